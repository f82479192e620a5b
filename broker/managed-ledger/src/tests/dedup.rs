//! Each sequence once (DD1..DD5, I13).

use std::time::Duration;

use geminga_bookie_client::bookie_rpc::memory::AddMode;
use geminga_proto::names::ProducerName;
use tokio::time::timeout;

use super::harness::*;
use crate::{
    ManagedLedger, ProducerError, ProducerIdentity, ProducerOpen, PublishError, Start, Stored,
};

async fn open(
    log: &ManagedLedger,
    identity: ProducerIdentity,
    stream_number: u64,
) -> Result<crate::ProducerOpened, ProducerError> {
    log.open_producer(ProducerOpen::shared(identity, stream_number)).await
}

#[tokio::test(start_paused = true)]
async fn a_repeat_of_what_is_stored_is_answered_with_its_place() {
    let world = World::new().await;
    let node = world.node();
    let log = node.load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    let stored = producer.store(&log, 2).await; // 1, 2..=3
    let again = log.publish(producer.batch(1, 2, 3)).await;
    assert_eq!(again, Ok(Stored { duplicate: true, ..stored[1] }));
    node.kill();
    let log = world.node().load().await;
    let producer = Producer::named(&log, "p", 2).await;
    assert_eq!(producer.last, 3);
    assert_eq!(log.publish(producer.batch(1, 2, 3)).await, again);
    assert_eq!(sequences(&log).await, [1, 3]);
}

#[tokio::test(start_paused = true)]
async fn a_repeat_of_what_is_on_its_way_waits_for_the_same_outcome() {
    let world = World::new().await;
    let log = world.node().load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    producer.store(&log, 1).await;
    for bookie in world.bookies.values() {
        bookie.set_mode(AddMode::Busy);
    }
    let first = producer.send(&log, 2); // 2..=3
    let again = log.publish(producer.batch(1, 2, 3));
    let cut = log.publish(producer.batch(1, 2, 4));
    let ahead = log.publish(producer.batch(4, 5, 5));
    assert_eq!(cut.await, Err(PublishError::SequenceConflict));
    assert_eq!(ahead.await, Err(PublishError::OutOfSequence { pushed: 3 }));
    for bookie in world.bookies.values() {
        bookie.set_mode(AddMode::Writable);
    }
    let stored = first.await.expect("stored");
    assert!(!stored.duplicate);
    assert_eq!(again.await, Ok(Stored { duplicate: true, ..stored }));
    assert_eq!(sequences(&log).await, [1, 3]);
}

/// Another process of the same name must not give the sequences on their way to messages of its own: it would be told that
/// they are stored (DD1, DD4).
#[tokio::test(start_paused = true)]
async fn a_stream_opens_only_when_what_an_earlier_one_sent_is_settled() {
    let world = World::new().await;
    let log = world.node().load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    producer.store(&log, 1).await;
    for bookie in world.bookies.values() {
        bookie.set_mode(AddMode::Busy);
    }
    let first = producer.send(&log, 2); // 2..=3
    let mut other = Box::pin(Producer::named(&log, "p", 2));
    assert!(timeout(Duration::from_secs(5), &mut other).await.is_err());
    let late = log.publish(producer.batch(3, 4, 4));
    assert_eq!(late.await, Err(PublishError::StaleStream), "the newer stream is ahead already");
    for bookie in world.bookies.values() {
        bookie.set_mode(AddMode::Writable);
    }
    let other = other.await;
    assert_eq!(other.last, 3);
    assert!(!first.await.expect("stored").duplicate);
    assert_eq!(sequences(&log).await, [1, 3]);
}

#[tokio::test(start_paused = true)]
async fn a_repeat_of_what_failed_is_no_duplicate() {
    // T32
    let world = World::new().await;
    let log = world.node().load().await;
    for bookie in 1..=3 {
        world.register(bookie, false).await;
    }
    // A session: a name would be granted an epoch first, and could not be (DD4).
    let mut producer = Producer::open(&log, ProducerIdentity::Session, 1).await;
    let first = producer.send(&log, 1);
    let again = log.publish(producer.batch(0, 1, 1));
    assert!(matches!(first.await, Err(PublishError::NotEnoughBookies(_))));
    assert!(matches!(again.await, Err(PublishError::NotEnoughBookies(_))));
    for bookie in 1..=3 {
        world.register(bookie, true).await;
    }
    let stored = log.publish(producer.batch(0, 1, 1)).await.expect("stored");
    assert!(!stored.duplicate);
    assert_eq!(sequences(&log).await, [1]);
}

