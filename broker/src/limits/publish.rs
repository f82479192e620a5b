//! The publish rate of a segment: who comes first passes first, however many producers there are.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::{
    sync::{Mutex as Turn, watch},
    time::{Instant, sleep},
};

use super::{Rates, Throttle};
use crate::metrics::Metrics;

/// The publish rate of one segment.
#[derive(Debug)]
pub(crate) struct PublishRate {
    throttle: Mutex<Throttle>,
    /// Held by the one that is next.
    turn: Turn<()>,
    changed: watch::Sender<()>,
    since: Instant,
}

impl Default for PublishRate {
    fn default() -> Self {
        Self {
            throttle: Mutex::default(),
            turn: Turn::default(),
            changed: watch::Sender::new(()),
            since: Instant::now(),
        }
    }
}

impl PublishRate {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// These rates from now on; those who wait are waited for no longer than they say.
    pub(crate) fn set(&self, rates: Rates) {
        let now = self.now_ms();
        if self.throttle.lock().set(rates, now) {
            self.changed.send_replace(());
        }
    }

    /// Takes what a batch needs, if it passes now and nobody is before it.
    pub(crate) fn try_pass(&self, messages: u64, bytes: u64) -> bool {
        if !self.throttle.lock().limits() {
            return true; // and whoever waits is on his way
        }
        let Ok(_turn) = self.turn.try_lock() else { return false };
        self.take(messages, bytes).is_ok()
    }

    /// # Errors
    /// How long to wait; none: until the rate is changed.
    fn take(&self, messages: u64, bytes: u64) -> Result<(), Option<Duration>> {
        let mut throttle = self.throttle.lock();
        if !throttle.limits() {
            return Ok(());
        }
        let now = self.now_ms();
        match throttle.wait_ms(now) {
            Some(0) => {
                throttle.take(messages, bytes, now);
                Ok(())
            }
            wait => Err(wait.map(Duration::from_millis)),
        }
    }

    /// Waits for a batch's turn, and takes what it needs. Cancel-safe: nothing is taken then.
    pub(crate) async fn pass(&self, (messages, bytes): (u64, u64), metrics: &Metrics) {
        if self.try_pass(messages, bytes) {
            return;
        }
        let _count = Waited { began: Instant::now(), bytes, metrics };
        let _turn = self.turn.lock().await;
        let mut changed = self.changed.subscribe();
        loop {
            changed.borrow_and_update();
            let wait = match self.take(messages, bytes) {
                Ok(()) => return,
                Err(wait) => wait,
            };
            let over = async {
                match wait {
                    Some(wait) => sleep(wait).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                _ = changed.changed() => {}
                () = over => {}
            }
        }
    }

    /// How long somebody who came now would wait, if nobody were before him; none: until the rate is changed.
    pub(crate) fn wait(&self) -> Option<Duration> {
        let now = self.now_ms();
        self.throttle.lock().wait_ms(now).map(Duration::from_millis)
    }
}

/// Less than this is no wait for a rate: somebody else took his share.
const WAIT_MIN: Duration = Duration::from_millis(1);

/// Counts a wait when it is over, or given up.
struct Waited<'a> {
    began: Instant,
    bytes: u64,
    metrics: &'a Metrics,
}

impl Drop for Waited<'_> {
    fn drop(&mut self) {
        let waited = self.began.elapsed();
        if waited >= WAIT_MIN {
            self.metrics.publish_throttled.inc_by(waited.as_secs_f64());
            self.metrics.publish_throttled_bytes.inc_by(self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures::poll;

    use super::{super::Rate, *};

    fn messages(per_s: u64) -> Rates {
        Rates { messages: Some(Rate { per_s, parts: 1 }), bytes: None }
    }

    #[tokio::test(start_paused = true)]
    async fn batches_pass_in_the_order_they_came_and_no_faster_than_the_rate() {
        let (rate, metrics) = (PublishRate::default(), Metrics::default());
        rate.set(messages(10));
        let began = Instant::now();
        rate.pass((30, 0), &metrics).await;
        assert_eq!(began.elapsed(), Duration::ZERO, "a large one passes");
        let mut first = Box::pin(rate.pass((10, 0), &metrics));
        let mut second = Box::pin(rate.pass((1, 0), &metrics));
        assert!(poll!(&mut first).is_pending() && poll!(&mut second).is_pending());
        assert!(!rate.try_pass(1, 0), "nobody goes past them");
        first.await;
        assert!(began.elapsed() >= Duration::from_secs(2), "and is paid back");
        assert!(poll!(&mut second).is_pending());
        second.await;
        assert!(began.elapsed() >= Duration::from_secs(3));
        assert!(metrics.publish_throttled.get() >= 5.0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_rate_is_in_force_for_those_who_wait_and_who_gives_up_takes_nothing() {
        let (rate, metrics) = (Arc::new(PublishRate::default()), Metrics::default());
        rate.set(messages(0));
        assert_eq!(rate.wait(), None);
        let mut gives_up = Box::pin(rate.pass((1_000, 0), &metrics));
        let mut waits = Box::pin(rate.pass((1, 0), &metrics));
        assert!(poll!(&mut gives_up).is_pending() && poll!(&mut waits).is_pending());
        drop(gives_up);
        rate.set(messages(5));
        let began = Instant::now();
        waits.await;
        assert_eq!(began.elapsed(), Duration::ZERO);
        let mut third = Box::pin(rate.pass((10, 0), &metrics));
        rate.set(messages(0));
        assert!(poll!(&mut third).is_pending());
        rate.set(Rates::default());
        third.await;
    }
}
