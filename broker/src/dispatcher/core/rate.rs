//! The rate that a policy allows: what is given is taken from a bucket, and nothing is looked at while it owes. Its time is
//! handed in apart from the core's: milliseconds of a clock that nobody sets, so that no delivery waits for one that was.

use super::{Batch, Core};
use crate::limits::{Rates, Throttle};

/// What may be given, and what waited for it.
#[derive(Debug, Default)]
pub(super) struct Rate {
    throttle: Throttle,
    now_ms: u64,
    /// Something deliverable waits, counted up to here.
    holds_since: Option<u64>,
    /// The next delivery waited.
    waited: bool,
}

impl<B: Batch> Core<B> {
    /// These rates from now on.
    pub fn on_rates(&mut self, rates: Rates) {
        self.rate.throttle.set(rates, self.rate.now_ms);
    }

    /// It is this time now, by the clock of rates.
    pub fn on_rate_time(&mut self, now_ms: u64) {
        let rate = &mut self.rate;
        rate.now_ms = rate.now_ms.max(now_ms);
        if let Some(since) = &mut rate.holds_since {
            self.tally.throttled_ms += rate.now_ms - *since;
            *since = rate.now_ms;
        }
    }

    /// Milliseconds until the rate lets something go that waits for it; none: nothing does, or it waits for another rate.
    #[must_use]
    pub fn next_rate_ms(&self) -> Option<u64> {
        self.rate.holds_since?;
        self.rate.throttle.wait_ms(self.rate.now_ms)
    }

    /// Whether the rate lets nothing go now.
    pub(super) fn rate_holds(&self) -> bool {
        self.rate.throttle.wait_ms(self.rate.now_ms) != Some(0)
    }

    /// As [`Self::rate_holds`]; remembers whether anything waits for it.
    pub(super) fn held_by_rate(&mut self) -> bool {
        let holds = self.rate_holds();
        let waits =
            holds && self.has_next() && self.consumers.values().any(|one| self.room(one) > 0);
        let rate = &mut self.rate;
        rate.waited |= waits;
        rate.holds_since = waits.then(|| rate.holds_since.unwrap_or(rate.now_ms));
        holds
    }

    /// So much was given.
    pub(super) fn charge(&mut self, messages: u64, bytes: u64) {
        let rate = &mut self.rate;
        rate.throttle.take(messages, bytes, rate.now_ms);
        if std::mem::take(&mut rate.waited) {
            self.tally.throttled_bytes += bytes;
        }
    }

    /// When what the rate holds up goes on, by the core's time; 0: unknown.
    pub(super) fn rate_until(&self) -> u64 {
        let wait = self.rate.throttle.wait_ms(self.rate.now_ms);
        wait.map_or(0, |wait| self.now_ms.saturating_add(wait))
    }

    /// Whether nothing is owed.
    pub(super) fn owes_nothing(&self) -> bool {
        self.rate.throttle.is_fresh(self.rate.now_ms)
    }
}
