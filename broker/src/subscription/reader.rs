//! Reading without a subscription: a stream from a place on, and a peek. No cursor moves, nothing is settled, and nobody is
//! kept from anything.

use std::sync::Arc;

use futures::StreamExt;
use geminga_managed_ledger::{CompactedRead, CompactedReadError, ReadError, StoredBatch};
use geminga_proto::{
    ids::Offset,
    reason::Reason,
    v1::{
        ConsumeFrame, ConsumeOpened, ConsumeReply, Credit, Delivery, OffsetRange, OpenConsume,
        PeekRequest, PeekResponse, ReadFrom, ReaderAt, SettleRefused, SubscriptionStart,
        consume_frame::Frame, consume_reply::Reply, read_from::From as Place, settle::Verb,
    },
};
use tokio::time::{Duration, sleep};

use super::{gate::Frames, handle::invalid, pace::Pace};
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

/// A stored batch as a delivery of all its messages, in a compacted view of those that are kept, without handle and attempt.
pub(super) fn as_stored(stored: &StoredBatch) -> Delivery {
    let header = &stored.header;
    let producer = header.producer.as_ref();
    let kept = stored.kept().into_iter();
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
        deliver: kept.map(|(first, last)| OffsetRange { first: first.0, last: last.0 }).collect(),
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

/// Where a compacted reader begins: a place in the log may have been trimmed and live on in the view. And the horizon when it
/// began; none for one that begins at an offset, since it may go on from an earlier stream.
async fn compacted_from(
    segment: &Segment,
    from: Option<ReadFrom>,
) -> Result<(u64, Option<Offset>), Refusal> {
    let ledger = segment.ledger();
    let since = ledger.compaction().compacted_to;
    let (first, end) = (ledger.first_offset().0, ledger.end().borrow().0);
    match from.and_then(|from| from.from) {
        Some(Place::Offset(0)) => Ok((0, Some(since))),
        Some(Place::Offset(offset)) => Ok((offset.min(end), None)),
        Some(Place::At(at)) if at == i32::from(SubscriptionStart::Earliest) => Ok((0, Some(since))),
        Some(Place::TimeMs(_)) => {
            let found = offset_of(segment, from).await?;
            let also_in_view = found <= first && first < since.0;
            Ok((if also_in_view { 0 } else { found }, Some(since)))
        }
        _ => Ok((offset_of(segment, from).await?, Some(since))),
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
    // One read gives what is at hand of one place: memory, or a ledger.
    let mut bytes = PEEK_BYTES_MAX.min(context.config.limits.outbox_bytes_max);
    let (mut at, mut left) = (from, most);
    while left > 0 && bytes > 0 && at < response.next_offset {
        let read = ledger.read(Offset(at), bytes, left as usize).await;
        let batches = match read {
            Ok(batches) if batches.is_empty() => break,
            Ok(batches) => batches,
            // What was found is good.
            Err(_) if !response.deliveries.is_empty() => break,
            Err(error) => return Err(storage_errors::of_read(&error)),
        };
        for stored in batches {
            if left == 0 {
                break;
            }
            let delivery = cut(as_stored(&stored), at, left);
            left -= delivery.deliver.iter().map(|range| range.last + 1 - range.first).sum::<u64>();
            bytes = bytes.saturating_sub(stored.payload.len());
            at = stored.end().0;
            response.deliveries.push(delivery);
        }
    }
    Ok(response)
}

/// A delivery of what lies at or after `from`, at most so many.
fn cut(mut delivery: Delivery, from: u64, most: u64) -> Delivery {
    let mut left = most;
    delivery.deliver.retain_mut(|range| {
        range.first = range.first.max(from);
        if range.first > range.last || left == 0 {
            return false;
        }
        range.last = range.last.min(range.first + left - 1);
        left -= range.last + 1 - range.first;
        true
    });
    delivery
}

/// A reader's stream.
pub(super) struct Reader {
    pub(super) shared: Shared,
    pub(super) segment: Arc<Segment>,
    pub(super) layout_epoch: u64,
    pub(super) next: u64,
    /// Reads the compacted view below its horizon.
    pub(super) compacted: Option<Compacted>,
    pub(super) granted: (u64, u64),
    pub(super) used: (u64, u64),
    pub(super) pace: Pace,
}

/// Of a compacted reader: the horizon when it began; none for one that may go on from before.
#[derive(Clone, Copy)]
pub(super) struct Compacted {
    since: Option<Offset>,
}

/// Where a reader begins, and how it reads.
///
/// # Errors
/// As [`offset_of`].
pub(super) async fn begin(
    segment: &Segment,
    open: &OpenConsume,
) -> Result<(u64, Option<Compacted>), Refusal> {
    if open.compacted {
        let (next, since) = compacted_from(segment, open.reader).await?;
        return Ok((next, Some(Compacted { since })));
    }
    Ok((offset_of(segment, open.reader).await?, None))
}

#[expect(clippy::large_enum_variant, reason = "one at a time, on the stack")]
enum Event {
    Woken,
    Pace,
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
            if self.goes_on(last, outbox) {
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
            let more = self.goes_on(last, outbox);
            let event = tokio::select! {
                biased;
                why = &mut ended => return Err(why),
                go_away = &mut told_to_go, if !told => {
                    told = true;
                    outbox.push(ConsumeReply { reply: Some(Reply::GoAway(go_away)) }, 0);
                    Event::Woken
                }
                () = outbox.changed() => Event::Woken,
                () = self.pace.changed() => Event::Pace,
                frame = frames.next(), if outbox.is_open() => Event::Frame(frame),
                changed = end.changed() => match changed {
                    Ok(()) => Event::Woken,
                    Err(_) => return Err(segment.ended().await),
                },
                () = std::future::ready(()), if more => Event::Woken,
            };
            match event {
                Event::Woken => {}
                Event::Pace => {
                    if self.pace.look(&shared, &segment, outbox)? {
                        return Ok(());
                    }
                }
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
            compacted_to: match self.compacted {
                Some(_) => self.segment.ledger().compaction().compacted_to.0,
                None => 0,
            },
            ..ConsumeOpened::default()
        };
        ConsumeReply { reply: Some(Reply::Opened(opened)) }
    }

    fn wants(&self, end: u64) -> bool {
        self.next < end && self.used.0 < self.granted.0 && self.used.1 < self.granted.1
    }

    /// Whether it reads on now: there is something, it may have it, and its rate lets it go.
    fn goes_on(&mut self, end: u64, outbox: &Outbox<ConsumeReply>) -> bool {
        let wanted = self.wants(end) && outbox.is_open();
        self.pace.passes(wanted, &self.shared.metrics) && wanted
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
        let CompactedRead { batches, next } = match self.batches(bytes, messages).await {
            Ok(read) => read,
            Err(CompactedReadError::Superseded) => {
                let why = "the compacted view that this reader began with was replaced too long ago: read anew";
                return Err(Refusal::request(why));
            }
            Err(CompactedReadError::Read(ReadError::Trimmed { first })) => {
                self.next = self.next.max(first.0);
                return Ok(false);
            }
            Err(CompactedReadError::Read(error)) => {
                let refusal = storage_errors::of_read(&error);
                let ends = matches!(refusal.reason, Reason::SegmentFenced | Reason::ReadDamaged);
                return if ends { Err(refusal) } else { Ok(true) };
            }
        };
        let held = held.map(Arc::new);
        let nothing = batches.is_empty() && next.0 <= self.next;
        let mut all = true;
        for stored in batches {
            let left = self.granted.0 - self.used.0;
            let passes = self.pace.passes(true, &self.shared.metrics);
            if left == 0 || self.used.1 >= self.granted.1 || !passes {
                return Ok(false);
            }
            let whole = as_stored(&stored);
            let last = whole.deliver.last().map(|range| range.last);
            let delivery = cut(whole, self.next, left);
            let Some(end) = delivery.deliver.last().map(|range| range.last) else { continue };
            let messages: u64 = delivery.deliver.iter().map(|r| r.last + 1 - r.first).sum();
            let bytes = stored.payload.len();
            self.used.0 += messages;
            self.used.1 += bytes as u64;
            // Behind the last one that is kept nothing of the batch is.
            all = last == Some(end);
            self.next = if all { stored.end().0 } else { end + 1 };
            self.pace.took(messages, bytes as u64, &self.shared.metrics);
            self.shared.metrics.dispatch_messages.inc_by(messages);
            self.shared.metrics.dispatch_bytes.inc_by(bytes as u64);
            let reply = ConsumeReply { reply: Some(Reply::Delivery(delivery)) };
            outbox.push_holding(reply, bytes, held.clone());
        }
        if all {
            self.next = self.next.max(next.0);
        }
        Ok(nothing)
    }

    /// What lies at the reader's place, and where to go on.
    async fn batches(
        &self,
        bytes: u64,
        messages: u64,
    ) -> Result<CompactedRead, CompactedReadError> {
        let (ledger, from) = (self.segment.ledger(), Offset(self.next));
        let (bytes, messages) = (bytes as usize, messages as usize);
        match self.compacted {
            Some(Compacted { since }) => ledger.read_compacted(from, since, bytes, messages).await,
            None => {
                let batches = ledger.read(from, bytes, messages).await?;
                let next = batches.last().map_or(from, StoredBatch::end);
                Ok(CompactedRead { batches, next })
            }
        }
    }

    fn frame(&mut self, outbox: &Outbox<ConsumeReply>, frame: ConsumeFrame) -> Result<(), Refusal> {
        self.pace.heard();
        match frame.frame {
            Some(Frame::Credit(Credit { messages, bytes })) => {
                self.granted = (self.granted.0.max(messages), self.granted.1.max(bytes));
            }
            Some(Frame::Ping(ping)) => {
                // Where it stands, also past what a view leaves out: who reads a table knows that it has all.
                let at = ReaderAt { next_offset: self.next };
                outbox.push(ConsumeReply { reply: Some(Reply::ReaderAt(at)) }, 0);
                outbox.push(ConsumeReply { reply: Some(Reply::Pong(ping)) }, 0);
            }
            Some(Frame::Settle(settle)) => {
                let _nothing_to_settle: Option<Verb> = settle.verb;
                let refused: SettleRefused =
                    invalid("a reader holds nothing that could be settled")
                        .settle_refused(settle.token);
                outbox.push(ConsumeReply { reply: Some(Reply::SettleRefused(refused)) }, 0);
            }
            // Ends with the stream: a reader holds nothing.
            Some(Frame::Leave(_)) => {}
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

#[cfg(test)]
mod tests {
    use geminga_proto::storage::v1::EntryHeader;

    use super::*;

    fn stored(kept_runs: &[u32]) -> StoredBatch {
        let kept_runs = kept_runs.to_vec();
        let header =
            EntryHeader { base_offset: 10, count: 10, kept_runs, ..EntryHeader::default() };
        StoredBatch { base_offset: Offset(10), header, payload: "payload".into() }
    }

    fn ranges(delivery: &Delivery) -> Vec<(u64, u64)> {
        delivery.deliver.iter().map(|range| (range.first, range.last)).collect()
    }

    #[test]
    fn a_delivery_names_what_is_kept_from_the_readers_place_on_and_no_more_than_it_may_have() {
        let whole = |from, most| ranges(&cut(as_stored(&stored(&[])), from, most));
        assert_eq!(whole(0, 100), [(10, 19)]);
        assert_eq!(whole(13, 4), [(13, 16)]);
        let kept = |from, most| ranges(&cut(as_stored(&stored(&[1, 2, 3, 1, 1, 2])), from, most));
        assert_eq!(kept(0, 100), [(11, 12), (16, 16), (18, 19)]);
        assert_eq!(kept(12, 2), [(12, 12), (16, 16)]);
        assert_eq!(kept(13, 2), [(16, 16), (18, 18)]);
        assert_eq!(kept(20, 2), []);
        let delivery = as_stored(&stored(&[1, 2]));
        assert_eq!((delivery.base_offset, delivery.count), (10, 10), "offsets stay as they are");
    }
}
