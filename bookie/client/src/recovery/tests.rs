//! Recovery over memory bookies: the traps that broke others, one test each.

use std::{sync::Arc, time::Duration};

use geminga_metadata::TxnOutcome;
use geminga_proto::ids::{EntryId, Epoch, Incarnation};
use geminga_runtime::random::Random;
use tokio::time::{Instant, timeout};

use super::*;
use crate::{
    AppendError, LedgerClient, LedgerState, Quorum,
    bookie_rpc::{
        Bookies,
        faulty::{FaultPlan, Faults, FaultyBookies},
        memory::{AddMode, MemoryBookie},
        scripted::{Call, ScriptedBookies},
    },
    testing::{LEDGER, World, append, names, pass, payload},
};

async fn recover(world: &World, epoch: u64) -> Result<ClosedLedger, RecoveryError> {
    world.client.recover_and_close(LEDGER, Epoch(epoch)).await
}

/// A client whose recovery gives up after one attempt or so.
fn impatient(world: &World) -> LedgerClient {
    world.client_with(None, |config| {
        config.recovery_patience = Duration::from_millis(10);
        config.read_timeout = Duration::from_millis(500);
    })
}

#[tokio::test(start_paused = true)]
async fn a_ledger_whose_writer_died_closes_with_all_it_acknowledged() {
    let world = World::new(3).await;
    let writer = world.create().await;
    append(&writer, 0..100).await;
    drop(writer);
    let closed = recover(&world, 2).await.expect("recovered");
    assert_eq!(closed.last, Some(EntryId(99)));
    assert_eq!(closed.length, names(100).iter().map(|name| name.len() as u64).sum::<u64>());
    assert_eq!(world.read_all().await, names(100));
    assert!(!world.is_listed().await, "every copy was shown (R8)");
    assert_eq!(
        recover(&world, 0).await.expect("accepted").last,
        Some(EntryId(99)),
        "Closed: accept"
    );
}

#[tokio::test(start_paused = true)]
async fn an_empty_ledger_recovers_empty() {
    let world = World::new(3).await;
    drop(world.create().await);
    let closed = recover(&world, 2).await.expect("recovered");
    assert_eq!((closed.last, closed.length), (None, 0));
    assert_eq!(closed.metadata.fragments.len(), 1, "the first fragment stays (R7)");
}

/// T1: an add in flight reaches a bookie after recovery read "no" there.
#[tokio::test(start_paused = true)]
async fn an_add_in_flight_cannot_be_acknowledged_after_recovery_cut_it() {
    let world = World::new(3).await;
    let (scripted, mut calls) = ScriptedBookies::new();
    let slow = world.client_with(Some(Arc::new(scripted)), |_| {});
    let writer = world.create_by(&slow, Quorum::default()).await;
    let pending = writer.append(payload("in flight"));
    pass(0.01).await;
    world.kill(3);
    assert_eq!(recover(&world, 2).await.expect("cover of two").last, None);
    while let Ok(call) = calls.try_recv() {
        let Call::Add(..) = &call else { continue };
        let bookie = world.bookies[&call.to().0].clone();
        call.pass_on(&bookie).await; // also to bookie 3, which was never fenced
    }
    assert_eq!(pending.await, Err(AppendError::Indeterminate));
    assert_eq!(world.bookies[&3].held(LEDGER).len(), 1, "one copy, no quorum");
}

