//! Ensemble changes: when to look for replacements (EC1), the change itself (EC2..EC5), and what to do without (EC7).

use geminga_proto::ids::{EntryId, Incarnation, Slot};
use geminga_runtime::random::Random;
use tokio::time::Instant;

use super::{
    Action, ChangePlan, Copy, HEALTHY_LOOK_FACTOR, OVERDUE_SHARE, Phase, Poison, SlotState,
    WriterCore,
};
use crate::{
    ensemble::Available,
    metadata::{FRAGMENTS_MAX, Fragment, LedgerMetadata, Nonce, Versioned, check_slots},
};

impl WriterCore {
    pub(super) fn is_troubled(&self) -> bool {
        self.slots.iter().any(|slot| slot.failing_since.is_some()) || self.is_pressed()
    }

    pub(super) fn is_pressed(&self) -> bool {
        self.held_bytes * 2 >= self.config.writer_bytes_max
            || self.in_flight.len() * 2 >= self.config.writer_entries_max
    }

    /// A pending write set cannot reach Qa with the slots that answer.
    pub(super) fn is_short(&self) -> bool {
        let hopeful = |slot: Slot| self.slots[slot.0].is_hopeful();
        let quorum = self.metadata.value.quorum;
        // With enough slots that answer no entry needs to be looked at: one lost bookie must not make each add cost as much
        // as all that are pending.
        !quorum.every_write_set_has(quorum.ack(), hopeful)
            && self.tracker.short_of_quorum(hopeful).is_some()
    }

    pub(super) fn wish_interval(&self) -> std::time::Duration {
        let gap =
            self.slots.iter().any(|slot| slot.holder.is_none() || slot.suspended || slot.slow);
        self.config.look_interval * if gap { 1 } else { HEALTHY_LOOK_FACTOR }
    }

    /// EC1: is it time to look for replacements?
    pub(super) fn evaluate(&mut self, now: Instant) {
        if self.poison.is_some() || self.sealing.is_some() || self.sealed {
            return;
        }
        self.note_overdue(now);
        let short = self.is_short();
        self.short_since = short.then(|| self.short_since.unwrap_or(now));
        if self.phase != Phase::Serving {
            return; // one at a time: further failures are merged into the next round (EC2)
        }
        let urgent = self
            .slots
            .iter()
            .any(|slot| slot.wants_replacement(short, self.is_pressed(), now, &self.config));
        if self.provisional {
            if urgent && now >= self.look_after {
                self.without_replacement(short, false, now);
                self.note_overdue(now); // entries were given up: another one is the oldest now
            }
            self.next_wish = self.next_wish.max(now + self.wish_interval());
        } else if urgent && now >= self.look_after {
            self.look(false);
        } else if now >= self.next_wish {
            self.look(true);
        }
    }

    pub(super) fn look(&mut self, hint: bool) {
        self.phase = Phase::Looking;
        self.actions.push(Action::Look { hint });
    }

    /// EC1: how long a healthy slot took for an add tells whether it is slow; then a replacement is wished for at once.
    pub(super) fn note_time(&mut self, id: EntryId, slot: Slot, from: Incarnation, now: Instant) {
        let state = &self.slots[slot.0];
        if state.holder != Some(from) || !state.is_hopeful() {
            return; // an add sent again took long for other reasons
        }
        let Some(in_flight) = self.in_flight.get(&id) else { return };
        let time = now.saturating_duration_since(in_flight.pushed_at);
        if let Some(slow) = self.slowness.on_answer(slot.0, time, now) {
            let ledger = self.metadata.value.id.0;
            tracing::warn!(ledger, slot = slow, holder = ?self.slots[slow].holder, "bookie is slow");
            self.slots[slow].slow = true;
            self.next_wish = now;
        }
    }

    /// Half of the memory is used, and the oldest entry waits for a slot that neither answers nor fails: it is overdue
    /// (T20).
    fn note_overdue(&mut self, now: Instant) {
        if self.overdue_at().is_none_or(|at| at > now) {
            return;
        }
        let Some((id, in_flight)) = self.in_flight.first_key_value() else { return };
        let quorum = self.metadata.value.quorum;
        for (slot, copy) in quorum.write_set(*id).zip(&in_flight.copies) {
            if let Copy::Sending(to) = copy
                && self.slots[slot.0].holder == Some(*to)
            {
                self.slots[slot.0].failing_since.get_or_insert(now);
            }
        }
    }

    pub(super) fn overdue_at(&self) -> Option<Instant> {
        let (id, oldest) = self.in_flight.first_key_value().filter(|_| self.is_pressed())?;
        let quorum = self.metadata.value.quorum;
        let owed_by_healthy = quorum.write_set(*id).zip(&oldest.copies).any(|(slot, copy)| {
            matches!(copy, Copy::Sending(to) if self.slots[slot.0].holder == Some(*to))
                && self.slots[slot.0].is_hopeful()
        });
        owed_by_healthy.then(|| oldest.pushed_at + self.config.add_timeout / OVERDUE_SHARE)
    }

