//! Who owns what. Claims on bundles under this broker's lease are a hint (O1); what makes it safe is in the managed
//! ledger: the epoch in the list value and the fencing of ledgers (O2, O4).
//!
//! ```text
//! placement   whose a bundle should be, and when a dead owner's may be taken (pure)
//! members     who is there, who claims what: a mirror, for hints
//! claims      our claims: made, confirmed, made again, given back
//! standing    confirms them in time, or says that they are provisional (O3)
//! balance     which bundles should be another broker's (pure), moves hands them over
//! ```
//! [`Ownership::segment`] is the one way to a segment: it claims the bundle if it is this broker's to claim, loads the
//! segment on first use, one load at a time, and hands out the loaded one until it is fenced, moved, or its topic is
//! deleted. [`Ownership::find`] says where a segment is instead, for those who can go there.

mod balance;
mod claims;
mod members;
mod moves;
mod placement;
mod registry;
mod repair;
mod segment;
mod standing;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use geminga_managed_ledger::{Claim as LedgerClaim, LoadError, ManagedLedgers};
use geminga_metadata::{LeaseKeeper, SharedStore, Standing, StandingSetter};
use geminga_proto::{
    ids::{Bundle, SegmentId},
    reason::Reason,
    v1::{HeldBy, OwnerHint},
};
use geminga_runtime::tasks::Tasks;
use parking_lot::Mutex;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

use crate::{
    catalog::Catalog,
    config::BrokerConfig,
    errors::Refusal,
    lifecycle,
    metrics::{BlockedBy, Metrics},
    relay::Peers,
};

use claims::{Claims, Identity, Made};
pub(crate) use members::{ClaimSeen, Members};
use placement::{Member, Verdict};
use registry::{Registry, Turn};
use standing::Confirmed;

pub(crate) use segment::Attending;
pub use segment::Segment;

/// How often the backlog metric is brought up to date.
const BACKLOG_INTERVAL: Duration = Duration::from_secs(5);
/// Time for the exact lease tables of a segment that ends cleanly (L4); what is late is delivered again.
const LEASES_MAX: Duration = Duration::from_secs(3);
/// Tries of one claim; each lost one means that somebody else wrote the key.
const TRIES_MAX: u32 = 8;
/// Pause before a claim that is about to fall is looked at again.
const EXPECT_POLL: Duration = Duration::from_millis(20);
/// Delay told to those who ask for what is refused while claims are provisional.
const PROVISIONAL_DELAY: Duration = Duration::from_millis(500);

/// The segments of this broker. Clones are handles to the same ones.
#[derive(Clone, Debug)]
pub struct Ownership {
    inner: Arc<Inner>,
}

/// What ownership needs.
#[derive(Debug)]
pub(crate) struct OwnershipParts {
    pub(crate) config: BrokerConfig,
    /// The instance uuid of this run of the broker.
    pub(crate) instance: [u8; 16],
    /// `host:port` for clients.
    pub(crate) address: String,
    pub(crate) started_at_ms: u64,
    pub(crate) store: SharedStore,
    pub(crate) catalog: Catalog,
    pub(crate) managed: ManagedLedgers,
    pub(crate) lease: LeaseKeeper,
    /// What others are told of O3; none: an embedded store, which never goes away alone.
    pub(crate) told: Option<StandingSetter>,
    /// The broker's own pair: set here, read by the catalog.
    pub(crate) setter: StandingSetter,
    pub(crate) standing: Standing,
    pub(crate) peers: Peers,
    pub(crate) metrics: Metrics,
    pub(crate) tasks: Tasks,
}

#[derive(Debug)]
struct Inner {
    parts: OwnershipParts,
    instance: Bytes,
    members: Members,
    claims: Claims,
    registry: Registry,
    confirmed: Confirmed,
    /// Bundles on their way to another broker.
    leaving: Mutex<BTreeMap<Bundle, Member>>,
    /// Bundles that another broker is about to give to us, and until when it has.
    expected: Mutex<BTreeMap<Bundle, Instant>>,
    /// Grows with every segment that comes into service.
    loads: watch::Sender<u64>,
    /// The broker is stopping: it takes nothing and gives everything away.
    stopping: watch::Sender<bool>,
}

/// Where a segment is.
#[derive(Clone, Debug)]
pub(crate) enum Found {
    Here(Arc<Segment>),
    Elsewhere(OwnerHint),
}

