//! The custom resources of `geminga.io/v1alpha1`. `cargo crds` writes their definitions into the operator's chart.
//!
//! A field stands here only if something acts on it. Defaults are in the schema, so that `kubectl get -o yaml` shows what
//! holds. Numbers carry their unit at the end of their name.

#![allow(unreachable_pub, reason = "the schema derive repeats each struct where nobody reaches it")]
#![allow(clippy::duplicated_attributes, reason = "printer columns share their types")]

mod cluster;
mod conditions;
mod connection;
mod namespace;
mod policies;
mod pool;
mod reference;
mod subscription;
mod tenant;
mod topic;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;

pub use cluster::{
    BrokerSpec, BrokerStatus, EtcdSpec, GemingaCluster, GemingaClusterSpec, GemingaClusterStatus,
    LedgerSpec, ServiceSpec, ServiceType, TieringSpec,
};
pub use conditions::{Condition, ConditionStatus, ConditionType, Reason, StatusReport};
pub use connection::{GemingaConnection, GemingaConnectionSpec, GemingaConnectionStatus};
pub use namespace::{TopicNamespace, TopicNamespaceSpec};
pub use policies::{BacklogActionSpec, PolicySpec, PolicyValues};
pub(crate) use policies::{on_the_wire, own_values};
pub use pool::{BookiePool, BookiePoolSpec, BookiePoolStatus, DrainNote, StorageSpec};
pub use reference::{
    ClusterKind, ClusterRef, DeletionPolicy, PullPolicy, ResourceStatus, Resources,
};
pub use subscription::{StartAt, Subscription, SubscriptionKind, SubscriptionSpec};
pub use tenant::{Tenant, TenantSpec};
pub use topic::{Topic, TopicSpec};

/// The rule of every kind whose object may have another name on the server.
const NAME_STAYS: &str =
    "has(self.name) == has(oldSelf.name) && (!has(self.name) || self.name == oldSelf.name)";

/// The API group of every resource, and the prefix of our annotations and labels.
pub const GROUP: &str = "geminga.io";
/// Set to `"true"`: the object is left alone, its status says so.
pub const PAUSED: &str = "geminga.io/paused";
/// Set to `"true"`: what would be done goes to `status.plan`, nothing is done.
pub const DRY_RUN: &str = "geminga.io/dry-run";
/// Present only where the deletion of the object deletes something on the server. It always lets go.
pub const FINALIZER: &str = "geminga.io/server-object";

/// Every definition, in the order of the documentation.
#[must_use]
pub fn definitions() -> Vec<CustomResourceDefinition> {
    vec![
        GemingaCluster::crd(),
        BookiePool::crd(),
        GemingaConnection::crd(),
        Tenant::crd(),
        TopicNamespace::crd(),
        Topic::crd(),
        Subscription::crd(),
    ]
}
