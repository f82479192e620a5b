//! Planned moves: a bundle is handed to another broker without an error at the client.
//!
//! ```text
//! here                                     there
//! Expect ────────────────────────────────► waits for the claim instead of sending clients back
//! new opens are sent there
//! GoAway{owner, drain_by} to the streams   (clients finish, and open there)
//! what was accepted is finished, ledgers are closed
//! claim deleted, by its create revision ─► claims, takes over: nothing to recover (TK1)
//! Take ──────────────────────────────────► loads what was loaded here
//! ```

use std::{sync::Arc, time::Duration};

use futures::{StreamExt, stream};
use geminga_proto::{
    ids::{Bundle, SegmentId},
    internal::v1::{
        SegmentRequest,
        segment_request::{Expect, Take, Verb},
    },
    reason::Reason,
};
use tokio::time::{Instant, sleep, timeout};

use super::{
    Ownership, Segment,
    balance::{Move, Situation, plan},
    hint, not_owner,
};
use crate::errors::Refusal;

/// Bundles that are handed over at the same time.
const MOVES_AT_ONCE: usize = 4;
/// Time to finish what was accepted and close the ledgers; then the next owner recovers them.
const CLOSE_MAX: Duration = Duration::from_secs(10);
/// Longest that a broker waits for a bundle that was announced to it.
const EXPECT_MAX: Duration = Duration::from_secs(60);
/// Time for a call to the broker that a bundle goes to.
const TELL_MAX: Duration = Duration::from_secs(2);

impl Ownership {
    /// Gives away what should be somebody else's, round by round.
    pub(super) async fn keep_balance(self) {
        let ttl = self.inner.parts.config.lease_ttl.max(Duration::from_secs(1));
        let drain = self.inner.parts.config.move_drain;
        loop {
            sleep(ttl / 4).await;
            // A broker that stops hands over by itself; one whose claims are provisional changes nothing (O3).
            if !*self.inner.stopping.borrow() && self.inner.parts.standing.confirmed() {
                self.hand_over_all(self.moves(ttl), drain).await;
            }
        }
    }

