//! The core against a small model of a log, a cursor and its consumers, under random events.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;

use super::{super::KeyRange, *};
use crate::limits::{Rate as PerSecond, Rates, Throttle};

#[derive(Clone, Debug, PartialEq, Eq)]
struct Stored {
    base: u64,
    count: u32,
    bytes: u64,
    delays: Vec<u64>,
}

impl Batch for Stored {
    fn base(&self) -> u64 {
        self.base
    }
    fn count(&self) -> u32 {
        self.count
    }
    fn bytes(&self) -> u64 {
        self.bytes
    }
    fn key_hash(&self, at: u32) -> u32 {
        key_of(self.base + u64::from(at))
    }
    fn deliver_at(&self, at: u32) -> u64 {
        self.delays.get(at as usize).copied().unwrap_or(0)
    }
    fn has_delays(&self) -> bool {
        !self.delays.is_empty()
    }
}

/// Five keys, far apart, so that they have different owners.
fn key_of(offset: u64) -> u32 {
    (offset as u32 * 7 % 5) * 0x3000_0001
}

const LIMITS: CoreLimits = CoreLimits {
    unacked_messages_max: 40,
    unacked_per_consumer_max: 25,
    consumers_max: 4,
    read_ahead_bytes_max: 800,
    parked_messages_max: 1_000,
    run_pause_ms: 10,
    dead_letters_max: 1_000,
    grace_ms: 50,
};

/// Every other shared one has no room to tell more than two waiting messages apart.
fn limits(policy: Policy) -> CoreLimits {
    let tight = policy.kind == Kind::Shared && policy.attempts_max % 2 == 1;
    CoreLimits { parked_messages_max: if tight { 2 } else { LIMITS.parked_messages_max }, ..LIMITS }
}

#[derive(Clone, Debug)]
enum Event {
    Append { count: u32, bytes: u64, delay: Option<u64> },
    Attach { name: u8, claim: bool },
    Leave { who: usize, clean: bool },
    Credit { who: usize, messages: u64 },
    Outbox { who: usize, open: bool },
    Accept { who: usize, pick: usize, len: usize },
    UpTo { who: usize, pick: usize },
    Release { who: usize, pick: usize, len: usize, delay: Option<u64>, counts: bool },
    Reject { who: usize, pick: usize },
    Extend { who: usize, pick: usize },
    Steal { who: usize, other: usize, pick: usize },
    Time(u64),
    Records { most: usize, fail: bool },
    Published,
    ReadFails,
    Retry,
    Crash,
    Seek(u64),
    Rate(Option<u64>),
}

fn event() -> impl Strategy<Value = Event> {
    let (who, pick, len) = (0usize..4, 0usize..64, 1usize..8);
    prop_oneof![
        6 => (1u32..8, 1u64..300, prop::option::weighted(0.2, 1u64..120))
            .prop_map(|(count, bytes, delay)| Event::Append { count, bytes, delay }),
        4 => (0u8..4, any::<bool>()).prop_map(|(name, claim)| Event::Attach { name, claim }),
        1 => (who.clone(), any::<bool>()).prop_map(|(who, clean)| Event::Leave { who, clean }),
        6 => (who.clone(), 1u64..30).prop_map(|(who, messages)| Event::Credit { who, messages }),
        1 => (who.clone(), any::<bool>()).prop_map(|(who, open)| Event::Outbox { who, open }),
        4 => (who.clone(), pick.clone(), len.clone()).prop_map(|(who, pick, len)| Event::Accept { who, pick, len }),
        2 => (who.clone(), pick.clone()).prop_map(|(who, pick)| Event::UpTo { who, pick }),
        4 => (who.clone(), pick.clone(), len, prop::option::of(0u64..80), any::<bool>())
            .prop_map(|(who, pick, len, delay, counts)| Event::Release { who, pick, len, delay, counts }),
        1 => (who.clone(), pick.clone()).prop_map(|(who, pick)| Event::Reject { who, pick }),
        1 => (who.clone(), pick.clone()).prop_map(|(who, pick)| Event::Extend { who, pick }),
        1 => (who.clone(), 0usize..4, pick).prop_map(|(who, other, pick)| Event::Steal { who, other, pick }),
        4 => (1u64..60).prop_map(Event::Time),
        8 => (1usize..6, prop::bool::weighted(0.1)).prop_map(|(most, fail)| Event::Records { most, fail }),
        2 => Just(Event::Published),
        1 => Just(Event::ReadFails),
        2 => Just(Event::Retry),
        1 => Just(Event::Crash),
        1 => (0u64..100).prop_map(Event::Seek),
        1 => prop::option::of(0u64..300).prop_map(Event::Rate),
    ]
}

/// The cursor as it is durable.
#[derive(Clone, Debug, Default)]
struct Durable {
    settled: BTreeSet<u64>,
    /// (attempt, due) of the next delivery.
    pending: BTreeMap<u64, (u32, u64)>,
    /// (consumer, attempt).
    leases: BTreeMap<u64, (u64, u32)>,
    dead: BTreeMap<u64, DeadLetter>,
    dead_letters: u64,
    keys: Vec<KeyRange>,
}

impl Durable {
    fn mark(&self) -> u64 {
        (0..).find(|offset| !self.settled.contains(offset)).expect("some")
    }

    fn settle(&mut self, offset: u64) {
        self.settled.insert(offset);
        self.pending.remove(&offset);
        self.leases.remove(&offset);
        self.dead.retain(|_, letter| letter.offset != offset);
    }

