//! A disk in memory that loses at a power cut what a disk may lose, as its seed decides.
//!
//! ```text
//! content  [sector 0][sector 1][sector 2]      what reads see (the page cache)
//! unsynced     -      [old, older]   [old]     what else each sector may hold on the platter
//! names    live: what list() shows; durable: as of the last sync_dir; changes: what happened since
//! ```
//! A power cut picks for each unsynced sector one of its versions, for a grown file a length, and for each unsynced name
//! change whether it happened. One seed and one order of calls give one disk.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    sync::Arc,
};

use parking_lot::{Mutex, MutexGuard};

use super::{Disk, DiskFile, DiskLock, OpenMode, Space, check_name};
use crate::random::Random;

mod content;
#[cfg(test)]
mod tests;

use content::Content;

/// A disk in memory; clones share it, and it outlives the processes that crash on it.
#[derive(Clone)]
pub struct MemoryDisk(Arc<Mutex<State>>);

type FileId = u64;

#[derive(Clone)]
struct State {
    capacity: u64,
    random: Random,
    /// Counts restarts: handles and locks from before the last one are dead.
    boot: u64,
    next_file: FileId,
    files: BTreeMap<FileId, File>,
    live: BTreeMap<String, FileId>,
    durable: BTreeMap<String, FileId>,
    changes: Vec<NameChange>,
    locks: BTreeSet<String>,
}

#[derive(Clone, Default)]
struct File {
    content: Content,
    handles: usize,
}

#[derive(Clone)]
enum NameChange {
    Create(String, FileId),
    Rename(String, String, FileId),
    Remove(String),
}

/// How much of what was not synced a restart may take away.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Loss {
    Nothing,
    ByChance,
    Everything,
}

impl MemoryDisk {
    /// An empty disk of `capacity_bytes`; `random` decides what power cuts leave.
    #[must_use]
    pub fn new(capacity_bytes: u64, random: Random) -> Self {
        Self(Arc::new(Mutex::new(State {
            capacity: capacity_bytes,
            random,
            boot: 0,
            next_file: 0,
            files: BTreeMap::new(),
            live: BTreeMap::new(),
            durable: BTreeMap::new(),
            changes: Vec::new(),
            locks: BTreeSet::new(),
        })))
    }

    /// A power cut and the next boot: the seed decides, per 512-byte sector and per name change, what of the unsynced work
    /// is on the disk. All handles and locks from before are dead: their calls fail.
    pub fn crash(&self) {
        self.0.lock().restart(Loss::ByChance);
    }

    /// A power cut after which nothing unsynced is on the disk.
    pub fn crash_losing_all_unsynced(&self) {
        self.0.lock().restart(Loss::Everything);
    }

    /// The process dies and the machine stays up (`kill -9`): handles and locks are dead, written bytes and name changes
    /// stay visible, and are still lost by a later power cut unless they are synced.
    pub fn kill(&self) {
        self.0.lock().restart(Loss::Nothing);
    }

    /// Flips one bit of a file at rest; bit 0 is the lowest of byte 0.
    ///
    /// # Errors
    /// `NotFound`; `InvalidInput` when the file is shorter.
    pub fn flip_bit(&self, name: &str, bit: u64) -> io::Result<()> {
        let mut state = self.0.lock();
        let id = state.find(name)?;
        let flipped = state.files.get_mut(&id).is_some_and(|file| file.content.flip_bit(bit));
        if flipped {
            Ok(())
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "the file has no such bit"))
        }
    }

    /// Changes the room on the disk; what is stored stays.
    pub fn set_capacity(&self, capacity_bytes: u64) {
        self.0.lock().capacity = capacity_bytes;
    }

    /// A second disk with what this one holds now, unsynced work included, and no handle on it: for a test that cuts the
    /// power at every step.
    #[must_use]
    pub fn copy(&self, random: Random) -> Self {
        let mut state = self.0.lock().clone();
        state.random = random;
        state.restart(Loss::Nothing);
        Self(Arc::new(Mutex::new(state)))
    }

    /// Opens a file, as [`Disk::open`] does, with the handle's own type.
    ///
    /// # Errors
    /// As [`Disk::open`].
    pub fn open_file(&self, name: &str, mode: OpenMode) -> io::Result<MemoryFile> {
        check_name(name)?;
        let mut state = self.0.lock();
        let id = match (mode, state.find(name)) {
            (OpenMode::CreateNew, Ok(_)) => return Err(io::ErrorKind::AlreadyExists.into()),
            (OpenMode::CreateNew, Err(_)) => state.create(name),
            (OpenMode::ReadWrite | OpenMode::Read, found) => found?,
        };
        if let Some(file) = state.files.get_mut(&id) {
            file.handles += 1;
        }
        let boot = state.boot;
        drop(state);
        Ok(MemoryFile { disk: self.clone(), id, boot, writable: mode != OpenMode::Read })
    }
}

