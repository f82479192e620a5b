//! Tenants and namespaces.

use geminga_metadata::{
    Compare, Op, Txn,
    keys::{self, ParsedKey},
};
use geminga_proto::{
    names::{NamespaceName, TenantName},
    reason::Reason,
    storage::v1::{NamespaceValue, TenantValue},
    v1::Policies,
};

use super::{
    Catalog, Listing, PageRequest, Record, TENANTS, TOPICS, TRIES_MAX, bad_token, contended, put,
    records::FORMAT,
};
use crate::errors::Refusal;

/// A tenant as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant {
    pub name: TenantName,
    pub created_at_ms: u64,
}

/// A namespace as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    pub name: NamespaceName,
    pub created_at_ms: u64,
    /// A missing topic is created on first use.
    pub auto_create_topics: bool,
    /// Set at the namespace itself.
    pub policies: Option<Policies>,
}

impl Catalog {
    /// Creates a tenant; an existing one is returned as it is.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn create_tenant(&self, name: &TenantName) -> Result<Tenant, Refusal> {
        let key = keys::tenant(name);
        for _ in 0..TRIES_MAX {
            if let Some((value, _)) = self.get::<TenantValue>(&key).await? {
                return Ok(Tenant { name: name.clone(), created_at_ms: value.created_at_ms });
            }
            let created_at_ms = self.clock.now().0;
            let (_, txn) = self.next_id(TENANTS).await?;
            let txn = txn.when(Compare::Absent(key.clone())).then(put(
                key.clone(),
                &TenantValue { format: FORMAT, created_at_ms, policies: None },
            ));
            if self.commit(&txn).await? {
                return Ok(Tenant { name: name.clone(), created_at_ms });
            }
        }
        Err(contended("the list of tenants"))
    }

    /// Reads a tenant.
    ///
    /// # Errors
    /// TENANT_NOT_FOUND.
    pub async fn tenant(&self, name: &TenantName) -> Result<Tenant, Refusal> {
        let found = self.get::<TenantValue>(&keys::tenant(name)).await?;
        let (value, _) = found.ok_or_else(|| tenant_not_found(name))?;
        Ok(Tenant { name: name.clone(), created_at_ms: value.created_at_ms })
    }

    /// How many namespaces a tenant has.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn namespace_count(&self, tenant: &TenantName) -> Result<usize, Refusal> {
        self.count(keys::namespaces_of(tenant)).await
    }

    /// One page of all tenants.
    ///
    /// # Errors
    /// INVALID_REQUEST for a foreign page token.
    pub async fn tenants(&self, page: &PageRequest) -> Result<Listing<Tenant>, Refusal> {
        let after = match page.token.as_str() {
            "" => None,
            token => Some(keys::tenant(&TenantName::parse(token).map_err(|_| bad_token())?)),
        };
        self.page(keys::tenants(), after, page.size, |found| {
            let Some(ParsedKey::Tenant(name)) = keys::parse(&found.key) else {
                return Err(Refusal::internal(format!("unexpected key {}", found.key)));
            };
            let created_at_ms = TenantValue::decode_value(found)?.created_at_ms;
            let token = name.to_string();
            Ok((Tenant { name, created_at_ms }, token))
        })
        .await
    }

    /// Deletes an empty tenant.
    ///
    /// # Errors
    /// TENANT_NOT_FOUND, NOT_EMPTY.
    pub async fn delete_tenant(&self, name: &TenantName) -> Result<(), Refusal> {
        let key = keys::tenant(name);
        for tries in 0..TRIES_MAX {
            let Some((_, revision)) = self.get::<TenantValue>(&key).await? else {
                // Found at first and gone now: it may have been our own transaction that was answered late.
                return if tries == 0 { Err(tenant_not_found(name)) } else { Ok(()) };
            };
            let unchanged = self.unchanged(TENANTS).await?;
            if !self.is_empty(keys::namespaces_of(name)).await? {
                let message = format!("tenant {name} still has namespaces");
                return Err(Refusal::new(Reason::NotEmpty, message));
            }
            let txn = Txn::new()
                .when(unchanged)
                .when(Compare::ModRevision(key.clone(), revision))
                .then(Op::Delete(key.clone()));
            if self.commit(&txn).await? {
                return Ok(());
            }
        }
        Err(contended("the list of tenants"))
    }

    /// Creates a namespace; an existing one with the same policy is returned as it is. `auto_create_topics` unset means
    /// off, or what an existing one has.
    ///
    /// # Errors
    /// TENANT_NOT_FOUND, ALREADY_EXISTS with another policy.
    pub async fn create_namespace(
        &self,
        name: &NamespaceName,
        auto_create_topics: Option<bool>,
    ) -> Result<Namespace, Refusal> {
        let key = keys::namespace(name);
        for _ in 0..TRIES_MAX {
            if let Some((value, _)) = self.get::<NamespaceValue>(&key).await? {
                if auto_create_topics.is_some_and(|wanted| wanted != value.auto_create_topics) {
                    let message = format!(
                        "namespace {name} exists with auto_create_topics = {}",
                        value.auto_create_topics
                    );
                    return Err(Refusal::new(Reason::AlreadyExists, message));
                }
                return Ok(Namespace::of(name, &value));
            }
            self.tenant(name.tenant()).await?;
            let value = NamespaceValue {
                format: FORMAT,
                created_at_ms: self.clock.now().0,
                auto_create_topics: auto_create_topics.unwrap_or(false),
                policies: None,
            };
            let (_, txn) = self.next_id(TENANTS).await?;
            let txn = txn
                .when(Compare::Absent(key.clone()))
                .when(Compare::Present(keys::tenant(name.tenant())))
                .then(put(key.clone(), &value));
            if self.commit(&txn).await? {
                return Ok(Namespace::of(name, &value));
            }
        }
        Err(contended("the list of namespaces"))
    }

    /// Reads a namespace.
    ///
    /// # Errors
    /// NAMESPACE_NOT_FOUND, or TENANT_NOT_FOUND when not even the tenant exists.
    pub async fn namespace(&self, name: &NamespaceName) -> Result<Namespace, Refusal> {
        match self.get::<NamespaceValue>(&keys::namespace(name)).await? {
            Some((value, _)) => Ok(Namespace::of(name, &value)),
            None => {
                self.tenant(name.tenant()).await?;
                let message = format!("namespace {name} does not exist");
                Err(Refusal::new(Reason::NamespaceNotFound, message))
            }
        }
    }

    /// How many topics a namespace has.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn topic_count(&self, namespace: &NamespaceName) -> Result<usize, Refusal> {
        self.count(keys::topic_names_of(namespace)).await
    }

    /// One page of a tenant's namespaces.
    ///
    /// # Errors
    /// TENANT_NOT_FOUND; INVALID_REQUEST for a foreign page token.
    pub async fn namespaces(
        &self,
        tenant: &TenantName,
        page: &PageRequest,
    ) -> Result<Listing<Namespace>, Refusal> {
        self.tenant(tenant).await?;
        let after = match page.token.as_str() {
            "" => None,
            token => {
                let name = NamespaceName::parse(token).map_err(|_| bad_token())?;
                if name.tenant() != tenant {
                    return Err(bad_token());
                }
                Some(keys::namespace(&name))
            }
        };
        self.page(keys::namespaces_of(tenant), after, page.size, |found| {
            let Some(ParsedKey::Namespace(name)) = keys::parse(&found.key) else {
                return Err(Refusal::internal(format!("unexpected key {}", found.key)));
            };
            Ok((Namespace::of(&name, &NamespaceValue::decode_value(found)?), name.to_string()))
        })
        .await
    }

    /// Deletes an empty namespace.
    ///
    /// # Errors
    /// NAMESPACE_NOT_FOUND, NOT_EMPTY.
    pub async fn delete_namespace(&self, name: &NamespaceName) -> Result<(), Refusal> {
        let key = keys::namespace(name);
        for tries in 0..TRIES_MAX {
            let Some((_, revision)) = self.get::<NamespaceValue>(&key).await? else {
                return if tries == 0 { self.namespace(name).await.map(drop) } else { Ok(()) };
            };
            let unchanged = self.unchanged(TOPICS).await?;
            if !self.is_empty(keys::topic_names_of(name)).await? {
                let message = format!("namespace {name} still has topics");
                return Err(Refusal::new(Reason::NotEmpty, message));
            }
            let txn = Txn::new()
                .when(unchanged)
                .when(Compare::ModRevision(key.clone(), revision))
                .then(Op::Delete(key.clone()));
            if self.commit(&txn).await? {
                return Ok(());
            }
        }
        Err(contended("the list of topics"))
    }
}

impl Namespace {
    fn of(name: &NamespaceName, value: &NamespaceValue) -> Self {
        Self {
            name: name.clone(),
            created_at_ms: value.created_at_ms,
            auto_create_topics: value.auto_create_topics,
            policies: value.policies,
        }
    }
}

fn tenant_not_found(name: &TenantName) -> Refusal {
    Refusal::new(Reason::TenantNotFound, format!("tenant {name} does not exist"))
}
