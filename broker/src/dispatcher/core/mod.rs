//! The dispatcher's decisions: events in, actions out. No clock, socket or lock; time is handed in.
//!
//! Level-triggered: [`Core::step`] looks at the whole state, never at what just happened, so no lost wake-up can stop it.
//! Progress rule (promise 2): with credit, room for unacknowledged messages, an open outbox, a rate that is not used up and
//! something deliverable, `step` returns an action; else [`Core::explain`] names the class of every message that is held up, and the classes add
//! up to the backlog.
//!
//! - `state`: what an offset may be, and the counts that follow each change;
//! - `consumers`: who is there, with what credit; attach, claims (L4), loss, grace; `active`: failover;
//! - `deliver`: who gets what next; `keys`: the same, by key, and the table (L5); `reads`: what must be read for it;
//! - `verbs`: settles; `records`: what must be durable before it counts (L1, L3); `dead`: dead letters;
//! - `time`: leases, delays, grace; `rate`: what a policy allows; `handover`: what the next owner learns (L2, L4); `explain`: why not.
//!
//! Byte credit: a delivery begins only while some is left, and may exceed it by the rest of that one batch. A batch
//! cannot be cut, and a consumer whose whole grant is smaller than one batch must not be stuck for ever.

mod active;
mod consumers;
mod dead;
mod deliver;
mod explain;
mod handover;
mod keys;
mod rate;
mod reads;
mod records;
mod state;
#[cfg(test)]
mod tests;
mod time;
mod types;
mod verbs;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

pub use consumers::AttachRefused;
pub use explain::{ConsumerSeen, Explained, HeldBy, HeldUp};
pub use types::{
    Action, Attached, Batch, Change, Claimed, CoreLimits, DeadLetter, Decision, Delivery, Kind,
    Lease, Owner, Policy, Presented, ReadOf, RecordFailed, Redelivery, Restored, SettleRefused,
    Tally, Verb,
};

use super::{RangeSet, RunMap};
use consumers::Consumer;
use keys::Keys;
use rate::Rate;
use records::Recording;
use state::State;

/// The state of one subscription on one segment.
#[derive(Debug)]
pub struct Core<B> {
    policy: Policy,
    limits: CoreLimits,
    owner: Owner,
    now_ms: u64,
    rate: Rate,

    end: u64,
    mark_delete: u64,
    settled: RangeSet,
    /// Everything below that is neither settled nor here is fresh no more: there is no such offset.
    states: RunMap<State>,
    /// Below it no offset is fresh.
    frontier: u64,
    /// Below the frontier or above: to be delivered as soon as somebody can take it.
    ready: RangeSet,
    /// Runs that wait for a time: (due, start, end).
    timers: BTreeSet<(u64, u64, u64)>,
    /// Messages by the end of their lease.
    deadlines: BTreeMap<u64, u64>,
    /// Holes that the cursor may have, once it has said so.
    holes_max: usize,
    /// Held, settling, ending, kept or dead.
    unacked: u64,
    /// Ready or waiting.
    parked: u64,
    /// In runs that wait for a time as one.
    distant: u64,
    /// Whose attempt ended, and that is being recorded.
    ending: u64,

    consumers: BTreeMap<u64, Consumer>,
    /// Whose turn is over (shared).
    turn: u64,
    /// Until then what was recorded as leased belongs to those who may come back (L4).
    grace_until: u64,
    /// What they are called.
    kept_names: BTreeMap<u64, String>,

    /// Failover.
    active: Option<u64>,
    /// Who is to be active, among those who are here; none: to be found.
    wanted: Option<Option<u64>>,
    assign_epoch: u64,
    /// The active one must be rid of what it holds by then: another one is to be active.
    drain_until: Option<u64>,

    keys: Keys,

    queue: VecDeque<B>,
    queued_bytes: u64,
    queued_messages: u64,
    next_read: u64,
    replay: VecDeque<B>,
    /// An offset to be delivered again whose batch is not at hand.
    replay_wanted: Option<u64>,
    reading: Option<u64>,
    replaying: Option<u64>,
    read_failed: bool,
    /// Rises with each seek: what was begun before counts for nothing.
    generation: u64,

