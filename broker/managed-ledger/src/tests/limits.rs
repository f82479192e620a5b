//! Time to live and backlog quotas over a real segment.

use std::time::Duration;

use geminga_proto::ids::Offset;
use tokio::time::timeout;

use super::harness::*;
use crate::{BacklogAction, ManagedLedger, PublishError, Settlement, Start, TierPolicy};

fn quota(bytes: u64, backlog_action: BacklogAction) -> TierPolicy {
    TierPolicy { backlog_quota_bytes: Some(bytes), backlog_action, ..TierPolicy::default() }
}

fn mark(log: &ManagedLedger) -> u64 {
    log.cursor(SUB).expect("there").mark_delete_next.0
}

/// A segment with a cursor and a producer under this policy.
async fn serving(node: &Node, policy: TierPolicy) -> (ManagedLedger, Producer) {
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    log.set_policy(policy);
    let producer = Producer::named(&log, "p", 1).await;
    (log, producer)
}

#[tokio::test(start_paused = true)]
async fn messages_older_than_their_time_count_as_settled_for_every_subscription() {
    let world = World::new().await;
    let node = world.node_with(|config| config.roll_bytes = 600);
    let policy = TierPolicy { ttl_ms: Some(60_000), ..TierPolicy::default() };
    let (log, mut producer) = serving(&node, policy).await;
    log.create_cursor(OTHER_SUB, Start::Earliest).await.expect("made");
    log.settle(SUB, Settlement::Accept(vec![])).await.expect("fine");
    for _ in 0..20 {
        producer.send(&log, 1).await.expect("stored");
    }
    log.settle(SUB, Settlement::Accept(vec![(offset(0), offset(4))])).await.expect("settled");
    pass(30.0).await;
    assert_eq!((mark(&log), node.metrics.expired_messages.get()), (5, 0), "none is old enough");
    world.clock.jump(50_000);
    for _ in 0..20 {
        producer.send(&log, 1).await.expect("stored");
    }
    pass(11.0).await;
    assert_eq!(mark(&log), 20);
    assert_eq!(log.cursor(OTHER_SUB).expect("there").mark_delete_next, offset(20));
    assert_eq!(node.metrics.expired_messages.get(), 15 + 20);
    assert_eq!((log.evicted(SUB), log.evicted(OTHER_SUB)), (15, 20), "of each");
    node.kill();
    let log = world.node().load().await;
    assert_eq!(mark(&log), 20, "it is durable");
    world.clock.jump(100_000);
    pass(30.0).await;
    assert_eq!(mark(&log), 20, "without a policy nothing expires");
    log.set_policy(TierPolicy { ttl_ms: Some(60_000), ..TierPolicy::default() });
    pass(30.0).await;
    assert_eq!(mark(&log), 40);
}

