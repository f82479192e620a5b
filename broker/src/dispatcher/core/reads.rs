//! What must be read for consumers, within their credit, and what came of it.

use super::{Action, Batch, Core, Kind, ReadOf, State, consumers::Consumer};

/// Messages that one read for a redelivery asks for.
const REPLAY_MESSAGES: u64 = 1_024;

impl<B: Batch> Core<B> {
    /// Messages and bytes that consumers would take now.
    fn wanted(&self) -> (u64, u64) {
        let of_one = |consumer: &Consumer| match self.room(consumer) {
            0 => (0, 0),
            room => (room, consumer.credit_bytes()),
        };
        let (mut messages, mut bytes) = (0u64, 0u64);
        match self.policy.kind {
            Kind::Exclusive | Kind::Failover => {
                if let Some((id, _)) = self.taker() {
                    (messages, bytes) = of_one(&self.consumers[&id]);
                }
            }
            Kind::Shared | Kind::KeyShared => {
                for consumer in self.consumers.values() {
                    let (m, b) = of_one(consumer);
                    (messages, bytes) = (messages.saturating_add(m), bytes.saturating_add(b));
                }
            }
        }
        let of_all = self.limits.unacked_messages_max.saturating_sub(self.unacked);
        (messages.min(of_all), bytes)
    }

    pub(super) fn read(&mut self) -> Option<Action<B>> {
        if self.read_failed {
            return None;
        }
        self.read_replay().or_else(|| self.read_fresh())
    }

    fn read_replay(&mut self) -> Option<Action<B>> {
        let from = self.replay_wanted.filter(|_| self.replaying.is_none())?;
        let (messages, bytes) = self.wanted();
        if messages == 0 || bytes == 0 {
            return None;
        }
        // What was read and is not wanted first makes room: it is read again.
        self.replay.clear();
        self.replaying = Some(from);
        Some(Action::Read {
            of: ReadOf::Replay,
            generation: self.generation,
            from,
            bytes_max: bytes.min(self.limits.read_ahead_bytes_max),
            messages_max: messages.min(REPLAY_MESSAGES),
        })
    }

    fn read_fresh(&mut self) -> Option<Action<B>> {
        let full = self.full()
            || (self.policy.kind == Kind::KeyShared
                && (self.looked_too_far() || self.keys.table.is_empty()));
        if self.reading.is_some()
            || full
            || self.queued_bytes * 2 > self.limits.read_ahead_bytes_max
        {
            return None;
        }
        self.next_read = self.next_read.max(self.frontier);
        if self.policy.kind == Kind::KeyShared {
            self.next_read = self.settled.next_outside(self.next_read);
        } else if let Some((start, _)) = self.next_without_state(self.next_read, self.end) {
            self.next_read = start;
        } else {
            return None;
        }
        if self.next_read >= self.end {
            return None;
        }
        let (messages, bytes) = self.wanted();
        let messages_max = messages.saturating_sub(self.queued_messages);
        let bytes_max =
            bytes.min(self.limits.read_ahead_bytes_max).saturating_sub(self.queued_bytes);
        if messages_max == 0 || bytes_max == 0 {
            return None;
        }
        self.reading = Some(self.next_read);
        let (generation, from) = (self.generation, self.next_read);
        Some(Action::Read { of: ReadOf::Fresh, generation, from, bytes_max, messages_max })
    }

    /// The answer to a read: batches in order, from the one that holds the offset on.
    pub fn on_read(&mut self, of: ReadOf, generation: u64, batches: Vec<B>) {
        let from = match of {
            ReadOf::Fresh => self.reading,
            ReadOf::Replay => self.replaying,
        };
        if !self.read_ended(of, generation) {
            return;
        }
        if let (Some(from), Some(first)) = (from, batches.first())
            && first.base() > from
        {
            self.gone_below(first.base()); // it was trimmed
        }
        if batches.is_empty() {
            self.read_failed = true; // there should have been something: no busy loop
            return;
        }
        for batch in batches {
            let end = batch.end();
            match of {
                ReadOf::Replay => {
                    if self.ready.next_inside(batch.base()).is_some_and(|at| at < end) {
                        self.replay.push_back(batch);
                    }
                }
                ReadOf::Fresh if end > self.next_read => {
                    self.next_read = end;
                    self.queued_bytes += batch.bytes();
                    self.queued_messages += u64::from(batch.count());
                    self.queue.push_back(batch);
                }
                ReadOf::Fresh => {}
            }
        }
    }

    fn read_ended(&mut self, of: ReadOf, generation: u64) -> bool {
        if generation != self.generation {
            return false;
        }
        match of {
            ReadOf::Fresh => self.reading = None,
            ReadOf::Replay => self.replaying = None,
        }
        true
    }

    /// The read found that everything below `first` is gone from the log: that is settled, for it can never be delivered.
    pub fn on_trimmed(&mut self, of: ReadOf, generation: u64, first: u64) {
        if !self.read_ended(of, generation) {
            return;
        }
        self.gone_below(first);
    }

    fn gone_below(&mut self, first: u64) {
        let first = first.min(self.end);
        self.next_read = self.next_read.max(first);
        let parked = |state| {
            matches!(
                state,
                State::Ready { .. }
                    | State::Waiting { .. }
                    | State::Distant { .. }
                    | State::Kept { .. }
            )
        };
        let mut gone: Vec<(u64, u64)> =
            self.runs_where(self.mark_delete, first, parked).iter().map(|r| (r.0, r.1)).collect();
        let mut at = self.frontier;
        while let Some((start, end)) = self.next_without_state(at, first) {
            gone.push((start, end));
            at = end;
        }
        self.frontier = self.frontier.max(first);
        self.record_gone(gone);
        self.skip_settled();
    }

    /// The read failed; nothing is read before [`Self::on_retry`].
    pub fn on_read_failed(&mut self, of: ReadOf, generation: u64) {
        if self.read_ended(of, generation) {
            self.read_failed = true;
        }
    }

    /// The pause after a failure is over.
    pub fn on_retry(&mut self) {
        self.read_failed = false;
        self.record_failed = false;
    }
}
