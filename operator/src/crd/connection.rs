//! `GemingaConnection`: a cluster that this operator does not run.

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Condition;

/// How to reach a cluster outside Kubernetes, or of another operator.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "geminga.io",
    version = "v1alpha1",
    kind = "GemingaConnection",
    namespaced,
    status = "GemingaConnectionStatus",
    shortname = "gconn",
    category = "geminga",
    doc = "A Geminga cluster that this operator does not run: Tenants, TopicNamespaces, Topics and Subscriptions can name it.",
    derive = "PartialEq",
    printcolumn(name = "Cluster", type_ = "string", json_path = ".status.clusterId")
)]
#[serde(rename_all = "camelCase")]
pub struct GemingaConnectionSpec {
    /// Addresses of brokers, such as http://geminga.example:8650; any of them will do.
    #[schemars(length(min = 1, max = 16), inner(regex(pattern = r"^https?://[^\s,]+$")))]
    pub servers: Vec<String>,
}

/// What is known of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GemingaConnectionStatus {
    /// The generation of the spec that this status is about.
    #[serde(default)]
    pub observed_generation: i64,
    /// The id of the cluster that answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_id: Option<String>,
    /// Ready, Reconciling and Stalled.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}