    fn apply(&mut self, change: Change) {
        match change {
            Change::Accept(runs) => {
                runs.iter().for_each(|run| (run.0..run.1).for_each(|at| self.settle(at)))
            }
            Change::UpTo(end) => (0..end).for_each(|at| self.settle(at)),
            Change::Redeliver(items) => {
                for item in items {
                    for offset in item.start..item.end {
                        let dead = self.dead.values().any(|letter| letter.offset == offset);
                        if !self.settled.contains(&offset) && !dead {
                            self.pending.insert(offset, (item.attempt, item.due_ms));
                            self.leases.remove(&offset);
                        }
                    }
                }
            }
            Change::DeadLetter(letters) => {
                for letter in letters {
                    assert_eq!(letter.number, self.dead_letters + 1, "numbers are dense");
                    self.dead_letters += 1;
                    if self.settled.contains(&letter.offset) {
                        continue; // its number is used, and no copy needed
                    }
                    self.pending.remove(&letter.offset);
                    self.leases.remove(&letter.offset);
                    self.dead.insert(letter.number, letter);
                }
            }
            Change::Keys(table) => self.keys = table,
            Change::Reset(to) => {
                let (dead_letters, keys) = (self.dead_letters, self.keys.clone());
                let settled = (0..to).collect();
                *self = Self { settled, dead_letters, keys, ..Self::default() };
            }
        }
    }
}

#[derive(Clone, Debug)]
struct Peer {
    id: u64,
    name: String,
    here: bool,
    outbox: bool,
    granted: u64,
    used: u64,
}

struct Model {
    policy: Policy,
    now: u64,
    log: Vec<Stored>,
    end: u64,
    durable: Durable,
    records: VecDeque<(u64, Change)>,
    peers: Vec<Peer>,
    next_id: u64,
    /// Who holds an offset under which attempt, as the consumers know; and for how long at least.
    held: BTreeMap<u64, (u64, u32)>,
    /// A settle of these is on its way.
    settling: BTreeSet<u64>,
    /// Accepted by its holder, or given up for dead, at least asked for.
    published: BTreeMap<u64, u64>,
    publishing: Option<DeadLetter>,
    read_fails: bool,
    crashes: u32,
    /// Deliveries of an offset since the last seek.
    deliveries: BTreeMap<u64, u32>,
    rate: Throttle,
    /// The batch that was given last: its rest passes with it.
    given: Option<u64>,
    core: Core<Stored>,
}

const OWNER: Owner = Owner { epoch: 3, segment: 1, segments: 4 };

impl Model {
    fn new(policy: Policy) -> Self {
        let mut core = Core::new(policy, limits(policy), OWNER, Restored::default(), (0, 1_000));
        core.on_rate_time(1_000);
        Self {
            policy,
            now: 1_000,
            log: Vec::new(),
            end: 0,
            durable: Durable::default(),
            records: VecDeque::new(),
            peers: Vec::new(),
            next_id: 0,
            held: BTreeMap::new(),
            settling: BTreeSet::new(),
            published: BTreeMap::new(),
            publishing: None,
            read_fails: false,
            crashes: 0,
            deliveries: BTreeMap::new(),
            rate: Throttle::default(),
            given: None,
            core,
        }
    }

    fn peer(&self, who: usize) -> Option<&Peer> {
        let here: Vec<&Peer> = self.peers.iter().filter(|peer| peer.here).collect();
        (!here.is_empty()).then(|| here[who % here.len()])
    }

    /// Something that a consumer holds: an offset and the attempt.
    fn pick(&self, id: u64, pick: usize) -> Option<(u64, u32)> {
        let mine: Vec<_> = self
            .held
            .iter()
            .filter(|(offset, (by, _))| *by == id && !self.settling.contains(offset))
            .map(|(offset, (_, attempt))| (*offset, *attempt))
            .collect();
        (!mine.is_empty()).then(|| mine[pick % mine.len()])
    }

    /// A run of what it holds under one attempt.
    fn pick_run(&self, id: u64, pick: usize, len: usize) -> Option<(Vec<u64>, Presented)> {
        let (first, attempt) = self.pick(id, pick)?;
        let of = |offset: u64| {
            self.held.get(&offset) == Some(&(id, attempt)) && !self.settling.contains(&offset)
        };
        let run = (first..first + len as u64).take_while(|offset| of(*offset)).collect();
        Some((run, Presented { consumer: id, attempt, earlier: false }))
    }

    fn settle(&mut self, who: Presented, offsets: &[u64], verb: impl Fn(Vec<(u64, u64)>) -> Verb) {
        let runs = vec![(offsets[0], offsets[offsets.len() - 1] + 1)];
        let verb = verb(runs);
        let given_back = matches!(verb, Verb::Release { .. });
        if self.core.resetting() {
            assert_eq!(self.core.settle(who, verb), Err(SettleRefused::Seeking));
            return;
        }
        match self.core.settle(who, verb).expect("held") {
            Decision::Recorded(_) => self.settling.extend(offsets),
            Decision::Now => {
                if given_back {
                    self.held.retain(|offset, _| !offsets.contains(offset));
                }
            }
        }
    }

