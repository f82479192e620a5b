//! A checkpoint as bytes, and its files (D5(a)): rows are in index files; flags, limbo and sets are in here.
//!
//! ```text
//! | magic u64 | crc u32 | length u32 | protobuf body |     checkpoint-<sequence>, named by atomic rename
//! ```

use std::io;

use bytes::{Buf, BufMut};
use geminga_proto::ids::{EntryId, LedgerId};
use geminga_runtime::disk::{Disk, OpenMode, SharedDisk};
use prost::Message;

use crate::{
    crash_points::{CrashPoint, CrashPoints},
    fencing::LedgerSummary,
    journal::format::{Bound, crc32c},
    ledger_set::LedgerSet,
};

const MAGIC: u64 = u64::from_le_bytes(*b"GMCHECK1");
const HEADER_BYTES: usize = 16;
const BODY_BYTES_MAX: usize = 1 << 30;
/// The format number of the body.
const FORMAT: u32 = 1;

/// What is known of a journal file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FileInfo {
    /// Numbers of its first and last group.
    pub(crate) first: u64,
    pub(crate) last: u64,
    /// Ledgers with entries in it.
    pub(crate) ledgers: LedgerSet,
    /// The checkpoint since which all of them are dropped.
    pub(crate) dead_at: Option<u64>,
}

/// Where the newest group covered lies: replay starts there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) number: u64,
    pub(crate) file: u64,
    pub(crate) position: u64,
}

/// The content of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Checkpoint {
    pub(crate) sequence: u64,
    pub(crate) mark: Mark,
    pub(crate) ledgers: Vec<LedgerSummary>,
    pub(crate) limbo: Option<Bound>,
    pub(crate) tombstones: LedgerSet,
    pub(crate) moved_away: LedgerSet,
    /// Sequences of the index files, newest first.
    pub(crate) indexes: Vec<u64>,
    pub(crate) files: Vec<(u64, FileInfo)>,
}

#[derive(Clone, PartialEq, Message)]
struct Run {
    #[prost(uint64, tag = "1")]
    first: u64,
    #[prost(uint64, tag = "2")]
    last: u64,
}

#[derive(Clone, PartialEq, Message)]
struct WireLedger {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(bool, tag = "2")]
    fenced: bool,
    #[prost(uint64, optional, tag = "3")]
    lac: Option<u64>,
    #[prost(uint64, optional, tag = "4")]
    indexed_max: Option<u64>,
    #[prost(uint64, optional, tag = "5")]
    valid_from_file: Option<u64>,
    #[prost(uint64, tag = "6")]
    valid_from_position: u64,
    #[prost(uint64, tag = "7")]
    bytes: u64,
}

