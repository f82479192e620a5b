//! A delivered message belongs to its consumer for a time.

use std::{sync::Arc, time::Duration};

use geminga_proto::v1::OpenConsume;
use tokio::time::Instant;

use super::{lease, offsets, shared, topic};
use crate::{
    client::numbered,
    consumer::{Got, accept, claim, open},
    world::World,
};

pub(crate) async fn expire(world: Arc<World>) {
    let topic = topic("lease-expires");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", lease(shared(), 1_000)).await;
    let mut a = client.consume(open(&topic, "work", "a"), 2).await;
    let began = Instant::now();
    client.publish(&topic, 0, &numbered(2)).await;
    let held = a.take(2).await;
    assert!(held.iter().all(|got| got.lease_ms == 1_000), "{held:?}");
    let mut b = client.consume(open(&topic, "work", "b"), 100).await;
    a.until("the messages are revoked", |a| !a.revoked.is_empty()).await;
    let mut again = b.take(2).await;
    again.sort_by_key(|got| got.offset);
    assert_eq!(offsets(&again), [0, 1]);
    assert!(again.iter().all(|got| got.attempt == 2), "{again:?}");
    assert!(again[0].at - began >= Duration::from_millis(1_000), "not early");
    assert_eq!(a.refused(accept(&held[0])).await, "INVALID_HANDLE");
    b.accept(&again[0]).await;
}

pub(crate) async fn extend(world: Arc<World>) {
    let topic = topic("lease-extended");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", lease(shared(), 1_000)).await;
    client.publish(&topic, 0, &numbered(2)).await;
    let mut a = client.consume(open(&topic, "work", "a"), 2).await;
    let held = a.take(2).await;
    a.extend(&held[1], 120_000).await;
    let mut b = client.consume(open(&topic, "work", "b"), 100).await;
    let got = b.next().await;
    assert_eq!((got.offset, got.attempt), (0, 2), "the one that was not extended");
    let got = b.within(Duration::from_millis(1_300)).await;
    assert!(got.iter().all(|got| got.offset == 0), "the extended one stays: {got:?}");
    a.accept(&held[1]).await;
}

pub(crate) async fn claims_after_a_kill(world: Arc<World>) {
    let topic = topic("claims");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", lease(shared(), 60_000)).await;
    client.publish(&topic, 0, &numbered(6)).await;
    let mut a = client.consume(open(&topic, "work", "a"), 6).await;
    let held = a.take(6).await;
    a.accept(&held[0]).await;
    world.kill_owner(&topic).await;
    // It claims all but one; what it accepted before is not given back.
    let back =
        OpenConsume { claims: held[..5].iter().map(claim).collect(), ..open(&topic, "work", "a") };
    let client = world.client().await;
    let mut a = client.consume(back, 0).await;
    let mut granted = std::collections::BTreeMap::new();
    for claim in &a.opened.granted {
        for range in &claim.ranges {
            granted.extend((range.first..=range.last).map(|at| (at, claim.handle.clone())));
        }
    }
    assert_eq!(granted.keys().copied().collect::<Vec<_>>(), [1, 2, 3, 4]);
    let mut b = client.consume(open(&topic, "work", "b"), 100).await;
    let rest = b.next().await;
    assert_eq!((rest.offset, rest.attempt), (5, 1), "only what was not claimed comes again");
    b.gets_nothing("the rest belongs to a").await;
    for (offset, handle) in granted {
        let got = Got { handle, ..held[offset as usize].clone() };
        a.accept(&got).await;
    }
    b.accept(&rest).await;
    let cursor = client.describe(&topic, "work").await.cursors[0].clone();
    assert_eq!(cursor.mark_delete_next, 6);
}

pub(crate) async fn unclaimed_after_a_kill(world: Arc<World>) {
    let topic = topic("unclaimed");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", lease(shared(), 60_000)).await;
    client.publish(&topic, 0, &numbered(4)).await;
    let mut a = client.consume(open(&topic, "work", "a"), 100).await;
    let held = a.take(4).await;
    // Messages 0 and 1 are at their second attempt, 2 and 3 at their first.
    for got in &held[..2] {
        a.release(got, Some(0), true).await;
    }
    let second = a.take(2).await;
    assert!(second.iter().all(|got| got.attempt == 2));
    world.kill_owner(&topic).await;
    let client = world.client().await;
    let mut b = client.consume(open(&topic, "work", "b"), 100).await;
    let mut again = b.take(4).await;
    again.sort_by_key(|got| got.offset);
    let attempts: Vec<(u64, u32)> = again.iter().map(|got| (got.offset, got.attempt)).collect();
    assert_eq!(attempts, [(0, 2), (1, 2), (2, 1), (3, 1)], "a crash raises no attempt");
}