    fn apply(&mut self, event: Event) -> Result<(), TestCaseError> {
        match event {
            Event::Append { count, bytes, delay } => {
                let delays =
                    delay.map(|delay| {
                        (0..count)
                            .map(|at| {
                                if at % 4 == 3 { 0 } else { self.now + delay + u64::from(at) * 17 }
                            })
                            .collect()
                    });
                let delays = delays.unwrap_or_default();
                self.log.push(Stored { base: self.end, count, bytes, delays });
                self.end += u64::from(count);
                self.core.on_end(self.end);
            }
            Event::Attach { name, claim } => self.attach(format!("c{name}"), claim),
            Event::Leave { who, clean } => {
                let Some(id) = self.peer(who).map(|peer| peer.id) else { return Ok(()) };
                self.core.detach(id, clean);
                if clean {
                    self.held.retain(|offset, (by, _)| *by != id || self.settling.contains(offset));
                    self.peers.retain(|peer| peer.id != id);
                } else {
                    self.peers
                        .iter_mut()
                        .filter(|peer| peer.id == id)
                        .for_each(|peer| peer.here = false);
                }
            }
            Event::Credit { who, messages } => {
                let Some(id) = self.peer(who).map(|peer| peer.id) else { return Ok(()) };
                let peer = self.peers.iter_mut().find(|peer| peer.id == id).expect("there");
                peer.granted += messages;
                self.core.on_credit(id, peer.granted, u64::MAX);
                self.core.on_credit(id, peer.granted / 2, 0); // an old total, come late
            }
            Event::Outbox { who, open } => {
                let Some(id) = self.peer(who).map(|peer| peer.id) else { return Ok(()) };
                self.peers
                    .iter_mut()
                    .filter(|peer| peer.id == id)
                    .for_each(|peer| peer.outbox = open);
                self.core.on_outbox(id, open);
            }
            Event::Accept { who, pick, len } => {
                let Some(id) = self.peer(who).map(|peer| peer.id) else { return Ok(()) };
                if let Some((run, presented)) = self.pick_run(id, pick, len) {
                    self.settle(presented, &run, |runs| Verb::Accept { runs });
                    let runs = vec![(run[0], run[run.len() - 1] + 1)];
                    let again = self.core.settle(presented, Verb::Accept { runs });
                    prop_assert!(again.is_ok() || self.core.resetting(), "accepting twice is fine");
                }
            }
            Event::UpTo { who, pick } => {
                let Some(id) = self.peer(who).map(|peer| peer.id) else { return Ok(()) };
                let Some((offset, attempt)) = self.pick(id, pick) else { return Ok(()) };
                let who = Presented { consumer: id, attempt, earlier: false };
                let done = self.core.settle(who, Verb::UpTo { end: offset + 1 });
                let can = !self.policy.kind.is_shared() && !self.core.resetting();
                prop_assert_eq!(done.is_ok(), can);
                if done.is_ok() {
                    let mine = self.held.iter().filter(|(at, (by, _))| **at <= offset && *by == id);
                    self.settling.extend(mine.map(|(at, _)| *at).collect::<Vec<_>>());
                }
            }
            Event::Release { who, pick, len, delay, counts } => {
                let Some(id) = self.peer(who).map(|peer| peer.id) else { return Ok(()) };
                if let Some((run, presented)) = self.pick_run(id, pick, len) {
                    self.settle(presented, &run, |runs| Verb::Release {
                        runs,
                        delay_ms: delay,
                        counts,
                    });
                }
            }
            Event::Reject { who, pick } => {
                let Some(id) = self.peer(who).map(|peer| peer.id) else { return Ok(()) };
                if let Some((run, presented)) = self.pick_run(id, pick, 1) {
                    let reason = "no".to_owned();
                    self.settle(presented, &run, |runs| Verb::Reject {
                        runs,
                        reason: reason.clone(),
                    });
                }
            }
            Event::Extend { who, pick } => {
                let Some(id) = self.peer(who).map(|peer| peer.id) else { return Ok(()) };
                if let Some((run, presented)) = self.pick_run(id, pick, 1) {
                    self.settle(presented, &run, |runs| Verb::Extend { runs, lease_ms: 200 });
                    self.settling.remove(&run[0]);
                }
            }
            Event::Steal { who, other, pick } => {
                let (Some(thief), Some(owner)) = (self.peer(who), self.peer(other)) else {
                    return Ok(());
                };
                let (thief, owner) = (thief.id, owner.id);
                let Some((offset, attempt)) = self.pick(owner, pick) else { return Ok(()) };
                let runs = vec![(offset, offset + 1)];
                for (consumer, attempt) in [(thief, attempt), (owner, attempt + 1), (999, attempt)]
                {
                    let right = (consumer, attempt) == self.held[&offset];
                    if !right {
                        let who = Presented { consumer, attempt, earlier: false };
                        let verb = Verb::Accept { runs: runs.clone() };
                        let refused = if self.core.resetting() {
                            SettleRefused::Seeking
                        } else {
                            SettleRefused::NotHeld(offset)
                        };
                        prop_assert_eq!(self.core.settle(who, verb), Err(refused));
                    }
                }
            }
            Event::Time(more) => {
                self.now += more;
                self.core.on_time(self.now);
                self.core.on_rate_time(self.now);
                self.peers
                    .retain(|peer| peer.here || self.core.names().any(|(id, _)| id == peer.id));
            }
            Event::Records { most, fail } => self.records(most, fail),
            Event::Published => self.publish(),
            Event::ReadFails => self.read_fails = true,
            Event::Retry => {
                self.read_fails = false;
                self.core.on_retry();
            }
            Event::Crash => self.crash(),
            Event::Seek(to) => {
                self.core.reset(to.min(self.end));
            }
            Event::Rate(per_s) => {
                let messages = per_s.map(|per_s| PerSecond { per_s, parts: 2 });
                let rates = Rates { messages, bytes: None };
                self.rate.set(rates, self.now);
                self.core.on_rates(rates);
            }
        }
        self.drain()
    }

