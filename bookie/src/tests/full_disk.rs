//! A full disk refuses adds with a reason, still fences, and never ends the bookie (D10).

use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use geminga_bookie_client::{
    bookie_rpc::{AddAnswer, AddRequest, BookieRpc, EntryAnswer, FenceAnswer, FenceRequest},
    entry::Entry,
};

use super::harness::*;
use crate::StartError;

#[tokio::test(start_paused = true)]
async fn at_the_end_of_the_disk_adds_are_refused_fences_answered_and_restarts_work() {
    let mut world = World::new(1);
    world.config.disk.check_interval = Duration::from_secs(3600); // the journal itself meets the end
    let bookie = world.started().await;
    add(&bookie, 1, 0).await;
    world.disk.set_capacity(world.used() + 9_000);
    let mut last = 0;
    let refused = loop {
        last += 1;
        match add(&bookie, 1, last).await {
            AddAnswer::Ok => {}
            other => break other,
        }
    };
    assert_eq!(refused, AddAnswer::NoSpace);
    assert_eq!(add(&bookie, 1, last).await, AddAnswer::ReadOnly);
    assert_eq!(recovery_add(&bookie, 1, last).await, AddAnswer::Ok, "from the reserve");
    assert!(matches!(fence(&bookie, 2).await, FenceAnswer::Fenced { .. }));
    bookie.kill();
    for _ in 0..8 {
        let bookie = world.started().await;
        for id in 0..=last {
            assert_eq!(read(&bookie, 1, id).await, EntryAnswer::Held(entry(1, id)));
        }
        assert_eq!(add(&bookie, 2, 0).await, AddAnswer::Fenced);
        assert!(matches!(fence(&bookie, 3).await, FenceAnswer::Fenced { .. }));
        assert!(bookie.shared().core().ledgers.limbo().is_none());
        bookie.kill();
        world.disk.crash();
    }
}

#[tokio::test(start_paused = true)]
async fn past_the_threshold_it_is_read_only_and_writable_again_when_space_returned() {
    let world = World::new(2);
    let bookie = world.started().await;
    add(&bookie, 1, 0).await;
    let used = world.used();
    world.disk.set_capacity(used * 100 / 92);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(add(&bookie, 1, 1).await, AddAnswer::ReadOnly);
    assert_eq!(recovery_add(&bookie, 1, 1).await, AddAnswer::Ok);
    world.disk.set_capacity(used * 100 / 98);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(recovery_add(&bookie, 1, 2).await, AddAnswer::NoSpace);
    world.disk.set_capacity(64 << 20);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(add(&bookie, 1, 2).await, AddAnswer::Ok);
}

#[tokio::test(start_paused = true)]
async fn a_checkpoint_without_room_is_dropped_and_written_later() {
    let world = World::new(3);
    let bookie = world.started().await;
    for id in 0..200 {
        add(&bookie, 1, id).await;
    }
    world.disk.set_capacity(world.used() + 100);
    assert!(!bookie.checkpoint().await.expect("no failure"));
    assert!(world.names("part-checkpoint").is_empty());
    world.disk.set_capacity(64 << 20);
    assert!(bookie.checkpoint().await.expect("room"));
    for id in 0..200 {
        assert_eq!(read(&bookie, 1, id).await, EntryAnswer::Held(entry(1, id)));
    }
}

#[tokio::test(start_paused = true)]
async fn plain_adds_that_were_queued_when_the_disk_ran_full_do_not_go_to_the_reserve() {
    let mut world = World::new(4);
    world.config.disk.check_interval = Duration::from_secs(3600);
    let bookie = world.started().await;
    add(&bookie, 1, 0).await;
    world.disk.set_capacity(world.used() + 100);
    let plain = |ids: std::ops::Range<u64>| {
        ids.map(|id| bookie.add(add_request(&bookie, 1, id, false))).collect::<Vec<_>>()
    };
    let before = plain(1..20);
    let fenced = bookie.fence(FenceRequest {
        to: bookie.incarnation(),
        ledger: 2.into(),
        list: None,
        deadline: deadline(),
    });
    let after = plain(20..80);
    assert!(matches!(fenced.await, FenceAnswer::Fenced { .. }), "from the reserve");
    for answer in join_all(before.into_iter().chain(after)).await {
        assert_eq!(answer, AddAnswer::NoSpace);
    }
    assert_eq!(read(&bookie, 1, 79).await, EntryAnswer::Absent);
}

