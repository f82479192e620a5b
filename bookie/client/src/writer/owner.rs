//! The task that owns a writer: carries out the core's actions and feeds their outcomes back. One loop.

use std::{
    collections::{BTreeMap, VecDeque},
    future::Future,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use geminga_metadata::{StoreError, Txn, commit};
use geminga_proto::ids::{EntryId, Incarnation, Slot};
use geminga_runtime::random::Random;
use tokio::{
    sync::oneshot,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Append, Shared, change,
    core::{Action, ChangeOutcome, WriterCore},
    types::{AppendError, Poison, SealError, Sealed},
};
use crate::{
    bookie_rpc::{AddAnswer, AddRequest, Answer, BookieRpc},
    client::LedgerClient,
    ensemble::Available,
    metadata::{LedgerMetadata, Versioned},
    settle::listing_op,
};

/// Answers taken in one turn before commands get theirs.
const ANSWERS_PER_TURN: usize = 256;
/// When the loop has no timer it still looks around this often.
const IDLE_TURN: Duration = Duration::from_secs(60);
/// A read of the registrations that takes longer counts as a store that does not answer.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) struct Owner {
    client: LedgerClient,
    shared: Arc<Shared>,
    core: WriterCore,
    random: Random,
    token: CancellationToken,
    bookies: BTreeMap<Incarnation, Arc<dyn BookieRpc>>,
    adds: FuturesUnordered<Sent>,
    jobs: FuturesUnordered<BoxFuture<'static, Event>>,
    pending: BTreeMap<EntryId, Pending>,
    /// The writer's last word was said: sealed, or poisoned by somebody else.
    over: bool,
}

/// An entry as its caller sees it.
struct Pending {
    bytes: usize,
    at: Instant,
    payload_bytes: u64,
    answer: Option<oneshot::Sender<Result<EntryId, AppendError>>>,
}

/// An add on its way.
struct Sent {
    entry: EntryId,
    slot: Slot,
    to: Incarnation,
    answer: Answer<AddAnswer>,
}

impl Future for Sent {
    type Output = (EntryId, Slot, Incarnation, AddAnswer);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let (entry, slot, to) = (self.entry, self.slot, self.to);
        self.answer.poll_unpin(context).map(|answer| (entry, slot, to, answer))
    }
}

enum Event {
    Stop,
    Answered(EntryId, Slot, Incarnation, AddAnswer),
    Candidates {
        available: Result<Arc<Vec<Available>>, StoreError>,
        hint: bool,
    },
    Changed(ChangeOutcome),
    /// The claim is confirmed, or provisional (O3).
    Standing(bool),
    /// Commands, time, or nothing to act on.
    Turn,
}

impl Owner {
    pub(super) fn new(
        client: LedgerClient,
        shared: Arc<Shared>,
        metadata: Versioned<LedgerMetadata>,
    ) -> Self {
        let config = Arc::new(client.parts.config.clone());
        Self {
            core: WriterCore::new(metadata, config, Instant::now()),
            random: client.parts.random.clone(),
            token: client.parts.tasks.token(),
            client,
            shared,
            bookies: BTreeMap::new(),
            adds: FuturesUnordered::new(),
            jobs: FuturesUnordered::new(),
            pending: BTreeMap::new(),
            over: false,
        }
    }

    pub(super) async fn run(mut self) {
        let token = self.token.clone();
        let shared = Arc::clone(&self.shared);
        let mut timer = pin!(sleep_until(Instant::now() + IDLE_TURN));
        let mut standing = self.other_standing(true);
        loop {
            self.take_commands();
            self.carry_out();
            if self.is_done() {
                break;
            }
            let at = self.core.next_timer().unwrap_or_else(|| Instant::now() + IDLE_TURN);
            if timer.deadline() != at {
                timer.as_mut().reset(at);
            }
            let event = tokio::select! {
                biased;
                () = token.cancelled() => Event::Stop,
                Some(event) = self.jobs.next() => event,
                Some((entry, slot, from, answer)) = self.adds.next() => {
                    Event::Answered(entry, slot, from, answer)
                }
                confirmed = &mut standing => {
                    standing = self.other_standing(confirmed);
                    Event::Standing(confirmed)
                }
                () = shared.wake.notified() => Event::Turn,
                () = &mut timer => Event::Turn,
            };
            self.apply(event);
        }
    }

