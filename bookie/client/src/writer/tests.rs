//! A writer over memory bookies: the public path, and what single failures do to it.

use std::time::Duration;

use geminga_metadata::TxnOutcome;
use geminga_proto::ids::{Epoch, Incarnation};
use tokio::time::{Instant, timeout};

use super::*;
use crate::{
    Quorum,
    bookie_rpc::memory::AddMode,
    metadata::LedgerState,
    settle::{CloseVerdict, settled_close},
    testing::{LEDGER, World, append, names, pass, payload},
};

/// Seals and lands the close.
async fn close(world: &World, writer: &LedgerWriter) -> Sealed {
    let sealed = writer.seal().await.expect("ours");
    let outcome = world.store.txn(sealed.txn.clone()).await.expect("the store answers");
    assert!(matches!(outcome, TxnOutcome::Done(_)));
    sealed
}

#[tokio::test(start_paused = true)]
async fn what_is_appended_is_read_back_after_the_close() {
    let world = World::new(3).await;
    let writer = world.create().await;
    append(&writer, 0..10).await;
    let sealed = close(&world, &writer).await;
    assert_eq!((sealed.last, sealed.length), (Some(EntryId(9)), 70));
    assert!(matches!(world.metadata().await.value.state, LedgerState::Closed { .. }));
    assert_eq!(world.read_all().await, names(10));
    assert!(!world.is_listed().await, "every slot has every entry");
    assert_eq!(writer.append(payload("late")).await, Err(AppendError::Ended));
}

#[tokio::test(start_paused = true)]
async fn an_empty_ledger_closes_empty() {
    let world = World::new(3).await;
    let writer = world.create().await;
    assert_eq!(close(&world, &writer).await.last, None);
    assert_eq!(world.read_all().await, names(0));
}

/// T42, EC7.
#[tokio::test(start_paused = true)]
async fn one_of_three_bookies_gone_for_ever_interrupts_nothing() {
    let world = World::new(3).await;
    let writer = world.create().await;
    append(&writer, 0..5).await;
    world.kill(2);
    world.unregister(2).await;
    let start = Instant::now();
    append(&writer, 5..50).await;
    assert_eq!(Instant::now(), start, "nobody waited for anything");
    pass(40.0).await; // past 30 s: the slot is given up
    append(&writer, 50..60).await;
    assert!(world.is_listed().await);
    assert_eq!(writer.held_bytes(), 0, "overdue adds are given up (W5)");
    assert_eq!(world.metadata().await.value.fragments.len(), 1, "no metadata write (T43)");
    close(&world, &writer).await;
    assert_eq!(world.read_all().await, names(60));
}

/// EC3, EC5.
#[tokio::test(start_paused = true)]
async fn one_of_three_gone_and_a_fourth_writable_costs_one_ensemble_change() {
    let mut world = World::new(3).await;
    let writer = world.create().await;
    append(&writer, 0..5).await;
    world.add_bookie(4).await;
    world.kill(2);
    world.unregister(2).await;
    append(&writer, 5..10).await;
    pass(35.0).await;
    append(&writer, 10..20).await;
    pass(1.0).await;
    let fragments = world.metadata().await.value.fragments;
    assert_eq!(fragments.len(), 2);
    assert_eq!(fragments[1].first_entry, EntryId(10));
    assert!(fragments[1].names(Incarnation(4)) && !fragments[1].names(Incarnation(2)));
    assert!(world.is_listed().await, "entries 5..10 of the ended fragment have two copies");
    assert_eq!(world.copies(15), 3);
    close(&world, &writer).await;
    assert_eq!(world.read_all().await, names(20));
}

