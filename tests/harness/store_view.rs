//! A client's faulty view of the store, with a book of what became of each transaction.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use geminga_metadata::{
    FaultPlan, FaultyStore, Key, KeyValue, LeaseId, MetadataStore, Page, RangeRequest, Revision,
    StoreError, Txn, TxnOutcome, Watch,
};

use super::{
    coverage::Seen,
    history::{Hash, History},
};

/// What every transaction takes.
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
}

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
        Self { faulty, book, history }
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
        self.book.with(print, |fate| fate.trying += 1);
        let trying = Try(&self.book, print);
        // A store is never instant: what tries without a pause must not stop the time.
        tokio::time::sleep(LATENCY).await;
        let answer = self.faulty.txn(txn).await;
        drop(trying);
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
        self.seen(self.faulty.watch(prefix, from).await)
    }
}
