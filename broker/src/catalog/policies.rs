//! Policies: of the cluster, of a tenant, of a namespace, of a topic. A field that a level does not set is taken from the
//! level above; above the cluster stands what is built in. The levels of one answer are read at one revision.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use geminga_metadata::{Compare, Key, KeyValue, Op, Revision, TXN_OPS_MAX, Txn, keys};
use geminga_proto::{
    ids::TopicId,
    names::{NamespaceName, TenantName, TopicName},
    policies::{FIELDS, Field},
    reason::Reason,
    storage::v1::{NamespaceValue, TenantValue, TopicValue},
    v1::{BacklogAction, Policies},
};
use prost::Message;

use super::{Catalog, Record, TRIES_MAX, Topic, contended, put, topics::topic_not_found};
use crate::errors::Refusal;

/// What holds where nobody set a field. One that is absent here too is no rule at all: nothing is offloaded for it, and no
/// retention is in force (which is not a retention of zero). Of counts the broker's own limits hold then.
pub const BUILT_IN: Policies = Policies {
    offload_after_ms: None,
    offload_above_bytes: None,
    delete_lag_ms: Some(DELETE_LAG_MS),
    retention_ms: None,
    retention_bytes: None,
    ttl_ms: None,
    backlog_quota_bytes: None,
    backlog_quota_ms: None,
    backlog_action: Some(BacklogAction::Reject as i32),
    publish_messages_per_s: None,
    publish_bytes_per_s: None,
    deliver_messages_per_s: None,
    deliver_bytes_per_s: None,
    producers_max: None,
    consumers_max: None,
    subscriptions_max: None,
    topics_max: None,
    compact_after_bytes: None,
};

/// From an upload to the deletion on bookies (X3).
const DELETE_LAG_MS: u64 = 4 * 3_600 * 1_000;

/// Where policies are set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    Cluster,
    Tenant(TenantName),
    Namespace(NamespaceName),
    Topic(TopicName),
}

/// What holds at a scope.
#[derive(Clone, Debug, PartialEq)]
pub struct Effective {
    /// Set at the scope itself.
    pub own: Policies,
    /// Every field that is set at some level, or built in.
    pub policies: Policies,
    /// From which level each field comes, in the order of [`FIELDS`]: cluster, tenant, namespace, topic or default.
    pub sources: Vec<(&'static str, &'static str)>,
}

/// What some level sets: field by field the nearest one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SetPolicies {
    pub policies: Policies,
    /// As in [`Effective`].
    pub sources: Vec<(&'static str, &'static str)>,
    /// Segments of the topic, which share its rates; 0: they are not of a topic.
    pub segments: u32,
}

/// The most of something, and who says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    pub most: u64,
    /// topic, namespace, tenant, cluster; `server` where it is the broker's own.
    pub level: &'static str,
}

impl Limit {
    /// The broker's own.
    #[must_use]
    pub fn of_server(most: usize) -> Self {
        Self { most: u64::try_from(most).unwrap_or(u64::MAX), level: "server" }
    }

    /// It is reached: the refusal carries the limit under its name, and the level that set it.
    #[must_use]
    pub fn reached(self, reason: Reason, name: &'static str, message: &str) -> Refusal {
        let Self { most, level } = self;
        let message = format!("{message}, as many as it may: {name} is {most} (set by: {level})");
        Refusal::new(reason, message).with(name, most).with("level", level)
    }
}

impl SetPolicies {
    /// The limit under this name, if some level sets it.
    #[must_use]
    pub fn limit(&self, name: &str) -> Option<Limit> {
        let field = FIELDS.iter().find(|field| field.name == name)?;
        let (_, level) = self.sources.iter().find(|(of, _)| *of == name)?;
        Some(Limit { most: (field.get)(&self.policies)?, level })
    }
}

impl Scope {
    /// Empty, tenant, tenant/namespace, or tenant/namespace/topic.
    ///
    /// # Errors
    /// INVALID_NAME.
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        Ok(match text.matches('/').count() {
            0 if text.is_empty() => Self::Cluster,
            0 => Self::Tenant(TenantName::parse(text)?),
            2 => Self::Topic(TopicName::parse(text)?),
            _ => Self::Namespace(NamespaceName::parse(text)?),
        })
    }
}

/// A change of policies, checked.
#[derive(Clone, Debug)]
pub struct PolicyChange {
    set: Policies,
    unset: Vec<Field>,
}

