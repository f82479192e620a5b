//! Reading without a subscription: a stream from a place on, and a peek. No cursor moves, nothing is settled, and nobody is
//! kept from anything.

use std::sync::Arc;

use futures::StreamExt;
use geminga_managed_ledger::{ReadError, StoredBatch};
use geminga_proto::{
    ids::Offset,
    reason::Reason,
    v1::{
        ConsumeFrame, ConsumeOpened, ConsumeReply, Credit, Delivery, OffsetRange, PeekRequest,
        PeekResponse, ReadFrom, SettleRefused, SubscriptionStart, consume_frame::Frame,
        consume_reply::Reply, read_from::From as Place, settle::Verb,
    },
};
use tokio::time::{Duration, sleep};

use super::{gate::Frames, handle::invalid};
use crate::{
    context::{Context, Shared},
    errors::{Refusal, unreadable},
    listener::Outbox,
    ownership::Segment,
    storage_errors,
};

/// Batches that one read of a reader asks for at most, bytes.
const READ_BYTES: u64 = 256 * 1024;
/// Pause after a failed read.
const RETRY: Duration = Duration::from_millis(250);
/// Most messages, and payload bytes, of one peek; one batch may exceed them.
const PEEK_MESSAGES_MAX: u64 = 1_000;
const PEEK_BYTES_MAX: usize = 1 << 20;

/// A stored batch as a delivery of all its messages, without handle and attempt.
pub(super) fn as_stored(stored: &StoredBatch) -> Delivery {
    let header = &stored.header;
    let producer = header.producer.as_ref();
    let last = stored.base_offset.0 + u64::from(header.count).max(1) - 1;
    Delivery {
        base_offset: stored.base_offset.0,
        count: header.count,
        format: header.format,
        codec: header.codec,
        uncompressed_size: header.uncompressed_size,
        publish_time_ms: header.publish_time_ms,
        producer_name: producer.map(|p| p.name.clone()).unwrap_or_default(),
        lo_sequence: producer.map_or(0, |p| p.lo_sequence),
        hi_sequence: producer.map_or(0, |p| p.hi_sequence),
        deliver: vec![OffsetRange { first: stored.base_offset.0, last }],
        payload: stored.payload.clone(),
        traceparent: header.traceparent.clone(),
        ..Delivery::default()
    }
}

/// The offset that a place means now.
///
/// # Errors
/// INVALID_REQUEST for no place or an unknown one; what kept a read.
pub(super) async fn offset_of(segment: &Segment, from: Option<ReadFrom>) -> Result<u64, Refusal> {
    let ledger = segment.ledger();
    let (first, end) = (ledger.first_offset().0, ledger.end().borrow().0);
    match from.and_then(|from| from.from) {
        None => Err(Refusal::request("the place to read from is missing")),
        Some(Place::Offset(offset)) => Ok(offset.clamp(first, end)),
        Some(Place::At(at)) => match SubscriptionStart::try_from(at) {
            Ok(SubscriptionStart::Earliest) => Ok(first),
            Ok(SubscriptionStart::Latest | SubscriptionStart::Unspecified) => Ok(end),
            Err(_) => Err(Refusal::request(format!("start {at} is unknown"))),
        },
        Some(Place::TimeMs(time)) => {
            let found = ledger.offset_at_time(time).await;
            Ok(found.map_err(|error| storage_errors::of_read(&error))?.0)
        }
    }
}

/// Messages as they are stored.
///
/// # Errors
/// INVALID_REQUEST; what kept a read.
pub(super) async fn peek(
    context: &Context,
    segment: &Segment,
    request: PeekRequest,
) -> Result<PeekResponse, Refusal> {
    let from = offset_of(segment, request.from).await?;
    let ledger = segment.ledger();
    let most = u64::from(request.messages_max.max(1)).min(PEEK_MESSAGES_MAX);
    let mut response = PeekResponse {
        first_offset: ledger.first_offset().0,
        next_offset: ledger.end().borrow().0,
        deliveries: Vec::new(),
    };
    if from >= response.next_offset {
        return Ok(response);
    }
    let bytes = PEEK_BYTES_MAX.min(context.config.limits.outbox_bytes_max);
    let read = ledger.read(Offset(from), bytes, most as usize).await;
    let batches = read.map_err(|error| storage_errors::of_read(&error))?;
    let mut left = most;
    for stored in batches {
        if left == 0 {
            break;
        }
        let delivery = cut(as_stored(&stored), from, left);
        left -= delivery.deliver.iter().map(|range| range.last + 1 - range.first).sum::<u64>();
        response.deliveries.push(delivery);
    }
    Ok(response)
}

/// A delivery of what lies at or after `from`, at most so many.
fn cut(mut delivery: Delivery, from: u64, most: u64) -> Delivery {
    for range in &mut delivery.deliver {
        range.first = range.first.max(from).min(range.last);
        range.last = range.last.min(range.first + most - 1);
    }
    delivery
}

/// A reader's stream.
pub(super) struct Reader {
    pub(super) shared: Shared,
    pub(super) segment: Arc<Segment>,
    pub(super) layout_epoch: u64,
    pub(super) next: u64,
    pub(super) granted: (u64, u64),
    pub(super) used: (u64, u64),
}

enum Event {
    Woken,
    Frame(Option<Result<ConsumeFrame, tonic::Status>>),
}

