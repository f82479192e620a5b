//! `geminga kube`, as the executable that a user runs, with a kubeconfig.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use k8s_openapi::{
    api::{
        apps::v1::Deployment,
        core::v1::{Event, Secret, ServiceAccount},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

use crate::{
    apiserver::{Kubernetes, NAMESPACE},
    harness::{Process, eventually, free_port, geminga},
    pools::World,
};

const NOT_FOUND: i32 = 3;
const REFUSED: i32 = 4;
const NOT_READY: i32 = 7;

/// `geminga kube ...` in the namespace, by this kubeconfig.
fn kube_by(kubeconfig: &Path, args: &[&str]) -> Command {
    let mut command = geminga();
    command.arg("kube").args(args).args(["-n", NAMESPACE]).env("KUBECONFIG", kubeconfig);
    command
}

fn kube(kubernetes: &Kubernetes, args: &[&str]) -> Command {
    kube_by(&kubernetes.directory().join("kubeconfig"), args)
}

/// A run to its end, beside the runtime of the test.
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

async fn ran(mut command: Command) -> Ran {
    let run = move || command.stdin(Stdio::null()).output().expect("the binary starts");
    let output: Output = tokio::task::spawn_blocking(run).await.expect("no panic");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ran { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) }
}

impl Ran {
    #[track_caller]
    fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "stdout:\n{}\nstderr:\n{}", self.out, self.err);
        self
    }

    #[track_caller]
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}", self.out))
    }
}

/// What a Deployment's controller would say once the brokers serve.
async fn brokers_serve(world: &World) {
    let deployments: Api<Deployment> = world.kubernetes.api();
    let live = eventually("the brokers' Deployment is there", async || {
        deployments.get_opt("demo-broker").await.expect("it answers")
    })
    .await;
    let status = json!({"status": {
        "observedGeneration": live.metadata.generation,
        "replicas": 2, "readyReplicas": 2, "updatedReplicas": 2, "availableReplicas": 2,
    }});
    let patch = Patch::Merge(&status);
    let params = PatchParams::default();
    deployments.patch_status("demo-broker", &params, &patch).await.expect("patched");
    world.kubernetes.settles("GemingaCluster", "demo", "True", "AsSpecified").await;
}

/// A kubeconfig of an account that may do nothing.
async fn powerless(kubernetes: &Kubernetes) -> PathBuf {
    let accounts: Api<ServiceAccount> = kubernetes.api();
    let account = serde_json::from_value(json!({"metadata": {"name": "nobody"}})).expect("sound");
    accounts.create(&PostParams::default(), &account).await.expect("created");
    let ask = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
    let params = PostParams::default();
    let token: Value =
        accounts.create_subresource("token", "nobody", &params, &ask).await.expect("a token");
    let admin = std::fs::read(kubernetes.directory().join("kubeconfig")).expect("there");
    let mut config: Value = serde_json::from_slice(&admin).expect("JSON");
    config["users"][0]["user"] = json!({"token": token["status"]["token"]});
    let file = kubernetes.directory().join("nobody");
    std::fs::write(&file, config.to_string()).expect("written");
    file
}

