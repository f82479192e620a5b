//! Randomness: from the operating system in production, from one seed in tests.

use std::sync::Arc;

use parking_lot::Mutex;
use rand::{Rng, RngCore, SeedableRng, rngs::StdRng};

/// A cloneable source of random numbers. Clones share one stream, so that a run with a seed is one run.
#[derive(Clone, Debug)]
pub struct Random(Arc<Mutex<StdRng>>);

impl Random {
    /// Seeded by the operating system.
    ///
    /// # Panics
    /// When the operating system has no randomness to give.
    #[must_use]
    pub fn from_os() -> Self {
        let mut seed = [0u8; 32];
        getrandom::fill(&mut seed).expect("the operating system gives randomness");
        Self(Arc::new(Mutex::new(StdRng::from_seed(seed))))
    }

    /// The same seed gives the same numbers.
    #[must_use]
    pub fn from_seed(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(StdRng::seed_from_u64(seed))))
    }

    /// An independent stream, determined by this one.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self::from_seed(self.u64())
    }

    /// Any 64-bit number.
    #[must_use]
    pub fn u64(&self) -> u64 {
        self.0.lock().next_u64()
    }

    /// A number below `bound`; 0 when `bound` is 0.
    #[must_use]
    pub fn below(&self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { self.0.lock().random_range(0..bound) }
    }

    /// True with the given probability, 0.0 to 1.0.
    #[must_use]
    pub fn chance(&self, probability: f64) -> bool {
        self.0.lock().random_bool(probability.clamp(0.0, 1.0))
    }

    /// A version 4 uuid's 16 bytes.
    #[must_use]
    pub fn uuid(&self) -> [u8; 16] {
        let mut bytes = [0u8; 16];
        self.0.lock().fill_bytes(&mut bytes);
        uuid::Builder::from_random_bytes(bytes).into_uuid().into_bytes()
    }

    /// Puts the items into a random order.
    pub fn shuffle<T>(&self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}
