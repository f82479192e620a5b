//! `GemingaCluster`: brokers, where etcd is, and what holds for every bookie pool of the cluster.

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Condition, PolicySpec, PullPolicy, Resources};

/// A cluster: brokers under a Deployment; its bookies are BookiePools that name it.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "geminga.io",
    version = "v1alpha1",
    kind = "GemingaCluster",
    namespaced,
    status = "GemingaClusterStatus",
    shortname = "gc",
    category = "geminga",
    doc = "A Geminga cluster: its brokers, its metadata store and its defaults. BookiePools name it.",
    derive = "PartialEq",
    scale(
        spec_replicas_path = ".spec.brokers.replicas",
        status_replicas_path = ".status.brokers.replicas",
        label_selector_path = ".status.brokers.selector"
    ),
    printcolumn(name = "Brokers", type_ = "integer", json_path = ".status.brokers.ready", description = "Brokers that serve"),
    printcolumn(name = "Bookies", type_ = "integer", json_path = ".status.bookies", description = "Bookies that are registered"),
    printcolumn(name = "Image", type_ = "string", json_path = ".spec.image", priority = 1),
    validation = Rule::new("size(self.metadata.name) <= 40").message("a cluster's name has at most 40 characters")
)]
#[serde(rename_all = "camelCase")]
pub struct GemingaClusterSpec {
    /// The image of brokers and bookies. A change replaces bookies one at a time, then brokers.
    #[schemars(length(min = 1, max = 1_024))]
    pub image: String,
    /// When the image is pulled.
    #[serde(default)]
    pub image_pull_policy: PullPolicy,
    /// Secrets with the credentials of the image's registry.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10))]
    pub image_pull_secrets: Vec<String>,
    /// The metadata store.
    pub etcd: EtcdSpec,
    /// The brokers.
    #[serde(default)]
    pub brokers: BrokerSpec,
    /// How ledgers are spread and copied.
    #[serde(default)]
    pub ledgers: LedgerSpec,
    /// The Service that clients connect to.
    #[serde(default)]
    pub service: ServiceSpec,
    /// Object storage for cold data; absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tiering: Option<TieringSpec>,
    /// Policies of the cluster's level: what holds where no tenant, namespace or topic says otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policies: Option<PolicySpec>,
}

/// Where etcd is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.prefix == oldSelf.prefix").message("the prefix of a cluster's keys cannot be changed")
)]
pub struct EtcdSpec {
    /// Client URLs, such as http://etcd:2379.
    #[schemars(length(min = 1, max = 16), inner(regex(pattern = r"^https?://[^\s,]+$")))]
    pub endpoints: Vec<String>,
    /// Prefix of every key; empty: /geminga/NAMESPACE/NAME/. It cannot be changed.
    #[serde(default)]
    #[schemars(length(max = 512))]
    pub prefix: String,
    /// Secret with username and password for etcd.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_secret: Option<String>,
    /// Secret with ca.crt, and tls.crt and tls.key where etcd asks for a certificate. Makes the connection TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_secret: Option<String>,
}

/// The brokers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct BrokerSpec {
    /// How many. They keep nothing: any number may be added or taken away.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 1_000))]
    pub replicas: i32,
    /// Requests and limits of each.
    #[serde(default)]
    pub resources: Resources,
    /// Whether missing topics are created on first use where their namespace allows it.
    #[serde(default)]
    pub auto_create_topics: bool,
    /// Time after SIGTERM to hand topics over and to finish what was accepted.
    #[serde(default = "half_a_minute")]
    #[schemars(range(min = 1_000, max = 3_600_000))]
    pub drain_grace_ms: i64,
    /// Labels of nodes that brokers may run on.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
}

impl Default for BrokerSpec {
    fn default() -> Self {
        Self {
            replicas: one(),
            resources: Resources::default(),
            auto_create_topics: false,
            drain_grace_ms: half_a_minute(),
            node_selector: BTreeMap::new(),
        }
    }
}

fn one() -> i32 {
    1
}

fn half_a_minute() -> i64 {
    30_000
}

/// How new ledgers are spread and copied. A change holds for ledgers that are begun after it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.ensemble >= self.writeQuorum && self.writeQuorum >= self.ackQuorum")
        .message("ensemble >= writeQuorum >= ackQuorum must hold")
)]
pub struct LedgerSpec {
    /// Bookies that a ledger is spread over.
    #[serde(default = "three")]
    #[schemars(range(min = 2, max = 100))]
    pub ensemble: i32,
    /// Copies of each entry.
    #[serde(default = "three")]
    #[schemars(range(min = 2, max = 100))]
    pub write_quorum: i32,
    /// Synced copies before a receipt.
    #[serde(default = "two")]
    #[schemars(range(min = 2, max = 100))]
    pub ack_quorum: i32,
}

impl Default for LedgerSpec {
    fn default() -> Self {
        Self { ensemble: three(), write_quorum: three(), ack_quorum: two() }
    }
}

fn three() -> i32 {
    3
}

fn two() -> i32 {
    2
}

/// How clients reach the brokers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ServiceType {
    /// Inside the Kubernetes cluster.
    #[default]
    ClusterIP,
    /// On a port of every node.
    NodePort,
    /// Behind the cloud's load balancer.
    LoadBalancer,
}

/// The Service NAME-broker, port 8650.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSpec {
    /// ClusterIP, NodePort or LoadBalancer.
    #[serde(default, rename = "type")]
    pub type_: ServiceType,
    /// Annotations of the Service, for load balancers.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// Object storage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct TieringSpec {
    /// s3://bucket/prefix, gs://bucket/prefix or az://container/prefix.
    #[schemars(regex(pattern = r"^(s3|gs|az)://\S+$"), length(max = 1_024))]
    pub url: String,
    /// Secret whose keys become environment variables of the brokers: the provider's credentials and endpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_secret: Option<String>,
}

/// What is known of a cluster.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GemingaClusterStatus {
    /// The generation of the spec that this status is about.
    #[serde(default)]
    pub observed_generation: i64,
    /// The id in the cluster's record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_id: Option<String>,
    /// The brokers.
    #[serde(default)]
    pub brokers: BrokerStatus,
    /// Bookies that are registered, of all pools.
    #[serde(default)]
    pub bookies: i32,
    /// Ledgers that lack copies.
    #[serde(default)]
    pub under_replicated_ledgers: i64,
    /// Policies of the cluster's level that this object has set.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "set"))]
    pub managed_policies: Vec<String>,
    /// With geminga.io/dry-run: what would be done, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub plan: Vec<String>,
    /// Ready, Reconciling and Stalled.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// What is known of the brokers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BrokerStatus {
    /// Pods there are.
    #[serde(default)]
    pub replicas: i32,
    /// Pods that serve.
    #[serde(default)]
    pub ready: i32,
    /// Pods of the present template.
    #[serde(default)]
    pub updated: i32,
    /// Labels that select the pods.
    #[serde(default)]
    pub selector: String,
}
