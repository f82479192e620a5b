//! The task of one subscription on one segment: it owns the core and the consumers, carries out what the core says, and
//! tells it what came of it.
//!
//! - `members`: the streams and calls of consumers; `frames`: what they say; `lives`: their heartbeats and their end; `pulls`:
//!   those that wait for messages;
//! - `carry_out`: the core's actions; `reads`: batches into memory, within the broker's budget.

mod carry_out;
mod frames;
mod lives;
mod members;
mod pulls;
mod reads;

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use futures::{
    StreamExt,
    future::BoxFuture,
    stream::{FuturesOrdered, FuturesUnordered, SelectAll},
};
use geminga_managed_ledger::SettleError;
use geminga_proto::{
    ids::{Offset, SubscriptionId},
    names::SubscriptionName,
    reason::Reason,
    v1::{GoAway, SubscriptionSettings},
};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    time::{Instant, Sleep, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    dead_letters::DeadLetters,
    dispatchers::{Command, Seen, SettingsRead, deleted},
    durable,
    gate::{Framed, Gated},
    handle::Signer,
    wanted,
};
use crate::{
    catalog::{Limit, Subscription},
    context::{Shared, shutting_down},
    dispatcher::{Core, CoreLimits, Owner, RecordFailed},
    errors::Refusal,
    limits::SegmentLimits,
    ownership::Segment,
    storage_errors,
};

use carry_out::AnswerTo;
use members::Member;
use pulls::Pull;
use reads::{Queued, ReadDone};

/// Pause after a failed read or record.
const RETRY: Duration = Duration::from_millis(250);
/// Most time for the exact lease table to become durable before a segment is closed.
const STOP_MAX: Duration = Duration::from_secs(3);
/// How long one without anything to do stays.
const IDLE_MAX: Duration = Duration::from_secs(5);
/// How late messages may be that are past the number told apart, milliseconds (L6).
const RUN_PAUSE_MS: u64 = 1_000;
/// How often the cursor is looked at.
const CURSOR_EVERY: Duration = Duration::from_secs(5);
/// Longest sleep: a wall clock that is set is noticed after so long.
const SLEEP_MAX: Duration = Duration::from_secs(10);

/// The outcome of a record, or an answer in its turn.
enum Done {
    Record { id: u64, result: Result<Offset, SettleError> },
    Answer { to: AnswerTo, result: Result<u64, Refusal> },
}

/// A dispatcher, before it runs.
pub(super) struct Dispatcher {
    shared: Shared,
    segment: Arc<Segment>,
    id: SubscriptionId,
    name: SubscriptionName,
    settings: SubscriptionSettings,
    signer: Signer,
    core: Core<Queued>,
    seen: Arc<Mutex<Seen>>,
    deleted: CancellationToken,
    settings_told: watch::Receiver<SettingsRead>,
    consumers_max: Limit,
    /// The beginning of the clock of rates.
    began: Instant,
    members: BTreeMap<u64, Member>,
    /// When each of them is to be looked at.
    lives: BTreeSet<(Instant, u64)>,
    pulls: BTreeMap<u64, Pull>,
    /// Calls' answers by the record they wait for.
    answers: BTreeMap<u64, AnswerTo>,
    inbound: SelectAll<Gated>,
    records: FuturesOrdered<BoxFuture<'static, Done>>,
    reads: FuturesUnordered<BoxFuture<'static, ReadDone>>,
    dead_letters: DeadLetters,
    publishing: Option<BoxFuture<'static, u64>>,
    retry: Option<Pin<Box<Sleep>>>,
    told: Option<GoAway>,
    cursor_seen: Instant,
    idle_since: Option<Instant>,
    /// Why a record of its own failed, once it is in the log.
    told_failure: Option<Reason>,
    /// When what holds the next message up was last looked at.
    looked: Option<Instant>,
    /// Some outbox opened, or its client left.
    woken: Arc<Notify>,
    /// Answered once everything on its way is durable.
    stopping: Option<oneshot::Sender<()>>,
}

enum Event {
    Woken,
    Command(Command),
    GoAway(GoAway),
    Done(Done),
    Read(ReadDone),
    Frame(Framed),
    Settings,
    Limits,
    Published(u64),
    Retry,
}

