//! Power cuts at every durable step: what was answered holds (I7, I8).

use std::collections::{BTreeMap, BTreeSet};

use geminga_bookie_client::bookie_rpc::{AddAnswer, BookieRpc, EntryAnswer, FenceAnswer, Unknown};
use geminga_runtime::random::Random;

use super::harness::*;
use crate::{
    Bookie,
    crash_points::{CrashPoint, CrashPoints},
};

/// What the callers were told.
#[derive(Default)]
struct Told {
    held: BTreeSet<(u64, u64)>,
    fenced: BTreeSet<u64>,
    sent: BTreeSet<(u64, u64)>,
    next: BTreeMap<u64, u64>,
}

const LEDGERS: u64 = 6;

/// Adds, fences, checkpoints, deletions, kills and restarts, until the power is cut or the script ends.
async fn live(world: &World, random: &Random, told: &mut Told, rounds: u64) -> Option<()> {
    for _ in 0..rounds {
        let bookie = world.start().await.ok()?;
        for _ in 0..6 {
            let mut adds = Vec::new();
            for _ in 0..random.below(12) {
                let ledger = 1 + random.below(LEDGERS);
                let id = told.next.entry(ledger).or_insert(0);
                told.sent.insert((ledger, *id));
                let recovery = told.fenced.contains(&ledger);
                adds.push(((ledger, *id), bookie.add(add_request(&bookie, ledger, *id, recovery))));
                *id += 1;
            }
            if random.chance(0.2) {
                let ledger = 1 + random.below(LEDGERS);
                let answer = fence(&bookie, ledger).await;
                if matches!(answer, FenceAnswer::Fenced { .. }) {
                    told.fenced.insert(ledger);
                }
            }
            for (id, answer) in adds {
                match answer.await {
                    AddAnswer::Ok => drop(told.held.insert(id)),
                    AddAnswer::Unknown(Unknown::Disconnected) => return None,
                    AddAnswer::Fenced => {}
                    other => panic!("unexpected {other:?}"),
                }
            }
            if random.chance(0.5) {
                bookie.checkpoint().await.ok()?;
            }
        }
        if random.chance(0.3) {
            let went_on = run_full(world, &bookie, random, told).await;
            world.disk.set_capacity(64 << 20);
            went_on?;
        }
        if random.chance(0.3) {
            let ledger = 100 + random.below(1000);
            for id in 0..50 {
                if add(&bookie, ledger, id).await != AddAnswer::Ok {
                    return None;
                }
            }
            world.put_ledger(ledger, true).await;
            bookie.collect_garbage().await.ok()?;
            for _ in 0..3 {
                if add(&bookie, 1, {
                    let n = told.next.entry(1).or_insert(0);
                    *n += 1;
                    told.sent.insert((1, *n - 1));
                    *n - 1
                })
                .await
                    == AddAnswer::Ok
                {
                    let id = told.next[&1] - 1;
                    told.held.insert((1, id));
                }
                bookie.checkpoint().await.ok()?;
            }
        }
        match random.below(3) {
            0 => bookie.stop().await,
            1 => bookie.kill(),
            _ => {
                bookie.kill();
                world.disk.kill();
            }
        }
    }
    Some(())
}

/// The disk runs full and gets room again: adds and fences meet its end.
async fn run_full(world: &World, bookie: &Bookie, random: &Random, told: &mut Told) -> Option<()> {
    world.disk.set_capacity(world.used() + random.below(9_000));
    for _ in 0..3 {
        let ledger = 1 + random.below(LEDGERS);
        for _ in 0..4 {
            let id = told.next.entry(ledger).or_insert(0);
            *id += 1;
            let id = (ledger, *id - 1);
            told.sent.insert(id);
            match add(bookie, id.0, id.1).await {
                AddAnswer::Ok => drop(told.held.insert(id)),
                AddAnswer::NoSpace | AddAnswer::ReadOnly | AddAnswer::Fenced => {}
                AddAnswer::Unknown(Unknown::Disconnected) => return None,
                other => panic!("unexpected {other:?}"),
            }
        }
        match fence(bookie, ledger).await {
            FenceAnswer::Fenced { .. } => drop(told.fenced.insert(ledger)),
            FenceAnswer::Unknown(Unknown::Disconnected) => return None,
            FenceAnswer::Unknown(_) => {}
        }
    }
    world.disk.set_capacity(64 << 20);
    tokio::time::sleep(std::time::Duration::from_secs(3)).await; // until the guard has seen it
    Some(())
}

async fn check(bookie: &Bookie, told: &Told, context: &str) {
    for &(ledger, id) in &told.sent {
        let answer = read(bookie, ledger, id).await;
        match answer {
            EntryAnswer::Held(found) => assert_eq!(found, entry(ledger, id), "{context}"),
            EntryAnswer::Absent => assert!(
                !told.held.contains(&(ledger, id)),
                "{context}: acknowledged {ledger}/{id} is gone"
            ),
            other => panic!("{context}: {ledger}/{id} is {other:?}"),
        }
    }
    for &ledger in &told.fenced {
        assert_eq!(add(bookie, ledger, 999_999).await, AddAnswer::Fenced, "{context}");
    }
}

#[tokio::test(start_paused = true)]
async fn whatever_step_the_power_is_cut_at_what_was_answered_holds() {
    let mut seen = BTreeSet::new();
    for &point in CrashPoint::ALL {
        let mut cuts = 0;
        for seed in 0..12 {
            let context = format!("{point:?} seed {seed}");
            let mut world = World::new(seed * 1000 + point as u64);
            let random = world.random.fork();
            let hook = CutAt::new(&world.disk, point, random.below(1 + seed * 2));
            world.crash_points = CrashPoints::new(hook.clone());
            let mut told = Told::default();
            live(&world, &random, &mut told, 5).await;
            cuts += u64::from(hook.cut.load(std::sync::atomic::Ordering::SeqCst));
            seen.extend(hook.seen.lock().iter().copied());
            world.disk.crash(); // and once more, wherever it stands now
            world.crash_points = CrashPoints::default();
            for _ in 0..2 {
                let bookie =
                    world.start().await.unwrap_or_else(|error| panic!("{context}: {error}"));
                check(&bookie, &told, &context).await;
                assert!(
                    bookie.shared().core().ledgers.limbo().is_none(),
                    "{context}: a power cut is no damage (T46)"
                );
                bookie.kill();
                world.disk.crash();
            }
        }
        assert!(cuts > 0, "{point:?} was never cut");
    }
    let all: BTreeSet<CrashPoint> = CrashPoint::ALL.iter().copied().collect();
    assert_eq!(seen, all, "every crash point is passed");
}
