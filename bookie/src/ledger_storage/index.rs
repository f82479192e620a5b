//! Immutable sorted index files, written at checkpoints (D5). Every block has its checksum.
//!
//! ```text
//! | block 4 KiB | block | ... | first keys, 16 bytes a block | trailer 32 bytes |
//! block:   | crc u32 | rows u32 | row 36 bytes ... |      row: ledger, entry, file u64; position, length, digest u32
//! trailer: | magic u64 | blocks u64 | rows u64 | crc u32 of first keys and trailer | 0 u32 |
//! ```
//! A block that fails its checksum is an error of the look-up, never an empty answer (D9).

use std::{io, sync::Arc};

use bytes::{Buf, BufMut};
use geminga_proto::ids::{EntryId, LedgerId};
use geminga_runtime::disk::DiskFile;

use crate::{fencing::Row, journal::format::crc32c};

const BLOCK_BYTES: usize = 4096;
const ROW_BYTES: usize = 36;
const ROWS_PER_BLOCK: usize = (BLOCK_BYTES - 8) / ROW_BYTES;
const TRAILER_BYTES: usize = 32;
const MAGIC: u64 = u64::from_le_bytes(*b"GMINDEX1");
const WRITE_BYTES: usize = 64 * BLOCK_BYTES;

/// Key of a row.
pub(crate) type RowKey = (LedgerId, EntryId);

/// The name of an index file.
pub(crate) fn index_name(sequence: u64) -> String {
    format!("index-{sequence:016x}")
}

/// An index file, opened: its first keys are in memory.
#[derive(Debug)]
pub(crate) struct IndexFile {
    pub(crate) sequence: u64,
    pub(crate) rows: u64,
    file: Arc<dyn DiskFile>,
    first_keys: Vec<RowKey>,
}

impl IndexFile {
    /// Opens a file and checks its trailer.
    pub(crate) fn open(sequence: u64, file: Arc<dyn DiskFile>) -> io::Result<Self> {
        let length = file.len()?;
        let mut trailer = [0u8; TRAILER_BYTES];
        let trailer_at =
            length.checked_sub(TRAILER_BYTES as u64).ok_or_else(|| damaged("too short"))?;
        read_exact(&*file, &mut trailer, trailer_at)?;
        let mut input = &trailer[..];
        let (magic, blocks, rows, crc) =
            (input.get_u64_le(), input.get_u64_le(), input.get_u64_le(), input.get_u32_le());
        let expected = blocks
            .checked_mul((BLOCK_BYTES + 16) as u64)
            .and_then(|b| b.checked_add(TRAILER_BYTES as u64));
        if magic != MAGIC || expected != Some(length) {
            return Err(damaged("no trailer"));
        }
        let mut keys = vec![0u8; blocks as usize * 16];
        read_exact(&*file, &mut keys, blocks * BLOCK_BYTES as u64)?;
        if crc != trailer_crc(&keys, &trailer) {
            return Err(damaged("trailer checksum"));
        }
        let mut input = &keys[..];
        let first_keys = (0..blocks)
            .map(|_| (LedgerId(input.get_u64_le()), EntryId(input.get_u64_le())))
            .collect();
        Ok(Self { sequence, rows, file, first_keys })
    }

    /// Reads every block and checks it.
    pub(crate) fn verify(&self) -> io::Result<()> {
        self.file.evict()?;
        let mut rows = 0;
        for block in 0..self.first_keys.len() {
            rows += self.block(block)?.len() as u64;
        }
        if rows == self.rows { Ok(()) } else { Err(damaged("row count")) }
    }

    /// The rows of a ledger from `first` to `last`, ascending.
    pub(crate) fn range(
        &self,
        ledger: LedgerId,
        first: EntryId,
        last: EntryId,
    ) -> io::Result<Vec<(EntryId, Row)>> {
        let (from, to) = ((ledger, first), (ledger, last));
        let mut found = Vec::new();
        let start = self.first_keys.partition_point(|key| *key <= from).saturating_sub(1);
        for block in start..self.first_keys.len() {
            if self.first_keys[block] > to {
                break;
            }
            let rows = self.block(block)?;
            found.extend(
                rows.into_iter()
                    .filter(|(key, _)| from <= *key && *key <= to)
                    .map(|(key, row)| (key.1, row)),
            );
        }
        Ok(found)
    }

