//! Epochs of named producers, access modes, and conditional appends (DD4, DD5).

use geminga_bookie_client::bookie_rpc::memory::AddMode;
use geminga_proto::names::ProducerName;
use tokio::time::{Duration, timeout};

use super::harness::*;
use crate::{
    Access, ManagedLedger, ProducerError, ProducerIdentity, ProducerOpen, ProducerOpened,
    PublishError,
};

async fn open(
    log: &ManagedLedger,
    name: &str,
    stream_number: u64,
    access: Access,
    held_epoch: Option<u64>,
) -> Result<ProducerOpened, ProducerError> {
    let identity = ProducerIdentity::Named(ProducerName::parse(name).expect("a valid name"));
    log.open_producer(ProducerOpen { identity, stream_number, access, held_epoch }).await
}

fn producer(opened: ProducerOpened, stream: u64) -> Producer {
    Producer { id: opened.id, token: opened.token, stream, last: opened.persisted }
}

#[tokio::test(start_paused = true)]
async fn an_epoch_is_durable_behind_what_was_on_its_way_before_its_stream_opens() {
    // DD4
    let world = World::new().await;
    let node = world.node();
    let log = node.load().await;
    let first = open(&log, "p", 1, Access::Shared, None).await.expect("opens");
    assert_eq!((first.epoch, first.persisted), (1, 0));
    let mut first = producer(first, 1);
    first.store(&log, 1).await;
    for bookie in world.bookies.values() {
        bookie.set_mode(AddMode::Busy);
    }
    let pending = first.send(&log, 3);
    let mut second = Box::pin(open(&log, "p", 2, Access::Shared, None));
    assert!(timeout(Duration::from_secs(5), &mut second).await.is_err(), "nothing is durable");
    for bookie in world.bookies.values() {
        bookie.set_mode(AddMode::Writable);
    }
    let second = second.await.expect("opens");
    assert_eq!((second.epoch, second.persisted), (2, 4));
    pending.await.expect("stored before the grant");
    let mut second = producer(second, 2);
    second.store(&log, 1).await;
    let epochs = |batches: Vec<crate::StoredBatch>| -> Vec<u64> {
        batches.iter().map(|one| one.header.producer.as_ref().expect("named").epoch).collect()
    };
    let all = log.read(offset(0), 1 << 20, 100).await.expect("readable");
    assert_eq!(epochs(all), [1, 1, 2]);
    assert_eq!(*log.end().borrow(), offset(5), "grants consume no offset");
    // The next owner knows epoch and stream by the log alone.
    node.kill();
    let log = world.node().load().await;
    let stale = open(&log, "p", 1, Access::Shared, None).await;
    assert_eq!(stale, Err(ProducerError::StaleStream { current: 2 }));
    let stale = open(&log, "p", 3, Access::Shared, Some(1)).await;
    assert_eq!(stale, Err(ProducerError::StaleEpoch { current: 2 }));
    let third = open(&log, "p", 3, Access::Shared, Some(2)).await.expect("comes back");
    assert_eq!((third.epoch, third.persisted), (3, 5));
    assert_eq!(sequences(&log).await, [1, 4, 5]);
}

#[tokio::test(start_paused = true)]
async fn epochs_survive_in_the_deduplication_snapshot_and_in_a_resting_segment() {
    // DD2
    let world = World::new().await;
    let node = world.node();
    let log = node.load().await;
    for stream in 1..=3 {
        open(&log, "p", stream, Access::Shared, None).await.expect("opens");
    }
    log.close().await;
    let list = world.list().await;
    assert!(list.cursor_log.is_empty(), "it rests");
    let log = world.node().load().await;
    let next = open(&log, "p", 4, Access::Shared, None).await.expect("opens");
    assert_eq!(next.epoch, 4);
}

#[tokio::test(start_paused = true)]
async fn an_exclusive_producer_is_alone_while_its_stream_is_open() {
    let world = World::new().await;
    let log = world.node().load().await;
    let mut a = producer(open(&log, "a", 1, Access::Shared, None).await.expect("opens"), 1);
    a.store(&log, 1).await;
    let refused = open(&log, "b", 1, Access::Exclusive, None).await;
    assert_eq!(refused, Err(ProducerError::OthersConnected));
    log.producer_gone(&a.id, 1);
    let mut b = producer(open(&log, "b", 1, Access::Exclusive, None).await.expect("opens"), 1);
    let held = Err(ProducerError::Held { holder: "b".to_owned() });
    assert_eq!(open(&log, "a", 2, Access::Shared, None).await, held);
    assert_eq!(a.send(&log, 1).await, Err(PublishError::ProducerFenced));
    let session = ProducerOpen::shared(ProducerIdentity::Session, 0);
    assert_eq!(log.open_producer(session.clone()).await, held);
    b.store(&log, 2).await;
    log.producer_gone(&b.id, 1);
    assert!(log.open_producer(session.clone()).await.is_ok());
    let fencing = ProducerOpen { access: Access::ExclusiveWithFencing, ..session };
    assert_eq!(log.open_producer(fencing).await, Err(ProducerError::NotNamed));
}

