//! Why messages are not delivered: every one that is not settled is in one class, and the classes add up to the backlog.

use std::collections::BTreeMap;

use super::{
    Batch, Core, Kind, State,
    consumers::{Consumer, Link},
};

/// What holds messages up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HeldBy {
    /// Deliverable, and on its way.
    Nothing,
    NoConsumer,
    NoCredit,
    Lease,
    Key,
    Delay,
    DeadLetter,
    UnackedLimit,
    SlowConnection,
    Read,
    Grace,
    HolesLimit,
    RateLimit,
}

/// A class of messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldUp {
    pub by: HeldBy,
    pub messages: u64,
    pub first: u64,
    /// Who has the first of them.
    pub consumer: String,
    /// When the first of them is free; 0: unknown.
    pub until_ms: u64,
}

/// A consumer as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsumerSeen {
    pub name: String,
    pub active: bool,
    pub connected: bool,
    pub credit_messages: u64,
    pub credit_bytes: u64,
    pub held: u64,
}

/// The answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Explained {
    pub mark_delete: u64,
    pub end: u64,
    pub held: Vec<HeldUp>,
    pub consumers: Vec<ConsumerSeen>,
}

#[derive(Default)]
struct Classes(BTreeMap<HeldBy, HeldUp>);

impl Classes {
    fn add(&mut self, by: HeldBy, (start, end): (u64, u64), consumer: &str, until_ms: u64) {
        let messages = end.saturating_sub(start);
        if messages == 0 {
            return;
        }
        let class = self.0.entry(by).or_insert_with(|| HeldUp {
            by,
            messages: 0,
            first: u64::MAX,
            consumer: String::new(),
            until_ms: 0,
        });
        class.messages += messages;
        if start < class.first {
            (class.first, class.until_ms) = (start, until_ms);
            consumer.clone_into(&mut class.consumer);
        }
    }
}

impl<B: Batch> Core<B> {
    /// Why what is not settled is not with anybody, or with whom it is.
    #[must_use]
    pub fn explain(&self) -> Explained {
        let mut classes = Classes::default();
        for (start, end, state) in self.states.iter() {
            if start >= self.end {
                break;
            }
            self.classify(&mut classes, (start, end), state);
        }
        let fresh = self.why_not();
        let mut at = self.mark_delete;
        while let Some((start, end)) = self.next_without_state(at, self.end) {
            self.classify_fresh(&mut classes, (start, end), fresh);
            at = end;
        }
        let consumers = self.consumers.iter().map(|(id, consumer)| ConsumerSeen {
            name: consumer.name.clone(),
            active: match self.policy.kind {
                Kind::Failover => self.active == Some(*id),
                _ => consumer.is_here(),
            },
            connected: consumer.link == Link::Stream,
            credit_messages: consumer.granted_messages.saturating_sub(consumer.used_messages),
            credit_bytes: consumer.credit_bytes(),
            held: consumer.held,
        });
        Explained {
            mark_delete: self.mark_delete,
            end: self.end,
            held: classes.0.into_values().collect(),
            consumers: consumers.collect(),
        }
    }

    /// What no consumer has come to: of what was read ahead it is known what waits for a time.
    fn classify_fresh(&self, classes: &mut Classes, run: (u64, u64), fresh: HeldBy) {
        let until = self.until_of(fresh);
        let mut at = run.0;
        if self.policy.kind.is_shared() {
            let read = self.queue.iter().filter(|batch| batch.has_delays());
            for batch in read.filter(|batch| batch.base() < run.1 && batch.end() > run.0) {
                for offset in batch.base().max(run.0)..batch.end().min(run.1) {
                    let due = batch.deliver_at((offset - batch.base()) as u32);
                    if due > self.now_ms {
                        classes.add(fresh, (at, offset), "", until);
                        classes.add(HeldBy::Delay, (offset, offset + 1), "", due);
                        at = offset + 1;
                    }
                }
            }
        }
        classes.add(fresh, (at, run.1), "", until);
    }

    fn until_of(&self, by: HeldBy) -> u64 {
        if by == HeldBy::RateLimit { self.rate_until() } else { 0 }
    }

    fn classify(&self, classes: &mut Classes, run: (u64, u64), state: State) {
        let name = |id: u64| self.consumers.get(&id).map_or("", |consumer| consumer.name.as_str());
        match state {
            State::Held { by, until, .. } => match self.consumers.get(&by).map(|c| c.link) {
                Some(Link::Gone { since }) => {
                    let until = since.saturating_add(self.limits.grace_ms);
                    classes.add(HeldBy::Grace, run, name(by), until);
                }
                _ => classes.add(HeldBy::Lease, run, name(by), until),
            },
            State::Settling { by, .. } => classes.add(HeldBy::Lease, run, name(by), 0),
            State::Ending { .. } | State::Gone => classes.add(HeldBy::Nothing, run, "", 0),
            State::Waiting { due, .. } | State::Distant { due } => {
                classes.add(HeldBy::Delay, run, "", due);
            }
            State::Kept { by, .. } => {
                let name = self.kept_names.get(&by).map_or("", String::as_str);
                classes.add(HeldBy::Grace, run, name, self.grace_until);
            }
            State::Dead => classes.add(HeldBy::DeadLetter, run, "", 0),
            State::Ready { .. } if self.policy.kind == Kind::KeyShared => {
                for offset in run.0..run.1 {
                    let (by, consumer) = self.why_not_by_key(offset);
                    classes.add(by, (offset, offset + 1), consumer, self.until_of(by));
                }
            }
            State::Ready { .. } => {
                let by = self.why_not();
                classes.add(by, run, "", self.until_of(by));
            }
        }
    }