    /// All rows, block by block.
    pub(crate) fn iter(&self) -> impl Iterator<Item = io::Result<(RowKey, Row)>> + '_ {
        (0..self.first_keys.len()).flat_map(|block| match self.block(block) {
            Ok(rows) => rows.into_iter().map(Ok).collect::<Vec<_>>(),
            Err(error) => vec![Err(error)],
        })
    }

    fn block(&self, block: usize) -> io::Result<Vec<(RowKey, Row)>> {
        let mut bytes = vec![0u8; BLOCK_BYTES];
        read_exact(&*self.file, &mut bytes, (block * BLOCK_BYTES) as u64)?;
        let mut input = &bytes[..];
        let (crc, count) = (input.get_u32_le(), input.get_u32_le() as usize);
        if crc != crc32c(&bytes[4..]) || count > ROWS_PER_BLOCK {
            return Err(damaged("block checksum"));
        }
        let row = |input: &mut &[u8]| {
            let key = (LedgerId(input.get_u64_le()), EntryId(input.get_u64_le()));
            let file = input.get_u64_le();
            let position = u64::from(input.get_u32_le());
            (key, Row { file, position, length: input.get_u32_le(), digest: input.get_u32_le() })
        };
        Ok((0..count).map(|_| row(&mut input)).collect())
    }
}

fn trailer_crc(keys: &[u8], trailer: &[u8]) -> u32 {
    let mut crc = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    crc.update(keys);
    crc.update(&trailer[..24]);
    crc.finalize() as u32
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("index file: {what}"))
}

fn read_exact(file: &dyn DiskFile, buffer: &mut [u8], position: u64) -> io::Result<()> {
    match file.read_at(buffer, position)? {
        got if got == buffer.len() => Ok(()),
        _ => Err(damaged("ends early")),
    }
}

/// Writes one index file from rows in ascending order of their keys. Nothing counts before `finish` and a sync.
#[derive(Debug)]
pub(crate) struct IndexWriter {
    file: Arc<dyn DiskFile>,
    buffer: Vec<u8>,
    position: u64,
    block: Vec<u8>,
    in_block: usize,
    first_keys: Vec<u8>,
    blocks: u64,
    rows: u64,
}

impl IndexWriter {
    pub(crate) fn new(file: Arc<dyn DiskFile>) -> Self {
        Self {
            file,
            buffer: Vec::with_capacity(WRITE_BYTES),
            position: 0,
            block: Vec::with_capacity(BLOCK_BYTES),
            in_block: 0,
            first_keys: Vec::new(),
            blocks: 0,
            rows: 0,
        }
    }

    pub(crate) fn push(&mut self, key: RowKey, row: Row) -> io::Result<()> {
        if self.in_block == 0 {
            self.first_keys.put_u64_le(key.0.0);
            self.first_keys.put_u64_le(key.1.0);
            self.block.put_u64_le(0); // crc and count, filled in later
        }
        self.block.put_u64_le(key.0.0);
        self.block.put_u64_le(key.1.0);
        self.block.put_u64_le(row.file);
        self.block.put_u32_le(row.position as u32);
        self.block.put_u32_le(row.length);
        self.block.put_u32_le(row.digest);
        self.in_block += 1;
        self.rows += 1;
        if self.in_block == ROWS_PER_BLOCK { self.end_block() } else { Ok(()) }
    }

    fn end_block(&mut self) -> io::Result<()> {
        if self.in_block == 0 {
            return Ok(());
        }
        self.block.resize(BLOCK_BYTES, 0);
        self.block[4..8].copy_from_slice(&(self.in_block as u32).to_le_bytes());
        let crc = crc32c(&self.block[4..]);
        self.block[0..4].copy_from_slice(&crc.to_le_bytes());
        self.buffer.extend_from_slice(&self.block);
        self.block.clear();
        self.in_block = 0;
        self.blocks += 1;
        if self.buffer.len() >= WRITE_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.buffer, self.position)?;
        self.position += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Writes the rest, without syncing.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.end_block()?;
        let mut trailer = [0u8; TRAILER_BYTES];
        let mut out = &mut trailer[..];
        out.put_u64_le(MAGIC);
        out.put_u64_le(self.blocks);
        out.put_u64_le(self.rows);
        let crc = trailer_crc(&self.first_keys, &trailer);
        trailer[24..28].copy_from_slice(&crc.to_le_bytes());
        self.buffer.extend_from_slice(&self.first_keys);
        self.buffer.extend_from_slice(&trailer);
        self.flush()
    }
}

