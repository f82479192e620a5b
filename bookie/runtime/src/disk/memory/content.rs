//! One file's bytes: what reads see, and what else the platter may hold of each sector.

use std::{collections::BTreeMap, ops::Range};

use crate::random::Random;

/// A disk writes sectors of this many bytes whole or not at all.
const SECTOR_BYTES: usize = 512;

/// Versions of one sector kept besides the present one; of more, the middle ones are forgotten.
const VERSIONS_MAX: usize = 4;

type Sector = Box<[u8; SECTOR_BYTES]>;

/// Bytes of one file and their unsynced past.
#[derive(Clone, Debug, Default)]
pub(super) struct Content {
    /// What reads see.
    cached: Vec<u8>,
    /// Per sector written since the last sync: what it may hold instead, the durable version first.
    unsynced: BTreeMap<usize, Vec<Sector>>,
    /// Length as of the last sync.
    durable_len: usize,
    /// After a failed sync: what the platter holds of sectors that the cache wrongly takes for clean.
    lost: BTreeMap<usize, Sector>,
    /// The same for the length.
    lost_len: Option<usize>,
}

impl Content {
    pub(super) fn len(&self) -> u64 {
        self.cached.len() as u64
    }

    pub(super) fn read_at(&self, buffer: &mut [u8], position: u64) -> usize {
        let from = usize::try_from(position).unwrap_or(usize::MAX).min(self.cached.len());
        let count = buffer.len().min(self.cached.len() - from);
        buffer[..count].copy_from_slice(&self.cached[from..from + count]);
        count
    }

    pub(super) fn write_at(&mut self, bytes: &[u8], position: u64) {
        if bytes.is_empty() {
            return;
        }
        let from =
            usize::try_from(position).expect("the capacity of a disk in memory fits its addresses");
        let end = from + bytes.len();
        for sector in from / SECTOR_BYTES..end.div_ceil(SECTOR_BYTES) {
            let before = self.sector(sector);
            let versions = self.unsynced.entry(sector).or_default();
            if versions.is_empty() {
                // The platter's own version, where a failed sync has hidden it.
                versions.extend(self.lost.remove(&sector));
            }
            versions.push(before);
            if versions.len() > VERSIONS_MAX {
                versions.remove(1);
            }
        }
        if end > self.cached.len() {
            self.cached.resize(end, 0);
            self.lost_len = None; // the length is dirty again, so the next sync writes it
        }
        self.cached[from..end].copy_from_slice(bytes);
    }

    pub(super) fn sync(&mut self) {
        self.unsynced.clear();
        if self.lost_len.is_none() {
            self.durable_len = self.cached.len();
        }
    }

    /// A failing sync: see [`super::MemoryFile::sync_and_fail`].
    pub(super) fn sync_and_fail(&mut self, random: &Random) {
        for (sector, versions) in std::mem::take(&mut self.unsynced) {
            if let Some(version) = pick(versions, random) {
                self.lost.insert(sector, version);
            }
        }
        let grown = self.cached.len();
        self.lost_len = Some(pick_len(self.lost_len.unwrap_or(self.durable_len), grown, random));
    }

    /// Drops clean pages: what a failed sync lost becomes visible. Dirty pages stay.
    pub(super) fn evict(&mut self) {
        for (sector, version) in std::mem::take(&mut self.lost) {
            if let Some(versions) = self.unsynced.get_mut(&sector) {
                versions.insert(0, version); // written again since: still dirty
            } else {
                self.put(sector, &version);
            }
        }
        if let Some(len) = self.lost_len.take() {
            self.cut(len);
            self.durable_len = len;
        }
    }

    /// A power cut: each unsynced sector keeps one of its versions.
    pub(super) fn tear(&mut self, random: &Random) {
        let durable_len = self.lost_len.unwrap_or(self.durable_len);
        let len = pick_len(durable_len, self.cached.len(), random);
        for (sector, version) in std::mem::take(&mut self.lost) {
            self.put(sector, &version);
        }
        for (sector, versions) in std::mem::take(&mut self.unsynced) {
            if let Some(version) = pick(versions, random) {
                self.put(sector, &version);
            }
        }
        self.settle(len);
    }

    /// A power cut that leaves only what was synced.
    pub(super) fn lose_unsynced(&mut self) {
        let len = self.lost_len.unwrap_or(self.durable_len);
        for (sector, version) in std::mem::take(&mut self.lost) {
            self.put(sector, &version);
        }
        for (sector, versions) in std::mem::take(&mut self.unsynced) {
            self.put(sector, &versions[0]);
        }
        self.settle(len);
    }

    /// Flips a bit in every version of its sector; false if the file is shorter.
    pub(super) fn flip_bit(&mut self, bit: u64) -> bool {
        let (byte, mask) = (usize::try_from(bit / 8).unwrap_or(usize::MAX), 1u8 << (bit % 8));
        let Some(cached) = self.cached.get_mut(byte) else { return false };
        *cached ^= mask;
        let (sector, within) = (byte / SECTOR_BYTES, byte % SECTOR_BYTES);
        for version in
            self.unsynced.get_mut(&sector).into_iter().flatten().chain(self.lost.get_mut(&sector))
        {
            version[within] ^= mask;
        }
        true
    }

    /// From now on the platter holds exactly `len` bytes of what the cache shows.
    fn settle(&mut self, len: usize) {
        self.cut(len);
        self.durable_len = len;
        self.lost_len = None;
    }

    fn cut(&mut self, len: usize) {
        self.cached.truncate(len);
    }

    fn range(&self, sector: usize) -> Range<usize> {
        let start = (sector * SECTOR_BYTES).min(self.cached.len());
        start..(start + SECTOR_BYTES).min(self.cached.len())
    }

    fn sector(&self, sector: usize) -> Sector {
        let mut bytes = Box::new([0; SECTOR_BYTES]);
        let present = &self.cached[self.range(sector)];
        bytes[..present.len()].copy_from_slice(present);
        bytes
    }

    fn put(&mut self, sector: usize, bytes: &[u8; SECTOR_BYTES]) {
        let range = self.range(sector);
        let count = range.len();
        self.cached[range].copy_from_slice(&bytes[..count]);
    }
}

/// One of the older versions, or none: the present one.
fn pick(mut versions: Vec<Sector>, random: &Random) -> Option<Sector> {
    let chosen = random.below(versions.len() as u64 + 1) as usize;
    (chosen < versions.len()).then(|| versions.swap_remove(chosen))
}

/// A length between the durable and the present one: either end, or a whole number of sectors between.
fn pick_len(durable: usize, present: usize, random: &Random) -> usize {
    if present <= durable {
        return present;
    }
    match random.below(3) {
        0 => durable,
        1 => present,
        _ => {
            let between = durable + random.below((present - durable) as u64 + 1) as usize;
            between.next_multiple_of(SECTOR_BYTES).clamp(durable, present)
        }
    }
}
