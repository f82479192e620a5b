//! `BookiePool`: bookies of one kind with volumes of their own.

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Condition, Resources};

/// Bookies of one kind: a StatefulSet with a volume each.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "geminga.io",
    version = "v1alpha1",
    kind = "BookiePool",
    namespaced,
    status = "BookiePoolStatus",
    shortname = "bp",
    category = "geminga",
    doc = "Bookies of one kind of a GemingaCluster, with a volume each. Fewer replicas drain bookies before their volumes go.",
    derive = "PartialEq",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Cluster", type_ = "string", json_path = ".spec.cluster"),
    printcolumn(name = "Desired", type_ = "integer", json_path = ".spec.replicas", description = "Bookies asked for"),
    printcolumn(name = "Bookies", type_ = "integer", json_path = ".status.ready", description = "Bookies that serve"),
    printcolumn(name = "Zone", type_ = "string", json_path = ".spec.zone", priority = 1),
    validation = Rule::new("size(self.metadata.name) <= 40").message("a pool's name has at most 40 characters")
)]
#[serde(rename_all = "camelCase")]
pub struct BookiePoolSpec {
    /// The GemingaCluster of the same namespace that these bookies belong to. It cannot be changed.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("a pool cannot move to another cluster"))]
    pub cluster: String,
    /// How many. Fewer: the bookies with the highest ordinals are drained, one at a time, and go when it is proven that no
    /// ledger names them; more again before that takes a drain back.
    #[serde(default = "three")]
    #[schemars(range(min = 0, max = 1_000))]
    pub replicas: i32,
    /// Failure domain of these bookies: copies are spread over zones first. Empty: none is known.
    #[serde(default)]
    #[schemars(length(max = 200), regex(pattern = r"^[A-Za-z0-9._~-]*$"))]
    pub zone: String,
    /// The volume of each.
    pub storage: StorageSpec,
    /// Requests and limits of each.
    #[serde(default)]
    pub resources: Resources,
    /// Labels of nodes that bookies may run on.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
}

fn three() -> i32 {
    3
}

/// The volume of each bookie.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("quantity(self.size).compareTo(quantity(oldSelf.size)) >= 0").message("volumes grow, they never shrink"),
    validation = Rule::new("has(self.storageClass) == has(oldSelf.storageClass) && (!has(self.storageClass) || self.storageClass == oldSelf.storageClass)")
        .message("the storage class of a pool cannot be changed: make another pool")
)]
pub struct StorageSpec {
    /// Size of each volume, such as 100Gi. It may grow where the storage class allows that; it never shrinks.
    #[schemars(
        length(min = 1, max = 32),
        regex(pattern = r"^[0-9]+(\.[0-9]+)?(k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$")
    )]
    pub size: String,
    /// Storage class; absent: the default one. It cannot be changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub storage_class: Option<String>,
}

/// What is known of a pool.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BookiePoolStatus {
    /// The generation of the spec that this status is about.
    #[serde(default)]
    pub observed_generation: i64,
    /// Bookies there are, those being drained among them.
    #[serde(default)]
    pub replicas: i32,
    /// Bookies whose pod is ready.
    #[serde(default)]
    pub ready: i32,
    /// Bookies of the present template.
    #[serde(default)]
    pub updated: i32,
    /// The image that every bookie of the pool runs; empty while they differ, or one is missing or not ready.
    #[serde(default)]
    pub image: String,
    /// Labels that select the pods.
    #[serde(default)]
    pub selector: String,
    /// The cluster that these bookies joined. A server of another one proves nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_id: Option<String>,
    /// Bookies that the operator drains, from before the server is asked until their volumes are gone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["bookie"]))]
    pub drains: Vec<DrainNote>,
    /// With geminga.io/dry-run: what would be done, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub plan: Vec<String>,
    /// Ready, Reconciling and Stalled.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// A drain that the operator asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DrainNote {
    /// The bookie's id: the name of its pod.
    pub bookie: String,
    /// It is proven that no ledger names it. From here on there is no way back: the pod goes, then its volume.
    #[serde(default)]
    pub proven: bool,
    /// Bytes that are still to be moved, as last seen.
    #[serde(default)]
    pub bytes_left: i64,
    /// Ledgers that still name it, as last seen.
    #[serde(default)]
    pub ledgers_left: i64,
    /// What keeps it, as the server says; empty: nothing does.
    #[serde(default)]
    pub blocked: String,
}
