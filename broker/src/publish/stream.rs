//! The task of one publish stream: wait for the topic's rate, reserve the bytes of each batch, hand it to the segment in order,
//! answer in order. While one batch waits nothing more is read, so that a stream holds one batch beyond its budget at most.

use std::{
    pin::{Pin, pin},
    sync::Arc,
};

use futures::{Stream, StreamExt};
use geminga_managed_ledger::{ProducerOpened, PublishBatch, PublishError};
use geminga_proto::{
    ids::Offset,
    reason::Reason,
    v1::{
        Batch, DurabilityLevel, GoAway, Ping, PublishFrame, PublishReply, Receipt,
        publish_frame::Frame, publish_reply::Reply,
    },
};
use geminga_runtime::{budget::Permit, telemetry::MessageSpan};
use tokio::time::Instant;
use tonic::Status;

use super::{
    batch,
    order::{InFlight, Outcome, Window},
};
use crate::{
    context::Shared,
    errors::{Refusal, unreadable},
    limits::ProducerSlot,
    listener::{Connection, Due, Hearing, Life, Outbox, silent},
    ownership::Segment,
    spans, storage_errors,
};

/// The bytes of one batch, taken from the connection's and the broker's budget.
type Reserved = (Permit, Permit);
type Reserving = Pin<Box<dyn Future<Output = Reserved> + Send>>;

/// One producer's stream, open.
pub(super) struct PublishStream<I> {
    pub(super) shared: Shared,
    pub(super) connection: Connection,
    pub(super) segment: Arc<Segment>,
    pub(super) producer: ProducerOpened,
    pub(super) _slot: ProducerSlot,
    pub(super) life: Life,
    pub(super) stream_number: u64,
    pub(super) inbound: I,
    pub(super) window: Window,
    /// The highest sequence the segment accepted on this stream, or had stored when it was opened.
    pub(super) pushed: u64,
}

impl<I> Drop for PublishStream<I> {
    fn drop(&mut self) {
        self.segment.ledger().producer_gone(&self.producer.id, self.stream_number);
    }
}

enum Event {
    Woken,
    GoAway(GoAway),
    Answer(Outcome),
    Reserved(Reserved),
    Due,
    Frame(Option<Result<PublishFrame, Status>>),
}

impl<I: Stream<Item = Result<PublishFrame, Status>> + Unpin> PublishStream<I> {
    /// Runs until the client is done and everything is answered, the segment is fenced, or the broker stops.
    pub(super) async fn run(mut self, outbox: &Outbox<PublishReply>) -> Result<(), Refusal> {
        let shared = Arc::clone(&self.shared);
        let segment = Arc::clone(&self.segment);
        let mut in_flight = InFlight::default();
        let mut waiting: Option<(Batch, Reserving)> = None;
        let (mut told, mut half_closed, mut leaves) = (false, false, false);
        let mut ended = pin!(segment.ended());
        let mut told_to_go = pin!(shared.told_to_go(&segment));
        let _attending = segment.attend();
        loop {
            if (half_closed || leaves) && in_flight.is_empty() && waiting.is_none() {
                return Ok(());
            }
            let listens = !half_closed && !leaves && waiting.is_none();
            let takes_frames = listens && outbox.is_open();
            let event = tokio::select! {
                biased;
                outcome = in_flight.next() => Event::Answer(outcome),
                why = &mut ended => return Err(why),
                go_away = &mut told_to_go, if !told => Event::GoAway(go_away),
                () = outbox.changed() => Event::Woken,
                reserved = reserved(&mut waiting) => Event::Reserved(reserved),
                () = self.life.due() => Event::Due,
                frame = self.inbound.next(), if takes_frames => Event::Frame(frame),
            };
            match event {
                Event::Woken => {}
                Event::GoAway(go_away) => {
                    told = true;
                    outbox.push(reply(Reply::GoAway(go_away)), 0);
                }
                Event::Due => {
                    let hearing = match (listens, outbox.is_open()) {
                        (false, _) => Hearing::Deaf,
                        (true, true) => Hearing::Listens,
                        (true, false) => Hearing::Full,
                    };
                    leaves |= self.look_at_life(outbox, hearing)?;
                    if leaves {
                        waiting = None; // it was not accepted
                    }
                }
                Event::Answer(outcome) => {
                    self.answer(outbox, outcome)?;
                    while let Some(outcome) = in_flight.ready() {
                        self.answer(outbox, outcome)?;
                    }
                    if let Some(credit) = self.window.grant() {
                        outbox.push(reply(Reply::Credit(credit)), 0);
                    }
                }
                Event::Reserved(permits) => {
                    let (batch, _) = waiting.take().expect("it was waited for");
                    self.publish(&mut in_flight, batch, permits);
                }
                Event::Frame(None) => half_closed = true,
                Event::Frame(Some(Err(status))) => {
                    if outbox.is_gone() {
                        return Ok(());
                    }
                    return Err(unreadable(&status));
                }
                Event::Frame(Some(Ok(frame))) => {
                    self.life.heard();
                    waiting = self.frame(outbox, &mut in_flight, frame)?;
                }
            }
            if outbox.is_gone() {
                return Ok(());
            }
        }
    }

