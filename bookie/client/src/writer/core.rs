//! The writer's decisions (W1..W7, EC1..EC7, section 6): events in, actions out. No clock, socket, store or lock; the time
//! comes with each event.
//!
//! ```text
//!  push ----> Send to the write set ----> on_answered ----> Confirm in order ----> Release when every slot answered
//!                                             |
//!                                     a slot fails (EC1)
//!                                             v
//!  Serving --Look--> on_candidates --Commit--> Changing (nothing acknowledged, EC2) --on_change--> EC5 --> Serving
//!                          |
//!                          +-- no replacement: suspend the slot, List (EC7), or poison as a write failure
//! ```
//! On a provisional claim (O3) nothing is looked for and nothing is listed: as if there were no replacement, and what cannot
//! reach Qa waits. The listing follows when the claim is confirmed again.

mod changes;
mod ending;
mod standing;

use std::{collections::BTreeMap, sync::Arc};

use geminga_proto::ids::{EntryId, Incarnation, Slot};
use geminga_runtime::random::Random;
use tokio::time::Instant;

use super::{
    slot::SlotState,
    slowness::Slowness,
    types::{AppendError, Poison},
};
use crate::{
    ack_tracker::AckTracker,
    bookie_rpc::{AddAnswer, Unknown},
    config::LedgerClientConfig,
    ensemble::{self, Available, LedgerAge},
    entry::{Entry, Payload},
    metadata::{Fragment, LedgerMetadata, Versioned},
};

/// What the owner is to do.
#[derive(Clone, Debug)]
pub enum Action {
    /// ADD to the incarnation; its outcome comes back as `on_answered`.
    Send { entry: Entry, slot: Slot, to: Incarnation },
    /// The entry is acknowledged (W2); in order.
    Confirm { entry: EntryId },
    /// Every append without a `Confirm` fails so.
    FailPending(AppendError),
    /// The entry's memory is free (W5).
    Release { entry: EntryId },
    /// Read the registrations; comes back as `on_candidates`. A hint may be a little old.
    Look { hint: bool },
    /// CAS the new fragment (EC3, EC4); comes back as `on_change`.
    Commit(ChangePlan),
    /// Write `underreplicated/<ledger>` (EC7).
    List,
    /// Tell the LAC (W3).
    WriteLac { lac: EntryId, to: Vec<Incarnation> },
    /// Nothing is acknowledged ever after (W6).
    Poisoned(Poison),
    /// Section 6: this is the end; `short` if any entry has fewer than Qw acks.
    Sealed { last: Option<EntryId>, length: u64, short: bool },
}

/// An ensemble change to be published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangePlan {
    /// Starts at LAC+1 (EC3).
    pub fragment: Fragment,
    /// The fragment that ends has an entry with fewer than Qw acks: list in the same transaction.
    pub list: bool,
}

/// How an ensemble change ended.
#[derive(Clone, Debug)]
pub enum ChangeOutcome {
    /// It stands in the store.
    Landed(Versioned<LedgerMetadata>),
    /// EC4: not Open, or the last fragment is somebody else's.
    Lost,
    /// Stopped while the outcome was unknown (MD3).
    Unsettled,
    /// The store refuses it for good; nothing happened.
    Refused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Serving,
    Looking,
    Changing { first: EntryId },
}

/// One copy of an entry in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copy {
    Vacant,
    Sending(Incarnation),
    Waiting,
    Stored,
    GivenUp,
}

#[derive(Debug)]
struct InFlight {
    entry: Entry,
    bytes: usize,
    pushed_at: Instant,
    /// By position in the write set.
    copies: Vec<Copy>,
}

#[derive(Clone, Copy, Debug)]
struct Sealing {
    acked_by: Instant,
    stragglers_by: Option<Instant>,
}

/// See the module's text.
#[derive(Debug)]
pub struct WriterCore {
    config: Arc<LedgerClientConfig>,
    metadata: Versioned<LedgerMetadata>,
    tracker: AckTracker,
    slots: Vec<SlotState>,
    slowness: Slowness,
    in_flight: BTreeMap<EntryId, InFlight>,
    held_bytes: usize,
    /// Payload bytes up to the last entry pushed, and up to the LAC.
    pushed_length: u64,
    length: u64,
    phase: Phase,
    poison: Option<Poison>,
    sealing: Option<Sealing>,
    sealed: bool,
    short_since: Option<Instant>,
    look_after: Instant,
    /// Changes in a row after which nothing was acknowledged: each waits longer for the next, so that dead bookies that
    /// still stand in the registrations do not take turns without end.
    fruitless: u32,
    next_wish: Instant,
    lac_told: Option<EntryId>,
    last_activity: Instant,
    /// The claim is provisional (O3).
    provisional: bool,
    /// A slot was given up meanwhile: the listing is still to be written (EC7).
    listing_owed: bool,
    actions: Vec<Action>,
}