/// T2.
#[tokio::test(start_paused = true)]
async fn one_hung_bookie_does_not_block_recovery_and_two_do() {
    let world = World::new(3).await;
    let writer = world.create().await;
    append(&writer, 0..5).await;
    drop(writer);
    let plan = FaultPlan::new(Faults { partitioned: [Incarnation(2)].into(), ..Faults::default() });
    let inner = Arc::new(world.loopback.clone());
    let faulty = FaultyBookies::new(inner, plan.clone(), Random::from_seed(1), world.tasks.clone());
    let client = world.client_with(Some(Arc::new(faulty)), |config| {
        config.recovery_patience = Duration::from_secs(20);
    });
    plan.change(|faults| faults.partitioned = [Incarnation(2), Incarnation(3)].into());
    let two = client.recover_and_close(LEDGER, Epoch(2)).await;
    assert!(matches!(two, Err(RecoveryError::Incomplete { .. })), "never guess: {two:?}");
    plan.change(|faults| faults.partitioned = [Incarnation(2)].into());
    let start = Instant::now();
    let one = client.recover_and_close(LEDGER, Epoch(3)).await.expect("cover of two");
    assert_eq!(one.last, Some(EntryId(4)));
    assert!(start.elapsed() < Duration::from_secs(1), "nobody waited for the hung one");
    assert!(world.is_listed().await, "R8: it was not heard");
}

/// T3, D8: unknown is never a no.
#[tokio::test(start_paused = true)]
async fn a_bookie_in_limbo_shortens_nothing() {
    let world = World::new(3).await;
    let writer = world.create().await;
    append(&writer, 0..5).await;
    drop(writer);
    world.bookies[&1].lose_entries();
    world.bookies[&2].lose_entries();
    world.kill(3);
    let guess = impatient(&world).recover_and_close(LEDGER, Epoch(2)).await;
    assert!(matches!(guess, Err(RecoveryError::Incomplete { .. })), "{guess:?}");
    world.start(3);
    let stuck = impatient(&world).recover_and_close(LEDGER, Epoch(3)).await;
    assert!(
        matches!(stuck, Err(RecoveryError::Incomplete { .. })),
        "one no, two unknown: {stuck:?}"
    );
}

/// T4: earlier fragments are final; recovery does not need them.
#[tokio::test(start_paused = true)]
async fn recovery_never_looks_below_the_last_fragment() {
    let mut world = World::new(1).await;
    let one = Quorum::new(1, 1, 1).expect("valid");
    let writer = world.create_by(&world.client, one).await;
    append(&writer, 0..3).await;
    world.add_bookie(2).await;
    world.bookies[&1].set_mode(AddMode::ReadOnly);
    append(&writer, 3..6).await;
    assert_eq!(world.metadata().await.value.fragments.len(), 2);
    drop(writer);
    world.kill(1);
    let closed = recover(&world, 2).await.expect("bookie 2 has the last fragment");
    assert_eq!(closed.last, Some(EntryId(5)));
    world.start(1);
    assert_eq!(world.read_all().await, names(6));
}

/// T5, R5, R7: what a recoverer changes is seen with the close, not before; the next one starts from what is published.
#[tokio::test(start_paused = true)]
async fn a_recoverers_ensemble_change_is_published_by_the_close_alone() {
    let mut world = World::new(3).await;
    let (scripted, mut calls) = ScriptedBookies::new();
    let slow = world.client_with(Some(Arc::new(scripted)), |_| {});
    let writer = world.create_by(&slow, Quorum::default()).await;
    let pending = writer.append(payload("entry 0"));
    pass(0.01).await;
    // The entry reached one bookie.
    let holder = loop {
        let call = calls.recv().await.expect("sent");
        if matches!(call, Call::Add(..)) {
            let to = call.to().0;
            call.pass_on(&world.bookies[&to].clone()).await;
            break to;
        }
    };
    drop((writer, pending));
    let others: Vec<u32> = (1..=3).filter(|i| *i != holder).collect();
    world.add_bookie(4).await;
    world.kill(others[0]);
    let before = world.metadata().await;
    let start = world.client.begin_recovery(&before, Epoch(2)).expect("open");
    let TxnOutcome::Done(revision) = world.store.txn(start.txn).await.expect("up") else {
        panic!("R1")
    };
    let started = before.changed(start.metadata, revision);
    // The other one refuses the write-back as well: bookie 4 must take part.
    let stubborn = MemoryBookie::new(Incarnation(999));
    let found = world.client.recover(started.clone(), start.nonce).await.expect("recovered");
    assert_eq!(found.last, Some(EntryId(0)));
    assert_eq!(world.metadata().await.value.fragments, before.value.fragments, "nothing published");
    // It dies here. With all of ens0 but the dead one asked again, the next one reaches the same end.
    world.loopback.attach(Incarnation(others[1]), Arc::new(stubborn));
    world.start(others[0]);
    let next = impatient(&world).recover_and_close(LEDGER, Epoch(3)).await.expect("cover of two");
    assert_eq!(next.last, Some(EntryId(0)));
    let metadata = world.metadata().await.value;
    let fragment = metadata.last_fragment();
    let copies =
        fragment.holders().filter(|(_, i)| world.bookies[&i.0].held(LEDGER).len() == 1).count();
    assert!(copies >= 2, "I4: {fragment:?}");
}

