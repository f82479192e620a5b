//! What every service shares, and how streams learn that the broker is stopping.

use std::{sync::Arc, time::Duration};

use geminga_proto::{
    reason::Reason,
    v1::{GoAway, OwnerHint},
};
use geminga_runtime::{budget::ByteBudget, random::Random, tasks::Tasks};
use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    auth::{Authorized, Gate},
    catalog::Catalog,
    config::BrokerConfig,
    discovery::Hub,
    errors::Refusal,
    listener::{Connection, Life, Outbox, OutboxStream, StreamSlot, outbox},
    metrics::Metrics,
    ownership::{Ownership, Segment},
    relay::{Peers, RelayBytes},
};

/// Shared handle to what every service needs.
pub(crate) type Shared = Arc<Context>;

/// What every service needs.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) config: BrokerConfig,
    pub(crate) catalog: Catalog,
    pub(crate) ownership: Ownership,
    pub(crate) hub: Hub,
    pub(crate) gate: Gate,
    pub(crate) metrics: Metrics,
    pub(crate) random: Random,
    /// Owner of the streams' tasks.
    pub(crate) streams: Tasks,
    pub(crate) draining: Draining,
    /// One for each stream there may be, all connections together.
    pub(crate) stream_slots: Arc<Semaphore>,
    /// Bytes of batches taken from producers, all connections together.
    pub(crate) publish_bytes: ByteBudget,
    /// Other brokers.
    pub(crate) peers: Peers,
    /// Payload bytes on their way to and from other brokers.
    pub(crate) relay_bytes: RelayBytes,
    /// Payload bytes read for consumers and not taken by their connections, all streams together.
    pub(crate) dispatch_bytes: ByteBudget,
}

impl Context {
    /// What every handler does first: is the broker open, and may the caller do this (S1)?
    pub(crate) fn admit<R: Authorized>(
        &self,
        connection: &Connection,
        request: &R,
    ) -> Result<(), Refusal> {
        if self.draining.begun() {
            return Err(shutting_down());
        }
        if connection.is_relayed() {
            self.gate.check_relay(connection.caller())?;
            if !connection.names_its_principal() {
                let message = "a relayed request must name a principal that it can be for";
                return Err(Refusal::new(Reason::PermissionDenied, message));
            }
        }
        self.gate.check(connection.principal(), request)
    }

    /// Resolves when streams on a segment are to be told to go: it is handed to another broker, or this one stops.
    /// Cancel-safe.
    pub(crate) async fn told_to_go(&self, segment: &Segment) -> GoAway {
        tokio::select! {
            biased;
            moving = segment.moving() => {
                let left = moving.until.saturating_duration_since(Instant::now()).as_millis();
                let drain_by_ms = u32::try_from(left).unwrap_or(u32::MAX);
                GoAway { drain_by_ms, owner: Some(moving.to) }
            }
            () = self.draining.started() => {
                self.draining.go_away(self.ownership.next_owner(segment.id()))
            }
        }
    }

    /// The life of a stream that begins now.
    pub(crate) fn life(&self, heartbeat_ms: u32) -> Life {
        Life::new(Instant::now(), heartbeat_ms, self.stream_age(), self.config.move_drain)
    }

    /// How old a stream that begins now may get: each another age, so that those that began together do not end together.
    pub(crate) fn stream_age(&self) -> Duration {
        let most = self.config.limits.stream_age_max;
        let tenth = u64::try_from((most / 10).as_millis()).unwrap_or(u64::MAX / 4);
        most - most / 10 + Duration::from_millis(self.random.below(2 * tenth + 1))
    }

    /// What a stream of a segment that is here, and stays, is told when it has until then: it may come back at once.
    pub(crate) fn rotate(&self, segment: &Segment, by: Instant) -> GoAway {
        let left = by.saturating_duration_since(Instant::now()).as_millis();
        GoAway {
            drain_by_ms: u32::try_from(left).unwrap_or(u32::MAX),
            owner: Some(self.ownership.hint(segment.id(), 0)),
        }
    }

