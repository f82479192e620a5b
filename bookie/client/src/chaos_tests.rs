//! Whole ledgers through bad networks, failing bookies and an uncertain store, by seed. The checker knows only what callers
//! were told, what bookies hold, and what the store says.

use std::{sync::Arc, time::Duration};

use geminga_metadata::{Fault, FaultPlan as StoreFaults, FaultyStore, MemoryStore, keys};
use geminga_proto::ids::{EntryId, Epoch, Incarnation};
use geminga_runtime::{random::Random, tasks::Tasks};
use tokio::time::{Instant, timeout};

use crate::{
    AppendError, LedgerClient, LedgerState, Quorum,
    bookie_rpc::{
        Bookies,
        faulty::{FaultPlan, Faults, FaultyBookies},
        memory::AddMode,
    },
    settle::{CloseVerdict, settled_close},
    testing::{LEDGER, World, append, names, pass, payload},
};

async fn faulty_world(bookies: u32, seed: u64, plan: StoreFaults) -> (World, FaultyStore, Tasks) {
    let tasks = Tasks::new("network");
    let store = FaultyStore::new(
        Arc::new(MemoryStore::new()),
        Random::from_seed(seed),
        StoreFaults::default(),
        &tasks,
    );
    let world = World::with_store(bookies, Arc::new(store.clone())).await;
    store.set_plan(plan);
    (world, store, tasks)
}

/// EC2, MD3, T49: however the change's CAS comes to stand, nothing is acknowledged before that is known.
#[tokio::test(start_paused = true)]
async fn while_an_ensemble_change_is_unsettled_nothing_is_acknowledged() {
    let slow = Duration::from_secs(3);
    for (fault, waits) in [
        (Fault::Slow(slow), true),
        (Fault::SlowAnswer(slow), true),
        (Fault::UnknownDone, false),
        (Fault::UnknownLost, false),
        (Fault::UnknownLate(slow), false),
        (Fault::Unavailable, false),
    ] {
        let (mut world, store, _tasks) = faulty_world(3, 1, StoreFaults::default()).await;
        let writer = world.create().await;
        append(&writer, 0..3).await;
        world.add_bookie(4).await;
        world.bookies[&1].set_mode(AddMode::ReadOnly);
        store.inject_below(keys::ledgers(), fault);
        let start = Instant::now();
        append(&writer, 3..4).await; // the failing answer may come after this is acknowledged by two
        pass(0.001).await;
        append(&writer, 4..10).await;
        if waits {
            assert!(start.elapsed() >= slow, "{fault:?}: acknowledged after {:?}", start.elapsed());
        } else {
            assert!(start.elapsed() < Duration::from_secs(1), "{fault:?}");
        }
        pass(5.0).await;
        let fragments = world.metadata().await.value.fragments;
        assert_eq!(fragments.len(), 2, "{fault:?}: one change, once");
        let sealed = writer.seal().await.expect("ours");
        world.store.txn(sealed.txn).await.expect("up");
        assert_eq!(world.read_all().await, names(10));
    }
}

/// EC4, T49: a recovery that comes between ends the writer, even if its change is still under way.
#[tokio::test(start_paused = true)]
async fn a_change_that_loses_to_a_recovery_poisons_the_writer() {
    let (mut world, store, _tasks) = faulty_world(3, 1, StoreFaults::default()).await;
    let writer = world.create().await;
    append(&writer, 0..3).await;
    world.add_bookie(4).await;
    world.bookies[&1].set_mode(AddMode::ReadOnly);
    store.inject_below(keys::ledgers(), Fault::Slow(Duration::from_secs(3)));
    let first = writer.append(payload("entry 3"));
    pass(0.01).await;
    let late = writer.append(payload("entry 4"));
    let closed = world.client.recover_and_close(LEDGER, Epoch(2)).await.expect("recovered");
    let acked = 3 + u64::from(first.await.is_ok());
    assert_eq!(late.await, Err(AppendError::Indeterminate));
    assert!(closed.last >= Some(EntryId(acked - 1)), "I1");
    pass(5.0).await;
    assert_eq!(world.metadata().await.value, closed.metadata, "the late CAS changed nothing");
}

