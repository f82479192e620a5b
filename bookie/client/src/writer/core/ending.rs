//! How a writer ends: poisoned (W6), or sealed at its LAC (section 6). And when it tells the LAC while it does not (W3).

use geminga_proto::ids::EntryId;
use tokio::time::Instant;

use super::{Action, AppendError, Copy, Poison, Sealing, SlotState, WriterCore};

impl WriterCore {
    /// W6: nothing is acknowledged ever after.
    pub(super) fn end(&mut self, poison: Poison) {
        if self.poison.is_some() || self.sealed {
            return;
        }
        self.poison = Some(poison);
        self.tracker.stop();
        let error = match poison {
            Poison::WriteFailure => AppendError::NotAcknowledged,
            Poison::Fenced | Poison::Stopped => AppendError::Indeterminate,
        };
        self.actions.push(Action::FailPending(error));
        self.give_up_waiting();
        self.actions.push(Action::Poisoned(poison));
    }

    fn give_up_waiting(&mut self) {
        let ids: Vec<EntryId> = self.in_flight.keys().copied().collect();
        for id in ids {
            if let Some(in_flight) = self.in_flight.get_mut(&id) {
                for copy in &mut in_flight.copies {
                    if *copy == Copy::Waiting {
                        *copy = Copy::GivenUp;
                    }
                }
            }
            self.resolve(id);
        }
        for slot in &mut self.slots {
            slot.waiting.clear();
        }
    }

    /// When may the ledger end? Never while a change is unsettled (MD3); after a write failure at once; else when all is
    /// acknowledged and, for a moment more, when every slot answered.
    pub(super) fn advance_seal(&mut self, now: Instant) {
        let Some(sealing) = self.sealing else { return };
        if self.is_changing()
            || self.sealed
            || matches!(self.poison, Some(Poison::Fenced | Poison::Stopped))
        {
            return;
        }
        let all_acked = self.tracker.all_confirmed();
        let stragglers_by = match sealing.stragglers_by {
            None if all_acked => Some(now + self.config.straggler_patience),
            known => known,
        };
        self.sealing = Some(Sealing { stragglers_by, ..sealing });
        let none_owed = self.in_flight.is_empty() || !self.slots.iter().any(|slot| self.owes(slot));
        let done = self.poison == Some(Poison::WriteFailure)
            || (all_acked && (none_owed || stragglers_by.is_some_and(|by| now >= by)))
            || (!all_acked && now >= sealing.acked_by);
        if done {
            let last = self.tracker.lac();
            let short = self.tracker.any_short();
            self.tracker.stop();
            self.sealed = true;
            self.actions.push(Action::FailPending(AppendError::NotAcknowledged));
            self.give_up_waiting();
            self.actions.push(Action::Sealed { last, length: self.length, short });
        }
    }

    /// A healthy slot still owes an answer.
    fn owes(&self, slot: &SlotState) -> bool {
        slot.is_hopeful()
            && self.in_flight.values().any(|in_flight| {
                in_flight
                    .copies
                    .iter()
                    .any(|copy| matches!(copy, Copy::Sending(to) if slot.holder == Some(*to)))
            })
    }

    pub(super) fn lac_due(&self) -> Option<Instant> {
        let untold = self.tracker.lac() > self.lac_told;
        let serving = self.poison.is_none() && self.sealing.is_none() && !self.sealed;
        (untold && serving).then(|| self.last_activity + self.config.lac_delay)
    }
}
