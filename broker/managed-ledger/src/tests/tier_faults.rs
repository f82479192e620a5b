//! Offload while stores misbehave and owners come and go: more copies than needed, never fewer (T31, #17512).

use std::time::Duration;

use geminga_metadata::{Fault, keys};
use geminga_runtime::clock::Timestamp;
use object_store::{ObjectStoreExt, path::Path};

use super::{harness::*, tier::*};
use crate::{
    Status, TierPolicy,
    offload::{Stage, format::ObjectId, store::faulty::ObjectFault},
};

/// Everything the list names is in the store, whole; nothing it names was swept.
async fn sweep_and_check(world: &World, cold: &Cold, node: &Node) -> usize {
    if let Some(name) = cold.names().await.first() {
        let newest = cold.storage.modified_ms(name).await;
        world.clock.set(Timestamp(newest + 25 * 3_600_000));
    }
    let swept = node.ledgers.sweep_objects(SEGMENT).await.expect("swept");
    let list = world.list().await;
    let named: usize =
        list.data.iter().filter_map(|l| l.offload.as_ref()).map(|o| o.objects.len()).sum();
    assert_eq!(cold.names().await.len(), named, "exactly what the list names is left");
    swept
}

#[tokio::test(start_paused = true)]
async fn a_write_that_was_done_and_timed_out_is_found_again() {
    let (world, cold) = cold_world().await;
    let node = world.cold_node();
    let log = node.load().await;
    fill(&log).await;
    let before = read_all(&log).await;
    cold.faulty.fail_writes([ObjectFault::Refused, ObjectFault::DoneThenLost]);
    cold.faulty.fail_reads([ObjectFault::Truncated, ObjectFault::Slow(Duration::from_secs(100))]);
    log.set_policy(eager());
    world.until_all(Stage::LedgerDeleted).await;
    assert_eq!(read_all(&log).await, before);
}

