//! Trims: what goes, what stays, and what counts as gone meanwhile (M3).

use std::time::Duration;

use geminga_metadata::{Fault, keys};
use geminga_proto::ids::Offset;

use super::{harness::*, tier::*};
use crate::{ManagedLedger, ReadError, Settlement, Start, Status, TierPolicy, offload::Stage};

async fn settle_all(log: &ManagedLedger) {
    let last = Offset(log.end().borrow().0 - 1);
    log.settle(SUB, Settlement::UpTo(last)).await.expect("settled");
}

#[tokio::test(start_paused = true)]
async fn what_all_subscriptions_settled_goes_once_a_policy_is_set() {
    let (world, _cold) = cold_world().await;
    let node = world.cold_node();
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    fill(&log).await;
    let all = world.list().await.data.len();
    settle_all(&log).await;
    pass(1000.0).await;
    assert_eq!(world.list().await.data.len(), all, "nobody set a policy");
    log.set_policy(TierPolicy::default());
    pass(30.0).await;
    let list = world.list().await;
    assert!(list.data.len() <= 2, "{}", list.data.len());
    assert_eq!(list.first_offset, log.first_offset());
    assert!(list.first_offset > Offset(400));
    let gone = log.read(Offset(0), 100, 10).await;
    assert_eq!(gone, Err(ReadError::Trimmed { first: list.first_offset }));
    world.check_metadata().await;
    // A new subscription begins at what is kept, and the next owner agrees.
    log.create_cursor(OTHER_SUB, Start::Earliest).await.expect("made");
    let at = log.cursor(OTHER_SUB).expect("there").mark_delete_next;
    assert_eq!(at, list.first_offset);
    let rest = read_all(&log).await;
    node.kill();
    let log = world.cold_node().load().await;
    assert_eq!(read_all(&log).await, rest);
    assert_eq!(Producer::named(&log, "p", 2).await.last, 468, "its window outlived the entries");
}

#[tokio::test(start_paused = true)]
async fn without_subscriptions_everything_stays_unless_retention_says_otherwise() {
    let (world, _cold) = cold_world().await;
    let node = world.cold_node();
    let log = node.load().await;
    fill(&log).await;
    let all = world.list().await.data.len();
    log.set_policy(TierPolicy::default());
    pass(1000.0).await;
    assert_eq!(world.list().await.data.len(), all);
    log.set_policy(TierPolicy { retention_bytes: Some(2_500), ..TierPolicy::default() });
    pass(30.0).await;
    let list = world.list().await;
    assert!(list.data.len() < all && list.data.len() > 2, "{}", list.data.len());
    assert!(log.stats().stored_bytes >= 2_500);
    log.set_policy(TierPolicy { retention_ms: Some(2_000_000), ..TierPolicy::default() });
    pass(30.0).await;
    assert_eq!(world.list().await.data.len(), list.data.len(), "younger than that");
    pass(2_000.0).await;
    assert!(world.list().await.data.len() <= 2);
}

#[tokio::test(start_paused = true)]
async fn a_cursor_that_is_behind_and_an_unconfirmed_restore_hold_everything() {
    let (world, _cold) = cold_world().await;
    let node = world.cold_node();
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    log.create_cursor(OTHER_SUB, Start::Earliest).await.expect("made");
    fill(&log).await;
    settle_all(&log).await;
    log.set_policy(TierPolicy { retention_ms: Some(0), ..TierPolicy::default() });
    pass(100.0).await;
    assert_eq!(log.first_offset(), Offset(0), "the other cursor stands there");
    world.put(keys::cluster(), cluster(1, 0)).await;
    log.remove_cursor(OTHER_SUB).await.expect("removed");
    pass(100.0).await;
    assert_eq!(log.first_offset(), Offset(0), "G3");
    assert!(log.tier_status().last_error.contains("G3"));
    world.put(keys::cluster(), cluster(1, 1)).await;
    pass(100.0).await;
    assert!(log.first_offset() > Offset(400));
    assert_eq!(log.tier_status().last_error, "");
}

#[tokio::test(start_paused = true)]
async fn while_a_trim_is_under_way_its_prefix_counts_as_gone() {
    let (world, _cold) = cold_world().await;
    let node = world.cold_node();
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    fill(&log).await;
    settle_all(&log).await;
    let slow = Fault::Slow(Duration::from_secs(3));
    world.store.inject_below(keys::segment_list(SEGMENT), slow);
    log.set_policy(TierPolicy::default());
    pass(1.0).await;
    assert_eq!(world.list().await.first_offset, Offset(0), "not yet");
    assert!(log.first_offset() > Offset(400));
    log.create_cursor(OTHER_SUB, Start::Earliest).await.expect("made");
    let at = log.cursor(OTHER_SUB).expect("there").mark_delete_next;
    pass(10.0).await;
    assert_eq!(world.list().await.first_offset, at, "it opened at what is kept");
    assert_eq!(*log.status().borrow(), Status::Serving);
}

