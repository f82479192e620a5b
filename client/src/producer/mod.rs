//! The producer: a handle that routes messages to one task per segment.
//!
//! ```text
//! send: size? -> bytes of the budget -> segment by the watched layout -> queue of the segment's task
//! segment_stream.rs: the task; batcher.rs cuts batches; chain.rs keeps their sequences over refusals and breaks;
//! content.rs: a sealed batch; line.rs: the stream, its credit and heartbeat
//! ```

mod batcher;
mod chain;
mod content;
mod line;
mod segment_stream;

use std::{
    collections::BTreeMap,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use geminga_proto::{
    names::{ProducerName, TopicName},
    reason::Reason,
    v1::AccessMode,
};
use geminga_runtime::{
    budget::ByteBudget,
    clock::{Clock, SystemClock},
    tasks::Tasks,
    telemetry::{MessageSpan, SpanKind, TraceContext},
};
use parking_lot::Mutex;
use tokio::{
    sync::{
        mpsc::{self, error::TrySendError},
        oneshot,
    },
    time::{Instant, timeout_at},
};

pub use self::batcher::Batching;
use self::{
    batcher::{Asks, Queued},
    segment_stream::{Command, SegmentStream, Settings},
};
use crate::{
    builder::Parts,
    codec::{Compression, record_len},
    error::Error,
    layout::LayoutWatch,
    message::{Message, Receipt, topic_name},
    routing::{Router, Routing},
};

/// Largest message, bytes: key, value, headers and what frames them, as the server counts it.
const MESSAGE_BYTES_MAX: usize = 5 * 1024 * 1024;
/// What a message costs the budget beyond its own bytes.
const MESSAGE_OVERHEAD_BYTES: usize = 256;
/// Messages that wait for a segment's task; a sender past that waits.
const QUEUED_MESSAGES_MAX: usize = 1024;

/// Settings of a [`Producer`].
#[derive(Clone, Debug)]
pub struct ProducerBuilder {
    parts: Parts,
    topic: String,
    name: Option<String>,
    routing: Routing,
    batching: Batching,
    compression: Compression,
    memory_bytes: u64,
    message_timeout: Duration,
    create_topic: bool,
    trace_ratio: f64,
    access: Access,
}

/// Who may publish to the topic's segments beside this producer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// Anybody.
    #[default]
    Shared,
    /// Nobody: refused while another producer is there, and others are refused while this one is.
    Exclusive,
    /// As exclusive, but the producers that are there are fenced: they end with an error. Needs a name.
    ExclusiveWithFencing,
}

impl Access {
    fn on_the_wire(self) -> AccessMode {
        match self {
            Self::Shared => AccessMode::Shared,
            Self::Exclusive => AccessMode::Exclusive,
            Self::ExclusiveWithFencing => AccessMode::ExclusiveWithFencing,
        }
    }
}

impl ProducerBuilder {
    pub(crate) fn new(parts: Parts, topic: String) -> Self {
        Self {
            parts,
            topic,
            name: None,
            routing: Routing::default(),
            batching: Batching::default(),
            compression: Compression::default(),
            memory_bytes: 64 * 1024 * 1024,
            message_timeout: Duration::from_secs(60),
            create_topic: true,
            trace_ratio: 0.0,
            access: Access::default(),
        }
    }

    /// A name of the user's own: sequences go on where the last producer of this name stopped, and a newer one of the same
    /// name fences this one. Without it the server names a session.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// How messages are spread over segments. Default: by key hash.
    #[must_use]
    pub fn routing(mut self, routing: Routing) -> Self {
        self.routing = routing;
        self
    }

    /// How messages are gathered into batches.
    #[must_use]
    pub fn batching(mut self, batching: Batching) -> Self {
        self.batching = batching;
        self
    }

    /// How batches are compressed. Default: not.
    #[must_use]
    pub fn compression(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self
    }

