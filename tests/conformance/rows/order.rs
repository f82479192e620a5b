//! Exclusive subscriptions: one consumer, in order.

use std::sync::Arc;

use super::{offsets, topic};
use crate::{
    client::{numbered, refusal, settings},
    consumer::open,
    judge::{Judge, Order},
    world::World,
};

pub(crate) async fn exclusive_refuses_a_second(world: Arc<World>) {
    let topic = topic("exclusive-second");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "one", settings(Default::default())).await;
    client.publish(&topic, 0, &numbered(2)).await;
    let mut first = client.consume(open(&topic, "one", "first"), 10).await;
    assert_eq!(refusal(client.try_consume(open(&topic, "one", "second")).await), "CONSUMER_EXISTS");
    assert_eq!(offsets(&first.take(2).await), [0, 1], "the first one is not harmed");
    first.leave().await;
    let mut second = client.consume(open(&topic, "one", "second"), 10).await;
    assert_eq!(offsets(&second.take(2).await), [0, 1], "nothing was settled");
}

pub(crate) async fn exclusive_resumes_in_order(world: Arc<World>) {
    const MESSAGES: usize = 400;
    let topic = topic("exclusive-resumes");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "one", settings(Default::default())).await;
    let mut judge = Judge::default();
    for chunk in numbered(MESSAGES).chunks(50) {
        judge.published(client.publish(&topic, 0, chunk).await, chunk);
    }
    let mut harm = 0;
    while judge.accepted().len() < MESSAGES {
        let client = world.client().await;
        let mut consumer = client.consume(open(&topic, "one", "only"), 10_000).await;
        let settled = judge.accepted().last().map_or(0, |last| last + 1);
        assert!(consumer.opened.mark_delete_next >= settled, "what was answered is durable (C3)");
        // Delivered far ahead of what is settled: a read position stored as mark-delete would lose it (T33).
        for _ in 0..150 {
            if judge.accepted().len() == MESSAGES {
                break;
            }
            let got = consumer.next().await;
            judge.delivered(&got);
            judge.asked(got.offset);
            consumer.accept(&got).await;
            judge.answered(got.offset, true);
        }
        if judge.accepted().len() < MESSAGES {
            harm += 1;
            if harm % 2 == 1 {
                world.kill_owner(&topic).await;
            } else {
                world.move_owner(&topic).await;
            }
        }
    }
    assert_eq!(judge.unfinished(Order::All), Vec::<String>::new());
}

pub(crate) async fn accept_up_to_settles_all_below(world: Arc<World>) {
    let topic = topic("accept-up-to");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "one", settings(Default::default())).await;
    client.publish(&topic, 0, &numbered(10)).await;
    let mut consumer = client.consume(open(&topic, "one", "only"), 100).await;
    let all = consumer.take(10).await;
    consumer.accept_up_to(&all[6]).await;
    consumer.leave().await;
    let mut consumer = client.consume(open(&topic, "one", "only"), 100).await;
    assert_eq!(consumer.opened.mark_delete_next, 7);
    assert_eq!(offsets(&consumer.take(3).await), [7, 8, 9]);
}
