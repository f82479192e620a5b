//! Reading by offset: which ledger, which entry; from memory, else from bookies or objects (`read/place.rs`). Runs beside
//! the owner task, on a view of what is confirmed (RD2).

mod cached;
mod compacted;
mod place;
mod time;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use geminga_bookie_client::{LedgerMetadata, LedgerWriter, bookie_rpc::EntryRange, entry::Entry};
use geminga_proto::ids::{EntryId, LedgerId, Offset, SegmentId};
use parking_lot::Mutex;

pub(crate) use compacted::Wanted;
pub(crate) use place::Place;

use crate::{
    catch_up::CatchUp,
    entry_cache::{EntryCache, Taken},
    entry_header,
    error::ReadError,
    factory::ManagedLedgers,
    list::{List, Listed},
    offload::Stage,
    types::StoredBatch,
};

/// Every so many entries of a ledger the offset is remembered.
const INDEX_EVERY: u64 = 16;
/// Bytes asked for at a time while scanning.
const SCAN_BYTES: usize = 4 << 20;

/// Sparse places of offsets in one ledger: base offset -> entry; both rise.
#[derive(Debug, Default)]
struct LedgerIndex(BTreeMap<u64, u64>);

impl LedgerIndex {
    /// Remembers a place, unless one is near.
    fn insert(&mut self, base: Offset, entry: EntryId) {
        let before = self.0.range(..=base.0).next_back();
        let after = self.0.range(base.0..).next();
        let far = |place: Option<(&u64, &u64)>| {
            place.is_none_or(|(_, at)| at.abs_diff(entry.0) >= INDEX_EVERY)
        };
        if far(before) && far(after) {
            self.0.insert(base.0, entry.0);
        }
    }

    /// The closest entry known to start at or below the offset.
    fn at_or_below(&self, offset: Offset) -> Option<EntryId> {
        self.0.range(..=offset.0).next_back().map(|(_, entry)| EntryId(*entry))
    }
}

/// The open data ledger as readers see it.
#[derive(Debug)]
struct OpenLedger {
    writer: LedgerWriter,
    /// The last entry that the owner confirmed (RD2).
    last: Option<EntryId>,
}

/// What readers see of a segment.
#[derive(Debug)]
pub(crate) struct View {
    ledgers: ManagedLedgers,
    segment: SegmentId,
    cache: EntryCache,
    catch_up: CatchUp,
    list: Mutex<Arc<List>>,
    /// Everything below counts as gone: a trim was sent and did not conflict (M3). 0: none is under way.
    floor: AtomicU64,
    open: Mutex<Option<OpenLedger>>,
    closed: Mutex<BTreeMap<LedgerId, Arc<LedgerMetadata>>>,
    index: Mutex<BTreeMap<LedgerId, LedgerIndex>>,
}

impl View {
    pub(crate) fn new(ledgers: ManagedLedgers, segment: SegmentId, list: List) -> Self {
        let bytes_max = ledgers.parts().config.segment_cache_bytes;
        Self {
            cache: EntryCache::new(ledgers.cache_bytes().clone(), bytes_max),
            catch_up: CatchUp::new(ledgers.catch_up_bytes().clone(), bytes_max),
            segment,
            list: Mutex::new(Arc::new(list)),
            floor: AtomicU64::new(0),
            open: Mutex::default(),
            closed: Mutex::default(),
            index: Mutex::default(),
            ledgers,
        }
    }

    /// The owner changed the list or the open ledger.
    pub(crate) fn update(&self, list: &List, writer: Option<LedgerWriter>) {
        {
            let mut open = self.open.lock();
            let same = open
                .take()
                .filter(|old| writer.as_ref().is_some_and(|new| new.id() == old.writer.id()));
            *open = same.or(writer.map(|writer| OpenLedger { writer, last: None }));
        }
        // Handles of ledgers that left bookies are closed: their objects are read from now on (X3).
        let stages: BTreeMap<LedgerId, Option<Stage>> =
            list.all_ledgers().map(|listed| (listed.id, listed.stage())).collect();
        let deleted = Some(Stage::LedgerDeleted);
        self.closed.lock().retain(|id, _| stages.get(id).is_some_and(|stage| *stage < deleted));
        self.index.lock().retain(|id, _| stages.contains_key(id));
        *self.list.lock() = Arc::new(list.clone());
    }

    pub(crate) fn segment(&self) -> SegmentId {
        self.segment
    }

    pub(crate) fn now_ms(&self) -> u64 {
        self.ledgers.parts().clock.now().0
    }

    pub(crate) fn list(&self) -> Arc<List> {
        self.list.lock().clone()
    }

