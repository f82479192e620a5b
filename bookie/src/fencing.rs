//! What this bookie may say of a ledger: fences, the LAC, accepted and synced entries, limbo, dropped ledgers.
//!
//! Pure: events in, verdicts out. One lock around it makes D2's one step: the fence check of an add and its becoming
//! visible to look-ups cannot be separated, since [`Ledgers::accept_add`] does both.
//!
//! ```text
//! accept_add --ticket--> pending --on_synced--> row in the memory table --checkpoint--> index file
//! ```
//! A pending entry is neither held nor absent: whoever asks waits for its group.

use std::{collections::BTreeMap, sync::Arc};

use geminga_proto::ids::{EntryId, LedgerId};

use crate::{
    journal::format::Bound,
    ledger_set::LedgerSet,
    validity::{Place, Validity},
};

/// Where an entry lies, and what it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Journal file number.
    pub file: u64,
    /// Position of the entry's encoding in the file, bytes.
    pub position: u64,
    /// Bytes of the encoding.
    pub length: u32,
    /// The entry's own digest.
    pub digest: u32,
}

/// Rows that no index file has yet.
pub type MemoryTable = BTreeMap<(LedgerId, EntryId), Row>;

/// Everything known of the ledgers of one directory.
#[derive(Debug, Default)]
pub struct Ledgers {
    ledgers: BTreeMap<LedgerId, Ledger>,
    tombstones: LedgerSet,
    moved_away: LedgerSet,
    limbo: Option<Bound>,
    /// What point reads said of ledgers while there is a bound (D8): true = created above it.
    judged: BTreeMap<LedgerId, bool>,
    /// Synced since the last checkpoint.
    active: MemoryTable,
    /// Being written to an index file.
    frozen: Option<Arc<MemoryTable>>,
    /// Rows whose stored bytes failed their check: a repeated add replaces them.
    damaged: MemoryTable,
    /// Changes when the set of index files does.
    version: u64,
}

#[derive(Debug, Default)]
struct Ledger {
    fence: Fence,
    /// Of a ledger that moved away and came back: its first record since.
    valid_from: Option<Place>,
    /// About to be dropped because it moved away (G1); in memory only.
    leaving: bool,
    /// Bytes of its rows; a copy that replaced a damaged one counts twice.
    bytes: u64,
    lac: Option<EntryId>,
    /// The highest entry that an index file may hold.
    indexed_max: Option<EntryId>,
    /// The highest entry synced since the last checkpoint.
    active_max: Option<EntryId>,
    pending: BTreeMap<EntryId, Pending>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Fence {
    #[default]
    None,
    /// Accepted, not synced: refuses plain adds, confirms nothing.
    Accepted,
    Synced,
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    digest: u32,
    ticket: u64,
}

/// What an add asks for.
#[derive(Clone, Copy, Debug)]
pub struct AddFacts {
    pub ledger: LedgerId,
    pub entry: EntryId,
    pub lac: Option<EntryId>,
    pub digest: u32,
    pub recovery: bool,
}

/// What the disk leaves room for (D10).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Room {
    /// All adds.
    #[default]
    Writable,
    /// Recovery adds and fences.
    RecoveryOnly,
    /// Fences only.
    Full,
}

/// What a look-up in the index files said, for [`Ledgers::accept_add`].
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// [`Ledgers::version`] when the look-up began.
    pub version: u64,
    /// The row found, in memory or in an index file.
    pub row: Option<Row>,
    /// The bytes there were read and fail their check: the add may replace them (section 3).
    pub damaged: bool,
}

/// What becomes of an add.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddVerdict {
    /// Accepted and pending under the ticket; to be journaled in this order.
    Accept,
    /// The same entry is held and synced (idempotent).
    Held,
    /// The same entry is pending: answer when everything accepted so far is synced, if it is held then.
    Wait,
    /// A plain add after a fence.
    Fenced,
    /// Disk or limbo.
    ReadOnly,
    /// No room for a recovery add.
    NoSpace,
    /// Another digest under the same id: alarm.
    Refused,
    /// Deleted and dropped (D13).
    Dropped,
    /// Look the entry up in the index files, then ask again.
    LookUp,
    /// Held under another digest: read those bytes, then ask again.
    Inspect(Row),
    /// Point-read the ledger's key, then ask again (D8).
    Judge,
}

