//! When a drain may start, and how far it is (DC1). Pure.

use std::collections::BTreeSet;

use geminga_bookie_client::metadata::{LedgerMetadata, LedgerState};
use geminga_proto::{ids::Incarnation, storage::v1 as wire};

use super::{
    WAITS,
    view::{View, Wish},
};

/// What still names a bookie, as a full scan found it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Left {
    pub(crate) ledgers: u64,
    /// Of them not Closed: their writers have to move off, or their owners to close them (A3).
    pub(crate) open: u64,
    /// Payload bytes, from the lengths of Closed ledgers.
    pub(crate) bytes: u64,
    /// The widest ensemble among them.
    pub(crate) ensemble: usize,
}

impl Left {
    /// Adds a ledger, if it names the incarnation and is not Deleted.
    pub(crate) fn take(&mut self, metadata: &LedgerMetadata, incarnation: Incarnation) {
        let named: Vec<_> = (0..metadata.fragments.len())
            .filter(|at| metadata.fragments[*at].names(incarnation))
            .collect();
        if named.is_empty() || matches!(metadata.state, LedgerState::Deleted { .. }) {
            return;
        }
        self.ledgers += 1;
        self.ensemble = self.ensemble.max(metadata.quorum.ensemble());
        let LedgerState::Closed { last, length } = metadata.state else {
            self.open += 1;
            return;
        };
        let entries = last.map_or(0, |last| last.0 + 1);
        let held: u64 = named
            .into_iter()
            .map(|at| {
                let first = metadata.fragments[at].first_entry.0.min(entries);
                let end = metadata.fragments.get(at + 1).map_or(entries, |next| next.first_entry.0);
                end.min(entries) - first
            })
            .sum();
        let (write, ensemble) =
            (metadata.quorum.write() as u128, metadata.quorum.ensemble() as u128);
        let share = u128::from(length) * u128::from(held) * write / ensemble;
        self.bytes += (share / u128::from(entries.max(1))) as u64;
    }
}

/// Why this drain may not go on now; none if it may. The oldest wish goes first, alone.
pub(crate) fn refusal(view: &View, wish: &Wish, ensemble: usize) -> Option<String> {
    let Some(going) = view.cookies.get(&wish.bookie).map(|cookie| cookie.incarnation) else {
        return Some(format!("{WAITS}there is no cookie of bookie {}", wish.bookie));
    };
    if let Some(first) = view.wishes.first().filter(|first| first.bookie != wish.bookie) {
        return Some(format!("{WAITS}bookie {} is drained first", first.bookie));
    }
    // Who waits for its own drain still serves, whatever it registered before it heard of that.
    let waiting: BTreeSet<Incarnation> =
        view.wishes.iter().filter_map(|w| Some(view.cookies.get(&w.bookie)?.incarnation)).collect();
    let stays = |incarnation: &Incarnation| {
        let found = view.registered.get(incarnation);
        *incarnation != going
            && found.is_some_and(|found| {
                found.available.writable
                    && (!found.available.draining || waiting.contains(incarnation))
            })
    };
    let left: Vec<_> = view.registered.keys().filter(|incarnation| stays(incarnation)).collect();
    if left.len() < ensemble {
        let left = left.len();
        return Some(format!("{WAITS}{left} bookies would stay writable, ledgers need {ensemble}"));
    }
    let zone = |incarnation: &Incarnation| {
        view.registered.get(incarnation).map(|r| r.zone.as_str()).filter(|zone| !zone.is_empty())
    };
    let zones: BTreeSet<&str> = left.iter().filter_map(|incarnation| zone(incarnation)).collect();
    match zone(&going) {
        Some(last) if !zones.contains(last) && zones.len() < ensemble => {
            Some(format!("{WAITS}zone {last} would have no writable bookie left"))
        }
        _ => None,
    }
}

/// The wish with the progress that a scan found.
pub(crate) fn progress(wish: &wire::Draining, left: Left) -> wire::Draining {
    let all_open = left.ledgers > 0 && left.open == left.ledgers;
    let blocked = if all_open {
        format!("{} ledgers are open: their writers have to move off", left.open)
    } else {
        String::new()
    };
    wire::Draining {
        format: 1,
        bytes_total: wish.bytes_total.max(left.bytes),
        bytes_left: left.bytes,
        ledgers_left: left.ledgers,
        blocked,
        ..wish.clone()
    }
}

