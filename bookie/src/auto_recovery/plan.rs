//! What a ledger lacks (A2-A4): which slots need another holder, and which holders lack entries. Pure.

use std::collections::{BTreeMap, BTreeSet};

use geminga_bookie_client::{
    Quorum,
    bookie_rpc::EntrySet,
    metadata::{Holder, LedgerMetadata, LedgerState, Nonce},
};
use geminga_proto::ids::{EntryId, Incarnation, Slot};

/// A fragment that is final: nobody but the replicator changes it any more (A3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) first: EntryId,
    /// The entry after its last one.
    pub(crate) end: EntryId,
    pub(crate) nonce: Nonce,
    pub(crate) slots: Vec<Holder>,
}

/// The final fragments: all of a Closed ledger, all but the last of one that is not (A3).
pub(crate) fn parts(metadata: &LedgerMetadata) -> Vec<Part> {
    let count = metadata.fragments.len();
    let finals = match metadata.state {
        LedgerState::Closed { .. } => count,
        LedgerState::Open | LedgerState::InRecovery(_) => count.saturating_sub(1),
        LedgerState::Deleted { .. } => 0,
    };
    let end = metadata.last().map_or(EntryId(0), EntryId::next);
    let part = |at: usize| {
        let fragment = &metadata.fragments[at];
        let end = metadata.fragments.get(at + 1).map_or(end, |next| next.first_entry);
        Part {
            first: fragment.first_entry,
            end: end.max(fragment.first_entry),
            nonce: fragment.nonce,
            slots: fragment.slots.clone(),
        }
    };
    (0..finals).map(part).collect()
}

impl Part {
    /// The entries that belong to a slot, ascending.
    pub(crate) fn assigned(&self, quorum: Quorum, slot: Slot) -> impl Iterator<Item = EntryId> {
        (self.first.0..self.end.0).map(EntryId).filter(move |e| quorum.position(*e, slot).is_some())
    }
}

/// What LIST showed, by part and slot; none where the holder gave no answer that counts.
pub(crate) type Lists = BTreeMap<(usize, usize), Option<EntrySet>>;

/// Who can give an entry: holders of its write set that showed it. A holder that leaves is one of them, for its own slot, too:
/// it may be the only one (DC1).
pub(crate) fn sources(
    quorum: Quorum,
    part: (usize, &Part),
    lists: &Lists,
    entry: EntryId,
) -> Vec<Incarnation> {
    let (at, part) = part;
    let shows = |slot: &Slot| {
        lists.get(&(at, slot.0)).and_then(Option::as_ref).is_some_and(|l| l.contains(entry))
    };
    let holder = |slot: Slot| part.slots.get(slot.0).copied().flatten();
    quorum.write_set(entry).filter(shows).filter_map(holder).collect()
}

/// One slot to be made whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Task {
    /// Index of the part.
    pub(crate) part: usize,
    pub(crate) slot: Slot,
    pub(crate) holder: Holder,
    /// The slot gets another holder; else the holder gets what it lacks.
    pub(crate) replace: bool,
}

/// What is to be done for a ledger's final fragments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) tasks: Vec<Task>,
    /// Slots whose holder is not condemned and did not show what it has.
    pub(crate) unknown: usize,
}

impl Plan {
    /// Every slot of every final fragment is held, and was shown complete (A2).
    pub(crate) fn is_complete(&self) -> bool {
        self.tasks.is_empty() && self.unknown == 0
    }
}

/// Compares final fragments with what their holders showed.
pub(crate) fn plan(
    quorum: Quorum,
    parts: &[Part],
    lists: &Lists,
    condemned: &BTreeSet<Incarnation>,
) -> Plan {
    let mut plan = Plan::default();
    for (at, part) in parts.iter().enumerate() {
        for (slot, holder) in part.slots.iter().enumerate() {
            let task = |replace| Task { part: at, slot: Slot(slot), holder: *holder, replace };
            if holder.is_none_or(|holder| condemned.contains(&holder)) {
                plan.tasks.push(task(true));
                continue;
            }
            match lists.get(&(at, slot)).and_then(Option::as_ref) {
                None => plan.unknown += 1,
                Some(shown) => {
                    if part.assigned(quorum, Slot(slot)).any(|entry| !shown.contains(entry)) {
                        plan.tasks.push(task(false));
                    }
                }
            }
        }
    }
    plan
}

/// The ledger with another holder in one slot, if that slot, in a fragment that is still final, holds what was read (A2). None
/// if it does not, if the new holder is in the fragment already, or if the step would not be legal (I9, MD4).
pub(crate) fn swapped(
    now: &LedgerMetadata,
    part: &Part,
    task: Task,
    to: Incarnation,
) -> Option<LedgerMetadata> {
    let finals = parts(now);
    let at = finals.iter().position(|f| f.first == part.first && f.nonce == part.nonce)?;
    let fragment = &now.fragments[at];
    if fragment.holder(task.slot) != task.holder || finals[at].end != part.end || fragment.names(to)
    {
        return None;
    }
    let mut next = now.clone();
    *next.fragments[at].slots.get_mut(task.slot.0)? = Some(to);
    (next.validate().is_ok() && now.may_become(&next)).then_some(next)
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
