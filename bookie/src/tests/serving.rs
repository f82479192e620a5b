//! What a healthy bookie answers.

use std::{sync::Arc, time::Duration};

use futures::FutureExt;
use geminga_bookie_client::bookie_rpc::{
    AddAnswer, AddRequest, BookieRpc, EntryAnswer, EntryRange, EntrySet, FenceAnswer, FenceRequest,
    LacAnswer, ListAnswer, Unknown, conformance,
};
use geminga_metadata::{MetadataStore, keys};
use geminga_proto::{
    ids::{EntryId, Incarnation, LedgerId},
    storage::v1 as wire,
};
use geminga_runtime::{disk::RealDisk, io::Io};
use prost::Message;

use super::harness::*;
use crate::journal::queue::Item;

#[tokio::test(start_paused = true)]
async fn it_passes_the_exam_of_the_seam() {
    conformance::exam(async || {
        let bookie = World::new(1).started().await;
        let me = bookie.incarnation();
        (Arc::new(bookie) as Arc<dyn BookieRpc>, me)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn what_was_answered_ok_is_read_back_now_and_after_restarts() {
    let world = World::new(2);
    for round in 0..4 {
        let bookie = world.started().await;
        for id in round * 30..(round + 1) * 30 {
            assert_eq!(add(&bookie, 1 + id % 3, id / 3).await, AddAnswer::Ok);
        }
        for id in 0..(round + 1) * 30 {
            let (ledger, id) = (1 + id % 3, id / 3);
            assert_eq!(read(&bookie, ledger, id).await, EntryAnswer::Held(entry(ledger, id)));
        }
        let lac = bookie.read_lac(bookie.incarnation(), LedgerId(1), deadline()).await;
        assert_eq!(lac, LacAnswer::Known(Some(EntryId((round + 1) * 10 - 2))));
        match round {
            0 => bookie.kill(),
            1 => bookie.stop().await,
            2 => {
                assert!(bookie.checkpoint().await.expect("room"));
                bookie.kill();
            }
            _ => {}
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_entry_never_added_is_an_explicit_no() {
    let bookie = World::new(3).started().await;
    add(&bookie, 1, 0).await;
    assert_eq!(read(&bookie, 1, 1).await, EntryAnswer::Absent);
    assert_eq!(read(&bookie, 9, 0).await, EntryAnswer::Absent);
}

#[tokio::test(start_paused = true)]
async fn a_fence_holds_across_kill_and_stop_also_for_an_unknown_ledger() {
    let world = World::new(4);
    let bookie = world.started().await;
    add(&bookie, 1, 0).await;
    assert_eq!(fence(&bookie, 1).await, FenceAnswer::Fenced { lac: None, held: None });
    assert_eq!(read_with(&bookie, 2, 0, 0, true).await, [EntryAnswer::Absent]);
    for stop in [false, true, false] {
        let bookie = if stop {
            let bookie = world.started().await;
            bookie.stop().await;
            world.started().await
        } else {
            bookie.kill();
            world.started().await
        };
        for ledger in [1, 2] {
            assert_eq!(add(&bookie, ledger, 1).await, AddAnswer::Fenced);
            assert_eq!(add(&bookie, 1, 0).await, AddAnswer::Fenced, "also of an entry held");
        }
        assert_eq!(recovery_add(&bookie, 1, 5).await, AddAnswer::Ok);
        bookie.kill();
    }
}

#[tokio::test(start_paused = true)]
async fn a_fence_sees_every_add_accepted_before_it() {
    let bookie = World::new(5).started().await;
    let adds: Vec<_> = (0..50).map(|id| bookie.add(add_request(&bookie, 1, id, false))).collect();
    let range = EntryRange { first: EntryId(0), last: EntryId(u64::MAX) };
    let request = FenceRequest {
        to: bookie.incarnation(),
        ledger: LedgerId(1),
        list: Some(range),
        deadline: deadline(),
    };
    let fenced = bookie.fence(request);
    let late = bookie.add(add_request(&bookie, 1, 50, false));
    let held: EntrySet = (0..50).map(EntryId).collect();
    assert_eq!(fenced.await, FenceAnswer::Fenced { lac: Some(EntryId(48)), held: Some(held) });
    assert_eq!(late.await, AddAnswer::Fenced);
    for answer in futures::future::join_all(adds).await {
        assert_eq!(answer, AddAnswer::Ok);
    }
}

#[tokio::test(start_paused = true)]
async fn many_adds_share_a_group_and_an_idle_journal_gets_one_empty_group() {
    let world = World::new(6);
    let bookie = world.started().await;
    tokio::time::sleep(Duration::from_millis(150)).await;
    let before = bookie.shared().core().last.number;
    let adds: Vec<_> = (0..5).map(|id| bookie.add(add_request(&bookie, 1, id, false))).collect();
    futures::future::join_all(adds).await;
    assert_eq!(bookie.shared().core().last.number, before + 1);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(bookie.shared().core().last.number, before + 2, "one empty group, and no more");
}

#[tokio::test(start_paused = true)]
async fn an_add_past_its_deadline_is_not_written() {
    let bookie = World::new(7).started().await;
    let request =
        AddRequest { deadline: tokio::time::Instant::now(), ..add_request(&bookie, 1, 0, false) };
    assert_eq!(bookie.add(request).await, AddAnswer::Unknown(Unknown::Timeout));
    let queued = bookie.add(AddRequest {
        deadline: tokio::time::Instant::now() + Duration::from_millis(5),
        ..add_request(&bookie, 1, 1, false)
    });
    tokio::time::advance(Duration::from_millis(6)).await; // the journal's task has not run yet
    assert_eq!(queued.await, AddAnswer::Unknown(Unknown::Timeout));
    assert_eq!(
        read_with(&bookie, 1, 0, 1, false).await,
        [EntryAnswer::Absent, EntryAnswer::Absent]
    );
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_answers_busy_and_not_late() {
    let mut world = World::new(8);
    world.config.queue_bytes_max = 10_000;
    let bookie = world.started().await;
    let adds: Vec<_> = (0..40).map(|id| bookie.add(add_request(&bookie, 1, id, false))).collect();
    let answers = futures::future::join_all(adds).await;
    assert!(answers.contains(&AddAnswer::Unknown(Unknown::Busy)));
    for (id, answer) in answers.iter().enumerate() {
        let held = read(&bookie, 1, id as u64).await;
        let expected = if *answer == AddAnswer::Ok {
            EntryAnswer::Held(entry(1, id as u64))
        } else {
            EntryAnswer::Absent
        };
        assert_eq!(held, expected);
    }
}

#[tokio::test(start_paused = true)]
async fn requests_for_another_incarnation_and_to_a_stopped_bookie_are_unknown() {
    let bookie = World::new(9).started().await;
    let request = AddRequest { to: Incarnation(77), ..add_request(&bookie, 1, 0, false) };
    assert_eq!(bookie.add(request).await, AddAnswer::Unknown(Unknown::WrongIncarnation));
    let pending = bookie.add(add_request(&bookie, 1, 0, false));
    bookie.kill();
    assert_eq!(pending.await, AddAnswer::Unknown(Unknown::Disconnected));
    assert_eq!(add(&bookie, 1, 0).await, AddAnswer::Unknown(Unknown::Disconnected));
    assert_eq!(read(&bookie, 1, 0).await, EntryAnswer::Unknown(Unknown::Disconnected));
}

#[tokio::test(start_paused = true)]
async fn old_entries_are_found_through_index_files_and_repeated_adds_stay_idempotent() {
    let world = World::new(10);
    let bookie = world.started().await;
    for id in 0..60 {
        assert_eq!(add(&bookie, 1, id).await, AddAnswer::Ok);
        if id % 10 == 9 {
            bookie.checkpoint().await.expect("room");
        }
    }
    let rows = bookie.shared().core().ledgers.memory_rows();
    assert_eq!(rows, 0, "everything is in index files");
    for id in 0..60 {
        assert_eq!(add(&bookie, 1, id).await, AddAnswer::Ok, "repeated");
        assert_eq!(read(&bookie, 1, id).await, EntryAnswer::Held(entry(1, id)));
    }
    assert_eq!(bookie.shared().core().ledgers.memory_rows(), 0, "nothing was written twice");
    let range = EntryRange { first: EntryId(5), last: EntryId(1000) };
    let list = bookie.list(bookie.incarnation(), LedgerId(1), range, deadline()).await;
    assert_eq!(list, ListAnswer::Held((5..60).map(EntryId).collect()));
    let other = geminga_bookie_client::entry::Entry::seal(
        LedgerId(1),
        EntryId(7),
        None,
        0,
        bytes::Bytes::new().into(),
    );
    let request = AddRequest { entry: other, ..add_request(&bookie, 1, 7, false) };
    assert!(matches!(bookie.add(request).await, AddAnswer::Unknown(Unknown::Refused(_))));
    assert_eq!(world.metrics.digest_conflicts.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn it_registers_under_a_lease_and_again_after_losing_it() {
    let world = World::new(11);
    let bookie = world.started().await;
    let read = async || {
        let (_, found) = world.store.get(&keys::available("b1")).await.expect("the store answers");
        found
            .map(|found| (found.lease, wire::Available::decode(&found.value[..]).expect("decodes")))
    };
    let (lease, available) = read().await.expect("registered before start returns");
    assert_eq!(available.incarnation, bookie.incarnation().0);
    assert!(available.writable && !available.draining && available.limbo.is_none());
    assert!(available.disk_total_bytes > 0);
    world.store.expire_lease(lease.expect("under a lease"));
    tokio::time::sleep(Duration::from_secs(10)).await;
    let (again, _) = read().await.expect("registered again");
    assert_ne!(again, lease);
    bookie.stop().await;
    assert!(read().await.is_none(), "a clean stop deregisters at once");
}

#[tokio::test]
async fn it_serves_from_a_real_directory_and_a_second_process_is_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut world = World::new(12);
    let disk = || Some(Arc::new(RealDisk::open(directory.path()).expect("a directory")) as _);
    for round in 0..3 {
        world.seen_disk = disk();
        let bookie = crate::Bookie::start(crate::BookieParts {
            disk: world.seen_disk.clone().expect("set"),
            journal_io: Io::thread("journal"),
            read_io: Io::thread("read"),
            store: Arc::new(world.store.clone()),
            clock: Arc::new(geminga_runtime::clock::SystemClock),
            random: world.random.clone(),
            config: world.config.clone(),
            metrics: world.metrics.clone(),
            crash_points: Default::default(),
        })
        .await
        .expect("starts");
        world.seen_disk = disk();
        assert!(matches!(world.start().await, Err(crate::StartError::Locked)));
        let adds: Vec<_> =
            (0..40).map(|id| bookie.add(add_request(&bookie, round, id, false))).collect();
        assert!(
            futures::future::join_all(adds).await.iter().all(|answer| *answer == AddAnswer::Ok)
        );
        for ledger in 0..=round {
            let held: Vec<_> = (0..40).map(|id| EntryAnswer::Held(entry(ledger, id))).collect();
            assert_eq!(read_with(&bookie, ledger, 0, 39, false).await, held);
        }
        if round == 0 { bookie.kill() } else { bookie.stop().await }
    }
}

#[tokio::test(start_paused = true)]
async fn a_killed_bookie_has_not_failed_whatever_was_under_way() {
    let mut world = World::new(13);
    world.read_io = Io::delayed(world.random.fork(), Duration::from_millis(50));
    let bookie = world.started().await;
    add(&bookie, 1, 0).await;
    let mut checkpoint = Box::pin(bookie.checkpoint());
    assert!(futures::poll!(checkpoint.as_mut()).is_pending());
    bookie.kill();
    assert!(checkpoint.await.is_err());
    assert_eq!(bookie.failed().now_or_never(), None);
}

#[tokio::test(start_paused = true)]
async fn stopping_a_bookie_that_has_ended_waits_for_nothing() {
    let bookie = World::new(14).started().await;
    bookie.kill();
    let before = tokio::time::Instant::now();
    bookie.stop().await;
    assert_eq!(tokio::time::Instant::now(), before);
}

#[tokio::test(start_paused = true)]
async fn an_add_behind_a_tombstone_in_one_group_is_not_confirmed() {
    let bookie = World::new(15).started().await;
    let (answer, synced) = tokio::sync::oneshot::channel();
    {
        let mut core = bookie.shared().core();
        bookie.shared().push(&mut core, Item::Tombstone { ledger: LedgerId(1), answer });
    }
    let late = bookie.add(add_request(&bookie, 1, 0, false));
    assert_eq!(late.await, AddAnswer::Unknown(Unknown::Dropped));
    assert_eq!(synced.await, Ok(Ok(())));
}

#[tokio::test(start_paused = true)]
async fn a_read_that_would_wait_behind_a_full_queue_is_busy() {
    let mut world = World::new(16);
    world.config.queue_requests_max = 2;
    let bookie = world.started().await;
    let adds: Vec<_> = (0..2).map(|id| bookie.add(add_request(&bookie, 1, id, false))).collect();
    assert_eq!(read(&bookie, 1, 0).await, EntryAnswer::Unknown(Unknown::Busy));
    assert_eq!(futures::future::join_all(adds).await, [AddAnswer::Ok, AddAnswer::Ok]);
    assert_eq!(read(&bookie, 1, 0).await, EntryAnswer::Held(entry(1, 0)));
}

#[tokio::test(start_paused = true)]
async fn an_answer_to_read_is_bounded_however_much_was_asked_for() {
    let bookie = World::new(17).started().await;
    for id in 0..4u64 {
        let payload = bytes::Bytes::from(vec![id as u8; 4 << 20]).into();
        let large =
            geminga_bookie_client::entry::Entry::seal(LedgerId(1), EntryId(id), None, id, payload);
        let request = AddRequest { entry: large, ..add_request(&bookie, 1, id, false) };
        assert_eq!(bookie.add(request).await, AddAnswer::Ok);
    }
    let range = EntryRange { first: EntryId(0), last: EntryId(3) };
    let request = geminga_bookie_client::bookie_rpc::ReadRequest {
        to: bookie.incarnation(),
        ledger: LedgerId(1),
        range,
        fence: false,
        bytes_max: usize::MAX,
        deadline: deadline(),
    };
    let answer = bookie.read(request).await;
    assert!(answer.entries.iter().all(|entry| matches!(entry, EntryAnswer::Held(_))));
    assert_eq!(answer.entries.len(), 2);
}