    fn attach(&mut self, name: String, claim: bool) {
        self.next_id += 1;
        let id = self.next_id;
        let earlier: Vec<u64> =
            self.peers.iter().filter(|peer| peer.name == name).map(|peer| peer.id).collect();
        let mut claims: BTreeMap<(u64, u32), Vec<(u64, u64)>> = BTreeMap::new();
        for (offset, (by, attempt)) in &self.held {
            if earlier.contains(by) {
                claims.entry((*by, *attempt)).or_default().push((*offset, offset + 1));
            }
        }
        let claims: Vec<Claimed> = claims
            .into_iter()
            .map(|((consumer, attempt), runs)| Claimed {
                presented: Presented { consumer, attempt, earlier: consumer >= 1_000_000 },
                runs,
            })
            .collect();
        let claims = if claim { claims } else { Vec::new() };
        let Ok(attached) = self.core.attach(id, &name, &claims) else { return };
        self.held.retain(|offset, (by, _)| !earlier.contains(by) || self.settling.contains(offset));
        for (attempt, runs) in attached.granted {
            for offset in runs.iter().flat_map(|run| run.0..run.1) {
                self.held.insert(offset, (id, attempt));
            }
        }
        // An exclusive subscription has one: whoever was gone is lost.
        let known: BTreeSet<u64> = self.core.names().map(|(id, _)| id).collect();
        self.peers.retain(|peer| known.contains(&peer.id));
        self.held.retain(|offset, (by, _)| known.contains(by) || self.settling.contains(offset));
        self.peers.push(Peer { id, name, here: true, outbox: true, granted: 0, used: 0 });
    }

    fn records(&mut self, most: usize, mut fail: bool) {
        for _ in 0..most {
            let Some((id, change)) = self.records.pop_front() else { return };
            let offsets: Vec<u64> = match &change {
                Change::Accept(runs) => runs.iter().flat_map(|run| run.0..run.1).collect(),
                Change::UpTo(end) => (0..*end).collect(),
                Change::Redeliver(items) => {
                    items.iter().flat_map(|item| item.start..item.end).collect()
                }
                Change::DeadLetter(letters) => letters.iter().map(|letter| letter.offset).collect(),
                Change::Keys(_) => Vec::new(),
                Change::Reset(_) => (0..self.end).collect(),
            };
            if std::mem::take(&mut fail) {
                // Whoever asked is told, and holds them as before.
                self.core.on_recorded(id, Err(RecordFailed));
                let core = &self.core;
                self.settling.retain(|offset| {
                    let state = core.states.get(*offset).map(|run| run.2);
                    !offsets.contains(offset) || matches!(state, Some(State::Settling { .. }))
                });
                self.forget_of_absent();
                continue;
            }
            if matches!(change, Change::Reset(_)) {
                self.held.clear();
                self.settling.clear();
                self.deliveries.clear();
                self.publishing = None;
                self.published.clear();
            }
            for offset in offsets {
                if self.settling.remove(&offset) || !matches!(change, Change::Redeliver(_)) {
                    self.held.remove(&offset);
                }
            }
            self.durable.apply(change);
            self.core.on_recorded(id, Ok(self.durable.mark()));
        }
    }

    /// Nobody holds what a consumer that left for good held.
    fn forget_of_absent(&mut self) {
        let known: BTreeSet<u64> = self.core.names().map(|(id, _)| id).collect();
        self.held.retain(|offset, (by, _)| known.contains(by) || self.settling.contains(offset));
    }

    fn publish(&mut self) {
        if let Some(letter) = self.publishing.take() {
            if !self.core.resetting() {
                self.published.insert(letter.number, letter.offset);
            }
            self.core.on_published(letter.number);
        }
    }

    /// The owner dies: records on their way are lost or not, and the next one knows what is durable.
    fn crash(&mut self) {
        let keep = self.records.len() / 2;
        for (_, change) in self.records.drain(..).take(keep).collect::<Vec<_>>() {
            self.durable.apply(change);
        }
        self.crashes += 1;
        (self.publishing, self.read_fails) = (None, false);
        self.published.clear(); // published again, and stored once by their numbers
        self.peers.clear();
        self.held.clear();
        self.settling.clear();
        let mut restored = Restored {
            mark_delete: self.durable.mark(),
            dead: self.durable.dead.values().cloned().collect(),
            dead_letters: self.durable.dead_letters,
            keys: self.durable.keys.clone(),
            ..Restored::default()
        };
        for offset in self.durable.settled.range(restored.mark_delete..) {
            restored.settled.insert(*offset, offset + 1);
        }
        for (offset, (attempt, due_ms)) in &self.durable.pending {
            restored.pending.push(Redelivery {
                start: *offset,
                end: offset + 1,
                attempt: *attempt,
                due_ms: *due_ms,
            });
        }
        for (offset, (consumer, attempt)) in &self.durable.leases {
            let name = String::new();
            restored.leases.push(Lease {
                consumer: *consumer,
                name,
                runs: vec![(*offset, offset + 1)],
                attempt: *attempt,
                left_ms: 1,
            });
        }
        self.core =
            Core::new(self.policy, limits(self.policy), OWNER, restored, (self.end, self.now));
        self.core.on_rate_time(self.now);
        self.rate = Throttle::default();
    }

