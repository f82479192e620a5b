//! Shared subscriptions: many consumers, each message settled by itself.

use std::sync::Arc;

use super::{offsets, shared, topic};
use crate::{
    client::numbered,
    consumer::open,
    judge::{Judge, Order},
    world::World,
};

pub(crate) async fn spreads_and_settles_individually(world: Arc<World>) {
    let topic = topic("shared-spreads");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    let mut a = client.consume(open(&topic, "work", "a"), 5).await;
    let mut b = client.consume(open(&topic, "work", "b"), 5).await;
    for message in numbered(10).chunks(1) {
        client.publish(&topic, 0, message).await;
    }
    let (of_a, of_b) = (a.take(5).await, b.take(5).await);
    let mut all = offsets(&of_a);
    all.extend(offsets(&of_b));
    all.sort_unstable();
    assert_eq!(all, (0..10).collect::<Vec<u64>>(), "each message with one of them");
    // Every second message of each, in any order.
    let mut left = Vec::new();
    for (consumer, got) in [(&mut a, of_a), (&mut b, of_b)] {
        for (number, got) in got.iter().enumerate().rev() {
            if number % 2 == 0 {
                consumer.accept(got).await;
            } else {
                left.push(got.offset);
            }
        }
    }
    left.sort_unstable();
    a.leave().await;
    b.leave().await;
    let mut c = client.consume(open(&topic, "work", "c"), 100).await;
    let mut again = offsets(&c.take(left.len()).await);
    again.sort_unstable();
    assert_eq!(again, left, "only what was not accepted comes again");
    c.gets_nothing("the rest is settled").await;
}

pub(crate) async fn credit_bounds_deliveries(world: Arc<World>) {
    let topic = topic("shared-credit");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    client.publish(&topic, 0, &numbered(30)).await;
    let mut a = client.consume(open(&topic, "work", "a"), 7).await;
    let mut got = a.take(7).await;
    a.gets_nothing("its credit is used up").await;
    // A lower total than before is ignored; a higher one counts from the beginning of the stream.
    a.grant_totals(3, 1 << 40).await;
    a.gets_nothing("credit does not fall, nor does it rise by a repeat").await;
    a.grant_totals(9, 1 << 40).await;
    got.extend(a.take(2).await);
    a.gets_nothing("two more, and no third").await;
    let mut b = client.consume(open(&topic, "work", "b"), 100).await;
    got.extend(b.take(21).await);
    let mut all = offsets(&got);
    all.sort_unstable();
    assert_eq!(all, (0..30).collect::<Vec<u64>>());
}

pub(crate) async fn holes_survive(world: Arc<World>) {
    const MESSAGES: usize = 300;
    let topic = topic("shared-holes");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    let mut judge = Judge::default();
    for chunk in numbered(MESSAGES).chunks(30) {
        judge.published(client.publish(&topic, 0, chunk).await, chunk);
    }
    // In each life of the owner another third is accepted, and the rest left.
    for life in 0..3_u64 {
        let client = world.client().await;
        let mut consumer = client.consume(open(&topic, "work", "only"), 10_000).await;
        let left = MESSAGES - judge.accepted().len();
        for got in consumer.take(left).await {
            judge.delivered(&got);
            if got.offset % 3 == life {
                judge.asked(got.offset);
                consumer.accept(&got).await;
                judge.answered(got.offset, true);
            }
        }
        consumer.gets_nothing("what was accepted does not come again").await;
        if life == 0 {
            world.kill_owner(&topic).await;
        } else {
            consumer.leave().await;
            world.move_owner(&topic).await;
        }
    }
    assert_eq!(judge.unfinished(Order::None), Vec::<String>::new());
    let cursor = world.client().await.describe(&topic, "work").await.cursors[0].clone();
    assert_eq!((cursor.mark_delete_next, cursor.holes), (MESSAGES as u64, 0));
}
