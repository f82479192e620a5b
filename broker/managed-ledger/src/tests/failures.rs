//! Bookies that fail under an open ledger (M2, DD1).

use std::time::Duration;

use geminga_bookie_client::bookie_rpc::memory::AddMode;
use geminga_proto::{ids::EntryId, names::ProducerName};

use super::harness::*;
use crate::{
    ProducerError, ProducerIdentity, ProducerOpen, PublishError, SettleError, Settlement, Start,
    Status, list::ListedState,
};

#[tokio::test(start_paused = true)]
async fn what_a_failed_ledger_did_not_store_goes_to_the_next_in_order_and_once() {
    let world = World::new().await;
    let node = world.node_with(|config| config.create_patience = Duration::from_secs(600));
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    let mut producer = Producer::named(&log, "p", 1).await;
    producer.store(&log, 5).await;
    world.kill(1);
    world.kill(2);
    for bookie in [1, 2] {
        world.register(bookie, false).await;
    }
    // The third bookie holds all of these; nobody acknowledged them.
    let waiting: Vec<_> = (0..7).map(|n| producer.send(&log, n % 2 + 1)).collect();
    let settled = log.settle(SUB, Settlement::UpTo(offset(2)));
    pass(60.0).await;
    let list = world.list().await;
    assert_eq!(list.data.len(), 1);
    assert_eq!(
        (list.data[0].state, list.data[0].counts.entries),
        (ListedState::Closed, 6),
        "a grant and five batches"
    );
    let held = world.bookies[&3].held(list.data[0].id);
    assert!(held.contains_key(&EntryId(6)), "it was sent before");
    for bookie in [1, 2] {
        world.start(bookie);
        world.register(bookie, true).await;
    }
    let mut next = list.closed_end();
    for outcome in waiting {
        let stored = outcome.await.expect("stored in the next ledger");
        assert_eq!(stored.base_offset, Some(next));
        assert!(!stored.duplicate);
        next = next.advance(u64::from(stored.count));
    }
    assert_eq!(settled.await, Ok(offset(3)));
    let all = read_all(&log).await;
    assert_eq!(all.len(), 12);
    assert_eq!(*log.status().borrow(), Status::Serving);
    node.kill();
    let log = world.node().load().await;
    assert_eq!(read_all(&log).await, all);
    assert_eq!(log.cursor(SUB).expect("there").mark_delete_next, offset(3));
    world.check_metadata().await;
}

#[tokio::test(start_paused = true)]
async fn without_bookies_a_batch_is_refused_after_patience_and_its_chain_goes_on_later() {
    let world = World::new().await;
    let log = world.node().load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    let mut producer = Producer::named(&log, "p", 1).await;
    producer.store(&log, 3).await; // up to 6
    for bookie in 1..=3 {
        world.kill(bookie);
        world.register(bookie, false).await;
    }
    let first = producer.send(&log, 1);
    let second = producer.send(&log, 1);
    let settled = log.settle(SUB, Settlement::UpTo(offset(0)));
    assert!(matches!(first.await, Err(PublishError::NotEnoughBookies(_))));
    assert!(matches!(second.await, Err(PublishError::NotEnoughBookies(_))));
    assert!(matches!(settled.await, Err(SettleError::NotEnoughBookies(_))));
    for bookie in 1..=3 {
        world.start(bookie);
        world.register(bookie, true).await;
    }
    // What was pipelined behind the refusal is refused (DD5); the refused one may come again.
    let behind = log.publish(producer.batch(8, 9, 9));
    assert_eq!(behind.await, Err(PublishError::OutOfSequence { pushed: 6 }));
    producer.last = 6;
    let stored = producer.store(&log, 2).await;
    assert_eq!(stored[0].base_offset, Some(offset(6)));
    assert_eq!(sequences(&log).await, [1, 3, 6, 7, 9]);
    assert_eq!(log.settle(SUB, Settlement::UpTo(offset(0))).await, Ok(offset(1)));
}

