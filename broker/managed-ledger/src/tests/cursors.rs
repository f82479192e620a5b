//! Cursors and their log (C1..C6, I12, I14).

use std::time::Duration;

use geminga_bookie_client::bookie_rpc::memory::AddMode;
use geminga_proto::ids::{EntryId, SubscriptionId};

use super::harness::*;
use crate::{ManagedLedger, SettleError, Settlement, Start, list::ListedState};

fn accept(runs: &[(u64, u64)]) -> Settlement {
    Settlement::Accept(runs.iter().map(|(first, last)| (offset(*first), offset(*last))).collect())
}

fn holes(log: &ManagedLedger, id: SubscriptionId) -> Vec<(u64, u64)> {
    let view = log.cursor(id).expect("there");
    view.holes.iter().map(|(first, last)| (first.0, last.0)).collect()
}

#[tokio::test(start_paused = true)]
async fn cursors_made_settled_and_removed_survive_a_crash() {
    let world = World::new().await;
    let node = world.node();
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    let mut producer = Producer::named(&log, "p", 1).await;
    producer.store(&log, 20).await;
    log.create_cursor(OTHER_SUB, Start::Latest).await.expect("made");
    log.create_cursor(SubscriptionId(3), Start::Earliest).await.expect("made");
    log.create_cursor(SUB, Start::Latest).await.expect("there already");
    assert_eq!(log.settle(SUB, Settlement::UpTo(offset(9))).await, Ok(offset(10)));
    assert_eq!(log.settle(SUB, accept(&[(12, 13), (20, 20)])).await, Ok(offset(10)));
    log.remove_cursor(SubscriptionId(3)).await.expect("removed");
    log.remove_cursor(SubscriptionId(99)).await.expect("a missing one is fine");
    let before = (log.cursor(SUB), log.cursor(OTHER_SUB));
    node.kill();
    let log = world.node().load().await;
    assert_eq!((log.cursor(SUB), log.cursor(OTHER_SUB)), before);
    assert_eq!(holes(&log, SUB), [(12, 13), (20, 20)]);
    assert_eq!(log.cursor(OTHER_SUB).expect("there").backlog, 0);
    assert_eq!(log.cursor(SubscriptionId(3)), None);
    assert_eq!(log.settle(SUB, accept(&[(10, 11)])).await, Ok(offset(14)));
}

#[tokio::test(start_paused = true)]
async fn a_settle_is_visible_only_once_its_record_is_durable() {
    // C3, T33
    let world = World::new().await;
    let log = world.node().load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    Producer::named(&log, "p", 1).await.store(&log, 5).await;
    for bookie in world.bookies.values() {
        bookie.set_mode(AddMode::Busy);
    }
    let mut settled = Box::pin(log.settle(SUB, Settlement::UpTo(offset(3))));
    let early = tokio::time::timeout(Duration::from_secs(1), &mut settled).await;
    assert!(early.is_err(), "nothing is durable yet");
    assert_eq!(log.cursor(SUB).expect("there").mark_delete_next, offset(0));
    let crashed = world.node().load().await;
    assert_eq!(crashed.cursor(SUB).expect("there").mark_delete_next, offset(0));
    assert_eq!(settled.await, Err(SettleError::Fenced));
}

#[tokio::test(start_paused = true)]
async fn a_cursor_asked_for_twice_at_once_keeps_its_first_start() {
    // I12: what was stored between the two requests is delivered, also after a crash.
    let world = World::new().await;
    let node = world.node();
    let log = node.load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    producer.store(&log, 1).await;
    // Data goes through; the cursor log's ledger takes its time.
    let list = geminga_metadata::keys::segment_list(SEGMENT);
    world.store.inject_below(list, geminga_metadata::Fault::Slow(Duration::from_secs(5)));
    let first = log.create_cursor(SUB, Start::Latest);
    let second = async {
        producer.store(&log, 3).await;
        log.create_cursor(SUB, Start::Latest).await
    };
    assert_eq!(tokio::join!(first, second), (Ok(()), Ok(())));
    assert_eq!(log.cursor(SUB).expect("there").backlog, 6);
    let view = log.cursor(SUB).expect("there");
    node.kill();
    let log = world.node().load().await;
    assert_eq!(log.cursor(SUB), Some(view));
}

#[tokio::test(start_paused = true)]
async fn a_cursor_removed_while_it_is_made_is_gone() {
    let world = World::new().await;
    let node = world.node();
    let log = node.load().await;
    let (made, removed) =
        tokio::join!(log.create_cursor(SUB, Start::Latest), log.remove_cursor(SUB));
    assert_eq!((made, removed), (Ok(()), Ok(())));
    assert_eq!(log.cursor(SUB), None);
    node.kill();
    assert_eq!(world.node().load().await.cursor(SUB), None);
}

