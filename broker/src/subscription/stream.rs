//! The task of one consume stream: it owns the dispatcher core, carries out its reads, and answers settles.
//!
//! ```text
//! frames in ──► credit, settle ──► core ──► deliveries ──► outbox
//! end of log ──► wake ──────────────┘ └──► read ──► batches back into the core
//! ```

use std::{
    future::Future,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use futures::{Stream, StreamExt, stream::FuturesOrdered};
use geminga_managed_ledger::{ReadError, SettleError, Settlement, StoredBatch};
use geminga_proto::{
    ids::{Offset, SubscriptionId},
    reason::Reason,
    v1::{
        ConsumeFrame, ConsumeOpened, ConsumeReply, Credit, Delivery as DeliveryReply, GoAway,
        OffsetRange, Settle, Settled, consume_frame::Frame, consume_reply::Reply, settle::Verb,
    },
};
use geminga_runtime::budget::{ByteBudget, Permit};
use tokio::time::{Instant, sleep};
use tonic::Status;

use super::{Attached, handle::invalid};
use crate::{
    context::Shared,
    dispatcher::{Action, Batch, Core, CoreLimits, Delivery, RangeSet},
    errors::{Refusal, unreadable},
    listener::Outbox,
    ownership::Segment,
    spans, storage_errors,
};

/// A read ahead for less is not worth it.
const READ_BYTES_MIN: u64 = 64 * 1024;
/// Pause after a failed read.
const READ_RETRY: Duration = Duration::from_millis(250);

/// A stored batch, holding its share of the read-ahead budget until its connection has taken it.
#[derive(Clone, Debug)]
pub(super) struct Queued {
    stored: Arc<StoredBatch>,
    held: Option<Arc<Permit>>,
}

impl Batch for Queued {
    fn base(&self) -> u64 {
        self.stored.base_offset.0
    }

    fn count(&self) -> u32 {
        self.stored.header.count
    }

    fn bytes(&self) -> u64 {
        self.stored.payload.len() as u64
    }
}

type ReadResult = Result<Vec<Queued>, ReadError>;
type Reading = Pin<Box<dyn Future<Output = ReadResult> + Send>>;
type Settling = Pin<Box<dyn Future<Output = SettleDone> + Send>>;

/// A settle whose record is durable, or was refused.
struct SettleDone {
    token: u64,
    runs: Vec<(u64, u64)>,
    began: Instant,
    result: Result<Offset, Refusal>,
}

/// One consumer's stream, open.
pub(super) struct ConsumeStream<I> {
    pub(super) shared: Shared,
    pub(super) segment: Arc<Segment>,
    pub(super) subscription: SubscriptionId,
    pub(super) attached: Attached,
    pub(super) inbound: I,
    pub(super) layout_epoch: u64,
}

enum Event {
    Woken,
    GoAway(GoAway),
    Retry,
    Cursor,
    Read(ReadResult),
    Settled(SettleDone),
    Frame(Option<Result<ConsumeFrame, Status>>),
}

impl<I: Stream<Item = Result<ConsumeFrame, Status>> + Unpin> ConsumeStream<I> {
    /// Runs until the client leaves, the segment or the subscription ends, or the broker stops.
    pub(super) async fn run(mut self, outbox: &Outbox<ConsumeReply>) -> Result<(), Refusal> {
        let shared = Arc::clone(&self.shared);
        let segment = Arc::clone(&self.segment);
        let mut end = segment.ledger().end();
        let mut core = self.core(end.borrow_and_update().0)?;
        self.greet(outbox);
        let mut reading: Option<Reading> = None;
        let mut settling: FuturesOrdered<Settling> = FuturesOrdered::new();
        let mut retry: Option<Pin<Box<tokio::time::Sleep>>> = None;
        let (mut told, mut half_closed) = (false, false);
        let mut ended = pin!(segment.ended());
        let mut told_to_go = pin!(shared.told_to_go(&segment));
        let _attending = segment.attend();
        loop {
            core.on_end(end.borrow_and_update().0);
            core.on_outbox(outbox.is_open());
            while let Some(action) = core.step() {
                match action {
                    Action::Deliver(delivery) => {
                        self.deliver(outbox, delivery, core.next_deliver());
                        core.on_outbox(outbox.is_open());
                    }
                    Action::Read { from, bytes_max, messages_max } => {
                        reading = Some(self.read(outbox, from, bytes_max, messages_max));
                    }
                }
            }
            if half_closed && settling.is_empty() {
                return Ok(());
            }
            let takes_frames = !half_closed
                && outbox.is_open()
                && settling.len() < shared.config.limits.settles_in_flight_max;
            let event = tokio::select! {
                biased;
                why = &mut ended => return Err(why),
                () = self.attached.ended() => return Err(deleted()),
                go_away = &mut told_to_go, if !told => Event::GoAway(go_away),
                () = outbox.changed() => Event::Woken,
                Some(done) = settling.next() => Event::Settled(done),
                result = wait(&mut reading) => Event::Read(result),
                () = wait_for(&mut retry) => Event::Retry,
                () = self.attached.cursor_changed() => Event::Cursor,
                frame = self.inbound.next(), if takes_frames => Event::Frame(frame),
                changed = end.changed() => match changed {
                    Ok(()) => Event::Woken,
                    Err(_) => return Err(segment.ended().await),
                },
            };
            match event {
                Event::Woken => {}
                Event::GoAway(go_away) => {
                    told = true;
                    outbox.push(reply(Reply::GoAway(go_away)), 0);
                }
                Event::Retry => {
                    retry = None;
                    core.on_retry();
                }
                Event::Cursor => self.sync_cursor(&mut core)?,
                Event::Read(result) => {
                    reading = None;
                    match result {
                        Ok(batches) if !batches.is_empty() => core.on_read(batches),
                        Ok(_) => {
                            core.on_read_failed();
                            retry = Some(Box::pin(sleep(READ_RETRY)));
                        }
                        Err(ReadError::Trimmed { first }) => core.on_trimmed(first.0),
                        Err(error) => {
                            self.read_failed(&error)?;
                            core.on_read_failed();
                            retry = Some(Box::pin(sleep(READ_RETRY)));
                        }
                    }
                }
                Event::Settled(done) => self.settled(outbox, &mut core, done),
                Event::Frame(None) => half_closed = true,
                Event::Frame(Some(Err(status))) => {
                    if outbox.is_gone() {
                        return Ok(());
                    }
                    return Err(unreadable(&status));
                }
                Event::Frame(Some(Ok(frame))) => {
                    settling.extend(self.frame(outbox, &mut core, frame)?);
                }
            }
            if outbox.is_gone() {
                return Ok(());
            }
        }
    }

    fn core(&self, end: u64) -> Result<Core<Queued>, Refusal> {
        let limits = &self.shared.config.limits;
        let limits = CoreLimits {
            unacked_messages_max: limits.unacked_messages_max,
            read_ahead_bytes_max: limits.read_ahead_bytes_max,
        };
        let (mark_delete_next, settled) = self.cursor()?;
        Ok(Core::new(limits, mark_delete_next, settled, end))
    }

    fn cursor(&self) -> Result<(u64, RangeSet), Refusal> {
        let cursor = self.segment.ledger().cursor(self.subscription).ok_or_else(deleted)?;
        let mut settled = RangeSet::default();
        for (first, last) in cursor.holes.iter() {
            settled.insert(first.0, last.0 + 1);
        }
        Ok((cursor.mark_delete_next.0, settled))
    }

    fn sync_cursor(&self, core: &mut Core<Queued>) -> Result<(), Refusal> {
        let (mark_delete_next, settled) = self.cursor()?;
        core.on_cursor(mark_delete_next, settled);
        Ok(())
    }

    fn greet(&self, outbox: &Outbox<ConsumeReply>) {
        let mark_delete_next =
            self.segment.ledger().cursor(self.subscription).map_or(0, |c| c.mark_delete_next.0);
        let unacked_max = self.shared.config.limits.unacked_messages_max;
        let opened = ConsumeOpened {
            mark_delete_next,
            layout_epoch: self.layout_epoch,
            epoch: self.segment.epoch().0,
            max_outstanding_messages: u32::try_from(unacked_max).unwrap_or(u32::MAX),
        };
        outbox.push(reply(Reply::Opened(opened)), 0);
    }

    /// Starts a read. What is read ahead comes out of the broker's budget, so that consumers who do not read cannot fill
    /// memory. When it is used up, one batch at a time may be read beyond it, once the connection has taken the one before:
    /// they cannot stop the others either.
    fn read(
        &self,
        outbox: &Outbox<ConsumeReply>,
        from: u64,
        bytes_max: u64,
        messages_max: u64,
    ) -> Reading {
        let ledger = self.segment.ledger().clone();
        let budget = self.shared.dispatch_bytes.clone();
        let drained = outbox.drained();
        Box::pin(async move {
            let mut held = share(&budget, bytes_max);
            if held.is_none() {
                drained.await;
                held = share(&budget, bytes_max);
            }
            let bytes_max = held.as_ref().map_or(1, Permit::bytes);
            let batches =
                ledger.read(Offset(from), bytes_max as usize, messages_max as usize).await?;
            let queue = batches.into_iter().map(|stored| {
                let part = held.as_mut().map(|held| {
                    let bytes = stored.payload.len() as u64;
                    let mut part = held.split(bytes);
                    // A batch larger than the read was for counts in full, where there is room.
                    if part.bytes() < bytes
                        && let Some(rest) = budget.try_acquire(bytes - part.bytes())
                    {
                        part.merge(rest);
                    }
                    part
                });
                Queued { stored: Arc::new(stored), held: part.map(Arc::new) }
            });
            Ok(queue.collect())
        })
    }

    fn read_failed(&self, error: &ReadError) -> Result<(), Refusal> {
        let refusal = storage_errors::of_read(error);
        if refusal.reason == Reason::SegmentFenced {
            return Err(refusal);
        }
        let id = self.segment.id();
        tracing::warn!(topic = %id.topic, segment = id.segment, %refusal, "read for a consumer failed");
        self.shared.metrics.refuse(refusal.reason);
        if refusal.reason == Reason::ReadDamaged { Err(refusal) } else { Ok(()) }
    }

    fn deliver(&self, outbox: &Outbox<ConsumeReply>, delivery: Delivery<Queued>, given: u64) {
        self.attached.gave(given);
        let stored = &delivery.batch.stored;
        let header = &stored.header;
        let producer = header.producer.as_ref();
        let bytes = stored.payload.len();
        let message = DeliveryReply {
            base_offset: stored.base_offset.0,
            count: header.count,
            format: header.format,
            codec: header.codec,
            uncompressed_size: header.uncompressed_size,
            publish_time_ms: header.publish_time_ms,
            producer_name: producer.map(|p| p.name.clone()).unwrap_or_default(),
            lo_sequence: producer.map_or(0, |p| p.lo_sequence),
            hi_sequence: producer.map_or(0, |p| p.hi_sequence),
            deliver: delivery
                .ranges
                .iter()
                .map(|(s, e)| OffsetRange { first: *s, last: e - 1 })
                .collect(),
            attempt: 1,
            handle: self.attached.encoded_handle(),
            payload: stored.payload.clone(),
            traceparent: header.traceparent.clone(),
        };
        self.shared.metrics.dispatch_messages.inc_by(delivery.messages);
        self.shared.metrics.dispatch_bytes.inc_by(bytes as u64);
        let span = spans::deliver(&header.traceparent, &self.segment, header.count);
        outbox.push_holding(reply(Reply::Delivery(message)), bytes, delivery.batch.held);
        drop(span);
    }

    fn frame(
        &self,
        outbox: &Outbox<ConsumeReply>,
        core: &mut Core<Queued>,
        frame: ConsumeFrame,
    ) -> Result<Option<Settling>, Refusal> {
        match frame.frame {
            Some(Frame::Credit(Credit { messages, bytes })) => core.on_credit(messages, bytes),
            Some(Frame::Ping(ping)) => outbox.push(reply(Reply::Pong(ping)), 0),
            Some(Frame::Settle(settle)) => {
                let token = settle.token;
                match self.settle(core, settle) {
                    Ok(settling) => return Ok(Some(settling)),
                    // In its turn, behind the settles before it.
                    Err(refusal) => {
                        let done = SettleDone {
                            token,
                            runs: Vec::new(),
                            began: Instant::now(),
                            result: Err(refusal),
                        };
                        return Ok(Some(Box::pin(async move { done })));
                    }
                }
            }
            Some(Frame::Open(_)) => {
                return Err(Refusal::new(Reason::UnexpectedFrame, "the stream is open already"));
            }
            None => {
                return Err(Refusal::new(Reason::UnexpectedFrame, "a frame of an unknown kind"));
            }
        }
        Ok(None)
    }

    fn settle(&self, core: &Core<Queued>, settle: Settle) -> Result<Settling, Refusal> {
        let token = settle.token;
        let request = SettleWanted::parse(settle, self.shared.config.limits.settle_ranges_max)?;
        self.attached.handle().check(&request.handle)?;
        if !core.was_given(request.end) {
            return Err(invalid("an offset was never given on this stream"));
        }
        let runs = request.runs;
        let began = Instant::now();
        let settled = self.segment.ledger().settle(self.subscription, request.settlement);
        Ok(Box::pin(async move {
            let result =
                settled.await.map_err(|error: SettleError| storage_errors::of_settle(&error));
            SettleDone { token, runs, began, result }
        }))
    }

    fn settled(&self, outbox: &Outbox<ConsumeReply>, core: &mut Core<Queued>, done: SettleDone) {
        self.shared.metrics.settle_duration.observe(done.began.elapsed().as_secs_f64());
        match done.result {
            Ok(mark_delete_next) => {
                core.on_settled(done.runs, mark_delete_next.0);
                let settled = Settled { token: done.token, mark_delete_next: mark_delete_next.0 };
                outbox.push(reply(Reply::Settled(settled)), 0);
            }
            Err(refusal) => {
                self.shared.metrics.refuse(refusal.reason);
                outbox.push(reply(Reply::SettleRefused(refusal.settle_refused(done.token))), 0);
            }
        }
    }
}

/// A settle as asked for, checked.
pub(super) struct SettleWanted {
    pub(super) handle: bytes::Bytes,
    /// Half-open.
    pub(super) runs: Vec<(u64, u64)>,
    /// Everything it settles lies below.
    pub(super) end: u64,
    pub(super) settlement: Settlement,
}

impl SettleWanted {
    /// Checks bounds before anything is built from them (S4).
    ///
    /// # Errors
    /// INVALID_REQUEST.
    pub(super) fn parse(settle: Settle, ranges_max: usize) -> Result<Self, Refusal> {
        match settle.verb {
            None => Err(Refusal::request("settle has no verb")),
            Some(Verb::AcceptUpTo(verb)) => {
                let end = verb
                    .offset
                    .checked_add(1)
                    .ok_or_else(|| Refusal::request("offset is out of range"))?;
                let settlement = Settlement::UpTo(Offset(verb.offset));
                Ok(Self { handle: verb.handle, runs: vec![(0, end)], end, settlement })
            }
            Some(Verb::Accept(verb)) => {
                if verb.ranges.is_empty() || verb.ranges.len() > ranges_max {
                    let message =
                        format!("a settle has 1 to {ranges_max} ranges, not {}", verb.ranges.len());
                    return Err(Refusal::request(message));
                }
                let mut runs = Vec::with_capacity(verb.ranges.len());
                for range in &verb.ranges {
                    if range.first > range.last || range.last == u64::MAX {
                        let message = format!(
                            "the range {}..={} is empty or out of range",
                            range.first, range.last
                        );
                        return Err(Refusal::request(message));
                    }
                    runs.push((range.first, range.last + 1));
                }
                let end = runs.iter().map(|run| run.1).max().expect("not empty");
                let ranges =
                    verb.ranges.iter().map(|r| (Offset(r.first), Offset(r.last))).collect();
                Ok(Self { handle: verb.handle, runs, end, settlement: Settlement::Accept(ranges) })
            }
        }
    }
}

/// As much of what a read wants as the budget has; none when that is next to nothing.
fn share(budget: &ByteBudget, wanted: u64) -> Option<Permit> {
    let free = budget.total() - budget.in_use();
    (free >= wanted.min(READ_BYTES_MIN)).then(|| budget.try_acquire(wanted.min(free))).flatten()
}

pub(super) fn reply(reply: Reply) -> ConsumeReply {
    ConsumeReply { reply: Some(reply) }
}

fn deleted() -> Refusal {
    Refusal::new(Reason::SubscriptionNotFound, "the subscription was deleted")
}

async fn wait(reading: &mut Option<Reading>) -> ReadResult {
    match reading {
        Some(reading) => reading.as_mut().await,
        None => std::future::pending().await,
    }
}

async fn wait_for(timer: &mut Option<Pin<Box<tokio::time::Sleep>>>) {
    match timer {
        Some(timer) => timer.as_mut().await,
        None => std::future::pending().await,
    }
}
