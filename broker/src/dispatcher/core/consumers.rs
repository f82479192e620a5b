//! Who is there: credit, coming and going, coming back (L4).

use super::types::Action;
use super::{Attached, Batch, Claimed, Core, Kind, State};

/// Why a consumer was not attached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachRefused {
    #[error("the subscription is consumed by {0:?}")]
    Taken(String),
    #[error("the subscription has {0} consumers on this segment, as many as it may")]
    TooMany(usize),
}

/// How a consumer is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Link {
    Stream,
    /// By single calls; its leases are its own until they end, its place until then.
    Pull {
        until: u64,
    },
    /// Its stream broke; it may come back.
    Gone {
        since: u64,
    },
}

/// A consumer.
#[derive(Clone, Debug)]
pub(super) struct Consumer {
    pub(super) name: String,
    pub(super) link: Link,
    pub(super) outbox_open: bool,
    pub(super) granted_messages: u64,
    pub(super) granted_bytes: u64,
    pub(super) used_messages: u64,
    pub(super) used_bytes: u64,
    pub(super) held: u64,
    /// Of its deliveries; 0: the subscription's.
    pub(super) lease_ms: u64,
    /// What it has accepted, as far as is remembered: accepting again is fine.
    pub(super) accepted: super::super::RangeSet,
}

impl Consumer {
    pub(super) fn is_here(&self) -> bool {
        !matches!(self.link, Link::Gone { .. })
    }

    pub(super) fn credit(&self) -> u64 {
        if self.used_bytes >= self.granted_bytes {
            return 0;
        }
        self.granted_messages.saturating_sub(self.used_messages)
    }

    pub(super) fn credit_bytes(&self) -> u64 {
        self.granted_bytes.saturating_sub(self.used_bytes)
    }
}

/// Ends of leases fall on multiples of this at least, so that few of them are looked for.
const LEASE_STEP_MS: u64 = 50;
/// Runs of accepted offsets that are remembered of a consumer.
const ACCEPTED_RUNS_MAX: usize = 1_024;

impl<B: Batch> Core<B> {
    /// A consumer comes, by a stream, or by calls with leases of `pull` ms. A name that is there already is the same
    /// consumer, come again: its earlier stream ends. What it brings back it goes on holding; the rest of what it held is
    /// delivered again: with the same attempt if it brought anything, for it lost nothing then; else its attempt has ended.
    ///
    /// # Errors
    /// [`AttachRefused`].
    pub fn attach(
        &mut self,
        consumer: u64,
        name: &str,
        claims: &[Claimed],
    ) -> Result<Attached, AttachRefused> {
        let earlier = self.named(name);
        self.make_room(earlier)?;
        self.consumers.insert(consumer, new_consumer(name, Link::Stream));
        let attached = Attached { granted: self.grant(consumer, earlier, claims) };
        let came_back = !attached.granted.is_empty();
        let was_active = self.active.is_some() && self.active == earlier;
        if let Some(earlier) = earlier {
            if self.consumers.get(&earlier).is_some_and(|c| c.link == Link::Stream) {
                self.out.push_back(Action::Replaced { consumer: earlier });
            }
            self.let_go(earlier, !came_back);
        }
        if self.policy.kind == Kind::Exclusive {
            // There is one place: whoever had it and is gone does not come back to it.
            let gone: Vec<u64> =
                self.consumers.keys().copied().filter(|id| *id != consumer).collect();
            gone.into_iter().for_each(|id| self.let_go(id, !came_back));
        }
        if was_active {
            self.active = Some(consumer);
            self.say_active(consumer);
        } else {
            self.say_standby(consumer);
        }
        self.members_changed();
        Ok(attached)
    }

    /// A consumer calls, and waits so long. One that `stays` is there, under the same instance, for the grace after each
    /// call; any is there while it holds something.
    ///
    /// # Errors
    /// [`AttachRefused`].
    pub fn attach_pull(
        &mut self,
        consumer: u64,
        name: &str,
        (lease_ms, wait_ms, stays): (u64, u64, bool),
    ) -> Result<u64, AttachRefused> {
        let stays_ms = if stays { self.limits.grace_ms } else { 0 };
        let until = self.now_ms.saturating_add(wait_ms).saturating_add(stays_ms);
        let lease_ms = if lease_ms == 0 { self.policy.lease_ms } else { lease_ms };
        if let Some(id) = self.named(name)
            && let Some(known) = self.consumers.get_mut(&id)
            && matches!(known.link, Link::Pull { .. })
        {
            known.link = Link::Pull { until };
            known.lease_ms = lease_ms;
            return Ok(id);
        }
        self.attach(consumer, name, &[])?;
        let known = self.consumers.get_mut(&consumer).expect("attached above");
        known.link = Link::Pull { until };
        known.lease_ms = lease_ms;
        Ok(consumer)
    }

    fn members_changed(&mut self) {
        self.wanted = None;
        self.keys.dirty = true;
        self.refresh_owners();
    }

