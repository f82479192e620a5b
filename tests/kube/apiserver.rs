//! A kube-apiserver of the test's own, with its etcd; everything ends with it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::Duration,
};

use geminga_operator::crd::definitions;
use k8s_openapi::{
    api::{
        authentication::v1::TokenRequest,
        core::v1::{Namespace, ServiceAccount},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, Config,
    api::{DynamicObject, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
    core::{ApiResource, GroupVersionKind},
};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    harness::{Etcd, Process, eventually, eventually_ok, free_port, geminga, tool},
    helm::{OPERATOR, documents, rendered},
};

/// Everybody works in this namespace.
pub(crate) const NAMESPACE: &str = "messaging";
/// The operator's account, made by its chart.
const ACCOUNT: &str = "geminga-operator";

/// The API server.
pub(crate) struct Kubernetes {
    /// May do everything.
    pub(crate) client: Client,
    /// The operator's, once it is logged in: with the rights of its chart and no others.
    operator: OnceLock<Client>,
    port: u16,
    ca: String,
    directory: TempDir,
    _apiserver: Process,
    _etcd: Etcd,
}

/// A CA, a serving certificate and the key of service accounts.
fn write_keys(directory: &Path) -> String {
    let mut ca = CertificateParams::new(Vec::new()).expect("no names");
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let ca_key = KeyPair::generate().expect("a key");
    let ca_pem = ca.self_signed(&ca_key).expect("a certificate").pem();
    let issuer = Issuer::new(ca, ca_key);
    let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
    let mut serving = CertificateParams::new(names).expect("names");
    serving.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let key = KeyPair::generate().expect("a key");
    let certificate = serving.signed_by(&key, &issuer).expect("a certificate");
    let accounts = KeyPair::generate().expect("a key");
    for (file, text) in [
        ("ca.crt", ca_pem.clone()),
        ("serving.crt", certificate.pem()),
        ("serving.key", key.serialize_pem()),
        ("accounts.key", accounts.serialize_pem()),
        ("accounts.pub", accounts.public_key_pem()),
    ] {
        fs::write(directory.join(file), text).expect("written");
    }
    ca_pem
}

impl Kubernetes {
    /// An API server that knows our kinds, and the operator's account with the rights of its chart.
    pub(crate) async fn start() -> Self {
        let kubernetes = Self::bare().await;
        kubernetes.define().await;
        // What is missing in the chart's Role fails the tests.
        let rbac = ["--namespace", NAMESPACE, "--show-only", "templates/rbac.yaml"];
        for object in documents(&rendered(ACCOUNT, OPERATOR, &rbac).expect("the chart renders")) {
            kubernetes.make(&object).await;
        }
        kubernetes.log_in_operator().await;
        kubernetes
    }

    /// An API server with nothing in it but the tests' namespace.
    pub(crate) async fn bare() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let etcd = Etcd::start(directory.path(), 1).await;
        let ca = write_keys(directory.path());
        let port = free_port();
        let file = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
        fs::write(directory.path().join("tokens.csv"), "admin-token,admin,1,system:masters\n")
            .expect("written");
        let mut command = Command::new(tool("kube-apiserver"));
        command
            .arg(format!("--etcd-servers={}", etcd.endpoints()))
            .args(["--bind-address=127.0.0.1", "--advertise-address=127.0.0.1"])
            .arg(format!("--secure-port={port}"))
            .args(["--endpoint-reconciler-type=none", "--authorization-mode=RBAC"])
            .args(["--service-cluster-ip-range=10.96.0.0/16", "--profiling=false"])
            .arg("--service-account-issuer=https://kubernetes.default.svc.cluster.local")
            .arg(format!("--token-auth-file={}", file("tokens.csv")))
            .arg(format!("--tls-cert-file={}", file("serving.crt")))
            .arg(format!("--tls-private-key-file={}", file("serving.key")))
            .arg(format!("--service-account-key-file={}", file("accounts.pub")))
            .arg(format!("--service-account-signing-key-file={}", file("accounts.key")))
            // Nobody makes the accounts that this one would ask for.
            .arg("--disable-admission-plugins=ServiceAccount");
        let apiserver = Process::start("kube-apiserver", command, directory.path());
        let kubeconfig = kubeconfig(port, &ca, "admin-token");
        fs::write(directory.path().join("kubeconfig"), &kubeconfig).expect("written");
        let client = client(&kubeconfig).await;
        let kubernetes = Self {
            client,
            operator: OnceLock::new(),
            port,
            ca,
            directory,
            _apiserver: apiserver,
            _etcd: etcd,
        };
        kubernetes.prepare().await;
        kubernetes
    }

    /// That of an administrator.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("kubeconfig")
    }

    fn operator_kubeconfig(&self) -> PathBuf {
        self.directory.path().join("operator.kubeconfig")
    }

    /// Takes a token for the operator's account: operators work with its rights from now on.
    pub(crate) async fn log_in_operator(&self) {
        let accounts: Api<ServiceAccount> = self.api();
        let wish = json!({"spec": {"audiences": [], "expirationSeconds": 3_600}});
        let wish: TokenRequest = serde_json::from_value(wish).expect("a request");
        let params = PostParams::default();
        let token = accounts.create_token_request(ACCOUNT, &params, &wish).await.expect("a token");
        let token = token.status.expect("a token").token;
        let kubeconfig = kubeconfig(self.port, &self.ca, &token);
        fs::write(self.operator_kubeconfig(), &kubeconfig).expect("written");
        assert!(self.operator.set(client(&kubeconfig).await).is_ok(), "it logs in once");
    }

    /// The operator's way to the API server.
    pub(crate) fn operator_client(&self) -> Client {
        self.operator.get().expect("it is logged in").clone()
    }

    /// Makes an object of a chart, in its own namespace or in the tests'.
    async fn make(&self, object: &Value) {
        let text = |path: &str| object.pointer(path).and_then(Value::as_str).unwrap_or_default();
        let (group, version) =
            text("/apiVersion").split_once('/').unwrap_or(("", text("/apiVersion")));
        let kind = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, text("/kind")));
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), text("/metadata/namespace"), &kind);
        let params = PatchParams::apply("test");
        let done = api.patch(text("/metadata/name"), &params, &Patch::Apply(object)).await;
        done.unwrap_or_else(|error| panic!("{object} is refused: {error}"));
    }

    async fn prepare(&self) {
        eventually_ok(async || {
            self.client
                .apiserver_version()
                .await
                .map_err(|error| format!("the API server: {error}"))
        })
        .await;
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        let namespace =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
        eventually_ok(async || {
            let patch = Patch::Apply(&namespace);
            let done = namespaces.patch(NAMESPACE, &PatchParams::apply("test"), &patch).await;
            done.map(drop).map_err(|error| format!("the namespace: {error}"))
        })
        .await;
    }

    /// Our kinds.
    async fn define(&self) {
        let crds: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        let definitions = definitions();
        let names: Vec<&str> =
            definitions.iter().filter_map(|crd| crd.metadata.name.as_deref()).collect();
        for (crd, name) in definitions.iter().zip(&names) {
            let done = crds.patch(name, &PatchParams::apply("test"), &Patch::Apply(crd)).await;
            done.unwrap_or_else(|error| panic!("{name} is refused: {error}"));
        }
        self.serves(&names).await;
    }

    /// Waits until the API server serves these definitions.
    pub(crate) async fn serves(&self, names: &[&str]) {
        let crds: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        for name in names {
            eventually(&format!("{name} is served"), async || {
                let status = crds.get(name).await.ok()?.status?;
                let conditions = status.conditions.unwrap_or_default();
                let holds =
                    |type_: &str| conditions.iter().any(|c| c.type_ == type_ && c.status == "True");
                assert!(!holds("NonStructuralSchema"), "{name}: {conditions:?}");
                holds("Established").then_some(())
            })
            .await;
        }
    }

    /// Objects of one of our kinds, as JSON.
    pub(crate) fn ours(&self, kind: &str) -> Api<DynamicObject> {
        let kind = GroupVersionKind::gvk("geminga.io", "v1alpha1", kind);
        Api::namespaced_with(self.client.clone(), NAMESPACE, &ApiResource::from_gvk(&kind))
    }

    pub(crate) fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    /// Applies an object of ours as a user would: fields that are not named leave it.
    pub(crate) async fn apply(&self, kind: &str, name: &str, spec: Value) -> Result<Value, String> {
        self.apply_with(kind, name, spec, json!({})).await
    }

    pub(crate) async fn apply_with(
        &self,
        kind: &str,
        name: &str,
        spec: Value,
        annotations: Value,
    ) -> Result<Value, String> {
        let object = json!({
            "apiVersion": "geminga.io/v1alpha1", "kind": kind,
            "metadata": {"name": name, "namespace": NAMESPACE, "annotations": annotations},
            "spec": spec,
        });
        let params = PatchParams::apply("user").force();
        let done = self.ours(kind).patch(name, &params, &Patch::Apply(&object)).await;
        done.map(|object| json!(object)).map_err(|error| error.to_string())
    }

    /// The object as it is; none if it is gone.
    pub(crate) async fn get(&self, kind: &str, name: &str) -> Option<Value> {
        let found = self.ours(kind).get_opt(name).await.expect("the API server answers");
        found.map(|object| json!(object))
    }

    /// Waits until the object's conditions are about its present spec and Ready has this status and reason.
    pub(crate) async fn settles(
        &self,
        kind: &str,
        name: &str,
        status: &str,
        reason: &str,
    ) -> Value {
        eventually_ok(async || {
            let object = self.get(kind, name).await.unwrap_or_default();
            let ready = condition(&object, "Ready");
            let fits = ready["observedGeneration"] == object["metadata"]["generation"]
                && ready["status"] == status
                && ready["reason"] == reason;
            if fits {
                Ok(object)
            } else {
                Err(format!("{kind} {name} is {status} for {reason}, not {ready}"))
            }
        })
        .await
    }

    /// An operator as a process, logged in before.
    pub(crate) fn operator(&self, id: &str, health: u16) -> Process {
        self.operator_with(id, health, 300)
    }

    pub(crate) fn operator_with(&self, id: &str, health: u16, resync_ms: u64) -> Process {
        let mut command = geminga();
        command
            .arg("operator")
            .args(["--operator-id", id, "--operator-namespace", NAMESPACE])
            .args(["--operator-lease-namespace", NAMESPACE, "--operator-lease-ttl-ms", "3000"])
            .arg(format!("--operator-resync-ms={resync_ms}"))
            .args(["--log-format", "json"])
            .arg(format!("--operator-health-listen=127.0.0.1:{health}"))
            .env("KUBECONFIG", self.operator_kubeconfig());
        Process::start(id, command, self.directory.path())
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }
}

/// One condition of an object; null if it has none of that type.
pub(crate) fn condition(object: &Value, type_: &str) -> Value {
    let conditions = object["status"]["conditions"].as_array();
    let found = conditions.into_iter().flatten().find(|condition| condition["type"] == type_);
    found.cloned().unwrap_or_default()
}

fn kubeconfig(port: u16, ca: &str, token: &str) -> String {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": {
            "server": format!("https://127.0.0.1:{port}"),
            "certificate-authority-data": base64::Engine::encode(&base64::prelude::BASE64_STANDARD, ca),
        }}],
        "users": [{"name": "test", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": NAMESPACE}}],
    })
    .to_string()
}

async fn client(kubeconfig: &str) -> Client {
    let config = Kubeconfig::from_yaml(kubeconfig).expect("a kubeconfig");
    let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await;
    let mut config = config.expect("a sound kubeconfig");
    config.read_timeout = Some(Duration::from_secs(20));
    Client::try_from(config).expect("a client")
}
