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

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceColumnDefinition, CustomResourceDefinition,
};
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
    let mut all = vec![
        GemingaCluster::crd(),
        BookiePool::crd(),
        GemingaConnection::crd(),
        Tenant::crd(),
        TopicNamespace::crd(),
        Topic::crd(),
        Subscription::crd(),
    ];
    for version in all.iter_mut().flat_map(|crd| &mut crd.spec.versions) {
        version.additional_printer_columns.get_or_insert_default().extend(common_columns());
    }
    all
}

/// Columns of `kubectl get` that every kind has behind its own.
fn common_columns() -> [CustomResourceColumnDefinition; 3] {
    let ready = |field: &str| format!(".status.conditions[?(@.type==\"Ready\")].{field}");
    let column = |name: &str, type_: &str, json_path: String| CustomResourceColumnDefinition {
        name: name.into(),
        type_: type_.into(),
        json_path,
        ..CustomResourceColumnDefinition::default()
    };
    [
        column("Ready", "string", ready("status")),
        column("Reason", "string", ready("reason")),
        column("Age", "date", ".metadata.creationTimestamp".into()),
    ]
}