    fn named(&self, name: &str) -> Option<u64> {
        self.consumers.iter().find(|(_, consumer)| consumer.name == name).map(|(id, _)| *id)
    }

    fn make_room(&mut self, earlier: Option<u64>) -> Result<(), AttachRefused> {
        if self.policy.kind == Kind::Exclusive {
            let others: Vec<u64> =
                self.consumers.keys().copied().filter(|id| Some(*id) != earlier).collect();
            for id in others {
                let other = &self.consumers[&id];
                let stands = match other.link {
                    Link::Stream => true,
                    Link::Pull { until } => until > self.now_ms || other.held > 0,
                    Link::Gone { .. } => false,
                };
                if stands {
                    return Err(AttachRefused::Taken(other.name.clone()));
                }
            }
        }
        let most = self.limits.consumers_max;
        if earlier.is_none() && self.consumers.len() >= most {
            return Err(AttachRefused::TooMany(most));
        }
        Ok(())
    }

    /// L4: what counts of the claims. Of this owner: what the instance still holds, if it is gone or is the one replaced. Of
    /// an earlier one: what is not settled, was not delivered again, and does not wait for another attempt.
    fn grant(
        &mut self,
        to: u64,
        earlier: Option<u64>,
        claims: &[Claimed],
    ) -> Vec<(u32, Vec<(u64, u64)>)> {
        let mut granted = Vec::new();
        let mut left = self.limits.unacked_per_consumer_max;
        for claim in claims {
            let (of, attempt) = (claim.presented.consumer, claim.presented.attempt);
            let may_take = earlier == Some(of)
                || self.consumers.get(&of).is_some_and(|consumer| !consumer.is_here());
            let mut runs = Vec::new();
            for (start, end) in &claim.runs {
                let (start, end) = ((*start).max(self.mark_delete), (*end).min(self.end));
                if claim.presented.earlier {
                    runs.extend(self.claimable(start, end, attempt));
                } else if may_take {
                    let held = |state| matches!(state, State::Held { by, attempt: of_run, .. } if by == of && of_run == attempt);
                    runs.extend(self.runs_where(start, end, held).iter().map(|run| (run.0, run.1)));
                }
            }
            // Nobody claims more than it may hold.
            runs.retain_mut(|run| {
                run.1 = run.1.min(run.0 + left);
                left -= run.1 - run.0;
                run.0 < run.1
            });
            for (start, end) in &runs {
                let until = self.lease_until(to);
                self.put(*start, *end, Some(State::Held { by: to, attempt, until }));
            }
            if !runs.is_empty() {
                granted.push((attempt, runs));
            }
        }
        granted
    }

    /// The runs of `[start, end)` that a handle of an earlier owner still stands for, whoever the lease record names: a later
    /// first delivery may not have been recorded (L2), and the first who presents one has it.
    pub(super) fn claimable(&self, start: u64, end: u64, attempt: u32) -> Vec<(u64, u64)> {
        let end = end.min(self.keys.doubt);
        if start >= end {
            return Vec::new();
        }
        let stands = |state| match state {
            State::Kept { attempt: kept, .. } => kept == attempt,
            State::Ready { attempt: ready } => ready == attempt,
            _ => false,
        };
        let mut runs: Vec<(u64, u64)> =
            self.runs_where(start, end, stands).iter().map(|run| (run.0, run.1)).collect();
        if attempt == 1 {
            let mut at = start;
            while let Some((s, e)) = self.next_without_state(at, end) {
                runs.push((s, e));
                at = e;
            }
        }
        runs.sort_unstable();
        runs
    }

    /// A consumer's stream ended: well (it gives back what it holds), or it broke (it may come back for it).
    pub fn detach(&mut self, consumer: u64, clean: bool) {
        let Some(known) = self.consumers.get_mut(&consumer) else { return };
        known.granted_messages = 0;
        known.granted_bytes = 0;
        if clean {
            self.let_go(consumer, false);
            return;
        }
        known.link = Link::Gone { since: self.now_ms };
        let holds = known.held > 0;
        if !holds && self.policy.kind != Kind::KeyShared && self.active != Some(consumer) {
            self.consumers.remove(&consumer);
        }
        if self.policy.kind == Kind::Exclusive && !holds {
            self.consumers.remove(&consumer);
        }
        self.members_changed();
    }

    /// What a consumer holds goes back, counted as a failed attempt or not, and its place is free.
    pub(super) fn let_go(&mut self, consumer: u64, counts: bool) {
        self.consumers.remove(&consumer);
        let mine = |state| matches!(state, State::Held { by, .. } if by == consumer);
        let settling = |state| matches!(state, State::Settling { by, .. } if by == consumer);
        for (start, end, state) in self.runs_where(self.mark_delete, u64::MAX, settling) {
            self.keys_changed(start, end, Some(state));
        }
        let runs = self.runs_where(self.mark_delete, u64::MAX, mine);
        if counts {
            self.end_attempts(&runs, "its consumer was lost");
        } else {
            for (start, end, state) in runs {
                if let State::Held { attempt, .. } = state {
                    self.put(start, end, Some(State::Ready { attempt }));
                }
            }
        }
        if self.active == Some(consumer) {
            self.active = None;
        }
        self.members_changed();
    }

