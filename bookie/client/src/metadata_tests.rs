//! Ledger metadata keeps its shape through the store, and only legal steps are legal.

use proptest::prelude::*;

use super::*;

pub(crate) fn ledger(quorum: Quorum, fragments: &[(u64, &[u32])]) -> LedgerMetadata {
    LedgerMetadata {
        id: LedgerId(9),
        state: LedgerState::Open,
        quorum,
        fragments: fragments
            .iter()
            .map(|(first, slots)| Fragment {
                first_entry: EntryId(*first),
                nonce: Nonce([*first as u8; 16]),
                slots: slots.iter().map(|s| (*s != 0).then_some(Incarnation(*s))).collect(),
            })
            .collect(),
        owner: LedgerOwner {
            segment: SegmentId { topic: TopicId(1), segment: 2 },
            epoch: Epoch(3),
        },
    }
}

#[test]
fn decode_gives_back_what_encode_took() {
    let open = ledger(Quorum::default(), &[(0, &[1, 2, 3]), (7, &[1, 0, 4])]);
    let nonce = RecoveryNonce { epoch: Epoch(5), nonce: Nonce([7; 16]) };
    let closed = open.closed(Some(EntryId(8)), 99);
    let empty = open.closed(None, 0);
    assert_eq!(empty.fragments.len(), 1, "the first fragment stays even when there is no entry");
    let deleted = closed.deleted(Nonce([8; 16])).expect("closed");
    for value in [open.clone(), open.in_recovery(nonce), closed, empty, deleted] {
        assert_eq!(LedgerMetadata::decode(&value.encode()), Ok(value));
    }
    assert_eq!(open.deleted(Nonce([8; 16])), None, "an open ledger is recovered before it goes");
}

#[test]
fn values_against_i9_are_refused() {
    let q = Quorum::default();
    for bad in [
        ledger(q, &[]),
        ledger(q, &[(1, &[1, 2, 3])]),
        ledger(q, &[(0, &[1, 2])]),
        ledger(q, &[(0, &[1, 2, 2])]),
        ledger(q, &[(0, &[1, 0, 0])]),
        ledger(q, &[(0, &[1, 2, 3]), (5, &[1, 2, 4]), (5, &[1, 2, 5])]),
    ] {
        assert!(LedgerMetadata::decode(&bad.encode()).is_err(), "{bad:?}");
    }
}

#[test]
fn only_the_transitions_of_md4_are_legal() {
    let open = ledger(Quorum::default(), &[(0, &[1, 2, 3])]);
    let recovering = open.in_recovery(RecoveryNonce { epoch: Epoch(5), nonce: Nonce([7; 16]) });
    let closed = open.closed(Some(EntryId(8)), 99);
    let deleted = closed.deleted(Nonce([1; 16])).expect("closed");
    let other_end = open.closed(Some(EntryId(7)), 99);
    let mut one_swap = closed.clone();
    one_swap.fragments[0].slots[1] = Some(Incarnation(5));
    let mut two_swaps = one_swap.clone();
    two_swaps.fragments[0].slots[0] = Some(Incarnation(6));
    let mut two = open.clone();
    two.fragments.push(Fragment { first_entry: EntryId(4), ..open.fragments[0].clone() });
    let mut last_replaced = two.clone();
    last_replaced.fragments[1].slots[0] = Some(Incarnation(5));
    let mut final_moved = two.clone();
    final_moved.fragments[0].slots[0] = Some(Incarnation(5));
    let mut final_restarted = two.clone();
    final_restarted.fragments.remove(0);
    final_restarted.fragments[0].first_entry = EntryId(3);
    let nonce = |by| RecoveryNonce { epoch: Epoch(by), nonce: Nonce([by as u8; 16]) };
    let (two_by_1, two_by_2) = (two.in_recovery(nonce(1)), two.in_recovery(nonce(2)));
    let two_closed = two.closed(Some(EntryId(8)), 99);
    let two_cut = two.closed(Some(EntryId(3)), 9);
    let legal = [
        (&open, &two),
        (&two, &last_replaced),
        (&two, &final_moved),
        (&two_by_1, &two_by_2),
        (&two_by_1, &final_moved.in_recovery(nonce(1))),
        (&two_by_1, &two_closed),
        (&two_by_1, &last_replaced.closed(Some(EntryId(8)), 99)),
        (&two_by_1, &two_cut),
        (&open, &open),
        (&open, &recovering),
        (&open, &closed),
        (&recovering, &recovering),
        (&recovering, &closed),
        (&closed, &one_swap),
        (&closed, &deleted),
    ];
    for (from, to) in legal {
        assert!(from.may_become(to), "{from:?} -> {to:?}");
    }
    let illegal = [
        (&two, &open),
        (&two, &final_restarted),
        (&two, &last_replaced.in_recovery(nonce(1))),
        (&two_by_1, &last_replaced.in_recovery(nonce(2))),
        (&two_by_1, &final_restarted.closed(Some(EntryId(8)), 99)),
        (&two_closed, &two_cut.deleted(Nonce([1; 16])).expect("closed")),
        (&recovering, &open),
        (&closed, &open),
        (&closed, &recovering),
        (&closed, &other_end),
        (&closed, &two_swaps),
        (&open, &deleted),
        (&recovering, &deleted),
        (&deleted, &closed),
    ];
    for (from, to) in illegal {
        assert!(!from.may_become(to), "{from:?} -> {to:?}");
    }
}

proptest! {
    #[test]
    fn foreign_bytes_become_errors(bytes: Vec<u8>) {
        drop(LedgerMetadata::decode(&bytes));
    }

    #[test]
    fn an_entry_lies_in_the_last_fragment_that_starts_at_or_before_it(entry in 0u64..30) {
        let ledger = ledger(Quorum::default(), &[(0, &[1, 2, 3]), (7, &[1, 2, 4]), (20, &[1, 2, 5])]);
        let expected = if entry >= 20 { 20 } else if entry >= 7 { 7 } else { 0 };
        prop_assert_eq!(ledger.fragment_of(EntryId(entry)).first_entry, EntryId(expected));
    }
}
