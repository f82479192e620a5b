//! What the application accepted and the server has not confirmed. Pure.
//!
//! An accept is presented with the handle of its delivery, and a handle is good on its own stream only. After a break an
//! accept is *stale*: it waits until the server shows what became of it, by delivering the message again (then it is
//! presented with the new handle, and the message is not handed out again) or by going past it (then it was settled).
//!
//! ```text
//!      mark-delete     given, with handles      frontier
//!  ---------|------[======]----[=============]------|------>    below the frontier and not given: settled
//! ```

use std::collections::BTreeMap;

use bytes::Bytes;
use geminga_proto::v1::{Accept, AcceptUpTo, OffsetRange, Settle, settle::Verb};
use tokio::{sync::oneshot, time::Instant};

use crate::error::Error;

/// Ranges in one frame.
const RANGES_MAX: usize = 1_000;

/// Who waits for an accept to be durable.
pub(crate) type Waiter = oneshot::Sender<Result<(), Error>>;

/// One accept as the application asked for it.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) offset: u64,
    /// Everything at or below too.
    pub(crate) up_to: bool,
    pub(crate) deadline: Instant,
    pub(crate) waiter: Waiter,
}

/// All accepts of one segment that are not confirmed.
#[derive(Debug, Default)]
pub(crate) struct Settles {
    /// Rises with each stream.
    stream: u64,
    singles: BTreeMap<u64, Entry>,
    ups: BTreeMap<u64, Entry>,
    /// Some entry may be stale.
    any_stale: bool,
    /// What the present stream delivered above mark-delete: the runs by their first offset.
    given: BTreeMap<u64, Given>,
    /// Everything below was delivered on the present stream, or is settled.
    frontier: u64,
    next_token: u64,
    /// The offsets of each frame in flight.
    tokens: BTreeMap<u64, Vec<OffsetRange>>,
}

#[derive(Debug)]
struct Given {
    end: u64,
    handle: Bytes,
}

#[derive(Debug)]
struct Entry {
    handle: Bytes,
    state: State,
    deadline: Instant,
    waiters: Vec<Waiter>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waiting,
    Sent(u64),
    Stale,
}

impl Settles {
    /// Takes an accept of a message that was handed out on this stream or an earlier one. What the present stream went
    /// past without delivering it is settled.
    pub(crate) fn request(&mut self, request: Request) {
        let Request { offset, up_to, deadline, waiter } = request;
        let run = self
            .given
            .range(..=offset)
            .next_back()
            .filter(|(_, given)| up_to || offset < given.end);
        let (state, handle) = match run {
            _ if offset >= self.frontier => (State::Stale, Bytes::new()),
            Some((_, given)) => (State::Waiting, given.handle.clone()),
            None => return drop(waiter.send(Ok(()))), // nobody may wait any more
        };
        self.any_stale |= state == State::Stale;
        let entries = if up_to { &mut self.ups } else { &mut self.singles };
        let entry =
            entries.entry(offset).or_insert(Entry { handle, state, deadline, waiters: Vec::new() });
        entry.waiters.push(waiter);
    }

    /// Whether this message was accepted already: it is not handed out again.
    pub(crate) fn is_accepted(&self, offset: u64) -> bool {
        self.singles.contains_key(&offset)
            || self.ups.last_key_value().is_some_and(|(up_to, _)| offset <= *up_to)
    }

    /// A stream is open; everything below `mark_delete_next` is settled.
    pub(crate) fn on_opened(&mut self, mark_delete_next: u64) {
        self.stream += 1;
        self.tokens.clear();
        self.given.clear();
        self.frontier = mark_delete_next;
        for entry in self.singles.values_mut().chain(self.ups.values_mut()) {
            entry.state = State::Stale;
        }
        self.any_stale = true;
        self.settled_below(mark_delete_next);
    }

    /// The number of the present stream.
    pub(crate) fn stream(&self) -> u64 {
        self.stream
    }

    /// The server delivered `[start, end)`; everything below it that it did not deliver on this stream is settled.
    pub(crate) fn on_delivered(&mut self, start: u64, end: u64, handle: &Bytes) {
        self.frontier = self.frontier.max(end);
        match self.given.last_entry() {
            Some(mut last) if last.get().end == start && last.get().handle == *handle => {
                last.get_mut().end = end
            }
            _ => drop(self.given.insert(start, Given { end, handle: handle.clone() })),
        }
        if !std::mem::take(&mut self.any_stale) {
            return;
        }
        let revived = self.singles.range_mut(start..end).chain(self.ups.range_mut(..end));
        for (_, entry) in revived {
            if entry.state == State::Stale {
                entry.state = State::Waiting;
                entry.handle = handle.clone();
            }
        }
        let passed: Vec<u64> = self
            .singles
            .range(..end)
            .filter(|(_, entry)| entry.state == State::Stale)
            .map(|(offset, _)| *offset)
            .collect();
        for offset in passed {
            answer(self.singles.remove(&offset), &Ok(()));
        }
        let left = self.singles.range(end..).chain(self.ups.range(end..));
        self.any_stale = left.into_iter().any(|(_, entry)| entry.state == State::Stale);
    }

