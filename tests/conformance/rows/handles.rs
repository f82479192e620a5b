//! A handle settles what it was given for, and nothing else.

use std::sync::Arc;

use geminga_proto::v1::{Settle, SettleRequest, settle::Verb};

use super::{offsets, shared, topic};
use crate::{
    client::{numbered, refusal},
    consumer::{Got, accept, open, release},
    world::World,
};

pub(crate) async fn twice_late_or_anothers(world: Arc<World>) {
    let topic = topic("handles");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    client.publish(&topic, 0, &numbered(6)).await;
    let mut a = client.consume(open(&topic, "work", "a"), 3).await;
    let of_a = a.take(3).await;
    let mut b = client.consume(open(&topic, "work", "b"), 3).await;
    let of_b = b.take(3).await;

    a.accept(&of_a[0]).await;
    a.accept(&of_a[0]).await; // twice: the same answer
    assert_eq!(b.refused(accept(&of_a[1])).await, "INVALID_HANDLE", "a's handle, b's stream");
    let not_held = Got { offset: of_b[0].offset, ..of_a[1].clone() };
    assert_eq!(a.refused(accept(&not_held)).await, "INVALID_HANDLE", "b's message, a's handle");
    let beyond = Got { offset: 1_000, ..of_a[1].clone() };
    assert_eq!(a.refused(accept(&beyond)).await, "INVALID_HANDLE", "never delivered");
    for junk in [Vec::new(), vec![7; 3], vec![0; 64], vec![1; 10_000]] {
        let junk = Got { handle: junk.into(), ..of_a[1].clone() };
        assert_eq!(a.refused(accept(&junk)).await, "INVALID_HANDLE");
    }
    for bit in 0..of_a[1].handle.len() * 8 {
        let mut bytes = of_a[1].handle.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let forged = Got { handle: bytes.into(), ..of_a[1].clone() };
        assert_eq!(a.refused(accept(&forged)).await, "INVALID_HANDLE", "bit {bit}");
    }

    // Late: released, and delivered again to the same consumer as another attempt.
    a.grant(1).await;
    a.release(&of_a[1], Some(0), true).await;
    let again = a.next().await;
    assert_eq!((again.offset, again.attempt), (of_a[1].offset, 2));
    assert_eq!(a.refused(accept(&of_a[1])).await, "INVALID_HANDLE", "of the attempt before");
    assert_eq!(a.refused(release(&of_a[1], None, true)).await, "INVALID_HANDLE");
    a.accept(&again).await;
    // Nothing of that harmed what is held.
    a.accept(&of_a[2]).await;
    for got in &of_b {
        b.accept(got).await;
    }
    assert_eq!(client.describe(&topic, "work").await.cursors[0].mark_delete_next, 6);
}

pub(crate) async fn the_same_name_replaces(world: Arc<World>) {
    let topic = topic("same-name");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    client.publish(&topic, 0, &numbered(3)).await;
    let mut first = client.consume(open(&topic, "work", "a"), 2).await;
    let held = first.take(2).await;
    let back = geminga_proto::v1::OpenConsume {
        claims: held.iter().map(crate::consumer::claim).collect(),
        ..open(&topic, "work", "a")
    };
    let mut second = client.consume(back, 10).await;
    assert_eq!(first.ends_with().await, "CONSUMER_REPLACED");
    let granted: u64 = second
        .opened
        .granted
        .iter()
        .flat_map(|claim| &claim.ranges)
        .map(|range| range.last - range.first + 1)
        .sum();
    assert_eq!(granted, 2, "it goes on with what it held");
    assert_eq!(offsets(&second.take(1).await), [2], "and gets the rest");
    second.gets_nothing("what it holds does not come again").await;
}

pub(crate) async fn unary_settles(world: Arc<World>) {
    let topic = topic("unary-settle");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    client.publish(&topic, 0, &numbered(2)).await;
    let mut a = client.consume(open(&topic, "work", "a"), 100).await;
    let got = a.take(2).await;
    let request = |verb: Verb| SettleRequest {
        topic: topic.clone(),
        segment: 0,
        subscription: "work".into(),
        settle: Some(Settle { token: 42, verb: Some(verb) }),
    };
    let settled = client.subscriber().settle(request(accept(&got[0]))).await.expect("settled");
    let settled = settled.into_inner().settled.expect("an answer");
    assert_eq!((settled.token, settled.mark_delete_next), (42, 1));
    client.subscriber().settle(request(release(&got[1], Some(0), true))).await.expect("settled");
    let again = a.next().await;
    assert_eq!((again.offset, again.attempt), (1, 2));
    let late = client.subscriber().settle(request(accept(&got[1]))).await;
    assert_eq!(refusal(late), "INVALID_HANDLE");
}
