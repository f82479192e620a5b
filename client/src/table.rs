//! The table view: the latest value of each key of a topic, from a reader; first what is there, then every change.
//!
//! Compacted segments are read from their compacted view, which is shorter and makes the same table: what it leaves out is
//! followed by a later message of its key, or is gone. Since the last messages of a view may be left out, the reader asks the
//! server how far it has read to know that all is there.

use std::{collections::BTreeMap, future::poll_fn, pin::Pin, task::Poll, time::Duration};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use geminga_proto::{names::TopicName, reason::Reason};
use tokio::time::{Instant, timeout};

use crate::{
    builder::Client,
    consumer::{Position, Reached, Reader},
    error::Error,
    message::Stored,
};

/// What a table may hold unless it is told otherwise.
const KEYS_MAX: usize = 10_000_000;
/// A table that is being read and gets nothing for so long gives up.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// While nothing comes, the server is asked this often how far it has read.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// Settings of a [`Table`].
#[derive(Clone, Debug)]
pub struct TableBuilder {
    client: Client,
    topic: String,
    keys_max: usize,
}

impl TableBuilder {
    pub(crate) fn new(client: Client, topic: String) -> Self {
        Self { client, topic, keys_max: KEYS_MAX }
    }

    /// Most keys it may hold; past that it ends with an error, since a table with holes would lie. Default 10 million.
    #[must_use]
    pub fn keys_max(mut self, keys: usize) -> Self {
        self.keys_max = keys;
        self
    }

    /// Reads everything that is in the topic now.
    ///
    /// # Errors
    /// A refusal; that the server does not answer, or sends nothing for a minute while there is more; too many keys.
    pub async fn build(self) -> Result<Table, Error> {
        match self.read(true).await? {
            Some(table) => Ok(table),
            // The server cannot say when a compacted reader has everything: the whole log says it by its last offset.
            None => self.read(false).await?.ok_or(Error::Closed),
        }
    }

    /// The table as it is now; none if the server does not say what it takes to know that everything was read.
    async fn read(&self, compacted: bool) -> Result<Option<Table>, Error> {
        let reader = self.client.reader(&self.topic).from(Position::Earliest);
        let reader = if compacted { reader.compacted() } else { reader };
        let reader = reader.build().await?;
        let mut missing = BTreeMap::new();
        for segment in reader.segments() {
            let ends = self.client.peek(&self.topic, segment, Position::Earliest, 1).await?;
            let end = End { offset: ends.next_offset, kept: ends.first_offset < ends.next_offset };
            missing.insert(segment, end);
        }
        let latest = Latest { entries: BTreeMap::new(), keys_max: self.keys_max };
        let mut table = Table { reader, latest };
        let mut heard_at = Instant::now();
        loop {
            let reader = &table.reader;
            missing.retain(|segment, end| !end.is_reached(reader, *segment));
            if missing.is_empty() {
                return Ok(Some(table));
            }
            let unknowable = |segment| {
                reader.compacted_to(segment) > 0 && reader.reached(segment) == Reached::NotTold
            };
            if missing.keys().any(|segment| unknowable(*segment)) {
                return Ok(None);
            }
            match timeout(ASK_EVERY, next_or_end(&mut table.reader, &missing)).await {
                Ok(None) => {}
                Ok(Some(stored)) => {
                    heard_at = Instant::now();
                    let stored = stored.ok_or(Error::Closed)??;
                    let id = stored.id;
                    table.latest.apply(stored)?;
                    if missing.get(&id.segment).is_some_and(|end| id.offset + 1 >= end.offset) {
                        missing.remove(&id.segment);
                    }
                }
                Err(_) if heard_at.elapsed() >= SILENCE_MAX => {
                    let words = "the topic was not read to its end: nothing comes";
                    return Err(Error::Unavailable(words.into()));
                }
                Err(_) => missing.keys().for_each(|segment| table.reader.ask_reached(*segment)),
            }
        }
    }
}

/// Where a segment ended when the table was begun.
#[derive(Clone, Copy, Debug)]
struct End {
    offset: u64,
    /// Whether its log has messages, beside what its compacted view may have.
    kept: bool,
}

impl End {
    /// Whether everything below is read, as far as the server says. Its last message says it too, when it comes.
    fn is_reached(self, reader: &Reader, segment: u32) -> bool {
        self.offset == 0
            || match reader.reached(segment) {
                Reached::Upto(next) => next >= self.offset,
                Reached::NotTold => !self.kept && reader.compacted_to(segment) == 0,
                Reached::Unknown => false,
            }
    }
}

/// The next message, or nothing as soon as a segment's end is reached. Cancel-safe.
async fn next_or_end(
    reader: &mut Reader,
    missing: &BTreeMap<u32, End>,
) -> Option<Option<Result<Stored, Error>>> {
    poll_fn(|context| match Pin::new(&mut *reader).poll_next(context) {
        Poll::Ready(item) => Poll::Ready(Some(item)),
        Poll::Pending if missing.iter().any(|(segment, end)| end.is_reached(reader, *segment)) => {
            Poll::Ready(None)
        }
        Poll::Pending => Poll::Pending,
    })
    .await
}

