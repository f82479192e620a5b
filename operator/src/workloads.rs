//! The objects that a cluster consists of: pure functions from specs to manifests.
//!
//! Every pod passes the restricted Pod Security level: not root, a read-only root, no capabilities, no privilege escalation,
//! seccomp. Settings travel as environment variables of the roles' own table; nothing is templated into files.

use serde_json::{Value, json};

use crate::{
    crd::{BookiePoolSpec, GemingaClusterSpec, Resources},
    manifest::{Manifest, TEMPLATE, hash, without_nulls},
};

/// gRPC, REST.
pub const CLIENT_PORT: u16 = 8650;
/// Metrics and health.
pub const HEALTH_PORT: u16 = 8651;
/// Bookies.
const BOOKIE_PORT: u16 = 8660;
/// The user and group of the image.
const USER: i64 = 65_532;
/// What a bookie gets to finish what it accepted.
const BOOKIE_GRACE_S: i64 = 45;
/// Beyond a broker's own drain grace: to close its last ledgers.
const BROKER_GRACE_MARGIN_S: i64 = 15;
/// What the nodes get to hear that a broker comes or goes: so long a new one is ready before an old one is told to go, and so
/// long one that goes serves on before it hears of it. No new connection reaches a broker that is gone.
const BROKER_NEWS_S: i64 = 5;

/// Label of every object of a cluster: its name.
pub const CLUSTER_LABEL: &str = "geminga.io/cluster";
/// Label of a pool's objects: its name.
pub(crate) const POOL_LABEL: &str = "geminga.io/pool";
/// Label that tells brokers from bookies.
pub const COMPONENT_LABEL: &str = "app.kubernetes.io/component";

/// Whose objects these are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The kind of the custom resource.
    pub kind: &'static str,
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its uid.
    pub uid: String,
}

impl Owner {
    fn reference(&self) -> Value {
        json!([{
            "apiVersion": "geminga.io/v1alpha1", "kind": self.kind, "name": self.name, "uid": self.uid,
            "controller": true, "blockOwnerDeletion": true,
        }])
    }

    fn metadata(&self, name: &str, labels: &Value) -> Value {
        json!({
            "name": name, "namespace": self.namespace, "labels": labels,
            "ownerReferences": self.reference(), "annotations": {},
        })
    }
}

fn labels(cluster: &str, component: &str, pool: Option<&str>) -> Value {
    without_nulls(json!({
        "app.kubernetes.io/name": "geminga",
        "app.kubernetes.io/instance": cluster,
        COMPONENT_LABEL: component,
        "app.kubernetes.io/managed-by": "geminga-operator",
        CLUSTER_LABEL: cluster,
        POOL_LABEL: pool,
    }))
}

fn selector(cluster: &str, component: &str, pool: Option<&str>) -> Value {
    without_nulls(json!({COMPONENT_LABEL: component, CLUSTER_LABEL: cluster, POOL_LABEL: pool}))
}

/// A selector as `kubectl -l` and the scale subresource take it.
fn selector_text(selector: &Value) -> String {
    let pairs = selector.as_object().into_iter().flatten();
    let pairs = pairs.map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()));
    let mut pairs: Vec<String> = pairs.collect();
    pairs.sort();
    pairs.join(",")
}

/// What selects a cluster's brokers.
pub(crate) fn broker_selector(cluster: &str) -> String {
    selector_text(&selector(cluster, "broker", None))
}

/// What selects a pool's bookies.
pub(crate) fn pool_selector(cluster: &str, pool: &str) -> String {
    selector_text(&selector(cluster, "bookie", Some(pool)))
}

/// What selects all bookies of a cluster.
pub(crate) fn bookie_selector(cluster: &str) -> String {
    selector_text(&selector(cluster, "bookie", None))
}

/// The StatefulSet and the Service of a pool.
pub(crate) fn set_name(pool: &str) -> String {
    format!("{pool}-bookie")
}

/// The Deployment and the Service of the brokers.
pub(crate) fn broker_name(cluster: &str) -> String {
    format!("{cluster}-broker")
}

/// Where the operator and everybody inside Kubernetes reach the brokers.
#[must_use]
pub fn broker_address(namespace: &str, cluster: &str) -> String {
    format!("http://{}.{namespace}.svc:{CLIENT_PORT}", broker_name(cluster))
}

fn field(name: &str, path: &str) -> Value {
    json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}})
}

