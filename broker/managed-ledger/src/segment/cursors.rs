//! The owner's cursor side: changes are decided, written to the cursor log in groups, and applied once durable (C1..C6).

use std::collections::BTreeMap;

use bytes::Bytes;
use geminga_bookie_client::{LedgerWriter, bookie_rpc::EntryRange, entry::Payload};
use geminga_proto::{
    ids::{EntryId, Offset, SubscriptionId},
    storage::v1::{Acked, Removed, cursor_record::Record},
};
use prost::Message;

use super::{CursorChange, lane::Appended, owner::Owner, publish::Answer};
use crate::{
    cursor::{Cursor, CursorError},
    cursor_log,
    error::SettleError,
    types::Start,
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

/// A cursor change that waits for its record.
pub(super) struct Waiting {
    change: Resolved,
    answer: Answer<Offset, SettleError>,
}

/// A cursor change with everything decided.
enum Resolved {
    /// Unless it is there by then.
    Create(SubscriptionId, Cursor),
    /// If it is there by then.
    Remove(SubscriptionId),
    Acked(Acked),
}

impl Owner {
    pub(super) fn change_cursor(
        &mut self,
        change: CursorChange,
        answer: Answer<Offset, SettleError>,
    ) {
        self.note_activity();
        match self.resolve(change) {
            Ok(change) => {
                if let Resolved::Acked(acked) = &change {
                    let runs = acked.ranges.len() / 2;
                    *self.queued_runs.entry(SubscriptionId(acked.subscription)).or_default() +=
                        runs;
                }
                self.settles.push_back(Waiting { change, answer });
            }
            Err(done) => drop(answer.send(done)),
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
                    Ok(Resolved::Create(id, Cursor::starting_at(at)))
                }
            },
            CursorChange::Remove(id) if settled && !cursors.contains_key(&id) => Err(Ok(Offset(0))),
            CursorChange::Remove(id) => Ok(Resolved::Remove(id)),
            CursorChange::Settle(id, settlement) => {
                let Some(cursor) = cursors.get(&id) else {
                    return Err(Err(SettleError::UnknownCursor));
                };
                let end = *self.shared.end.borrow();
                let limit = self.ledgers.parts().config.holes_max;
                let queued = self.queued_runs.get(&id).copied().unwrap_or(0);
                let acked = cursor.settle(id, &settlement, end, limit.saturating_sub(queued));
                let acked = acked.map_err(|error| {
                    Err(match error {
                        CursorError::OutOfRange => SettleError::OutOfRange { end },
                        CursorError::TooManyRuns { .. } => SettleError::TooManyHoles { limit },
                    })
                })?;
                Ok(Resolved::Acked(acked))
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
        let changes = self.take_changes(&mut records);
        if !records.is_empty() || !changes.is_empty() {
            let entry = cursor_log::encode(records);
            self.log.pending.push_back(Group::Changes { entry, changes, dedup: replay_from });
        }
    }

    /// The changes of the next entry. Everything before them is applied, so it is known here which cursors there are.
    fn take_changes(&mut self, records: &mut Vec<Record>) -> Vec<Waiting> {
        let cursors = self.shared.cursors.lock();
        let mut exists: BTreeMap<SubscriptionId, bool> = BTreeMap::new();
        let mut changes = Vec::new();
        let mut bytes = 0;
        while bytes < GROUP_BYTES
            && let Some(waiting) = self.settles.pop_front()
        {
            let record = match &waiting.change {
                Resolved::Create(id, cursor) => {
                    let there =
                        exists.insert(*id, true).unwrap_or_else(|| cursors.contains_key(id));
                    (!there).then(|| Record::State(cursor.encode(*id)))
                }
                Resolved::Remove(id) => {
                    let there =
                        exists.insert(*id, false).unwrap_or_else(|| cursors.contains_key(id));
                    there.then_some(Record::Removed(Removed { subscription: id.0 }))
                }
                Resolved::Acked(acked) => Some(Record::Acked(acked.clone())),
            };
            bytes += record.as_ref().map_or(0, Record::encoded_len);
            records.extend(record);
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
        let mut cursors = self.shared.cursors.lock();
        for Waiting { change, answer } in changes {
            let result = match change {
                Resolved::Create(id, cursor) => {
                    Ok(cursors.entry(id).or_insert(cursor).mark_delete_next())
                }
                Resolved::Remove(id) => {
                    cursors.remove(&id);
                    Ok(Offset(0))
                }
                Resolved::Acked(acked) => {
                    forget_runs(&mut self.queued_runs, &acked);
                    match cursors.get_mut(&SubscriptionId(acked.subscription)) {
                        Some(cursor) => {
                            cursor.apply(&acked);
                            Ok(cursor.mark_delete_next())
                        }
                        None => Err(SettleError::UnknownCursor),
                    }
                }
            };
            let _ = answer.send(result);
        }
    }

    /// The first offset that some cursor, or one about to be made, has not settled (M3).
    pub(super) fn slowest_cursor(&self) -> Option<Offset> {
        let in_flight = self.log.pending.iter().flat_map(|group| match group {
            Group::Changes { changes, .. } => &changes[..],
            Group::Snapshot { .. } => &[],
        });
        let opening =
            self.settles.iter().chain(in_flight).filter_map(|waiting| match &waiting.change {
                Resolved::Create(_, cursor) => Some(cursor.mark_delete_next()),
                Resolved::Remove(_) | Resolved::Acked(_) => None,
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
                    self.settles.push_front(waiting);
                }
            }
        }
    }

    /// Ends everything that waits for a record.
    pub(super) fn fail_settles(&mut self, error: &SettleError) {
        self.requeue_groups();
        self.queued_runs.clear();
        for waiting in std::mem::take(&mut self.settles) {
            let _ = waiting.answer.send(Err(error.clone()));
        }
    }
}

fn forget_runs(queued: &mut BTreeMap<SubscriptionId, usize>, acked: &Acked) {
    let id = SubscriptionId(acked.subscription);
    if let Some(runs) = queued.get_mut(&id) {
        *runs -= acked.ranges.len() / 2;
        if *runs == 0 {
            queued.remove(&id);
        }
    }
}
