//! The story, step by step.

use std::{
    collections::BTreeMap,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    harness::{Etcd, Load, tool},
    kubernetes::{Kubernetes, NODES, executable, run, until},
    release::{
        BOOKIES, BROKERS, CLUSTER, IMAGE, NAMESPACE, NEXT_IMAGE, OPERATOR, Step, commands, pool,
        settled, shell, unsettled, upgrade,
    },
};

const CHART: &str = "charts/geminga-cluster";
/// The S3 server of the cluster.
const S3_IMAGE: &str = "localhost/versitygw:test";

#[tokio::test(flavor = "multi_thread")]
async fn a_release_lives_through_everything_and_loses_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let step = Step::begin("nodes come up");
    let kubernetes = Kubernetes::up();
    step.end("");
    let step = Step::begin("images are brought to the nodes");
    let geminga = executable(folder.path());
    kubernetes.load(IMAGE, &geminga);
    kubernetes.load(NEXT_IMAGE, &geminga);
    kubernetes.load(&etcd_image(), Path::new(Etcd::binary()));
    kubernetes.load(S3_IMAGE, Path::new(tool("versitygw")));
    step.end("");

    the_readme(&kubernetes).await;
    the_command_line(&kubernetes);
    let servers = servers(&kubernetes);
    let loads = [Load::at(&servers, "one", 1).await, Load::at(&servers, "four", 4).await];
    let story = Story { kubernetes, loads };
    story.processes_die().await;
    story.pods_are_deleted().await;
    story.brokers_scale().await;
    story.a_node_loses_its_power().await;
    story.bookies_scale().await;
    story.the_image_changes().await;
    story.cold_data_goes_to_object_storage().await;
    story.the_end(&servers).await;
}

/// The README's commands, as printed, from nothing to the first message.
async fn the_readme(kubernetes: &Kubernetes) {
    let commands = commands();
    assert_eq!(commands.len(), 4, "four commands: {commands:#?}");
    let step = Step::begin("helm install, twice, to Ready");
    for command in &commands[..2] {
        shell(kubernetes, command);
    }
    settled(kubernetes).await;
    step.end("");
    let step = Step::begin("the first message");
    shell(kubernetes, &commands[2]);
    let consumed = shell(kubernetes, &commands[3]);
    assert!(consumed.contains("hello"), "{consumed}");
    step.end("");
    let step = Step::begin("helm test");
    kubernetes.helm(&["test", CLUSTER, "--namespace", NAMESPACE, "--logs"]);
    step.end("");
}

/// What only real pods can show of `geminga kube`: ports that are forwarded, logs, metrics by the API server's proxy.
fn the_command_line(kubernetes: &Kubernetes) {
    let step = Step::begin("geminga kube status, plan, report");
    let kube = |args: &[&str]| {
        let args = [&["kube"], args, &["--namespace", NAMESPACE]].concat();
        run(&mut kubernetes.command("geminga", &args))
    };
    assert!(kube(&["status"]).contains("3 registered, 3 wanted"));
    // Nothing is to be done, as a broker says that is reached through its pod.
    let planned = kube(&["plan", "-o", "json"]);
    let planned: Vec<Value> = serde_json::from_str(&planned).expect("a list");
    let idle = planned.iter().filter(|object| object["actions"] == serde_json::json!([])).count();
    assert!(planned.len() == 2 && idle == 2, "cluster and pool have nothing to do: {planned:?}");
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("report.tar.gz").to_string_lossy().into_owned();
    kube(&["report", "--out", &file]);
    let read = |member: &str| run(Command::new("tar").args(["xzOf", &file, "--wildcards", member]));
    assert_eq!(read("*/errors.txt"), "", "everything could be read");
    assert!(read("*/bookie.log").contains("bookie"), "logs are in it");
    assert!(read("*/metrics/demo-broker-*").contains("geminga_broker_segments"));
    step.end("");
}

/// The Service, as this machine reaches it.
fn servers(kubernetes: &Kubernetes) -> String {
    let service = kubernetes.object(NAMESPACE, &["service", "demo-broker"]);
    format!("http://{}:8650", service["spec"]["clusterIP"].as_str().expect("an address"))
}

struct Story {
    kubernetes: Kubernetes,
    loads: [Load; 2],
}

impl Story {
    async fn goes_on(&self, when: &str) {
        for load in &self.loads {
            load.goes_on(when).await;
        }
    }

    /// Scales with `kubectl scale` and waits for the end.
    async fn scale(&self, what: &str, replicas: u32) {
        self.kubernetes.kubectl(&[
            "-n",
            NAMESPACE,
            "scale",
            what,
            &format!("--replicas={replicas}"),
        ]);
        settled(&self.kubernetes).await;
    }

