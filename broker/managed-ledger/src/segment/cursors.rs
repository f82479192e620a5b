//! The owner's cursor side: changes are decided, written to the cursor log in groups, and applied once durable (C1..C6).

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use geminga_bookie_client::{LedgerWriter, bookie_rpc::EntryRange, entry::Payload};
use geminga_proto::{
    ids::{EntryId, Offset, SubscriptionId},
    storage::v1::{Removed, cursor_record::Record},
};
use prost::Message;

use super::{CursorChange, lane::Appended, owner::Owner, publish::Answer};
use crate::{
    cursor::{self, Bounds, Cursor, CursorError, Decided},
    cursor_log,
    error::SettleError,
    redelivery::LOST_DECISIONS,
    types::{LeaseRecord, Settlement, Start},
};

/// Records that go into one entry: no more once they have so many bytes. One record alone is far below an entry's limit.
const GROUP_BYTES: usize = 1 << 20;

/// One entry of the cursor log: what it changes, and who waits for that.
pub(super) enum Group {
    Changes {
        entry: Bytes,
        changes: Vec<Waiting>,
        /// It says from where a load replays (DD2).
        dedup: Option<Offset>,
    },
    Snapshot {
        entry: Bytes,
        /// Of the last entry: how many there are, and from where a load replays.
        last: Option<(u64, Offset)>,
    },
}

impl Group {
    pub(super) fn payload(&self) -> Payload {
        match self {
            Self::Changes { entry, .. } | Self::Snapshot { entry, .. } => {
                Payload::from(entry.clone())
            }
        }
    }
}

/// Runs of leases that may wait for the log; more are dropped (L2).
const LEASE_RUNS_QUEUED_MAX: usize = 16_384;

/// A cursor change that waits for its record.
pub(super) struct Waiting {
    change: Resolved,
    /// None: nobody waits.
    answer: Option<Answer<Offset, SettleError>>,
}

impl Waiting {
    fn is_droppable(&self) -> bool {
        matches!(&self.change, Resolved::Record(_, decided) if decided.is_droppable())
    }
}

/// What is on its way to the log of one cursor: it counts against the cursor's limits.
#[derive(Debug, Default)]
pub(super) struct Queued {
    runs: usize,
    decisions: u64,
    /// Resets, and where the last one goes.
    resets: usize,
    reset_to: Option<Offset>,
}

/// A cursor change with everything decided.
enum Resolved {
    /// Unless it is there by then.
    Create(SubscriptionId, Cursor),
    /// If it is there by then.
    Remove(SubscriptionId),
    /// Its reset epoch is that of its turn.
    Record(SubscriptionId, Decided),
}

impl Owner {
    pub(super) fn change_cursor(
        &mut self,
        change: CursorChange,
        answer: Answer<Offset, SettleError>,
    ) {
        self.note_activity();
        match self.resolve(change) {
            Ok(change) => self.queue(change, Some(answer)),
            Err(done) => drop(answer.send(done)),
        }
    }

    fn queue(&mut self, change: Resolved, answer: Option<Answer<Offset, SettleError>>) {
        if let Resolved::Record(id, decided) = &change
            && !decided.is_droppable()
        {
            let queued = self.queued.entry(*id).or_default();
            queued.runs += decided.runs;
            queued.decisions += decided.decisions;
            if let Record::Reset(reset) = &decided.record {
                queued.resets += 1;
                queued.reset_to = Some(Offset(reset.mark_delete_next));
            }
        }
        let waiting = Waiting { change, answer };
        self.lease_records += usize::from(waiting.is_droppable());
        self.settles.push_back(waiting);
    }

    /// L2: first deliveries are logged beside everything that is waited for, and dropped first.
    pub(super) fn log_leases(&mut self, id: SubscriptionId, leases: &[LeaseRecord]) {
        let runs = leases.iter().map(|lease| lease.ranges.len()).sum::<usize>();
        let config = &self.ledgers.parts().config;
        let pressed = self.queued_leases + runs > LEASE_RUNS_QUEUED_MAX
            || self.settles.len() > config.commands_max / 2
            || self.closing.is_some()
            || self.refuses_settles();
        if pressed {
            return self.dropped_leases(runs);
        }
        let (decided, dropped) = {
            let cursors = self.shared.cursors.lock();
            let Some(cursor) = cursors.get(&id) else { return };
            let mut bounds = self.bounds(id);
            bounds.queued_runs += self.queued_leases;
            cursor.log_leases(id, leases, &bounds)
        };
        self.dropped_leases(dropped);
        if let Some(decided) = decided {
            self.queued_leases += decided.runs;
            self.queue(Resolved::Record(id, decided), None);
        }
    }

