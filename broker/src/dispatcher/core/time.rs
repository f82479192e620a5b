//! What time brings: leases and graces end, delays come due. Time is wall-clock milliseconds, handed in; it may stand still
//! or jump, and nothing is early by it.

use super::{Batch, Change, Core, State, consumers::Link, records::What};

impl<B: Batch> Core<B> {
    /// It is this time now.
    pub fn on_time(&mut self, now_ms: u64) {
        if now_ms <= self.now_ms {
            return;
        }
        let graced = self.now_ms < self.grace_until;
        self.now_ms = now_ms;
        self.come_due();
        if self.stopping {
            return;
        }
        self.expire_leases();
        self.lose_consumers();
        if graced && now_ms >= self.grace_until {
            self.end_grace();
        }
    }

    /// When something changes by time alone.
    #[must_use]
    pub fn next_time(&self) -> Option<u64> {
        let timer = self.timers.first().map(|timer| timer.0);
        let lease = self.deadlines.keys().next().copied();
        let grace = (self.now_ms < self.grace_until).then_some(self.grace_until);
        let links = self.consumers.values().filter_map(|consumer| match consumer.link {
            Link::Stream => None,
            Link::Pull { until } if until <= self.now_ms => None, // its leases have their own end
            Link::Pull { until } => Some(until),
            Link::Gone { since } => Some(since.saturating_add(self.limits.grace_ms)),
        });
        links.chain(timer).chain(lease).chain(grace).chain(self.drain_until).min()
    }

    fn come_due(&mut self) {
        while let Some((due, start, end)) = self.timers.first().copied() {
            if due > self.now_ms {
                return;
            }
            match self.states.get(start) {
                Some((_, _, State::Waiting { attempt, .. })) => {
                    self.put(start, end, Some(State::Ready { attempt }));
                }
                Some((_, _, State::Distant { .. })) => {
                    self.put(start, end, Some(State::Ready { attempt: 1 }));
                }
                _ => {
                    self.timers.remove(&(due, start, end));
                }
            }
        }
    }

    fn expire_leases(&mut self) {
        if self.deadlines.keys().next().is_none_or(|first| *first > self.now_ms) {
            return;
        }
        let now = self.now_ms;
        let over = |state| matches!(state, State::Held { until, .. } if until != 0 && until <= now);
        let runs = self.runs_where(self.mark_delete, u64::MAX, over);
        for (start, end, state) in &runs {
            self.tally.leases_expired += end - start;
            if let State::Held { by, attempt, .. } = *state {
                self.tell_revoked(by, attempt, (*start, *end));
            }
        }
        self.end_attempts(&runs, "its lease ran out");
    }

    fn lose_consumers(&mut self) {
        let over: Vec<(u64, bool)> = self
            .consumers
            .iter()
            .filter_map(|(id, consumer)| match consumer.link {
                Link::Gone { since } => {
                    let ends = since.saturating_add(self.limits.grace_ms);
                    (ends <= self.now_ms).then_some((*id, true))
                }
                Link::Pull { until } => {
                    (until <= self.now_ms && consumer.held == 0).then_some((*id, false))
                }
                Link::Stream => None,
            })
            .collect();
        for (consumer, counts) in over {
            self.let_go(consumer, counts);
        }
    }

    /// Those who did not come back lose what was kept for them: it is delivered again with its attempt unchanged (L4).
    fn end_grace(&mut self) {
        let kept = |state| matches!(state, State::Kept { .. });
        for (start, end, state) in self.runs_where(0, u64::MAX, kept) {
            if let State::Kept { attempt, .. } = state {
                self.put(start, end, Some(State::Ready { attempt }));
            }
        }
        self.kept_names.clear();
        self.keys.dirty = true;
    }

    /// An operator settles what waits for a time, of these runs; and what no consumer has come to yet, of `known`.
    /// Returns how many messages, and the record to wait for.
    pub fn cancel_delayed(
        &mut self,
        runs: &[(u64, u64)],
        known: &[(u64, u64)],
    ) -> (u64, Option<u64>) {
        let mut found: Vec<(u64, u64, Option<State>)> = Vec::new();
        for (start, end) in runs {
            let waiting = |state| matches!(state, State::Waiting { .. });
            let waits = self.runs_where(*start, *end, waiting);
            found.extend(waits.into_iter().map(|(start, end, state)| (start, end, Some(state))));
        }
        let distant = |state| matches!(state, State::Distant { .. });
        for (start, end) in known {
            let told_apart = self.runs_where(*start, *end, distant);
            found.extend(told_apart.into_iter().map(|(s, e, state)| (s, e, Some(state))));
            let (mut at, end) = ((*start).max(self.frontier), (*end).min(self.end));
            while let Some((s, e)) = self.next_without_state(at, end) {
                found.push((s, e, None));
                at = e;
            }
        }
        found.sort_unstable_by_key(|run| run.0);
        found.dedup_by_key(|run| run.0);
        let messages = found.iter().map(|run| run.1 - run.0).sum();
        if found.is_empty() || self.resetting() {
            return (0, None);
        }
        for (start, end, _) in &found {
            self.put(*start, *end, Some(State::Gone));
        }
        let runs = found.iter().map(|run| (run.0, run.1)).collect();
        (messages, Some(self.record(What::Cancelled(found), Change::Accept(runs))))
    }
}