    /// Heartbeats, and the end in time. True: its time to leave is over.
    ///
    /// # Errors
    /// STREAM_SILENT.
    fn look_at_life(
        &mut self,
        outbox: &Outbox<PublishReply>,
        hearing: Hearing,
    ) -> Result<bool, Refusal> {
        while let Some(due) = self.life.look(Instant::now(), outbox.traffic(), hearing) {
            match due {
                Due::Say => outbox.push(reply(Reply::Pong(Ping { token: 0 })), 0),
                Due::Silent => return Err(silent()),
                Due::Go(by) => {
                    let go_away = self.shared.rotate(&self.segment, by);
                    outbox.push(reply(Reply::GoAway(go_away)), 0);
                }
                Due::Leave => return Ok(true),
            }
        }
        Ok(false)
    }

    fn frame(
        &mut self,
        outbox: &Outbox<PublishReply>,
        in_flight: &mut InFlight,
        frame: PublishFrame,
    ) -> Result<Option<(Batch, Reserving)>, Refusal> {
        match frame.frame {
            Some(Frame::Batch(batch)) => return self.accept(in_flight, batch),
            Some(Frame::Ping(ping)) => outbox.push(reply(Reply::Pong(ping)), 0),
            Some(Frame::Open(_)) => {
                return Err(Refusal::new(Reason::UnexpectedFrame, "the stream is open already"));
            }
            None => {
                return Err(Refusal::new(Reason::UnexpectedFrame, "a frame of an unknown kind"));
            }
        }
        Ok(None)
    }

    /// Checks a batch, waits for the topic's rate, and reserves its bytes; returns it with the
    /// wait when it cannot go on now. What waits for the rate holds no bytes of the budgets: it stops its own stream only.
    fn accept(
        &mut self,
        in_flight: &mut InFlight,
        batch: Batch,
    ) -> Result<Option<(Batch, Reserving)>, Refusal> {
        let bytes = batch.payload.len() as u64;
        if !self.window.take(bytes) {
            let message = "a batch came beyond the granted totals";
            return Err(Refusal::new(Reason::CreditExceeded, message));
        }
        if let Err(refusal) = batch::check(&batch, &self.shared.config.limits) {
            let began = Instant::now();
            let outcome = Outcome {
                hi_sequence: batch.hi_sequence,
                payload_bytes: bytes,
                began,
                pushed: None,
                result: Err(refusal),
            };
            in_flight.push(async move { outcome });
            return Ok(None);
        }
        let held = batch::held_bytes(&batch);
        let (segment, shared) = (Arc::clone(&self.segment), Arc::clone(&self.shared));
        let messages = u64::from(batch.count);
        let passes = segment.publish_rate().try_pass(messages, bytes);
        if passes {
            let mine = self.connection.bytes().try_acquire(held);
            let all = self.shared.publish_bytes.try_acquire(held);
            if let (Some(mine), Some(all)) = (mine, all) {
                self.publish(in_flight, batch, (mine, all));
                return Ok(None);
            }
        }
        let mine = self.connection.bytes().clone();
        let reserving = async move {
            if !passes {
                segment.publish_rate().pass((messages, bytes), &shared.metrics).await;
            }
            (mine.acquire(held).await, shared.publish_bytes.acquire(held).await)
        };
        Ok(Some((batch, Box::pin(reserving))))
    }

