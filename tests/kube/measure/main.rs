//! The operator's figures of docs/performance.md: `cargo measure-kube`. Prints; asserts nothing about speed.
//!
//! `TOPICS=1000 RESYNC_MS=60000 cargo measure-kube` says what the defaults are.

#![allow(
    clippy::disallowed_methods,
    reason = "real tasks on a real runtime, outside the processes under test"
)]

#[allow(dead_code, unused_imports, reason = "each test target uses a part of the harness")]
#[path = "../../cluster/harness/mod.rs"]
mod harness;

#[allow(dead_code, reason = "each test target uses a part of it")]
#[path = "../apiserver.rs"]
mod apiserver;

#[allow(dead_code, reason = "each test target uses a part of it")]
#[path = "../helm.rs"]
mod helm;

use std::time::Duration;

use futures::{StreamExt, stream};
use kube::api::ListParams;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use apiserver::{Kubernetes, condition};
use harness::{Process, free_port, geminga, http_get};

/// Tenants, with a namespace each.
const TENANTS: u64 = 10;
/// Objects that are applied at a time.
const AT_ONCE: usize = 16;
/// Until all of them must be Ready.
const PATIENCE: Duration = Duration::from_secs(1_800);

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect("a number"))
}

/// What an operator says of itself.
struct Figures {
    at: Instant,
    reconciles: f64,
    requests: f64,
    cpu_s: f64,
    memory_bytes: f64,
}

impl Figures {
    async fn of(health: u16) -> Self {
        let page = http_get(&format!("127.0.0.1:{health}"), "/metrics").await.expect("it listens");
        let sum = |name: &str| -> f64 {
            let of_name = |line: &&str| {
                line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
            };
            let values = page.lines().filter(of_name).filter_map(|line| line.rsplit(' ').next());
            values.filter_map(|value| value.parse::<f64>().ok()).sum()
        };
        Self {
            at: Instant::now(),
            reconciles: sum("geminga_operator_reconciles_total"),
            requests: sum("geminga_operator_api_requests_total"),
            cpu_s: sum("process_cpu_seconds_total"),
            memory_bytes: sum("process_resident_memory_bytes"),
        }
    }

    fn show(&self, what: &str, before: &Self) {
        let seconds = (self.at - before.at).as_secs_f64();
        let reconciles = self.reconciles - before.reconciles;
        println!(
            "{what}: {seconds:.1} s, {reconciles:.0} reconciles ({:.1}/s), {:.0} API requests ({:.1}/s), {:.2} CPU s ({:.1} % of a core), {:.1} MiB resident",
            reconciles / seconds,
            self.requests - before.requests,
            (self.requests - before.requests) / seconds,
            self.cpu_s - before.cpu_s,
            100.0 * (self.cpu_s - before.cpu_s) / seconds,
            self.memory_bytes / f64::from(1 << 20),
        );
    }
}

fn is_ready(object: &Value) -> bool {
    let ready = condition(object, "Ready");
    ready["status"] == "True" && ready["observedGeneration"] == object["metadata"]["generation"]
}

/// Waits until so many objects of a kind are Ready.
async fn all_ready(kubernetes: &Kubernetes, kind: &str, wanted: u64) {
    let begun = Instant::now();
    loop {
        let all = kubernetes.ours(kind).list(&ListParams::default()).await.expect("it answers");
        let ready = all.iter().filter(|object| is_ready(&json!(object))).count() as u64;
        if ready == wanted {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{ready} of {wanted} {kind} objects are Ready");
        sleep(Duration::from_millis(200)).await;
    }
}

async fn apply_all(kubernetes: &Kubernetes, kind: &str, objects: Vec<(String, Value)>) {
    stream::iter(objects)
        .for_each_concurrent(AT_ONCE, |(name, spec)| async move {
            kubernetes.apply(kind, &name, spec).await.expect("sound");
        })
        .await;
}

fn standalone(kubernetes: &Kubernetes) -> (Process, String) {
    let port = free_port();
    let mut command = geminga();
    command
        .args(["standalone", "--bookies", "3", "--data-dir"])
        .arg(kubernetes.directory().join("data"))
        .arg(format!("--listen=127.0.0.1:{port}"))
        .arg(format!("--health-listen=127.0.0.1:{}", free_port()));
    let process = Process::start("standalone", command, kubernetes.directory());
    (process, format!("http://127.0.0.1:{port}"))
}

/// Many Topics: until all are Ready, what that costs, and what it costs to keep them so.
#[tokio::test(flavor = "multi_thread")]
async fn topics() {
    let (topics, resync_ms) = (number("TOPICS", 1_000), number("RESYNC_MS", 60_000));
    let kubernetes = Kubernetes::start().await;
    let (_standalone, server) = standalone(&kubernetes);
    let health = free_port();
    let _operator = kubernetes.operator_with("operator-0", health, resync_ms);
    kubernetes
        .apply("GemingaConnection", "out", json!({"servers": [server]}))
        .await
        .expect("sound");
    kubernetes.settles("GemingaConnection", "out", "True", "AsSpecified").await;
    let reference = json!({"kind": "GemingaConnection", "name": "out"});
    let tenants = (0..TENANTS).map(|t| (format!("t{t}"), json!({"clusterRef": reference})));
    apply_all(&kubernetes, "Tenant", tenants.collect()).await;
    let spaces = (0..TENANTS).map(|t| {
        let spec = json!({"clusterRef": reference, "tenant": format!("t{t}"), "name": "n"});
        (format!("t{t}"), spec)
    });
    apply_all(&kubernetes, "TopicNamespace", spaces.collect()).await;
    all_ready(&kubernetes, "Tenant", TENANTS).await;
    all_ready(&kubernetes, "TopicNamespace", TENANTS).await;
    let idle = Figures::of(health).await;
    sleep(Duration::from_secs(10)).await;
    Figures::of(health).await.show("with 10 tenants and namespaces", &idle);

    let before = Figures::of(health).await;
    let specs = (0..topics).map(|n| {
        let spec = json!({
            "clusterRef": reference, "namespace": format!("t{}/n", n % TENANTS),
            "policies": {"retentionMs": 60_000},
        });
        (format!("topic-{n}"), spec)
    });
    apply_all(&kubernetes, "Topic", specs.collect()).await;
    println!("{topics} Topics applied in {:.1} s", before.at.elapsed().as_secs_f64());
    all_ready(&kubernetes, "Topic", topics).await;
    let made = Figures::of(health).await;
    made.show(&format!("until {topics} Topics are Ready"), &before);

    sleep(Duration::from_millis(resync_ms)).await; // what is left of the beginning
    let before = Figures::of(health).await;
    sleep(Duration::from_millis(2 * resync_ms)).await;
    let after = Figures::of(health).await;
    after.show(&format!("two rounds of {} s with {topics} Topics", resync_ms / 1_000), &before);
}
