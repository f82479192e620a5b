//! The chain of batches of one producer on one segment (DD5). Pure: what happened comes in, what to send comes out.
//!
//! ```text
//!      base        in flight            not sent
//!  ------|--[lo hi][lo hi][lo hi]--|--[lo hi][lo hi]---->     a batch's prev is the hi of the one before it, or base
//! ```
//! A batch keeps its bounds [lo, hi] for ever (DD3); its `prev` is what stands before it when it is sent. After a refusal
//! everything pipelined behind it is refused too, so nothing is sent until all of that is answered; then sending starts
//! again at the first batch that is not stored. After a break everything at or below `persisted` is stored, the rest is
//! sent again in order.

use std::collections::VecDeque;

use tokio::time::Instant;

/// One batch in the chain; `T` is what is sent.
#[derive(Debug)]
pub(crate) struct Link<T> {
    pub(crate) lo: u64,
    pub(crate) hi: u64,
    pub(crate) deadline: Instant,
    pub(crate) content: T,
    /// Sent on the present stream and not answered.
    in_flight: bool,
    /// It was in flight when a stream broke, or when it was taken out: it may be stored. Never true of a batch that was
    /// not sent, or was refused each time.
    pub(crate) uncertain: bool,
}

/// The chain of one stream after another.
#[derive(Debug)]
pub(crate) struct Chain<T> {
    /// The highest sequence known to stand before the first link.
    base: u64,
    /// What the last open said to be stored.
    persisted: u64,
    /// The highest sequence ever given to a batch; unknown until the first open is answered.
    last: Option<u64>,
    links: VecDeque<Link<T>>,
    in_flight: usize,
    /// A batch was refused: wait for the answers of all behind it.
    refused: bool,
    /// In flight, but given up by the caller: their answers are awaited too.
    abandoned: Vec<u64>,
}

/// What became of a batch that has its sequence.
#[derive(Debug)]
pub(crate) enum Placed<T> {
    /// It stands in the chain.
    Waits,
    /// The server has had it before this stream was opened.
    Stored(T),
    /// A higher one was given out.
    Behind(T),
}

/// What to do with a refused batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Send it again, in its place.
    Again,
    /// It will never be taken: it leaves the chain.
    Drop,
}

/// What an answer belongs to.
enum Answered {
    /// The link at this index.
    Link(usize),
    /// A batch whose time was over before its answer came.
    GivenUp,
}

impl<T> Default for Chain<T> {
    fn default() -> Self {
        Self {
            base: 0,
            persisted: 0,
            last: None,
            links: VecDeque::new(),
            in_flight: 0,
            refused: false,
            abandoned: Vec::new(),
        }
    }
}

impl<T> Chain<T> {
    /// A stream is open; the server has everything up to `persisted`. Returns what is thereby known to be stored.
    pub(crate) fn on_opened(&mut self, persisted: u64) -> Vec<Link<T>> {
        self.on_broken();
        let stored = self.links.partition_point(|link| link.hi <= persisted);
        self.base = persisted;
        self.persisted = persisted;
        self.last = Some(self.last.unwrap_or_default().max(persisted));
        self.links.drain(..stored).collect()
    }

    /// The stream is gone: nothing is in flight any more.
    pub(crate) fn on_broken(&mut self) {
        for link in &mut self.links {
            link.uncertain |= link.in_flight;
            link.in_flight = false;
        }
        self.in_flight = 0;
        self.abandoned.clear();
        self.refused = false;
    }

    /// A new session takes the place of one that the server forgot: what was certainly not stored stays, to be sent there.
    /// Returns what may have been stored.
    pub(crate) fn restart(&mut self) -> Vec<Link<T>> {
        self.on_broken();
        let (gone, kept) =
            std::mem::take(&mut self.links).into_iter().partition(|link| link.uncertain);
        self.links = kept;
        Vec::from(gone)
    }

    /// Takes every batch out. Their sequences are never used again: a named producer's may still be on their way to the
    /// log, and another batch under the same ones would be answered with their receipt (DD1, DD5).
    pub(crate) fn drain(&mut self) -> Vec<Link<T>> {
        self.on_broken();
        std::mem::take(&mut self.links).into()
    }

    /// Appends a batch of one message that has its sequence. None where the server has it already, or where it is not above
    /// all before it: it is not sent then, and `stored` tells which.
    ///
    /// # Panics
    /// Before the first open was answered.
    pub(crate) fn push_at(&mut self, sequence: u64, deadline: Instant, content: T) -> Placed<T> {
        let before = self.last.expect("a stream was opened before batches are cut");
        if sequence <= self.persisted {
            return Placed::Stored(content);
        }
        if sequence <= before {
            return Placed::Behind(content);
        }
        self.last = Some(sequence - 1);
        self.push(1, deadline, content);
        Placed::Waits
    }