    /// A settlement that the policy decided; whether it waits for the log.
    pub(super) fn settle_by_policy(&mut self, id: SubscriptionId, settlement: Settlement) -> bool {
        match self.resolve(CursorChange::Settle(id, settlement)) {
            Ok(change) => {
                self.queue(change, None);
                true
            }
            Err(_) => false,
        }
    }

    fn dropped_leases(&self, runs: usize) {
        self.ledgers.parts().metrics.leases_dropped.inc_by(runs as u64);
    }

    /// Leases that wait are no reason to wait for a ledger: they are forgotten.
    pub(super) fn drop_leases(&mut self) {
        let settles = std::mem::take(&mut self.settles);
        let (awaited, leases): (VecDeque<_>, VecDeque<_>) =
            settles.into_iter().partition(|waiting| !waiting.is_droppable());
        self.settles = awaited;
        self.lease_records = 0;
        leases.into_iter().for_each(|waiting| self.forget_leases(waiting));
    }

    fn forget_leases(&mut self, waiting: Waiting) {
        if let Resolved::Record(id, decided) = waiting.change {
            self.dropped_leases(decided.runs);
            self.unqueue(id, &decided);
        }
    }

    fn unqueue(&mut self, id: SubscriptionId, decided: &Decided) {
        if decided.is_droppable() {
            self.queued_leases = self.queued_leases.saturating_sub(decided.runs);
        } else if let Some(queued) = self.queued.get_mut(&id) {
            queued.runs = queued.runs.saturating_sub(decided.runs);
            queued.decisions = queued.decisions.saturating_sub(decided.decisions);
            let reset = usize::from(matches!(decided.record, Record::Reset(_)));
            queued.resets = queued.resets.saturating_sub(reset);
            queued.reset_to = queued.reset_to.filter(|_| queued.resets > 0);
            if queued.runs == 0 && queued.decisions == 0 && queued.resets == 0 {
                self.queued.remove(&id);
            }
        }
    }

    /// There are records that are not dropped when there is no ledger.
    pub(super) fn settles_awaited(&self) -> bool {
        self.settles.len() > self.lease_records
    }

    fn bounds(&self, id: SubscriptionId) -> Bounds {
        let queued = self.queued.get(&id);
        Bounds {
            first: self.shared.view.first_offset(),
            end: *self.shared.end.borrow(),
            holes_max: self.ledgers.parts().config.holes_max,
            queued_runs: queued.map_or(0, |queued| queued.runs),
            queued_decisions: queued.map_or(0, |queued| queued.decisions),
            reset_to: queued.and_then(|queued| queued.reset_to),
        }
    }

    /// Decides a change; `Err` holds an answer that needs no record.
    fn resolve(&self, change: CursorChange) -> Result<Resolved, Result<Offset, SettleError>> {
        if self.closing.is_some() {
            return Err(Err(SettleError::Closed));
        }
        if self.refuses_settles() {
            return Err(Err(SettleError::MetadataUnavailable));
        }
        // What waits may make or remove the cursor: then only its turn tells.
        let settled = self.settles.is_empty() && self.log.is_empty();
        let cursors = self.shared.cursors.lock();
        match change {
            CursorChange::Create(id, start) => match cursors.get(&id) {
                Some(cursor) if settled => Err(Ok(cursor.mark_delete_next())),
                _ => {
                    let at = match start {
                        Start::Earliest => self.shared.view.first_offset(),
                        Start::Latest => *self.shared.end.borrow(),
                    };
                    let lost = self.lost.saturating_mul(LOST_DECISIONS);
                    Ok(Resolved::Create(id, Cursor::starting_at(at, lost)))
                }
            },
            CursorChange::Remove(id) if settled && !cursors.contains_key(&id) => Err(Ok(Offset(0))),
            CursorChange::Remove(id) => Ok(Resolved::Remove(id)),
            CursorChange::Settle(id, settlement) => {
                let Some(cursor) = cursors.get(&id) else {
                    return Err(Err(SettleError::UnknownCursor));
                };
                let bounds = self.bounds(id);
                let decided = cursor.settle(id, &settlement, &bounds).map_err(|error| {
                    Err(match error {
                        CursorError::OutOfRange => SettleError::OutOfRange { end: bounds.end },
                        CursorError::TooManyRuns { limit } => SettleError::TooManyHoles { limit },
                    })
                })?;
                Ok(Resolved::Record(id, decided))
            }
        }
    }

