//! What the application asked of its messages, by offset: what waits to be sent, and what is on its way. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use bytes::Bytes;
use geminga_proto::v1::OffsetRange;
use tokio::{sync::oneshot, time::Instant};

use super::holds::RANGES_MAX;
use crate::error::Error;

/// Waiting settles looked at for one frame.
const LOOKED_AT_MAX: usize = 4_096;

/// Who waits for an answer.
pub(crate) type Waiter = oneshot::Sender<Result<(), Error>>;

/// What the application wants of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    Accept,
    /// And everything below.
    AcceptUpTo,
    Release {
        delay_ms: Option<u64>,
        counts: bool,
    },
    Reject(Arc<str>),
    /// From when the server hears of it; 0: the subscription's lease.
    Extend(u64),
}

/// One wish as the application asked for it.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) offset: u64,
    /// Of the delivery that is meant; 0: whichever is held (accept-up-to only).
    pub(crate) key: u64,
    pub(crate) ask: Ask,
    pub(crate) deadline: Instant,
    pub(crate) waiter: Waiter,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) entries: BTreeMap<u64, Entry>,
    /// Those to be sent.
    pub(super) waiting: BTreeSet<u64>,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) ask: Ask,
    pub(super) key: u64,
    pub(super) handle: Bytes,
    /// The frame it is in.
    pub(super) sent: Option<u64>,
    /// It was in a frame whose answer got lost.
    pub(super) uncertain: bool,
    /// Most messages of a frame with this one: a frame is refused as a whole.
    pub(super) together_max: usize,
    pub(super) deadline: Instant,
    pub(super) waiters: Vec<Waiter>,
}

impl Entry {
    pub(super) fn answer(self, result: &Result<(), Error>) {
        for waiter in self.waiters {
            let _ = waiter.send(result.clone()); // nobody may wait any more
        }
    }

    /// Its message is not ours any more.
    pub(super) fn not_held(self) {
        let error = if self.uncertain {
            Error::Indeterminate(
                "the stream broke before the answer, and the message is not held any more".into(),
            )
        } else {
            Error::not_held()
        };
        self.answer(&Err(error));
    }

    fn goes_with(&self, other: &(Bytes, Ask, usize)) -> bool {
        self.handle == other.0 && self.ask == other.1 && self.together_max == other.2
    }
}

impl Table {
    pub(super) fn wait(&mut self, offset: u64) {
        if let Some(entry) = self.entries.get_mut(&offset) {
            entry.sent = None;
            self.waiting.insert(offset);
        }
    }

    pub(super) fn remove(&mut self, offset: u64) -> Option<Entry> {
        self.waiting.remove(&offset);
        self.entries.remove(&offset)
    }

    /// Takes out what matches.
    pub(super) fn extract(&mut self, matches: impl Fn(u64, &Entry) -> bool) -> Vec<(u64, Entry)> {
        let found: Vec<u64> = self
            .entries
            .iter()
            .filter(|(offset, entry)| matches(**offset, entry))
            .map(|(offset, _)| *offset)
            .collect();
        found.into_iter().filter_map(|offset| Some((offset, self.remove(offset)?))).collect()
    }

    /// Those in the frame with this token, which lie in `ranges`.
    pub(super) fn in_frame(&self, token: u64, ranges: &[OffsetRange]) -> Vec<u64> {
        let inside = ranges.iter().flat_map(|range| self.entries.range(range.first..=range.last));
        inside.filter(|(_, entry)| entry.sent == Some(token)).map(|(offset, _)| *offset).collect()
    }

    /// The ranges of the next frame: the first that waits, and those that may go with it.
    pub(super) fn gather(&mut self, token: u64) -> Option<(Bytes, Ask, Vec<OffsetRange>)> {
        let first = *self.waiting.first()?;
        let entry = self.entries.get(&first)?;
        let like = (entry.handle.clone(), entry.ask.clone(), entry.together_max);
        let mut ranges: Vec<OffsetRange> = Vec::new();
        let mut gathered = Vec::new();
        for offset in self.waiting.iter().take(LOOKED_AT_MAX) {
            if gathered.len() >= like.2 {
                break;
            }
            let Some(entry) = self.entries.get_mut(offset) else { continue };
            if !entry.goes_with(&like) {
                continue;
            }
            let full = ranges.len() == RANGES_MAX;
            match ranges.last_mut() {
                Some(range) if range.last + 1 == *offset => range.last = *offset,
                _ if full => break,
                _ => ranges.push(OffsetRange { first: *offset, last: *offset }),
            }
            entry.sent = Some(token);
            gathered.push(*offset);
        }
        for offset in gathered {
            self.waiting.remove(&offset);
        }
        Some((like.0, like.1, ranges))
    }
}
