//! A disk that fails when a test says so, or by chance.

use std::{collections::BTreeMap, fmt, io, sync::Arc};

use parking_lot::Mutex;

use super::{Disk, DiskFile, DiskLock, MemoryDisk, MemoryFile, OpenMode, SharedDisk, Space};
use crate::random::Random;

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A write stores a part of its bytes and fails.
    Write,
    /// A write stores a part of its bytes and finds the disk full.
    WriteFull,
    /// A sync fails; on a [`MemoryDisk`] it loses pages and hides that (T21).
    Sync,
    /// A sync of the directory fails and does nothing.
    SyncDir,
    /// A creation, rename or removal fails and does nothing.
    Names,
    /// A read fails.
    Read,
    /// A read succeeds with one bit flipped.
    ReadFlip,
}

/// The plan of what fails; the test keeps a clone and changes it while the disk is in use. At first nothing fails.
#[derive(Clone, Debug)]
pub struct Faults(Arc<Mutex<Plan>>);

#[derive(Debug)]
struct Plan {
    random: Random,
    only: String,
    rules: BTreeMap<Fault, Rule>,
    struck: u64,
}

#[derive(Debug, Default)]
struct Rule {
    chance: f64,
    calls_before: Option<u64>,
}

impl Faults {
    /// Nothing fails yet; `random` decides what is left to chance.
    #[must_use]
    pub fn none(random: Random) -> Self {
        Self(Arc::new(Mutex::new(Plan {
            random,
            only: String::new(),
            rules: BTreeMap::new(),
            struck: 0,
        })))
    }

    /// The next such call fails, after `calls_before` more that do not; once.
    pub fn plan(&self, fault: Fault, calls_before: u64) {
        self.0.lock().rules.entry(fault).or_default().calls_before = Some(calls_before);
    }

    /// Each such call fails with this probability from now on.
    pub fn set_chance(&self, fault: Fault, chance: f64) {
        self.0.lock().rules.entry(fault).or_default().chance = chance;
    }

    /// Only files whose names begin so are struck, and counted by [`Self::plan`]; all of them with "".
    pub fn set_only(&self, name_prefix: impl Into<String>) {
        self.0.lock().only = name_prefix.into();
    }

    /// Nothing fails from now on.
    pub fn clear(&self) {
        self.0.lock().rules.clear();
    }

    /// Calls that were made to fail so far.
    #[must_use]
    pub fn struck(&self) -> u64 {
        self.0.lock().struck
    }

    fn strikes(&self, fault: Fault, name: &str) -> bool {
        let mut plan = self.0.lock();
        if !name.starts_with(&plan.only) {
            return false;
        }
        let random = plan.random.clone();
        let Some(rule) = plan.rules.get_mut(&fault) else { return false };
        let planned = rule.calls_before == Some(0);
        rule.calls_before = rule.calls_before.and_then(|calls| calls.checked_sub(1));
        let strikes = planned || (rule.chance > 0.0 && random.chance(rule.chance));
        plan.struck += u64::from(strikes);
        strikes
    }

    fn check(&self, fault: Fault, name: &str) -> io::Result<()> {
        if self.strikes(fault, name) { Err(injected()) } else { Ok(()) }
    }

    fn below(&self, bound: u64) -> u64 {
        self.0.lock().random.below(bound)
    }
}

fn injected() -> io::Error {
    io::Error::other("injected fault")
}

/// Another disk, whose calls fail as [`Faults`] says.
#[derive(Clone, Debug)]
pub struct FaultyDisk {
    inner: Inner,
    faults: Faults,
}

#[derive(Clone, Debug)]
enum Inner {
    Any(SharedDisk),
    Memory(MemoryDisk),
}

impl FaultyDisk {
    /// Over any disk. A sync that is made to fail does nothing.
    #[must_use]
    pub fn new(inner: SharedDisk, faults: Faults) -> Self {
        Self { inner: Inner::Any(inner), faults }
    }

    /// Over a disk in memory. A sync that is made to fail loses pages as [`MemoryFile::sync_and_fail`] says.
    #[must_use]
    pub fn over_memory(inner: MemoryDisk, faults: Faults) -> Self {
        Self { inner: Inner::Memory(inner), faults }
    }

    fn inner(&self) -> &dyn Disk {
        match &self.inner {
            Inner::Any(disk) => &**disk,
            Inner::Memory(disk) => disk,
        }
    }
}

impl Disk for FaultyDisk {
    fn open(&self, name: &str, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        if mode == OpenMode::CreateNew {
            self.faults.check(Fault::Names, name)?;
        }
        let (file, memory): (Arc<dyn DiskFile>, _) = match &self.inner {
            Inner::Any(disk) => (disk.open(name, mode)?, None),
            Inner::Memory(disk) => {
                let file = Arc::new(disk.open_file(name, mode)?);
                (Arc::clone(&file) as Arc<dyn DiskFile>, Some(file))
            }
        };
        Ok(Arc::new(FaultyFile {
            inner: file,
            memory,
            name: name.to_owned(),
            faults: self.faults.clone(),
        }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.faults.check(Fault::Names, from)?;
        self.inner().rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.faults.check(Fault::Names, name)?;
        self.inner().remove(name)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.inner().list()
    }

    fn sync_dir(&self) -> io::Result<()> {
        // The directory has no name of its own: it is struck whatever names are chosen.
        let only = self.faults.0.lock().only.clone();
        self.faults.check(Fault::SyncDir, &only)?;
        self.inner().sync_dir()
    }

    fn space(&self) -> io::Result<Space> {
        self.inner().space()
    }

    fn lock(&self, name: &str) -> io::Result<DiskLock> {
        self.inner().lock(name)
    }
}

struct FaultyFile {
    inner: Arc<dyn DiskFile>,
    memory: Option<Arc<MemoryFile>>,
    /// As it was opened.
    name: String,
    faults: Faults,
}

impl FaultyFile {
    fn write_part(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        let part = self.faults.below(bytes.len() as u64) as usize;
        self.inner.write_all_at(&bytes[..part], position)
    }
}

impl DiskFile for FaultyFile {
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        self.faults.check(Fault::Read, &self.name)?;
        let count = self.inner.read_at(buffer, position)?;
        if count > 0 && self.faults.strikes(Fault::ReadFlip, &self.name) {
            let bit = self.faults.below(count as u64 * 8);
            buffer[bit as usize / 8] ^= 1 << (bit % 8);
        }
        Ok(count)
    }

    fn write_all_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        if self.faults.strikes(Fault::WriteFull, &self.name) {
            self.write_part(bytes, position)?;
            return Err(io::ErrorKind::StorageFull.into());
        }
        if self.faults.strikes(Fault::Write, &self.name) {
            self.write_part(bytes, position)?;
            return Err(injected());
        }
        self.inner.write_all_at(bytes, position)
    }