    /// Gives everything away because the broker stops, until `deadline`. Its registration says so first; nothing new is
    /// taken from now on.
    pub(crate) async fn stop(&self, deadline: Instant) {
        self.inner.stopping.send_replace(true);
        let hand_over = async {
            self.registration_is_old(); // readiness goes first
            if let Some(lease) = self.inner.parts.lease.current() {
                let _told_or_late =
                    timeout(TELL_MAX, self.inner.claims.register(lease, true)).await;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let config = &self.inner.parts.config;
            self.successor(Instant::now() + config.successor_wait.min(left / 3)).await;
            let left = deadline.saturating_duration_since(Instant::now());
            let drain = config.move_drain.min(left / 2);
            self.hand_over_all(self.moves(config.lease_ttl), drain).await;
        };
        if tokio::time::timeout_at(deadline, hand_over).await.is_err() {
            tracing::warn!("not everything was handed over in time");
        }
    }

    /// Waits until there is a broker to hand over to; meanwhile what is loaded here is served. Where pods are replaced, the next
    /// one is on its way. Not beyond `end`, and not where nothing is loaded.
    async fn successor(&self, end: Instant) {
        let mut version = self.inner.members.version();
        let ttl = self.inner.parts.config.lease_ttl;
        let nobody = || !self.served().is_empty() && self.moves(ttl).is_empty();
        if nobody() && Instant::now() < end {
            tracing::info!("no other broker is there: serving on until one comes, for a while");
        }
        while nobody() {
            if !matches!(tokio::time::timeout_at(end, version.changed()).await, Ok(Ok(()))) {
                return;
            }
        }
    }

    fn moves(&self, ttl: Duration) -> Vec<Move> {
        let held = self.inner.claims.held();
        let held = held.into_iter().map(|(bundle, held)| (bundle, held.since)).collect();
        plan(&Situation {
            view: &self.inner.members.view(),
            me: &self.inner.parts.config.id,
            drains: self.drains(),
            stable_since: self.inner.members.stable_since(),
            held: &held,
            ttl,
            now: Instant::now(),
        })
    }

    async fn hand_over_all(&self, moves: Vec<Move>, drain: Duration) {
        let over = moves.into_iter().map(|(bundle, to, member)| async move {
            match self.hand_over(bundle, &member, drain).await {
                Ok(()) => {
                    self.inner.parts.metrics.bundles_moved.inc();
                    tracing::info!(bundle = bundle.0, to, "bundle handed over");
                }
                Err(refusal) => {
                    tracing::warn!(bundle = bundle.0, to, %refusal, "bundle not handed over");
                }
            }
            self.inner.leaving.lock().remove(&bundle);
        });
        stream::iter(over).buffer_unordered(MOVES_AT_ONCE).collect::<Vec<()>>().await;
    }

    async fn hand_over(
        &self,
        bundle: Bundle,
        to: &super::Member,
        drain: Duration,
    ) -> Result<(), Refusal> {
        let inner = &self.inner;
        if let Some(one) = self.loaded_of(bundle).first() {
            // The claim must fall in time, or clients would be sent to and fro.
            let within = u32::try_from((drain + CLOSE_MAX).as_millis()).unwrap_or(u32::MAX);
            let verb = Verb::Expect(Expect { within_ms: within });
            self.tell(&to.address, one.id(), verb).await?;
        }
        inner.leaving.lock().insert(bundle, to.clone());
        for mut load in inner.registry.loading(|id| self.bundle(id) == bundle) {
            let done = load.wait_for(Option::is_some);
            let _late = timeout(inner.parts.config.limits.load_deadline, done).await;
        }
        let segments = self.loaded_of(bundle);
        let until = Instant::now() + drain;
        for segment in &segments {
            segment.move_to(hint(segment.id(), to.address.clone()), until);
        }
        for segment in &segments {
            let _late = tokio::time::timeout_at(until, segment.deserted()).await;
            self.close_moved(segment, to).await;
        }
        if !inner.claims.release(bundle).await? {
            return Err(Refusal::internal("a bundle that was handed over was not held"));
        }
        for segment in segments {
            let (this, address) = (self.clone(), to.address.clone());
            let take = async move {
                if let Err(refusal) = this.tell(&address, segment.id(), Verb::Take(Take {})).await {
                    tracing::debug!(%refusal, "the next owner was not told; clients will");
                }
            };
            inner.parts.tasks.spawn("move", take);
        }
        Ok(())
    }

    /// What was accepted is finished, the ledgers are closed, and whoever is still there is sent on.
    async fn close_moved(&self, segment: &Arc<Segment>, to: &super::Member) {
        let id = segment.id();
        let Some(removed) = self.inner.registry.remove(id) else { return }; // it was fenced or deleted meanwhile
        self.inner.parts.metrics.segments.dec();
        let close = async {
            removed.dispatchers().stop().await;
            removed.ledger().close().await;
        };
        if timeout(CLOSE_MAX, close).await.is_err() {
            tracing::warn!(topic = %id.topic, segment = id.segment, "segment moved without a clean end");
        }
        removed.end(not_owner(id, &hint(id, to.address.clone())));
    }

    fn loaded_of(&self, bundle: Bundle) -> Vec<Arc<Segment>> {
        let mut served = self.inner.registry.served();
        served.retain(|segment| self.bundle(segment.id()) == bundle);
        served
    }

    async fn tell(&self, address: &str, id: SegmentId, verb: Verb) -> Result<(), Refusal> {
        let request = SegmentRequest { topic: id.topic.0, segment: id.segment, verb: Some(verb) };
        match timeout(TELL_MAX, self.inner.parts.peers.ask(address, request)).await {
            Ok(answer) => answer.map(drop),
            Err(_) => Err(Refusal::new(Reason::DeadlineExceeded, "the next owner did not answer")),
        }
    }

    /// Another broker announces that it gives the segment's bundle to this one.
    ///
    /// # Errors
    /// SHUTTING_DOWN when this broker gives bundles away itself.
    pub(crate) fn expect(&self, id: SegmentId, within: Duration) -> Result<(), Refusal> {
        if self.drains() {
            let message = "the broker gives its own bundles away";
            return Err(Refusal::new(Reason::ShuttingDown, message));
        }
        let now = Instant::now();
        let mut expected = self.inner.expected.lock();
        expected.retain(|_, until| *until > now);
        expected.insert(self.bundle(id), now + within.min(EXPECT_MAX));
        Ok(())
    }

    /// Whether a bundle was announced, and not too long ago.
    pub(super) fn expects(&self, bundle: Bundle) -> bool {
        let expected = self.inner.expected.lock();
        expected.get(&bundle).is_some_and(|until| *until > Instant::now())
    }
}