    fn publish(&mut self, in_flight: &mut InFlight, batch: Batch, (mine, all): Reserved) {
        let (hi_sequence, payload_bytes) = (batch.hi_sequence, batch.payload.len() as u64);
        let began = Instant::now();
        let span = spans::publish(&batch.traceparent, &self.segment, batch.count);
        let mut batch = to_publish(batch, &self.producer, self.stream_number, all);
        batch.trace = span.as_ref().map(MessageSpan::context);
        let stored = self.segment.ledger().publish(batch);
        in_flight.push(async move {
            let result = stored.await;
            if let (Some(mut span), Err(error)) = (span, &result) {
                span.failed(error.to_string());
            }
            drop(mine);
            let pushed = match result {
                Err(PublishError::OutOfSequence { pushed }) => Some(pushed),
                _ => None,
            };
            let result = result.map_err(|error| storage_errors::of_publish(&error));
            Outcome { hi_sequence, payload_bytes, began, pushed, result }
        });
    }

    /// Puts the answer to one batch out.
    ///
    /// # Errors
    /// What ends the stream: the outcome is unknown, or this producer may not go on.
    fn answer(&mut self, outbox: &Outbox<PublishReply>, outcome: Outcome) -> Result<(), Refusal> {
        self.window.answered(outcome.payload_bytes);
        let metrics = &self.shared.metrics;
        match outcome.result {
            Ok(stored) => {
                metrics.publish_duration.observe(outcome.began.elapsed().as_secs_f64());
                count_stored(metrics, &stored, outcome.payload_bytes);
                self.pushed = self.pushed.max(outcome.hi_sequence);
                let receipt = receipt(&self.segment, outcome.hi_sequence, &stored);
                outbox.push(reply(Reply::Receipt(receipt)), 0);
                Ok(())
            }
            Err(refusal) if ends_stream(refusal.reason) => Err(refusal),
            Err(refusal) => {
                metrics.refuse(refusal.reason);
                let refused = refusal
                    .batch_refused(outcome.hi_sequence, outcome.pushed.unwrap_or(self.pushed));
                outbox.push(reply(Reply::Refused(refused)), 0);
                Ok(())
            }
        }
    }
}

/// After these the stream cannot go on: what was in flight is of unknown outcome, or the producer was replaced.
fn ends_stream(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::SegmentFenced
            | Reason::ProducerFenced
            | Reason::ProducerExpired
            | Reason::ShuttingDown
            | Reason::Internal
    )
}

pub(super) fn count_stored(
    metrics: &crate::metrics::Metrics,
    stored: &geminga_managed_ledger::Stored,
    bytes: u64,
) {
    if stored.duplicate {
        metrics.publish_duplicates.inc();
    } else {
        metrics.publish_messages.inc_by(u64::from(stored.count));
        metrics.publish_bytes.inc_by(bytes);
    }
}

pub(super) fn receipt(
    segment: &Segment,
    hi_sequence: u64,
    stored: &geminga_managed_ledger::Stored,
) -> Receipt {
    Receipt {
        hi_sequence,
        base_offset: stored.base_offset.map_or(u64::MAX, |offset| offset.0),
        count: stored.count,
        level: level(segment).into(),
        epoch: segment.epoch().0,
        duplicate: stored.duplicate,
    }
}

fn level(segment: &Segment) -> DurabilityLevel {
    segment.ledger().level()
}

pub(super) fn to_publish(
    batch: Batch,
    producer: &ProducerOpened,
    stream_number: u64,
    permit: Permit,
) -> PublishBatch {
    PublishBatch {
        producer: producer.id.clone(),
        stream_number,
        prev: batch.prev_sequence,
        lo: batch.lo_sequence,
        hi: batch.hi_sequence,
        count: batch.count,
        format: batch.format,
        codec: batch.codec,
        uncompressed_size: batch.uncompressed_size,
        index: batch.index.unwrap_or_default(),
        payload: batch.payload,
        expected_offset: batch.expected_offset.map(Offset),
        traceparent: spans::sound(batch.traceparent),
        trace: None,
        permit,
    }
}

pub(super) fn reply(reply: Reply) -> PublishReply {
    PublishReply { reply: Some(reply) }
}

async fn reserved(waiting: &mut Option<(Batch, Reserving)>) -> Reserved {
    match waiting {
        Some((_, reserving)) => reserving.as_mut().await,
        None => std::future::pending().await,
    }
}
