//! The consumer: a stream of messages over all segments of a subscription, and what is asked for them.
//!
//! ```text
//! server -> line.rs (stream, credit, heartbeat) -> segment_stream.rs (one task a segment) -> desk.rs -> source.rs: hand out
//! accept, release, reject, extend -> desk.rs -> settles.rs: presented under the handle held now, confirmed once durable
//!                                               holds.rs: what is held, claimed after a break (L4), leases extended
//! ```
//! One hop a delivery, none a message. A batch is decompressed when its turn comes, not before: what waits is bounded by
//! the credit. What a broken stream had delivered and the application has not seen is claimed, given back uncounted, and comes
//! again; what it has seen stays its own, if the server grants it.

mod asked;
mod desk;
mod holds;
mod line;
mod reader;
mod received;
mod segment_stream;
mod settles;
mod source;
mod unseen;

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::Stream;
use geminga_proto::{
    names::{ConsumerName, SubscriptionName, TopicName},
    reason::Reason,
    v1::{SubscriptionSettings, SubscriptionStart},
};
use tokio::{
    sync::oneshot,
    time::{Instant, timeout},
};

pub(crate) use self::desk::Reached;
pub(crate) use self::source::{Batch, ranges_of};
use self::{
    asked::Ask,
    desk::Desk,
    segment_stream::{SegmentStream, Settings, Target},
    source::{Handed, Source},
};
pub use self::{
    desk::Settling,
    reader::{Position, Reader, ReaderBuilder},
    received::Received,
};
use crate::{
    builder::Parts,
    error::Error,
    layout::LayoutWatch,
    message::{MessageId, topic_name},
};

/// Time that [`Consumer::close`] waits for pending settles.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);
/// Most messages of credit: each one may come as a delivery of its own.
const WINDOW_MESSAGES_MAX: u64 = 100_000;

/// The credit a segment: messages and bytes that may be delivered and not handed out.
#[derive(Clone, Copy, Debug)]
struct Window {
    messages: u64,
    bytes: u64,
}

impl Window {
    fn new(messages: u64, bytes: u64) -> Self {
        Self {
            messages: messages.clamp(1, WINDOW_MESSAGES_MAX),
            bytes: bytes.clamp(64 * 1024, 1 << 30),
        }
    }
}

impl Default for Window {
    fn default() -> Self {
        Self { messages: 20_000, bytes: 8 * 1024 * 1024 }
    }
}

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
    settings: Option<SubscriptionSettings>,
    segments: Option<Vec<u32>>,
    window: Window,
    processing_time_max: Duration,
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
            settings: None,
            segments: None,
            window: Window::default(),
            processing_time_max: Duration::from_secs(300),
        }
    }

    /// A name for this consumer; by default a random one. A consumer that attaches under a name replaces the one that has
    /// it: the other one ends. Failover subscriptions share their segments out by these names.
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

    /// Type, retry policy and lease of the subscription, if [`Self::start`] creates it. One that exists with others is
    /// refused; without this call any will do.
    #[must_use]
    pub fn settings(mut self, settings: SubscriptionSettings) -> Self {
        self.settings = Some(settings);
        self
    }

    /// How long a message that was handed out is kept from going to another consumer (shared and key-shared
    /// subscriptions): its lease is extended in time for so long, or until it is settled. Afterwards it counts as failed,
    /// unless [`Received::extend`] asked for more. Zero: it has the subscription's lease and no more. Default 5 minutes.
    #[must_use]
    pub fn processing_time_max(mut self, time: Duration) -> Self {
        self.processing_time_max = time.min(Duration::from_secs(30 * 24 * 3600));
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
        self.window = Window::new(messages, bytes);
        self
    }

    /// Opens the streams of all segments.
    ///
    /// # Errors
    /// A refusal (a name, a missing topic or subscription, another consumer, other settings), or that the server does not
    /// answer within the client's open timeout.
    pub async fn build(self) -> Result<Consumer, Error> {
        let topic = topic_name(&self.topic)?;
        let name = match &self.name {
            Some(name) => ConsumerName::parse(name)?,
            None => random_name(&self.parts)?,
        };
        let target = Target::Subscription {
            name: SubscriptionName::parse(&self.subscription)?,
            create_at: self.create_at.map(Start::on_the_wire),
            settings: self.settings,
            processing_time_max: self.processing_time_max,
        };
        let settings = Settings {
            topic,
            target,
            name,
            window: self.window,
            heartbeat: self.parts.heartbeat,
            open_by: Instant::now() + self.parts.open_timeout,
        };
        let sources = Sources::open(self.parts, settings, self.create_topic, self.segments).await?;
        Ok(Consumer(sources))
    }
}

fn random_name(parts: &Parts) -> Result<ConsumerName, Error> {
    Ok(ConsumerName::parse(&format!("consumer-{:016x}", parts.random.u64()))?)
}

/// A stream of the messages of a subscription. It ends after [`Self::close`], or with the errors of all segments.
///
/// Dropping it without close says nothing to the server: settles that are not confirmed are of unknown outcome, and what it
/// holds counts as failed when the server has waited for it to come back (5 s).
#[derive(Debug)]
pub struct Consumer(Sources);

