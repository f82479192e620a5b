//! Shared subscriptions: who gets what, attempts, leases.

use std::collections::BTreeSet;

use geminga_proto::v1::{
    Accept, Extend, SubscriptionSettings, SubscriptionType, consume_reply::Reply, settle::Verb,
};

use super::{
    TOPIC, accept, consumer, delivery, offsets, one, publish, release, settings, settle, started,
};

#[tokio::test]
async fn shared_consumers_share_and_every_one_settles_its_own() {
    let (_cluster, client) = started().await;
    let shared = settings(SubscriptionType::Shared);
    let mut one = consumer(&client, "one", &shared).await;
    let mut two = consumer(&client, "two", &shared).await;
    publish(&client, 10, 10).await;
    let (mut of_one, mut of_two, mut last) = (BTreeSet::new(), BTreeSet::new(), None);
    for _ in 0..5 {
        let (a, b) = (delivery(&mut one).await, delivery(&mut two).await);
        assert_eq!((a.attempt, b.attempt), (1, 1));
        assert!(a.lease_ms > 0);
        of_one.extend(offsets(&a));
        of_two.extend(offsets(&b));
        settle(&mut one, accept(&a)).await.expect("settled");
        assert_eq!(settle(&mut two, accept(&a)).await, Err("INVALID_HANDLE".into()), "of another");
        settle(&mut two, accept(&b)).await.expect("settled");
        last = Some(b);
    }
    assert_eq!((of_one.len(), of_two.len()), (50, 50));
    assert!(of_one.is_disjoint(&of_two));
    // Once more, late: the same delivery, and nothing new.
    assert_eq!(settle(&mut two, accept(&last.expect("some"))).await, Ok(100));
    let sub = _cluster.subscription(TOPIC, "s").await;
    assert_eq!((sub.cursors[0].mark_delete_next, sub.cursors[0].consumers), (100, 2));
}

#[tokio::test]
async fn a_counted_release_is_a_new_attempt_and_an_uncounted_one_is_not() {
    let (_cluster, client) = started().await;
    let mut consumer = consumer(&client, "one", &settings(SubscriptionType::Shared)).await;
    publish(&client, 1, 1).await;
    let first = delivery(&mut consumer).await;
    settle(&mut consumer, release(&first, false, None)).await.expect("released");
    let again = delivery(&mut consumer).await;
    assert_eq!((again.attempt, offsets(&again)), (1, vec![0]));
    settle(&mut consumer, release(&again, true, None)).await.expect("released");
    let third = delivery(&mut consumer).await;
    assert_eq!(third.attempt, 2);
    assert_eq!(settle(&mut consumer, accept(&again)).await, Err("INVALID_HANDLE".into()), "late");
    settle(&mut consumer, accept(&third)).await.expect("settled");
}

#[tokio::test]
async fn a_lease_that_runs_out_is_told_and_the_message_comes_again() {
    let (_cluster, client) = started().await;
    let short = SubscriptionSettings { lease_ms: 300, ..settings(SubscriptionType::Shared) };
    let mut slow = consumer(&client, "slow", &short).await;
    publish(&client, 1, 3).await;
    let first = delivery(&mut slow).await;
    let verb =
        Verb::Extend(Extend { ranges: one(1), handle: first.handle.clone(), lease_ms: 60_000 });
    settle(&mut slow, verb).await.expect("extended");
    let mut revoked = Vec::new();
    let again = loop {
        match slow.reply().await.expect("no refusal") {
            Some(Reply::Revoked(told)) => revoked.extend(told.ranges),
            Some(Reply::Delivery(delivery)) => break delivery,
            other => panic!("neither: {other:?}"),
        }
    };
    assert_eq!(revoked, [one(0), one(2)].concat());
    assert_eq!((offsets(&again), again.attempt), (vec![0, 2], 2));
    let late = Accept { ranges: one(0), handle: first.handle.clone() };
    assert_eq!(settle(&mut slow, Verb::Accept(late)).await, Err("INVALID_HANDLE".into()));
    let extended = Accept { ranges: one(1), handle: first.handle };
    settle(&mut slow, Verb::Accept(extended)).await.expect("still its own");
}