    fn drain(&mut self) -> Result<(), TestCaseError> {
        let mut steps = 0;
        self.given = None;
        while let Some(action) = self.core.step() {
            steps += 1;
            prop_assert!(steps < 10_000, "it does not spin");
            match action {
                Action::Read { of, generation, from, bytes_max, messages_max } => {
                    prop_assert!(bytes_max > 0 && messages_max > 0 && from < self.end);
                    self.read(of, generation, from, bytes_max);
                }
                Action::Deliver(delivery) => self.deliver(&delivery)?,
                Action::Record { id, change: Change::DeadLetter(letters) }
                    if letters.is_empty() =>
                {
                    self.core.on_recorded(id, Ok(self.durable.mark()));
                }
                Action::Record { id, change } => {
                    if let Change::Redeliver(items) = &change {
                        // Attempts that ended without a settle: their holder knows, or is lost.
                        for offset in items.iter().flat_map(|item| item.start..item.end) {
                            if !self.settling.contains(&offset) {
                                self.held.remove(&offset);
                            }
                        }
                    }
                    self.records.push_back((id, change));
                }
                Action::Revoke { consumer, attempt, runs } => {
                    for offset in runs.iter().flat_map(|run| run.0..run.1) {
                        if let Some(held) = self.held.remove(&offset) {
                            prop_assert_eq!(held, (consumer, attempt));
                        }
                    }
                }
                Action::LogLeases(leases) => {
                    for lease in leases {
                        for offset in lease.runs.iter().flat_map(|run| run.0..run.1) {
                            if offset % 3 != 0 && !self.durable.settled.contains(&offset) {
                                self.durable.leases.insert(offset, (lease.consumer, lease.attempt));
                            }
                        }
                    }
                }
                Action::PublishDead(letter) => {
                    let first = self
                        .durable
                        .dead
                        .keys()
                        .find(|number| !self.published.contains_key(number));
                    prop_assert_eq!(first, Some(&letter.number), "in the order of the numbers");
                    self.publishing = Some(letter);
                }
                Action::Replaced { consumer } => self.peers.retain(|peer| peer.id != consumer),
                Action::Assign { .. } => {}
            }
        }
        self.check_progress()
    }

    fn read(&mut self, of: ReadOf, generation: u64, from: u64, bytes_max: u64) {
        if self.read_fails {
            self.core.on_read_failed(of, generation);
            return;
        }
        let (mut bytes, mut batches) = (0, Vec::new());
        for batch in self.log.iter().filter(|batch| batch.end() > from) {
            if !batches.is_empty() && bytes + batch.bytes > bytes_max {
                break;
            }
            bytes += batch.bytes;
            batches.push(batch.clone());
        }
        self.core.on_read(of, generation, batches);
    }

    fn deliver(&mut self, delivery: &Delivery<Stored>) -> Result<(), TestCaseError> {
        let id = delivery.consumer;
        let peer = self.peers.iter_mut().find(|peer| peer.id == id);
        prop_assert!(peer.is_some(), "to somebody who is there");
        let peer = peer.expect("checked");
        prop_assert!(peer.here && peer.outbox);
        let of_one = self.given.replace(delivery.batch.base) == Some(delivery.batch.base);
        let passes = self.rate.wait_ms(self.now) == Some(0);
        prop_assert!(passes || (of_one && self.policy.kind == Kind::KeyShared), "past the rate");
        self.rate.take(delivery.messages, delivery.batch.bytes, self.now);
        peer.used += delivery.messages;
        prop_assert!(peer.used <= peer.granted, "never beyond the messages granted");
        let offsets: Vec<u64> = delivery.runs.iter().flat_map(|run| run.0..run.1).collect();
        prop_assert_eq!(offsets.len() as u64, delivery.messages);
        prop_assert!(delivery.messages > 0);
        for offset in offsets {
            prop_assert!(delivery.batch.base <= offset && offset < delivery.batch.end());
            prop_assert!(!self.durable.settled.contains(&offset), "{offset} is settled");
            prop_assert!(!self.durable.dead.values().any(|letter| letter.offset == offset));
            if let Some((by, _)) = self.held.get(&offset)
                && !self.peers.iter().any(|peer| peer.id == *by && peer.here)
            {
                self.held.remove(&offset); // revoked, and nobody is there to be told
            }
            prop_assert_eq!(self.held.get(&offset), None, "{} is held", offset);
            let (attempt, due) = self.durable.pending.get(&offset).copied().unwrap_or((1, 0));
            prop_assert_eq!(
                delivery.attempt,
                attempt,
                "L3: the record before the delivery, and no skip: {}",
                offset
            );
            prop_assert!(due <= self.now, "never early");
            let max = self.policy.attempts_max;
            prop_assert!(max == 0 || attempt <= max);
            if self.policy.kind.is_shared()
                && attempt == 1
                && !self.durable.pending.contains_key(&offset)
            {
                let at = (offset - delivery.batch.base) as u32;
                prop_assert!(delivery.batch.deliver_at(at) <= self.now, "never early");
            }
            self.check_order(id, offset)?;
            self.held.insert(offset, (id, delivery.attempt));
        }
        let here = |by: u64| self.peers.iter().any(|peer| peer.id == by && peer.here);
        let held = self.held.values().filter(|(by, _)| here(*by)).count() as u64;
        prop_assert!(held <= LIMITS.unacked_messages_max);
        Ok(())
    }

