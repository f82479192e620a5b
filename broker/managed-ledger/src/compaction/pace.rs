//! Compaction gives way to traffic: of a byte rate for both it takes what publishing and reading leave, and a little always.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::factory::ManagedLedgers;

/// However busy the broker is, compaction gets this part of its rate.
const ALWAYS: u64 = 16;

/// What compaction may take, bytes a second, beside so much traffic.
fn left(bytes_per_s: u64, traffic_per_s: u64) -> u64 {
    bytes_per_s.saturating_sub(traffic_per_s).max(bytes_per_s / ALWAYS).max(1)
}

/// How long the work on `bytes` has to take.
fn time_of(bytes: u64, rate: u64) -> Duration {
    Duration::from_secs_f64(bytes as f64 / rate as f64)
}

/// The pace of one run.
#[derive(Debug)]
pub(crate) struct Pacer {
    ledgers: ManagedLedgers,
    /// Traffic so far, and when that was.
    seen: (u64, Instant),
    /// When the present step's work began.
    began: Instant,
}

impl Pacer {
    pub(crate) fn new(ledgers: ManagedLedgers) -> Self {
        let now = Instant::now();
        let seen = (ledgers.traffic_bytes(), now);
        Self { ledgers, seen, began: now }
    }

    /// So many bytes were worked on since the last step: waits until they took as long as they should. Cancel-safe.
    pub(crate) async fn step(&mut self, bytes: u64) {
        let most = self.ledgers.parts().config.compaction_bytes_per_s;
        let (before, since) = self.seen;
        let traffic = self.ledgers.traffic_bytes();
        // Over the shortest time that says anything: a burst within a millisecond is no rate.
        let over = since.elapsed().max(time_of(bytes, most.max(1))).max(Duration::from_millis(1));
        let per_s = (traffic.wrapping_sub(before) as f64 / over.as_secs_f64()) as u64;
        self.seen = (traffic, Instant::now());
        let pause = time_of(bytes, left(most, per_s)).saturating_sub(self.began.elapsed());
        if pause.is_zero() {
            tokio::task::yield_now().await;
        } else {
            sleep(pause).await;
        }
        self.began = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compaction_takes_what_traffic_leaves_and_a_sixteenth_always() {
        assert_eq!(left(1_600, 0), 1_600);
        assert_eq!(left(1_600, 1_000), 600);
        assert_eq!(left(1_600, 1_599), 100);
        assert_eq!(left(1_600, 9_999), 100);
        assert_eq!(left(0, 5), 1, "it never stands still");
        assert_eq!(time_of(800, left(1_600, 0)), Duration::from_millis(500));
    }
}
