//! Subscription types, settle verbs, redelivery, dead letters, and what may be asked about them.

mod calls;
mod coming_back;
mod configured;
mod delays;
mod failing;
mod in_order;
mod key_shared;
mod shared;

use std::time::Duration;

use bytes::Bytes;
use geminga_proto::v1::{
    Accept, Claim, Delivery, ExplainRequest, HeldBy, OffsetRange, OpenConsume, PeekRequest,
    ReadFrom, Record, RecordBatch, Release, RetryPolicy, SegmentExplained, Settle,
    SubscriptionSettings, SubscriptionType, consume_frame::Frame, consume_reply::Reply,
    read_from::From as Place, settle::Verb,
};
use prost::Message;
use tokio::{
    runtime::{Builder, Runtime},
    time::timeout,
};

use crate::harness::{Client, Cluster, Consumer, PATIENCE, batch, eventually, open_consume};

pub(crate) const TOPIC: &str = "public/default/t";

pub(crate) fn settings(kind: SubscriptionType) -> SubscriptionSettings {
    SubscriptionSettings { r#type: kind.into(), ..SubscriptionSettings::default() }
}

pub(crate) fn retrying(kind: SubscriptionType, attempts_max: u32) -> SubscriptionSettings {
    let retry = Some(RetryPolicy { attempts_max, ..RetryPolicy::default() });
    SubscriptionSettings { retry, ..settings(kind) }
}

pub(crate) fn open(name: &str, settings: &SubscriptionSettings) -> OpenConsume {
    OpenConsume {
        consumer_name: name.into(),
        settings: Some(settings.clone()),
        ..open_consume(TOPIC, "s")
    }
}

pub(crate) async fn consumer(
    client: &Client,
    name: &str,
    settings: &SubscriptionSettings,
) -> Consumer {
    let consumer = client.open_consumer(open(name, settings)).await.expect("opened");
    consumer.credit(1 << 40, 1 << 40).await;
    consumer
}

/// A client whose connection breaks when it is dropped, with everything that is open on it.
pub(crate) struct Doomed {
    pub(crate) client: Client,
    runtime: Option<Runtime>,
}

impl Doomed {
    pub(crate) async fn of(cluster: &Cluster) -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let address = cluster.broker().address().to_string();
        let connected = runtime.spawn(async move { Client::at(&address).await });
        Self { client: connected.await.expect("no panic"), runtime: Some(runtime) }
    }
}

