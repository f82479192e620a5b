//! The figures of docs/performance.md that need real processes: `cargo measure NAME`. Prints; asserts nothing about speed.

#![allow(
    clippy::disallowed_methods,
    reason = "real tasks on a real runtime, outside the processes under test"
)]

#[allow(dead_code, unused_imports, reason = "each test target uses a part of the harness")]
#[path = "../harness/mod.rs"]
mod harness;
mod subscriptions;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::StreamExt;
use geminga_client::{Batching, Message, Routing, Start, topic_name};
use rand::{RngCore, SeedableRng, rngs::SmallRng};
use tokio::time::{Instant, sleep};

use harness::{BookieSpec, Cluster, ClusterSpec, Load, S3, eventually};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect("a number"))
}

/// Milliseconds: count, p50, p99, max.
fn show(what: &str, mut samples: Vec<Duration>) {
    samples.sort();
    let at = |share: f64| samples[((samples.len() - 1) as f64 * share).round() as usize];
    let ms = |time: Duration| time.as_secs_f64() * 1_000.0;
    println!(
        "{what}: {} samples, p50 {:.0} ms, p99 {:.0} ms, max {:.0} ms",
        samples.len(),
        ms(at(0.5)),
        ms(at(0.99)),
        ms(at(1.0))
    );
}

/// From `kill -9` of the owner to the first new receipt at a client.
#[tokio::test(flavor = "multi_thread")]
async fn failover() {
    let mut cluster = Cluster::start(ClusterSpec { brokers: 3, ..ClusterSpec::default() }).await;
    let client = harness::client(&cluster).await;
    client.admin().create_topic(&topic_name("one").expect("a name"), 1).await.expect("created");
    let probe = Probe::start(&client, "one", 0).await;
    let mut samples = Vec::new();
    for _ in 0..number("ROUNDS", 50) {
        let owner = cluster.owner("one").await;
        let killed = Instant::now();
        cluster.kill(&owner);
        samples.push(probe.first_receipt_sent_after(killed).await - killed);
        cluster.start_member(&owner);
        cluster.ready(&owner).await;
    }
    show("kill -9 of the owner to the first new receipt (lease 5 s)", samples);
}

/// The longest time a segment gave no receipt while it moved, seen by a client that sends every 2 ms.
#[tokio::test(flavor = "multi_thread")]
async fn planned_move() {
    const SEGMENTS: u32 = 16;
    let cluster = Cluster::start(ClusterSpec::default()).await;
    let client = harness::client(&cluster).await;
    let name = topic_name("many").expect("a name");
    client.admin().create_topic(&name, SEGMENTS).await.expect("created");
    let mut probes = Vec::new();
    for segment in 0..SEGMENTS {
        probes.push(Probe::start(&client, "many", segment).await);
    }
    let mut samples = Vec::new();
    let mut still = Vec::new();
    while samples.len() < number("SAMPLES", 50) as usize {
        for broker in ["broker-0", "broker-1"] {
            sleep(Duration::from_secs(2)).await;
            still.extend(probes.iter().map(Probe::take_longest_gap));
            sleep(Duration::from_secs(2)).await;
            still.extend(probes.iter().map(Probe::take_longest_gap));
            let before = client.admin().locate_topic(&name).await.expect("answered");
            client.admin().drain_broker(broker, false).await.expect("it drains");
            eventually("it has nothing", async || {
                let brokers = client.admin().brokers().await.ok()?;
                brokers.iter().find(|b| b.id == broker).filter(|b| b.bundles == 0).map(drop)
            })
            .await;
            sleep(Duration::from_secs(1)).await;
            for (place, probe) in before.iter().zip(&probes) {
                let gap = probe.take_longest_gap();
                if place.broker == broker {
                    samples.push(gap);
                }
            }
            client.admin().drain_broker(broker, true).await.expect("taken back");
            sleep(Duration::from_secs(25)).await; // it gets its share again
        }
    }
    show("pause of a segment in a planned move", samples);
    show("the same client's longest gap in 2 s without a move", still);
}

/// A producer that sends one message every 2 ms and waits for no receipt before the next.
struct Probe {
    receipts: Arc<Mutex<Receipts>>,
    stop: Arc<AtomicBool>,
}

