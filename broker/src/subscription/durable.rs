//! Between the dispatcher's core and the managed ledger: the same facts in the words of each.

use geminga_managed_ledger::{
    DeadLetter as StoredDeadLetter, KeyOwner, LeaseRecord, ManagedLedger,
    Redelivery as StoredRedelivery, Settlement,
};
use geminga_proto::ids::{Offset, SubscriptionId};

use crate::dispatcher::{
    Change, DeadLetter, KeyRange, Kind, Lease, RangeSet, Redelivery, Restored,
};

/// The subscription's state as it is durable; none when it has no cursor.
#[must_use]
pub fn restored(ledger: &ManagedLedger, id: SubscriptionId) -> Option<Restored> {
    let cursor = ledger.cursor(id)?;
    let view = ledger.redelivery(id)?;
    let mut settled = RangeSet::default();
    for (first, last) in &cursor.holes {
        settled.insert(first.0, last.0 + 1);
    }
    let pending = view.pending.into_iter().map(|of| Redelivery {
        start: of.first.0,
        end: of.last.0 + 1,
        attempt: of.attempt,
        due_ms: of.due_ms,
    });
    let leases = view.leases.into_iter().map(|lease| Lease {
        consumer: lease.consumer,
        name: lease.name,
        runs: half_open(&lease.ranges),
        attempt: lease.attempt,
        left_ms: lease.left_ms,
    });
    let dead = view.dead.into_iter().map(|letter| DeadLetter {
        number: letter.number,
        offset: letter.offset.0,
        attempt: letter.attempt,
        reason: letter.reason,
    });
    let keys = view.keys.into_iter().map(|of| KeyRange {
        first: of.first,
        last: of.last,
        consumer: of.consumer,
    });
    Some(Restored {
        mark_delete: cursor.mark_delete_next.0,
        settled,
        pending: pending.collect(),
        leases: leases.collect(),
        dead: dead.collect(),
        dead_letters: view.dead_letters,
        keys: keys.collect(),
    })
}

/// What the cursor log is to hold.
#[must_use]
pub fn settlement(change: Change) -> Settlement {
    match change {
        Change::Accept(runs) => Settlement::Accept(inclusive(&runs)),
        Change::UpTo(end) => Settlement::UpTo(Offset(end.saturating_sub(1))),
        Change::Redeliver(items) => {
            let stored = items.into_iter().map(|item| StoredRedelivery {
                first: Offset(item.start),
                last: Offset(item.end - 1),
                attempt: item.attempt,
                due_ms: item.due_ms,
            });
            Settlement::Redeliver(stored.collect())
        }
        Change::DeadLetter(letters) => {
            let stored = letters.into_iter().map(|letter| StoredDeadLetter {
                number: letter.number,
                offset: Offset(letter.offset),
                attempt: letter.attempt,
                reason: letter.reason,
            });
            Settlement::DeadLetter(stored.collect())
        }
        Change::Keys(table) => {
            let stored = table.into_iter().map(|range| KeyOwner {
                first: range.first,
                last: range.last,
                consumer: range.consumer,
            });
            Settlement::Keys(stored.collect())
        }
        Change::Reset(to) => Settlement::Reset(Offset(to)),
    }
}

/// The exact lease table of a clean end (L4). None in order: the next owner keeps nothing from the one consumer there is.
pub(super) fn exact_leases(leases: Vec<Lease>, kind: Kind) -> Option<Settlement> {
    if !kind.is_shared() {
        return None;
    }
    Some(Settlement::Leases(leases.into_iter().map(lease_record).collect()))
}

/// L2: without waiting.
pub(super) fn log_leases(ledger: &ManagedLedger, id: SubscriptionId, leases: Vec<Lease>) {
    ledger.log_leases(id, leases.into_iter().map(lease_record).collect());
}

/// A lease as the cursor log holds it.
#[must_use]
pub fn lease_record(lease: Lease) -> LeaseRecord {
    LeaseRecord {
        consumer: lease.consumer,
        name: lease.name,
        ranges: inclusive(&lease.runs),
        attempt: lease.attempt,
        left_ms: lease.left_ms,
    }
}

fn inclusive(runs: &[(u64, u64)]) -> Vec<(Offset, Offset)> {
    runs.iter().map(|(start, end)| (Offset(*start), Offset(end - 1))).collect()
}

fn half_open(ranges: &[(Offset, Offset)]) -> Vec<(u64, u64)> {
    ranges.iter().map(|(first, last)| (first.0, last.0 + 1)).collect()
}
