//! What is not accepted comes again; how often it was tried is durable.

use std::{sync::Arc, time::Duration};

use geminga_proto::v1::RetryPolicy;
use tokio::time::Instant;

use super::{lease, offsets, retry, shared, topic};
use crate::{
    client::{Mortal, numbered},
    consumer::open,
    world::{Shape, World},
};

pub(crate) async fn release_counts_or_not(world: Arc<World>) {
    let topic = topic("release-counts");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    client.publish(&topic, 0, &numbered(1)).await;
    let mut a = client.consume(open(&topic, "work", "a"), 100).await;
    let mut got = a.next().await;
    for (counts, attempt) in [(true, 2), (false, 2), (true, 3), (false, 3), (true, 4)] {
        a.release(&got, Some(0), counts).await;
        got = a.next().await;
        assert_eq!((got.offset, got.attempt), (0, attempt), "after counts = {counts}");
    }
    a.accept(&got).await;
    a.gets_nothing("it is done").await;
}

pub(crate) async fn release_waits_for_its_delay(world: Arc<World>) {
    let topic = topic("release-delay");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    client.publish(&topic, 0, &numbered(3)).await;
    let mut a = client.consume(open(&topic, "work", "a"), 100).await;
    let got = a.take(3).await;
    let began = Instant::now();
    a.release(&got[0], Some(900), true).await;
    a.release(&got[1], Some(400), false).await;
    let first = a.next().await;
    assert_eq!((first.offset, first.attempt), (1, 1), "the one that is due first");
    assert!(first.at - began >= Duration::from_millis(400), "not early: {:?}", first.at - began);
    let second = a.next().await;
    assert_eq!((second.offset, second.attempt), (0, 2));
    assert!(second.at - began >= Duration::from_millis(900), "not early: {:?}", second.at - began);
}

pub(crate) async fn backoff_doubles(world: Arc<World>) {
    let topic = topic("backoff");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    let policy = RetryPolicy { backoff_ms: 200, backoff_ms_max: 500, ..RetryPolicy::default() };
    client.subscription(&topic, "work", retry(shared(), policy)).await;
    client.publish(&topic, 0, &numbered(1)).await;
    let mut a = client.consume(open(&topic, "work", "a"), 100).await;
    let mut got = a.next().await;
    for (attempt, pause) in [(2, 200), (3, 400), (4, 500), (5, 500)] {
        let began = Instant::now();
        a.release(&got, None, true).await;
        got = a.next().await;
        assert_eq!(got.attempt, attempt);
        let waited = got.at - began;
        assert!(waited >= Duration::from_millis(pause), "attempt {attempt} after {waited:?}");
    }
}

pub(crate) async fn lost_consumers_count(world: Arc<World>) {
    let topic = topic("lost-consumer");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    client.publish(&topic, 0, &numbered(4)).await;
    let process = Mortal::start(&world).await;
    let mut a = process.client.consume(open(&topic, "work", "a"), 100).await;
    let got = a.take(4).await;
    a.accept(&got[1]).await;
    let lost = Instant::now();
    drop(process);
    let mut b = client.consume(open(&topic, "work", "b"), 100).await;
    let again = b.take(3).await;
    let mut places = offsets(&again);
    places.sort_unstable();
    assert_eq!(places, [0, 2, 3]);
    assert!(again.iter().all(|got| got.attempt == 2), "a lost consumer's attempts count");
    assert!(again[0].at - lost >= Duration::from_secs(4), "it could have come back for a while");
}

pub(crate) async fn clean_leaves_do_not_count(world: Arc<World>) {
    let topic = topic("clean-leave");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    client.publish(&topic, 0, &numbered(4)).await;
    for consumer in ["a", "b", "c"] {
        let mut consumer = client.consume(open(&topic, "work", consumer), 100).await;
        let got = consumer.take(4).await;
        assert!(got.iter().all(|got| got.attempt == 1), "nothing failed yet");
        consumer.leave().await;
    }
}

/// Offset `n` is released `n` times, with counts; then the owner is harmed, and the attempts must be as before.
async fn attempts_survive(world: &World, topic: &str, messages: u32, mut harm: impl AsyncFnMut()) {
    let client = world.client().await;
    client.topic(topic, 1).await;
    client.subscription(topic, "work", lease(shared(), 60_000)).await;
    client.publish(topic, 0, &numbered(messages as usize)).await;
    let mut a = client.consume(open(topic, "work", "a"), 1_000).await;
    let mut reached = 0;
    while reached < messages {
        let got = a.next().await;
        if u64::from(got.attempt) <= got.offset {
            a.release(&got, Some(0), true).await;
        } else {
            reached += 1; // held
        }
    }
    a.leave().await;
    harm().await;
    let client = world.client().await;
    let mut b = client.consume(open(topic, "work", "b"), 1_000).await;
    let mut again = b.take(messages as usize).await;
    again.sort_by_key(|got| got.offset);
    for (offset, got) in (0..).zip(&again) {
        assert_eq!((got.offset, u64::from(got.attempt)), (offset, offset + 1));
    }
    for got in &again {
        b.accept(got).await;
    }
    b.gets_nothing("all is settled").await;
}

pub(crate) async fn attempts_survive_kills(world: Arc<World>) {
    let topic = topic("attempts-kill");
    attempts_survive(&world, &topic, 8, async || {
        for _ in 0..3 {
            world.kill_owner(&topic).await;
            world.client().await.describe(&topic, "work").await; // the next owner loads it
        }
    })
    .await;
}

/// How often the owner moves: a hundred times in the long run of `cargo conformance`, or as often as `MOVES` says.
fn moves(shape: Shape) -> u32 {
    let said = std::env::var("MOVES").ok().map(|text| text.parse().expect("MOVES is a number"));
    said.unwrap_or(if shape == Shape::Cluster { 100 } else { 10 })
}

pub(crate) async fn attempts_survive_moves(world: Arc<World>) {
    let topic = topic("attempts-move");
    attempts_survive(&world, &topic, 8, async || {
        for _ in 0..moves(world.shape()) {
            world.move_owner(&topic).await;
            world.client().await.describe(&topic, "work").await; // the next owner loads it
        }
    })
    .await;
}
