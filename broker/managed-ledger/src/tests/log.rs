//! Storing, reading, rolling.

use std::time::Duration;

use geminga_bookie_client::bookie_rpc::faulty::Faults;
use geminga_metadata::{Fault, keys};
use geminga_proto::v1::RecordIndex;

use super::harness::*;
use crate::{PublishError, Settlement, Start, Status, list::ListedState};

#[tokio::test(start_paused = true)]
async fn what_was_stored_and_settled_is_there_after_a_crash() {
    let world = World::new().await;
    let node = world.node();
    let log = node.load().await;
    log.create_cursor(SUB, Start::Latest).await.expect("made");
    let mut producer = Producer::named(&log, "p", 1).await;
    let stored = producer.store(&log, 20).await;
    let settled =
        log.settle(SUB, Settlement::Accept(vec![(offset(0), offset(4)), (offset(9), offset(9))]));
    assert_eq!(settled.await, Ok(offset(5)));
    let before = (read_all(&log).await, log.cursor(SUB), log.epoch());
    node.kill();

    let log = world.node().load().await;
    assert_eq!(read_all(&log).await, before.0);
    assert_eq!(log.cursor(SUB), before.1);
    assert!(log.epoch() > before.2);
    let places: Vec<u64> = stored.iter().map(|stored| stored.base_offset.expect("new").0).collect();
    assert_eq!(before.0.iter().map(|(base, _, _)| *base).collect::<Vec<_>>(), places);
    world.check_metadata().await;
}

#[tokio::test(start_paused = true)]
async fn a_reader_crosses_ledgers_whatever_the_size_of_its_steps() {
    let world = World::new().await;
    let node = world.node_with(|config| config.roll_bytes = 600);
    let log = node.load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    for _ in 0..10 {
        producer.store(&log, 9).await;
        pass(0.5).await;
    }
    let rolled = world.list().await;
    assert!(rolled.data.len() > 3, "{}", rolled.data.len());
    let all = read_all(&log).await;
    assert_eq!(all.len(), 90);
    for (bytes, messages) in [(1, 1), (30, 7), (200, 1_000)] {
        assert_eq!(read_in_steps(&log, bytes, messages).await, all);
    }
    // Somebody else, who has to find every place anew.
    node.kill();
    let log = world.node().load().await;
    assert_eq!(read_in_steps(&log, 30, 7).await, all);
    for (base, count, _) in &all {
        let batches = log.read(offset(base + u64::from(*count) - 1), 1, 1).await.expect("readable");
        assert_eq!(batches[0].base_offset, offset(*base));
    }
}

#[tokio::test(start_paused = true)]
async fn a_ledger_is_rolled_once_however_much_is_on_its_way() {
    let world = World::new().await;
    let late = Faults { delay: 0.6, delay_max: Duration::from_millis(25), ..Faults::default() };
    let log = world.node_over(world.faulty(late), |config| config.roll_bytes = 2_000).load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    for _ in 0..6 {
        producer.store(&log, 60).await;
        pass(1.0).await;
    }
    let list = world.list().await;
    for listed in list.data.iter().filter(|listed| listed.state == ListedState::Closed) {
        assert!(listed.counts.bytes >= 2_000, "{listed:?}");
    }
    assert_eq!(read_all(&log).await.len(), 360);
}

#[tokio::test(start_paused = true)]
async fn a_list_change_without_an_answer_is_settled_not_guessed() {
    for fault in [
        Fault::UnknownDone,
        Fault::UnknownLost,
        Fault::UnknownLate(Duration::from_millis(15)),
        Fault::UnknownLate(Duration::from_secs(2)),
        Fault::Slow(Duration::from_secs(1)),
        Fault::SlowAnswer(Duration::from_secs(1)),
        Fault::Unavailable,
    ] {
        let world = World::new().await;
        let list = keys::segment_list(SEGMENT);
        world.store.inject_below(list.clone(), fault); // TK1
        let node = world.node_with(|config| config.roll_bytes = 600);
        let log = node.load().await;
        world.store.inject_below(list.clone(), fault); // the first ledger
        world.store.inject_below(list.clone(), fault); // the first roll
        let mut producer = Producer::named(&log, "p", 1).await;
        for _ in 0..5 {
            producer.store(&log, 6).await;
        }
        pass(3.0).await;
        assert_eq!(*log.status().borrow(), Status::Serving, "{fault:?}");
        assert!(world.list().await.data.len() > 1, "{fault:?}");
        world.check_metadata().await;
        let all = read_all(&log).await;
        node.kill();
        world.store.inject_below(list.clone(), fault); // TK1
        world.store.inject_below(list, fault); // TK2
        let log = world.node().load().await;
        pass(3.0).await;
        assert_eq!(read_all(&log).await, all, "{fault:?}");
        assert_eq!(*log.status().borrow(), Status::Serving, "{fault:?}");
        world.check_metadata().await;
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_accepted_that_could_not_be_read_back() {
    let world = World::new().await;
    let log = world.node().load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    let mut batch = producer.batch(0, 1, 1);
    batch.index = RecordIndex { key_hash: vec![1; 300_000], ..RecordIndex::default() };
    assert!(matches!(log.publish(batch).await, Err(PublishError::TooLarge { .. })));
    let mut batch = producer.batch(0, 1, 1);
    batch.payload = vec![0; 7 << 20].into();
    assert!(matches!(log.publish(batch).await, Err(PublishError::TooLarge { .. })));
    let mut batch = producer.batch(0, 1, 1);
    batch.count = 0;
    assert!(matches!(log.publish(batch).await, Err(PublishError::Invalid(_))));
    // What was refused took no sequence.
    producer.store(&log, 3).await;
    assert_eq!(sequences(&log).await, [1, 3, 6]);
}

#[tokio::test(start_paused = true)]
async fn damage_in_one_ledger_does_not_hide_what_lies_before_it() {
    let world = World::new().await;
    let lost = world.forgetful();
    let node = world.node_with(|config| config.roll_bytes = 200);
    let log = node.load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    for _ in 0..3 {
        producer.store(&log, 6).await;
        pass(0.5).await;
    }
    let second = world.list().await.data[1].clone();
    lost.lock().push((second.id, geminga_proto::ids::EntryId(0)));
    let before = log.read(offset(0), 1 << 20, 1_000).await.expect("the first ledger is fine");
    let end = before.last().map(|batch| batch.base_offset.advance(u64::from(batch.header.count)));
    assert_eq!(end, Some(second.base_offset));
    assert!(log.read(second.base_offset, 1 << 20, 1_000).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_a_receipt_finds_the_message() {
    let world = World::new().await;
    let log = world.node_with(|config| config.roll_bytes = 4_000).load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    for _ in 0..2_000 {
        let stored = producer.send(&log, 2).await.expect("stored");
        let base = stored.base_offset.expect("new");
        assert!(*log.end().borrow() >= base.advance(2));
        let read = log.read(base.advance(1), 1, 1).await.expect("readable");
        assert_eq!(read[0].base_offset, base);
    }
}
