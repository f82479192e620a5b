//! Redelivery state over a real segment (C1, C3, C6, L1..L5): what was durable is there for every later owner.

use std::time::Duration;

use geminga_bookie_client::bookie_rpc::memory::AddMode;
use geminga_proto::ids::EntryId;

use super::harness::*;
use crate::{
    DeadLetter, KeyOwner, LeaseRecord, ManagedLedger, Redelivery, RedeliveryView, SettleError,
    Settlement, Start,
};

fn pending(first: u64, last: u64, attempt: u32, due_ms: u64) -> Redelivery {
    Redelivery { first: offset(first), last: offset(last), attempt, due_ms }
}

fn lease(consumer: u64, first: u64, last: u64, attempt: u32) -> LeaseRecord {
    let (name, ranges) = (format!("c{consumer}"), vec![(offset(first), offset(last))]);
    LeaseRecord { consumer, name, ranges, attempt, left_ms: 300_000 }
}

fn dead(number: u64, at: u64) -> DeadLetter {
    DeadLetter { number, offset: offset(at), attempt: 3, reason: "poison".to_owned() }
}

async fn serving(node: &Node) -> ManagedLedger {
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    Producer::named(&log, "p", 1).await.store(&log, 20).await;
    log
}

/// Something of every kind; the view that results.
async fn fill(log: &ManagedLedger) -> RedeliveryView {
    let keys = vec![
        KeyOwner { first: 0, last: 99, consumer: "c1".to_owned() },
        KeyOwner { first: 100, last: u32::MAX, consumer: "c2".to_owned() },
    ];
    log.log_leases(SUB, vec![lease(1, 0, 9, 1), lease(2, 10, 14, 1)]);
    let taken = [
        log.settle(SUB, Settlement::Keys(keys.clone())),
        log.settle(SUB, Settlement::Redeliver(vec![pending(3, 4, 2, 0), pending(12, 12, 2, 77)])),
        log.settle(SUB, Settlement::DeadLetter(vec![dead(1, 6)])),
        log.settle(SUB, Settlement::DeadLetter(vec![dead(2, 8), dead(3, 20)])),
        log.settle(SUB, Settlement::Accept(vec![(offset(20), offset(20)), (offset(0), offset(0))])),
    ];
    for settled in taken {
        settled.await.expect("settled");
    }
    let first = LeaseRecord {
        ranges: [(1, 2), (5, 5), (7, 7), (9, 9)].map(|(a, b)| (offset(a), offset(b))).to_vec(),
        ..lease(1, 0, 0, 1)
    };
    let second = LeaseRecord {
        ranges: [(10, 11), (13, 14)].map(|(a, b)| (offset(a), offset(b))).to_vec(),
        ..lease(2, 0, 0, 1)
    };
    let expected = RedeliveryView {
        pending: vec![pending(3, 4, 2, 0), pending(12, 12, 2, 77)],
        leases: vec![first, second],
        leases_exact: false,
        dead: vec![dead(1, 6), dead(2, 8)],
        dead_letters: 3,
        keys,
        reset_epoch: 0,
    };
    assert_eq!(log.redelivery(SUB), Some(expected.clone()));
    expected
}

#[tokio::test(start_paused = true)]
async fn redelivery_state_and_the_handle_key_survive_a_crash_and_a_clean_end() {
    let world = World::new().await;
    let node = world.node();
    let log = serving(&node).await;
    let mut expected = fill(&log).await;
    let key = log.handle_key();
    assert_ne!(key, [0; 32]);
    node.kill();
    let node = world.node();
    let log = node.load().await;
    assert_eq!(log.redelivery(SUB), Some(expected.clone()), "after a crash");
    assert_eq!(log.handle_key(), key);
    // L4: the exact table replaces what was logged.
    let exact = vec![lease(7, 5, 5, 1)];
    log.settle(SUB, Settlement::Leases(exact.clone())).await.expect("durable");
    (expected.leases, expected.leases_exact) = (exact, true);
    log.close().await;
    assert!(world.list().await.cursor_log.is_empty(), "its snapshot is inline (C6)");
    let log = world.node().load().await;
    assert_eq!(log.redelivery(SUB), Some(expected), "after a clean end");
    assert_eq!(log.handle_key(), key);
    assert_eq!(log.redelivery(OTHER_SUB), None);
}

