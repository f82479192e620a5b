//! A sealed batch: what is sent of it, and who waits for its receipt. Pure.

use bytes::Bytes;
use geminga_proto::{
    reason::Reason,
    v1::{
        self, Codec, DurabilityLevel, PayloadFormat, PublishFrame, RecordIndex,
        publish_frame::Frame,
    },
};
use geminga_runtime::telemetry::TraceContext;
use tokio::time::Instant;

use super::{
    batcher::{Asks, Cut, Waiters},
    chain::{Chain, Link, Placed},
};
use crate::{
    codec::{Compression, compress},
    error::Error,
    message::{Level, MessageId, Receipt},
};

/// A sealed batch.
pub(super) struct Content {
    codec: Codec,
    payload: Bytes,
    uncompressed: u32,
    index: RecordIndex,
    /// The first message's place among all of this stream.
    pub(super) number: u64,
    asks: Asks,
    waiters: Waiters,
    trace: Option<TraceContext>,
}

impl Content {
    fn seal(cut: Cut, compression: Compression) -> Self {
        let uncompressed = cut.records.len() as u32;
        let (codec, payload) = compress(cut.records, compression);
        Self {
            codec,
            payload,
            uncompressed,
            index: RecordIndex {
                key_hash: cut.hashes,
                has_key: cut.has_key,
                deliver_at_ms: cut.deliver_at_ms,
            },
            asks: cut.asks,
            number: cut.number,
            waiters: cut.waiters,
            trace: cut.trace,
        }
    }

    /// Bytes that are sent.
    pub(super) fn bytes(&self) -> usize {
        self.payload.len()
    }

    /// Tells every message that it is stored; `receipt`: none where it got lost.
    pub(super) fn stored(self, segment: u32, receipt: Option<&v1::Receipt>) {
        let base = receipt.map(|receipt| receipt.base_offset).filter(|base| *base != u64::MAX);
        let answer = Receipt {
            segment,
            id: None,
            level: receipt.map_or(Level::Unknown, |receipt| {
                Level::of(DurabilityLevel::try_from(receipt.level).unwrap_or_default())
            }),
            epoch: receipt.map_or(0, |receipt| receipt.epoch),
            duplicate: receipt.is_none_or(|receipt| receipt.duplicate),
        };
        self.waiters.answer(|place| {
            let id = base.map(|base| MessageId { segment, offset: base.saturating_add(place) });
            Ok(Receipt { id, ..answer })
        });
    }

    /// Tells every message that it failed.
    pub(super) fn fail(self, error: &Error) {
        fail([self.waiters], error);
    }
}

/// Seals a batch and puts it behind those of the chain. One with a sequence of its own may be stored already, or be refused:
/// it is answered at once then.
pub(super) fn push(chain: &mut Chain<Content>, cut: Cut, compression: Compression, segment: u32) {
    let (count, deadline, sequence) = (cut.waiters.len() as u64, cut.deadline, cut.asks.sequence);
    let content = Content::seal(cut, compression);
    match sequence {
        None => chain.push(count, deadline, content),
        Some(sequence) => place(chain, segment, sequence, deadline, content),
    }
}

fn place(
    chain: &mut Chain<Content>,
    segment: u32,
    sequence: u64,
    deadline: Instant,
    content: Content,
) {
    match chain.push_at(sequence, deadline, content) {
        Placed::Waits => {}
        Placed::Stored(content) => content.waiters.answer(|_| {
            let level = Level::Unknown;
            Ok(Receipt { segment, id: None, level, epoch: 0, duplicate: true })
        }),
        Placed::Behind(content) => {
            let words = format!("sequence {sequence} is not above those before it");
            content.fail(&Error::refused(Reason::SequenceConflict, words));
        }
    }
}

/// A batch as it goes over the wire.
pub(super) fn frame(prev: u64, link: &Link<Content>) -> PublishFrame {
    let content = &link.content;
    PublishFrame {
        frame: Some(Frame::Batch(v1::Batch {
            prev_sequence: prev,
            lo_sequence: link.lo,
            hi_sequence: link.hi,
            format: PayloadFormat::Native.into(),
            codec: content.codec.into(),
            uncompressed_size: content.uncompressed,
            index: Some(content.index.clone()),
            count: content.waiters.len() as u32,
            payload: content.payload.clone(),
            traceparent: content.trace.map(|trace| trace.to_string()).unwrap_or_default(),
            expected_offset: content.asks.expected_offset,
        })),
    }
}

/// Tells messages that they failed.
pub(super) fn fail(waiters: impl IntoIterator<Item = Waiters>, error: &Error) {
    for waiters in waiters {
        waiters.answer(|_| Err(error.clone()));
    }
}

/// What was in flight on a stream that is gone may have been stored; the rest was not.
pub(super) fn fail_link(link: Link<Content>, error: &Error) {
    if link.uncertain {
        link.content.fail(&Error::Indeterminate(error.to_string()));
    } else {
        link.content.fail(error);
    }
}