#[tokio::test(start_paused = true)]
async fn what_a_full_disk_refuses_leaves_no_file_behind() {
    let mut world = World::new(5);
    world.config.disk.check_interval = Duration::from_secs(3600);
    let bookie = world.started().await;
    add(&bookie, 1, 0).await;
    world.disk.set_capacity(world.used());
    let mut refused = 0;
    for ledger in 2..400 {
        refused += u64::from(!matches!(fence(&bookie, ledger).await, FenceAnswer::Fenced { .. }));
    }
    assert!(refused > 100, "even the reserve is used up");
    let journals = world.names("journal-");
    assert!(journals.len() <= 4, "{journals:?}");
    world.disk.set_capacity(64 << 20);
    assert!(matches!(fence(&bookie, 2).await, FenceAnswer::Fenced { .. }));
}

#[tokio::test(start_paused = true)]
async fn a_freed_journal_file_refills_the_reserve_first() {
    let mut world = World::new(6);
    world.config.journal_file_bytes = 14 * 4096 + 100; // no file is ever filled to the last byte
    world.config.disk.check_interval = Duration::from_secs(3600);
    let bookie = world.started().await;
    for id in 0..120 {
        add(&bookie, 1, id).await;
    }
    world.put_ledger(1, true).await;
    world.disk.set_capacity(world.used());
    assert!(matches!(fence(&bookie, 2).await, FenceAnswer::Fenced { .. }));
    assert_eq!(world.names("reserve-").len(), 1, "one is in use");
    assert_eq!(bookie.collect_garbage().await.expect("the store answers"), 1);
    world.disk.set_capacity(world.used() + (512 << 10));
    for _ in 0..2 {
        assert!(bookie.checkpoint().await.expect("room"));
    }
    assert_eq!(world.names("reserve-").len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_start_that_finds_no_room_can_be_repeated_until_there_is() {
    let mut world = World::new(7);
    world.started().await.stop().await;
    let small = std::mem::replace(&mut world.config.journal_file_bytes, 4 << 20); // no roll, no checkpoint
    let bookie = world.started().await;
    let payload = Bytes::from(vec![7; 1 << 20]).into(); // more than a reserve file holds
    let large = Entry::seal(1.into(), 0.into(), None, 1 << 20, payload);
    let request = AddRequest { entry: large.clone(), ..add_request(&bookie, 1, 0, false) };
    assert_eq!(bookie.add(request).await, AddAnswer::Ok);
    bookie.kill();
    world.config.journal_file_bytes = small;
    world.disk.set_capacity(world.used());
    for _ in 0..4 {
        let refused = world.start().await;
        assert!(matches!(refused, Err(StartError::NoSpace)), "{refused:?}");
        assert_eq!(world.names("reserve-").len(), 2, "no start eats up the reserve");
    }
    world.disk.set_capacity(64 << 20);
    let bookie = world.started().await;
    assert_eq!(read(&bookie, 1, 0).await, EntryAnswer::Held(large));
    assert!(bookie.shared().core().ledgers.limbo().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_bookie_short_of_room_gives_deleted_ledgers_back_within_seconds() {
    let world = World::new(8);
    let bookie = world.started().await;
    for id in 0..400 {
        assert_eq!(add(&bookie, 1, id).await, AddAnswer::Ok);
    }
    world.disk.set_capacity(world.used() * 100 / 92);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(add(&bookie, 2, 0).await, AddAnswer::ReadOnly);
    world.put_ledger(1, true).await;
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert_eq!(add(&bookie, 2, 0).await, AddAnswer::Ok);
}

#[tokio::test(start_paused = true)]
async fn a_fast_writer_is_stopped_at_the_threshold_and_leaves_room_for_others() {
    let world = World::new(9);
    let bookie = world.started().await;
    let total = world.used() + (1 << 20);
    world.disk.set_capacity(total);
    tokio::time::sleep(Duration::from_secs(2)).await; // measured once, then never again in this test
    let mut id = 0;
    while add(&bookie, 1, id).await == AddAnswer::Ok {
        id += 1;
    }
    assert_eq!(add(&bookie, 1, id).await, AddAnswer::ReadOnly);
    assert!(total - world.used() > total / 20, "{} of {total} are used", world.used());
}