impl Dispatcher {
    /// # Errors
    /// SUBSCRIPTION_NOT_FOUND when it has no cursor here.
    pub(super) fn new(
        shared: Shared,
        segment: Arc<Segment>,
        subscription: &Subscription,
        (seen, token, settings_told): (
            Arc<Mutex<Seen>>,
            CancellationToken,
            watch::Receiver<SettingsRead>,
        ),
    ) -> Result<Self, Refusal> {
        let limits = &shared.config.limits;
        let core_limits = CoreLimits {
            unacked_messages_max: limits.unacked_messages_max,
            unacked_per_consumer_max: limits.unacked_per_consumer_max,
            consumers_max: limits.consumers_max,
            read_ahead_bytes_max: limits.read_ahead_bytes_max,
            parked_messages_max: limits.delayed_messages_max,
            run_pause_ms: RUN_PAUSE_MS,
            dead_letters_max: limits.dead_letters_max,
            grace_ms: u64::try_from(limits.consumer_grace.as_millis()).unwrap_or(u64::MAX),
        };
        let ledger = segment.ledger();
        let restored = durable::restored(ledger, subscription.id).ok_or_else(deleted)?;
        let owner = Owner { epoch: segment.epoch().0, segment: segment.id().segment, segments: 1 };
        let (end, now) = (ledger.end().borrow().0, shared.catalog.now_ms());
        let policy = wanted::policy(&subscription.settings);
        let core = Core::new(policy, core_limits, owner, restored, (end, now));
        Ok(Self {
            signer: Signer::new(&ledger.handle_key()),
            id: subscription.id,
            name: subscription.name.clone(),
            settings: subscription.settings.clone(),
            dead_letters: DeadLetters::new(&segment, subscription),
            core,
            seen,
            deleted: token,
            settings_told,
            consumers_max: Limit::of_server(limits.consumers_max),
            began: Instant::now(),
            lives: BTreeSet::new(),
            members: BTreeMap::new(),
            pulls: BTreeMap::new(),
            answers: BTreeMap::new(),
            inbound: SelectAll::new(),
            records: FuturesOrdered::new(),
            reads: FuturesUnordered::new(),
            publishing: None,
            retry: None,
            told: None,
            cursor_seen: Instant::now(),
            idle_since: None,
            told_failure: None,
            looked: None,
            woken: Arc::default(),
            stopping: None,
            shared,
            segment,
        })
    }