/// T43, EC1.
#[tokio::test(start_paused = true)]
async fn a_bookie_restart_costs_no_metadata_write() {
    let mut world = World::new(3).await;
    world.add_bookie(4).await;
    let writer = world.create().await;
    append(&writer, 0..5).await;
    let held = writer.metadata().value.last_fragment().slots[0].expect("not vacant").0;
    world.kill(held);
    append(&writer, 5..10).await;
    pass(10.0).await;
    world.start(held);
    pass(5.0).await;
    assert_eq!(world.metadata().await.value.fragments.len(), 1);
    assert_eq!(world.bookies[&held].held(LEDGER).len(), 10, "what waited was sent again");
    assert_eq!(writer.held_bytes(), 0);
    close(&world, &writer).await;
    assert!(!world.is_listed().await);
}

#[tokio::test(start_paused = true)]
async fn a_read_only_bookie_is_replaced_at_once() {
    for mode in [AddMode::ReadOnly, AddMode::NoSpace] {
        let mut world = World::new(3).await;
        let writer = world.create().await;
        world.add_bookie(4).await;
        append(&writer, 0..2).await;
        world.bookies[&1].set_mode(mode);
        append(&writer, 2..10).await;
        pass(0.1).await;
        let fragments = world.metadata().await.value.fragments;
        assert_eq!(fragments.len(), 2);
        assert!(fragments[1].names(Incarnation(4)) && !fragments[1].names(Incarnation(1)));
        close(&world, &writer).await;
        assert_eq!(world.read_all().await, names(10));
    }
}

/// W0, EC1.
#[tokio::test(start_paused = true)]
async fn a_vacant_slot_is_filled_when_a_bookie_comes() {
    let mut world = World::new(2).await;
    let writer = world.create().await;
    append(&writer, 0..3).await;
    assert!(writer.metadata().value.has_vacancy());
    world.add_bookie(3).await;
    pass(5.0).await;
    let metadata = world.metadata().await.value;
    assert!(!metadata.last_fragment().has_vacancy());
    assert_eq!(metadata.fragments[1].first_entry, EntryId(3));
    append(&writer, 3..6).await;
    assert_eq!(world.copies(4), 3);
    assert!(world.is_listed().await, "the ended fragment has a vacant slot");
}

#[tokio::test(start_paused = true)]
async fn with_every_copy_on_one_bookie_the_level_is_one_copy() {
    let world = World::new(1).await;
    let one = Quorum::new(1, 1, 1).expect("valid");
    let writer = world.create_by(&world.client, one).await;
    append(&writer, 0..5).await;
    close(&world, &writer).await;
    assert_eq!(world.read_all().await, names(5));
}

/// W6, W7.
#[tokio::test(start_paused = true)]
async fn a_fenced_writer_acknowledges_nothing_more() {
    let world = World::new(3).await;
    let writer = world.create().await;
    append(&writer, 0..3).await;
    world.client.recover_and_close(LEDGER, Epoch(2)).await.expect("recovered");
    assert_eq!(writer.append(payload("late")).await, Err(AppendError::Indeterminate));
    assert_eq!(writer.poisoned().await, Poison::Fenced);
    assert_eq!(writer.append(payload("later")).await, Err(AppendError::Ended));
    assert_eq!(writer.seal().await.map(|_| ()), Err(SealError::Fenced));
    assert_eq!(world.read_all().await, names(3));
}

/// EC7, M2.
#[tokio::test(start_paused = true)]
async fn two_of_three_gone_is_a_write_failure_and_the_ledger_closes_at_its_lac() {
    let world = World::new(3).await;
    let writer = world.create().await;
    append(&writer, 0..3).await;
    world.kill(1);
    world.kill(2);
    let lost = writer.append(payload("lost"));
    assert_eq!(lost.await, Err(AppendError::NotAcknowledged));
    assert_eq!(writer.poisoned().await, Poison::WriteFailure);
    let sealed = close(&world, &writer).await;
    assert_eq!(sealed.last, Some(EntryId(2)));
    assert_eq!(world.copies(3), 1, "the bookie that lives has the lost entry");
    world.start(1);
    assert_eq!(world.read_all().await, names(3), "RD1: and nobody reads it");
}

