//! Who owns what. Claims on bundles under this broker's lease are a hint (O1); what makes it safe is in the managed
//! ledger: the epoch in the list value and the fencing of ledgers (O2, O4).
//!
//! [`Ownership::segment`] is the one way to a segment: it claims the bundle if nobody has, loads the segment on first use,
//! one load at a time, and hands out the loaded one until it is fenced, the lease is lost, or its topic is deleted.

mod claims;
mod registry;
mod segment;

use std::{sync::Arc, time::Duration};

use geminga_managed_ledger::{LoadError, ManagedLedgers};
use geminga_metadata::{LeaseKeeper, SharedStore};
use geminga_proto::{ids::SegmentId, reason::Reason, v1::OwnerHint};
use geminga_runtime::tasks::Tasks;
use tokio::time::{Instant, timeout};

use crate::{catalog::Catalog, config::BrokerConfig, errors::Refusal, lifecycle, metrics::Metrics};

use claims::Claims;
use registry::{Registry, Turn};

pub use segment::Segment;

/// How often the backlog metric is brought up to date.
const BACKLOG_INTERVAL: Duration = Duration::from_secs(5);

/// The segments of this broker. Clones are handles to the same ones.
#[derive(Clone, Debug)]
pub struct Ownership {
    inner: Arc<Inner>,
}

/// What ownership needs.
#[derive(Clone, Debug)]
pub struct OwnershipParts {
    pub config: BrokerConfig,
    /// The instance uuid of this run of the broker.
    pub instance: [u8; 16],
    /// `host:port` for clients.
    pub address: String,
    pub store: SharedStore,
    pub catalog: Catalog,
    pub managed: ManagedLedgers,
    pub lease: LeaseKeeper,
    pub metrics: Metrics,
    pub tasks: Tasks,
}

#[derive(Debug)]
struct Inner {
    parts: OwnershipParts,
    claims: Claims,
    registry: Registry,
}

impl Ownership {
    /// Starts to own: segments are loaded when they are asked for.
    #[must_use]
    pub fn start(parts: OwnershipParts) -> Self {
        let claims = Claims::new(&parts);
        let tasks = parts.tasks.clone();
        let this = Self { inner: Arc::new(Inner { parts, claims, registry: Registry::default() }) };
        tasks.spawn("lease watcher", this.clone().watch_lease());
        tasks.spawn("backlog metric", this.clone().watch_backlog());
        this
    }

    /// The segment, loaded. Waits for a load that is under way, up to the configured deadline.
    ///
    /// # Errors
    /// NOT_OWNER with the owner; SEGMENT_LOADING with a delay; METADATA_UNAVAILABLE; NOT_ENOUGH_BOOKIES.
    pub async fn segment(&self, id: SegmentId) -> Result<Arc<Segment>, Refusal> {
        let mut state = match self.inner.registry.ask(id) {
            Turn::Served(segment) => return Ok(segment),
            Turn::Refused(refusal) => return Err(refusal),
            Turn::Wait(state) => state,
            Turn::Load(state) => {
                self.inner.parts.tasks.spawn("segment load", self.clone().load(id));
                state
            }
        };
        let wait = state.wait_for(Option::is_some);
        match timeout(self.inner.parts.config.limits.load_deadline, wait).await {
            Ok(Ok(result)) => result.clone().expect("waited for it"),
            Ok(Err(_)) => Err(loading(id)), // the load was aborted: the broker ends
            Err(_) => Err(loading(id)),
        }
    }

    /// The segments that are served now.
    #[must_use]
    pub fn served(&self) -> Vec<Arc<Segment>> {
        self.inner.registry.served()
    }

    /// A segment if it is loaded.
    #[must_use]
    pub fn loaded(&self, id: SegmentId) -> Option<Arc<Segment>> {
        self.inner.registry.loaded(id)
    }

    /// Where clients find a segment that nobody else has claimed.
    #[must_use]
    pub fn self_hint(&self, segment: u32, layout_epoch: u64) -> OwnerHint {
        OwnerHint { segment, address: self.inner.parts.address.clone(), layout_epoch }
    }

    /// Ends the segment's streams and forgets it, so that it can be deleted or taken elsewhere.
    pub async fn drop_segment(&self, id: SegmentId, why: Refusal) {
        if let Some(segment) = self.inner.registry.remove(id) {
            segment.end(why);
            segment.ledger().close().await;
            self.inner.parts.metrics.segments.dec();
        }
    }