    /// Longest time without a receipt, and messages not acknowledged, of both loads since this was last asked.
    fn told(&self) -> String {
        let pause = self.loads.iter().map(Load::longest_pause).max().expect("loads");
        let failed: usize = self.loads.iter().map(Load::failed).sum();
        format!("longest pause {:.1} s, {failed} messages not acknowledged", pause.as_secs_f64())
    }

    async fn processes_die(&self) {
        self.told();
        let step = Step::begin("kill -9 of a bookie's process, then of the broker's");
        let bookie = &self.kubernetes.pods(NAMESPACE, BOOKIES)[0];
        self.kubernetes.kill_process(NAMESPACE, bookie);
        self.goes_on("a bookie's process was killed").await;
        settled(&self.kubernetes).await;
        let broker = &self.kubernetes.pods(NAMESPACE, BROKERS)[0];
        self.kubernetes.kill_process(NAMESPACE, broker);
        self.goes_on("the broker's process was killed").await;
        settled(&self.kubernetes).await;
        step.end(&self.told());
    }

    async fn pods_are_deleted(&self) {
        let step = Step::begin("pods of a bookie, the broker and the operator are deleted at once");
        let pods = [BOOKIES, BROKERS, OPERATOR]
            .map(|labels| self.kubernetes.pods(NAMESPACE, labels)[0].clone());
        let [bookie, broker, operator] = &pods;
        self.kubernetes.kubectl(&["-n", NAMESPACE, "delete", "pod", bookie, broker, operator]);
        self.goes_on("pods were deleted").await;
        settled(&self.kubernetes).await;
        step.end(&self.told());
    }

    async fn brokers_scale(&self) {
        let step = Step::begin("brokers 1 -> 3 -> 1");
        self.scale("gemingacluster/demo", 3).await;
        self.goes_on("three brokers").await;
        self.scale("gemingacluster/demo", 1).await;
        self.goes_on("one broker").await;
        step.end(&self.told());
        assert_eq!(self.kubernetes.pods(NAMESPACE, BROKERS).len(), 1);
    }