    /// The next frame to send, if anything waits.
    pub(crate) fn frame(&mut self) -> Option<Settle> {
        let token = self.next_token + 1;
        let verb = self.up_to_verb(token).or_else(|| self.accept_verb(token))?;
        self.next_token = token;
        let ranges = match &verb {
            Verb::Accept(accept) => accept.ranges.clone(),
            Verb::AcceptUpTo(up_to) => vec![OffsetRange { first: 0, last: up_to.offset }],
        };
        self.tokens.insert(token, ranges);
        Some(Settle { token, verb: Some(verb) })
    }

    /// Only the highest is sent: it covers the others.
    fn up_to_verb(&mut self, token: u64) -> Option<Verb> {
        let (offset, handle) = self
            .ups
            .iter()
            .rev()
            .find(|(_, entry)| entry.state == State::Waiting)
            .map(|(offset, entry)| (*offset, entry.handle.clone()))?;
        for (_, entry) in self.ups.range_mut(..=offset) {
            if entry.state == State::Waiting {
                entry.state = State::Sent(token);
            }
        }
        Some(Verb::AcceptUpTo(AcceptUpTo { offset, handle }))
    }

    fn accept_verb(&mut self, token: u64) -> Option<Verb> {
        let mut ranges: Vec<OffsetRange> = Vec::new();
        let mut with: Option<Bytes> = None;
        for (offset, entry) in &mut self.singles {
            let same_handle = with.as_ref().is_none_or(|handle| *handle == entry.handle);
            if entry.state != State::Waiting || !same_handle {
                continue;
            }
            let full = ranges.len() == RANGES_MAX;
            match ranges.last_mut() {
                Some(range) if range.last + 1 == *offset => range.last = *offset,
                _ if full => break,
                _ => ranges.push(OffsetRange { first: *offset, last: *offset }),
            }
            with.get_or_insert_with(|| entry.handle.clone());
            entry.state = State::Sent(token);
        }
        Some(Verb::Accept(Accept { ranges, handle: with? }))
    }

    /// The frame with this token is durable (C3).
    pub(crate) fn on_settled(&mut self, token: u64, mark_delete_next: u64) {
        let Some(ranges) = self.tokens.remove(&token) else { return };
        for entry in self.take(token, &ranges) {
            answer(Some(entry), &Ok(()));
        }
        self.settled_below(mark_delete_next);
    }

    /// The frame with this token was refused: tried again if that may help, else the accepts fail.
    pub(crate) fn on_refused(&mut self, token: u64, error: &Error, again: bool) {
        let Some(ranges) = self.tokens.remove(&token) else { return };
        if !again {
            for entry in self.take(token, &ranges) {
                answer(Some(entry), &Err(error.clone()));
            }
            return;
        }
        for entries in [&mut self.singles, &mut self.ups] {
            for range in &ranges {
                for (_, entry) in entries.range_mut(range.first..=range.last) {
                    if entry.state == State::Sent(token) {
                        entry.state = State::Waiting;
                    }
                }
            }
        }
    }

    /// Takes out what the frame with this token asked for, which lies in `ranges`.
    fn take(&mut self, token: u64, ranges: &[OffsetRange]) -> Vec<Entry> {
        let mut taken = Vec::new();
        for entries in [&mut self.singles, &mut self.ups] {
            for range in ranges {
                let offsets: Vec<u64> = entries
                    .range(range.first..=range.last)
                    .filter(|(_, entry)| entry.state == State::Sent(token))
                    .map(|(offset, _)| *offset)
                    .collect();
                taken.extend(offsets.into_iter().filter_map(|offset| entries.remove(&offset)));
            }
        }
        taken
    }

    fn settled_below(&mut self, mark_delete_next: u64) {
        while let Some(first) =
            self.given.first_entry().filter(|first| first.get().end <= mark_delete_next)
        {
            first.remove();
        }
        for entries in [&mut self.singles, &mut self.ups] {
            let kept = entries.split_off(&mark_delete_next);
            for (_, entry) in std::mem::replace(entries, kept) {
                answer(Some(entry), &Ok(()));
            }
        }
    }

    /// Accepts whose time is over fail.
    pub(crate) fn expire(&mut self, now: Instant) {
        for entries in [&mut self.singles, &mut self.ups] {
            let late: Vec<u64> = entries
                .iter()
                .filter(|(_, entry)| entry.deadline <= now)
                .map(|(offset, _)| *offset)
                .collect();
            for offset in late {
                let error = Error::Indeterminate("the accept was not confirmed in time".into());
                answer(entries.remove(&offset), &Err(error));
            }
        }
    }

    /// Nothing can be settled any more.
    pub(crate) fn fail(&mut self, error: &Error) {
        for entries in [&mut self.singles, &mut self.ups] {
            for (_, entry) in std::mem::take(entries) {
                answer(Some(entry), &Err(error.clone()));
            }
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.singles.is_empty() && self.ups.is_empty()
    }

    /// Frames sent and not answered.
    pub(crate) fn in_flight(&self) -> usize {
        self.tokens.len()
    }
}

fn answer(entry: Option<Entry>, result: &Result<(), Error>) {
    for waiter in entry.into_iter().flat_map(|entry| entry.waiters) {
        let _ = waiter.send(result.clone()); // nobody may wait any more
    }
}

#[cfg(test)]
#[path = "settles_tests.rs"]
mod tests;