    recordings: BTreeMap<u64, Recording>,
    next_record: u64,
    /// Records of the core's own that failed, to be tried again after a pause.
    again: Vec<Recording>,
    record_failed: bool,
    /// Seeks that are being recorded: until then nothing is delivered or settled.
    resets: u32,
    stopping: bool,

    dead: BTreeMap<u64, DeadLetter>,
    dead_next: u64,
    deciding: VecDeque<(u64, Recording)>,
    deciding_now: Option<u64>,
    publishing: Option<u64>,

    out: VecDeque<Action<B>>,
    round: Vec<Lease>,
    tally: Tally,
}

impl<B: Batch> Core<B> {
    /// The state as it is durable, and nobody there yet.
    #[must_use]
    pub fn new(
        policy: Policy,
        limits: CoreLimits,
        owner: Owner,
        restored: Restored,
        (end, now_ms): (u64, u64),
    ) -> Self {
        // In order there is one to give to: what others held before is not kept from it. A claim comes before that, or late.
        let leases = if policy.kind.is_shared() { restored.leases } else { Vec::new() };
        let graced = !leases.is_empty() || !restored.keys.is_empty();
        let mut core = Self {
            policy,
            owner,
            now_ms,
            rate: Rate::default(),
            end,
            mark_delete: restored.mark_delete,
            settled: restored.settled,
            states: RunMap::default(),
            frontier: restored.mark_delete,
            ready: RangeSet::default(),
            timers: BTreeSet::new(),
            deadlines: BTreeMap::new(),
            holes_max: usize::MAX,
            unacked: 0,
            parked: 0,
            distant: 0,
            ending: 0,
            consumers: BTreeMap::new(),
            turn: 0,
            grace_until: if graced { now_ms.saturating_add(limits.grace_ms) } else { 0 },
            kept_names: BTreeMap::new(),
            limits,
            active: None,
            wanted: None,
            assign_epoch: owner.epoch << 32,
            drain_until: None,
            keys: Keys::new(restored.keys),
            queue: VecDeque::new(),
            queued_bytes: 0,
            queued_messages: 0,
            next_read: restored.mark_delete,
            replay: VecDeque::new(),
            replay_wanted: None,
            reading: None,
            replaying: None,
            read_failed: false,
            generation: 0,
            recordings: BTreeMap::new(),
            next_record: 0,
            again: Vec::new(),
            record_failed: false,
            resets: 0,
            stopping: false,
            dead: BTreeMap::new(),
            dead_next: restored.dead_letters,
            deciding: VecDeque::new(),
            deciding_now: None,
            publishing: None,
            out: VecDeque::new(),
            round: Vec::new(),
            tally: Tally::default(),
        };
        core.restore(restored.pending, leases, restored.dead);
        core
    }

    fn restore(&mut self, pending: Vec<Redelivery>, leases: Vec<Lease>, dead: Vec<DeadLetter>) {
        for Redelivery { start, end, attempt, due_ms } in pending {
            let state = self.parked_state(attempt, due_ms);
            self.put_unsettled(start, end, state);
            if self.policy.kind == Kind::KeyShared {
                self.keys.doubt = self.keys.doubt.min(start);
            }
        }
        // A lease may lie above what is pending under the same attempt.
        for lease in leases {
            self.kept_names.insert(lease.consumer, lease.name);
            for (start, end) in lease.runs {
                let kept = State::Kept { by: lease.consumer, attempt: lease.attempt };
                self.put_unsettled(start, end, kept);
            }
        }
        for letter in dead {
            self.put_unsettled(letter.offset, letter.offset + 1, State::Dead);
            self.dead.insert(letter.number, letter);
        }
    }

    fn put_unsettled(&mut self, start: u64, end: u64, state: State) {
        let (mut at, end) = (start.max(self.mark_delete), end.min(self.end));
        while at < end {
            at = self.settled.next_outside(at);
            let until = self.settled.next_inside(at).unwrap_or(end).min(end);
            self.put(at, until, Some(state));
            at = until.max(at + 1);
        }
    }

    /// Everything below this offset is confirmed. It never falls.
    pub fn on_end(&mut self, end: u64) {
        self.end = self.end.max(end);
    }