/// T7: an empty bookie behind an old address is a different bookie.
#[tokio::test(start_paused = true)]
async fn a_fresh_bookie_behind_an_old_address_says_neither_yes_nor_no() {
    let world = World::new(3).await;
    let writer = world.create().await;
    append(&writer, 0..3).await;
    for old in [1, 2] {
        let fresh = MemoryBookie::new(Incarnation(old + 50));
        world.loopback.attach(Incarnation(old), Arc::new(fresh));
    }
    let append = writer.append(payload("to strangers"));
    assert_eq!(append.await, Err(AppendError::NotAcknowledged));
    let guess = impatient(&world).recover_and_close(LEDGER, Epoch(2)).await;
    assert!(matches!(guess, Err(RecoveryError::Incomplete { .. })), "{guess:?}");
}

/// T8, R6: a recoverer's write-back raises no LAC, so the next one does it again.
#[tokio::test(start_paused = true)]
async fn a_recoverer_tells_no_lac_of_its_own() {
    let world = World::new(3).await;
    let (scripted, mut calls) = ScriptedBookies::new();
    let slow = world.client_with(Some(Arc::new(scripted)), |_| {});
    let writer = world.create_by(&slow, Quorum::default()).await;
    let pending: Vec<_> = (0..4).map(|i| writer.append(payload(format!("entry {i}")))).collect();
    pass(0.01).await;
    while let Ok(call) = calls.try_recv() {
        if matches!(call, Call::Add(..)) && call.to() == Incarnation(1) {
            call.pass_on(&world.bookies[&1].clone()).await;
        }
    }
    drop((writer, pending));
    let before = world.metadata().await;
    let start = world.client.begin_recovery(&before, Epoch(2)).expect("open");
    let TxnOutcome::Done(revision) = world.store.txn(start.txn).await.expect("up") else {
        panic!("R1")
    };
    let started = before.changed(start.metadata, revision);
    let found = world.client.recover(started, start.nonce).await.expect("recovered");
    assert_eq!(found.last, Some(EntryId(3)));
    let metadata = world.metadata().await.value;
    assert_eq!(
        world.client.reader(LEDGER).read_lac(&metadata).await,
        None,
        "the writer acknowledged nothing"
    );
    for i in 1..=3 {
        for (_, entry) in world.bookies[&i].held(LEDGER) {
            assert_eq!(entry.lac, None, "frozen bytes (T44)");
        }
    }
    assert_eq!(recover(&world, 3).await.expect("recovered").last, Some(EntryId(3)));
    assert_eq!(world.read_all().await, names(4));
}

