//! However acks are shuffled, repeated and mixed with ensemble changes, the LAC follows the record.

use proptest::prelude::*;

use super::*;
use crate::metadata::Nonce;

fn fragment(first: u64, slots: &[u32]) -> Fragment {
    Fragment {
        first_entry: EntryId(first),
        nonce: Nonce([0; 16]),
        slots: slots.iter().map(|s| (*s != 0).then_some(Incarnation(*s))).collect(),
    }
}

fn tracker(quorum: Quorum, slots: &[u32], entries: u64) -> AckTracker {
    let mut tracker = AckTracker::new(quorum, vec![fragment(0, slots)], None);
    for _ in 0..entries {
        tracker.push();
    }
    tracker
}

fn ids(range: std::ops::Range<u64>) -> Vec<EntryId> {
    range.map(EntryId).collect()
}

proptest! {
    #[test]
    fn shuffled_acks_confirm_every_entry_once_and_in_order(
        order in Just((0u64..20).flat_map(|e| (0usize..3).map(move |s| (e, s))).collect::<Vec<_>>()).prop_shuffle(),
    ) {
        let mut tracker = tracker(Quorum::default(), &[1, 2, 3], 20);
        let mut confirmed = Vec::new();
        let mut seen: Vec<BTreeSet<usize>> = vec![BTreeSet::new(); 20];
        for (entry, slot) in order {
            confirmed.extend(tracker.on_stored(EntryId(entry), Slot(slot), Incarnation(slot as u32 + 1)));
            seen[entry as usize].insert(slot);
            let expected = seen.iter().take_while(|acks| acks.len() >= 2).count() as u64;
            prop_assert_eq!(&confirmed, &ids(0..expected));
        }
        prop_assert!(!tracker.any_short());
    }

    #[test]
    fn acks_of_replaced_incarnations_count_for_nothing(
        before in prop::collection::vec((0u64..6, 0usize..3), 0..20),
        during in prop::collection::vec((0u64..6, 0usize..3, 1u32..6), 0..20),
        after in prop::collection::vec((0u64..6, 0usize..3, 1u32..6), 0..20),
        replaced in 0usize..3,
    ) {
        let old = [1u32, 2, 3];
        let mut new = old;
        new[replaced] = 4;
        let mut tracker = tracker(Quorum::default(), &old, 6);
        let mut record: BTreeMap<u64, BTreeSet<(usize, u32)>> = BTreeMap::new();
        for (entry, slot) in before {
            tracker.on_stored(EntryId(entry), Slot(slot), Incarnation(old[slot]));
            record.entry(entry).or_default().insert((slot, old[slot]));
        }
        let start = tracker.begin_change();
        for (entry, slot, from) in during {
            prop_assert!(tracker.on_stored(EntryId(entry), Slot(slot), Incarnation(from)).is_empty(), "EC2");
            if old[slot] == from { record.entry(entry).or_default().insert((slot, from)); }
        }
        prop_assert_eq!(tracker.first_unconfirmed(), start, "the LAC stands still during a change");
        let fragments = if start == EntryId(0) { vec![fragment(0, &new)] } else { vec![fragment(0, &old), fragment(start.0, &new)] };
        tracker.finish_change(fragments);
        for (entry, slot, from) in after {
            tracker.on_stored(EntryId(entry), Slot(slot), Incarnation(from));
            if new[slot] == from { record.entry(entry).or_default().insert((slot, from)); }
        }
        let counts = |entry: u64| record.get(&entry).map_or(0, |acks| acks.iter().filter(|(slot, from)| new[*slot] == *from).count());
        let expected = (start.0..6).take_while(|entry| counts(*entry) >= 2).count() as u64;
        prop_assert_eq!(tracker.first_unconfirmed(), EntryId(start.0 + expected));
    }
}

#[test]
fn a_vacant_slot_never_acknowledges() {
    let mut tracker = tracker(Quorum::default(), &[1, 2, 0], 1);
    assert!(tracker.on_stored(EntryId(0), Slot(0), Incarnation(1)).is_empty());
    assert!(tracker.on_stored(EntryId(0), Slot(2), Incarnation(0)).is_empty());
    assert_eq!(tracker.on_stored(EntryId(0), Slot(1), Incarnation(2)), [EntryId(0)]);
    assert!(tracker.any_short(), "confirmed, and short of Qw");
}

#[test]
fn slots_outside_the_write_set_count_for_nothing() {
    let mut tracker = tracker(Quorum::new(3, 2, 2).expect("valid"), &[1, 2, 3], 1);
    tracker.on_stored(EntryId(0), Slot(0), Incarnation(1));
    assert!(tracker.on_stored(EntryId(0), Slot(2), Incarnation(3)).is_empty());
    assert_eq!(tracker.on_stored(EntryId(0), Slot(1), Incarnation(2)), [EntryId(0)]);
}

#[test]
fn after_a_stop_nothing_is_acknowledged() {
    let mut tracker = tracker(Quorum::default(), &[1, 2, 3], 1);
    tracker.on_stored(EntryId(0), Slot(0), Incarnation(1));
    tracker.stop();
    assert!(tracker.on_stored(EntryId(0), Slot(1), Incarnation(2)).is_empty());
    assert_eq!(tracker.lac(), None);
}

#[test]
fn a_fragment_is_short_until_every_slot_of_its_entries_answered() {
    let mut tracker = tracker(Quorum::default(), &[1, 2, 3], 2);
    for entry in 0..2 {
        for slot in 0..2 {
            tracker.on_stored(EntryId(entry), Slot(slot), Incarnation(slot as u32 + 1));
        }
    }
    assert!(tracker.is_short(EntryId(0), tracker.lac()));
    tracker.on_stored(EntryId(0), Slot(2), Incarnation(3));
    assert!(tracker.is_short(EntryId(0), tracker.lac()));
    tracker.on_stored(EntryId(1), Slot(2), Incarnation(3));
    assert!(!tracker.is_short(EntryId(0), tracker.lac()));
    tracker.push();
    tracker.on_stored(EntryId(2), Slot(0), Incarnation(1));
    tracker.on_stored(EntryId(2), Slot(1), Incarnation(2));
    tracker.forget(EntryId(2));
    tracker.on_stored(EntryId(2), Slot(2), Incarnation(3));
    assert!(tracker.any_short(), "forgotten is forgotten");
}
