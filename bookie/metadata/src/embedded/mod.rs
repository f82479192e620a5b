//! The embedded form: the metadata of one process, on disk.
//!
//! ```text
//! callers --commands--> owner task: State (ahead of the disk)
//!                          | a group of transactions = one redb commit, synced
//!                          v
//!                       visible: Data (what is durable) ---> readers, watches; then the callers get their answers
//! ```
//! Nobody sees a revision that a crash could take back. A failed commit ends the store.

mod disk;
mod owner;
mod record;
#[cfg(test)]
mod tests;

use std::{fmt, path::Path, sync::Arc, time::Duration};

use async_trait::async_trait;
use geminga_runtime::{io::Io, tasks::Tasks};
use parking_lot::RwLock;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};

pub use self::disk::OpenError;
use self::{
    disk::{EmbeddedDisk, Loaded},
    owner::Worker,
};
use crate::{
    Change, HistoryLimits, Key, KeyValue, LeaseId, MetadataStore, Page, RangeRequest, Revision,
    StoreError, Txn, TxnOutcome, Watch, WatchError,
    data::Data,
    state::{State, check_limits, check_many},
};

/// Commands that wait for the owner; a caller past that waits.
const QUEUED_MAX: usize = 256;
/// The store of one process, in one directory. Clones share it; it ends when all clones are gone, or with its tasks' owner.
#[derive(Clone)]
pub struct EmbeddedStore {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
}

struct Shared {
    visible: RwLock<Data>,
    /// The state of the owner; changes also wake the watches.
    owner: watch::Sender<Owner>,
    #[cfg(test)]
    disk_fails: std::sync::atomic::AtomicBool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Serving,
    Ended,
}

type Answer<T> = oneshot::Sender<Result<T, StoreError>>;

enum Command {
    Txn(Txn, Answer<TxnOutcome>),
    Grant(Duration, Answer<LeaseId>),
    KeepAlive(LeaseId, Answer<()>),
    Revoke(LeaseId, Answer<()>),
    Expire(LeaseId, Answer<()>),
    Compact(Revision, Answer<()>),
    Close(Answer<()>),
}

impl fmt::Debug for EmbeddedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedStore").finish_non_exhaustive()
    }
}

impl EmbeddedStore {
    /// Opens the store in this directory, and makes both if they are missing. Takes an exclusive lock, checks the whole
    /// file, and ends all leases with their keys in one revision, since their holders are dead. Blocking work runs on `io`.
    ///
    /// # Errors
    /// [`OpenError`]; the files are as they were.
    pub async fn open(directory: &Path, io: Io, tasks: &Tasks) -> Result<Self, OpenError> {
        Self::open_with_limits(directory, io, tasks, HistoryLimits::default()).await
    }

    /// As [`Self::open`], with so much history kept.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn open_with_limits(
        directory: &Path,
        io: Io,
        tasks: &Tasks,
        limits: HistoryLimits,
    ) -> Result<Self, OpenError> {
        let directory = directory.to_owned();
        let (disk, data, first_lease) = io.run(move || open(&directory, limits)).await?;
        // The owner's own copy serves no watch.
        let mut ahead = data.clone();
        ahead.compact(ahead.revision());
        let state = State::new(ahead, first_lease).recording();
        let owner = watch::Sender::new(Owner::Serving);
        let shared = Arc::new(Shared {
            visible: RwLock::new(data),
            owner,
            #[cfg(test)]
            disk_fails: false.into(),
        });
        let (commands, queue) = mpsc::channel(QUEUED_MAX);
        let worker = Worker {
            shared: Arc::clone(&shared),
            disk: Arc::new(disk),
            io,
            state,
            start: Instant::now(),
        };
        tasks.spawn("embedded metadata store", worker.run(queue, tasks.token()));
        Ok(Self { shared, commands })
    }

    /// The revision now.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.shared.visible.read().revision()
    }

    /// Forgets history up to this revision (inclusive), as etcd's compaction does.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`], `Unknown`.
    pub async fn compact(&self, revision: Revision) -> Result<(), StoreError> {
        self.ask(|answer| Command::Compact(revision, answer)).await
    }

    /// Ends a lease now, as if its time had run out.
    ///
    /// # Errors
    /// As [`MetadataStore::revoke_lease`].
    pub async fn expire_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.ask(|answer| Command::Expire(lease, answer)).await
    }

    /// Settles what was accepted and gives the directory back; every handle is unavailable after it. Cancel-safe.
    pub async fn close(&self) {
        // An owner that is gone already has nothing left to settle.
        let _closed = self.ask(Command::Close).await;
    }

    async fn ask<T>(&self, command: impl FnOnce(Answer<T>) -> Command) -> Result<T, StoreError> {
        let (sender, answer) = oneshot::channel();
        if self.commands.send(command(sender)).await.is_err() {
            return Err(ended());
        }
        let unknown = || StoreError::Unknown("the embedded store ended meanwhile".to_owned());
        answer.await.unwrap_or_else(|_dropped| Err(unknown()))
    }
}

