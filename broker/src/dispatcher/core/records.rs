//! What must be durable before it counts (L1, L3), and what follows once it is.

use super::{super::KeyRange, Action, Batch, Change, Core, RecordFailed, Redelivery, State};

/// A record on its way.
#[derive(Clone, Debug)]
pub(super) struct Recording {
    pub(super) generation: u64,
    pub(super) what: What,
}

/// What it says.
#[derive(Clone, Debug)]
pub(super) enum What {
    Accept {
        by: u64,
        runs: Vec<(u64, u64)>,
    },
    UpTo {
        by: u64,
        end: u64,
    },
    /// A settle of a consumer; its messages are settling.
    Release(Vec<Redelivery>),
    /// Attempts that ended without a settle; their messages are ending.
    Ended(Vec<Redelivery>),
    /// (offset, attempt) with one reason; `settle`: by a consumer.
    Dead {
        letters: Vec<(u64, u32)>,
        reason: String,
        settle: bool,
    },
    /// Its copy is stored.
    DeadDone {
        offset: u64,
    },
    /// Not in the log any more.
    Gone(Vec<(u64, u64)>),
    /// An operator cancelled what waits.
    Cancelled(Vec<(u64, u64, Option<State>)>),
    Keys(Vec<KeyRange>),
    Reset,
}

impl<B: Batch> Core<B> {
    pub(super) fn record(&mut self, what: What, change: Change) -> u64 {
        let id = self.new_record();
        let recording = Recording { generation: self.generation, what };
        self.recordings.insert(id, recording);
        self.out.push_back(Action::Record { id, change });
        id
    }

    pub(super) fn new_record(&mut self) -> u64 {
        self.next_record += 1;
        self.next_record
    }

    /// The record is durable, with mark-delete now here; or it is not.
    pub fn on_recorded(&mut self, id: u64, result: Result<u64, RecordFailed>) {
        if self.deciding_now == Some(id) {
            self.deciding_now = None;
        }
        let Some(recording) = self.recordings.remove(&id) else { return };
        let stale = recording.generation != self.generation;
        match result {
            Ok(mark_delete) => self.recorded(recording, mark_delete, stale),
            Err(RecordFailed) => self.not_recorded(recording, stale),
        }
    }

    fn recorded(&mut self, recording: Recording, mark_delete: u64, stale: bool) {
        match recording.what {
            What::Keys(table) => self.table_recorded(Some(table)),
            What::Reset => self.was_reset(mark_delete),
            What::Dead { letters, reason, .. } => self.decided(letters, &reason, stale),
            _ if stale => {}
            What::Accept { by, runs } => {
                self.remember_accepted(by, &runs);
                self.settle_runs(&runs, mark_delete);
            }
            What::UpTo { by, end } => {
                let runs = [(self.mark_delete, end)];
                self.remember_accepted(by, &[(0, end)]);
                self.settle_runs(&runs, mark_delete);
            }
            What::Release(items) | What::Ended(items) => {
                for Redelivery { start, end, attempt, due_ms } in items {
                    let state = self.parked_state(attempt, due_ms);
                    // What was settled meanwhile, by an earlier accept that was repeated, stays so.
                    for (s, e, _) in self.runs_where(start, end, State::is_ending) {
                        self.put(s, e, Some(state));
                    }
                }
            }
            What::DeadDone { offset } => self.settle_runs(&[(offset, offset + 1)], mark_delete),
            What::Gone(runs) => self.settle_runs(&runs, mark_delete),
            What::Cancelled(found) => {
                let runs: Vec<(u64, u64)> = found.iter().map(|run| (run.0, run.1)).collect();
                self.settle_runs(&runs, mark_delete);
            }
        }
    }

    fn not_recorded(&mut self, recording: Recording, stale: bool) {
        match &recording.what {
            What::Keys(_) => {
                self.record_failed = true;
                self.table_recorded(None);
            }
            What::Reset => self.resets -= 1,
            _ if stale => {}
            What::Accept { runs, .. } => self.unsettle(&runs.clone(), true),
            What::UpTo { end, .. } => self.unsettle(&[(self.mark_delete, *end)], true),
            What::Release(items) => {
                let runs: Vec<_> = items.iter().map(|item| (item.start, item.end)).collect();
                self.unsettle(&runs, false);
            }
            What::Dead { letters, settle: true, .. } => {
                let runs: Vec<_> =
                    letters.iter().map(|(offset, _)| (*offset, offset + 1)).collect();
                self.unsettle(&runs, false);
            }
            What::Cancelled(runs) => {
                for (start, end, state) in runs.clone() {
                    let state = match state {
                        Some(State::Waiting { attempt, due }) => self.parked_state(attempt, due),
                        Some(distant @ State::Distant { due }) if due > self.now_ms => distant,
                        // Looked at again, unless the frontier has passed it.
                        _ if start >= self.frontier => {
                            self.put(start, end, None);
                            continue;
                        }
                        _ => State::Ready { attempt: 1 },
                    };
                    self.put(start, end, Some(state));
                }
            }
            What::Ended(_) | What::Dead { .. } | What::DeadDone { .. } | What::Gone(_) => {
                self.record_failed = true;
                self.again.push(recording);
            }
        }
    }

