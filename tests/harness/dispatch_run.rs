//! The layer "subscriptions": the broker's dispatcher core over a segment that owners take from each other, with consumers
//! that come, go, crash, settle, release, reject, extend, and present what they hold to the next owner (L1 to L5).
//!
//! Each owner runs one loop, as the broker's dispatcher task does: events into the core, actions out of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use geminga_broker::{
    dispatcher::{
        Action, Batch, Change, Core, CoreLimits, DeadLetter, Decision, HeldBy, Kind, Owner, Policy,
        Presented, ReadOf, RecordFailed, SettleRefused, Verb,
    },
    subscription::durable::{lease_record, restored, settlement},
};
use geminga_managed_ledger::{Settlement, Start, Status, StoredBatch};
use geminga_proto::ids::{Offset, SubscriptionId};
use geminga_runtime::{clock::Clock, random::Random};
use tokio::time::{Instant, sleep, timeout};

use super::{
    agents::{Agents, Holding},
    coverage::Seen,
    history::Event,
    plan::DispatchPlan,
    segment_run::{CALLER_PATIENCE, Segment, Serving},
    world::{ClientNode, World},
};

/// The subscription.
const ID: SubscriptionId = SubscriptionId(0);
/// Pause after a read or a record failed.
const RETRY: Duration = Duration::from_millis(250);
/// The longest until everything is accepted or dead once all is healed (I12, I20), virtual time.
const HEALED_PATIENCE: Duration = Duration::from_secs(300);

/// The subscription, as its owners and consumers find it.
#[derive(Debug)]
pub(crate) struct Subscription {
    plan: DispatchPlan,
    agents: Mutex<Agents>,
}

impl Subscription {
    pub(crate) fn new(world: &World, plan: DispatchPlan) -> Arc<Self> {
        world.history.record(Event::Promised {
            key_order: plan.kind == Kind::KeyShared,
            attempts_max: plan.attempts_max,
            deliver_at: plan.kind.is_shared(),
        });
        let agents = Mutex::new(Agents::new(plan.agents));
        Arc::new(Self { plan, agents })
    }
}

/// A stored batch.
#[derive(Clone, Debug)]
struct Queued(Arc<StoredBatch>);

impl Queued {
    fn of_index<T: Copy + Default>(&self, pick: impl Fn(&Self) -> Option<T>) -> T {
        pick(self).unwrap_or_default()
    }
}

impl Batch for Queued {
    fn base(&self) -> u64 {
        self.0.base_offset.0
    }

    fn count(&self) -> u32 {
        self.0.header.count
    }

    fn bytes(&self) -> u64 {
        self.0.payload.len() as u64
    }

    fn key_hash(&self, at: u32) -> u32 {
        self.of_index(|of| of.0.header.index.as_ref()?.key_hash.get(at as usize).copied())
    }

    fn deliver_at(&self, at: u32) -> u64 {
        self.of_index(|of| of.0.header.index.as_ref()?.deliver_at_ms.get(at as usize).copied())
    }

    fn has_delays(&self) -> bool {
        (0..self.count()).any(|at| self.deliver_at(at) > 0)
    }
}

/// Something that the loop waited for.
enum Done {
    Record { id: u64, result: Result<u64, RecordFailed> },
    Read { of: ReadOf, generation: u64, batches: Option<Vec<Queued>> },
    Copied(DeadLetter),
}

/// Why a loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// Everything is accepted or dead.
    AllDone,
    /// The time is over.
    TimeOver,
    /// The ledger does not serve any more.
    Lost,
}

/// One owner's loop.
struct Dispatch<'a> {
    segment: &'a Segment,
    subscription: &'a Subscription,
    serving: &'a Serving,
    random: Random,
    core: Core<Queued>,
    work: FuturesUnordered<BoxFuture<'static, Done>>,
    /// What is to become durable, by record.
    changes: BTreeMap<u64, Change>,
    /// Streams whose consumers are gone, as far as the core knows.
    left: BTreeSet<u64>,
    retry_at: Option<Instant>,
    now_ms: u64,
}

