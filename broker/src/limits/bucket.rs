//! A token bucket: one second of burst, and debt. Something larger than what is left passes while anything is left, and is
//! paid back before the next one: so no batch is too large for its rate, and the mean holds. Time is handed in, in
//! milliseconds of any clock that does not go back; where it does, it stands still.

/// So many per second, shared evenly by so many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub per_s: u64,
    /// At least 1.
    pub parts: u32,
}

/// Tokens are counted in parts of a thousandth, so that no share of a rate is rounded.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    rate: Rate,
    /// Tokens times 1,000 times parts; below 0: debt.
    level: i128,
    at_ms: u64,
}

impl Bucket {
    /// A full one.
    #[must_use]
    pub fn new(rate: Rate, now_ms: u64) -> Self {
        Self { rate, level: Self::full(rate), at_ms: now_ms }
    }

    fn full(rate: Rate) -> i128 {
        i128::from(rate.per_s) * 1_000
    }

    fn level_at(&self, now_ms: u64) -> i128 {
        let passed = i128::from(now_ms.saturating_sub(self.at_ms));
        let more = passed * i128::from(self.rate.per_s);
        self.level.saturating_add(more).min(Self::full(self.rate))
    }

    /// Milliseconds until something passes, 0: now. None: never.
    #[must_use]
    pub fn wait_ms(&self, now_ms: u64) -> Option<u64> {
        let level = self.level_at(now_ms);
        if level > 0 {
            return Some(0);
        }
        if self.rate.per_s == 0 {
            return None;
        }
        let missing = 1 - level;
        let per_ms = i128::from(self.rate.per_s);
        Some(u64::try_from((missing + per_ms - 1) / per_ms).unwrap_or(u64::MAX))
    }

    /// So many passed.
    pub fn take(&mut self, tokens: u64, now_ms: u64) {
        let parts = i128::from(self.rate.parts.max(1));
        let cost = i128::from(tokens) * 1_000 * parts;
        self.level = self.level_at(now_ms).saturating_sub(cost);
        self.at_ms = self.at_ms.max(now_ms);
    }

    /// Whether it is full: nothing would be different with a new one.
    fn is_full(&self, now_ms: u64) -> bool {
        self.level_at(now_ms) >= Self::full(self.rate)
    }
}

/// Rates of messages and of payload bytes; none: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    pub messages: Option<Rate>,
    pub bytes: Option<Rate>,
}

/// A bucket for each.
#[derive(Clone, Copy, Debug, Default)]
pub struct Throttle {
    rates: Rates,
    messages: Option<Bucket>,
    bytes: Option<Bucket>,
}

impl Throttle {
    /// These rates from now on; one that changed begins with a full second, without debt. True: something changed.
    pub fn set(&mut self, rates: Rates, now_ms: u64) -> bool {
        if self.rates == rates {
            return false;
        }
        if self.rates.messages != rates.messages {
            self.messages = rates.messages.map(|rate| Bucket::new(rate, now_ms));
        }
        if self.rates.bytes != rates.bytes {
            self.bytes = rates.bytes.map(|rate| Bucket::new(rate, now_ms));
        }
        self.rates = rates;
        true
    }

    /// Whether there is any limit.
    #[must_use]
    pub fn limits(&self) -> bool {
        self.rates != Rates::default()
    }

    /// Milliseconds until something passes, 0: now. None: never.
    #[must_use]
    pub fn wait_ms(&self, now_ms: u64) -> Option<u64> {
        let buckets = [self.messages.as_ref(), self.bytes.as_ref()];
        let mut waits = buckets.into_iter().flatten().map(|bucket| bucket.wait_ms(now_ms));
        waits.try_fold(0u64, |longest, wait| Some(longest.max(wait?)))
    }

