//! Figures of subscriptions, timers and many topics, on one standalone process: `cargo measure NAME`.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures::{StreamExt, stream};
use geminga_client::{Client, Consumer, Message, Start, topic_name};
use geminga_proto::v1::{HeldBy, SubscriptionSettings, SubscriptionType};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use super::{
    harness::{Process, free_port, geminga, http_get},
    number,
};

/// A standalone with one bookie; its data goes with it.
struct Standalone {
    process: Option<Process>,
    port: u16,
    health: String,
    directory: TempDir,
}

impl Standalone {
    async fn start() -> Self {
        let mut standalone = Self {
            process: None,
            port: free_port(),
            health: format!("127.0.0.1:{}", free_port()),
            directory: tempfile::tempdir().expect("a temporary directory"),
        };
        standalone.boot().await;
        standalone
    }

    /// Starts the process; returns the time to its readiness.
    async fn boot(&mut self) -> Duration {
        let mut command = geminga();
        let data = self.directory.path().join("data");
        command.args(["standalone", "--bookies", "1", "--data-dir"]).arg(data).args([
            &format!("--listen=127.0.0.1:{}", self.port),
            &format!("--health-listen={}", self.health),
        ]);
        let begun = Instant::now();
        self.process = Some(Process::start("standalone", command, self.directory.path()));
        while http_get(&self.health, "/readyz").await.is_none_or(|text| text != "ready\n") {
            assert!(begun.elapsed() < Duration::from_secs(120), "it does not get ready");
            sleep(Duration::from_millis(1)).await;
        }
        begun.elapsed()
    }

    fn kill(&mut self) {
        self.process.take().expect("it runs").kill();
    }

    async fn client(&self) -> Client {
        let server = format!("http://127.0.0.1:{}", self.port);
        Client::builder().server(server).build().await.expect("it answers")
    }

    /// CPU seconds so far, and resident megabytes.
    async fn usage(&self) -> (f64, f64) {
        let page = http_get(&self.health, "/metrics").await.expect("served");
        let value = |name: &str| {
            let mut lines = page.lines();
            let found =
                lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
            found.unwrap_or(0.0_f64)
        };
        (value("process_cpu_seconds_total"), value("process_resident_memory_bytes") / 1e6)
    }

    fn cli(&self, args: &[&str]) -> serde_json::Value {
        let mut command = geminga();
        command.env("GEMINGA_SERVER", format!("http://127.0.0.1:{}", self.port));
        let output = command.args(["-o", "json"]).args(args).output().expect("the binary runs");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }
}

