//! How long each bookie takes for a READ, for the moment when a second one is asked (RD5).

use std::{collections::BTreeMap, time::Duration};

use geminga_proto::ids::Incarnation;
use parking_lot::Mutex;

/// Reads that are remembered of each bookie.
const WINDOW: usize = 64;
/// With fewer than this nothing is said of a bookie.
const NEEDED: usize = 20;
/// Bookies remembered; past that it starts afresh.
const BOOKIES_MAX: usize = 1_024;

/// The last read times of one bookie. Pure.
#[derive(Debug, Default)]
struct Window {
    times: Vec<Duration>,
    next: usize,
}

impl Window {
    fn note(&mut self, time: Duration) {
        if self.times.len() < WINDOW {
            self.times.push(time);
        } else {
            self.times[self.next] = time;
            self.next = (self.next + 1) % WINDOW;
        }
    }

    /// The time that 95 of 100 reads do not exceed; none with too few reads.
    fn p95(&self) -> Option<Duration> {
        if self.times.len() < NEEDED {
            return None;
        }
        let mut sorted = self.times.clone();
        let at = (sorted.len() * 95).div_ceil(100) - 1;
        Some(*sorted.select_nth_unstable(at).1)
    }
}

/// Read times of all bookies, shared by the readers of a client.
#[derive(Debug, Default)]
pub(crate) struct ReadTimes(Mutex<BTreeMap<Incarnation, Window>>);

impl ReadTimes {
    /// A read had taken so long without an answer when another bookie's answer was taken. It counts as twice that: leaving
    /// it out, or taking it for an answer, would make the bookie look faster with every second read, until all reads are
    /// sent twice.
    pub(crate) fn note_unanswered(&self, bookie: Incarnation, time: Duration) {
        self.note(bookie, time * 2);
    }

    /// A read was answered after so long.
    pub(crate) fn note(&self, bookie: Incarnation, time: Duration) {
        let mut windows = self.0.lock();
        if windows.len() >= BOOKIES_MAX && !windows.contains_key(&bookie) {
            windows.clear();
        }
        windows.entry(bookie).or_default().note(time);
    }

    /// RD5: when to ask a second bookie: after this one's p95, at least `floor`; `unknown` while it is not known.
    pub(crate) fn patience(
        &self,
        bookie: Incarnation,
        floor: Duration,
        unknown: Duration,
    ) -> Duration {
        let p95 = self.0.lock().get(&bookie).and_then(Window::p95);
        p95.map_or(unknown, |p95| p95.max(floor))
    }
}

#[cfg(test)]
mod tests {
    use geminga_runtime::random::Random;
    use proptest::prelude::*;

    use super::*;

    const BOOKIE: Incarnation = Incarnation(1);
    const FLOOR: Duration = Duration::from_millis(5);
    const UNKNOWN: Duration = Duration::from_millis(200);

    fn patience(times: &ReadTimes) -> Duration {
        times.patience(BOOKIE, FLOOR, UNKNOWN)
    }

    proptest! {
        #[test]
        fn one_read_in_twenty_takes_longer_than_the_patience(ms in prop::collection::vec(6u64..1_000, 1..200)) {
            let times = ReadTimes::default();
            for ms in &ms {
                times.note(BOOKIE, Duration::from_millis(*ms));
            }
            let last = &ms[ms.len().saturating_sub(WINDOW)..];
            let patience = patience(&times);
            if last.len() < NEEDED {
                prop_assert_eq!(patience, UNKNOWN);
            } else {
                let longer = last.iter().filter(|ms| u128::from(**ms) > patience.as_millis()).count();
                prop_assert!(longer * 20 <= last.len(), "{} of {}", longer, last.len());
                prop_assert!(last.iter().any(|ms| u128::from(*ms) == patience.as_millis()));
            }
        }
    }

    #[test]
    fn a_fast_bookie_gets_the_floor_and_a_slow_one_its_own_time() {
        let times = ReadTimes::default();
        for _ in 0..WINDOW {
            times.note(BOOKIE, Duration::from_micros(100));
        }
        assert_eq!(patience(&times), FLOOR);
        for _ in 0..WINDOW {
            times.note(BOOKIE, Duration::from_millis(700));
        }
        assert_eq!(patience(&times), Duration::from_millis(700), "asking twice would not help it");
    }

    /// The answers that were not waited for are part of the picture: few reads are sent twice, however long it goes on.
    #[test]
    fn second_reads_do_not_lead_to_more_second_reads() {
        let (times, random) = (ReadTimes::default(), Random::from_seed(1));
        let mut twice = 0;
        for _ in 0..10_000 {
            let (time, limit) = (Duration::from_millis(10 + random.below(101)), patience(&times));
            if time > limit {
                times.note_unanswered(BOOKIE, limit);
                twice += 1;
            } else {
                times.note(BOOKIE, time);
            }
        }
        assert!(twice < 1_000, "{twice} of 10,000");
    }
}