impl PolicyChange {
    /// Checks bounds and names.
    ///
    /// # Errors
    /// INVALID_REQUEST naming the field: out of bounds, unknown, both set and unset; or nothing is changed.
    pub fn new(set: Policies, unset: &[String]) -> Result<Self, Refusal> {
        let mut fields = Vec::new();
        for name in unset {
            let field = FIELDS.iter().find(|field| field.name == name);
            let field = field.ok_or_else(|| Refusal::request(format!("no policy {name:?}")))?;
            if (field.get)(&set).is_some() {
                return Err(Refusal::request(format!("{name} is both set and unset")));
            }
            fields.push(*field);
        }
        for field in FIELDS {
            let most = field.value_max;
            if let Some(value) = (field.get)(&set)
                && value > most
            {
                let message = format!("{} is {value}, at most {most} is allowed", field.name);
                return Err(Refusal::request(message).with("value_max", most));
            }
        }
        if fields.is_empty() && set == Policies::default() {
            return Err(Refusal::request("nothing is set or unset"));
        }
        Ok(Self { set, unset: fields })
    }

    fn apply(&self, own: &Policies) -> Policies {
        let mut changed = *own;
        for field in FIELDS {
            if let Some(value) = (field.get)(&self.set) {
                (field.set)(&mut changed, Some(value));
            }
        }
        self.unset.iter().for_each(|field| (field.set)(&mut changed, None));
        changed
    }
}

