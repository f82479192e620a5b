//! One subscription's cursor: mark-delete, runs, redelivery state, properties; and the records it leaves in the cursor log
//! (C1, C5).
//!
//! Records and snapshots use the same fields: what is applied here is what a later owner applies when it reads them.

use std::collections::BTreeMap;

use geminga_proto::{
    ids::{Offset, SubscriptionId},
    storage::v1::{
        Acked, CursorState, DeadLettered, KeyTable, Leased, Redelivered, Reset,
        cursor_record::Record,
    },
};
use prost::Message;

use crate::{
    mark_delete::MarkDelete,
    redelivery::{self, CONSUMER_BYTES_MAX, RedeliveryState},
    run_map::RunMap,
    types::{CursorView, DeadLetterCounts, KeyOwner, LeaseRecord, RedeliveryView, Settlement},
};

/// The largest record of one change, bytes: a group and one record are far below an entry's limit.
const RECORD_BYTES_MAX: usize = 2 << 20;
/// The largest key table, encoded.
const KEY_TABLE_BYTES_MAX: usize = 256 << 10;

/// A cursor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    marks: MarkDelete,
    redelivery: RedeliveryState,
    /// Rises with each explicit reset (C2).
    reset_epoch: u64,
    properties: BTreeMap<String, String>,
}

/// Why a settlement was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CursorError {
    /// A run ends before it starts, or reaches the end of the log; a number, a name or an attempt makes no sense.
    #[error("an offset is not stored yet, or a run, number or name makes no sense")]
    OutOfRange,
    /// More runs than allowed, or more than fit into one record; settle the oldest messages first.
    #[error("the cursor would have more than {limit} runs")]
    TooManyRuns { limit: usize },
}

/// What a settlement is decided against.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The first offset kept.
    pub first: Offset,
    /// The first offset not confirmed.
    pub end: Offset,
    /// Runs of a cursor: settled above mark-delete, pending, and decisions.
    pub holes_max: usize,
    /// Of them, in records that are on their way.
    pub queued_runs: usize,
    /// Decisions in records that are on their way.
    pub queued_decisions: u64,
    /// Where the last reset goes that is on its way: what comes now comes after it.
    pub reset_to: Option<Offset>,
}

/// A settlement's record, to be applied once it is durable (C3).
#[derive(Clone, Debug, PartialEq)]
pub struct Decided {
    pub record: Record,
    /// Runs that it adds at most.
    pub runs: usize,
    pub decisions: u64,
}

impl Decided {
    /// Leases of first deliveries, which are logged only where nothing stands in the way (L2).
    #[must_use]
    pub fn is_droppable(&self) -> bool {
        matches!(&self.record, Record::Leased(leased) if !leased.exact)
    }
}

impl Cursor {
    /// A cursor that has settled everything below `next`. Numbers of dead-letter decisions up to `decisions_before` may have
    /// been used by one that was lost to damage.
    #[must_use]
    pub fn starting_at(next: Offset, decisions_before: u64) -> Self {
        let redelivery = RedeliveryState::after_decisions(decisions_before);
        Self { marks: MarkDelete::new(next.0), redelivery, ..Self::default() }
    }

    /// The first offset that is not settled.
    #[must_use]
    pub fn mark_delete_next(&self) -> Offset {
        Offset(self.marks.next())
    }

    /// Rises with each reset (C2): the epoch that records of now belong to.
    #[must_use]
    pub fn reset_epoch(&self) -> u64 {
        self.reset_epoch
    }

    /// How many messages below `offset` are not settled.
    #[must_use]
    pub fn unsettled_below(&self, offset: Offset) -> u64 {
        let open = self.marks.open_within(0, offset.0);
        open.into_iter().map(|(first, end)| end - first).sum()
    }

    /// Nothing below `first` is kept: it counts as settled.
    pub fn settle_trimmed(&mut self, first: Offset) {
        self.settle_below(first.0);
    }

    /// An entry of the log was lost; see [`RedeliveryState::skip_numbers`].
    pub(crate) fn skip_numbers(&mut self) {
        self.redelivery.skip_numbers();
    }