    /// Slots to be filled: the failing ones first, then those that only wish for it: vacant, given up (EC7), or slow or
    /// draining, which are replaced at once (EC1) but go on while nobody can take their place.
    pub(super) fn wanted(&self, short: bool, available: &[Available], now: Instant) -> Vec<usize> {
        let pressed = self.is_pressed();
        let drains = |slot: &SlotState| {
            available.iter().any(|a| a.draining && slot.holder == Some(a.incarnation))
        };
        let urgent = |slot: &SlotState| slot.wants_replacement(short, pressed, now, &self.config);
        let wishes = |slot: &SlotState| {
            !urgent(slot) && (slot.holder.is_none() || slot.suspended || slot.slow || drains(slot))
        };
        let pick = |which: &dyn Fn(&SlotState) -> bool| -> Vec<usize> {
            (0..self.slots.len()).filter(|i| which(&self.slots[*i])).collect()
        };
        let mut wanted = pick(&|slot| urgent(slot) && slot.hard);
        wanted.extend(pick(&|slot| urgent(slot) && !slot.hard));
        wanted.extend(pick(&wishes));
        wanted
    }

    /// EC3. From here until `change_landed` acks are recorded and nothing is acknowledged (EC2).
    pub(super) fn begin_change(&mut self, chosen: &[(usize, Incarnation)], random: &Random) {
        if self.metadata.value.fragments.len() * 2 >= FRAGMENTS_MAX {
            return self.end(Poison::WriteFailure); // roll to a new ledger instead
        }
        let last = self.metadata.value.last_fragment();
        let mut slots = last.slots.clone();
        for (slot, incarnation) in chosen {
            slots[*slot] = Some(*incarnation);
        }
        debug_assert_eq!(check_slots(self.metadata.value.quorum, &slots), Ok(()), "I9");
        let ended = last.first_entry;
        let first = self.tracker.begin_change();
        let list = self.tracker.is_short(ended, self.tracker.lac());
        self.fruitless = if first == ended { self.fruitless + 1 } else { 0 };
        let fragment = Fragment { first_entry: first, nonce: Nonce(random.uuid()), slots };
        self.phase = Phase::Changing { first };
        self.actions.push(Action::Commit(ChangePlan { fragment, list }));
    }

    /// EC5: every stored ack is compared with the new fragment (in the tracker), and every copy without an ack is sent.
    pub(super) fn change_landed(
        &mut self,
        metadata: Versioned<LedgerMetadata>,
        first: EntryId,
        now: Instant,
    ) {
        self.metadata = metadata;
        let fragments = self.metadata.value.fragments.clone();
        let holders = self.metadata.value.last_fragment().slots.clone();
        let mut replaced = vec![false; self.slots.len()];
        for (slot, holder) in holders.into_iter().enumerate() {
            if self.slots[slot].holder != holder {
                self.slots[slot] = SlotState::new(holder);
                self.slowness.reset(slot);
                replaced[slot] = true;
            }
        }
        let confirmed = self.tracker.finish_change(fragments);
        if self.poison.is_some() {
            return;
        }
        if self.fruitless > 0 {
            let pause = self.config.resend_pause_min * (1 << self.fruitless.min(16));
            self.look_after = now + pause.min(self.config.resend_pause_max);
        }
        let quorum = self.metadata.value.quorum;
        let ids: Vec<EntryId> = self.in_flight.keys().copied().collect();
        for id in &ids {
            for (position, slot) in quorum.write_set(*id).enumerate() {
                let Some(in_flight) = self.in_flight.get_mut(id) else { break };
                if !replaced[slot.0] {
                    continue; // what is on its way or waits there goes on
                }
                if *id < first {
                    // Acknowledged in the fragment that ended; that slot's copy is missing there, and listed.
                    if in_flight.copies[position] != Copy::Stored {
                        in_flight.copies[position] = Copy::GivenUp;
                    }
                } else {
                    self.dispatch(*id, slot);
                }
            }
            if *id < first {
                self.resolve(*id);
            }
        }
        self.confirm(&confirmed, now);
    }

    /// EC7: go on while every pending write set can reach Qa, give up what is overdue, and list; else the ledger ends as a
    /// write failure. An unreachable store ends nothing: what cannot reach Qa waits (O3).
    pub(super) fn without_replacement(&mut self, short: bool, store_answers: bool, now: Instant) {
        self.look_after = now + self.config.look_interval / 4;
        if short {
            let soft = |slot: Slot| {
                let state = &self.slots[slot.0];
                state.holder.is_some() && !state.hard
            };
            let hopeless = self.tracker.short_of_quorum(soft).is_some();
            let waited =
                self.short_since.is_some_and(|since| now >= since + self.config.short_patience);
            if store_answers && (hopeless || waited) {
                self.end(Poison::WriteFailure);
            }
            return;
        }
        let pressed = self.is_pressed();
        for slot in 0..self.slots.len() {
            let state = &self.slots[slot];
            if !state.suspended && state.wants_replacement(false, pressed, now, &self.config) {
                self.suspend(Slot(slot), now);
            }
        }
        self.next_wish = now + self.wish_interval();
    }

    fn suspend(&mut self, slot: Slot, now: Instant) {
        self.list();
        let state = &mut self.slots[slot.0];
        state.suspended = true;
        state.waiting.clear();
        state.probing = None;
        state.retry_at = Some(now + self.config.look_interval);
        let ids: Vec<EntryId> = self.in_flight.keys().copied().collect();
        let quorum = self.metadata.value.quorum;
        for id in ids {
            if let (Some(position), Some(in_flight)) =
                (quorum.position(id, slot), self.in_flight.get_mut(&id))
                && matches!(in_flight.copies[position], Copy::Sending(_) | Copy::Waiting)
            {
                in_flight.copies[position] = Copy::GivenUp;
                self.resolve(id);
            }
        }
    }
}