/// R1: a standing nonce is replaced by a higher epoch at once, by an equal one only after patience, by a lower one never.
#[tokio::test(start_paused = true)]
async fn rivals_are_left_alone_for_a_while() {
    let world = World::new(3).await;
    let writer = world.create().await;
    append(&writer, 0..3).await;
    drop(writer);
    let before = world.metadata().await;
    let start = world.client.begin_recovery(&before, Epoch(5)).expect("open");
    world.store.txn(start.txn).await.expect("up");
    let lower = recover(&world, 4).await;
    assert!(matches!(lower, Err(RecoveryError::Superseded { by: Epoch(5), .. })), "{lower:?}");
    let began = Instant::now();
    assert!(
        timeout(Duration::from_millis(1_500), recover(&world, 0)).await.is_err(),
        "a helper waits"
    );
    let helped = recover(&world, 0).await.expect("nobody moved for 2 s");
    assert!(began.elapsed() >= Duration::from_secs(2));
    assert_eq!(helped.last, Some(EntryId(2)));
}

#[tokio::test(start_paused = true)]
async fn rival_recoverers_and_a_live_writer_agree_on_one_end() {
    for seed in 0..30 {
        let world = World::new(4).await;
        let faults = Faults {
            lose_request: 0.05,
            lose_answer: 0.05,
            repeat: 0.2,
            delay: 0.5,
            delay_max: Duration::from_millis(300),
            reorder: true,
            ..Faults::default()
        };
        let plan = FaultPlan::new(faults);
        let random = Random::from_seed(seed);
        let through = |seed: &Random| -> Arc<dyn Bookies> {
            let inner = Arc::new(world.loopback.clone());
            Arc::new(FaultyBookies::new(inner, plan.clone(), seed.fork(), world.tasks.clone()))
        };
        let client = |random: &Random| {
            world.client_with(Some(through(random)), |config| {
                config.add_timeout = Duration::from_millis(400);
                config.read_timeout = Duration::from_millis(400);
            })
        };
        let writer = world.create_by(&client(&random), Quorum::default()).await;
        let appends: Vec<_> =
            (0..40).map(|i| writer.append(payload(format!("entry {i}")))).collect();
        let (one, two) = (client(&random), client(&random));
        let first = async {
            pass(0.2).await;
            one.recover_and_close(LEDGER, Epoch(2)).await
        };
        let second = async {
            pass(0.3).await;
            two.recover_and_close(LEDGER, Epoch(3)).await
        };
        let acked = async {
            let mut acked = 0;
            for append in appends {
                acked += u64::from(append.await.is_ok());
            }
            acked
        };
        let (first, second, acked) = tokio::join!(first, second, acked);
        plan.heal();
        let ends: Vec<_> =
            [first, second].into_iter().flatten().map(|closed| closed.last).collect();
        let end = recover(&world, 9).await.expect("healed").last;
        assert!(ends.iter().all(|last| *last == end), "I2: seed {seed}: {ends:?} {end:?}");
        let kept = end.map_or(0, |last| last.0 + 1);
        assert!(kept >= acked, "I1: seed {seed}: {acked} acknowledged, {kept} kept");
        assert_eq!(world.read_all().await, names(kept), "seed {seed}");
        let metadata = world.metadata().await.value;
        assert!(matches!(metadata.state, LedgerState::Closed { .. }));
        for id in 0..kept {
            let fragment = metadata.fragment_of(EntryId(id));
            let held = |(_, i): &(_, Incarnation)| {
                world.bookies[&i.0].held(LEDGER).contains_key(&EntryId(id))
            };
            assert!(fragment.holders().filter(held).count() >= 2, "I4: seed {seed} entry {id}");
        }
        world.tasks.abort();
    }
}

