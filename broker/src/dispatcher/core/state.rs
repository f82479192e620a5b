//! What an offset may be, and the counts that follow each change of it.

use super::{Batch, Core, Kind};

/// An offset that is neither settled nor fresh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// With a consumer, until a time (0: as long as it is connected).
    Held { by: u64, attempt: u32, until: u64 },
    /// As held, and a settle of it is being recorded.
    Settling { by: u64, attempt: u32, until: u64, accept: bool },
    /// Its attempt ended by a lease or a loss, which is being recorded.
    Ending { attempt: u32 },
    /// To be delivered under this attempt, not before a time.
    Waiting { attempt: u32, due: u64 },
    /// Messages with times of their own, none before this one, which are not told apart: memory has no room for each (L6). When
    /// it comes they are ready to be read again, and each waits for its own time or is delivered.
    Distant { due: u64 },
    /// To be delivered under this attempt.
    Ready { attempt: u32 },
    /// With a consumer of the owner before, which may come back (L4).
    Kept { by: u64, attempt: u32 },
    /// Decided to be a dead letter; settled once its copy is stored.
    Dead,
    /// Gone from the log; being settled.
    Gone,
}

impl State {
    /// Whether the end of its attempt is being recorded.
    pub(super) fn is_ending(self) -> bool {
        matches!(self, Self::Ending { .. } | Self::Settling { accept: false, .. })
    }

    fn is_parked(self) -> bool {
        matches!(self, Self::Waiting { .. } | Self::Ready { .. })
    }

    /// When it has its turn by time alone.
    fn timer(self) -> Option<u64> {
        match self {
            Self::Waiting { due, .. } | Self::Distant { due } => Some(due),
            _ => None,
        }
    }
}

/// Messages of one [`State::Distant`] run.
const DISTANT_RUN_MAX: u64 = 4_096;

impl<B: Batch> Core<B> {
    /// What waits, or is ready if its time has come.
    pub(super) fn parked_state(&self, attempt: u32, due: u64) -> State {
        if due > self.now_ms { State::Waiting { attempt, due } } else { State::Ready { attempt } }
    }

    /// Every change of an offset's state goes through here. None: settled, by whoever calls.
    pub(super) fn put(&mut self, start: u64, end: u64, state: Option<State>) {
        if start >= end {
            return;
        }
        let mut at = start;
        while at < end {
            let Some((s, e, old)) = self.states.next(at).filter(|run| run.0 < end) else { break };
            let (s, e) = (s.max(at), e.min(end));
            self.leave(s, e, old);
            at = e;
        }
        let (gone, came) = self.states.put(start, end, state);
        for (s, e, run) in gone {
            if let Some(due) = run.timer() {
                self.timers.remove(&(due, s, e));
            }
        }
        for (s, e, run) in came {
            if let Some(due) = run.timer() {
                self.timers.insert((due, s, e));
            }
        }
        if let Some(state) = state {
            self.enter(start, end, state);
        }
        self.keys_changed(start, end, state);
    }

    /// A message that was never delivered waits for its time: by itself, or where memory has no room for more of these, as one
    /// of a run with its neighbours.
    pub(super) fn park(&mut self, offset: u64, due: u64) {
        if self.policy.kind != Kind::Shared
            || self.timers.len() as u64 <= self.limits.parked_messages_max
        {
            return self.put(offset, offset + 1, Some(State::Waiting { attempt: 1, due }));
        }
        let due = due.max(self.now_ms.saturating_add(self.limits.run_pause_ms));
        let (start, due) = match offset.checked_sub(1).and_then(|before| self.states.get(before)) {
            Some((start, _, State::Distant { due: first })) if offset - start < DISTANT_RUN_MAX => {
                (start, due.min(first))
            }
            _ => (offset, due),
        };
        self.put(start, offset + 1, Some(State::Distant { due }));
    }

    fn leave(&mut self, start: u64, end: u64, old: State) {
        let messages = end - start;
        match old {
            State::Distant { .. } => self.distant -= messages,
            _ if old.is_parked() => self.parked -= messages,
            _ => self.unacked -= messages,
        }
        if old.is_ending() {
            self.ending -= messages;
        }
        match old {
            State::Held { by, until, .. } => {
                self.count_held(by, messages, false);
                self.count_deadline(until, messages, false);
            }
            State::Settling { by, .. } => self.count_held(by, messages, false),
            State::Ready { .. } => self.ready.remove(start, end),
            _ => {}
        }
    }

    fn enter(&mut self, start: u64, end: u64, new: State) {
        let messages = end - start;
        match new {
            State::Distant { .. } => self.distant += messages,
            _ if new.is_parked() => self.parked += messages,
            _ => self.unacked += messages,
        }
        if new.is_ending() {
            self.ending += messages;
        }
        match new {
            State::Held { by, until, .. } => {
                self.count_held(by, messages, true);
                self.count_deadline(until, messages, true);
            }
            State::Settling { by, .. } => self.count_held(by, messages, true),
            State::Ready { .. } => self.ready.insert(start, end),
            _ => {}
        }
    }

    fn count_held(&mut self, by: u64, messages: u64, more: bool) {
        if let Some(consumer) = self.consumers.get_mut(&by) {
            if more {
                consumer.held += messages;
            } else {
                consumer.held = consumer.held.saturating_sub(messages);
            }
        }
    }

    fn count_deadline(&mut self, until: u64, messages: u64, more: bool) {
        if until == 0 {
            return;
        }
        let count = self.deadlines.entry(until).or_default();
        if more {
            *count += messages;
            return;
        }
        *count = count.saturating_sub(messages);
        if *count == 0 {
            self.deadlines.remove(&until);
        }
    }

    /// Settles durably settled runs in memory; mark-delete stands here now.
    pub(super) fn settle_runs(&mut self, runs: &[(u64, u64)], mark_delete: u64) {
        for (start, end) in runs {
            let start = (*start).max(self.mark_delete);
            self.put(start, *end, None);
            self.settled.insert(start, *end);
        }
        self.pass(mark_delete);
        self.frontier = self.settled.next_outside(self.frontier);
    }

    /// Mark-delete stands here, by whatever settled what is below: a policy may have (retention, quota).
    pub(super) fn pass(&mut self, mark_delete: u64) {
        if mark_delete > self.mark_delete {
            self.put(self.mark_delete, mark_delete, None);
            self.mark_delete = mark_delete;
            self.settled.remove(0, mark_delete);
            self.frontier = self.frontier.max(mark_delete);
        }
    }

    /// The first run of offsets in `[at, end)` that are neither settled nor have a state.
    pub(super) fn next_without_state(&self, mut at: u64, end: u64) -> Option<(u64, u64)> {
        while at < end {
            at = self.settled.next_outside(at);
            match self.states.get(at) {
                Some(run) => at = run.1,
                None => {
                    let settled = self.settled.next_inside(at).unwrap_or(end);
                    let state = self.states.next(at).map_or(end, |run| run.0);
                    let until = settled.min(state).min(end);
                    return (at < until).then_some((at, until));
                }
            }
        }
        None
    }

    /// The runs of `[start, end)` in this state, as asked.
    pub(super) fn runs_where(
        &self,
        start: u64,
        end: u64,
        wanted: impl Fn(State) -> bool,
    ) -> Vec<(u64, u64, State)> {
        self.states.within(start, end).filter(|run| wanted(run.2)).collect()
    }
}
