//! What all controllers share, and how an error becomes what a status says.

use std::{sync::Arc, time::Duration};

use geminga_client::Reason as ServerReason;
use geminga_runtime::clock::SharedClock;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder},
};

use crate::{
    crd::{ClusterKind, ClusterRef, GemingaCluster, GemingaConnection, Reason, StatusReport},
    kubernetes::Namespace,
    metrics::Metrics,
    server::{Server, ServerError, SharedServers},
};

/// How soon something that is under way is looked at again, where no event comes first.
pub(crate) const SOON: Duration = Duration::from_secs(5);

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
    /// Events.
    pub recorder: Recorder,
    /// Figures.
    pub metrics: Metrics,
    /// How often everything is compared with its spec, without any event.
    pub resync: Duration,
}

/// Why a reconciliation broke off.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The Kubernetes API.
    #[error("the Kubernetes API: {0}")]
    Kubernetes(#[from] Box<kube::Error>),
    /// The Geminga server.
    #[error("the server: {0}")]
    Server(#[from] ServerError),
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
            note: Some(note.chars().take(1_000).collect()),
            action: "Reconcile".into(),
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

    #[test]
    fn a_server_that_does_not_answer_says_nothing_about_readiness() {
        let silent = Error::from(ServerError::Unreachable("timed out".into())).report();
        assert_eq!(silent.ready, ConditionStatus::Unknown);
        assert!(silent.reconciling);
    }
}
