//! The consumer: a stream of messages over all segments of a subscription, and their accepts.
//!
//! ```text
//! server -> segment_stream.rs (one task a segment, credit) -> desk.rs -> Consumer::poll_next: decode, hand out
//! accept -> desk.rs -> settles.rs: presented with the handle, again after a break, confirmed once durable
//! ```
//! One hop a delivery, none a message. A batch is decompressed when its turn comes, not before: what waits is bounded by
//! the credit, and what a broken stream had delivered is dropped when the next one begins.

mod desk;
mod segment_stream;
mod settles;

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::Stream;
use geminga_proto::{
    names::{ConsumerName, SubscriptionName, TopicName},
    reason::Reason,
    v1::{Codec, PayloadFormat, Record, SubscriptionStart},
};
use geminga_runtime::telemetry::{MessageSpan, SpanKind, TraceContext};
use tokio::{
    sync::oneshot,
    time::{Instant, timeout},
};

pub use self::desk::Settling;
use self::{
    desk::Desk,
    segment_stream::{Inbound, SegmentStream, Settings},
};
use crate::{
    builder::Parts,
    codec::Records,
    error::Error,
    layout::LayoutWatch,
    message::{MessageId, topic_name},
};

/// Time that [`Consumer::close`] waits for pending accepts.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);
/// Most messages of credit: each one may come as a delivery of its own.
const WINDOW_MESSAGES_MAX: u64 = 100_000;

/// Where a new subscription begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// With the oldest message kept.
    Earliest,
    /// With the first message published after it was created.
    #[default]
    Latest,
}

impl Start {
    pub(crate) fn on_the_wire(self) -> SubscriptionStart {
        match self {
            Self::Earliest => SubscriptionStart::Earliest,
            Self::Latest => SubscriptionStart::Latest,
        }
    }
}

/// Settings of a [`Consumer`].
#[derive(Clone, Debug)]
pub struct ConsumerBuilder {
    parts: Parts,
    topic: String,
    subscription: String,
    name: Option<String>,
    create_at: Option<Start>,
    create_topic: bool,
    segments: Option<Vec<u32>>,
    window_messages: u64,
    window_bytes: u64,
}

impl ConsumerBuilder {
    pub(crate) fn new(parts: Parts, topic: String, subscription: String) -> Self {
        Self {
            parts,
            topic,
            subscription,
            name: None,
            create_at: None,
            create_topic: false,
            segments: None,
            window_messages: 20_000,
            window_bytes: 8 * 1024 * 1024,
        }
    }

    /// A name for this consumer; by default a random one.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Creates the subscription here when it is missing. Without it a missing subscription is an error.
    #[must_use]
    pub fn start(mut self, start: Start) -> Self {
        self.create_at = Some(start);
        self
    }

    /// Whether a missing topic is created where its namespace allows it. Default no.
    #[must_use]
    pub fn create_topic(mut self, create: bool) -> Self {
        self.create_topic = create;
        self
    }

    /// Consumes only these segments. Default: all of the layout as it is when the consumer is built.
    #[must_use]
    pub fn segments(mut self, segments: impl IntoIterator<Item = u32>) -> Self {
        self.segments = Some(segments.into_iter().collect());
        self
    }

    /// The credit a segment: how much may be delivered and not handed out. Held between 1 and 100,000 messages, and
    /// between 64 KiB and 1 GiB. Default 20,000 messages, 8 MiB.
    #[must_use]
    pub fn window(mut self, messages: u64, bytes: u64) -> Self {
        self.window_messages = messages.clamp(1, WINDOW_MESSAGES_MAX);
        self.window_bytes = bytes.clamp(64 * 1024, 1 << 30);
        self
    }