fn settings(kind: SubscriptionType) -> SubscriptionSettings {
    SubscriptionSettings { r#type: kind.into(), ..SubscriptionSettings::default() }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    u64::try_from(since.as_millis()).expect("before the year 500 million")
}

async fn publish(client: &Client, topic: &str, messages: impl Iterator<Item = Message>) {
    let producer = client.producer(topic).build().await.expect("opened");
    let mut last = None;
    for message in messages {
        last = Some(producer.send(message).await.expect("taken"));
    }
    last.expect("one at least").await.expect("stored");
    producer.close().await.expect("closed");
}

async fn open(client: &Client, topic: &str, name: &str, kind: SubscriptionType) -> Consumer {
    let builder = client.consumer(topic, name).start(Start::Earliest).settings(settings(kind));
    builder.build().await.expect("opened")
}

/// A backlog of 1 KiB messages: taken by one exclusive consumer with cumulative accepts, and by one of a shared subscription
/// that accepts each message by itself; every accept confirmed before the end.
#[tokio::test(flavor = "multi_thread")]
async fn shared_beside_exclusive() {
    let count = number("COUNT", 1_000_000);
    let server = Standalone::start().await;
    let client = server.client().await;
    client.admin().create_topic(&topic_name("work").expect("a name"), 4).await.expect("created");
    publish(&client, "work", (0..count).map(|_| Message::new(vec![7; 1024]))).await;
    for round in 0..3 {
        for (kind, name) in
            [(SubscriptionType::Exclusive, "exclusive"), (SubscriptionType::Shared, "shared")]
        {
            let (cpu, _) = server.usage().await;
            let begun = Instant::now();
            let mut consumer = open(&client, "work", &format!("{name}-{round}"), kind).await;
            let mut accepted = BTreeMap::new();
            for n in 1..=count {
                let message = consumer.next().await.expect("goes on").expect("delivered");
                if kind == SubscriptionType::Shared {
                    drop(message.accept()); // confirmed by `close`
                } else {
                    accepted.insert(message.id.segment, message.id);
                    if n % 1_000 == 0 || n == count {
                        for id in std::mem::take(&mut accepted).into_values() {
                            drop(consumer.accept_up_to(id));
                        }
                    }
                }
            }
            consumer.close().await.expect("every accept is confirmed");
            let seconds = begun.elapsed().as_secs_f64();
            let (after, memory) = server.usage().await;
            println!(
                "{name}: {:.0} msg/s, server CPU-s per million {:.2}, resident {memory:.0} MB",
                count as f64 / seconds,
                (after - cpu) * 1e6 / count as f64
            );
        }
    }
}

/// What the consumers of `key_shared` saw.
struct Seen {
    /// By key: the highest number delivered.
    last: Vec<AtomicU64>,
    delivered: AtomicU64,
    skipped: AtomicU64,
    /// Milliseconds from send to first delivery, the longest.
    longest_ms: AtomicU64,
    waits: Mutex<hdrhistogram::Histogram<u64>>,
}

/// A million keys at a rate, 64 consumers of which one leaves and one joins every 200 ms. Order per key is checked at each
/// delivery; the longest wait of a message is the longest pause that its key had.
#[tokio::test(flavor = "multi_thread")]
async fn key_shared() {
    const CONSUMERS: usize = 64;
    let (keys, rate) = (number("KEYS", 1_000_000), number("RATE", 20_000));
    let count = number("COUNT", 2_000_000);
    let server = Standalone::start().await;
    let client = server.client().await;
    client.admin().create_topic(&topic_name("keys").expect("a name"), 1).await.expect("created");
    let seen = Arc::new(Seen {
        last: (0..keys).map(|_| AtomicU64::new(0)).collect(),
        delivered: AtomicU64::new(0),
        skipped: AtomicU64::new(0),
        longest_ms: AtomicU64::new(0),
        waits: Mutex::new(hdrhistogram::Histogram::new(3).expect("a histogram")),
    });
    let join = async |number: usize| {
        let mut consumer = client
            .consumer("keys", "judge")
            .name(format!("consumer-{number}"))
            .start(Start::Earliest)
            .settings(settings(SubscriptionType::KeyShared))
            .window(1_000, 1 << 20)
            .build()
            .await
            .expect("opened");
        let (seen, leave) = (Arc::clone(&seen), Arc::new(AtomicBool::new(false)));
        let leaving = Arc::clone(&leave);
        let task = tokio::spawn(async move {
            while !leaving.load(Ordering::SeqCst) {
                let next = tokio::time::timeout(Duration::from_millis(20), consumer.next()).await;
                let Ok(Some(message)) = next else { continue };
                let message = message.expect("goes on");
                seen.take(&message.value);
                drop(message.accept());
            }
            consumer.close().await.expect("settled");
        });
        (leave, task)
    };
    let mut consumers = Vec::new();
    for number in 0..CONSUMERS {
        consumers.push(join(number).await);
    }
    let (cpu, _) = server.usage().await;
    let publisher = {
        let client = client.clone();
        tokio::spawn(async move {
            let producer = client.producer("keys").build().await.expect("opened");
            let mut random = SmallRng::seed_from_u64(3);
            let mut numbers = vec![0_u64; keys as usize];
            let begun = Instant::now();
            for n in 0..count {
                if n % 100 == 0 {
                    let due = begun + Duration::from_secs_f64(n as f64 / rate as f64);
                    tokio::time::sleep_until(due).await;
                }
                let key = random.random_range(0..keys);
                numbers[key as usize] += 1;
                let value = format!("{key} {} {}", numbers[key as usize], now_ms());
                let message = Message::new(value).with_key(key.to_be_bytes().to_vec());
                producer.send(message).await.expect("taken");
            }
            producer.close().await.expect("stored");
        })
    };
    let (mut random, mut changes, mut next) = (SmallRng::seed_from_u64(4), 0, CONSUMERS);
    while !publisher.is_finished() {
        sleep(Duration::from_millis(200)).await;
        let (leave, task) = consumers.swap_remove(random.random_range(0..consumers.len()));
        leave.store(true, Ordering::SeqCst);
        task.await.expect("it left");
        consumers.push(join(next).await);
        (next, changes) = (next + 1, changes + 1);
    }
    publisher.await.expect("published");
    let waiting = Instant::now();
    let distinct = || -> u64 { seen.last.iter().map(|last| last.load(Ordering::SeqCst)).sum() };
    while distinct() < count {
        assert!(waiting.elapsed() < Duration::from_secs(60), "{} of {count}", distinct());
        sleep(Duration::from_millis(100)).await;
    }
    let (after, memory) = server.usage().await;
    let waits = seen.waits.lock().expect("no panic");
    println!(
        "key-shared: {count} messages of {keys} keys at {rate}/s, {changes} times one left and one joined: {} skipped their turn, {} delivered twice; send to delivery p50 {} ms, p99 {} ms, longest pause {} ms; server CPU-s per million {:.1}, resident {memory:.0} MB",
        seen.skipped.load(Ordering::SeqCst),
        seen.delivered.load(Ordering::SeqCst) - count,
        waits.value_at_quantile(0.5),
        waits.value_at_quantile(0.99),
        seen.longest_ms.load(Ordering::SeqCst),
        (after - cpu) * 1e6 / count as f64,
    );
    assert_eq!(seen.skipped.load(Ordering::SeqCst), 0, "order per key");
}

impl Seen {
    /// A number is delivered after the one before it; one that comes again is no news.
    fn take(&self, value: &[u8]) {
        let text = std::str::from_utf8(value).expect("as sent");
        let mut parts = text.split(' ').map(|part| part.parse::<u64>().expect("as sent"));
        let (key, number, sent) = (parts.next(), parts.next(), parts.next());
        let last = &self.last[key.expect("as sent") as usize];
        let (number, before) = (number.expect("as sent"), last.load(Ordering::SeqCst));
        self.delivered.fetch_add(1, Ordering::SeqCst);
        if number > before + 1 {
            self.skipped.fetch_add(1, Ordering::SeqCst);
        } else if number == before + 1 {
            last.store(number, Ordering::SeqCst);
            let waited = now_ms().saturating_sub(sent.expect("as sent"));
            self.longest_ms.fetch_max(waited, Ordering::SeqCst);
            self.waits.lock().expect("no panic").record(waited).expect("in bounds");
        }
    }
}

/// Resident memory while a million messages are with consumers and none is settled.
#[tokio::test(flavor = "multi_thread")]
async fn unacked() {
    const SEGMENTS: u32 = 4;
    let count = number("COUNT", 1_000_000);
    let server = Standalone::start().await;
    let client = server.client().await;
    let name = topic_name("held").expect("a name");
    client.admin().create_topic(&name, SEGMENTS).await.expect("created");
    publish(&client, "held", (0..count).map(|n| Message::new(format!("{n:0100}")))).await;
    let (_, before) = server.usage().await;
    let mut consumer = open(&client, "held", "holders", SubscriptionType::Shared).await;
    let mut held = Vec::new();
    for _ in 0..count {
        held.push(consumer.next().await.expect("goes on").expect("delivered").id);
    }
    let (_, with) = server.usage().await;
    println!(
        "{count} messages with a consumer, none settled: resident {with:.0} MB, {before:.0} MB before they were delivered"
    );
}

/// A million deliver-at messages: memory while they wait, time to know all of them again after kill -9, none early.
#[tokio::test(flavor = "multi_thread")]
async fn timers() {
    let count = number("COUNT", 1_000_000);
    let mut server = Standalone::start().await;
    let client = server.client().await;
    let name = topic_name("later").expect("a name");
    client.admin().create_topic(&name, 1).await.expect("created");
    let (first, spread) = (now_ms() + number("AFTER_S", 90) * 1_000, 30_000);
    let mut random = SmallRng::seed_from_u64(5);
    let due = (0..count).map(|_| first + random.random_range(0..spread));
    let later = due.map(|due| Message::new(due.to_string()).with_deliver_at_ms(due));
    publish(&client, "later", later).await;
    let (_, before) = server.usage().await;
    let begun = Instant::now();
    let consumer = open(&client, "later", "worker", SubscriptionType::Shared).await;
    all_wait(&client, count).await;
    let (_, with) = server.usage().await;
    println!(
        "{count} timers: known after {:.1} s; resident {with:.0} MB, {before:.0} MB before; {} s before the first is due",
        begun.elapsed().as_secs_f64(),
        first.saturating_sub(now_ms()) / 1_000
    );
    drop(consumer);
    drop(client);
    server.kill();
    let begun = Instant::now();
    let ready = server.boot().await;
    let client = server.client().await;
    let mut consumer = open(&client, "later", "worker", SubscriptionType::Shared).await;
    all_wait(&client, count).await;
    let (_, with) = server.usage().await;
    println!(
        "after kill -9: ready in {} ms, all timers known after {:.1} s, resident {with:.0} MB; {} s before the first is due",
        ready.as_millis(),
        begun.elapsed().as_secs_f64(),
        first.saturating_sub(now_ms()) / 1_000
    );
    let (mut early, mut latest, mut late) =
        (0, 0, hdrhistogram::Histogram::<u64>::new(3).expect("one"));
    for _ in 0..count {
        let message = consumer.next().await.expect("goes on").expect("delivered");
        let due: u64 = std::str::from_utf8(&message.value).expect("text").parse().expect("as sent");
        let now = now_ms();
        early += u64::from(now < due);
        latest = latest.max(now.saturating_sub(due));
        late.record(now.saturating_sub(due)).expect("in bounds");
        drop(message.accept());
    }
    consumer.close().await.expect("settled");
    println!(
        "delivered: {early} early, late p50 {} ms, p99 {} ms, most {latest} ms ({} a second came due)",
        late.value_at_quantile(0.5),
        late.value_at_quantile(0.99),
        count * 1_000 / spread
    );
    assert_eq!(early, 0);
}

/// Until the server counts so many messages as waiting for their time.
async fn all_wait(client: &Client, count: u64) {
    let begun = Instant::now();
    loop {
        let explained = client.explain("later", "worker", None).await.expect("answered");
        let held = explained.iter().flat_map(|segment| &segment.held);
        let waiting: u64 =
            held.filter(|held| held.by() == HeldBy::Delay).map(|held| held.messages).sum();
        if waiting == count {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{waiting} of {count} are known");
        sleep(Duration::from_millis(20)).await;
    }
}

/// Ten thousand topics in one process: memory, and the time of a restart after kill -9.
#[tokio::test(flavor = "multi_thread")]
async fn many_topics() {
    let topics = number("TOPICS", 10_000);
    let mut server = Standalone::start().await;
    let (_, empty) = server.usage().await;
    let client = server.client().await;
    let begun = Instant::now();
    let create = |n| {
        let admin = client.admin();
        async move {
            let name = topic_name(&format!("topic-{n}")).expect("a name");
            admin.create_topic(&name, 1).await.expect("created");
        }
    };
    stream::iter(0..topics).map(create).buffer_unordered(32).for_each(async |()| ()).await;
    let seconds = begun.elapsed().as_secs_f64();
    let (_, created) = server.usage().await;
    println!(
        "{topics} topics: created in {seconds:.1} s; resident {empty:.0} MB with none, {created:.0} MB with all"
    );
    let begun = Instant::now();
    let touch = |n| {
        let client = client.clone();
        async move {
            let producer = client.producer(format!("topic-{n}")).build().await.expect("opened");
            producer.send(Message::new("one")).await.expect("taken").await.expect("stored");
            producer.close().await.expect("closed");
        }
    };
    stream::iter(0..topics).map(touch).buffer_unordered(32).for_each(async |()| ()).await;
    let (_, touched) = server.usage().await;
    println!(
        "one message published to each, by a producer of its own, in {:.1} s; resident {touched:.0} MB",
        begun.elapsed().as_secs_f64()
    );
    server.kill();
    let ready = server.boot().await;
    let (_, restarted) = server.usage().await;
    let begun = Instant::now();
    let client = server.client().await;
    let again = |n| {
        let client = client.clone();
        async move {
            let name = topic_name(&format!("topic-{n}")).expect("a name");
            let peeked = client.admin().topic(&name).await.expect("described");
            drop(peeked);
            let mut reader = client
                .consumer(format!("topic-{n}"), "second")
                .start(Start::Earliest)
                .build()
                .await
                .expect("opened");
            let message = reader.next().await.expect("goes on").expect("delivered");
            message.accept().await.expect("accepted");
            reader.close().await.expect("closed");
        }
    };
    stream::iter(0..topics).map(again).buffer_unordered(32).for_each(async |()| ()).await;
    let (_, all) = server.usage().await;
    println!(
        "kill -9: ready again in {} ms, resident {restarted:.0} MB; every topic recovered, its message read by a new subscription in {:.1} s, resident {all:.0} MB",
        ready.as_millis(),
        begun.elapsed().as_secs_f64()
    );
}

/// CPU of the server for few messages: topics with ten messages of 1 KiB a second each, published one by one and consumed.
#[tokio::test(flavor = "multi_thread")]
async fn small_rates() {
    for topics in [1, 1_000] {
        let server = Standalone::start().await;
        let seconds = number("SECONDS", 30);
        let (topics_text, rate) = (topics.to_string(), (topics * 10).to_string());
        let count = (topics * 10 * seconds).to_string();
        let run = [
            "bench",
            "e2e",
            "--topics",
            &topics_text,
            "--rate",
            &rate,
            "--count",
            &count,
            "--metrics",
            "",
        ];
        let (before, _) = server.usage().await;
        let report = server.cli(&run);
        let (after, memory) = server.usage().await;
        let messages = report["messages"].as_f64().expect("a number");
        println!(
            "{topics} topics x 10 msg/s for {seconds} s: server CPU-s {:.2}, a million {:.0}; end to end p50 {} ms, p99 {} ms; resident {memory:.0} MB",
            after - before,
            (after - before) * 1e6 / messages,
            report["end_to_end_ms"]["p50"],
            report["end_to_end_ms"]["p99"]
        );
    }
}
