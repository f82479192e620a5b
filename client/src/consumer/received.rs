//! A message as the application gets it, and what it can ask for it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use geminga_runtime::telemetry::{MessageSpan, SpanKind, TraceContext};

use super::{asked::Ask, desk::Desk, desk::Settling};
use crate::{
    error::Error,
    message::{Message, MessageId, Stored},
};

/// Longest reason of a reject, bytes.
const REASON_BYTES_MAX: usize = 256;

/// One message, received by a consumer.
///
/// It stays this consumer's until it is settled, its lease runs out ([`ConsumerBuilder::processing_time_max`]), or the
/// server takes it back; what is asked for it then fails with [`Error::NotHeld`]. Dropping it settles nothing: it comes
/// again when its lease is over, or when the consumer is closed.
///
/// [`ConsumerBuilder::processing_time_max`]: crate::ConsumerBuilder::processing_time_max
#[derive(Clone, Debug)]
pub struct Received {
    /// Where it lies.
    pub id: MessageId,
    /// What placed it.
    pub key: Option<Bytes>,
    /// The payload.
    pub value: Bytes,
    /// Application headers, by name.
    pub headers: BTreeMap<String, String>,
    /// Set by the producer; milliseconds since the Unix epoch.
    pub event_time_ms: Option<u64>,
    /// When the server took it; milliseconds since the Unix epoch.
    pub publish_time_ms: u64,
    /// Who published it.
    pub producer: Arc<str>,
    /// The number of this delivery, from 1: it rises with each one before that counted as failed.
    pub attempt: u32,
    delivery: u64,
    desk: Arc<Desk>,
}

impl Received {
    pub(super) fn new(stored: Stored, attempt: u32, delivery: u64, desk: Arc<Desk>) -> Self {
        let Stored { id, key, value, headers, event_time_ms, publish_time_ms, producer } = stored;
        Self {
            id,
            key,
            value,
            headers,
            event_time_ms,
            publish_time_ms,
            producer,
            attempt,
            delivery,
            desk,
        }
    }

    /// Begins the span of processing this message; none where its trace is not recorded or this process exports no spans. It
    /// ends when dropped.
    #[must_use]
    pub fn process_span(&self) -> Option<MessageSpan> {
        let sent = TraceContext::parse(self.headers.get(TraceContext::HEADER)?).ok()?;
        let mut span = MessageSpan::linked_to(&sent, "process", SpanKind::Consumer, "process")?;
        span.set("messaging.destination.partition.id", i64::from(self.id.segment));
        span.set("messaging.geminga.offset", i64::try_from(self.id.offset).unwrap_or(i64::MAX));
        Some(span)
    }

    /// The message alone.
    #[must_use]
    pub fn to_stored(&self) -> Stored {
        Stored {
            id: self.id,
            key: self.key.clone(),
            value: self.value.clone(),
            headers: self.headers.clone(),
            event_time_ms: self.event_time_ms,
            publish_time_ms: self.publish_time_ms,
            producer: Arc::clone(&self.producer),
        }
    }

    /// The same content as a new message to publish.
    #[must_use]
    pub fn to_message(&self) -> Message {
        Message {
            key: self.key.clone(),
            value: self.value.clone(),
            headers: self.headers.clone(),
            event_time_ms: self.event_time_ms,
            ..Message::default()
        }
    }

    /// It is done. Asked for at once; the future is its durable confirmation.
    pub fn accept(&self) -> Settling {
        self.ask(Ask::Accept)
    }

    /// This message and everything before it in its segment is done (exclusive and failover subscriptions).
    pub fn accept_up_to(&self) -> Settling {
        self.ask(Ask::AcceptUpTo)
    }

    /// It failed: deliver it again after the subscription's backoff. Counts as an attempt; after the last one allowed the
    /// message goes to the dead-letter topic.
    pub fn release(&self) -> Settling {
        self.ask(Ask::Release { delay_ms: None, counts: true })
    }

    /// It failed: deliver it again, not before `delay` is over. Counts as an attempt.
    pub fn release_after(&self, delay: Duration) -> Settling {
        self.ask(Ask::Release { delay_ms: Some(as_millis(delay)), counts: true })
    }

    /// Not now, and it is not the message's fault: deliver it again after `delay` (zero: at once), to anybody. Does not
    /// count.
    pub fn give_back(&self, delay: Duration) -> Settling {
        let delay_ms = (!delay.is_zero()).then(|| as_millis(delay));
        self.ask(Ask::Release { delay_ms, counts: false })
    }

    /// It will never be done: to the dead-letter topic now. `reason` is kept with it; at most 256 bytes.
    pub fn reject(&self, reason: impl Into<String>) -> Settling {
        let reason = reason.into();
        if reason.len() > REASON_BYTES_MAX {
            let words = format!(
                "a reason has {} bytes, at most {REASON_BYTES_MAX} are allowed",
                reason.len()
            );
            return Settling::failed(Error::refused(crate::Reason::InvalidRequest, words));
        }
        self.ask(Ask::Reject(reason.into()))
    }

    /// More time: it stays this consumer's for so long from now on; zero: the subscription's lease again. Of no effect on
    /// exclusive and failover subscriptions, which hold messages while they are connected.
    pub fn extend(&self, time: Duration) -> Settling {
        self.ask(Ask::Extend(as_millis(time)))
    }

    fn ask(&self, ask: Ask) -> Settling {
        self.desk.ask(self.id.offset, self.delivery, ask)
    }
}

/// Whole milliseconds, rounded up: a pause is never cut short.
fn as_millis(time: Duration) -> u64 {
    u64::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}
