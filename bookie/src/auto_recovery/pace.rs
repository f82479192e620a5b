//! An I/O budget: bytes per second, smoothed over the pauses between chunks.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// One spender's budget.
#[derive(Debug)]
pub(crate) struct Pace {
    bytes_per_second: u64,
    free_at: Instant,
}

impl Pace {
    pub(crate) fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), free_at: Instant::now() }
    }

    /// Takes bytes that were just spent; when the next may be.
    fn take(&mut self, bytes: u64, now: Instant) -> Instant {
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        self.free_at = self.free_at.max(now) + cost;
        self.free_at
    }

    /// Accounts for bytes and waits until the budget has room again. Cancel-safe: they stay accounted for.
    pub(crate) async fn spend(&mut self, bytes: u64) {
        let until = self.take(bytes, Instant::now());
        sleep_until(until).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_budget_is_kept_over_time_and_not_saved_up() {
        let mut pace = Pace::new(100);
        let start = Instant::now();
        for _ in 0..10 {
            pace.spend(50).await;
        }
        assert_eq!(start.elapsed(), Duration::from_secs(5));
        tokio::time::sleep(Duration::from_secs(100)).await;
        let again = Instant::now();
        pace.spend(200).await;
        assert_eq!(again.elapsed(), Duration::from_secs(2));
    }
}