#[tokio::test(start_paused = true)]
async fn a_settle_is_answered_though_publishers_keep_asking_for_a_ledger() {
    let world = World::new().await;
    let node = world.node_with(|config| config.create_patience = Duration::from_secs(3));
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    let mut producer = Producer::named(&log, "p", 1).await;
    producer.store(&log, 1).await;
    log.close().await;
    let log = node.load().await;
    for bookie in 1..=3 {
        world.register(bookie, false).await;
    }
    let publisher = log.clone();
    world.tasks.spawn("publisher", async move {
        let mut producer = Producer::named(&publisher, "p", 2).await;
        loop {
            let batch = producer.send(&publisher, 1);
            pass(0.1).await;
            drop(batch);
        }
    });
    let settled = log.settle(SUB, Settlement::UpTo(offset(0)));
    let answer = tokio::time::timeout(Duration::from_secs(10), settled).await;
    assert!(matches!(answer, Ok(Err(SettleError::NotEnoughBookies(_)))), "{answer:?}");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_gone_ends_in_a_refusal_not_in_silence() {
    let world = World::new().await;
    let node = world.node();
    let log = node.load().await;
    let mut producer = Producer::open(&log, ProducerIdentity::Session, 1).await;
    // The creation of the first ledger is under way when the store goes: it stays unsettled (MD3).
    let list = geminga_metadata::keys::segment_list(SEGMENT);
    world.store.inject_below(list, geminga_metadata::Fault::Slow(Duration::from_secs(1)));
    let outcome = producer.send(&log, 1);
    pass(0.5).await;
    world.store.set_partitioned(true);
    let answer = tokio::time::timeout(Duration::from_secs(30), outcome).await;
    assert!(matches!(answer, Ok(Err(PublishError::NotEnoughBookies(_)))), "{answer:?}");
    world.store.set_partitioned(false);
    producer.last = 0;
    producer.store(&log, 2).await;
    assert_eq!(sequences(&log).await, [1, 3]);
    world.check_metadata().await;
}

#[tokio::test(start_paused = true)]
async fn a_store_outage_does_not_stop_an_open_ledger() {
    let world = World::new().await;
    let log = world.node().load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    producer.store(&log, 1).await;
    world.store.set_partitioned(true);
    producer.store(&log, 20).await;
    pass(100.0).await;
    producer.store(&log, 20).await;
    world.store.set_partitioned(false);
    assert_eq!(read_all(&log).await.len(), 41);
}

#[tokio::test(start_paused = true)]
async fn what_waits_is_bounded_and_the_rest_is_refused_at_once() {
    let world = World::new().await;
    let log = world.node_with(|config| config.commands_max = 8).load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    let mut producer = Producer::named(&log, "p", 1).await;
    producer.store(&log, 1).await;
    for bookie in world.bookies.values() {
        bookie.set_mode(AddMode::Busy);
    }
    let mut settles = Vec::new();
    for _ in 0..200 {
        settles.push(log.settle(SUB, Settlement::UpTo(offset(0))));
        tokio::task::yield_now().await;
    }
    let mut busy = 0;
    for bookie in world.bookies.values() {
        bookie.set_mode(AddMode::Writable);
    }
    for settle in settles {
        match settle.await {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error, SettleError::Busy);
                busy += 1;
            }
        }
    }
    assert!(busy >= 150, "{busy}");
}

#[tokio::test(start_paused = true)]
async fn a_closed_segment_takes_nothing_more() {
    let world = World::new().await;
    let log = world.node().load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    for bookie in world.bookies.values() {
        bookie.set_mode(AddMode::Busy);
    }
    let pending = producer.send(&log, 1);
    let closing = world.tasks.spawn_returning("close", {
        let log = log.clone();
        async move { log.close().await }
    });
    pass(0.1).await;
    assert_eq!(producer.send(&log, 1).await, Err(PublishError::Closed));
    assert_eq!(log.create_cursor(SUB, Start::Earliest).await, Err(SettleError::Closed));
    let identity = ProducerIdentity::Named(ProducerName::parse("q").expect("valid"));
    let open = ProducerOpen::shared(identity, 1);
    assert_eq!(log.open_producer(open).await, Err(ProducerError::Closed));
    for bookie in world.bookies.values() {
        bookie.set_mode(AddMode::Writable);
    }
    assert!(pending.await.is_ok(), "what was taken up is finished");
    closing.await.expect("runs");
    assert_eq!(*log.status().borrow(), Status::Closed);
}
