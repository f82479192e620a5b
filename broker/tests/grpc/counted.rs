//! A store that counts what is read of it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use geminga_metadata::{
    Key, KeyValue, LeaseId, MetadataStore, Page, RangeRequest, Revision, SharedStore, StoreError,
    Txn, TxnOutcome, Watch,
};

/// Counts the values that are read; watches are not counted.
#[derive(Debug)]
pub(crate) struct Counted {
    pub(crate) store: SharedStore,
    pub(crate) read: Arc<AtomicU64>,
}

impl Counted {
    fn count(&self, values: usize) {
        self.read.fetch_add(values as u64, Ordering::Relaxed);
    }
}

#[tonic::async_trait]
impl MetadataStore for Counted {
    async fn get(&self, key: &Key) -> Result<(Revision, Option<KeyValue>), StoreError> {
        self.count(1);
        self.store.get(key).await
    }

    async fn get_many(
        &self,
        keys: &[Key],
    ) -> Result<(Revision, Vec<Option<KeyValue>>), StoreError> {
        self.count(keys.len());
        self.store.get_many(keys).await
    }

    async fn range(&self, request: RangeRequest) -> Result<Page, StoreError> {
        let page = self.store.range(request).await?;
        self.count(1 + page.items.len());
        Ok(page)
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        self.store.txn(txn).await
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.store.grant_lease(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.store.keep_alive(lease).await
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.store.revoke_lease(lease).await
    }

    async fn watch(&self, prefix: &Key, from: Revision) -> Result<Box<dyn Watch>, StoreError> {
        self.store.watch(prefix, from).await
    }
}
