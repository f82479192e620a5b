//! One batch of a view: which of its records stay, and its bytes without the others. Pure.

use bytes::{BufMut, Bytes, BytesMut};
use geminga_bookie_client::entry::ENTRY_PAYLOAD_BYTES_MAX;
use geminga_proto::{
    ids::Offset,
    records::Records,
    storage::v1::EntryHeader,
    v1::{Codec, PayloadFormat, Record},
};
use prost::{
    Message,
    encoding::{encode_varint, encoded_len_varint},
};

use super::{
    keys::{KeyHash, KeyTable},
    runs,
};
use crate::{
    entry_header::{HEADER_BYTES_MAX, PREFIX_BYTES},
    types::StoredBatch,
};

/// Fast, and far from the window that readers allow.
const ZSTD_LEVEL: i32 = 1;

/// A record, as far as compaction looks into it.
#[derive(Debug)]
struct Seen {
    key: Option<KeyHash>,
    is_empty: bool,
    bytes: Bytes,
}

/// The records of a batch, or none if it cannot be understood: such a batch stays as it is, for it may hold anything.
fn records(batch: &StoredBatch) -> Option<Vec<Seen>> {
    let header = &batch.header;
    if header.format() != PayloadFormat::Native {
        return None;
    }
    let codec = Codec::try_from(header.codec).ok()?;
    let payload = batch.payload.clone();
    let mut records = Records::open(codec, header.uncompressed_size, header.count, payload).ok()?;
    let mut all = Vec::with_capacity(header.count as usize);
    while let Some(bytes) = records.read_bytes().ok()? {
        let record = Record::decode(bytes.clone()).ok()?;
        let key = record.key.as_deref().map(KeyHash::of);
        all.push(Seen { key, is_empty: record.value.is_empty(), bytes });
    }
    Some(all)
}

/// Pass 1: the keys of a batch of the log.
pub(crate) fn observe(table: &mut KeyTable, batch: &StoredBatch) {
    for (n, seen) in records(batch).into_iter().flatten().enumerate() {
        if let Some(key) = seen.key {
            table.observe(key, batch.base_offset.advance(n as u64));
        }
    }
}

/// What of a batch goes into the next view.
#[derive(Debug)]
pub(crate) struct Rewritten {
    pub(crate) batch: StoredBatch,
    /// Messages that a reader who begins with that view gets.
    pub(crate) messages: u64,
}

/// Pass 2: the batch with nothing but the latest message of each key; none if nothing is left. `of_view`: it comes from the
/// view before. A deleted key is told of from `tombstones_from` on.
pub(crate) fn rewrite(
    table: &KeyTable,
    batch: StoredBatch,
    of_view: bool,
    tombstones_from: Offset,
) -> Option<Rewritten> {
    let count = batch.header.count;
    let Some(seen) = records(&batch) else {
        let kept_runs = runs::encode(&vec![true; count as usize]);
        let header = EntryHeader { kept_runs, ..batch.header };
        let batch = StoredBatch { header, ..batch };
        return Some(Rewritten { batch, messages: u64::from(count) });
    };
    let before = match of_view {
        true => runs::flags(&batch.header.kept_runs, count),
        false => vec![true; count as usize],
    };
    let (mut kept, mut tombstones) = (Vec::new(), Vec::new());
    for (n, (seen, was_kept)) in seen.iter().zip(&before).enumerate() {
        let offset = batch.base_offset.advance(n as u64);
        let latest = seen.key.is_some_and(|key| table.is_latest(key, offset, of_view));
        let keep = *was_kept && latest && (!seen.is_empty || offset >= tombstones_from);
        kept.push(keep);
        tombstones.push(keep && seen.is_empty);
    }
    let of = |flags: &[bool]| flags.iter().filter(|flag| **flag).count() as u64;
    let (all, deleted) = (of(&kept), of(&tombstones));
    if all == 0 {
        return None;
    }
    let kept_runs = runs::encode(&kept);
    let changed = kept != before;
    let header =
        EntryHeader { kept_runs, tombstone_runs: runs::encode(&tombstones), ..batch.header };
    let batch = StoredBatch { header, ..batch };
    let batch = match changed {
        true => without_the_others(batch, &seen, &kept),
        false => batch,
    };
    Some(Rewritten { batch: fitting(batch), messages: all - deleted })
}

/// The others become empty records; packed where that helps. A payload that would not get smaller stays: `kept_runs` says
/// all that readers need.
fn without_the_others(batch: StoredBatch, seen: &[Seen], kept: &[bool]) -> StoredBatch {
    let mut plain = BytesMut::new();
    for (seen, kept) in seen.iter().zip(kept) {
        let bytes: &[u8] = if *kept { &seen.bytes } else { &[] };
        plain.reserve(bytes.len() + 1 + encoded_len_varint(bytes.len() as u64));
        plain.put_u8(RECORD_TAG);
        encode_varint(bytes.len() as u64, &mut plain);
        plain.put_slice(bytes);
    }
    let plain = plain.freeze();
    let packed = zstd::bulk::compress(&plain, ZSTD_LEVEL).ok().map(Bytes::from);
    let (codec, payload) = match packed.filter(|packed| packed.len() < plain.len()) {
        Some(packed) => (Codec::Zstd, packed),
        None => (Codec::Unspecified, plain.clone()),
    };
    if payload.len() > batch.payload.len() {
        return batch;
    }
    let uncompressed_size = plain.len() as u32;
    let header = EntryHeader { codec: codec.into(), uncompressed_size, ..batch.header };
    StoredBatch { header, payload, ..batch }
}

/// `records` of `RecordBatch`, length-delimited.
const RECORD_TAG: u8 = 0x0A;

/// A batch near every bound at once loses its index, which nobody asks for in a view.
fn fitting(mut batch: StoredBatch) -> StoredBatch {
    let header = batch.header.encoded_len();
    if header > HEADER_BYTES_MAX
        || PREFIX_BYTES + header + batch.payload.len() > ENTRY_PAYLOAD_BYTES_MAX
    {
        batch.header.index = None;
    }
    batch
}

/// The batch as a reader at `from` gets it from the view: without what lies before, and without messages that delete a key
/// unless they are at or above `since`, the horizon when the reader began. None if nothing is left.
pub(crate) fn as_read(mut batch: StoredBatch, from: Offset, since: Offset) -> Option<StoredBatch> {
    let count = batch.header.count;
    let tombstones = std::mem::take(&mut batch.header.tombstone_runs);
    if !tombstones.is_empty() || batch.base_offset < from {
        let mut kept = runs::flags(&batch.header.kept_runs, count);
        let below =
            |offset: Offset| offset.0.saturating_sub(batch.base_offset.0).min(u64::from(count));
        let passed = below(from) as usize;
        kept[..passed].fill(false);
        let needless = below(since) as usize;
        for (first, last) in runs::ranges(&tombstones, count) {
            let (first, end) = (first as usize, (last as usize + 1).min(needless));
            if first < end {
                kept[first..end].fill(false);
            }
        }
        batch.header.kept_runs = runs::encode(&kept);
    }
    (!runs::ranges(&batch.header.kept_runs, count).is_empty()).then_some(batch)
}