/// Lays levels, the nearest first, over what is below them all.
fn laid_over(
    mut policies: Policies,
    levels: &[(&'static str, Policies)],
) -> (Policies, Vec<(&'static str, &'static str)>) {
    let mut sources = Vec::new();
    for field in FIELDS {
        let found = levels.iter().find_map(|(name, own)| Some((*name, (field.get)(own)?)));
        if let Some((_, value)) = found {
            (field.set)(&mut policies, Some(value));
        }
        sources.push((field.name, found.map_or("default", |(name, _)| name)));
    }
    (policies, sources)
}

/// Topics that [`Catalog::set_policies_of`] takes at a time.
pub(crate) const TOPICS_PER_READ: usize = (TXN_OPS_MAX - 1) / 3;

impl Catalog {
    /// What the levels above each of these topics, and it itself, set: field by field the nearest one. None where the topic is
    /// deleted, and where a value cannot be read: then nothing may be trimmed or moved. At most [`TOPICS_PER_READ`].
    ///
    /// All levels are read at one revision: a policy that is moved from one level to another is never missed in between.
    ///
    /// # Errors
    /// What the store answers.
    pub(crate) async fn set_policies_of(
        &self,
        topics: &[(TopicId, TopicName)],
    ) -> Result<Vec<Option<SetPolicies>>, Refusal> {
        let namespaces: BTreeSet<&NamespaceName> =
            topics.iter().map(|(_, name)| name.namespace()).collect();
        let tenants: BTreeSet<&TenantName> = namespaces.iter().map(|name| name.tenant()).collect();
        let mut keys = vec![keys::cluster_policies()];
        keys.extend(topics.iter().map(|(id, _)| keys::topic(*id)));
        keys.extend(namespaces.iter().map(|name| keys::namespace(name)));
        keys.extend(tenants.iter().map(|name| keys::tenant(name)));
        let (_, found) = self.store().get_many(&keys).await?;
        let cluster = match found.first() {
            Some(Some(found)) => decode(&found.key, found.value.clone())?,
            _ => Policies::default(),
        };
        let (of_topics, above) = found[1..].split_at(topics.len());
        let (of_namespaces, of_tenants) = above.split_at(namespaces.len());
        let namespaces: BTreeMap<&NamespaceName, &Option<KeyValue>> =
            namespaces.into_iter().zip(of_namespaces).collect();
        let tenants: BTreeMap<&TenantName, &Option<KeyValue>> =
            tenants.into_iter().zip(of_tenants).collect();
        let set = |name: &TopicName, topic: &Option<KeyValue>| {
            let topic = TopicValue::decode_value(topic.as_ref()?).ok()?;
            let namespace = namespaces.get(name.namespace())?.as_ref()?;
            let namespace = NamespaceValue::decode_value(namespace).ok()?;
            let tenant = tenants.get(name.namespace().tenant())?.as_ref()?;
            let tenant = TenantValue::decode_value(tenant).ok()?;
            let levels = [
                ("topic", topic.policies.unwrap_or_default()),
                ("namespace", namespace.policies.unwrap_or_default()),
                ("tenant", tenant.policies.unwrap_or_default()),
                ("cluster", cluster),
            ];
            let (policies, sources) = laid_over(Policies::default(), &levels);
            let segments = u32::try_from(topic.segments.len()).unwrap_or(u32::MAX);
            (!topic.deleting).then_some(SetPolicies { policies, sources, segments })
        };
        Ok(topics.iter().zip(of_topics).map(|((_, name), topic)| set(name, topic)).collect())
    }

    /// What is set for a topic.
    ///
    /// # Errors
    /// TOPIC_NOT_FOUND when it is gone.
    pub(crate) async fn set_policies(&self, topic: &Topic) -> Result<SetPolicies, Refusal> {
        let mut set = self.set_policies_of(&[(topic.id, topic.name.clone())]).await?;
        set.pop().flatten().ok_or_else(|| topic_not_found(&topic.name))
    }

    /// What is set for the topics of a namespace.
    ///
    /// # Errors
    /// NAMESPACE_NOT_FOUND, TENANT_NOT_FOUND.
    pub(crate) async fn set_policies_in(
        &self,
        namespace: &NamespaceName,
    ) -> Result<SetPolicies, Refusal> {
        let levels = self.levels(&Scope::Namespace(namespace.clone())).await?;
        let (policies, sources) = laid_over(Policies::default(), &levels);
        Ok(SetPolicies { policies, sources, segments: 0 })
    }

    /// What holds at a scope.
    ///
    /// # Errors
    /// NAMESPACE_NOT_FOUND, TOPIC_NOT_FOUND, TENANT_NOT_FOUND.
    pub async fn policies(&self, scope: &Scope) -> Result<Effective, Refusal> {
        let levels = self.levels(scope).await?;
        let (policies, sources) = laid_over(BUILT_IN, &levels);
        Ok(Effective { own: levels[0].1, policies, sources })
    }

    /// What each level sets, the scope's own first, at one revision.
    async fn levels(&self, scope: &Scope) -> Result<Vec<(&'static str, Policies)>, Refusal> {
        let (topic, namespace) = match scope {
            Scope::Cluster | Scope::Tenant(_) => (None, None),
            Scope::Namespace(name) => (None, Some(name)),
            Scope::Topic(name) => {
                (Some((name, self.topic(name).await?.id)), Some(name.namespace()))
            }
        };
        let tenant = match scope {
            Scope::Tenant(name) => Some(name),
            _ => namespace.map(NamespaceName::tenant),
        };
        let mut keys = vec![keys::cluster_policies()];
        keys.extend(tenant.map(keys::tenant));
        keys.extend(namespace.map(keys::namespace));
        keys.extend(topic.map(|(_, id)| keys::topic(id)));
        let (_, found) = self.store().get_many(&keys).await?;
        let mut found = found.into_iter();
        let cluster = match found.next().flatten() {
            Some(found) => decode(&found.key, found.value)?,
            None => Policies::default(),
        };
        let mut levels = vec![("cluster", cluster)];
        if let Some(name) = tenant {
            let Some(found) = found.next().flatten() else {
                self.tenant(name).await?; // gives the right refusal
                return Err(contended("the tenant"));
            };
            levels
                .push(("tenant", TenantValue::decode_value(&found)?.policies.unwrap_or_default()));
        }
        if let Some(name) = namespace {
            let Some(found) = found.next().flatten() else {
                self.namespace(name).await?;
                return Err(contended("the namespace"));
            };
            let value = NamespaceValue::decode_value(&found)?;
            levels.push(("namespace", value.policies.unwrap_or_default()));
        }
        if let Some((name, _)) = topic {
            let found = found.next().flatten().ok_or_else(|| topic_not_found(name))?;
            levels.push(("topic", TopicValue::decode_value(&found)?.policies.unwrap_or_default()));
        }
        levels.reverse();
        Ok(levels)
    }

    /// Changes the policies of a scope.
    ///
    /// # Errors
    /// As [`Self::policies`]; INVALID_REQUEST for a policy that a topic cannot have.
    pub async fn change_policies(
        &self,
        scope: &Scope,
        change: &PolicyChange,
    ) -> Result<(), Refusal> {
        if matches!(scope, Scope::Topic(_)) && change.set.topics_max.is_some() {
            let message = "topics_max is set for a namespace, a tenant or the cluster";
            return Err(Refusal::request(message));
        }
        for _ in 0..TRIES_MAX {
            let (key, revision, op) = match scope {
                Scope::Cluster => {
                    let (own, revision) = self.cluster_policies().await?;
                    let key = keys::cluster_policies();
                    let value = change.apply(&own).encode_to_vec();
                    (key.clone(), revision, Op::put(key, value))
                }
                Scope::Tenant(name) => {
                    self.tenant(name).await?; // gives the right refusal
                    let key = keys::tenant(name);
                    let Some((mut value, revision)) = self.get::<TenantValue>(&key).await? else {
                        continue;
                    };
                    value.policies = Some(change.apply(&value.policies.unwrap_or_default()));
                    (key.clone(), Some(revision), put(key, &value))
                }
                Scope::Namespace(name) => {
                    self.namespace(name).await?; // gives the right refusal
                    let key = keys::namespace(name);
                    let Some((mut value, revision)) = self.get::<NamespaceValue>(&key).await?
                    else {
                        continue;
                    };
                    value.policies = Some(change.apply(&value.policies.unwrap_or_default()));
                    (key.clone(), Some(revision), put(key, &value))
                }
                Scope::Topic(name) => {
                    let key = keys::topic(self.topic(name).await?.id);
                    let Some((mut value, revision)) = self.get::<TopicValue>(&key).await? else {
                        continue;
                    };
                    if value.deleting {
                        return Err(topic_not_found(name));
                    }
                    value.policies = Some(change.apply(&value.policies.unwrap_or_default()));
                    (key.clone(), Some(revision), put(key, &value))
                }
            };
            if self.commit(&Txn::new().when(as_read(key, revision)).then(op)).await? {
                return Ok(());
            }
        }
        Err(contended("the policies"))
    }

    async fn cluster_policies(&self) -> Result<(Policies, Option<Revision>), Refusal> {
        let key = keys::cluster_policies();
        let (_, found) = self.store().get(&key).await?;
        let Some(found) = found else { return Ok((Policies::default(), None)) };
        Ok((decode(&key, found.value)?, Some(found.mod_revision)))
    }
}

fn decode(key: &Key, value: Bytes) -> Result<Policies, Refusal> {
    Policies::decode(value)
        .map_err(|error| Refusal::internal(format!("{key} cannot be read: {error}")))
}

fn as_read(key: Key, revision: Option<Revision>) -> Compare {
    match revision {
        Some(revision) => Compare::ModRevision(key, revision),
        None => Compare::Absent(key),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retention(ms: u64) -> Policies {
        Policies { retention_ms: Some(ms), ..Policies::default() }
    }

    #[test]
    fn the_nearest_level_decides_field_by_field() {
        let topic = Policies { retention_ms: Some(1), ..Policies::default() };
        let cluster =
            Policies { retention_ms: Some(2), retention_bytes: Some(3), ..Policies::default() };
        let tenant = Policies { ttl_ms: Some(4), ..Policies::default() };
        let cluster = Policies { ttl_ms: Some(5), ..cluster };
        let levels = [
            ("topic", topic),
            ("namespace", Policies::default()),
            ("tenant", tenant),
            ("cluster", cluster),
        ];
        let (policies, sources) = laid_over(BUILT_IN, &levels);
        assert_eq!(policies.ttl_ms, Some(4));
        assert!(sources.contains(&("ttl_ms", "tenant")));
        assert_eq!((policies.retention_ms, policies.retention_bytes), (Some(1), Some(3)));
        assert_eq!(policies.delete_lag_ms, BUILT_IN.delete_lag_ms);
        assert!(sources.contains(&("retention_ms", "topic")));
        assert!(sources.contains(&("retention_bytes", "cluster")));
        assert!(sources.contains(&("delete_lag_ms", "default")));
        assert!(sources.contains(&("offload_after_ms", "default")));
        assert_eq!(policies.offload_after_ms, None, "no such rule");
        let nothing = [("cluster", Policies::default())];
        assert_eq!(laid_over(BUILT_IN, &nothing).0, BUILT_IN);
    }

    #[test]
    fn a_change_sets_and_unsets_what_it_names_and_keeps_the_rest() {
        let own = Policies { retention_bytes: Some(7), ..retention(5) };
        let set = PolicyChange::new(retention(6), &["retention_bytes".into()]).expect("valid");
        assert_eq!(set.apply(&own), retention(6));
        for (set, unset) in [
            (retention(u64::MAX), None),
            (retention(1), Some("retention_ms")),
            (Policies::default(), Some("colour")),
            (Policies::default(), None),
        ] {
            let unset: Vec<String> = unset.into_iter().map(Into::into).collect();
            PolicyChange::new(set, &unset).expect_err("refused");
        }
    }
}
