//! Wall time. Used for liveness and for what users see, never for safety (ledger-protocol.md section 1).

use std::{
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::random::Random;

/// Milliseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// This much later; stays at the end of time.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)))
    }

    /// Time since `earlier`; zero if the clock went backwards meanwhile.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

/// A wall clock. It may jump in both directions.
pub trait Clock: Send + Sync + std::fmt::Debug + 'static {
    /// The wall time now.
    fn now(&self) -> Timestamp;
}

/// Shared handle to the clock of a process.
pub type SharedClock = Arc<dyn Clock>;

/// The clock of the machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        #[expect(
            clippy::disallowed_methods,
            reason = "this is the seam that everything else goes through"
        )]
        let since_epoch =
            std::time::SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Timestamp(0).plus(since_epoch)
    }
}

/// A clock that tests set. Between settings it runs with `tokio::time`, so it stands still or leaps as the paused time
/// of the test does. Clones share one clock.
#[derive(Clone, Debug)]
pub struct ManualClock(Arc<Mutex<Setting>>);

#[derive(Debug)]
struct Setting {
    shown: Timestamp,
    at: Instant,
}

impl ManualClock {
    /// A clock that shows `start` now.
    #[must_use]
    pub fn new(start: Timestamp) -> Self {
        Self(Arc::new(Mutex::new(Setting { shown: start, at: Instant::now() })))
    }

    /// Sets the clock; it runs on from there.
    pub fn set(&self, time: Timestamp) {
        *self.0.lock() = Setting { shown: time, at: Instant::now() };
    }

    /// Moves the clock by so many milliseconds, forwards or backwards; not before the epoch.
    pub fn jump(&self, milliseconds: i64) {
        self.set(Timestamp(self.now().0.saturating_add_signed(milliseconds)));
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        let setting = self.0.lock();
        setting.shown.plus(setting.at.elapsed())
    }
}

/// The faulty form: another clock, which is set wrong now and then by chance.
#[derive(Debug)]
pub struct JumpyClock {
    inner: SharedClock,
    random: Random,
    jump_chance: f64,
    jump_ms_max: u64,
    offset_ms: Mutex<i64>,
}

impl JumpyClock {
    /// At each look, with probability `jump_chance`, the clock is set anew: up to `jump_ms_max` before or after `inner`.
    #[must_use]
    pub fn new(inner: SharedClock, random: Random, jump_chance: f64, jump_ms_max: u64) -> Self {
        let jump_ms_max = jump_ms_max.min(i64::MAX as u64 / 4);
        Self { inner, random, jump_chance, jump_ms_max, offset_ms: Mutex::new(0) }
    }
}

impl Clock for JumpyClock {
    fn now(&self) -> Timestamp {
        let mut offset_ms = self.offset_ms.lock();
        if self.random.chance(self.jump_chance) {
            *offset_ms =
                self.random.below(2 * self.jump_ms_max + 1) as i64 - self.jump_ms_max as i64;
        }
        Timestamp(self.inner.now().0.saturating_add_signed(*offset_ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_clock_shows_this_century() {
        assert!(SystemClock.now() > Timestamp(1_700_000_000_000));
    }

    #[tokio::test(start_paused = true)]
    async fn the_manual_clock_follows_paused_time_and_jumps() {
        let clock = ManualClock::new(Timestamp(1_000));
        assert_eq!(clock.now(), Timestamp(1_000));
        tokio::time::advance(Duration::from_millis(500)).await;
        assert_eq!(clock.clone().now(), Timestamp(1_500));
        clock.jump(-700);
        assert_eq!(clock.now(), Timestamp(800));
        clock.jump(-5_000);
        assert_eq!(clock.now(), Timestamp(0), "not before the epoch");
        clock.set(Timestamp(10));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(clock.now(), Timestamp(11));
    }

    #[tokio::test(start_paused = true)]
    async fn the_jumpy_clock_jumps_both_ways_within_its_bound_and_by_its_seed() {
        let looks = |seed| {
            let base = Arc::new(ManualClock::new(Timestamp(10_000)));
            let clock = JumpyClock::new(base, Random::from_seed(seed), 0.5, 1_000);
            (0..200).map(|_| clock.now().0).collect::<Vec<_>>()
        };
        let seen = looks(1);
        assert!(seen.iter().all(|t| (9_000..=11_000).contains(t)));
        assert!(seen.iter().any(|t| *t < 9_900) && seen.iter().any(|t| *t > 10_100));
        assert!(seen.windows(2).any(|w| w[1] < w[0]), "it goes backwards");
        assert_eq!(seen, looks(1));
        assert_ne!(seen, looks(2));
    }

    #[test]
    fn time_spans_do_not_go_below_zero() {
        assert_eq!(Timestamp(5).since(Timestamp(9)), Duration::ZERO);
        assert_eq!(Timestamp(9).since(Timestamp(5)), Duration::from_millis(4));
        assert_eq!(Timestamp(u64::MAX).plus(Duration::MAX), Timestamp(u64::MAX));
    }
}
