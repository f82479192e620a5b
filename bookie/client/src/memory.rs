//! Bytes that writers hold (W5): a limit per writer, and one for all writers of a client.

use std::sync::atomic::{AtomicUsize, Ordering};

use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::Notify;

/// What all writers of a client hold together. Soft: an append right after `ready` may pass it by one entry per writer,
/// because who waited for room must not be refused by a neighbour.
#[derive(Debug)]
pub(crate) struct ClientMemory {
    limit: usize,
    held: AtomicUsize,
    room: Notify,
    gauge: Gauge,
}

impl ClientMemory {
    pub(crate) fn new(limit: usize, gauge: Gauge) -> Self {
        Self { limit, held: AtomicUsize::new(0), room: Notify::new(), gauge }
    }

    pub(crate) fn take(&self, bytes: usize) {
        self.held.fetch_add(bytes, Ordering::AcqRel);
        self.gauge.inc_by(bytes as i64);
    }

    pub(crate) fn give_back(&self, bytes: usize) {
        let before = self.held.fetch_sub(bytes, Ordering::AcqRel);
        self.gauge.dec_by(bytes as i64);
        if before >= self.limit && before - bytes < self.limit {
            self.room.notify_waiters();
        }
    }

    /// Whether the limit is not reached.
    pub(crate) fn has_room(&self) -> bool {
        self.held.load(Ordering::Acquire) < self.limit
    }

    /// Waits while the limit is reached. Cancel-safe.
    pub(crate) async fn room(&self) {
        loop {
            let mut room = std::pin::pin!(self.room.notified());
            room.as_mut().enable();
            if self.has_room() {
                return;
            }
            room.await;
        }
    }
}
