//! Properties of the pure core, against a plain model.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const LEDGER: LedgerId = LedgerId(1);

fn facts(entry: u64, digest: u32, recovery: bool) -> AddFacts {
    AddFacts {
        ledger: LEDGER,
        entry: EntryId(entry),
        lac: entry.checked_sub(1).map(EntryId),
        digest,
        recovery,
    }
}

fn row(digest: u32) -> Row {
    Row { file: 1, position: 0, length: 100, digest }
}

#[derive(Clone, Debug)]
enum Step {
    Add { entry: u64, recovery: bool },
    Sync,
    Fence,
    SyncFence,
    Withdraw,
    Freeze,
    Thaw(bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0u64..8, any::<bool>()).prop_map(|(entry, recovery)| Step::Add { entry, recovery }),
        3 => Just(Step::Sync),
        1 => Just(Step::Fence),
        1 => Just(Step::SyncFence),
        1 => Just(Step::Withdraw),
        1 => Just(Step::Freeze),
        1 => any::<bool>().prop_map(Step::Thaw),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    /// I7 and I8 of the core: after a fence no plain add is accepted or confirmed; a synced entry is never called absent.
    #[test]
    fn a_fence_ends_plain_adds_and_nothing_synced_is_lost(steps in steps()) {
        let mut ledgers = Ledgers::default();
        let mut fenced = false;
        let mut pending: Vec<(u64, u64)> = Vec::new();
        let mut held = BTreeSet::new();
        let mut in_index = BTreeSet::new();
        let mut frozen: Option<BTreeSet<u64>> = None;
        for (ticket, step) in steps.into_iter().enumerate() {
            let ticket = ticket as u64;
            match step {
                Step::Add { entry, recovery } => {
                    let version = ledgers.version();
                    let known = in_index.contains(&entry).then(|| row(entry as u32));
                    let known = Some(Known { version, row: known, damaged: false });
                    let verdict = ledgers.accept_add(facts(entry, entry as u32, recovery), ticket, Room::Writable, known);
                    if fenced && !recovery {
                        prop_assert_eq!(verdict, AddVerdict::Fenced);
                    } else if pending.iter().any(|p| p.0 == entry) {
                        prop_assert_eq!(verdict, AddVerdict::Wait);
                    } else if held.contains(&entry) {
                        prop_assert_eq!(verdict, AddVerdict::Held);
                    } else {
                        prop_assert_eq!(verdict, AddVerdict::Accept);
                        pending.push((entry, ticket));
                    }
                }
                Step::Sync => for (entry, _) in pending.drain(..) {
                    ledgers.on_synced(LEDGER, EntryId(entry), None, row(entry as u32));
                    held.insert(entry);
                },
                Step::Withdraw => if let Some((entry, ticket)) = pending.pop() {
                    ledgers.withdraw(LEDGER, EntryId(entry), ticket);
                },
                Step::Fence => {
                    prop_assert_ne!(ledgers.accept_fence(LEDGER), FenceVerdict::Dropped);
                    fenced = true;
                }
                Step::SyncFence => if fenced {
                    ledgers.on_fence_synced(LEDGER);
                    let expected = if pending.is_empty() { FenceVerdict::Done } else { FenceVerdict::Wait };
                    prop_assert_eq!(ledgers.accept_fence(LEDGER), expected);
                },
                Step::Freeze => if frozen.is_none() {
                    let (rows, _) = ledgers.freeze();
                    frozen = Some(rows.keys().map(|key| key.1.0).collect());
                },
                Step::Thaw(done) => if let Some(rows) = frozen.take() {
                    if done {
                        in_index.extend(rows);
                        ledgers.thaw_into_index();
                    } else {
                        ledgers.thaw_back();
                    }
                },
            }
            for entry in &held {
                let in_memory = ledgers.row(LEDGER, EntryId(*entry)).is_some();
                prop_assert!(in_memory || ledgers.indexed_max(LEDGER) >= Some(EntryId(*entry)), "entry {} lost", entry);
            }
            for (entry, _) in &pending {
                prop_assert!(ledgers.has_pending(LEDGER, EntryId(*entry), EntryId(*entry)));
            }
        }
    }
}

#[test]
fn a_fenced_ledger_does_not_confirm_an_entry_that_a_recovery_add_brought() {
    let mut ledgers = Ledgers::default();
    ledgers.accept_fence(LEDGER);
    ledgers.on_fence_synced(LEDGER);
    assert_eq!(ledgers.accept_add(facts(0, 7, true), 1, Room::Writable, None), AddVerdict::Accept);
    ledgers.on_synced(LEDGER, EntryId(0), None, row(7));
    assert_eq!(
        ledgers.accept_add(facts(0, 7, false), 2, Room::Writable, None),
        AddVerdict::Fenced,
        "T52"
    );
}