/// O3, EC7: a store outage stops changes, not traffic; the listing follows when it is back; what cannot reach Qa waits.
#[tokio::test(start_paused = true)]
async fn a_store_outage_does_not_stop_what_can_reach_qa() {
    let (world, store, _tasks) = faulty_world(3, 1, StoreFaults::default()).await;
    let writer = world.create().await;
    store.set_partitioned(true);
    world.kill(2);
    append(&writer, 0..5).await;
    pass(40.0).await;
    append(&writer, 5..10).await;
    world.kill(3);
    let waits = writer.append(payload("entry 10"));
    assert!(timeout(Duration::from_secs(60), waits).await.is_err(), "it waits, nothing ends");
    assert_eq!(writer.poison(), None);
    world.start(3);
    pass(5.0).await;
    assert_eq!(writer.lac(), Some(EntryId(10)));
    store.set_partitioned(false);
    pass(5.0).await;
    assert!(world.is_listed().await);
}

/// I1..I4, I6 over rival recoverers, ensemble changes and lies of the network, for many seeds.
#[tokio::test(start_paused = true)]
async fn whatever_fails_acknowledged_entries_stay() {
    let mut totals = (0u64, 0usize, 0usize);
    for seed in 0..60 {
        let plan = StoreFaults {
            unavailable: 0.05,
            unknown_done: 0.1,
            unknown_lost: 0.1,
            unknown_late: 0.1,
            late_max: Duration::from_secs(2),
            delay: 0.2,
            delay_max: Duration::from_millis(200),
            ..StoreFaults::default()
        };
        let (world, store, network) = faulty_world(5, seed, StoreFaults::default()).await;
        let random = Random::from_seed(seed);
        let faults = Faults {
            lose_request: 0.03,
            lose_answer: 0.03,
            repeat: 0.1,
            delay: 0.4,
            delay_max: Duration::from_millis(200),
            reorder: random.chance(0.5),
            ..Faults::default()
        };
        let faults = FaultPlan::new(faults);
        let client = || -> LedgerClient {
            let inner = Arc::new(world.loopback.clone());
            let faulty = FaultyBookies::new(inner, faults.clone(), random.fork(), network.clone());
            let bookies: Arc<dyn Bookies> = Arc::new(faulty);
            world.client_with(Some(bookies), |config| {
                config.add_timeout = Duration::from_millis(300);
                config.read_timeout = Duration::from_millis(300);
                config.short_patience = Duration::from_secs(3);
                config.resend_for = Duration::from_secs(2);
            })
        };
        let writer = world.create_by(&client(), Quorum::default()).await;
        store.set_plan(plan);
        let writing = async {
            let mut acked = 0;
            let mut pending = Vec::new();
            for i in 0..60 {
                pending.push(writer.append(payload(format!("entry {i}"))));
                pass(random.below(100) as f64 / 1_000.0).await;
            }
            let all = timeout(Duration::from_secs(60), futures::future::join_all(pending)).await;
            for (i, answer) in all.expect("every append ends").into_iter().enumerate() {
                if answer.is_ok() {
                    assert_eq!(i as u64, acked, "in order, no hole: seed {seed}");
                    acked += 1;
                }
            }
            acked
        };
        let failing = async {
            for _ in 0..8 {
                pass(random.below(800) as f64 / 1_000.0).await;
                let which = 1 + random.below(5) as u32;
                match random.below(4) {
                    0 => world.kill(which),
                    1 => world.bookies[&which].set_mode(AddMode::ReadOnly),
                    2 => faults.change(|faults| faults.partitioned = [Incarnation(which)].into()),
                    _ => {
                        world.start(which);
                        world.bookies[&which].set_mode(AddMode::Writable);
                        faults.change(|faults| faults.partitioned.clear());
                    }
                }
            }
            for which in 1..=5 {
                world.start(which);
                world.bookies[&which].set_mode(AddMode::Writable);
            }
            faults.change(|faults| faults.partitioned.clear());
        };
        let rivals = async {
            if random.chance(0.5) {
                return Vec::new();
            }
            let (one, two) = (client(), client());
            pass(random.below(6_000) as f64 / 1_000.0).await;
            let second = async {
                pass(random.below(500) as f64 / 1_000.0).await;
                two.recover_and_close(LEDGER, Epoch(3)).await
            };
            let (first, second) = tokio::join!(one.recover_and_close(LEDGER, Epoch(2)), second);
            [first, second].into_iter().flatten().map(|closed| closed.last).collect()
        };
        let tailing = async {
            let reader = world.client.reader(LEDGER);
            let mut told = None;
            for _ in 0..30 {
                pass(random.below(300) as f64 / 1_000.0).await;
                told = told.max(reader.read_lac(&writer.metadata().value).await);
            }
            told
        };
        let (acked, (), mut ends, told) = tokio::join!(writing, failing, rivals, tailing);
        if let Ok(Ok(mut sealed)) = timeout(Duration::from_secs(60), writer.seal()).await {
            let token = world.tasks.token();
            loop {
                use geminga_metadata::{Committed, commit};
                match commit(&world.store, &sealed.txn, &token).await {
                    Committed::Done(_) => ends.push(sealed.last),
                    Committed::Conflict { found, .. } => {
                        match settled_close(found[0].as_ref(), &sealed) {
                            CloseVerdict::Ours | CloseVerdict::SameEnd => ends.push(sealed.last),
                            CloseVerdict::Lost => {}
                            CloseVerdict::Rebuild(rebuilt) => {
                                sealed = *rebuilt;
                                continue;
                            }
                        }
                    }
                    other => panic!("seed {seed}: {other:?}"),
                }
                break;
            }
        }
        faults.heal();
        store.set_plan(StoreFaults::default());
        let end = world.client.recover_and_close(LEDGER, Epoch(9)).await.expect("healed").last;
        pass(10.0).await; // what is late lands
        let metadata = world.metadata().await.value;
        assert!(matches!(metadata.state, LedgerState::Closed { last, .. } if last == end), "I2");
        assert!(ends.iter().all(|last| *last == end), "I2: seed {seed}: {ends:?} {end:?}");
        assert!(end >= told, "I3: seed {seed}: a reader was told {told:?}, it ends at {end:?}");
        let kept = end.map_or(0, |last| last.0 + 1);
        assert!(kept >= acked, "I1: seed {seed}: {acked} acknowledged, {kept} kept");
        assert_eq!(world.read_all().await, names(kept), "seed {seed}");
        assert_eq!(metadata.validate(), Ok(()), "I9");
        let mut short = metadata.has_vacancy();
        for id in (0..60).map(EntryId) {
            let digests: Vec<u32> = world
                .bookies
                .values()
                .filter_map(|bookie| bookie.held(LEDGER).get(&id).map(|entry| entry.digest))
                .collect();
            assert!(
                digests.windows(2).all(|pair| pair[0] == pair[1]),
                "I6: seed {seed} entry {id}"
            );
            if id.0 < kept {
                let holds =
                    |(_, i): &(_, Incarnation)| world.bookies[&i.0].held(LEDGER).contains_key(&id);
                let held = metadata.fragment_of(id).holders().filter(holds).count();
                assert!(held >= 2, "I4: seed {seed} entry {id}: {held}");
                short |= held < 3;
            }
        }
        assert!(!short || world.is_listed().await, "I5: seed {seed}: short, and not listed");
        totals.0 += acked;
        totals.1 += metadata.fragments.len() - 1;
        totals.2 += usize::from(acked < kept);
        world.tasks.abort();
        network.abort();
    }
    assert!(totals.0 > 1_000 && totals.1 > 20 && totals.2 > 3, "too little happened: {totals:?}");
}