#[tokio::test(start_paused = true)]
async fn an_upload_that_reads_back_wrong_is_never_counted_on() {
    let (world, cold) = cold_world().await;
    let node = world.cold_node();
    let log = node.load().await;
    fill(&log).await;
    let before = read_all(&log).await;
    cold.faulty.fail_reads([ObjectFault::Flipped]);
    log.set_policy(eager());
    world.until_all(Stage::Uploaded).await;
    assert_eq!(node.metrics.upload_failures.get(), 1, "X2");
    world.until_all(Stage::LedgerDeleted).await;
    assert_eq!(read_all(&log).await, before);
    assert!(sweep_and_check(&world, &cold, &node).await > 0, "the bad one is left to the janitor");
    assert_eq!(read_all(&log).await, before);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_away_holds_nothing_up_and_is_used_once_it_is_back() {
    let (world, cold) = cold_world().await;
    let node = world.cold_node();
    let log = node.load().await;
    cold.faulty.set_down(true);
    log.set_policy(eager());
    let mut producer = fill(&log).await;
    pass(300.0).await;
    producer.store(&log, 5).await;
    assert_eq!(*log.status().borrow(), Status::Serving);
    assert!(node.metrics.upload_failures.get() > 1);
    assert!(log.tier_status().last_error.contains("503"), "{}", log.tier_status().last_error);
    let problems = all_steps(log.offload_now(false).expect("begun")).await;
    assert!(problems.iter().any(|step| step.problem.contains("503")), "{problems:?}");
    let before = read_all(&log).await;
    cold.faulty.set_down(false);
    world.until_all(Stage::LedgerDeleted).await;
    assert_eq!(log.tier_status().last_error, "");
    assert_eq!(read_all(&log).await, before);
}

#[tokio::test(start_paused = true)]
async fn an_owner_that_dies_at_any_step_leaves_nothing_half_done() {
    let (world, cold) = cold_world().await;
    let node = world.cold_node();
    let log = node.load().await;
    fill(&log).await;
    let before = read_all(&log).await;
    // Uploading: the store answers nothing, and the owner dies.
    cold.faulty.set_down(true);
    log.set_policy(eager());
    pass(5.0).await;
    let uploading = world.list().await.data[0].offload.clone().expect("begun");
    assert_eq!(uploading.stage, Stage::Uploading);
    node.kill();
    cold.faulty.set_down(false);
    // Its successor begins anew, under another uuid, and dies in the middle of writing.
    let node = world.cold_node();
    let log = node.load().await;
    cold.faulty.fail_writes([ObjectFault::Slow(Duration::from_secs(25))]);
    log.set_policy(eager());
    pass(10.0).await;
    let again = world.list().await.data[0].offload.clone().expect("begun");
    assert_eq!(again.stage, Stage::Uploading);
    assert_ne!(again.uuid, uploading.uuid, "X1");
    node.kill();
    // The next one gets to Uploaded, and dies before anything is deleted.
    let node = world.cold_node();
    let log = node.load().await;
    log.set_policy(eager());
    while world.stages().await[0] != Some(Stage::Uploaded) {
        pass(1.0).await;
    }
    node.kill();
    let node = world.cold_node();
    let log = node.load().await;
    assert_eq!(read_all(&log).await, before);
    log.set_policy(eager());
    world.until_all(Stage::LedgerDeleted).await;
    node.kill();
    let node = world.cold_node();
    let log = node.load().await;
    assert_eq!(read_all(&log).await, before);
    sweep_and_check(&world, &cold, &node).await;
    assert_eq!(read_all(&log).await, before);
    world.check_metadata().await;
}

/// T31: an answer of the metadata store is lost at every arrow, done or not done; the clean-up that follows takes nothing
/// that is the only copy.
#[tokio::test(start_paused = true)]
async fn uncertain_metadata_writes_never_cost_the_only_copy() {
    for first in 0..12usize {
        let (world, cold) = cold_world().await;
        let node = world.cold_node();
        let log = node.load().await;
        fill(&log).await;
        let before = read_all(&log).await;
        let faults = [Fault::UnknownDone, Fault::UnknownLost, Fault::Unavailable];
        log.set_policy(TierPolicy { delete_lag: Duration::from_secs(3), ..eager() });
        for step in 0..24 {
            if step % 3 == 0 {
                let fault = faults[(first + step) % faults.len()];
                world.store.inject_below(keys::segment_list(SEGMENT), fault);
            }
            if first % 2 == 0 && step % 4 == 0 {
                cold.faulty.fail_writes([ObjectFault::Refused]);
            }
            pass(2.0 + first as f64 / 10.0).await;
            world.check_metadata().await;
        }
        let late = Fault::UnknownLate(Duration::from_secs(2));
        world.store.inject_below(keys::segment_list(SEGMENT), late);
        assert_eq!(read_all(&log).await, before);
        node.kill();
        let node = world.cold_node();
        let log = node.load().await;
        sweep_and_check(&world, &cold, &node).await;
        assert_eq!(read_all(&log).await, before, "{first}");
        log.set_policy(eager());
        world.until_all(Stage::LedgerDeleted).await;
        sweep_and_check(&world, &cold, &node).await;
        assert_eq!(read_all(&log).await, before, "{first}");
    }
}

/// Uploads that fail again and again make one list change each. Whatever they do, a roll that publishing waits for comes next:
/// no receipt takes longer than a write and a few changes of the list.
#[tokio::test(start_paused = true)]
async fn failing_uploads_never_hold_up_a_roll() {
    for seed in 0..4u64 {
        let (world, cold) = cold_world().await;
        let node = world.node_with(|config| {
            config.roll_bytes = 300;
            config.offload_retry = Duration::from_millis(1);
        });
        let log = node.load().await;
        log.create_cursor(SUB, crate::Start::Earliest).await.expect("made");
        cold.faulty.set_down(true);
        log.set_policy(TierPolicy { retention_ms: Some(1 << 40), ..eager() });
        let mut producer = Producer::named(&log, "p", 1).await;
        let mut longest = Duration::ZERO;
        for n in 0..400u64 {
            // Whoever wants everything offloaded now has failed uploads follow one another without a pause.
            if n % 5 == 0 {
                drop(log.offload_now(n % 10 == 0));
            }
            if n % 7 == seed {
                let list = keys::segment_list(SEGMENT);
                world.store.inject_below(list, Fault::Slow(Duration::from_millis(300)));
            }
            // A ledger that fails in the middle of it all: nothing is stored before it is followed by another.
            if n % 50 == 10 * seed {
                for bookie in [1, 2] {
                    world.kill(bookie);
                }
                pass(0.2).await;
                for bookie in [1, 2] {
                    world.start(bookie);
                }
            }
            pass(0.05).await;
            let begun = tokio::time::Instant::now();
            let stored = producer.send(&log, n % 3 + 1).await.expect("stored");
            log.settle(SUB, crate::Settlement::UpTo(stored.base_offset.expect("new")))
                .await
                .expect("settled");
            longest = longest.max(begun.elapsed());
        }
        assert!(longest < Duration::from_secs(5), "seed {seed}: {longest:?}");
        assert!(node.metrics.upload_failures.get() > 20, "{}", node.metrics.upload_failures.get());
        assert!(world.list().await.data.len() > 10);
        let before = read_all(&log).await;
        cold.faulty.set_down(false);
        pass(60.0).await;
        assert_eq!(read_all(&log).await, before);
    }
}

#[tokio::test(start_paused = true)]
async fn an_object_that_no_list_names_is_found_behind_more_of_those_that_one_does() {
    // X4: a pass looks at a bounded number of candidates, and what the list names is none.
    let (world, cold) = cold_world().await;
    let node = world.cold_node();
    let log = node.load().await;
    fill(&log).await;
    log.set_policy(eager());
    world.until_all(Stage::Uploaded).await;
    let named = cold.names().await;
    assert!(named.len() > 8, "more than the pass below removes: {}", named.len());
    let ledger = world.list().await.data.last().expect("there are many").id;
    let orphan = ObjectId { segment: SEGMENT, ledger, uuid: [0xff; 16], part: 0 }.name();
    cold.memory
        .put(&Path::from(format!("test/{orphan}")), "nobody's".into())
        .await
        .expect("written");
    assert_eq!(cold.names().await.last(), Some(&orphan), "the last one listed");
    let newest = cold.storage.modified_ms(&orphan).await;
    world.clock.set(Timestamp(newest + 25 * 3_600_000));
    assert_eq!(node.ledgers.sweep_at_most(SEGMENT, 8).await.expect("swept"), 1);
    assert_eq!(cold.names().await, named);
}