/// Rows in ascending order of their keys.
pub(crate) type Source<'a> = Box<dyn Iterator<Item = io::Result<(RowKey, Row)>> + 'a>;

/// Merges ascending sources, newest first; of equal keys the newest row wins.
pub(crate) fn merge<'a>(
    mut sources: Vec<Source<'a>>,
    mut emit: impl FnMut(RowKey, Row) -> io::Result<()>,
) -> io::Result<()> {
    let mut heads: Vec<Option<(RowKey, Row)>> =
        sources.iter_mut().map(|source| source.next().transpose()).collect::<io::Result<_>>()?;
    loop {
        let lowest =
            heads.iter().enumerate().filter_map(|(at, head)| head.map(|(key, _)| (key, at))).min();
        let Some((key, at)) = lowest else { return Ok(()) };
        if let Some((key, row)) = heads[at] {
            emit(key, row)?;
        }
        for (source, head) in sources.iter_mut().zip(heads.iter_mut()) {
            if head.is_some_and(|(other, _)| other == key) {
                *head = source.next().transpose()?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use geminga_runtime::{
        disk::{Disk, MemoryDisk, OpenMode},
        random::Random,
    };
    use proptest::prelude::*;

    use super::*;

    fn disk() -> MemoryDisk {
        MemoryDisk::new(1 << 30, Random::from_seed(1))
    }

    fn write(disk: &MemoryDisk, rows: &BTreeMap<RowKey, Row>) -> IndexFile {
        let file = disk.open("index", OpenMode::CreateNew).expect("a new file");
        let mut writer = IndexWriter::new(Arc::clone(&file));
        rows.iter().for_each(|(key, row)| writer.push(*key, *row).expect("room"));
        writer.finish().expect("room");
        IndexFile::open(1, file).expect("sound")
    }

    fn rows() -> impl Strategy<Value = BTreeMap<RowKey, Row>> {
        let row = (0u64..4, 0u64..200, any::<u32>());
        prop::collection::vec(row, 0..600).prop_map(|rows| {
            let row = |digest| Row { file: 1, position: 4096, length: 9, digest };
            rows.into_iter().map(|(l, e, d)| ((LedgerId(l), EntryId(e)), row(d))).collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn every_range_gives_what_was_written(rows in rows(), ledger in 0u64..4, first in 0u64..210, span in 0u64..210) {
            let index = write(&disk(), &rows);
            let got = index.range(LedgerId(ledger), EntryId(first), EntryId(first + span)).expect("sound");
            let range = (LedgerId(ledger), EntryId(first))..=(LedgerId(ledger), EntryId(first + span));
            let expected: Vec<_> = rows.range(range).map(|(key, row)| (key.1, *row)).collect();
            prop_assert_eq!(got, expected);
            prop_assert!(index.verify().is_ok());
        }

        #[test]
        fn any_flipped_bit_is_an_error_and_never_an_empty_answer(rows in rows(), bit: u64) {
            let disk = disk();
            let length = { write(&disk, &rows); disk.open("index", OpenMode::Read).expect("there").len().expect("known") };
            disk.flip_bit("index", bit % (length * 8)).expect("within");
            let file = disk.open("index", OpenMode::Read).expect("there");
            let verdict = IndexFile::open(1, file).and_then(|index| index.verify().map(|()| index));
            if let Ok(index) = verdict {
                // Only bytes that nothing reads may change unseen.
                let all: BTreeMap<_, _> = index.iter().collect::<io::Result<_>>().expect("verified");
                prop_assert_eq!(all, rows);
            }
        }

        #[test]
        fn a_merge_keeps_the_newest_row_of_each_key(new in rows(), old in rows()) {
            let mut merged = BTreeMap::new();
            let source = |rows: &BTreeMap<RowKey, Row>| -> Source<'static> {
                Box::new(rows.clone().into_iter().map(Ok))
            };
            merge(vec![source(&new), source(&old)], |key, row| { merged.insert(key, row); Ok(()) }).expect("sound");
            let mut expected = old;
            expected.extend(new);
            prop_assert_eq!(merged, expected);
        }
    }
}
