//! Groups and records as bytes (D4). Pure: no file is touched here.
//!
//! ```text
//! | header 64 bytes                                                        | records ...        | zeroes |
//! | magic | crc | nonce | file | number | first_live | length | count | 0  | `length` bytes     | to 4 KiB
//!   u32     u32   16 B    u64    u64      u64          u32      u32     u64
//! record: | kind u8 | flags u8 | 0 u16 | length u32 | body |
//! ```
//! `crc` is CRC32C over everything from the nonce to the end of the records. A group starts on a device block and fills it
//! with zeroes, so that no later write touches a block that holds synced bytes. `first_live` is the number of the file's
//! first group that is not a copy: older files end in front of it, whatever they hold (T46).

use bytes::{Buf, BufMut, Bytes};
use geminga_bookie_client::entry::{ENTRY_HEADER_BYTES, ENTRY_PAYLOAD_BYTES_MAX, Entry};
use geminga_proto::ids::{EntryId, LedgerId};

/// The device block that groups are aligned to, bytes.
pub const BLOCK_BYTES: usize = 4096;
/// Bytes of a group's header.
pub const GROUP_HEADER_BYTES: usize = 64;
/// Bytes in front of a record's body.
pub const RECORD_HEADER_BYTES: usize = 8;
/// No group is larger, bytes; a length beyond is damage, checked before anything is allocated (S4).
pub const GROUP_BYTES_MAX: usize = 64 << 20;
const MAGIC: u32 = u32::from_le_bytes(*b"GMJ1");

/// D4's nonce: 128 random bits, kept in the directory's own cookie and told to nobody.
pub type Nonce = [u8; 16];

/// A group's place in the order of things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupHeader {
    /// Number of the file it was written for; stale groups of a reused file carry another (D5(c)).
    pub file: u64,
    /// Dense per directory, from 1.
    pub number: u64,
    /// The first number of this file that is not a copy of an older file's group.
    pub first_live: u64,
    /// Bytes of records.
    pub length: u32,
    /// Records.
    pub count: u32,
}

impl GroupHeader {
    /// Bytes it takes on disk, zeroes included.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        (GROUP_HEADER_BYTES + self.length as usize).next_multiple_of(BLOCK_BYTES) as u64
    }

    /// Whether it was copied forward at a start (D3).
    #[must_use]
    pub fn is_copy(&self) -> bool {
        self.number < self.first_live
    }
}

/// A record without its entry's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// An entry. `position` is that of its encoding, in bytes from the group's start.
    Add {
        ledger: LedgerId,
        entry: EntryId,
        lac: Option<EntryId>,
        position: u32,
        length: u32,
        digest: u32,
    },
    /// The ledger is fenced (D2).
    Fence(LedgerId),
    /// The ledger was Deleted and is dropped for ever (D13).
    Tombstone(LedgerId),
    /// The ledger moved away: fenced for ever, data dropped (D13).
    MovedAway(LedgerId),
    /// Damage in the groups before this one was judged: this bound stands (D8).
    Limbo(Bound),
}

/// "Every ledger created at or below" (D8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bound {
    /// The cluster's generation when the bound was taken.
    pub generation: u8,
    /// The store's revision then.
    pub revision: i64,
}

/// Builds one group in a buffer that is used again and again: the one copy that entries take on their way to the disk.
#[derive(Debug, Default)]
pub struct GroupBuilder {
    bytes: Vec<u8>,
    count: u32,
}

impl GroupBuilder {
    /// Starts an empty group in `buffer`, keeping its room.
    #[must_use]
    pub fn new(mut buffer: Vec<u8>) -> Self {
        buffer.clear();
        buffer.resize(GROUP_HEADER_BYTES, 0);
        Self { bytes: buffer, count: 0 }
    }

    /// Bytes so far, header included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether no record was added.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Appends an entry; returns the position of its encoding in the group.
    pub fn add(&mut self, entry: &Entry, recovery: bool) -> u32 {
        self.record(1, u8::from(recovery), entry.encoded_len());
        let position = self.bytes.len() as u32;
        entry.encode(&mut self.bytes);
        position
    }

    /// Appends a fence.
    pub fn fence(&mut self, ledger: LedgerId) {
        self.record(2, 0, 8);
        self.bytes.put_u64_le(ledger.0);
    }

    /// Appends a tombstone.
    pub fn tombstone(&mut self, ledger: LedgerId) {
        self.record(3, 0, 8);
        self.bytes.put_u64_le(ledger.0);
    }

