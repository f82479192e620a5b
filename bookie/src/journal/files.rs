//! Journal files by number: taking, reusing, releasing, and the reserve (D5, D10).
//!
//! ```text
//! free-<old number> or reserve-<k> or nothing  --take-->  journal-<new number>  --release-->  reserve-<k>, free-<n>, gone
//! ```
//! A reused file gets a new number, and with it a new name: a row that names the old number finds no file (T47). All calls
//! block; they run on I/O threads.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::Arc,
};

use geminga_runtime::disk::{DiskFile, OpenMode, SharedDisk};
use parking_lot::Mutex;

use crate::{
    crash_points::{CrashPoint, CrashPoints},
    ledger_storage::checkpoint::remove_if_there,
};

/// Reserve files of a directory (D10).
pub(crate) const RESERVE_FILES: usize = 2;
/// Room in a reserve file beyond a full journal file: first groups of the starts that copied it forward.
const RESERVE_SLACK_BYTES: u64 = 256 << 10;

/// Which files may be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A free file, else a new one.
    Normal,
    /// The reserve, for start-up, fences and recovery adds on a full disk; a free file if there is none.
    Reserve,
}

/// The journal files of one directory.
#[derive(Debug)]
pub(crate) struct Files {
    disk: SharedDisk,
    crash: CrashPoints,
    file_bytes: u64,
    free_max: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    journals: BTreeMap<u64, Arc<dyn DiskFile>>,
    free: BTreeSet<String>,
    reserve: BTreeSet<String>,
    next: u64,
}

fn journal_name(number: u64) -> String {
    format!("journal-{number:016x}")
}

fn number(name: &str, prefix: &str) -> Option<u64> {
    let digits = name.strip_prefix(prefix)?;
    (digits.len() == 16).then(|| u64::from_str_radix(digits, 16).ok())?
}

impl Files {
    /// Opens what the directory has. Numbers are dense enough: the newest file is never released, so none repeats.
    pub(crate) fn open(
        disk: SharedDisk,
        crash: CrashPoints,
        file_bytes: u64,
        free_max: usize,
    ) -> io::Result<Self> {
        let mut state = State { next: 1, ..State::default() };
        for name in disk.list()? {
            if let Some(number) = number(&name, "journal-") {
                state.journals.insert(number, disk.open(&name, OpenMode::ReadWrite)?);
                state.next = state.next.max(number + 1);
            } else if let Some(number) = number(&name, "free-") {
                state.next = state.next.max(number + 1);
                state.free.insert(name);
            } else if name.starts_with("reserve-") {
                state.reserve.insert(name);
            }
        }
        Ok(Self { disk, crash, file_bytes, free_max, state: Mutex::new(state) })
    }

    /// Every journal file, oldest first.
    pub(crate) fn all(&self) -> Vec<(u64, Arc<dyn DiskFile>)> {
        self.state
            .lock()
            .journals
            .iter()
            .map(|(number, file)| (*number, Arc::clone(file)))
            .collect()
    }

    /// The file of this number. Whoever holds the handle pins the file (D5(b)).
    pub(crate) fn get(&self, number: u64) -> Option<Arc<dyn DiskFile>> {
        self.state.lock().journals.get(&number).map(Arc::clone)
    }

    /// Whether another file can be had without the file system's help.
    pub(crate) fn has_spare(&self) -> bool {
        let state = self.state.lock();
        !state.free.is_empty() || !state.reserve.is_empty()
    }

    /// Bytes of free files: they count as free (D10).
    pub(crate) fn free_bytes(&self) -> u64 {
        self.state.lock().free.len() as u64 * self.file_bytes
    }

    /// Takes a file under the next number and makes its name durable (D1).
    ///
    /// # Errors
    /// `StorageFull` when there is none and none can be made; anything else is D3.
    pub(crate) fn take(&self, purpose: Purpose) -> io::Result<(u64, Arc<dyn DiskFile>)> {
        let (number, old) = {
            let mut state = self.state.lock();
            let number = state.next;
            state.next += 1;
            let old = match purpose {
                Purpose::Normal => state.free.pop_first(),
                Purpose::Reserve => state.reserve.pop_first().or_else(|| state.free.pop_first()),
            };
            (number, old)
        };
        let name = journal_name(number);
        let file = match old {
            Some(old) => {
                self.disk.rename(&old, &name)?;
                self.disk.open(&name, OpenMode::ReadWrite)?
            }
            None if purpose == Purpose::Reserve => return Err(io::ErrorKind::StorageFull.into()),
            None => self.disk.open(&name, OpenMode::CreateNew)?,
        };
        self.crash.pass(CrashPoint::FileTaken)?;
        self.disk.sync_dir()?;
        self.crash.pass(CrashPoint::FileNamed)?;
        self.state.lock().journals.insert(number, Arc::clone(&file));
        Ok((number, file))
    }