#[derive(Clone, PartialEq, Message)]
struct WireFile {
    #[prost(uint64, tag = "1")]
    number: u64,
    #[prost(uint64, tag = "2")]
    first: u64,
    #[prost(uint64, tag = "3")]
    last: u64,
    #[prost(message, repeated, tag = "4")]
    ledgers: Vec<Run>,
    #[prost(uint64, optional, tag = "5")]
    dead_at: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
struct WireBound {
    #[prost(uint32, tag = "1")]
    generation: u32,
    #[prost(int64, tag = "2")]
    revision: i64,
}

#[derive(Clone, PartialEq, Message)]
struct WireCheckpoint {
    #[prost(uint32, tag = "1")]
    format: u32,
    #[prost(uint64, tag = "2")]
    sequence: u64,
    #[prost(uint64, tag = "3")]
    mark_number: u64,
    #[prost(uint64, tag = "4")]
    mark_file: u64,
    #[prost(uint64, tag = "5")]
    mark_position: u64,
    #[prost(message, repeated, tag = "6")]
    ledgers: Vec<WireLedger>,
    #[prost(message, optional, tag = "7")]
    limbo: Option<WireBound>,
    #[prost(message, repeated, tag = "8")]
    tombstones: Vec<Run>,
    #[prost(message, repeated, tag = "9")]
    moved_away: Vec<Run>,
    #[prost(uint64, repeated, tag = "10")]
    indexes: Vec<u64>,
    #[prost(message, repeated, tag = "11")]
    files: Vec<WireFile>,
}

fn to_runs(set: &LedgerSet) -> Vec<Run> {
    set.runs().iter().map(|&(first, last)| Run { first, last }).collect()
}

fn from_runs(runs: &[Run]) -> Option<LedgerSet> {
    LedgerSet::from_runs(runs.iter().map(|run| (run.first, run.last)).collect())
}

impl Checkpoint {
    /// Its bytes.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let body = WireCheckpoint {
            format: FORMAT,
            sequence: self.sequence,
            mark_number: self.mark.number,
            mark_file: self.mark.file,
            mark_position: self.mark.position,
            ledgers: self.ledgers.iter().map(wire_ledger).collect(),
            limbo: self.limbo.map(|bound| WireBound {
                generation: bound.generation.into(),
                revision: bound.revision,
            }),
            tombstones: to_runs(&self.tombstones),
            moved_away: to_runs(&self.moved_away),
            indexes: self.indexes.clone(),
            files: self.files.iter().map(|(number, info)| wire_file(*number, info)).collect(),
        }
        .encode_to_vec();
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
        bytes.put_u64_le(MAGIC);
        bytes.put_u32_le(crc32c(&body));
        bytes.put_u32_le(body.len() as u32);
        bytes.extend_from_slice(&body);
        bytes
    }

    /// Reads it back; none for any damage.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut header = bytes.get(..HEADER_BYTES)?;
        let (magic, crc, length) =
            (header.get_u64_le(), header.get_u32_le(), header.get_u32_le() as usize);
        let body = bytes.get(HEADER_BYTES..)?;
        if magic != MAGIC || length > BODY_BYTES_MAX || body.len() != length || crc != crc32c(body)
        {
            return None;
        }
        let wire = WireCheckpoint::decode(body).ok()?;
        if wire.format != FORMAT {
            return None;
        }
        let limbo = match wire.limbo {
            None => None,
            Some(bound) => Some(Bound {
                generation: u8::try_from(bound.generation).ok()?,
                revision: bound.revision,
            }),
        };
        let file = |file: &WireFile| {
            let ledgers = from_runs(&file.ledgers)?;
            Some((
                file.number,
                FileInfo { first: file.first, last: file.last, ledgers, dead_at: file.dead_at },
            ))
        };
        Some(Self {
            sequence: wire.sequence,
            mark: Mark {
                number: wire.mark_number,
                file: wire.mark_file,
                position: wire.mark_position,
            },
            ledgers: wire.ledgers.iter().map(summary).collect(),
            limbo,
            tombstones: from_runs(&wire.tombstones)?,
            moved_away: from_runs(&wire.moved_away)?,
            indexes: wire.indexes,
            files: wire.files.iter().map(file).collect::<Option<_>>()?,
        })
    }
}

fn wire_ledger(summary: &LedgerSummary) -> WireLedger {
    WireLedger {
        id: summary.ledger.0,
        fenced: summary.fenced,
        lac: summary.lac.map(|lac| lac.0),
        indexed_max: summary.indexed_max.map(|entry| entry.0),
        valid_from_file: summary.valid_from.map(|place| place.0),
        valid_from_position: summary.valid_from.map_or(0, |place| place.1),
        bytes: summary.bytes,
    }
}

fn summary(wire: &WireLedger) -> LedgerSummary {
    LedgerSummary {
        ledger: LedgerId(wire.id),
        fenced: wire.fenced,
        lac: wire.lac.map(EntryId),
        indexed_max: wire.indexed_max.map(EntryId),
        valid_from: wire.valid_from_file.map(|file| (file, wire.valid_from_position)),
        bytes: wire.bytes,
    }
}

fn wire_file(number: u64, info: &FileInfo) -> WireFile {
    WireFile {
        number,
        first: info.first,
        last: info.last,
        ledgers: to_runs(&info.ledgers),
        dead_at: info.dead_at,
    }
}

fn name(sequence: u64) -> String {
    format!("checkpoint-{sequence:016x}")
}

/// The name under which a file is written before it counts.
pub(crate) const PART: &str = "part-checkpoint";

