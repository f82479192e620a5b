//! The faulty form: any store, behind a network that loses, delays, and lets things land late (trap T49). All chance
//! comes from one seed, all waiting is on tokio's clock, so a run can be repeated.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use geminga_runtime::{random::Random, tasks::Tasks};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{
    Change, Key, KeyValue, LeaseId, MetadataStore, Page, RangeRequest, Revision, SharedStore,
    StoreError, Txn, TxnOutcome, Watch, WatchError,
};

/// How often each fault strikes, as probabilities from 0.0 to 1.0. The default has none.
#[derive(Clone, Debug, Default)]
pub struct FaultPlan {
    /// Any call: refused before anything is done.
    pub unavailable: f64,
    /// Calls that change something: done, but the answer is lost ([`StoreError::Unknown`]).
    pub unknown_done: f64,
    /// Calls that change something: never done, and the caller cannot know it.
    pub unknown_lost: f64,
    /// Transactions: `Unknown` is answered at once, and the transaction lands later.
    pub unknown_late: f64,
    /// A late transaction lands after up to this long.
    pub late_max: Duration,
    /// Any call: takes time before the work, or after it, evenly.
    pub delay: f64,
    /// A delayed call takes up to this long.
    pub delay_max: Duration,
    /// A batch of a watch: the watch is cut instead.
    pub watch_lost: f64,
}

/// What happens to one transaction, for scripted tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Refused before anything is done.
    Unavailable,
    /// Done, but the answer is lost.
    UnknownDone,
    /// Never done, and the caller cannot know it.
    UnknownLost,
    /// `Unknown` at once; lands after this long.
    UnknownLate(Duration),
    /// Takes this long before it is done and answered.
    Slow(Duration),
    /// Done at once, answered after this long.
    SlowAnswer(Duration),
}

struct Scripted {
    prefix: Option<Key>,
    fault: Fault,
}

struct Inner {
    store: SharedStore,
    random: Random,
    tasks: Tasks,
    plan: Mutex<FaultPlan>,
    script: Mutex<VecDeque<Scripted>>,
    partitioned: watch::Sender<bool>,
    late: AtomicU64,
    landed: AtomicU64,
}

/// A store that fails on purpose. Clones share plan and script.
#[derive(Clone)]
pub struct FaultyStore(Arc<Inner>);

impl fmt::Debug for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyStore").field("inner", &self.0.store).finish_non_exhaustive()
    }
}

impl FaultyStore {
    /// Wraps a store. Late transactions land in tasks of `tasks`: let that be an owner that outlives the callers, since a
    /// request under way does not die with its sender.
    #[must_use]
    pub fn new(inner: SharedStore, random: Random, plan: FaultPlan, tasks: &Tasks) -> Self {
        Self(Arc::new(Inner {
            store: inner,
            random,
            tasks: tasks.clone(),
            plan: Mutex::new(plan),
            script: Mutex::default(),
            partitioned: watch::Sender::new(false),
            late: AtomicU64::new(0),
            landed: AtomicU64::new(0),
        }))
    }

    /// Replaces the plan for all later calls.
    pub fn set_plan(&self, plan: FaultPlan) {
        *self.0.plan.lock() = plan;
    }

    /// The next transaction that has no other scripted fault gets this one, whatever the plan says.
    pub fn inject(&self, fault: Fault) {
        self.0.script.lock().push_back(Scripted { prefix: None, fault });
    }

    /// The next transaction that changes a key below `prefix` gets this fault.
    pub fn inject_below(&self, prefix: Key, fault: Fault) {
        self.0.script.lock().push_back(Scripted { prefix: Some(prefix), fault });
    }

    /// While partitioned, every call is `Unavailable` and every watch is lost. What is under way still lands.
    pub fn set_partitioned(&self, partitioned: bool) {
        self.0.partitioned.send_replace(partitioned);
    }

    /// Transactions answered `Unknown` that have not landed yet.
    #[must_use]
    pub fn under_way(&self) -> u64 {
        self.0.late.load(Ordering::SeqCst) - self.0.landed.load(Ordering::SeqCst)
    }
}

impl Inner {
    fn scripted(&self, txn: &Txn) -> Option<Fault> {
        let mut script = self.script.lock();
        let meant = |scripted: &Scripted| {
            scripted.prefix.as_ref().is_none_or(|prefix| {
                txn.changes.iter().any(|change| change.key().0.starts_with(&prefix.0))
            })
        };
        let at = script.iter().position(meant)?;
        script.remove(at).map(|scripted| scripted.fault)
    }

    fn up_to(&self, most: Duration) -> Duration {
        let most = u64::try_from(most.as_micros()).unwrap_or(u64::MAX);
        Duration::from_micros(self.random.below(most.saturating_add(1)))
    }

    /// By the plan; the first fault that strikes, in the order of its fields.
    fn chance(&self, late_too: bool) -> Option<Fault> {
        let plan = self.plan.lock().clone();
        if self.random.chance(plan.unavailable) {
            return Some(Fault::Unavailable);
        }
        if self.random.chance(plan.unknown_done) {
            return Some(Fault::UnknownDone);
        }
        if self.random.chance(plan.unknown_lost) {
            return Some(Fault::UnknownLost);
        }
        if late_too && self.random.chance(plan.unknown_late) {
            return Some(Fault::UnknownLate(self.up_to(plan.late_max)));
        }
        if self.random.chance(plan.delay) {
            let delay = self.up_to(plan.delay_max);
            let before = self.random.chance(0.5);
            return Some(if before { Fault::Slow(delay) } else { Fault::SlowAnswer(delay) });
        }
        None
    }

