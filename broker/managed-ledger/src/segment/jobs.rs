//! The owner's work on the list: ledgers are opened, closed, rolled and trimmed beside the loop, one change at a time (M1).

use std::{sync::Arc, time::Duration};

use futures::{FutureExt, future::BoxFuture};
use geminga_bookie_client::{LedgerWriter, SealError, Sealed, bookie_rpc::EntryRange};
use geminga_proto::ids::{EntryId, LedgerId, Offset};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    compact::ViewChanged,
    lane::Phase,
    owner::{OpenLedger, Owner},
    tier::TierDone,
};
use crate::{
    change::{ChangeError, Changer, Current},
    cursor_log::{self, Fold},
    error::{PublishError, SettleError},
    list::{Counts, INLINE_SNAPSHOT_BYTES_MAX, Log},
    takeover::LEDGERS_PER_TXN,
};

/// Pause before a list change that did not happen is tried again.
pub(super) const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// Why a job that reads first did not happen.
pub(super) const PREEMPTED: &str = "a more urgent change of the list waits";

/// A piece of work beside the loop: at most one at a time (M1).
pub(super) type Job = BoxFuture<'static, Done>;

pub(super) enum Done {
    Opened(Log, Result<(Current, LedgerWriter), ChangeError>),
    Sealed {
        log: Log,
        open_next: bool,
        sealed: Result<Sealed, SealError>,
    },
    Closed(Log, Result<(Current, Option<LedgerWriter>), ChangeError>),
    /// Cursor-log ledgers are gone; so many data bytes need no replay any more, up to this offset.
    Trimmed(Result<Current, ChangeError>, Option<(u64, Offset)>),
    Tier(TierDone),
    /// A list change of a compaction.
    View(ViewChanged),
}

impl Owner {
    pub(super) fn changer(&self) -> Changer {
        Changer { ledgers: self.ledgers.clone(), segment: self.shared.segment }
    }

    /// Whether something that publishing or settling waits for needs the next list change.
    pub(super) fn change_is_urgent(&self) -> bool {
        (self.want.roll_data && self.data.is_open())
            || (self.want.roll_log && self.log.is_open())
            || (matches!(self.data.phase, Phase::Idle) && !self.data.is_empty())
            || (matches!(self.log.phase, Phase::Idle) && self.settles_awaited())
    }

    /// For a job that reads before it changes the list: it ends early when the change slot is needed.
    pub(super) fn preemptible(&mut self) -> CancellationToken {
        self.preempt = CancellationToken::new();
        self.reads_begun = self.reads_begun.wrapping_add(1);
        self.preempt.clone()
    }

    /// The next list change, most urgent first.
    pub(super) fn next_job(&mut self) -> Option<Job> {
        if std::mem::take(&mut self.want.roll_data) && self.data.is_open() {
            return self.begin_closing(Log::Data, true);
        }
        if std::mem::take(&mut self.want.roll_log) && self.log.is_open() {
            return self.begin_closing(Log::Cursor, true);
        }
        if matches!(self.data.phase, Phase::Idle) && !self.data.is_empty() {
            return Some(self.open_ledger(Log::Data));
        }
        if matches!(self.log.phase, Phase::Idle) && self.log_is_wanted() {
            return Some(self.open_ledger(Log::Cursor));
        }
        if let Some(last) = self.want.trim_after.take()
            && let Some(writer) = self.log.writer().cloned()
        {
            return Some(self.trim(writer, last));
        }
        if self.want.rest && self.is_quiet() {
            let job = self.rest();
            if job.is_some() {
                return job;
            }
        }
        self.next_tier_job().or_else(|| self.next_view_job())
    }

    fn log_is_wanted(&self) -> bool {
        !self.settles.is_empty() || !self.log.is_empty() || self.want.dedup
    }

    fn open_ledger(&mut self, log: Log) -> Job {
        match log {
            Log::Data => self.data.phase = Phase::Opening,
            Log::Cursor => self.log.phase = Phase::Opening,
        }
        let (changer, current) = (self.changer(), self.current.clone());
        async move { Done::Opened(log, changer.open(current, log).await) }.boxed()
    }

    fn begin_closing(&mut self, log: Log, open_next: bool) -> Option<Job> {
        let writer = match log {
            Log::Data => self.data.begin_closing()?,
            Log::Cursor => self.log.begin_closing()?,
        };
        Some(async move { Done::Sealed { log, open_next, sealed: writer.seal().await } }.boxed())
    }