    /// Gives a file back whose content nobody needs any more (D5(b), G1): first to the reserve, then to the free files.
    /// False if a reader pins it.
    pub(crate) fn release(&self, number: u64) -> io::Result<bool> {
        let (file, reserve_slot, keep) = {
            let mut state = self.state.lock();
            let Some(file) = state.journals.get(&number) else { return Ok(true) };
            if Arc::strong_count(file) > 1 {
                return Ok(false);
            }
            let slot =
                (0..RESERVE_FILES).map(reserve_name).find(|name| !state.reserve.contains(name));
            let keep = state.free.len() < self.free_max;
            (state.journals.remove(&number), slot, keep)
        };
        let name = journal_name(number);
        let reserve = match (file, reserve_slot) {
            (Some(file), Some(slot)) if self.fill(&*file, file.len()?)? => Some(slot),
            _ => None,
        };
        match reserve {
            Some(reserve) => {
                self.disk.rename(&name, &reserve)?;
                self.crash.pass(CrashPoint::FileReleased)?;
                self.disk.sync_dir()?;
                self.state.lock().reserve.insert(reserve);
            }
            None if keep => {
                let free = format!("free-{number:016x}");
                self.disk.rename(&name, &free)?;
                self.crash.pass(CrashPoint::FileReleased)?;
                self.disk.sync_dir()?;
                self.state.lock().free.insert(free);
            }
            None => {
                self.disk.remove(&name)?;
                self.crash.pass(CrashPoint::FileReleased)?;
                self.disk.sync_dir()?;
            }
        }
        Ok(true)
    }

    /// Drops a file that was taken and then could not be filled for want of space: nothing in it counts.
    pub(crate) fn discard(&self, number: u64) -> io::Result<()> {
        self.state.lock().journals.remove(&number);
        self.disk.remove(&journal_name(number))?;
        self.crash.pass(CrashPoint::FileDiscarded)?;
        self.disk.sync_dir()
    }

    /// Writes reserve files that are missing, to their full length (D10). Stops quietly when there is no room.
    pub(crate) fn fill_reserve(&self) -> io::Result<()> {
        for name in (0..RESERVE_FILES).map(reserve_name) {
            if self.state.lock().reserve.contains(&name) {
                continue;
            }
            let part = "part-reserve";
            remove_if_there(&*self.disk, part)?;
            let file = match self.disk.open(part, OpenMode::CreateNew) {
                Err(error) if error.kind() == io::ErrorKind::StorageFull => return Ok(()),
                file => file?,
            };
            if !self.fill(&*file, 0)? {
                return remove_if_there(&*self.disk, part);
            }
            self.disk.rename(part, &name)?;
            self.crash.pass(CrashPoint::ReserveNamed)?;
            self.disk.sync_dir()?;
            self.state.lock().reserve.insert(name);
        }
        Ok(())
    }

    /// Writes and syncs a file from `position` up to the length of a reserve file. False when there is no room for it.
    fn fill(&self, file: &dyn DiskFile, mut position: u64) -> io::Result<bool> {
        let zeroes = vec![0u8; 256 << 10];
        let end = self.file_bytes + RESERVE_SLACK_BYTES;
        let mut write = || {
            while position < end {
                let length =
                    zeroes.len().min(usize::try_from(end - position).unwrap_or(usize::MAX));
                file.write_all_at(&zeroes[..length], position)?;
                position += length as u64;
            }
            self.crash.pass(CrashPoint::ReserveWritten)?;
            file.sync()
        };
        match write() {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::StorageFull => Ok(false),
            Err(error) => Err(error),
        }
    }
}

fn reserve_name(slot: usize) -> String {
    format!("reserve-{slot}")
}
