//! How far a compaction is, for those who listen.

use geminga_proto::ids::LedgerId;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use crate::types::TierProgress;

/// Who listens, and how far it is; shared with the owner.
#[derive(Debug, Default)]
pub(crate) struct Progress(Mutex<Steps>);

#[derive(Debug, Default)]
struct Steps {
    watchers: Vec<mpsc::Sender<TierProgress>>,
    bytes_done: u64,
    bytes_total: u64,
}

impl Progress {
    pub(crate) fn watch(&self, watcher: mpsc::Sender<TierProgress>) {
        let watchers = &mut self.0.lock().watchers;
        watchers.retain(|one| !one.is_closed());
        watchers.push(watcher);
    }

    pub(crate) fn is_watched(&self) -> bool {
        !self.0.lock().watchers.is_empty()
    }

    /// So many bytes are to be read, beside what was.
    pub(super) fn expect(&self, bytes: u64) {
        let mut steps = self.0.lock();
        steps.bytes_total = steps.bytes_done + bytes;
    }

    pub(super) fn read(&self, bytes: u64) {
        let mut steps = self.0.lock();
        steps.bytes_done += bytes;
        steps.bytes_total = steps.bytes_total.max(steps.bytes_done);
        steps.tell("");
    }

    /// It is over, with or without a problem: those who listen are let go.
    pub(crate) fn end(&self, problem: &str) {
        let mut steps = self.0.lock();
        if problem.is_empty() {
            steps.bytes_total = steps.bytes_done;
        }
        if steps.bytes_done > 0 || !problem.is_empty() {
            steps.tell(problem);
        }
        *steps = Steps::default();
    }
}

impl Steps {
    fn tell(&self, problem: &str) {
        for watcher in &self.watchers {
            // Who is behind misses a step of the bar; the end is told by the end of the channel.
            let _ = watcher.try_send(TierProgress {
                ledger: LedgerId(0),
                bytes_done: self.bytes_done,
                bytes_total: self.bytes_total,
                problem: problem.to_owned(),
            });
        }
    }
}