impl Reader {
    /// Runs until the client leaves, the segment ends, or the broker stops.
    ///
    /// # Errors
    /// Why it ended.
    pub(super) async fn run(
        mut self,
        mut frames: Frames,
        outbox: &Outbox<ConsumeReply>,
    ) -> Result<(), Refusal> {
        let (shared, segment) = (Arc::clone(&self.shared), Arc::clone(&self.segment));
        let mut end = segment.ledger().end();
        let mut ended = std::pin::pin!(segment.ended());
        let mut told_to_go = std::pin::pin!(shared.told_to_go(&segment));
        let mut told = false;
        let _attending = segment.attend();
        outbox.push(self.opened(), 0);
        loop {
            let last = end.borrow_and_update().0;
            if self.wants(last) && outbox.is_open() {
                let pause = tokio::select! {
                    biased;
                    why = &mut ended => return Err(why),
                    read = self.read(outbox) => read?,
                };
                if pause {
                    sleep(RETRY).await;
                }
                if outbox.is_gone() {
                    return Ok(());
                }
            }
            let more = self.wants(last) && outbox.is_open();
            let event = tokio::select! {
                biased;
                why = &mut ended => return Err(why),
                go_away = &mut told_to_go, if !told => {
                    told = true;
                    outbox.push(ConsumeReply { reply: Some(Reply::GoAway(go_away)) }, 0);
                    Event::Woken
                }
                () = outbox.changed() => Event::Woken,
                frame = frames.next(), if outbox.is_open() => Event::Frame(frame),
                changed = end.changed() => match changed {
                    Ok(()) => Event::Woken,
                    Err(_) => return Err(segment.ended().await),
                },
                () = std::future::ready(()), if more => Event::Woken,
            };
            match event {
                Event::Woken => {}
                Event::Frame(None) => return Ok(()),
                Event::Frame(Some(Err(_))) if outbox.is_gone() => return Ok(()),
                Event::Frame(Some(Err(status))) => return Err(unreadable(&status)),
                Event::Frame(Some(Ok(frame))) => self.frame(outbox, frame)?,
            }
            if outbox.is_gone() {
                return Ok(());
            }
        }
    }

    fn opened(&self) -> ConsumeReply {
        let opened = ConsumeOpened {
            mark_delete_next: self.next,
            layout_epoch: self.layout_epoch,
            epoch: self.segment.epoch().0,
            ..ConsumeOpened::default()
        };
        ConsumeReply { reply: Some(Reply::Opened(opened)) }
    }

    fn wants(&self, end: u64) -> bool {
        self.next < end && self.used.0 < self.granted.0 && self.used.1 < self.granted.1
    }

    /// Reads and delivers what the credit allows. True: try again after a pause.
    async fn read(&mut self, outbox: &Outbox<ConsumeReply>) -> Result<bool, Refusal> {
        let messages = (self.granted.0 - self.used.0).min(usize::MAX as u64);
        let bytes = (self.granted.1 - self.used.1).min(READ_BYTES);
        let held = self.shared.dispatch_bytes.try_acquire(bytes);
        if held.is_none() {
            outbox.drained().await; // one batch at a time then
        }
        let bytes = if held.is_some() { bytes } else { 1 };
        let read =
            self.segment.ledger().read(Offset(self.next), bytes as usize, messages as usize).await;
        let batches = match read {
            Ok(batches) => batches,
            Err(ReadError::Trimmed { first }) => {
                self.next = self.next.max(first.0);
                return Ok(false);
            }
            Err(error) => {
                let refusal = storage_errors::of_read(&error);
                let ends = matches!(refusal.reason, Reason::SegmentFenced | Reason::ReadDamaged);
                return if ends { Err(refusal) } else { Ok(true) };
            }
        };
        let held = held.map(Arc::new);
        let nothing = batches.is_empty();
        for stored in batches {
            let left = self.granted.0 - self.used.0;
            if left == 0 || self.used.1 >= self.granted.1 {
                break;
            }
            let delivery = cut(as_stored(&stored), self.next, left);
            let range = delivery.deliver[0];
            let bytes = stored.payload.len();
            self.used.0 += range.last + 1 - range.first;
            self.used.1 += bytes as u64;
            self.next = range.last + 1;
            self.shared.metrics.dispatch_messages.inc_by(range.last + 1 - range.first);
            self.shared.metrics.dispatch_bytes.inc_by(bytes as u64);
            let reply = ConsumeReply { reply: Some(Reply::Delivery(delivery)) };
            outbox.push_holding(reply, bytes, held.clone());
        }
        Ok(nothing)
    }

    fn frame(&mut self, outbox: &Outbox<ConsumeReply>, frame: ConsumeFrame) -> Result<(), Refusal> {
        match frame.frame {
            Some(Frame::Credit(Credit { messages, bytes })) => {
                self.granted = (self.granted.0.max(messages), self.granted.1.max(bytes));
            }
            Some(Frame::Ping(ping)) => {
                outbox.push(ConsumeReply { reply: Some(Reply::Pong(ping)) }, 0);
            }
            Some(Frame::Settle(settle)) => {
                let _nothing_to_settle: Option<Verb> = settle.verb;
                let refused: SettleRefused =
                    invalid("a reader holds nothing that could be settled")
                        .settle_refused(settle.token);
                outbox.push(ConsumeReply { reply: Some(Reply::SettleRefused(refused)) }, 0);
            }
            Some(Frame::Open(_)) => {
                return Err(Refusal::new(Reason::UnexpectedFrame, "the stream is open already"));
            }
            None => {
                return Err(Refusal::new(Reason::UnexpectedFrame, "a frame of an unknown kind"));
            }
        }
        Ok(())
    }
}