#[cfg(test)]
mod tests {
    use geminga_bookie_client::{Fragment, LedgerOwner, Nonce, Quorum, ensemble::Available};
    use geminga_metadata::Revision;
    use geminga_proto::ids::{EntryId, Epoch, LedgerId, SegmentId, TopicId};

    use super::*;
    use crate::auto_recovery::view::{Known, Registered};

    fn view(zones: &[&str], wishes: &[u32]) -> View {
        let mut view = View::default();
        for (at, zone) in zones.iter().enumerate() {
            let number = at as u32 + 1;
            let incarnation = Incarnation(number);
            let available = wire::Available {
                format: 1,
                incarnation: number,
                writable: true,
                draining: wishes.contains(&number),
                ..Default::default()
            };
            let item = geminga_metadata::KeyValue {
                key: geminga_metadata::keys::available("b"),
                value: prost::Message::encode_to_vec(&available).into(),
                create_revision: Revision(1),
                mod_revision: Revision(1),
                lease: None,
            };
            let available = Available::from_key_value(&item).expect("valid");
            view.registered.insert(incarnation, Registered { available, zone: (*zone).to_owned() });
            let known = Known { incarnation, revoked: Vec::new(), revision: Revision(1) };
            view.cookies.insert(format!("b{number}"), known);
        }
        for number in wishes {
            view.wishes.push(Wish {
                bookie: format!("b{number}"),
                value: wire::Draining::default(),
                revision: Revision(1),
            });
        }
        view
    }

    fn refused(view: &View, at: usize) -> String {
        refusal(view, &view.wishes[at], 3).unwrap_or_default()
    }

    #[test]
    fn a_drain_must_leave_as_many_writable_bookies_as_ledgers_are_wide() {
        assert!(refused(&view(&["", "", ""], &[1]), 0).contains("2 bookies would stay"));
        assert_eq!(refused(&view(&["", "", "", ""], &[1]), 0), "");
        let mut short = view(&["", "", "", ""], &[1]);
        short.registered.remove(&Incarnation(2));
        assert!(refused(&short, 0).starts_with(WAITS));
    }

    #[test]
    fn one_bookie_at_a_time_and_who_waits_counts_as_there() {
        let two = view(&["", "", "", ""], &[2, 1]);
        assert_eq!(refused(&two, 0), "");
        assert!(refused(&two, 1).contains("bookie b2 is drained first"));
    }

    #[test]
    fn a_zone_is_not_emptied_while_ledgers_need_it() {
        assert!(refused(&view(&["a", "b", "c", "c"], &[1]), 0).contains("zone a"));
        assert_eq!(refused(&view(&["a", "b", "c", "c"], &[3]), 0), "");
        assert_eq!(refused(&view(&["a", "b", "c", "d"], &[1]), 0), "", "three zones are left");
    }

    #[test]
    fn what_is_left_counts_the_share_of_closed_ledgers_and_the_open_ones() {
        let fragment = |first, slots: [u32; 3]| Fragment {
            first_entry: EntryId(first),
            nonce: Nonce([0; 16]),
            slots: slots.map(|i| Some(Incarnation(i))).to_vec(),
        };
        let mut metadata = LedgerMetadata {
            id: LedgerId(1),
            state: LedgerState::Closed { last: Some(EntryId(9)), length: 1_000 },
            quorum: Quorum::default(),
            fragments: vec![fragment(0, [1, 2, 3]), fragment(6, [1, 2, 4])],
            owner: LedgerOwner {
                segment: SegmentId { topic: TopicId(1), segment: 0 },
                epoch: Epoch(1),
            },
        };
        let mut left = Left::default();
        left.take(&metadata, Incarnation(4));
        assert_eq!(left, Left { ledgers: 1, open: 0, bytes: 400, ensemble: 3 });
        left.take(&metadata, Incarnation(5));
        metadata.state = LedgerState::Deleted { nonce: Nonce([0; 16]) };
        left.take(&metadata, Incarnation(1));
        assert_eq!(left.ledgers, 1, "neither who is not named nor the deleted");
        metadata.state = LedgerState::Open;
        left.take(&metadata, Incarnation(1));
        assert_eq!((left.ledgers, left.open, left.bytes), (2, 1, 400));
    }
}
