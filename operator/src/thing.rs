//! What the four server kinds describe, apart from Kubernetes: a tenant, a namespace, a topic, a subscription.

use std::fmt;

use geminga_proto::names::{NameError, NamespaceName, SubscriptionName, TenantName, TopicName};
use kube::ResourceExt;
use serde::{Deserialize, Serialize};

use crate::crd::{
    ClusterRef, DeletionPolicy, PolicySpec, PolicyValues, ResourceStatus, StartAt, Subscription,
    SubscriptionKind, Tenant, Topic, TopicNamespace,
};

/// The longest pause between deliveries where a subscription names none.
const BACKOFF_MS_MAX: u64 = 600_000;
/// The lease of a delivered message where a subscription names none.
const LEASE_MS: u64 = 300_000;

/// What should be on the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Thing {
    /// A tenant.
    Tenant {
        /// Its name.
        name: TenantName,
    },
    /// A namespace.
    Namespace {
        /// Its full name.
        name: NamespaceName,
        /// None: as the server does.
        auto_create_topics: Option<bool>,
    },
    /// A topic.
    Topic {
        /// Its full name.
        name: TopicName,
        /// None: as many as it has, one for a new topic.
        segments: Option<u32>,
    },
    /// A subscription.
    Subscription {
        /// Its topic.
        topic: TopicName,
        /// Its name.
        name: SubscriptionName,
        /// Where a new one begins.
        start: StartAt,
        /// Type, retry policy and lease.
        settings: Settings,
    },
}

/// Attributes of a subscription, zeros where the server's defaults hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Settings {
    /// Who gets a message.
    pub kind: SubscriptionKind,
    /// Deliveries before the dead-letter topic.
    pub attempts_max: u32,
    /// Pause before the second delivery.
    pub backoff_ms: u64,
    /// The longest pause.
    pub backoff_ms_max: u64,
    /// Full name; empty: the topic's own.
    pub dead_letter_topic: String,
    /// How long a delivered message belongs to its consumer.
    pub lease_ms: u64,
}

impl Settings {
    /// With the server's defaults filled in, as it stores and shows them.
    fn stored(&self) -> Self {
        let or = |value: u64, default: u64| if value == 0 { default } else { value };
        Self {
            backoff_ms_max: or(self.backoff_ms_max, BACKOFF_MS_MAX.max(self.backoff_ms)),
            lease_ms: or(self.lease_ms, LEASE_MS),
            ..self.clone()
        }
    }
}

/// What is on the server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Found {
    /// A tenant.
    Tenant,
    /// A namespace.
    #[serde(rename_all = "camelCase")]
    Namespace {
        /// Whether a missing topic is created on first use.
        auto_create_topics: bool,
    },
    /// A topic.
    Topic {
        /// As many segments.
        segments: u32,
    },
    /// A subscription.
    Subscription(Settings),
}

/// How what is there compares with what should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Compared {
    Same,
    /// It differs in what can be changed.
    Changed,
    /// It differs in what cannot be changed: how.
    Conflict(String),
}

impl Thing {
    /// In a word.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Tenant { .. } => "tenant",
            Self::Namespace { .. } => "namespace",
            Self::Topic { .. } => "topic",
            Self::Subscription { .. } => "subscription",
        }
    }

    /// Its full name; of a subscription `TOPIC SUBSCRIPTION`, as the command line takes it.
    #[must_use]
    pub fn full_name(&self) -> String {
        match self {
            Self::Tenant { name } => name.to_string(),
            Self::Namespace { name, .. } => name.to_string(),
            Self::Topic { name, .. } => name.to_string(),
            Self::Subscription { topic, name, .. } => format!("{topic} {name}"),
        }
    }

    /// Where its policies are set; a subscription has none.
    #[must_use]
    pub fn policy_scope(&self) -> Option<String> {
        match self {
            Self::Subscription { .. } => None,
            thing => Some(thing.full_name()),
        }
    }

    pub(crate) fn compare(&self, found: &Found) -> Compared {
        match (self, found) {
            (Self::Tenant { .. }, Found::Tenant) => Compared::Same,
            (
                Self::Namespace { auto_create_topics: wanted, .. },
                Found::Namespace { auto_create_topics: found },
            ) => match wanted {
                Some(wanted) if wanted != found => Compared::Conflict(format!(
                    "it exists with autoCreateTopics {found}, which cannot be changed"
                )),
                _ => Compared::Same,
            },
            (Self::Topic { segments: wanted, .. }, Found::Topic { segments: found }) => {
                match wanted {
                    Some(wanted) if wanted != found => Compared::Conflict(format!(
                        "it exists with {found} segments, which cannot be changed: leave spec.segments out to adopt it"
                    )),
                    _ => Compared::Same,
                }
            }
            (Self::Subscription { settings: wanted, .. }, Found::Subscription(found)) => {
                if wanted.kind != found.kind {
                    Compared::Conflict(format!(
                        "it exists with type {:?}, which cannot be changed",
                        found.kind
                    ))
                } else if wanted.stored() == found.stored() {
                    Compared::Same
                } else {
                    Compared::Changed
                }
            }
            (thing, found) => {
                Compared::Conflict(format!("expected a {}, found {found:?}", thing.kind()))
            }
        }
    }
}