#[tokio::test(start_paused = true)]
async fn an_ended_attempt_is_visible_only_once_its_record_is_durable() {
    // C3, L1
    let world = World::new().await;
    let log = serving(&world.node()).await;
    for bookie in world.bookies.values() {
        bookie.set_mode(AddMode::Busy);
    }
    let ended = Settlement::Redeliver(vec![pending(3, 4, 2, 0)]);
    let mut settled = Box::pin(log.settle(SUB, ended));
    assert!(tokio::time::timeout(Duration::from_secs(1), &mut settled).await.is_err());
    assert_eq!(log.redelivery(SUB).expect("there").pending, []);
    let crashed = world.node().load().await;
    assert_eq!(crashed.redelivery(SUB).expect("there").pending, []);
    assert_eq!(settled.await, Err(SettleError::Fenced));
}

#[tokio::test(start_paused = true)]
async fn a_seek_takes_everything_back_and_what_was_called_before_it_comes_first() {
    // C2
    let world = World::new().await;
    let node = world.node();
    let log = serving(&node).await;
    fill(&log).await;
    log.settle(SUB, Settlement::UpTo(offset(25))).await.expect("settled");
    let settled = [
        log.settle(SUB, Settlement::UpTo(offset(25))),
        log.settle(SUB, Settlement::Reset(offset(4))),
        log.settle(SUB, Settlement::Redeliver(vec![pending(5, 5, 2, 0)])),
        log.settle(SUB, Settlement::Reset(offset(2))),
        log.settle(SUB, Settlement::Accept(vec![(offset(2), offset(3))])),
    ];
    let mut marks = Vec::new();
    for settled in settled {
        marks.push(settled.await.expect("settled").0);
    }
    assert_eq!(marks, [26, 4, 4, 2, 4]);
    let view = log.redelivery(SUB).expect("there");
    assert_eq!((view.pending.len(), view.leases.len(), view.dead.len()), (0, 0, 0));
    assert_eq!((view.dead_letters, view.keys.len(), view.reset_epoch), (3, 2, 2));
    node.kill();
    let log = world.node().load().await;
    assert_eq!(log.redelivery(SUB), Some(view));
    assert_eq!(log.cursor(SUB).expect("there").mark_delete_next, offset(4));
    // Past the end is the end.
    let end = *log.end().borrow();
    assert_eq!(log.settle(SUB, Settlement::Reset(offset(u64::MAX))).await, Ok(end));
}