    /// Bytes that all messages without an answer may hold together; [`Producer::send`] waits past it. Default 64 MiB.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory_bytes = bytes;
        self
    }

    /// Time from `send` to an answer, after which a message fails. Default 60 s.
    #[must_use]
    pub fn message_timeout(mut self, timeout: Duration) -> Self {
        self.message_timeout = timeout;
        self
    }

    /// Who else may publish to a segment from the first message that this producer sends there. Default anybody.
    #[must_use]
    pub fn access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    /// Whether a missing topic is created where its namespace allows it. Default yes.
    #[must_use]
    pub fn create_topic(mut self, create: bool) -> Self {
        self.create_topic = create;
        self
    }

    /// The share of messages without a `traceparent` header that get one of a new, recorded trace (W3C trace context), 0 to
    /// 1. Default 0.
    #[must_use]
    pub fn trace_ratio(mut self, ratio: f64) -> Self {
        self.trace_ratio = ratio;
        self
    }

    /// Reads the topic's layout. Streams are opened with the first message for each segment.
    ///
    /// # Errors
    /// A refusal (a name, a missing topic), or that the server does not answer within the client's open timeout.
    pub async fn build(self) -> Result<Producer, Error> {
        let topic = topic_name(&self.topic)?;
        let name = self.name.as_deref().map(ProducerName::parse).transpose()?;
        if self.access == Access::ExclusiveWithFencing && name.is_none() {
            let words = "exclusive access with fencing needs a producer name";
            return Err(Error::refused(Reason::InvalidRequest, words));
        }
        let parts = self.parts;
        let deadline = Instant::now() + parts.open_timeout;
        let layout = LayoutWatch::start(
            &parts.connections,
            &topic,
            self.create_topic,
            &parts.random,
            &parts.tasks,
            deadline,
        )
        .await?;
        let batching = self.batching.bounded();
        let sticky = batching.linger.max(Duration::from_millis(10));
        let start = parts.random.below(1 << 32);
        // A session counts its streams from 1; a name outlives processes, so its streams count by wall time.
        let first_stream = name.as_ref().map_or(1, |_| SystemClock.now().0.saturating_mul(1_000));
        Ok(Producer(Arc::new(Inner {
            budget: ByteBudget::new(self.memory_bytes),
            lanes: Mutex::new(Lanes {
                router: Router::new(self.routing, batching.bytes_max, sticky, start),
                streams: BTreeMap::new(),
                closed: false,
            }),
            layout,
            settings: Settings {
                batching,
                compression: self.compression,
                name,
                message_timeout: self.message_timeout,
                first_stream,
                access: self.access.on_the_wire(),
                heartbeat: parts.heartbeat,
            },
            trace_ratio: self.trace_ratio,
            topic,
            parts,
        })))
    }
}

/// Publishes to one topic. Clones share everything; when the last one is dropped without [`Self::close`], messages without
/// an answer are of unknown outcome.
#[derive(Clone, Debug)]
pub struct Producer(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    parts: Parts,
    topic: TopicName,
    layout: LayoutWatch,
    settings: Settings,
    trace_ratio: f64,
    budget: ByteBudget,
    lanes: Mutex<Lanes>,
}

#[derive(Debug)]
struct Lanes {
    router: Router,
    streams: BTreeMap<u32, mpsc::Sender<Command>>,
    closed: bool,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.parts.tasks.abort();
    }
}

/// The receipt of one message, to come. Dropping it abandons the answer, not the message.
#[derive(Debug)]
#[must_use = "a message is stored only once its receipt came"]
pub struct Pending {
    answer: oneshot::Receiver<Result<Receipt, Error>>,
    /// Ends when the receipt is taken, or given up.
    _span: Option<MessageSpan>,
}

impl Future for Pending {
    type Output = Result<Receipt, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.answer).poll(context).map(|answer| {
            answer.unwrap_or_else(|_| Err(Error::Indeterminate("the producer was dropped".into())))
        })
    }
}

impl Producer {
    /// Takes a message: waits for room, then returns the future of its receipt. Messages of one caller, and of equal keys,
    /// are stored in the order of these calls.
    ///
    /// Cancel-safe: dropped while it waits, the message was not taken.
    ///
    /// # Errors
    /// `MESSAGE_TOO_LARGE` past 5 MiB of key, value, headers and their framing; `SEGMENT_NOT_FOUND` if no segment takes it;
    /// not sent, if there was no room within the message timeout; closed.
    pub async fn send(&self, message: Message) -> Result<Pending, Error> {
        self.send_as(message, Asks::default(), None).await
    }