/// What becomes of a fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FenceVerdict {
    /// Journal the flag.
    Journal,
    /// The flag is synced, but adds accepted earlier are pending: wait for them.
    Wait,
    /// Everything is synced.
    Done,
    /// Deleted and dropped (D13).
    Dropped,
}

/// What an entry that was not found may be called (D9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AbsentVerdict {
    /// The explicit no.
    Absent,
    Limbo,
    Dropped,
    /// Point-read the ledger's key, then ask again (D8).
    Judge,
}

/// A ledger's part of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LedgerSummary {
    pub ledger: LedgerId,
    pub fenced: bool,
    pub lac: Option<EntryId>,
    pub indexed_max: Option<EntryId>,
    pub valid_from: Option<Place>,
    pub bytes: u64,
}

impl Ledgers {
    /// The state a checkpoint describes.
    #[must_use]
    pub fn restore(
        summaries: &[LedgerSummary],
        tombstones: LedgerSet,
        moved_away: LedgerSet,
        limbo: Option<Bound>,
    ) -> Self {
        let ledgers = summaries.iter().map(|summary| {
            let fence = if summary.fenced { Fence::Synced } else { Fence::None };
            let ledger = Ledger {
                fence,
                lac: summary.lac,
                indexed_max: summary.indexed_max,
                valid_from: summary.valid_from,
                bytes: summary.bytes,
                ..Ledger::default()
            };
            (summary.ledger, ledger)
        });
        Self { ledgers: ledgers.collect(), tombstones, moved_away, limbo, ..Self::default() }
    }

    /// Accepts or refuses an add; on `Accept` it is pending under `ticket` (D2).
    pub fn accept_add(
        &mut self,
        add: AddFacts,
        ticket: u64,
        room: Room,
        known: Option<Known>,
    ) -> AddVerdict {
        if self.tombstones.contains(add.ledger) {
            return AddVerdict::Dropped;
        }
        if add.recovery && self.is_leaving(add.ledger) {
            return AddVerdict::Dropped; // a copy must not settle on what is about to go (G1, T51)
        }
        if !add.recovery && self.is_fenced(add.ledger) {
            return AddVerdict::Fenced; // also of an entry held here: a rival may have brought it (T52)
        }
        if !add.recovery && self.limbo.is_some() {
            match self.judged(add.ledger) {
                Some(true) => {}
                Some(false) => return AddVerdict::ReadOnly,
                None => return AddVerdict::Judge,
            }
        }
        if let Some(verdict) = self.held_already(add, known) {
            return verdict;
        }
        match (room, add.recovery) {
            (Room::Writable, _) | (Room::RecoveryOnly, true) => {}
            (_, false) => return AddVerdict::ReadOnly,
            (Room::Full, true) => return AddVerdict::NoSpace,
        }
        let ledger = self.ledgers.entry(add.ledger).or_default();
        ledger.lac = ledger.lac.max(add.lac);
        ledger.pending.insert(add.entry, Pending { digest: add.digest, ticket });
        AddVerdict::Accept
    }

    fn held_already(&self, add: AddFacts, known: Option<Known>) -> Option<AddVerdict> {
        let ledger = self.ledgers.get(&add.ledger)?;
        if let Some(pending) = ledger.pending.get(&add.entry) {
            let same = pending.digest == add.digest;
            return Some(if same { AddVerdict::Wait } else { AddVerdict::Refused });
        }
        let known = known.filter(|known| known.version == self.version);
        let row = match self.row(add.ledger, add.entry) {
            Some(row) => row,
            None if ledger.indexed_max < Some(add.entry) => return None,
            None => match known {
                None => return Some(AddVerdict::LookUp),
                Some(known) => known.row?,
            },
        };
        if self.damaged.get(&(add.ledger, add.entry)) == Some(&row) {
            return None;
        }
        if row.digest == add.digest {
            return Some(AddVerdict::Held);
        }
        match known.filter(|known| known.row == Some(row)) {
            None => Some(AddVerdict::Inspect(row)),
            Some(known) if known.damaged => None,
            Some(_) => Some(AddVerdict::Refused),
        }
    }

    /// The add of this ticket was not journaled (deadline, no space): it was never accepted.
    pub fn withdraw(&mut self, ledger: LedgerId, entry: EntryId, ticket: u64) {
        if let Some(ledger) = self.ledgers.get_mut(&ledger)
            && ledger.pending.get(&entry).is_some_and(|pending| pending.ticket == ticket)
        {
            ledger.pending.remove(&entry);
        }
    }