#[tokio::test(start_paused = true)]
async fn two_of_three_restarting_is_waited_for() {
    let world = World::new(3).await;
    let writer = world.create().await;
    world.kill(1);
    world.kill(2);
    let pending = writer.append(payload("entry 0"));
    pass(3.0).await;
    world.start(1);
    assert_eq!(pending.await, Ok(EntryId(0)));
    assert_eq!(writer.poison(), None);
}

/// W5, T20.
#[tokio::test(start_paused = true)]
async fn memory_is_held_until_the_third_bookie_answers_and_then_the_writer_waits() {
    let world = World::new(3).await;
    let client = world.client_with(None, |config| config.writer_bytes_max = 4_000);
    let writer = world.create_by(&client, Quorum::default()).await;
    world.kill(3);
    let bytes = 1_000 - ENTRY_HEADER_BYTES;
    let body = || payload("x".repeat(bytes));
    assert_eq!(writer.append(body()).await, Ok(EntryId(0)));
    assert_eq!(writer.held_bytes(), 1_000, "acknowledged, and still owed to one slot");
    // Half of the budget used: the slot is given up, with nobody to replace it (EC1, EC7).
    assert_eq!(writer.append(body()).await, Ok(EntryId(1)));
    pass(0.1).await;
    assert_eq!(writer.held_bytes(), 0);
    assert!(world.is_listed().await);
    // All slots silent: the writer takes its limit and no more.
    world.kill(1);
    let kept: Vec<_> = (0..4).map(|_| writer.append(body())).collect();
    assert_eq!(writer.append(body()).await, Err(AppendError::Full));
    assert!(timeout(Duration::from_secs(1), writer.ready(bytes)).await.is_err());
    world.start(1);
    timeout(Duration::from_secs(5), writer.ready(bytes)).await.expect("room again");
    for append in kept {
        assert!(append.await.is_ok());
    }
}

/// W3.
#[tokio::test(start_paused = true)]
async fn an_idle_writer_tells_its_lac_within_100_ms() {
    let world = World::new(3).await;
    let writer = world.create().await;
    append(&writer, 0..3).await;
    pass(0.1).await;
    let metadata = world.metadata().await.value;
    assert_eq!(world.client.reader(LEDGER).read_lac(&metadata).await, Some(EntryId(2)));
}

/// Section 6, MD3.
#[tokio::test(start_paused = true)]
async fn conflicts_of_a_close_are_judged_by_what_stands() {
    let world = World::new(3).await;
    let writer = world.create().await;
    append(&writer, 0..3).await;
    let sealed = close(&world, &writer).await;
    let again = world.store.txn(sealed.txn.clone()).await.expect("the store answers");
    let TxnOutcome::Conflict { found, .. } = again else { panic!("its own success broke it") };
    assert!(matches!(settled_close(found[0].as_ref(), &sealed), CloseVerdict::Ours));
    let with = |change: &dyn Fn(&mut LedgerMetadata)| {
        let mut found = found[0].clone().expect("there");
        let mut metadata = LedgerMetadata::decode(&found.value).expect("valid");
        change(&mut metadata);
        found.value = metadata.encode();
        settled_close(Some(&found), &sealed)
    };
    let same = with(&|m| m.fragments[0].slots[0] = Some(Incarnation(9)));
    assert!(matches!(same, CloseVerdict::SameEnd));
    let other = with(&|m| m.state = LedgerState::Closed { last: Some(EntryId(1)), length: 1 });
    assert!(matches!(other, CloseVerdict::Lost));
    let open = with(&|m| m.state = LedgerState::Open);
    let CloseVerdict::Rebuild(rebuilt) = open else { panic!("nothing but the revision moved") };
    assert_eq!(rebuilt.closed, sealed.closed);
    let foreign = with(&|m| {
        m.state = LedgerState::Open;
        m.fragments[0].slots[0] = Some(Incarnation(9));
    });
    assert!(matches!(foreign, CloseVerdict::Lost), "the last fragment is somebody else's");
    assert!(matches!(settled_close(None, &sealed), CloseVerdict::Lost));
}

