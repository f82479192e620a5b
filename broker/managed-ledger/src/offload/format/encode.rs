//! Writing an object, in order and in parts, with one block in memory.

use bytes::{BufMut, Bytes, BytesMut};
use crc_fast::{CrcAlgorithm, Digest};
use geminga_bookie_client::entry::Entry;
use geminga_proto::ids::{EntryId, Offset};

use super::{
    BLOCK_BYTES, BLOCK_HEADER_BYTES, BLOCK_MAGIC, CODEC_NONE, CODEC_ZSTD, FOOTER_MAGIC,
    HEADER_MAGIC, ObjectId, ROWS_MAX, Row, VERSION,
};

/// Level of the compression: speed first, this runs beside publishes.
const ZSTD_LEVEL: i32 = 1;

/// CRC32C of some bytes.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// Makes one object out of the entries it is given, in order.
pub(crate) struct Encoder {
    id: ObjectId,
    first_entry: EntryId,
    next_entry: EntryId,
    block_bytes: usize,
    block: BytesMut,
    block_offset: Offset,
    block_entries: u32,
    rows: Vec<Row>,
    /// Encoded and not taken yet.
    out: BytesMut,
    taken: u64,
    crc: Digest,
}

/// What an object came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Finished {
    pub(crate) bytes: u64,
    pub(crate) crc32c: u32,
    pub(crate) first_entry: EntryId,
    pub(crate) entries: u64,
}

impl Encoder {
    /// Blocks are closed at `block_bytes`, or at [`BLOCK_BYTES`] if that is less.
    pub(crate) fn new(id: ObjectId, first_entry: EntryId, block_bytes: usize) -> Self {
        let mut out = BytesMut::new();
        out.put_slice(&HEADER_MAGIC);
        out.put_u16_le(VERSION);
        out.put_u16_le(0);
        out.put_u32_le(id.part);
        out.put_u64_le(id.segment.topic.0);
        out.put_u32_le(id.segment.segment);
        out.put_u32_le(0);
        out.put_u64_le(id.ledger.0);
        out.put_u64_le(first_entry.0);
        out.put_slice(&id.uuid);
        let crc = crc32c(&out);
        out.put_u32_le(crc);
        Self {
            id,
            first_entry,
            next_entry: first_entry,
            block_bytes: block_bytes.min(BLOCK_BYTES),
            block: BytesMut::new(),
            block_offset: Offset(0),
            block_entries: 0,
            rows: Vec::new(),
            out,
            taken: 0,
            crc: Digest::new(CrcAlgorithm::Crc32Iscsi),
        }
    }

    /// The next entry; `base` is the offset in its header.
    ///
    /// # Panics
    /// When it is not the next one: then the object would have a hole.
    pub(crate) fn push(&mut self, entry: &Entry, base: Offset) {
        assert_eq!(
            (entry.ledger, entry.id),
            (self.id.ledger, self.next_entry),
            "entries come in order"
        );
        if self.block_entries == 0 {
            self.block_offset = base;
        }
        entry.encode(&mut self.block);
        self.block_entries += 1;
        self.next_entry = entry.id.next();
        if self.block.len() >= self.block_bytes {
            self.close_block();
        }
    }

    /// Bytes of the object so far, as they will be stored; without the block in the making.
    pub(crate) fn bytes(&self) -> u64 {
        self.taken + self.out.len() as u64
    }

    /// Whether the object should end here: it has the size, or its index has no row left.
    pub(crate) fn is_full(&self, bytes_max: u64) -> bool {
        self.block_entries == 0 && (self.bytes() >= bytes_max || self.rows.len() >= ROWS_MAX - 1)
    }

    /// The next `length` bytes of the object, once there are so many.
    pub(crate) fn take(&mut self, length: usize) -> Option<Bytes> {
        (self.out.len() >= length).then(|| self.split(length))
    }

    fn split(&mut self, length: usize) -> Bytes {
        let part = self.out.split_to(length).freeze();
        self.crc.update(&part);
        self.taken += part.len() as u64;
        part
    }

    /// The rest of the object.
    pub(crate) fn finish(mut self) -> (Bytes, Finished) {
        self.close_block();
        let index_position = self.bytes();
        let mut index = BytesMut::with_capacity(self.rows.len() * super::ROW_BYTES);
        for row in &self.rows {
            index.put_u64_le(row.first_entry.0);
            index.put_u64_le(row.first_offset.0);
            index.put_u64_le(row.position);
            index.put_u32_le(row.length);
            index.put_u32_le(row.raw_length);
            index.put_u32_le(row.entries);
        }
        self.out.put_slice(&index);
        let mut footer = BytesMut::with_capacity(super::FOOTER_BYTES);
        footer.put_slice(&FOOTER_MAGIC);
        footer.put_u16_le(VERSION);
        footer.put_u16_le(0);
        footer.put_u32_le(self.rows.len() as u32);
        footer.put_u64_le(self.id.ledger.0);
        footer.put_u64_le(self.first_entry.0);
        footer.put_slice(&self.id.uuid);
        footer.put_u64_le(index_position);
        footer.put_u32_le(crc32c(&index));
        let crc = crc32c(&footer);
        footer.put_u32_le(crc);
        self.out.put_slice(&footer);
        let rest = self.split(self.out.len());
        let finished = Finished {
            bytes: self.taken,
            crc32c: self.crc.finalize() as u32,
            first_entry: self.first_entry,
            entries: self.next_entry.0 - self.first_entry.0,
        };
        (rest, finished)
    }

    fn close_block(&mut self) {
        if self.block_entries == 0 {
            return;
        }
        let raw = self.block.split();
        let packed = zstd::bulk::compress(&raw, ZSTD_LEVEL).ok().filter(|p| p.len() < raw.len());
        let (codec, stored) = match &packed {
            Some(packed) => (CODEC_ZSTD, &packed[..]),
            None => (CODEC_NONE, &raw[..]),
        };
        let first_entry = EntryId(self.next_entry.0 - u64::from(self.block_entries));
        let position = self.bytes();
        let mut header = BytesMut::with_capacity(BLOCK_HEADER_BYTES);
        header.put_slice(&BLOCK_MAGIC);
        header.put_u8(codec);
        header.put_slice(&[0; 3]);
        header.put_u64_le(first_entry.0);
        header.put_u32_le(self.block_entries);
        header.put_u32_le(raw.len() as u32);
        header.put_u32_le(stored.len() as u32);
        let mut crc = Digest::new(CrcAlgorithm::Crc32Iscsi);
        crc.update(&header);
        crc.update(stored);
        header.put_u32_le(crc.finalize() as u32);
        self.out.put_slice(&header);
        self.out.put_slice(stored);
        self.rows.push(Row {
            first_entry,
            first_offset: self.block_offset,
            position,
            length: (BLOCK_HEADER_BYTES + stored.len()) as u32,
            raw_length: raw.len() as u32,
            entries: self.block_entries,
        });
        self.block_entries = 0;
    }
}