impl State {
    fn find(&self, name: &str) -> io::Result<FileId> {
        self.live.get(name).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn create(&mut self, name: &str) -> FileId {
        let id = self.next_file;
        self.next_file += 1;
        self.files.insert(id, File::default());
        self.live.insert(name.to_owned(), id);
        self.changes.push(NameChange::Create(name.to_owned(), id));
        id
    }

    fn used(&self) -> u64 {
        self.live.values().filter_map(|id| self.files.get(id)).map(|file| file.content.len()).sum()
    }

    fn restart(&mut self, loss: Loss) {
        self.boot += 1;
        self.locks.clear();
        for file in self.files.values_mut() {
            file.handles = 0;
        }
        if loss != Loss::Nothing {
            self.cut_power(loss);
        }
        self.forget_unreachable();
    }

    fn cut_power(&mut self, loss: Loss) {
        for change in std::mem::take(&mut self.changes) {
            if loss == Loss::Everything || self.random.chance(0.5) {
                continue;
            }
            match change {
                NameChange::Create(name, id) => drop(self.durable.insert(name, id)),
                NameChange::Remove(name) => drop(self.durable.remove(&name)),
                NameChange::Rename(from, to, id) => {
                    // Without the lost creation there is nothing to rename; a lost remove may leave another file there.
                    if self.durable.get(&from) == Some(&id) {
                        self.durable.remove(&from);
                        self.durable.insert(to, id);
                    }
                }
            }
        }
        self.live = self.durable.clone();
        for id in self.live.values() {
            let Some(file) = self.files.get_mut(id) else { continue };
            match loss {
                Loss::Everything => file.content.lose_unsynced(),
                Loss::Nothing | Loss::ByChance => file.content.tear(&self.random),
            }
        }
    }

    /// Drops files that no name, no change that may still be undone, and no handle leads to.
    fn forget_unreachable(&mut self) {
        let mut reachable: BTreeSet<FileId> =
            self.live.values().chain(self.durable.values()).copied().collect();
        reachable.extend(self.changes.iter().filter_map(|change| match change {
            NameChange::Create(_, id) | NameChange::Rename(_, _, id) => Some(*id),
            NameChange::Remove(_) => None,
        }));
        self.files.retain(|id, file| file.handles > 0 || reachable.contains(id));
    }
}

impl Disk for MemoryDisk {
    fn open(&self, name: &str, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(self.open_file(name, mode)?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        check_name(to)?;
        let mut state = self.0.lock();
        let id = state.find(from)?;
        state.live.remove(from);
        state.live.insert(to.to_owned(), id);
        state.changes.push(NameChange::Rename(from.to_owned(), to.to_owned(), id));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.0.lock();
        state.find(name)?;
        state.live.remove(name);
        state.changes.push(NameChange::Remove(name.to_owned()));
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.0.lock().live.keys().cloned().collect())
    }

    fn sync_dir(&self) -> io::Result<()> {
        let mut state = self.0.lock();
        state.durable = state.live.clone();
        state.changes.clear();
        state.forget_unreachable();
        Ok(())
    }

    fn space(&self) -> io::Result<Space> {
        let state = self.0.lock();
        Ok(Space { total: state.capacity, free: state.capacity.saturating_sub(state.used()) })
    }

    fn lock(&self, name: &str) -> io::Result<DiskLock> {
        check_name(name)?;
        let mut state = self.0.lock();
        if !state.locks.insert(name.to_owned()) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if state.find(name).is_err() {
            state.create(name);
        }
        let boot = state.boot;
        drop(state);
        Ok(Box::new(MemoryLock { disk: self.clone(), name: name.to_owned(), boot }))
    }
}

impl fmt::Debug for MemoryDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MemoryDisk")
    }
}

struct MemoryLock {
    disk: MemoryDisk,
    name: String,
    boot: u64,
}

impl Drop for MemoryLock {
    fn drop(&mut self) {
        let mut state = self.disk.0.lock();
        if state.boot == self.boot {
            state.locks.remove(&self.name);
        }
    }
}

/// An open file of a [`MemoryDisk`].
pub struct MemoryFile {
    disk: MemoryDisk,
    id: FileId,
    boot: u64,
    writable: bool,
}

impl MemoryFile {
    /// Does what a failing fsync does (T21): of the unsynced sectors the seed decides which are on the platter, while the
    /// page cache shows all of them as clean. A repeated sync succeeds and writes nothing; an evict or a power cut shows
    /// what was lost. Call it in place of [`DiskFile::sync`], and report an error.
    pub fn sync_and_fail(&self) {
        let mut state = self.disk.0.lock();
        let random = state.random.clone();
        if state.boot == self.boot
            && let Some(file) = state.files.get_mut(&self.id)
        {
            file.content.sync_and_fail(&random);
        }
    }

    fn state(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.disk.0.lock();
        if state.boot == self.boot {
            Ok(state)
        } else {
            Err(io::Error::other("a handle from before the restart"))
        }
    }

    fn with<T>(&self, work: impl FnOnce(&mut Content) -> T) -> io::Result<T> {
        let mut state = self.state()?;
        let file = state.files.get_mut(&self.id).ok_or(io::ErrorKind::NotFound)?;
        Ok(work(&mut file.content))
    }
}

impl DiskFile for MemoryFile {
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        self.with(|content| content.read_at(buffer, position))
    }

    fn write_all_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        if !self.writable {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let mut state = self.state()?;
        let end = position.checked_add(bytes.len() as u64).ok_or(io::ErrorKind::InvalidInput)?;
        let room = state.capacity.saturating_sub(state.used());
        let file = state.files.get_mut(&self.id).ok_or(io::ErrorKind::NotFound)?;
        let end_max = file.content.len().saturating_add(room);
        if end <= end_max {
            file.content.write_at(bytes, position);
            return Ok(());
        }
        // A full disk takes what fits.
        if let Some(fits) = end_max.checked_sub(position) {
            file.content.write_at(&bytes[..fits as usize], position);
        }
        Err(io::ErrorKind::StorageFull.into())
    }

    fn sync(&self) -> io::Result<()> {
        self.with(Content::sync)
    }

    fn len(&self) -> io::Result<u64> {
        self.with(|content| content.len())
    }

    fn evict(&self) -> io::Result<()> {
        self.with(Content::evict)
    }
}

impl fmt::Debug for MemoryFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryFile").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        let mut state = self.disk.0.lock();
        if state.boot == self.boot
            && let Some(file) = state.files.get_mut(&self.id)
        {
            file.handles -= 1;
            if file.handles == 0 {
                state.forget_unreachable();
            }
        }
    }
}
