//! The disk seam: one flat directory of files. Calls block; run them through [`crate::io::Io`].
//!
//! The contract is what a careful program may assume of a disk, and no more:
//! - bytes written are lost by a power cut unless `sync` returned after the write; any 512-byte sector of an unsynced
//!   write may be on the disk or not;
//! - a file created, renamed or removed is lost, un-renamed or back after a power cut unless `sync_dir` returned (D1);
//! - after a failed `write_all_at` or `sync` nothing is known about the file: the caller ends (D3);
//! - a read may return other bytes than were written: the caller has checksums.

pub mod conformance;
mod faulty;
mod memory;
mod real;

use std::{fmt, io, sync::Arc};

pub use faulty::{Fault, Faults, FaultyDisk};
pub use memory::{MemoryDisk, MemoryFile};
pub use real::RealDisk;

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// Must not exist.
    CreateNew,
    /// Must exist; reads and writes.
    ReadWrite,
    /// Must exist; reads only.
    Read,
}

/// Room on the file system of a directory, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// What is in use and what is free for this process, together.
    pub total: u64,
    /// What this process may still write.
    pub free: u64,
}

/// One directory. File names are plain names without separators, chosen by the program, never by a user.
pub trait Disk: Send + Sync + fmt::Debug + 'static {
    /// Opens a file.
    ///
    /// # Errors
    /// `AlreadyExists`, `NotFound`, `StorageFull`, or any I/O error.
    fn open(&self, name: &str, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>>;
    /// Atomically renames; an existing `to` is replaced.
    ///
    /// # Errors
    /// Any I/O error; then either name may exist.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file; open handles stay usable.
    ///
    /// # Errors
    /// `NotFound`, or any I/O error.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Names of all files, sorted; those of locks ever taken are among them.
    ///
    /// # Errors
    /// Any I/O error.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Makes creations, renames and removals durable.
    ///
    /// # Errors
    /// Any I/O error; treat as D3.
    fn sync_dir(&self) -> io::Result<()>;
    /// Room on the file system.
    ///
    /// # Errors
    /// Any I/O error.
    fn space(&self) -> io::Result<Space>;
    /// Takes the exclusive lock file `name`, held until the guard is dropped or the process ends.
    ///
    /// # Errors
    /// `WouldBlock` when another holder lives.
    fn lock(&self, name: &str) -> io::Result<DiskLock>;
}

/// Keeps a lock until dropped.
pub type DiskLock = Box<dyn Send + Sync>;

/// An open file. Positions and lengths in bytes.
#[expect(
    clippy::len_without_is_empty,
    reason = "a length that may fail is no length of a collection"
)]
pub trait DiskFile: Send + Sync + fmt::Debug + 'static {
    /// Reads up to `buffer.len()` bytes; fewer only at the end of the file.
    ///
    /// # Errors
    /// Any I/O error; the bytes are then unknown, not absent (D9).
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize>;
    /// Writes all bytes, extending the file as needed.
    ///
    /// # Errors
    /// `StorageFull` (nothing is known of the range), or any I/O error.
    fn write_all_at(&self, bytes: &[u8], position: u64) -> io::Result<()>;
    /// Makes all earlier writes of this file durable, with what is needed to read them back (fdatasync).
    ///
    /// # Errors
    /// Any I/O error; treat as D3.
    fn sync(&self) -> io::Result<()>;
    /// Length now.
    ///
    /// # Errors
    /// Any I/O error.
    fn len(&self) -> io::Result<u64>;
    /// Drops cached pages, so that the next read comes from the device (D3).
    ///
    /// # Errors
    /// Any I/O error.
    fn evict(&self) -> io::Result<()>;
}

/// Shared handle to a directory.
pub type SharedDisk = Arc<dyn Disk>;

/// Refuses what is not a plain file name.
fn check_name(name: &str) -> io::Result<()> {
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a plain file name"));
    }
    Ok(())
}
