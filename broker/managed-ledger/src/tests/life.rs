//! The end of a segment, and of its owner.

use std::time::Duration;

use geminga_bookie_client::LedgerState;
use geminga_metadata::{Fault, keys};
use geminga_proto::{ids::LedgerId, storage::v1::DedupSnapshot};

use super::harness::*;
use crate::{
    DeleteError, LoadError, ProducerIdentity, PublishError, Settlement, Start, Status,
    cursor_log::{self, LogState},
    list::{Counts, List, ListedState, Log},
};

#[tokio::test(start_paused = true)]
async fn a_closed_segment_has_nothing_open_and_is_loaded_as_it_was() {
    let world = World::new().await;
    let node = world.node();
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    let mut producer = Producer::named(&log, "p", 1).await;
    let pending: Vec<_> = (0..10).map(|_| producer.send(&log, 2)).collect();
    let settle = async {
        for outcome in pending {
            outcome.await.expect("stored");
        }
        log.settle(SUB, Settlement::UpTo(offset(4))).await
    };
    assert_eq!(settle.await, Ok(offset(5)));
    let pending = producer.send(&log, 1);
    log.close().await;
    pending.await.expect("what was asked before the close is stored");
    log.close().await;
    assert_eq!(*log.status().borrow(), Status::Closed);
    let list = world.list().await;
    assert!(list.ledgers().all(|(_, listed)| listed.state == ListedState::Closed));
    assert!(!list.inline_snapshot.is_empty() && list.cursor_log.is_empty());
    world.check_metadata().await;

    let log = node.load().await;
    assert_eq!(read_all(&log).await.len(), 11);
    assert_eq!(log.cursor(SUB).expect("there").mark_delete_next, offset(5));
    assert_eq!(world.list().await.data, list.data, "a load changes nothing but the epoch");
    assert_eq!(Producer::named(&log, "p", 2).await.last, 21);
}

#[tokio::test(start_paused = true)]
async fn a_segment_that_nobody_holds_closes_by_itself() {
    let world = World::new().await;
    let node = world.node();
    let log = node.load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    producer.store(&log, 3).await;
    assert_eq!(node.metrics.segments.get(), 1);
    drop(log);
    pass(1.0).await;
    assert_eq!(node.metrics.segments.get(), 0);
    assert!(world.list().await.data.iter().all(|listed| listed.state == ListedState::Closed));
}

#[tokio::test(start_paused = true)]
async fn a_deleted_segment_is_gone_with_its_ledgers_and_deleting_it_again_is_fine() {
    let world = World::new().await;
    let node = world.node_with(|config| config.roll_bytes = 300);
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    let mut producer = Producer::named(&log, "p", 1).await;
    for _ in 0..60 {
        producer.store(&log, 9).await;
        pass(0.1).await;
    }
    assert!(world.list().await.data.len() > 50, "more than one transaction's worth");
    let list = keys::segment_list(SEGMENT);
    for fault in [Fault::UnknownDone, Fault::UnknownLost, Fault::UnknownDone, Fault::UnknownDone] {
        world.store.inject_below(list.clone(), fault);
    }
    node.ledgers.delete(SEGMENT).await.expect("deleted");
    assert!(world.find_list().await.is_none());
    for ledger in world.ledgers().await {
        assert!(matches!(ledger.state, LedgerState::Deleted { .. }), "{ledger:?}");
    }
    assert_eq!(producer.send(&log, 1).await, Err(PublishError::Fenced));
    node.ledgers.delete(SEGMENT).await.expect("nothing is left to delete");
    let refused = node.ledgers.load(SEGMENT, world.claim.clone()).await;
    assert!(matches!(refused, Err(LoadError::NotFound)));
}