#[tokio::test(start_paused = true)]
async fn another_cut_of_stored_sequences_is_refused() {
    let world = World::new().await;
    let log = world.node().load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    producer.store(&log, 3).await; // 1, 2..=3, 4..=6
    for (prev, lo, hi) in [(3, 4, 8), (0, 1, 7), (5, 6, 7), (9, 9, 9), (6, 0, 0)] {
        let answer = log.publish(producer.batch(prev, lo, hi)).await;
        assert_eq!(answer, Err(PublishError::SequenceConflict), "{prev} {lo} {hi}");
    }
    assert_eq!(sequences(&log).await, [1, 3, 6]);
}

#[tokio::test(start_paused = true)]
async fn what_was_pipelined_behind_a_refusal_is_refused_until_it_is_sent_again() {
    // T41: 1 is refused for its size, 2 and 3 were on their way.
    let world = World::new().await;
    let log = world.node().load().await;
    let producer = Producer::named(&log, "p", 1).await;
    let mut large = producer.batch(0, 1, 1);
    large.payload = vec![0; 7 << 20].into();
    let outcomes = [
        log.publish(large),
        log.publish(producer.batch(1, 2, 2)),
        log.publish(producer.batch(2, 3, 3)),
    ];
    let [first, second, third] = outcomes;
    assert!(matches!(first.await, Err(PublishError::TooLarge { .. })));
    assert_eq!(second.await, Err(PublishError::OutOfSequence { pushed: 0 }));
    assert_eq!(third.await, Err(PublishError::OutOfSequence { pushed: 0 }));
    // It drops 1 and re-chains: a gap in the sequences, none in the chain.
    assert!(log.publish(producer.batch(0, 2, 2)).await.is_ok());
    assert!(log.publish(producer.batch(2, 3, 3)).await.is_ok());
    assert_eq!(sequences(&log).await, [2, 3]);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_was_followed_by_another_is_refused() {
    let world = World::new().await;
    let log = world.node().load().await;
    let mut old = Producer::named(&log, "p", 4).await;
    let mut new = Producer::named(&log, "p", 5).await;
    assert_eq!(old.send(&log, 1).await, Err(PublishError::StaleStream));
    let name = ProducerName::parse("p").expect("valid");
    let refused = open(&log, ProducerIdentity::Named(name), 4).await;
    assert_eq!(refused, Err(ProducerError::StaleStream { current: 5 }));
    new.store(&log, 1).await;
    let stranger = Producer { id: "nobody".into(), ..new };
    assert_eq!(log.publish(stranger.batch(0, 1, 1)).await, Err(PublishError::UnknownProducer));
}

#[tokio::test(start_paused = true)]
async fn a_session_is_resumed_by_its_token_and_a_stranger_is_no_new_producer() {
    let world = World::new().await;
    let node = world.node();
    let log = node.load().await;
    let mut session = Producer::open(&log, ProducerIdentity::Session, 1).await;
    let other = Producer::open(&log, ProducerIdentity::Session, 1).await;
    assert_ne!(session.id, other.id);
    session.store(&log, 3).await;
    node.kill();
    let log = world.node().load().await;
    let resumed = Producer::open(&log, ProducerIdentity::Resume(session.token.clone()), 2).await;
    assert_eq!((&resumed.id, resumed.last), (&session.id, 6));
    for token in ["session:0123", "p", ""] {
        let refused = open(&log, ProducerIdentity::Resume(token.into()), 1).await;
        assert_eq!(refused, Err(ProducerError::UnknownSession));
    }
    assert!(log.publish(resumed.batch(3, 4, 6)).await.expect("stored").duplicate);
}

#[tokio::test(start_paused = true)]
async fn a_session_away_for_long_leaves_and_a_name_stays() {
    let world = World::new().await;
    let node = world.node_with(|config| config.idle_after = Duration::from_secs(100_000));
    let log = node.load().await;
    let mut session = Producer::open(&log, ProducerIdentity::Session, 1).await;
    session.store(&log, 1).await;
    let mut named = Producer::named(&log, "p", 1).await;
    named.store(&log, 1).await;
    let resume = || open(&log, ProducerIdentity::Resume(session.token.clone()), 1);
    pass(2_000.0).await;
    assert!(resume().await.is_ok(), "its stream was open all the time");
    for _both in 0..2 {
        log.producer_gone(&session.id, 1);
    }
    pass(800.0).await;
    assert!(resume().await.is_ok());
    log.producer_gone(&session.id, 1);
    pass(940.0).await;
    let refused = open(&log, ProducerIdentity::Resume(session.token.clone()), 1).await;
    assert_eq!(refused, Err(ProducerError::UnknownSession));
    assert_eq!(Producer::named(&log, "p", 2).await.last, 1);
}

#[tokio::test(start_paused = true)]
async fn a_full_window_refuses_names_but_lets_old_sessions_go() {
    let world = World::new().await;
    let log = world.node_with(|config| config.producers_max = 2).load().await;
    Producer::named(&log, "p", 1).await;
    let first = Producer::open(&log, ProducerIdentity::Session, 1).await;
    let refused = open(&log, ProducerIdentity::Session, 1).await;
    assert_eq!(refused, Err(ProducerError::TooManyProducers { limit: 2 }), "both are connected");
    log.producer_gone(&first.id, 1);
    Producer::named(&log, "q", 1).await;
    let refused = open(&log, ProducerIdentity::Resume(first.token), 1).await;
    assert_eq!(refused, Err(ProducerError::UnknownSession));
    let refused = open(&log, ProducerIdentity::Session, 1).await;
    assert_eq!(refused, Err(ProducerError::TooManyProducers { limit: 2 }));
}

#[tokio::test(start_paused = true)]
async fn the_window_is_a_snapshot_and_a_replay_of_what_follows() {
    let world = World::new().await;
    let node = world.node_with(|config| config.dedup_snapshot_bytes = 2_000);
    let log = node.load().await;
    let mut early = Producer::named(&log, "early", 3).await;
    early.store(&log, 2).await;
    let mut late = Producer::named(&log, "late", 1).await;
    late.store(&log, 300).await;
    let mut newest = Producer::named(&log, "newest", 1).await;
    pass(1.0).await; // the snapshot is written behind them
    let covered = world.list().await.cursor_log.len();
    assert_eq!(covered, 1, "the snapshot made a cursor log");
    newest.store(&log, 1).await;
    node.kill();

    let log = world.node().load().await;
    assert_eq!(Producer::named(&log, "late", 2).await.last, late.last);
    assert_eq!(Producer::named(&log, "newest", 2).await.last, newest.last);
    let name = ProducerName::parse("early").expect("valid");
    let refused = open(&log, ProducerIdentity::Named(name), 2).await;
    assert_eq!(
        refused,
        Err(ProducerError::StaleStream { current: 3 }),
        "the snapshot knew the stream"
    );
    assert_eq!(Producer::named(&log, "early", 3).await.last, early.last);
}

#[tokio::test(start_paused = true)]
async fn a_window_larger_than_an_entry_is_snapshotted_all_the_same() {
    let world = World::new().await;
    let node = world.node_with(|config| config.dedup_snapshot_bytes = 2_000);
    let log = node.load().await;
    let long = "n".repeat(190);
    for n in 0..40_000 {
        Producer::named(&log, &format!("{n}{long}"), 7).await;
    }
    let mut producer = Producer::named(&log, "p", 1).await;
    producer.store(&log, 100).await;
    log.create_cursor(SUB, Start::Earliest).await.expect("the cursor log goes on");
    pass(1.0).await;
    assert!(node.metrics.snapshots.get() >= 1);
    node.kill();
    let log = world.node().load().await;
    for n in [0, 17_000, 39_999] {
        let name = ProducerName::parse(&format!("{n}{long}")).expect("valid");
        let refused = open(&log, ProducerIdentity::Named(name), 6).await;
        assert_eq!(refused, Err(ProducerError::StaleStream { current: 7 }), "{n} is remembered");
    }
}

#[tokio::test(start_paused = true)]
async fn a_load_never_replays_much_more_than_a_snapshots_distance() {
    // Idle rests and crashes in between do not start the count anew.
    let world = World::new().await;
    let mut node = world.node_with(|config| config.dedup_snapshot_bytes = 2_000);
    let mut log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    for n in 0..30 {
        // Too much for an inline snapshot.
        Producer::named(&log, &format!("{n}{}", "x".repeat(100)), 1).await;
    }
    let mut producer = Producer::named(&log, "p", 1).await;
    for n in 0..20 {
        producer.store(&log, 20).await;
        if n % 2 == 0 {
            pass(700.0).await; // idle: the ledgers are closed
        } else {
            pass(1.0).await;
            node.kill();
            node = world.node_with(|config| config.dedup_snapshot_bytes = 2_000);
            log = node.load().await;
            producer = Producer::named(&log, "p", n + 2).await;
        }
    }
    node.kill();
    let (state, end) = world.node().log_state().await;
    let behind = end.0 - state.dedup.next_offset;
    assert!(behind < 500, "{behind} of {end} messages would be replayed");
}