    /// Settles that were not recorded: the messages are held as before; if their consumer left
    /// meanwhile, they are delivered again with their attempt unchanged.
    fn unsettle(&mut self, runs: &[(u64, u64)], accepts: bool) {
        let mut left = Vec::new();
        for (start, end) in runs {
            let settling =
                |state| matches!(state, State::Settling { accept, .. } if accept == accepts);
            for (s, e, state) in self.runs_where(*start, *end, settling) {
                let State::Settling { by, attempt, until, .. } = state else { continue };
                let held = State::Held { by, attempt, until };
                if self.consumers.contains_key(&by) {
                    self.put(s, e, Some(held));
                    self.revoke_behind(s, e);
                } else {
                    self.put(s, e, Some(State::Ready { attempt }));
                    left.push((s, e, held));
                }
            }
        }
        self.revoke_followers(&left);
    }

    /// The core's own records that failed are tried again, in order, after the pause.
    pub(super) fn retry_records(&mut self) {
        if self.record_failed || self.resetting() {
            return;
        }
        for recording in std::mem::take(&mut self.again) {
            if recording.generation != self.generation {
                continue;
            }
            let change = match &recording.what {
                What::Ended(items) => Change::Redeliver(items.clone()),
                What::DeadDone { offset } => Change::Accept(vec![(*offset, offset + 1)]),
                What::Gone(runs) => Change::Accept(runs.clone()),
                _ => {
                    let id = self.new_record();
                    self.deciding.push_front((id, recording));
                    continue;
                }
            };
            self.record(recording.what, change);
        }
    }

    /// These runs' attempts ended without a settle: recorded, and then delivered again, or dead (L1).
    pub(super) fn end_attempts(&mut self, runs: &[(u64, u64, State)], reason: &str) {
        if self.resetting() {
            // Behind the seek's record it would count after it.
            for (start, end, state) in runs {
                if let State::Held { attempt, .. } = *state {
                    self.put(*start, *end, Some(State::Ready { attempt }));
                }
            }
            self.revoke_followers(runs);
            return;
        }
        let max = self.policy.attempts_max;
        let (mut items, mut dead): (Vec<Redelivery>, Vec<(u64, u32)>) = Default::default();
        let mut again = Vec::new();
        for (start, end, state) in runs {
            let State::Held { attempt, .. } = *state else { continue };
            self.put(*start, *end, Some(State::Ending { attempt }));
            if max > 0 && attempt >= max {
                dead.extend((*start..*end).map(|offset| (offset, attempt)));
            } else {
                let due_ms = self.due_in(self.policy.backoff(attempt));
                let attempt = attempt.saturating_add(1);
                items.push(Redelivery { start: *start, end: *end, attempt, due_ms });
                again.push((*start, *end, *state));
            }
        }
        self.revoke_followers(&again);
        if !items.is_empty() {
            self.record(What::Ended(items.clone()), Change::Redeliver(items));
        }
        if !dead.is_empty() {
            let reason = format!("{reason}, and it was delivered as often as it may be");
            self.decide(dead, reason, false);
        }
    }

    /// When a delay that begins now is over: never early, though the clock cuts milliseconds off.
    pub(super) fn due_in(&self, delay_ms: u64) -> u64 {
        if delay_ms == 0 { 0 } else { self.now_ms.saturating_add(delay_ms).saturating_add(1) }
    }

    /// These offsets are not in the log any more.
    pub(super) fn record_gone(&mut self, runs: Vec<(u64, u64)>) {
        if runs.is_empty() || self.resetting() {
            return;
        }
        for (start, end) in &runs {
            self.put(*start, *end, Some(State::Gone));
        }
        self.record(What::Gone(runs.clone()), Change::Accept(runs));
    }

    /// Moves the subscription to an offset; resolved by the record of this number.
    pub fn reset(&mut self, to: u64) -> u64 {
        self.resets += 1;
        self.record(What::Reset, Change::Reset(to))
    }

    fn was_reset(&mut self, mark_delete: u64) {
        let held = |state| matches!(state, State::Held { .. });
        for (start, end, state) in self.runs_where(0, u64::MAX, held) {
            if let State::Held { by, attempt, .. } = state {
                self.tell_revoked(by, attempt, (start, end));
            }
        }
        self.put(0, u64::MAX, None);
        self.forget_keys();
        for consumer in self.consumers.values_mut() {
            consumer.accepted = super::super::RangeSet::default();
        }
        self.settled = super::super::RangeSet::default();
        self.mark_delete = mark_delete;
        self.frontier = mark_delete;
        self.next_read = mark_delete;
        (self.queued_bytes, self.queued_messages) = (0, 0);
        self.queue.clear();
        self.replay.clear();
        (self.reading, self.replaying, self.replay_wanted) = (None, None, None);
        self.dead.clear();
        self.publishing = None;
        self.round.clear();
        self.generation += 1;
        self.resets -= 1;
    }
}
