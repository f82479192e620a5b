//! `Tenant`.

use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use super::{ClusterRef, DeletionPolicy, PolicySpec, ResourceStatus};

/// A tenant of a cluster.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "geminga.io",
    version = "v1alpha1",
    kind = "Tenant",
    namespaced,
    status = "ResourceStatus",
    shortname = "gtenant",
    category = "geminga",
    doc = "A tenant of a Geminga cluster.",
    derive = "PartialEq",
    printcolumn(name = "Tenant", type_ = "string", json_path = ".status.serverName")
)]
#[x_kube(
    validation = Rule::new(super::NAME_STAYS).message("the name on the server cannot be changed")
)]
#[serde(rename_all = "camelCase")]
pub struct TenantSpec {
    /// The cluster it belongs to. It cannot be changed.
    #[x_kube(validation = Rule::new("self == oldSelf").message("it cannot move to another cluster"))]
    pub cluster_ref: ClusterRef,
    /// Its name on the server; absent: that of this object. It cannot be changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 200), regex(pattern = r"^[A-Za-z0-9._~-]+$"))]
    pub name: Option<String>,
    /// Policies of the tenant's level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policies: Option<PolicySpec>,
    /// What the deletion of this object does on the server. A tenant that is not empty is never deleted.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
}
