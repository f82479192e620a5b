//! The files of the embedded store: a lock, and one redb database. Blocking.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions, TryLockError},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use redb::{
    Builder, Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, StorageError,
    TableDefinition, TableError,
};

use super::record::{decode_applied, decode_value, encode_applied, encode_value};
use crate::{
    Key, KeyValue, Revision,
    data::{Applied, FIRST_REVISION},
};

const LOCK: &str = "lock";
const DATABASE: &str = "metadata.redb";
const UNFINISHED: &str = "metadata.redb.new";
const FORMAT: i64 = 1;
/// The store is little, and in memory anyway: redb's cache need not hold it twice.
const CACHE_BYTES: usize = 8 << 20;

const META: TableDefinition<&str, i64> = TableDefinition::new("geminga.metadata");
const KEYS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("keys");
const HISTORY: TableDefinition<i64, &[u8]> = TableDefinition::new("history");

/// Why the embedded store did not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory is in use. Stop the other process, or choose another directory.
    #[error("{} is locked: another process uses this metadata directory", .directory.display())]
    AlreadyLocked {
        /// The directory asked for.
        directory: PathBuf,
    },
    /// The operating system refused: permissions, a full disk, a failing disk.
    #[error("{} cannot be used", .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// Not a file of ours, or of another format. Nothing was changed in it.
    #[error("{} is not a metadata store of this version: {reason}", .path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// A file of ours whose bytes changed at rest. Restore it from a backup.
    #[error("{} is damaged: {reason}", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
}

/// The open files. Dropping it gives the lock back.
pub(super) struct EmbeddedDisk {
    database: Database,
    _lock: File,
}

/// What the files held.
pub(super) struct Loaded {
    pub(super) revision: Revision,
    /// How often the store was opened before.
    pub(super) opens: i64,
    pub(super) keys: BTreeMap<Key, KeyValue>,
    pub(super) history: Vec<Applied>,
}

impl EmbeddedDisk {
    pub(super) fn open(directory: &Path) -> Result<(Self, Loaded), OpenError> {
        let io_error = |path: &Path, source| OpenError::Io { path: path.to_owned(), source };
        fs::create_dir_all(directory).map_err(|source| io_error(directory, source))?;
        let lock = lock(directory)?;
        let path = directory.join(DATABASE);
        if !path.try_exists().map_err(|source| io_error(&path, source))? {
            create(directory, &path)?;
        }
        // redb may panic on bytes that it never wrote: that, too, is a damaged file and no bug of ours.
        let opened = catch_unwind(AssertUnwindSafe(|| {
            let database = builder()
                .set_check_integrity_on_open(true)
                .open(&path)
                .map_err(|error| open_error(directory, &path, error))?;
            let loaded = load(&database).map_err(|error| load_error(&path, error))?;
            Ok((database, loaded))
        }));
        let damaged = || OpenError::Damaged {
            path: path.clone(),
            reason: "it does not hang together".to_owned(),
        };
        let (database, loaded) = opened.unwrap_or_else(|_panic| Err(damaged()))?;
        Ok((Self { database, _lock: lock }, loaded))
    }

    /// Makes revisions durable, and forgets history up to `compacted`. After an error nothing may be committed any more:
    /// what is on disk is unknown until the next open.
    pub(super) fn commit(
        &self,
        applied: &[Arc<Applied>],
        compacted: Revision,
        opens: Option<i64>,
    ) -> Result<(), redb::Error> {
        let mut txn = self.database.begin_write()?;
        txn.set_durability(Durability::Immediate)?;
        {
            let mut meta = txn.open_table(META)?;
            if let Some(last) = applied.last() {
                meta.insert("revision", last.revision.0)?;
            }
            if let Some(opens) = opens {
                meta.insert("opens", opens)?;
            }
            let mut keys = txn.open_table(KEYS)?;
            let mut history = txn.open_table(HISTORY)?;
            for applied in applied {
                for event in &applied.events {
                    match &event.after {
                        Some(found) => {
                            drop(keys.insert(&event.key.0[..], &encode_value(found)[..])?);
                        }
                        None => drop(keys.remove(&event.key.0[..])?),
                    }
                }
                history.insert(applied.revision.0, &encode_applied(applied)[..])?;
            }
            while history.first()?.is_some_and(|(oldest, _)| oldest.value() <= compacted.0) {
                history.pop_first()?;
            }
        }
        txn.commit()?;
        Ok(())
    }
}

fn builder() -> Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES);
    builder
}

fn lock(directory: &Path) -> Result<File, OpenError> {
    let path = directory.join(LOCK);
    let error = |source| OpenError::Io { path: path.clone(), source };
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false).open(&path);
    let file = file.map_err(error)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            Err(OpenError::AlreadyLocked { directory: directory.to_owned() })
        }
        Err(TryLockError::Error(source)) => Err(error(source)),
    }
}

