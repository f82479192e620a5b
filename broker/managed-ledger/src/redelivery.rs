//! The redelivery state of one cursor (C1, L1..L5): what waits for another attempt, what is with whom, what is decided to be
//! dead, and who owns which keys. Pure; kept as runs, so that its size follows the runs, not the messages.
//!
//! ```text
//! offsets   10 .......... 20 .......... 30        mark-delete 10
//! pending      [12..14 attempt 2 due now]         their attempt ended: durable before they are delivered again (L1, L3)
//! leases          [13..19 with c, attempt 2]      a lease covers a pending entry and does not remove it: whoever loses the
//! dead                         23 = number 7      lease finds the attempt unchanged (L4)
//! ```
//! Only offsets that are not settled are in it. What settles them takes them out.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use geminga_proto::{
    ids::{Offset, SubscriptionId},
    storage::v1::{
        CursorState, DeadLetter as WireDead, DeadLettered, KeyRangeOwner, KeyTable,
        Lease as WireLease, Leased, Pending as WirePending, Redelivered, cursor_record::Record,
    },
};

use crate::{
    run_map::RunMap,
    types::{DeadLetter, DeadLetterCounts, KeyOwner, LeaseRecord, Redelivery, RedeliveryView},
};

/// The longest reason of a dead-letter decision, bytes; longer ones are cut.
pub const REASON_BYTES_MAX: usize = 256;
/// The longest consumer name, bytes.
pub const CONSUMER_BYTES_MAX: usize = 256;
/// Decisions, pending runs, leases in one record of a snapshot: far below an entry's limit.
const PART: usize = 4_096;
/// A damaged entry may have held so many decisions at most: their numbers are not used again.
pub(crate) const LOST_DECISIONS: u64 = 1 << 20;

/// See the module's text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RedeliveryState {
    pending: RunMap<Pending>,
    leases: RunMap<Arc<Lease>>,
    leases_exact: bool,
    /// By offset.
    dead: BTreeMap<u64, Dead>,
    /// The number of the last decision.
    dead_letters: u64,
    keys: Vec<KeyOwner>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pending {
    attempt: u32,
    due_ms: u64,
}

/// In order of its fields: whose it is comes first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Lease {
    consumer: u64,
    name: String,
    attempt: u32,
    left_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Dead {
    number: u64,
    attempt: u32,
    reason: String,
}

impl RedeliveryState {
    /// No decision has been made, but numbers up to this one may have been used.
    pub(crate) fn after_decisions(dead_letters: u64) -> Self {
        Self { dead_letters, ..Self::default() }
    }

    /// Runs that count against the cursor's limit; leases do not, they make room.
    pub(crate) fn runs(&self) -> usize {
        self.pending.len() + self.dead.len()
    }

    pub(crate) fn lease_runs(&self) -> usize {
        self.leases.len()
    }

    pub(crate) fn dead_letters(&self) -> u64 {
        self.dead_letters
    }

    /// Whether settling `first..end` leaves one pending run more than before.
    pub(crate) fn splits(&self, first: u64, end: u64) -> bool {
        self.pending.splits(first, end)
    }

    /// Pending runs that lie in `first..end` as a whole.
    pub(crate) fn covered(&self, first: u64, end: u64) -> usize {
        self.pending.covered(first, end)
    }

    /// Decisions in `first..end`.
    pub(crate) fn decided(&self, first: u64, end: u64) -> usize {
        if first < end { self.dead.range(first..end).count() } else { 0 }
    }

    /// `first..end` are settled.
    pub(crate) fn settle(&mut self, first: u64, end: u64) {
        self.pending.remove(first, end);
        self.leases.remove(first, end);
        if first < end {
            let settled: Vec<u64> =
                self.dead.range(first..end).map(|(offset, _)| *offset).collect();
            for offset in settled {
                self.dead.remove(&offset);
            }
        }
    }

    /// A seek (C2): nothing of the messages is left. Numbers of decisions are never used again, and who owns which keys is
    /// about consumers, not messages.
    pub(crate) fn reset(&mut self) {
        let keys = std::mem::take(&mut self.keys);
        *self = Self { keys, ..Self::after_decisions(self.dead_letters) };
    }

    /// An entry of the log was lost: the decisions it may have held have numbers that nobody uses again.
    pub(crate) fn skip_numbers(&mut self) {
        self.dead_letters = self.dead_letters.saturating_add(LOST_DECISIONS);
    }

    /// The attempt of `first..end` ended; `open` are the parts of it that are not settled. What is decided to be dead stays so.
    pub(crate) fn redeliver(&mut self, open: &[(u64, u64)], attempt: u32, due_ms: u64) {
        for &(first, end) in open {
            self.leases.remove(first, end);
            let mut at = first;
            let dead: Vec<u64> = self.dead.range(first..end).map(|(offset, _)| *offset).collect();
            for offset in dead.into_iter().chain([end]) {
                self.pending.insert(at, offset, Pending { attempt, due_ms });
                at = offset.saturating_add(1);
            }
        }
    }

