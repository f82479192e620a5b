//! The format of objects in cold storage (docs/object-format.md): whole entries in checksummed blocks, and an index at the
//! end that leads from an offset or an entry to its block. Nothing here does I/O.
//!
//! ```text
//! | header | block 0 | block 1 | ... | index | footer |
//! ```
//! A reader fetches index and footer once, then only the blocks it needs. Every length is checked before anything is
//! allocated, every byte is covered by a checksum, and every entry keeps the digest its writer gave it.

mod decode;
mod encode;
#[cfg(test)]
mod tests;

use geminga_proto::ids::{EntryId, LedgerId, Offset, SegmentId};

pub(crate) use decode::{decode_block, decode_footer, decode_index};
pub(crate) use encode::{Encoder, Finished, crc32c};

/// Of this format.
pub(crate) const VERSION: u16 = 1;
/// A block is closed at this many bytes of entries at the latest; the last entry in it may exceed them.
pub(crate) const BLOCK_BYTES: usize = 1 << 20;
/// The largest block, bytes of entries: [`BLOCK_BYTES`] and one entry of the largest size.
pub(crate) const BLOCK_BYTES_MAX: usize = 8 << 20;
/// The most rows of an index.
pub(crate) const ROWS_MAX: usize = 64 * 1024;

pub(crate) const HEADER_BYTES: usize = 68;
pub(crate) const BLOCK_HEADER_BYTES: usize = 32;
pub(crate) const ROW_BYTES: usize = 36;
pub(crate) const FOOTER_BYTES: usize = 64;

const HEADER_MAGIC: [u8; 8] = *b"GMGAOBJ\x01";
const BLOCK_MAGIC: [u8; 4] = *b"GBLK";
const FOOTER_MAGIC: [u8; 8] = *b"GMGAIDX\x01";
const CODEC_NONE: u8 = 0;
const CODEC_ZSTD: u8 = 1;

/// Which object: its name follows from this alone, so no text of a user ever gets into one, and the uuid is drawn for one
/// upload only, so no name is ever used twice (X1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ObjectId {
    pub(crate) segment: SegmentId,
    pub(crate) ledger: LedgerId,
    pub(crate) uuid: [u8; 16],
    /// Position among the objects of the ledger, from 0.
    pub(crate) part: u32,
}

impl ObjectId {
    /// `<topic hex>/<segment>/<ledger hex>-<uuid hex>/<part>`.
    pub(crate) fn name(&self) -> String {
        let uuid: String = self.uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{}/{:016x}-{uuid}/{}", segment_prefix(self.segment), self.ledger.0, self.part)
    }

    /// Ledger and uuid in a name under [`segment_prefix`]; none for a name of somebody else's.
    pub(crate) fn parse(rest: &str) -> Option<(LedgerId, [u8; 16])> {
        let (upload, part) = rest.split_once('/')?;
        let (ledger, uuid) = upload.split_once('-')?;
        part.parse::<u32>().ok()?;
        if ledger.len() != 16 || uuid.len() != 32 || !uuid.is_ascii() {
            return None;
        }
        let ledger = LedgerId(u64::from_str_radix(ledger, 16).ok()?);
        let uuid = u128::from_str_radix(uuid, 16).ok()?.to_be_bytes();
        Some((ledger, uuid))
    }
}

/// Where a segment's objects lie.
pub(crate) fn segment_prefix(segment: SegmentId) -> String {
    format!("{:016x}/{}", segment.topic.0, segment.segment)
}

/// One block, as the index tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) first_entry: EntryId,
    /// The base offset of its first entry.
    pub(crate) first_offset: Offset,
    /// Where it begins in the object, bytes.
    pub(crate) position: u64,
    /// With its header, as stored, bytes.
    pub(crate) length: u32,
    /// Its entries, bytes, not compressed.
    pub(crate) raw_length: u32,
    pub(crate) entries: u32,
}

/// Where the index lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Footer {
    pub(crate) first_entry: EntryId,
    pub(crate) rows: u32,
    pub(crate) index_position: u64,
    index_crc: u32,
}

impl Footer {
    pub(crate) fn index_bytes(&self) -> u64 {
        u64::from(self.rows) * ROW_BYTES as u64
    }
}

/// Bytes that are not the object they should be. Names both, for who goes looking.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("object {object} of ledger {ledger} {why}")]
pub(crate) struct ObjectDamage {
    pub(crate) ledger: LedgerId,
    pub(crate) object: String,
    pub(crate) why: String,
}

impl ObjectDamage {
    pub(crate) fn new(id: &ObjectId, why: impl Into<String>) -> Self {
        Self { ledger: id.ledger, object: id.name(), why: why.into() }
    }
}
