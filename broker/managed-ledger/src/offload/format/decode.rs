//! Reading what an object's bytes say, and refusing what they cannot mean.

use bytes::{Buf, Bytes};
use geminga_bookie_client::entry::{ENTRY_HEADER_BYTES, Entry};
use geminga_proto::ids::{EntryId, LedgerId, Offset};

use super::{
    BLOCK_BYTES_MAX, BLOCK_HEADER_BYTES, BLOCK_MAGIC, CODEC_NONE, CODEC_ZSTD, FOOTER_BYTES,
    FOOTER_MAGIC, Footer, HEADER_BYTES, ObjectDamage, ObjectId, ROW_BYTES, ROWS_MAX, Row, VERSION,
    crc32c,
};

/// The last [`FOOTER_BYTES`] bytes of an object of `object_bytes`.
///
/// # Errors
/// [`ObjectDamage`].
pub(crate) fn decode_footer(
    id: &ObjectId,
    object_bytes: u64,
    bytes: &[u8],
) -> Result<Footer, ObjectDamage> {
    let damage = |why: &str| ObjectDamage::new(id, why);
    if bytes.len() != FOOTER_BYTES {
        return Err(damage("has a footer of the wrong length"));
    }
    let mut crc = &bytes[FOOTER_BYTES - 4..];
    if crc.get_u32_le() != crc32c(&bytes[..FOOTER_BYTES - 4]) {
        return Err(damage("has a footer with a bad checksum"));
    }
    let mut rest = bytes;
    let mut magic = [0; 8];
    rest.copy_to_slice(&mut magic);
    if magic != FOOTER_MAGIC || rest.get_u16_le() != VERSION {
        return Err(damage("has a footer of an unknown format"));
    }
    rest.advance(2);
    let rows = rest.get_u32_le();
    let ledger = LedgerId(rest.get_u64_le());
    let first_entry = EntryId(rest.get_u64_le());
    let mut uuid = [0; 16];
    rest.copy_to_slice(&mut uuid);
    if (ledger, uuid) != (id.ledger, id.uuid) {
        return Err(damage("is another ledger's"));
    }
    let index_position = rest.get_u64_le();
    let index_crc = rest.get_u32_le();
    let footer = Footer { first_entry, rows, index_position, index_crc };
    let end = index_position
        .checked_add(footer.index_bytes())
        .and_then(|end| end.checked_add(FOOTER_BYTES as u64));
    if rows as usize > ROWS_MAX || rows == 0 || end != Some(object_bytes) {
        return Err(damage("has an index that does not fit its size"));
    }
    Ok(footer)
}

/// The index that the footer names: dense from the first entry and the first byte on.
///
/// # Errors
/// [`ObjectDamage`].
pub(crate) fn decode_index(
    id: &ObjectId,
    footer: &Footer,
    mut bytes: &[u8],
) -> Result<Vec<Row>, ObjectDamage> {
    let damage = |why: &str| ObjectDamage::new(id, why);
    if bytes.len() as u64 != footer.index_bytes() {
        return Err(damage("has an index of the wrong length"));
    }
    if crc32c(bytes) != footer.index_crc {
        return Err(damage("has an index with a bad checksum"));
    }
    let mut rows: Vec<Row> = Vec::with_capacity(bytes.len() / ROW_BYTES);
    let (mut next_entry, mut position) = (Some(footer.first_entry.0), HEADER_BYTES as u64);
    let mut offset = 0;
    while bytes.has_remaining() {
        let row = Row {
            first_entry: EntryId(bytes.get_u64_le()),
            first_offset: Offset(bytes.get_u64_le()),
            position: bytes.get_u64_le(),
            length: bytes.get_u32_le(),
            raw_length: bytes.get_u32_le(),
            entries: bytes.get_u32_le(),
        };
        let sane = Some(row.first_entry.0) == next_entry
            && row.position == position
            && row.first_offset.0 >= offset
            && row.entries > 0
            && row.length as usize > BLOCK_HEADER_BYTES
            && row.length as usize <= BLOCK_HEADER_BYTES + BLOCK_BYTES_MAX
            && row.raw_length as usize <= BLOCK_BYTES_MAX;
        if !sane {
            return Err(damage("has an index with a hole"));
        }
        next_entry = row.first_entry.0.checked_add(u64::from(row.entries));
        position += u64::from(row.length);
        offset = row.first_offset.0;
        rows.push(row);
    }
    if position != footer.index_position || next_entry.is_none() {
        return Err(damage("has an index that does not end where its blocks do"));
    }
    Ok(rows)
}

/// The entries of one block, each checked once more by its writer's digest.
///
/// # Errors
/// [`ObjectDamage`].
pub(crate) fn decode_block(
    id: &ObjectId,
    row: &Row,
    bytes: Bytes,
) -> Result<Vec<Entry>, ObjectDamage> {
    let damage = |why: &str| {
        ObjectDamage::new(id, format!("has a block at byte {} that {why}", row.position))
    };
    if bytes.len() != row.length as usize || bytes.len() < BLOCK_HEADER_BYTES {
        return Err(damage("has the wrong length"));
    }
    let stored = bytes.slice(BLOCK_HEADER_BYTES..);
    let mut crc = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    crc.update(&bytes[..BLOCK_HEADER_BYTES - 4]);
    crc.update(&stored);
    let mut header = &bytes[..BLOCK_HEADER_BYTES];
    let mut magic = [0; 4];
    header.copy_to_slice(&mut magic);
    let codec = header.get_u8();
    header.advance(3);
    let first = header.get_u64_le();
    let entries = header.get_u32_le();
    let raw_length = header.get_u32_le();
    let stored_length = header.get_u32_le() as usize;
    if header.get_u32_le() != crc.finalize() as u32 {
        return Err(damage("has a bad checksum"));
    }
    if magic != BLOCK_MAGIC
        || (first, entries, raw_length) != (row.first_entry.0, row.entries, row.raw_length)
        || stored_length != stored.len()
    {
        return Err(damage("is not the one in the index"));
    }
    let raw = match codec {
        CODEC_NONE => stored,
        CODEC_ZSTD => zstd::bulk::decompress(&stored, raw_length as usize)
            .map(Bytes::from)
            .map_err(|_| damage("cannot be decompressed"))?,
        _ => return Err(damage("has an unknown codec")),
    };
    if raw.len() != raw_length as usize {
        return Err(damage("decompresses to another length"));
    }
    split_entries(id, row, raw).ok_or_else(|| damage("holds something else than its entries"))
}

fn split_entries(id: &ObjectId, row: &Row, mut raw: Bytes) -> Option<Vec<Entry>> {
    // An entry has at least a header: what the row claims is checked before room is made for it.
    if row.entries as usize > raw.len() / ENTRY_HEADER_BYTES {
        return None;
    }
    let mut entries = Vec::with_capacity(row.entries as usize);
    for n in 0..u64::from(row.entries) {
        let mut length = raw.get(32..36)?;
        let whole = ENTRY_HEADER_BYTES.checked_add(length.get_u32_le() as usize)?;
        if whole > raw.len() {
            return None;
        }
        let entry = Entry::decode(raw.split_to(whole)).ok()?;
        if (entry.ledger, entry.id) != (id.ledger, EntryId(row.first_entry.0 + n)) {
            return None;
        }
        entries.push(entry);
    }
    raw.is_empty().then_some(entries)
}
