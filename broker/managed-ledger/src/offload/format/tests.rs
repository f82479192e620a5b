use bytes::Bytes;
use geminga_bookie_client::entry::{Entry, Payload};
use geminga_proto::ids::{SegmentId, TopicId};
use proptest::prelude::*;

use super::*;

fn id() -> ObjectId {
    let segment = SegmentId { topic: TopicId(0x2a), segment: 3 };
    ObjectId { segment, ledger: LedgerId(0x1f), uuid: *b"0123456789abcdef", part: 2 }
}

fn entry(n: u64, size: usize, seed: u8) -> Entry {
    let body: Vec<u8> = (0..size).map(|i| (i as u8).wrapping_mul(31) ^ seed).collect();
    let payload = Payload::from(Bytes::from(body));
    Entry::seal(LedgerId(0x1f), EntryId(n), n.checked_sub(1).map(EntryId), n * 10, payload)
}

/// An object of these entry sizes from entry `first` on, taken in parts of `part` bytes.
fn object(first: u64, sizes: &[usize], part: usize) -> (Vec<u8>, Vec<Entry>, Finished) {
    let mut encoder = Encoder::new(id(), EntryId(first), BLOCK_BYTES);
    let (mut bytes, mut entries) = (Vec::new(), Vec::new());
    for (n, size) in sizes.iter().enumerate() {
        let entry = entry(first + n as u64, *size, n as u8);
        encoder.push(&entry, Offset(1_000 + 2 * entry.id.0));
        entries.push(entry);
        while let Some(taken) = encoder.take(part) {
            bytes.extend(taken);
        }
    }
    let (rest, finished) = encoder.finish();
    bytes.extend(rest);
    (bytes, entries, finished)
}

/// Everything an object gives to a reader who knows its size.
fn read(bytes: &[u8]) -> Result<Vec<Entry>, ObjectDamage> {
    let short = || ObjectDamage::new(&id(), "is short");
    let size = bytes.len();
    let tail = size.checked_sub(FOOTER_BYTES).ok_or_else(short)?;
    let footer = decode_footer(&id(), size as u64, &bytes[tail..])?;
    let index = footer.index_position as usize;
    let rows = decode_index(&id(), &footer, bytes.get(index..tail).ok_or_else(short)?)?;
    let mut entries = Vec::new();
    for row in rows {
        let at = row.position as usize;
        let block = bytes.get(at..at + row.length as usize).ok_or_else(short)?;
        entries.extend(decode_block(&id(), &row, Bytes::copy_from_slice(block))?);
    }
    Ok(entries)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn an_object_gives_back_the_entries_it_was_made_of(
        first in 0u64..1_000,
        sizes in prop::collection::vec(0usize..400_000, 1..12),
        part in 1usize..300_000,
    ) {
        let (bytes, entries, finished) = object(first, &sizes, part);
        prop_assert_eq!(finished.bytes, bytes.len() as u64);
        prop_assert_eq!(finished.crc32c, crc32c(&bytes));
        prop_assert_eq!((finished.first_entry.0, finished.entries), (first, sizes.len() as u64));
        prop_assert_eq!(read(&bytes), Ok(entries));
    }

    #[test]
    fn a_flipped_bit_is_damage_or_changes_nothing(at: prop::sample::Index, bit in 0u8..8) {
        let (mut bytes, entries, finished) = object(5, &[300, 0, 2_000, 17], 100);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert_ne!(finished.crc32c, crc32c(&bytes), "X2 sees it");
        match read(&bytes) {
            // Readers do not fetch the header: it is for who finds an object without a list.
            Ok(found) => prop_assert!(at < HEADER_BYTES && found == entries, "byte {}", at),
            Err(damage) => prop_assert!(damage.to_string().contains(&id().name())),
        }
    }

    #[test]
    fn foreign_bytes_are_refused_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), rows in 0u32..70_000) {
        drop(read(&bytes));
        let footer = Footer { first_entry: EntryId(u64::MAX), rows, index_position: 0, index_crc: crc32c(&bytes) };
        drop(decode_index(&id(), &footer, &bytes));
        let row = Row {
            first_entry: EntryId(0),
            first_offset: Offset(0),
            position: 0,
            length: bytes.len() as u32,
            raw_length: u32::MAX,
            entries: u32::MAX,
        };
        prop_assert!(decode_block(&id(), &row, Bytes::from(bytes)).is_err());
    }
}

#[test]
fn a_shortened_object_is_damage_at_every_length() {
    let (bytes, _, _) = object(0, &[100, 50, 1_000], 64);
    for length in 0..bytes.len() {
        assert!(read(&bytes[..length]).is_err(), "{length} of {}", bytes.len());
    }
}

#[test]
fn many_small_entries_share_blocks_and_a_large_one_has_its_own() {
    let mut sizes = vec![10_000; 300];
    sizes.push(6 << 20);
    let (bytes, _, _) = object(0, &sizes, 1 << 20);
    let footer = decode_footer(&id(), bytes.len() as u64, &bytes[bytes.len() - FOOTER_BYTES..])
        .expect("a footer");
    assert_eq!(footer.rows, 3);
    assert!((bytes.len() as u64) < 10_000 * 300, "it is compressed");
}

#[test]
fn an_object_of_another_ledger_or_upload_is_refused() {
    let (bytes, _, _) = object(0, &[10], 64);
    let tail = &bytes[bytes.len() - FOOTER_BYTES..];
    let other = ObjectId { uuid: [7; 16], ..id() };
    assert!(decode_footer(&other, bytes.len() as u64, tail).is_err());
    let other = ObjectId { ledger: LedgerId(1), ..id() };
    assert!(decode_footer(&other, bytes.len() as u64, tail).is_err());
}

#[test]
fn a_name_tells_ledger_and_upload_and_other_names_tell_nothing() {
    let name = id().name();
    let prefix = segment_prefix(id().segment);
    let rest = name.strip_prefix(&format!("{prefix}/")).expect("below its segment");
    assert_eq!(ObjectId::parse(rest), Some((id().ledger, id().uuid)));
    for foreign in
        ["", "x", "a/b", "0/1-2/3", "000000000000001f-zz/0", &rest[1..], &format!("{rest}x")]
    {
        assert_eq!(ObjectId::parse(foreign), None, "{foreign}");
    }
}