    /// The first offset that can be counted on: below it nothing opens, seeks or plans (M3).
    pub(crate) fn first_offset(&self) -> Offset {
        self.list().first_offset.max(Offset(self.floor.load(Ordering::SeqCst)))
    }

    /// A trim up to here is being sent, or (0) has an end.
    pub(crate) fn set_floor(&self, floor: Offset) {
        self.floor.store(floor.0, Ordering::SeqCst);
    }

    /// The open data ledger's size, bytes.
    pub(crate) fn open_bytes(&self) -> u64 {
        self.open.lock().as_ref().map_or(0, |open| open.writer.length())
    }

    /// The owner confirmed the open ledger up to here: readers may go so far.
    pub(crate) fn confirmed(&self, last: EntryId) {
        if let Some(open) = &mut *self.open.lock() {
            open.last = Some(last);
        }
    }

    /// Remembers where an offset of a ledger being written lies; every so many entries is enough.
    pub(crate) fn place(&self, ledger: LedgerId, base: Offset, entry: EntryId) {
        if entry.0.is_multiple_of(INDEX_EVERY) {
            self.index(ledger, base, entry);
        }
    }

    fn index(&self, ledger: LedgerId, base: Offset, entry: EntryId) {
        self.index.lock().entry(ledger).or_default().insert(base, entry);
    }

    /// Batches from the one that contains `from` on, all below `end`, from bookies or objects.
    pub(crate) async fn read_stored(
        &self,
        from: Offset,
        end: Offset,
        bytes_max: usize,
        messages_max: usize,
    ) -> Result<Vec<StoredBatch>, ReadError> {
        let mut taken = Taken::new(from, bytes_max, messages_max);
        while taken.next() < end && !taken.is_full() {
            let list = self.list();
            let Some(listed) = list.holding(taken.next()) else { break };
            let before = taken.batches.len();
            match self.read_ledger(listed, &mut taken, end, bytes_max).await {
                Ok(()) if taken.batches.len() > before => {}
                // What was read is good; whoever reads on from there hears of the rest.
                Err(error) if taken.batches.is_empty() => {
                    // Trimmed while it was read.
                    let first = self.list().first_offset;
                    return Err(if from < first { ReadError::Trimmed { first } } else { error });
                }
                Ok(()) | Err(_) => break,
            }
        }
        if taken.batches.is_empty() {
            return Err(ReadError::Unavailable(format!(
                "offset {from} is in no ledger that can be read yet"
            )));
        }
        Ok(taken.batches)
    }

