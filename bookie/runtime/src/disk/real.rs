//! A directory of the operating system.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::fs::{Advice, FlockOperation, OFlags, fadvise, flock, fstatvfs};

use super::{Disk, DiskFile, DiskLock, OpenMode, Space, check_name};

/// One directory, held open. Files are readable by this user only, and symbolic links are not followed (security.md).
#[derive(Debug)]
pub struct RealDisk {
    path: PathBuf,
    directory: File,
}

impl RealDisk {
    /// Opens the directory; creates it, and those above it, when missing.
    ///
    /// # Errors
    /// Any I/O error, for example when the path is a file or not permitted.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        let path = path.canonicalize()?;
        let directory = File::open(&path)?;
        // A directory that was just created must itself survive a power cut (D1).
        if let Some(above) = path.parent() {
            File::open(above)?.sync_all()?;
        }
        Ok(Self { path, directory })
    }

    fn options() -> OpenOptions {
        let mut options = OpenOptions::new();
        options.read(true).mode(0o600).custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
        options
    }

    fn file(&self, name: &str) -> io::Result<PathBuf> {
        check_name(name)?;
        Ok(self.path.join(name))
    }
}

impl Disk for RealDisk {
    fn open(&self, name: &str, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let mut options = Self::options();
        match mode {
            OpenMode::CreateNew => options.write(true).create_new(true),
            OpenMode::ReadWrite => options.write(true),
            OpenMode::Read => &mut options,
        };
        Ok(Arc::new(RealFile(options.open(self.file(name)?)?)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.file(from)?, self.file(to)?)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.file(name)?)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            // Other kinds, and names that are not text, are none of ours.
            if entry.file_type()?.is_file()
                && let Ok(name) = entry.file_name().into_string()
            {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.directory.sync_all()
    }

    fn space(&self) -> io::Result<Space> {
        let found = fstatvfs(&self.directory)?;
        Ok(space_of(found.f_blocks, found.f_bfree, found.f_bavail, found.f_frsize))
    }

    fn lock(&self, name: &str) -> io::Result<DiskLock> {
        let file =
            Self::options().write(true).create(true).truncate(false).open(self.file(name)?)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Box::new(file))
    }
}

#[derive(Debug)]
struct RealFile(File);

impl DiskFile for RealFile {
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.0.read_at(&mut buffer[filled..], position + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }

    fn write_all_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, position)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn evict(&self) -> io::Result<()> {
        // The kernel drops only clean pages, and a killed process may have left dirty ones.
        self.0.sync_data()?;
        Ok(fadvise(&self.0, 0, None, Advice::DontNeed)?)
    }
}

/// What this process shares in: blocks in use, and those it may still take. Blocks that are free but kept for others are
/// in neither: counted as used, they would make a disk with room look full.
fn space_of(blocks: u64, free: u64, available: u64, block_bytes: u64) -> Space {
    let usable = blocks.saturating_sub(free).saturating_add(available);
    Space { total: usable.saturating_mul(block_bytes), free: available.saturating_mul(block_bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_kept_for_others_count_neither_as_used_nor_as_free() {
        let space = space_of(1_000, 700, 100, 4096);
        assert_eq!(space, Space { total: 400 * 4096, free: 100 * 4096 });
    }

    #[test]
    fn it_passes_the_exam_in_a_directory_it_creates() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("new/data");
        super::super::conformance::exam(
            &(Arc::new(RealDisk::open(path).unwrap()) as Arc<dyn Disk>),
        );
    }

    #[test]
    fn a_second_opening_sees_the_files_and_is_refused_the_lock() {
        let temporary = tempfile::tempdir().unwrap();
        let first = RealDisk::open(temporary.path()).unwrap();
        let second = RealDisk::open(temporary.path()).unwrap();
        let lock = first.lock("LOCK").unwrap();
        assert_eq!(second.lock("LOCK").map(drop).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(lock);
        drop(second.lock("LOCK").unwrap());
        first.open("a", OpenMode::CreateNew).unwrap().write_all_at(b"abc", 0).unwrap();
        assert_eq!(second.open("a", OpenMode::Read).unwrap().len().unwrap(), 3);
    }

    #[test]
    fn links_are_not_followed_and_directories_not_listed() {
        let temporary = tempfile::tempdir().unwrap();
        let disk = RealDisk::open(temporary.path()).unwrap();
        fs::write(temporary.path().join("target"), b"secret").unwrap();
        std::os::unix::fs::symlink("target", temporary.path().join("link")).unwrap();
        fs::create_dir(temporary.path().join("directory")).unwrap();
        assert!(disk.open("link", OpenMode::ReadWrite).is_err());
        assert!(disk.lock("link").is_err());
        assert_eq!(disk.list().unwrap(), ["target"]);
    }

    #[test]
    fn a_file_in_the_place_of_the_directory_is_an_error() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("file");
        fs::write(&path, b"").unwrap();
        assert!(RealDisk::open(&path).is_err());
    }
}