impl Consumer {
    /// Accepts everything up to this message in its segment. It must have been handed out by this consumer.
    pub fn accept_up_to(&self, id: MessageId) -> Settling {
        let Some(source) = self.0.sources.get(&id.segment) else {
            let words = format!("segment {} is not consumed here", id.segment);
            return Settling::failed(Error::refused(Reason::SegmentNotFound, words));
        };
        if id.offset >= source.handed_out {
            let words = format!("{id} was not handed out yet");
            return Settling::failed(Error::refused(Reason::InvalidHandle, words));
        }
        source.desk.ask(id.offset, 0, Ask::AcceptUpTo)
    }

    /// The topic it consumes.
    #[must_use]
    pub fn topic(&self) -> &TopicName {
        &self.0.topic
    }

    /// The id of the topic that has the name now: another one when it was deleted and created again.
    pub(crate) fn topic_id(&self) -> u64 {
        self.0.layout.with(|known| known.topic_id)
    }

    /// Type, retry policy and lease of the subscription, as they were when its stream was opened last.
    #[must_use]
    pub fn settings(&self) -> SubscriptionSettings {
        self.0.sources.values().next().map(|source| source.desk.settings()).unwrap_or_default()
    }

    /// The segments whose messages this consumer gets now. On a failover subscription the server shares them out among the
    /// consumers, and this changes as they come and go; elsewhere it is every segment whose stream stands.
    #[must_use]
    pub fn active_segments(&self) -> Vec<u32> {
        let active = self.0.sources.iter().filter(|(_, source)| source.desk.is_active());
        active.map(|(segment, _)| *segment).collect()
    }

    /// Asks for no more messages, waits until every settle is confirmed, and leaves for good. What was delivered and not
    /// settled goes back to the subscription at once, and its attempt does not count.
    ///
    /// # Errors
    /// Settles that were not confirmed within 30 s: they may or may not be durable.
    pub async fn close(self) -> Result<(), Error> {
        self.0.close().await
    }
}

impl Stream for Consumer {
    type Item = Result<Received, Error>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let sources = &mut self.get_mut().0;
        sources.poll(context).map(|item| {
            item.map(|(desk, handed)| {
                let Handed { stored, attempt, key } = handed?;
                Ok(Received::new(stored, attempt, key, desk))
            })
        })
    }
}

/// What comes next, and the desk of the segment it is from.
type Item = (Arc<Desk>, Result<Handed, Error>);

/// The segments of a consumer or a reader, each with its task.
#[derive(Debug)]
struct Sources {
    sources: BTreeMap<u32, Source>,
    /// The segment whose turn it is.
    turn: u32,
    parts: Parts,
    topic: TopicName,
    layout: LayoutWatch,
}

impl Drop for Sources {
    fn drop(&mut self) {
        self.parts.tasks.abort();
    }
}

impl Sources {
    /// Opens a stream a segment: of `wanted`, or of the layout as it is now.
    async fn open(
        parts: Parts,
        settings: Settings,
        create_topic: bool,
        wanted: Option<Vec<u32>>,
    ) -> Result<Self, Error> {
        let topic = settings.topic.clone();
        let layout = LayoutWatch::start(
            &parts.connections,
            &topic,
            create_topic,
            &parts.random,
            &parts.tasks,
            settings.open_by,
        )
        .await?;
        // From here on dropping it ends its tasks.
        let (sources, watch) = (BTreeMap::new(), layout.clone());
        let mut opened = Self { sources, turn: 0, parts, topic: topic.clone(), layout: watch };
        let known: Vec<u32> = layout.with(|known| known.table.segments().collect());
        let wanted = wanted.unwrap_or_else(|| known.clone());
        if let Some(missing) = wanted.iter().find(|segment| !known.contains(segment)) {
            let words = format!("{topic} has no segment {missing}");
            return Err(Error::refused(Reason::SegmentNotFound, words));
        }
        let mut opening = Vec::with_capacity(wanted.len());
        for segment in wanted {
            opening.push(opened.add(segment, &layout, &settings));
        }
        for ready in opening {
            ready.await.map_err(|_| Error::Closed)??;
        }
        Ok(opened)
    }

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
        self.sources.insert(segment, Source::new(desk));
        opened
    }

    /// The next message, from the segment whose turn it is around to the one before it.
    fn poll(&mut self, context: &Context<'_>) -> Poll<Option<Item>> {
        let turn = self.turn;
        for range in [turn..=u32::MAX, 0..=turn.saturating_sub(1)] {
            for (segment, source) in self.sources.range_mut(range) {
                if let Poll::Ready(Some(item)) = source.poll(*segment, context) {
                    // A batch at a time: when it is handed out, the next segment has its turn.
                    let amid = source.is_amid_a_batch();
                    self.turn = if amid { *segment } else { segment.wrapping_add(1) };
                    return Poll::Ready(Some((Arc::clone(&source.desk), item)));
                }
            }
        }
        if self.sources.values().all(|source| source.ended) {
            Poll::Ready(None)
        } else {
            Poll::Pending
        }
    }

    async fn close(self) -> Result<(), Error> {
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
            .map_err(|_| Error::Indeterminate("settles were not confirmed before the end".into()))
    }
}