/// Makes a checkpoint durable: written, synced, renamed, directory synced (D5(a)). A full disk drops the partial file and
/// is an error of kind `StorageFull`, not D3 (D10).
pub(crate) fn write(
    disk: &SharedDisk,
    crash: &CrashPoints,
    checkpoint: &Checkpoint,
) -> io::Result<()> {
    remove_if_there(&**disk, PART)?;
    let file = disk.open(PART, OpenMode::CreateNew)?;
    let written = file.write_all_at(&checkpoint.encode(), 0).and_then(|()| file.sync());
    if let Err(error) = written {
        if error.kind() == io::ErrorKind::StorageFull {
            remove_if_there(&**disk, PART)?;
        }
        return Err(error);
    }
    crash.pass(CrashPoint::CheckpointSynced)?;
    disk.rename(PART, &name(checkpoint.sequence))?;
    crash.pass(CrashPoint::CheckpointRenamed)?;
    disk.sync_dir()?;
    crash.pass(CrashPoint::CheckpointDone)
}

/// Every checkpoint file, newest first; none where it cannot be read or fails its check.
pub(crate) fn read_all(disk: &SharedDisk) -> io::Result<Vec<(u64, Option<Checkpoint>)>> {
    let mut all = Vec::new();
    for found in disk.list()? {
        let Some(sequence) =
            found.strip_prefix("checkpoint-").and_then(|hex| u64::from_str_radix(hex, 16).ok())
        else {
            continue;
        };
        let content =
            read(&**disk, &found).ok().filter(|checkpoint| checkpoint.sequence == sequence);
        if content.is_none() {
            tracing::error!(file = found, "checkpoint is unreadable or damaged");
        }
        all.push((sequence, content));
    }
    all.sort_by_key(|(sequence, _)| std::cmp::Reverse(*sequence));
    Ok(all)
}

fn read(disk: &dyn Disk, name: &str) -> io::Result<Checkpoint> {
    let file = disk.open(name, OpenMode::Read)?;
    file.evict()?;
    let length = file.len()?;
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "checkpoint damaged");
    if length > (HEADER_BYTES + BODY_BYTES_MAX) as u64 {
        return Err(damaged());
    }
    let mut bytes = vec![0u8; length as usize];
    let got = file.read_at(&mut bytes, 0)?;
    bytes.truncate(got);
    Checkpoint::decode(&bytes).ok_or_else(damaged)
}

/// Removes checkpoints and index files that neither kept checkpoint names.
pub(crate) fn remove_old(
    disk: &SharedDisk,
    crash: &CrashPoints,
    kept: &[u64],
    indexes: &[u64],
) -> io::Result<()> {
    let kept: Vec<String> = kept
        .iter()
        .map(|s| name(*s))
        .chain(indexes.iter().map(|s| super::index::index_name(*s)))
        .collect();
    let mut removed = false;
    for found in disk.list()? {
        let ours = found.starts_with("checkpoint-") || found.starts_with("index-");
        if ours && !kept.contains(&found) {
            disk.remove(&found)?;
            removed = true;
        }
    }
    if removed {
        crash.pass(CrashPoint::OldRemoved)?;
        disk.sync_dir()?;
    }
    Ok(())
}

pub(crate) fn remove_if_there(disk: &dyn Disk, name: &str) -> io::Result<()> {
    match disk.remove(name) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Checkpoint {
        let mut tombstones = LedgerSet::default();
        tombstones.insert(LedgerId(3));
        let info = FileInfo { first: 1, last: 9, ledgers: tombstones.clone(), dead_at: Some(4) };
        let summary = LedgerSummary {
            ledger: LedgerId(5),
            fenced: true,
            lac: Some(EntryId(0)),
            indexed_max: None,
            valid_from: Some((4, 4096)),
            bytes: 77,
        };
        Checkpoint {
            sequence: 7,
            mark: Mark { number: 9, file: 2, position: 4096 },
            ledgers: vec![summary],
            limbo: Some(Bound { generation: 1, revision: -1 }),
            tombstones: tombstones.clone(),
            moved_away: tombstones,
            indexes: vec![7, 3],
            files: vec![(2, info)],
        }
    }

    #[test]
    fn a_checkpoint_comes_back_as_it_was_written() {
        assert_eq!(Checkpoint::decode(&sample().encode()), Some(sample()));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_or_cut_is_found(bit: usize, cut: usize) {
            let bytes = sample().encode();
            let mut flipped = bytes.clone();
            let bit = bit % (bytes.len() * 8);
            flipped[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Checkpoint::decode(&flipped), None);
            prop_assert_eq!(Checkpoint::decode(&bytes[..cut % bytes.len()]), None);
        }
    }
}