    /// The consumer's totals for this stream; lower ones than before are ignored (S7).
    pub fn on_credit(&mut self, consumer: u64, messages: u64, bytes: u64) {
        if let Some(consumer) = self.consumers.get_mut(&consumer) {
            consumer.granted_messages = consumer.granted_messages.max(messages);
            consumer.granted_bytes = consumer.granted_bytes.max(bytes);
        }
    }

    /// What a calling consumer takes from now on, beyond what it has had.
    pub fn set_credit(&mut self, consumer: u64, messages: u64, bytes: u64) {
        if let Some(consumer) = self.consumers.get_mut(&consumer) {
            consumer.granted_messages = consumer.used_messages.saturating_add(messages);
            consumer.granted_bytes = consumer.used_bytes.saturating_add(bytes);
        }
    }

    /// Whether the outgoing buffer of a consumer takes more.
    pub fn on_outbox(&mut self, consumer: u64, open: bool) {
        if let Some(consumer) = self.consumers.get_mut(&consumer) {
            consumer.outbox_open = open;
        }
    }

    /// Messages that this consumer may get now.
    pub(super) fn room(&self, consumer: &Consumer) -> u64 {
        if !consumer.is_here() || !consumer.outbox_open {
            return 0;
        }
        let of_all = self.limits.unacked_messages_max.saturating_sub(self.unacked);
        let of_one = self.limits.unacked_per_consumer_max.saturating_sub(consumer.held);
        consumer.credit().min(of_all).min(of_one)
    }

    pub(super) fn lease_of(&self, consumer: u64) -> u64 {
        let Some(known) = self.consumers.get(&consumer) else { return 0 };
        match known.link {
            Link::Pull { .. } => known.lease_ms,
            _ if self.policy.kind.is_shared() => self.policy.lease_ms,
            _ => 0,
        }
    }

    /// The end of a lease that begins now. Rounded up, so that leases of one moment make one run: late, never early (L4).
    pub(super) fn lease_until(&self, consumer: u64) -> u64 {
        self.until(self.lease_of(consumer))
    }

    pub(super) fn until(&self, lease_ms: u64) -> u64 {
        if lease_ms == 0 {
            return 0;
        }
        let step = (lease_ms / 64).max(LEASE_STEP_MS);
        let end = self.now_ms.saturating_add(lease_ms);
        end.div_ceil(step).saturating_mul(step)
    }

    /// Remembers that a consumer accepted these.
    pub(super) fn remember_accepted(&mut self, consumer: u64, runs: &[(u64, u64)]) {
        let Some(known) = self.consumers.get_mut(&consumer) else { return };
        for (start, end) in runs {
            known.accepted.insert(*start, *end);
        }
        while known.accepted.runs() > ACCEPTED_RUNS_MAX {
            let Some((start, end)) = known.accepted.iter().next() else { return };
            known.accepted.remove(start, end);
        }
    }

    /// Everything that a consumer holds goes back with its attempt unchanged, and it is told.
    pub(super) fn revoke_all(&mut self, consumer: u64) {
        let mine = |state| matches!(state, State::Held { by, .. } if by == consumer);
        let runs = self.runs_where(self.mark_delete, u64::MAX, mine);
        self.revoke(&runs);
    }

    /// These held runs go back with their attempt unchanged, and their consumers are told.
    pub(super) fn revoke(&mut self, runs: &[(u64, u64, State)]) {
        for (start, end, state) in runs {
            if let State::Held { by, attempt, .. } = *state {
                self.put(*start, *end, Some(State::Ready { attempt }));
                self.tell_revoked(by, attempt, (*start, *end));
            }
        }
    }

    pub(super) fn tell_revoked(&mut self, consumer: u64, attempt: u32, run: (u64, u64)) {
        if !self.consumers.get(&consumer).is_some_and(Consumer::is_here) {
            return;
        }
        if let Some(Action::Revoke { consumer: last, attempt: of, runs }) = self.out.back_mut()
            && *last == consumer
            && *of == attempt
        {
            runs.push(run);
            return;
        }
        self.out.push_back(Action::Revoke { consumer, attempt, runs: vec![run] });
    }

    /// Instances that are there, with what each is called.
    pub fn names(&self) -> impl Iterator<Item = (u64, &str)> + '_ {
        self.consumers.iter().map(|(id, consumer)| (*id, consumer.name.as_str()))
    }
}

fn new_consumer(name: &str, link: Link) -> Consumer {
    Consumer {
        name: name.to_owned(),
        link,
        outbox_open: true,
        granted_messages: 0,
        granted_bytes: 0,
        used_messages: 0,
        used_bytes: 0,
        held: 0,
        lease_ms: 0,
        accepted: super::super::RangeSet::default(),
    }
}