/// An owner: takes the segment, dispatches for a while, loses it, gives it back or dies.
pub(crate) async fn own(
    segment: Arc<Segment>,
    subscription: Arc<Subscription>,
    node: ClientNode,
    random: Random,
    until: Instant,
) {
    let history = segment.world.history.clone();
    let ledgers = segment.factory(&node);
    while Instant::now() < until {
        sleep(Duration::from_millis(random.below(segment.plan.takeover_ms + 1))).await;
        let serving = match segment.load(&node, &ledgers).await {
            Ok(serving) => serving,
            Err(error) => {
                history.note(format!("client {} does not load: {error}", node.number));
                continue;
            }
        };
        let made = timeout(CALLER_PATIENCE, serving.ledger.create_cursor(ID, Start::Earliest));
        if !matches!(made.await, Ok(Ok(()))) {
            continue;
        }
        let kept = Duration::from_millis(random.below(4 * segment.plan.takeover_ms + 1));
        let Some(mut dispatch) = Dispatch::new(&segment, &subscription, &serving, random.fork())
        else {
            continue;
        };
        let ended = dispatch.run(until.min(Instant::now() + kept), false).await;
        history.note(format!("owner {}: {ended:?}", serving.owner));
        if ended == Ended::Lost {
            continue;
        }
        match random.below(4) {
            0 => {
                dispatch.hand_over().await;
                let closed = timeout(CALLER_PATIENCE, serving.ledger.close()).await.is_ok();
                history.saw_if(closed, Seen::LeasesHandedOver);
            }
            1 => {
                history.saw(Seen::ClientKilled);
                history.note(format!("client {} is killed", node.number));
                node.tasks.abort();
                return;
            }
            _ => {} // others take it
        }
    }
}

/// When all is healed: one more owner takes it, and every message is accepted or dead within bounds.
pub(crate) async fn inspect(
    segment: &Arc<Segment>,
    subscription: &Arc<Subscription>,
    node: &ClientNode,
) {
    let history = &segment.world.history;
    let ledgers = segment.factory(node);
    // The clock had jumped to and fro; what waits for a time would wait for as long as it went back.
    segment.world.clock.set(segment.world.clock.now().plus(Duration::from_secs(24 * 3_600)));
    let deadline = Instant::now() + HEALED_PATIENCE;
    while history.violation().is_none() {
        if Instant::now() > deadline {
            return history.fail("I20", "messages are left though all is healed");
        }
        if let Ok(serving) = segment.load(node, &ledgers).await
            && serving.ledger.create_cursor(ID, Start::Earliest).await.is_ok()
            && let Some(mut dispatch) =
                Dispatch::new(segment, subscription, &serving, segment.world.random.fork())
        {
            let ended = dispatch.run(deadline, true).await;
            if ended == Ended::AllDone {
                let end = serving.ledger.end().borrow().0;
                history.record(Event::AllDispatched { end });
                serving.ledger.close().await;
                return;
            }
            history.note(format!("{ended:?}, and left are {:?}", dispatch.core.explain()));
        }
        sleep(Duration::from_millis(500)).await;
    }
}

