//! What clients see when the store, the bookies, the broker or its ownership fails.

use std::time::Duration;

use geminga_broker::BrokerConfig;
use geminga_metadata::{MetadataStore, Op, Txn, keys};
use geminga_proto::{
    admin::v1::{
        CreateSubscriptionRequest, CreateTenantRequest, DeleteSubscriptionRequest,
        DescribeSubscriptionRequest,
    },
    ids::SubscriptionId,
    names::SubscriptionName,
    reason::Reason,
    storage::v1::{
        SubscriptionValue,
        subscription_value::{Start, State},
    },
    v1::{
        AcceptUpTo, OpenPublish, PublishRequest, Settle, SubscriptionStart, consume_frame::Frame,
        consume_reply::Reply, settle::Verb,
    },
};
use geminga_runtime::tasks::Tasks;
use prost::Message;

use crate::harness::{Client, Cluster, Consumer, batch, eventually, reason, refused};

const TOPIC: &str = "public/default/t";

async fn settle_up_to(consumer: &mut Consumer, offset: u64) -> Result<u64, Reason> {
    let verb = Verb::AcceptUpTo(AcceptUpTo { offset, handle: consumer.handle.clone() });
    consumer.send(Frame::Settle(Settle { token: offset, verb: Some(verb) })).await;
    match consumer.reply().await {
        Ok(Some(Reply::Settled(settled))) => Ok(settled.mark_delete_next),
        Ok(Some(Reply::SettleRefused(refused))) => {
            Err(Reason::parse(&refused.reason).expect("a known reason"))
        }
        Ok(other) => panic!("not an answer to a settle: {other:?}"),
        Err(status) => Err(reason(&status)),
    }
}

async fn publish_unnamed(client: &Client) -> Result<u64, Reason> {
    let request = PublishRequest {
        topic: TOPIC.into(),
        batch: Some(batch(0, 1, "x")),
        ..PublishRequest::default()
    };
    let answer = client.publisher().publish(request).await.map_err(|status| reason(&status))?;
    Ok(answer.into_inner().receipt.expect("there").base_offset)
}

/// Design, promise 4: an outage of the metadata store stops changes, not traffic on open ledgers.
#[tokio::test]
async fn an_outage_of_the_store_stops_changes_and_no_traffic() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let mut producer = client.producer(TOPIC).await;
    let mut consumer = client.consumer(TOPIC, "s").await;
    producer.publish(1, "x").await;
    consumer.delivery().await;
    assert_eq!(settle_up_to(&mut consumer, 0).await, Ok(1));
    publish_unnamed(&client).await.expect("the topic is known from now on");
    consumer.delivery().await;
    cluster.store.set_partitioned(true);
    assert_eq!(producer.publish(1, "x").await.base_offset, 2);
    assert_eq!(publish_unnamed(&client).await, Ok(3));
    assert_eq!(consumer.deliveries(2).await, [2, 3]);
    assert_eq!(settle_up_to(&mut consumer, 3).await, Ok(4));
    let tenant = || CreateTenantRequest { name: "acme".into() };
    assert_eq!(refused(client.admin().create_tenant(tenant()).await), Reason::MetadataUnavailable);
    cluster.store.set_partitioned(false);
    client.admin().create_tenant(tenant()).await.expect("created");
}

#[tokio::test]
async fn what_was_acknowledged_and_settled_survives_a_kill() {
    let mut cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let named = || OpenPublish {
        topic: TOPIC.into(),
        producer_name: "p".into(),
        stream_number: 1,
        ..OpenPublish::default()
    };
    let mut producer = client.open_producer(named()).await.expect("opened");
    let epoch = producer.publish(10, "ten").await.epoch;
    let mut consumer = client.consumer(TOPIC, "s").await;
    consumer.deliveries(10).await;
    assert_eq!(settle_up_to(&mut consumer, 3).await, Ok(4));
    let address = cluster.broker().address();
    cluster.kill().await;
    let same_address = |config: &mut BrokerConfig| config.listen = address;
    cluster.start_broker(|settings| same_address(&mut settings.broker)).await;
    let client = cluster.client().await;
    // The new run proves the old one over by its address, and waits for no lease (O5).
    let mut producer = client.open_producer(named()).await.expect("opened");
    assert_eq!(producer.opened.last_persisted_sequence, 10);
    let receipt = producer.publish(1, "eleven").await;
    assert_eq!(receipt.base_offset, 10);
    assert!(receipt.epoch > epoch);
    let stale = consumer.handle;
    let mut consumer = client.consumer(TOPIC, "s").await;
    assert_eq!(consumer.deliveries(7).await, (4..11).collect::<Vec<_>>());
    consumer.handle = stale;
    assert_eq!(
        settle_up_to(&mut consumer, 9).await,
        Err(Reason::InvalidHandle),
        "of an earlier epoch"
    );
}

