//! Whether this broker's claims were confirmed a short while ago (O3), its registration, and what it does when its lease was
//! lost: one task owns all of it.

use std::{collections::BTreeSet, pin::Pin, time::Duration};

use futures::FutureExt;
use geminga_metadata::{LeaseId, TXN_OPS_MAX, keys};
use geminga_proto::{ids::Bundle, reason::Reason, storage::v1::ListValue};
use parking_lot::Mutex;
use prost::Message;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};

use super::Ownership;
use crate::errors::Refusal;

/// Time that a segment which is somebody else's now has to end.
const DROP_MAX: Duration = Duration::from_secs(10);

/// What is known of the claims' confirmation.
#[derive(Debug)]
pub(super) struct Confirmed {
    /// What `brokers/<id>` says: under which lease, and whether it drains.
    registered: watch::Sender<Option<(LeaseId, bool)>>,
    /// Bundles claimed again whose segments were not compared with the store yet.
    unverified: Mutex<BTreeSet<Bundle>>,
    ready: watch::Sender<bool>,
}

impl Default for Confirmed {
    fn default() -> Self {
        Self {
            registered: watch::Sender::new(None),
            unverified: Mutex::default(),
            ready: watch::Sender::new(false),
        }
    }
}

impl Confirmed {
    pub(super) fn ready(&self) -> watch::Receiver<bool> {
        self.ready.subscribe()
    }

    pub(super) async fn registered_once(&self) {
        let mut registered = self.registered.subscribe();
        let _ended = registered.wait_for(Option::is_some).await;
    }
}

type Confirming = Pin<Box<dyn Future<Output = Option<Instant>> + Send>>;

enum Event {
    Lease,
    Due,
    Overdue,
    Members,
    /// When the reading that confirmed everything was sent, if it did.
    Confirmed(Option<Instant>),
}

impl Ownership {
    /// Confirms all claims every third of the lease's length by one linearizable range read, timed from when it was sent;
    /// unconfirmed for 0.8 of it they are provisional (O3).
    pub(super) async fn keep_standing(self) {
        let parts = &self.inner.parts;
        let ttl = parts.config.lease_ttl.max(Duration::from_secs(1));
        let mut lease = parts.lease.watch();
        let mut members = self.inner.members.version();
        let (mut confirmed_at, mut due) = (Instant::now(), Instant::now());
        let mut confirming: Option<Confirming> = None;
        loop {
            let overdue = confirmed_at + ttl * 4 / 5;
            let event = tokio::select! {
                biased;
                at = pending(&mut confirming) => Event::Confirmed(at),
                changed = lease.changed() => match changed {
                    Ok(()) => Event::Lease,
                    Err(_) => return,
                },
                () = sleep_until(overdue), if parts.standing.confirmed() && parts.told.is_some() => {
                    Event::Overdue
                }
                () = sleep_until(due), if confirming.is_none() => Event::Due,
                changed = members.changed() => match changed {
                    Ok(()) => Event::Members,
                    Err(_) => return,
                },
            };
            match event {
                Event::Confirmed(at) => {
                    confirming = None;
                    due = Instant::now() + if at.is_some() { ttl / 3 } else { ttl / 12 };
                    if let Some(at) = at {
                        confirmed_at = at;
                        self.tell_standing(true);
                    }
                    if self.registration_is_old() {
                        due = Instant::now();
                    }
                }
                // Registered anew, and what ran out is claimed again: others leave it to us for a moment only.
                Event::Lease => {
                    self.registration_is_old();
                    (confirming, due) = (None, Instant::now());
                }
                Event::Due => {
                    let confirm = timeout(ttl / 3, self.clone().confirm());
                    confirming = Some(confirm.map(|at| at.unwrap_or(None)).boxed());
                }
                Event::Overdue => {
                    tracing::warn!("claims are provisional: the metadata store confirms nothing");
                    self.tell_standing(false);
                }
                Event::Members => {
                    let held = self.inner.claims.held();
                    let held = held.iter().map(|(bundle, held)| (*bundle, held.create_revision));
                    if self.registration_is_old() || self.inner.members.any_foreign(held) {
                        due = due.min(Instant::now() + ttl / 12);
                    }
                }
            }
        }
    }

    fn tell_standing(&self, confirmed: bool) {
        let parts = &self.inner.parts;
        parts.setter.set(confirmed);
        if let Some(told) = &parts.told {
            told.set(confirmed);
        }
        parts.metrics.provisional.set(i64::from(!confirmed));
    }

