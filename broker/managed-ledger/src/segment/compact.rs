//! The owner's part in a compaction: it says when one runs, and makes its list changes between its own, the least urgent of
//! all. What a compaction does stands in `compaction/`.

use std::{sync::Arc, time::Duration};

use futures::FutureExt;
use geminga_bookie_client::LedgerWriter;
use geminga_proto::ids::Offset;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::Instant,
};

use super::{
    Command, ManagedLedger,
    jobs::{Done, Job},
    owner::Owner,
};
use crate::{
    backlog,
    change::{ChangeError, Current},
    compaction::{
        progress::Progress,
        round::{Ask, Change, Compaction, CompactionError},
    },
    error::{CompactedReadError, ReadError, TierError},
    read::Wanted,
    types::{CompactedRead, CompactionStatus, Status, TierProgress},
};

/// Steps of progress that may wait for who listens.
const PROGRESS_MAX: usize = 1_024;
/// Pause after a compaction that failed; doubled for each further one.
const RETRY_PAUSE: Duration = Duration::from_secs(5);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(300);

/// What the owner knows of compactions, besides the list.
pub(super) struct Compact {
    running: Option<Running>,
    /// A list change that the running one waits for.
    asked: Option<Ask>,
    /// Where the horizon was asked to go.
    forced: Offset,
    progress: Arc<Progress>,
    /// The policy is to be looked at.
    pub(super) due: bool,
    failures: u32,
    not_before: Option<Instant>,
}

/// A compaction beside the owner; it ends with its owner.
struct Running {
    task: JoinHandle<Result<(), CompactionError>>,
    asks: mpsc::Receiver<Ask>,
    target: watch::Sender<Offset>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(super) enum CompactEvent {
    Asked,
    Ended(Result<(), String>),
}

/// A list change of a compaction has an end.
pub(super) struct ViewChanged {
    result: Result<(Current, Option<LedgerWriter>), ChangeError>,
    answer: oneshot::Sender<Result<Option<LedgerWriter>, String>>,
}

impl Compact {
    pub(super) fn new() -> Self {
        Self {
            running: None,
            asked: None,
            forced: Offset(0),
            progress: Arc::default(),
            due: true,
            failures: 0,
            not_before: None,
        }
    }

    pub(super) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// What happens next here. Cancel-safe; pending for ever if nothing can.
    pub(super) async fn next(&mut self) -> CompactEvent {
        let Some(running) = &mut self.running else { return std::future::pending().await };
        let ended = tokio::select! {
            biased;
            Some(ask) = running.asks.recv(), if self.asked.is_none() => {
                self.asked = Some(ask);
                return CompactEvent::Asked;
            }
            ended = &mut running.task => ended,
        };
        (self.running, self.asked) = (None, None);
        CompactEvent::Ended(match ended {
            Ok(result) => result.map_err(|error| error.to_string()),
            Err(_) => Err("the compaction's task ended".to_owned()),
        })
    }

    /// Nothing is compacted any more; what was written is for the next owner to delete.
    pub(super) fn stop(&mut self) {
        (self.running, self.asked) = (None, None);
        self.progress.end("the segment is closing");
    }
}

impl Owner {
    /// The segment is compacted up to its end now.
    pub(super) fn compact_now(&mut self, watcher: mpsc::Sender<TierProgress>) {
        if self.closing.is_some() {
            return;
        }
        let end = *self.shared.end.borrow();
        let compact = &mut self.compact;
        compact.forced = compact.forced.max(end);
        compact.progress.watch(watcher);
        if let Some(running) = &compact.running {
            running.target.send_if_modified(|target| {
                let behind = *target < end;
                *target = end.max(*target);
                behind
            });
        }
        (compact.due, compact.not_before) = (true, None);
        self.end_forced("");
    }

    /// Starts one if one is due: to get somewhere, or to delete what an earlier one left.
    pub(super) fn start_compaction(&mut self) {
        let compact = &self.compact;
        let early = compact.not_before.is_some_and(|at| Instant::now() < at);
        if !compact.due || compact.is_running() || self.closing.is_some() || early {
            return;
        }
        // What it reads must not be trimmed by a change under way.
        if self.job.is_some() || !self.may_change() {
            return;
        }
        self.compact.due = false;
        let (list, end) = (&self.current.list, *self.shared.end.borrow());
        let target = match self.compact_by_policy() {
            true => end,
            false => self.compact.forced.max(list.compacted_to),
        };
        if target <= list.compacted_to && list.compacting.is_empty() {
            return;
        }
        let (target, watched) = watch::channel(target);
        let (asks, asked) = mpsc::channel(1);
        let compaction = Compaction {
            ledgers: self.ledgers.clone(),
            view: Arc::clone(&self.shared.view),
            asks,
            target: watched,
            progress: Arc::clone(&self.compact.progress),
            open: *self.shared.open_counts.lock(),
        };
        let tasks = &self.ledgers.parts().tasks;
        let task = tasks.spawn_returning("compaction", compaction.run());
        self.compact.running = Some(Running { task, asks: asked, target });
    }

    /// Whether enough was published behind the horizon.
    fn compact_by_policy(&self) -> bool {
        let after = self.shared.policy.borrow().as_ref().and_then(|one| one.compact_after_bytes);
        let Some(after) = after else { return false };
        let open = *self.shared.open_counts.lock();
        let list = &self.current.list;
        let behind = backlog::estimate(list, &open, list.compacted_to.max(list.first_offset));
        behind.messages > 0 && behind.bytes >= after
    }

