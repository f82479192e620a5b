//! Publishing: receipts, order, refusals that leave the stream open, and unary calls.

use geminga_proto::{
    key_hash::key_hash,
    reason::Reason,
    v1::{OpenPublish, PublishRequest, RecordIndex, publish_frame, publish_reply},
};

use crate::harness::{Cluster, batch, reason, refused};

const TOPIC: &str = "public/default/t";

#[tokio::test]
async fn receipts_come_in_order_with_dense_offsets() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let mut producer = client.producer(TOPIC).await;
    for i in 0..100u32 {
        producer.send(1 + i % 3, vec![7; 100]).await;
    }
    let (mut next, mut last) = (0, 0);
    for _ in 0..100 {
        let receipt = producer.receipt().await;
        assert_eq!(receipt.base_offset, next);
        assert!(receipt.hi_sequence > last && !receipt.duplicate && receipt.epoch > 0);
        next += u64::from(receipt.count);
        last = receipt.hi_sequence;
    }
    assert_eq!(last, producer.last);
}

#[tokio::test]
async fn a_first_publish_creates_the_topic_where_the_policy_allows_it() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    let mut producer = client.producer("public/default/new").await;
    producer.publish(1, "x").await;
    let elsewhere = OpenPublish { topic: "public/nowhere/t".into(), ..OpenPublish::default() };
    assert_eq!(refused(client.open_producer(elsewhere).await), Reason::NamespaceNotFound);
    let strict = Cluster::start_with(|config| config.auto_create_topics = false).await;
    let open = OpenPublish { topic: TOPIC.into(), ..OpenPublish::default() };
    assert_eq!(refused(strict.client().await.open_producer(open).await), Reason::TopicNotFound);
}

#[tokio::test]
async fn a_refused_batch_leaves_the_stream_open_and_the_rest_of_its_chain_refused() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let mut producer = client.producer(TOPIC).await;
    producer.publish(1, "one").await;
    // An index that does not match, then a batch chained behind it, then the chain from the last accepted one.
    let mut broken = batch(1, 1, "two");
    broken.index = Some(RecordIndex::default());
    for frame in [broken, batch(2, 1, "three"), batch(1, 1, "two again")] {
        producer.raw.send(publish_frame::Frame::Batch(frame)).await;
    }
    for expected in [Reason::InvalidRequest, Reason::OutOfSequence] {
        match producer.raw.reply().await.expect("open") {
            Some(publish_reply::Reply::Refused(refused)) => {
                assert_eq!(refused.reason, expected.as_str());
                assert_eq!(refused.pushed_sequence, 1);
            }
            other => panic!("not refused: {other:?}"),
        }
    }
    assert_eq!(producer.receipt().await.hi_sequence, 2);
}

#[tokio::test]
async fn an_oversized_batch_is_refused_and_an_oversized_frame_ends_the_stream_with_a_typed_reason()
{
    let cluster = Cluster::start_with(|config| {
        config.limits.message_bytes_max = 1_000;
        config.limits.batch_bytes_max = 2_000;
    })
    .await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let mut producer = client.producer(TOPIC).await;
    for (messages, bytes) in [(1, 1_001), (2, 2_001)] {
        producer.raw.send(publish_frame::Frame::Batch(batch(0, messages, vec![0; bytes]))).await;
        match producer.raw.reply().await.expect("open") {
            Some(publish_reply::Reply::Refused(refused)) => {
                assert_eq!(refused.reason, "MESSAGE_TOO_LARGE")
            }
            other => panic!("not refused: {other:?}"),
        }
    }
    producer.publish(2, vec![0; 2_000]).await;
    producer.raw.send(publish_frame::Frame::Batch(batch(2, 1, vec![0; 1 << 20]))).await;
    assert_eq!(reason(&producer.raw.reply().await.expect_err("refused")), Reason::MessageTooLarge);
    let request = PublishRequest {
        topic: TOPIC.into(),
        batch: Some(batch(0, 1, vec![0; 1 << 20])),
        ..PublishRequest::default()
    };
    assert_eq!(refused(client.publisher().publish(request).await), Reason::MessageTooLarge);
}

#[tokio::test]
async fn a_producer_that_ignores_its_credit_is_refused() {
    let cluster = Cluster::start_with(|config| config.limits.publish_window_batches = 0).await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let mut producer = client.producer(TOPIC).await;
    assert_eq!(producer.opened.granted_batches, 0);
    producer.send(1, "x").await;
    assert_eq!(reason(&producer.raw.reply().await.expect_err("ended")), Reason::CreditExceeded);
}

#[tokio::test]
async fn credit_is_given_back_so_that_a_producer_within_it_goes_on_for_ever() {
    let cluster = Cluster::start_with(|config| config.limits.publish_window_batches = 4).await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let mut producer = client.producer(TOPIC).await;
    let (mut granted, mut receipts) = (producer.opened.granted_batches, 0);
    let mut sent = 0;
    while receipts < 100 {
        while sent < granted && sent < 100 {
            producer.send(1, "x").await;
            sent += 1;
        }
        match producer.raw.reply().await.expect("open") {
            Some(publish_reply::Reply::Receipt(_)) => receipts += 1,
            Some(publish_reply::Reply::Credit(credit)) => granted = credit.granted_batches,
            other => panic!("unexpected: {other:?}"),
        }
    }
}

#[tokio::test]
async fn unary_publish_is_routed_by_key_and_numbered_by_the_broker() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 4).await;
    let mut segments = std::collections::BTreeSet::new();
    for i in 0..20u32 {
        let key = key_hash(&i.to_be_bytes());
        let index = RecordIndex { key_hash: vec![key], has_key: vec![true], ..Default::default() };
        let batch = geminga_proto::v1::Batch { index: Some(index), ..batch(0, 1, "x") };
        let request = PublishRequest {
            topic: TOPIC.into(),
            batch: Some(batch.clone()),
            ..PublishRequest::default()
        };
        let one = client.publisher().publish(request.clone()).await.expect("stored").into_inner();
        let two = client.publisher().publish(request).await.expect("stored").into_inner();
        assert_eq!(one.segment, two.segment, "one key, one segment");
        let offsets = [one, two].map(|r| r.receipt.expect("there").base_offset);
        assert!(offsets[0] < offsets[1]);
        segments.insert(key / (u32::MAX / 4 + 1));
    }
    assert_eq!(segments.len(), 4);
}

#[tokio::test]
async fn a_unary_retry_under_the_same_name_and_sequences_is_stored_once() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 4).await;
    let request = PublishRequest {
        topic: TOPIC.into(),
        producer_name: "p".into(),
        batch: Some(batch(0, 3, "abc")),
        ..PublishRequest::default()
    };
    let first = client.publisher().publish(request.clone()).await.expect("stored").into_inner();
    let second = client.publisher().publish(request).await.expect("stored").into_inner();
    assert_eq!(first.segment, second.segment);
    assert!(!first.receipt.expect("there").duplicate);
    assert!(second.receipt.expect("there").duplicate);
}

#[tokio::test]
async fn a_resumed_session_goes_on_where_it_was() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let mut producer = client.producer(TOPIC).await;
    producer.publish(5, "x").await;
    let token = producer.opened.resume_token.clone();
    drop(producer);
    let open = OpenPublish {
        topic: TOPIC.into(),
        resume_token: token,
        stream_number: 2,
        ..OpenPublish::default()
    };
    let resumed = client.open_producer(open).await.expect("resumed");
    assert_eq!(resumed.opened.last_persisted_sequence, 5);
}