    /// Idle, or on the way out: close the data ledger, then the cursor log; a small snapshot goes inline (C6).
    fn rest(&mut self) -> Option<Job> {
        if self.data.is_open() {
            return self.begin_closing(Log::Data, false);
        }
        if self.log.is_open() {
            return self.begin_closing(Log::Cursor, false);
        }
        let closed: Vec<LedgerId> =
            self.current.list.cursor_log.iter().map(|listed| listed.id).collect();
        if !closed.is_empty()
            && closed.len() <= LEDGERS_PER_TXN
            && let [inline] = &cursor_log::snapshot(0, &self.log_state())[..]
            && inline.len() <= INLINE_SNAPSHOT_BYTES_MAX
        {
            let (changer, current, inline) =
                (self.changer(), self.current.clone(), inline.to_vec());
            let covered = (self.data_since_dedup, *self.shared.end.borrow());
            let drop_all = async move {
                let dropped = changer.drop_cursor_ledgers(current, &closed, inline).await;
                Done::Trimmed(dropped, Some(covered))
            };
            return Some(drop_all.boxed());
        }
        self.want.rest = false;
        None
    }

    /// C4: read the snapshot back, then let the ledgers before it go.
    fn trim(&mut self, writer: LedgerWriter, last: EntryId) -> Job {
        let preempt = self.preemptible();
        let (changer, current) = (self.changer(), self.current.clone());
        let shared = Arc::clone(&self.shared);
        async move {
            let range = EntryRange { first: EntryId(0), last };
            let read = shared.view.read_back(&writer, range);
            let Some(read) = preempt.run_until_cancelled(read).await else {
                return Done::Trimmed(Err(ChangeError::NotNow(PREEMPTED.to_owned())), None);
            };
            let entries = read.unwrap_or_default();
            let mut fold = Fold::default();
            let whole = entries.iter().all(|entry| fold.apply(&entry.payload.to_bytes()).is_ok());
            if !whole || fold.complete() == 0 {
                let why = "the snapshot cannot be read back".to_owned();
                return Done::Trimmed(Err(ChangeError::NotNow(why)), None);
            }
            let listed = current.list.cursor_log.iter().map(|listed| listed.id);
            let superseded: Vec<LedgerId> =
                listed.filter(|id| *id != writer.id()).take(LEDGERS_PER_TXN).collect();
            Done::Trimmed(changer.drop_cursor_ledgers(current, &superseded, Vec::new()).await, None)
        }
        .boxed()
    }

    pub(super) async fn finish(&mut self, done: Done) {
        match done {
            Done::Opened(log, Ok((current, writer))) => {
                self.current = current;
                self.opened(log, writer);
            }
            Done::Opened(log, Err(error)) => {
                match log {
                    Log::Data => self.data.phase = Phase::Idle,
                    Log::Cursor => {
                        self.log.phase = Phase::Idle;
                        self.drop_leases();
                    }
                }
                match error {
                    ChangeError::Fenced(why) => self.fence(&why),
                    ChangeError::NotNow(why) => {
                        self.refusal = why;
                        self.retry_at = Some(Instant::now() + RETRY_PAUSE);
                    }
                }
            }
            Done::Sealed { log, open_next, sealed: Ok(sealed) } => {
                self.sealed(log, open_next, sealed).await
            }
            Done::Sealed { sealed: Err(error), .. } => self.fence(&error.to_string()),
            Done::Closed(log, Ok((current, next))) => self.closed(log, current, next),
            Done::Trimmed(Ok(current), covered) => {
                self.current = current;
                if let Some((bytes, next)) = covered {
                    self.data_since_dedup -= bytes.min(self.data_since_dedup);
                    self.tier.dedup.inline(next);
                }
                self.show();
            }
            Done::Tier(done) => self.tier_done(done),
            Done::View(changed) => self.view_changed(changed),
            // Nothing happened, and nothing depends on it: the next snapshot or rest tries again.
            Done::Trimmed(Err(ChangeError::NotNow(why)), _) => {
                tracing::info!(topic = self.shared.segment.topic.0, why, "cursor log not trimmed");
                self.want.rest = false;
            }
            Done::Closed(_, Err(error)) | Done::Trimmed(Err(error), _) => {
                self.fence(&error.to_string())
            }
        }
    }

