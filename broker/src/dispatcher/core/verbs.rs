//! Settles: what a consumer may settle, and what it means.

use super::{
    Batch, Change, Core, Decision, Presented, Redelivery, SettleRefused, State, Verb, records::What,
};

/// A run of messages as a settle finds it.
type Found = (u64, u64, State);

impl<B: Batch> Core<B> {
    /// A settle under a handle whose signature was good. All of it, or nothing.
    ///
    /// # Errors
    /// [`SettleRefused`].
    pub fn settle(&mut self, who: Presented, verb: Verb) -> Result<Decision, SettleRefused> {
        if self.resetting() {
            // A record behind the seek's would count after it, for what is about to be revoked.
            return Err(SettleRefused::Seeking);
        }
        match verb {
            Verb::Accept { runs } => self.accept(who, &runs),
            Verb::UpTo { end } => self.accept_up_to(who, end),
            Verb::Release { runs, delay_ms, counts } => self.release(who, &runs, delay_ms, counts),
            Verb::Reject { runs, reason } => self.reject(who, &runs, reason),
            Verb::Extend { runs, lease_ms } => self.extend(who, &runs, lease_ms),
        }
    }

    /// The runs that are held under this handle, in order. `again`: what this consumer accepted before is fine, and left out.
    fn found(
        &self,
        who: Presented,
        runs: &[(u64, u64)],
        again: bool,
    ) -> Result<Vec<Found>, SettleRefused> {
        let mut found = Vec::new();
        for (start, end) in runs {
            let mut at = *start;
            while at < *end {
                match self.states.get(at) {
                    Some((_, e, state @ State::Held { by, attempt, .. }))
                        if by == who.consumer && attempt == who.attempt =>
                    {
                        found.push((at, e.min(*end), state));
                        at = e;
                    }
                    Some((_, e, State::Settling { by, attempt, accept: true, .. }))
                        if again && by == who.consumer && attempt == who.attempt =>
                    {
                        at = e;
                    }
                    _ if again && self.was_accepted(who, at) => {
                        at = self.consumers[&who.consumer].accepted.next_outside(at);
                    }
                    _ if who.earlier => {
                        let runs = self.claimable(at, *end, who.attempt);
                        let Some((s, e)) = runs.first().copied().filter(|run| run.0 == at) else {
                            return Err(SettleRefused::NotHeld(at));
                        };
                        found.push((s, e, State::Kept { by: who.consumer, attempt: who.attempt }));
                        at = e;
                    }
                    _ => return Err(SettleRefused::NotHeld(at)),
                }
            }
        }
        found.sort_unstable_by_key(|run| run.0);
        found.dedup_by_key(|run| run.0);
        Ok(found)
    }

    fn was_accepted(&self, who: Presented, offset: u64) -> bool {
        let settled = offset < self.mark_delete || self.settled.contains(offset);
        settled && self.consumers.get(&who.consumer).is_some_and(|c| c.accepted.contains(offset))
    }

    fn settling(&mut self, found: &[Found], accept: bool) {
        for (start, end, state) in found {
            let (by, attempt, until) = match *state {
                State::Held { by, attempt, until } => (by, attempt, until),
                State::Kept { by, attempt } => (by, attempt, 0),
                _ => continue,
            };
            self.put(*start, *end, Some(State::Settling { by, attempt, until, accept }));
        }
    }

    fn accept(&mut self, who: Presented, runs: &[(u64, u64)]) -> Result<Decision, SettleRefused> {
        let found = self.found(who, runs, true)?;
        if found.is_empty() {
            return Ok(self.after_in_flight(who, runs));
        }
        self.settling(&found, true);
        let runs: Vec<(u64, u64)> = found.iter().map(|run| (run.0, run.1)).collect();
        let what = What::Accept { by: who.consumer, runs: runs.clone() };
        Ok(Decision::Recorded(self.record(what, Change::Accept(runs))))
    }

    /// All of it was accepted before: answered at once, or with the record that is on its way.
    fn after_in_flight(&mut self, who: Presented, runs: &[(u64, u64)]) -> Decision {
        let settling = |state| matches!(state, State::Settling { .. });
        let on_the_way = runs.iter().any(|run| !self.runs_where(run.0, run.1, settling).is_empty());
        if !on_the_way {
            return Decision::Now;
        }
        let runs = runs.to_vec();
        let what = What::Accept { by: who.consumer, runs: runs.clone() };
        Decision::Recorded(self.record(what, Change::Accept(runs)))
    }

