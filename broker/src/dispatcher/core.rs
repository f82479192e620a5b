//! The dispatcher's decisions: events in, deliveries and reads out. No clock, socket or lock.
//!
//! Level-triggered: [`Core::step`] looks at the whole state, never at what just happened, so no lost wake-up can stop it.
//! Progress rule (promise 2): with credit in messages and bytes, room for unacknowledged messages, an open outbox and
//! something deliverable, `step` returns an action; else [`Core::blocked`] names what is missing.
//!
//! Byte credit: a delivery begins only while some is left, and may exceed it by the rest of that one batch. A batch
//! cannot be cut, and a consumer whose whole grant is smaller than one batch must not be stuck for ever.

use std::collections::VecDeque;

use super::RangeSet;

/// A stored batch in the queue.
pub trait Batch: Clone {
    /// Its first offset.
    fn base(&self) -> u64;
    /// Its number of messages, at least 1.
    fn count(&self) -> u32;
    /// Its payload, bytes.
    fn bytes(&self) -> u64;
}

/// What one core may hold.
#[derive(Clone, Copy, Debug)]
pub struct CoreLimits {
    /// Delivered and unsettled messages.
    pub unacked_messages_max: u64,
    /// Bytes read and not delivered.
    pub read_ahead_bytes_max: u64,
}

/// What is to be done now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action<B> {
    /// Read from this offset on; answer with [`Core::on_read`] or [`Core::on_read_failed`].
    Read { from: u64, bytes_max: u64, messages_max: u64 },
    /// Give these messages to the consumer.
    Deliver(Delivery<B>),
}

/// Messages of one batch for the consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery<B> {
    /// The whole batch.
    pub batch: B,
    /// The offsets of it that are delivered, half-open runs in order.
    pub ranges: Vec<(u64, u64)>,
    /// How many messages that are.
    pub messages: u64,
}

/// Why nothing is delivered at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocked {
    /// Everything confirmed was delivered or settled.
    CaughtUp,
    /// The consumer granted no more messages or bytes.
    NoCredit,
    /// Too many delivered messages are not settled.
    UnackedLimit,
    /// The consumer does not read what was sent.
    SlowConnection,
    /// A read is on its way.
    Reading,
    /// The last read failed; it is tried again after a pause.
    ReadFailed,
}

/// The state of one consumer of one segment's subscription.
#[derive(Clone, Debug)]
pub struct Core<B> {
    limits: CoreLimits,
    end: u64,
    mark_delete: u64,
    settled: RangeSet,
    outstanding: RangeSet,
    next_deliver: u64,
    next_read: u64,
    queue: VecDeque<B>,
    queued_bytes: u64,
    queued_messages: u64,
    reading: bool,
    read_failed: bool,
    outbox_open: bool,
    granted_messages: u64,
    granted_bytes: u64,
    used_messages: u64,
    used_bytes: u64,
}

impl<B: Batch> Core<B> {
    /// A consumer that has just connected: everything not settled will be delivered, from the first such offset on.
    #[must_use]
    pub fn new(limits: CoreLimits, mark_delete_next: u64, settled: RangeSet, end: u64) -> Self {
        Self {
            limits,
            end,
            mark_delete: mark_delete_next,
            settled,
            outstanding: RangeSet::default(),
            next_deliver: mark_delete_next,
            next_read: mark_delete_next,
            queue: VecDeque::new(),
            queued_bytes: 0,
            queued_messages: 0,
            reading: false,
            read_failed: false,
            outbox_open: true,
            granted_messages: 0,
            granted_bytes: 0,
            used_messages: 0,
            used_bytes: 0,
        }
    }

    /// Everything below this offset is confirmed. It never falls.
    pub fn on_end(&mut self, end: u64) {
        self.end = self.end.max(end);
    }

    /// The consumer's totals for this stream; lower ones than before are ignored (S7).
    pub fn on_credit(&mut self, messages: u64, bytes: u64) {
        self.granted_messages = self.granted_messages.max(messages);
        self.granted_bytes = self.granted_bytes.max(bytes);
    }

    /// Whether the outgoing buffer takes more.
    pub fn on_outbox(&mut self, open: bool) {
        self.outbox_open = open;
    }

    /// The answer to a read: batches in order, without a gap but for what was trimmed.
    pub fn on_read(&mut self, batches: Vec<B>) {
        self.reading = false;
        if batches.is_empty() {
            self.read_failed = true; // there should have been something: no busy loop
            return;
        }
        for batch in batches {
            let end = batch.base() + u64::from(batch.count());
            if end <= self.next_read {
                continue;
            }
            self.next_read = end;
            self.queued_bytes += batch.bytes();
            self.queued_messages += u64::from(batch.count());
            self.queue.push_back(batch);
        }
    }

    /// The read found that everything below `first` was trimmed: it is gone, not pending.
    pub fn on_trimmed(&mut self, first: u64) {
        self.reading = false;
        self.next_read = self.next_read.max(first);
        if self.queue.is_empty() {
            self.next_deliver = self.next_deliver.max(first);
        }
    }

    /// The read failed; nothing is read before [`Self::on_retry`].
    pub fn on_read_failed(&mut self) {
        self.reading = false;
        self.read_failed = true;
    }

    /// The pause after a failed read is over.
    pub fn on_retry(&mut self) {
        self.read_failed = false;
    }