/// O1, C3: whoever lost a segment gives no receipt and settles nothing more.
#[tokio::test]
async fn a_stale_owner_gives_no_receipt_settles_nothing_and_ends_its_streams() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let mut producer = client.producer(TOPIC).await;
    producer.publish(2, "xy").await;
    let mut consumer = client.consumer(TOPIC, "s").await;
    consumer.deliveries(2).await;
    assert_eq!(settle_up_to(&mut consumer, 0).await, Ok(1));
    let id = cluster.subscription(TOPIC, "s").await.id;
    let rival = cluster.take_over(TOPIC).await;
    assert_eq!(settle_up_to(&mut consumer, 1).await, Err(Reason::SegmentFenced));
    producer.send(1, "late").await;
    assert_eq!(reason(&producer.raw.reply().await.expect_err("ended")), Reason::SegmentFenced);
    assert_eq!(rival.end().borrow().0, 2, "nothing came after the takeover");
    let cursor = rival.cursor(SubscriptionId(id)).expect("it came along");
    assert_eq!(cursor.mark_delete_next.0, 1);
}

#[tokio::test]
async fn an_unnamed_call_hears_nothing_of_the_failures_before_it() {
    let cluster = Cluster::start_as(|settings| settings.managed.producers_max = 1).await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    cluster.register_bookies(false).await;
    assert_eq!(publish_unnamed(&client).await, Err(Reason::NotEnoughBookies));
    cluster.register_bookies(true).await;
    assert_eq!(publish_unnamed(&client).await, Ok(0));
    client.producer(TOPIC).await; // takes the one place for a producer: the session behind unnamed calls is forgotten
    assert_eq!(publish_unnamed(&client).await, Ok(1));
}

/// C6: what a dead broker left half done is driven to its end by the owner of segment 0.
#[tokio::test]
async fn a_subscription_left_half_made_becomes_ready_and_one_half_deleted_goes() {
    let cluster = Cluster::start_with(|config| {
        config.limits.subscription_stall = Duration::from_millis(100);
    })
    .await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    client.consumer(TOPIC, "other").await; // segment 0 is loaded
    let topic = cluster.topic_id(TOPIC).await;
    let key = keys::subscription(topic, &SubscriptionName::parse("s").expect("valid"));
    let write = async |state: State| {
        let start = Start::Earliest.into();
        let value = SubscriptionValue {
            format: 1,
            id: 77,
            start,
            state: state.into(),
            created_at_ms: 0,
            ..Default::default()
        };
        let put = Op::put(key.clone(), value.encode_to_vec());
        cluster.store.txn(Txn::new().then(put)).await.expect("written");
    };
    let read = async || {
        let (_, found) = cluster.store.get(&key).await.expect("the store answers");
        found.map(|found| SubscriptionValue::decode(found.value).expect("valid").state())
    };
    write(State::Creating).await;
    eventually("it is ready", async || read().await == Some(State::Ready)).await;
    assert_eq!(cluster.subscription(TOPIC, "s").await.cursors.len(), 1);
    write(State::Deleting).await;
    eventually("it is gone", async || read().await.is_none()).await;
    let ledger = cluster.take_over(TOPIC).await;
    assert!(ledger.cursor(SubscriptionId(77)).is_none());
}

/// C6: a deletion that overtakes a creation leaves no cursor that nobody knows; it would keep the log from being trimmed.
#[tokio::test]
async fn a_subscription_deleted_while_it_is_made_leaves_no_cursor() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    client.producer(TOPIC).await.publish(1, "x").await;
    cluster.cut_bookies_off(true); // the cursor's record waits
    let create = CreateSubscriptionRequest {
        topic: TOPIC.into(),
        name: "s".into(),
        start: SubscriptionStart::Earliest.into(),
        ..Default::default()
    };
    let mut admin = client.admin();
    let creating = Tasks::new("test")
        .spawn_returning("create", async move { admin.create_subscription(create).await });
    let describe = || DescribeSubscriptionRequest { topic: TOPIC.into(), name: "s".into() };
    eventually("the key is there", async || {
        client.admin().describe_subscription(describe()).await.is_ok()
    })
    .await;
    let first = cluster.subscription(TOPIC, "s").await.id;
    let delete = DeleteSubscriptionRequest { topic: TOPIC.into(), name: "s".into() };
    let mut admin = client.admin();
    let deleting = Tasks::new("test")
        .spawn_returning("delete", async move { admin.delete_subscription(delete).await });
    let topic = cluster.topic_id(TOPIC).await;
    let key = keys::subscription(topic, &SubscriptionName::parse("s").expect("valid"));
    eventually("the key is marked", async || {
        let (_, found) = cluster.store.get(&key).await.expect("the store answers");
        found.is_some_and(|found| {
            SubscriptionValue::decode(found.value).expect("valid").state() == State::Deleting
        })
    })
    .await;
    cluster.cut_bookies_off(false);
    deleting.await.expect("no panic").expect("deleted");
    let second = creating.await.expect("no panic").expect("made anew").into_inner().id;
    assert!(second > first);
    let ledger = cluster.take_over(TOPIC).await;
    assert!(ledger.cursor(SubscriptionId(second)).is_some());
    assert!(ledger.cursor(SubscriptionId(first)).is_none(), "nobody would ever settle it");
}