/// A healthy ledger compares its slots with the registrations this much less often than one with a gap.
const HEALTHY_LOOK_FACTOR: u32 = 5;
/// An add that only one slot still owes, while memory is short, counts as overdue after this share of its deadline.
const OVERDUE_SHARE: u32 = 5;

impl WriterCore {
    /// Of a ledger that this caller just created: no entry was ever sent.
    #[must_use]
    pub fn new(
        metadata: Versioned<LedgerMetadata>,
        config: Arc<LedgerClientConfig>,
        now: Instant,
    ) -> Self {
        let value = &metadata.value;
        let fragment = value.last_fragment();
        // A ledger handed over with several fragments starts at its last one.
        let lac = fragment.first_entry.0.checked_sub(1).map(EntryId);
        Self {
            tracker: AckTracker::new(value.quorum, value.fragments.clone(), lac),
            slots: fragment.slots.iter().map(|holder| SlotState::new(*holder)).collect(),
            slowness: Slowness::new(fragment.slots.len(), now),
            next_wish: now + config.look_interval,
            config,
            metadata,
            in_flight: BTreeMap::new(),
            held_bytes: 0,
            pushed_length: 0,
            length: 0,
            phase: Phase::Serving,
            poison: None,
            sealing: None,
            sealed: false,
            short_since: None,
            look_after: now,
            fruitless: 0,
            lac_told: lac,
            last_activity: now,
            provisional: false,
            listing_owed: false,
            actions: Vec::new(),
        }
    }

    /// Takes what is to be done since the last call, in order.
    pub fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// Takes up an entry and sends it to its write set (W1). Its bytes are frozen here: its lac is the LAC of this moment
    /// (section 3). None after a poison or seal.
    pub fn push(&mut self, payload: Payload, now: Instant) -> Option<EntryId> {
        if self.poison.is_some() || self.sealing.is_some() || self.sealed {
            return None;
        }
        self.last_activity = now;
        self.pushed_length += payload.len() as u64;
        let id = self.tracker.push();
        let lac = self.tracker.lac();
        self.lac_told = lac;
        let entry = Entry::seal(self.metadata.value.id, id, lac, self.pushed_length, payload);
        let bytes = entry.encoded_len();
        let quorum = self.metadata.value.quorum;
        self.held_bytes += bytes;
        let copies = vec![Copy::GivenUp; quorum.write()];
        self.in_flight.insert(id, InFlight { entry, bytes, pushed_at: now, copies });
        for slot in quorum.write_set(id) {
            self.dispatch(id, slot);
        }
        if self.is_troubled() {
            self.evaluate(now);
        }
        Some(id)
    }

    /// The answer to one `Send`.
    pub fn on_answered(
        &mut self,
        id: EntryId,
        slot: Slot,
        from: Incarnation,
        answer: AddAnswer,
        now: Instant,
    ) {
        match answer {
            AddAnswer::Ok => self.on_stored(id, slot, from, now),
            AddAnswer::Fenced => self.end(Poison::Fenced),
            AddAnswer::ReadOnly | AddAnswer::NoSpace => self.on_failed(id, slot, from, true, now),
            AddAnswer::Unknown(why) => {
                let hard = match &why {
                    Unknown::WrongIncarnation | Unknown::Limbo | Unknown::Dropped => true,
                    Unknown::Refused(why) => {
                        let ledger = self.metadata.value.id.0;
                        tracing::error!(
                            ledger,
                            entry = id.0,
                            bookie = from.0,
                            why,
                            "bookie refused an entry's bytes"
                        );
                        true
                    }
                    _ => false,
                };
                self.on_failed(id, slot, from, hard, now);
            }
        }
        self.resolve(id);
        if self.is_troubled() {
            self.evaluate(now);
        }
        self.advance_seal(now);
    }

    /// The registrations asked for by `Look`; `Err` when the store did not answer, which counts as *no replacement* as long
    /// as it lasts (EC7, O3).
    pub fn on_candidates(
        &mut self,
        available: Result<&[Available], ()>,
        hint: bool,
        random: &Random,
        now: Instant,
    ) {
        if self.phase != Phase::Looking {
            return;
        }
        self.phase = Phase::Serving;
        if self.poison.is_some() || self.sealing.is_some() || self.sealed {
            return self.advance_seal(now);
        }
        self.next_wish = now + self.wish_interval();
        let short = self.is_short();
        // The claim may have become provisional since the look began.
        let available = if self.provisional { Err(()) } else { available };
        let available_now = available.unwrap_or_default();
        let wanted = self.wanted(short, available_now, now);
        let chosen = ensemble::replacements(
            self.metadata.value.quorum,
            &self.metadata.value.last_fragment().slots,
            &wanted,
            available_now,
            LedgerAge::new(self.metadata.value.id, Some(self.metadata.create_revision)),
            random,
        );
        if !chosen.is_empty() && hint {
            self.look(false); // a hint leads to no decision (MD2): read again
        } else if !chosen.is_empty() {
            self.begin_change(&chosen, random);
        } else if !hint {
            self.without_replacement(short, available.is_ok(), now);
        } else {
            self.evaluate(now);
        }
    }

