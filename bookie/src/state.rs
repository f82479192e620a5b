//! What the parts of one bookie share: one core behind one lock, never held across an await or a disk call.
//!
//! The lock is what makes D2's single step: an add is checked against the fence, becomes visible as pending, and gets its
//! place in the journal's order while it is held. The journal's owner task takes groups out and puts verdicts back in.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use geminga_bookie_client::bookie_rpc::Unknown;
use geminga_metadata::SharedStore;
use geminga_runtime::{
    disk::{DiskLock, SharedDisk},
    io::Io,
    tasks::Tasks,
};
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::{Notify, Semaphore, oneshot, watch},
    time::Instant,
};

use crate::{
    config::BookieConfig,
    cookie::Identity,
    crash_points::CrashPoints,
    fencing::{Ledgers, Room},
    gc,
    journal::{
        files::Files,
        queue::{Item, Queue},
    },
    ledger_storage::{
        checkpoint::{FileInfo, Mark},
        index::IndexFile,
        write_cache::WriteCache,
    },
    metrics::BookieMetrics,
};

/// The index files, newest first. Replaced whole.
pub(crate) type Indexes = Arc<Vec<Arc<IndexFile>>>;

/// A kept checkpoint.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    pub(crate) sequence: u64,
    pub(crate) mark: u64,
    pub(crate) indexes: Vec<u64>,
}

/// Everything that changes.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) ledgers: Ledgers,
    pub(crate) cache: WriteCache,
    pub(crate) queue: Queue,
    pub(crate) next_ticket: u64,
    pub(crate) room: Room,
    /// The journal ran out of space since the disk was last measured.
    pub(crate) ran_full: bool,
    pub(crate) files: BTreeMap<u64, FileInfo>,
    pub(crate) indexes: Indexes,
    /// The newest synced group.
    pub(crate) last: Mark,
    /// The newest kept checkpoint, and the older one.
    pub(crate) kept: (Kept, Option<Kept>),
    /// The highest sequence that a checkpoint file ever had here, readable or not.
    pub(crate) sequence_max: u64,
    /// No new request is taken.
    pub(crate) closed: bool,
    /// Nothing is answered any more.
    pub(crate) ended: bool,
    /// Free and total bytes of the file system, as last measured.
    pub(crate) space: (u64, u64),
}

/// What a bookie is made of: it stays as it was at the start.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) config: BookieConfig,
    pub(crate) disk: SharedDisk,
    pub(crate) files: Files,
    pub(crate) crash: CrashPoints,
    pub(crate) journal_io: Io,
    pub(crate) read_io: Io,
    pub(crate) store: SharedStore,
    pub(crate) metrics: BookieMetrics,
    pub(crate) tasks: Tasks,
    pub(crate) identity: Identity,
}

/// One bookie's shared parts; those that never change are reached as its own fields.
#[derive(Debug)]
pub(crate) struct Shared {
    parts: Parts,
    /// Wakes the journal's owner.
    pub(crate) journal_wake: Notify,
    /// Wakes the checkpointer.
    pub(crate) checkpoint_wake: Notify,
    /// Wakes the registration: what it says has changed.
    pub(crate) status_wake: Notify,
    /// Requests that wait for a look-up on disk or in the store (D12).
    pub(crate) lookups: Arc<Semaphore>,
    /// Held during a checkpoint.
    pub(crate) checkpointing: tokio::sync::Mutex<()>,
    /// What GC saw in earlier passes; one pass at a time.
    pub(crate) gc: tokio::sync::Mutex<gc::Memory>,
    pub(crate) failure: watch::Sender<Option<String>>,
    /// The end was no failure: the bookie was decommissioned (DC1).
    decommissioned: AtomicBool,
    core: Mutex<Core>,
    lock: Mutex<Option<Arc<LockGuard>>>,
}

/// Keeps the directory locked while a job may still write to it.
pub(crate) struct LockGuard(
    #[expect(dead_code, reason = "held until dropped")] pub(crate) DiskLock,
);

