//! The reader: messages as they are stored, from a place on, without a subscription and without a trace in any.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use futures::Stream;
use geminga_proto::{
    names::TopicName,
    v1::{ReadFrom, read_from},
};
use tokio::time::Instant;

use super::{
    Reached, Sources, Start, Window, random_name,
    segment_stream::{Settings, Target},
};
use crate::{
    builder::Parts,
    error::Error,
    message::{Stored, topic_name},
};

/// Where reading begins, on each segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Position {
    /// With the oldest message kept.
    #[default]
    Earliest,
    /// With the first message published from now on.
    Latest,
    /// With this offset, or the oldest kept behind it.
    Offset(u64),
    /// With the first message published at or after this time; milliseconds since the Unix epoch.
    TimeMs(u64),
}

impl Position {
    pub(crate) fn on_the_wire(self) -> ReadFrom {
        let from = match self {
            Self::Earliest => read_from::From::At(Start::Earliest.on_the_wire().into()),
            Self::Latest => read_from::From::At(Start::Latest.on_the_wire().into()),
            Self::Offset(offset) => read_from::From::Offset(offset),
            Self::TimeMs(time) => read_from::From::TimeMs(time),
        };
        ReadFrom { from: Some(from) }
    }
}

/// Settings of a [`Reader`].
#[derive(Clone, Debug)]
pub struct ReaderBuilder {
    parts: Parts,
    topic: String,
    from: Position,
    compacted: bool,
    segments: Option<Vec<u32>>,
    window: Window,
}

impl ReaderBuilder {
    pub(crate) fn new(parts: Parts, topic: String) -> Self {
        let (from, window) = (Position::default(), Window::default());
        Self { parts, topic, from, compacted: false, segments: None, window }
    }

    /// Where reading begins. Default: with the oldest message kept.
    #[must_use]
    pub fn from(mut self, from: Position) -> Self {
        self.from = from;
        self
    }

    /// Below the compaction horizon of a segment, reads only the latest message of each key, and everything from there on.
    /// A key whose latest message there is empty, and messages without a key, are left out. A topic that was never compacted
    /// is read as a whole.
    #[must_use]
    pub fn compacted(mut self) -> Self {
        self.compacted = true;
        self
    }

    /// Reads only these segments. Default: all of the layout as it is when the reader is built.
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
    /// A refusal (a name, a missing topic), or that the server does not answer within the client's open timeout.
    pub async fn build(self) -> Result<Reader, Error> {
        let settings = Settings {
            topic: topic_name(&self.topic)?,
            target: Target::Reader { from: self.from.on_the_wire(), compacted: self.compacted },
            name: random_name(&self.parts)?,
            window: self.window,
            heartbeat: self.parts.heartbeat,
            open_by: Instant::now() + self.parts.open_timeout,
        };
        Ok(Reader(Sources::open(self.parts, settings, false, self.segments).await?))
    }
}

/// A stream of the messages of a topic, each once and in the order of its segment, over breaks too. It does not end by
/// itself: behind the newest message it waits for the next one. One of a compacted topic may get, after a break, the latest
/// message of a key where it would have got several.
#[derive(Debug)]
pub struct Reader(Sources);

impl Reader {
    /// The topic it reads.
    #[must_use]
    pub fn topic(&self) -> &TopicName {
        &self.0.topic
    }

    /// The segments it reads.
    #[must_use]
    pub fn segments(&self) -> Vec<u32> {
        self.0.sources.keys().copied().collect()
    }

    /// Messages below this offset of the segment came from its compacted view; 0: none did.
    #[must_use]
    pub fn compacted_to(&self, segment: u32) -> u64 {
        self.0.sources.get(&segment).map_or(0, |source| source.desk.compacted_to())
    }

    /// Asks the server how far it has read a segment.
    pub(crate) fn ask_reached(&self, segment: u32) {
        if let Some(source) = self.0.sources.get(&segment) {
            source.desk.ask_reached();
        }
    }

    /// How far this reader has come in a segment.
    pub(crate) fn reached(&self, segment: u32) -> Reached {
        self.0.sources.get(&segment).map_or(Reached::Unknown, |source| source.desk.reached())
    }
}

impl Stream for Reader {
    type Item = Result<Stored, Error>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let sources = &mut self.get_mut().0;
        sources.poll(context).map(|item| item.map(|(_, handed)| Ok(handed?.stored)))
    }
}