    /// The record of a settlement, to be applied once it is durable (C3).
    ///
    /// Runs are joined before they are counted. A settlement that adds none is always welcome: filling the oldest hole, or
    /// accepting what waits for its next attempt.
    ///
    /// # Errors
    /// [`CursorError`].
    pub fn settle(
        &self,
        id: SubscriptionId,
        settlement: &Settlement,
        bounds: &Bounds,
    ) -> Result<Decided, CursorError> {
        if let Some(to) = bounds.reset_to {
            let fresh = Self::starting_at(to, self.redelivery.dead_letters());
            let after = Self { reset_epoch: self.reset_epoch, ..fresh };
            return after.settle(id, settlement, &Bounds { reset_to: None, ..*bounds });
        }
        let (subscription, reset_epoch) = (id.0, self.reset_epoch);
        let record = Acked { subscription, reset_epoch, ..Acked::default() };
        let plain = |record| Ok(Decided { record, runs: 0, decisions: 0 });
        let stored = |first: Offset, last: Offset| first <= last && last < bounds.end;
        let check = |fine: bool| if fine { Ok(()) } else { Err(CursorError::OutOfRange) };
        let decided = match settlement {
            Settlement::UpTo(offset) => {
                check(*offset < bounds.end)?;
                plain(Record::Acked(Acked { up_to: Some(offset.0), ..record }))
            }
            Settlement::Accept(runs) => {
                check(runs.iter().all(|(first, last)| stored(*first, *last)))?;
                let mut joined = MarkDelete::new(self.marks.next());
                for (first, last) in runs {
                    joined.settle(first.0, last.0 + 1);
                }
                let beyond = joined
                    .runs()
                    .map(|(first, end)| 1 + self.growth(first, end) - self.decided(first, end));
                let runs = self.admit(beyond.sum(), bounds)?;
                let filled =
                    (joined.next() > self.marks.next()).then(|| (self.marks.next(), joined.next()));
                let ranges = filled
                    .into_iter()
                    .chain(joined.runs())
                    .flat_map(|(first, end)| [first, end - 1])
                    .collect();
                let record = Record::Acked(Acked { ranges, ..record });
                Ok(Decided { record, runs, decisions: 0 })
            }
            Settlement::Redeliver(messages) => {
                check(messages.iter().all(|one| stored(one.first, one.last) && one.attempt > 0))?;
                // Of several for one message the last one counts.
                let mut joined = RunMap::default();
                for one in messages {
                    joined.insert(one.first.0, one.last.0 + 1, (one.attempt, one.due_ms));
                }
                // What is decided to be dead stays so, and parts what lies around it, as settled messages do.
                let growth = joined
                    .iter()
                    .flat_map(|(first, end, _)| self.marks.open_within(first, end))
                    .map(|(first, end)| 1 + self.growth(first, end) + self.decided(first, end));
                let runs = self.admit(growth.sum(), bounds)?;
                let pending = joined.iter().map(redelivery::wire_pending).collect();
                let record =
                    Record::Redelivered(Redelivered { subscription, pending, reset_epoch });
                Ok(Decided { record, runs, decisions: 0 })
            }
            Settlement::DeadLetter(decisions) => {
                let before = self.redelivery.dead_letters().checked_add(bounds.queued_decisions);
                check(before.is_some_and(|before| redelivery::is_dense(decisions, before)))?;
                check(decisions.iter().all(|one| stored(one.offset, one.offset)))?;
                let growth = decisions.iter().map(|one| {
                    let (first, end) = (one.offset.0, one.offset.0 + 1);
                    1 + self.growth(first, end) - self.decided(first, end)
                });
                let runs = self.admit(growth.sum(), bounds)?;
                let dead = decisions.iter().map(redelivery::wire_dead).collect();
                let record = Record::DeadLettered(DeadLettered { subscription, dead, reset_epoch });
                Ok(Decided { record, runs, decisions: decisions.len() as u64 })
            }
            Settlement::Keys(owners) => {
                let sound = |one: &KeyOwner| {
                    one.first <= one.last && one.consumer.len() <= CONSUMER_BYTES_MAX
                };
                check(owners.iter().all(sound))?;
                let keys = owners.iter().map(redelivery::wire_key).collect();
                let table = KeyTable { subscription, keys };
                if table.encoded_len() > KEY_TABLE_BYTES_MAX {
                    return Err(CursorError::TooManyRuns { limit: bounds.holes_max });
                }
                plain(Record::Keys(table))
            }
            Settlement::Leases(leases) => {
                let sound = |one: &LeaseRecord| {
                    one.name.len() <= CONSUMER_BYTES_MAX
                        && one.ranges.iter().all(|(first, last)| stored(*first, *last))
                };
                check(leases.iter().all(sound))?;
                if leases.iter().map(|lease| lease.ranges.len()).sum::<usize>() > bounds.holes_max {
                    return Err(CursorError::TooManyRuns { limit: bounds.holes_max });
                }
                let leases = leases.iter().map(redelivery::wire_lease).collect();
                let (exact, part) = (true, false);
                plain(Record::Leased(Leased { subscription, leases, reset_epoch, exact, part }))
            }
            Settlement::Reset(to) => {
                let mark_delete_next = to.0.min(bounds.end.0).max(bounds.first.0);
                let reset_epoch = reset_epoch + 1;
                plain(Record::Reset(Reset { subscription, mark_delete_next, reset_epoch }))
            }
        }?;
        match decided.record.encoded_len() > RECORD_BYTES_MAX {
            true => Err(CursorError::TooManyRuns { limit: bounds.holes_max }),
            false => Ok(decided),
        }
    }