    /// As [`Self::send`], but the message is stored only if it gets this offset in its segment: a conditional append. Else
    /// it is refused, and the refusal says which offset it would have got. It goes as a batch of its own.
    ///
    /// Offsets count per segment: let messages of one key, or [`Routing::Segment`], choose it.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub async fn send_expecting(&self, message: Message, offset: u64) -> Result<Pending, Error> {
        let asks = Asks { expected_offset: Some(offset), ..Asks::default() };
        self.send_as(message, asks, None).await
    }

    /// A message with a sequence and a hash of its own: it is stored once per name, segment and sequence, over restarts
    /// too (TX8).
    pub(crate) async fn send_at(
        &self,
        message: Message,
        sequence: u64,
        hash: u32,
    ) -> Result<Pending, Error> {
        let asks = Asks { sequence: Some(sequence), ..Asks::default() };
        self.send_as(message, asks, Some(hash)).await
    }

    async fn send_as(
        &self,
        mut message: Message,
        asks: Asks,
        hash: Option<u32>,
    ) -> Result<Pending, Error> {
        let inner = &*self.0;
        let mut now = Instant::now();
        let deadline = now + inner.settings.message_timeout;
        let span = self.trace(&mut message);
        let size = record_len(&message);
        if size > MESSAGE_BYTES_MAX {
            let words = format!(
                "a message has {size} bytes of key, value and headers, at most {MESSAGE_BYTES_MAX} are allowed"
            );
            return Err(Error::refused(Reason::MessageTooLarge, words));
        }
        let late = |_| Error::NotSent { within: inner.settings.message_timeout, trouble: None };
        let bytes = (size + MESSAGE_OVERHEAD_BYTES) as u64;
        let permit = match inner.budget.try_acquire(bytes) {
            Some(permit) => permit,
            None => {
                let permit =
                    timeout_at(deadline, inner.budget.acquire(bytes)).await.map_err(late)?;
                now = Instant::now();
                permit
            }
        };
        let (answer, pending) = oneshot::channel();
        let queued = Queued { asks, message, size, hash: 0, deadline, answer, permit };
        if let Some((lane, queued)) = self.queue(queued, hash, now)? {
            let sent =
                timeout_at(deadline, lane.send(Command::Send(queued))).await.map_err(late)?;
            sent.map_err(|_| Error::Closed)?;
        }
        Ok(Pending { answer: pending, _span: span })
    }

    /// Waits until every message taken so far is answered, one way or the other. Their receipts tell which.
    ///
    /// # Errors
    /// Closed meanwhile.
    pub async fn flush(&self) -> Result<(), Error> {
        let lanes: Vec<_> = self.0.lanes.lock().streams.values().cloned().collect();
        self.ask_all(lanes, Command::Flush).await
    }

    /// Takes no more messages, waits until all are answered, and ends the streams. A message whose `send` was still waiting
    /// for room fails as closed.
    ///
    /// Cancel-safe: dropped while it waits, no more messages are taken, and it can be called again.
    ///
    /// # Errors
    /// None today.
    pub async fn close(&self) -> Result<(), Error> {
        let lanes = {
            let mut lanes = self.0.lanes.lock();
            lanes.closed = true;
            lanes.streams.values().cloned().collect()
        };
        self.ask_all(lanes, Command::Close).await
    }

    /// The topic it publishes to.
    #[must_use]
    pub fn topic(&self) -> &TopicName {
        &self.0.topic
    }

    async fn ask_all(
        &self,
        lanes: Vec<mpsc::Sender<Command>>,
        command: fn(oneshot::Sender<()>) -> Command,
    ) -> Result<(), Error> {
        let mut answers = Vec::with_capacity(lanes.len());
        for lane in lanes {
            let (done, answer) = oneshot::channel();
            if lane.send(command(done)).await.is_ok() {
                answers.push(answer);
            }
        }
        for answer in answers {
            answer.await.map_err(|_| Error::Closed)?;
        }
        Ok(())
    }

    /// Puts a message into the queue of its segment's task, which is started for its first message. Gives both back when
    /// the queue is full.
    fn queue(
        &self,
        mut queued: Queued,
        hash: Option<u32>,
        now: Instant,
    ) -> Result<Option<(mpsc::Sender<Command>, Queued)>, Error> {
        let inner = &*self.0;
        let mut lanes = inner.lanes.lock();
        let lanes = &mut *lanes;
        if lanes.closed {
            return Err(Error::Closed);
        }
        let route = inner
            .layout
            .with(|known| match hash {
                Some(hash) => known.table.place(hash),
                None => lanes.router.route(&known.table, &queued.message, queued.size, now),
            })
            .ok_or_else(|| {
                Error::refused(
                    Reason::SegmentNotFound,
                    "no segment of the topic takes this message",
                )
            })?;
        queued.hash = route.hash;
        let lane = lanes.streams.entry(route.segment).or_insert_with(|| self.start(route.segment));
        match lane.try_send(Command::Send(queued)) {
            Ok(()) => Ok(None),
            Err(TrySendError::Full(Command::Send(queued))) => Ok(Some((lane.clone(), queued))),
            Err(_) => Err(Error::Closed),
        }
    }

    /// Starts the task of a segment.
    fn start(&self, segment: u32) -> mpsc::Sender<Command> {
        let inner = &*self.0;
        let (lane, inbox) = mpsc::channel(QUEUED_MESSAGES_MAX);
        let stream = SegmentStream::new(
            inner.parts.connections.clone(),
            inner.parts.random.clone(),
            inner.topic.clone(),
            segment,
            inner.layout.clone(),
            inner.settings.clone(),
            inbox,
        );
        self.tasks().spawn("producer segment", stream.run());
        lane
    }

    fn tasks(&self) -> &Tasks {
        &self.0.parts.tasks
    }

    /// Gives the message its place in a trace, and begins the span of its send where this process exports spans.
    fn trace(&self, message: &mut Message) -> Option<MessageSpan> {
        let inner = &*self.0;
        let given = message.headers.get(TraceContext::HEADER);
        let given = given.and_then(|text| TraceContext::parse(text).ok());
        let parent = match given {
            Some(given) => given,
            None if inner.trace_ratio > 0.0
                && !message.headers.contains_key(TraceContext::HEADER) =>
            {
                let chance = inner.parts.random.below(1 << 32) as f64 / f64::from(u32::MAX);
                if chance > inner.trace_ratio {
                    return None;
                }
                let root = TraceContext::root(&inner.parts.random, true);
                message.headers.insert(TraceContext::HEADER.to_owned(), root.to_string());
                root
            }
            None => return None,
        };
        let mut span = MessageSpan::below(&parent, "send", SpanKind::Producer, "send")?;
        span.set("messaging.destination.name", inner.topic.to_string());
        message.headers.insert(TraceContext::HEADER.to_owned(), span.context().to_string());
        Some(span)
    }
}
