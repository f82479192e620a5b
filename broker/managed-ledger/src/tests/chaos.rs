//! Seeds of everything at once: a bad network, a store that forgets its answers, bookies and owners that come and go.

use std::{collections::BTreeMap, time::Duration};

use geminga_bookie_client::bookie_rpc::faulty::Faults;
use geminga_metadata::FaultPlan;
use geminga_proto::ids::Offset;
use geminga_runtime::random::Random;
use tokio::time::timeout;

use super::harness::*;
use crate::{ManagedLedger, Settlement, Start};

/// What the outside knows.
#[derive(Default)]
struct Known {
    /// Batches as first cut: (lo, hi), each sent after the one before.
    cut: Vec<(u64, u64)>,
    /// Acknowledged: last sequence -> base offset.
    stored: BTreeMap<u64, u64>,
    /// Runs that were asked to be settled, and whether that was acknowledged.
    settles: Vec<(u64, u64, bool)>,
}

#[tokio::test(start_paused = true)]
async fn nothing_acknowledged_is_lost_whatever_fails() {
    for seed in 0..20 {
        let world = World::with_bookies(5, seed).await;
        let random = Random::from_seed(seed + 1_000);
        let mut known = Known::default();
        make_cursor(&world).await;
        for stream in 1..=8 {
            world.store.set_plan(FaultPlan {
                unavailable: 0.05,
                unknown_done: 0.05,
                unknown_lost: 0.03,
                unknown_late: 0.05,
                late_max: Duration::from_millis(800),
                delay: 0.2,
                delay_max: Duration::from_millis(50),
                ..FaultPlan::default()
            });
            let bookie = random.below(5) as u32 + 1;
            world.kill(bookie);
            live(&world, &mut known, &random, stream).await;
            world.start(bookie);
            if random.chance(0.4) {
                world.bookies[&bookie].restart();
            }
        }
        world.store.set_plan(FaultPlan::default());
        pass(5.0).await; // what is late lands
        check(&world, &known, seed).await;
    }
}

async fn make_cursor(world: &World) {
    let node = world.node();
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    log.close().await;
}

/// One owner's life: it loads, serves for a while, and is killed, or closed, or simply followed by the next.
async fn live(world: &World, known: &mut Known, random: &Random, stream: u64) {
    let faults = Faults {
        lose_request: 0.01,
        lose_answer: 0.02,
        repeat: 0.02,
        delay: 0.4,
        delay_max: Duration::from_millis(20),
        ..Faults::default()
    };
    let node = world.node_over(world.faulty(faults), |config| {
        config.roll_bytes = 1_500;
        config.cursor_roll_bytes = 500;
        config.snapshot_after_bytes = 200;
        config.dedup_snapshot_bytes = 700;
    });
    let log = loop {
        match node.ledgers.load(SEGMENT, world.claim.clone()).await {
            Ok(log) => break log,
            Err(_) => pass(0.1).await,
        }
    };
    let serve = serve(&log, known, random, stream * 1_000);
    drop(timeout(Duration::from_millis(500 + random.below(8_000)), serve).await);
    match random.below(3) {
        0 => node.kill(),
        1 => drop(timeout(Duration::from_secs(2), log.close()).await),
        _ => {}
    }
}

async fn serve(log: &ManagedLedger, known: &mut Known, random: &Random, first_stream: u64) {
    for stream in first_stream.. {
        let Ok(mut producer) = Producer::try_named(log, "p", stream).await else { return };
        let persisted = producer.last;
        let resend = known.cut.partition_point(|(lo, _)| *lo <= persisted);
        for round in 0.. {
            let from = if round == 0 { resend } else { known.cut.len() };
            for _ in 0..6 {
                let prev = known.cut.last().map_or(0, |(_, hi)| *hi);
                known.cut.push((prev + 1, prev + 1 + random.below(4)));
            }
            let mut outcomes = Vec::new();
            for &(lo, hi) in &known.cut[from..] {
                outcomes.push((hi, log.publish(producer.batch(producer.last, lo, hi))));
                producer.last = hi;
            }
            let mut failed = false;
            for (hi, outcome) in outcomes {
                match outcome.await {
                    Ok(stored) => {
                        let base = stored.base_offset.map(|base| base.0);
                        let before = known.stored.entry(hi).or_insert_with(|| base.expect("new"));
                        assert!(base.is_none_or(|base| base == *before), "{hi} moved");
                    }
                    Err(_) => failed = true,
                }
            }
            settle(log, known, random).await;
            if random.chance(0.1) {
                drop(log.compact_now());
            }
            if failed {
                pass(0.05).await;
                break;
            }
        }
    }
}

async fn settle(log: &ManagedLedger, known: &mut Known, random: &Random) {
    let end = log.end().borrow().0;
    let Some(view) = log.cursor(SUB) else { return };
    for _ in 0..3 {
        let first = view.mark_delete_next.0 + random.below(20);
        let last = first + random.below(3);
        if last < end {
            known.settles.push((first, last, false));
            let run = Settlement::Accept(vec![(Offset(first), Offset(last))]);
            let settled = log.settle(SUB, run).await.is_ok();
            if let Some(asked) = known.settles.last_mut() {
                asked.2 = settled;
            }
        }
    }
}

async fn check(world: &World, known: &Known, seed: u64) {
    let log = world.node().load().await;
    let all = read_all(&log).await;
    let stored: Vec<u64> = all.iter().map(|(_, _, hi)| *hi).collect();
    let sent: Vec<u64> = known.cut.iter().map(|(_, hi)| *hi).take(stored.len()).collect();
    assert_eq!(stored, sent, "seed {seed}: each once, in order, without a gap (I11, I13)");
    assert!(known.stored.len() > 30, "seed {seed}: {}", known.stored.len());
    for (hi, base) in &known.stored {
        assert!(all.iter().any(|(b, _, h)| (b, h) == (base, hi)), "seed {seed}: {hi} is lost");
    }
    // These payloads are no records: a compaction keeps all of them.
    let mut compacted = Vec::new();
    let (mut next, end) = (Offset(0), *log.end().borrow());
    while next < end {
        let read = log.read_compacted(next, None, 1 << 20, 1_000).await.expect("readable");
        compacted
            .extend(read.batches.iter().map(|batch| (batch.base_offset.0, batch.header.count)));
        next = read.next;
    }
    let same = all.iter().map(|(base, count, _)| (*base, *count));
    assert!(compacted.into_iter().eq(same), "seed {seed}: the view lost something");
    let view = log.cursor(SUB).expect("it was made");
    let is_settled = |offset: u64| {
        view.mark_delete_next.0 > offset
            || view.holes.iter().any(|(first, last)| first.0 <= offset && offset <= last.0)
    };
    let asked = |offset: u64, sure: bool| {
        let mut runs = known.settles.iter().filter(|run| run.2 || !sure);
        runs.any(|(first, last, _)| (*first..=*last).contains(&offset))
    };
    for offset in 0..log.end().borrow().0 {
        assert!(
            is_settled(offset) || !asked(offset, true),
            "seed {seed}: {offset} came back (I14)"
        );
        assert!(
            !is_settled(offset) || asked(offset, false),
            "seed {seed}: {offset} is skipped (I12)"
        );
    }
    assert!(known.settles.iter().filter(|run| run.2).count() > 10, "seed {seed}");
    pass(60.0).await;
    assert!(world.list().await.compacting.is_empty(), "seed {seed}: a view that nobody writes");
    world.check_metadata().await;
}
