//! A failed write or sync ends the bookie; nothing unsynced was confirmed, and every start says the same (D3, T21).

use std::{collections::BTreeSet, sync::Arc};

use futures::future::join_all;
use geminga_bookie_client::bookie_rpc::{AddAnswer, BookieRpc, EntryAnswer, Unknown};
use geminga_runtime::disk::{Fault, Faults, FaultyDisk};

use super::harness::*;

#[tokio::test(start_paused = true)]
async fn after_a_failed_write_or_sync_nothing_is_confirmed_and_the_bookie_ends() {
    for seed in 0..40 {
        let mut world = World::new(seed);
        let faults = Faults::none(world.random.fork());
        world.seen_disk =
            Some(Arc::new(FaultyDisk::over_memory(world.disk.clone(), faults.clone())));
        let bookie = world.started().await;
        let fault = [Fault::Write, Fault::Sync][seed as usize % 2];
        faults.set_only("journal-");
        faults.plan(fault, world.random.below(4));
        let mut held = BTreeSet::new();
        let mut sent = 0;
        while faults.struck() == 0 {
            let ids = sent..sent + 1 + world.random.below(12);
            sent = ids.end;
            let adds = ids.clone().map(|id| bookie.add(add_request(&bookie, 1, id, false)));
            for (id, answer) in ids.clone().zip(join_all(adds.collect::<Vec<_>>()).await) {
                match answer {
                    AddAnswer::Ok => drop(held.insert(id)),
                    AddAnswer::Unknown(Unknown::Disconnected) => {}
                    other => panic!("seed {seed}: {other:?}"),
                }
            }
        }
        assert!(held.len() < sent as usize, "seed {seed}");
        assert!(bookie.failed().await.contains("injected"), "seed {seed}");
        assert_eq!(add(&bookie, 1, sent).await, AddAnswer::Unknown(Unknown::Disconnected));
        faults.clear();
        let mut first_verdict: Option<Vec<EntryAnswer>> = None;
        for start in 0..3 {
            match start {
                0 => world.disk.kill(), // the page cache lies about what the failed sync lost
                _ => world.disk.crash(),
            }
            let bookie = world.started().await;
            let mut verdict = Vec::new();
            for id in 0..sent {
                verdict.push(read(&bookie, 1, id).await);
            }
            for id in &held {
                assert_eq!(verdict[*id as usize], EntryAnswer::Held(entry(1, *id)), "seed {seed}");
            }
            assert!(bookie.shared().core().ledgers.limbo().is_none(), "seed {seed}");
            assert_eq!(
                *first_verdict.get_or_insert_with(|| verdict.clone()),
                verdict,
                "seed {seed}"
            );
            bookie.kill();
        }
    }
}