    /// The group with this entry is synced: it is held.
    pub fn on_synced(&mut self, ledger: LedgerId, entry: EntryId, lac: Option<EntryId>, row: Row) {
        if self.tombstones.contains(ledger) {
            return;
        }
        let moved_away = self.moved_away.contains(ledger);
        let state = self.ledgers.entry(ledger).or_default();
        state.pending.remove(&entry);
        state.bytes += u64::from(row.length);
        if moved_away {
            state.valid_from.get_or_insert((row.file, row.position));
        }
        state.lac = state.lac.max(lac);
        state.active_max = state.active_max.max(Some(entry));
        self.damaged.remove(&(ledger, entry));
        self.active.insert((ledger, entry), row);
    }

    /// Whether the entry is held and synced under this digest, as far as memory knows: for an add that waited.
    #[must_use]
    pub fn is_held(&self, ledger: LedgerId, entry: EntryId, digest: u32) -> bool {
        self.row(ledger, entry).is_some_and(|row| row.digest == digest)
    }

    /// Accepts a fence: from here on no plain add is accepted (D2). An unknown ledger is created by it.
    pub fn accept_fence(&mut self, ledger: LedgerId) -> FenceVerdict {
        if self.tombstones.contains(ledger) {
            return FenceVerdict::Dropped;
        }
        if self.moved_away.contains(ledger) {
            // The fenced set is synced, and no state is made for what is not here.
            let waits = self.ledgers.get(&ledger).is_some_and(|ledger| !ledger.pending.is_empty());
            return if waits { FenceVerdict::Wait } else { FenceVerdict::Done };
        }
        let state = self.ledgers.entry(ledger).or_default();
        match state.fence {
            Fence::Synced if state.pending.is_empty() => FenceVerdict::Done,
            Fence::Synced => FenceVerdict::Wait,
            Fence::None | Fence::Accepted => {
                state.fence = Fence::Accepted;
                FenceVerdict::Journal
            }
        }
    }

    /// The flag's group is synced.
    pub fn on_fence_synced(&mut self, ledger: LedgerId) {
        if !self.tombstones.contains(ledger) && !self.moved_away.contains(ledger) {
            self.ledgers.entry(ledger).or_default().fence = Fence::Synced;
        }
    }

    /// Whether plain adds are refused for ever.
    #[must_use]
    pub fn is_fenced(&self, ledger: LedgerId) -> bool {
        self.moved_away.contains(ledger)
            || self
                .ledgers
                .get(&ledger)
                .is_some_and(|ledger| ledger.fence != Fence::None || ledger.leaving)
    }

    /// Marks a ledger that moved away as *leaving* (G1): plain adds are FENCED, recovery adds and LIST unknown. False if it
    /// is not here, or an add to it is under way: then a copy may be settling, and it stays.
    pub fn mark_leaving(&mut self, ledger: LedgerId) -> bool {
        match self.ledgers.get_mut(&ledger) {
            Some(state) if state.pending.is_empty() => {
                state.leaving = true;
                true
            }
            _ => false,
        }
    }

    /// The ledger stays after all.
    pub fn unmark_leaving(&mut self, ledger: LedgerId) {
        if let Some(state) = self.ledgers.get_mut(&ledger) {
            state.leaving = false;
        }
    }

    /// Whether the ledger is about to be dropped (G1).
    #[must_use]
    pub fn is_leaving(&self, ledger: LedgerId) -> bool {
        self.ledgers.get(&ledger).is_some_and(|ledger| ledger.leaving)
    }

    /// Which rows of the ledger count.
    #[must_use]
    pub fn validity(&self, ledger: LedgerId) -> Validity {
        if !self.moved_away.contains(ledger) {
            return Validity::All;
        }
        let from = self.ledgers.get(&ledger).and_then(|ledger| ledger.valid_from);
        from.map_or(Validity::Nothing, Validity::From)
    }

    /// Whether nothing of the ledger that lies in this journal file counts.
    #[must_use]
    pub fn is_dead_in(&self, ledger: LedgerId, file: u64) -> bool {
        match self.validity(ledger) {
            Validity::All => self.tombstones.contains(ledger),
            Validity::From(place) => place.0 > file || self.tombstones.contains(ledger),
            Validity::Nothing => true,
        }
    }

