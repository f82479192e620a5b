//! Reading a ledger from its objects: index and footer once, then whole blocks, each verified (X5).

use std::sync::Arc;

use geminga_bookie_client::{bookie_rpc::EntryRange, entry::Entry};
use geminga_proto::ids::{EntryId, LedgerId, Offset, SegmentId};

use super::{
    Object, Offload,
    format::{self, FOOTER_BYTES, ObjectDamage, ObjectId, Row},
    lru::Lru,
    store::{ColdError, ColdStorage},
};
use crate::{error::ReadError, metrics::ManagedLedgerMetrics};

/// Cold storage as readers of a broker share it: with what was fetched lately, bounded.
#[derive(Debug)]
pub(crate) struct ColdReader {
    pub(crate) cold: ColdStorage,
    indexes: Lru<ObjectId, Arc<Vec<Row>>>,
    blocks: Lru<(ObjectId, u64), Arc<Vec<Entry>>>,
    metrics: ManagedLedgerMetrics,
}

/// A ledger that lies in objects.
#[derive(Clone, Debug)]
pub(crate) struct ObjectLedger {
    pub(crate) segment: SegmentId,
    pub(crate) ledger: LedgerId,
    pub(crate) offload: Offload,
}

impl ObjectLedger {
    pub(crate) fn id(&self, part: usize) -> ObjectId {
        let (segment, ledger, uuid) = (self.segment, self.ledger, self.offload.uuid);
        ObjectId { segment, ledger, uuid, part: part as u32 }
    }

    fn objects(&self) -> &[Object] {
        &self.offload.objects
    }
}

impl From<ObjectDamage> for ReadError {
    fn from(damage: ObjectDamage) -> Self {
        Self::Damaged(damage.to_string())
    }
}

/// An object that is gone or has another content is damage: the list says it is there.
pub(crate) fn read_error(ledger: LedgerId, error: &ColdError) -> ReadError {
    let why = format!("ledger {ledger}: {error}");
    match error {
        ColdError::NotFound { .. } | ColdError::Conflict { .. } => ReadError::Damaged(why),
        ColdError::Refused { .. } | ColdError::Unavailable { .. } => ReadError::Unavailable(why),
    }
}

impl ColdReader {
    pub(crate) fn new(
        cold: ColdStorage,
        index_bytes_max: u64,
        block_bytes_max: u64,
        metrics: ManagedLedgerMetrics,
    ) -> Self {
        let (indexes, blocks) = (Lru::new(index_bytes_max), Lru::new(block_bytes_max));
        Self { cold, indexes, blocks, metrics }
    }

    /// Entries from `range.first` on: at least one, in order, at most up to `range.last`, about `bytes_max` bytes and whole
    /// blocks of them. Cancel-safe.
    pub(crate) async fn entries(
        &self,
        ledger: &ObjectLedger,
        range: EntryRange,
        bytes_max: usize,
    ) -> Result<Vec<Entry>, ReadError> {
        let after = ledger.objects().partition_point(|object| object.first_entry <= range.first);
        let part = after.saturating_sub(1);
        let rows = self.index(ledger, part).await?;
        let at = rows.partition_point(|row| row.first_entry <= range.first).saturating_sub(1);
        let wanted = rows[at..].iter().take_while(|row| row.first_entry <= range.last);
        let mut entries = Vec::new();
        let mut bytes = 0;
        let mut run: &[Row] = &[];
        for row in wanted.take_while(|row| {
            let first = bytes == 0;
            bytes += row.raw_length as usize;
            first || bytes <= bytes_max
        }) {
            match self.blocks.get(&(ledger.id(part), row.position)) {
                Some(block) if run.is_empty() => entries.extend_from_slice(&block),
                // A kept block behind ones to fetch: the next read finds it.
                Some(_) => break,
                None => run = grow(&rows, run, row),
            }
        }
        if !run.is_empty() {
            self.fetch(ledger, part, run, &mut entries).await?;
        }
        entries.retain(|entry| range.first <= entry.id && entry.id <= range.last);
        if entries.is_empty() {
            let why = format!("object {} lacks entry {}", ledger.id(part).name(), range.first);
            return Err(ReadError::Damaged(why));
        }
        self.metrics.object_entries.inc_by(entries.len() as u64);
        Ok(entries)
    }