    /// Group commit: one entry at a time takes what queued while the last one was written. A snapshot is formed only when
    /// nothing is in flight, so that it holds everything acknowledged.
    pub(super) fn form_group(&mut self) {
        if !self.log.is_open() || !self.log.is_empty() {
            return;
        }
        let (mut records, mut replay_from) = (Vec::new(), None);
        if self.want.dedup && !self.want.snapshot {
            let dedup = self.dedup_state();
            // One that needs several entries comes into force only as a whole: in a snapshot.
            if dedup.encoded_len() > GROUP_BYTES {
                self.want.snapshot = true;
            } else {
                self.want.dedup = false;
                self.data_since_dedup = 0;
                replay_from = Some(Offset(dedup.next_offset));
                records.push(Record::Dedup(dedup));
            }
        }
        if self.want.snapshot {
            (self.want.snapshot, self.want.dedup) = (false, false);
            self.restate.clear();
            self.data_since_dedup = 0;
            let state = self.log_state();
            let entries = cursor_log::snapshot(self.ledgers.parts().random.u64(), &state);
            self.snapshot_bytes = entries.iter().map(|entry| entry.len() as u64).sum();
            let count = entries.len();
            let end = (count as u64, Offset(state.dedup.next_offset));
            let groups = entries.into_iter().enumerate();
            self.log.pending.extend(groups.map(|(n, entry)| Group::Snapshot {
                entry,
                last: (n + 1 == count).then_some(end),
            }));
            return;
        }
        self.restate_cursors(&mut records);
        let changes = self.take_changes(&mut records);
        if !records.is_empty() || !changes.is_empty() {
            let entry = cursor_log::encode(records);
            self.log.pending.push_back(Group::Changes { entry, changes, dedup: replay_from });
        }
    }

    /// The state of cursors that were reset, once more in an entry of its own: no single damaged entry brings a mark-delete
    /// back that the reset took away, which would skip messages (C4).
    fn restate_cursors(&mut self, records: &mut Vec<Record>) {
        let cursors = self.shared.cursors.lock();
        for id in std::mem::take(&mut self.restate) {
            records.extend(cursors.get(&id).into_iter().flat_map(|cursor| cursor.encode(id)));
        }
    }

    /// The changes of the next entry. Everything before them is applied, so it is known here which cursors there are, and in
    /// which reset epoch each is.
    fn take_changes(&mut self, records: &mut Vec<Record>) -> Vec<Waiting> {
        let cursors = self.shared.cursors.lock();
        let mut exists: BTreeMap<SubscriptionId, bool> = BTreeMap::new();
        let mut epochs: BTreeMap<SubscriptionId, u64> = BTreeMap::new();
        let mut changes = Vec::new();
        let mut bytes = 0;
        while bytes < GROUP_BYTES
            && let Some(mut waiting) = self.settles.pop_front()
        {
            let before = records.len();
            self.lease_records -= usize::from(waiting.is_droppable());
            match &mut waiting.change {
                Resolved::Create(id, cursor) => {
                    let there =
                        exists.insert(*id, true).unwrap_or_else(|| cursors.contains_key(id));
                    if !there {
                        epochs.insert(*id, cursor.reset_epoch());
                        records.extend(cursor.encode(*id));
                    }
                }
                Resolved::Remove(id) => {
                    let there =
                        exists.insert(*id, false).unwrap_or_else(|| cursors.contains_key(id));
                    records
                        .extend(there.then_some(Record::Removed(Removed { subscription: id.0 })));
                }
                Resolved::Record(id, decided) => {
                    let epoch = epochs
                        .entry(*id)
                        .or_insert_with(|| cursors.get(id).map_or(0, Cursor::reset_epoch));
                    *epoch = cursor::stamp(&mut decided.record, *epoch);
                    records.push(decided.record.clone());
                }
            }
            bytes += records[before..].iter().map(Record::encoded_len).sum::<usize>();
            changes.push(waiting);
        }
        changes
    }

    pub(super) fn log_appended(&mut self, outcome: Appended) {
        match outcome {
            Appended::Stored(entry) => self.apply_group(entry),
            Appended::NotStored => {}
            Appended::Indeterminate => self.fence("a settle of unknown outcome"),
        }
    }