impl std::fmt::Debug for LockGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LockGuard")
    }
}

impl std::ops::Deref for Shared {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.parts
    }
}

impl Shared {
    pub(crate) fn new(parts: Parts, lock: Arc<LockGuard>, core: Core) -> Arc<Self> {
        Arc::new(Self {
            journal_wake: Notify::new(),
            checkpoint_wake: Notify::new(),
            status_wake: Notify::new(),
            lookups: Arc::new(Semaphore::new(parts.config.lookups_max)),
            checkpointing: tokio::sync::Mutex::new(()),
            gc: tokio::sync::Mutex::default(),
            failure: watch::Sender::new(None),
            decommissioned: AtomicBool::new(false),
            core: Mutex::new(core),
            lock: Mutex::new(Some(lock)),
            parts,
        })
    }

    /// The core, for a short synchronous step.
    pub(crate) fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock()
    }

    /// Runs blocking work; refuses once the bookie has ended, so that nothing is written after a kill. The directory stays
    /// locked as long as the work runs.
    pub(crate) async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        io: &Io,
        work: impl FnOnce(&Self) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let shared = Arc::clone(self);
        io.run(move || {
            let Some(_guard) = shared.lock.lock().clone() else {
                return Err(io::Error::other("the bookie has ended"));
            };
            work(&shared)
        })
        .await
    }

    /// Ends the bookie where it stands (D3): nothing more is written or answered. Only the first end counts: what breaks
    /// since the bookie was killed is no failure of it.
    pub(crate) fn end(&self, cause: Option<&str>) {
        {
            let mut core = self.core();
            if std::mem::replace(&mut core.ended, true) {
                return;
            }
            core.closed = true;
            core.queue.clear();
        }
        *self.lock.lock() = None;
        if let Some(cause) = cause {
            if self.is_decommissioned() {
                tracing::info!(bookie_id = self.config.id, "bookie is decommissioned");
            } else {
                tracing::error!(bookie_id = self.config.id, cause, "bookie ends");
            }
            self.failure.send_replace(Some(cause.to_owned()));
        }
        self.tasks.abort();
    }

    /// Ends the bookie since its cookie is gone with a proof that no ledger names it (DC1).
    pub(crate) fn end_decommissioned(&self) {
        self.decommissioned.store(true, Ordering::Release);
        self.end(Some("the bookie was decommissioned: no ledger names it any more"));
    }

    /// Whether the bookie ended because it was decommissioned.
    pub(crate) fn is_decommissioned(&self) -> bool {
        self.decommissioned.load(Ordering::Acquire)
    }

    /// Queues an item for the journal and wakes its owner.
    pub(crate) fn push(&self, core: &mut Core, item: Item) {
        core.queue.push(item);
        self.journal_wake.notify_one();
    }

    /// Waits until everything accepted so far is synced; busy when the queue is full (D12).
    pub(crate) async fn barrier(&self, deadline: Instant) -> Result<(), Unknown> {
        let synced = {
            let mut core = self.core();
            if core.closed {
                return Err(Unknown::Disconnected);
            }
            if !core.queue.has_room(0) {
                self.metrics.busy.inc();
                return Err(Unknown::Busy);
            }
            let (answer, synced) = oneshot::channel();
            self.push(&mut core, Item::Barrier { answer });
            synced
        };
        until(deadline, synced).await
    }
}

/// Awaits an answer of the journal's owner, until the deadline.
pub(crate) async fn until(
    deadline: Instant,
    synced: oneshot::Receiver<Result<(), Unknown>>,
) -> Result<(), Unknown> {
    match tokio::time::timeout_at(deadline, synced).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) => Err(Unknown::Disconnected),
        Err(_) => Err(Unknown::Timeout),
    }
}

/// How long an internal request may wait for the journal.
pub(crate) const INTERNAL_PATIENCE: Duration = Duration::from_secs(30);