#[tokio::test(start_paused = true)]
async fn killing_the_client_leaves_appends_indeterminate() {
    let world = World::new(3).await;
    let writer = world.create().await;
    world.kill(1);
    world.kill(2);
    let pending = writer.append(payload("x"));
    pass(0.1).await;
    world.tasks.abort();
    assert_eq!(pending.await, Err(AppendError::Indeterminate));
    assert_eq!(writer.seal().await.map(|_| ()), Err(SealError::Ended));
}

/// A writer that waits for its seal after a write failure ends when the process stops.
#[tokio::test(start_paused = true)]
async fn a_stop_after_a_write_failure_ends_the_writer() {
    let world = World::new(3).await;
    let writer = world.create().await;
    world.kill(1);
    world.kill(2);
    assert_eq!(writer.append(payload("x")).await, Err(AppendError::NotAcknowledged));
    assert_eq!(writer.poisoned().await, Poison::WriteFailure);
    world.tasks.token().cancel();
    world.tasks.idle().await;
    assert_eq!(writer.seal().await.map(|_| ()), Err(SealError::Ended));
}

/// Section 6, I5: there is no moment when a short Closed ledger is unlisted.
#[tokio::test(start_paused = true)]
async fn a_close_with_fewer_than_qw_copies_lists_the_ledger_in_its_own_transaction() {
    let world = World::new(3).await;
    let writer = world.create().await;
    append(&writer, 0..3).await;
    world.kill(2);
    append(&writer, 3..5).await;
    assert!(!world.is_listed().await, "Qa < Qw is a window");
    let sealed = writer.seal().await.expect("ours");
    let listing = geminga_metadata::keys::under_replicated(LEDGER);
    let listed = sealed.txn.changes.iter().filter(|op| *op.key() == listing).count();
    assert_eq!((sealed.last, listed), (Some(EntryId(4)), 1));
    let unheard = settled_close(None, &sealed);
    assert!(matches!(unheard, CloseVerdict::Lost));
    let open = world.metadata().await;
    let found = geminga_metadata::KeyValue {
        key: geminga_metadata::keys::ledger(LEDGER),
        value: open.value.encode(),
        create_revision: open.create_revision,
        mod_revision: open.mod_revision,
        lease: None,
    };
    let CloseVerdict::Rebuild(again) = settled_close(Some(&found), &sealed) else {
        panic!("nothing moved")
    };
    assert_eq!(again.txn, sealed.txn, "a rebuilt close lists as well");
}

/// EC4: a replicator that moved a copy of an earlier fragment is no rival: the change and the close keep what it did.
#[tokio::test(start_paused = true)]
async fn changes_and_closes_merge_what_the_replicator_did() {
    let mut world = World::new(3).await;
    let writer = world.create().await;
    append(&writer, 0..3).await;
    world.add_bookie(4).await;
    world.bookies[&1].set_mode(AddMode::ReadOnly);
    append(&writer, 3..6).await;
    pass(1.0).await;
    world.replicate(8).await;
    world.add_bookie(5).await;
    world.bookies[&2].set_mode(AddMode::ReadOnly);
    append(&writer, 6..9).await;
    pass(1.0).await;
    let metadata = world.metadata().await.value;
    assert_eq!(metadata.fragments.len(), 3);
    assert!(metadata.fragments[0].names(Incarnation(8)));
    assert!(metadata.fragments[2].names(Incarnation(5)));
    world.replicate(9).await;
    let sealed = writer.seal().await.expect("ours");
    let outcome = world.store.txn(sealed.txn.clone()).await.expect("up");
    let TxnOutcome::Conflict { found, .. } = outcome else { panic!("the key moved") };
    let CloseVerdict::Rebuild(again) = settled_close(found[0].as_ref(), &sealed) else {
        panic!("nothing but an earlier fragment moved")
    };
    assert!(matches!(world.store.txn(again.txn).await.expect("up"), TxnOutcome::Done(_)));
    let metadata = world.metadata().await.value;
    assert_eq!(metadata.last(), Some(EntryId(8)));
    assert!(metadata.fragments[0].names(Incarnation(9)));
}

