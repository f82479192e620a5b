//! The cursor log's entries (C1, C5, C6): state = last complete snapshot + all later records. Pure.

use std::collections::BTreeMap;

use bytes::Bytes;
use geminga_proto::{
    ids::SubscriptionId,
    storage::v1::{
        CursorLogEntry, CursorRecord, DedupSnapshot, Removed, SnapshotBegin, SnapshotEnd,
        cursor_record::Record,
    },
};
use prost::Message;

use crate::cursor::{self, Cursor};

const FORMAT: u32 = 1;
/// Bytes after which a snapshot goes on in another entry.
const SNAPSHOT_ENTRY_BYTES: usize = 1 << 20;

/// Producers in one record of a snapshot.
const DEDUP_PART_PRODUCERS: usize = 1_000;

/// What the log says: every subscription's cursor, and the deduplication state.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct LogState {
    pub(crate) cursors: BTreeMap<SubscriptionId, Cursor>,
    pub(crate) dedup: DedupSnapshot,
    /// Entries lost to damage since the last complete snapshot.
    pub(crate) lost: u64,
}

/// An entry that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a cursor-log entry is damaged")]
pub(crate) struct LogDamage;

/// Encodes one log entry.
pub(crate) fn encode(records: Vec<Record>) -> Bytes {
    let records = records.into_iter().map(|record| CursorRecord { record: Some(record) }).collect();
    CursorLogEntry { format: FORMAT, records }.encode_to_vec().into()
}

fn decode(entry: &[u8]) -> Result<Vec<Record>, LogDamage> {
    let entry = CursorLogEntry::decode(entry).map_err(|_| LogDamage)?;
    if entry.format != FORMAT {
        return Err(LogDamage);
    }
    entry.records.into_iter().map(|record| record.record.ok_or(LogDamage)).collect()
}

/// A full snapshot as log entries: begin, every cursor, the deduplication state (in parts), end.
pub(crate) fn snapshot(id: u64, state: &LogState) -> Vec<Bytes> {
    let mut entries = Vec::new();
    let mut records = vec![Record::Begin(SnapshotBegin { snapshot: id })];
    let mut bytes = 0;
    let cursors = state.cursors.iter().flat_map(|(id, cursor)| cursor.encode(*id));
    // At least one part, which says how far it goes.
    let parts = state.dedup.producers.chunks(DEDUP_PART_PRODUCERS);
    let parts = parts.chain(state.dedup.producers.is_empty().then_some(&[][..]));
    let whole = DedupSnapshot { producers: Vec::new(), ..state.dedup.clone() };
    let dedup = parts
        .map(|part| Record::Dedup(DedupSnapshot { producers: part.to_vec(), ..whole.clone() }));
    for record in cursors.chain(dedup) {
        bytes += record.encoded_len();
        records.push(record);
        if bytes >= SNAPSHOT_ENTRY_BYTES {
            entries.push(encode(std::mem::take(&mut records)));
            bytes = 0;
        }
    }
    let subscriptions = state.cursors.len() as u32;
    records.push(Record::End(SnapshotEnd { snapshot: id, subscriptions }));
    entries.push(encode(records));
    entries
}

/// Folds log entries, in order, into the state they describe.
#[derive(Debug, Default)]
pub(crate) struct Fold {
    state: LogState,
    /// A snapshot that has begun and not ended: it counts only once it is complete.
    staged: Option<(u64, LogState)>,
    /// An entry was lost, perhaps with the beginning of a snapshot: until the next begin or end it is not known whether a
    /// deduplication record is the whole state or a part.
    torn: bool,
    complete: u64,
}

impl Fold {
    /// Applies one entry.
    ///
    /// # Errors
    /// [`LogDamage`]: nothing of the entry was applied, and a snapshot it may have been part of does not count (C4).
    pub(crate) fn apply(&mut self, entry: &[u8]) -> Result<(), LogDamage> {
        let records = decode(entry).inspect_err(|_| self.skip())?;
        records.into_iter().for_each(|record| self.apply_record(record));
        Ok(())
    }

    /// An entry could not be read at all.
    pub(crate) fn skip(&mut self) {
        (self.staged, self.torn) = (None, true);
        self.state.lost += 1;
        self.state.cursors.values_mut().for_each(Cursor::skip_numbers);
    }