    /// Not the node by which this machine reaches services, nor that of the one etcd member: whatever else runs on it.
    async fn a_node_loses_its_power(&self) {
        self.scale("gemingacluster/demo", 2).await;
        let etcd = self.kubernetes.object(NAMESPACE, &["pod", "demo-etcd-0"]);
        let victim = (2..=NODES)
            .rev()
            .find(|n| etcd["spec"]["nodeName"] != format!("node{n}"))
            .expect("three nodes");
        let node = format!("node{victim}");
        let step = Step::begin("a node loses its power");
        self.kubernetes.power_off(victim);
        self.goes_on("a node has no power").await;
        until(async || {
            let seen = self.kubernetes.object("default", &["node", &node]);
            let conditions = seen["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let ready = conditions
                .iter()
                .find(|condition| condition["type"] == "Ready")
                .map(|ready| ready["status"].clone());
            if ready == Some("True".into()) {
                Err(format!("{node} counts as ready"))
            } else {
                Ok(())
            }
        })
        .await;
        self.goes_on("the node is lost").await;
        step.end(&self.told());
        let step = Step::begin("and comes back with its disks");
        self.kubernetes.power_on();
        self.kubernetes.kubectl(&[
            "wait",
            "--for=condition=Ready",
            "node",
            "--all",
            "--timeout=120s",
        ]);
        settled(&self.kubernetes).await;
        self.goes_on("the node is back").await;
        step.end(&self.told());
        self.scale("gemingacluster/demo", 1).await;
    }

    /// Five bookies, then three again: each of the two that go is drained with proof, through a restart of the operator.
    async fn bookies_scale(&self) {
        let step = Step::begin("bookies 3 -> 5");
        self.scale("bookiepool/demo-main", 5).await;
        self.goes_on("five bookies").await;
        step.end(&self.told());
        // Something to move: both new bookies hold ledgers only from here on.
        self.kubernetes.kubectl(&["-n", NAMESPACE, "delete", "pod", "-l", BROKERS, "--wait=false"]);
        self.goes_on("ledgers over five bookies").await;
        self.fill();

        let step = Step::begin("bookies 5 -> 3");
        self.kubernetes.kubectl(&[
            "-n",
            NAMESPACE,
            "scale",
            "bookiepool/demo-main",
            "--replicas=3",
        ]);
        until(async || {
            let drains = pool(&self.kubernetes)["status"]["drains"].clone();
            drains[0]["bookie"]
                .is_string()
                .then_some(())
                .ok_or_else(|| format!("no drain is noted: {drains}"))
        })
        .await;
        let claims = self.claims();
        assert_eq!(claims.len(), 5, "no volume goes before the proof: {claims:?}");
        self.kubernetes.kubectl(&[
            "-n",
            NAMESPACE,
            "delete",
            "pod",
            "-l",
            OPERATOR,
            "--wait=false",
        ]);
        let drains = self.drains_end().await;
        self.goes_on("three bookies").await;
        step.end(&format!("{}; {drains}", self.told()));
        assert_eq!(self.kubernetes.pods(NAMESPACE, BOOKIES).len(), 3);
        until(async || {
            let claims = self.claims();
            (claims.len() == 3)
                .then_some(())
                .ok_or_else(|| format!("volumes of drained bookies: {claims:?}"))
        })
        .await;
    }

    /// Follows the drains to their end: how much each had to move, and how long until its proof.
    async fn drains_end(&self) -> String {
        let mut seen: BTreeMap<String, (Instant, f64, Option<Duration>)> = BTreeMap::new();
        until(async || {
            let notes =
                pool(&self.kubernetes)["status"]["drains"].as_array().cloned().unwrap_or_default();
            for note in notes {
                let bookie = note["bookie"].as_str().expect("a name").to_owned();
                let (begun, most, proven) =
                    seen.entry(bookie).or_insert((Instant::now(), 0.0, None));
                *most = most.max(note["bytesLeft"].as_f64().unwrap_or_default());
                if note["proven"] == true {
                    proven.get_or_insert(begun.elapsed());
                }
            }
            unsettled(&self.kubernetes).map_or(Ok(()), Err)
        })
        .await;
        let told = seen.iter().map(|(bookie, (_, most, proven))| {
            let took = proven
                .map_or_else(|| "?".to_owned(), |proven| format!("{:.0}", proven.as_secs_f64()));
            format!("{bookie} moved {:.0} MB, proven after {took} s", most / 1e6)
        });
        told.collect::<Vec<_>>().join(", ")
    }

    /// So many megabytes more, where figures are taken: `NODES_FILL_MB`.
    fn fill(&self) {
        let Ok(megabytes) = std::env::var("NODES_FILL_MB") else { return };
        let messages = (megabytes.parse::<u64>().expect("a number") * 1_000).to_string();
        let servers = servers(&self.kubernetes);
        let args = [
            "bench",
            "produce",
            "--server",
            &servers,
            "--segments",
            "8",
            "--size",
            "1000",
            "--count",
            &messages,
        ];
        println!("{}", run(&mut self.kubernetes.command("geminga", &args)));
    }

    fn claims(&self) -> Vec<String> {
        let list = self.kubernetes.object(NAMESPACE, &["pvc", "-l", BOOKIES]);
        let names = list["items"].as_array().expect("a list").iter();
        names.map(|claim| claim["metadata"]["name"].as_str().expect("a name").to_owned()).collect()
    }

    /// Bookies one at a time, then the brokers; clients notice nothing.
    async fn the_image_changes(&self) {
        self.scale("gemingacluster/demo", 2).await;
        self.told();
        let before: usize = self.loads.iter().map(Load::failed).sum();
        let step = Step::begin("a rolling upgrade under load");
        let (_, tag) = NEXT_IMAGE.split_once(':').expect("a tag");
        upgrade(
            &self.kubernetes,
            CLUSTER,
            CHART,
            &[&format!("image.tag={tag}"), "brokers.replicas=2"],
        );
        settled(&self.kubernetes).await;
        self.goes_on("every pod has the next image").await;
        step.end(&self.told());
        let after: usize = self.loads.iter().map(Load::failed).sum();
        assert_eq!(after, before, "messages that clients had to handle");
        let pods = self.kubernetes.object(NAMESPACE, &["pods", "-l", "geminga.io/cluster=demo"]);
        let items = pods["items"].as_array().expect("a list").iter();
        for pod in items.filter(|pod| pod["metadata"]["deletionTimestamp"].is_null()) {
            assert_eq!(
                pod["spec"]["containers"][0]["image"], NEXT_IMAGE,
                "{}",
                pod["metadata"]["name"]
            );
        }
    }

    async fn cold_data_goes_to_object_storage(&self) {
        let step = Step::begin("cold data goes to an S3 server of the cluster");
        self.apply(&s3_objects());
        self.kubernetes.kubectl(&[
            "-n",
            NAMESPACE,
            "rollout",
            "status",
            "deployment/s3",
            "--timeout=120s",
        ]);
        let values = ["tiering.url=s3://geminga/cold", "tiering.credentialsSecret=s3"];
        upgrade(&self.kubernetes, CLUSTER, CHART, &values);
        settled(&self.kubernetes).await;
        self.goes_on("brokers know the object store").await;
        let servers = servers(&self.kubernetes);
        let bytes = until(async || {
            let geminga = |args: &[&str]| {
                let output = self
                    .kubernetes
                    .command("geminga", args)
                    .env("GEMINGA_SERVER", &servers)
                    .output();
                let output = output.map_err(|error| error.to_string())?;
                let (out, err) = (
                    String::from_utf8_lossy(&output.stdout),
                    String::from_utf8_lossy(&output.stderr),
                );
                if output.status.success() {
                    Ok(out.into_owned())
                } else {
                    Err(format!("{out}{err}"))
                }
            };
            geminga(&["tier", "offload", "four", "--roll"])?;
            let verified = geminga(&["tier", "verify", "four", "-o", "json"])?;
            let verified: Value =
                serde_json::from_str(&verified).map_err(|error| error.to_string())?;
            let bytes = verified["bytes"].as_u64().unwrap_or_default();
            (bytes > 0).then_some(bytes).ok_or(format!("nothing was offloaded: {verified}"))
        })
        .await;
        self.goes_on("ledgers were offloaded").await;
        step.end(&format!("{}; {bytes} bytes verified", self.told()));
    }

    fn apply(&self, objects: &Value) {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("objects.json");
        std::fs::write(&file, objects.to_string()).expect("written");
        self.kubernetes.kubectl(&["-n", NAMESPACE, "apply", "-f", &file.to_string_lossy()]);
    }

    /// Judges everything, and uninstalls: what holds data stays.
    async fn the_end(self, servers: &str) {
        let step = Step::begin("helm test once more, then the history checker");
        self.kubernetes.helm(&["test", CLUSTER, "--namespace", NAMESPACE]);
        let mut acknowledged = 0;
        let failed: usize = self.loads.iter().map(Load::failed).sum();
        for load in self.loads {
            acknowledged += load.finish_at(servers).await;
        }
        step.end(&format!("{acknowledged} messages acknowledged, none lost, changed, repeated in the log or reordered; {failed} not acknowledged"));
        let kubernetes = self.kubernetes;
        let step = Step::begin("helm uninstall, twice");
        kubernetes.helm(&["uninstall", CLUSTER, "--namespace", NAMESPACE, "--wait"]);
        until(async || {
            let pods = kubernetes.pods(NAMESPACE, "geminga.io/cluster=demo");
            pods.is_empty().then_some(()).ok_or_else(|| format!("{pods:?} stay"))
        })
        .await;
        kubernetes.helm(&["uninstall", "geminga-operator", "--namespace", NAMESPACE, "--wait"]);
        let claims = kubernetes.object(NAMESPACE, &["pvc", "-l", BOOKIES]);
        assert_eq!(claims["items"].as_array().map(Vec::len), Some(3), "volumes with data stay");
        assert!(
            kubernetes.kubectl(&["get", "crd"]).contains("topics.geminga.io"),
            "definitions stay"
        );
        step.end("");
    }
}

/// The image that the chart names for its etcd: built here, brought to the nodes under that name.
fn etcd_image() -> String {
    let values = include_str!("../../charts/geminga-cluster/values.yaml");
    let values: Value = serde_saphyr::from_str(values).expect("YAML");
    let image = &values["etcd"]["bundled"]["image"];
    let part = |name: &str| image[name].as_str().expect("text").to_owned();
    format!("{}:{}", part("repository"), part("tag"))
}

/// An S3 server with one bucket, and a Secret with what brokers need to reach it.
fn s3_objects() -> Value {
    let labels = serde_json::json!({"app": "s3"});
    let metadata = |name: &str| serde_json::json!({"name": name, "labels": labels});
    serde_json::json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Secret", "metadata": metadata("s3"), "stringData": {
            "AWS_ACCESS_KEY_ID": "geminga-test", "AWS_SECRET_ACCESS_KEY": "geminga-test-secret",
            "AWS_REGION": "us-east-1", "AWS_ENDPOINT": "http://s3:7070", "AWS_ALLOW_HTTP": "true",
            "ROOT_ACCESS_KEY": "geminga-test", "ROOT_SECRET_KEY": "geminga-test-secret",
        }},
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata("s3"), "spec": {
            "selector": labels, "ports": [{"port": 7070}],
        }},
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata("s3"), "spec": {
            "replicas": 1, "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {
                "containers": [{
                    "name": "s3", "image": S3_IMAGE, "args": ["--port", ":7070", "posix", "/objects"],
                    "envFrom": [{"secretRef": {"name": "s3"}}],
                    "volumeMounts": [
                        {"name": "bucket", "mountPath": "/objects"},
                        {"name": "bucket", "mountPath": "/objects/geminga", "subPath": "geminga"},
                    ],
                    "readinessProbe": {"tcpSocket": {"port": 7070}, "periodSeconds": 1},
                }],
                "securityContext": {"fsGroup": 65_532},
                "volumes": [{"name": "bucket", "emptyDir": {}}],
            }},
        }},
    ]})
}