    /// By key, nothing earlier of the key is anywhere but with the same consumer. In order, nothing earlier is anywhere but
    /// with somebody, or waits for its time or its record.
    fn check_order(&self, id: u64, offset: u64) -> Result<(), TestCaseError> {
        if self.policy.kind == Kind::KeyShared {
            let owner = super::super::hash_owner(&self.durable.keys, key_of(offset));
            let name = self.peers.iter().find(|peer| peer.id == id).map(|peer| peer.name.as_str());
            prop_assert_eq!(owner, name, "L5: the table is durable before it takes effect");
            for (later, (by, _)) in self.held.range(offset + 1..) {
                let here = self.peers.iter().any(|peer| peer.id == *by && peer.here);
                let of_key = key_of(*later) == key_of(offset) && !self.settling.contains(later);
                prop_assert!(!(here && of_key), "{later} is held after {offset} of its key");
            }
        }
        for earlier in 0..offset {
            let gone = self.durable.settled.contains(&earlier)
                || self.durable.dead.values().any(|letter| letter.offset == earlier);
            if gone || self.policy.kind != Kind::KeyShared || key_of(earlier) != key_of(offset) {
                continue;
            }
            let by = self.held.get(&earlier).map(|held| held.0);
            prop_assert_eq!(by, Some(id), "{} before {} of its key", offset, earlier);
        }
        Ok(())
    }

    fn check_progress(&self) -> Result<(), TestCaseError> {
        let explained = self.core.explain();
        let backlog =
            (0..self.end).filter(|offset| !self.durable.settled.contains(offset)).count() as u64;
        let sum: u64 = explained.held.iter().map(|held| held.messages).sum();
        prop_assert_eq!(self.core.backlog(), backlog);
        prop_assert_eq!(sum, backlog, "classes add up: {:?}", explained.held);
        if !self.records.is_empty() || self.core.record_failed {
            return Ok(());
        }
        for held in &explained.held {
            prop_assert!(held.by != HeldBy::Nothing, "stuck: {held:?}");
            if held.by == HeldBy::Read {
                prop_assert!(self.core.read_failed, "stuck in a read: {held:?}");
            }
            if held.by == HeldBy::RateLimit {
                let wait = self.rate.wait_ms(self.now);
                prop_assert!(wait != Some(0), "the rate lets it go: {held:?}");
                prop_assert_eq!(held.until_ms, wait.map_or(0, |wait| self.now + wait));
                prop_assert_eq!(self.core.next_rate_ms(), wait, "it wakes by time");
            }
            if held.by == HeldBy::Key {
                prop_assert_eq!(self.policy.kind, Kind::KeyShared);
            }
        }
        let room = |peer: &Peer| {
            let held = self.held.values().filter(|held| held.0 == peer.id).count() as u64;
            peer.here
                && peer.outbox
                && peer.used < peer.granted
                && held < LIMITS.unacked_per_consumer_max
        };
        let all_free = self.peers.iter().all(room) && !self.peers.is_empty();
        if all_free && self.policy.kind == Kind::Shared && !self.core.read_failed {
            let stuck =
                |by| matches!(by, HeldBy::NoCredit | HeldBy::NoConsumer | HeldBy::SlowConnection);
            prop_assert!(!explained.held.iter().any(|held| stuck(held.by)), "{:?}", explained.held);
        }
        Ok(())
    }

    /// With enough of everything, all that is stored is settled in the end.
    fn finish(&mut self) -> Result<(), TestCaseError> {
        self.read_fails = false;
        self.apply(Event::Rate(None))?;
        for round in 0..400u64 {
            self.core.on_retry();
            if self.peers.iter().all(|peer| !peer.here) {
                self.attach("c9".to_owned(), false);
            }
            for peer in &mut self.peers {
                (peer.outbox, peer.granted) = (true, peer.granted + 100);
            }
            for peer in self.peers.clone().iter().filter(|peer| peer.here) {
                self.core.on_outbox(peer.id, true);
                self.core.on_credit(peer.id, peer.granted, u64::MAX);
            }
            self.drain()?;
            let ids: Vec<u64> =
                self.peers.iter().filter(|peer| peer.here).map(|peer| peer.id).collect();
            for id in ids {
                while !self.core.resetting()
                    && let Some((run, presented)) = self.pick_run(id, 0, 50)
                {
                    self.settle(presented, &run, |runs| Verb::Accept { runs });
                }
            }
            self.drain()?;
            self.records(1_000, false);
            self.publish();
            self.apply(Event::Time(20 + round))?;
            self.forget_of_absent();
            let end = self.end;
            if (0..end).all(|offset| self.durable.settled.contains(&offset)) {
                return Ok(());
            }
        }
        prop_assert!(false, "never settled: {:?}", self.core.explain());
        Ok(())
    }
}

fn policy() -> impl Strategy<Value = Policy> {
    let kind = prop_oneof![
        Just(Kind::Exclusive),
        Just(Kind::Failover),
        Just(Kind::Shared),
        Just(Kind::KeyShared),
    ];
    (kind, 0u32..4, 0u64..30).prop_map(|(kind, attempts_max, backoff_ms)| Policy {
        kind,
        attempts_max,
        backoff_ms,
        backoff_ms_max: 100,
        lease_ms: 60,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_024))]

    #[test]
    fn every_message_is_settled_as_its_verbs_say_and_nothing_gets_stuck(
        policy in policy(), events in prop::collection::vec(event(), 1..120)
    ) {
        let mut model = Model::new(policy);
        for event in events {
            model.apply(event)?;
        }
        model.finish()?;
    }
}