    /// The parts of `open` for which a lease under this attempt means something: later attempts and decisions stand above it.
    pub(crate) fn leasable(&self, open: &[(u64, u64)], attempt: u32) -> Vec<(u64, u64)> {
        let mut leasable = Vec::new();
        for &(first, end) in open {
            let ended = self.pending.within(first, end).filter(|(.., p)| p.attempt > attempt);
            let dead =
                self.dead.range(first..end).map(|(offset, _)| (*offset, offset.saturating_add(1)));
            let mut above: Vec<(u64, u64)> =
                ended.map(|(first, end, _)| (first, end)).chain(dead).collect();
            above.sort_unstable();
            let mut at = first;
            for (run, run_end) in above.into_iter().chain([(end, end)]) {
                if at < run {
                    leasable.push((at, run));
                }
                at = at.max(run_end);
            }
        }
        leasable
    }

    fn lease(&mut self, open: &[(u64, u64)], lease: &WireLease) {
        let value = Arc::new(Lease {
            consumer: lease.consumer,
            name: lease.name.clone(),
            attempt: lease.attempt,
            left_ms: lease.left_ms,
        });
        for (first, end) in self.leasable(open, lease.attempt) {
            self.leases.insert(first, end, Arc::clone(&value));
        }
    }

    /// `open` gives the parts of a range that are not settled.
    pub(crate) fn apply_leased(
        &mut self,
        record: &Leased,
        open: impl Fn(u64, u64) -> Vec<(u64, u64)>,
    ) {
        if record.exact {
            self.leases.clear();
        }
        for lease in &record.leases {
            for range in lease.ranges.chunks_exact(2) {
                self.lease(&open(range[0], range[1].saturating_add(1)), lease);
            }
        }
        self.leases_exact = record.exact || (record.part && self.leases_exact);
    }

    /// A decision: the message's attempts have ended for good. Its number is taken whether or not the message is settled.
    pub(crate) fn decide(&mut self, dead: &WireDead, settled: bool) {
        self.dead_letters = self.dead_letters.max(dead.number);
        if !settled {
            self.pending.remove(dead.offset, dead.offset.saturating_add(1));
            self.leases.remove(dead.offset, dead.offset.saturating_add(1));
            let (number, attempt) = (dead.number, dead.attempt);
            self.dead.insert(dead.offset, Dead { number, attempt, reason: dead.reason.clone() });
        }
    }

    pub(crate) fn apply_keys(&mut self, table: &KeyTable) {
        self.keys = table.keys.iter().map(key_owner).collect();
    }

    // ---- the stored forms ----

    /// Into a cursor's full state, as far as one record should hold it; the rest follows as records of the same log (C1).
    pub(crate) fn encode(&self, id: SubscriptionId, state: &mut CursorState) -> Vec<Record> {
        state.leases_exact = self.leases_exact;
        state.dead_letters = self.dead_letters;
        state.keys = self.keys.iter().map(wire_key).collect();
        let pending: Vec<WirePending> = self.wire_pending().collect();
        let leases = self.lease_records(PART);
        let leases: Vec<WireLease> = leases.iter().map(wire_lease).collect();
        let dead: Vec<WireDead> = self.dead_by_number().iter().map(wire_dead).collect();
        let lease_runs: usize = leases.iter().map(|lease| lease.ranges.len() / 2 + 1).sum();
        if pending.len() + lease_runs + dead.len() <= PART {
            (state.pending, state.leases, state.dead) = (pending, leases, dead);
            return Vec::new();
        }
        let (subscription, reset_epoch) = (id.0, state.reset_epoch);
        let mut more = Vec::new();
        for pending in pending.chunks(PART) {
            let pending = pending.to_vec();
            more.push(Record::Redelivered(Redelivered { subscription, pending, reset_epoch }));
        }
        for leases in by_runs(leases, PART) {
            let (exact, part) = (false, true);
            more.push(Record::Leased(Leased { subscription, leases, reset_epoch, exact, part }));
        }
        for dead in dead.chunks(PART) {
            let dead = dead.to_vec();
            more.push(Record::DeadLettered(DeadLettered { subscription, dead, reset_epoch }));
        }
        more
    }

    /// Out of a cursor's full state. `open` gives the parts of a range that are not settled.
    pub(crate) fn decode(state: &CursorState, open: impl Fn(u64, u64) -> Vec<(u64, u64)>) -> Self {
        let mut decoded = Self::after_decisions(state.dead_letters);
        decoded.keys = state.keys.iter().map(key_owner).collect();
        for pending in &state.pending {
            let open = open(pending.first, pending.last.saturating_add(1));
            decoded.redeliver(&open, pending.attempt, pending.due_ms);
        }
        for dead in &state.dead {
            let settled = open(dead.offset, dead.offset.saturating_add(1)).is_empty();
            decoded.decide(dead, settled);
        }
        let leases = state.leases.clone();
        decoded.apply_leased(&Leased { leases, ..Leased::default() }, open);
        decoded.leases_exact = state.leases_exact;
        decoded
    }

