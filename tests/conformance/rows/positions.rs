//! Other ways to a message than a consume stream from the cursor: seek, pull, peek, readers.

use std::{sync::Arc, time::Duration};

use geminga_proto::{
    admin::v1::ListSubscriptionsRequest,
    v1::{
        OpenConsume, PeekRequest, PullRequest, ReadFrom, SeekRequest, Settle, SettleRequest,
        SubscriptionStart, read_from::From,
    },
};
use tokio::time::Instant;

use super::{lease, offsets, shared, topic};
use crate::{
    client::{Client, numbered, refusal, settings},
    consumer::{accept, at_offset, messages, open},
    world::World,
};

fn at(start: SubscriptionStart) -> ReadFrom {
    ReadFrom { from: Some(From::At(start.into())) }
}

fn at_time(time_ms: u64) -> ReadFrom {
    ReadFrom { from: Some(From::TimeMs(time_ms)) }
}

/// Seeks; where the subscription stands then.
async fn seek_to(client: &Client, topic: &str, to: ReadFrom) -> u64 {
    let request = SeekRequest {
        topic: topic.to_owned(),
        segment: Some(0),
        subscription: "work".into(),
        to: Some(to),
    };
    let places = client.subscriber().seek(request).await.expect("moved").into_inner().segments;
    assert_eq!((places.len(), places[0].segment), (1, 0));
    places[0].mark_delete_next
}

pub(crate) async fn seek(world: Arc<World>) {
    let topic = topic("seek");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", settings(Default::default())).await;
    client.publish(&topic, 0, &numbered(5)).await;
    tokio::time::sleep(Duration::from_millis(30)).await; // the next batch's time is a later one
    client.publish(&topic, 0, &numbered(5)).await;
    let mut a = client.consume(open(&topic, "work", "a"), 100).await;
    let all = a.take(10).await;
    a.accept_up_to(&all[9]).await;
    assert!(all[5].publish_time_ms > all[4].publish_time_ms);

    assert_eq!(seek_to(&client, &topic, at_offset(3)).await, 3);
    let again = a.take(7).await;
    assert_eq!(offsets(&again), [3, 4, 5, 6, 7, 8, 9], "the stream goes on from there");
    assert!(again.iter().all(|got| got.attempt == 1), "a seek is no failure");
    assert_eq!(seek_to(&client, &topic, at_time(all[5].publish_time_ms)).await, 5);
    assert_eq!(offsets(&a.take(5).await), [5, 6, 7, 8, 9]);
    assert_eq!(seek_to(&client, &topic, at(SubscriptionStart::Earliest)).await, 0);
    assert_eq!(a.take(10).await[0].offset, 0);
    assert_eq!(seek_to(&client, &topic, at(SubscriptionStart::Latest)).await, 10);
    client.publish(&topic, 0, &numbered(1)).await;
    assert_eq!(offsets(&a.take(1).await), [10]);
    assert_eq!(seek_to(&client, &topic, at_offset(u64::MAX)).await, 11, "clamped to the end");
    assert_eq!(seek_to(&client, &topic, at_time(u64::MAX)).await, 11);
    assert_eq!(seek_to(&client, &topic, at_time(0)).await, 0);
    // What was delivered before a seek settles nothing after it.
    let old = all[0].clone();
    let again = a.take(11).await;
    assert_eq!(again[0].offset, 0);
    drop(old);
    a.accept(&again[0]).await;
}

pub(crate) async fn seek_survives_a_kill(world: Arc<World>) {
    let topic = topic("seek-kill");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    client.publish(&topic, 0, &numbered(10)).await;
    let mut a = client.consume(open(&topic, "work", "a"), 100).await;
    let all = a.take(10).await;
    // Holes and a failure before the seek must not come back after it.
    a.accept(&all[7]).await;
    a.release(&all[4], Some(3_600_000), true).await;
    assert_eq!(seek_to(&client, &topic, at_offset(2)).await, 2);
    world.kill_owner(&topic).await;
    let client = world.client().await;
    assert_eq!(client.describe(&topic, "work").await.cursors[0].mark_delete_next, 2);
    let mut b = client.consume(open(&topic, "work", "b"), 100).await;
    let mut again = b.take(8).await;
    again.sort_by_key(|got| got.offset);
    assert_eq!(offsets(&again), (2..10).collect::<Vec<u64>>());
    assert!(again.iter().all(|got| got.attempt == 1));
}

fn pull_of(topic: &str) -> PullRequest {
    PullRequest {
        topic: topic.to_owned(),
        subscription: "work".into(),
        consumer_name: "puller".into(),
        ..PullRequest::default()
    }
}