#[tokio::test(start_paused = true)]
async fn over_its_quota_a_segment_refuses_batches_until_its_subscriptions_settle() {
    let world = World::new().await;
    let node = world.node();
    let (log, mut producer) = serving(&node, quota(1_000, BacklogAction::Reject)).await;
    let mut stored = 0;
    let refused = loop {
        match producer.send(&log, 1).await {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
        assert!(stored < 100, "it is about a thousand bytes");
    };
    assert!(stored > 10, "{stored}");
    assert!(matches!(refused, PublishError::BacklogQuota { bytes, .. } if bytes > 1_000));
    // DD5: what is chained behind is refused, a repeat of what is stored is not.
    let behind = producer.send(&log, 1).await;
    assert_eq!(behind, Err(PublishError::OutOfSequence { pushed: stored }));
    assert!(
        log.publish(producer.batch(stored - 1, stored, stored)).await.expect("is stored").duplicate
    );
    assert_eq!(mark(&log), 0, "nothing is lost");
    log.settle(SUB, Settlement::UpTo(Offset(stored / 2))).await.expect("settled");
    producer.last = stored;
    producer.send(&log, 1).await.expect("there is room");
    log.clear_policy();
    pass(0.1).await;
    producer.store(&log, 100).await;
    // By age, at the next look.
    log.set_policy(TierPolicy { backlog_quota_ms: Some(5_000), ..TierPolicy::default() });
    producer.store(&log, 1).await;
    world.clock.jump(6_000);
    pass(11.0).await;
    let refused = producer.send(&log, 1).await;
    assert!(
        matches!(refused, Err(PublishError::BacklogQuota { age_ms: 6_000.., .. })),
        "{refused:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_held_batch_is_stored_once_there_is_room_in_order_and_refused_in_the_end() {
    let world = World::new().await;
    let node = world.node_with(|config| config.commands_max = 64);
    let (log, mut producer) = serving(&node, quota(600, BacklogAction::Hold)).await;
    let mut stored = 0;
    let mut held = loop {
        let mut sent = Box::pin(producer.send(&log, 1));
        match timeout(Duration::from_secs(1), &mut sent).await {
            Ok(answer) => assert_eq!(answer.expect("stored").base_offset, Some(offset(stored))),
            Err(_) => break sent,
        }
        stored += 1;
        assert!(stored < 100);
    };
    let more: Vec<_> = (0..3).map(|_| producer.send(&log, 1)).collect();
    log.settle(SUB, Settlement::UpTo(offset(stored - 1))).await.expect("settling goes on");
    assert_eq!((&mut held).await.expect("stored").base_offset, Some(offset(stored)));
    for (sent, at) in more.into_iter().zip(stored + 1..) {
        assert_eq!(sent.await.expect("stored").base_offset, Some(offset(at)));
    }
    // Nobody settles: the answers come, late, and are refusals.
    let mut last = Box::pin(producer.send(&log, 1));
    while timeout(Duration::from_secs(1), &mut last).await.is_ok() {
        last = Box::pin(producer.send(&log, 1));
    }
    let waiting: Vec<_> = (0..150).map(|_| producer.send(&log, 1)).collect();
    let refused = last.await;
    assert!(matches!(refused, Err(PublishError::BacklogQuota { .. })), "{refused:?}");
    let (mut chained, mut busy) = (0, 0);
    for sent in waiting {
        match timeout(Duration::from_secs(30), sent).await.expect("answered") {
            Err(PublishError::OutOfSequence { .. }) => chained += 1,
            Err(PublishError::Busy) => busy += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(chained > 0 && busy > 0, "{chained} {busy}");
    // Who is held when the segment closes is told.
    let held = producer.send(&log, 1);
    pass(1.0).await;
    log.close().await;
    assert_eq!(held.await, Err(PublishError::Closed));
}

#[tokio::test(start_paused = true)]
async fn evicting_moves_the_slowest_cursors_and_counts_what_they_lose() {
    let world = World::new().await;
    let node = world.node_with(|config| config.roll_bytes = 700);
    let (log, mut producer) = serving(&node, quota(2_000, BacklogAction::EvictOldest)).await;
    log.create_cursor(OTHER_SUB, Start::Earliest).await.expect("made");
    for n in 0..200u64 {
        producer.send(&log, 1).await.expect("never refused");
        log.settle(OTHER_SUB, Settlement::UpTo(offset(n))).await.expect("settled");
    }
    pass(1.0).await;
    let lost = mark(&log);
    assert!((100..200).contains(&lost), "{lost}");
    assert!(log.backlog(Offset(lost)).bytes < 2_400, "{:?}", log.backlog(Offset(lost)));
    assert_eq!(node.metrics.evicted_messages.get(), lost, "the other one lost nothing");
    assert_eq!((log.evicted(SUB), log.evicted(OTHER_SUB)), (lost, 0));
    let other = log.cursor(OTHER_SUB).expect("there");
    assert_eq!(other.mark_delete_next, offset(200));
    node.kill();
    let log = world.node().load().await;
    assert_eq!(mark(&log), lost, "it is durable");
    // By age.
    let policy = TierPolicy {
        backlog_quota_ms: Some(1_000),
        backlog_action: BacklogAction::EvictOldest,
        ..TierPolicy::default()
    };
    log.set_policy(policy);
    world.clock.jump(10_000);
    pass(11.0).await;
    assert_eq!(mark(&log), 200);
}