    /// Runs until there is nothing to do, the segment or the subscription ends, or the broker stops. `leave` says whether
    /// nobody has a command any more.
    pub(super) async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        leave: impl Fn(&mut mpsc::Receiver<Command>) -> bool,
    ) {
        let why = self.serve(&mut commands, leave).await;
        commands.close();
        if let Some(why) = why {
            self.end(&why);
            while let Ok(command) = commands.try_recv() {
                refuse(command, &why);
            }
        }
        self.segment.dispatchers().forget(self.id);
    }

    /// With why it ended; none: there is nothing to do.
    async fn serve(
        &mut self,
        commands: &mut mpsc::Receiver<Command>,
        leave: impl Fn(&mut mpsc::Receiver<Command>) -> bool,
    ) -> Option<Refusal> {
        let (shared, segment) = (Arc::clone(&self.shared), Arc::clone(&self.segment));
        let (token, woken) = (self.deleted.clone(), Arc::clone(&self.woken));
        let mut end = segment.ledger().end();
        let mut ended = std::pin::pin!(segment.ended());
        let mut told_to_go = std::pin::pin!(shared.told_to_go(&segment));
        let mut over = std::pin::pin!(shared.draining.over());
        let (mut settings, mut limits) = (self.settings_told.clone(), segment.limits());
        limits.mark_changed();
        loop {
            self.look_at_lives();
            self.core.on_end(end.borrow_and_update().0);
            self.look_at_cursor();
            self.step();
            if self.has_been_idle() && leave(commands) {
                return None;
            }
            if self.shared.draining.begun() && self.members.is_empty() && self.pulls.is_empty() {
                // The broker stops, and waits for nobody who is not there.
                self.write_leases().await;
                return Some(shutting_down());
            }
            let mut time = std::pin::pin!(self.until_next_time());
            let event = tokio::select! {
                biased;
                why = &mut ended => return Some(why),
                () = token.cancelled() => return Some(deleted()),
                () = &mut over => {
                    self.write_leases().await;
                    return Some(shutting_down());
                }
                go_away = &mut told_to_go, if self.told.is_none() => Event::GoAway(go_away),
                () = woken.notified() => { self.look_at_outboxes(); Event::Woken }
                Some(done) = self.records.next() => Event::Done(done),
                Some(done) = self.reads.next() => Event::Read(done),
                number = wait_for(&mut self.publishing) => Event::Published(number),
                () = wait(&mut self.retry) => Event::Retry,
                Ok(()) = settings.changed() => Event::Settings,
                Ok(()) = limits.changed() => Event::Limits,
                command = commands.recv() => match command {
                    Some(command) => Event::Command(command),
                    None => return Some(deleted()), // nobody knows of it any more
                },
                Some(frame) = self.inbound.next() => Event::Frame(frame),
                changed = end.changed() => match changed {
                    Ok(()) => Event::Woken,
                    Err(_) => return Some(segment.ended().await),
                },
                () = &mut time => Event::Woken,
            };
            // What it says is about now, not about the last turn.
            self.core.on_time(self.shared.catalog.now_ms());
            let passed = self.began.elapsed().as_millis();
            self.core.on_rate_time(u64::try_from(passed).unwrap_or(u64::MAX));
            if let Err(why) = self.apply(event) {
                return Some(why);
            }
        }
    }

    /// Policies settle without a dispatcher: now and then the cursor is looked at.
    fn look_at_cursor(&mut self) {
        if !self.records.is_empty() || self.cursor_seen.elapsed() < CURSOR_EVERY {
            return;
        }
        self.cursor_seen = Instant::now();
        if let Some(next) = self.segment.ledger().mark_delete_next(self.id) {
            self.core.on_cursor(next.0);
        }
    }

    fn apply(&mut self, event: Event) -> Result<(), Refusal> {
        match event {
            Event::Woken => {}
            Event::Command(command) => self.command(command),
            Event::GoAway(go_away) => self.tell_all(go_away),
            Event::Done(done) => self.done(done)?,
            Event::Read(done) => self.read_done(done)?,
            Event::Frame((consumer, frame)) => self.frame(consumer, frame),
            Event::Settings => self.take_settings(),
            Event::Limits => self.take_limits(),
            Event::Published(number) => {
                self.publishing = None;
                self.core.on_published(number);
            }
            Event::Retry => {
                self.retry = None;
                self.core.on_retry();
            }
        }
        Ok(())
    }

    fn take_settings(&mut self) {
        let settings = self.settings_told.borrow().1.clone();
        self.core.on_policy(wanted::policy(&settings));
        self.dead_letters.settings(&settings);
        self.settings = settings;
    }

    fn take_limits(&mut self) {
        let SegmentLimits { deliver, consumers_max, .. } = *self.segment.limits().borrow();
        let of_server = Limit::of_server(self.shared.config.limits.consumers_max);
        self.consumers_max = consumers_max.unwrap_or(of_server);
        let most = usize::try_from(self.consumers_max.most).unwrap_or(usize::MAX);
        self.core.on_consumers_max(most);
        self.core.on_rates(deliver);
    }

    /// Carries out what there is to do, and answers pulls.
    fn step(&mut self) {
        while let Some(action) = self.core.step() {
            self.carry_out(action);
        }
        self.answer_pulls();
        self.let_leavers_go();
        self.count();
        if self.records.is_empty()
            && let Some(done) = self.stopping.take()
        {
            let _nobody_waits = done.send(());
        }
    }

    fn done(&mut self, done: Done) -> Result<(), Refusal> {
        match done {
            Done::Answer { to, result } => self.answer(to, result),
            Done::Record { id, result } => {
                let of_core = match &result {
                    Ok(mark_delete) => Ok(mark_delete.0),
                    Err(SettleError::UnknownCursor) => return Err(deleted()),
                    Err(SettleError::Fenced | SettleError::Closed) => {
                        // Its streams end by the segment's end, which says more.
                        let refusal = result.as_ref().map_err(storage_errors::of_settle);
                        if let (Some(to), Err(refusal)) = (self.answers.remove(&id), refusal) {
                            self.answer(to, Err(refusal));
                        }
                        return Ok(());
                    }
                    Err(SettleError::TooManyHoles { limit }) => {
                        self.core.on_holes_max(*limit);
                        Err(RecordFailed)
                    }
                    Err(_) => Err(RecordFailed),
                };
                if of_core.is_err() && self.retry.is_none() {
                    self.retry = Some(Box::pin(sleep(RETRY)));
                }
                self.core.on_recorded(id, of_core);
                let answer = result.map(|mark_delete| mark_delete.0);
                let answer = answer.map_err(|error| storage_errors::of_settle(&error));
                match self.answers.remove(&id) {
                    Some(to) => self.answer(to, answer),
                    None if answer.is_ok() => self.told_failure = None,
                    None => {
                        if let Err(refusal) = answer
                            && self.told_failure != Some(refusal.reason)
                        {
                            self.told_failure = Some(refusal.reason);
                            let id = self.segment.id();
                            tracing::warn!(
                                topic = %id.topic, segment = id.segment, subscription = %self.name, %refusal,
                                "record of a dispatcher is tried again"
                            );
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn until_next_time(&self) -> Sleep {
        let pull = self.pulls.values().map(|pull| pull.deadline).min();
        let now = self.shared.catalog.now_ms();
        let time = self.core.next_time().map(|at| Duration::from_millis(at.saturating_sub(now)));
        let rate = self.core.next_rate_ms().map(Duration::from_millis);
        let waits = [time, rate, Some(SLEEP_MAX)].into_iter().flatten().min();
        let by_time = Instant::now() + waits.unwrap_or(SLEEP_MAX);
        let life = self.lives.first().map(|(at, _)| *at);
        let next = [pull, life, Some(by_time)].into_iter().flatten().min();
        tokio::time::sleep_until(next.unwrap_or(by_time))
    }

    /// Whether there has been nothing to do for some time: calls that follow each other find it still there.
    fn has_been_idle(&mut self) -> bool {
        if !self.core.is_idle() || !self.is_deserted() {
            self.idle_since = None;
            return false;
        }
        self.idle_since.get_or_insert_with(Instant::now).elapsed() >= IDLE_MAX
    }

    fn is_deserted(&self) -> bool {
        self.members.is_empty()
            && self.pulls.is_empty()
            && self.answers.is_empty()
            && self.records.is_empty()
            && self.publishing.is_none()
            && self.stopping.is_none()
    }

    /// As [`Self::stop`], and waits for it.
    async fn write_leases(&mut self) {
        let (done, mut written) = oneshot::channel();
        self.stop(done);
        let write = async {
            while written.try_recv().is_err() {
                let Some(done) = self.records.next().await else { break };
                if self.done(done).is_err() {
                    break;
                }
                self.step();
            }
        };
        let _late = timeout(STOP_MAX, write).await;
    }

    /// L4: the exact lease table, behind every record that is on its way.
    fn stop(&mut self, done: oneshot::Sender<()>) {
        let leases = self.core.stop();
        if let Some(settlement) = durable::exact_leases(leases, self.core.kind()) {
            let settled = self.segment.ledger().settle(self.id, settlement);
            self.records.push_back(Box::pin(async move {
                let written = timeout(STOP_MAX, settled).await;
                let result = match written {
                    Ok(written) => written.map(|_| 0).map_err(|e| storage_errors::of_settle(&e)),
                    Err(_) => Ok(0),
                };
                Done::Answer { to: AnswerTo::Nobody, result }
            }));
        }
        self.stopping = Some(done);
    }
}

/// Answers a command that nobody will carry out.
fn refuse(command: Command, why: &Refusal) {
    match command {
        Command::Attach(attach) => {
            attach.outbox.finish(Err(why.clone()));
            let _gone = attach.ended.send(Err(why.clone()));
        }
        Command::Settle(_, answer) | Command::Seek(_, answer) | Command::Cancel(_, _, answer) => {
            let _gone = answer.send(Err(why.clone()));
        }
        Command::Pull(_, answer) => drop(answer.send(Err(why.clone()))),
        Command::Explain(answer) => drop(answer.send(Err(why.clone()))),
        Command::Delayed(_, answer) => drop(answer.send(Err(why.clone()))),
        Command::Stop(done) => drop(done.send(())),
        Command::Resume => {}
    }
}

async fn wait(timer: &mut Option<Pin<Box<Sleep>>>) {
    match timer {
        Some(timer) => timer.as_mut().await,
        None => std::future::pending().await,
    }
}

async fn wait_for<T>(future: &mut Option<BoxFuture<'static, T>>) -> T {
    match future {
        Some(future) => future.as_mut().await,
        None => std::future::pending().await,
    }
}
