//! What all segments of a broker share.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use geminga_bookie_client::LedgerClient;
use geminga_metadata::{IdBlocks, Op, SharedStore, keys};
use geminga_proto::ids::{SegmentId, generation_base_64};
use geminga_runtime::{budget::ByteBudget, clock::SharedClock, random::Random, tasks::Tasks};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    config::ManagedLedgerConfig,
    error::LoadError,
    list::List,
    load,
    metrics::ManagedLedgerMetrics,
    offload::{ColdStorage, object::ColdReader},
    segment::ManagedLedger,
    types::Claim,
};

/// What managed ledgers are made of.
#[derive(Debug)]
pub struct ManagedLedgersParts {
    pub client: LedgerClient,
    pub store: SharedStore,
    pub clock: SharedClock,
    pub random: Random,
    /// Owner of the segments' tasks: `abort` on it is the owner's kill -9.
    pub tasks: Tasks,
    pub config: ManagedLedgerConfig,
    pub metrics: ManagedLedgerMetrics,
    /// Where old ledgers go; without one nothing is offloaded, and what was is not readable here.
    pub cold: Option<ColdStorage>,
}

/// Loads and deletes segments. Clones share everything.
#[derive(Clone, Debug)]
pub struct ManagedLedgers(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    parts: ManagedLedgersParts,
    ledger_ids: IdBlocks,
    cache_bytes: ByteBudget,
    catch_up_bytes: ByteBudget,
    offload_bytes: ByteBudget,
    /// One compaction at a time.
    compaction: Arc<Semaphore>,
    /// Published and read so far, bytes; it wraps.
    traffic: AtomicU64,
    cold: Option<Arc<ColdReader>>,
}

/// Ledger ids are taken from the store in blocks of this many (section 2).
const LEDGER_IDS_BLOCK: u64 = 1_000;

impl ManagedLedgers {
    /// The factory of a broker.
    #[must_use]
    pub fn new(parts: ManagedLedgersParts) -> Self {
        let base = generation_base_64(parts.config.generation);
        let ledger_ids =
            IdBlocks::new(parts.store.clone(), keys::counter("ledger"), LEDGER_IDS_BLOCK, base);
        let cache_bytes = ByteBudget::new(parts.config.cache_bytes);
        let catch_up_bytes = ByteBudget::new(parts.config.catch_up_cache_bytes);
        let offload_bytes = ByteBudget::new(parts.config.offload_bytes);
        let reader = |cold: &ColdStorage| {
            let (index, blocks) =
                (parts.config.object_index_bytes, parts.config.object_block_bytes);
            Arc::new(ColdReader::new(cold.clone(), index, blocks, parts.metrics.clone()))
        };
        let cold = parts.cold.as_ref().map(reader);
        Self(Arc::new(Inner {
            parts,
            ledger_ids,
            cache_bytes,
            catch_up_bytes,
            offload_bytes,
            compaction: Arc::new(Semaphore::new(1)),
            traffic: AtomicU64::new(0),
            cold,
        }))
    }

    /// The list value of a new segment, for the transaction that creates its topic.
    #[must_use]
    pub fn initial_list(segment: SegmentId) -> Op {
        let value = List::empty().encode().expect("an empty list is small");
        Op::put(keys::segment_list(segment), value)
    }

    /// Takes the segment over and loads it (O2, O4): recovery, cursors, deduplication; nothing is served before.
    ///
    /// # Errors
    /// [`LoadError`]; may be repeated.
    pub async fn load(&self, segment: SegmentId, claim: Claim) -> Result<ManagedLedger, LoadError> {
        let begun = Instant::now();
        let taken = self.take_over(segment, Some(&claim)).await?;
        let loaded = load::load(self, segment, taken).await?;
        self.parts().metrics.load_duration.observe(begun.elapsed().as_secs_f64());
        Ok(loaded)
    }

    pub(crate) fn parts(&self) -> &ManagedLedgersParts {
        &self.0.parts
    }

    pub(crate) fn ledger_ids(&self) -> &IdBlocks {
        &self.0.ledger_ids
    }

    pub(crate) fn cache_bytes(&self) -> &ByteBudget {
        &self.0.cache_bytes
    }

    /// Taken by what is kept of reads behind the tail.
    pub(crate) fn catch_up_bytes(&self) -> &ByteBudget {
        &self.0.catch_up_bytes
    }

    /// So much was published or read.
    pub(crate) fn note_traffic(&self, bytes: u64) {
        self.0.traffic.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Published and read so far, bytes; it wraps.
    pub(crate) fn traffic_bytes(&self) -> u64 {
        self.0.traffic.load(Ordering::Relaxed)
    }

    /// Waits until no other segment of this broker is being compacted.
    pub(crate) fn compaction_turn(&self) -> impl Future<Output = OwnedSemaphorePermit> + use<> {
        let turns = Arc::clone(&self.0.compaction);
        async move { turns.acquire_owned().await.expect("the semaphore is never closed") }
    }

    /// Taken by uploads.
    pub(crate) fn offload_bytes(&self) -> &ByteBudget {
        &self.0.offload_bytes
    }

    pub(crate) fn cold(&self) -> Option<ColdStorage> {
        self.0.parts.cold.clone()
    }

    pub(crate) fn cold_reader(&self) -> Option<&Arc<ColdReader>> {
        self.0.cold.as_ref()
    }

    pub(crate) fn cancel(&self) -> CancellationToken {
        self.0.parts.tasks.token()
    }
}