    /// Opens the streams of all segments.
    ///
    /// # Errors
    /// A refusal (a name, a missing topic or subscription, another consumer), or that the server does not answer within the
    /// client's open timeout.
    pub async fn build(self) -> Result<Consumer, Error> {
        let topic = topic_name(&self.topic)?;
        let subscription = SubscriptionName::parse(&self.subscription)?;
        let parts = self.parts;
        let name = match &self.name {
            Some(name) => ConsumerName::parse(name)?,
            None => ConsumerName::parse(&format!("consumer-{:016x}", parts.random.u64()))?,
        };
        let open_by = Instant::now() + parts.open_timeout;
        let layout = LayoutWatch::start(
            &parts.connections,
            &topic,
            self.create_topic,
            &parts.random,
            &parts.tasks,
            open_by,
        )
        .await?;
        // From here on dropping the consumer ends its tasks.
        let mut consumer =
            Consumer { sources: BTreeMap::new(), turn: 0, parts, topic: topic.clone() };
        let known: Vec<u32> = layout.with(|known| known.table.segments().collect());
        let wanted = self.segments.unwrap_or_else(|| known.clone());
        if let Some(missing) = wanted.iter().find(|segment| !known.contains(segment)) {
            let words = format!("{topic} has no segment {missing}");
            return Err(Error::refused(Reason::SegmentNotFound, words));
        }
        let settings = Settings {
            topic,
            subscription,
            name,
            create_at: self.create_at.map(Start::on_the_wire),
            window_messages: self.window_messages,
            window_bytes: self.window_bytes,
            open_by,
        };
        let mut opening = Vec::with_capacity(wanted.len());
        for segment in wanted {
            opening.push(consumer.add(segment, &layout, &settings));
        }
        for ready in opening {
            ready.await.map_err(|_| Error::Closed)??;
        }
        Ok(consumer)
    }
}

/// One message, received.
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
    /// From 1; higher if it was delivered before.
    pub attempt: u32,
    stream: u64,
    desk: Arc<Desk>,
}

impl Received {
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

    /// Accepts this message. Asked for at once; the future is its durable confirmation.
    pub fn accept(&self) -> Settling {
        self.desk.accept(self.id.offset, false, self.stream)
    }

    /// Accepts this message and everything before it in its segment.
    pub fn accept_up_to(&self) -> Settling {
        self.desk.accept(self.id.offset, true, self.stream)
    }
}

/// A stream of the messages of a subscription. It ends after [`Self::close`], or with the errors of all segments.
///
/// Dropping it without close leaves accepts that are not confirmed of unknown outcome.
#[derive(Debug)]
pub struct Consumer {
    sources: BTreeMap<u32, Source>,
    /// The segment whose turn it is.
    turn: u32,
    parts: Parts,
    topic: TopicName,
}

/// What comes from one segment.
#[derive(Debug)]
struct Source {
    desk: Arc<Desk>,
    current: Option<Batch>,
    /// Stream and offset of what was handed out last.
    last: (u64, u64),
    /// Everything below was handed out, or lies before what was.
    handed_out: u64,
    ended: bool,
}

/// A delivery, handed out message by message.
#[derive(Debug)]
struct Batch {
    records: Records,
    /// The offset of the next record.
    at: u64,
    /// Offsets to hand out, as inclusive ranges; the next one is the last.
    offsets: Vec<(u64, u64)>,
    stream: u64,
    messages: u64,
    bytes: u64,
    producer: Arc<str>,
    publish_time_ms: u64,
    attempt: u32,
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.parts.tasks.abort();
    }
}

impl Consumer {
    fn add(
        &mut self,
        segment: u32,
        layout: &LayoutWatch,
        settings: &Settings,
    ) -> oneshot::Receiver<Result<(), Error>> {
        let desk = Arc::new(Desk::default());
        let (ready, opened) = oneshot::channel();
        let stream = SegmentStream::new(
            self.parts.connections.clone(),
            self.parts.random.clone(),
            segment,
            layout.clone(),
            settings.clone(),
            Arc::clone(&desk),
            ready,
        );
        self.parts.tasks.spawn("consumer segment", stream.run());
        self.sources.insert(
            segment,
            Source { desk, current: None, last: (0, 0), handed_out: 0, ended: false },
        );
        opened
    }

    /// Accepts everything up to this message in its segment. It must have been handed out by this consumer.
    pub fn accept_up_to(&self, id: MessageId) -> Settling {
        let Some(source) = self.sources.get(&id.segment) else {
            let words = format!("segment {} is not consumed here", id.segment);
            return Settling::failed(Error::refused(Reason::SegmentNotFound, words));
        };
        if id.offset >= source.handed_out {
            let words = format!("{id} was not handed out yet");
            return Settling::failed(Error::refused(Reason::InvalidHandle, words));
        }
        // What the present stream did not hand out yet was handed out on an earlier one.
        let (stream, last) = source.last;
        source.desk.accept(id.offset, true, if id.offset <= last { stream } else { 0 })
    }

