//! The seam to a Geminga cluster: what controllers ask of it, typed. [`Clients`] is the real form; tests script their own.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use geminga_client::{
    Admin, Client, Error, Reason as ServerReason, RetryPolicy, Start, SubscriptionSettings,
    SubscriptionType,
};
use geminga_proto::admin::v1 as pb;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::{
    crd::{PolicyValues, StartAt, SubscriptionKind, on_the_wire, own_values},
    thing::{Found, Settings, Thing},
};

/// Why a call gave nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServerError {
    /// Nobody answered, or not now: the same call may succeed later. A change may have happened.
    #[error("{0}")]
    Unreachable(String),
    /// The server refused; nothing happened.
    #[error("{}: {message}", reason.as_str())]
    Refused {
        /// Why.
        reason: ServerReason,
        /// The case in words.
        message: String,
    },
}

impl From<Error> for ServerError {
    fn from(error: Error) -> Self {
        match error {
            Error::Refused(refused) if !passes(refused.reason) => {
                Self::Refused { reason: refused.reason, message: refused.message }
            }
            error => Self::Unreachable(error.to_string()),
        }
    }
}

/// Refusals that come from the state of the moment, not from what was asked.
fn passes(reason: ServerReason) -> bool {
    matches!(
        reason,
        ServerReason::MetadataUnavailable
            | ServerReason::SegmentLoading
            | ServerReason::NotOwner
            | ServerReason::SegmentFenced
            | ServerReason::Busy
            | ServerReason::ShuttingDown
            | ServerReason::DeadlineExceeded
            | ServerReason::Internal
    )
}

/// The cluster as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClusterFacts {
    /// The id in the cluster's record.
    pub id: String,
    /// Ledgers that lack copies.
    pub under_replicated: u64,
    /// Incarnations of bookies that were declared lost.
    pub lost: u32,
    /// Every bookie that has a cookie or is registered.
    pub bookies: Vec<BookieFacts>,
}

/// A bookie, as the cluster knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BookieFacts {
    /// Its id: the name of its pod.
    pub id: String,
    /// It holds its lease.
    pub registered: bool,
    /// It cannot vouch for all of its entries.
    pub limbo: bool,
    /// It is to give its ledgers away.
    pub draining: bool,
    /// How far that is.
    pub drain: Option<DrainFacts>,
}

/// How far a drain is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DrainFacts {
    /// Bytes still to be moved.
    pub bytes_left: u64,
    /// Ledgers that still name it.
    pub ledgers_left: u64,
    /// What keeps it; empty: nothing does.
    pub blocked: String,
    /// No ledger names it, by full scans (DC1).
    pub proven: bool,
}

/// One cluster. Every call ends within the timeout it was made with.
#[async_trait]
pub trait Server: Send + Sync {
    /// The cluster and its bookies.
    async fn cluster(&self) -> Result<ClusterFacts, ServerError>;
    /// Asks that a bookie's ledgers are moved away for good, or takes that back (DC1).
    async fn drain_bookie(&self, id: &str, cancel: bool) -> Result<(), ServerError>;
    /// What has the name of a thing.
    async fn find(&self, thing: &Thing) -> Result<Option<Found>, ServerError>;
    /// Creates it. Idempotent for equal parameters.
    async fn create(&self, thing: &Thing) -> Result<(), ServerError>;
    /// Changes what can be changed.
    async fn update(&self, thing: &Thing) -> Result<(), ServerError>;
    /// Deletes it with everything in it; one that is gone is no error.
    async fn delete(&self, thing: &Thing) -> Result<(), ServerError>;
    /// What a level has set.
    async fn policies(&self, scope: &str) -> Result<PolicyValues, ServerError>;
    /// Sets and un-sets fields of a level.
    async fn set_policies(
        &self,
        scope: &str,
        set: &PolicyValues,
        unset: &[String],
    ) -> Result<(), ServerError>;
}

/// How a server is reached.
#[async_trait]
pub trait Servers: Send + Sync {
    /// A handle to the cluster behind these addresses, `http://host:port` each, separated by commas. Nothing is connected.
    ///
    /// # Errors
    /// An address that is none.
    async fn connect(&self, addresses: &str) -> Result<Arc<dyn Server>, ServerError>;
}

