//! Pull, seek, explain, peek, readers; here and through another broker.

use bytes::Bytes;
use geminga_proto::{
    admin::v1::CreateSubscriptionRequest,
    reason::Reason,
    v1::{
        Accept, ExplainRequest, HeldBy, OpenConsume, PeekRequest, PullRequest, ReadFrom, Route,
        SeekRequest, Settle, SettleRequest, SubscriptionStart, SubscriptionType,
        consume_reply::Reply, read_from::From as Place, settle::Verb,
    },
};
use tonic::Status;

use super::{
    Doomed, TOPIC, accept, consumer, delivery, explain, held, offsets, one, open, publish, records,
    release, settings, settle, started,
};
use crate::harness::{Pair, eventually, refused};

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