    /// Appends a limbo bound.
    pub fn limbo(&mut self, bound: Bound) {
        self.record(4, 0, 16);
        self.bytes.put_u64_le(u64::from(bound.generation));
        self.bytes.put_i64_le(bound.revision);
    }

    /// Appends a member of the fenced set.
    pub fn moved_away(&mut self, ledger: LedgerId) {
        self.record(5, 0, 8);
        self.bytes.put_u64_le(ledger.0);
    }

    fn record(&mut self, kind: u8, flags: u8, length: usize) {
        self.bytes.put_u8(kind);
        self.bytes.put_u8(flags);
        self.bytes.put_u16_le(0);
        self.bytes.put_u32_le(length as u32);
        self.count += 1;
    }

    /// Writes the header and the padding; the bytes are a whole number of blocks.
    #[must_use]
    pub fn finish(mut self, nonce: &Nonce, file: u64, number: u64, first_live: u64) -> Vec<u8> {
        let length = (self.bytes.len() - GROUP_HEADER_BYTES) as u32;
        let header = GroupHeader { file, number, first_live, length, count: self.count };
        write_header(&mut self.bytes, nonce, &header);
        self.bytes.resize(self.bytes.len().next_multiple_of(BLOCK_BYTES), 0);
        self.bytes
    }
}