/// A core with one shared consumer that takes everything, and so many single messages.
fn with_one(messages: u64) -> (Core<Stored>, Policy) {
    let policy = Policy {
        kind: Kind::Shared,
        attempts_max: 0,
        backoff_ms: 0,
        backoff_ms_max: 0,
        lease_ms: 60,
    };
    let mut core = Core::new(policy, LIMITS, OWNER, Restored::default(), (messages, 1));
    core.attach(1, "one", &[]).expect("free");
    core.on_credit(1, 1_000, 1_000_000);
    (core, policy)
}

/// Carries out reads and records at once; what is delivered.
fn deliveries(core: &mut Core<Stored>) -> Vec<(u64, u32)> {
    let mut given = Vec::new();
    while let Some(action) = core.step() {
        match action {
            Action::Read { of, generation, from, .. } => {
                let one = Stored { base: from, count: 1, bytes: 1, delays: Vec::new() };
                core.on_read(of, generation, vec![one]);
            }
            Action::Deliver(delivery) => {
                given.extend(
                    delivery
                        .runs
                        .iter()
                        .flat_map(|run| run.0..run.1)
                        .map(|at| (at, delivery.attempt)),
                );
            }
            Action::Record { id, change: Change::Accept(runs) } => {
                let mark = core.mark_delete();
                let mark =
                    if runs[0].0 == mark { core.settled.next_outside(runs[0].1) } else { mark };
                core.on_recorded(id, Ok(mark));
            }
            Action::Record { id, .. } => core.on_recorded(id, Ok(core.mark_delete())),
            _ => {}
        }
    }
    given
}

fn accept(core: &mut Core<Stored>, offset: u64) {
    let who = Presented { consumer: 1, attempt: 1, earlier: false };
    core.settle(who, Verb::Accept { runs: vec![(offset, offset + 1)] }).expect("held");
}

#[test]
fn at_its_most_holes_nothing_fresh_is_given_until_the_oldest_are_settled() {
    let (mut core, _) = with_one(100);
    assert_eq!(deliveries(&mut core).len(), 25, "as much as one may hold");
    for offset in [1, 3, 5] {
        accept(&mut core, offset);
    }
    core.on_holes_max(3);
    assert_eq!(deliveries(&mut core), []);
    assert_eq!(core.why_not(), HeldBy::HolesLimit);
    accept(&mut core, 0);
    assert_eq!(deliveries(&mut core).len(), 4, "one hole less");
}

#[test]
fn a_rate_lets_a_second_go_and_then_what_time_brings() {
    let (mut core, _) = with_one(25);
    let messages = Some(PerSecond { per_s: 10, parts: 1 });
    core.on_rates(Rates { messages, bytes: None });
    assert_eq!(deliveries(&mut core).len(), 10);
    assert_eq!((core.why_not(), core.next_rate_ms()), (HeldBy::RateLimit, Some(1)));
    let held = core.explain().held;
    let rate = held.iter().find(|held| held.by == HeldBy::RateLimit).expect("explained");
    assert_eq!((rate.messages, rate.first, rate.until_ms), (15, 10, 2));
    core.on_rate_time(500);
    assert_eq!(deliveries(&mut core).len(), 5);
    assert!(!core.is_idle());
    assert_eq!(core.take_tally().throttled_ms, 500);
    core.on_rates(Rates { messages: Some(PerSecond { per_s: 0, parts: 1 }), bytes: None });
    core.on_rate_time(60_000);
    assert_eq!((deliveries(&mut core).len(), core.next_rate_ms()), (0, None), "nothing goes");
    core.on_rates(Rates::default());
    assert_eq!(deliveries(&mut core).len(), 10, "and then the rest");
    core.on_end(26);
    assert!(core.take_tally().throttled_bytes >= 1);
}

#[test]
fn a_large_batch_passes_its_rate_and_the_next_one_waits_until_it_is_paid_back() {
    let (mut core, _) = with_one(40);
    let bytes = Some(PerSecond { per_s: 100, parts: 1 });
    core.on_rates(Rates { messages: None, bytes });
    let mut given = Vec::new();
    while let Some(action) = core.step() {
        match action {
            Action::Read { of, generation, from, .. } => {
                let of_20 = |base| Stored { base, count: 20, bytes: 500, delays: Vec::new() };
                core.on_read(of, generation, vec![of_20(from / 20 * 20)]);
            }
            Action::Deliver(delivery) => given.push(delivery.messages),
            _ => {}
        }
    }
    assert_eq!((given, core.next_rate_ms()), (vec![20], Some(4_001)));
}

#[test]
fn what_is_read_ahead_and_waits_for_its_time_is_explained_by_it() {
    let (mut core, _) = with_one(4);
    core.on_credit(1, 1_000, 1_000_000);
    core.on_rates(Rates { messages: Some(PerSecond { per_s: 1, parts: 1 }), bytes: None });
    let Some(Action::Read { of, generation, .. }) = core.step() else { panic!("reads") };
    let delays = vec![0, 0, 700, 0];
    core.on_read(of, generation, vec![Stored { base: 0, count: 4, bytes: 1, delays }]);
    core.set_credit(1, 1, 100);
    while core.step().is_some() {}
    let held: Vec<_> =
        core.explain().held.iter().map(|held| (held.by, held.messages, held.until_ms)).collect();
    assert!(held.contains(&(HeldBy::Delay, 1, 700)), "{held:?}");
    assert!(held.contains(&(HeldBy::NoCredit, 2, 0)), "{held:?}");
}