#[tokio::test(start_paused = true)]
async fn a_seek_whose_record_is_damaged_still_skips_nothing() {
    // C4
    for damaged in 0..4 {
        let world = World::new().await;
        let lost = world.forgetful();
        let node = world.node();
        let log = serving(&node).await;
        log.settle(SUB, Settlement::UpTo(offset(29))).await.expect("settled");
        let ledger = world.list().await.cursor_log[0].id;
        log.settle(SUB, Settlement::Reset(offset(5))).await.expect("reset");
        log.create_cursor(OTHER_SUB, Start::Latest).await.expect("made");
        log.settle(OTHER_SUB, Settlement::UpTo(offset(9))).await.expect("settled");
        node.kill();
        // Entries: the snapshot, the cursor, up to 29, the reset, its repetition, another cursor.
        lost.lock().push((ledger, EntryId(2 + damaged)));
        let log = world.node().load().await;
        let view = log.cursor(SUB).expect("there");
        assert!(view.mark_delete_next <= offset(5), "entry {damaged}: {view:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn at_the_limit_redelivery_is_refused_and_leases_are_dropped_first() {
    let world = World::new().await;
    let node = world.node_with(|config| config.holes_max = 4);
    let log = serving(&node).await;
    log.log_leases(SUB, vec![lease(1, 0, 0, 1), lease(2, 2, 2, 1), lease(3, 4, 4, 1)]);
    let one = |n: u64| Settlement::Redeliver(vec![pending(10 + 2 * n, 10 + 2 * n, 2, n)]);
    let settles: Vec<_> = (0..6).map(|n| log.settle(SUB, one(n))).collect();
    let mut refused = 0;
    for settle in settles {
        if let Err(error) = settle.await {
            assert_eq!(error, SettleError::TooManyHoles { limit: 4 });
            refused += 1;
        }
    }
    assert_eq!(refused, 2, "leases make room");
    let before = node.metrics.leases_dropped.get();
    log.log_leases(SUB, vec![lease(4, 6, 6, 1)]);
    log.settle(SUB, Settlement::UpTo(offset(0))).await.expect("settled");
    assert_eq!(node.metrics.leases_dropped.get(), before + 1);
    let view = log.redelivery(SUB).expect("there");
    assert_eq!((view.pending.len(), view.leases.len()), (4, 2));
    // The next attempt of one that waits is no new run; settling it makes room.
    let again = Settlement::Redeliver(vec![pending(10, 10, 3, 0)]);
    log.settle(SUB, again).await.expect("in its place");
    log.settle(SUB, Settlement::Accept(vec![(offset(12), offset(12))]))
        .await
        .expect("in its place");
    log.settle(SUB, Settlement::UpTo(offset(12))).await.expect("settled");
    log.settle(SUB, one(5)).await.expect("there is room");
    let far = LeaseRecord { ranges: vec![(offset(0), offset(u64::MAX))], ..lease(5, 0, 0, 1) };
    log.log_leases(SUB, vec![far]);
    log.settle(SUB, Settlement::UpTo(offset(12))).await.expect("settled");
    assert_eq!(log.redelivery(SUB).expect("there").leases, [], "only what is stored is leased");
}

#[tokio::test(start_paused = true)]
async fn leases_open_a_log_of_their_own_and_fail_nothing_when_there_is_none() {
    // L2
    let world = World::new().await;
    let node = world.node();
    let log = serving(&node).await;
    log.close().await;
    let node = world.node();
    let log = node.load().await;
    log.log_leases(SUB, vec![lease(1, 0, 0, 1)]);
    pass(0.1).await;
    assert_eq!(log.redelivery(SUB).expect("there").leases.len(), 1);
    log.close().await;
    // No ledger can be made: they are forgotten at once, and nothing is retried for them.
    for bookie in 1..=3 {
        world.register(bookie, false).await;
    }
    let node = world.node();
    let log = node.load().await;
    log.log_leases(SUB, vec![lease(2, 2, 2, 1)]);
    pass(60.0).await;
    assert_eq!(node.metrics.leases_dropped.get(), 1);
    assert_eq!(*log.status().borrow(), crate::Status::Serving);
    assert_eq!(log.redelivery(SUB).expect("there").leases.len(), 1);
    log.log_leases(OTHER_SUB, vec![lease(2, 2, 2, 1)]);
    for bookie in 1..=3 {
        world.register(bookie, true).await;
    }
    pass(1.0).await;
    log.log_leases(SUB, vec![lease(2, 2, 2, 1)]);
    pass(1.0).await;
    assert_eq!(log.redelivery(SUB).expect("there").leases.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn decisions_have_dense_numbers_also_while_some_are_on_their_way() {
    let world = World::new().await;
    let log = serving(&world.node()).await;
    let decide = |number, at| log.settle(SUB, Settlement::DeadLetter(vec![dead(number, at)]));
    let end = *log.end().borrow();
    let (one, gap, two) = (decide(1, 3), decide(3, 4), decide(2, 5));
    assert!(one.await.is_ok() && two.await.is_ok());
    assert_eq!(gap.await, Err(SettleError::OutOfRange { end }));
    log.settle(SUB, Settlement::Accept(vec![(offset(3), offset(5))])).await.expect("settled");
    assert_eq!(decide(2, 8).await, Err(SettleError::OutOfRange { end }), "never used again");
    assert!(decide(3, 8).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn numbers_of_decisions_lost_to_damage_are_not_used_again() {
    // DD1: the producer of copies would take the second one for a repeat.
    let world = World::new().await;
    let lost = world.forgetful();
    let node = world.node();
    let log = serving(&node).await;
    let ledger = world.list().await.cursor_log[0].id;
    log.settle(SUB, Settlement::DeadLetter(vec![dead(1, 3)])).await.expect("decided");
    log.settle(SUB, Settlement::UpTo(offset(0))).await.expect("settled");
    node.kill();
    lost.lock().push((ledger, EntryId(2)));
    let log = world.node().load().await;
    let view = log.redelivery(SUB).expect("there");
    assert_eq!(view.dead, []);
    assert!(view.dead_letters >= 1);
    let next = dead(view.dead_letters + 1, 3);
    log.settle(SUB, Settlement::DeadLetter(vec![next.clone()])).await.expect("decided");
    assert_eq!(log.redelivery(SUB).expect("there").dead, [next]);
}