#[tokio::test(start_paused = true)]
async fn a_fenced_producer_stays_out_also_of_the_next_owner() {
    let world = World::new().await;
    let node = world.node();
    let log = node.load().await;
    let mut a = producer(open(&log, "a", 1, Access::Shared, None).await.expect("opens"), 1);
    let mut session = Producer::open(&log, ProducerIdentity::Session, 1).await;
    a.store(&log, 1).await;
    session.store(&log, 1).await;
    let b = open(&log, "b", 1, Access::ExclusiveWithFencing, None).await.expect("opens");
    let mut b = producer(b, 1);
    assert_eq!(a.send(&log, 1).await, Err(PublishError::ProducerFenced));
    assert_eq!(session.send(&log, 1).await, Err(PublishError::ProducerFenced));
    b.store(&log, 1).await;
    node.kill();
    // Nobody holds it here, and yet they are out.
    let log = world.node().load().await;
    let stale = open(&log, "a", 2, Access::Shared, Some(1)).await;
    assert_eq!(stale, Err(ProducerError::StaleEpoch { current: 1 }));
    let resume = ProducerIdentity::Resume(session.token.clone());
    let stale = log.open_producer(ProducerOpen::shared(resume, 2)).await;
    assert_eq!(stale, Err(ProducerError::StaleEpoch { current: 0 }));
    assert_eq!(a.send(&log, 1).await, Err(PublishError::ProducerFenced));
    let back = open(&log, "b", 2, Access::ExclusiveWithFencing, Some(1)).await.expect("it is b's");
    assert_eq!((back.epoch, back.persisted), (2, 1));
    let other = open(&log, "a", 2, Access::Shared, None).await;
    assert_eq!(other, Err(ProducerError::Held { holder: "b".to_owned() }));
    log.producer_gone(&back.id, 2);
    let anew = open(&log, "a", 2, Access::Shared, None).await.expect("it begins anew");
    assert_eq!((anew.epoch, anew.persisted), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn a_grant_that_cannot_be_written_is_refused_and_what_is_tried_again_gets_a_later_epoch() {
    let world = World::new().await;
    let log = world.node().load().await;
    for bookie in 1..=3 {
        world.register(bookie, false).await;
    }
    let refused = open(&log, "p", 1, Access::Exclusive, None).await;
    assert!(matches!(refused, Err(ProducerError::NotEnoughBookies(_))), "{refused:?}");
    for bookie in 1..=3 {
        world.register(bookie, true).await;
    }
    let other = open(&log, "q", 1, Access::Exclusive, None).await.expect("nobody holds it");
    log.producer_gone(&other.id, 1);
    let opened = open(&log, "p", 2, Access::Shared, None).await.expect("opens");
    assert_eq!(opened.epoch, 2);
}

#[tokio::test(start_paused = true)]
async fn a_batch_with_an_expected_offset_is_stored_there_or_not_at_all() {
    let world = World::new().await;
    let node = world.node();
    let log = node.load().await;
    let mut a = Producer::named(&log, "a", 1).await;
    let mut b = Producer::named(&log, "b", 1).await;
    let expecting = |batch: crate::PublishBatch, at: u64| crate::PublishBatch {
        expected_offset: Some(offset(at)),
        ..batch
    };
    let stored = log.publish(expecting(a.batch(0, 1, 3), 0)).await.expect("the next offset");
    a.last = 3;
    // Two at once on the same offset: one gets it, whatever is on its way.
    let (first, second) =
        (log.publish(expecting(b.batch(0, 1, 1), 3)), log.publish(expecting(a.batch(3, 4, 4), 3)));
    b.last = 1;
    // And what is chained behind a refused one is refused (DD5).
    let behind = log.publish(a.batch(4, 5, 5));
    assert_eq!(first.await.expect("stored").base_offset, Some(offset(3)));
    assert_eq!(second.await, Err(PublishError::UnexpectedOffset { next: offset(4) }));
    assert_eq!(behind.await, Err(PublishError::OutOfSequence { pushed: 3 }));
    // A repeat of what is stored is a duplicate, whatever it expects.
    let again = log.publish(expecting(a.batch(0, 1, 3), 0)).await.expect("stored before");
    assert!(again.duplicate && again.base_offset == stored.base_offset);
    node.kill();
    let log = world.node().load().await;
    let mut a = Producer::named(&log, "a", 2).await;
    assert_eq!(a.last, 3);
    let late = log.publish(expecting(a.batch(3, 4, 4), 3)).await;
    assert_eq!(late, Err(PublishError::UnexpectedOffset { next: offset(4) }));
    a.send(&log, 1).await.expect("without a condition");
    assert_eq!(*log.end().borrow(), offset(5));
}
