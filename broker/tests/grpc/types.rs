//! Subscription types, settle verbs, redelivery, dead letters, and what may be asked about them.

use std::{collections::BTreeSet, time::Duration};

use bytes::Bytes;
use geminga_proto::{
    admin::v1::{
        CancelDelayedRequest, CreateSubscriptionRequest, ListDelayedRequest,
        UpdateSubscriptionRequest,
    },
    reason::Reason,
    v1::{
        Accept, Claim, Delivery, ExplainRequest, Extend, HeldBy, OffsetRange, OpenConsume,
        PeekRequest, PullRequest, ReadFrom, Record, RecordBatch, Reject, Release, RetryPolicy,
        Route, SeekRequest, SegmentExplained, Settle, SettleRequest, SubscriptionSettings,
        SubscriptionStart, SubscriptionType, consume_frame::Frame, consume_reply::Reply,
        read_from::From as Place, settle::Verb,
    },
};
use prost::Message;
use tokio::{
    runtime::{Builder, Runtime},
    time::timeout,
};
use tonic::Status;

use crate::harness::{
    Client, Cluster, Consumer, PATIENCE, Pair, batch, eventually, open_consume, refused,
};

const TOPIC: &str = "public/default/t";

fn settings(kind: SubscriptionType) -> SubscriptionSettings {
    SubscriptionSettings { r#type: kind.into(), ..SubscriptionSettings::default() }
}

fn retrying(kind: SubscriptionType, attempts_max: u32) -> SubscriptionSettings {
    let retry = Some(RetryPolicy { attempts_max, ..RetryPolicy::default() });
    SubscriptionSettings { retry, ..settings(kind) }
}

fn open(name: &str, settings: &SubscriptionSettings) -> OpenConsume {
    OpenConsume {
        consumer_name: name.into(),
        settings: Some(settings.clone()),
        ..open_consume(TOPIC, "s")
    }
}

async fn consumer(client: &Client, name: &str, settings: &SubscriptionSettings) -> Consumer {
    let consumer = client.open_consumer(open(name, settings)).await.expect("opened");
    consumer.credit(1 << 40, 1 << 40).await;
    consumer
}

/// A client whose connection breaks when it is dropped, with everything that is open on it.
struct Doomed {
    client: Client,
    runtime: Option<Runtime>,
}

impl Doomed {
    async fn of(cluster: &Cluster) -> Self {
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
async fn delivery(consumer: &mut Consumer) -> Delivery {
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

fn offsets(delivery: &Delivery) -> Vec<u64> {
    delivery.deliver.iter().flat_map(|range| range.first..=range.last).collect()
}

fn one(offset: u64) -> Vec<OffsetRange> {
    vec![OffsetRange { first: offset, last: offset }]
}

/// Settles on the stream and waits for the answer: mark-delete, or the reason.
async fn settle(consumer: &mut Consumer, verb: Verb) -> Result<u64, String> {
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

fn accept(delivery: &Delivery) -> Verb {
    Verb::Accept(Accept { ranges: delivery.deliver.clone(), handle: delivery.handle.clone() })
}

fn release(delivery: &Delivery, counts: bool, delay_ms: Option<u64>) -> Verb {
    let (ranges, handle) = (delivery.deliver.clone(), delivery.handle.clone());
    Verb::Release(Release { ranges, handle, delay_ms, counts })
}

async fn publish(client: &Client, batches: u32, of: u32) {
    let mut producer = client.producer(TOPIC).await;
    for _ in 0..batches {
        producer.publish(of, "x").await;
    }
}

async fn explain(client: &Client) -> SegmentExplained {
    let request =
        ExplainRequest { topic: TOPIC.into(), subscription: "s".into(), segment: Some(0) };
    let answer = client.subscriber().explain(request).await.expect("explained").into_inner();
    let segment = answer.segments.into_iter().next().expect("one segment");
    let sum: u64 = segment.held.iter().map(|held| held.messages).sum();
    assert!(sum <= segment.next_offset - segment.mark_delete_next);
    segment
}

fn held(explained: &SegmentExplained, by: HeldBy) -> u64 {
    let of = explained.held.iter().filter(|held| held.by == i32::from(by));
    of.map(|held| held.messages).sum()
}

async fn started() -> (Cluster, Client) {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    (cluster, client)
}

#[tokio::test]
async fn shared_consumers_share_and_every_one_settles_its_own() {
    let (_cluster, client) = started().await;
    let shared = settings(SubscriptionType::Shared);
    let mut one = consumer(&client, "one", &shared).await;
    let mut two = consumer(&client, "two", &shared).await;
    publish(&client, 10, 10).await;
    let (mut of_one, mut of_two, mut last) = (BTreeSet::new(), BTreeSet::new(), None);
    for _ in 0..5 {
        let (a, b) = (delivery(&mut one).await, delivery(&mut two).await);
        assert_eq!((a.attempt, b.attempt), (1, 1));
        assert!(a.lease_ms > 0);
        of_one.extend(offsets(&a));
        of_two.extend(offsets(&b));
        settle(&mut one, accept(&a)).await.expect("settled");
        assert_eq!(settle(&mut two, accept(&a)).await, Err("INVALID_HANDLE".into()), "of another");
        settle(&mut two, accept(&b)).await.expect("settled");
        last = Some(b);
    }
    assert_eq!((of_one.len(), of_two.len()), (50, 50));
    assert!(of_one.is_disjoint(&of_two));
    // Once more, late: the same delivery, and nothing new.
    assert_eq!(settle(&mut two, accept(&last.expect("some"))).await, Ok(100));
    let sub = _cluster.subscription(TOPIC, "s").await;
    assert_eq!((sub.cursors[0].mark_delete_next, sub.cursors[0].consumers), (100, 2));
}

#[tokio::test]
async fn a_counted_release_is_a_new_attempt_and_an_uncounted_one_is_not() {
    let (_cluster, client) = started().await;
    let mut consumer = consumer(&client, "one", &settings(SubscriptionType::Shared)).await;
    publish(&client, 1, 1).await;
    let first = delivery(&mut consumer).await;
    settle(&mut consumer, release(&first, false, None)).await.expect("released");
    let again = delivery(&mut consumer).await;
    assert_eq!((again.attempt, offsets(&again)), (1, vec![0]));
    settle(&mut consumer, release(&again, true, None)).await.expect("released");
    let third = delivery(&mut consumer).await;
    assert_eq!(third.attempt, 2);
    assert_eq!(settle(&mut consumer, accept(&again)).await, Err("INVALID_HANDLE".into()), "late");
    settle(&mut consumer, accept(&third)).await.expect("settled");
}

#[tokio::test]
async fn in_order_types_know_every_verb_and_deliver_again_before_what_is_newer() {
    let (_cluster, client) = started().await;
    let mut consumer = consumer(&client, "one", &settings(SubscriptionType::Exclusive)).await;
    publish(&client, 2, 1).await;
    let (a, b) = (delivery(&mut consumer).await, delivery(&mut consumer).await);
    assert_eq!((offsets(&a), offsets(&b), a.lease_ms), (vec![0], vec![1], 0));
    settle(&mut consumer, release(&a, true, Some(300))).await.expect("released");
    publish(&client, 1, 1).await;
    assert_eq!(offsets(&delivery(&mut consumer).await), [2], "what waits stops nobody");
    let again = delivery(&mut consumer).await;
    assert_eq!((offsets(&again), again.attempt), (vec![0], 2));
    let up_to = geminga_proto::v1::AcceptUpTo { offset: 2, handle: b.handle.clone() };
    assert_eq!(settle(&mut consumer, Verb::AcceptUpTo(up_to)).await, Ok(3));
}

#[tokio::test]
async fn a_lease_that_runs_out_is_told_and_the_message_comes_again() {
    let (_cluster, client) = started().await;
    let short = SubscriptionSettings { lease_ms: 300, ..settings(SubscriptionType::Shared) };
    let mut slow = consumer(&client, "slow", &short).await;
    publish(&client, 1, 3).await;
    let first = delivery(&mut slow).await;
    let verb =
        Verb::Extend(Extend { ranges: one(1), handle: first.handle.clone(), lease_ms: 60_000 });
    settle(&mut slow, verb).await.expect("extended");
    let mut revoked = Vec::new();
    let again = loop {
        match slow.reply().await.expect("no refusal") {
            Some(Reply::Revoked(told)) => revoked.extend(told.ranges),
            Some(Reply::Delivery(delivery)) => break delivery,
            other => panic!("neither: {other:?}"),
        }
    };
    assert_eq!(revoked, [one(0), one(2)].concat());
    assert_eq!((offsets(&again), again.attempt), (vec![0, 2], 2));
    let late = Accept { ranges: one(0), handle: first.handle.clone() };
    assert_eq!(settle(&mut slow, Verb::Accept(late)).await, Err("INVALID_HANDLE".into()));
    let extended = Accept { ranges: one(1), handle: first.handle };
    settle(&mut slow, Verb::Accept(extended)).await.expect("still its own");
}

/// The dead letters of the default topic: the records, one by one.
async fn dead_letters(client: &Client, count: usize) -> Vec<Record> {
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

fn records(values: &[&str]) -> Bytes {
    let records = values.iter().map(|value| Record {
        key: Some(Bytes::from_static(b"k")),
        value: Bytes::copy_from_slice(value.as_bytes()),
        headers: [("mine".to_owned(), "kept".to_owned())].into_iter().collect(),
        event_time_ms: Some(5),
    });
    RecordBatch { records: records.collect() }.encode_to_vec().into()
}

#[tokio::test]
async fn what_fails_too_often_or_is_rejected_goes_to_the_dead_letter_topic_once() {
    let (cluster, client) = started().await;
    let twice = retrying(SubscriptionType::Shared, 2);
    let mut consumer = consumer(&client, "one", &twice).await;
    client.producer(TOPIC).await.publish(2, records(&["poison", "fine"])).await;
    let first = delivery(&mut consumer).await;
    let verb = Verb::Reject(Reject {
        ranges: one(1),
        handle: first.handle.clone(),
        reason: "not mine".into(),
    });
    settle(&mut consumer, verb).await.expect("rejected");
    let only_0 = Delivery { deliver: one(0), ..first };
    settle(&mut consumer, release(&only_0, true, None)).await.expect("released");
    let second = delivery(&mut consumer).await;
    assert_eq!((offsets(&second), second.attempt), (vec![0], 2));
    settle(&mut consumer, release(&second, true, None)).await.expect("released");
    let dead = dead_letters(&client, 2).await;
    let header =
        |record: &Record, name: &str| record.headers.get(name).cloned().unwrap_or_default();
    let (fine, poison) = (&dead[0], &dead[1]);
    assert_eq!((&fine.value[..], &poison.value[..]), (&b"fine"[..], &b"poison"[..]));
    assert_eq!((fine.key.as_deref(), fine.event_time_ms), (Some(&b"k"[..]), Some(5)));
    assert_eq!(header(fine, "mine"), "kept");
    assert_eq!(header(fine, "geminga-reason"), "not mine");
    assert_eq!(header(fine, "geminga-origin-topic"), TOPIC);
    assert_eq!(header(fine, "geminga-origin-offset"), "1");
    assert_eq!(header(fine, "geminga-origin-segment"), "0");
    assert_eq!(header(fine, "geminga-subscription"), "s");
    assert_eq!(
        (header(fine, "geminga-attempts"), header(poison, "geminga-attempts")),
        ("1".into(), "2".into())
    );
    eventually("both are settled", async || {
        let cursor = &cluster.subscription(TOPIC, "s").await.cursors[0];
        (cursor.mark_delete_next, cursor.dead_letters) == (2, 2)
    })
    .await;
    assert!(consumer.quiet().await);
}

#[tokio::test]
async fn attempts_and_dead_letters_survive_kill_9_of_the_owner() {
    let mut cluster = Cluster::start_with(|config| config.lease_ttl = Duration::from_secs(1)).await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let thrice = retrying(SubscriptionType::Shared, 3);
    let mut before = consumer(&client, "one", &thrice).await;
    client.producer(TOPIC).await.publish(1, records(&["a"])).await;
    for attempt in 1..=2 {
        let got = delivery(&mut before).await;
        assert_eq!(got.attempt, attempt);
        settle(&mut before, release(&got, true, None)).await.expect("released");
    }
    assert_eq!(delivery(&mut before).await.attempt, 3, "delivered, and not settled");
    cluster.kill().await;
    cluster.start_broker(|settings| settings.broker.lease_ttl = Duration::from_secs(1)).await;
    let client = cluster.client().await;
    let mut after = reopened(&client, open("two", &thrice)).await;
    let again = delivery(&mut after).await;
    assert_eq!(again.attempt, 3, "a crash never raises an attempt (L4)");
    settle(&mut after, release(&again, true, None)).await.expect("released");
    let dead = dead_letters(&client, 1).await;
    assert_eq!(dead[0].headers.get("geminga-attempts").map(String::as_str), Some("3"));
}

/// Opens as soon as the segment is served again.
async fn reopened(client: &Client, open: OpenConsume) -> Consumer {
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

/// Opens with claims and returns what was granted.
async fn come_back(
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

#[tokio::test]
async fn a_consumer_that_comes_back_goes_on_with_what_it_holds() {
    let (cluster, client) = started().await;
    for kind in [SubscriptionType::Shared, SubscriptionType::Exclusive] {
        let of_kind = settings(kind);
        let sub = format!("s-{}", kind.as_str_name());
        let named = |name: &str| OpenConsume { subscription: sub.clone(), ..open(name, &of_kind) };
        let doomed = Doomed::of(&cluster).await;
        let mut first = doomed.client.open_consumer(named("one")).await.expect("opened");
        first.credit(1 << 40, 1 << 40).await;
        publish(&client, 1, 4).await;
        let got = delivery(&mut first).await;
        let all = OffsetRange { first: got.deliver[0].first, last: got.deliver[0].last };
        drop(doomed);
        let kept = OffsetRange { first: all.first, last: all.last - 1 };
        let claim = Claim { handle: got.handle.clone(), ranges: vec![kept] };
        let (mut again, granted) = come_back(&client, named("one"), vec![claim]).await;
        assert_eq!(granted.len(), 1, "{kind:?}");
        assert_eq!(granted[0].ranges, [kept]);
        again.credit(1 << 40, 1 << 40).await;
        let rest = delivery(&mut again).await;
        assert_eq!(
            (offsets(&rest), rest.attempt),
            (vec![all.last], 1),
            "it lost nothing: {kind:?}"
        );
        let old = Accept { ranges: vec![kept], handle: got.handle };
        assert_eq!(settle(&mut again, Verb::Accept(old)).await, Err("INVALID_HANDLE".into()));
        let new = Accept { ranges: vec![kept], handle: granted[0].handle.clone() };
        settle(&mut again, Verb::Accept(new)).await.expect("under the new handle");
    }
}

#[tokio::test]
async fn after_kill_9_a_handle_of_the_owner_before_stands_for_what_it_was_given_for() {
    let mut cluster = Cluster::start_with(|config| config.lease_ttl = Duration::from_secs(1)).await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let shared = settings(SubscriptionType::Shared);
    let mut before = consumer(&client, "one", &shared).await;
    publish(&client, 1, 4).await;
    let got = delivery(&mut before).await;
    cluster.kill().await;
    cluster.start_broker(|settings| settings.broker.lease_ttl = Duration::from_secs(1)).await;
    let client = cluster.client().await;
    let part = OffsetRange { first: 0, last: 1 };
    let claim = Claim { handle: got.handle.clone(), ranges: vec![part] };
    let (mut after, granted) = come_back(&client, open("one", &shared), vec![claim]).await;
    assert_eq!(granted.iter().map(|claim| claim.ranges.clone()).collect::<Vec<_>>(), [vec![part]]);
    after.credit(1 << 40, 1 << 40).await;
    // And one that calls: the handle is presented by the settle itself.
    let verb = Verb::Accept(Accept { ranges: one(2), handle: got.handle.clone() });
    let request = SettleRequest {
        topic: TOPIC.into(),
        segment: 0,
        subscription: "s".into(),
        settle: Some(Settle { token: 1, verb: Some(verb) }),
    };
    let called = client.subscriber().settle(request).await;
    let rest = if called.is_ok() { vec![3] } else { vec![2, 3] };
    let new = Accept { ranges: vec![part], handle: granted[0].handle.clone() };
    settle(&mut after, Verb::Accept(new)).await.expect("as good as a new one");
    let mut again = Vec::new();
    while again.len() < rest.len() {
        let got = delivery(&mut after).await;
        assert_eq!(got.attempt, 1, "unchanged");
        again.extend(offsets(&got));
    }
    assert_eq!(again, rest);
}

/// What `segment 0` answers to a settle outside a stream.
async fn settle_by_call(client: &Client, verb: Verb) -> Result<u64, Status> {
    let request = SettleRequest {
        topic: TOPIC.into(),
        segment: 0,
        subscription: "s".into(),
        settle: Some(Settle { token: 1, verb: Some(verb) }),
    };
    let answer = client.subscriber().settle(request).await?.into_inner();
    Ok(answer.settled.expect("there").mark_delete_next)
}

#[tokio::test]
async fn a_clean_stop_leaves_the_exact_lease_table_and_its_handles_stand() {
    let mut cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let shared = settings(SubscriptionType::Shared);
    let mut first = consumer(&client, "one", &shared).await;
    publish(&client, 1, 3).await;
    let got = delivery(&mut first).await;
    assert_eq!(offsets(&got), [0, 1, 2]);
    let broker = cluster.broker.take().expect("it runs");
    broker.shutdown(Duration::from_millis(300)).await;
    cluster.start_broker(|_| {}).await;
    let client = cluster.client().await;
    let mut other = reopened(&client, open("two", &shared)).await;
    eventually("they wait for the one that has them", async || {
        held(&explain(&client).await, HeldBy::Grace) == 3
    })
    .await;
    assert!(other.quiet().await);
    let verb = Verb::Accept(Accept { ranges: one(0), handle: got.handle.clone() });
    assert_eq!(settle_by_call(&client, verb).await.expect("its handle stands"), 1);
    let counted = Delivery { deliver: one(1), ..got.clone() };
    settle_by_call(&client, release(&counted, true, None)).await.expect("and for a release");
    let again = delivery(&mut other).await;
    assert_eq!((offsets(&again), again.attempt), (vec![1], 2));
    let last = delivery(&mut other).await;
    assert_eq!((offsets(&last), last.attempt), (vec![2], 1), "its attempt never ended");
    let late = Verb::Accept(Accept { ranges: one(2), handle: got.handle });
    assert_eq!(refused(settle_by_call(&client, late).await), Reason::InvalidHandle);
}

#[tokio::test]
async fn messages_of_a_lost_consumer_come_again_as_a_new_attempt_and_of_one_that_left_well_not() {
    let cluster =
        Cluster::start_with(|config| config.limits.consumer_grace = Duration::from_millis(300))
            .await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let shared = settings(SubscriptionType::Shared);
    let doomed = Doomed::of(&cluster).await;
    let mut one = consumer(&doomed.client, "one", &shared).await;
    publish(&client, 1, 1).await;
    assert_eq!(delivery(&mut one).await.attempt, 1);
    let mut two = consumer(&client, "two", &shared).await;
    drop(doomed);
    let lost = delivery(&mut two).await;
    assert_eq!(lost.attempt, 2);
    let mut three = consumer(&client, "three", &shared).await;
    let Consumer { frames, mut replies, .. } = two;
    drop(frames); // half-close
    while timeout(PATIENCE, replies.message()).await.expect("in time").expect("well").is_some() {}
    assert_eq!(delivery(&mut three).await.attempt, 2, "given back, not failed");
}

/// A batch with one message per key.
fn keyed(keys: &[u32]) -> geminga_proto::v1::Batch {
    let count = u32::try_from(keys.len()).expect("few");
    let mut batch = batch(0, count, "x");
    let index = batch.index.as_mut().expect("set");
    index.key_hash = keys.to_vec();
    index.has_key = vec![true; keys.len()];
    batch
}

async fn publish_batch(client: &Client, batch: geminga_proto::v1::Batch) -> u64 {
    let request = geminga_proto::v1::PublishRequest {
        topic: TOPIC.into(),
        batch: Some(batch),
        ..Default::default()
    };
    let published = client.publisher().publish(request).await.expect("published").into_inner();
    published.receipt.expect("there").base_offset
}

#[tokio::test]
async fn key_shared_keeps_each_key_with_one_consumer_through_joins_and_releases() {
    let (_cluster, client) = started().await;
    let by_key = settings(SubscriptionType::KeyShared);
    let mut one = consumer(&client, "one", &by_key).await;
    let keys: Vec<u32> = (0..8).map(|n| n * 0x2000_0000 + 5).collect();
    publish_batch(&client, keyed(&keys)).await;
    let first = delivery(&mut one).await;
    assert_eq!(offsets(&first), (0..8).collect::<Vec<_>>(), "alone it has every key");
    let mut two = consumer(&client, "two", &by_key).await;
    // The table is in force once the new one gets messages of keys that nobody holds.
    for n in 1.. {
        let others: Vec<u32> = keys.iter().map(|key| key + n).collect();
        publish_batch(&client, keyed(&others)).await;
        if !two.quiet().await {
            break; // what it got is not looked at: none of it is of `keys`
        }
    }
    let base = publish_batch(&client, keyed(&keys)).await;
    // Nothing of a key goes to the new one while the former holds an earlier message of it.
    while let Ok(got) = timeout(Duration::from_millis(200), delivery(&mut two)).await {
        assert!(offsets(&got).iter().all(|offset| *offset < base));
    }
    settle(&mut one, accept(&first)).await.expect("settled");
    let (mut of_one, mut of_two) = (BTreeSet::new(), BTreeSet::new());
    while of_one.len() + of_two.len() < 8 {
        tokio::select! {
            got = delivery(&mut one) => of_one.extend(offsets(&got)),
            got = delivery(&mut two) => of_two.extend(offsets(&got)),
        }
        of_one.retain(|offset| *offset >= base);
        of_two.retain(|offset| *offset >= base);
    }
    assert_eq!((of_one.len(), of_two.len()), (4, 4), "half of the hashes moved");
}

#[tokio::test]
async fn a_released_message_of_a_key_takes_the_later_ones_of_its_key_with_it() {
    let (_cluster, client) = started().await;
    let by_key = settings(SubscriptionType::KeyShared);
    let mut one = consumer(&client, "one", &by_key).await;
    publish_batch(&client, keyed(&[7, 8, 7, 8])).await;
    let first = delivery(&mut one).await;
    assert_eq!(offsets(&first), [0, 1, 2, 3]);
    let of_0 = Delivery { deliver: crate::types::one(0), ..first.clone() };
    one.send(Frame::Settle(Settle { token: 1, verb: Some(release(&of_0, true, Some(200))) })).await;
    let (mut revoked, mut settled) = (Vec::new(), false);
    while revoked.is_empty() || !settled {
        match one.reply().await.expect("no refusal") {
            Some(Reply::Revoked(told)) => revoked.extend(told.ranges),
            Some(Reply::Settled(_)) => settled = true,
            other => panic!("neither: {other:?}"),
        }
    }
    assert_eq!(revoked, crate::types::one(2));
    let explained = explain(&client).await;
    assert_eq!(
        (held(&explained, HeldBy::Delay), held(&explained, HeldBy::Key)),
        (1, 1),
        "{explained:?}"
    );
    let again = delivery(&mut one).await;
    assert_eq!((offsets(&again), again.attempt), (vec![0], 2));
    let after = delivery(&mut one).await;
    assert_eq!((offsets(&after), after.attempt), (vec![2], 1));
}

/// Whether it is told to be active, skipping everything else.
async fn assigned(consumer: &mut Consumer) -> bool {
    loop {
        match consumer.reply().await.expect("no refusal") {
            Some(Reply::Assigned(assigned)) => return assigned.active,
            Some(Reply::Delivery(delivery)) => consumer.later.push_back(delivery),
            Some(_) => {}
            None => panic!("the stream ended"),
        }
    }
}

#[tokio::test]
async fn failover_has_one_active_consumer_a_segment_and_another_takes_over() {
    let cluster =
        Cluster::start_with(|config| config.limits.consumer_grace = Duration::from_millis(300))
            .await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let failover = settings(SubscriptionType::Failover);
    let (one, two) = (Doomed::of(&cluster).await, Doomed::of(&cluster).await);
    let mut consumers = vec![
        ("one", consumer(&one.client, "one", &failover).await, one),
        ("two", consumer(&two.client, "two", &failover).await, two),
    ];
    publish(&client, 1, 1).await;
    let explained = explain(&client).await;
    assert_eq!(explained.consumers.len(), 2);
    eventually("one of them is active", async || {
        explain(&client).await.consumers.iter().filter(|consumer| consumer.active).count() == 1
    })
    .await;
    eventually("the message is with it", async || {
        held(&explain(&client).await, HeldBy::Lease) == 1
    })
    .await;
    let explained = explain(&client).await;
    let active = explained.consumers.iter().find(|consumer| consumer.active).expect("one is");
    let at = consumers.iter().position(|(name, ..)| *name == active.name).expect("one of them");
    let (_, lost, connected) = consumers.remove(at);
    drop(connected); // first: dropped alone, the stream would end well
    drop(lost);
    let (_, mut other, _connected) = consumers.remove(0);
    while !assigned(&mut other).await {}
    let again = delivery(&mut other).await;
    assert_eq!((offsets(&again), again.attempt), (vec![0], 2), "the active one was lost");
    settle(&mut other, accept(&again)).await.expect("settled");
}

#[tokio::test]
async fn a_pull_gets_messages_with_leases_and_a_settle_ends_them() {
    let (_cluster, client) = started().await;
    let request = CreateSubscriptionRequest {
        topic: TOPIC.into(),
        name: "s".into(),
        start: SubscriptionStart::Earliest.into(),
        settings: Some(settings(SubscriptionType::Shared)),
    };
    client.admin().create_subscription(request).await.expect("created");
    let pull = |name: &str, wait_ms| PullRequest {
        topic: TOPIC.into(),
        subscription: "s".into(),
        consumer_name: name.into(),
        messages_max: 3,
        wait_ms,
        lease_ms: 400,
        ..PullRequest::default()
    };
    let empty = client.subscriber().pull(pull("p", 50)).await.expect("answered").into_inner();
    assert!(empty.deliveries.is_empty());
    publish(&client, 1, 5).await;
    let first = client.subscriber().pull(pull("p", 5_000)).await.expect("pulled").into_inner();
    assert_eq!(offsets(&first.deliveries[0]), [0, 1, 2]);
    let second = client.subscriber().pull(pull("q", 5_000)).await.expect("pulled").into_inner();
    assert_eq!(offsets(&second.deliveries[0]), [3, 4]);
    let request = |verb| SettleRequest {
        topic: TOPIC.into(),
        segment: 0,
        subscription: "s".into(),
        settle: Some(Settle { token: 4, verb: Some(verb) }),
    };
    let settled = client.subscriber().settle(request(accept(&first.deliveries[0]))).await;
    assert_eq!(settled.expect("settled").into_inner().settled.expect("there").mark_delete_next, 3);
    let again = client.subscriber().pull(pull("r", 10_000)).await.expect("pulled").into_inner();
    assert_eq!(offsets(&again.deliveries[0]), [3, 4], "its lease ran out");
    assert_eq!(again.deliveries[0].attempt, 2);
    let late = client.subscriber().settle(request(accept(&second.deliveries[0]))).await;
    assert_eq!(refused(late), Reason::InvalidHandle);
}

#[tokio::test]
async fn a_seek_moves_the_subscription_and_revokes_what_is_held() {
    let (_cluster, client) = started().await;
    let mut consumer = consumer(&client, "one", &settings(SubscriptionType::Shared)).await;
    publish(&client, 5, 2).await;
    let mut got = Vec::new();
    while got.len() < 10 {
        let delivery = delivery(&mut consumer).await;
        got.extend(offsets(&delivery));
        if offsets(&delivery)[0] < 4 {
            settle(&mut consumer, accept(&delivery)).await.expect("settled");
        }
    }
    let seek = |place| SeekRequest {
        topic: TOPIC.into(),
        subscription: "s".into(),
        segment: None,
        to: Some(ReadFrom { from: Some(place) }),
    };
    let sought = client.subscriber().seek(seek(Place::Offset(2))).await.expect("sought");
    assert_eq!(sought.into_inner().segments[0].mark_delete_next, 2);
    let (mut revoked, mut again) = (0, Vec::new());
    while again.len() < 8 {
        match consumer.reply().await.expect("no refusal") {
            Some(Reply::Revoked(told)) => {
                revoked +=
                    told.ranges.iter().map(|range| range.last + 1 - range.first).sum::<u64>();
            }
            Some(Reply::Delivery(delivery)) => {
                assert_eq!(delivery.attempt, 1);
                again.extend(offsets(&delivery));
            }
            other => panic!("neither: {other:?}"),
        }
    }
    assert_eq!((revoked, again), (6, (2..10).collect::<Vec<_>>()));
    let latest = Place::At(SubscriptionStart::Latest.into());
    let sought = client.subscriber().seek(seek(latest)).await.expect("sought").into_inner();
    assert_eq!(sought.segments[0].mark_delete_next, 10);
    let by_time = client.subscriber().seek(seek(Place::TimeMs(1))).await.expect("sought");
    assert_eq!(by_time.into_inner().segments[0].mark_delete_next, 0);
    let nowhere = SeekRequest { to: Some(ReadFrom { from: None }), ..seek(Place::Offset(0)) };
    assert_eq!(refused(client.subscriber().seek(nowhere).await), Reason::InvalidRequest);
    let future = client.subscriber().seek(seek(Place::TimeMs(u64::MAX))).await.expect("sought");
    assert_eq!(future.into_inner().segments[0].mark_delete_next, 10);
}

#[tokio::test]
async fn explain_names_what_holds_messages_up() {
    let (cluster, client) = started().await;
    let limited = settings(SubscriptionType::Shared);
    let doomed = Doomed::of(&cluster).await;
    let consumer = doomed.client.open_consumer(open("one", &limited)).await.expect("opened");
    publish(&client, 1, 10).await;
    let explained = explain(&client).await;
    assert_eq!(held(&explained, HeldBy::NoCredit), 10);
    assert!(explained.summary.contains("credit"), "{}", explained.summary);
    assert_eq!(
        (explained.consumers[0].name.as_str(), explained.broker.as_str()),
        ("one", "broker-0")
    );
    consumer.credit(4, 1 << 20).await;
    eventually("four are leased", async || {
        let explained = explain(&client).await;
        held(&explained, HeldBy::Lease) == 4 && held(&explained, HeldBy::NoCredit) == 6
    })
    .await;
    let leased = explain(&client).await;
    let of_lease = leased.held.iter().find(|held| held.by == i32::from(HeldBy::Lease));
    let of_lease = of_lease.expect("there");
    assert_eq!((of_lease.consumer.as_str(), of_lease.first_offset), ("one", 0));
    assert!(of_lease.until_ms > 0);
    drop(doomed);
    eventually("it may come back", async || held(&explain(&client).await, HeldBy::Grace) >= 4)
        .await;
    let nobody = ExplainRequest { topic: TOPIC.into(), subscription: "no".into(), segment: None };
    assert_eq!(refused(client.subscriber().explain(nobody).await), Reason::SubscriptionNotFound);
}

#[tokio::test]
async fn peeks_and_readers_leave_no_trace() {
    let (cluster, client) = started().await;
    let _consumer = client.open_consumer(open("one", &settings(SubscriptionType::Shared))).await;
    publish(&client, 3, 2).await;
    let peek = |place, messages_max| PeekRequest {
        topic: TOPIC.into(),
        segment: 0,
        from: Some(ReadFrom { from: Some(place) }),
        messages_max,
    };
    let found = client.subscriber().peek(peek(Place::Offset(1), 2)).await.expect("peeked");
    let found = found.into_inner();
    let got: Vec<u64> = found.deliveries.iter().flat_map(offsets).collect();
    assert_eq!((got, found.first_offset, found.next_offset), (vec![1, 2], 0, 6));
    assert!(found.deliveries[0].handle.is_empty());
    let reader = OpenConsume {
        topic: TOPIC.into(),
        reader: Some(ReadFrom { from: Some(Place::Offset(3)) }),
        ..OpenConsume::default()
    };
    let mut reading = client.open_consumer(reader.clone()).await.expect("opened");
    reading.credit(2, 1 << 20).await;
    assert_eq!(offsets(&delivery(&mut reading).await), [3]);
    assert_eq!(offsets(&delivery(&mut reading).await), [4]);
    assert!(reading.quiet().await, "never beyond the credit");
    reading.credit(100, 1 << 20).await;
    assert_eq!(offsets(&delivery(&mut reading).await), [5]);
    publish(&client, 1, 1).await;
    assert_eq!(offsets(&delivery(&mut reading).await), [6]);
    let settles = Accept { ranges: one(5), handle: Bytes::new() };
    assert_eq!(settle(&mut reading, Verb::Accept(settles)).await, Err("INVALID_HANDLE".into()));
    let both = OpenConsume { subscription: "s".into(), ..reader };
    assert_eq!(refused(client.open_consumer(both).await), Reason::InvalidRequest);
    let cursor = &cluster.subscription(TOPIC, "s").await.cursors[0];
    assert_eq!((cursor.mark_delete_next, cursor.backlog_messages), (0, 7));
}

/// A batch whose messages are to be delivered so long after now.
fn delayed(after_ms: &[u64]) -> geminga_proto::v1::Batch {
    let now = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_millis() as u64;
    let mut batch = keyed(&vec![1; after_ms.len()]);
    let due = |after: &u64| if *after == 0 { 0 } else { now + after };
    batch.index.as_mut().expect("set").deliver_at_ms = after_ms.iter().map(due).collect();
    batch
}

#[tokio::test]
async fn delayed_messages_are_never_early_and_can_be_listed_and_cancelled() {
    let (cluster, client) = started().await;
    let mut consumer = consumer(&client, "one", &settings(SubscriptionType::Shared)).await;
    publish_batch(&client, delayed(&[3_600_000, 0, 400, 7_200_000])).await;
    assert_eq!(offsets(&delivery(&mut consumer).await), [1]);
    let list = ListDelayedRequest {
        topic: TOPIC.into(),
        subscription: "s".into(),
        page_size: 2,
        ..ListDelayedRequest::default()
    };
    let page = client.admin().list_delayed(list.clone()).await.expect("listed").into_inner();
    assert_eq!(
        page.messages.iter().map(|m| m.offset).collect::<Vec<_>>(),
        [2, 0],
        "next due first"
    );
    let next = ListDelayedRequest { page_token: page.next_page_token, ..list.clone() };
    let rest = client.admin().list_delayed(next).await.expect("listed").into_inner();
    assert_eq!(rest.messages.iter().map(|m| m.offset).collect::<Vec<_>>(), [3]);
    assert_eq!(rest.next_page_token, "");
    let due = delivery(&mut consumer).await;
    let now = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_millis() as u64;
    assert_eq!(offsets(&due), [2]);
    assert!(now >= page.messages[0].due_ms, "never early");
    let cancel = CancelDelayedRequest {
        topic: TOPIC.into(),
        subscription: "s".into(),
        segment: 0,
        ranges: vec![OffsetRange { first: 0, last: 2 }],
    };
    let cancelled = client.admin().cancel_delayed(cancel.clone()).await.expect("done");
    assert_eq!(cancelled.into_inner().cancelled, 1);
    let again = client.admin().cancel_delayed(cancel).await.expect("done");
    assert_eq!(again.into_inner().cancelled, 0);
    assert_eq!(cluster.subscription(TOPIC, "s").await.cursors[0].mark_delete_next, 1);
    let bad = ListDelayedRequest { page_token: "x".into(), ..list };
    assert_eq!(refused(client.admin().list_delayed(bad).await), Reason::InvalidRequest);
    drop(consumer);
    // One that no consumer has come to is known as well.
    publish_batch(&client, delayed(&[3_600_000])).await;
    eventually("both that are left are listed", async || {
        let all = ListDelayedRequest {
            topic: TOPIC.into(),
            subscription: "s".into(),
            ..ListDelayedRequest::default()
        };
        let all = client.admin().list_delayed(all).await.expect("listed").into_inner();
        all.messages.iter().map(|m| m.offset).collect::<BTreeSet<_>>() == BTreeSet::from([3, 4])
    })
    .await;
}

#[tokio::test]
async fn settings_are_kept_shown_compared_and_changed_but_never_the_type() {
    let (cluster, client) = started().await;
    let twice = retrying(SubscriptionType::Shared, 2);
    let mut consumer = consumer(&client, "one", &twice).await;
    let stored = cluster.subscription(TOPIC, "s").await.settings.expect("shown");
    assert_eq!((stored.lease_ms, stored.r#type), (300_000, i32::from(SubscriptionType::Shared)));
    let other = open("two", &settings(SubscriptionType::Exclusive));
    assert_eq!(refused(client.open_consumer(other).await), Reason::AlreadyExists);
    let any = OpenConsume { settings: None, ..open("two", &twice) };
    client.open_consumer(any).await.expect("any will do");
    let update = |settings| UpdateSubscriptionRequest {
        topic: TOPIC.into(),
        name: "s".into(),
        settings: Some(settings),
    };
    let failover = update(settings(SubscriptionType::Failover));
    assert_eq!(refused(client.admin().update_subscription(failover).await), Reason::InvalidRequest);
    let unknown = SubscriptionSettings { r#type: 99, ..SubscriptionSettings::default() };
    assert_eq!(
        refused(client.admin().update_subscription(update(unknown)).await),
        Reason::InvalidRequest
    );
    let once = retrying(SubscriptionType::Unspecified, 1);
    let updated = client.admin().update_subscription(update(once)).await.expect("updated");
    let kept = updated.into_inner().settings.expect("shown").r#type;
    assert_eq!(kept, i32::from(SubscriptionType::Shared));
    // It is in force for what is delivered already.
    client.producer(TOPIC).await.publish(1, records(&["a"])).await;
    let got = delivery(&mut consumer).await;
    settle(&mut consumer, release(&got, true, None)).await.expect("released");
    dead_letters(&client, 1).await;
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_and_harms_nobody() {
    let (_cluster, client) = started().await;
    let mut consumer = consumer(&client, "one", &settings(SubscriptionType::Shared)).await;
    publish(&client, 1, 4).await;
    let got = delivery(&mut consumer).await;
    let long = Reject { ranges: one(0), handle: got.handle.clone(), reason: "x".repeat(257) };
    assert_eq!(settle(&mut consumer, Verb::Reject(long)).await, Err("INVALID_REQUEST".into()));
    let far = Release {
        ranges: one(0),
        handle: got.handle.clone(),
        delay_ms: Some(u64::MAX),
        counts: true,
    };
    assert_eq!(settle(&mut consumer, Verb::Release(far)).await, Err("INVALID_REQUEST".into()));
    let up_to = geminga_proto::v1::AcceptUpTo { offset: 3, handle: got.handle.clone() };
    assert_eq!(
        settle(&mut consumer, Verb::AcceptUpTo(up_to)).await,
        Err("INVALID_REQUEST".into()),
        "shared types settle by ranges"
    );
    let beyond = Release {
        ranges: vec![OffsetRange { first: 0, last: 9 }],
        handle: got.handle.clone(),
        delay_ms: None,
        counts: false,
    };
    assert_eq!(settle(&mut consumer, Verb::Release(beyond)).await, Err("INVALID_HANDLE".into()));
    let mut forged = got.handle.to_vec();
    forged[27] ^= 1; // another attempt
    let forged = Accept { ranges: one(0), handle: forged.into() };
    assert_eq!(settle(&mut consumer, Verb::Accept(forged)).await, Err("INVALID_HANDLE".into()));
    let claims = vec![Claim { handle: vec![1; 44].into(), ranges: one(0) }];
    let with_forged = OpenConsume { claims, ..open("two", &settings(SubscriptionType::Shared)) };
    assert_eq!(refused(client.open_consumer(with_forged).await), Reason::InvalidHandle);
    let claims = vec![Claim { handle: got.handle.clone(), ranges: one(0) }; 1_001];
    let with_many = OpenConsume { claims, ..open("two", &settings(SubscriptionType::Shared)) };
    assert_eq!(refused(client.open_consumer(with_many).await), Reason::InvalidRequest);
    let pull = PullRequest {
        topic: TOPIC.into(),
        subscription: "s".into(),
        wait_ms: u64::MAX,
        ..PullRequest::default()
    };
    assert_eq!(refused(client.subscriber().pull(pull).await), Reason::InvalidRequest);
    assert_eq!(settle(&mut consumer, accept(&got)).await, Ok(4), "nothing of it counted");
}

#[tokio::test]
async fn everything_works_when_another_broker_owns_the_segment() -> Result<(), Status> {
    let pair = Pair::start(|_| {}).await;
    let client = pair.cluster.client().await;
    client.topic(TOPIC, 8).await;
    let segment = pair.segment_of_other(TOPIC).await;
    let shared = settings(SubscriptionType::Shared);
    let open = OpenConsume { segment, route: Route::Relay.into(), ..open("one", &shared) };
    let mut consumer = client.open_consumer(open).await?;
    consumer.credit(2, 1 << 30).await;
    let mut producer = client
        .open_producer(geminga_proto::v1::OpenPublish {
            topic: TOPIC.into(),
            segment,
            stream_number: 1,
            route: Route::Relay.into(),
            ..Default::default()
        })
        .await?;
    for _ in 0..4 {
        producer.publish(1, records(&["a"])).await;
    }
    let first = delivery(&mut consumer).await;
    settle(&mut consumer, release(&first, true, None)).await.expect("released");
    let pull = PullRequest {
        topic: TOPIC.into(),
        subscription: "s".into(),
        segment: Some(segment),
        wait_ms: 5_000,
        messages_max: 1,
        ..PullRequest::default()
    };
    let pulled = client.subscriber().pull(pull).await?.into_inner();
    let got = &pulled.deliveries[0];
    let request = SettleRequest {
        topic: TOPIC.into(),
        segment,
        subscription: "s".into(),
        settle: Some(Settle { token: 1, verb: Some(accept(got)) }),
    };
    client.subscriber().settle(request).await?;
    let explained = ExplainRequest { topic: TOPIC.into(), subscription: "s".into(), segment: None };
    let explained = client.subscriber().explain(explained).await?.into_inner();
    assert_eq!(explained.segments.len(), 8);
    assert_eq!(explained.segments[segment as usize].broker, "broker-1");
    let peek = PeekRequest {
        topic: TOPIC.into(),
        segment,
        from: Some(ReadFrom { from: Some(Place::Offset(1)) }),
        messages_max: 1,
    };
    let peeked = client.subscriber().peek(peek).await?.into_inner();
    assert_eq!(offsets(&peeked.deliveries[0]), [1]);
    let seek = SeekRequest {
        topic: TOPIC.into(),
        subscription: "s".into(),
        segment: Some(segment),
        to: Some(ReadFrom { from: Some(Place::Offset(3)) }),
    };
    let sought = client.subscriber().seek(seek).await?.into_inner();
    assert_eq!(sought.segments[0].mark_delete_next, 3);
    Ok(())
}
