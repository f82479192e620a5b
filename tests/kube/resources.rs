//! Tenants, namespaces, topics and subscriptions of a standalone outside Kubernetes, by an operator process.

use geminga_client::{Admin, Client, topic_name};
use geminga_proto::v1::Policies;
use kube::api::DeleteParams;
use serde_json::{Value, json};

use crate::{
    apiserver::{Kubernetes, condition},
    harness::{Process, eventually, free_port, geminga},
};

/// An API server, a standalone, an operator, and a connection `out` to the standalone.
struct World {
    kubernetes: Kubernetes,
    admin: Admin,
    health: u16,
    /// Where the standalone listens, with its metrics.
    ports: [u16; 2],
    standalone: Option<Process>,
    _operator: Process,
    _client: Client,
}

impl World {
    async fn start() -> Self {
        let kubernetes = Kubernetes::start().await;
        let (ports, health) = ([free_port(), free_port()], free_port());
        let standalone = standalone(&kubernetes, ports);
        let [port, _] = ports;
        let server = format!("http://127.0.0.1:{port}");
        let client = Client::builder().server(&server).build().await.expect("a client");
        let operator = kubernetes.operator("operator-0", health);
        let spec = json!({"servers": [server]});
        kubernetes.apply("GemingaConnection", "out", spec).await.expect("sound");
        let out = kubernetes.settles("GemingaConnection", "out", "True", "AsSpecified").await;
        assert!(out["status"]["clusterId"].is_string(), "{out}");
        Self {
            kubernetes,
            admin: client.admin(),
            health,
            ports,
            standalone: Some(standalone),
            _operator: operator,
            _client: client,
        }
    }

    fn start_standalone_again(&mut self) {
        self.standalone = Some(standalone(&self.kubernetes, self.ports));
    }

    async fn topic(&self, name: &str, change: Value) -> Value {
        let mut spec = json!({"clusterRef": {"kind": "GemingaConnection", "name": "out"}});
        for (key, value) in change.as_object().into_iter().flatten() {
            spec[key] = value.clone();
        }
        self.kubernetes.apply("Topic", name, spec).await.expect("sound")
    }

    async fn delete(&self, kind: &str, name: &str) {
        let objects = self.kubernetes.ours(kind);
        objects.delete(name, &DeleteParams::default()).await.expect("it is there");
        eventually(&format!("{kind} {name} goes"), async || {
            self.kubernetes.get(kind, name).await.is_none().then_some(())
        })
        .await;
    }

    async fn segments(&self, topic: &str) -> Option<usize> {
        let found = self.admin.topic(&topic_name(topic).expect("a name")).await.ok()?;
        Some(found.layout.expect("a layout").segments.len())
    }

    async fn own(&self, topic: &str) -> Policies {
        let scope = topic_name(topic).expect("a name").to_string();
        self.admin.policies(&scope).await.expect("it answers").own.unwrap_or_default()
    }
}

fn standalone(kubernetes: &Kubernetes, [port, metrics]: [u16; 2]) -> Process {
    let mut command = geminga();
    command
        .args(["standalone", "--bookies", "3", "--data-dir"])
        .arg(kubernetes.directory().join("data"))
        .arg(format!("--listen=127.0.0.1:{port}"))
        .arg(format!("--health-listen=127.0.0.1:{metrics}"));
    Process::start("standalone", command, kubernetes.directory())
}

