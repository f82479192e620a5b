//! Compaction over the wire: on demand and by policy, and what a compacted reader is delivered.

use geminga_proto::{
    admin::v1::{
        CompactTopicRequest, DescribeTopicRequest, SegmentState, SetPoliciesRequest, TierProgress,
    },
    reason::Reason,
    v1::{
        ConsumeOpened, OpenConsume, Policies, ReadFrom, Record, RecordBatch, SubscriptionStart,
        consume_frame::Frame, consume_reply::Reply, read_from::From as Place,
    },
};
use prost::Message;
use tokio::time::timeout;

use crate::harness::{
    Client, Cluster, Consumer, PATIENCE, Producer, eventually, open_consume, refused,
};

const TOPIC: &str = "public/default/t";

async fn publish(producer: &mut Producer, says: &[(&'static str, &'static str)]) {
    let record = |(key, value): &(&'static str, &'static str)| Record {
        key: Some((*key).into()),
        value: (*value).into(),
        ..Record::default()
    };
    let payload = RecordBatch { records: says.iter().map(record).collect() }.encode_to_vec();
    producer.publish(says.len() as u32, payload).await;
}

fn reader(place: Place) -> OpenConsume {
    OpenConsume {
        topic: TOPIC.into(),
        reader: Some(ReadFrom { from: Some(place) }),
        compacted: true,
        ..OpenConsume::default()
    }
}

async fn reading(client: &Client, open: OpenConsume) -> (ConsumeOpened, Consumer) {
    let mut consumer = client.raw_consume().await.expect("a stream");
    consumer.send(Frame::Open(open)).await;
    let Ok(Some(Reply::Opened(opened))) = consumer.reply().await else { panic!("not opened") };
    consumer.credit(1 << 40, 1 << 40).await;
    (opened, consumer)
}

async fn state(client: &Client) -> SegmentState {
    let request = DescribeTopicRequest { name: TOPIC.into() };
    let topic = client.admin().describe_topic(request).await.expect("described");
    topic.into_inner().segments.remove(0)
}

async fn compact(client: &Client) -> Vec<TierProgress> {
    let request = CompactTopicRequest { topic: TOPIC.into() };
    let mut steps = client.admin().compact_topic(request).await.expect("begun").into_inner();
    let mut all = Vec::new();
    while let Some(step) = timeout(PATIENCE, steps.message()).await.expect("in time").expect("good")
    {
        all.push(step);
    }
    all
}

const EARLIEST: Place = Place::At(SubscriptionStart::Earliest as i32);

#[tokio::test]
async fn a_compacted_reader_is_delivered_the_latest_of_each_key_and_then_everything() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let mut producer = client.producer(TOPIC).await;
    publish(&mut producer, &[("a", "1"), ("b", "2"), ("a", "3")]).await; // 0 1 2
    publish(&mut producer, &[("c", "4"), ("b", "")]).await; // 3 4
    publish(&mut producer, &[("d", "5")]).await; // 5

    let (opened, mut before) = reading(&client, reader(EARLIEST)).await;
    assert_eq!(opened.compacted_to, 0);
    assert_eq!(before.deliveries(6).await, [0, 1, 2, 3, 4, 5]);

    let steps = compact(&client).await;
    let last = steps.last().expect("it told of its steps");
    assert_eq!((last.ledger, &last.problem[..]), (0, ""));
    assert!(last.bytes_done > 0 && last.bytes_done == last.bytes_total, "{last:?}");
    let now = state(&client).await;
    assert_eq!((now.compacted_to, now.compacted_messages, now.first_offset), (6, 3, 0));
    assert!(now.compacted_bytes > 0);
    publish(&mut producer, &[("a", "6"), ("a", "7")]).await; // 6 7

    let (opened, mut fresh) = reading(&client, reader(EARLIEST)).await;
    assert_eq!(opened.compacted_to, 6);
    assert_eq!(fresh.deliveries(5).await, [2, 3, 5, 6, 7]);
    // One at a time, and one that goes on inside: it hears that b is gone.
    let open = reader(Place::Offset(3));
    let mut slow = client.open_consumer(open).await.expect("opened");
    for (n, expected) in (1..).zip([3, 4, 5, 6, 7]) {
        slow.credit(n, 1 << 30).await;
        assert_eq!(slow.delivery().await, [expected]);
    }
    assert!(slow.quiet().await, "never beyond the credit");
    // Subscriptions, and readers that do not ask for it, get the log.
    let mut all = client.consumer(TOPIC, "s").await;
    assert_eq!(all.deliveries(8).await, [0, 1, 2, 3, 4, 5, 6, 7]);
    let plain = OpenConsume { compacted: false, ..reader(EARLIEST) };
    let mut plain = reading(&client, plain).await.1;
    assert_eq!(plain.deliveries(8).await, [0, 1, 2, 3, 4, 5, 6, 7]);
    let both = OpenConsume { compacted: true, ..open_consume(TOPIC, "s") };
    assert_eq!(refused(client.open_consumer(both).await), Reason::InvalidRequest);
}

#[tokio::test]
async fn a_policy_compacts_a_topic_once_enough_was_published() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let mut producer = client.producer(TOPIC).await;
    publish(&mut producer, &[("a", "1"), ("a", "2")]).await;
    let policies = Some(Policies { compact_after_bytes: Some(1), ..Policies::default() });
    let request = SetPoliciesRequest { scope: TOPIC.into(), policies, unset: Vec::new() };
    client.admin().set_policies(request).await.expect("set");
    eventually("compacted", || async { state(&client).await.compacted_to == 2 }).await;
    let mut reading = reading(&client, reader(EARLIEST)).await.1;
    assert_eq!(reading.deliveries(1).await, [1]);
}