    /// The subscription's settings changed; the type never does.
    pub fn on_policy(&mut self, policy: Policy) {
        self.policy = Policy { kind: self.policy.kind, ..policy };
    }

    /// The policy in force.
    #[must_use]
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// Consumers that there may be; those who are there stay.
    pub fn on_consumers_max(&mut self, consumers_max: usize) {
        self.limits.consumers_max = consumers_max;
    }

    /// The topic has so many segments, which failover consumers share.
    pub fn on_segments(&mut self, segments: u32) {
        if segments > self.owner.segments {
            self.owner.segments = segments;
            self.wanted = None;
        }
    }

    /// Below it no offset is fresh: what waits for a time is known.
    #[must_use]
    pub fn frontier(&self) -> u64 {
        self.frontier
    }

    /// The one consumer that gets the messages, where there is one.
    #[must_use]
    pub fn active_name(&self) -> Option<&str> {
        let id = match self.policy.kind {
            Kind::Failover => self.active?,
            Kind::Exclusive => *self.consumers.keys().next()?,
            Kind::Shared | Kind::KeyShared => return None,
        };
        self.consumers.get(&id).filter(|c| c.is_here()).map(|c| c.name.as_str())
    }

    /// The cursor as it stands; somebody else may have settled something: a policy, for instance. What is with consumers and
    /// below mark-delete is taken from them. Nothing while a record is on its way: its answer says as much.
    pub fn on_cursor(&mut self, mark_delete: u64) {
        if self.resets > 0 || mark_delete <= self.mark_delete {
            return;
        }
        let held = |state| matches!(state, State::Held { .. });
        for (start, end, state) in self.runs_where(self.mark_delete, mark_delete, held) {
            if let State::Held { by, attempt, .. } = state {
                self.tell_revoked(by, attempt, (start, end));
            }
        }
        self.dead.retain(|_, letter| letter.offset >= mark_delete);
        self.pass(mark_delete);
    }

    /// The cursor refused a settle for having so many holes: nothing fresh is given while it has, so that what is given can
    /// be settled.
    pub fn on_holes_max(&mut self, holes_max: usize) {
        self.holes_max = holes_max.max(1);
    }

    /// Whether as much is out of order as may be: nothing later is looked at.
    fn full(&self) -> bool {
        let parked = match self.policy.kind {
            // What waits for its first delivery needs no room of its own ([`State::Distant`]).
            Kind::Shared => self.timers.len() as u64 / 2,
            _ => self.parked,
        };
        parked >= self.limits.parked_messages_max || self.settled.runs() >= self.holes_max
    }

    /// What was counted since the last call.
    pub fn take_tally(&mut self) -> Tally {
        std::mem::take(&mut self.tally)
    }

    /// The first offset that is not settled.
    #[must_use]
    pub fn mark_delete(&self) -> u64 {
        self.mark_delete
    }

    /// Messages not settled.
    #[must_use]
    pub fn backlog(&self) -> u64 {
        self.end.saturating_sub(self.mark_delete).saturating_sub(self.settled.len())
    }

    /// Whether nobody is there, nobody may come back, and nothing goes on: the task may end. What waits for a time is
    /// durable, or found again by reading; with nobody there it needs no timer.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.consumers.is_empty()
            && self.recordings.is_empty()
            && self.again.is_empty()
            && self.deciding.is_empty()
            && self.dead.is_empty()
            && self.out.is_empty()
            && self.now_ms >= self.grace_until
            && self.owes_nothing()
    }

    fn resetting(&self) -> bool {
        self.resets > 0
    }

    /// What to do now; call until it returns none. None always has a reason: [`Self::explain`].
    pub fn step(&mut self) -> Option<Action<B>> {
        if let Some(action) = self.out.pop_front() {
            return Some(action);
        }
        self.retry_records();
        self.decide_next();
        self.settle_active();
        self.settle_table();
        if self.out.is_empty()
            && let Some(action) = self.dispatch()
        {
            return Some(action);
        }
        if let Some(action) = self.out.pop_front() {
            return Some(action);
        }
        if !self.round.is_empty() {
            return Some(Action::LogLeases(std::mem::take(&mut self.round)));
        }
        self.publish_next()
    }
}