    /// As [`Self::why_not`], of a ready message of a key-shared subscription, which only one consumer may get.
    fn why_not_by_key(&self, offset: u64) -> (HeldBy, &str) {
        let general = self.why_not();
        if general == HeldBy::NoConsumer || offset >= self.frontier {
            return (general, "");
        }
        let Some(owner) = self.keys.head_owner(offset) else {
            let holder = self.key_holder(offset).and_then(|id| self.consumers.get(&id));
            return (HeldBy::Key, holder.map_or("", |holder| holder.name.as_str()));
        };
        let Some(consumer) = self.consumers.get(&owner) else { return (HeldBy::Grace, "") };
        let unacked = self.unacked >= self.limits.unacked_messages_max
            || consumer.held >= self.limits.unacked_per_consumer_max;
        let by = match () {
            () if !consumer.is_here() => HeldBy::Grace,
            () if consumer.credit() == 0 => HeldBy::NoCredit,
            () if unacked => HeldBy::UnackedLimit,
            () if !consumer.outbox_open => HeldBy::SlowConnection,
            () if self.rate_holds() => HeldBy::RateLimit,
            () if self.read_failed || self.replaying.is_some() => HeldBy::Read,
            () => HeldBy::Nothing,
        };
        (by, consumer.name.as_str())
    }

    /// Why what could be delivered is not: of several reasons the one that others can do something about.
    #[must_use]
    pub fn why_not(&self) -> HeldBy {
        let here: Vec<&Consumer> = match self.policy.kind {
            Kind::Failover => {
                let active = self.active.and_then(|active| self.consumers.get(&active));
                active.into_iter().filter(|consumer| consumer.is_here()).collect()
            }
            _ => self.consumers.values().filter(|consumer| consumer.is_here()).collect(),
        };
        let any = |holds: &dyn Fn(&&&Consumer) -> bool| here.iter().find(holds).is_some();
        if here.is_empty() {
            return if self.consumers.is_empty() { HeldBy::NoConsumer } else { HeldBy::Grace };
        }
        if !any(&|consumer| consumer.credit() > 0) {
            return HeldBy::NoCredit;
        }
        if self.drain_until.is_some() {
            return HeldBy::Lease;
        }
        let of_one = self.limits.unacked_per_consumer_max;
        if self.unacked >= self.limits.unacked_messages_max
            || !any(&|consumer| consumer.credit() > 0 && consumer.held < of_one)
        {
            return HeldBy::UnackedLimit;
        }
        if !any(&|consumer| self.room(consumer) > 0) {
            return HeldBy::SlowConnection;
        }
        if self.rate_holds() {
            return HeldBy::RateLimit;
        }
        if self.full() {
            return HeldBy::HolesLimit;
        }
        if self.read_failed || self.reading.is_some() || self.replaying.is_some() {
            return HeldBy::Read;
        }
        if self.policy.kind == Kind::KeyShared
            && (self.looked_too_far() || self.keys.recording || self.keys.table.is_empty())
        {
            return HeldBy::Key;
        }
        HeldBy::Nothing
    }

    /// Whether something is neither settled nor with anybody, nor waits for a time.
    #[must_use]
    pub fn has_next(&self) -> bool {
        !self.ready.is_empty() || self.next_without_state(self.frontier, self.end).is_some()
    }

    /// What waits for a time: (due, start, end, attempt), the next due first, after this place.
    #[must_use]
    pub fn delayed(&self, after: (u64, u64), most: usize) -> Vec<(u64, u64, u64, u32)> {
        let from = (after.0, after.1, u64::MAX);
        let next = self.timers.range((std::ops::Bound::Excluded(from), std::ops::Bound::Unbounded));
        next.filter_map(|(due, start, end)| match self.states.get(*start) {
            Some((_, _, State::Waiting { attempt, .. })) => Some((*due, *start, *end, attempt)),
            _ => None,
        })
        .take(most)
        .collect()
    }

    /// Runs whose messages, by their times, must be looked for in the log: those that wait as one, and what no consumer has come
    /// to yet.
    #[must_use]
    pub fn not_told_apart(&self) -> Vec<(u64, u64)> {
        let distant = |state| matches!(state, State::Distant { .. });
        let mut runs: Vec<(u64, u64)> = if self.distant == 0 {
            Vec::new()
        } else {
            self.runs_where(self.mark_delete, u64::MAX, distant)
                .iter()
                .map(|r| (r.0, r.1))
                .collect()
        };
        runs.push((self.frontier, u64::MAX));
        runs
    }

    /// Messages that wait for a time, and consumers that are there.
    #[must_use]
    pub fn gauges(&self) -> (u64, u64) {
        let waiting = self.parked.saturating_sub(self.ready.len()) + self.distant;
        (waiting, self.consumers.len() as u64)
    }
}
