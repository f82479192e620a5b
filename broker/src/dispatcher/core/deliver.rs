//! Who gets what next, and what must be read for it. What is to be delivered again comes first, then what is fresh.

use super::{Action, Batch, Core, Delivery, Kind, State, consumers::Consumer};

/// Runs of one delivery: it must fit a frame beside its payload.
pub(super) const RUNS_MAX: usize = 8_192;

impl<B: Batch> Core<B> {
    pub(super) fn dispatch(&mut self) -> Option<Action<B>> {
        self.skip_settled();
        if self.resetting() || self.stopping {
            return None;
        }
        self.replay_wanted = None;
        if self.held_by_rate() {
            return None;
        }
        let frontier = self.frontier;
        let delivery = match self.policy.kind {
            Kind::KeyShared => self.deliver_ready_keys().or_else(|| {
                self.scan_keys();
                None
            }),
            Kind::Shared => self.deliver_ready().or_else(|| self.deliver_fresh()),
            Kind::Exclusive | Kind::Failover => self.deliver_in_order(),
        };
        match delivery {
            Some(delivery) => Some(Action::Deliver(delivery)),
            // What the frontier has passed may be ready.
            None if self.frontier != frontier => self.out.pop_front().or_else(|| self.dispatch()),
            None => self.out.pop_front().or_else(|| self.read()),
        }
    }

    /// The consumer that gets the next messages, and how many it may get.
    pub(super) fn taker(&self) -> Option<(u64, u64)> {
        let candidate = |(id, consumer): (&u64, &Consumer)| {
            let room = self.room(consumer);
            (room > 0).then_some((*id, room))
        };
        match self.policy.kind {
            Kind::Failover => {
                let active = self.active.filter(|_| self.drain_until.is_none())?;
                candidate((&active, self.consumers.get(&active)?))
            }
            Kind::Exclusive => self.consumers.iter().find_map(candidate),
            Kind::Shared | Kind::KeyShared => self
                .consumers
                .range(self.turn.saturating_add(1)..)
                .chain(self.consumers.range(..=self.turn))
                .find_map(candidate),
        }
    }

    /// Drops batches that hold nothing for anybody from the front of the queue.
    pub(super) fn skip_settled(&mut self) {
        let by_key = self.policy.kind == Kind::KeyShared;
        loop {
            self.frontier = self.settled.next_outside(self.frontier);
            match self.states.get(self.frontier) {
                // By key the batch must be seen first.
                Some(run) if !by_key => self.frontier = run.1,
                _ => break,
            }
        }
        while let Some(batch) = self.queue.front() {
            if batch.end() > self.frontier {
                break;
            }
            self.pop();
        }
    }

    pub(super) fn pop(&mut self) -> Option<B> {
        let batch = self.queue.pop_front()?;
        self.queued_bytes -= batch.bytes();
        self.queued_messages -= u64::from(batch.count());
        Some(batch)
    }

    /// A batch at hand that holds the offset.
    pub(super) fn at_hand(&self, offset: u64) -> Option<B> {
        let holds = |batch: &&B| batch.base() <= offset && offset < batch.end();
        let replayed = self.replay.iter().find(holds);
        replayed.or_else(|| self.queue.iter().take(2).find(holds)).cloned()
    }

    fn ready_first(&self) -> Option<u64> {
        self.ready.next_inside(self.mark_delete).filter(|at| *at < self.frontier)
    }

    /// What is delivered again comes before anything later, also while it is being read, or the end of its attempt recorded.
    fn deliver_in_order(&mut self) -> Option<Delivery<B>> {
        if self.ending > 0 {
            return None;
        }
        if self.ready_first().is_some() { self.deliver_ready() } else { self.deliver_fresh() }
    }