    /// Bytes stored of a ledger, about.
    #[must_use]
    pub fn bytes(&self, ledger: LedgerId) -> u64 {
        self.ledgers.get(&ledger).map_or(0, |ledger| ledger.bytes)
    }

    /// Remembers a LAC that the writer told; refused after a fence (section 3).
    pub fn write_lac(&mut self, ledger: LedgerId, lac: EntryId) {
        if self.tombstones.contains(ledger) || self.is_fenced(ledger) {
            return;
        }
        if let Some(ledger) = self.ledgers.get_mut(&ledger) {
            ledger.lac = ledger.lac.max(Some(lac));
        }
    }

    /// The highest LAC told; none for a ledger never heard of.
    #[must_use]
    pub fn lac(&self, ledger: LedgerId) -> Option<EntryId> {
        self.ledgers.get(&ledger).and_then(|ledger| ledger.lac)
    }

    /// Whether the ledger was dropped because it was Deleted.
    #[must_use]
    pub fn is_dropped(&self, ledger: LedgerId) -> bool {
        self.tombstones.contains(ledger)
    }

    /// Whether an entry of the range is accepted and not synced.
    #[must_use]
    pub fn has_pending(&self, ledger: LedgerId, first: EntryId, last: EntryId) -> bool {
        first <= last
            && self
                .ledgers
                .get(&ledger)
                .is_some_and(|ledger| ledger.pending.range(first..=last).next().is_some())
    }

    /// The row in memory.
    #[must_use]
    pub fn row(&self, ledger: LedgerId, entry: EntryId) -> Option<Row> {
        let key = (ledger, entry);
        let row = self
            .active
            .get(&key)
            .or_else(|| self.frozen.as_ref().and_then(|frozen| frozen.get(&key)));
        row.copied().filter(|row| self.validity(ledger).admits(row))
    }

    /// The rows in memory of a range, ascending.
    #[must_use]
    pub fn rows(&self, ledger: LedgerId, first: EntryId, last: EntryId) -> BTreeMap<EntryId, Row> {
        let mut rows = BTreeMap::new();
        if first > last {
            return rows;
        }
        let range = (ledger, first)..=(ledger, last);
        if let Some(frozen) = &self.frozen {
            rows.extend(frozen.range(range.clone()).map(|(key, row)| (key.1, *row)));
        }
        rows.extend(self.active.range(range).map(|(key, row)| (key.1, *row)));
        let validity = self.validity(ledger);
        rows.retain(|_, row| validity.admits(row)); // a frozen row may be of a copy that is gone
        rows
    }

    /// Whether an index file may hold the entry, or one before it.
    #[must_use]
    pub fn indexed_max(&self, ledger: LedgerId) -> Option<EntryId> {
        self.ledgers.get(&ledger).and_then(|ledger| ledger.indexed_max)
    }

    /// What an entry that neither memory nor any index file has may be called (D9).
    #[must_use]
    pub fn absent(&self, ledger: LedgerId) -> AbsentVerdict {
        if self.tombstones.contains(ledger) {
            return AbsentVerdict::Dropped;
        }
        if self.moved_away.contains(ledger) || self.is_leaving(ledger) {
            return AbsentVerdict::Dropped;
        }
        if self.limbo.is_none() {
            return AbsentVerdict::Absent;
        }
        match self.judged(ledger) {
            Some(true) => AbsentVerdict::Absent,
            Some(false) => AbsentVerdict::Limbo,
            None => AbsentVerdict::Judge,
        }
    }

    /// The stored bytes at this row failed their check. It says nothing of another row of the same entry: a repeated add
    /// may have replaced the copy while this one was read.
    pub fn note_damaged(&mut self, ledger: LedgerId, entry: EntryId, row: Row) {
        const DAMAGED_MAX: usize = 100_000;
        if self.damaged.len() < DAMAGED_MAX {
            self.damaged.insert((ledger, entry), row);
        }
    }

    /// Whether the bytes at this row are known to fail their check: then they are not listed as held (LIST).
    #[must_use]
    pub fn is_damaged(&self, ledger: LedgerId, entry: EntryId, row: &Row) -> bool {
        self.damaged.get(&(ledger, entry)) == Some(row)
    }

    /// The bound, if anything is in limbo.
    #[must_use]
    pub fn limbo(&self) -> Option<Bound> {
        self.limbo
    }