    /// The topic it consumes.
    #[must_use]
    pub fn topic(&self) -> &TopicName {
        &self.topic
    }

    /// Asks for no more messages, waits until every accept is confirmed, and ends the streams.
    ///
    /// # Errors
    /// Accepts that were not confirmed within 30 s: they may or may not be durable.
    pub async fn close(self) -> Result<(), Error> {
        for source in self.sources.values() {
            source.desk.close();
        }
        let idle = async {
            for source in self.sources.values() {
                source.desk.ended().await;
            }
        };
        timeout(CLOSE_TIMEOUT, idle)
            .await
            .map_err(|_| Error::Indeterminate("accepts were not confirmed before the end".into()))
    }
}

impl Stream for Consumer {
    type Item = Result<Received, Error>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        // From the segment whose turn it is, around to the one before it.
        let turn = this.turn;
        for range in [turn..=u32::MAX, 0..=turn.saturating_sub(1)] {
            for (segment, source) in this.sources.range_mut(range) {
                if let Poll::Ready(Some(item)) = source.poll(*segment, context) {
                    // A batch at a time: when it is handed out, the next segment has its turn.
                    this.turn =
                        if source.current.is_some() { *segment } else { segment.wrapping_add(1) };
                    return Poll::Ready(Some(item));
                }
            }
        }
        if this.sources.values().all(|source| source.ended) {
            Poll::Ready(None)
        } else {
            Poll::Pending
        }
    }
}

impl Source {
    fn poll(
        &mut self,
        segment: u32,
        context: &Context<'_>,
    ) -> Poll<Option<Result<Received, Error>>> {
        loop {
            match self.hand_out(segment) {
                Ok(Some(received)) => return Poll::Ready(Some(Ok(received))),
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
            match Batch::open(inbound) {
                Ok(batch) => self.current = Some(batch),
                Err(error) => return Poll::Ready(Some(Err(self.damaged(error)))),
            }
        }
    }

    /// What was delivered cannot be read: no more is asked for, pending accepts go on.
    fn damaged(&mut self, error: Error) -> Error {
        self.current = None;
        self.ended = true;
        self.desk.close();
        error
    }

    fn hand_out(&mut self, segment: u32) -> Result<Option<Received>, Error> {
        let Some(batch) = &mut self.current else { return Ok(None) };
        if !self.desk.is_current(batch.stream) {
            self.current = None; // the rest comes again on the new stream
            return Ok(None);
        }
        let mut next = batch.next()?;
        while next.as_ref().is_some_and(|(offset, _)| self.desk.is_late(*offset)) {
            next = batch.next()?;
        }
        let received = next.map(|(offset, record)| {
            self.last = (batch.stream, offset);
            self.handed_out = self.handed_out.max(offset.saturating_add(1));
            Received {
                id: MessageId { segment, offset },
                key: record.key,
                value: record.value,
                headers: record.headers.into_iter().collect(),
                event_time_ms: record.event_time_ms,
                publish_time_ms: batch.publish_time_ms,
                producer: Arc::clone(&batch.producer),
                attempt: batch.attempt,
                stream: batch.stream,
                desk: Arc::clone(&self.desk),
            }
        });
        if batch.offsets.is_empty() {
            self.desk.taken(batch.stream, batch.messages, batch.bytes);
            self.current = None;
        }
        Ok(received)
    }
}

impl Batch {
    fn open(inbound: Inbound) -> Result<Self, Error> {
        let Inbound { stream, delivery, mut offsets, messages, bytes } = inbound;
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
            stream,
            messages,
            bytes,
            producer: delivery.producer_name.into(),
            publish_time_ms: delivery.publish_time_ms,
            attempt: delivery.attempt.max(1),
        })
    }

    /// The next message to hand out, with its offset. Ranges are ascending and within the batch, which has its count of
    /// records.
    fn next(&mut self) -> Result<Option<(u64, Record)>, Error> {
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
        Ok(self.records.next()?.map(|record| (offset, record)))
    }
}
