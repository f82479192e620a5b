//! How streams end: a sign of life on both sides, leaving for good, or breaking.

use std::{sync::Arc, time::Duration};

use geminga_proto::v1::{OpenConsume, OpenPublish};
use tokio::time::sleep;

use super::{offsets, shared, topic};
use crate::{
    client::{numbered, passing},
    consumer::open,
    producer,
    world::World,
};

pub(crate) async fn frozen_clients_lose_their_streams(world: Arc<World>) {
    let topic = topic("frozen");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    client.publish(&topic, 0, &numbered(3)).await;
    // It takes what it gets, and says nothing any more; one that promises nothing may do so.
    let promising = |name: &str| OpenConsume { heartbeat_ms: 1_000, ..open(&topic, "work", name) };
    let mut frozen = client.consume(promising("frozen"), 100).await;
    frozen.take(3).await;
    let mut silent = client.consume(open(&topic, "work", "silent"), 0).await;
    let end = frozen.end().await;
    let status = end.expect_err("not a clean end");
    assert!(passing(&status), "a client that thaws may come back: {status:?}");
    let mut next = client.consume(open(&topic, "work", "next"), 100).await;
    let mut again = next.take(3).await;
    again.sort_by_key(|got| got.offset);
    assert_eq!(offsets(&again), [0, 1, 2], "nothing is lost");
    assert!(again.iter().all(|got| got.attempt == 2), "they were with a lost consumer");
    for got in &again {
        next.accept(got).await;
    }
    silent.in_step().await;
    // The same holds for producers.
    let open = OpenPublish { heartbeat_ms: 1_000, ..producer::open(&topic, "frozen") };
    let mut frozen = client.produce(open).await;
    frozen.send(&numbered(1)).await;
    frozen.receipt().await;
    let status = frozen.outcome().await.expect_err("it ends");
    assert!(passing(&status), "{status:?}");
}

pub(crate) async fn living_ones_keep_them(world: Arc<World>) {
    let topic = topic("alive");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    let promising = OpenConsume { heartbeat_ms: 1_000, ..open(&topic, "work", "a") };
    let mut a = client.consume(promising, 100).await;
    // The server gives signs of its own, beside the answers to ours.
    for _ in 0..7 {
        let heard = a.frames_heard;
        sleep(Duration::from_millis(700)).await;
        a.in_step().await;
        a.within(Duration::from_millis(10)).await;
        assert!(a.frames_heard > heard && a.ended.is_none());
    }
    client.publish(&topic, 0, &numbered(1)).await;
    let got = a.next().await;
    assert_eq!(got.attempt, 1);
    a.accept(&got).await;
}

pub(crate) async fn leaving_is_not_breaking(world: Arc<World>) {
    let topic = topic("leave-or-break");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    client.publish(&topic, 0, &numbered(4)).await;
    // One that leaves, on a stream that it does not close: what it holds is free at once.
    let mut a = client.consume(open(&topic, "work", "a"), 100).await;
    a.take(4).await;
    a.say_leave().await;
    let mut b = client.consume(open(&topic, "work", "b"), 100).await;
    let again = b.take(4).await;
    assert!(again.iter().all(|got| got.attempt == 1), "nothing failed: {again:?}");
    // One whose streams go both at once has said nothing: it may come back, and failed if it does not.
    drop(b);
    let mut c = client.consume(open(&topic, "work", "c"), 100).await;
    let after = c.take(4).await;
    assert!(after.iter().all(|got| got.attempt == 2), "it may have been at work: {after:?}");
    for got in &after {
        c.accept(got).await;
    }
    assert_eq!(client.describe(&topic, "work").await.cursors[0].mark_delete_next, 4);
}