    /// Opens a stream: a task of its own serves it, and has the last word. Its end is counted.
    ///
    /// # Errors
    /// TOO_MANY_STREAMS.
    pub(crate) fn serve_stream<F, R, S>(
        self: &Arc<Self>,
        kind: &'static str,
        request: Request<Streaming<F>>,
        serve: impl FnOnce(Shared, Connection, Streaming<F>, Outbox<R>) -> S + Send + 'static,
    ) -> Result<Response<OutboxStream<R>>, Status>
    where
        F: Send + 'static,
        R: Send + 'static,
        S: Future<Output = Result<(), Refusal>> + Send,
    {
        let shared = Arc::clone(self);
        let connection = Connection::of(&request, &shared.config.limits);
        let slot = shared.stream_slot(&connection).map_err(|refusal| shared.refused(refusal))?;
        let (sender, stream) = outbox(shared.config.limits.outbox_bytes_max);
        let inbound = request.into_inner();
        let task = async move {
            let _slot = slot;
            let _open = shared.metrics.stream(kind);
            if let Err(refusal) = serve(Arc::clone(&shared), connection, inbound, sender).await {
                shared.metrics.refuse(refusal.reason);
                tracing::debug!(
                    kind,
                    reason = refusal.reason.as_str(),
                    message = refusal.message,
                    "stream ended"
                );
            }
        };
        self.streams.spawn(kind, task);
        Ok(Response::new(stream))
    }

    /// Runs a stream, but no longer than the broker has: open or not.
    pub(crate) async fn until_over(
        &self,
        stream: impl Future<Output = Result<(), Refusal>>,
    ) -> Result<(), Refusal> {
        tokio::select! {
            biased;
            ended = stream => ended,
            () = self.draining.over() => Err(shutting_down()),
        }
    }

    /// A place for a stream, of its connection's and of all.
    ///
    /// # Errors
    /// TOO_MANY_STREAMS.
    pub(crate) fn stream_slot(&self, connection: &Connection) -> Result<Slot, Refusal> {
        let of_connection = connection.stream_slot()?;
        match Arc::clone(&self.stream_slots).try_acquire_owned() {
            Ok(of_all) => Ok(Slot { _of_connection: of_connection, _of_all: of_all }),
            Err(_) => {
                let streams_max = self.config.limits.streams_max;
                let message = format!("the broker has {streams_max} streams, as many as it may");
                Err(Refusal::new(Reason::TooManyStreams, message).with("streams_max", streams_max))
            }
        }
    }

    /// Counts a refusal on its way out.
    pub(crate) fn refused(&self, refusal: Refusal) -> Status {
        self.metrics.refuse(refusal.reason);
        tracing::debug!(
            reason = refusal.reason.as_str(),
            message = refusal.message,
            "request refused"
        );
        refusal.into()
    }
}

/// A stream's place; free again when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    _of_connection: StreamSlot,
    _of_all: OwnedSemaphorePermit,
}

pub(crate) fn shutting_down() -> Refusal {
    Refusal::new(Reason::ShuttingDown, "the broker is stopping").after(Duration::from_secs(1))
}

/// The broker's way to its end: streams are told to go, and have until a deadline.
#[derive(Debug)]
pub(crate) struct Draining {
    token: CancellationToken,
    deadline: Mutex<Option<Instant>>,
}

impl Draining {
    pub(crate) fn new(token: CancellationToken) -> Self {
        Self { token, deadline: Mutex::new(None) }
    }

    pub(crate) fn begin(&self, grace: Duration) {
        self.deadline.lock().get_or_insert(Instant::now() + grace);
        self.token.cancel();
    }

    pub(crate) fn begun(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Resolves when streams are to be told. Cancel-safe.
    pub(crate) async fn started(&self) {
        self.token.cancelled().await;
    }

    /// Resolves when streams must have ended. Cancel-safe.
    pub(crate) async fn over(&self) {
        self.token.cancelled().await;
        let deadline = self.deadline.lock().unwrap_or_else(Instant::now);
        sleep_until(deadline).await;
    }

    /// What streams tell their clients.
    pub(crate) fn go_away(&self, owner: Option<OwnerHint>) -> GoAway {
        let deadline = self.deadline.lock().unwrap_or_else(Instant::now);
        let left = deadline.saturating_duration_since(Instant::now()).as_millis();
        GoAway { drain_by_ms: u32::try_from(left).unwrap_or(u32::MAX), owner }
    }
}
