//! What the next owner learns of leases: logged without waiting as they are given (L2), and exactly at a clean end (L4).

use super::{Batch, Core, Kind, Lease, State};

impl<B: Batch> Core<B> {
    /// Joined to what this round gave before.
    pub(super) fn log_lease(
        &mut self,
        consumer: u64,
        runs: &[(u64, u64)],
        attempt: u32,
        left_ms: u64,
    ) {
        let of_round = self.round.iter_mut().find(|lease| {
            lease.consumer == consumer && lease.attempt == attempt && lease.left_ms == left_ms
        });
        let lease = match of_round {
            Some(lease) => lease,
            None => {
                let name =
                    self.consumers.get(&consumer).map_or_else(String::new, |c| c.name.clone());
                self.round.push(Lease { consumer, name, runs: Vec::new(), attempt, left_ms });
                self.round.last_mut().expect("pushed above")
            }
        };
        for (start, end) in runs {
            match lease.runs.last_mut() {
                Some((_, last)) if *last == *start => *last = *end,
                _ => lease.runs.push((*start, *end)),
            }
        }
    }

    /// What is with consumers, exactly, for the next owner (L4); nothing is given from now on.
    pub fn stop(&mut self) -> Vec<Lease> {
        self.stopping = true;
        let mut leases: Vec<Lease> = Vec::new();
        let now = self.now_ms;
        for (start, end, state) in self.states.iter() {
            let (consumer, attempt, left_ms) = match state {
                State::Held { by, attempt, until } | State::Settling { by, attempt, until, .. } => {
                    (by, attempt, if until == 0 { 0 } else { until.saturating_sub(now).max(1) })
                }
                State::Kept { by, attempt } => (by, attempt, 0),
                _ => continue,
            };
            let same = |lease: &&mut Lease| {
                lease.consumer == consumer && lease.attempt == attempt && lease.left_ms == left_ms
            };
            match leases.iter_mut().rev().take(64).find(same) {
                Some(lease) => lease.runs.push((start, end)),
                None => {
                    let name =
                        self.consumers.get(&consumer).map_or_else(String::new, |c| c.name.clone());
                    leases.push(Lease {
                        consumer,
                        name,
                        runs: vec![(start, end)],
                        attempt,
                        left_ms,
                    });
                }
            }
        }
        leases
    }

    /// Who gets messages.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.policy.kind
    }
}