    async fn read_ledger(
        &self,
        listed: &Listed,
        taken: &mut Taken,
        end: Offset,
        bytes_max: usize,
    ) -> Result<(), ReadError> {
        let place = self.place_of(listed).await?;
        let Some(last) = place.last() else { return Ok(()) };
        let mut next = self.locate(&place, listed, last, taken.next()).await?;
        while next <= last && !taken.is_full() {
            let range = EntryRange { first: next, last };
            let budget = bytes_max.clamp(1, SCAN_BYTES);
            let entries = self.entries(&place, range, budget).await?;
            for entry in entries {
                next = entry.id.next();
                let Some(batch) = decode(listed.id, &entry)? else { continue };
                self.index(listed.id, batch.base_offset, entry.id);
                let over = batch.base_offset >= end;
                let before =
                    batch.base_offset.advance(u64::from(batch.header.count)) <= taken.next();
                if before {
                    continue;
                }
                if over || !taken.take(&batch) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// An entry at or before the one that holds `offset`: by the index, else by halving the ledger.
    async fn locate(
        &self,
        place: &Place,
        listed: &Listed,
        last: EntryId,
        offset: Offset,
    ) -> Result<EntryId, ReadError> {
        if offset <= listed.base_offset {
            return Ok(EntryId(0));
        }
        if let Some(found) = self.locate_in_objects(place, offset).await {
            return found;
        }
        let known = self.index.lock().get(&listed.id).and_then(|index| index.at_or_below(offset));
        let (mut low, mut high) = (known.unwrap_or(EntryId(0)).0, last.0);
        if known.is_some() && self.is_fully_indexed(listed.id, last) {
            return Ok(EntryId(low));
        }
        // Who reads on is a step away from a known place: look there first.
        let mut near = known.is_some();
        while high - low > INDEX_EVERY {
            let middle = EntryId(if std::mem::take(&mut near) {
                low + INDEX_EVERY
            } else {
                low + (high - low) / 2
            });
            let entries =
                self.entries(place, EntryRange { first: middle, last: middle }, 1).await?;
            let entry = entries
                .first()
                .ok_or_else(|| ReadError::Unavailable("an empty answer".to_owned()))?;
            let (header, _) = entry_header::decode(&entry.payload)
                .map_err(|error| damaged(listed.id, error.to_string()))?;
            if header.base_offset <= offset.0 { low = middle.0 } else { high = middle.0 }
        }
        Ok(EntryId(low))
    }

    /// The index was kept while all of the ledger was written or replayed: the next place is at most a step away.
    fn is_fully_indexed(&self, ledger: LedgerId, last: EntryId) -> bool {
        self.index
            .lock()
            .get(&ledger)
            .is_some_and(|index| index.0.len() as u64 * INDEX_EVERY > last.0)
    }

    /// Every entry of a closed ledger that may hold offsets from `from` on, control entries included, in order; for the
    /// replay of a load (DD2).
    pub(crate) async fn replay(
        &self,
        listed: &Listed,
        from: Offset,
        mut each: impl FnMut(StoredBatch),
    ) -> Result<(), ReadError> {
        let place = self.place_of(listed).await?;
        let Some(last) = place.last() else { return Ok(()) };
        let mut next = self.locate(&place, listed, last, from).await?;
        while next <= last {
            let entries =
                self.entries(&place, EntryRange { first: next, last }, SCAN_BYTES).await?;
            for entry in entries {
                next = entry.id.next();
                let (header, payload) = entry_header::decode(&entry.payload)
                    .map_err(|error| damaged(listed.id, error))?;
                let base_offset = Offset(header.base_offset);
                if header.count > 0 {
                    self.index(listed.id, base_offset, entry.id);
                }
                if base_offset >= from {
                    each(StoredBatch { base_offset, header, payload });
                }
            }
        }
        Ok(())
    }

    /// Every entry of a closed cursor-log ledger; a damaged one comes as `None` (C4).
    pub(crate) async fn log_entries(
        &self,
        listed: &Listed,
        mut each: impl FnMut(Option<&Entry>),
    ) -> Result<(), ReadError> {
        let place = self.place_of(listed).await?;
        let Some(last) = place.last() else { return Ok(()) };
        let mut next = EntryId(0);
        while next <= last {
            match self.entries(&place, EntryRange { first: next, last }, SCAN_BYTES).await {
                Ok(entries) => {
                    for entry in entries {
                        next = entry.id.next();
                        each(Some(&entry));
                    }
                }
                Err(ReadError::Damaged(why)) => {
                    tracing::error!(
                        ledger = listed.id.0,
                        entry = next.0,
                        why,
                        "cursor-log entry skipped"
                    );
                    each(None);
                    next = next.next();
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Entries of the open cursor-log ledger as they can be read back (C4).
    pub(crate) async fn read_back(
        &self,
        writer: &LedgerWriter,
        range: EntryRange,
    ) -> Result<Vec<Entry>, ReadError> {
        let place = Place::on_bookies(Arc::new(writer.metadata().value), Some(range.last));
        self.read_range(&place, range).await
    }

    /// Entries of a closed cursor-log ledger as they can be read back.
    pub(crate) async fn read_back_closed(
        &self,
        listed: &Listed,
        range: EntryRange,
    ) -> Result<Vec<Entry>, ReadError> {
        let place = self.place_of(listed).await?;
        self.read_range(&place, range).await
    }

    async fn read_range(&self, place: &Place, range: EntryRange) -> Result<Vec<Entry>, ReadError> {
        let mut entries = Vec::new();
        let mut next = range.first;
        while next <= range.last {
            let range = EntryRange { first: next, last: range.last };
            for entry in self.entries(place, range, SCAN_BYTES).await? {
                next = entry.id.next();
                entries.push(entry);
            }
        }
        Ok(entries)
    }
}

fn damaged(ledger: LedgerId, why: impl std::fmt::Display) -> ReadError {
    ReadError::Damaged(format!("ledger {ledger}: {why}"))
}

/// A data entry as a batch; none for a control entry.
fn decode(ledger: LedgerId, entry: &Entry) -> Result<Option<StoredBatch>, ReadError> {
    let (header, payload) =
        entry_header::decode(&entry.payload).map_err(|error| damaged(ledger, error))?;
    let base_offset = Offset(header.base_offset);
    Ok((header.count > 0).then_some(StoredBatch { base_offset, header, payload }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_leads_to_an_entry_at_or_before_the_offset() {
        let mut index = LedgerIndex::default();
        // First the tail, then all of it: whoever comes first.
        for entry in (80..100u64).chain(0..100) {
            index.insert(Offset(1000 + entry * 7), EntryId(entry));
        }
        assert!(index.0.len() < 10, "it is sparse");
        assert_eq!(index.at_or_below(Offset(999)), None);
        for entry in 0..100u64 {
            let found = index.at_or_below(Offset(1000 + entry * 7 + 3)).expect("known").0;
            assert!(found <= entry && entry - found < 2 * INDEX_EVERY, "{entry}: {found}");
        }
    }
}