#[tokio::test(start_paused = true)]
async fn only_what_is_stored_can_be_settled_and_only_by_cursors_that_exist() {
    let world = World::new().await;
    let log = world.node().load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    Producer::named(&log, "p", 1).await.store(&log, 3).await;
    let out = Err(SettleError::OutOfRange { end: offset(6) });
    assert_eq!(log.settle(SUB, Settlement::UpTo(offset(6))).await, out);
    assert_eq!(log.settle(SUB, accept(&[(0, 0), (5, 6)])).await, out);
    assert_eq!(log.settle(SUB, accept(&[(3, 2)])).await, out);
    assert_eq!(log.settle(OTHER_SUB, accept(&[(0, 0)])).await, Err(SettleError::UnknownCursor));
    assert_eq!(log.cursor(SUB).expect("there").backlog, 6);
}

#[tokio::test(start_paused = true)]
async fn runs_stay_under_their_limit_however_many_settles_come_at_once() {
    let world = World::new().await;
    let log = world.node_with(|config| config.holes_max = 4).load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    Producer::named(&log, "p", 1).await.store(&log, 30).await;
    let settles: Vec<_> = (1..20).map(|n| log.settle(SUB, accept(&[(n * 2, n * 2)]))).collect();
    let mut refused = 0;
    for settle in settles {
        if let Err(error) = settle.await {
            assert_eq!(error, SettleError::TooManyHoles { limit: 4 });
            refused += 1;
        }
    }
    assert_eq!((refused, holes(&log, SUB)), (15, vec![(2, 2), (4, 4), (6, 6), (8, 8)]));
    // The oldest hole may always be filled.
    assert_eq!(log.settle(SUB, accept(&[(0, 0), (1, 1)])).await, Ok(offset(3)));
    assert_eq!(log.settle(SUB, accept(&[(3, 3)])).await, Ok(offset(5)));
    assert_eq!(holes(&log, SUB), [(6, 6), (8, 8)]);
    assert_eq!(
        log.settle(SUB, accept(&[(20, 20), (22, 22), (24, 24)])).await,
        Err(SettleError::TooManyHoles { limit: 4 })
    );
    assert_eq!(log.settle(SUB, accept(&[(20, 20), (22, 22)])).await, Ok(offset(5)));
}

#[tokio::test(start_paused = true)]
async fn many_large_settles_at_once_fit_their_entries() {
    let world = World::new().await;
    let node = world.node();
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    let mut producer = Producer::named(&log, "p", 1).await;
    producer.send(&log, 2_000_000).await.expect("stored");
    let runs: Vec<(u64, u64)> = (1..90_000).map(|n| (n * 20 + 1_000, n * 20 + 1_000)).collect();
    let settles: Vec<_> = (0..14).map(|_| log.settle(SUB, accept(&runs))).collect();
    for settle in settles {
        let answer = tokio::time::timeout(Duration::from_secs(60), settle).await;
        let answer = answer.expect("answered");
        assert!(matches!(answer, Ok(_) | Err(SettleError::TooManyHoles { .. })), "{answer:?}");
    }
    // Repeats and what is settled already take no room in the log.
    let below: Vec<(u64, u64)> = (0..300_000).map(|n| (n % 7, n % 7)).collect();
    let settle = log.settle(SUB, accept(&below));
    let answer = tokio::time::timeout(Duration::from_secs(60), settle).await;
    assert_eq!(answer, Ok(Ok(offset(7))));
    assert_eq!(holes(&log, SUB).len(), 89_999);
    node.kill();
    assert_eq!(holes(&world.node().load().await, SUB).len(), 89_999);
}