#[tokio::test(start_paused = true)]
async fn a_trim_takes_fifty_ledgers_at_a_time_and_uncertain_answers_change_nothing() {
    let (world, _cold) = cold_world().await;
    let node = world.node_with(|config| {
        config.roll_bytes = 60;
        config.dedup_snapshot_bytes = 100;
    });
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    let mut producer = Producer::named(&log, "p", 1).await;
    for _ in 0..70 {
        producer.store(&log, 6).await;
        pass(0.1).await;
    }
    let all = world.list().await.data.len();
    assert!(all > 60, "{all}");
    settle_all(&log).await;
    for fault in [Fault::UnknownDone, Fault::UnknownLost, Fault::UnknownDone] {
        world.store.inject_below(keys::segment_list(SEGMENT), fault);
    }
    log.set_policy(TierPolicy::default());
    pass(100.0).await;
    assert!(world.list().await.data.len() <= 2);
    assert_eq!(node.metrics.trimmed_ledgers.get() as usize, all - world.list().await.data.len());
    world.check_metadata().await;
    producer.store(&log, 6).await;
    read_all(&log).await;
}

#[tokio::test(start_paused = true)]
async fn a_deleted_segment_leaves_its_objects_to_the_janitor() {
    let (world, cold) = cold_world().await;
    let node = world.cold_node();
    let log = node.load().await;
    fill(&log).await;
    log.set_policy(eager());
    world.until_all(Stage::LedgerDeleted).await;
    let names = cold.names().await;
    let newest = cold.storage.modified_ms(&names[0]).await;
    world.clock.set(geminga_runtime::clock::Timestamp(newest + 25 * 3_600_000));
    assert_eq!(node.ledgers.sweep_objects(SEGMENT).await.expect("swept"), 0, "listed");
    node.ledgers.delete(SEGMENT).await.expect("deleted");
    world.put(keys::cluster(), cluster(1, 0)).await;
    node.ledgers.sweep_objects(SEGMENT).await.expect_err("G3");
    world.put(keys::cluster(), cluster(1, 1)).await;
    assert_eq!(node.ledgers.sweep_objects(SEGMENT).await.expect("swept"), names.len());
    assert!(cold.names().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_trim_that_reads_for_long_makes_way_for_a_roll() {
    // M1: changes of the list go one at a time, and publishing may wait for the next one.
    let (world, _cold) = cold_world().await;
    let node = world.cold_node();
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    let mut producer = fill(&log).await;
    settle_all(&log).await;
    pass(1.0).await;
    let all = world.list().await.data.len();
    world.slow_reads(Duration::from_secs(4));
    log.set_policy(TierPolicy::default());
    pass(0.1).await;
    let rolls = node.metrics.rolls.get();
    for _ in 0..60 {
        producer.send(&log, 1).await.expect("stored");
    }
    pass(1.0).await;
    assert!(node.metrics.rolls.get() > rolls, "the trim reads on");
    assert!(world.list().await.data.len() >= all);
    world.slow_reads(Duration::ZERO);
    pass(60.0).await;
    settle_all(&log).await;
    pass(60.0).await;
    assert!(world.list().await.data.len() < all, "it is tried again");
    world.check_metadata().await;
}

#[tokio::test(start_paused = true)]
async fn a_seek_under_way_holds_what_it_goes_back_to() {
    // M3
    let (world, _cold) = cold_world().await;
    let node = world.cold_node();
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    fill(&log).await;
    settle_all(&log).await;
    for bookie in world.bookies.values() {
        bookie.set_mode(geminga_bookie_client::bookie_rpc::memory::AddMode::Busy);
    }
    let seek = log.settle(SUB, Settlement::Reset(Offset(100)));
    log.set_policy(TierPolicy::default());
    pass(15.0).await;
    for bookie in world.bookies.values() {
        bookie.set_mode(geminga_bookie_client::bookie_rpc::memory::AddMode::Writable);
    }
    let at = seek.await.expect("durable");
    assert_eq!((at, log.first_offset() <= at), (Offset(100), true));
    assert!(log.read(at, 100, 1).await.expect("kept")[0].base_offset <= at);
}