/// Under another name first, so that a crash on the way leaves nothing that looks like a damaged store.
fn create(directory: &Path, path: &Path) -> Result<(), OpenError> {
    let unfinished = directory.join(UNFINISHED);
    let io_error = |source| OpenError::Io { path: unfinished.clone(), source };
    match fs::remove_file(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error(error)),
        _ => {}
    }
    let database =
        builder().create(&unfinished).map_err(|error| open_error(directory, &unfinished, error))?;
    let fill = || -> Result<(), redb::Error> {
        let txn = database.begin_write()?;
        {
            let mut meta = txn.open_table(META)?;
            meta.insert("format", FORMAT)?;
            meta.insert("revision", FIRST_REVISION.0)?;
            meta.insert("opens", 0)?;
            txn.open_table(KEYS)?;
            txn.open_table(HISTORY)?;
        }
        txn.commit()?;
        Ok(())
    };
    fill().map_err(|error| storage_error(&unfinished, error))?;
    drop(database);
    let sync = |path: &Path| File::open(path)?.sync_all();
    sync(&unfinished)
        .and_then(|()| fs::rename(&unfinished, path))
        .and_then(|()| sync(directory))
        .map_err(io_error)
}

/// What is wrong with the content of a readable database.
enum LoadError {
    Foreign(String),
    Damaged(String),
    Storage(redb::Error),
}

impl<E: Into<redb::Error>> From<E> for LoadError {
    fn from(error: E) -> Self {
        Self::Storage(error.into())
    }
}

fn load(database: &Database) -> Result<Loaded, LoadError> {
    let txn = database.begin_read()?;
    let meta = match txn.open_table(META) {
        Err(TableError::TableDoesNotExist(_) | TableError::TableTypeMismatch { .. }) => {
            return Err(LoadError::Foreign("it lacks our tables".to_owned()));
        }
        other => other?,
    };
    let number = |name: &str| -> Result<i64, LoadError> {
        let found = meta.get(name)?;
        found
            .map(|found| found.value())
            .ok_or_else(|| LoadError::Damaged(format!("it lacks the number {name:?}")))
    };
    let format = number("format")?;
    if format != FORMAT {
        return Err(LoadError::Foreign(format!("format {format}, this version reads {FORMAT}")));
    }
    let mut keys = BTreeMap::new();
    for item in txn.open_table(KEYS)?.iter()? {
        let (key, record) = item?;
        let key = Key(Bytes::copy_from_slice(key.value()));
        let found = decode_value(key.clone(), record.value())
            .ok_or_else(|| LoadError::Damaged(format!("key {key} has no valid value")))?;
        keys.insert(key, found);
    }
    let mut history = Vec::new();
    for item in txn.open_table(HISTORY)?.iter()? {
        let (revision, record) = item?;
        let revision = Revision(revision.value());
        let applied = decode_applied(revision, record.value()).ok_or_else(|| {
            LoadError::Damaged(format!("revision {} has no valid history", revision.0))
        })?;
        history.push(applied);
    }
    let (revision, opens) = (Revision(number("revision")?), number("opens")?);
    Ok(Loaded { revision, opens, keys, history })
}

fn load_error(path: &Path, error: LoadError) -> OpenError {
    let path = path.to_owned();
    match error {
        LoadError::Foreign(reason) => OpenError::Foreign { path, reason },
        LoadError::Damaged(reason) => OpenError::Damaged { path, reason },
        LoadError::Storage(error) => storage_error(&path, error),
    }
}

pub(super) fn storage_error(path: &Path, error: redb::Error) -> OpenError {
    let path = path.to_owned();
    match error {
        redb::Error::Io(source) => OpenError::Io { path, source },
        other => OpenError::Damaged { path, reason: other.to_string() },
    }
}

fn open_error(directory: &Path, path: &Path, error: DatabaseError) -> OpenError {
    match error {
        DatabaseError::DatabaseAlreadyOpen => {
            OpenError::AlreadyLocked { directory: directory.to_owned() }
        }
        DatabaseError::Storage(StorageError::Io(error)) => match error.kind() {
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => {
                OpenError::Foreign { path: path.to_owned(), reason: error.to_string() }
            }
            _ => OpenError::Io { path: path.to_owned(), source: error },
        },
        DatabaseError::UpgradeRequired(version) => OpenError::Foreign {
            path: path.to_owned(),
            reason: format!("its database file has format {version}"),
        },
        other => OpenError::Damaged { path: path.to_owned(), reason: other.to_string() },
    }
}