    /// Neighbouring blocks in one request.
    async fn fetch(
        &self,
        ledger: &ObjectLedger,
        part: usize,
        rows: &[Row],
        entries: &mut Vec<Entry>,
    ) -> Result<(), ReadError> {
        let (Some(first), Some(last)) = (rows.first(), rows.last()) else { return Ok(()) };
        let id = ledger.id(part);
        let range = first.position..last.position + u64::from(last.length);
        let bytes = self.cold.read(&id.name(), range.clone()).await;
        let bytes = bytes.map_err(|error| read_error(ledger.ledger, &error))?;
        self.metrics.object_read_bytes.inc_by(bytes.len() as u64);
        for row in rows {
            let at = (row.position - range.start) as usize;
            // Copied out: a block that stays must not pin its neighbours.
            let block = bytes::Bytes::copy_from_slice(&bytes[at..at + row.length as usize]);
            let block = Arc::new(format::decode_block(&id, row, block).inspect_err(|damage| {
                self.metrics.object_damage.inc();
                tracing::error!(ledger = ledger.ledger.0, %damage, "object damaged");
            })?);
            entries.extend_from_slice(&block);
            self.blocks.insert((id, row.position), block, u64::from(row.raw_length));
        }
        Ok(())
    }

    /// An entry at or before the one that holds `offset`.
    pub(crate) async fn locate(
        &self,
        ledger: &ObjectLedger,
        offset: Offset,
    ) -> Result<EntryId, ReadError> {
        let mut found = EntryId(0);
        for part in 0..ledger.objects().len() {
            let rows = self.index(ledger, part).await?;
            let below = rows.partition_point(|row| row.first_offset <= offset);
            // The last block that begins at or below it, of this object or one before.
            found = below.checked_sub(1).map_or(found, |at| rows[at].first_entry);
            if below < rows.len() {
                break;
            }
        }
        Ok(found)
    }

    /// Where the blocks of an object lie; fetched once.
    pub(crate) async fn index(
        &self,
        ledger: &ObjectLedger,
        part: usize,
    ) -> Result<Arc<Vec<Row>>, ReadError> {
        let id = ledger.id(part);
        if let Some(rows) = self.indexes.get(&id) {
            return Ok(rows);
        }
        let no_object = || ObjectDamage::new(&id, "is not listed");
        let object = ledger.objects().get(part).ok_or_else(no_object)?;
        let short = || ObjectDamage::new(&id, "is too short to be one");
        let tail = object.bytes.checked_sub(FOOTER_BYTES as u64).ok_or_else(short)?;
        let unread = |error: ColdError| read_error(ledger.ledger, &error);
        let name = id.name();
        let footer = self.cold.read(&name, tail..object.bytes).await.map_err(unread)?;
        let footer = format::decode_footer(&id, object.bytes, &footer)?;
        let index = self.cold.read(&name, footer.index_position..tail).await.map_err(unread)?;
        let rows = format::decode_index(&id, &footer, &index)?;
        let entries: u64 = rows.iter().map(|row| u64::from(row.entries)).sum();
        if (footer.first_entry, entries) != (object.first_entry, object.entries) {
            return Err(ObjectDamage::new(&id, "holds other entries than the list says").into());
        }
        let (rows, bytes) = (Arc::new(rows), footer.index_bytes());
        self.indexes.insert(id, Arc::clone(&rows), bytes);
        Ok(rows)
    }
}

/// `run` and its next row.
fn grow<'a>(rows: &'a [Row], run: &'a [Row], next: &'a Row) -> &'a [Row] {
    let begin = run.first().unwrap_or(next).first_entry;
    let from = rows.partition_point(|row| row.first_entry < begin);
    let to = rows.partition_point(|row| row.first_entry <= next.first_entry);
    &rows[from..to]
}