impl Ownership {
    /// Starts to own: segments are loaded when they are asked for.
    pub(crate) fn start(parts: OwnershipParts) -> Self {
        let instance = Bytes::copy_from_slice(&parts.instance);
        let me = Identity {
            broker: parts.config.id.clone(),
            instance: instance.clone(),
            address: parts.address.clone(),
            started_at_ms: parts.started_at_ms,
        };
        let member =
            Member { instance: instance.clone(), address: me.address.clone(), draining: false };
        let members = Members::start(&parts.store, (me.broker.clone(), member), &parts.tasks);
        let claims = Claims::new(&parts, me);
        let tasks = parts.tasks.clone();
        let inner = Inner {
            parts,
            instance,
            members,
            claims,
            registry: Registry::default(),
            confirmed: Confirmed::default(),
            leaving: Mutex::default(),
            expected: Mutex::default(),
            loads: watch::Sender::new(0),
            stopping: watch::Sender::new(false),
        };
        let this = Self { inner: Arc::new(inner) };
        tasks.spawn("claims", this.clone().keep_standing());
        tasks.spawn("balance", this.clone().keep_balance());
        tasks.spawn("repair asks", this.clone().roll_what_lacks_copies());
        tasks.spawn("backlog metric", this.clone().watch_backlog());
        this
    }

    /// Who is there, and who claims what, as last seen.
    pub(crate) fn members(&self) -> &Members {
        &self.inner.members
    }

    /// Whether this broker is registered under the lease that it holds, and takes bundles.
    #[must_use]
    pub fn ready(&self) -> watch::Receiver<bool> {
        self.inner.confirmed.ready()
    }

    /// Resolves when the broker is registered for the first time. Cancel-safe.
    pub(crate) async fn registered(&self) {
        self.inner.confirmed.registered_once().await;
    }

    fn bundle(&self, id: SegmentId) -> Bundle {
        id.bundle(self.inner.parts.catalog.bundles())
    }