    /// The record of leases that nobody waits for (L2): of stored messages, as far as there is room. None when nothing is left;
    /// how many runs are in it, and how many had no room.
    #[must_use]
    pub fn log_leases(
        &self,
        id: SubscriptionId,
        leases: &[LeaseRecord],
        bounds: &Bounds,
    ) -> (Option<Decided>, usize) {
        let held = self.runs() + self.redelivery.lease_runs() + bounds.queued_runs;
        let (mut room, mut dropped, mut logged) = (bounds.holes_max.saturating_sub(held), 0, 0);
        let mut kept = Vec::new();
        for lease in leases.iter().filter(|lease| lease.name.len() <= CONSUMER_BYTES_MAX) {
            let ranges =
                lease.ranges.iter().filter(|(first, last)| first <= last && *last < bounds.end);
            let ranges: Vec<(Offset, Offset)> = ranges
                .flat_map(|(first, last)| self.marks.open_within(first.0, last.0 + 1))
                .map(|(first, end)| (Offset(first), Offset(end - 1)))
                .collect();
            let fits = ranges.len().min(room);
            (room, dropped, logged) = (room - fits, dropped + ranges.len() - fits, logged + fits);
            if fits > 0 {
                let ranges = ranges[..fits].to_vec();
                kept.push(redelivery::wire_lease(&LeaseRecord { ranges, ..lease.clone() }));
            }
        }
        let (subscription, reset_epoch) = (id.0, self.reset_epoch);
        let (exact, part) = (false, false);
        let record = Leased { subscription, leases: kept, reset_epoch, exact, part };
        if record.leases.is_empty() || record.encoded_len() > RECORD_BYTES_MAX {
            return (None, dropped + logged);
        }
        (Some(Decided { record: Record::Leased(record), runs: logged, decisions: 0 }), dropped)
    }

    fn runs(&self) -> usize {
        self.marks.runs().len() + self.redelivery.runs()
    }

    /// Pending runs that taking `first..end` out adds, or takes away.
    fn growth(&self, first: u64, end: u64) -> isize {
        isize::from(self.redelivery.splits(first, end))
            - self.redelivery.covered(first, end) as isize
    }

    fn decided(&self, first: u64, end: u64) -> isize {
        self.redelivery.decided(first, end) as isize
    }

    fn admit(&self, growth: isize, bounds: &Bounds) -> Result<usize, CursorError> {
        let growth = usize::try_from(growth).unwrap_or(0);
        if growth > 0 && self.runs() + growth + bounds.queued_runs > bounds.holes_max {
            return Err(CursorError::TooManyRuns { limit: bounds.holes_max });
        }
        Ok(growth)
    }

    /// Applies a record of this cursor. One of an earlier reset epoch counts for nothing (C2); numbers that make no sense settle
    /// nothing. One of a later epoch tells that a reset was lost to damage: nobody knows where it went, so everything kept is
    /// delivered again (C4).
    pub fn apply(&mut self, record: &Record) {
        let epoch = match record {
            Record::Acked(record) => record.reset_epoch,
            Record::Redelivered(record) => record.reset_epoch,
            Record::Leased(record) => record.reset_epoch,
            Record::DeadLettered(record) => record.reset_epoch,
            Record::Keys(table) => return self.redelivery.apply_keys(table),
            Record::Reset(reset) if reset.reset_epoch > self.reset_epoch => {
                return self.reset(reset.mark_delete_next, reset.reset_epoch);
            }
            _ => return,
        };
        if epoch > self.reset_epoch {
            self.reset(0, epoch);
        }
        if epoch < self.reset_epoch {
            return;
        }
        let Self { marks, redelivery, .. } = self;
        match record {
            Record::Acked(acked) => {
                if let Some(up_to) = acked.up_to {
                    self.settle_below(up_to.saturating_add(1));
                }
                for run in acked.ranges.chunks_exact(2) {
                    self.settle_run(run[0], run[1].saturating_add(1));
                }
            }
            Record::Redelivered(redelivered) => {
                for one in &redelivered.pending {
                    let open = marks.open_within(one.first, one.last.saturating_add(1));
                    redelivery.redeliver(&open, one.attempt, one.due_ms);
                }
            }
            Record::Leased(leased) => {
                redelivery.apply_leased(leased, |first, end| marks.open_within(first, end));
            }
            Record::DeadLettered(dead) => {
                for one in &dead.dead {
                    let settled = marks.open_within(one.offset, one.offset.saturating_add(1));
                    redelivery.decide(one, settled.is_empty());
                }
            }
            _ => {}
        }
    }

