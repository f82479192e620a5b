//! Properties of the plan, against plain counting.

use geminga_bookie_client::{Fragment, LedgerOwner, RecoveryNonce};
use geminga_proto::ids::{Epoch, LedgerId, SegmentId, TopicId};
use proptest::prelude::*;

use super::*;

fn ledger(state: LedgerState, fragments: &[(u64, &[u32])], quorum: Quorum) -> LedgerMetadata {
    let fragment = |(first, slots): &(u64, &[u32])| Fragment {
        first_entry: EntryId(*first),
        nonce: Nonce([*first as u8; 16]),
        slots: slots.iter().map(|i| (*i > 0).then_some(Incarnation(*i))).collect(),
    };
    LedgerMetadata {
        id: LedgerId(1),
        state,
        quorum,
        fragments: fragments.iter().map(fragment).collect(),
        owner: LedgerOwner {
            segment: SegmentId { topic: TopicId(1), segment: 0 },
            epoch: Epoch(1),
        },
    }
}

fn closed(last: i64) -> LedgerState {
    let last = u64::try_from(last).ok().map(EntryId);
    LedgerState::Closed { last, length: 0 }
}

const TWO: &[(u64, &[u32])] = &[(0, &[1, 2, 3]), (5, &[1, 4, 0])];

#[test]
fn the_last_fragment_of_a_ledger_that_is_not_closed_is_not_touched() {
    let quorum = Quorum::default();
    let recovery = RecoveryNonce { epoch: Epoch(0), nonce: Nonce([1; 16]) };
    for state in [LedgerState::Open, LedgerState::InRecovery(recovery)] {
        let metadata = ledger(state, TWO, quorum);
        let finals = parts(&metadata);
        assert_eq!(finals.iter().map(|p| (p.first.0, p.end.0)).collect::<Vec<_>>(), [(0, 5)]);
        let plan = plan(quorum, &finals, &Lists::new(), &BTreeSet::new());
        assert_eq!((plan.tasks.len(), plan.unknown), (0, 3), "the vacant slot is the writer's");
    }
    let finals = parts(&ledger(closed(7), TWO, quorum));
    assert_eq!(finals.iter().map(|p| (p.first.0, p.end.0)).collect::<Vec<_>>(), [(0, 5), (5, 8)]);
}

#[test]
fn a_slot_of_an_empty_ledger_is_replaced_like_any_other() {
    let quorum = Quorum::default();
    let finals = parts(&ledger(closed(-1), &[(0, &[1, 2, 0])], quorum));
    let empty = Some(EntrySet::default());
    let lists = (0..2).map(|slot| ((0, slot), empty.clone())).collect();
    let plan = plan(quorum, &finals, &lists, &BTreeSet::from([Incarnation(2)]));
    let slots: Vec<_> = plan.tasks.iter().map(|task| (task.slot.0, task.replace)).collect();
    assert_eq!(slots, [(1, true), (2, true)], "A4, T15");
}

#[test]
fn a_slot_is_swapped_only_while_it_holds_what_was_read() {
    let quorum = Quorum::default();
    let metadata = ledger(closed(7), TWO, quorum);
    let finals = parts(&metadata);
    let task = Task { part: 0, slot: Slot(1), holder: Some(Incarnation(2)), replace: true };
    let new = Incarnation(9);
    let next = swapped(&metadata, &finals[0], task, new).expect("as read");
    assert_eq!(next.fragments[0].holder(Slot(1)), Some(new));
    assert_eq!(swapped(&next, &finals[0], task, Incarnation(8)), None, "somebody was faster");
    assert_eq!(swapped(&metadata, &finals[0], task, Incarnation(3)), None, "in the fragment (I9)");
    let open = ledger(LedgerState::Open, &TWO[..1], quorum);
    assert_eq!(swapped(&open, &finals[0], task, new), None, "the last fragment of an open ledger");
    let mut other = metadata.clone();
    other.fragments[0].nonce = Nonce([77; 16]);
    assert_eq!(swapped(&other, &finals[0], task, new), None, "another fragment in its place");
    let deleted = metadata.deleted(Nonce([1; 16])).expect("closed");
    assert_eq!(swapped(&deleted, &finals[0], task, new), None);
}

proptest! {
    /// Complete exactly if every slot is held by somebody not condemned who showed each of its entries.
    #[test]
    fn a_plan_is_complete_exactly_if_every_copy_was_shown(
        (e, w) in (1usize..5).prop_flat_map(|e| (Just(e), 1..=e)),
        last in -1i64..12,
        held in prop::collection::vec(prop::option::weighted(0.9, prop::collection::btree_set(0u64..12, 9..12)), 4),
        vacant: bool,
        condemned in prop::collection::btree_set(1u32..9, 0..2),
    ) {
        let quorum = Quorum::new(e, w, 1).expect("in order");
        let mut slots: Vec<u32> = (1..=e as u32).collect();
        if vacant && w > 1 { slots[0] = 0; }
        let metadata = ledger(closed(last), &[(0, &slots)], quorum);
        let finals = parts(&metadata);
        let lists: Lists = (0..e).map(|slot| {
            let shown = held[slot].as_ref().map(|h| h.iter().map(|id| EntryId(*id)).collect());
            ((0, slot), shown)
        }).collect();
        let condemned: BTreeSet<_> = condemned.into_iter().map(Incarnation).collect();
        let plan = plan(quorum, &finals, &lists, &condemned);
        let whole = |slot: usize| slots[slot] > 0
            && !condemned.contains(&Incarnation(slots[slot]))
            && held[slot].as_ref().is_some_and(|held| (0..=last).all(|id| {
                let ours = quorum.write_set(EntryId(id as u64)).any(|s| s.0 == slot);
                !ours || held.contains(&(id as u64))
            }));
        prop_assert_eq!(plan.is_complete(), (0..e).all(whole));
        for task in &plan.tasks {
            for entry in finals[0].assigned(quorum, task.slot) {
                for source in sources(quorum, (0, &finals[0]), &lists, entry) {
                    let slot = source.0 as usize - 1;
                    prop_assert!(held[slot].as_ref().is_some_and(|h| h.contains(&entry.0)));
                }
            }
        }
    }
}

#[test]
fn a_holder_that_leaves_gives_its_own_copy_when_nobody_else_has_one() {
    let quorum = Quorum::new(1, 1, 1).expect("in order");
    let metadata = ledger(closed(0), &[(0, &[7])], quorum);
    let finals = parts(&metadata);
    let shown = [EntryId(0)].into_iter().collect();
    let lists: Lists = [((0, 0), Some(shown))].into();
    let plan = plan(quorum, &finals, &lists, &BTreeSet::from([Incarnation(7)]));
    assert!(plan.tasks.iter().all(|task| task.replace) && plan.tasks.len() == 1);
    assert_eq!(sources(quorum, (0, &finals[0]), &lists, EntryId(0)), [Incarnation(7)]);
}