    /// The segment, loaded. Waits for a load that is under way, up to the configured deadline.
    ///
    /// # Errors
    /// NOT_OWNER with the owner; SEGMENT_LOADING with a delay; METADATA_UNAVAILABLE; NOT_ENOUGH_BOOKIES.
    pub async fn segment(&self, id: SegmentId) -> Result<Arc<Segment>, Refusal> {
        if let Some(to) = self.leaving(id) {
            return Err(not_owner(id, &to));
        }
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

    /// Where the segment is: here, loaded, or at the broker that claims it or should. A claim seen by the mirror is enough to
    /// send somebody there, also while the store is away; what it does not know is read from the store.
    ///
    /// # Errors
    /// As [`Self::segment`], without NOT_OWNER.
    pub(crate) async fn find(&self, id: SegmentId) -> Result<Found, Refusal> {
        if let Some(to) = self.leaving(id) {
            return Ok(Found::Elsewhere(to));
        }
        if let Some(segment) = self.loaded(id) {
            return Ok(Found::Here(segment));
        }
        match self.claimed_elsewhere(id) {
            Some(owner) => Ok(Found::Elsewhere(owner)),
            None => self.find_again(id).await,
        }
    }

    /// As [`Self::find`], by the store alone: what the mirror said was wrong.
    ///
    /// # Errors
    /// The same.
    pub(crate) async fn find_again(&self, id: SegmentId) -> Result<Found, Refusal> {
        match self.segment(id).await {
            Ok(segment) => Ok(Found::Here(segment)),
            Err(Refusal { reason: Reason::NotOwner, owner: Some(owner), .. }) => {
                Ok(Found::Elsewhere(owner))
            }
            Err(refusal) => Err(refusal),
        }
    }

    /// The other broker that claims the segment's bundle and is registered, by the mirror. None when it has announced that
    /// it gives the bundle to this one.
    pub(crate) fn claimed_elsewhere(&self, id: SegmentId) -> Option<OwnerHint> {
        let inner = &self.inner;
        if self.expects(self.bundle(id)) {
            return None;
        }
        let ClaimSeen { broker, instance, address, .. } =
            inner.members.claim_of(self.bundle(id))?;
        let stands = instance != inner.instance && inner.members.is_registered(&broker, &instance);
        stands.then(|| hint(id, address))
    }

    /// Where clients find a segment: at the broker that claims its bundle, else at the one that should.
    pub(crate) fn hint(&self, id: SegmentId, layout_epoch: u64) -> OwnerHint {
        let members = &self.inner.members;
        let claimed = members.claim_of(self.bundle(id)).map(|claim| claim.address);
        let placed = || members.preferred(self.bundle(id), false).map(|(_, member)| member.address);
        let address = claimed.or_else(placed).unwrap_or_else(|| self.inner.parts.address.clone());
        OwnerHint { segment: id.segment, address, layout_epoch }
    }

    /// Where a segment goes when this broker stops; none: nobody else is there.
    pub(crate) fn next_owner(&self, id: SegmentId) -> Option<OwnerHint> {
        let (_, member) = self.inner.members.preferred(self.bundle(id), true)?;
        Some(hint(id, member.address))
    }

    /// Changes with every segment that comes into service.
    pub(crate) fn loads(&self) -> watch::Receiver<u64> {
        self.inner.loads.subscribe()
    }

    /// What the segments here are made of.
    pub(crate) fn managed(&self) -> &ManagedLedgers {
        &self.inner.parts.managed
    }

    /// Whether this broker is the one that should own the segment, as far as it knows. A hint.
    pub(crate) fn is_placed_here(&self, id: SegmentId) -> bool {
        let preferred = self.inner.members.preferred(self.bundle(id), false);
        preferred.is_some_and(|(broker, _)| broker == self.inner.parts.config.id)
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

    /// Ends the segment's streams and forgets it, so that it can be deleted or taken elsewhere.
    pub async fn drop_segment(&self, id: SegmentId, why: Refusal) {
        if let Some(segment) = self.inner.registry.remove(id) {
            let _late = timeout(LEASES_MAX, segment.dispatchers().stop()).await;
            segment.end(why);
            segment.ledger().close().await;
            self.inner.parts.metrics.segments.dec();
        }
    }

    /// Deletes a segment's ledgers and list value (MD4). Safe to repeat.
    ///
    /// # Errors
    /// NOT_OWNER with the owner; what kept it; the deletion goes on when called again.
    pub async fn delete_segment(&self, id: SegmentId, why: Refusal) -> Result<(), Refusal> {
        if let Some(to) = self.leaving(id) {
            return Err(not_owner(id, &to));
        }
        self.claim(id).await?;
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

    /// The claim on the segment's bundle: held, or made now if it is this broker's to make.
    async fn claim(&self, id: SegmentId) -> Result<LedgerClaim, Refusal> {
        let (inner, bundle) = (&self.inner, self.bundle(id));
        if !inner.parts.standing.confirmed() {
            return Err(provisional());
        }
        let Some(lease) = inner.parts.lease.current() else {
            let message = "the broker holds no ownership lease";
            return Err(Refusal::new(Reason::MetadataUnavailable, message));
        };
        if let Some(claim) = inner.claims.held_under(bundle, lease) {
            return Ok(claim);
        }
        if inner.claims.is_held(bundle) {
            return Err(loading(id)); // the lease changed: the claim is being made again
        }
        let mut tries = 0;
        while tries < TRIES_MAX {
            let found = match inner.claims.read(bundle).await? {
                Some(found) => found,
                None => match self.unclaimed(bundle) {
                    Verdict::Elsewhere(_, member) => {
                        return Err(not_owner(id, &hint(id, member.address)));
                    }
                    Verdict::Wait(left) => {
                        sleep(left).await;
                        continue;
                    }
                    Verdict::Take => match inner.claims.make(bundle, lease).await? {
                        Made::Ours(claim) => {
                            inner.expected.lock().remove(&bundle);
                            return Ok(claim);
                        }
                        Made::Theirs(found) => found,
                    },
                },
            };
            if inner.claims.is_mine(&found) && found.lease == Some(lease) {
                return Ok(inner.claims.adopt(bundle, lease, &found));
            }
            if inner.claims.is_mine(&found) || found.claim.broker == inner.parts.config.id {
                return Err(loading(id)); // of an earlier lease or run of this broker; it goes with that lease
            }
            if !self.expects(bundle) {
                return Err(not_owner(id, &hint(id, found.claim.address)));
            }
            sleep(EXPECT_POLL).await; // it was announced, and has an end
            tries += u32::from(!self.expects(bundle));
        }
        Err(loading(id))
    }

    fn unclaimed(&self, bundle: Bundle) -> Verdict {
        let members = &self.inner.members;
        if *self.inner.stopping.borrow()
            && let Some((id, member)) = members.preferred(bundle, true)
        {
            return Verdict::Elsewhere(id, member);
        }
        if self.expects(bundle) { Verdict::Take } else { members.unclaimed(bundle) }
    }

    /// Where the bundle is going.
    fn leaving(&self, id: SegmentId) -> Option<OwnerHint> {
        let leaving = self.inner.leaving.lock();
        leaving.get(&self.bundle(id)).map(|member| hint(id, member.address.clone()))
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
            Err(refusal) if refusal.reason == Reason::NotOwner => {}
            Err(refusal) => {
                tracing::warn!(topic = %id.topic, segment = id.segment, %refusal, "segment not loaded");
            }
        }
        let served = result.is_ok();
        self.inner.registry.loaded_with(id, result);
        if served {
            self.inner.loads.send_modify(|loads| *loads += 1);
        }
    }

    async fn try_load(&self, id: SegmentId) -> Result<Arc<Segment>, Refusal> {
        let parts = &self.inner.parts;
        let topic = parts.catalog.topic_by_id(id.topic).await?;
        let Some(topic) = topic.filter(|topic| !topic.deleting) else {
            let message = format!("topic {} does not exist", id.topic);
            return Err(Refusal::new(Reason::TopicNotFound, message));
        };
        let claim = self.claim(id).await.map_err(|mut refusal| {
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
            self.inner.claims.forget(self.bundle(id));
        }
        crate::storage_errors::of_load(error)
    }

    /// Waits for a segment's end and takes it out of service; the next request loads it again.
    async fn watch_segment(self, segment: Arc<Segment>) {
        let why = segment.fenced().await;
        if self.inner.registry.fenced(segment.id(), &segment) {
            tracing::warn!(topic = %segment.id().topic, segment = segment.id().segment, %why, "segment fenced");
            self.inner.parts.metrics.segments.dec();
            segment.end(why);
        }
        // Else somebody took it out on purpose, and ends it with a better reason.
    }

    async fn watch_backlog(self) {
        let metrics = &self.inner.parts.metrics;
        loop {
            sleep(BACKLOG_INTERVAL).await;
            for family in [&metrics.backlog, &metrics.backlog_bytes, &metrics.backlog_age] {
                family.clear();
            }
            let now_ms = self.inner.parts.catalog.now_ms();
            // A cause that holds nothing up now is a zero, not a gap.
            for by in (2..).map_while(|number| HeldBy::try_from(number).ok()) {
                metrics.blocked.get_or_create(&BlockedBy { by: by.as_str_name() }).set(0);
            }
            let (mut delayed, mut consumers) = (0, 0);
            for segment in self.inner.registry.served() {
                segment.report_backlog(metrics, now_ms);
                for seen in segment.dispatchers().all_seen() {
                    delayed += seen.delayed;
                    consumers += u64::from(seen.consumers);
                    if let Some(by) = seen.blocked {
                        metrics.blocked.get_or_create(&BlockedBy { by }).inc();
                    }
                }
            }
            metrics.delayed.set(i64::try_from(delayed).unwrap_or(i64::MAX));
            metrics.consumers.set(i64::try_from(consumers).unwrap_or(i64::MAX));
        }
    }
}

/// The segment is being recovered.
pub(crate) fn loading(id: SegmentId) -> Refusal {
    let message = format!("segment {} of topic {} is being recovered", id.segment, id.topic);
    Refusal::new(Reason::SegmentLoading, message).after(Duration::from_millis(500))
}

/// O3: nothing is started that changes the store.
pub(crate) fn provisional() -> Refusal {
    let message = "the broker's claims are not confirmed by the metadata store; changes wait";
    Refusal::new(Reason::MetadataUnavailable, message).after(PROVISIONAL_DELAY)
}

/// Somebody else serves the segment, or is to.
pub(crate) fn not_owner(id: SegmentId, owner: &OwnerHint) -> Refusal {
    let message = format!("segment {} is served at {}", id.segment, owner.address);
    Refusal::new(Reason::NotOwner, message).owned_by(owner.clone())
}

fn hint(id: SegmentId, address: String) -> OwnerHint {
    OwnerHint { segment: id.segment, address, layout_epoch: 0 }
}