fn write_header(group: &mut [u8], nonce: &Nonce, header: &GroupHeader) {
    let end = GROUP_HEADER_BYTES + header.length as usize;
    let mut out = &mut group[8..GROUP_HEADER_BYTES];
    out.put_slice(nonce);
    out.put_u64_le(header.file);
    out.put_u64_le(header.number);
    out.put_u64_le(header.first_live);
    out.put_u32_le(header.length);
    out.put_u32_le(header.count);
    out.put_u64_le(0);
    let crc = crc32c(&group[8..end]);
    group[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    group[4..8].copy_from_slice(&crc.to_le_bytes());
}

/// Rewrites a group's header for another file (D3's copy forward): same number, same records.
pub fn rehome(group: &mut [u8], nonce: &Nonce, header: &GroupHeader, file: u64, first_live: u64) {
    write_header(group, nonce, &GroupHeader { file, first_live, ..*header });
}

/// Reads a header; none if these bytes do not start a group of this directory and file. The crc is not checked yet.
#[must_use]
pub fn peek(bytes: &[u8], nonce: &Nonce, file: u64) -> Option<GroupHeader> {
    if bytes.len() < GROUP_HEADER_BYTES || bytes[8..24] != nonce[..] {
        return None;
    }
    let mut input = bytes;
    if input.get_u32_le() != MAGIC {
        return None;
    }
    input.advance(20);
    let header = GroupHeader {
        file: input.get_u64_le(),
        number: input.get_u64_le(),
        first_live: input.get_u64_le(),
        length: input.get_u32_le(),
        count: input.get_u32_le(),
    };
    let fits = header.length as usize <= GROUP_BYTES_MAX && header.number > 0;
    (header.file == file && fits).then_some(header)
}

/// Whether the bytes are the group that its header promises.
#[must_use]
pub fn crc_fits(group: &[u8], header: &GroupHeader) -> bool {
    let end = GROUP_HEADER_BYTES + header.length as usize;
    group.len() >= end && group[4..8] == crc32c(&group[8..end]).to_le_bytes()
}

/// The records of a group whose crc fits. None if they do not parse: then the writer was not ours.
#[must_use]
pub fn records(group: &[u8], header: &GroupHeader) -> Option<Vec<Record>> {
    let end = GROUP_HEADER_BYTES + header.length as usize;
    let mut records = Vec::with_capacity(
        (header.count as usize).min(header.length as usize / RECORD_HEADER_BYTES),
    );
    let mut at = GROUP_HEADER_BYTES;
    while at < end {
        let mut head = group.get(at..end)?.get(..RECORD_HEADER_BYTES)?;
        let kind = head.get_u8();
        head.advance(3);
        let length = head.get_u32_le() as usize;
        at += RECORD_HEADER_BYTES;
        let body = group.get(at..at.checked_add(length)?.min(end))?;
        if body.len() != length {
            return None;
        }
        records.push(record(kind, body, at as u32)?);
        at += length;
    }
    (records.len() == header.count as usize).then_some(records)
}

fn record(kind: u8, body: &[u8], position: u32) -> Option<Record> {
    let mut input = body;
    let id = |input: &mut &[u8]| (input.len() == 8).then(|| LedgerId(input.get_u64_le()));
    Some(match kind {
        1 => {
            if body.len() < ENTRY_HEADER_BYTES
                || body.len() > ENTRY_HEADER_BYTES + ENTRY_PAYLOAD_BYTES_MAX
            {
                return None;
            }
            let ledger = LedgerId(input.get_u64_le());
            let entry = EntryId(input.get_u64_le());
            let lac = u64::try_from(input.get_i64_le()).ok().map(EntryId);
            input.advance(12);
            let digest = input.get_u32_le();
            Record::Add { ledger, entry, lac, position, length: body.len() as u32, digest }
        }
        2 => Record::Fence(id(&mut input)?),
        3 => Record::Tombstone(id(&mut input)?),
        4 if body.len() == 16 => Record::Limbo(Bound {
            generation: u8::try_from(input.get_u64_le()).ok()?,
            revision: input.get_i64_le(),
        }),
        5 => Record::MovedAway(id(&mut input)?),
        _ => return None,
    })
}

/// CRC32C.
#[must_use]
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// Reads the entry at a record's position out of a group's bytes.
///
/// # Errors
/// The entry's own digest does not fit.
pub fn entry_at(
    group: &Bytes,
    position: u32,
    length: u32,
) -> Result<Entry, geminga_bookie_client::entry::EntryDamage> {
    Entry::decode(group.slice(position as usize..(position + length) as usize))
}

#[cfg(test)]
mod tests {
    use geminga_bookie_client::entry::Payload;
    use proptest::prelude::*;

    use super::*;

    const NONCE: Nonce = [7; 16];

    fn entry(ledger: u64, id: u64, body: &[u8]) -> Entry {
        Entry::seal(
            LedgerId(ledger),
            EntryId(id),
            None,
            1,
            Payload::from(Bytes::copy_from_slice(body)),
        )
    }

    fn group(bodies: &[Vec<u8>], fences: &[u64]) -> Vec<u8> {
        let mut builder = GroupBuilder::new(Vec::new());
        for (id, body) in bodies.iter().enumerate() {
            builder.add(&entry(5, id as u64, body), false);
        }
        for ledger in fences {
            builder.fence(LedgerId(*ledger));
            builder.tombstone(LedgerId(*ledger));
            builder.moved_away(LedgerId(*ledger));
            builder.limbo(Bound { generation: 3, revision: 9 });
        }
        builder.finish(&NONCE, 4, 11, 10)
    }

    proptest! {
        #[test]
        fn records_come_back_as_they_went_in(bodies: Vec<Vec<u8>>, fences: Vec<u64>) {
            let bytes = group(&bodies, &fences);
            prop_assert_eq!(bytes.len() % BLOCK_BYTES, 0);
            let header = peek(&bytes, &NONCE, 4).expect("a group");
            prop_assert_eq!((header.number, header.first_live, header.is_copy()), (11, 10, false));
            prop_assert_eq!(header.disk_bytes(), bytes.len() as u64);
            prop_assert!(crc_fits(&bytes, &header));
            let records = records(&bytes, &header).expect("they parse");
            prop_assert_eq!(records.len(), bodies.len() + 4 * fences.len());
            let bytes = Bytes::from(bytes);
            for (id, body) in bodies.iter().enumerate() {
                let Record::Add { position, length, .. } = records[id] else { panic!("an add") };
                prop_assert_eq!(entry_at(&bytes, position, length), Ok(entry(5, id as u64, body)));
            }
        }

        #[test]
        fn any_flipped_bit_is_found_or_lies_in_the_padding(bodies: Vec<Vec<u8>>, bit: usize) {
            let mut bytes = group(&bodies, &[1]);
            let header = peek(&bytes, &NONCE, 4).expect("a group");
            let bit = bit % ((GROUP_HEADER_BYTES + header.length as usize) * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(peek(&bytes, &NONCE, 4).is_none_or(|header| !crc_fits(&bytes, &header)));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>, length in 0u32..200, count: u32) {
            let header = GroupHeader { file: 1, number: 1, first_live: 1, length, count };
            if crc_fits(&bytes, &header) || bytes.len() >= GROUP_HEADER_BYTES + length as usize {
                let _ = records(&bytes, &header);
            }
            let _ = peek(&bytes, &NONCE, 4);
        }
    }

    #[test]
    fn a_stale_or_foreign_group_is_not_taken() {
        let bytes = group(&[vec![1]], &[]);
        assert!(peek(&bytes, &NONCE, 5).is_none(), "another file number");
        assert!(peek(&bytes, &[8; 16], 4).is_none(), "another directory");
    }
}