    fn settle_below(&mut self, end: u64) {
        self.marks.settle_below(end);
        self.redelivery.settle(0, end);
    }

    fn settle_run(&mut self, first: u64, end: u64) {
        self.marks.settle(first, end);
        self.redelivery.settle(first, end);
    }

    fn reset(&mut self, next: u64, epoch: u64) {
        (self.marks, self.reset_epoch) = (MarkDelete::new(next), epoch);
        self.redelivery.reset();
    }

    /// The one full encoding: the state, and what of it did not fit well into one record.
    #[must_use]
    pub fn encode(&self, id: SubscriptionId) -> Vec<Record> {
        let mut state = CursorState {
            subscription: id.0,
            mark_delete_next: self.marks.next(),
            acked_runs: self.marks.encode_runs(),
            reset_epoch: self.reset_epoch,
            properties: self.properties.clone().into_iter().collect(),
            ..Default::default()
        };
        let more = self.redelivery.encode(id, &mut state);
        [Record::State(state)].into_iter().chain(more).collect()
    }

    /// Reads the state back; records that follow it are applied.
    #[must_use]
    pub fn decode(state: &CursorState) -> Self {
        let marks = MarkDelete::decode(state.mark_delete_next, &state.acked_runs);
        Self {
            redelivery: RedeliveryState::decode(state, |first, end| marks.open_within(first, end)),
            marks,
            reset_epoch: state.reset_epoch,
            properties: state.properties.clone().into_iter().collect(),
        }
    }

    /// What callers see; `end` is the first offset not confirmed.
    #[must_use]
    pub fn view(&self, end: Offset) -> CursorView {
        let holes = self.marks.runs().map(|(first, end)| (Offset(first), Offset(end - 1)));
        CursorView {
            mark_delete_next: self.mark_delete_next(),
            holes: holes.collect(),
            backlog: end.0.saturating_sub(self.marks.next()).saturating_sub(self.marks.above()),
        }
    }

    /// What waits for another attempt, what is with whom.
    #[must_use]
    pub fn redelivery(&self) -> RedeliveryView {
        self.redelivery.view(self.reset_epoch)
    }

    /// Dead-letter decisions so far.
    #[must_use]
    pub fn dead_letters(&self) -> DeadLetterCounts {
        self.redelivery.dead_letter_counts()
    }
}

/// The subscription whose cursor a record is about; none for those that are about a whole state or several.
#[must_use]
pub fn subscription_of(record: &Record) -> Option<SubscriptionId> {
    let id = match record {
        Record::Acked(record) => record.subscription,
        Record::Redelivered(record) => record.subscription,
        Record::Leased(record) => record.subscription,
        Record::DeadLettered(record) => record.subscription,
        Record::Keys(record) => record.subscription,
        Record::Reset(record) => record.subscription,
        _ => return None,
    };
    Some(SubscriptionId(id))
}

/// Gives a record the reset epoch that it comes into force in; returns the epoch after it.
pub(crate) fn stamp(record: &mut Record, epoch: u64) -> u64 {
    match record {
        Record::Acked(record) => record.reset_epoch = epoch,
        Record::Redelivered(record) => record.reset_epoch = epoch,
        Record::Leased(record) => record.reset_epoch = epoch,
        Record::DeadLettered(record) => record.reset_epoch = epoch,
        Record::Reset(record) => {
            record.reset_epoch = epoch + 1;
            return record.reset_epoch;
        }
        _ => {}
    }
    epoch
}

#[cfg(test)]
mod tests;
