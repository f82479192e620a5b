//! Pauses between attempts: they double up to a bound, with jitter, so that many clients do not come back at once.

use std::time::Duration;

use geminga_runtime::random::Random;

const FIRST: Duration = Duration::from_millis(20);
const MAX: Duration = Duration::from_secs(2);

/// The pause before the next attempt.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    random: Random,
    failures: u32,
}

impl Backoff {
    pub(crate) fn new(random: Random) -> Self {
        Self { random, failures: 0 }
    }

    /// Something worked: the next pause is the shortest.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }

    /// The next pause: between half and all of 20 ms, 40 ms, ... 2 s, and not less than `at_least`.
    pub(crate) fn pause(&mut self, at_least: Option<Duration>) -> Duration {
        let full = (FIRST * 2u32.saturating_pow(self.failures.min(10))).min(MAX);
        self.failures = self.failures.saturating_add(1);
        let half = full / 2;
        let jitter = Duration::from_micros(self.random.below(half.as_micros() as u64 + 1));
        (half + jitter).max(at_least.unwrap_or_default().min(MAX * 5))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_their_bound_and_start_again() {
        let mut backoff = Backoff::new(Random::from_seed(1));
        assert!(backoff.pause(None) <= FIRST);
        let later = (0..50).map(|_| backoff.pause(None)).last().expect("fifty");
        assert!(later >= MAX / 2 && later <= MAX);
        assert!(backoff.pause(Some(Duration::from_secs(5))) >= Duration::from_secs(5));
        assert!(
            backoff.pause(Some(Duration::MAX)) <= MAX * 5,
            "a server cannot make us wait for ever"
        );
        backoff.reset();
        assert!(backoff.pause(None) <= FIRST);
    }
}