#[test]
fn what_is_kept_after_a_crash_is_explained_by_the_name_of_its_consumer() {
    let policy = with_one(0).1;
    let lease = Lease {
        consumer: 5,
        name: "before".to_owned(),
        runs: vec![(0, 2)],
        attempt: 1,
        left_ms: 9,
    };
    let restored = Restored { leases: vec![lease], ..Restored::default() };
    let mut core = Core::<Stored>::new(policy, LIMITS, OWNER, restored, (2, 1));
    let held = core.explain().held;
    assert_eq!((held[0].by, held[0].consumer.as_str()), (HeldBy::Grace, "before"));
    core.on_time(1_000);
    assert_eq!(core.explain().held[0].by, HeldBy::NoConsumer, "nobody came back");
}

#[test]
fn a_lowered_number_of_consumers_lets_those_who_are_there_stay() {
    let (mut core, _) = with_one(0);
    core.on_consumers_max(1);
    assert_eq!(core.attach(2, "two", &[]), Err(AttachRefused::TooMany(1)));
    core.attach(3, "one", &[]).expect("the same one again");
    core.on_consumers_max(0);
    assert_eq!(core.names().count(), 1);
}

#[test]
fn a_policy_that_settles_by_itself_takes_messages_from_whoever_has_them() {
    let (mut core, _) = with_one(30);
    assert_eq!(deliveries(&mut core).len(), 25);
    core.on_cursor(10);
    let Some(Action::Revoke { consumer: 1, attempt: 1, runs }) = core.step() else {
        panic!("told")
    };
    assert_eq!(runs, [(0, 10)]);
    assert_eq!(core.backlog(), 20);
    assert_eq!(deliveries(&mut core).len(), 5, "there is room for the rest");
    let who = Presented { consumer: 1, attempt: 1, earlier: false };
    let late = core.settle(who, Verb::Accept { runs: vec![(9, 10)] });
    assert_eq!(late, Err(SettleRefused::NotHeld(9)));
}

#[test]
fn a_call_keeps_its_leases_and_gives_its_place_back() {
    let (mut core, policy) = with_one(0);
    core.detach(1, true);
    let id = core.attach_pull(7, "call", (200, 0, false)).expect("free");
    core.set_credit(id, 1, 100);
    core.on_end(2);
    assert_eq!(deliveries(&mut core), [(0, 1)], "no more than it asked for");
    core.on_time(100);
    assert_eq!(core.names().count(), 1, "it holds something");
    core.on_time(500);
    assert_eq!(deliveries(&mut core), []);
    core.on_time(501);
    assert_eq!(core.names().count(), 0, "its lease ran out, and nobody waits");
    assert_eq!(core.take_tally().leases_expired, 1);
    assert_eq!(policy.kind, Kind::Shared);
}

/// A hundred thousand messages for later, of which memory may tell a thousand apart, and one for now behind them.
#[test]
fn what_memory_cannot_tell_apart_waits_in_runs_and_keeps_nothing_from_its_turn() {
    let policy = Policy {
        kind: Kind::Shared,
        attempts_max: 0,
        backoff_ms: 0,
        backoff_ms_max: 0,
        lease_ms: 1_000_000_000,
    };
    let many = 100_000_u64;
    let tight = CoreLimits {
        parked_messages_max: 1_000,
        run_pause_ms: 1_000,
        unacked_messages_max: 1 << 40,
        unacked_per_consumer_max: 1 << 40,
        read_ahead_bytes_max: 1_000_000,
        ..LIMITS
    };
    let due_of = |offset: u64| {
        if offset == many { 0 } else { 10_000 + offset.wrapping_mul(0x9e37_79b9) % 50_000 }
    };
    let batch_of = |base: u64| Stored {
        base,
        count: 1_000.min(many + 1 - base) as u32,
        bytes: 1_000,
        delays: (base..(base + 1_000).min(many + 1)).map(due_of).collect(),
    };
    let mut core = Core::new(policy, tight, OWNER, Restored::default(), (many + 1, 1));
    core.attach(1, "c", &[]).expect("room for one");
    core.on_credit(1, u64::MAX, u64::MAX);
    let mut come = vec![false; many as usize + 1];
    let mut now = 1_u64;
    while now < 62_000 {
        while let Some(action) = core.step() {
            match action {
                Action::Read { of, generation, from, .. } => {
                    let batches = (0..4).map(|n| from / 1_000 * 1_000 + n * 1_000);
                    let batches = batches.filter(|base| *base <= many).map(batch_of).collect();
                    core.on_read(of, generation, batches);
                }
                Action::Deliver(delivery) => {
                    for offset in delivery.runs.iter().flat_map(|run| run.0..run.1) {
                        assert!(!std::mem::replace(&mut come[offset as usize], true), "once");
                        let late = now.saturating_sub(due_of(offset).max(1));
                        assert!(due_of(offset) <= now && late <= 2_000, "late by {late} ms");
                    }
                }
                _ => {}
            }
        }
        assert!(come[many as usize], "the one for now did not wait for the others");
        // A message that had its turn cuts the run it was in; it is held, or a hole, and there is a limit to both.
        let gaps = come.iter().filter(|come| **come).count();
        assert!(core.timers.len() <= 1_100 + gaps, "{} timers at {now}", core.timers.len());
        now += 500;
        core.on_time(now);
    }
    assert!(come.iter().all(|came| *came), "none skipped");
}
