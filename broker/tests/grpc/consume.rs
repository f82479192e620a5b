//! Consuming: credit, settles, redelivery, handles, and slow readers.

use geminga_proto::{
    reason::Reason,
    v1::{
        Accept, AcceptUpTo, OffsetRange, OpenConsume, Settle, SettleRequest, consume_frame::Frame,
        consume_reply::Reply, settle::Verb,
    },
};

use crate::harness::{Client, Cluster, Consumer, open_consume, refused};

const TOPIC: &str = "public/default/t";

fn up_to(consumer: &Consumer, token: u64, offset: u64) -> Settle {
    Settle {
        token,
        verb: Some(Verb::AcceptUpTo(AcceptUpTo { offset, handle: consumer.handle.clone() })),
    }
}

fn accept(consumer: &Consumer, token: u64, ranges: &[(u64, u64)]) -> Settle {
    let ranges =
        ranges.iter().map(|(first, last)| OffsetRange { first: *first, last: *last }).collect();
    Settle { token, verb: Some(Verb::Accept(Accept { ranges, handle: consumer.handle.clone() })) }
}

async fn settled(consumer: &mut Consumer) -> (u64, u64) {
    match consumer.reply().await.expect("no refusal") {
        Some(Reply::Settled(settled)) => (settled.token, settled.mark_delete_next),
        other => panic!("not settled: {other:?}"),
    }
}

async fn settle_refused(consumer: &mut Consumer) -> String {
    match consumer.reply().await.expect("no refusal") {
        Some(Reply::SettleRefused(refused)) => refused.reason,
        other => panic!("not refused: {other:?}"),
    }
}

async fn with_messages(client: &Client, batches: u32, of: u32) {
    client.topic(TOPIC, 1).await;
    let mut producer = client.producer(TOPIC).await;
    for _ in 0..batches {
        producer.publish(of, vec![1; 100]).await;
    }
}

#[tokio::test]
async fn every_message_is_delivered_in_order_and_only_what_is_not_settled_comes_again() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    with_messages(&client, 10, 10).await;
    let mut consumer = client.consumer(TOPIC, "s").await;
    assert_eq!(consumer.deliveries(100).await, (0..100).collect::<Vec<_>>());
    consumer.send(Frame::Settle(up_to(&consumer, 1, 29))).await;
    assert_eq!(settled(&mut consumer).await, (1, 30));
    consumer.send(Frame::Settle(accept(&consumer, 2, &[(35, 37), (50, 59), (60, 60)]))).await;
    assert_eq!(settled(&mut consumer).await, (2, 30));
    drop(consumer);
    let mut again = client.consumer(TOPIC, "s").await;
    let expected: Vec<u64> =
        (30..100).filter(|x| !(35..=37).contains(x) && !(50..=60).contains(x)).collect();
    assert_eq!(again.deliveries(expected.len()).await, expected);
    assert!(again.quiet().await);
}

#[tokio::test]
async fn a_waiting_consumer_gets_new_messages_at_once() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let mut consumer = client.consumer(TOPIC, "s").await;
    let mut producer = client.producer(TOPIC).await;
    for i in 0..20 {
        producer.publish(1, "x").await;
        assert_eq!(consumer.delivery().await, [i]);
    }
}

#[tokio::test]
async fn nothing_is_delivered_beyond_the_credit() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    with_messages(&client, 5, 10).await;
    let mut consumer = client.open_consumer(open_consume(TOPIC, "s")).await.expect("opened");
    assert!(consumer.quiet().await, "no credit, no delivery");
    consumer.credit(7, 1 << 20).await;
    assert_eq!(consumer.delivery().await, (0..7).collect::<Vec<_>>());
    assert!(consumer.quiet().await);
    consumer.credit(7, 1 << 20).await; // the same totals again: nothing new
    assert!(consumer.quiet().await);
    consumer.credit(12, 1 << 20).await;
    assert_eq!(consumer.deliveries(5).await, (7..12).collect::<Vec<_>>());
    assert!(consumer.quiet().await);
}