#[tokio::test(start_paused = true)]
async fn a_deletion_without_bookies_waits_and_goes_on_later() {
    let world = World::new().await;
    let node = world.node_with(|config| config.load_patience = Duration::from_secs(2));
    let log = node.load().await;
    Producer::named(&log, "p", 1).await.store(&log, 3).await;
    for bookie in 1..=3 {
        world.kill(bookie);
    }
    let refused = node.ledgers.delete(SEGMENT).await;
    assert!(matches!(refused, Err(DeleteError::Unavailable(_))), "{refused:?}");
    assert!(world.find_list().await.is_some());
    for bookie in 1..=3 {
        world.start(bookie);
    }
    node.ledgers.delete(SEGMENT).await.expect("deleted");
    assert!(world.find_list().await.is_none());
}

/// A list with room for so many more ledgers; each one listed has one message, long gone, which no load replays.
fn nearly_full(room: usize) -> List {
    let mut list = List::empty();
    let counts = Counts {
        entries: 1,
        records: 1,
        bytes: 1 << 28,
        first_publish_ms: 1 << 41,
        last_publish_ms: 1 << 41,
    };
    for id in 1_000_000.. {
        if list.open(Log::Data, LedgerId(id)).is_err() {
            break;
        }
        list.close(LedgerId(id), counts);
    }
    list.data.truncate(list.data.len() - room);
    let last = list.data.last().expect("there are many");
    let dedup = DedupSnapshot {
        next_offset: list.closed_end().0,
        ledger: last.id.0,
        entries: 1,
        ..DedupSnapshot::default()
    };
    let snapshot = cursor_log::snapshot(1, &LogState { dedup, ..LogState::default() });
    list.inline_snapshot = snapshot[0].clone();
    list
}

#[tokio::test(start_paused = true)]
async fn a_list_without_room_refuses_new_ledgers_and_is_loaded_all_the_same() {
    let world = World::new().await;
    let list = nearly_full(0);
    world.put(keys::segment_list(SEGMENT), list.encode().expect("fits")).await;
    let log = world.node().load().await;
    let mut producer = Producer::open(&log, ProducerIdentity::Session, 1).await;
    let refused = producer.send(&log, 1).await;
    let Err(PublishError::NotEnoughBookies(why)) = refused else { panic!("{refused:?}") };
    assert!(why.contains("list value"), "{why}");
    assert_eq!(*log.status().borrow(), Status::Serving);
}

#[tokio::test(start_paused = true)]
async fn a_list_that_fills_up_while_a_ledger_is_open_lets_it_close() {
    let world = World::new().await;
    let list = nearly_full(3);
    world.put(keys::segment_list(SEGMENT), list.encode().expect("fits")).await;
    let node = world.node_with(|config| config.roll_bytes = 200);
    let log = node.load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    let mut stored = 0;
    let refused = loop {
        match producer.send(&log, 1).await {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
        assert!(stored < 1_000);
    };
    assert!(matches!(refused, PublishError::NotEnoughBookies(_)), "{refused:?}");
    assert!(stored > 3);
    assert_eq!(*log.status().borrow(), Status::Serving);
    node.kill();
    let log = world.node().load().await;
    assert_eq!(*log.end().borrow(), list.closed_end().advance(stored));
}

#[tokio::test(start_paused = true)]
async fn a_stopping_process_fences_its_segments_and_tells_everybody() {
    let world = World::new().await;
    let node = world.node();
    let log = node.load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    producer.store(&log, 1).await;
    for bookie in 1..=3 {
        world.kill(bookie);
    }
    let pending = producer.send(&log, 1);
    pass(0.1).await;
    assert!(node.tasks.shutdown(Duration::from_secs(5)).await);
    assert_eq!(pending.await, Err(PublishError::Fenced), "its outcome is unknown");
    until_fenced(&log).await;
}

#[tokio::test(start_paused = true)]
async fn a_segment_whose_owner_is_aborted_before_it_ever_ran_is_not_called_served() {
    let world = World::new().await;
    let node = world.node();
    let log = node.load().await;
    node.kill();
    let mut status = log.status();
    let ended = status.wait_for(|status| *status != Status::Serving);
    let ended = tokio::time::timeout(Duration::from_secs(10), ended).await;
    let ended = ended.expect("it does not stay Serving").expect("somebody tells").clone();
    assert!(matches!(ended, Status::Fenced(_)), "{ended:?}");
}
