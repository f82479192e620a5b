//! The seam to a Geminga cluster: what controllers ask of it, typed. [`Clients`] is the real form; tests script their own.

use std::{collections::BTreeMap, future::Future, sync::Arc, time::Duration};

use async_trait::async_trait;
use geminga_client::{
    Admin, Client, Error, Reason as ServerReason, RetryPolicy, Start, SubscriptionSettings,
    SubscriptionType,
};
use geminga_proto::admin::v1 as pb;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::{
    crd::{PolicyValues, StartAt, SubscriptionKind, on_the_wire, own_values},
    metrics::Metrics,
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
/// While a cluster does not answer, one call in so long finds out whether it is back; all others are told at once what that
/// one heard, so that a thousand objects of a silent cluster keep nobody's worker.
const SILENCE: Duration = Duration::from_secs(5);

/// Real servers by the SDK; connections of one address are shared.
#[derive(Debug)]
pub struct Clients {
    timeout: Duration,
    metrics: Metrics,
    known: Mutex<BTreeMap<String, Arc<Line>>>,
}

impl Clients {
    /// Every call ends within `timeout`.
    #[must_use]
    pub fn new(timeout: Duration, metrics: Metrics) -> Self {
        Self { timeout, metrics, known: Mutex::default() }
    }
}

#[async_trait]
impl Servers for Clients {
    async fn connect(&self, addresses: &str) -> Result<Arc<dyn Server>, ServerError> {
        if let Some(line) = self.known.lock().get(addresses) {
            return Ok(Arc::new(AdminServer(Arc::clone(line))));
        }
        let builder = Client::builder().server(addresses).open_timeout(self.timeout);
        let client = builder.build().await?;
        let line = Arc::new(Line {
            admin: client.admin(),
            _client: client,
            silent: Silent::default(),
            metrics: self.metrics.clone(),
        });
        let mut known = self.known.lock();
        if known.len() >= CLIENTS_MAX {
            known.clear();
        }
        known.insert(addresses.to_owned(), Arc::clone(&line));
        Ok(Arc::new(AdminServer(line)))
    }
}

/// What is shared of the way to one cluster.
#[derive(Debug)]
struct Line {
    admin: Admin,
    /// Held for its connections.
    _client: Client,
    silent: Silent,
    metrics: Metrics,
}

/// Until when nobody asks, and what was heard last; none: it answers, as far as we know.
#[derive(Debug, Default)]
struct Silent(Mutex<Option<(Instant, String)>>);

impl Silent {
    /// Leave to ask, or what the one who asked last was told.
    fn ask(&self, now: Instant) -> Result<(), String> {
        match &mut *self.0.lock() {
            Some((until, why)) if now < *until => Err(why.clone()),
            Some((until, _)) => {
                *until = now + SILENCE;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// What came of it; a refusal is an answer.
    fn heard<T>(&self, outcome: &Result<T, Error>, now: Instant) {
        *self.0.lock() = match outcome {
            Ok(_) | Err(Error::Refused(_)) => None,
            Err(error) => Some((now + SILENCE, error.to_string())),
        };
    }
}

struct AdminServer(Arc<Line>);

impl AdminServer {
    fn admin(&self) -> &Admin {
        &self.0.admin
    }

    async fn call<T>(&self, call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let Line { silent, metrics, .. } = &*self.0;
        silent.ask(Instant::now()).map_err(Error::Unavailable)?;
        let outcome = call.await;
        silent.heard(&outcome, Instant::now());
        match &outcome {
            Err(Error::Refused(refused)) if !is_not_found(refused.reason) => {
                metrics.on_server_call_failed(refused.reason.as_str());
            }
            Ok(_) | Err(Error::Refused(_)) => {}
            Err(_) => metrics.on_server_call_failed("UNREACHABLE"),
        }
        outcome
    }
}

#[async_trait]
impl Server for AdminServer {
    async fn cluster(&self) -> Result<ClusterFacts, ServerError> {
        let cluster = self.call(self.admin().cluster()).await?;
        let bookies = self.call(self.admin().bookies()).await?.into_iter().map(facts).collect();
        Ok(ClusterFacts {
            id: cluster.id,
            under_replicated: cluster.ledgers_under_replicated,
            lost: cluster.incarnations_lost,
            bookies,
        })
    }

    async fn drain_bookie(&self, id: &str, cancel: bool) -> Result<(), ServerError> {
        self.call(self.admin().drain_bookie(id, cancel)).await?;
        Ok(())
    }

    async fn find(&self, thing: &Thing) -> Result<Option<Found>, ServerError> {
        match self.call(self.look_for(thing)).await {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.reason().is_some_and(is_not_found) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn create(&self, thing: &Thing) -> Result<(), ServerError> {
        Ok(self.call(self.make(thing)).await?)
    }

    async fn update(&self, thing: &Thing) -> Result<(), ServerError> {
        if let Thing::Subscription { topic, name, settings, .. } = thing {
            self.call(self.admin().update_subscription(topic, name, to_wire(settings))).await?;
        }
        Ok(())
    }

    async fn delete(&self, thing: &Thing) -> Result<(), ServerError> {
        match self.call(self.remove(thing)).await {
            Err(error) if !error.reason().is_some_and(is_not_found) => Err(error.into()),
            _ => Ok(()),
        }
    }

    async fn policies(&self, scope: &str) -> Result<PolicyValues, ServerError> {
        let answer = self.call(self.admin().policies(scope)).await?;
        Ok(own_values(&answer.own.unwrap_or_default()))
    }

    async fn set_policies(
        &self,
        scope: &str,
        set: &PolicyValues,
        unset: &[String],
    ) -> Result<(), ServerError> {
        self.call(self.admin().set_policies(scope, on_the_wire(set), unset.to_vec())).await?;
        Ok(())
    }
}

impl AdminServer {
    async fn look_for(&self, thing: &Thing) -> Result<Found, Error> {
        let admin = self.admin();
        Ok(match thing {
            Thing::Tenant { name } => admin.tenant(name).await.map(|_| Found::Tenant)?,
            Thing::Namespace { name, .. } => {
                let found = admin.namespace(name).await?;
                Found::Namespace { auto_create_topics: found.auto_create_topics }
            }
            Thing::Topic { name, .. } => {
                let found = admin.topic(name).await?;
                let segments = found.layout.map_or(0, |layout| layout.segments.len());
                Found::Topic { segments: u32::try_from(segments).unwrap_or(u32::MAX) }
            }
            Thing::Subscription { topic, name, .. } => {
                let found = admin.subscription(topic, name).await?;
                Found::Subscription(from_wire(found.settings.unwrap_or_default()))
            }
        })
    }

    async fn make(&self, thing: &Thing) -> Result<(), Error> {
        let admin = self.admin();
        match thing {
            Thing::Tenant { name } => admin.create_tenant(name).await.map(drop),
            Thing::Namespace { name, auto_create_topics } => {
                admin.create_namespace(name, *auto_create_topics).await.map(drop)
            }
            Thing::Topic { name, segments } => {
                admin.create_topic(name, segments.unwrap_or_default()).await.map(drop)
            }
            Thing::Subscription { topic, name, start, settings } => {
                let start = match start {
                    StartAt::Earliest => Start::Earliest,
                    StartAt::Latest => Start::Latest,
                };
                let settings = Some(to_wire(settings));
                admin.create_subscription_as(topic, name, start, settings).await.map(drop)
            }
        }
    }

    async fn remove(&self, thing: &Thing) -> Result<(), Error> {
        let admin = self.admin();
        match thing {
            Thing::Tenant { name } => admin.delete_tenant(name).await,
            Thing::Namespace { name, .. } => admin.delete_namespace(name).await,
            Thing::Topic { name, .. } => admin.delete_topic(name).await,
            Thing::Subscription { topic, name, .. } => admin.delete_subscription(topic, name).await,
        }
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
    fn one_call_at_a_time_asks_a_silent_server_and_an_answer_of_any_kind_ends_the_silence() {
        let silent = Silent::default();
        let start = Instant::now();
        let gone = Err::<(), _>(Error::Unavailable("refused".into()));
        let refused = Err::<(), _>(Error::refused(ServerReason::Busy, "later"));
        let told = Err(gone.as_ref().expect_err("an error").to_string());
        assert_eq!(silent.ask(start), Ok(()));
        silent.heard(&gone, start);
        assert_eq!(silent.ask(start), told, "nobody asks again at once");
        let later = start + SILENCE;
        assert_eq!(silent.ask(later), Ok(()), "one finds out");
        assert_eq!(silent.ask(later), told, "the others are told");
        silent.heard(&refused, later);
        assert_eq!(silent.ask(later), Ok(()), "a refusal is an answer");
    }

    #[test]
    fn a_refusal_of_the_moment_is_no_refusal_of_the_request() {
        let of = |reason| ServerError::from(Error::refused(reason, "words"));
        assert!(matches!(of(ServerReason::MetadataUnavailable), ServerError::Unreachable(_)));
        assert!(matches!(of(ServerReason::NotEmpty), ServerError::Refused { .. }));
        assert!(matches!(of(ServerReason::NotEnoughBookies), ServerError::Refused { .. }));
    }
}
