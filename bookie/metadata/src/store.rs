//! The trait, its values and its errors.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;

/// A key. Built only by [`crate::keys`], so that no user text can escape its prefix (security S3).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub Bytes);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

/// The store's revision: grows by one with every transaction that changes something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub i64);

/// A lease. Never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub i64);

/// A key as it stood at some revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    pub key: Key,
    pub value: Bytes,
    /// The revision that made the key, since it was last absent.
    pub create_revision: Revision,
    /// The revision of its last change.
    pub mod_revision: Revision,
    /// The lease it lives under.
    pub lease: Option<LeaseId>,
}

/// A condition of a transaction (MD1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The key does not exist.
    Absent(Key),
    /// The key exists, whatever its value.
    Present(Key),
    /// The key's last change was at this revision.
    ModRevision(Key, Revision),
    /// The key was created at this revision.
    CreateRevision(Key, Revision),
}

impl Compare {
    /// The key it is about.
    #[must_use]
    pub fn key(&self) -> &Key {
        match self {
            Self::Absent(key)
            | Self::Present(key)
            | Self::ModRevision(key, _)
            | Self::CreateRevision(key, _) => key,
        }
    }
}

/// A change in a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Creates or replaces.
    Put { key: Key, value: Bytes, lease: Option<LeaseId> },
    /// Removes; nothing happens to an absent key.
    Delete(Key),
}

impl Op {
    /// A put without a lease.
    #[must_use]
    pub fn put(key: Key, value: impl Into<Bytes>) -> Self {
        Self::Put { key, value: value.into(), lease: None }
    }

    /// The key it changes.
    #[must_use]
    pub fn key(&self) -> &Key {
        match self {
            Self::Put { key, .. } | Self::Delete(key) => key,
        }
    }
}

/// All conditions hold: all changes happen, at one revision. Else none does. A key is changed at most once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    pub compares: Vec<Compare>,
    pub changes: Vec<Op>,
}

impl Txn {
    /// An empty transaction.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition.
    #[must_use]
    pub fn when(mut self, compare: Compare) -> Self {
        self.compares.push(compare);
        self
    }

    /// Adds a change.
    #[must_use]
    pub fn then(mut self, op: Op) -> Self {
        self.changes.push(op);
        self
    }

    /// Adds all of another transaction's conditions and changes.
    #[must_use]
    pub fn and(mut self, other: Txn) -> Self {
        self.compares.extend(other.compares);
        self.changes.extend(other.changes);
        self
    }
}

/// The most conditions, and the most changes, of one transaction (etcd's default).
pub const TXN_OPS_MAX: usize = 128;
/// The most bytes of keys and values in one transaction (below etcd's 1.5 MiB).
pub const TXN_BYTES_MAX: usize = 1_400_000;

/// What a transaction came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TxnOutcome {
    /// All conditions held; the changes stand at this revision.
    Done(Revision),
    /// A condition failed; nothing changed. Every compared key as it stood, in the order of the conditions.
    Conflict { revision: Revision, found: Vec<Option<KeyValue>> },
}

/// One page of keys below a prefix, in key order, all at `revision`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    pub revision: Revision,
    pub items: Vec<KeyValue>,
    /// More keys follow the last one.
    pub more: bool,
}

/// Which keys a range read returns.
#[derive(Clone, Debug)]
pub struct RangeRequest {
    /// Keys that start with this.
    pub prefix: Key,
    /// Only keys after this one.
    pub after: Option<Key>,
    /// At most so many; 0 means 1,000.
    pub limit: usize,
    /// At this revision (for a scan of several pages at one revision); none means now, linearizable.
    pub at: Option<Revision>,
}

/// Something changed below a watched prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Put(KeyValue),
    Deleted { key: Key, revision: Revision },
}

/// A watch: batches of changes, each batch one or more whole revisions, in order, none left out.
#[async_trait]
pub trait Watch: Send {
    /// The next batch; waits for it. Cancel-safe.
    ///
    /// # Errors
    /// [`WatchError::Compacted`]: read the range again, watch from its revision + 1. [`WatchError::Lost`]: watch again
    /// from the last revision seen + 1.
    async fn next(&mut self) -> Result<Vec<Change>, WatchError>;
}

/// Why a watch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WatchError {
    /// History before this revision is gone.
    #[error("the store has compacted its history up to revision {}", .0.0)]
    Compacted(Revision),
    /// The connection or the store went away.
    #[error("the watch was cut off")]
    Lost,
}

/// Why a request was not answered with a result.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// Nothing happened: safe to retry after a pause.
    #[error("the metadata store is not available: {0}")]
    Unavailable(String),
    /// It may have happened, or may still (MD3): repeat the same transaction until it is done or conflicts.
    #[error("the metadata store did not answer; the request may have been carried out: {0}")]
    Unknown(String),
    /// Nothing happened, and the same request will be refused again.
    #[error("the metadata store refused the request: {0}")]
    Refused(String),
    /// The lease is not known (any more): it expired or was revoked.
    #[error("the lease {} is gone", .0.0)]
    LeaseGone(LeaseId),
    /// History at the asked revision is gone.
    #[error("the store has compacted its history up to revision {}", .0.0)]
    Compacted(Revision),
}

/// A linearizable key-value store with etcd's semantics. All calls may be made from any task.
///
/// MD1: every change is a transaction on the revisions read. MD2: `get` and `range` without `at` are linearizable.
/// MD3: [`StoreError::Unknown`] settles nothing; see [`crate::commit`].
#[async_trait]
pub trait MetadataStore: Send + Sync + fmt::Debug + 'static {
    /// Reads one key, linearizably, with the revision of the read.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    async fn get(&self, key: &Key) -> Result<(Revision, Option<KeyValue>), StoreError>;

    /// Reads several keys at one revision, linearizably; results in the order of the keys. At most [`TXN_OPS_MAX`].
    ///
    /// # Errors
    /// [`StoreError::Unavailable`], [`StoreError::Refused`] past the bound.
    async fn get_many(&self, keys: &[Key])
    -> Result<(Revision, Vec<Option<KeyValue>>), StoreError>;

    /// Reads one page of a prefix.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`], [`StoreError::Compacted`].
    async fn range(&self, request: RangeRequest) -> Result<Page, StoreError>;

    /// Carries out a transaction.
    ///
    /// # Errors
    /// Any [`StoreError`]; only `Unknown` leaves open whether it happened. `LeaseGone` if a put names a lost lease.
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError>;

    /// Grants a lease of this length, 1 s at least.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] or `Unknown` (then a lease may exist that nobody renews: harmless).
    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, StoreError>;

    /// Renews a lease to its full length, counted from when the store handled the call.
    ///
    /// # Errors
    /// [`StoreError::LeaseGone`], `Unavailable`, `Unknown`.
    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError>;

    /// Ends a lease; its keys go at once, in one revision.
    ///
    /// # Errors
    /// [`StoreError::LeaseGone`], `Unavailable`, `Unknown`.
    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError>;

    /// Watches a prefix from a revision on (inclusive); changes since then are replayed first.
    ///
    /// # Errors
    /// [`StoreError::Compacted`], `Unavailable`.
    async fn watch(&self, prefix: &Key, from: Revision) -> Result<Box<dyn Watch>, StoreError>;
}

/// Shared handle to the store.
pub type SharedStore = Arc<dyn MetadataStore>;