    /// These offsets, half-open runs, are durably settled, and mark-delete stands here.
    pub fn on_settled(
        &mut self,
        runs: impl IntoIterator<Item = (u64, u64)>,
        mark_delete_next: u64,
    ) {
        for (start, end) in runs {
            self.settled.insert(start.max(self.mark_delete), end);
            self.outstanding.remove(start, end);
        }
        self.advance(mark_delete_next);
    }

    /// The cursor as it stands, after somebody else changed it.
    pub fn on_cursor(&mut self, mark_delete_next: u64, settled: RangeSet) {
        for (start, end) in settled.iter() {
            self.outstanding.remove(start, end);
        }
        self.settled = settled;
        self.advance(mark_delete_next);
    }

    fn advance(&mut self, mark_delete_next: u64) {
        self.mark_delete = self.mark_delete.max(mark_delete_next);
        self.settled.remove(0, self.mark_delete);
        self.outstanding.remove(0, self.mark_delete);
        self.next_deliver = self.next_deliver.max(self.mark_delete);
    }

    /// Whether all offsets of `[start, end)` were delivered on this stream, or were settled before it could be.
    #[must_use]
    pub fn was_given(&self, end: u64) -> bool {
        end <= self.next_deliver
    }

    /// Everything below was delivered to this consumer or settled.
    #[must_use]
    pub fn next_deliver(&self) -> u64 {
        self.next_deliver
    }

    /// Delivered and not settled.
    #[must_use]
    pub fn outstanding(&self) -> u64 {
        self.outstanding.len()
    }

    /// What to do now; call until it returns none. None always has a reason: [`Self::blocked`].
    pub fn step(&mut self) -> Option<Action<B>> {
        self.skip_settled();
        if let Some(delivery) = self.deliver() {
            return Some(Action::Deliver(delivery));
        }
        self.read()
    }

    /// Why [`Self::step`] delivers nothing. Of several reasons the one that others can do something about.
    #[must_use]
    pub fn blocked(&self) -> Blocked {
        let next = self.settled.next_outside(self.next_deliver);
        if next >= self.end && self.queue.is_empty() {
            Blocked::CaughtUp
        } else if self.credit_messages() == 0 || self.credit_bytes() == 0 {
            Blocked::NoCredit
        } else if self.unacked_room() == 0 {
            Blocked::UnackedLimit
        } else if !self.outbox_open {
            Blocked::SlowConnection
        } else if self.read_failed {
            Blocked::ReadFailed
        } else {
            Blocked::Reading
        }
    }

    fn credit_messages(&self) -> u64 {
        self.granted_messages.saturating_sub(self.used_messages)
    }

    fn credit_bytes(&self) -> u64 {
        self.granted_bytes.saturating_sub(self.used_bytes)
    }

    fn unacked_room(&self) -> u64 {
        self.limits.unacked_messages_max.saturating_sub(self.outstanding.len())
    }

    /// Drops what is settled from the front of the queue; what lies between `next_deliver` and the front was trimmed: it is
    /// gone, not pending.
    fn skip_settled(&mut self) {
        self.next_deliver = self.settled.next_outside(self.next_deliver);
        while let Some(batch) = self.queue.front() {
            self.next_deliver = self.settled.next_outside(self.next_deliver.max(batch.base()));
            if batch.base() + u64::from(batch.count()) > self.next_deliver {
                break;
            }
            self.pop();
        }
    }

    fn pop(&mut self) -> Option<B> {
        let batch = self.queue.pop_front()?;
        self.queued_bytes -= batch.bytes();
        self.queued_messages -= u64::from(batch.count());
        Some(batch)
    }

    fn deliver(&mut self) -> Option<Delivery<B>> {
        let room = self.credit_messages().min(self.unacked_room());
        if room == 0 || self.credit_bytes() == 0 || !self.outbox_open {
            return None;
        }
        let batch = self.queue.front()?;
        let end = batch.base() + u64::from(batch.count());
        let bytes = batch.bytes();
        let mut at = self.next_deliver;
        let (mut ranges, mut messages) = (Vec::new(), 0);
        while at < end && messages < room {
            let until =
                self.settled.next_inside(at).unwrap_or(end).min(end).min(at + room - messages);
            ranges.push((at, until));
            messages += until - at;
            at = self.settled.next_outside(until);
        }
        self.next_deliver = at;
        self.used_messages += messages;
        self.used_bytes += bytes;
        for (start, until) in &ranges {
            self.outstanding.insert(*start, *until);
        }
        let batch = if at >= end { self.pop()? } else { batch.clone() };
        Some(Delivery { batch, ranges, messages })
    }

    fn read(&mut self) -> Option<Action<B>> {
        if self.reading
            || self.read_failed
            || self.queued_bytes * 2 > self.limits.read_ahead_bytes_max
        {
            return None;
        }
        self.next_read = self.settled.next_outside(self.next_read.max(self.next_deliver));
        if self.next_read >= self.end {
            return None;
        }
        let messages_max =
            self.credit_messages().min(self.unacked_room()).saturating_sub(self.queued_messages);
        let bytes_max = self
            .credit_bytes()
            .min(self.limits.read_ahead_bytes_max)
            .saturating_sub(self.queued_bytes);
        if messages_max == 0 || bytes_max == 0 {
            return None;
        }
        self.reading = true;
        Some(Action::Read { from: self.next_read, bytes_max, messages_max })
    }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