    fn deliver_ready(&mut self) -> Option<Delivery<B>> {
        loop {
            let first = self.ready_first()?;
            let (consumer, room) = self.taker()?;
            let Some(batch) = self.at_hand(first) else {
                self.replay_wanted = Some(first);
                return None;
            };
            if self.park_early(&batch) {
                continue;
            }
            let (_, _, State::Ready { attempt }) = self.states.get(first)? else { return None };
            let (mut runs, mut messages) = (Vec::new(), 0);
            for (start, end, state) in self.states.within(first, batch.end().min(self.frontier)) {
                if state == (State::Ready { attempt }) && messages < room && runs.len() < RUNS_MAX {
                    let end = end.min(start + room - messages);
                    messages += end - start;
                    runs.push((start, end));
                } else if !self.policy.kind.is_shared() && matches!(state, State::Ready { .. }) {
                    break; // in order, under another attempt
                }
            }
            return Some(self.give(consumer, batch, runs, attempt));
        }
    }

    /// Of a distant run whose first message is due, those of this batch that are not wait again. True: there were some.
    fn park_early(&mut self, batch: &B) -> bool {
        if !self.policy.kind.is_shared() || !batch.has_delays() {
            return false;
        }
        let undelivered = State::Ready { attempt: 1 };
        let runs = self.runs_where(batch.base(), batch.end(), |state| state == undelivered);
        let early: Vec<(u64, u64)> = runs
            .iter()
            .flat_map(|run| run.0..run.1)
            .map(|offset| (offset, batch.deliver_at((offset - batch.base()) as u32)))
            .filter(|(_, due)| *due > self.now_ms)
            .collect();
        early.iter().for_each(|(offset, due)| self.park(*offset, *due));
        !early.is_empty()
    }

    fn deliver_fresh(&mut self) -> Option<Delivery<B>> {
        loop {
            if self.full() {
                return None;
            }
            let (consumer, room) = self.taker()?;
            let batch = self.queue.front()?.clone();
            let end = batch.end();
            let delays = self.policy.kind.is_shared() && batch.has_delays();
            let (mut runs, mut messages, mut at) = (Vec::new(), 0, self.frontier.max(batch.base()));
            while messages < room && runs.len() < RUNS_MAX {
                let Some((start, until)) = self.next_without_state(at, end) else {
                    at = end;
                    break;
                };
                let before = self.ready.next_inside(at).is_some_and(|ready| ready < start);
                at = start;
                if before && !self.policy.kind.is_shared() {
                    break; // that one first
                }
                let until = until.min(start + room - messages);
                if !delays {
                    runs.push((start, until));
                    (messages, at) = (messages + until - start, until);
                    continue;
                }
                let due = batch.deliver_at((start - batch.base()) as u32);
                if due <= self.now_ms {
                    match runs.last_mut() {
                        Some((_, last)) if *last == start => *last += 1,
                        _ => runs.push((start, start + 1)),
                    }
                    messages += 1;
                } else {
                    self.park(start, due);
                }
                at = start + 1;
            }
            let moved = at > self.frontier;
            self.frontier = self.frontier.max(at);
            if messages > 0 {
                let delivery = self.give(consumer, batch, runs, 1);
                self.skip_settled();
                return Some(delivery);
            }
            if !moved {
                return None;
            }
            self.skip_settled();
            if !self.policy.kind.is_shared() && self.ready_first().is_some() {
                return self.deliver_ready();
            }
        }
    }

    /// Hands runs of a batch to a consumer. Nothing is read or written for it: what ended an earlier attempt is durable (L3).
    pub(super) fn give(
        &mut self,
        consumer: u64,
        batch: B,
        runs: Vec<(u64, u64)>,
        attempt: u32,
    ) -> Delivery<B> {
        let (lease_ms, until) = (self.lease_of(consumer), self.lease_until(consumer));
        let batch = batch.cut(&runs);
        let mut messages = 0;
        for (start, end) in &runs {
            self.put(*start, *end, Some(State::Held { by: consumer, attempt, until }));
            messages += end - start;
        }
        if let Some(known) = self.consumers.get_mut(&consumer) {
            known.used_messages += messages;
            known.used_bytes += batch.bytes();
        }
        self.charge(messages, batch.bytes());
        self.turn = consumer;
        if attempt > 1 {
            self.tally.redelivered += messages;
        }
        if self.policy.kind.is_shared() {
            self.log_lease(consumer, &runs, attempt, lease_ms);
        }
        let ready = &self.ready;
        self.replay.retain(|held| ready.next_inside(held.base()).is_some_and(|at| at < held.end()));
        Delivery { consumer, batch, runs, messages, attempt, lease_ms }
    }
}