    fn wire_pending(&self) -> impl Iterator<Item = WirePending> + '_ {
        self.pending.iter().map(|(first, end, pending)| WirePending {
            first,
            last: end - 1,
            attempt: pending.attempt,
            due_ms: pending.due_ms,
        })
    }

    /// One record per consumer, attempt and time left, cut where it has so many ranges.
    fn lease_records(&self, ranges_max: usize) -> Vec<LeaseRecord> {
        let mut held: BTreeMap<&Lease, Vec<(Offset, Offset)>> = BTreeMap::new();
        for (first, end, lease) in self.leases.iter() {
            held.entry(lease).or_default().push((Offset(first), Offset(end - 1)));
        }
        let records = held.iter().flat_map(|(lease, ranges)| {
            ranges.chunks(ranges_max).map(|ranges| LeaseRecord {
                consumer: lease.consumer,
                name: lease.name.clone(),
                ranges: ranges.to_vec(),
                attempt: lease.attempt,
                left_ms: lease.left_ms,
            })
        });
        records.collect()
    }

    fn dead_by_number(&self) -> Vec<DeadLetter> {
        let mut dead: Vec<DeadLetter> = self
            .dead
            .iter()
            .map(|(offset, dead)| DeadLetter {
                number: dead.number,
                offset: Offset(*offset),
                attempt: dead.attempt,
                reason: dead.reason.clone(),
            })
            .collect();
        dead.sort_unstable_by_key(|dead| dead.number);
        dead
    }

    /// Without the state that [`Self::view`] copies.
    pub(crate) fn dead_letter_counts(&self) -> DeadLetterCounts {
        DeadLetterCounts { decided: self.dead_letters, waiting: !self.dead.is_empty() }
    }

    /// What callers see.
    pub(crate) fn view(&self, reset_epoch: u64) -> RedeliveryView {
        let pending = self.pending.iter().map(|(first, end, pending)| Redelivery {
            first: Offset(first),
            last: Offset(end - 1),
            attempt: pending.attempt,
            due_ms: pending.due_ms,
        });
        RedeliveryView {
            pending: pending.collect(),
            leases: self.lease_records(usize::MAX),
            leases_exact: self.leases_exact,
            dead: self.dead_by_number(),
            dead_letters: self.dead_letters,
            keys: self.keys.clone(),
            reset_epoch,
        }
    }
}

/// Leases in groups of about so many ranges.
fn by_runs(leases: Vec<WireLease>, runs_max: usize) -> Vec<Vec<WireLease>> {
    let (mut groups, mut runs): (Vec<Vec<WireLease>>, usize) = (Vec::new(), usize::MAX);
    for lease in leases {
        let more = lease.ranges.len() / 2 + 1;
        if runs.saturating_add(more) > runs_max {
            groups.push(Vec::new());
            runs = 0;
        }
        runs += more;
        if let Some(group) = groups.last_mut() {
            group.push(lease);
        }
    }
    groups
}

pub(crate) fn wire_lease(record: &LeaseRecord) -> WireLease {
    WireLease {
        ranges: record.ranges.iter().flat_map(|(first, last)| [first.0, last.0]).collect(),
        consumer: record.consumer,
        name: record.name.clone(),
        attempt: record.attempt,
        left_ms: record.left_ms,
    }
}

pub(crate) fn wire_dead(dead: &DeadLetter) -> WireDead {
    let cut = dead.reason.floor_char_boundary(REASON_BYTES_MAX);
    WireDead {
        number: dead.number,
        offset: dead.offset.0,
        attempt: dead.attempt,
        reason: dead.reason[..cut].to_owned(),
    }
}

pub(crate) fn wire_pending(
    (first, end, &(attempt, due_ms)): (u64, u64, &(u32, u64)),
) -> WirePending {
    WirePending { first, last: end - 1, attempt, due_ms }
}

pub(crate) fn wire_key(owner: &KeyOwner) -> KeyRangeOwner {
    KeyRangeOwner { first: owner.first, last: owner.last, consumer: owner.consumer.clone() }
}

fn key_owner(wire: &KeyRangeOwner) -> KeyOwner {
    KeyOwner { first: wire.first, last: wire.last, consumer: wire.consumer.clone() }
}

/// Whether decisions follow the last one without a gap, each about another message.
pub(crate) fn is_dense(dead: &[DeadLetter], after: u64) -> bool {
    let offsets: BTreeSet<Offset> = dead.iter().map(|dead| dead.offset).collect();
    offsets.len() == dead.len()
        && dead.iter().zip(1..).all(|(dead, n)| Some(dead.number) == after.checked_add(n))
}