fn plain(name: &str, value: impl ToString) -> Value {
    json!({"name": name, "value": value.to_string()})
}

/// Settings that brokers and bookies share, and the volumes that they come from.
fn common(namespace: &str, cluster: &str, spec: &GemingaClusterSpec) -> (Vec<Value>, Parts) {
    let etcd = &spec.etcd;
    let prefix = match etcd.prefix.as_str() {
        "" => format!("/geminga/{namespace}/{cluster}/"),
        prefix => prefix.to_owned(),
    };
    let mut env = vec![
        field("POD_NAME", "metadata.name"),
        field("POD_IP", "status.podIP"),
        plain("GEMINGA_METADATA_ENDPOINTS", etcd.endpoints.join(",")),
        plain("GEMINGA_METADATA_PREFIX", prefix),
        plain("GEMINGA_LEDGER_ENSEMBLE", spec.ledgers.ensemble),
        plain("GEMINGA_LEDGER_WRITE_QUORUM", spec.ledgers.write_quorum),
        plain("GEMINGA_LEDGER_ACK_QUORUM", spec.ledgers.ack_quorum),
        plain("GEMINGA_LOG_FORMAT", "json"),
    ];
    let mut parts = Parts::default();
    if let Some(secret) = &etcd.credentials_secret {
        env.push(json!({
            "name": "GEMINGA_METADATA_USER",
            "valueFrom": {"secretKeyRef": {"name": secret, "key": "username"}},
        }));
        env.push(plain("GEMINGA_METADATA_PASSWORD_FILE", "/etc/geminga/etcd-user/password"));
        parts.secret("etcd-user", secret, &["password"]);
    }
    if let Some(secret) = &etcd.tls_secret {
        env.push(plain("GEMINGA_METADATA_CA_FILE", "/etc/geminga/etcd-tls/ca.crt"));
        env.push(plain("GEMINGA_METADATA_CERT_FILE", "/etc/geminga/etcd-tls/tls.crt"));
        env.push(plain("GEMINGA_METADATA_KEY_FILE", "/etc/geminga/etcd-tls/tls.key"));
        parts.secret("etcd-tls", secret, &[]);
    }
    (env, parts)
}

/// Volumes of a pod and where its container has them.
#[derive(Default)]
struct Parts {
    volumes: Vec<Value>,
    mounts: Vec<Value>,
}

impl Parts {
    /// All keys of a secret, or only these, under /etc/geminga/NAME.
    fn secret(&mut self, name: &str, secret: &str, keys: &[&str]) {
        let items: Vec<Value> = keys.iter().map(|key| json!({"key": key, "path": key})).collect();
        let mut source = json!({"secretName": secret, "defaultMode": 0o440});
        if !items.is_empty() {
            source["items"] = json!(items);
        }
        self.volumes.push(json!({"name": name, "secret": source}));
        self.mounts.push(
            json!({"name": name, "mountPath": format!("/etc/geminga/{name}"), "readOnly": true}),
        );
    }
}

fn probes(container: &mut Value) {
    // The last words of a container that failed, for the condition that names it.
    container["terminationMessagePolicy"] = json!("FallbackToLogsOnError");
    let probe = |path: &str, period: i32, failures: i32| {
        json!({
            "httpGet": {"path": path, "port": "health"},
            "periodSeconds": period, "timeoutSeconds": 5, "failureThreshold": failures,
        })
    };
    container["readinessProbe"] = probe("/readyz", 2, 3);
    // Alive means that the process answers at all; a start that waits for etcd is alive.
    container["livenessProbe"] = probe("/livez", 10, 6);
}

fn resources(resources: &Resources) -> Value {
    json!({"requests": resources.requests, "limits": resources.limits})
}

fn container_security() -> Value {
    json!({
        "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
        "capabilities": {"drop": ["ALL"]},
    })
}

fn pod_security() -> Value {
    json!({
        "runAsNonRoot": true, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
    })
}

/// Spread over nodes and zones where that is possible.
fn spread(selector: &Value) -> Value {
    let over = |key: &str| {
        json!({
            "maxSkew": 1, "topologyKey": key, "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": selector},
        })
    };
    json!([over("kubernetes.io/hostname"), over("topology.kubernetes.io/zone")])
}

