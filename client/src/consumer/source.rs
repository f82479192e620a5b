//! What comes from one segment, handed out message by message.

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use geminga_proto::{
    records::Records,
    v1::{Codec, Delivery, PayloadFormat, Record},
};

use super::{desk::Desk, segment_stream::Inbound};
use crate::{
    error::Error,
    message::{MessageId, Stored},
};

#[derive(Debug)]
pub(super) struct Source {
    pub(super) desk: Arc<Desk>,
    current: Option<Current>,
    /// Everything below was handed out, or lies before what was.
    pub(super) handed_out: u64,
    pub(super) ended: bool,
}

/// A message with what its settle needs.
#[derive(Debug)]
pub(super) struct Handed {
    pub(super) stored: Stored,
    pub(super) attempt: u32,
    pub(super) key: u64,
}

#[derive(Debug)]
struct Current {
    batch: Batch,
    stream: u64,
    key: u64,
    messages: u64,
    bytes: u64,
}

impl Source {
    pub(super) fn new(desk: Arc<Desk>) -> Self {
        Self { desk, current: None, handed_out: 0, ended: false }
    }

    /// Whether messages of a delivery are left: the next segment's turn comes behind them.
    pub(super) fn is_amid_a_batch(&self) -> bool {
        self.current.is_some()
    }

    pub(super) fn poll(
        &mut self,
        segment: u32,
        context: &Context<'_>,
    ) -> Poll<Option<Result<Handed, Error>>> {
        loop {
            match self.hand_out(segment) {
                Ok(Some(handed)) => return Poll::Ready(Some(Ok(handed))),
                Ok(None) if self.ended => return Poll::Ready(None),
                Ok(None) => {}
                Err(error) => return Poll::Ready(Some(Err(self.damaged(error)))),
            }
            let inbound = match self.desk.poll_delivery(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(Ok(inbound))) => inbound,
                Poll::Ready(Some(Err(error))) => {
                    self.ended = true;
                    return Poll::Ready(Some(Err(error)));
                }
                Poll::Ready(None) => {
                    self.ended = true;
                    return Poll::Ready(None);
                }
            };
            let Inbound { stream, key, delivery, offsets, messages, bytes } = inbound;
            match Batch::open(delivery, offsets) {
                Ok(batch) => self.current = Some(Current { batch, stream, key, messages, bytes }),
                Err(error) => return Poll::Ready(Some(Err(self.damaged(error)))),
            }
        }
    }

    /// What was delivered cannot be read: no more is asked for, pending settles go on.
    fn damaged(&mut self, error: Error) -> Error {
        self.current = None;
        self.ended = true;
        self.desk.close();
        error
    }

    fn hand_out(&mut self, segment: u32) -> Result<Option<Handed>, Error> {
        loop {
            let Some(current) = &mut self.current else { return Ok(None) };
            let next = current.batch.next(segment)?;
            // What was left of a broken stream comes again on the new one.
            if next.is_some() && !self.desk.see(current.stream) {
                self.current = None;
                return Ok(None);
            }
            let (key, attempt) = (current.key, current.batch.attempt);
            if current.batch.is_over() {
                self.desk.taken(current.stream, current.messages, current.bytes);
                self.current = None;
            }
            let Some(stored) = next else { return Ok(None) };
            let offset = stored.id.offset;
            self.handed_out = self.handed_out.max(offset.saturating_add(1));
            if !self.desk.is_revoked(offset, key) {
                return Ok(Some(Handed { stored, attempt, key }));
            }
        }
    }
}

/// A delivered batch, read message by message.
#[derive(Debug)]
pub(crate) struct Batch {
    records: Records,
    /// The offset of the next record.
    at: u64,
    /// Offsets to hand out, as inclusive ranges; the next one is the last.
    offsets: Vec<(u64, u64)>,
    producer: Arc<str>,
    publish_time_ms: u64,
    pub(crate) attempt: u32,
}

impl Batch {
    /// `offsets` are ascending and lie within the batch.
    pub(crate) fn open(delivery: Delivery, mut offsets: Vec<(u64, u64)>) -> Result<Self, Error> {
        if delivery.format != i32::from(PayloadFormat::Native) {
            return Err(Error::Damaged(format!(
                "payload format {} is not known here",
                delivery.format
            )));
        }
        let codec = Codec::try_from(delivery.codec)
            .map_err(|_| Error::Damaged(format!("codec {} is not known here", delivery.codec)))?;
        let records =
            Records::open(codec, delivery.uncompressed_size, delivery.count, delivery.payload)?;
        offsets.reverse();
        Ok(Self {
            records,
            at: delivery.base_offset,
            offsets,
            producer: delivery.producer_name.into(),
            publish_time_ms: delivery.publish_time_ms,
            attempt: delivery.attempt.max(1),
        })
    }

    fn is_over(&self) -> bool {
        self.offsets.is_empty()
    }

    /// The next message to hand out. Ranges are ascending and within the batch, which has its count of records.
    pub(crate) fn next(&mut self, segment: u32) -> Result<Option<Stored>, Error> {
        let Some((first, last)) = self.offsets.last().copied() else { return Ok(None) };
        while self.at < first {
            self.records.skip()?;
            self.at += 1;
        }
        let offset = self.at;
        self.at += 1;
        if offset >= last {
            self.offsets.pop();
        }
        Ok(self.records.read()?.map(|record| self.stored(MessageId { segment, offset }, record)))
    }

    fn stored(&self, id: MessageId, record: Record) -> Stored {
        Stored {
            id,
            key: record.key,
            value: record.value,
            headers: record.headers.into_iter().collect(),
            event_time_ms: record.event_time_ms,
            publish_time_ms: self.publish_time_ms,
            producer: Arc::clone(&self.producer),
        }
    }
}

/// The ranges that a delivery hands over: they rise and lie within the batch. None for anything else.
pub(crate) fn ranges_of(delivery: &Delivery) -> Option<Vec<(u64, u64)>> {
    let end = delivery.base_offset.checked_add(u64::from(delivery.count))?;
    let mut from = delivery.base_offset;
    let mut ranges = Vec::with_capacity(delivery.deliver.len());
    for range in &delivery.deliver {
        if range.first < from || range.last < range.first || range.last >= end {
            return None;
        }
        from = range.last + 1;
        ranges.push((range.first, range.last));
    }
    (!ranges.is_empty()).then_some(ranges)
}
