//! Deleted ledgers give their space back, and a reused file shows nothing of its past (D5, D13, G1, T47).

use geminga_bookie_client::bookie_rpc::{AddAnswer, EntryAnswer, FenceAnswer, Unknown};

use super::harness::*;

async fn fill(bookie: &crate::Bookie, ledger: u64, entries: u64) {
    for id in 0..entries {
        assert_eq!(add(bookie, ledger, id).await, AddAnswer::Ok);
    }
}

#[tokio::test(start_paused = true)]
async fn files_of_deleted_ledgers_are_reused_and_their_ledgers_stay_dead() {
    let world = World::new(1);
    let bookie = world.started().await;
    let mut alive = Vec::new();
    for ledger in 1..12 {
        fill(&bookie, ledger, 60).await;
        if ledger % 4 == 0 {
            alive.push(ledger);
        } else {
            world.put_ledger(ledger, true).await;
        }
    }
    assert!(bookie.collect_garbage().await.expect("the store answers") >= 8);
    for id in 0..3 {
        bookie.checkpoint().await.expect("room");
        add(&bookie, 20, id).await;
    }
    assert!(world.metrics.files_released.get() > 0);
    let free = world.names("free-");
    assert!(!free.is_empty());
    for ledger in 30..36 {
        fill(&bookie, ledger, 60).await;
        alive.push(ledger);
    }
    assert!(!world.names("free-").contains(&free[0]), "reused");
    let mut bookie = bookie;
    for _ in 0..3 {
        for &ledger in &alive {
            for id in 0..60 {
                assert_eq!(read(&bookie, ledger, id).await, EntryAnswer::Held(entry(ledger, id)));
            }
        }
        assert_eq!(read(&bookie, 1, 0).await, EntryAnswer::Unknown(Unknown::Dropped));
        assert_eq!(add(&bookie, 1, 99).await, AddAnswer::Unknown(Unknown::Dropped));
        assert_eq!(recovery_add(&bookie, 1, 99).await, AddAnswer::Unknown(Unknown::Dropped));
        assert_eq!(fence(&bookie, 1).await, FenceAnswer::Unknown(Unknown::Dropped));
        bookie.kill();
        world.disk.crash();
        bookie = world.started().await;
        assert!(bookie.shared().core().ledgers.limbo().is_none(), "stale groups are no damage");
    }
    let rows: u64 = bookie.shared().core().indexes.iter().map(|index| index.rows).sum();
    assert!(rows > 0);
}

#[tokio::test(start_paused = true)]
async fn only_deleted_drops_a_ledger() {
    let world = World::new(2);
    let bookie = world.started().await;
    world.put_ledger(1, false).await;
    fill(&bookie, 1, 3).await;
    fill(&bookie, 2, 3).await; // no key at all
    assert_eq!(bookie.collect_garbage().await.expect("the store answers"), 0);
    assert_eq!(read(&bookie, 2, 0).await, EntryAnswer::Held(entry(2, 0)));
}

#[tokio::test(start_paused = true)]
async fn a_dead_file_stays_until_the_older_checkpoint_knows_it_as_dead() {
    let world = World::new(3);
    let bookie = world.started().await;
    fill(&bookie, 1, 120).await;
    for _ in 0..2 {
        bookie.checkpoint().await.expect("room");
        fill(&bookie, 2, 1).await;
    }
    let journals = world.names("journal-");
    world.put_ledger(1, true).await;
    assert_eq!(bookie.collect_garbage().await.expect("the store answers"), 1);
    bookie.checkpoint().await.expect("room");
    assert_eq!(world.names("journal-"), journals, "D5(b)");
    bookie.checkpoint().await.expect("room");
    assert!(world.names("journal-").len() < journals.len(), "an idle bookie gives it back, too");
}