    fn apply_group(&mut self, entry: EntryId) {
        let Some(group) = self.log.pending.pop_front() else { return };
        self.ledgers.parts().metrics.settle_entries.inc();
        match group {
            Group::Changes { entry: bytes, changes, dedup } => {
                self.delta_bytes += bytes.len() as u64;
                if let Some(next) = dedup {
                    self.note_dedup(next, entry, 1);
                }
                self.ledgers.parts().metrics.settles.inc_by(changes.len() as u64);
                self.apply_changes(changes);
                self.note_settled();
            }
            Group::Snapshot { last: None, .. } => {}
            Group::Snapshot { last: Some((count, next)), .. } => {
                self.note_dedup(next, entry, count);
                self.ledgers.parts().metrics.snapshots.inc();
                self.delta_bytes = 0;
                let list = &self.current.list;
                let superseded = list.cursor_log.len() > 1 || !list.inline_snapshot.is_empty();
                self.want.trim_after = superseded.then_some(entry).or(self.want.trim_after);
            }
        }
        let config = &self.ledgers.parts().config;
        self.want.snapshot |=
            self.delta_bytes > config.snapshot_after_bytes.max(2 * self.snapshot_bytes);
        if self.log.is_open() {
            let length = self.log.writer().map_or(0, LedgerWriter::length);
            // Beyond the snapshot it began with: a large one alone is no reason for another ledger that begins with it.
            self.want.roll_log |= length >= config.cursor_roll_bytes + self.snapshot_bytes;
        }
    }

    /// C3: a change is visible and answered only after its record is acknowledged.
    fn apply_changes(&mut self, changes: Vec<Waiting>) {
        for Waiting { change, answer } in changes {
            let result = match change {
                Resolved::Create(id, cursor) => {
                    let mut cursors = self.shared.cursors.lock();
                    Ok(cursors.entry(id).or_insert(cursor).mark_delete_next())
                }
                Resolved::Remove(id) => {
                    self.shared.cursors.lock().remove(&id);
                    Ok(Offset(0))
                }
                Resolved::Record(id, decided) => {
                    self.unqueue(id, &decided);
                    if answer.is_none() {
                        self.limits.moved(id);
                    }
                    if matches!(decided.record, Record::Reset(_)) {
                        self.restate.insert(id);
                    }
                    match self.shared.cursors.lock().get_mut(&id) {
                        Some(cursor) => {
                            cursor.apply(&decided.record);
                            Ok(cursor.mark_delete_next())
                        }
                        None => Err(SettleError::UnknownCursor),
                    }
                }
            };
            if let Some(answer) = answer {
                let _ = answer.send(result);
            }
        }
    }

    /// The first offset that some cursor has not settled, or will not have: one about to be made, or a seek under way (M3).
    pub(super) fn slowest_cursor(&self) -> Option<Offset> {
        let in_flight = self.log.pending.iter().flat_map(|group| match group {
            Group::Changes { changes, .. } => &changes[..],
            Group::Snapshot { .. } => &[],
        });
        let opening =
            self.settles.iter().chain(in_flight).filter_map(|waiting| match &waiting.change {
                Resolved::Create(_, cursor) => Some(cursor.mark_delete_next()),
                Resolved::Record(_, Decided { record: Record::Reset(reset), .. }) => {
                    Some(Offset(reset.mark_delete_next))
                }
                Resolved::Remove(_) | Resolved::Record(..) => None,
            });
        let cursors = self.shared.cursors.lock();
        cursors.values().map(Cursor::mark_delete_next).chain(opening).min()
    }

    /// Where the state of deduplication that is durable now begins, and where it can be read back.
    fn note_dedup(&mut self, next: Offset, last: EntryId, entries: u64) {
        if let Some(ledger) = self.log.writer().map(LedgerWriter::id) {
            let first = EntryId(last.0.saturating_sub(entries.saturating_sub(1)));
            self.tier.dedup.logged(next, ledger, EntryRange { first, last });
        }
    }

    /// What was not acknowledged in the closed cursor-log ledger waits again, behind the snapshot.
    pub(super) fn requeue_groups(&mut self) {
        let groups = std::mem::take(&mut self.log.pending);
        for group in groups.into_iter().rev() {
            if let Group::Changes { changes, .. } = group {
                for waiting in changes.into_iter().rev() {
                    match !waiting.is_droppable() {
                        true => self.settles.push_front(waiting),
                        // L2: not worth a second try.
                        false => self.forget_leases(waiting),
                    }
                }
            }
        }
    }

    /// Ends everything that waits for a record.
    pub(super) fn fail_settles(&mut self, error: &SettleError) {
        self.requeue_groups();
        self.queued.clear();
        self.limits.none_moves();
        (self.queued_leases, self.lease_records) = (0, 0);
        for waiting in std::mem::take(&mut self.settles) {
            if let Some(answer) = waiting.answer {
                let _ = answer.send(Err(error.clone()));
            }
        }
    }
}