impl<'a> Dispatch<'a> {
    fn new(
        segment: &'a Segment,
        subscription: &'a Subscription,
        serving: &'a Serving,
        random: Random,
    ) -> Option<Self> {
        let restored = restored(&serving.ledger, ID)?;
        let plan = &subscription.plan;
        let policy = Policy {
            kind: plan.kind,
            attempts_max: plan.attempts_max,
            backoff_ms: plan.backoff_ms,
            backoff_ms_max: 8 * plan.backoff_ms,
            lease_ms: plan.lease_ms,
        };
        let limits = CoreLimits {
            unacked_messages_max: plan.unacked_max,
            unacked_per_consumer_max: plan.unacked_max,
            consumers_max: 16,
            read_ahead_bytes_max: 4_000,
            // Few enough for a shared one to reach what is past them.
            parked_messages_max: if policy.kind == Kind::Shared { 20 } else { 200 },
            run_pause_ms: 50,
            dead_letters_max: 100,
            grace_ms: 5_000,
        };
        let owner = Owner { epoch: serving.ledger.epoch().0, segment: 0, segments: 1 };
        let now_ms = segment.world.clock.now().0;
        let end = serving.ledger.end().borrow().0;
        segment.world.history.saw_if(!restored.pending.is_empty(), Seen::FailuresRestored);
        segment.world.history.saw_if(!restored.leases.is_empty(), Seen::LeasesRestored);
        let core = Core::new(policy, limits, owner, restored, (end, now_ms));
        Some(Self {
            segment,
            subscription,
            serving,
            random,
            core,
            work: FuturesUnordered::new(),
            changes: BTreeMap::new(),
            left: BTreeSet::new(),
            retry_at: None,
            now_ms,
        })
    }

    /// Until the time is over, or, when `healthy`, until nothing is left: consumers then only come and accept.
    async fn run(&mut self, until: Instant, healthy: bool) -> Ended {
        let mut end = self.serving.ledger.end();
        let mut status = self.serving.ledger.status();
        loop {
            self.now_ms = self.now_ms.max(self.segment.world.clock.now().0);
            self.core.on_end(end.borrow_and_update().0);
            self.core.on_time(self.now_ms);
            if self.retry_at.is_some_and(|at| at <= Instant::now()) {
                self.retry_at = None;
                self.core.on_retry();
            }
            self.lose_those_who_left();
            while let Some(action) = self.core.step() {
                self.carry_out(action);
            }
            self.is_not_stuck();
            if self.segment.world.history.violation().is_some() || Instant::now() >= until {
                return Ended::TimeOver;
            }
            if healthy && self.work.is_empty() && self.core.mark_delete() >= end.borrow().0 {
                return Ended::AllDone;
            }
            let pause = self.pause(healthy);
            tokio::select! {
                biased;
                ended = status.wait_for(|status| *status != Status::Serving) => {
                    drop(ended);
                    return Ended::Lost;
                }
                Some(done) = self.work.next() => self.done(done),
                () = sleep(pause) => self.play(healthy),
            }
        }
    }

    /// To the next step of a consumer, or to what time brings, whichever is first.
    fn pause(&self, healthy: bool) -> Duration {
        let gap = if healthy { 5 } else { 1 + self.random.below(self.subscription.plan.gap_ms) };
        let due = self.core.next_time().map_or(gap, |at| at.saturating_sub(self.now_ms).max(1));
        Duration::from_millis(gap.min(due))
    }

    /// The progress rule: when nothing is on its way, no message is held up by nothing; and every message is in one class.
    fn is_not_stuck(&self) {
        let explained = self.core.explain();
        let history = &self.segment.world.history;
        let sum: u64 = explained.held.iter().map(|held| held.messages).sum();
        if sum != self.core.backlog() {
            let backlog = self.core.backlog();
            history.fail("explain", format!("{sum} of {backlog} are explained: {explained:?}"));
        }
        if !self.work.is_empty() || self.retry_at.is_some() {
            return;
        }
        history.saw(Seen::DispatchQuiet);
        if let Some(held) = explained.held.iter().find(|held| held.by == HeldBy::Nothing) {
            history.fail("progress", format!("held up by nothing: {held:?} of {explained:?}"));
        }
    }

    fn owner(&self) -> u32 {
        self.serving.owner
    }

    fn epoch(&self) -> u64 {
        self.serving.ledger.epoch().0
    }