    fn reachable(&self) -> Result<(), StoreError> {
        if *self.partitioned.borrow() { Err(unavailable()) } else { Ok(()) }
    }

    /// A call that changes nothing: it can fail or take time.
    async fn read<T>(
        &self,
        work: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        self.reachable()?;
        let (fails, delay) = {
            let plan = self.plan.lock().clone();
            let fails = self.random.chance(plan.unavailable);
            let delayed = self.random.chance(plan.delay);
            (fails, delayed.then(|| (self.up_to(plan.delay_max), self.random.chance(0.5))))
        };
        if let Some((delay, true)) = delay {
            tokio::time::sleep(delay).await;
        }
        if fails {
            return Err(unavailable());
        }
        let answer = work.await;
        if let Some((delay, false)) = delay {
            tokio::time::sleep(delay).await;
        }
        // A read whose answer is lost changed nothing.
        self.reachable()?;
        answer
    }

    /// A call that changes something, under a fault that is not `UnknownLate`.
    async fn write<T>(
        &self,
        fault: Option<Fault>,
        work: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        self.reachable()?;
        match fault {
            Some(Fault::Unavailable) => Err(unavailable()),
            Some(Fault::UnknownLost | Fault::UnknownLate(_)) => Err(unknown()),
            Some(Fault::UnknownDone) => match work.await {
                Err(StoreError::Unavailable(reason)) => Err(StoreError::Unavailable(reason)),
                _lost => Err(unknown()),
            },
            Some(Fault::Slow(delay)) => {
                tokio::time::sleep(delay).await;
                self.reachable()?;
                work.await
            }
            Some(Fault::SlowAnswer(delay)) => {
                let answer = work.await;
                tokio::time::sleep(delay).await;
                self.reachable().map_err(|_cut_meanwhile| unknown())?;
                answer
            }
            None => work.await,
        }
    }

    fn land_later(self: &Arc<Self>, txn: Txn, delay: Duration) {
        self.late.fetch_add(1, Ordering::SeqCst);
        let inner = Arc::clone(self);
        self.tasks.spawn("late metadata transaction", async move {
            tokio::time::sleep(delay).await;
            let outcome = inner.store.txn(txn).await;
            tracing::debug!(?outcome, "late metadata transaction landed");
            inner.landed.fetch_add(1, Ordering::SeqCst);
        });
    }
}

fn unavailable() -> StoreError {
    StoreError::Unavailable("injected".to_owned())
}

fn unknown() -> StoreError {
    StoreError::Unknown("injected".to_owned())
}

#[async_trait]
impl MetadataStore for FaultyStore {
    async fn get(&self, key: &Key) -> Result<(Revision, Option<KeyValue>), StoreError> {
        self.0.read(self.0.store.get(key)).await
    }

    async fn get_many(
        &self,
        keys: &[Key],
    ) -> Result<(Revision, Vec<Option<KeyValue>>), StoreError> {
        self.0.read(self.0.store.get_many(keys)).await
    }

    async fn range(&self, request: RangeRequest) -> Result<Page, StoreError> {
        self.0.read(self.0.store.range(request)).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        self.0.reachable()?;
        let fault = self.0.scripted(&txn).or_else(|| self.0.chance(true));
        if let Some(Fault::UnknownLate(delay)) = fault {
            self.0.land_later(txn, delay);
            return Err(unknown());
        }
        self.0.write(fault, self.0.store.txn(txn)).await
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.0.write(self.0.chance(false), self.0.store.grant_lease(ttl)).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.0.write(self.0.chance(false), self.0.store.keep_alive(lease)).await
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.0.write(self.0.chance(false), self.0.store.revoke_lease(lease)).await
    }

    async fn watch(&self, prefix: &Key, from: Revision) -> Result<Box<dyn Watch>, StoreError> {
        let watch = self.0.read(self.0.store.watch(prefix, from)).await?;
        let partitioned = self.0.partitioned.subscribe();
        Ok(Box::new(FaultyWatch { inner: Arc::clone(&self.0), watch, partitioned, lost: false }))
    }
}

struct FaultyWatch {
    inner: Arc<Inner>,
    watch: Box<dyn Watch>,
    partitioned: watch::Receiver<bool>,
    lost: bool,
}

#[async_trait]
impl Watch for FaultyWatch {
    async fn next(&mut self) -> Result<Vec<Change>, WatchError> {
        if self.lost {
            return Err(WatchError::Lost);
        }
        let cut = self.partitioned.wait_for(|partitioned| *partitioned);
        let batch = tokio::select! {
            biased;
            _cut = cut => Err(WatchError::Lost),
            batch = self.watch.next() => batch,
        };
        let probability = self.inner.plan.lock().watch_lost;
        self.lost = batch.is_err() || self.inner.random.chance(probability);
        if self.lost { batch.and(Err(WatchError::Lost)) } else { batch }
    }
}

#[cfg(test)]
mod tests;