/// EC4: a last fragment that is not one's own ends the writer, although the ledger is Open.
#[tokio::test(start_paused = true)]
async fn a_foreign_last_fragment_poisons_the_writer() {
    let mut world = World::new(3).await;
    let writer = world.create().await;
    append(&writer, 0..3).await;
    world.replicate(8).await; // there is only the last one: nobody else may touch it (A3)
    world.add_bookie(4).await;
    world.bookies[&2].set_mode(AddMode::ReadOnly);
    drop(writer.append(payload("x")));
    assert_eq!(writer.poisoned().await, Poison::Fenced);
}

/// O3: on a provisional claim appends go on; no ledger is created, no close is started, and nothing is stopped for one.
#[tokio::test(start_paused = true)]
async fn on_a_provisional_claim_appends_go_on_and_closes_and_creations_wait() {
    let world = World::new(3).await;
    let (setter, standing) = geminga_metadata::Standing::new();
    let client = world.client_standing(standing);
    let writer = world.create_by(&client, Quorum::default()).await;
    append(&writer, 0..5).await;
    setter.set(false);
    let before = world.metadata().await.mod_revision;
    let planned = client.plan_create(LEDGER, Quorum::default(), crate::testing::owner()).await;
    assert!(
        matches!(
            planned,
            Err(crate::EnsembleError::Store(geminga_metadata::StoreError::Unavailable(_)))
        ),
        "{planned:?}"
    );
    let hour = Duration::from_secs(3_600);
    assert!(timeout(hour, writer.seal()).await.is_err(), "waits for the store");
    world.kill(1);
    append(&writer, 5..20).await;
    pass(60.0).await; // past 30 s: the slot is given up, and nothing says so yet
    append(&writer, 20..30).await;
    assert!(!world.is_listed().await);
    assert_eq!(world.metadata().await.mod_revision, before);
    setter.set(true);
    pass(1.0).await;
    assert!(world.is_listed().await, "EC7: it follows");
    assert_eq!(close(&world, &writer).await.last, Some(EntryId(29)));
}

/// A writer that was fenced closes nothing: whoever asks for it is not kept waiting for the store.
#[tokio::test(start_paused = true)]
async fn a_fenced_writer_on_a_provisional_claim_says_so_at_once() {
    let world = World::new(3).await;
    let (setter, standing) = geminga_metadata::Standing::new();
    let client = world.client_standing(standing);
    let writer = world.create_by(&client, Quorum::default()).await;
    setter.set(false);
    let sealing = writer.clone();
    let sealed = world.tasks.spawn_returning("seal", async move { sealing.seal().await });
    let rival = world.client_with(None, |_| {});
    rival.recover_and_close(LEDGER, Epoch(2)).await.expect("recovers");
    assert!(writer.append(payload("late")).await.is_err());
    assert!(matches!(sealed.await.expect("no panic"), Err(SealError::Fenced)));
}

/// Its caller's thread may be kept waiting in between.
#[tokio::test(start_paused = true)]
async fn an_append_that_was_answered_before_anybody_looked_was_not_refused() {
    let world = World::new(3).await;
    let writer = world.create().await;
    let early = writer.append(payload("early"));
    append(&writer, 1..2).await; // answered after it
    assert_eq!(early.refused(), None);
    assert_eq!(early.await, Ok(EntryId(0)));
    close(&world, &writer).await;
    let late = writer.append(payload("late"));
    assert_eq!(late.refused(), Some(AppendError::Ended));
}