#[derive(Default)]
struct Receipts {
    /// When the last receipt came of a message that was sent when.
    last: Option<(Instant, Instant)>,
    longest_gap: Duration,
    /// Of messages sent after this, the first receipt.
    wanted: Option<Instant>,
    found: Option<Instant>,
}

impl Probe {
    async fn start(client: &geminga_client::Client, topic: &str, segment: u32) -> Self {
        let producer = client
            .producer(topic)
            .routing(Routing::Segment(segment))
            .batching(Batching { linger: Duration::ZERO, ..Batching::default() })
            .message_timeout(Duration::from_secs(120))
            .build()
            .await
            .expect("opened");
        let receipts: Arc<Mutex<Receipts>> = Arc::default();
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, stopped) = (Arc::clone(&receipts), Arc::clone(&stop));
        tokio::spawn(async move {
            let mut pace = tokio::time::interval(Duration::from_millis(2));
            pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            while !stopped.load(Ordering::SeqCst) {
                pace.tick().await;
                let sent = Instant::now();
                let pending = producer.send(Message::new("probe")).await.expect("taken");
                let (shared, stopped) = (Arc::clone(&shared), Arc::clone(&stopped));
                tokio::spawn(async move {
                    match pending.await {
                        Ok(_) => shared.lock().expect("no panic").came(sent),
                        Err(error) => {
                            assert!(stopped.load(Ordering::SeqCst), "at the client: {error}")
                        }
                    }
                });
            }
        });
        let probe = Self { receipts, stop };
        let begun = Instant::now();
        probe.first_receipt_sent_after(begun).await;
        probe
    }

    /// When the first receipt came of a message sent after `then`.
    async fn first_receipt_sent_after(&self, then: Instant) -> Instant {
        {
            let mut receipts = self.receipts.lock().expect("no panic");
            (receipts.wanted, receipts.found) = (Some(then), None);
        }
        let deadline = then + harness::PATIENCE;
        loop {
            if let Some(found) = self.receipts.lock().expect("no panic").found {
                return found;
            }
            assert!(Instant::now() < deadline, "no receipt within {:?}", harness::PATIENCE);
            sleep(Duration::from_millis(1)).await;
        }
    }

    fn take_longest_gap(&self) -> Duration {
        let mut receipts = self.receipts.lock().expect("no panic");
        let open = receipts.last.map_or(Duration::ZERO, |(came, _)| came.elapsed());
        std::mem::take(&mut receipts.longest_gap).max(open)
    }
}

