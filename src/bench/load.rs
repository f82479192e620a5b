//! The load: producers and consumers through the SDK, over real connections.

use std::{sync::Arc, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use futures::{StreamExt, future::try_join_all};
use geminga_client::{Batching, Client, Message, Pending, Producer, Routing, Start, topic_name};
use geminga_runtime::random::Random;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout},
};

use super::{
    LoadArgs,
    report::{Latencies, Report},
    server,
};
use crate::cli::{Global, exit::Failure, output::note};

/// Every value starts with the moment it was sent and its number.
pub(super) const STAMP_BYTES: usize = 16;
/// Messages of one producer whose receipts are waited for at a time; bounds the bench's own memory.
const IN_FLIGHT_MAX: usize = 50_000;
/// How long a bench waits for the next message before it gives up.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// The end-to-end bench's rate when none is given, messages a second.
const END_TO_END_RATE: u64 = 10_000;

/// What the producers measured.
struct Published {
    messages: u64,
    elapsed: Duration,
    latencies: Latencies,
}

fn topic_names(args: &LoadArgs) -> Vec<String> {
    let id = Random::from_os().u64();
    (0..args.topics).map(|n| format!("public/default/bench-{id:016x}-{n}")).collect()
}

async fn create(client: &Client, topics: &[String], args: &LoadArgs) -> Result<(), Failure> {
    for topic in topics {
        client.admin().create_topic(&topic_name(topic)?, args.segments).await?;
    }
    Ok(())
}

async fn producer(client: &Client, topic: &str, args: &LoadArgs) -> Result<Producer, Failure> {
    let producer = client
        .producer(topic)
        .routing(Routing::StickyBatch)
        .batching(Batching {
            bytes_max: args.batch_bytes,
            linger: Duration::from_millis(args.linger_ms),
            ..Batching::default()
        })
        .compression(args.compression.into())
        .build()
        .await?;
    Ok(producer)
}

/// A value of the wanted size; its tail looks like text, so that compression has something to do.
fn value(tail: &[u8], epoch: Instant, number: u64) -> Bytes {
    let mut value = BytesMut::with_capacity(STAMP_BYTES + tail.len());
    value.put_u64_le(epoch.elapsed().as_nanos() as u64);
    value.put_u64_le(number);
    value.put_slice(tail);
    value.freeze()
}

fn sent_at(value: &[u8]) -> Duration {
    let stamp = value.first_chunk::<8>().copied().unwrap_or_default();
    Duration::from_nanos(u64::from_le_bytes(stamp))
}

/// One producer's share of the load.
async fn publish_share(
    producer: Producer,
    args: Arc<LoadArgs>,
    share: u64,
    rate: Option<f64>,
    epoch: Instant,
) -> Result<(u64, Latencies), Failure> {
    let tail: Vec<u8> = b"the quick brown fox jumps over the lazy dog; "
        .iter()
        .copied()
        .cycle()
        .take(args.size - STAMP_BYTES)
        .collect();
    let (sent, mut receipts) = mpsc::channel::<(Instant, Pending)>(IN_FLIGHT_MAX);
    let begun = Instant::now();
    let send = async {
        let sent = sent;
        for number in 0..share {
            if begun.elapsed() >= args.time_limit() {
                break;
            }
            if let Some(rate) = rate {
                sleep_until(begun + Duration::from_secs_f64(number as f64 / rate)).await;
            }
            let message = Message::new(value(&tail, epoch, number));
            let at = Instant::now();
            let receipt = producer.send(message).await?;
            if sent.send((at, receipt)).await.is_err() {
                break; // the other half failed, and tells why
            }
        }
        Ok::<_, Failure>(())
    };
    let settle = async {
        let mut latencies = Latencies::new();
        let mut messages = 0u64;
        while let Some((at, receipt)) = receipts.recv().await {
            receipt.await?;
            latencies.record(at.elapsed());
            messages += 1;
        }
        Ok::<_, Failure>((messages, latencies))
    };
    let ((), measured) = tokio::try_join!(send, settle)?;
    producer.close().await?;
    Ok(measured)
}

async fn publish(
    client: &Client,
    topics: &[String],
    args: &LoadArgs,
    rate: Option<u64>,
    epoch: Instant,
) -> Result<Published, Failure> {
    let shares = u64::from(args.topics) * u64::from(args.producers);
    let args = Arc::new(args.clone());
    let mut tasks = Vec::new();
    for (n, topic) in
        topics.iter().flat_map(|t| std::iter::repeat_n(t, args.producers as usize)).enumerate()
    {
        let share = args.count / shares + u64::from((n as u64) < args.count % shares);
        let rate = rate.filter(|rate| *rate > 0).map(|rate| rate as f64 / shares as f64);
        tasks.push((producer(client, topic, &args).await?, share, rate));
    }
    let begun = Instant::now();
    let tasks = tasks.into_iter().map(|(producer, share, rate)| {
        publish_share(producer, Arc::clone(&args), share, rate, epoch)
    });
    let measured = try_join_all(tasks).await?;
    let elapsed = begun.elapsed();
    let mut latencies = Latencies::new();
    measured.iter().for_each(|(_, one)| latencies.add(one));
    Ok(Published { messages: measured.iter().map(|(n, _)| n).sum(), elapsed, latencies })
}

