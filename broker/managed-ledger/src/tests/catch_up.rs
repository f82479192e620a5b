//! Readers behind the tail share what is read for them, and leave the tail alone.

use std::time::Duration;

use geminga_proto::ids::Offset;

use super::harness::*;
use crate::{ManagedLedger, Start};

/// Reads all from an offset on, a little at a time.
async fn read_from(log: &ManagedLedger, mut next: Offset, end: Offset) -> u64 {
    let mut batches = 0;
    while next < end {
        let read = log.read(next, 200, 1_000).await.expect("readable");
        batches += read.len() as u64;
        next = read.last().expect("there is more").end();
    }
    batches
}

#[tokio::test(start_paused = true)]
async fn several_readers_of_the_same_old_range_ask_bookies_once_and_push_out_nothing_at_the_tail() {
    let world = World::new().await;
    let node = world.node_with(|config| {
        config.roll_bytes = 4_000;
        config.segment_cache_bytes = 200_000;
        config.cache_bytes = 10_000;
        config.catch_up_cache_bytes = 400_000;
    });
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    let mut producer = Producer::named(&log, "p", 1).await;
    producer.store(&log, 300).await;
    let end = *log.end().borrow();
    let tail = Offset(end.0 - 20);
    let of_tail = read_from(&log, tail, end).await;
    let (hits, misses) = (&node.metrics.catch_up_hits, &node.metrics.catch_up_misses);
    assert_eq!((node.metrics.cache_hits.get(), misses.get()), (of_tail, 0));

    world.slow_reads(Duration::from_millis(5));
    let middle = Offset(end.0 / 2);
    let old = read_from(&log, Offset(0), middle).await;
    assert_eq!((hits.get(), misses.get()), (0, old));
    assert_eq!(read_from(&log, Offset(0), middle).await, old);
    assert_eq!((hits.get(), misses.get()), (old, old), "the second one asks nobody");
    // Kept a short while only.
    pass(21.0).await;
    assert_eq!(node.metrics.catch_up_bytes.get(), 0);
    // At the same time: whoever comes second waits for the first.
    let reads: Vec<_> = (0..4)
        .map(|_| {
            let log = log.clone();
            let read = async move { log.read(Offset(5), 300, 1_000).await.expect("readable") };
            world.tasks.spawn_returning("read", read)
        })
        .collect();
    let before = misses.get();
    let mut all = Vec::new();
    for read in reads {
        all.push(read.await.expect("runs"));
    }
    assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
    assert_eq!(misses.get() - before, all[0].len() as u64, "one read for four");
    // All this pushed out nothing at the tail.
    let tail_hits = node.metrics.cache_hits.get();
    assert_eq!(read_from(&log, tail, end).await, of_tail);
    assert_eq!(node.metrics.cache_hits.get(), tail_hits + of_tail);
    assert!(node.metrics.cache_bytes.get() <= 10_000);
}

#[tokio::test(start_paused = true)]
async fn a_read_that_others_wait_for_and_that_is_given_up_holds_nobody() {
    let world = World::new().await;
    let node = world.node();
    let log = node.load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    producer.store(&log, 30).await;
    world.slow_reads(Duration::from_secs(2));
    let first = tokio::time::timeout(Duration::from_secs(1), log.read(Offset(0), 500, 100));
    let (given_up, second) = tokio::join!(first, log.read(Offset(0), 500, 100));
    assert!(given_up.is_err());
    assert_eq!(second.expect("it read for itself")[0].base_offset, Offset(0));
}