impl Drop for Doomed {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// The next reply that is a delivery.
pub(crate) async fn delivery(consumer: &mut Consumer) -> Delivery {
    if let Some(delivery) = consumer.later.pop_front() {
        return delivery;
    }
    loop {
        match consumer.reply().await.expect("no refusal") {
            Some(Reply::Delivery(delivery)) => return delivery,
            Some(_) => {}
            None => panic!("the stream ended"),
        }
    }
}

pub(crate) fn offsets(delivery: &Delivery) -> Vec<u64> {
    delivery.deliver.iter().flat_map(|range| range.first..=range.last).collect()
}

pub(crate) fn one(offset: u64) -> Vec<OffsetRange> {
    vec![OffsetRange { first: offset, last: offset }]
}

/// Settles on the stream and waits for the answer: mark-delete, or the reason.
pub(crate) async fn settle(consumer: &mut Consumer, verb: Verb) -> Result<u64, String> {
    consumer.send(Frame::Settle(Settle { token: 77, verb: Some(verb) })).await;
    loop {
        match consumer.reply().await.expect("no refusal") {
            Some(Reply::Settled(settled)) if settled.token == 77 => {
                return Ok(settled.mark_delete_next);
            }
            Some(Reply::SettleRefused(refused)) => return Err(refused.reason),
            Some(Reply::Delivery(delivery)) => consumer.later.push_back(delivery),
            Some(_) => {}
            None => panic!("the stream ended"),
        }
    }
}

pub(crate) fn accept(delivery: &Delivery) -> Verb {
    Verb::Accept(Accept { ranges: delivery.deliver.clone(), handle: delivery.handle.clone() })
}

pub(crate) fn release(delivery: &Delivery, counts: bool, delay_ms: Option<u64>) -> Verb {
    let (ranges, handle) = (delivery.deliver.clone(), delivery.handle.clone());
    Verb::Release(Release { ranges, handle, delay_ms, counts })
}

pub(crate) async fn publish(client: &Client, batches: u32, of: u32) {
    let mut producer = client.producer(TOPIC).await;
    for _ in 0..batches {
        producer.publish(of, "x").await;
    }
}

pub(crate) async fn explain(client: &Client) -> SegmentExplained {
    let request =
        ExplainRequest { topic: TOPIC.into(), subscription: "s".into(), segment: Some(0) };
    let answer = client.subscriber().explain(request).await.expect("explained").into_inner();
    let segment = answer.segments.into_iter().next().expect("one segment");
    let sum: u64 = segment.held.iter().map(|held| held.messages).sum();
    assert!(sum <= segment.next_offset - segment.mark_delete_next);
    segment
}

pub(crate) fn held(explained: &SegmentExplained, by: HeldBy) -> u64 {
    let of = explained.held.iter().filter(|held| held.by == i32::from(by));
    of.map(|held| held.messages).sum()
}

pub(crate) async fn started() -> (Cluster, Client) {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    (cluster, client)
}

/// The dead letters of the default topic: the records, one by one.
pub(crate) async fn dead_letters(client: &Client, count: usize) -> Vec<Record> {
    let topic = format!("{TOPIC}~s~dlq");
    let peek = PeekRequest {
        topic,
        segment: 0,
        from: Some(ReadFrom { from: Some(Place::Offset(0)) }),
        messages_max: 100,
    };
    eventually("they are stored", async || {
        let found = client.subscriber().peek(peek.clone()).await;
        found.is_ok_and(|found| found.into_inner().next_offset >= count as u64)
    })
    .await;
    let found = client.subscriber().peek(peek).await.expect("peeked").into_inner();
    assert_eq!(found.next_offset, count as u64, "each once");
    let batches = found.deliveries.iter().map(|of| RecordBatch::decode(&of.payload[..]));
    batches.flat_map(|batch| batch.expect("sound").records).collect()
}

pub(crate) fn records(values: &[&str]) -> Bytes {
    let records = values.iter().map(|value| Record {
        key: Some(Bytes::from_static(b"k")),
        value: Bytes::copy_from_slice(value.as_bytes()),
        headers: [("mine".to_owned(), "kept".to_owned())].into_iter().collect(),
        event_time_ms: Some(5),
    });
    RecordBatch { records: records.collect() }.encode_to_vec().into()
}

/// Opens as soon as the segment is served again.
pub(crate) async fn reopened(client: &Client, open: OpenConsume) -> Consumer {
    let opening = async {
        loop {
            let mut consumer = client.raw_consume().await.expect("begun");
            consumer.send(Frame::Open(open.clone())).await;
            if let Ok(Some(Reply::Opened(_))) = consumer.reply().await {
                return consumer;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let consumer = timeout(PATIENCE, opening).await.expect("served again in time");
    consumer.credit(1 << 40, 1 << 40).await;
    consumer
}

pub(crate) async fn publish_batch(client: &Client, batch: geminga_proto::v1::Batch) -> u64 {
    let request = geminga_proto::v1::PublishRequest {
        topic: TOPIC.into(),
        batch: Some(batch),
        ..Default::default()
    };
    let published = client.publisher().publish(request).await.expect("published").into_inner();
    published.receipt.expect("there").base_offset
}

/// A batch with one message per key.
pub(crate) fn keyed(keys: &[u32]) -> geminga_proto::v1::Batch {
    let count = u32::try_from(keys.len()).expect("few");
    let mut batch = batch(0, count, "x");
    let index = batch.index.as_mut().expect("set");
    index.key_hash = keys.to_vec();
    index.has_key = vec![true; keys.len()];
    batch
}

/// Opens with claims and returns what was granted.
pub(crate) async fn come_back(
    client: &Client,
    open: OpenConsume,
    claims: Vec<Claim>,
) -> (Consumer, Vec<Claim>) {
    let opening = async {
        loop {
            let mut consumer = client.raw_consume().await.expect("begun");
            let open = OpenConsume { claims: claims.clone(), ..open.clone() };
            consumer.send(Frame::Open(open)).await;
            if let Ok(Some(Reply::Opened(opened))) = consumer.reply().await {
                return (consumer, opened.granted);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, opening).await.expect("served again in time")
}