    /// Deletes a segment's ledgers and list value (MD4). Safe to repeat.
    ///
    /// # Errors
    /// What kept it; the deletion goes on when called again.
    pub async fn delete_segment(&self, id: SegmentId, why: Refusal) -> Result<(), Refusal> {
        self.inner.claims.claim(id).await?;
        self.drop_segment(id, why).await;
        self.inner
            .parts
            .managed
            .delete(id)
            .await
            .map_err(|error| crate::storage_errors::of_delete(&error))
    }

    /// Closes every segment cleanly: what is pending is settled, ledgers are closed.
    pub async fn close(&self, why: Refusal) {
        let segments = self.inner.registry.served();
        futures::future::join_all(segments.iter().map(|s| self.drop_segment(s.id(), why.clone())))
            .await;
    }

    async fn load(self, id: SegmentId) {
        let begun = Instant::now();
        let result = self.try_load(id).await;
        let metrics = &self.inner.parts.metrics;
        match &result {
            Ok(segment) => {
                metrics.segment_load_duration.observe(begun.elapsed().as_secs_f64());
                metrics.segments.inc();
                tracing::info!(topic = %id.topic, segment = id.segment, epoch = segment.epoch().0, "segment served");
                let watcher = self.clone().watch_segment(Arc::clone(segment));
                self.inner.parts.tasks.spawn("segment watcher", watcher);
            }
            Err(refusal) => {
                tracing::warn!(topic = %id.topic, segment = id.segment, %refusal, "segment not loaded");
            }
        }
        self.inner.registry.loaded_with(id, result);
    }

    async fn try_load(&self, id: SegmentId) -> Result<Arc<Segment>, Refusal> {
        let parts = &self.inner.parts;
        let topic = parts.catalog.topic_by_id(id.topic).await?;
        let Some(topic) = topic.filter(|topic| !topic.deleting) else {
            let message = format!("topic {} does not exist", id.topic);
            return Err(Refusal::new(Reason::TopicNotFound, message));
        };
        let claim = self.inner.claims.claim(id).await.map_err(|mut refusal| {
            if let Some(owner) = &mut refusal.owner {
                owner.layout_epoch = topic.layout_epoch;
            }
            refusal
        })?;
        let ledger =
            parts.managed.load(id, claim).await.map_err(|error| self.load_refused(id, &error))?;
        let segment = Arc::new(Segment::new(id, topic.name, ledger));
        // C6: missing cursor records are written before the segment is served.
        lifecycle::restore_cursors(&parts.catalog, &segment).await?;
        Ok(segment)
    }

    fn load_refused(&self, id: SegmentId, error: &LoadError) -> Refusal {
        if crate::storage_errors::lost_claim(error) {
            self.inner.claims.forget(id);
        }
        crate::storage_errors::of_load(error)
    }

    /// Waits for a segment's end and takes it out of service; the next request loads it again.
    async fn watch_segment(self, segment: Arc<Segment>) {
        let why = segment.fenced().await;
        if self.inner.registry.fenced(segment.id(), &segment) {
            tracing::warn!(topic = %segment.id().topic, segment = segment.id().segment, %why, "segment fenced");
            self.inner.parts.metrics.segments.dec();
        }
        segment.end(why);
    }

    /// O1: without the lease nothing is ours. Everything is dropped, and claimed anew under the next lease.
    async fn watch_lease(self) {
        let mut lease = self.inner.parts.lease.watch();
        loop {
            if let Err(error) = self.inner.claims.register().await {
                tracing::warn!(%error, "broker not registered");
            }
            let held = *lease.borrow_and_update();
            if lease.changed().await.is_err() {
                return;
            }
            if held.is_some() && *lease.borrow() != held {
                tracing::warn!("ownership lease lost: every segment is dropped");
                self.inner.claims.clear();
                let why =
                    Refusal::new(Reason::SegmentFenced, "the broker lost its ownership lease");
                for segment in self.inner.registry.served() {
                    if self.inner.registry.remove(segment.id()).is_some() {
                        segment.end(why.clone());
                        self.inner.parts.metrics.segments.dec();
                    }
                }
            }
        }
    }

    async fn watch_backlog(self) {
        let metrics = &self.inner.parts.metrics;
        loop {
            tokio::time::sleep(BACKLOG_INTERVAL).await;
            metrics.backlog.clear();
            for segment in self.inner.registry.served() {
                segment.report_backlog(metrics);
            }
        }
    }
}

/// The segment is being recovered.
pub(crate) fn loading(id: SegmentId) -> Refusal {
    let message = format!("segment {} of topic {} is being recovered", id.segment, id.topic);
    Refusal::new(Reason::SegmentLoading, message).after(Duration::from_millis(500))
}