#[tokio::test(start_paused = true)]
async fn after_a_roll_a_snapshot_follows_and_what_it_supersedes_goes() {
    let world = World::new().await;
    let node = world.node_with(|config| config.cursor_roll_bytes = 400);
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    let mut producer = Producer::named(&log, "p", 1).await;
    producer.store(&log, 100).await;
    for n in 0..190 {
        let settled = log.settle(SUB, accept(&[(n, n)])).await;
        assert_eq!(settled, Ok(offset(n + 1)));
    }
    pass(1.0).await;
    let list = world.list().await;
    assert_eq!(list.cursor_log.len(), 1, "{:?}", list.cursor_log);
    assert!(node.metrics.snapshots.get() > 3, "{}", node.metrics.snapshots.get());
    assert!(world.ledgers().await.len() > 4);
    world.check_metadata().await;
    node.kill();
    let log = world.node().load().await;
    assert_eq!(log.cursor(SUB).expect("there").mark_delete_next, offset(190));
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_cannot_be_read_back_supersedes_nothing() {
    // C4
    let world = World::new().await;
    let lost = world.forgetful();
    let node = world.node_with(|config| config.cursor_roll_bytes = 400);
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    let mut producer = Producer::named(&log, "p", 1).await;
    producer.store(&log, 30).await;
    let first = world.list().await.cursor_log[0].id;
    // The next ledgers lose their first entries.
    let data = world.list().await.data[0].id;
    for id in first.0.max(data.0) + 1..first.0 + 50 {
        lost.lock().push((id.into(), EntryId(0)));
    }
    for n in 0..45 {
        assert_eq!(log.settle(SUB, accept(&[(n, n)])).await, Ok(offset(n + 1)));
    }
    pass(1.0).await;
    let list = world.list().await;
    assert!(list.cursor_log.len() > 1, "{:?}", list.cursor_log);
    assert_eq!(list.cursor_log[0].id, first, "the last state that can be read stays");
    node.kill();
    let log = world.node().load().await;
    let mark = log.cursor(SUB).expect("there").mark_delete_next;
    assert!(mark <= offset(45) && mark > offset(0), "{mark}");
}

#[tokio::test(start_paused = true)]
async fn a_damaged_entry_of_the_cursor_log_redelivers_and_never_skips() {
    // C4
    for damaged in 0..8 {
        let world = World::new().await;
        let lost = world.forgetful();
        let node = world.node();
        let log = node.load().await;
        log.create_cursor(SUB, Start::Earliest).await.expect("made");
        Producer::named(&log, "p", 1).await.store(&log, 30).await;
        log.create_cursor(OTHER_SUB, Start::Latest).await.expect("made");
        for n in 0..6 {
            log.settle(SUB, accept(&[(n, n), (20 + n, 20 + n)])).await.expect("settled");
        }
        let log_ledger = world.list().await.cursor_log[0].clone();
        node.kill();
        lost.lock().push((log_ledger.id, EntryId(damaged)));
        let node = world.node();
        let log = node.load().await;
        assert_eq!(node.metrics.damaged_cursor_entries.get(), 1, "entry {damaged}");
        if let Some(view) = log.cursor(SUB) {
            for n in 0..60 {
                let settled = view.mark_delete_next > offset(n)
                    || view
                        .holes
                        .iter()
                        .any(|(first, last)| *first <= offset(n) && offset(n) <= *last);
                assert!(
                    !settled || n < 6 || (20..26).contains(&n),
                    "entry {damaged}: {n} was never settled"
                );
            }
        }
        if let Some(view) = log.cursor(OTHER_SUB) {
            assert_eq!(view.mark_delete_next, offset(60));
        }
        assert_eq!(read_all(&log).await.len(), 30);
        assert_eq!(Producer::named(&log, "p", 2).await.last, 60, "entry {damaged}");
        // Served on as usual.
        log.create_cursor(SUB, Start::Earliest).await.expect("made");
        log.settle(SUB, Settlement::UpTo(offset(59))).await.expect("settled");
    }
}

#[tokio::test(start_paused = true)]
async fn deltas_are_followed_by_a_snapshot() {
    // C5
    let world = World::new().await;
    let node = world.node_with(|config| config.snapshot_after_bytes = 200);
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    let mut producer = Producer::named(&log, "p", 1).await;
    producer.store(&log, 50).await;
    for n in 0..99 {
        log.settle(SUB, accept(&[(n, n)])).await.expect("settled");
    }
    assert!(node.metrics.snapshots.get() > 5, "{}", node.metrics.snapshots.get());
    assert_eq!(world.list().await.cursor_log.len(), 1);
    node.kill();
    assert_eq!(world.node().load().await.cursor(SUB).expect("there").mark_delete_next, offset(99));
}

#[tokio::test(start_paused = true)]
async fn an_idle_segment_rests_with_its_snapshot_in_the_list() {
    // C6, O4
    let world = World::new().await;
    let node = world.node();
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    let mut producer = Producer::named(&log, "p", 1).await;
    producer.store(&log, 10).await;
    log.settle(SUB, accept(&[(0, 3), (7, 7)])).await.expect("settled");
    pass(590.0).await;
    assert!(world.list().await.ledgers().any(|(_, listed)| listed.state == ListedState::Open));
    pass(30.0).await;
    let list = world.list().await;
    assert!(list.ledgers().all(|(_, listed)| listed.state == ListedState::Closed));
    assert!(list.cursor_log.is_empty() && !list.inline_snapshot.is_empty());
    world.check_metadata().await;
    let view = log.cursor(SUB);
    // It serves on.
    let behind = World::node(&world);
    producer.store(&log, 1).await;
    node.kill();
    let log = behind.load().await;
    assert_eq!(
        log.cursor(SUB).map(|view| (view.mark_delete_next, view.holes)),
        view.map(|view| (view.mark_delete_next, view.holes))
    );
    assert_eq!(Producer::named(&log, "p", 2).await.last, producer.last);
    // The next snapshot takes the inline one's place.
    log.settle(SUB, accept(&[(4, 4)])).await.expect("settled");
    pass(1.0).await;
    assert!(world.list().await.inline_snapshot.is_empty());
    assert_eq!(holes(&log, SUB), [(7, 7)]);
}

#[tokio::test(start_paused = true)]
async fn traffic_that_comes_while_a_segment_goes_to_rest_keeps_it_awake() {
    let world = World::new().await;
    let node = world.node();
    let log = node.load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    producer.store(&log, 1).await;
    // Closing takes its time, and meanwhile somebody publishes.
    pass(598.0).await;
    let list = geminga_metadata::keys::segment_list(SEGMENT);
    world.store.inject_below(list, geminga_metadata::Fault::Slow(Duration::from_secs(5)));
    pass(4.0).await;
    assert_eq!(world.list().await.data.len(), 1);
    for _ in 0..100 {
        producer.store(&log, 1).await;
        pass(0.3).await;
    }
    assert!(world.list().await.data.len() <= 2, "{}", world.list().await.data.len());
}

/// A backlog of ten million messages with a hundred thousand holes, as consumers leave it that settle one by one.
async fn many_holes(log: &ManagedLedger) {
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    let mut producer = Producer::named(log, "p", 1).await;
    for _ in 0..5 {
        producer.send(log, 2_000_000).await.expect("stored");
    }
    // Each hole and each run between two is of another length.
    let runs: Vec<(u64, u64)> =
        (0..100_000).map(|n| (n * 100 + 1 + n * 7 % 40, n * 100 + 41 + n * 13 % 59)).collect();
    for runs in runs.chunks(10_000) {
        assert_eq!(log.settle(SUB, accept(runs)).await, Ok(offset(0)));
    }
    assert_eq!(holes(log, SUB).len(), 100_000);
}

#[tokio::test(start_paused = true)]
async fn a_hundred_thousand_holes_in_ten_million_messages_take_less_than_a_megabyte() {
    let world = World::new().await;
    let node = world.node();
    let log = node.load().await;
    many_holes(&log).await;
    let before = log.cursor(SUB);
    // There is room for more, and for what waits for another attempt.
    let more = Settlement::Redeliver(vec![crate::Redelivery {
        first: offset(0),
        last: offset(9_999_999),
        attempt: 2,
        due_ms: 0,
    }]);
    let refused = log.settle(SUB, more).await;
    assert_eq!(refused, Err(SettleError::TooManyHoles { limit: 200_000 }), "one run for each hole");
    node.kill();
    let node = world.node();
    let log = node.load().await;
    assert_eq!(log.cursor(SUB), before);
    let (state, _) = node.log_state().await;
    let bytes: usize = crate::cursor_log::snapshot(1, &state).iter().map(bytes::Bytes::len).sum();
    assert!(bytes < 1_000_000, "{bytes}");
}

/// Prints figures: `cargo test --release --workspace --lib -- --ignored --nocapture reload_of_a_hundred_thousand_holes`.
#[tokio::test]
#[ignore = "prints figures of this machine"]
async fn reload_of_a_hundred_thousand_holes() {
    let world = World::new().await;
    let node = world.node();
    let log = node.load().await;
    many_holes(&log).await;
    node.kill();
    // From deltas, then from a snapshot alone.
    for from in ["deltas", "a snapshot"] {
        let node = world.node_with(|config| config.snapshot_after_bytes = 1);
        let begun = tokio::time::Instant::now();
        let log = node.load().await;
        let loaded = begun.elapsed();
        assert_eq!(holes(&log, SUB).len(), 100_000);
        for _ in 0..2 {
            log.settle(SUB, accept(&[(1, 1)])).await.expect("settled");
        }
        let (state, _) = node.log_state().await;
        let entries = crate::cursor_log::snapshot(1, &state);
        let bytes: usize = entries.iter().map(bytes::Bytes::len).sum();
        println!("reload from {from}: {loaded:?}, the snapshot has {bytes} bytes");
    }
}
