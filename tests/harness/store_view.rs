//! A client's faulty view of the store, with a book of what became of each transaction.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use geminga_metadata::{
    Change, FaultPlan, FaultyStore, Key, KeyValue, LeaseId, MetadataStore, Page, RangeRequest,
    Revision, Standing, StoreError, Txn, TxnOutcome, Watch, WatchError,
};
use tokio::time::{Instant, sleep_until};

use super::{
    coverage::Seen,
    history::{Hash, History},
};

/// What every transaction takes; more by [`StoreView::apart`].
const LATENCY: Duration = Duration::from_millis(3);

/// Transactions by their content: which were tried, answered, done. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct TxnBook(Arc<Mutex<BTreeMap<u64, Fate>>>);

/// What became of a transaction.
#[derive(Debug, Default)]
struct Fate {
    trying: u32,
    unknown: bool,
    done: bool,
}

impl TxnBook {
    /// What a transaction is known by.
    pub(crate) fn print(txn: &Txn) -> u64 {
        Hash::of(format!("{txn:?}").as_bytes())
    }

    /// The transaction has just been done below all faults.
    pub(crate) fn landed(&self, print: u64, history: &History) {
        self.with(print, |fate| {
            fate.done = true;
            if fate.unknown && fate.trying == 0 {
                history.saw(Seen::TxnLandedLate);
            }
        });
    }

    fn is_known(&self, print: u64) -> bool {
        self.0.lock().expect("nothing panics while it holds the book").contains_key(&print)
    }

    fn with<T>(&self, print: u64, work: impl FnOnce(&mut Fate) -> T) -> T {
        work(
            self.0
                .lock()
                .expect("nothing panics while it holds the book")
                .entry(print)
                .or_default(),
        )
    }
}

/// See the module's text. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct StoreView {
    faulty: FaultyStore,
    book: TxnBook,
    history: History,
    watched: Arc<Mutex<Option<Watched>>>,
    /// How long a change takes to be heard of. Tokio wakes those who wait for one change in an order that no seed decides:
    /// where several processes act on the same one, each has to hear of it at a time of its own.
    hears_after: Duration,
    /// How long a transaction takes.
    latency: Duration,
}

/// A process that may start no metadata change while its claims are provisional (O3).
#[derive(Debug)]
struct Watched {
    number: u32,
    standing: Standing,
    /// Loads under way: what belongs to them was started before.
    loading: u32,
    /// When a change was last refused: it is tried again in another form, and counts as the same.
    refused: Option<Instant>,
    provisional: Option<Instant>,
}

/// What is seen of the standing, and done about it, takes effect within this time.
const STANDING_SEEN: Duration = Duration::from_millis(50);
/// A change that conflicted is rebuilt within this time.
const REBUILT: Duration = Duration::from_secs(3);

/// A try under way; ends when its future does, however that is.
struct Try<'a>(&'a TxnBook, u64);

impl Drop for Try<'_> {
    fn drop(&mut self) {
        self.0.with(self.1, |fate| fate.trying -= 1);
    }
}

impl StoreView {
    /// Over a store that fails.
    pub(crate) fn new(faulty: FaultyStore, book: TxnBook, history: History) -> Self {
        let (watched, hears_after) = Default::default();
        Self { faulty, book, history, watched, hears_after, latency: LATENCY }
    }

    /// A view for another part of a process, whose transactions land at moments of their own: as with changes that are heard
    /// of, tasks that wait for one lease are woken in any order.
    pub(crate) fn apart(mut self, hears_after: Duration) -> Self {
        self.latency = LATENCY * 2;
        self.hears_after = hears_after;
        self
    }

    /// Watches that no change is started while `standing` is not confirmed.
    pub(crate) fn watch_standing(&self, number: u32, standing: Standing) {
        let (refused, provisional) = (None, None);
        let watched = Watched { number, standing, loading: 0, refused, provisional };
        *self.watched.lock().expect("no panic in here") = Some(watched);
    }

    /// A load begins, or has ended.
    pub(crate) fn loads(&self, more: bool) {
        if let Some(watched) = &mut *self.watched.lock().expect("no panic in here") {
            watched.loading = if more { watched.loading + 1 } else { watched.loading - 1 };
        }
    }