#[tokio::test]
async fn a_second_exclusive_consumer_is_refused_until_the_first_leaves() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let first = client.consumer(TOPIC, "s").await;
    let second = || OpenConsume { consumer_name: "second".into(), ..open_consume(TOPIC, "s") };
    assert_eq!(refused(client.open_consumer(second()).await), Reason::ConsumerExists);
    client.open_consumer(open_consume(TOPIC, "other")).await.expect("another subscription is free");
    drop(first);
    for _ in 0..100 {
        if client.open_consumer(second()).await.is_ok() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("the place never became free");
}

#[tokio::test]
async fn a_handle_settles_only_what_it_was_given_for() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    with_messages(&client, 2, 10).await;
    let mut consumer = client.open_consumer(open_consume(TOPIC, "s")).await.expect("opened");
    consumer.credit(5, 1 << 20).await;
    consumer.delivery().await;
    consumer.send(Frame::Settle(accept(&consumer, 1, &[(0, 5)]))).await;
    assert_eq!(settle_refused(&mut consumer).await, "INVALID_HANDLE", "5 was never given");
    let stolen = Consumer { handle: vec![9; 24].into(), ..consumer };
    let mut consumer = stolen;
    consumer.send(Frame::Settle(accept(&consumer, 2, &[(0, 1)]))).await;
    assert_eq!(settle_refused(&mut consumer).await, "INVALID_HANDLE", "a handle of nobody");
    consumer.send(Frame::Settle(accept(&consumer, 3, &[(3, 1)]))).await;
    assert_eq!(settle_refused(&mut consumer).await, "INVALID_REQUEST", "an empty range");
    consumer.send(Frame::Settle(Settle { token: 4, verb: None })).await;
    assert_eq!(settle_refused(&mut consumer).await, "INVALID_REQUEST", "no verb");
}

#[tokio::test]
async fn settling_outside_the_stream_needs_the_same_handle() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    with_messages(&client, 1, 10).await;
    let mut consumer = client.consumer(TOPIC, "s").await;
    consumer.deliveries(10).await;
    let request = SettleRequest {
        topic: TOPIC.into(),
        segment: 0,
        subscription: "s".into(),
        settle: Some(up_to(&consumer, 7, 4)),
    };
    let answer = client.subscriber().settle(request.clone()).await.expect("settled").into_inner();
    assert_eq!(answer.settled.expect("there").mark_delete_next, 5);
    client.consumer(TOPIC, "another").await;
    let elsewhere = SettleRequest { subscription: "another".into(), ..request.clone() };
    assert_eq!(refused(client.subscriber().settle(elsewhere).await), Reason::InvalidHandle);
    let nowhere = SettleRequest { subscription: "nowhere".into(), ..request };
    assert_eq!(refused(client.subscriber().settle(nowhere).await), Reason::SubscriptionNotFound);
}

#[tokio::test]
async fn unsettled_messages_beyond_the_limit_wait_for_a_settle_wherever_it_comes_from() {
    let cluster = Cluster::start_with(|config| config.limits.unacked_messages_max = 10).await;
    let client = cluster.client().await;
    with_messages(&client, 3, 10).await;
    let mut consumer = client.consumer(TOPIC, "s").await;
    assert_eq!(consumer.deliveries(10).await.len(), 10);
    assert!(consumer.quiet().await);
    let settle = Some(up_to(&consumer, 1, 4));
    let request =
        SettleRequest { topic: TOPIC.into(), segment: 0, subscription: "s".into(), settle };
    client.subscriber().settle(request).await.expect("settled");
    assert_eq!(consumer.deliveries(5).await, (10..15).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_consumer_that_does_not_read_stops_only_itself() {
    let cluster =
        Cluster::start_with(|config| config.limits.dispatch_bytes_max = 4 * 1024 * 1024).await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let mut producer = client.producer(TOPIC).await;
    for _ in 0..40 {
        producer.publish(1, vec![0; 1 << 20]).await;
    }
    let mut lazy = Vec::new();
    for i in 0..8 {
        let other = cluster.client().await;
        lazy.push(other.consumer(TOPIC, &format!("lazy-{i}")).await);
    }
    let mut eager = cluster.client().await.consumer(TOPIC, "eager").await;
    assert_eq!(eager.deliveries(40).await, (0..40).collect::<Vec<_>>());
    // And the lazy ones have lost nothing.
    assert_eq!(lazy[0].deliveries(40).await, (0..40).collect::<Vec<_>>());
}