impl fmt::Display for Thing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind(), self.full_name())
    }
}

/// What an object of the four kinds asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// What should be there.
    pub thing: Thing,
    /// Policies of its level.
    pub policies: PolicyValues,
    /// What the object's deletion does.
    pub deletion: DeletionPolicy,
}

/// An object of the four kinds.
pub trait Described:
    kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
    + Clone
    + fmt::Debug
    + serde::de::DeserializeOwned
    + Serialize
    + Send
    + Sync
    + 'static
{
    /// What it asks for.
    ///
    /// # Errors
    /// A name that is not allowed: what the schema lets through and the server would refuse.
    fn wish(&self) -> Result<Wish, NameError>;
    /// The cluster it names.
    fn cluster_ref(&self) -> &ClusterRef;
    /// What was last known.
    fn status(&self) -> ResourceStatus;
}

fn values(policies: Option<&PolicySpec>) -> PolicyValues {
    policies.map(PolicySpec::values).unwrap_or_default()
}

impl Described for Tenant {
    fn wish(&self) -> Result<Wish, NameError> {
        let name = self.spec.name.clone().unwrap_or_else(|| self.name_any());
        Ok(Wish {
            thing: Thing::Tenant { name: TenantName::parse(&name)? },
            policies: values(self.spec.policies.as_ref()),
            deletion: self.spec.deletion_policy,
        })
    }

    fn cluster_ref(&self) -> &ClusterRef {
        &self.spec.cluster_ref
    }

    fn status(&self) -> ResourceStatus {
        self.status.clone().unwrap_or_default()
    }
}

impl Described for TopicNamespace {
    fn wish(&self) -> Result<Wish, NameError> {
        let name = self.spec.name.clone().unwrap_or_else(|| self.name_any());
        let name = NamespaceName::parse(&format!("{}/{name}", self.spec.tenant))?;
        Ok(Wish {
            thing: Thing::Namespace { name, auto_create_topics: self.spec.auto_create_topics },
            policies: values(self.spec.policies.as_ref()),
            deletion: self.spec.deletion_policy,
        })
    }

    fn cluster_ref(&self) -> &ClusterRef {
        &self.spec.cluster_ref
    }

    fn status(&self) -> ResourceStatus {
        self.status.clone().unwrap_or_default()
    }
}

impl Described for Topic {
    fn wish(&self) -> Result<Wish, NameError> {
        let name = self.spec.name.clone().unwrap_or_else(|| self.name_any());
        let name = TopicName::parse(&format!("{}/{name}", self.spec.namespace))?;
        let segments = self.spec.segments.and_then(|segments| u32::try_from(segments).ok());
        Ok(Wish {
            thing: Thing::Topic { name, segments },
            policies: values(self.spec.policies.as_ref()),
            deletion: self.spec.deletion_policy,
        })
    }

    fn cluster_ref(&self) -> &ClusterRef {
        &self.spec.cluster_ref
    }

    fn status(&self) -> ResourceStatus {
        self.status.clone().unwrap_or_default()
    }
}

impl Described for Subscription {
    fn wish(&self) -> Result<Wish, NameError> {
        let spec = &self.spec;
        let name = spec.name.clone().unwrap_or_else(|| self.name_any());
        // The schema keeps these from being negative.
        let unsigned = |value: i64| u64::try_from(value).unwrap_or_default();
        let settings = Settings {
            kind: spec.type_,
            attempts_max: u32::try_from(spec.attempts_max).unwrap_or_default(),
            backoff_ms: unsigned(spec.backoff_ms),
            backoff_ms_max: unsigned(spec.backoff_max_ms),
            dead_letter_topic: spec.dead_letter_topic.clone().unwrap_or_default(),
            lease_ms: unsigned(spec.lease_ms),
        };
        Ok(Wish {
            thing: Thing::Subscription {
                topic: TopicName::parse(&spec.topic)?,
                name: SubscriptionName::parse(&name)?,
                start: spec.start,
                settings,
            },
            policies: PolicyValues::new(),
            deletion: spec.deletion_policy,
        })
    }

    fn cluster_ref(&self) -> &ClusterRef {
        &self.spec.cluster_ref
    }

    fn status(&self) -> ResourceStatus {
        self.status.clone().unwrap_or_default()
    }
}