    pub(super) fn compaction_ended(&mut self, result: Result<(), String>) {
        let compact = &mut self.compact;
        compact.due = true; // it may have become due again meanwhile
        match result {
            Ok(()) => {
                (compact.failures, compact.not_before) = (0, None);
                self.shared.tier_errors.lock().compaction.clear();
                self.end_forced("");
            }
            Err(why) => {
                self.ledgers.parts().metrics.compaction_failures.inc();
                tracing::warn!(
                    topic = self.shared.segment.topic.0,
                    segment = self.shared.segment.segment,
                    why,
                    "segment not compacted"
                );
                let pause = RETRY_PAUSE.saturating_mul(1 << compact.failures.min(8));
                compact.failures += 1;
                compact.not_before = Some(Instant::now() + pause.min(RETRY_PAUSE_MAX));
                // Whoever asked hears of it and may ask again.
                compact.forced = Offset(0);
                compact.progress.end(&why);
                self.shared.tier_errors.lock().compaction = why;
            }
        }
    }

    /// Lets those who listen go, once the horizon is where they wanted it.
    fn end_forced(&mut self, problem: &str) {
        let reached = self.current.list.compacted_to >= self.compact.forced;
        if reached && !self.compact.is_running() && self.compact.progress.is_watched() {
            self.compact.progress.end(problem);
        }
    }

    /// The list change that a compaction waits for.
    pub(super) fn next_view_job(&mut self) -> Option<Job> {
        let Ask { change, answer } = self.compact.asked.take()?;
        let (changer, current) = (self.changer(), self.current.clone());
        let change = async move {
            let result = match change {
                Change::Open(base_offset) => {
                    let opened = changer.open_view(current, base_offset).await;
                    opened.map(|(current, writer)| (current, Some(writer)))
                }
                Change::Close(sealed, counts) => {
                    changer.close_view(current, *sealed, counts).await.map(|now| (now, None))
                }
                Change::Swap(horizon, tombstones) => {
                    let swapped = changer.swap_view(current, horizon, tombstones).await;
                    swapped.map(|now| (now, None))
                }
                Change::Drop => changer.drop_view(current).await.map(|now| (now, None)),
            };
            Done::View(ViewChanged { result, answer })
        };
        Some(change.boxed())
    }

    pub(super) fn view_changed(&mut self, changed: ViewChanged) {
        let ViewChanged { result, answer } = changed;
        let told = match result {
            Ok((current, writer)) => {
                self.current = current;
                self.tier.due = true; // what was held for the compaction may go
                self.show();
                Ok(writer)
            }
            Err(ChangeError::Fenced(why)) => return self.fence(&why),
            Err(ChangeError::NotNow(why)) => Err(why),
        };
        // Unheard if the compaction was stopped: what it wrote is listed, and deleted later.
        let _unheard = answer.send(told);
    }
}

impl ManagedLedger {
    /// Compacts the segment up to its present end, whatever the policy says. The channel has steps of bytes read of bytes to
    /// read, without a ledger, and ends when it is done; a step with a `problem` is why it was not: call again. A second
    /// call follows the compaction that runs. Dropping the receiver stops nothing. Steps are lost to who does not listen.
    ///
    /// # Errors
    /// [`TierError`], but not [`TierError::NoColdStorage`].
    pub fn compact_now(&self) -> Result<mpsc::Receiver<TierProgress>, TierError> {
        let (sender, receiver) = mpsc::channel(PROGRESS_MAX);
        self.commands.try_send(Command::Compact(sender)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => TierError::Busy,
            mpsc::error::TrySendError::Closed(_) => TierError::Fenced,
        })?;
        Ok(receiver)
    }

    /// Where the segment's compaction stands.
    #[must_use]
    pub fn compaction(&self) -> CompactionStatus {
        let list = self.shared.view.list();
        let (messages, bytes) = list.view_counts();
        let last_error = self.shared.tier_errors.lock().compaction.clone();
        CompactionStatus { compacted_to: list.compacted_to, messages, bytes, last_error }
    }

    /// Below the compaction horizon only the latest message of each key, then everything: batches from `from` on, about
    /// `bytes_max` payload bytes or `messages_max` messages, and where to read on. Empty at the end, or where what comes next
    /// was trimmed before it was compacted; then the place to read on is behind that. Keys whose latest message has an empty
    /// value, and messages without a key, are left out below the horizon. Cancel-safe.
    ///
    /// The view may be replaced between two reads. `since` is the horizon when this reader began: of keys that were deleted
    /// after that it gets the message that says so. None: a reader that goes on from elsewhere, which gets all of these that
    /// the view holds: those of the last [`crate::ManagedLedgerConfig::tombstones_kept`] at least.
    ///
    /// # Errors
    /// [`CompactedReadError`].
    pub async fn read_compacted(
        &self,
        from: Offset,
        since: Option<Offset>,
        bytes_max: usize,
        messages_max: usize,
    ) -> Result<CompactedRead, CompactedReadError> {
        let end = *self.shared.end.borrow();
        let wanted = Wanted { from, since, end, bytes_max, messages_max };
        let answer = self.shared.view.read_compacted(wanted).await;
        match (&answer, &*self.shared.status.borrow()) {
            (Err(CompactedReadError::Read(_)), Status::Fenced(_)) => Err(ReadError::Fenced.into()),
            (Ok(read), _) => {
                self.note_read(&read.batches);
                answer
            }
            _ => answer,
        }
    }
}