    /// Everything at or below that this consumer holds. What it gave back, or others have, stays as it is.
    fn accept_up_to(&mut self, who: Presented, end: u64) -> Result<Decision, SettleRefused> {
        if self.policy.kind.is_shared() {
            return Err(SettleRefused::NotInOrder);
        }
        let last = end.saturating_sub(1);
        if end <= self.mark_delete || self.was_accepted(who, last) {
            let known = self.consumers.contains_key(&who.consumer) || who.earlier;
            return if known { Ok(Decision::Now) } else { Err(SettleRefused::NotHeld(last)) };
        }
        let at_last = self.states.get(last).map(|run| run.2);
        let given = match at_last {
            Some(State::Held { by, .. } | State::Settling { by, accept: true, .. }) => {
                by == who.consumer
            }
            _ => who.earlier && !self.claimable(last, end, who.attempt).is_empty(),
        };
        if !given && !self.settled.contains(last) {
            return Err(SettleRefused::NotHeld(last));
        }
        let (mut found, mut all) = (Vec::new(), true);
        for (start, until, state) in self.states.within(self.mark_delete, end) {
            match state {
                State::Held { by, .. } if by == who.consumer => found.push((start, until, state)),
                State::Settling { by, accept: true, .. } if by == who.consumer => {}
                _ => all = false,
            }
        }
        if who.earlier {
            let runs = self.claimable(self.mark_delete, end, who.attempt);
            let kept = State::Kept { by: who.consumer, attempt: who.attempt };
            found.extend(runs.into_iter().map(|(start, until)| (start, until, kept)));
            found.sort_unstable_by_key(|run| run.0);
        } else if self.next_without_state(self.mark_delete, end).is_some() {
            all = false;
        }
        self.settling(&found, true);
        if all && !who.earlier {
            let what = What::UpTo { by: who.consumer, end };
            return Ok(Decision::Recorded(self.record(what, Change::UpTo(end))));
        }
        let runs: Vec<(u64, u64)> = found.iter().map(|run| (run.0, run.1)).collect();
        if runs.is_empty() {
            return Ok(Decision::Now);
        }
        let what = What::Accept { by: who.consumer, runs: runs.clone() };
        Ok(Decision::Recorded(self.record(what, Change::Accept(runs))))
    }

    fn release(
        &mut self,
        who: Presented,
        runs: &[(u64, u64)],
        delay_ms: Option<u64>,
        counts: bool,
    ) -> Result<Decision, SettleRefused> {
        let found = self.found(who, runs, false)?;
        let max = self.policy.attempts_max;
        if counts && max > 0 && who.attempt >= max {
            self.room_for_dead(&found)?;
            let reason = "released, and it was delivered as often as it may be".to_owned();
            return Ok(self.give_up(&found, reason));
        }
        let backoff = if counts { self.policy.backoff(who.attempt) } else { 0 };
        let due_ms = self.due_in(delay_ms.unwrap_or(backoff));
        if !counts && due_ms == 0 {
            for (start, end, _) in &found {
                self.put(*start, *end, Some(State::Ready { attempt: who.attempt }));
            }
            self.revoke_followers(&found);
            return Ok(Decision::Now);
        }
        self.settling(&found, false);
        self.revoke_followers(&found);
        let attempt = who.attempt.saturating_add(u32::from(counts));
        let items: Vec<Redelivery> = found
            .iter()
            .map(|(start, end, _)| Redelivery { start: *start, end: *end, attempt, due_ms })
            .collect();
        Ok(Decision::Recorded(self.record(What::Release(items.clone()), Change::Redeliver(items))))
    }

    fn reject(
        &mut self,
        who: Presented,
        runs: &[(u64, u64)],
        reason: String,
    ) -> Result<Decision, SettleRefused> {
        let found = self.found(who, runs, false)?;
        self.room_for_dead(&found)?;
        Ok(self.give_up(&found, reason))
    }

    fn room_for_dead(&self, found: &[Found]) -> Result<(), SettleRefused> {
        let more: u64 = found.iter().map(|run| run.1 - run.0).sum();
        let deciding = self.deciding.len() as u64 + self.dead.len() as u64;
        if deciding + more > self.limits.dead_letters_max as u64 {
            return Err(SettleRefused::TooManyDead);
        }
        Ok(())
    }

    fn give_up(&mut self, found: &[Found], reason: String) -> Decision {
        self.settling(found, false);
        let letters = found.iter().flat_map(|(start, end, state)| {
            let attempt = match state {
                State::Held { attempt, .. } | State::Kept { attempt, .. } => *attempt,
                _ => 1,
            };
            (*start..*end).map(move |offset| (offset, attempt))
        });
        Decision::Recorded(self.decide(letters.collect(), reason, true))
    }

    fn extend(
        &mut self,
        who: Presented,
        runs: &[(u64, u64)],
        lease_ms: u64,
    ) -> Result<Decision, SettleRefused> {
        let found = self.found(who, runs, false)?;
        let standing = self.lease_of(who.consumer);
        if standing == 0 && !who.earlier {
            return Ok(Decision::Now); // held as long as it is connected
        }
        let lease_ms = match lease_ms {
            0 if standing == 0 => self.policy.lease_ms,
            0 => standing,
            asked => asked,
        };
        let until = self.until(lease_ms);
        for (start, end, state) in found {
            if let State::Held { by, attempt, .. } = state {
                self.put(start, end, Some(State::Held { by, attempt, until }));
                self.log_lease(by, &[(start, end)], attempt, lease_ms);
            }
        }
        Ok(Decision::Now)
    }
}
