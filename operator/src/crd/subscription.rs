//! `Subscription`.

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ClusterRef, DeletionPolicy, ResourceStatus};

/// Who gets a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SubscriptionKind {
    /// One consumer a segment, in order; a second one is refused.
    #[default]
    Exclusive,
    /// One active consumer a segment, in order; the others stand by.
    Failover,
    /// Any consumer with credit; no order.
    Shared,
    /// As Shared, but each key in order.
    KeyShared,
}

/// Where a new subscription begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum StartAt {
    /// At the oldest message that is kept.
    Earliest,
    /// Behind the newest message.
    #[default]
    Latest,
}

/// A subscription of a topic.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "geminga.io",
    version = "v1alpha1",
    kind = "Subscription",
    namespaced,
    status = "ResourceStatus",
    shortname = "gsub",
    category = "geminga",
    doc = "A subscription of a topic of a Geminga cluster, with its retry policy.",
    derive = "PartialEq",
    printcolumn(name = "Subscription", type_ = "string", json_path = ".status.serverName"),
    printcolumn(name = "Type", type_ = "string", json_path = ".spec.type")
)]
#[x_kube(
    validation = Rule::new(super::NAME_STAYS).message("the name on the server cannot be changed"),
    validation = Rule::new("self.backoffMaxMs == 0 || self.backoffMaxMs >= self.backoffMs").message("backoffMaxMs is smaller than backoffMs")
)]
#[serde(rename_all = "camelCase")]
pub struct SubscriptionSpec {
    /// The cluster it belongs to. It cannot be changed.
    #[x_kube(validation = Rule::new("self == oldSelf").message("it cannot move to another cluster"))]
    pub cluster_ref: ClusterRef,
    /// The topic on the server, tenant/namespace/topic. It cannot be changed.
    #[schemars(
        length(min = 5, max = 602),
        regex(pattern = r"^[A-Za-z0-9._~-]+/[A-Za-z0-9._~-]+/[A-Za-z0-9._~-]+$")
    )]
    #[x_kube(validation = Rule::new("self == oldSelf").message("it cannot move to another topic"))]
    pub topic: String,
    /// Its name on the server; absent: that of this object. It cannot be changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 200), regex(pattern = r"^[A-Za-z0-9._~-]+$"))]
    pub name: Option<String>,
    /// Who gets a message. It cannot be changed.
    #[serde(default, rename = "type")]
    #[x_kube(validation = Rule::new("self == oldSelf").message("the type of a subscription cannot be changed"))]
    pub type_: SubscriptionKind,
    /// Where it begins when it is created. It cannot be changed.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("a subscription begins once; move it by geminga sub seek"))]
    pub start: StartAt,
    /// Deliveries of a message before it goes to the dead-letter topic; 0: no limit.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub attempts_max: i32,
    /// Pause before the second delivery, doubled for each further one; 0: none.
    #[serde(default)]
    #[schemars(range(min = 0, max = 604_800_000))]
    pub backoff_ms: i64,
    /// The longest pause; 0: ten minutes.
    #[serde(default)]
    #[schemars(range(min = 0, max = 604_800_000))]
    pub backoff_max_ms: i64,
    /// Where messages go that used up their attempts, tenant/namespace/topic; absent: the topic's own, SUBSCRIPTION~dlq.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 602),
        regex(pattern = r"^[A-Za-z0-9._~-]+/[A-Za-z0-9._~-]+/[A-Za-z0-9._~-]+$")
    )]
    pub dead_letter_topic: Option<String>,
    /// How long a delivered message belongs to its consumer unless it is extended; 0: five minutes.
    #[serde(default)]
    #[schemars(range(min = 0, max = 604_800_000))]
    pub lease_ms: i64,
    /// What the deletion of this object does on the server. Retain keeps the subscription with what it has not settled.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
}