/// The template of a pod, marked with its own hash.
fn template(labels: &Value, pod: Value) -> Value {
    let pod = without_nulls(pod);
    let hash = hash(&json!([labels, pod]));
    json!({"metadata": {"labels": labels, "annotations": {TEMPLATE: hash}}, "spec": pod})
}

/// The hash of the template in a manifest of a Deployment or StatefulSet.
#[must_use]
pub fn template_hash(manifest: &Manifest) -> &str {
    let path = "/spec/template/metadata/annotations/geminga.io~1template";
    manifest.object().pointer(path).and_then(Value::as_str).unwrap_or_default()
}

fn pull_secrets(spec: &GemingaClusterSpec) -> Option<Vec<Value>> {
    let secrets = spec.image_pull_secrets.iter().map(|name| json!({"name": name}));
    (!spec.image_pull_secrets.is_empty()).then(|| secrets.collect())
}

/// The brokers: a Deployment. A new pod is ready, and known to the nodes, before an old one hands its topics over and goes.
#[must_use]
pub fn broker_deployment(owner: &Owner, spec: &GemingaClusterSpec, image: &str) -> Manifest {
    let brokers = &spec.brokers;
    let (mut env, parts) = common(&owner.namespace, &owner.name, spec);
    env.extend([
        plain("GEMINGA_BROKER_ID", "$(POD_NAME)"),
        plain("GEMINGA_BROKER_LISTEN", format!("0.0.0.0:{CLIENT_PORT}")),
        plain("GEMINGA_BROKER_ADVERTISE", format!("$(POD_IP):{CLIENT_PORT}")),
        plain("GEMINGA_BROKER_HEALTH_LISTEN", format!("0.0.0.0:{HEALTH_PORT}")),
        plain("GEMINGA_BROKER_AUTO_CREATE_TOPICS", brokers.auto_create_topics),
        plain("GEMINGA_BROKER_DRAIN_GRACE_MS", brokers.drain_grace_ms),
    ]);
    let mut from = None;
    if let Some(tiering) = &spec.tiering {
        env.push(plain("GEMINGA_TIER_URL", &tiering.url));
        from = tiering
            .credentials_secret
            .as_ref()
            .map(|secret| json!([{"secretRef": {"name": secret}}]));
    }
    let selector = selector(&owner.name, "broker", None);
    let labels = labels(&owner.name, "broker", None);
    let mut container = json!({
        "name": "broker", "image": image, "imagePullPolicy": spec.image_pull_policy,
        "args": ["broker"], "env": env, "envFrom": from,
        "ports": [
            {"name": "grpc", "containerPort": CLIENT_PORT, "protocol": "TCP"},
            {"name": "health", "containerPort": HEALTH_PORT, "protocol": "TCP"},
        ],
        "resources": resources(&brokers.resources),
        "securityContext": container_security(), "volumeMounts": parts.mounts,
    });
    probes(&mut container);
    container["lifecycle"] = json!({"preStop": {"sleep": {"seconds": BROKER_NEWS_S}}});
    let grace_s = brokers.drain_grace_ms.div_euclid(1_000) + BROKER_NEWS_S + BROKER_GRACE_MARGIN_S;
    let pod = json!({
        "containers": [container], "volumes": parts.volumes,
        "securityContext": pod_security(), "enableServiceLinks": false,
        "automountServiceAccountToken": false, "imagePullSecrets": pull_secrets(spec),
        "nodeSelector": brokers.node_selector,
        "terminationGracePeriodSeconds": grace_s,
        "topologySpreadConstraints": spread(&selector),
    });
    Manifest::new(json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": owner.metadata(&broker_name(&owner.name), &labels),
        "spec": {
            "replicas": brokers.replicas,
            "selector": {"matchLabels": selector},
            "minReadySeconds": BROKER_NEWS_S,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": template(&labels, pod),
        },
    }))
}

/// What clients connect to.
#[must_use]
pub fn broker_service(owner: &Owner, spec: &GemingaClusterSpec) -> Manifest {
    let labels = labels(&owner.name, "broker", None);
    let mut metadata = owner.metadata(&broker_name(&owner.name), &labels);
    for (key, value) in &spec.service.annotations {
        metadata["annotations"][key] = json!(value);
    }
    Manifest::new(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata,
        "spec": {
            "type": spec.service.type_,
            "selector": selector(&owner.name, "broker", None),
            "ports": [{"name": "grpc", "port": CLIENT_PORT, "targetPort": "grpc", "protocol": "TCP", "appProtocol": "grpc"}],
        },
    }))
}