/// Shared handle to the way to servers.
pub type SharedServers = Arc<dyn Servers>;

/// Most clusters whose connections are kept; beyond it, all are made anew.
const CLIENTS_MAX: usize = 256;

/// Real servers by the SDK; connections of one address are shared.
#[derive(Debug)]
pub struct Clients {
    timeout: Duration,
    known: Mutex<BTreeMap<String, Client>>,
}

impl Clients {
    /// Every call ends within `timeout`.
    #[must_use]
    pub fn new(timeout: Duration) -> Self {
        Self { timeout, known: Mutex::default() }
    }
}

#[async_trait]
impl Servers for Clients {
    async fn connect(&self, addresses: &str) -> Result<Arc<dyn Server>, ServerError> {
        let known = self.known.lock().get(addresses).cloned();
        let client = match known {
            Some(client) => client,
            None => {
                let builder = Client::builder().server(addresses).open_timeout(self.timeout);
                let client = builder.build().await?;
                let mut known = self.known.lock();
                if known.len() >= CLIENTS_MAX {
                    known.clear();
                }
                known.insert(addresses.to_owned(), client.clone());
                client
            }
        };
        Ok(Arc::new(AdminServer(client.admin(), client)))
    }
}

/// An admin handle, and the client that keeps its connections.
struct AdminServer(Admin, #[expect(dead_code, reason = "held for its connections")] Client);

#[async_trait]
impl Server for AdminServer {
    async fn cluster(&self) -> Result<ClusterFacts, ServerError> {
        let cluster = self.0.cluster().await?;
        let bookies = self.0.bookies().await?.into_iter().map(facts).collect();
        Ok(ClusterFacts {
            id: cluster.id,
            under_replicated: cluster.ledgers_under_replicated,
            lost: cluster.incarnations_lost,
            bookies,
        })
    }

    async fn drain_bookie(&self, id: &str, cancel: bool) -> Result<(), ServerError> {
        self.0.drain_bookie(id, cancel).await?;
        Ok(())
    }

    async fn find(&self, thing: &Thing) -> Result<Option<Found>, ServerError> {
        let found = match thing {
            Thing::Tenant { name } => self.0.tenant(name).await.map(|_| Found::Tenant),
            Thing::Namespace { name, .. } => self
                .0
                .namespace(name)
                .await
                .map(|found| Found::Namespace { auto_create_topics: found.auto_create_topics }),
            Thing::Topic { name, .. } => self.0.topic(name).await.map(|found| {
                let segments = found.layout.map_or(0, |layout| layout.segments.len());
                Found::Topic { segments: u32::try_from(segments).unwrap_or(u32::MAX) }
            }),
            Thing::Subscription { topic, name, .. } => self
                .0
                .subscription(topic, name)
                .await
                .map(|found| Found::Subscription(from_wire(found.settings.unwrap_or_default()))),
        };
        match found {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.reason().is_some_and(is_not_found) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn create(&self, thing: &Thing) -> Result<(), ServerError> {
        match thing {
            Thing::Tenant { name } => self.0.create_tenant(name).await.map(drop),
            Thing::Namespace { name, auto_create_topics } => {
                self.0.create_namespace(name, *auto_create_topics).await.map(drop)
            }
            Thing::Topic { name, segments } => {
                self.0.create_topic(name, segments.unwrap_or_default()).await.map(drop)
            }
            Thing::Subscription { topic, name, start, settings } => {
                let start = match start {
                    StartAt::Earliest => Start::Earliest,
                    StartAt::Latest => Start::Latest,
                };
                let settings = Some(to_wire(settings));
                self.0.create_subscription_as(topic, name, start, settings).await.map(drop)
            }
        }
        .map_err(ServerError::from)
    }

    async fn update(&self, thing: &Thing) -> Result<(), ServerError> {
        if let Thing::Subscription { topic, name, settings, .. } = thing {
            self.0.update_subscription(topic, name, to_wire(settings)).await?;
        }
        Ok(())
    }

    async fn delete(&self, thing: &Thing) -> Result<(), ServerError> {
        let done = match thing {
            Thing::Tenant { name } => self.0.delete_tenant(name).await,
            Thing::Namespace { name, .. } => self.0.delete_namespace(name).await,
            Thing::Topic { name, .. } => self.0.delete_topic(name).await,
            Thing::Subscription { topic, name, .. } => {
                self.0.delete_subscription(topic, name).await
            }
        };
        match done {
            Err(error) if !error.reason().is_some_and(is_not_found) => Err(error.into()),
            _ => Ok(()),
        }
    }

    async fn policies(&self, scope: &str) -> Result<PolicyValues, ServerError> {
        let answer = self.0.policies(scope).await?;
        Ok(own_values(&answer.own.unwrap_or_default()))
    }

    async fn set_policies(
        &self,
        scope: &str,
        set: &PolicyValues,
        unset: &[String],
    ) -> Result<(), ServerError> {
        self.0.set_policies(scope, on_the_wire(set), unset.to_vec()).await?;
        Ok(())
    }
}

fn is_not_found(reason: ServerReason) -> bool {
    matches!(
        reason,
        ServerReason::TenantNotFound
            | ServerReason::NamespaceNotFound
            | ServerReason::TopicNotFound
            | ServerReason::SubscriptionNotFound
    )
}

fn facts(bookie: pb::Bookie) -> BookieFacts {
    BookieFacts {
        id: bookie.id,
        registered: bookie.registered,
        limbo: bookie.limbo,
        draining: bookie.draining || bookie.drain.is_some(),
        drain: bookie.drain.map(|drain| DrainFacts {
            bytes_left: drain.bytes_left,
            ledgers_left: drain.ledgers_left,
            blocked: drain.blocked,
            proven: drain.proven,
        }),
    }
}

fn to_wire(settings: &Settings) -> SubscriptionSettings {
    let kind = match settings.kind {
        SubscriptionKind::Exclusive => SubscriptionType::Exclusive,
        SubscriptionKind::Failover => SubscriptionType::Failover,
        SubscriptionKind::Shared => SubscriptionType::Shared,
        SubscriptionKind::KeyShared => SubscriptionType::KeyShared,
    };
    SubscriptionSettings {
        r#type: kind.into(),
        retry: Some(RetryPolicy {
            attempts_max: settings.attempts_max,
            backoff_ms: settings.backoff_ms,
            backoff_ms_max: settings.backoff_ms_max,
            dead_letter_topic: settings.dead_letter_topic.clone(),
        }),
        lease_ms: settings.lease_ms,
    }
}

fn from_wire(settings: SubscriptionSettings) -> Settings {
    let kind = match settings.r#type() {
        SubscriptionType::Failover => SubscriptionKind::Failover,
        SubscriptionType::Shared => SubscriptionKind::Shared,
        SubscriptionType::KeyShared => SubscriptionKind::KeyShared,
        SubscriptionType::Exclusive | SubscriptionType::Unspecified => SubscriptionKind::Exclusive,
    };
    let retry = settings.retry.unwrap_or_default();
    Settings {
        kind,
        attempts_max: retry.attempts_max,
        backoff_ms: retry.backoff_ms,
        backoff_ms_max: retry.backoff_ms_max,
        dead_letter_topic: retry.dead_letter_topic,
        lease_ms: settings.lease_ms,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_the_same_after_the_wire() {
        for kind in [
            SubscriptionKind::Exclusive,
            SubscriptionKind::Failover,
            SubscriptionKind::Shared,
            SubscriptionKind::KeyShared,
        ] {
            let settings = Settings {
                kind,
                attempts_max: 5,
                backoff_ms: 1_000,
                backoff_ms_max: 60_000,
                dead_letter_topic: "public/default/dead".into(),
                lease_ms: 30_000,
            };
            assert_eq!(from_wire(to_wire(&settings)), settings);
        }
    }

    #[test]
    fn a_refusal_of_the_moment_is_no_refusal_of_the_request() {
        let of = |reason| ServerError::from(Error::refused(reason, "words"));
        assert!(matches!(of(ServerReason::MetadataUnavailable), ServerError::Unreachable(_)));
        assert!(matches!(of(ServerReason::NotEmpty), ServerError::Refused { .. }));
        assert!(matches!(of(ServerReason::NotEnoughBookies), ServerError::Refused { .. }));
    }
}