pub(crate) async fn pull(world: Arc<World>) {
    let topic = topic("pull");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", lease(shared(), 60_000)).await;
    client.publish(&topic, 0, &numbered(5)).await;
    let request = PullRequest { messages_max: 3, wait_ms: 10_000, ..pull_of(&topic) };
    let pulled = client.subscriber().pull(request.clone()).await.expect("pulled").into_inner();
    assert_eq!(pulled.segment, 0);
    let first: Vec<_> = pulled.deliveries.iter().flat_map(messages).collect();
    assert_eq!(offsets(&first), [0, 1, 2]);
    let pulled = client.subscriber().pull(request.clone()).await.expect("pulled").into_inner();
    let second: Vec<_> = pulled.deliveries.iter().flat_map(messages).collect();
    assert_eq!(offsets(&second), [3, 4], "what was pulled is leased");
    for got in first.iter().chain(&second[..1]) {
        let settle = SettleRequest {
            topic: topic.clone(),
            segment: 0,
            subscription: "work".into(),
            settle: Some(Settle { token: 1, verb: Some(accept(got)) }),
        };
        client.subscriber().settle(settle).await.expect("settled");
    }
    // Nothing is left: it waits as long as it was told, and answers with nothing.
    let began = Instant::now();
    let empty = PullRequest { wait_ms: 300, ..request.clone() };
    let pulled = client.subscriber().pull(empty).await.expect("answered").into_inner();
    assert!(pulled.deliveries.is_empty(), "{pulled:?}");
    assert!(began.elapsed() >= Duration::from_millis(300));
    // Something comes while it waits.
    let waiting = {
        let (client, request) = (client.clone(), request.clone());
        tokio::spawn(async move { client.subscriber().pull(request).await })
    };
    tokio::time::sleep(Duration::from_millis(100)).await; // either order is a case; this one is the likelier
    let base = client.publish(&topic, 0, &numbered(1)).await;
    let pulled = waiting.await.expect("no panic").expect("pulled").into_inner();
    let third: Vec<_> = pulled.deliveries.iter().flat_map(messages).collect();
    assert_eq!(offsets(&third), [base]);
    // A lease of its own, which runs out.
    let base = client.publish(&topic, 0, &numbered(1)).await;
    let short = PullRequest { lease_ms: 1_000, ..request.clone() };
    client.subscriber().pull(short).await.expect("pulled");
    let pulled = client.subscriber().pull(request).await.expect("pulled").into_inner();
    let fourth: Vec<_> = pulled.deliveries.iter().flat_map(messages).collect();
    assert_eq!((fourth[0].offset, fourth[0].attempt), (base, 2), "its lease ran out");
}

pub(crate) async fn peek(world: Arc<World>) {
    let topic = topic("peek");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    client.publish(&topic, 0, &numbered(5)).await;
    let before = client.describe(&topic, "work").await;
    let request = |from, messages_max| PeekRequest {
        topic: topic.clone(),
        segment: 0,
        from: Some(from),
        messages_max,
    };
    let peeked = client.subscriber().peek(request(at_offset(1), 3)).await.expect("peeked");
    let peeked = peeked.into_inner();
    let got: Vec<_> = peeked.deliveries.iter().flat_map(messages).collect();
    assert_eq!(offsets(&got), [1, 2, 3]);
    assert!(got.iter().all(|got| got.handle.is_empty() && got.attempt == 0));
    assert_eq!((peeked.first_offset, peeked.next_offset), (0, 5), "what the segment has");
    let one = client.subscriber().peek(request(at(SubscriptionStart::Earliest), 0)).await;
    let got: Vec<_> =
        one.expect("peeked").into_inner().deliveries.iter().flat_map(messages).collect();
    assert_eq!(offsets(&got), [0], "one, if no number is given");
    let end = client.subscriber().peek(request(at(SubscriptionStart::Latest), 10)).await;
    assert!(end.expect("peeked").into_inner().deliveries.is_empty());
    assert_eq!(client.describe(&topic, "work").await, before, "no trace");
    let mut a = client.consume(open(&topic, "work", "a"), 100).await;
    assert!(a.take(5).await.iter().all(|got| got.attempt == 1), "no trace");
}

pub(crate) async fn reader(world: Arc<World>) {
    let topic = topic("reader");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.publish(&topic, 0, &numbered(5)).await;
    tokio::time::sleep(Duration::from_millis(30)).await; // the next batch's time is a later one
    client.publish(&topic, 0, &numbered(5)).await;
    let read =
        |from| OpenConsume { topic: topic.clone(), reader: Some(from), ..OpenConsume::default() };
    let mut a = client.consume(read(at(SubscriptionStart::Earliest)), 100).await;
    let all = a.take(10).await;
    assert_eq!(offsets(&all), (0..10).collect::<Vec<u64>>());
    assert_ne!(a.refused(accept(&all[0])).await, "nothing: it was taken");
    let mut b = client.consume(read(at_offset(7)), 100).await;
    assert_eq!(offsets(&b.take(3).await), [7, 8, 9], "beside the other");
    let mut c = client.consume(read(at_time(all[5].publish_time_ms)), 100).await;
    assert_eq!(c.take(5).await[0].offset, 5);
    let mut d = client.consume(read(at(SubscriptionStart::Latest)), 100).await;
    client.publish(&topic, 0, &numbered(1)).await;
    for reader in [&mut b, &mut c, &mut d] {
        assert_eq!(offsets(&reader.take(1).await), [10]);
    }
    let both = OpenConsume { subscription: "work".into(), ..read(at_offset(0)) };
    assert_eq!(refusal(client.try_consume(both).await), "INVALID_REQUEST");
    let list = ListSubscriptionsRequest { topic: topic.clone(), ..Default::default() };
    let list = client.admin().list_subscriptions(list).await.expect("listed").into_inner();
    assert!(list.subscriptions.is_empty(), "no trace");
}