impl Receipts {
    fn came(&mut self, sent: Instant) {
        let now = Instant::now();
        if let Some((last, _)) = self.last {
            self.longest_gap = self.longest_gap.max(now - last);
        }
        self.last = Some((now, sent));
        if self.found.is_none() && self.wanted.is_some_and(|wanted| sent > wanted) {
            self.found = Some(now);
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

/// CPU seconds of all server processes for a million 1 KiB messages, published as fast as they are taken.
#[tokio::test(flavor = "multi_thread")]
async fn cpu_per_million() {
    let count = number("COUNT", 1_000_000);
    let cluster = Cluster::start(ClusterSpec { brokers: 1, ..ClusterSpec::default() }).await;
    let members = ["broker-0", "bookie-0", "bookie-1", "bookie-2"];
    cluster.cli(&["namespace", "create", "bench", "--auto-create-topics", "true"]).await;
    let cpu = async || {
        let mut of = Vec::new();
        for member in members {
            of.push(cluster.metric(member, "process_cpu_seconds_total").await.expect("served"));
        }
        of
    };
    for _ in 0..3 {
        let before = cpu().await;
        let count_text = count.to_string();
        let args = ["bench", "produce", "--count", &count_text, "--segments", "4", "--metrics", ""];
        let report = cluster.cli(&args).await;
        let after = cpu().await;
        let used: Vec<f64> =
            before.iter().zip(&after).map(|(b, a)| (a - b) * 1e6 / count as f64).collect();
        println!(
            "cluster: {} msg/s; CPU-s per million: broker {:.2}, bookies {:.2} {:.2} {:.2}, all {:.2}",
            report["messages_per_second"],
            used[0],
            used[1],
            used[2],
            used[3],
            used.iter().sum::<f64>()
        );
    }
}

/// Bytes a second that are copied after a bookie was lost.
#[tokio::test(flavor = "multi_thread")]
async fn re_replication() {
    let spec = ClusterSpec {
        bookies: vec![BookieSpec::default(); 4],
        brokers: 1,
        settings: vec![
            ("bookie-lost-after-ms", "2000".into()),
            ("bookie-scan-ms", "2000".into()),
            ("bookie-copy-bytes-per-second", "10000000000".into()),
        ],
        ..ClusterSpec::default()
    };
    let mut cluster = Cluster::start(spec).await;
    let count = number("COUNT", 1_000_000).to_string();
    cluster.cli(&["bench", "produce", "--count", &count, "--segments", "4", "--metrics", ""]).await;
    cluster.kill("bookie-1");
    eventually("the loss is seen", async || {
        let status = cluster.cli(&["cluster", "status"]).await;
        (status["ledgers_under_replicated"].as_u64()? > 0).then_some(())
    })
    .await;
    let begun = Instant::now();
    let copied = async |cluster: &Cluster| {
        let mut bytes = 0.0;
        for bookie in ["bookie-0", "bookie-2", "bookie-3"] {
            let name = "geminga_bookie_repair_bytes_total";
            bytes += cluster.metric(bookie, name).await.expect("served");
        }
        bytes
    };
    // Only what is copied between the first look that sees a copy and the last is timed: the rest is waiting for the next scan.
    let (mut first, mut last) = (None, (begun, 0.0));
    let mut looks = 0_u32;
    loop {
        let bytes = copied(&cluster).await;
        let now = Instant::now();
        if bytes > last.1 {
            first.get_or_insert((now, bytes));
            last = (now, bytes);
        }
        looks += 1;
        if looks.is_multiple_of(10) {
            let status = cluster.cli(&["cluster", "status"]).await;
            if status["ledgers_under_replicated"] == 0 {
                break;
            }
        }
        assert!(begun.elapsed() < Duration::from_secs(300), "not all is copied");
        sleep(Duration::from_millis(50)).await;
    }
    let first = first.expect("something was copied");
    println!(
        "re-replication: {:.0} MB, all listed ledgers done in {:.1} s; {:.1} MB/s between the first and the last copy",
        last.1 / 1e6,
        begun.elapsed().as_secs_f64(),
        (last.1 - first.1) / 1e6 / (last.0 - first.0).as_secs_f64()
    );
}

/// Offload, and reading everything from the start: from bookies, from object storage, and a bare GET of the same objects.
#[tokio::test(flavor = "multi_thread")]
async fn tiering() {
    let count = number("COUNT", 500_000);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let s3 = S3::start(directory.path()).await;
    let spec = ClusterSpec {
        brokers: 1,
        settings: vec![
            ("tier-url", "s3://geminga/cold".to_owned()),
            ("ledger-roll-bytes", (64 << 20).to_string()),
        ],
        environment: s3.environment(),
        ..ClusterSpec::default()
    };
    let mut cluster = Cluster::start(spec).await;
    let keep = ["--retention-ms", "86400000", "--retention-bytes", "1000000000000"];
    cluster.cli(&[&["policy", "set"], &keep[..]].concat()).await;
    let client = harness::client(&cluster).await;
    client.admin().create_topic(&topic_name("cold").expect("a name"), 1).await.expect("created");
    let producer = client.producer("cold").build().await.expect("opened");
    // Blocks of objects are compressed: values that do not shrink are the honest ones.
    let (mut noise, mut last) = (SmallRng::seed_from_u64(7), None);
    for _ in 0..count {
        let mut value = vec![0; 1024];
        noise.fill_bytes(&mut value);
        last = Some(producer.send(Message::new(value)).await.expect("taken"));
    }
    last.expect("one at least").await.expect("stored");
    let megabytes = (count * 1024) as f64 / 1e6;

    restart_broker(&mut cluster).await; // nothing in its cache
    let from_bookies = read_all(&cluster, "from-bookies", count).await;
    let begun = Instant::now();
    cluster.cli(&["tier", "offload", "cold", "--roll"]).await;
    let offload = begun.elapsed().as_secs_f64();
    cluster.cli(&["policy", "set", "--delete-lag-ms", "0", "--offload-after-ms", "0"]).await;
    eventually("bookies hold none of it", async || {
        let tier = cluster.cli(&["tier", "status", "cold"]).await;
        let only = tier[0]["object_only"].as_u64()?;
        (only > 0 && Some(only) == tier[0]["ledgers"].as_u64()).then_some(())
    })
    .await;
    restart_broker(&mut cluster).await;
    let from_objects = read_all(&cluster, "from-objects", count).await;
    let (bytes, get) = s3.get_all().await;
    let rate = |seconds: f64| megabytes / seconds;
    println!(
        "{count} messages of 1 KiB, {megabytes:.0} MB; {:.0} MB in objects",
        bytes as f64 / 1e6
    );
    println!("offload: {offload:.2} s, {:.0} MB/s", rate(offload));
    println!("catch-up read from bookies: {:.0} MB/s", rate(from_bookies));
    println!("catch-up read from objects: {:.0} MB/s", rate(from_objects));
    println!(
        "bare GET of the same objects, one after the other: {:.0} MB/s",
        bytes as f64 / 1e6 / get
    );
}

async fn restart_broker(cluster: &mut Cluster) {
    cluster.terminate("broker-0").await;
    cluster.start_member("broker-0");
    cluster.ready("broker-0").await;
}

/// Seconds until a new subscription has got so many messages of `cold`.
async fn read_all(cluster: &Cluster, subscription: &str, count: u64) -> f64 {
    let client = harness::client(cluster).await;
    let begun = Instant::now();
    let mut consumer = client
        .consumer("cold", subscription)
        .start(Start::Earliest)
        .window(100_000, 64 << 20)
        .build()
        .await
        .expect("opened");
    for n in 0..count {
        let message = consumer.next().await.expect("goes on").expect("delivered");
        if n % 1_000 == 999 || n + 1 == count {
            let _confirmed_later = message.accept_up_to();
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    consumer.close().await.expect("settled");
    seconds
}

/// Keys, bytes and transactions in etcd: an idle topic, a takeover, a roll, an ack.
#[tokio::test(flavor = "multi_thread")]
async fn etcd_budget() {
    let spec = ClusterSpec {
        settings: vec![("ledger-roll-bytes", "262144".into())],
        ..ClusterSpec::default()
    };
    let mut cluster = Cluster::start(spec).await;
    let revision = async |cluster: &Cluster| {
        cluster.cli(&["cluster", "status"]).await["revision"].as_i64().expect("a number")
    };
    let quiet = async |cluster: &Cluster| {
        let before = revision(cluster).await;
        sleep(Duration::from_secs(20)).await;
        (revision(cluster).await - before) as f64 / 20.0
    };
    let (keys, bytes) = cluster.etcd.size().await;
    for topic in 0..100 {
        cluster.cli(&["topic", "create", &format!("idle-{topic}")]).await;
    }
    let (more_keys, more_bytes) = cluster.etcd.size().await;
    println!(
        "idle topic: {:.1} keys, {:.0} bytes of keys and values",
        (more_keys - keys) as f64 / 100.0,
        (more_bytes - bytes) as f64 / 100.0
    );
    println!("transactions a second with 100 idle topics: {:.2}", quiet(&cluster).await);
    let load = Load::start(&cluster, "busy", 1).await;
    let (before, acknowledged) = (revision(&cluster).await, load.acknowledged());
    let ledgers = async |cluster: &Cluster| {
        let ledgers = cluster.cli(&["ledger", "ls", "--topic", "busy"]).await;
        ledgers.as_array().map_or(0, Vec::len)
    };
    let ledgers_before = ledgers(&cluster).await;
    sleep(Duration::from_secs(20)).await;
    let rolls = ledgers(&cluster).await - ledgers_before;
    let changes = revision(&cluster).await - before;
    println!(
        "{} messages published and acknowledged, {rolls} rolls, {changes} transactions: {:.2} a roll if acks cost none",
        load.acknowledged() - acknowledged,
        changes as f64 / rolls.max(1) as f64
    );
    let owner = cluster.owner("busy").await;
    let before = revision(&cluster).await;
    cluster.kill(&owner);
    load.goes_on("a takeover").await;
    println!(
        "takeover of one segment, claims and first ledgers included: {} transactions",
        revision(&cluster).await - before
    );
    load.finish(&cluster).await;
}
