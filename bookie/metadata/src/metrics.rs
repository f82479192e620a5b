//! What the store seam measures, around any form of it.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};
use tokio::time::Instant;

use crate::{
    Key, KeyValue, LeaseId, MetadataStore, Page, RangeRequest, Revision, SharedStore, StoreError,
    Txn, TxnOutcome, Watch,
};

/// Transactions by `outcome`: `done`, `conflict`, `refused`, `unavailable`, `unknown`.
pub const TXN_COUNT: &str = "metadata.txn";
/// From the call to the answer, s.
pub const TXN_DURATION: &str = "metadata.txn.duration";
/// Reads of a key, of several, or of a page; from the call to the answer, s.
pub const READ_DURATION: &str = "metadata.read.duration";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

/// The metrics of one handle to the store.
#[derive(Clone, Debug)]
pub struct MetadataMetrics {
    txns: Family<Outcome, Counter>,
    txn_duration: Histogram,
    read_duration: Histogram,
}

impl Default for MetadataMetrics {
    fn default() -> Self {
        // 100 us to 3.3 s
        let buckets = || Histogram::new(exponential_buckets(0.0001, 2.0, 16));
        Self { txns: Family::default(), txn_duration: buckets(), read_duration: buckets() }
    }
}

impl MetadataMetrics {
    /// Registers the metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let name = |dotted: &str| format!("geminga_{}", dotted.replace('.', "_"));
        registry.register(
            name(TXN_COUNT),
            "Metadata transactions, by outcome",
            metrics.txns.clone(),
        );
        registry.register_with_unit(
            name(TXN_DURATION),
            "Time from a metadata transaction to its answer",
            Unit::Seconds,
            metrics.txn_duration.clone(),
        );
        registry.register_with_unit(
            name(READ_DURATION),
            "Time from a metadata read to its answer",
            Unit::Seconds,
            metrics.read_duration.clone(),
        );
        metrics
    }

    fn on_txn(&self, answer: &Result<TxnOutcome, StoreError>, took: Duration) {
        let outcome = match answer {
            Ok(TxnOutcome::Done(_)) => "done",
            Ok(TxnOutcome::Conflict { .. }) => "conflict",
            Err(StoreError::Unavailable(_)) => "unavailable",
            Err(StoreError::Unknown(_)) => "unknown",
            Err(_) => "refused",
        };
        self.txns.get_or_create(&Outcome { outcome }).inc();
        self.txn_duration.observe(took.as_secs_f64());
    }
}

/// A store that counts what passes through it.
pub struct MeteredStore {
    inner: SharedStore,
    metrics: MetadataMetrics,
}

impl fmt::Debug for MeteredStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl MeteredStore {
    /// Wraps a store.
    #[must_use]
    pub fn new(inner: SharedStore, metrics: MetadataMetrics) -> Self {
        Self { inner, metrics }
    }

    async fn read<T>(&self, read: impl Future<Output = T>) -> T {
        let start = Instant::now();
        let answer = read.await;
        self.metrics.read_duration.observe(start.elapsed().as_secs_f64());
        answer
    }
}

#[async_trait]
impl MetadataStore for MeteredStore {
    async fn get(&self, key: &Key) -> Result<(Revision, Option<KeyValue>), StoreError> {
        self.read(self.inner.get(key)).await
    }

    async fn get_many(
        &self,
        keys: &[Key],
    ) -> Result<(Revision, Vec<Option<KeyValue>>), StoreError> {
        self.read(self.inner.get_many(keys)).await
    }

    async fn range(&self, request: RangeRequest) -> Result<Page, StoreError> {
        self.read(self.inner.range(request)).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        let start = Instant::now();
        let answer = self.inner.txn(txn).await;
        self.metrics.on_txn(&answer, start.elapsed());
        answer
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.inner.grant_lease(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.inner.keep_alive(lease).await
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.inner.revoke_lease(lease).await
    }

    async fn watch(&self, prefix: &Key, from: Revision) -> Result<Box<dyn Watch>, StoreError> {
        self.inner.watch(prefix, from).await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{Compare, MemoryStore, Op, keys};

    #[tokio::test(start_paused = true)]
    async fn outcomes_are_counted_by_name() {
        let mut registry = Registry::default();
        let metrics = MetadataMetrics::register(&mut registry);
        let store = MeteredStore::new(Arc::new(MemoryStore::new()), metrics);
        let key = keys::cluster();
        let txn = Txn::new().when(Compare::Absent(key.clone())).then(Op::put(key.clone(), "x"));
        for _ in 0..3 {
            store.txn(txn.clone()).await.expect("answered");
        }
        store.get(&key).await.expect("read");
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).expect("encoded");
        assert!(text.contains("geminga_metadata_txn_total{outcome=\"done\"} 1"), "{text}");
        assert!(text.contains("geminga_metadata_txn_total{outcome=\"conflict\"} 2"), "{text}");
        assert!(text.contains("geminga_metadata_txn_duration_seconds_count 3"), "{text}");
        assert!(text.contains("geminga_metadata_read_duration_seconds_count 1"), "{text}");
    }
}