    /// Appends a batch of `count` messages. Only after the first open was answered: a named producer goes on where it
    /// stopped.
    ///
    /// # Panics
    /// Before that, and for an empty batch.
    pub(crate) fn push(&mut self, count: u64, deadline: Instant, content: T) {
        assert!(count > 0, "a batch has messages");
        let before = self.last.expect("a stream was opened before batches are cut");
        let (lo, hi) = (before + 1, before + count);
        self.last = Some(hi);
        self.links.push_back(Link {
            lo,
            hi,
            deadline,
            content,
            in_flight: false,
            uncertain: false,
        });
    }

    /// The next batch to send, if any may be sent now.
    pub(crate) fn sendable(&self) -> Option<&Link<T>> {
        if self.refused {
            return None;
        }
        self.links.get(self.first_unsent())
    }

    /// Marks the next batch as sent; returns its `prev` and the batch.
    pub(crate) fn send(&mut self) -> Option<(u64, &Link<T>)> {
        if self.refused {
            return None;
        }
        let at = self.first_unsent();
        let prev = match at.checked_sub(1) {
            Some(before) => self.links.get(before)?.hi,
            // What was given up in flight still stands before it.
            None => self.abandoned.iter().copied().fold(self.base, u64::max),
        };
        let link = self.links.get_mut(at)?;
        link.in_flight = true;
        self.in_flight += 1;
        Some((prev, link))
    }

    /// While nothing is refused, what is in flight was sent from the front on, and the rest stands behind it.
    fn first_unsent(&self) -> usize {
        self.links.partition_point(|link| link.in_flight)
    }

    /// The batch up to `hi` is stored. None if it was given up meanwhile, or the answer is a stranger's.
    pub(crate) fn on_stored(&mut self, hi: u64) -> Option<Link<T>> {
        let link = match self.answered(hi)? {
            Answered::Link(at) => self.links.remove(at),
            Answered::GivenUp => None,
        };
        self.base = self.base.max(hi);
        self.settle_refusals();
        link
    }

    /// The batch up to `hi` was refused while `pushed` was the highest sequence accepted. Returns the batch if it leaves
    /// the chain.
    pub(crate) fn on_refused(&mut self, hi: u64, pushed: u64, refusal: Refusal) -> Option<Link<T>> {
        let answered = self.answered(hi)?;
        self.refused = true;
        self.base = pushed;
        let dropped = match (refusal, answered) {
            (Refusal::Drop, Answered::Link(at)) => self.links.remove(at),
            _ => None,
        };
        self.settle_refusals();
        dropped
    }

    /// Finds the batch and takes it out of flight. None for an answer to nothing that was asked on this stream.
    fn answered(&mut self, hi: u64) -> Option<Answered> {
        if let Some(at) = self.abandoned.iter().position(|given_up| *given_up == hi) {
            self.abandoned.swap_remove(at);
            self.in_flight -= 1;
            return Some(Answered::GivenUp);
        }
        let at = self.links.partition_point(|link| link.hi < hi);
        let link = self.links.get_mut(at).filter(|link| link.hi == hi && link.in_flight)?;
        link.in_flight = false;
        self.in_flight -= 1;
        Some(Answered::Link(at))
    }

    fn settle_refusals(&mut self) {
        if self.in_flight == 0 {
            self.refused = false;
        }
    }

    /// Takes out every batch whose time is over at `now`. The ones behind them are chained on by the server's answers.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<Link<T>> {
        let mut expired = Vec::new();
        while self.links.front().is_some_and(|link| link.deadline <= now) {
            let mut link = self.links.pop_front().expect("there is a front");
            if link.in_flight {
                link.uncertain = true;
                self.abandoned.push(link.hi);
            }
            expired.push(link);
        }
        expired
    }

    /// What the first batch that is not settled holds.
    pub(crate) fn front(&self) -> Option<&T> {
        self.links.front().map(|link| &link.content)
    }

    /// When the first batch's time is over.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.links.front().map(|link| link.deadline)
    }

    pub(crate) fn nothing_in_flight(&self) -> bool {
        self.in_flight == 0
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.links.is_empty()
    }

    /// Batches that wait to be sent, now or after a refusal.
    pub(crate) fn unsent(&self) -> usize {
        self.links.len() - (self.in_flight - self.abandoned.len())
    }
}

#[cfg(test)]
#[path = "chain_tests.rs"]
mod tests;
