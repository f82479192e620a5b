//! Keeps one lease alive, and takes a new one when it is lost.

use std::{fmt, sync::Arc, time::Duration};

use geminga_runtime::tasks::Tasks;
use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{LeaseId, SharedStore, StoreError};

/// Handle to a task that grants a lease and renews it every third of its length. Clones share it.
///
/// The lease is a hint (O1): it is *lost* when the store says so. While the store does not answer, the lease counts as
/// held, and [`Self::renewed_at`] tells since when nobody has confirmed it.
#[derive(Clone)]
pub struct LeaseKeeper {
    shared: Arc<Shared>,
    current: watch::Receiver<Option<LeaseId>>,
}

struct Shared {
    store: SharedStore,
    ttl: Duration,
    stop: CancellationToken,
    renewed_at: Mutex<Option<Instant>>,
}

impl fmt::Debug for LeaseKeeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaseKeeper").field("current", &self.current()).finish_non_exhaustive()
    }
}

impl LeaseKeeper {
    /// Starts to keep a lease of this length (1 s at least) in a task of `tasks`, until that owner or [`Self::end`] stops
    /// it. A stopped owner leaves the lease to run out, as a crash would.
    #[must_use]
    pub fn start(store: SharedStore, ttl: Duration, tasks: &Tasks) -> Self {
        let ttl = ttl.max(Duration::from_secs(1));
        let stop = tasks.token().child_token();
        let shared = Arc::new(Shared { store, ttl, stop, renewed_at: Mutex::new(None) });
        let (sender, current) = watch::channel(None);
        tasks.spawn("lease keeper", keep(Arc::clone(&shared), Current(sender)));
        Self { shared, current }
    }

    /// The lease held now; none before the first grant, after a loss, and after the end.
    #[must_use]
    pub fn current(&self) -> Option<LeaseId> {
        *self.current.borrow()
    }

    /// The lease as it changes: none means lost or not yet granted. Closed when the keeper has ended.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Option<LeaseId>> {
        self.current.clone()
    }

    /// Waits until a lease is held. None when the keeper has ended. Cancel-safe.
    pub async fn held(&self) -> Option<LeaseId> {
        let mut current = self.current.clone();
        let found = current.wait_for(Option::is_some).await.ok()?;
        *found
    }

    /// Waits until this lease is not the one held (any more): lost, replaced, or the keeper has ended. Cancel-safe.
    pub async fn lost(&self, lease: LeaseId) {
        let mut current = self.current.clone();
        let _gone_or_ended = current.wait_for(|held| *held != Some(lease)).await;
    }

    /// When the last renewal that succeeded was *sent*. At worst the lease ends its length after this.
    #[must_use]
    pub fn renewed_at(&self) -> Option<Instant> {
        *self.shared.renewed_at.lock()
    }

    /// Whether the store confirmed the lease by a renewal *sent* no longer than `limit` ago; false while none is held.
    ///
    /// The clock is tokio's, so tests can pause it. It stands still while the machine is suspended: after a suspension
    /// this may say yes until the next renewal is answered. O3's confirmation must not rest on it alone.
    #[must_use]
    pub fn confirmed_within(&self, limit: Duration) -> bool {
        self.renewed_at().is_some_and(|sent| sent.elapsed() <= limit)
    }

    /// The length that the lease is asked for with.
    #[must_use]
    pub fn ttl(&self) -> Duration {
        self.shared.ttl
    }

    /// Stops the keeper and revokes its lease, so that its keys go at once. Tries for one length of the lease at most;
    /// after that the lease runs out by itself. Not cancel-safe: dropped, it may leave the lease to run out.
    pub async fn end(&self) {
        let held = self.current();
        self.shared.stop.cancel();
        let Some(lease) = held else { return };
        let revoke = async {
            let mut pause = Duration::from_millis(10);
            loop {
                match self.shared.store.revoke_lease(lease).await {
                    Err(StoreError::Unavailable(_) | StoreError::Unknown(_)) => {}
                    Ok(()) | Err(_) => return,
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(1));
            }
        };
        if tokio::time::timeout(self.shared.ttl, revoke).await.is_err() {
            tracing::warn!(lease = lease.0, "lease could not be revoked and is left to run out");
        }
    }
}

/// Tells that nothing is held when the task ends, in whatever way.
struct Current(watch::Sender<Option<LeaseId>>);

impl Drop for Current {
    fn drop(&mut self) {
        self.0.send_replace(None);
    }
}

