//! The task of one publish stream: reserve the bytes of each batch, hand it to the segment in order, answer in order.

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
        Batch, DurabilityLevel, GoAway, PublishFrame, PublishReply, Receipt, publish_frame::Frame,
        publish_reply::Reply,
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
    listener::{Connection, Outbox},
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
    Frame(Option<Result<PublishFrame, Status>>),
}

impl<I: Stream<Item = Result<PublishFrame, Status>> + Unpin> PublishStream<I> {
    /// Runs until the client is done and everything is answered, the segment is fenced, or the broker stops.
    pub(super) async fn run(mut self, outbox: &Outbox<PublishReply>) -> Result<(), Refusal> {
        let shared = Arc::clone(&self.shared);
        let segment = Arc::clone(&self.segment);
        let mut in_flight = InFlight::default();
        let mut waiting: Option<(Batch, Reserving)> = None;
        let (mut told, mut half_closed) = (false, false);
        let mut ended = pin!(segment.ended());
        let mut told_to_go = pin!(shared.told_to_go(&segment));
        let _attending = segment.attend();
        loop {
            if half_closed && in_flight.is_empty() && waiting.is_none() {
                return Ok(());
            }
            let takes_frames = !half_closed && waiting.is_none() && outbox.is_open();
            let event = tokio::select! {
                biased;
                outcome = in_flight.next() => Event::Answer(outcome),
                why = &mut ended => return Err(why),
                go_away = &mut told_to_go, if !told => Event::GoAway(go_away),
                () = outbox.changed() => Event::Woken,
                reserved = reserved(&mut waiting) => Event::Reserved(reserved),
                frame = self.inbound.next(), if takes_frames => Event::Frame(frame),
            };
            match event {
                Event::Woken => {}
                Event::GoAway(go_away) => {
                    told = true;
                    outbox.push(reply(Reply::GoAway(go_away)), 0);
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
                Event::Frame(Some(Ok(frame))) => match frame.frame {
                    Some(Frame::Batch(batch)) => waiting = self.accept(&mut in_flight, batch)?,
                    Some(Frame::Ping(ping)) => outbox.push(reply(Reply::Pong(ping)), 0),
                    Some(Frame::Open(_)) => {
                        return Err(Refusal::new(
                            Reason::UnexpectedFrame,
                            "the stream is open already",
                        ));
                    }
                    None => {
                        return Err(Refusal::new(
                            Reason::UnexpectedFrame,
                            "a frame of an unknown kind",
                        ));
                    }
                },
            }
            if outbox.is_gone() {
                return Ok(());
            }
        }
    }

    /// Checks a batch and reserves its bytes; returns it with the wait when they are not free now.
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
        let mine = self.connection.bytes().try_acquire(held);
        let all = self.shared.publish_bytes.try_acquire(held);
        if let (Some(mine), Some(all)) = (mine, all) {
            self.publish(in_flight, batch, (mine, all));
            return Ok(None);
        }
        let (mine, all) = (self.connection.bytes().clone(), self.shared.publish_bytes.clone());
        Ok(Some((
            batch,
            Box::pin(async move { (mine.acquire(held).await, all.acquire(held).await) }),
        )))
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