/// The latest value of each key. Messages without a key are passed by; one with an empty value removes its key.
///
/// Which of two messages of a key is the later one: within a segment the one behind the other; over segments, where a key
/// should not be, the one that the server took later.
#[derive(Debug)]
pub struct Table {
    reader: Reader,
    latest: Latest,
}

/// One change of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Update {
    /// The key has this value now.
    Put(Stored),
    /// The key is gone.
    Removed(Bytes),
}

impl Table {
    /// The latest message of this key.
    #[must_use]
    pub fn get(&self, key: &[u8]) -> Option<&Stored> {
        self.latest.entries.get(key)
    }

    /// All keys with their latest messages, in the order of the keys.
    pub fn iter(&self) -> impl Iterator<Item = (&Bytes, &Stored)> {
        self.latest.entries.iter()
    }

    /// How many keys there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.latest.entries.len()
    }

    /// Whether there is no key.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.latest.entries.is_empty()
    }

    /// The topic it is of.
    #[must_use]
    pub fn topic(&self) -> &TopicName {
        self.reader.topic()
    }

    /// Waits for the next change and takes it in. Cancel-safe.
    ///
    /// # Errors
    /// What the reader met, or too many keys: the table does not change any more then.
    pub async fn next_update(&mut self) -> Result<Update, Error> {
        loop {
            let stored = self.reader.next().await.ok_or(Error::Closed)??;
            if let Some(update) = self.latest.apply(stored)? {
                return Ok(update);
            }
        }
    }
}

/// The table itself. Pure.
#[derive(Debug)]
struct Latest {
    entries: BTreeMap<Bytes, Stored>,
    keys_max: usize,
}

impl Latest {
    /// Takes a message in; what it changed, if anything.
    fn apply(&mut self, stored: Stored) -> Result<Option<Update>, Error> {
        let Some(key) = stored.key.clone() else { return Ok(None) };
        let before = self.entries.get(&key);
        if before.is_some_and(|before| is_later(before, &stored)) {
            return Ok(None);
        }
        if stored.value.is_empty() {
            return Ok(self.entries.remove(&key).map(|_| Update::Removed(key)));
        }
        if before.is_none() && self.entries.len() >= self.keys_max {
            let words = format!("the topic has more than {} keys", self.keys_max);
            return Err(Error::refused(Reason::InvalidRequest, words));
        }
        self.entries.insert(key, stored.clone());
        Ok(Some(Update::Put(stored)))
    }
}

/// Whether `one` is later than `other`, of the same key.
fn is_later(one: &Stored, other: &Stored) -> bool {
    if one.id.segment == other.id.segment {
        return one.id.offset > other.id.offset;
    }
    (one.publish_time_ms, one.id.segment) > (other.publish_time_ms, other.id.segment)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::message::MessageId;

    fn stored(segment: u32, offset: u64, key: Option<u8>, value: &str) -> Stored {
        Stored {
            id: MessageId { segment, offset },
            key: key.map(|key| Bytes::from(vec![key])),
            value: value.to_owned().into(),
            headers: BTreeMap::new(),
            event_time_ms: None,
            publish_time_ms: offset,
            producer: "p".into(),
        }
    }

    proptest! {
        /// Segments are read in any order against each other; the table is the same.
        #[test]
        fn the_latest_of_each_key_stays_however_segments_are_interleaved(
            log in prop::collection::vec((0u8..5, 0u32..3, 1u8..9), 1..60),
            order in prop::collection::vec(0u32..3, 0..120),
        ) {
            let mut segments: [Vec<Stored>; 3] = Default::default();
            let mut model = BTreeMap::new();
            for (time, (key, segment, value)) in (0u64..).zip(log) {
                let message = stored(segment, time, Some(key), &value.to_string());
                model.insert(Bytes::from(vec![key]), message.clone());
                segments[segment as usize].push(message);
            }
            let mut read = segments.map(Vec::into_iter);
            let mut latest = Latest { entries: BTreeMap::new(), keys_max: 100 };
            for segment in order.into_iter().chain([0, 1, 2].repeat(60)) {
                if let Some(message) = read[segment as usize].next() {
                    latest.apply(message).expect("few keys");
                }
            }
            prop_assert_eq!(latest.entries, model);
        }
    }

    #[test]
    fn an_empty_value_removes_its_key_and_the_limit_is_an_error() {
        let mut latest = Latest { entries: BTreeMap::new(), keys_max: 1 };
        assert_eq!(latest.apply(stored(0, 0, None, "x")), Ok(None));
        assert!(matches!(latest.apply(stored(0, 1, Some(1), "x")), Ok(Some(Update::Put(_)))));
        assert!(latest.apply(stored(0, 2, Some(2), "x")).is_err());
        let removed = latest.apply(stored(0, 3, Some(1), ""));
        assert_eq!(removed, Ok(Some(Update::Removed(Bytes::from_static(&[1])))));
        assert_eq!(latest.apply(stored(0, 4, Some(1), "")), Ok(None));
    }
}
