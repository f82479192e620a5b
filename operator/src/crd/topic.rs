//! `Topic`.

use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use super::{ClusterRef, DeletionPolicy, PolicySpec, ResourceStatus};

/// A topic.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "geminga.io",
    version = "v1alpha1",
    kind = "Topic",
    namespaced,
    status = "ResourceStatus",
    shortname = "gtopic",
    category = "geminga",
    doc = "A topic of a Geminga cluster. One that exists is adopted; one that is removed behind this object's back is created again.",
    derive = "PartialEq",
    printcolumn(name = "Topic", type_ = "string", json_path = ".status.serverName"),
    printcolumn(name = "Segments", type_ = "integer", json_path = ".spec.segments")
)]
#[x_kube(
    validation = Rule::new(super::NAME_STAYS).message("the name on the server cannot be changed"),
    validation = Rule::new("!has(self.segments) || !has(oldSelf.segments) || self.segments == oldSelf.segments").message("the number of segments is chosen when the topic is created")
)]
#[serde(rename_all = "camelCase")]
pub struct TopicSpec {
    /// The cluster it belongs to. It cannot be changed.
    #[x_kube(validation = Rule::new("self == oldSelf").message("it cannot move to another cluster"))]
    pub cluster_ref: ClusterRef,
    /// The namespace on the server, tenant/namespace. It cannot be changed.
    #[serde(default = "public_default")]
    #[schemars(
        length(min = 3, max = 401),
        regex(pattern = r"^[A-Za-z0-9._~-]+/[A-Za-z0-9._~-]+$")
    )]
    #[x_kube(validation = Rule::new("self == oldSelf").message("it cannot move to another namespace"))]
    pub namespace: String,
    /// Its name on the server; absent: that of this object. It cannot be changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 200), regex(pattern = r"^[A-Za-z0-9._~-]+$"))]
    pub name: Option<String>,
    /// Segments of a topic that is created; absent: one, and a topic that exists is adopted with as many as it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub segments: Option<i32>,
    /// Policies of the topic's level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("!has(self.topicsMax)").message("topicsMax is a policy of namespaces, not of a topic"))]
    pub policies: Option<PolicySpec>,
    /// What the deletion of this object does on the server. Retain keeps the topic with its messages and subscriptions.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
}

pub(super) fn public_default() -> String {
    "public/default".into()
}