    fn sync(&self) -> io::Result<()> {
        if self.faults.strikes(Fault::Sync, &self.name) {
            if let Some(memory) = &self.memory {
                memory.sync_and_fail();
            }
            return Err(injected());
        }
        self.inner.sync()
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn evict(&self) -> io::Result<()> {
        self.inner.evict()
    }
}

impl fmt::Debug for FaultyFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyFile").field("name", &self.name).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts() -> (MemoryDisk, Faults, FaultyDisk) {
        let memory = MemoryDisk::new(1 << 24, Random::from_seed(3));
        let faults = Faults::none(Random::from_seed(4));
        (memory.clone(), faults.clone(), FaultyDisk::over_memory(memory, faults))
    }

    #[test]
    fn without_faults_it_passes_the_exam() {
        let (memory, faults, disk) = parts();
        super::super::conformance::exam(&(Arc::new(disk) as SharedDisk));
        let again = FaultyDisk::new(
            Arc::new(MemoryDisk::new(1 << 24, Random::from_seed(0))),
            faults.clone(),
        );
        super::super::conformance::exam(&(Arc::new(again) as SharedDisk));
        assert_eq!(faults.struck(), 0);
        drop(memory);
    }

    #[test]
    fn a_planned_fault_strikes_the_chosen_call_once() {
        let (_, faults, disk) = parts();
        let file = disk.open("a", OpenMode::CreateNew).unwrap();
        faults.plan(Fault::Write, 1);
        file.write_all_at(&[1; 100], 0).unwrap();
        assert!(file.write_all_at(&[2; 100], 100).is_err());
        assert!(file.len().unwrap() < 200, "a part is written, not all");
        file.write_all_at(&[2; 100], 100).unwrap();
        faults.plan(Fault::WriteFull, 0);
        assert_eq!(file.write_all_at(&[3; 9], 0).unwrap_err().kind(), io::ErrorKind::StorageFull);
        faults.plan(Fault::Names, 0);
        assert!(disk.rename("a", "b").is_err());
        faults.plan(Fault::SyncDir, 0);
        assert!(disk.sync_dir().is_err());
        assert_eq!(faults.struck(), 4);
    }

    #[test]
    fn a_failed_sync_loses_data_that_a_repeated_sync_calls_durable() {
        let lost = (0..32).filter(|seed| {
            let memory = MemoryDisk::new(1 << 24, Random::from_seed(*seed));
            let faults = Faults::none(Random::from_seed(0));
            let disk = FaultyDisk::over_memory(memory.clone(), faults.clone());
            let file = disk.open("a", OpenMode::CreateNew).unwrap();
            file.write_all_at(&[1; 512], 0).unwrap();
            file.sync().unwrap();
            disk.sync_dir().unwrap();
            file.write_all_at(&[2; 512], 0).unwrap();
            faults.plan(Fault::Sync, 0);
            assert!(file.sync().is_err());
            file.sync().unwrap();
            memory.crash_losing_all_unsynced();
            let mut bytes = [0; 512];
            disk.open("a", OpenMode::Read).unwrap().read_at(&mut bytes, 0).unwrap();
            bytes[0] == 1
        });
        assert!((1..32).contains(&lost.count()));
    }

    #[test]
    fn reads_fail_or_lie_by_chance_and_only_for_the_chosen_names() {
        let (_, faults, disk) = parts();
        let (a, b) = (
            disk.open("a", OpenMode::CreateNew).unwrap(),
            disk.open("b", OpenMode::CreateNew).unwrap(),
        );
        for file in [&a, &b] {
            file.write_all_at(&[0; 64], 0).unwrap();
        }
        faults.set_only("b");
        faults.set_chance(Fault::ReadFlip, 1.0);
        let mut bytes = [9; 100];
        assert_eq!(a.read_at(&mut bytes, 0).unwrap(), 64);
        assert_eq!(bytes[..64], [0; 64]);
        assert_eq!(b.read_at(&mut bytes, 0).unwrap(), 64);
        assert_eq!(bytes[..64].iter().map(|b| b.count_ones()).sum::<u32>(), 1);
        assert_eq!(bytes[64..], [9; 36]);
        faults.set_chance(Fault::Read, 1.0);
        assert!(a.read_at(&mut bytes, 0).is_ok() && b.read_at(&mut bytes, 0).is_err());
        faults.clear();
        assert!(b.read_at(&mut bytes, 0).is_ok());
    }
}