    /// Whether this broker takes no bundle and gives its own away.
    pub(super) fn drains(&self) -> bool {
        *self.inner.stopping.borrow() || self.inner.members.wished_away()
    }

    /// Whether `brokers/<id>` does not say what is so; tells readiness on the way.
    pub(super) fn registration_is_old(&self) -> bool {
        let (lease, drains) = (self.inner.parts.lease.current(), self.drains());
        let registered = *self.inner.confirmed.registered.borrow();
        let old = registered != lease.map(|lease| (lease, drains));
        self.inner.confirmed.ready.send_if_modified(|ready| {
            let is = lease.is_some() && !old && !drains;
            std::mem::replace(ready, is) != is
        });
        old
    }

    /// One round: registration, all claims by one reading, what ran out. The time it was sent, if everything is confirmed.
    async fn confirm(self) -> Option<Instant> {
        let sent = Instant::now();
        match self.try_confirm().await {
            Ok(()) => Some(sent),
            Err(refusal) => {
                tracing::debug!(%refusal, "claims not confirmed");
                None
            }
        }
    }

    async fn try_confirm(&self) -> Result<(), Refusal> {
        let inner = &self.inner;
        let Some(lease) = inner.parts.lease.current() else {
            return Err(Refusal::new(Reason::MetadataUnavailable, "no lease is held"));
        };
        let drains = self.drains();
        let registered = *inner.confirmed.registered.borrow();
        if registered != Some((lease, drains)) {
            inner.claims.register(lease, drains).await?;
            inner.confirmed.registered.send_replace(Some((lease, drains)));
        }
        let review = inner.claims.review(lease).await?;
        for bundle in review.foreign {
            inner.claims.forget(bundle);
            self.drop_bundle(bundle, "another broker claims its bundle");
        }
        if !review.missing.is_empty() {
            let (again, lost) = inner.claims.make_again(&review.missing, lease).await?;
            tracing::warn!(again = again.len(), lost = lost.len(), "claims had run out");
            inner.parts.metrics.bundles_reclaimed.inc_by(again.len() as u64);
            inner.confirmed.unverified.lock().extend(again);
            for bundle in lost {
                self.drop_bundle(bundle, "another broker claimed its bundle");
            }
        }
        self.verify().await?;
        let held = inner.claims.held().len();
        inner.parts.metrics.bundles.set(i64::try_from(held).unwrap_or(i64::MAX));
        Ok(())
    }

    /// O3: of the bundles claimed again, each segment whose list epoch is still its own goes on; every other goes through
    /// O4 when it is asked for. Epochs of one list are handed out by compare-and-swap, so equal ones are the same (O2).
    async fn verify(&self) -> Result<(), Refusal> {
        let inner = &self.inner;
        let unverified = inner.confirmed.unverified.lock().clone();
        let segments = inner.registry.served();
        let segments: Vec<_> =
            segments.into_iter().filter(|s| unverified.contains(&self.bundle(s.id()))).collect();
        for batch in segments.chunks(TXN_OPS_MAX) {
            let lists: Vec<_> = batch.iter().map(|s| keys::segment_list(s.id())).collect();
            let (_, found) = inner.parts.store.get_many(&lists).await?;
            for (segment, found) in batch.iter().zip(found) {
                let list = found.and_then(|found| ListValue::decode(found.value).ok());
                if list.is_none_or(|list| list.epoch != segment.epoch().0) {
                    self.drop_foreign(segment.id(), "another owner took it meanwhile");
                }
            }
        }
        inner.confirmed.unverified.lock().retain(|bundle| !unverified.contains(bundle));
        Ok(())
    }

    /// A foreign claim ends what is served of the bundle: its streams close, its log does no more (O3).
    fn drop_bundle(&self, bundle: Bundle, why: &'static str) {
        for segment in self.inner.registry.served() {
            if self.bundle(segment.id()) == bundle {
                self.drop_foreign(segment.id(), why);
            }
        }
    }

    fn drop_foreign(&self, id: geminga_proto::ids::SegmentId, why: &'static str) {
        tracing::warn!(topic = %id.topic, segment = id.segment, why, "segment dropped");
        let (this, refusal) = (self.clone(), Refusal::new(Reason::SegmentFenced, why));
        let drop = async move {
            let _late = timeout(DROP_MAX, this.drop_segment(id, refusal)).await;
        };
        self.inner.parts.tasks.spawn("segment drop", drop);
    }
}

async fn pending(confirming: &mut Option<Confirming>) -> Option<Instant> {
    match confirming {
        Some(confirming) => confirming.as_mut().await,
        None => std::future::pending().await,
    }
}