    /// The outcome of a `Commit`.
    pub fn on_change(&mut self, outcome: ChangeOutcome, now: Instant) {
        let Phase::Changing { first } = self.phase else { return };
        self.phase = Phase::Serving;
        match outcome {
            ChangeOutcome::Landed(metadata) => self.change_landed(metadata, first, now),
            ChangeOutcome::Lost => self.end(Poison::Fenced),
            ChangeOutcome::Unsettled => self.end(Poison::Stopped),
            ChangeOutcome::Refused => self.end(Poison::WriteFailure),
        }
        self.evaluate(now);
        self.advance_seal(now);
    }

    /// Time passed; call at `next_timer`.
    pub fn on_timer(&mut self, now: Instant) {
        for slot in 0..self.slots.len() {
            if self.slots[slot].retry_at.is_some_and(|at| at <= now) {
                self.slots[slot].retry_at = None;
                self.probe(Slot(slot));
            }
        }
        if self.lac_due().is_some_and(|at| at <= now) {
            self.lac_told = self.tracker.lac();
            let to = self.slots.iter().filter_map(|slot| slot.holder).collect();
            if let Some(lac) = self.lac_told {
                self.actions.push(Action::WriteLac { lac, to });
            }
        }
        self.evaluate(now);
        self.advance_seal(now);
    }

    /// When `on_timer` has something to do.
    #[must_use]
    pub fn next_timer(&self) -> Option<Instant> {
        let mut next = self.lac_due();
        let mut at = |instant: Option<Instant>| {
            next = match (next, instant) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        };
        if self.poison.is_some() || self.sealed {
            return next;
        }
        if let Some(sealing) = self.sealing.filter(|_| !self.is_changing()) {
            at(sealing.stragglers_by.or(Some(sealing.acked_by)));
        }
        for slot in &self.slots {
            at(slot.retry_at);
        }
        if self.phase == Phase::Serving && self.sealing.is_none() {
            at(Some(self.next_wish));
            at(self.overdue_at());
            if self.slots.iter().any(|slot| slot.failing_since.is_some()) {
                let matures = self
                    .slots
                    .iter()
                    .filter(|slot| !slot.suspended)
                    .filter_map(|slot| Some(slot.failing_since? + self.config.resend_for))
                    .min();
                let urgent = self.short_since.map(|_| self.look_after);
                at(matures.map(|at| at.max(self.look_after)));
                at(urgent.or_else(|| self.is_pressed().then_some(self.look_after)).filter(|_| {
                    self.slots.iter().any(|slot| {
                        slot.failing_since.is_some()
                            && (!slot.suspended || self.short_since.is_some())
                    })
                }));
                at(self
                    .slots
                    .iter()
                    .any(|slot| slot.hard && !slot.suspended)
                    .then_some(self.look_after));
            }
        }
        next
    }

    /// Section 6: no more entries; the end comes as `Sealed` once the pending ones are acknowledged or the patience ends.
    /// A poison by somebody else comes as `Poisoned` instead.
    pub fn seal(&mut self, now: Instant) {
        if self.sealing.is_none() && !self.sealed {
            let acked_by = now + self.config.seal_patience;
            self.sealing = Some(Sealing { acked_by, stragglers_by: None });
        }
        self.advance_seal(now);
    }

    /// The process stops: everything pending is indeterminate.
    pub fn stop(&mut self) {
        self.end(Poison::Stopped);
    }

    /// Last-add-confirmed.
    #[must_use]
    pub fn lac(&self) -> Option<EntryId> {
        self.tracker.lac()
    }

    /// Payload bytes up to the LAC.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Entries taken up.
    #[must_use]
    pub fn entries_pushed(&self) -> u64 {
        self.tracker.next().0
    }

    /// The metadata as it stands, as far as this writer knows.
    #[must_use]
    pub fn metadata(&self) -> &Versioned<LedgerMetadata> {
        &self.metadata
    }

    /// Why nothing is acknowledged any more.
    #[must_use]
    pub fn poison(&self) -> Option<Poison> {
        self.poison
    }

    /// Whether an ensemble change is unsettled.
    #[must_use]
    pub fn is_changing(&self) -> bool {
        matches!(self.phase, Phase::Changing { .. })
    }

