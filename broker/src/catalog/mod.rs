//! Tenants, namespaces, topics and subscriptions in the metadata store.
//!
//! Every change is one transaction on the revisions read (MD1), carried to an end by [`geminga_metadata::commit`] (MD3).
//! Every creation also compares and changes a counter that is never deleted, so that it cannot land late, after a
//! deletion; every deletion of a container compares the counter that creations inside it change.
//!
//! What it does not know: cursors, owners, ledgers. Those steps of a life cycle are in [`crate::lifecycle`].

mod policies;
mod records;
mod subscriptions;
mod tenants;
mod topics;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use geminga_metadata::{
    Cluster, Committed, Key, KeyValue, Op, RangeRequest, Revision, SharedStore, Standing, Txn,
    commit, keys,
};
use geminga_proto::{ids::SegmentId, reason::Reason};
use geminga_runtime::clock::SharedClock;
use tokio::{sync::Mutex, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::errors::Refusal;

pub(crate) use policies::TOPICS_PER_READ;
pub use policies::{BUILT_IN, Effective, Limit, PolicyChange, Scope, SetPolicies};
pub use records::Record;
pub use subscriptions::{Start, State, Subscription};
pub use tenants::{Namespace, Tenant};
pub use topics::{SegmentRange, Topic};

/// Counter of topic ids; changed by every topic creation.
const TOPICS: &str = "topics";
/// Counter of subscription ids; changed by every subscription creation.
const SUBSCRIPTIONS: &str = "subscriptions";
/// Changed by every creation of a tenant or namespace.
const TENANTS: &str = "tenants";

/// Tries of one change before it is given up as contended; each lost one means that somebody else succeeded.
const TRIES_MAX: u32 = 32;
/// Time after which a change without an answer is told to the caller as of unknown outcome.
const COMMIT_DEADLINE: Duration = Duration::from_secs(10);

/// Access to the catalog. Clones share everything.
#[derive(Clone, Debug)]
pub struct Catalog {
    store: SharedStore,
    clock: SharedClock,
    cluster: Cluster,
    initial_list: fn(SegmentId) -> Op,
    cancel: CancellationToken,
    standing: Standing,
    /// Creations of this broker compare one counter: they take turns instead of making each other try again.
    creating: Arc<Mutex<()>>,
}

/// One page of a listing.
#[derive(Clone, Debug)]
pub struct Listing<T> {
    /// In the order of their names.
    pub items: Vec<T>,
    /// Names the last item when more follow; empty at the end.
    pub next_page_token: String,
}

/// Which page of a listing is wanted.
#[derive(Clone, Debug, Default)]
pub struct PageRequest {
    /// At most so many items; 0 means the broker's limit.
    pub size: usize,
    /// From the page before; empty for the first.
    pub token: String,
}

impl Catalog {
    /// A catalog in this store. `initial_list` makes the list value of a new segment; `cancel` ends waiting changes.
    #[must_use]
    pub fn new(
        store: SharedStore,
        clock: SharedClock,
        cluster: Cluster,
        initial_list: fn(SegmentId) -> Op,
        cancel: CancellationToken,
    ) -> Self {
        Self {
            store,
            clock,
            cluster,
            initial_list,
            cancel,
            standing: Standing::always(),
            creating: Arc::default(),
        }
    }

    /// Nothing is changed while these claims are provisional (O3).
    #[must_use]
    pub fn under(mut self, standing: Standing) -> Self {
        self.standing = standing;
        self
    }

    /// The cluster as it was when the broker started.
    #[must_use]
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Now, milliseconds since the Unix epoch.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        self.clock.now().0
    }

    /// Bundles of the cluster (section 11).
    #[must_use]
    pub fn bundles(&self) -> u32 {
        self.cluster.bundles
    }

    /// The store below.
    #[must_use]
    pub fn store(&self) -> &SharedStore {
        &self.store
    }

    fn id_base(&self) -> u64 {
        self.cluster.generation_base_64()
    }

    async fn get<R: Record>(&self, key: &Key) -> Result<Option<(R, Revision)>, Refusal> {
        let (_, found) = self.store.get(key).await?;
        found.map(|found| Ok((R::decode_value(&found)?, found.mod_revision))).transpose()
    }

    /// A number from a counter, with the transaction that takes it.
    async fn next_id(&self, counter: &str) -> Result<(u64, Txn), Refusal> {
        let next =
            geminga_metadata::next_id(&self.store, &keys::counter(counter), self.id_base()).await?;
        Ok((next.id, next.txn))
    }

    /// The condition that a counter still stands as it does now.
    async fn unchanged(&self, counter: &str) -> Result<geminga_metadata::Compare, Refusal> {
        use geminga_metadata::Compare;
        let key = keys::counter(counter);
        let (_, found) = self.store.get(&key).await?;
        Ok(match found {
            Some(found) => Compare::ModRevision(key, found.mod_revision),
            None => Compare::Absent(key),
        })
    }

    /// True when the transaction stands, false when a condition did not hold (which may be its own effect: the caller
    /// reads again and judges what it finds).
    pub(crate) async fn commit(&self, txn: &Txn) -> Result<bool, Refusal> {
        if !self.standing.confirmed() {
            return Err(crate::ownership::provisional());
        }
        match timeout(COMMIT_DEADLINE, commit(&self.store, txn, &self.cancel)).await {
            Ok(Committed::Done(_)) => Ok(true),
            Ok(Committed::Conflict { .. }) => Ok(false),
            Ok(Committed::Refused(error)) => Err(error.into()),
            Ok(Committed::Unsettled) | Err(_) => Err(Refusal::new(
                Reason::DeadlineExceeded,
                "the metadata store did not answer in time; the change may still happen",
            )),
        }
    }

    async fn page<T>(
        &self,
        prefix: Key,
        after: Option<Key>,
        limit: usize,
        read: impl Fn(&KeyValue) -> Result<(T, String), Refusal>,
    ) -> Result<Listing<T>, Refusal> {
        let page = self.store.range(RangeRequest { prefix, after, limit, at: None }).await?;
        let mut items = Vec::with_capacity(page.items.len());
        let mut last = String::new();
        for item in &page.items {
            let (value, name) = read(item)?;
            items.push(value);
            last = name;
        }
        let next_page_token = if page.more { last } else { String::new() };
        Ok(Listing { items, next_page_token })
    }

    async fn is_empty(&self, prefix: Key) -> Result<bool, Refusal> {
        let page =
            self.store.range(RangeRequest { prefix, after: None, limit: 1, at: None }).await?;
        Ok(page.items.is_empty())
    }

    /// Keys below a prefix, counted page by page.
    async fn count(&self, prefix: Key) -> Result<usize, Refusal> {
        let mut count = 0;
        let mut after = None;
        loop {
            let request = RangeRequest { prefix: prefix.clone(), after, limit: 1_000, at: None };
            let page = self.store.range(request).await?;
            count += page.items.len();
            match page.items.last() {
                Some(last) if page.more => after = Some(last.key.clone()),
                _ => return Ok(count),
            }
        }
    }
}

fn contended(what: &str) -> Refusal {
    Refusal::new(Reason::MetadataUnavailable, format!("{what} is being changed by many; try again"))
}

fn bad_token() -> Refusal {
    Refusal::request("page_token is not one that this listing gave")
}

fn put<R: Record>(key: Key, record: &R) -> Op {
    Op::put(key, Bytes::from(record.encode_value()))
}

#[cfg(test)]
mod tests;