    /// Resolves when the standing is no longer `confirmed`, to what it then is.
    fn other_standing(&self, confirmed: bool) -> BoxFuture<'static, bool> {
        let standing = self.client.parts.standing.clone();
        async move {
            if confirmed {
                standing.until_provisional().await;
            } else {
                standing.until_confirmed().await;
            }
            !confirmed
        }
        .boxed()
    }

    fn apply(&mut self, event: Event) {
        let now = Instant::now();
        match event {
            Event::Stop => {
                self.core.stop();
                self.over = true; // also after a write failure, where nobody may come to seal
            }
            Event::Answered(entry, slot, from, answer) => {
                self.core.on_answered(entry, slot, from, answer, now);
                for _ in 1..ANSWERS_PER_TURN {
                    let Some(Some((entry, slot, from, answer))) = self.adds.next().now_or_never()
                    else {
                        break;
                    };
                    self.core.on_answered(entry, slot, from, answer, now);
                }
            }
            Event::Candidates { available, hint } => {
                if let Err(error) = &available {
                    let ledger = self.shared.id.0;
                    tracing::warn!(ledger, %error, "registrations cannot be read, the ensemble stays");
                }
                let available = available.as_ref().map(|list| &list[..]).map_err(|_| ());
                self.core.on_candidates(available, hint, &self.random, now);
            }
            Event::Changed(outcome) => {
                if let ChangeOutcome::Landed(metadata) = &outcome {
                    self.client.parts.metrics.ensemble_changes.inc();
                    let fragment = metadata.value.last_fragment();
                    tracing::info!(
                        ledger = self.shared.id.0,
                        first_entry = fragment.first_entry.0,
                        slots = ?fragment.slots,
                        "ensemble changed"
                    );
                }
                self.core.on_change(outcome, now);
            }
            Event::Standing(confirmed) => {
                tracing::info!(
                    ledger = self.shared.id.0,
                    confirmed,
                    "standing of the claim changed"
                );
                self.core.on_standing(confirmed, now);
            }
            Event::Turn => {}
        }
        if self.core.next_timer().is_some_and(|at| at <= now) {
            self.core.on_timer(now);
        }
    }

    /// Takes what the handles asked for, all of it in one go.
    fn take_commands(&mut self) {
        let (appends, seal) = {
            let mut state = self.shared.state.lock();
            (std::mem::take(&mut state.appends), !state.seals.is_empty())
        };
        let now = Instant::now();
        self.push(appends, now);
        if seal {
            self.core.seal(now);
        }
    }

    fn push(&mut self, appends: VecDeque<Append>, now: Instant) {
        for Append { payload, at, answer } in appends {
            let bytes = super::charge(&payload);
            let payload_bytes = payload.len() as u64;
            match self.core.push(payload, now) {
                Some(entry) => {
                    let pending = Pending { bytes, at, payload_bytes, answer: Some(answer) };
                    self.pending.insert(entry, pending);
                }
                None => {
                    let _ = answer.send(Err(AppendError::Ended));
                    self.give_back(bytes, 1);
                }
            }
        }
    }

    fn carry_out(&mut self) {
        let now = Instant::now();
        self.show_state(); // first: who hears of an acknowledgement finds the LAC there
        let (mut bytes_free, mut entries_free) = (0, 0);
        for action in self.core.take_actions() {
            match action {
                Action::Send { entry, slot, to } => {
                    let id = entry.id;
                    let deadline = now + self.client.parts.config.add_timeout;
                    let request = AddRequest { to, entry, recovery: false, deadline };
                    let answer = self.bookie(to).add(request);
                    self.adds.push(Sent { entry: id, slot, to, answer });
                }
                Action::Confirm { entry } => self.confirm(entry, now),
                Action::FailPending(error) => {
                    self.shared.state.lock().ended = true;
                    for pending in self.pending.values_mut() {
                        if let Some(answer) = pending.answer.take() {
                            let _ = answer.send(Err(error));
                        }
                    }
                }
                Action::Release { entry } => {
                    if let Some(pending) = self.pending.remove(&entry) {
                        bytes_free += pending.bytes;
                        entries_free += 1;
                    }
                }
                Action::Look { hint } => self.look(hint),
                Action::Commit(plan) => {
                    let store = Arc::clone(&self.client.parts.store);
                    let base = self.core.metadata().clone();
                    let change = change::publish(store, base, plan, self.token.clone());
                    self.jobs.push(change.map(Event::Changed).boxed());
                }
                Action::List => self.list(),
                Action::WriteLac { lac, to } => {
                    for to in to {
                        let told = self.bookie(to).write_lac(to, self.shared.id, lac);
                        let told = timeout(self.client.parts.config.add_timeout, told);
                        self.jobs.push(told.map(|_| Event::Turn).boxed());
                    }
                }
                Action::Poisoned(poison) => self.poisoned(poison),
                Action::Sealed { last, length, short } => {
                    self.say_sealed(Sealed::build(
                        self.core.metadata().clone(),
                        last,
                        length,
                        short,
                    ));
                }
            }
        }
        if entries_free > 0 {
            self.give_back(bytes_free, entries_free);
        }
    }

    fn confirm(&mut self, entry: EntryId, now: Instant) {
        let metrics = &self.client.parts.metrics;
        if let Some(pending) = self.pending.get_mut(&entry) {
            metrics.append_duration.observe((now - pending.at).as_secs_f64());
            metrics.append_bytes.inc_by(pending.payload_bytes);
            if let Some(answer) = pending.answer.take() {
                let _ = answer.send(Ok(entry));
            }
        }
    }

    fn bookie(&mut self, to: Incarnation) -> Arc<dyn BookieRpc> {
        let bookies = &self.client.parts.bookies;
        Arc::clone(self.bookies.entry(to).or_insert_with(|| bookies.bookie(to)))
    }

    fn look(&mut self, hint: bool) {
        let client = self.client.clone();
        let look = async move {
            let read = async {
                if hint {
                    client.available_hint().await
                } else {
                    client.available().await.map(Arc::new)
                }
            };
            let late = || StoreError::Unavailable("no answer in time".to_owned());
            let available = timeout(LOOK_TIMEOUT, read).await.unwrap_or_else(|_| Err(late()));
            Event::Candidates { available, hint }
        };
        self.jobs.push(look.boxed());
    }

    /// EC7's listing; follows when the store is back (O3).
    fn list(&mut self) {
        self.client.parts.metrics.slots_given_up.inc();
        tracing::warn!(
            ledger = self.shared.id.0,
            "slot given up, the ledger is listed as under-replicated"
        );
        let store = Arc::clone(&self.client.parts.store);
        let token = self.token.clone();
        let txn = Txn::new().then(listing_op(self.shared.id, "a slot has no replacement"));
        let list = async move {
            drop(commit(&store, &txn, &token).await);
            Event::Turn
        };
        self.jobs.push(list.boxed());
    }

    fn poisoned(&mut self, poison: Poison) {
        if poison != Poison::Stopped {
            self.client.parts.metrics.writers_poisoned.inc();
            tracing::warn!(ledger = self.shared.id.0, %poison, "ledger writer poisoned");
        }
        self.shared.poison.send_replace(Some(poison));
        self.shared.room.notify_waiters();
        self.over = poison != Poison::WriteFailure; // after a write failure it can still be sealed
    }

    fn say_sealed(&mut self, sealed: Sealed) {
        let mut state = self.shared.state.lock();
        for seal in state.seals.drain(..) {
            drop(seal.send(Ok(sealed.clone())));
        }
        state.sealed = Some(Box::new(sealed));
        self.over = true;
    }

    fn show_state(&mut self) {
        let mut state = self.shared.state.lock();
        state.lac = self.core.lac();
        state.length = self.core.length();
        if state.metadata.mod_revision != self.core.metadata().mod_revision {
            state.metadata = self.core.metadata().clone();
        }
    }

    fn give_back(&self, bytes: usize, entries: usize) {
        let mut state = self.shared.state.lock();
        state.held_bytes -= bytes;
        state.held_entries -= entries;
        drop(state);
        self.shared.memory.give_back(bytes);
        self.shared.room.notify_waiters();
    }

    fn is_done(&self) -> bool {
        self.over || (self.core.is_idle() && self.shared.state.lock().abandoned)
    }
}

impl Drop for Owner {
    /// However the task ends (seal, poison, abort as by kill -9), nobody waits for it any more and its memory is free.
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.ended = true;
        state.over = true;
        let queued: usize =
            state.appends.drain(..).map(|append| super::charge(&append.payload)).sum();
        let held: usize = self.pending.values().map(|pending| pending.bytes).sum();
        state.held_bytes = 0;
        state.held_entries = 0;
        let seals = std::mem::take(&mut state.seals);
        let sealed = state.sealed.is_some();
        drop(state);
        if !sealed {
            self.shared.poison.send_if_modified(|poison| {
                let news = poison.is_none();
                poison.get_or_insert(Poison::Stopped);
                news
            });
        }
        self.shared.memory.give_back(queued + held);
        self.shared.room.notify_waiters();
        for seal in seals {
            let error = match *self.shared.poison.borrow() {
                Some(Poison::Fenced) => SealError::Fenced,
                _ => SealError::Ended,
            };
            drop(seal.send(Err(error)));
        }
    }
}