    /// Whether nothing is pending: no entry in flight, no change.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty() && !self.is_changing()
    }

    /// Bytes of entries that some slot still owes an answer for (W5).
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.held_bytes
    }

    // ---- sending ----

    /// Sends one copy, or lets it wait, or gives it up, as the slot's state asks.
    fn dispatch(&mut self, id: EntryId, slot: Slot) {
        let Some(position) = self.metadata.value.quorum.position(id, slot) else { return };
        let Some(in_flight) = self.in_flight.get_mut(&id) else { return };
        let state = &mut self.slots[slot.0];
        let copy = match state.holder {
            None => Copy::Vacant,
            Some(to) => {
                let probe = state.may_probe();
                if state.is_hopeful() || probe {
                    if probe {
                        state.probing = Some(id);
                    }
                    let entry = in_flight.entry.clone();
                    self.actions.push(Action::Send { entry, slot, to });
                    Copy::Sending(to)
                } else if state.suspended {
                    Copy::GivenUp
                } else {
                    state.waiting.insert(id);
                    Copy::Waiting
                }
            }
        };
        in_flight.copies[position] = copy;
    }

    /// Tries one add on a failing slot: the oldest that waits, or that was given up and is still unconfirmed.
    fn probe(&mut self, slot: Slot) {
        let state = &self.slots[slot.0];
        if !state.may_probe() || self.poison.is_some() {
            return;
        }
        let first = self.tracker.first_unconfirmed();
        let given_up = || self.given_up(slot, first).next();
        let Some(id) = state.waiting.first().copied().or_else(given_up) else { return };
        self.slots[slot.0].waiting.remove(&id);
        self.dispatch(id, slot);
    }

    fn given_up(&self, slot: Slot, from: EntryId) -> impl Iterator<Item = EntryId> + '_ {
        let quorum = self.metadata.value.quorum;
        self.in_flight.range(from..).filter_map(move |(id, in_flight)| {
            let position = quorum.position(*id, slot)?;
            (in_flight.copies[position] == Copy::GivenUp).then_some(*id)
        })
    }

    fn on_stored(&mut self, id: EntryId, slot: Slot, from: Incarnation, now: Instant) {
        self.note_time(id, slot, from, now);
        let confirmed = self.tracker.on_stored(id, slot, from);
        let stored = self.tracker.is_stored(id, slot);
        let position = self.metadata.value.quorum.position(id, slot);
        if let (Some(position), Some(in_flight)) = (position, self.in_flight.get_mut(&id)) {
            let copy = &mut in_flight.copies[position];
            if stored {
                *copy = Copy::Stored;
            } else if *copy == Copy::Sending(from) {
                *copy = Copy::GivenUp; // the replicator moved this copy of a final fragment meanwhile
            }
        }
        let state = &mut self.slots[slot.0];
        if stored {
            state.waiting.remove(&id); // not for a replaced bookie's late answer: its successor still owes the entry
        }
        if state.holder == Some(from) && state.failing_since.is_some() && self.poison.is_none() {
            let mut again = state.recover();
            // Given up while it was away, and not confirmed yet: it may be needed.
            again.extend(self.given_up(slot, self.tracker.first_unconfirmed()));
            for id in again {
                self.dispatch(id, slot);
            }
        }
        self.confirm(&confirmed, now);
    }

    fn on_failed(&mut self, id: EntryId, slot: Slot, from: Incarnation, hard: bool, now: Instant) {
        let state = &mut self.slots[slot.0];
        let replaced = state.holder != Some(from);
        if !replaced {
            state.fail(id, hard, now, &self.config);
        }
        let Some(position) = self.metadata.value.quorum.position(id, slot) else { return };
        let Some(in_flight) = self.in_flight.get_mut(&id) else { return };
        if in_flight.copies[position] == Copy::Sending(from) {
            in_flight.copies[position] = if replaced || state.suspended || self.poison.is_some() {
                Copy::GivenUp
            } else {
                state.waiting.insert(id);
                Copy::Waiting
            };
        }
    }

    fn confirm(&mut self, confirmed: &[EntryId], now: Instant) {
        for id in confirmed {
            self.last_activity = now;
            if let Some(in_flight) = self.in_flight.get(id) {
                self.length = in_flight.entry.acc_length;
            }
            self.actions.push(Action::Confirm { entry: *id });
            self.resolve(*id);
        }
    }

    /// Frees an entry that is confirmed (or never will be) and for which no slot owes an answer (W5).
    fn resolve(&mut self, id: EntryId) {
        let settled = id < self.tracker.first_unconfirmed() || self.poison.is_some() || self.sealed;
        let Some(in_flight) = self.in_flight.get(&id) else { return };
        let owed = in_flight.copies.iter().any(|c| matches!(c, Copy::Sending(_) | Copy::Waiting));
        if settled && !owed {
            self.held_bytes -= in_flight.bytes;
            self.in_flight.remove(&id);
            self.tracker.forget(id);
            self.actions.push(Action::Release { entry: id });
        }
    }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
