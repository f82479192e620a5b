//! Bytes in hand, bounded: taken at the front door, given back when the work they belong to is settled.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A bounded number of bytes, handed out first come first served. Clones share one budget.
#[derive(Clone, Debug)]
pub struct ByteBudget {
    free: Arc<Semaphore>,
    total: u64,
}

impl ByteBudget {
    /// A budget of `bytes`, held between 1 byte and 4 GiB - 1: a single request may take all of it.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        let total = bytes.clamp(1, u64::from(u32::MAX));
        Self { free: Arc::new(Semaphore::new(total as usize)), total }
    }

    /// Waits until `bytes` are free and takes them. A request beyond the total takes the whole budget, so that a large
    /// request waits for its turn instead of for ever; one of 0 bytes takes 1, so that empty things are bounded too.
    /// Nobody overtakes: a large request is not starved by small ones behind it.
    ///
    /// Cancel-safe: a dropped wait takes nothing and loses its place.
    pub async fn acquire(&self, bytes: u64) -> Permit {
        let taken = Arc::clone(&self.free)
            .acquire_many_owned(self.clamped(bytes))
            .await
            .expect("the semaphore is never closed");
        Permit { held: taken }
    }

    /// Takes `bytes` (clamped as in [`Self::acquire`]) if they are free now and nobody waits for them.
    #[must_use]
    pub fn try_acquire(&self, bytes: u64) -> Option<Permit> {
        let held = Arc::clone(&self.free).try_acquire_many_owned(self.clamped(bytes)).ok()?;
        Some(Permit { held })
    }

    /// Bytes taken now, including what is already set aside for the first one that waits.
    #[must_use]
    pub fn in_use(&self) -> u64 {
        self.total - self.free.available_permits() as u64
    }

    /// All bytes of the budget.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    fn clamped(&self, bytes: u64) -> u32 {
        bytes.clamp(1, self.total).try_into().expect("the total fits 32 bits")
    }
}

/// Bytes taken from a [`ByteBudget`]; dropping it gives them back.
#[derive(Debug)]
pub struct Permit {
    held: OwnedSemaphorePermit,
}

impl Permit {
    /// Bytes it holds.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.held.num_permits() as u64
    }

    /// Gives back all but `bytes`; keeps everything if it holds no more than that.
    pub fn shrink_to(&mut self, bytes: u64) {
        drop(self.split(self.bytes().saturating_sub(bytes)));
    }

    /// Splits off a permit of at most `bytes`.
    #[must_use]
    pub fn split(&mut self, bytes: u64) -> Self {
        let part = bytes.min(self.bytes()) as usize;
        Self { held: self.held.split(part).expect("no more than it holds") }
    }

    /// Adds another permit's bytes to this one.
    ///
    /// # Panics
    /// When the permits come from different budgets.
    pub fn merge(&mut self, other: Self) {
        self.held.merge(other.held);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use tokio::time::timeout;

    use super::*;

    const SHORT: Duration = Duration::from_millis(10);

    #[tokio::test(start_paused = true)]
    async fn a_request_waits_until_bytes_come_back() {
        let budget = ByteBudget::new(100);
        let first = budget.acquire(80).await;
        assert!(timeout(SHORT, budget.acquire(30)).await.is_err());
        assert_eq!(budget.in_use(), 80, "a cancelled wait holds nothing");
        drop(first);
        assert_eq!(budget.acquire(30).await.bytes(), 30);
        assert_eq!(budget.in_use(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_larger_than_the_budget_gets_all_of_it() {
        let budget = ByteBudget::new(100);
        assert_eq!(budget.acquire(1 << 40).await.bytes(), 100);
    }

    #[tokio::test(start_paused = true)]
    async fn small_requests_do_not_overtake_a_large_one() {
        let budget = ByteBudget::new(100);
        let first = budget.acquire(60).await;
        let mut large = Box::pin(budget.acquire(90));
        assert!(timeout(SHORT, &mut large).await.is_err());
        assert!(budget.try_acquire(10).is_none(), "the large one is first");
        assert!(timeout(SHORT, budget.acquire(10)).await.is_err());
        drop(first);
        assert_eq!(large.await.bytes(), 90);
    }

    #[test]
    fn empty_requests_are_bounded_too() {
        let budget = ByteBudget::new(1);
        let held = budget.try_acquire(0);
        assert!(held.is_some());
        assert!(budget.try_acquire(0).is_none());
    }

    proptest! {
        #[test]
        fn what_is_taken_and_split_always_adds_up(takes in prop::collection::vec((0u64..50, 0u64..50), 1..40)) {
            let budget = ByteBudget::new(400);
            let mut held = Vec::new();
            for (bytes, part) in takes {
                let Some(mut permit) = budget.try_acquire(bytes) else { continue };
                held.push(permit.split(part));
                if part % 3 == 0 { permit.shrink_to(part); }
                held.push(permit);
                prop_assert_eq!(budget.in_use(), held.iter().map(Permit::bytes).sum::<u64>());
                if part % 5 == 0 { held.remove(0); }
            }
            held.clear();
            prop_assert_eq!(budget.in_use(), 0);
        }
    }
}