    /// So much passed.
    pub fn take(&mut self, messages: u64, bytes: u64, now_ms: u64) {
        if let Some(bucket) = &mut self.messages {
            bucket.take(messages, now_ms);
        }
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes, now_ms);
        }
    }

    /// Whether nothing is owed: a new one would be the same.
    #[must_use]
    pub fn is_fresh(&self, now_ms: u64) -> bool {
        let buckets = [self.messages.as_ref(), self.bytes.as_ref()];
        buckets.into_iter().flatten().all(|bucket| bucket.is_full(now_ms))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rate(per_s: u64, parts: u32) -> Rate {
        Rate { per_s, parts }
    }

    #[test]
    fn a_second_passes_at_once_and_then_as_much_as_time_brings() {
        let mut bucket = Bucket::new(rate(10, 1), 0);
        for _ in 0..10 {
            assert_eq!(bucket.wait_ms(0), Some(0));
            bucket.take(1, 0);
        }
        assert_eq!(bucket.wait_ms(0), Some(1), "a part of a message is enough to begin one");
        bucket.take(1, 1);
        assert_eq!(bucket.wait_ms(1), Some(100), "and the rest of it is paid back first");
        assert_eq!(bucket.wait_ms(60_000), Some(0));
        bucket.take(10, 60_000);
        assert_ne!(bucket.wait_ms(60_000), Some(0), "no more than a second is saved up");
    }

    #[test]
    fn a_large_batch_passes_and_is_paid_back() {
        let mut bucket = Bucket::new(rate(100, 4), 0);
        bucket.take(250, 0);
        assert_eq!(bucket.wait_ms(0), Some(9_001), "25 a second for one of four parts");
        assert_eq!(bucket.wait_ms(9_000), Some(1));
        assert_eq!(bucket.wait_ms(9_001), Some(0));
    }

    #[test]
    fn nothing_goes_at_zero_and_a_share_below_one_is_not_rounded_to_it() {
        let nothing = Bucket::new(rate(0, 3), 0);
        assert_eq!(nothing.wait_ms(u64::MAX), None);
        let mut little = Bucket::new(rate(1, 100), 0);
        assert_eq!(little.wait_ms(0), Some(0));
        little.take(1, 0);
        assert_eq!(little.wait_ms(0), Some(99_001));
        // The largest values that a policy may have.
        let mut most = Bucket::new(rate(1 << 60, u32::MAX), 0);
        most.take(u64::MAX, 0);
        assert!(most.wait_ms(u64::MAX).is_some());
    }

    #[test]
    fn a_pair_waits_for_the_slower_one_and_a_changed_rate_begins_anew() {
        let rates = Rates { messages: Some(rate(10, 1)), bytes: Some(rate(1_000, 1)) };
        let mut pair = Throttle::default();
        assert_eq!((pair.limits(), pair.wait_ms(0)), (false, Some(0)));
        assert!(pair.set(rates, 0) && !pair.set(rates, 0));
        pair.take(1, 3_000, 0);
        assert_eq!(pair.wait_ms(0), Some(2_001));
        assert!(!pair.is_fresh(2_001) && pair.is_fresh(3_000));
        pair.take(1, 3_000, 3_000);
        let zero = Rates { bytes: Some(rate(0, 1)), ..rates };
        assert!(pair.set(zero, 3_000));
        assert_eq!(pair.wait_ms(3_000), None);
        assert!(pair.set(Rates::default(), 3_000));
        assert_eq!(pair.wait_ms(3_000), Some(0));
    }

    proptest! {
        #[test]
        fn no_stretch_of_time_sees_more_than_its_rate_a_burst_and_one_batch(
            per_s in 1u64..2_000, parts in 1u32..5,
            steps in prop::collection::vec((0u64..700, 1u64..3_000), 1..100),
        ) {
            let mut bucket = Bucket::new(rate(per_s, parts), 0);
            let (mut now, mut passed) = (0, Vec::new());
            for (step, batch) in steps {
                now += step;
                if let Some(wait) = bucket.wait_ms(now) {
                    now += wait;
                    prop_assert_eq!(bucket.wait_ms(now), Some(0), "it passes when it said so");
                    bucket.take(batch, now);
                    passed.push((now, batch));
                }
            }
            for (at, (from, _)) in passed.iter().enumerate() {
                let mut all = 0;
                for (until, batch) in &passed[at..] {
                    let ms = until - from + 1_000;
                    // All but the last one that is looked at.
                    prop_assert!(
                        u128::from(all) * 1_000 * u128::from(parts) < u128::from(ms) * u128::from(per_s) + 1,
                        "{} in {} ms", all, ms
                    );
                    all += batch;
                }
            }
        }
    }
}