    fn carry_out(&mut self, action: Action<Queued>) {
        match action {
            Action::Deliver(delivery) => {
                let offsets = delivery.runs.iter().flat_map(|run| run.0..run.1);
                let of_batch = |offset: u64| (offset - delivery.batch.base()) as u32;
                let messages: Vec<(u64, u32, u64)> = offsets
                    .map(|offset| {
                        let at = of_batch(offset);
                        (offset, delivery.batch.key_hash(at), delivery.batch.deliver_at(at))
                    })
                    .collect();
                self.segment.world.history.record(Event::Dispatched {
                    owner: self.owner(),
                    consumer: delivery.consumer,
                    attempt: delivery.attempt,
                    now_ms: self.now_ms,
                    messages: messages.clone(),
                });
                let (owner, epoch) = (self.owner(), self.epoch());
                let mut agents = self.subscription.agents.lock().expect("no panic in here");
                if let Some(agent) = agents.with(owner, delivery.consumer) {
                    agent.held.extend(messages.iter().map(|(offset, key, _)| Holding {
                        offset: *offset,
                        attempt: delivery.attempt,
                        key: *key,
                        instance: delivery.consumer,
                        epoch,
                        settling: None,
                    }));
                }
            }
            Action::Read { of, generation, from, bytes_max, messages_max } => {
                let ledger = self.serving.ledger.clone();
                let (bytes, messages) = (bytes_max.min(2_000), messages_max.min(50));
                self.work.push(Box::pin(async move {
                    let read = ledger.read(Offset(from), bytes as usize, messages as usize).await;
                    let batches = read.ok().filter(|batches| !batches.is_empty());
                    let queued = |batch| Queued(Arc::new(batch));
                    let batches = batches.map(|all| all.into_iter().map(queued).collect());
                    Done::Read { of, generation, batches }
                }));
            }
            Action::Record { id, change } => {
                let settled = match &change {
                    Change::DeadLetter(letters) if letters.is_empty() => None,
                    _ => Some(self.serving.ledger.settle(ID, settlement(change.clone()))),
                };
                self.changes.insert(id, change);
                let here = self.core.mark_delete();
                self.work.push(Box::pin(async move {
                    let result = match settled {
                        Some(settled) => settled.await.map(|at| at.0).map_err(|_| RecordFailed),
                        None => Ok(here),
                    };
                    Done::Record { id, result }
                }));
            }
            Action::Revoke { consumer, attempt, runs } => {
                self.segment.world.history.saw(Seen::Revoked);
                self.given_back(runs.iter().flat_map(|run| run.0..run.1).collect());
                let owner = self.owner();
                let mut agents = self.subscription.agents.lock().expect("no panic in here");
                if let Some(agent) = agents.with(owner, consumer) {
                    agent.held.retain(|held| {
                        held.attempt != attempt
                            || !runs.iter().any(|run| (run.0..run.1).contains(&held.offset))
                    });
                }
            }
            Action::Assign { .. } | Action::Replaced { .. } => {}
            Action::LogLeases(leases) => {
                let records = leases.into_iter().map(lease_record).collect();
                self.serving.ledger.log_leases(ID, records);
            }
            Action::PublishDead(letter) => {
                let pause = Duration::from_millis(self.random.below(300));
                self.work.push(Box::pin(async move {
                    sleep(pause).await;
                    Done::Copied(letter)
                }));
            }
        }
    }

    /// These may be delivered again with their attempt unchanged.
    fn given_back(&self, offsets: Vec<u64>) {
        if !offsets.is_empty() {
            self.segment.world.history.record(Event::GivenBack { offsets });
        }
    }