    /// Everything created at or below the bound is fenced and in limbo (D8). Bounds only grow.
    pub fn set_limbo(&mut self, bound: Bound) {
        if self.limbo < Some(bound) {
            self.limbo = Some(bound);
            self.judged.clear();
        }
    }

    fn judged(&self, ledger: LedgerId) -> Option<bool> {
        let bound = self.limbo?;
        match ((ledger.0 >> 56) as u8).cmp(&bound.generation) {
            std::cmp::Ordering::Greater => Some(true),
            std::cmp::Ordering::Less => Some(false),
            std::cmp::Ordering::Equal => self.judged.get(&ledger).copied(),
        }
    }

    /// A linearizable point read found the ledger's key, created at this revision.
    pub fn judge(&mut self, ledger: LedgerId, created: i64) {
        if let Some(bound) = self.limbo {
            self.judged.insert(ledger, created > bound.revision);
        }
    }

    /// Ledgers known to be in limbo.
    #[must_use]
    pub fn limbo_ledgers(&self) -> usize {
        if self.limbo.is_none() {
            return 0;
        }
        self.ledgers.keys().filter(|ledger| self.judged(**ledger) != Some(true)).count()
    }

    /// Every ledger with state here.
    pub fn ids(&self) -> impl Iterator<Item = LedgerId> + '_ {
        self.ledgers.keys().copied()
    }

    /// The ledger was Deleted, and its tombstone is synced: everything of it goes (D13, G1).
    pub fn drop_deleted(&mut self, ledger: LedgerId) {
        self.tombstones.insert(ledger);
        self.forget(ledger);
    }

    /// The ledger moved away, and its id is synced in the fenced set (D13).
    pub fn drop_moved_away(&mut self, ledger: LedgerId) {
        self.moved_away.insert(ledger);
        self.forget(ledger);
        self.version += 1; // what was looked up before may be a row of the copy that is gone
    }

    fn forget(&mut self, ledger: LedgerId) {
        self.ledgers.remove(&ledger);
        self.judged.remove(&ledger);
        for table in [&mut self.active, &mut self.damaged] {
            let range = (ledger, EntryId(0))..=(ledger, EntryId(u64::MAX));
            let keys: Vec<_> = table.range(range).map(|(key, _)| *key).collect();
            for key in keys {
                table.remove(&key);
            }
        }
    }

    /// Dropped ledgers, both kinds.
    #[must_use]
    pub fn dropped(&self) -> (&LedgerSet, &LedgerSet) {
        (&self.tombstones, &self.moved_away)
    }

    /// Rows in memory.
    #[must_use]
    pub fn memory_rows(&self) -> usize {
        self.active.len() + self.frozen.as_ref().map_or(0, |frozen| frozen.len())
    }

    /// Changes when a look-up in the index files has to be repeated.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Freezes the memory table for a checkpoint: its rows, and the summaries as they will stand with them.
    pub fn freeze(&mut self) -> (Arc<MemoryTable>, Vec<LedgerSummary>) {
        debug_assert!(self.frozen.is_none(), "one checkpoint at a time");
        let frozen = Arc::new(std::mem::take(&mut self.active));
        self.frozen = Some(Arc::clone(&frozen));
        let summaries = self.ledgers.iter_mut().map(|(&ledger, state)| {
            state.indexed_max = state.indexed_max.max(state.active_max.take());
            LedgerSummary {
                ledger,
                fenced: state.fence != Fence::None,
                lac: state.lac,
                indexed_max: state.indexed_max,
                valid_from: state.valid_from,
                bytes: state.bytes,
            }
        });
        (frozen, summaries.collect())
    }

    /// The frozen rows are in an index file now; given back, since many rows take long to drop.
    pub fn thaw_into_index(&mut self) -> Option<Arc<MemoryTable>> {
        self.version += 1;
        self.frozen.take()
    }

    /// The checkpoint failed: the frozen rows go back, newer ones win.
    pub fn thaw_back(&mut self) {
        let Some(frozen) = self.frozen.take() else { return };
        for (&(ledger, entry), row) in frozen.iter() {
            if self.ledgers.contains_key(&ledger) && self.validity(ledger).admits(row) {
                self.active.entry((ledger, entry)).or_insert(*row);
            }
        }
        self.version += 1;
    }
}

#[cfg(test)]
mod tests;