#[test]
fn another_digest_is_refused_unless_the_held_copy_is_damaged() {
    let mut ledgers = Ledgers::default();
    ledgers.accept_add(facts(0, 7, false), 1, Room::Writable, None);
    assert_eq!(
        ledgers.accept_add(facts(0, 8, false), 2, Room::Writable, None),
        AddVerdict::Refused
    );
    ledgers.on_synced(LEDGER, EntryId(0), None, row(7));
    assert_eq!(
        ledgers.accept_add(facts(0, 8, false), 3, Room::Writable, None),
        AddVerdict::Inspect(row(7))
    );
    let known = |damaged| Some(Known { version: ledgers.version(), row: Some(row(7)), damaged });
    let (sound, damaged) = (known(false), known(true));
    assert_eq!(
        ledgers.accept_add(facts(0, 8, false), 4, Room::Writable, sound),
        AddVerdict::Refused
    );
    assert_eq!(
        ledgers.accept_add(facts(0, 8, false), 5, Room::Writable, damaged),
        AddVerdict::Accept
    );
}

#[test]
fn limbo_takes_no_plain_add_and_gives_no_explicit_no() {
    let mut ledgers = Ledgers::default();
    ledgers.set_limbo(Bound { generation: 0, revision: 10 });
    assert_eq!(ledgers.accept_add(facts(0, 7, false), 1, Room::Writable, None), AddVerdict::Judge);
    assert_eq!(ledgers.absent(LEDGER), AbsentVerdict::Judge);
    ledgers.judge(LEDGER, 10);
    assert_eq!(
        ledgers.accept_add(facts(0, 7, false), 1, Room::Writable, None),
        AddVerdict::ReadOnly
    );
    assert_eq!(ledgers.absent(LEDGER), AbsentVerdict::Limbo);
    assert_eq!(
        ledgers.accept_add(facts(0, 7, true), 1, Room::Writable, None),
        AddVerdict::Accept,
        "recovery adds pass"
    );
    let newer = LedgerId(2);
    ledgers.judge(newer, 11);
    assert_eq!(ledgers.absent(newer), AbsentVerdict::Absent, "created above the bound");
    assert_eq!(ledgers.absent(LedgerId(1 << 56)), AbsentVerdict::Absent, "a later generation");
    ledgers.set_limbo(Bound { generation: 0, revision: 20 });
    assert_eq!(ledgers.absent(newer), AbsentVerdict::Judge, "the bound grew");
}

#[test]
fn a_dropped_ledger_is_refused_for_ever_and_a_moved_one_stays_fenced() {
    let mut ledgers = Ledgers::default();
    ledgers.accept_add(facts(0, 7, false), 1, Room::Writable, None);
    ledgers.drop_deleted(LEDGER);
    ledgers.on_synced(LEDGER, EntryId(0), None, row(7));
    assert_eq!(ledgers.row(LEDGER, EntryId(0)), None, "a late group revives nothing");
    assert_eq!(ledgers.accept_add(facts(0, 7, true), 2, Room::Writable, None), AddVerdict::Dropped);
    assert_eq!(ledgers.accept_fence(LEDGER), FenceVerdict::Dropped);
    let moved = LedgerId(9);
    ledgers.drop_moved_away(moved);
    let add = |recovery| AddFacts { ledger: moved, ..facts(0, 7, recovery) };
    assert_eq!(ledgers.accept_add(add(false), 3, Room::Writable, None), AddVerdict::Fenced);
    assert_eq!(ledgers.accept_add(add(true), 4, Room::Writable, None), AddVerdict::Accept);
    assert_eq!(ledgers.absent(moved), AbsentVerdict::Dropped);
}

#[test]
fn a_full_disk_refuses_adds_but_not_fences() {
    let mut ledgers = Ledgers::default();
    assert_eq!(
        ledgers.accept_add(facts(0, 7, false), 1, Room::RecoveryOnly, None),
        AddVerdict::ReadOnly
    );
    assert_eq!(ledgers.accept_add(facts(0, 7, true), 1, Room::Full, None), AddVerdict::NoSpace);
    assert_eq!(ledgers.accept_fence(LEDGER), FenceVerdict::Journal);
}

#[test]
fn damage_found_in_a_copy_says_nothing_of_the_copy_that_replaced_it() {
    let mut ledgers = Ledgers::default();
    let (old, new) = (row(7), Row { file: 2, ..row(7) });
    ledgers.on_synced(LEDGER, EntryId(0), None, old);
    ledgers.note_damaged(LEDGER, EntryId(0), old);
    let add = |ticket, digest, ledgers: &mut Ledgers| {
        ledgers.accept_add(facts(0, digest, false), ticket, Room::Writable, None)
    };
    assert_eq!(add(1, 7, &mut ledgers), AddVerdict::Accept);
    ledgers.on_synced(LEDGER, EntryId(0), None, new);
    ledgers.note_damaged(LEDGER, EntryId(0), old); // a read that began before
    assert_eq!(add(2, 8, &mut ledgers), AddVerdict::Inspect(new), "T44");
    assert_eq!(add(3, 7, &mut ledgers), AddVerdict::Held);
}