#[tokio::test(flavor = "multi_thread")]
async fn many_objects_of_a_silent_server_keep_nobody_waiting_and_go_on_when_it_is_back() {
    const TOPICS: usize = 40;
    let mut world = World::start().await;
    world.topic("before", json!({})).await;
    world.kubernetes.settles("Topic", "before", "True", "AsSpecified").await;
    // It takes connections and answers nothing: each call would take its whole time.
    let standalone = world.standalone.as_mut().expect("it runs");
    standalone.signal(rustix::process::Signal::STOP);
    for n in 0..TOPICS {
        world.topic(&format!("t{n}"), json!({})).await;
    }
    let begun = tokio::time::Instant::now();
    for n in 0..TOPICS {
        let kubernetes = &world.kubernetes;
        kubernetes.settles("Topic", &format!("t{n}"), "Unknown", "ServerUnreachable").await;
    }
    // If each waited for an answer they would take some 50 s.
    assert!(begun.elapsed().as_secs() < 30, "{:?}", begun.elapsed());
    let page = metrics(world.health).await;
    let failed = "geminga_operator_server_calls_failed_total{reason=\"UNREACHABLE\"}";
    assert!(page.contains(failed), "{page}");

    world.standalone.take().expect("it runs").kill();
    world.start_standalone_again();
    for n in 0..TOPICS {
        world.kubernetes.settles("Topic", &format!("t{n}"), "True", "AsSpecified").await;
    }
    let counted = async |topics: usize| {
        let ready =
            format!("geminga_operator_objects{{kind=\"Topic\",state=\"ready\"}} {topics}\n");
        eventually(&format!("{topics} are counted"), async || {
            metrics(world.health).await.contains(&ready).then_some(())
        })
        .await;
    };
    counted(TOPICS + 1).await;
    world.delete("Topic", "before").await;
    counted(TOPICS).await;
    let page = metrics(world.health).await;
    assert!(page.contains("geminga_operator_api_requests_total{code=\"200\"}"), "{page}");
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_are_made_kept_adopted_and_left_behind_as_their_objects_say() {
    let world = World::start().await;
    let kubernetes = &world.kubernetes;

    // Made, with its policies.
    world
        .topic(
            "orders",
            json!({"segments": 3, "policies": {"retentionMs": 60_000, "retentionBytes": 7}}),
        )
        .await;
    let object = kubernetes.settles("Topic", "orders", "True", "AsSpecified").await;
    assert_eq!(object["status"]["serverName"], "public/default/orders");
    assert_eq!(object["metadata"]["finalizers"], Value::Null, "Retain needs none");
    assert_eq!(world.segments("orders").await, Some(3));
    eventually("policies are set", async || {
        (world.own("orders").await.retention_ms == Some(60_000)).then_some(())
    })
    .await;

    // A field that leaves the spec is un-set; what somebody else set stays.
    let name = topic_name("orders").expect("a name");
    let foreign = Policies { ttl_ms: Some(9), ..Policies::default() };
    world.admin.set_policies(&name.to_string(), foreign, Vec::new()).await.expect("set");
    world.topic("orders", json!({"segments": 3, "policies": {"retentionMs": 60_000}})).await;
    eventually("retention_bytes is un-set", async || {
        world.own("orders").await.retention_bytes.is_none().then_some(())
    })
    .await;
    assert_eq!(world.own("orders").await.ttl_ms, Some(9));

    // Drift is corrected by the timer: a policy, and the whole topic.
    let drift = Policies { retention_ms: Some(1), ..Policies::default() };
    world.admin.set_policies(&name.to_string(), drift, Vec::new()).await.expect("set");
    eventually("the policy comes back", async || {
        (world.own("orders").await.retention_ms == Some(60_000)).then_some(())
    })
    .await;
    world.admin.delete_topic(&name).await.expect("deleted");
    eventually("the topic comes back", async || world.segments("orders").await).await;

    // The spec is never written by anybody but its user.
    let object = kubernetes.get("Topic", "orders").await.expect("there");
    let managers = object["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
    for manager in managers.iter().filter(|m| m["manager"] != "user") {
        assert!(manager["fieldsV1"]["f:spec"].is_null(), "{manager}");
    }

    // One that exists is adopted, unless it contradicts the spec.
    world.admin.create_topic(&topic_name("old").expect("a name"), 5).await.expect("created");
    world.topic("old", json!({})).await;
    kubernetes.settles("Topic", "old", "True", "AsSpecified").await;
    assert_eq!(world.segments("old").await, Some(5));
    world.topic("clash", json!({"name": "old", "segments": 2})).await;
    let clash = kubernetes.settles("Topic", "clash", "False", "Conflict").await;
    assert_eq!(condition(&clash, "Stalled")["status"], "True");

    // What waits for its namespace goes on when it comes.
    world.topic("logs", json!({"namespace": "acme/prod"})).await;
    kubernetes.settles("Topic", "logs", "False", "ParentNotFound").await;
    let reference = json!({"kind": "GemingaConnection", "name": "out"});
    let space = json!({"clusterRef": reference, "tenant": "acme", "name": "prod"});
    kubernetes.apply("TopicNamespace", "prod", space).await.expect("sound");
    kubernetes.apply("Tenant", "acme", json!({"clusterRef": reference})).await.expect("sound");
    kubernetes.settles("Topic", "logs", "True", "AsSpecified").await;

    // Subscriptions: made, and their retry policy follows the spec.
    let sub = |attempts: u32| {
        json!({
            "clusterRef": reference, "topic": "public/default/orders", "type": "Shared",
            "start": "Earliest", "attemptsMax": attempts,
        })
    };
    kubernetes.apply("Subscription", "jobs", sub(5)).await.expect("sound");
    kubernetes.settles("Subscription", "jobs", "True", "AsSpecified").await;
    kubernetes.apply("Subscription", "jobs", sub(7)).await.expect("sound");
    let jobs = geminga_client::SubscriptionName::parse("jobs").expect("a name");
    eventually("the retry policy follows", async || {
        let found = world.admin.subscription(&name, &jobs).await.ok()?;
        (found.settings?.retry?.attempts_max == 7).then_some(())
    })
    .await;

    // Deleting the object keeps the data, unless its policy says otherwise.
    world.delete("Topic", "old").await;
    assert_eq!(world.segments("old").await, Some(5), "Retain");
    world.topic("gone", json!({"deletionPolicy": "Delete"})).await;
    kubernetes.settles("Topic", "gone", "True", "AsSpecified").await;
    assert_eq!(world.segments("gone").await, Some(1));
    world.delete("Topic", "gone").await;
    assert_eq!(world.segments("gone").await, None, "Delete");

    // Figures and health.
    let page = metrics(world.health).await;
    assert!(page.contains("geminga_operator_leader 1"), "{page}");
    assert!(
        page.contains("geminga_operator_reconciles_total{kind=\"Topic\",outcome=\"ready\"}"),
        "{page}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn paused_and_dry_run_touch_nothing_and_deletion_works_without_the_server() {
    let mut world = World::start().await;
    let kubernetes = &world.kubernetes;
    let spec = json!({
        "clusterRef": {"kind": "GemingaConnection", "name": "out"},
        "segments": 2, "deletionPolicy": "Delete",
    });

    let annotations = json!({"geminga.io/dry-run": "true"});
    kubernetes.apply_with("Topic", "dry", spec.clone(), annotations).await.expect("sound");
    let dry = kubernetes.settles("Topic", "dry", "Unknown", "DryRun").await;
    assert_eq!(dry["status"]["plan"], json!(["add finalizer", "create topic public/default/dry"]));
    assert_eq!(world.segments("dry").await, None);
    assert_eq!(dry["metadata"]["finalizers"], Value::Null);

    let annotations = json!({"geminga.io/paused": "true"});
    kubernetes.apply_with("Topic", "paused", spec.clone(), annotations).await.expect("sound");
    kubernetes.settles("Topic", "paused", "Unknown", "Paused").await;
    assert_eq!(world.segments("paused").await, None);
    kubernetes.apply("Topic", "paused", spec.clone()).await.expect("sound");
    kubernetes.settles("Topic", "paused", "True", "AsSpecified").await;
    assert_eq!(world.segments("paused").await, Some(2), "it goes on where it was left");

    // The server goes, then the connection: the object is let go all the same.
    world.standalone.take().expect("it runs").kill();
    kubernetes.settles("Topic", "paused", "Unknown", "ServerUnreachable").await;
    let topics = kubernetes.ours("Topic");
    topics.delete("paused", &DeleteParams::default()).await.expect("it is there");
    let waiting = eventually("it waits for the server", async || {
        let object = kubernetes.get("Topic", "paused").await?;
        (condition(&object, "Ready")["reason"] == "ServerUnreachable"
            && object["metadata"]["deletionTimestamp"].is_string())
        .then_some(object)
    })
    .await;
    assert_eq!(waiting["metadata"]["finalizers"], json!(["geminga.io/server-object"]));
    world.delete("GemingaConnection", "out").await;
    eventually("it is let go", async || {
        kubernetes.get("Topic", "paused").await.is_none().then_some(())
    })
    .await;
}

async fn metrics(port: u16) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.expect("it listens");
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        .await
        .expect("sent");
    let mut page = String::new();
    stream.read_to_string(&mut page).await.expect("text");
    page
}
