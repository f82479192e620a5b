//! The in-memory form, for tests and simulations: the pure state machine behind a lock, on tokio's clock.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};

use crate::{
    Change, HistoryLimits, Key, KeyValue, LeaseId, MetadataStore, Page, RangeRequest, Revision,
    StoreError, Txn, TxnOutcome, Watch, WatchError, data::Data, state::State, state::check_many,
};

/// A store in memory. Clones share it. Leases end on tokio's clock, also when it is paused; nothing runs in the
/// background: a due lease is swept by the next call, and a waiting watch wakes for it by itself.
#[derive(Clone)]
pub struct MemoryStore {
    inner: Arc<Inner>,
}

struct Inner {
    state: Mutex<State>,
    /// Changes with every revision and every cut. A new deadline needs no signal: it matters with the lease's first key.
    changed: watch::Sender<Signal>,
    /// Monotonic time is counted from the first call inside a runtime.
    start: std::sync::OnceLock<Instant>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Signal {
    cuts: u64,
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore").finish_non_exhaustive()
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::with_limits(HistoryLimits::default())
    }

    /// An empty store that keeps so much history.
    #[must_use]
    pub fn with_limits(limits: HistoryLimits) -> Self {
        let state = Mutex::new(State::new(Data::new(limits), 1));
        let changed = watch::Sender::new(Signal::default());
        Self { inner: Arc::new(Inner { state, changed, start: std::sync::OnceLock::new() }) }
    }

    /// The revision now.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.inner.with(|state, _| state.data().revision())
    }

    /// Forgets history up to this revision (inclusive), as etcd's compaction does.
    pub fn compact(&self, revision: Revision) {
        self.inner.with(|state, _| state.compact(revision));
    }

    /// Ends a lease now, as if its time had run out. Nothing happens to an unknown one.
    pub fn expire_lease(&self, lease: LeaseId) {
        self.inner.with(|state, _| drop(state.revoke(lease)));
    }

    /// Ends every watch that exists now with [`WatchError::Lost`].
    pub fn cut_watches(&self) {
        self.inner.changed.send_modify(|signal| signal.cuts += 1);
    }
}

impl Inner {
    fn now(&self) -> Duration {
        let now = Instant::now();
        now.saturating_duration_since(*self.start.get_or_init(|| now))
    }

    /// Sweeps due leases, then looks or acts; wakes the watches if the revision moved.
    fn with<T>(&self, work: impl FnOnce(&mut State, Duration) -> T) -> T {
        let now = self.now();
        let mut state = self.state.lock();
        let before = state.data().revision();
        state.expire(now);
        let result = work(&mut state, now);
        let moved = state.data().revision() != before;
        drop(state);
        if moved {
            self.changed.send_modify(|_| ());
        }
        result
    }
}

#[async_trait]
impl MetadataStore for MemoryStore {
    async fn get(&self, key: &Key) -> Result<(Revision, Option<KeyValue>), StoreError> {
        Ok(self.inner.with(|state, _| (state.data().revision(), state.data().get(key).cloned())))
    }

    async fn get_many(
        &self,
        keys: &[Key],
    ) -> Result<(Revision, Vec<Option<KeyValue>>), StoreError> {
        check_many(keys)?;
        Ok(self.inner.with(|state, _| {
            let found = keys.iter().map(|key| state.data().get(key).cloned()).collect();
            (state.data().revision(), found)
        }))
    }

    async fn range(&self, request: RangeRequest) -> Result<Page, StoreError> {
        self.inner.with(|state, _| state.data().range(&request))
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        self.inner.with(|state, _| state.txn(&txn))
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        Ok(self.inner.with(|state, now| state.grant(now, ttl)))
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.inner.with(|state, now| state.keep_alive(now, lease))
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.inner.with(|state, _| state.revoke(lease))
    }

    async fn watch(&self, prefix: &Key, from: Revision) -> Result<Box<dyn Watch>, StoreError> {
        let changed = self.inner.changed.subscribe();
        let cuts = changed.borrow().cuts;
        let compacted = self.inner.with(|state, _| state.data().compacted());
        let from = from.max(Revision(2)); // nothing happened before the first change
        if from <= compacted {
            return Err(StoreError::Compacted(compacted));
        }
        Ok(Box::new(MemoryWatch {
            inner: Arc::clone(&self.inner),
            changed,
            cuts,
            prefix: prefix.clone(),
            next: from,
        }))
    }
}

struct MemoryWatch {
    inner: Arc<Inner>,
    changed: watch::Receiver<Signal>,
    cuts: u64,
    prefix: Key,
    next: Revision,
}

#[async_trait]
impl Watch for MemoryWatch {
    async fn next(&mut self) -> Result<Vec<Change>, WatchError> {
        loop {
            if self.changed.borrow_and_update().cuts != self.cuts {
                return Err(WatchError::Lost);
            }
            let (found, deadline) = self.inner.with(|state, now| {
                let wait = state.next_deadline().map(|deadline| deadline.saturating_sub(now));
                (state.data().changes(&self.prefix, self.next), wait)
            });
            let (changes, next) = found?;
            self.next = next;
            if !changes.is_empty() {
                return Ok(changes);
            }
            let lease_due = async {
                match deadline {
                    Some(wait) => tokio::time::sleep(wait).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                changed = self.changed.changed() => changed.map_err(|_| WatchError::Lost)?,
                () = lease_due => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Op, keys};

    #[tokio::test(start_paused = true)]
    async fn a_waiting_watch_wakes_by_itself_when_a_lease_runs_out() {
        let store = MemoryStore::new();
        let mut watch = store.watch(&keys::brokers(), Revision(3)).await.expect("watch");
        let waiter = async {
            let changes = watch.next().await.expect("woken");
            assert!(matches!(changes[..], [Change::Deleted { revision: Revision(3), .. }]));
            Instant::now()
        };
        let start = Instant::now();
        let (woken, ()) = tokio::join!(waiter, async {
            // granted while the watch already sleeps
            let ttl = Duration::from_secs(5);
            let lease = Some(store.grant_lease(ttl).await.expect("granted"));
            let put = Op::Put { key: keys::broker("b"), value: "x".into(), lease };
            store.txn(Txn::new().then(put)).await.expect("put");
        });
        assert_eq!((woken - start).as_secs(), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn cut_watches_are_lost_and_new_ones_resume() {
        let store = MemoryStore::new();
        let mut watch = store.watch(&keys::brokers(), Revision(2)).await.expect("watch");
        store.cut_watches();
        store.txn(Txn::new().then(Op::put(keys::broker("b"), "x"))).await.expect("put");
        assert_eq!(watch.next().await, Err(WatchError::Lost));
        assert_eq!(watch.next().await, Err(WatchError::Lost));
        let mut watch = store.watch(&keys::brokers(), Revision(2)).await.expect("watch");
        assert_eq!(watch.next().await.expect("replayed").len(), 1);
    }
}