/// Reads `expected` messages from the start of every topic; returns how long it took and the latencies since `epoch`.
async fn consume_all(
    client: &Client,
    topics: &[String],
    expected: u64,
    epoch: Instant,
) -> Result<(u64, Latencies), Failure> {
    let mut consumers = Vec::new();
    for topic in topics {
        consumers
            .push(client.consumer(topic.as_str(), "bench").start(Start::Earliest).build().await?);
    }
    let mut latencies = Latencies::new();
    let mut received = 0u64;
    let mut all = futures::stream::select_all(consumers.iter_mut());
    while received < expected {
        let next = timeout(SILENCE_MAX, all.next()).await.map_err(|_| {
            let seconds = SILENCE_MAX.as_secs();
            Failure::failed(format!(
                "nothing came for {seconds} s; {received} of {expected} received"
            ))
        })?;
        let Some(message) = next else { break };
        let message = message?;
        latencies.record(epoch.elapsed().saturating_sub(sent_at(&message.value)));
        received += 1;
    }
    drop(all);
    for consumer in consumers {
        consumer.close().await?;
    }
    Ok((received, latencies))
}

/// Fills in what the server spent between two moments.
async fn with_usage(mut report: Report, before: Option<server::Usage>, args: &LoadArgs) -> Report {
    if let (Some(before), Some(after)) = (before, server::usage(&args.metrics).await) {
        let million = report.messages as f64 / 1e6;
        report.server_cpu_seconds_per_million =
            Some((after.cpu_seconds - before.cpu_seconds) / million);
        report.server_rss_mb = Some(after.rss_bytes / 1e6);
    }
    report
}

async fn usage_before(args: &LoadArgs) -> Option<server::Usage> {
    if args.metrics.is_empty() {
        return None;
    }
    let usage = server::usage(&args.metrics).await;
    if usage.is_none() {
        note(&format!(
            "hint: no metrics at {}; name the server's health port with --metrics",
            args.metrics
        ));
    }
    usage
}

fn settings(args: &LoadArgs) -> serde_json::Value {
    serde_json::to_value(args).unwrap_or_default()
}

pub(super) async fn produce(args: &LoadArgs, global: &Global) -> Result<Report, Failure> {
    args.check()?;
    let client = global.client().await?;
    let topics = topic_names(args);
    create(&client, &topics, args).await?;
    let before = usage_before(args).await;
    let published = publish(&client, &topics, args, args.rate, Instant::now()).await?;
    let bytes = published.messages * args.size as u64;
    let mut report =
        Report::new("produce", published.messages, bytes, published.elapsed, settings(args));
    report.publish_ms = published.latencies.percentiles();
    Ok(with_usage(report, before, args).await)
}

pub(super) async fn consume(args: &LoadArgs, global: &Global) -> Result<Report, Failure> {
    args.check()?;
    let client = global.client().await?;
    let topics = topic_names(args);
    create(&client, &topics, args).await?;
    let published = publish(&client, &topics, args, args.rate, Instant::now()).await?;
    let before = usage_before(args).await;
    let begun = Instant::now();
    let (received, _) = consume_all(&client, &topics, published.messages, begun).await?;
    let report = Report::new(
        "consume",
        received,
        received * args.size as u64,
        begun.elapsed(),
        settings(args),
    );
    Ok(with_usage(report, before, args).await)
}

pub(super) async fn end_to_end(args: &LoadArgs, global: &Global) -> Result<Report, Failure> {
    args.check()?;
    let mut args = args.clone();
    let rate = args.rate.unwrap_or(END_TO_END_RATE);
    args.rate = Some(rate);
    if let Some(seconds) = args.duration {
        args.count = args.count.min(rate.saturating_mul(seconds)).max(1);
    }
    let client = global.client().await?;
    let topics = topic_names(&args);
    create(&client, &topics, &args).await?;
    let before = usage_before(&args).await;
    let epoch = Instant::now();
    let publishing = publish(&client, &topics, &args, Some(rate), epoch);
    let consuming = consume_all(&client, &topics, args.count, epoch);
    let (published, (received, latencies)) = tokio::try_join!(publishing, consuming)?;
    let bytes = received * args.size as u64;
    let mut report = Report::new("e2e", received, bytes, epoch.elapsed(), settings(&args));
    report.publish_ms = published.latencies.percentiles();
    report.end_to_end_ms = latencies.percentiles();
    Ok(with_usage(report, before, &args).await)
}