    /// O3: a change that begins.
    fn begins(&self, txn: &Txn) {
        let Some(watched) = &mut *self.watched.lock().expect("no panic in here") else { return };
        let now = Instant::now();
        if watched.standing.confirmed() {
            watched.provisional = None;
            return;
        }
        let since = *watched.provisional.get_or_insert(now);
        let names = |prefix: &[u8]| txn.changes.iter().any(|op| op.key().0.starts_with(prefix));
        let again = watched.refused.is_some_and(|at| at + REBUILT > now);
        if (names(b"ledgers/") || names(b"segments/"))
            && watched.loading == 0
            && !again
            && since + STANDING_SEEN < now
        {
            let what = format!("client {} starts a change while provisional", watched.number);
            self.history.fail("O3", format!("{what}: {txn:?}"));
        }
    }

    /// From now on it fails like this.
    pub(crate) fn set_plan(&self, plan: FaultPlan) {
        self.faulty.set_plan(plan);
    }

    /// Cuts or joins it.
    pub(crate) fn set_partitioned(&self, partitioned: bool) {
        self.faulty.set_partitioned(partitioned);
    }

    fn seen<T>(&self, answer: Result<T, StoreError>) -> Result<T, StoreError> {
        if matches!(answer, Err(StoreError::Unavailable(_))) {
            self.history.saw(Seen::StoreUnavailable);
        }
        answer
    }
}

#[async_trait]
impl MetadataStore for StoreView {
    async fn get(&self, key: &Key) -> Result<(Revision, Option<KeyValue>), StoreError> {
        self.seen(self.faulty.get(key).await)
    }

    async fn get_many(
        &self,
        keys: &[Key],
    ) -> Result<(Revision, Vec<Option<KeyValue>>), StoreError> {
        self.seen(self.faulty.get_many(keys).await)
    }

    async fn range(&self, request: RangeRequest) -> Result<Page, StoreError> {
        self.seen(self.faulty.range(request).await)
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        let print = TxnBook::print(&txn);
        if !self.book.is_known(print) {
            self.begins(&txn);
        }
        self.book.with(print, |fate| fate.trying += 1);
        let trying = Try(&self.book, print);
        // A store is never instant: what tries without a pause must not stop the time.
        tokio::time::sleep(self.latency).await;
        let answer = self.faulty.txn(txn).await;
        drop(trying);
        if let (Ok(TxnOutcome::Conflict { .. }), Some(watched)) =
            (&answer, &mut *self.watched.lock().expect("no panic in here"))
        {
            watched.refused = Some(Instant::now());
        }
        match &answer {
            Err(StoreError::Unknown(_)) => {
                self.book.with(print, |fate| fate.unknown = true);
                self.history.saw(Seen::TxnUnknown);
            }
            Ok(TxnOutcome::Conflict { .. })
                if self.book.with(print, |fate| fate.done && fate.unknown) =>
            {
                self.history.saw(Seen::TxnOwnNonce);
            }
            _ => {}
        }
        self.seen(answer)
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.seen(self.faulty.grant_lease(ttl).await)
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.seen(self.faulty.keep_alive(lease).await)
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.seen(self.faulty.revoke_lease(lease).await)
    }

    async fn watch(&self, prefix: &Key, from: Revision) -> Result<Box<dyn Watch>, StoreError> {
        let inner = self.seen(self.faulty.watch(prefix, from).await)?;
        let (after, heard) = (self.hears_after, None);
        Ok(if after.is_zero() { inner } else { Box::new(LateWatch { inner, after, heard }) })
    }
}

/// A watch whose batches come later.
struct LateWatch {
    inner: Box<dyn Watch>,
    after: Duration,
    /// What has come, and when it is told.
    heard: Option<(Instant, Result<Vec<Change>, WatchError>)>,
}

#[async_trait]
impl Watch for LateWatch {
    async fn next(&mut self) -> Result<Vec<Change>, WatchError> {
        if self.heard.is_none() {
            let batch = self.inner.next().await;
            self.heard = Some((Instant::now() + self.after, batch));
        }
        if let Some((at, _)) = &self.heard {
            sleep_until(*at).await;
        }
        self.heard.take().map_or(Err(WatchError::Lost), |(_, batch)| batch)
    }
}
