//! How a reader's stream goes on: its delivery rate, its heartbeats, its end in time.

use std::time::Duration;

use geminga_proto::v1::{ConsumeReply, Ping, consume_reply::Reply};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use crate::{
    context::{Context, Shared},
    errors::Refusal,
    limits::{SegmentLimits, Throttle},
    listener::{Due, Hearing, Life, Outbox, silent},
    metrics::Metrics,
    ownership::Segment,
};

/// The pace of one reader.
pub(super) struct Pace {
    life: Life,
    throttle: Throttle,
    limits: watch::Receiver<SegmentLimits>,
    began: Instant,
    /// Something waits for the rate, counted up to here.
    holds_since: Option<Instant>,
    /// The next delivery waited.
    waited: bool,
    /// Its time is over.
    over: bool,
}

impl Pace {
    pub(super) fn new(shared: &Context, segment: &Segment, heartbeat_ms: u32) -> Self {
        let mut pace = Self {
            life: shared.life(heartbeat_ms),
            throttle: Throttle::default(),
            limits: segment.limits(),
            began: Instant::now(),
            holds_since: None,
            waited: false,
            over: false,
        };
        pace.take_limits();
        pace
    }

    fn take_limits(&mut self) {
        let rates = self.limits.borrow_and_update().deliver;
        self.throttle.set(rates, self.now_ms());
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// A frame came.
    pub(super) fn heard(&mut self) {
        self.life.heard();
    }

    /// Whether the rate lets something go. `wanted`: something waits for it.
    pub(super) fn passes(&mut self, wanted: bool, metrics: &Metrics) -> bool {
        let passes = self.throttle.wait_ms(self.now_ms()) == Some(0);
        let now = Instant::now();
        if let Some(since) = self.holds_since.take() {
            metrics.dispatch_throttled.inc_by((now - since).as_secs_f64());
        }
        self.holds_since = (wanted && !passes).then_some(now);
        self.waited |= self.holds_since.is_some();
        passes
    }

    /// So much was given.
    pub(super) fn took(&mut self, messages: u64, bytes: u64, metrics: &Metrics) {
        if std::mem::take(&mut self.waited) {
            metrics.dispatch_throttled_bytes.inc_by(bytes);
        }
        self.throttle.take(messages, bytes, self.now_ms());
    }

    /// Resolves when the rate lets go what waits for it, or was changed, or something is due. Cancel-safe.
    pub(super) async fn changed(&mut self) {
        let wait = self.throttle.wait_ms(self.now_ms());
        let rate = async {
            match wait.filter(|wait| *wait > 0) {
                Some(wait) => sleep(Duration::from_millis(wait)).await,
                None => std::future::pending().await,
            }
        };
        let limits_changed = tokio::select! {
            biased;
            () = self.life.due() => false,
            Ok(()) = self.limits.changed() => true,
            () = rate, if self.holds_since.is_some() => false,
            else => std::future::pending().await,
        };
        if limits_changed {
            self.take_limits();
        }
    }

    /// Does what is due. True: the stream's time is over.
    ///
    /// # Errors
    /// STREAM_SILENT.
    pub(super) fn look(
        &mut self,
        shared: &Shared,
        segment: &Segment,
        outbox: &Outbox<ConsumeReply>,
    ) -> Result<bool, Refusal> {
        let hearing = if outbox.is_open() { Hearing::Listens } else { Hearing::Full };
        while let Some(due) = self.life.look(Instant::now(), outbox.traffic(), hearing) {
            let reply = match due {
                Due::Say => Reply::Pong(Ping { token: 0 }),
                Due::Silent => return Err(silent()),
                Due::Go(by) => Reply::GoAway(shared.rotate(segment, by)),
                Due::Leave => {
                    self.over = true;
                    break;
                }
            };
            outbox.push(ConsumeReply { reply: Some(reply) }, 0);
        }
        Ok(self.over)
    }
}