/// R7: who finds the ledger closed accepts what stands, not what it would have written.
#[tokio::test(start_paused = true)]
async fn a_recoverer_that_was_overtaken_reports_the_metadata_that_stands() {
    let world = World::new(3).await;
    let writer = world.create().await;
    append(&writer, 0..3).await;
    drop(writer);
    let (scripted, mut calls) = ScriptedBookies::new();
    let slow = world.client_with(Some(Arc::new(scripted)), |config| {
        config.read_timeout = Duration::from_secs(60);
    });
    let rival = async {
        let mut held = vec![calls.recv().await.expect("R2 asks the bookies")];
        let closed = recover(&world, 9).await.expect("closed");
        world.replicate(7).await; // at once: the same end, on another bookie
        loop {
            for call in held.drain(..) {
                let bookie = world.bookies[&call.to().0].clone();
                call.pass_on(&bookie).await;
            }
            match timeout(Duration::from_secs(1), calls.recv()).await {
                Ok(Some(call)) => held.push(call),
                _ => return closed,
            }
        }
    };
    let (ours, rival) = tokio::join!(slow.recover_and_close(LEDGER, Epoch(2)), rival);
    let ours = ours.expect("accepted");
    assert_eq!((ours.last, ours.length), (rival.last, rival.length));
    assert_eq!(ours.metadata, world.metadata().await.value);
}

/// T48: two helpers, each slower than R1's 2 s, end: the later one learns to wait for the earlier.
#[tokio::test(start_paused = true)]
async fn two_slow_helpers_do_not_take_turns_for_ever() {
    let world = World::new(3).await;
    let writer = world.create().await;
    append(&writer, 0..3).await;
    drop(writer);
    let plan = FaultPlan::new(Faults {
        delay: 1.0,
        delay_max: Duration::from_secs(6),
        ..Faults::default()
    });
    let client = |seed| {
        let inner = Arc::new(world.loopback.clone());
        let random = Random::from_seed(seed);
        let faulty = FaultyBookies::new(inner, plan.clone(), random, world.tasks.clone());
        world.client_with(Some(Arc::new(faulty)), |config| {
            config.read_timeout = Duration::from_secs(60);
            config.add_timeout = Duration::from_secs(60);
            config.recovery_patience = Duration::from_secs(600);
        })
    };
    let (one, two) = (client(1), client(2));
    let (one, two) = tokio::join!(
        timeout(Duration::from_secs(120), one.recover_and_close(LEDGER, Epoch(0))),
        timeout(Duration::from_secs(120), two.recover_and_close(LEDGER, Epoch(0))),
    );
    let one = one.expect("in bounded time").expect("closed");
    let two = two.expect("in bounded time").expect("closed");
    assert_eq!((one.last, two.last), (Some(EntryId(2)), Some(EntryId(2))));
}

/// R7: what the replicator moved in an earlier fragment meanwhile stays moved; the close is built anew.
#[tokio::test(start_paused = true)]
async fn a_close_by_a_recoverer_merges_what_the_replicator_did() {
    let mut world = World::new(3).await;
    let writer = world.create().await;
    append(&writer, 0..3).await;
    world.add_bookie(4).await;
    world.bookies[&1].set_mode(AddMode::ReadOnly);
    append(&writer, 3..6).await;
    pass(1.0).await;
    append(&writer, 6..8).await;
    drop(writer);
    let before = world.metadata().await;
    assert_eq!(before.value.fragments.len(), 2);
    let start = world.client.begin_recovery(&before, Epoch(2)).expect("open");
    let TxnOutcome::Done(revision) = world.store.txn(start.txn).await.expect("up") else {
        panic!("R1")
    };
    let started = before.changed(start.metadata, revision);
    let found = world.client.recover(started, start.nonce).await.expect("recovered");
    world.replicate(9).await;
    let TxnOutcome::Conflict { found: stands, .. } =
        world.store.txn(found.txn.clone()).await.expect("up")
    else {
        panic!("the key moved")
    };
    let verdict = crate::settled_recovery(stands[0].as_ref(), &found);
    let crate::CloseVerdict::Rebuild(again) = verdict else { panic!("{verdict:?}") };
    assert_eq!(again.last, Some(EntryId(7)));
    let outcome = world.store.txn(again.txn).await.expect("up");
    assert!(matches!(outcome, TxnOutcome::Done(_)));
    let metadata = world.metadata().await.value;
    assert!(metadata.is_closed() && metadata.fragments[0].names(Incarnation(9)));
    assert_eq!(metadata.fragments[1], before.value.fragments[1]);
}