async fn keep(shared: Arc<Shared>, current: Current) {
    let mut held: Option<LeaseId> = None;
    let mut pause = Duration::ZERO;
    loop {
        tokio::select! {
            biased;
            () = shared.stop.cancelled() => break,
            () = tokio::time::sleep(pause) => {}
        }
        let sent = Instant::now();
        let call = tokio::time::timeout(shared.ttl / 3, renew(&shared.store, held, shared.ttl));
        let answer = tokio::select! {
            biased;
            () = shared.stop.cancelled() => break,
            answer = call => answer,
        };
        pause = match answer {
            Ok(Ok(lease)) => {
                *shared.renewed_at.lock() = Some(sent);
                if held != Some(lease) {
                    held = Some(lease);
                    current.0.send_replace(held);
                }
                shared.ttl / 3
            }
            Ok(Err(StoreError::LeaseGone(lease))) => {
                tracing::warn!(lease = lease.0, "lease was lost");
                *shared.renewed_at.lock() = None;
                held = None;
                current.0.send_replace(None);
                Duration::ZERO
            }
            Ok(Err(error)) => {
                tracing::debug!(%error, "lease renewal is tried again");
                shared.ttl / 12
            }
            Err(_late) => Duration::from_millis(10),
        };
    }
}

async fn renew(
    store: &SharedStore,
    held: Option<LeaseId>,
    ttl: Duration,
) -> Result<LeaseId, StoreError> {
    match held {
        Some(lease) => store.keep_alive(lease).await.map(|()| lease),
        None => store.grant_lease(ttl).await,
    }
}

#[cfg(test)]
mod tests {
    use geminga_runtime::random::Random;

    use super::*;
    use crate::{FaultPlan, FaultyStore, MemoryStore, MetadataStore, Op, Txn, keys};

    const TTL: Duration = Duration::from_secs(5);

    fn parts() -> (MemoryStore, Tasks, LeaseKeeper) {
        let store = MemoryStore::new();
        let tasks = Tasks::new("test");
        let keeper = LeaseKeeper::start(Arc::new(store.clone()), TTL, &tasks);
        (store, tasks, keeper)
    }

    #[tokio::test(start_paused = true)]
    async fn a_kept_lease_outlives_its_length_and_a_stopped_keeper_lets_it_run_out() {
        let (store, tasks, keeper) = parts();
        let lease = keeper.held().await.expect("granted");
        tokio::time::sleep(TTL * 10).await;
        assert_eq!(keeper.current(), Some(lease));
        store.keep_alive(lease).await.expect("alive");
        tasks.abort();
        tokio::time::sleep(TTL).await;
        assert!(store.keep_alive(lease).await.is_err());
        assert_eq!(keeper.held().await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_lease_is_told_and_replaced() {
        let (store, _tasks, keeper) = parts();
        let first = keeper.held().await.expect("granted");
        store.expire_lease(first);
        keeper.lost(first).await;
        let second = keeper.held().await.expect("granted again");
        assert_ne!(first, second);
    }

    #[tokio::test(start_paused = true)]
    async fn a_confirmation_is_as_old_as_the_sending_of_the_last_renewal() {
        let tasks = Tasks::new("test");
        let plan = FaultPlan::default();
        let random = Random::from_seed(1);
        let store = FaultyStore::new(Arc::new(MemoryStore::new()), random, plan, &tasks);
        let keeper = LeaseKeeper::start(Arc::new(store.clone()), TTL, &tasks);
        assert!(!keeper.confirmed_within(TTL), "nothing is held yet");
        let lease = keeper.held().await.expect("granted");
        store.set_partitioned(true);
        tokio::time::sleep(TTL).await;
        assert_eq!(keeper.current(), Some(lease), "the lease is not known to be lost");
        assert!(!keeper.confirmed_within(TTL * 4 / 5) && keeper.confirmed_within(TTL * 2));
        store.set_partitioned(false);
        keeper.lost(lease).await; // it ran out meanwhile
        keeper.held().await.expect("granted again");
        assert!(keeper.confirmed_within(TTL / 3));
    }

    #[tokio::test(start_paused = true)]
    async fn ending_the_keeper_removes_the_leased_keys_at_once() {
        let (store, _tasks, keeper) = parts();
        let lease = keeper.held().await;
        let key = keys::broker("b");
        let put = Op::Put { key: key.clone(), value: "x".into(), lease };
        store.txn(Txn::new().then(put)).await.expect("put");
        let before = Instant::now();
        keeper.end().await;
        assert!(store.get(&key).await.expect("read").1.is_none());
        assert!(before.elapsed() < TTL);
        tokio::time::sleep(TTL).await;
        assert_eq!(keeper.current(), None);
    }
}
