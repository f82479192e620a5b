//! Dead letters: a decision with a dense number, then the copy, then settled (L1, L3). One decision record at a time, so
//! that numbers stay dense when one fails; one copy at a time, in order.

use super::{
    Action, Batch, Change, Core, DeadLetter, State,
    records::{Recording, What},
};

impl<B: Batch> Core<B> {
    /// These messages, (offset, attempts), are to be dead letters.
    pub(super) fn decide(&mut self, letters: Vec<(u64, u32)>, reason: String, settle: bool) -> u64 {
        let id = self.new_record();
        let what = What::Dead { letters, reason, settle };
        self.deciding.push_back((id, Recording { generation: self.generation, what }));
        id
    }

    pub(super) fn decide_next(&mut self) {
        if self.deciding_now.is_some() || self.record_failed || self.resetting() {
            return;
        }
        let Some((id, recording)) = self.deciding.pop_front() else { return };
        let What::Dead { letters, reason, .. } = &recording.what else { return };
        let numbered =
            letters.iter().zip(self.dead_next + 1..).map(|((offset, attempt), number)| {
                DeadLetter { number, offset: *offset, attempt: *attempt, reason: reason.clone() }
            });
        let letters =
            if recording.generation == self.generation { numbered.collect() } else { Vec::new() };
        self.deciding_now = Some(id);
        self.recordings.insert(id, recording);
        // Of before a seek: nothing is left to decide, and whoever waits for it is answered.
        self.out.push_back(Action::Record { id, change: Change::DeadLetter(letters) });
    }

    pub(super) fn decided(&mut self, letters: Vec<(u64, u32)>, reason: &str, stale: bool) {
        if stale {
            return;
        }
        for (offset, attempt) in letters {
            self.dead_next += 1;
            let (number, reason) = (self.dead_next, reason.to_owned());
            let ending = self.states.get(offset).is_some_and(|run| run.2.is_ending());
            if !ending {
                continue; // settled meanwhile
            }
            self.put(offset, offset + 1, Some(State::Dead));
            self.dead.insert(number, DeadLetter { number, offset, attempt, reason });
            self.tally.dead_lettered += 1;
        }
    }

    pub(super) fn publish_next(&mut self) -> Option<Action<B>> {
        if self.publishing.is_some() || self.stopping || self.resetting() {
            return None;
        }
        let letter = self.dead.values().next()?.clone();
        self.publishing = Some(letter.number);
        Some(Action::PublishDead(letter))
    }

    /// The copy of the dead letter of this number is stored.
    pub fn on_published(&mut self, number: u64) {
        if self.publishing != Some(number) {
            return;
        }
        self.publishing = None;
        if self.resetting() {
            return; // it is published again if the seek fails, and stored once
        }
        if let Some(DeadLetter { offset, .. }) = self.dead.remove(&number) {
            self.record(What::DeadDone { offset }, Change::Accept(vec![(offset, offset + 1)]));
        }
    }

    /// Decisions so far.
    #[must_use]
    pub fn dead_letters(&self) -> u64 {
        self.dead_next
    }
}