#[tokio::test(flavor = "multi_thread")]
async fn status_is_0_only_when_all_is_ready_and_errors_say_what_to_do() {
    let (world, _operator) = World::start(3).await;
    let kubernetes = &world.kubernetes;
    let status = async |args: &[&str]| ran(kube(kubernetes, &[&["status"], args].concat())).await;

    let waiting = status(&["demo", "-o", "json"]).await.exits(NOT_READY);
    assert_eq!(waiting.json()["clusters"][0]["brokers"], json!({"ready": 0, "wanted": 2}));
    assert!(waiting.err.contains("GemingaCluster/demo"), "{}", waiting.err);

    // The one that waits ends with the brokers.
    let mut waits = Process::start(
        "waits",
        kube(kubernetes, &["status", "--wait-ready", "--timeout", "1m"]),
        kubernetes.directory(),
    );
    waits.wrote("0 of 2 brokers are ready").await;
    brokers_serve(&world).await;
    assert_eq!(waits.ended().await, Some(0), "{}", waits.log());

    let ready = status(&["-o", "json"]).await.exits(0).json();
    assert_eq!(ready["ready"], true, "{ready}");
    let demo = &ready["clusters"][0];
    assert_eq!((&demo["image"], &demo["rolling"]), (&json!("geminga:1"), &json!(false)), "{demo}");
    assert_eq!(demo["images_running"], json!(["geminga:1"]));
    assert_eq!(demo["bookies"], json!({"ready": 3, "wanted": 3}));
    assert_eq!(demo["pools"][0]["bookies"], json!({"ready": 3, "wanted": 3}));
    let table = status(&[]).await.exits(0).out;
    assert!(table.contains("cluster messaging/demo") && table.contains("Ready"), "{table}");

    // Something on the server that is not Ready, and a Warning about a pod.
    let topic = json!({"clusterRef": {"kind": "GemingaConnection", "name": "nowhere"}});
    kubernetes.apply("Topic", "orders", topic).await.expect("sound");
    kubernetes.settles("Topic", "orders", "False", "ClusterNotFound").await;
    let events: Api<Event> = kubernetes.api();
    let event = json!({
        "metadata": {"name": "main-bookie-0.1"}, "type": "Warning", "reason": "FailedMount",
        "message": "the volume is elsewhere", "count": 4,
        "involvedObject": {"kind": "Pod", "namespace": NAMESPACE, "name": "main-bookie-0", "apiVersion": "v1"},
        "firstTimestamp": "2026-01-01T00:00:00Z", "lastTimestamp": "2026-01-01T00:00:00Z",
    });
    let event = serde_json::from_value(event).expect("an event");
    events.create(&PostParams::default(), &event).await.expect("created");
    let worse = status(&[]).await.exits(NOT_READY);
    for words in
        ["Topic messaging/orders", "ClusterNotFound", "FailedMount", "the volume is elsewhere"]
    {
        assert!(worse.out.contains(words), "{words}: {}", worse.out);
    }
    assert!(worse.err.contains("Topic/orders"), "{}", worse.err);
    status(&["demo"]).await.exits(0); // the topic is not of this cluster

    let unknown = status(&["dmeo"]).await.exits(NOT_FOUND);
    assert!(unknown.err.contains("there are: demo"), "{}", unknown.err);
    let nobody = powerless(kubernetes).await;
    let forbidden = ran(kube_by(&nobody, &["status"])).await.exits(REFUSED);
    for words in ["cannot list resource", "gemingaclusters", "kubectl auth can-i"] {
        assert!(forbidden.err.contains(words), "{words}: {}", forbidden.err);
    }
    let mut context = kube(kubernetes, &["status", "--context", "tset"]);
    context.arg("-o").arg("json");
    let context = ran(context).await.exits(2);
    assert!(context.err.contains("there are: test"), "{}", context.err);
    let nothing = ran(kube_by(Path::new("/nonexistent"), &["status"])).await.exits(2);
    assert!(nothing.err.contains("export KUBECONFIG"), "{}", nothing.err);

    let crds: Api<CustomResourceDefinition> = Api::all(kubernetes.client.clone());
    let name = "gemingaclusters.geminga.io";
    crds.delete(name, &DeleteParams::default()).await.expect("deleted");
    eventually("the kind is gone", async || {
        crds.get_opt(name).await.expect("it answers").is_none().then_some(())
    })
    .await;
    let bare = ran(kube(kubernetes, &["status"])).await.exits(NOT_FOUND);
    assert!(bare.err.contains("helm install geminga-operator"), "{}", bare.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_is_followed_to_its_end_left_at_its_timeout_taken_back_and_refused() {
    let (world, _operator) = World::start(5).await;
    let kubernetes = &world.kubernetes;
    let wanted = async || {
        let pool = kubernetes.get("BookiePool", "main").await.expect("there");
        pool["spec"]["replicas"].as_i64()
    };

    let few = ran(kube(kubernetes, &["drain", "main", "--replicas", "2"])).await.exits(REFUSED);
    assert!(few.err.contains("2 bookies would stay") && few.err.contains("--force"), "{}", few.err);
    ran(kube(kubernetes, &["drain", "mian"])).await.exits(NOT_FOUND);
    ran(kube(kubernetes, &["drain", "main", "--cancel"])).await.exits(REFUSED);
    ran(kube(kubernetes, &["drain", "main", "--replicas", "5"])).await.exits(2);
    assert_eq!(wanted().await, Some(5), "nothing was changed by what was refused");

    let mut drain =
        Process::start("drain", kube(kubernetes, &["drain", "main"]), kubernetes.directory());
    world
        .until("the highest one is drained", async || {
            (world.server.calls() == ["drain main-bookie-4"]).then_some(())
        })
        .await;
    assert_eq!(wanted().await, Some(4), "one fewer");
    drain.wrote("main-bookie-4: 5 ledgers").await;
    world.server.bookie("main-bookie-4", |bookie| {
        if let Some(drain) = &mut bookie.drain {
            drain.blocked = "no bookie has room".into();
        }
    });
    drain.wrote("blocked: no bookie has room").await;
    assert!(!drain.has_ended(), "{}", drain.log());
    world.prove("main-bookie-4");
    world.until("the command ends", async || drain.has_ended().then_some(())).await;
    assert_eq!(drain.ended().await, Some(0), "{}", drain.log());
    assert_eq!(world.status().await["drains"], Value::Null, "its volume was gone by then");

    let timed = ["drain", "main", "--timeout", "2s", "-o", "json"];
    let timed = ran(kube(kubernetes, &timed)).await.exits(NOT_READY);
    assert_eq!(timed.json()["done"], false);
    assert!(timed.err.contains("goes on"), "{}", timed.err);
    assert_eq!(wanted().await, Some(3));

    let mut back = Process::start(
        "back",
        kube(kubernetes, &["drain", "main", "--cancel"]),
        kubernetes.directory(),
    );
    world.until("the command ends", async || back.has_ended().then_some(())).await;
    assert_eq!(back.ended().await, Some(0), "{}", back.log());
    assert_eq!(wanted().await, Some(4));
    assert!(world.server.calls().contains(&"cancel main-bookie-3".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_says_what_would_be_done_and_does_nothing_and_a_report_has_no_secrets() {
    let (world, operator) = World::start(3).await;
    let kubernetes = &world.kubernetes;
    brokers_serve(&world).await;
    drop(operator); // what changes from here on is nobody else's doing
    let plan = async |args: &[&str]| {
        ran(kube(kubernetes, &[&["plan", "-o", "json"], args].concat())).await
    };
    let file = kubernetes.directory().join("wish.yaml");
    let path = file.to_str().expect("text");
    let write = |text: &str| std::fs::write(&file, text).expect("written");

    // As it is: no broker can be asked, which is said, and nothing is to be done.
    let still = plan(&["bookiepool/main"]).await.exits(0);
    assert_eq!(still.json()[0]["actions"], json!([]));
    assert!(still.err.contains("not seen") && still.err.contains("no broker"), "{}", still.err);

    // With another image: the pool follows its cluster, and brokers wait for it.
    let cluster = |image: &str| {
        format!(
            "apiVersion: geminga.io/v1alpha1\nkind: GemingaCluster\nmetadata: {{name: demo}}\n\
             spec: {{image: '{image}', etcd: {{endpoints: ['http://etcd:2379']}}, brokers: {{replicas: 2}}}}\n"
        )
    };
    write(&cluster("geminga:2"));
    let before = kubernetes.get("GemingaCluster", "demo").await;
    let upgrade = plan(&["-f", path]).await.exits(0).json();
    assert_eq!(upgrade[0]["reason"], "WaitingForBookies", "{upgrade}");
    assert_eq!(upgrade[1]["kind"], "BookiePool");
    let actions = upgrade[1]["actions"].to_string();
    assert!(actions.contains("apply StatefulSet main-bookie"), "{upgrade}");
    assert_eq!(kubernetes.get("GemingaCluster", "demo").await, before, "nothing was done");

    // What the API server's rules refuse is refused before it is applied.
    let pool = |size: &str| {
        format!(
            "---\napiVersion: geminga.io/v1alpha1\nkind: BookiePool\nmetadata: {{name: main}}\n\
             spec: {{cluster: demo, storage: {{size: {size}, storageClass: standard}}}}\n"
        )
    };
    write(&pool("9Gi"));
    let smaller = plan(&["-f", path]).await.exits(REFUSED);
    assert!(smaller.err.contains("never shrink"), "{}", smaller.err);
    write(&pool("20Gi"));
    let larger = plan(&["-f", path]).await.exits(0).json();
    assert!(larger[0]["actions"].to_string().contains("grow claim"), "{larger}");
    plan(&["topic/orders"]).await.exits(NOT_FOUND);
    plan(&["pod/main-bookie-0"]).await.exits(2);

    // A cluster and a pool that are not there yet, and an object on a real server.
    let (port, health) = (free_port(), free_port());
    let mut command = geminga();
    command
        .args(["standalone", "--bookies", "3", "--data-dir"])
        .arg(kubernetes.directory().join("data"))
        .arg(format!("--listen=127.0.0.1:{port}"))
        .arg(format!("--health-listen=127.0.0.1:{health}"));
    let _standalone = Process::start("standalone", command, kubernetes.directory());
    let servers = json!({"servers": [format!("http://127.0.0.1:{port}")]});
    kubernetes.apply("GemingaConnection", "out", servers).await.expect("sound");
    write(
        "apiVersion: geminga.io/v1alpha1\nkind: Topic\nmetadata: {name: orders}\n\
         spec: {clusterRef: {kind: GemingaConnection, name: out}, segments: 2}\n\
         ---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: other}\n",
    );
    let topic = eventually("the server answers", async || {
        let planned = plan(&["-f", path]).await.exits(0);
        assert!(planned.err.contains("ConfigMap other is not of our kinds"), "{}", planned.err);
        (planned.json()[0]["reason"] != "ServerUnreachable").then(|| planned.json())
    })
    .await;
    assert_eq!(topic[0]["actions"], json!(["create topic public/default/orders"]));
    assert_eq!(kubernetes.get("Topic", "orders").await, None);
    let all = ran(kube(kubernetes, &["plan"])).await.exits(0);
    assert!(all.out.contains("GemingaCluster/demo"), "{}\n{}", all.out, all.err);

    report(kubernetes).await;
}

async fn report(kubernetes: &Kubernetes) {
    let secrets: Api<Secret> = kubernetes.api();
    let canary = "c4n4ry-in-a-secret";
    let secret = json!({"metadata": {"name": "etcd-user"}, "stringData": {"password": canary}});
    let secret = serde_json::from_value(secret).expect("a secret");
    secrets.create(&PostParams::default(), &secret).await.expect("created");
    let file = kubernetes.directory().join("report.tar.gz");
    let path = file.to_str().expect("text");
    let done = ran(kube(kubernetes, &["report", "-o", "json", "--out", path])).await;
    let done = done.exits(0).json();
    assert!(done["files"].as_u64().expect("a number") > 10, "{done}");

    let tar = |args: &[&str]| {
        let output = Command::new("tar").args(args).output().expect("tar runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let names = tar(&["-tzf", path]);
    for name in [
        "versions.yaml",
        "objects/gemingaclusters.yaml",
        "objects/bookiepools.yaml",
        "objects/statefulsets.yaml",
        "objects/pods.yaml",
        "objects/persistentvolumeclaims.yaml",
        "events.yaml",
        "errors.txt",
    ] {
        assert!(
            names.lines().any(|line| line == format!("geminga-report/{name}")),
            "{name}: {names}"
        );
    }
    let all = tar(&["-xzOf", path]);
    assert!(
        all.contains("main-bookie-2") && all.contains("observedGeneration"),
        "objects with status"
    );
    assert!(!all.contains(canary) && !names.contains("secrets"), "no Secret");
    assert!(!all.contains("managedFields"));
    // There is no kubelet here: each page that cannot be had is a line, not a failure.
    let errors = tar(&["-xzOf", path, "geminga-report/errors.txt"]);
    assert!(errors.contains("metrics/main-bookie-0.txt: "), "{errors}");
    assert_eq!(done["left_out"], errors.lines().count());
    assert!(!kubernetes.directory().join("report.tar.gz.part").exists());
}
