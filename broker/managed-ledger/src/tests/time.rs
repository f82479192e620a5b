//! Seek by time: the first message published at or after a moment.

use geminga_proto::ids::Offset;
use geminga_runtime::clock::Timestamp;

use super::harness::*;
use crate::{ManagedLedger, ReadError};

/// Every message kept, with its publish time.
async fn times(log: &ManagedLedger) -> Vec<(u64, u64)> {
    let (mut next, end) = (log.first_offset(), *log.end().borrow());
    let mut all = Vec::new();
    while next < end {
        for batch in log.read(next, 1 << 20, 1_000).await.expect("readable") {
            for n in 0..u64::from(batch.header.count) {
                all.push((batch.base_offset.0 + n, batch.header.publish_time_ms));
            }
            next = batch.base_offset.advance(u64::from(batch.header.count));
        }
    }
    all
}

async fn check(log: &ManagedLedger) {
    let all = times(log).await;
    assert!(all.windows(2).all(|pair| pair[0].1 <= pair[1].1), "publish times do not fall");
    let end = *log.end().borrow();
    let moments = all.iter().flat_map(|(_, at)| [at - 1, *at, at + 1]).chain([0, u64::MAX]);
    for moment in moments {
        let first = all.iter().find(|(_, at)| *at >= moment);
        let expected = first.map_or(end, |(offset, _)| Offset(*offset));
        assert_eq!(log.offset_at_time(moment).await, Ok(expected), "at {moment}");
    }
}

/// Batches some time apart, and what a clock does between them.
async fn publish(world: &World, log: &ManagedLedger, producer: &mut Producer, steps: &[i64]) {
    for (n, step) in steps.iter().enumerate() {
        world.clock.jump(*step);
        producer.send(log, n as u64 % 3 + 1).await.expect("stored");
    }
}

#[tokio::test(start_paused = true)]
async fn a_time_leads_to_the_first_message_published_then_in_closed_and_open_ledgers() {
    let world = World::new().await;
    let node = world.node_with(|config| config.roll_bytes = 600);
    let log = node.load().await;
    assert_eq!(log.offset_at_time(0).await, Ok(offset(0)), "an empty segment");
    let mut producer = Producer::named(&log, "p", 1).await;
    let steps: Vec<i64> = (0..60).map(|n| [10, 0, 1_000, 7][n % 4]).collect();
    publish(&world, &log, &mut producer, &steps).await;
    assert!(world.list().await.data.len() > 2);
    check(&log).await;
    node.kill();
    check(&world.node().load().await).await;
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_goes_back_a_little_or_is_another_owners_turns_no_time_back() {
    let world = World::new().await;
    let node = world.node_with(|config| config.roll_bytes = 600);
    let log = node.load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    publish(&world, &log, &mut producer, &[5_000, -4_000, 10, 10, -900, 6_000, 3, -3_000]).await;
    check(&log).await;
    node.kill();
    world.clock.jump(-60_000);
    let log = world.node().load().await;
    let mut producer = Producer::named(&log, "p", 2).await;
    publish(&world, &log, &mut producer, &[1, 1, 70_000, 5, -20, 5]).await;
    check(&log).await;
}

#[tokio::test(start_paused = true)]
async fn where_a_clock_was_hours_ahead_times_fall_once_and_nothing_at_or_after_the_time_is_before_the_older_message()
 {
    let world = World::new().await;
    let log = world.node().load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    world.clock.set(Timestamp(900_000_000));
    publish(&world, &log, &mut producer, &[10, 10, 10]).await;
    world.clock.set(Timestamp(500_000_000));
    publish(&world, &log, &mut producer, &[10, 10, 10]).await;
    let all = times(&log).await;
    assert_eq!(all[11].1, 500_000_030, "no honest clock stamped what came before: {all:?}");
    for (_, moment) in &all {
        let found = log.offset_at_time(*moment).await.expect("found").0 as usize;
        let (before, at) =
            (found.checked_sub(1).map(|n| all[n].1), all.get(found).map(|one| one.1));
        assert!(
            at.is_none_or(|at| at >= *moment) && before.is_none_or(|before| before < *moment),
            "{moment}: {found}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_trimmed_is_no_answer_and_what_cannot_be_read_is_said() {
    let world = World::new().await;
    let node = world.node_with(|config| config.roll_bytes = 600);
    let log = node.load().await;
    log.create_cursor(SUB, crate::Start::Earliest).await.expect("made");
    let mut producer = Producer::named(&log, "p", 1).await;
    publish(&world, &log, &mut producer, &[100; 60]).await;
    let end = *log.end().borrow();
    log.settle(SUB, crate::Settlement::UpTo(Offset(end.0 - 1))).await.expect("settled");
    log.set_policy(crate::TierPolicy::default());
    pass(30.0).await;
    assert!(log.first_offset() > offset(0), "{:?}", log.stats());
    assert_eq!(log.offset_at_time(0).await, Ok(log.first_offset()));
    check(&log).await;
    let last = times(&log).await.last().expect("there are some").1;
    for bookie in 1..=3 {
        world.kill(bookie);
    }
    let answer = log.offset_at_time(last).await;
    assert!(matches!(answer, Err(ReadError::Unavailable(_)) | Ok(_)), "{answer:?}");
}
