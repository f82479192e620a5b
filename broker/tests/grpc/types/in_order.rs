//! Exclusive and failover subscriptions.

use std::time::Duration;

use geminga_proto::v1::{HeldBy, SubscriptionType, consume_reply::Reply, settle::Verb};

use super::{
    Doomed, TOPIC, accept, consumer, delivery, explain, held, offsets, publish, release, settings,
    settle, started,
};
use crate::harness::{Cluster, Consumer, eventually};

#[tokio::test]
async fn in_order_types_know_every_verb_and_deliver_again_before_what_is_newer() {
    let (_cluster, client) = started().await;
    let mut consumer = consumer(&client, "one", &settings(SubscriptionType::Exclusive)).await;
    publish(&client, 2, 1).await;
    let (a, b) = (delivery(&mut consumer).await, delivery(&mut consumer).await);
    assert_eq!((offsets(&a), offsets(&b), a.lease_ms), (vec![0], vec![1], 0));
    settle(&mut consumer, release(&a, true, Some(2_000))).await.expect("released");
    publish(&client, 1, 1).await;
    assert_eq!(offsets(&delivery(&mut consumer).await), [2], "what waits stops nobody");
    let again = delivery(&mut consumer).await;
    assert_eq!((offsets(&again), again.attempt), (vec![0], 2));
    let up_to = geminga_proto::v1::AcceptUpTo { offset: 2, handle: b.handle.clone() };
    assert_eq!(settle(&mut consumer, Verb::AcceptUpTo(up_to)).await, Ok(3));
}

/// Whether it is told to be active, skipping everything else.
async fn assigned(consumer: &mut Consumer) -> bool {
    loop {
        match consumer.reply().await.expect("no refusal") {
            Some(Reply::Assigned(assigned)) => return assigned.active,
            Some(Reply::Delivery(delivery)) => consumer.later.push_back(delivery),
            Some(_) => {}
            None => panic!("the stream ended"),
        }
    }
}

#[tokio::test]
async fn failover_has_one_active_consumer_a_segment_and_another_takes_over() {
    let cluster =
        Cluster::start_with(|config| config.limits.consumer_grace = Duration::from_millis(300))
            .await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let failover = settings(SubscriptionType::Failover);
    let (one, two) = (Doomed::of(&cluster).await, Doomed::of(&cluster).await);
    let mut consumers = vec![
        ("one", consumer(&one.client, "one", &failover).await, one),
        ("two", consumer(&two.client, "two", &failover).await, two),
    ];
    publish(&client, 1, 1).await;
    let explained = explain(&client).await;
    assert_eq!(explained.consumers.len(), 2);
    eventually("one of them is active", async || {
        explain(&client).await.consumers.iter().filter(|consumer| consumer.active).count() == 1
    })
    .await;
    eventually("the message is with it", async || {
        held(&explain(&client).await, HeldBy::Lease) == 1
    })
    .await;
    let explained = explain(&client).await;
    let active = explained.consumers.iter().find(|consumer| consumer.active).expect("one is");
    let at = consumers.iter().position(|(name, ..)| *name == active.name).expect("one of them");
    let (_, lost, connected) = consumers.remove(at);
    drop(connected); // first: dropped alone, the stream would end well
    drop(lost);
    let (_, mut other, _connected) = consumers.remove(0);
    while !assigned(&mut other).await {}
    let again = delivery(&mut other).await;
    assert_eq!((offsets(&again), again.attempt), (vec![0], 2), "the active one was lost");
    settle(&mut other, accept(&again)).await.expect("settled");
}
