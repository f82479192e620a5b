//! What goes on while the metadata store does not answer (O3).

use std::time::Duration;

use geminga_metadata::{Standing, StandingSetter};

use super::harness::*;
use crate::{ProducerIdentity, PublishError, SettleError, Settlement, Start, Status};

async fn world() -> (World, StandingSetter) {
    let mut world = World::new().await;
    let (setter, standing) = Standing::new();
    world.standing = standing;
    (world, setter)
}

#[tokio::test(start_paused = true)]
async fn open_ledgers_go_on_are_probed_and_stretch_to_four_times_their_size() {
    let (world, setter) = world().await;
    let node = world.node_with(|config| config.roll_bytes = 300);
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    let mut producer = Producer::named(&log, "p", 1).await;
    producer.store(&log, 1).await;
    setter.set(false);
    let before = world.list().await;
    pass(600.0).await; // no idle close, a probe a second
    assert_eq!(*log.status().borrow(), Status::Serving);
    let mut stored = 1;
    let refused = loop {
        match producer.send(&log, 1).await {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
        log.settle(SUB, Settlement::UpTo(offset(stored - 1))).await.expect("the log is open");
    };
    assert_eq!(refused, PublishError::MetadataUnavailable);
    assert_eq!(world.list().await, before, "nothing was changed");
    setter.set(true);
    producer.last -= 1;
    producer.store(&log, 9).await;
    assert!(world.list().await.data.len() > 1, "it rolls again");
    let all = sequences(&log).await;
    assert!(all.len() as u64 > stored, "probes consume no offset");
    node.kill();
    let log = world.node().load().await;
    assert_eq!(sequences(&log).await, all, "a takeover reads past the probes");
    world.check_metadata().await;
}

#[tokio::test(start_paused = true)]
async fn what_needs_a_ledger_that_is_not_open_is_refused_and_without_any_the_segment_ends() {
    let (world, setter) = world().await;
    let node = world.node();
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    let mut producer = Producer::open(&log, ProducerIdentity::Session, 1).await;
    setter.set(false);
    let refused = producer.send(&log, 1).await;
    assert_eq!(refused, Err(PublishError::MetadataUnavailable), "only the cursor log is open");
    log.create_cursor(OTHER_SUB, Start::Earliest).await.expect("settling goes on");
    pass(60.0).await;
    assert_eq!(*log.status().borrow(), Status::Serving);
    setter.set(true);
    producer.last -= 1;
    producer.store(&log, 1).await;
    node.kill();

    let log = world.node().load().await;
    setter.set(false);
    until_fenced(&log).await;
    let made = log.create_cursor(SUB, Start::Earliest).await;
    assert_eq!(made, Err(SettleError::Fenced));
}

#[tokio::test(start_paused = true)]
async fn a_probe_tells_an_owner_that_it_was_fenced_and_silence_ends_it_after_a_second() {
    let (world, setter) = world().await;
    let log = world.node().load().await;
    Producer::named(&log, "p", 1).await.store(&log, 3).await;
    setter.set(false);
    pass(5.0).await;
    assert_eq!(*log.status().borrow(), Status::Serving);
    // Somebody else, whose store answers, takes the segment.
    let mut other = World { standing: Standing::always(), ..world };
    let next = other.node().load().await;
    tokio::time::timeout(Duration::from_secs(2), until_fenced(&log))
        .await
        .expect("by the next probe");

    let (setter, standing) = Standing::new();
    other.standing = standing;
    drop(next);
    let log = other.node().load().await;
    Producer::named(&log, "q", 1).await.store(&log, 1).await;
    setter.set(false);
    for bookie in [1, 2, 3] {
        other.kill(bookie);
    }
    tokio::time::timeout(Duration::from_secs(4), until_fenced(&log))
        .await
        .expect("adds are overdue");
}