    fn done(&mut self, done: Done) {
        let history = self.segment.world.history.clone();
        match done {
            Done::Record { id, result } => {
                let change = self.changes.remove(&id).expect("it was asked for");
                if result.is_ok() {
                    self.told(&change);
                } else {
                    self.retry_at = Some(Instant::now() + RETRY);
                    history.saw(Seen::RecordFailed);
                }
                self.settle_ended(id, result.is_ok());
                self.core.on_recorded(id, result);
            }
            Done::Read { of, generation, batches: Some(batches) } => {
                self.core.on_read(of, generation, batches);
            }
            Done::Read { of, generation, batches: None } => {
                self.retry_at = Some(Instant::now() + RETRY);
                self.core.on_read_failed(of, generation);
            }
            Done::Copied(letter) => {
                let number = letter.number;
                history.record(Event::DeadCopied {
                    owner: self.owner(),
                    number,
                    offset: letter.offset,
                    attempt: letter.attempt,
                    rejected: letter.reason == REJECTED,
                });
                self.core.on_published(number);
            }
        }
    }

    /// A record is durable: what it says holds for every later owner (I14).
    fn told(&self, change: &Change) {
        let owner = self.owner();
        let event = match change {
            Change::Accept(runs) => {
                let offsets = runs.iter().flat_map(|run| run.0..run.1).collect();
                Event::AcceptTold { owner, offsets }
            }
            Change::Redeliver(items) => {
                let items =
                    items.iter().map(|item| (item.start, item.end, item.attempt, item.due_ms));
                Event::FailureTold { owner, items: items.collect() }
            }
            _ => return,
        };
        self.segment.world.history.record(event);
    }

    /// A consumer has the answer to its settle: it is rid of the messages, or holds them as before.
    fn settle_ended(&self, id: u64, settled: bool) {
        let id = (self.owner(), id);
        let mut agents = self.subscription.agents.lock().expect("no panic in here");
        let mut back = Vec::new();
        for agent in &mut agents.all {
            if settled {
                agent.held.retain(|held| held.settling != Some(id));
            }
            for held in agent.held.iter_mut().filter(|held| held.settling == Some(id)) {
                held.settling = None;
                back.push(held.offset);
            }
        }
        drop(agents);
        self.given_back(back);
    }

    /// Streams that their consumers left behind, for another owner or for nothing.
    fn lose_those_who_left(&mut self) {
        let here: Vec<u64> = self.core.names().map(|(instance, _)| instance).collect();
        let agents = self.subscription.agents.lock().expect("no panic in here");
        let gone: Vec<u64> =
            here.into_iter().filter(|at| !agents.is_there(self.serving.owner, *at)).collect();
        drop(agents);
        for instance in gone {
            if self.left.insert(instance) {
                self.core.detach(instance, false);
            }
        }
    }

    /// One step of one consumer.
    fn play(&mut self, healthy: bool) {
        let number = {
            let agents = self.subscription.agents.lock().expect("no panic in here");
            self.random.below(agents.all.len() as u64) as usize
        };
        let place = self.subscription.agents.lock().expect("no panic in here").all[number].place;
        match place {
            Some((owner, instance)) if owner == self.owner() => {
                self.step_of(number, instance, healthy);
            }
            // Its stream goes to another owner: it finds out at some time that nobody is there.
            Some(_) if !healthy && self.random.chance(0.7) => {}
            _ => self.attach(number),
        }
    }

    fn attach(&mut self, number: usize) {
        let (owner, epoch) = (self.owner(), self.epoch());
        let mut agents = self.subscription.agents.lock().expect("no panic in here");
        let instance = agents.instance();
        let agent = &mut agents.all[number];
        let claims =
            if self.random.chance(0.7) { agent.claims(epoch, &self.random) } else { Vec::new() };
        let name = agent.name.clone();
        let Ok(attached) = self.core.attach(instance, &name, &claims) else { return };
        let mut before = std::mem::take(&mut agent.held);
        agent.place = Some((owner, instance));
        for (attempt, runs) in attached.granted {
            for offset in runs.iter().flat_map(|run| run.0..run.1) {
                let Some(at) = before.iter().position(|held| held.offset == offset) else {
                    self.segment.world.history.fail("L4", format!("{offset} was not claimed"));
                    continue;
                };
                let held = before.swap_remove(at);
                if held.attempt != attempt {
                    let what = format!("{offset} is granted under attempt {attempt}: {held:?}");
                    self.segment.world.history.fail("L4", what);
                }
                agent.held.push(Holding { instance, epoch, settling: None, ..held });
                self.segment.world.history.saw(Seen::ClaimGranted);
            }
        }
        agent.held.sort_unstable_by_key(|held| held.offset);
        agent.credit = 1 + self.random.below(30);
        self.core.on_credit(instance, agent.credit, 1 << 40);
        drop(agents);
        self.given_back(before.into_iter().map(|held| held.offset).collect());
    }