    fn opened(&mut self, log: Log, writer: LedgerWriter) {
        self.refusal.clear();
        match log {
            Log::Data => {
                self.want.roll_data = false; // that was about the ledger before
                self.data_ledger =
                    OpenLedger { opened_at: Some(Instant::now()), counts: Counts::default() };
                *self.shared.open_counts.lock() = Counts::default();
                self.data.open(writer);
            }
            Log::Cursor => {
                (self.want.roll_log, self.want.trim_after) = (false, None);
                self.log.open(writer);
                self.delta_bytes = 0;
                // C5: every cursor-log ledger starts with a full snapshot, before what waits is sent again.
                self.requeue_groups();
                self.want.snapshot = true;
            }
        }
        self.show();
    }

    /// The ledger ends here. Every append is answered by now; what was acknowledged is counted before the list says so.
    async fn sealed(&mut self, log: Log, open_next: bool, sealed: Sealed) {
        let counts = match log {
            Log::Data => {
                while let Some(outcome) = self.data.appended_or_empty().await {
                    self.data_appended(outcome);
                }
                Counts { bytes: sealed.length, ..self.data_ledger.counts }
            }
            Log::Cursor => {
                while let Some(outcome) = self.log.appended_or_empty().await {
                    self.log_appended(outcome);
                }
                let entries = sealed.last.map_or(0, |last| last.0 + 1);
                Counts { entries, bytes: sealed.length, ..Counts::default() }
            }
        };
        if self.fenced.is_some() {
            return;
        }
        debug_assert_eq!(
            counts.entries,
            sealed.last.map_or(0, |last| last.0 + 1),
            "every acknowledged entry is counted"
        );
        let (changer, current) = (self.changer(), self.current.clone());
        self.job = Some(
            async move {
                Done::Closed(log, changer.close(current, log, sealed, counts, open_next).await)
            }
            .boxed(),
        );
    }

    fn closed(&mut self, log: Log, current: Current, next: Option<LedgerWriter>) {
        self.current = current;
        self.tier.due = true;
        match log {
            Log::Data => self.data.idle(),
            Log::Cursor => self.log.idle(),
        }
        match next {
            Some(writer) => {
                self.ledgers.parts().metrics.rolls.inc();
                self.opened(log, writer);
            }
            None => self.show(),
        }
        // A load replays from here, unless all goes to rest (DD2, C5).
        self.want.dedup |= log == Log::Data && !self.want.rest && self.data_since_dedup > 0;
    }

    /// Readers see the list and the open ledger as they are now.
    pub(super) fn show(&self) {
        self.shared.view.update(&self.current.list, self.data.writer().cloned());
    }

    // ---- without a ledger ----

    /// Remembers since when each log has something to write and no ledger for it.
    pub(super) fn note_waiting(&mut self) {
        // Nobody waits for leases: patience with what others wait for is not shortened by them.
        let wanted = self.settles_awaited() || !self.log.is_empty() || self.want.dedup;
        self.log.note_waiting(wanted);
        let wanted = !self.data.is_empty();
        self.data.note_waiting(wanted);
    }

    pub(super) fn patience_ends(&self) -> Option<Instant> {
        let since =
            [self.data.waiting_since(), self.log.waiting_since()].into_iter().flatten().min()?;
        Some(since + self.ledgers.parts().config.create_patience)
    }

    /// No ledger could be made for long: whoever waits for one is told. Nothing of theirs was sent, or the ledger it was
    /// sent to was closed below it, so it is certain not to be stored (DD1: pushed := persisted).
    pub(super) fn out_of_patience(&mut self) {
        let patience = self.ledgers.parts().config.create_patience;
        let over = |since: Option<Instant>| since.is_some_and(|since| since.elapsed() >= patience);
        let why = match &self.refusal[..] {
            "" => "the metadata store does not answer".to_owned(),
            why => why.to_owned(),
        };
        let segment = self.shared.segment;
        tracing::warn!(
            topic = segment.topic.0,
            segment = segment.segment,
            why,
            "no ledger for what waits"
        );
        if over(self.data.waiting_since()) {
            self.next_offset = self.current.list.closed_end();
            self.window.forget_pending();
            self.fail_batches(&PublishError::NotEnoughBookies(why.clone()));
        }
        if over(self.log.waiting_since()) {
            self.want.dedup = false; // the next batch asks for it again
            self.fail_settles(&SettleError::NotEnoughBookies(why));
        }
    }
}
