//! The charts, by helm: what they render, what they refuse, and what a real API server says to all of it.
//!
//! A case is a pair of files in `snapshots/`: NAME.values.yaml and what is rendered from it, NAME.yaml, and the notes of an
//! installation, NAME.notes. The first word of a name is the chart. `UPDATE_DOCS=1 cargo kube -- snapshots` writes the latter two.

use std::{
    fs,
    path::{Path, PathBuf},
};

use k8s_openapi::{
    api::{
        apps::v1::{Deployment, StatefulSet},
        authorization::v1::SubjectAccessReview,
        core::v1::{Namespace, Pod},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api,
    api::{ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

use crate::{
    apiserver::{Kubernetes, NAMESPACE},
    harness::{Etcd, Process, eventually, free_port, http_get},
    helm::{CLUSTER, OPERATOR, Said, documents, helm, rendered},
};

/// Values, and what comes of them.
struct Case {
    name: String,
    values: PathBuf,
}

impl Case {
    fn all() -> Vec<Self> {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kube/snapshots");
        let mut all = Vec::new();
        for entry in fs::read_dir(directory).expect("snapshots") {
            let values = entry.expect("an entry").path();
            let file = values.file_name().expect("a name").to_string_lossy().into_owned();
            if let Some(name) = file.strip_suffix(".values.yaml") {
                all.push(Self { name: name.to_owned(), values });
            }
        }
        all.sort_by(|one, two| one.name.cmp(&two.name));
        assert!(all.len() > 5, "the cases are there");
        all
    }

    fn named(name: &str) -> Self {
        Self::all().into_iter().find(|case| case.name == name).expect("a case")
    }

    /// The chart and the name that a release of it has.
    fn chart(&self) -> (&'static str, &'static str) {
        match self.name.split_once('-').expect("CHART-CASE").0 {
            "cluster" => (CLUSTER, "demo"),
            "operator" => (OPERATOR, "geminga-operator"),
            other => panic!("{}: there is no chart {other}", self.name),
        }
    }

    fn values(&self) -> &str {
        self.values.to_str().expect("a path")
    }

    fn rendered(&self) -> String {
        let (chart, release) = self.chart();
        rendered(release, chart, &["--values", self.values()]).expect(&self.name)
    }

    fn notes(&self) -> String {
        let (chart, release) = self.chart();
        let args = ["install", release, chart, "--dry-run=client", "--values", self.values()];
        let said = helm(None, &args).expect(&self.name);
        said.stdout.split_once("\nNOTES:\n").expect("notes").1.to_owned()
    }

    /// What lies in the repository is what comes of the values now.
    fn compare(&self, extension: &str, found: &str) {
        let file = self.values.with_file_name(format!("{}.{extension}", self.name));
        if std::env::var_os("UPDATE_DOCS").is_some() {
            fs::write(&file, found).expect("written");
        }
        let expected = fs::read_to_string(&file).unwrap_or_default();
        let differs = |(one, two): &(&str, &str)| one != two;
        let first = found.lines().zip(expected.lines()).find(differs);
        assert!(
            found == expected,
            "{}.{extension} differs, first in {first:?} (now, then): UPDATE_DOCS=1 cargo kube -- snapshots",
            self.name
        );
    }
}

#[test]
fn what_is_rendered_is_what_the_snapshots_show() {
    for case in Case::all() {
        case.compare("yaml", &case.rendered());
        case.compare("notes", &case.notes());
    }
}

#[test]
fn helm_lint_finds_nothing_in_any_case() {
    for case in Case::all() {
        let (chart, _) = case.chart();
        let args = ["lint", "--strict", "--quiet", chart, "--values", case.values()];
        helm(None, &args).unwrap_or_else(|error| panic!("{}: {error}", case.name));
    }
    let defaults = ["lint", "--strict", CLUSTER, OPERATOR];
    let said = helm(None, &defaults).expect("the defaults are sound");
    assert!(said.stdout.contains("2 chart(s) linted, 0 chart(s) failed"), "{said:?}");
}

/// Values that are refused, and words of the answer.
const REFUSED: &[(&str, &[&str], &str)] = &[
    // What a schema cannot say ends with what to do.
    (CLUSTER, &["etcd.bundled.enabled=false"], "--set etcd.bundled.enabled=true"),
    (CLUSTER, &["etcd.endpoints={http://e:2379}"], "both set: keep one"),
    (CLUSTER, &["preset=production"], "Run an etcd of three members"),
    (CLUSTER, &["etcd.tlsSecret=tls"], "has no users and no TLS"),
    (CLUSTER, &["pools.a-name-of-21-letters-x.replicas=1"], "does not match pattern"),
    // Typing errors, at every depth.
    (CLUSTER, &["preset=prod"], "'dev', 'production'"),
    (CLUSTER, &["brokres.replicas=3"], "'brokres' not allowed"),
    (CLUSTER, &["brokers.replica=3"], "'replica' not allowed"),
    (CLUSTER, &["brokers.resources.request.cpu=1"], "'request' not allowed"),
    (CLUSTER, &["pools.main.replica=3"], "'replica' not allowed"),
    (CLUSTER, &["pools.main.cluster=other"], "'cluster' not allowed"),
    (CLUSTER, &["pools.main.storage.class=fast"], "'class' not allowed"),
    (CLUSTER, &["pools.Main.replicas=3"], "Main"),
    (CLUSTER, &["etcd.bundled.size=1Gi"], "'size' not allowed"),
    (CLUSTER, &["policies.retention=1"], "'retention' not allowed"),
    (CLUSTER, &["networkPolicy.clients[0].pods.a=b"], "'pods' not allowed"),
    (CLUSTER, &["podMonitor.on=true"], "'on' not allowed"),
    (OPERATOR, &["replica=3"], "'replica' not allowed"),
    (OPERATOR, &["tolerations[0].effects=NoSchedule"], "'effects' not allowed"),
    (OPERATOR, &["crds.enabled=false"], "'enabled' not allowed"),
    // Values that cannot be.
    (CLUSTER, &["pools=null"], "missing property 'pools'"),
    (CLUSTER, &["pools.main=null"], "at '/pools': minProperties"),
    (CLUSTER, &["etcd.bundled=null"], "missing property 'bundled'"),
    (CLUSTER, &["brokers.replicas=-1"], "/brokers/replicas"),
    (CLUSTER, &["brokers.replicas=three"], "want integer"),
    (CLUSTER, &["pools.main.storage.size=lots"], "/pools/main/storage/size"),
    (CLUSTER, &["ledgers.ackQuorum=1"], "/ledgers/ackQuorum"),
    (CLUSTER, &["service.type=Ingress"], "'LoadBalancer'"),
    (CLUSTER, &["tiering.url=http://bucket"], "/tiering/url"),
    (CLUSTER, &["tiering.credentialsSecret=s3"], "'url' required"),
    (CLUSTER, &["policies.ttlMs=-1"], "/policies/ttlMs"),
    (CLUSTER, &["etcd.bundled.enabled=false", "etcd.endpoints={etcd:2379}"], "/etcd/endpoints/0"),
    (CLUSTER, &["image.pullPolicy=Sometimes"], "'IfNotPresent'"),
    (CLUSTER, &["image.repository=geminga:1"], "/image/repository"),
    (OPERATOR, &["replicas=9"], "/replicas"),
    (OPERATOR, &["watchNamespace=Team"], "/watchNamespace"),
];

#[test]
fn what_cannot_be_meant_is_refused_with_words_that_help() {
    for (chart, values, words) in REFUSED {
        let mut args = Vec::new();
        if *chart == CLUSTER {
            args.extend(["--set", "etcd.bundled.enabled=true"]);
        }
        args.extend(values.iter().flat_map(|value| ["--set", *value]));
        let error = rendered("demo", chart, &args).expect_err(&format!("{values:?}"));
        assert!(error.contains(words), "{values:?}: {error}");
    }
    // Names of pods and Services come from that of the release.
    let etcd = ["--set", "etcd.bundled.enabled=true"];
    for (release, words) in [
        ("a".repeat(41), "1 to 40 characters"),
        ("1demo".into(), "begins with a letter"),
        ("de.mo".into(), "a-z, 0-9 and -"),
        ("a".repeat(36), "a shorter release name"), // its pool has 41
    ] {
        let error = rendered(&release, CLUSTER, &etcd).expect_err(&release);
        assert!(error.contains(words) && error.contains("fullnameOverride"), "{error}");
        let shorter = [&etcd[..], &["--set", "fullnameOverride=demo"]].concat();
        rendered(&release, CLUSTER, &shorter).expect("that is the way out");
    }
}

/// An argument of the bundled etcd, on ports and a directory of the test's own.
fn own(argument: &str, directory: &Path, ports: &[(&str, u16)]) -> String {
    let mut own = argument.replace("=/data/", &format!("={}/", directory.display()));
    for (address, port) in ports {
        own = own.replace(address, &format!("127.0.0.1:{port}"));
    }
    own
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bundled_etcd_takes_its_arguments_and_answers_its_probes() {
    let all = documents(&Case::named("cluster-dev").rendered());
    let set = all.iter().find(|object| object["kind"] == "StatefulSet").expect("an etcd");
    let container = &set["spec"]["template"]["spec"]["containers"][0];
    let directory = tempfile::tempdir().expect("a temporary directory");
    let health = free_port();
    let ports =
        [("0.0.0.0:2379", free_port()), ("127.0.0.1:2380", free_port()), ("0.0.0.0:2381", health)];
    let arguments = container["args"].as_array().expect("arguments").iter();
    let arguments =
        arguments.map(|argument| own(argument.as_str().expect("text"), directory.path(), &ports));
    let mut command = std::process::Command::new(Etcd::binary());
    command.args(arguments);
    let _etcd = Process::start("bundled", command, directory.path());
    for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
        let path = container[probe]["httpGet"]["path"].as_str().expect("a path");
        eventually(&format!("{probe} is answered"), async || {
            let answer = http_get(&format!("127.0.0.1:{health}"), path).await?;
            (answer.trim() == "ok").then_some(())
        })
        .await;
    }
}

/// Helm with the rights of an administrator.
struct Admin<'a>(&'a Kubernetes);

impl Admin<'_> {
    /// Nothing that the API server warns of, such as a template that no pod will be made of, is left.
    fn helm(&self, args: &[&str]) -> Result<Said, String> {
        let said = helm(Some(&self.0.kubeconfig()), args)?;
        assert!(!said.stderr.to_lowercase().contains("warn"), "{args:?}: {}", said.stderr);
        Ok(said)
    }
}

/// The namespace takes pods of the restricted Pod Security level only, and says so of templates too.
async fn restrict(kubernetes: &Kubernetes) {
    let level = |mode: &str| format!("pod-security.kubernetes.io/{mode}");
    let patch = json!({"metadata": {"labels": {level("enforce"): "restricted", level("warn"): "restricted"}}});
    let namespaces: Api<Namespace> = Api::all(kubernetes.client.clone());
    let patch = Patch::Merge(&patch);
    namespaces.patch(NAMESPACE, &PatchParams::default(), &patch).await.expect("labelled");
}

/// Whether the namespace takes this pod; nothing is made.
async fn admitted(kubernetes: &Kubernetes, mut pod: Value) -> Result<(), String> {
    pod["apiVersion"] = json!("v1");
    pod["kind"] = json!("Pod");
    pod["metadata"]["name"] = json!("a-pod");
    let pod: Pod = serde_json::from_value(pod).expect("a pod");
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    let api: Api<Pod> = kubernetes.api();
    api.create(&dry, &pod).await.map(drop).map_err(|error| error.to_string())
}

/// The definition that a PodMonitor needs.
async fn define_pod_monitors(kubernetes: &Kubernetes) {
    let crds: Api<CustomResourceDefinition> = Api::all(kubernetes.client.clone());
    let schema = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    let crd = json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "podmonitors.monitoring.coreos.com"},
        "spec": {
            "group": "monitoring.coreos.com", "scope": "Namespaced",
            "names": {"kind": "PodMonitor", "plural": "podmonitors"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": schema}}],
        },
    });
    let params = PatchParams::apply("test");
    crds.patch("podmonitors.monitoring.coreos.com", &params, &Patch::Apply(&crd))
        .await
        .expect("defined");
    kubernetes.serves(&["podmonitors.monitoring.coreos.com"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_comes_up_in_a_restricted_namespace_is_upgraded_and_leaves_what_is_not_its_own() {
    let kubernetes = Kubernetes::bare().await;
    let admin = Admin(&kubernetes);
    restrict(&kubernetes).await;
    let kinds: Vec<String> = geminga_operator::crd::definitions()
        .into_iter()
        .map(|crd| crd.metadata.name.expect("a name"))
        .collect();
    let kinds: Vec<&str> = kinds.iter().map(String::as_str).collect();

    // The operator brings the kinds. It works with the rights of its chart.
    admin.helm(&["install", "geminga-operator", OPERATOR]).expect("installed");
    kubernetes.serves(&kinds).await;
    kubernetes.log_in_operator().await;
    let mut operator = kubernetes.operator("operator-0", free_port());
    let bundled = "etcd.bundled.enabled=true";
    admin.helm(&["install", "demo", CLUSTER, "--set", bundled]).expect("installed");
    let deployments: Api<Deployment> = kubernetes.api();
    let sets: Api<StatefulSet> = kubernetes.api();
    let brokers = eventually("brokers are made", async || {
        deployments.get_opt("demo-broker").await.expect("it answers")
    })
    .await;
    let bookies = eventually("bookies are made", async || {
        sets.get_opt("demo-main-bookie").await.expect("it answers")
    })
    .await;
    let env = json!(brokers)["spec"]["template"]["spec"]["containers"][0]["env"].to_string();
    assert!(env.contains("http://demo-etcd.messaging.svc:2379"), "{env}");

    // Every pod that there will be is admitted.
    let hooks = documents(&admin.helm(&["get", "hooks", "demo"]).expect("hooks").stdout);
    assert_eq!(hooks.len(), 1);
    let template = |object: Value| {
        let mut pod = object["spec"]["template"].clone();
        if object["spec"]["volumeClaimTemplates"].is_array() {
            pod["spec"]["volumes"] =
                json!([{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]);
        }
        pod
    };
    let pods = [
        ("operator", template(json!(deployments.get("geminga-operator").await.expect("there")))),
        ("etcd", template(json!(sets.get("demo-etcd").await.expect("there")))),
        ("broker", template(json!(brokers))),
        ("bookie", template(json!(bookies))),
        ("check", hooks[0].clone()),
    ];
    for (name, pod) in &pods {
        admitted(&kubernetes, pod.clone()).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut careless = pod.clone();
        careless["spec"].as_object_mut().expect("a spec").remove("securityContext");
        let refusal = admitted(&kubernetes, careless).await.expect_err("not without its rules");
        assert!(refusal.contains("violates PodSecurity"), "{name}: {refusal}");
    }

    // An upgrade changes what it says and nothing else.
    let upgrade = ["upgrade", "demo", CLUSTER, "--set", bundled, "--set", "image.tag=next"];
    admin.helm(&upgrade).expect("upgraded");
    let demo = kubernetes.get("GemingaCluster", "demo").await.expect("there");
    assert_eq!(demo["spec"]["image"], "geminga:next");
    admin.helm(&["upgrade", "geminga-operator", OPERATOR]).expect("upgraded");
    // Nor does it take back what somebody scaled by hand, unless the values say the same number.
    let scale = json!({"spec": {"replicas": 3}});
    let params = PatchParams { field_manager: Some("kubectl".into()), ..PatchParams::default() };
    let clusters = kubernetes.ours("GemingaCluster");
    clusters.patch_scale("demo", &params, &Patch::Merge(&scale)).await.expect("scaled");
    let refusal =
        helm(Some(&kubernetes.kubeconfig()), &upgrade).expect_err("somebody else's field");
    assert!(refusal.contains(".spec.brokers.replicas"), "{refusal}");
    admin.helm(&[&upgrade[..], &["--set", "brokers.replicas=3"]].concat()).expect("upgraded");

    // Definitions and objects stay when the operator goes, and it takes them up again.
    let topic = json!({"clusterRef": {"name": "demo"}, "segments": 2});
    kubernetes.apply("Topic", "orders", topic).await.expect("sound");
    operator.terminate().await;
    admin.helm(&["uninstall", "geminga-operator"]).expect("uninstalled");
    assert!(deployments.get_opt("geminga-operator").await.expect("it answers").is_none());
    assert!(kubernetes.get("Topic", "orders").await.is_some());
    assert!(kubernetes.get("GemingaCluster", "demo").await.is_some());
    admin.helm(&["install", "geminga-operator", OPERATOR]).expect("installed again");
    admin.helm(&["uninstall", "geminga-operator"]).expect("uninstalled");
    // Under another name helm asks who owns the definitions.
    let other = ["install", "other", OPERATOR];
    let refusal = admin.helm(&other).expect_err("the definitions belong to another release");
    assert!(refusal.contains("geminga-operator"), "{refusal}");
    for way in ["--take-ownership", "--set=crds.install=false"] {
        admin.helm(&[&other[..], &[way]].concat()).unwrap_or_else(|error| panic!("{way}: {error}"));
        admin.helm(&["uninstall", "other"]).expect("uninstalled");
    }

    // The cluster goes, what was not of the release stays.
    admin.helm(&["uninstall", "demo"]).expect("uninstalled");
    assert!(kubernetes.get("GemingaCluster", "demo").await.is_none());
    assert!(kubernetes.get("BookiePool", "demo-main").await.is_none());
    assert!(sets.get_opt("demo-etcd").await.expect("it answers").is_none());
    assert!(kubernetes.get("Topic", "orders").await.is_some());
    admin.helm(&["install", "demo", CLUSTER, "--set", bundled]).expect("installed again");
    admin.helm(&["uninstall", "demo"]).expect("uninstalled");

    every_case_is_accepted(&kubernetes).await;
    the_rights_are_in_the_watched_namespace_only(&kubernetes).await;
}

/// With the kinds there, the API server takes what each case renders.
async fn every_case_is_accepted(kubernetes: &Kubernetes) {
    let admin = Admin(kubernetes);
    define_pod_monitors(kubernetes).await;
    let namespaces: Api<Namespace> = Api::all(kubernetes.client.clone());
    let team = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team-a"}});
    namespaces
        .patch("team-a", &PatchParams::apply("test"), &Patch::Apply(&team))
        .await
        .expect("made");
    for (number, case) in Case::all().iter().enumerate() {
        let release = format!("case-{number}");
        let done = admin.helm(&["install", &release, case.chart().0, "--values", case.values()]);
        done.unwrap_or_else(|error| panic!("{}: {error}", case.name));
        if case.name == "operator-elsewhere" {
            continue; // looked at below
        }
        admin.helm(&["uninstall", &release]).expect("uninstalled");
    }
    let left =
        kubernetes.ours("GemingaCluster").list(&ListParams::default()).await.expect("listed");
    assert_eq!(left.items.len(), 0, "{left:?}");
}

async fn the_rights_are_in_the_watched_namespace_only(kubernetes: &Kubernetes) {
    let number = Case::all().iter().position(|case| case.name == "operator-elsewhere");
    let account = format!("system:serviceaccount:{NAMESPACE}:case-{}", number.expect("a case"));
    let reviews: Api<SubjectAccessReview> = Api::all(kubernetes.client.clone());
    let may = async |namespace: &str, verb: &str, group: &str, resource: &str| {
        let attributes =
            json!({"namespace": namespace, "verb": verb, "group": group, "resource": resource});
        let review = json!({"spec": {"user": account, "resourceAttributes": attributes}});
        let review = serde_json::from_value(review).expect("a review");
        let done = reviews.create(&PostParams::default(), &review).await.expect("reviewed");
        done.status.expect("a status").allowed
    };
    for (verb, group, resource) in [
        ("list", "geminga.io", "topics"),
        ("delete", "", "pods"),
        ("create", "coordination.k8s.io", "leases"),
    ] {
        assert!(may("team-a", verb, group, resource).await, "{verb} {resource}");
        assert!(!may(NAMESPACE, verb, group, resource).await, "{verb} {resource} elsewhere");
    }
    assert!(!may("team-a", "get", "", "secrets").await);
    assert!(!may("team-a", "update", "geminga.io", "topics").await, "specs are never written");
}
