//! What all controllers share, and how an error becomes what a status says.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use geminga_client::Reason as ServerReason;
use geminga_runtime::{clock::SharedClock, random::Random};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder},
};
use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;

use crate::{
    crd::{ClusterKind, ClusterRef, GemingaCluster, GemingaConnection, Reason, StatusReport},
    kubernetes::Namespace,
    metrics::Metrics,
    server::{Server, ServerError, SharedServers},
};

/// How soon something that is under way is looked at again, where no event comes first.
pub(crate) const SOON: Duration = Duration::from_secs(5);
/// Pause after a turn that broke off.
pub(crate) const RETRY: Duration = Duration::from_secs(5);
/// Longest word of an Event that tells one step from another, as the API has it.
const ACTION_MAX: usize = 128;

/// Where the brokers of a cluster are: namespace and name to an address.
pub type Address = Arc<dyn Fn(&str, &str) -> String + Send + Sync>;

/// What controllers work with.
#[derive(Clone)]
pub struct Context {
    /// The Kubernetes API.
    pub client: Client,
    /// The way to Geminga clusters.
    pub servers: SharedServers,
    /// Where a GemingaCluster's brokers are.
    pub address: Address,
    /// Wall time.
    pub clock: SharedClock,
    /// Chance.
    pub random: Random,
    /// Who works at what nobody else may work at meanwhile.
    pub turns: Turns,
    /// Events.
    pub recorder: Recorder,
    /// Figures.
    pub metrics: Metrics,
    /// How often everything is compared with its spec, without any event.
    pub resync: Duration,
}

/// Turns that exclude each other, by a name of what they work at.
#[derive(Clone, Debug, Default)]
pub struct Turns(Arc<Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<()>>>>>);

impl Turns {
    /// Waits until nobody else works at it; it is ours until the guard goes. Cancel-safe.
    pub(crate) async fn begin(&self, what: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.0.lock();
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(locks.entry(what.to_owned()).or_default())
        };
        lock.lock_owned().await
    }
}

/// Why a reconciliation broke off.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The Kubernetes API.
    #[error("the Kubernetes API: {}", words(.0))]
    Kubernetes(#[from] Box<kube::Error>),
    /// The Geminga server.
    #[error("the server: {0}")]
    Server(#[from] ServerError),
}

/// The API server's own words, without the answer that they came in.
fn words(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        error => error.to_string(),
    }
}

impl From<kube::Error> for Error {
    fn from(error: kube::Error) -> Self {
        Self::Kubernetes(Box::new(error))
    }
}

impl Error {
    /// What a status says of it.
    #[must_use]
    pub fn report(&self) -> StatusReport {
        let words = self.to_string();
        match self {
            Self::Server(ServerError::Unreachable(_)) => {
                StatusReport::unknown(Reason::ServerUnreachable, words)
            }
            Self::Server(ServerError::Refused { reason, .. }) => match reason {
                ServerReason::TenantNotFound
                | ServerReason::NamespaceNotFound
                | ServerReason::TopicNotFound => {
                    StatusReport::working(false, Reason::ParentNotFound, words)
                }
                ServerReason::NotEmpty => StatusReport::stalled(false, Reason::NotEmpty, words),
                ServerReason::AlreadyExists => {
                    StatusReport::stalled(false, Reason::Conflict, words)
                }
                // More bookies may come.
                ServerReason::NotEnoughBookies => {
                    StatusReport::working(true, Reason::DrainBlocked, words)
                }
                _ => StatusReport::stalled(false, Reason::ServerRefused, words),
            },
            Self::Kubernetes(error) => match &**error {
                kube::Error::Api(status) if status.is_forbidden() || status.is_invalid() => {
                    StatusReport::stalled(false, Reason::ApiRefused, words)
                }
                _ => StatusReport::working(false, Reason::ApiRefused, words),
            },
        }
    }
}

/// A cluster that an object names.
pub(crate) enum Reached {
    /// It is not there, or is being deleted.
    Gone,
    /// Its address is of no use.
    Silent(String),
    /// A handle; nobody was asked yet.
    Server(Arc<dyn Server>),
}

impl Context {
    /// The cluster that an object of this namespace names.
    pub(crate) async fn reach(
        &self,
        namespace: &str,
        cluster: &ClusterRef,
    ) -> Result<Reached, Error> {
        let kubernetes = Namespace::new(&self.client, namespace);
        let address = match cluster.kind {
            ClusterKind::GemingaCluster => {
                let found = kubernetes.get::<GemingaCluster>(&cluster.name).await?;
                let found = found.filter(|found| found.metadata.deletion_timestamp.is_none());
                found.map(|_| (self.address)(namespace, &cluster.name))
            }
            ClusterKind::GemingaConnection => {
                let found = kubernetes.get::<GemingaConnection>(&cluster.name).await?;
                let found = found.filter(|found| found.metadata.deletion_timestamp.is_none());
                found.map(|found| found.spec.servers.join(","))
            }
        };
        let Some(address) = address else { return Ok(Reached::Gone) };
        Ok(match self.servers.connect(&address).await {
            Ok(server) => Reached::Server(server),
            Err(error) => Reached::Silent(error.to_string()),
        })
    }

    /// Tells what was done, or what keeps it; an Event that cannot be written is logged and forgotten.
    pub(crate) async fn tell(
        &self,
        about: &ObjectReference,
        type_: EventType,
        reason: Reason,
        note: String,
    ) {
        let event = Event {
            type_,
            reason: format!("{reason:?}"),
            // Events of one reason and action are counted as one, whatever their notes say.
            action: note.chars().take(ACTION_MAX).collect(),
            note: Some(note.chars().take(1_000).collect()),
            secondary: None,
        };
        if let Err(error) = self.recorder.publish(&event, about).await {
            tracing::debug!(%error, "event not written");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crd::ConditionStatus;

    fn refused(reason: ServerReason) -> StatusReport {
        Error::from(ServerError::Refused { reason, message: "words".into() }).report()
    }

    #[test]
    fn a_missing_parent_is_waited_for_and_a_conflict_is_not() {
        let parent = refused(ServerReason::NamespaceNotFound);
        assert!(parent.reconciling && !parent.stalled);
        assert_eq!(parent.reason, Reason::ParentNotFound);
        let conflict = refused(ServerReason::AlreadyExists);
        assert!(conflict.stalled && !conflict.reconciling);
        assert_eq!(conflict.reason, Reason::Conflict);
    }

    #[tokio::test]
    async fn turns_at_one_thing_follow_each_other_and_others_go_on() {
        let turns = Turns::default();
        let first = turns.begin("a").await;
        let mut second = std::pin::pin!(turns.begin("a"));
        assert!(futures::poll!(&mut second).is_pending(), "somebody works at it");
        drop(turns.begin("b").await);
        assert!(futures::poll!(&mut second).is_pending(), "the lock of a busy thing is kept");
        drop(first);
        drop(second.await);
        drop(turns.begin("c").await);
        assert_eq!(turns.0.lock().len(), 1, "nothing is kept of what nobody works at");
    }

    #[test]
    fn a_server_that_does_not_answer_says_nothing_about_readiness() {
        let silent = Error::from(ServerError::Unreachable("timed out".into())).report();
        assert_eq!(silent.ready, ConditionStatus::Unknown);
        assert!(silent.reconciling);
    }
}