impl Shared {
    fn read<T>(&self, read: impl FnOnce(&Data) -> T) -> Result<T, StoreError> {
        if *self.owner.borrow() == Owner::Ended {
            return Err(ended());
        }
        Ok(read(&self.visible.read()))
    }
}

fn ended() -> StoreError {
    StoreError::Unavailable("the embedded store has ended".to_owned())
}

fn open(directory: &Path, limits: HistoryLimits) -> Result<(EmbeddedDisk, Data, i64), OpenError> {
    let (disk, Loaded { revision, opens, keys, history }) = EmbeddedDisk::open(directory)?;
    let damaged = |reason: String| OpenError::Damaged { path: directory.to_owned(), reason };
    let data = Data::resume(limits, revision, keys, history)
        .ok_or_else(|| damaged("its revisions do not fit together".to_owned()))?;
    // Lease ids of earlier lives never come back.
    let opens = opens.wrapping_add(1) & i64::from(i32::MAX);
    let mut state = State::new(data, 1).recording();
    state.drop_leases();
    let fresh = state.take_fresh();
    let data = state.data().clone();
    disk.commit(&fresh, data.compacted(), Some(opens))
        .map_err(|error| disk::storage_error(directory, error))?;
    Ok((disk, data, (opens << 32) + 1))
}

#[async_trait]
impl MetadataStore for EmbeddedStore {
    async fn get(&self, key: &Key) -> Result<(Revision, Option<KeyValue>), StoreError> {
        self.shared.read(|data| (data.revision(), data.get(key).cloned()))
    }

    async fn get_many(
        &self,
        keys: &[Key],
    ) -> Result<(Revision, Vec<Option<KeyValue>>), StoreError> {
        check_many(keys)?;
        self.shared
            .read(|data| (data.revision(), keys.iter().map(|key| data.get(key).cloned()).collect()))
    }

    async fn range(&self, request: RangeRequest) -> Result<Page, StoreError> {
        self.shared.read(|data| data.range(&request))?
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        check_limits(&txn)?;
        self.ask(|answer| Command::Txn(txn, answer)).await
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.ask(|answer| Command::Grant(ttl, answer)).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.ask(|answer| Command::KeepAlive(lease, answer)).await
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.ask(|answer| Command::Revoke(lease, answer)).await
    }

    async fn watch(&self, prefix: &Key, from: Revision) -> Result<Box<dyn Watch>, StoreError> {
        let changed = self.shared.owner.subscribe();
        let compacted = self.shared.read(Data::compacted)?;
        let next = from.max(Revision(2)); // nothing happened before the first change
        if next <= compacted {
            return Err(StoreError::Compacted(compacted));
        }
        let shared = Arc::clone(&self.shared);
        Ok(Box::new(EmbeddedWatch { shared, changed, prefix: prefix.clone(), next }))
    }
}

struct EmbeddedWatch {
    shared: Arc<Shared>,
    changed: watch::Receiver<Owner>,
    prefix: Key,
    next: Revision,
}

#[async_trait]
impl Watch for EmbeddedWatch {
    async fn next(&mut self) -> Result<Vec<Change>, WatchError> {
        loop {
            let owner = *self.changed.borrow_and_update();
            let (changes, next) = self.shared.visible.read().changes(&self.prefix, self.next)?;
            self.next = next;
            if !changes.is_empty() {
                return Ok(changes);
            }
            if owner == Owner::Ended {
                return Err(WatchError::Lost);
            }
            self.changed.changed().await.map_err(|_| WatchError::Lost)?;
        }
    }
}