    fn apply_record(&mut self, record: Record) {
        let target = self.staged.as_mut().map_or(&mut self.state, |(_, staged)| staged);
        match record {
            Record::Begin(begin) => {
                self.staged = Some((begin.snapshot, LogState::default()));
                self.torn = false;
            }
            Record::End(end) => {
                self.torn = false;
                if let Some((id, staged)) = self.staged.take()
                    && id == end.snapshot
                    && staged.cursors.len() == end.subscriptions as usize
                {
                    self.state = staged;
                    self.complete += 1;
                }
            }
            Record::State(state) => {
                target.cursors.insert(SubscriptionId(state.subscription), Cursor::decode(&state));
            }
            Record::Removed(Removed { subscription }) => {
                drop(target.cursors.remove(&SubscriptionId(subscription)))
            }
            Record::Dedup(dedup) => match &mut self.staged {
                Some((_, staged)) => {
                    let mut producers = std::mem::take(&mut staged.dedup.producers);
                    producers.extend(dedup.producers);
                    staged.dedup = DedupSnapshot { producers, ..dedup };
                }
                // An older state only makes the replay longer (DD2); a part of one would forget what is stored.
                None if self.torn => {}
                None => self.state.dedup = dedup,
            },
            // Of a cursor that was lost to damage: it will be made anew and redeliver (C4).
            record => {
                let of = cursor::subscription_of(&record);
                if let Some(cursor) = of.and_then(|id| target.cursors.get_mut(&id)) {
                    cursor.apply(&record);
                }
            }
        }
    }

    /// Complete snapshots seen.
    pub(crate) fn complete(&self) -> u64 {
        self.complete
    }

    /// The state after all entries.
    pub(crate) fn into_state(self) -> LogState {
        self.state
    }
}

#[cfg(test)]
mod tests {
    use geminga_proto::{
        ids::Offset,
        storage::v1::{Acked, dedup_snapshot::ProducerState},
    };

    use super::*;

    fn acked(subscription: u64, up_to: u64) -> Bytes {
        encode(vec![Record::Acked(Acked { subscription, up_to: Some(up_to), ..Acked::default() })])
    }

    fn two_cursors() -> LogState {
        let mut state = LogState::default();
        for id in [1, 2] {
            state.cursors.insert(SubscriptionId(id), Cursor::starting_at(Offset(id * 10), 0));
        }
        state.dedup.next_offset = 99;
        state
    }

    fn fold<'a>(entries: impl IntoIterator<Item = &'a Bytes>) -> Fold {
        let mut fold = Fold::default();
        for entry in entries {
            fold.apply(entry).expect("valid");
        }
        fold
    }

    #[test]
    fn a_snapshot_and_its_deltas_give_the_state_back() {
        let mut expected = two_cursors();
        let mut entries = snapshot(1, &expected);
        entries.push(acked(1, 14));
        expected.cursors.insert(SubscriptionId(1), Cursor::starting_at(Offset(15), 0));
        assert_eq!(fold(&entries).into_state(), expected);
    }

    #[test]
    fn a_snapshot_that_did_not_end_does_not_count() {
        let mut large = two_cursors();
        for n in 0..120_000 {
            let hole = Acked { ranges: vec![100 + n * 3, 100 + n * 3], ..Acked::default() };
            large.cursors.get_mut(&SubscriptionId(2)).expect("there").apply(&Record::Acked(hole));
            large.cursors.insert(SubscriptionId(10 + n), Cursor::starting_at(Offset(n), 0));
        }
        let new = snapshot(2, &large);
        assert!(new.len() > 1, "it takes several entries");
        let old = snapshot(1, &two_cursors());
        let cut: Vec<&Bytes> = old.iter().chain(&new[..new.len() - 1]).collect();
        let folded = fold(cut);
        assert_eq!(folded.complete(), 1);
        assert_eq!(folded.into_state(), two_cursors());
        let whole: Vec<&Bytes> = old.iter().chain(&new).collect();
        assert_eq!(fold(whole).into_state(), large);
    }

    #[test]
    fn damage_costs_redelivery_and_never_skips() {
        let mut damaged = Fold::default();
        for entry in snapshot(1, &two_cursors()) {
            damaged.apply(&entry).expect("valid");
        }
        assert_eq!(damaged.apply(b"\xff\xff"), Err(LogDamage));
        damaged.apply(&acked(2, 30)).expect("valid");
        let state = damaged.into_state();
        assert_eq!(state.cursors[&SubscriptionId(1)].mark_delete_next(), Offset(10));
        assert_eq!(state.cursors[&SubscriptionId(2)].mark_delete_next(), Offset(31));
    }
    #[test]
    fn a_part_of_the_deduplication_state_never_stands_for_all_of_it() {
        let mut large = two_cursors();
        for n in 0..8_000 {
            let name = format!("{n:0200}");
            large.dedup.producers.push(ProducerState {
                name,
                persisted: n,
                ..ProducerState::default()
            });
        }
        let old = snapshot(1, &two_cursors());
        let new = snapshot(2, &large);
        assert!(new.len() > 1, "it takes several entries");
        assert_eq!(fold(old.iter().chain(&new)).into_state(), large);
        for lost in 0..new.len() {
            let mut folded = fold(&old);
            for (n, entry) in new.iter().enumerate() {
                if n == lost { folded.skip() } else { folded.apply(entry).expect("valid") }
            }
            assert_eq!(folded.into_state().dedup, two_cursors().dedup, "entry {lost}");
        }
    }
}
