//! Uploading one closed ledger: bookies are read one step ahead of the writes, and every object is read back before it
//! counts (X1, X2). Runs beside the segment's owner, with a budget of its own.

use std::sync::Arc;

use geminga_bookie_client::{bookie_rpc::EntryRange, entry::Entry};
use geminga_proto::ids::{EntryId, Offset, SegmentId};
use tokio::sync::mpsc;

use super::{
    Object,
    format::{Encoder, Finished, ObjectId, crc32c},
    store::{ColdError, ColdStorage, ObjectWrite},
};
use crate::{
    entry_header,
    error::ReadError,
    list::Listed,
    read::{Place, View},
    types::TierProgress,
};

/// Bytes asked from bookies at a time.
const READ_BYTES: usize = 4 << 20;
/// Bytes read back at a time.
const VERIFY_BYTES: u64 = 4 << 20;

/// What an upload holds in memory at most, bytes: what was read and what is read ahead, a block and what it is packed to,
/// and twice a part.
pub(crate) fn upload_memory_bytes(cold: &ColdStorage) -> u64 {
    // An answer may exceed what was asked for by one entry of the largest size.
    let read = 2 * (READ_BYTES + (7 << 20));
    (read + (16 << 20) + 2 * cold.config().part_bytes) as u64
}

/// Why an upload did not end. Its objects are nobody's; the next one has another uuid.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UploadError {
    #[error(transparent)]
    Ledger(#[from] ReadError),
    #[error("ledger {0} cannot be understood: {1}")]
    Entry(geminga_proto::ids::LedgerId, String),
    #[error(transparent)]
    Store(#[from] ColdError),
    #[error("object {object} was read back with {got} instead of {expected} (X2)")]
    NotWhole { object: String, got: String, expected: String },
}

/// One upload.
pub(crate) struct Upload {
    pub(crate) view: Arc<View>,
    pub(crate) cold: ColdStorage,
    pub(crate) segment: SegmentId,
    pub(crate) listed: Listed,
    pub(crate) uuid: [u8; 16],
    pub(crate) watchers: Vec<mpsc::Sender<TierProgress>>,
    /// Of the ledgers before this one, for the watchers.
    pub(crate) bytes_before: u64,
    pub(crate) bytes_total: u64,
}

impl Upload {
    /// Writes and reads back all objects of the ledger.
    pub(crate) async fn run(self) -> Result<Vec<Object>, UploadError> {
        let place = self.view.place_of(&self.listed).await?;
        let Some(last) = place.last() else { return Ok(Vec::new()) };
        let (mut objects, mut next, mut done) = (Vec::new(), EntryId(0), 0);
        let mut writing = self.begin(0, next);
        let mut ahead = self.read(&place, next, last).await?;
        while !ahead.is_empty() {
            let entries = std::mem::take(&mut ahead);
            next = entries.last().map_or(next, |entry| entry.id.next());
            done += entries.iter().map(|entry| entry.payload.len() as u64).sum::<u64>();
            let (read, written) = tokio::join!(
                self.read(&place, next, last),
                self.write(writing, &entries, &mut objects)
            );
            (ahead, writing) = (read?, written?);
            self.tell(done);
        }
        // The last entry may have ended an object exactly.
        if !writing.is_empty() {
            objects.push(self.end(writing).await?);
        }
        Ok(objects)
    }

    async fn read(
        &self,
        place: &Place,
        next: EntryId,
        last: EntryId,
    ) -> Result<Vec<Entry>, ReadError> {
        if next > last {
            return Ok(Vec::new());
        }
        self.view.entries(place, EntryRange { first: next, last }, READ_BYTES).await
    }

    fn begin(&self, part: usize, first: EntryId) -> Writing {
        let (segment, ledger, uuid) = (self.segment, self.listed.id, self.uuid);
        let id = ObjectId { segment, ledger, uuid, part: part as u32 };
        let write = ObjectWrite::new(&self.cold, id.name());
        Writing {
            id,
            encoder: Encoder::new(id, first, self.cold.config().block_bytes),
            write,
            entries: 0,
        }
    }

    async fn write(
        &self,
        mut writing: Writing,
        entries: &[Entry],
        objects: &mut Vec<Object>,
    ) -> Result<Writing, UploadError> {
        let part_bytes = self.cold.config().part_bytes;
        for entry in entries {
            let (header, _) = entry_header::decode(&entry.payload)
                .map_err(|error| UploadError::Entry(self.listed.id, error.to_string()))?;
            writing.encoder.push(entry, Offset(header.base_offset));
            writing.entries += 1;
            while let Some(part) = writing.encoder.take(part_bytes) {
                writing.write.write(part).await?;
            }
            if writing.encoder.is_full(self.cold.config().object_bytes) {
                let next = self.begin(objects.len() + 1, entry.id.next());
                let full = std::mem::replace(&mut writing, next);
                objects.push(self.end(full).await?);
            }
        }
        Ok(writing)
    }

    /// Ends an object and reads it back (X2).
    async fn end(&self, writing: Writing) -> Result<Object, UploadError> {
        let Writing { id, encoder, mut write, .. } = writing;
        let (rest, finished) = encoder.finish();
        write.write(rest).await?;
        write.finish().await?;
        let Finished { bytes, crc32c, first_entry, entries } = finished;
        let object = Object { bytes, crc32c, first_entry, entries };
        read_back(&self.cold, &id.name(), &object).await?;
        Ok(object)
    }

    fn tell(&self, done: u64) {
        for watcher in &self.watchers {
            // Who is behind misses a step of the bar, not the outcome.
            let _ = watcher.try_send(TierProgress {
                ledger: self.listed.id,
                bytes_done: self.bytes_before + done.min(self.listed.counts.bytes),
                bytes_total: self.bytes_total,
                problem: String::new(),
            });
        }
    }
}

/// An object in the making.
struct Writing {
    id: ObjectId,
    encoder: Encoder,
    write: ObjectWrite,
    entries: u64,
}

impl Writing {
    fn is_empty(&self) -> bool {
        self.entries == 0
    }
}

/// X2: size and checksum of what the store gives back are those of what was sent.
pub(crate) async fn read_back(
    cold: &ColdStorage,
    name: &str,
    object: &Object,
) -> Result<(), UploadError> {
    let not_whole = |got: String, expected: String| {
        Err(UploadError::NotWhole { object: name.to_owned(), got, expected })
    };
    let size = cold.size(name).await?;
    if size != object.bytes {
        return not_whole(format!("{size} bytes"), format!("{} bytes", object.bytes));
    }
    let mut crc = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    let mut at = 0;
    while at < size {
        let end = size.min(at + VERIFY_BYTES);
        crc.update(&cold.read(name, at..end).await?);
        at = end;
    }
    let crc = crc.finalize() as u32;
    debug_assert!(size > 0 || crc == crc32c(b""));
    if crc != object.crc32c {
        return not_whole(format!("checksum {crc:08x}"), format!("checksum {:08x}", object.crc32c));
    }
    Ok(())
}