/// At most one pod of a component is taken by a node's drain at a time.
#[must_use]
pub fn disruption_budget(owner: &Owner, component: &str) -> Manifest {
    let labels = labels(&owner.name, component, None);
    Manifest::new(json!({
        "apiVersion": "policy/v1", "kind": "PodDisruptionBudget",
        "metadata": owner.metadata(&format!("{}-{component}", owner.name), &labels),
        "spec": {
            "maxUnavailable": 1,
            "selector": {"matchLabels": selector(&owner.name, component, None)},
        },
    }))
}

/// The bookies of a pool: a StatefulSet whose pods only the operator replaces.
#[must_use]
pub fn bookie_set(
    owner: &Owner,
    cluster: &str,
    spec: &GemingaClusterSpec,
    pool: &BookiePoolSpec,
    replicas: i32,
) -> Manifest {
    let (mut env, mut parts) = common(&owner.namespace, cluster, spec);
    env.extend([
        plain("GEMINGA_BOOKIE_ID", "$(POD_NAME)"),
        plain("GEMINGA_BOOKIE_DATA_DIR", "/data/bookie"),
        plain("GEMINGA_BOOKIE_LISTEN", format!("0.0.0.0:{BOOKIE_PORT}")),
        plain("GEMINGA_BOOKIE_ADVERTISE", format!("$(POD_IP):{BOOKIE_PORT}")),
        plain("GEMINGA_BOOKIE_HEALTH_LISTEN", format!("0.0.0.0:{HEALTH_PORT}")),
        plain("GEMINGA_BOOKIE_ZONE", &pool.zone),
    ]);
    parts.mounts.push(json!({"name": "data", "mountPath": "/data"}));
    let selector = selector(cluster, "bookie", Some(&owner.name));
    let labels = labels(cluster, "bookie", Some(&owner.name));
    let mut container = json!({
        "name": "bookie", "image": spec.image, "imagePullPolicy": spec.image_pull_policy,
        "args": ["bookie"], "env": env,
        "ports": [
            {"name": "bookie", "containerPort": BOOKIE_PORT, "protocol": "TCP"},
            {"name": "health", "containerPort": HEALTH_PORT, "protocol": "TCP"},
        ],
        "resources": resources(&pool.resources),
        "securityContext": container_security(), "volumeMounts": parts.mounts,
    });
    probes(&mut container);
    let pod = json!({
        "containers": [container], "volumes": parts.volumes,
        "securityContext": pod_security(), "enableServiceLinks": false,
        "automountServiceAccountToken": false, "imagePullSecrets": pull_secrets(spec),
        "nodeSelector": pool.node_selector,
        "terminationGracePeriodSeconds": BOOKIE_GRACE_S,
        "topologySpreadConstraints": spread(&selector),
    });
    let claim = without_nulls(json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim",
        "metadata": {"name": "data"},
        "spec": {
            "accessModes": ["ReadWriteOnce"], "storageClassName": pool.storage.storage_class,
            "resources": {"requests": {"storage": pool.storage.size}},
        },
    }));
    Manifest::new(json!({
        "apiVersion": "apps/v1", "kind": "StatefulSet",
        "metadata": owner.metadata(&set_name(&owner.name), &labels),
        "spec": {
            "replicas": replicas,
            "serviceName": set_name(&owner.name),
            "selector": {"matchLabels": selector},
            "podManagementPolicy": "Parallel",
            "updateStrategy": {"type": "OnDelete"},
            "persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Retain", "whenScaled": "Retain"},
            "template": template(&labels, pod),
            "volumeClaimTemplates": [claim],
        },
    }))
}

/// The headless Service that names a pool's pods.
#[must_use]
pub fn bookie_service(owner: &Owner, cluster: &str) -> Manifest {
    let labels = labels(cluster, "bookie", Some(&owner.name));
    Manifest::new(json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": owner.metadata(&set_name(&owner.name), &labels),
        "spec": {
            "clusterIP": "None", "publishNotReadyAddresses": true,
            "selector": selector(cluster, "bookie", Some(&owner.name)),
            "ports": [
                {"name": "bookie", "port": BOOKIE_PORT, "targetPort": "bookie", "protocol": "TCP"},
                {"name": "health", "port": HEALTH_PORT, "targetPort": "health", "protocol": "TCP"},
            ],
        },
    }))
}