    fn step_of(&mut self, number: usize, instance: u64, healthy: bool) {
        let mut agents = self.subscription.agents.lock().expect("no panic in here");
        let agent = &mut agents.all[number];
        agent.credit += 1 + self.random.below(3);
        self.core.on_credit(instance, agent.credit, 1 << 40);
        let draw = self.random.below(100);
        if !healthy && draw < 4 {
            agent.place = None;
            let clean = draw < 2;
            let given_back = if clean {
                std::mem::take(&mut agent.held).into_iter().map(|held| held.offset).collect()
            } else {
                Vec::new() // it may come back for them
            };
            self.core.detach(instance, clean);
            self.left.insert(instance);
            drop(agents);
            return self.given_back(given_back);
        }
        let Some(held) = agent.choose(&self.random) else { return };
        drop(agents);
        self.settle(number, held, if healthy { 99 } else { draw });
    }

    fn settle(&mut self, number: usize, held: Holding, draw: u64) {
        let runs = vec![(held.offset, held.offset + 1)];
        let who = Presented { consumer: held.instance, attempt: held.attempt, earlier: false };
        let delay_ms = self.random.chance(0.5).then(|| self.random.below(10_000));
        let verb = match draw {
            0..15 => Verb::Release { runs, delay_ms, counts: true },
            15..22 => Verb::Release { runs, delay_ms, counts: false },
            22..25 => Verb::Reject { runs, reason: REJECTED.to_owned() },
            25..30 => Verb::Extend { runs, lease_ms: 1 + self.random.below(20_000) },
            30..40 => return, // it is in no hurry: its lease may run out
            _ => Verb::Accept { runs },
        };
        let history = self.segment.world.history.clone();
        if matches!(verb, Verb::Accept { .. }) {
            history.record(Event::AcceptAsked { offset: held.offset, key: held.key });
        }
        let owner = self.owner();
        let keeps = matches!(verb, Verb::Extend { .. });
        let gives_back = matches!(verb, Verb::Release { counts: false, .. });
        match self.core.settle(who, verb.clone()) {
            Ok(decision) => {
                let mut agents = self.subscription.agents.lock().expect("no panic in here");
                let of_agent = &mut agents.all[number].held;
                let Some(at) = of_agent.iter().position(|of| of.offset == held.offset) else {
                    return;
                };
                match decision {
                    Decision::Recorded(id) => of_agent[at].settling = Some((owner, id)),
                    Decision::Now if keeps => {}
                    Decision::Now => drop(of_agent.remove(at)),
                }
                drop(agents);
                if gives_back {
                    self.given_back(vec![held.offset]);
                }
            }
            Err(SettleRefused::TooManyDead) => history.saw(Seen::RejectWaits),
            // What it holds it may settle: it was told of everything that it lost.
            Err(refused) => history.fail("settle", format!("{verb:?} of {held:?}: {refused}")),
        }
    }

    /// A clean end: the exact lease table (L4).
    async fn hand_over(&mut self) {
        let leases = self.core.stop().into_iter().map(lease_record).collect();
        let written = self.serving.ledger.settle(ID, Settlement::Leases(leases));
        let _as_far_as_possible = timeout(CALLER_PATIENCE, written).await;
    }
}

/// The reason of rejects.
const REJECTED: &str = "rejected by the simulation";
