//! `TopicNamespace`.

use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use super::{ClusterRef, DeletionPolicy, PolicySpec, ResourceStatus};

/// A namespace of topics.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "geminga.io",
    version = "v1alpha1",
    kind = "TopicNamespace",
    namespaced,
    status = "ResourceStatus",
    shortname = "gns",
    category = "geminga",
    doc = "A namespace of topics of a Geminga cluster.",
    derive = "PartialEq",
    printcolumn(name = "Namespace", type_ = "string", json_path = ".status.serverName")
)]
#[x_kube(
    validation = Rule::new(super::NAME_STAYS).message("the name on the server cannot be changed"),
    validation = Rule::new("has(self.autoCreateTopics) == has(oldSelf.autoCreateTopics) && (!has(self.autoCreateTopics) || self.autoCreateTopics == oldSelf.autoCreateTopics)")
        .message("autoCreateTopics is chosen when the namespace is created")
)]
#[serde(rename_all = "camelCase")]
pub struct TopicNamespaceSpec {
    /// The cluster it belongs to. It cannot be changed.
    #[x_kube(validation = Rule::new("self == oldSelf").message("it cannot move to another cluster"))]
    pub cluster_ref: ClusterRef,
    /// The tenant on the server. It cannot be changed.
    #[schemars(length(min = 1, max = 200), regex(pattern = r"^[A-Za-z0-9._~-]+$"))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("it cannot move to another tenant"))]
    pub tenant: String,
    /// Its name on the server; absent: that of this object. It cannot be changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 200), regex(pattern = r"^[A-Za-z0-9._~-]+$"))]
    pub name: Option<String>,
    /// Whether a missing topic is created on first use; absent: as the cluster does. It cannot be changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_create_topics: Option<bool>,
    /// Policies of the namespace's level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policies: Option<PolicySpec>,
    /// What the deletion of this object does on the server. A namespace that is not empty is never deleted.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
}
