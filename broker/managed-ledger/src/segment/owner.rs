//! The owner of a segment's state: list, open ledgers, chain, cursors. One task, one loop; every event is applied at once.
//! What it does with a batch stands in `publish.rs`, with a cursor in `cursors.rs`, with the list in `jobs.rs`.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use geminga_bookie_client::{LedgerWriter, Poison, entry::Payload};
use geminga_proto::{
    ids::{EntryId, LedgerId, Offset, SubscriptionId},
    storage::v1::DedupSnapshot,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, MissedTickBehavior, interval_at, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    Command, Loaded, Shared,
    compact::{Compact, CompactEvent},
    cursors::{Group, Queued, Waiting},
    jobs::{Done, Job, RETRY_PAUSE},
    lane::{Lane, LaneEvent},
    limits::Limits,
    publish::{Answer, Item, Opening},
    tier::{Tier, TierEvent},
};
use crate::{
    change::Current,
    cursor_log::LogState,
    dedup::Window,
    entry_header,
    error::{ProducerError, PublishError, SettleError},
    factory::ManagedLedgers,
    list::{Counts, Log},
    types::{Status, Stored},
};

/// How often time-driven duties are looked at.
const TICK: Duration = Duration::from_secs(10);

pub(super) struct Owner {
    pub(super) ledgers: ManagedLedgers,
    pub(super) shared: Arc<Shared>,
    pub(super) current: Current,
    pub(super) data: Lane<Item>,
    pub(super) log: Lane<Group>,
    pub(super) job: Option<Job>,
    /// Ends what a job still reads before its list change: a more urgent change waits.
    pub(super) preempt: CancellationToken,
    /// Jobs that read first, so far.
    pub(super) reads_begun: u32,
    /// When ledgers were last looked at while the store did not answer.
    pub(super) probed_at: Option<Instant>,
    /// Not before this is the next list change tried, after one that did not happen.
    pub(super) retry_at: Option<Instant>,
    /// Why the last ledger could not be made.
    pub(super) refusal: String,
    pub(super) window: Window,
    /// The offset of the next batch taken up.
    pub(super) next_offset: Offset,
    /// The publish time of the last entry taken up.
    pub(super) last_publish_ms: u64,
    /// Receipts of batches that are durable, until the end has moved.
    pub(super) receipts: Vec<(Answer<Stored, PublishError>, Stored)>,
    /// Streams that open when what is on its way of their producers is settled.
    pub(super) openings: Vec<Opening>,
    /// Streams whose grant is durable, until the end has moved.
    pub(super) granted: Vec<Opening>,
    pub(super) settles: VecDeque<Waiting>,
    /// What records that wait or are under way add to cursors.
    pub(super) queued: BTreeMap<SubscriptionId, Queued>,
    /// Runs of leases among them that nobody waits for, and how many records of them wait.
    pub(super) queued_leases: usize,
    pub(super) lease_records: usize,
    /// Cursors that were reset, until their state is written once more.
    pub(super) restate: BTreeSet<SubscriptionId>,
    /// Entries of the cursor log that the load found lost.
    pub(super) lost: u64,
    pub(super) want: Want,
    pub(super) tier: Tier,
    pub(super) compact: Compact,
    pub(super) limits: Limits,
    pub(super) data_ledger: OpenLedger,
    pub(super) snapshot_bytes: u64,
    pub(super) delta_bytes: u64,
    /// Data bytes that a load would replay (DD2).
    pub(super) data_since_dedup: u64,
    /// Stored since the backlog was told.
    pub(super) stored_bytes: u64,
    pub(super) last_activity: Instant,
    pub(super) closing: Option<Vec<oneshot::Sender<()>>>,
    pub(super) fenced: Option<String>,
    /// The last handle is gone.
    abandoned: bool,
    _serving: Serving,
}

/// What the loop should get done when nothing else runs.
#[derive(Debug, Default)]
pub(super) struct Want {
    pub(super) roll_data: bool,
    pub(super) roll_log: bool,
    /// Close the ledgers: idle, or on the way out.
    pub(super) rest: bool,
    pub(super) snapshot: bool,
    /// The deduplication window goes into the cursor log (DD2).
    pub(super) dedup: bool,
    /// Superseded cursor-log ledgers may go, once the snapshot up to this entry is read back (C4).
    pub(super) trim_after: Option<EntryId>,
}

/// What is confirmed in the open data ledger.
#[derive(Debug, Default)]
pub(super) struct OpenLedger {
    pub(super) opened_at: Option<Instant>,
    pub(super) counts: Counts,
}

/// Says so when the owner ends in any way it was not meant to, a panic or an abort before its task ever ran: whoever holds the
/// segment loads it anew.
struct Serving(Arc<Shared>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.status.send_if_modified(|status| {
            let unsaid = matches!(status, Status::Serving);
            if unsaid {
                *status = Status::Fenced("its owner's task ended".to_owned());
            }
            unsaid
        });
    }
}

impl Owner {
    pub(super) fn new(ledgers: ManagedLedgers, shared: Arc<Shared>, loaded: Loaded) -> Self {
        let next_offset = loaded.current.list.closed_end();
        let mut stamped =
            loaded.current.list.data.iter().rev().map(|listed| listed.counts.last_publish_ms);
        let last_publish_ms = stamped.find(|at_ms| *at_ms > 0).unwrap_or(0);
        ledgers.parts().metrics.segments.inc();
        let tier = Tier::new(shared.policy.subscribe(), loaded.dedup_next);
        Self {
            _serving: Serving(Arc::clone(&shared)),
            ledgers,
            shared,
            current: loaded.current,
            data: Lane::new(),
            log: Lane::new(),
            job: None,
            preempt: CancellationToken::new(),
            reads_begun: 0,
            probed_at: None,
            retry_at: None,
            refusal: String::new(),
            window: loaded.window,
            next_offset,
            last_publish_ms,
            receipts: Vec::new(),
            openings: Vec::new(),
            granted: Vec::new(),
            settles: VecDeque::new(),
            queued: BTreeMap::new(),
            queued_leases: 0,
            lease_records: 0,
            restate: BTreeSet::new(),
            lost: loaded.lost,
            want: Want::default(),
            tier,
            compact: Compact::new(),
            limits: Limits::default(),
            data_ledger: OpenLedger::default(),
            snapshot_bytes: 0,
            delta_bytes: 0,
            data_since_dedup: loaded.replayed_bytes,
            stored_bytes: 0,
            last_activity: Instant::now(),
            closing: None,
            fenced: None,
            abandoned: false,
        }
    }

    /// Serves until the segment is fenced or closed, or nobody holds it any more.
    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let token = self.ledgers.cancel();
        let mut stopped = pin!(token.cancelled());
        let mut standing_turns = pin!(self.standing_turns());
        let mut tick = interval_at(Instant::now() + TICK, TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while self.fenced.is_none() {
            self.progress();
            if self.is_closed() {
                break;
            }
            let patience_ends = self.patience_ends();
            let probe_at = self.probe_at();
            let hold_ends = self.limits.hold_ends(self.ledgers.parts().config.create_patience);
            tokio::select! {
                biased;
                () = &mut stopped => self.fence("the broker is stopping"),
                done = finished(&mut self.job) => self.finish(done).await,
                event = self.data.next() => match event {
                    LaneEvent::Poisoned(poison) => self.poisoned(Log::Data, poison),
                    LaneEvent::Appended(outcome) => self.data_appended(outcome),
                    LaneEvent::Room => {}
                },
                event = self.log.next() => match event {
                    LaneEvent::Poisoned(poison) => self.poisoned(Log::Cursor, poison),
                    LaneEvent::Appended(outcome) => self.log_appended(outcome),
                    LaneEvent::Room => {}
                },
                command = commands.recv(), if self.takes_commands() => match command {
                    Some(command) => {
                        self.apply(command);
                        while self.takes_commands() && let Ok(command) = commands.try_recv() {
                            self.apply(command);
                        }
                    }
                    None => {
                        self.abandoned = true;
                        self.begin_close(None);
                    }
                },
                event = self.tier.next() => match event {
                    TierEvent::PolicySet => {
                        (self.tier.due, self.compact.due) = (true, true);
                        self.watch_backlog();
                    }
                    TierEvent::UploadEnded(outcome) => self.upload_ended(outcome),
                },
                event = self.compact.next() => match event {
                    CompactEvent::Asked => {}
                    CompactEvent::Ended(result) => self.compaction_ended(result),
                },
                found = self.limits.searched() => self.expire(found),
                () = until(hold_ends) => self.refuse_held(),
                () = &mut standing_turns => {
                    self.probed_at = None;
                    standing_turns.set(self.standing_turns());
                }
                () = until(probe_at) => self.probe(),
                () = until(self.retry_at) => self.retry_at = None,
                () = until(patience_ends) => self.out_of_patience(),
                _ = tick.tick() => self.on_tick(),
            }
        }
        self.end(commands);
    }

    /// What waits here is bounded: past that the queue of commands fills up, and callers hear `Busy`.
    fn takes_commands(&self) -> bool {
        let waiting_max = self.ledgers.parts().config.commands_max;
        !self.abandoned && self.settles.len() < waiting_max && self.data.waiting() < waiting_max
    }

    fn apply(&mut self, command: Command) {
        match command {
            Command::Publish(batch, answer) => self.publish(batch, answer),
            Command::OpenProducer(open, answer) => self.open_producer(open, answer),
            Command::Cursor(change, answer) => self.change_cursor(change, answer),
            Command::Leases(id, leases) => self.log_leases(id, &leases),
            Command::Offload(roll, watcher) => self.begin_offload(roll, watcher),
            Command::Compact(watcher) => self.compact_now(watcher),
            Command::Roll(ledger) => self.roll(ledger),
            Command::Close(answer) => self.begin_close(Some(answer)),
        }
    }

    fn roll(&mut self, ledger: LedgerId) {
        let is_open = |writer: Option<&LedgerWriter>| writer.is_some_and(|w| w.id() == ledger);
        self.want.roll_data |= self.data.is_open() && is_open(self.data.writer());
        self.want.roll_log |= self.log.is_open() && is_open(self.log.writer());
    }

    fn poisoned(&mut self, log: Log, poison: Poison) {
        if poison != Poison::WriteFailure {
            return self.fence(&poison.to_string());
        }
        let writer = match log {
            Log::Data => {
                self.want.roll_data = true;
                self.data.writer()
            }
            Log::Cursor => {
                self.want.roll_log = true;
                self.log.writer()
            }
        };
        // Not a single entry: the next ledger may fare no better, and one ledger a round trip would help nobody.
        if writer.is_some_and(|writer| writer.lac().is_none()) {
            self.retry_at = Some(Instant::now() + RETRY_PAUSE);
        }
    }

    /// Starts whatever can be started; level-triggered.
    fn progress(&mut self) {
        self.form_group();
        self.data.send(|item| match item {
            Item::Batch(batch) => Payload {
                trace: batch.trace,
                ..entry_header::encode(&batch.header, batch.payload.clone())
            },
            Item::Control(header, _) => entry_header::encode(header, Bytes::new()),
        });
        self.log.send(Group::payload);
        // Looked at here as well: while other events keep coming the timer's turn may not.
        self.retry_at.take_if(|at| *at <= Instant::now());
        // Every fourth one comes to its end all the same: what it frees is wanted, too.
        if self.job.is_some() && self.change_is_urgent() && !self.reads_begun.is_multiple_of(4) {
            self.preempt.cancel();
        }
        if self.job.is_none() && self.retry_at.is_none() && self.may_change() {
            self.job = self.next_job();
        }
        self.start_compaction();
        self.note_waiting();
    }

    pub(super) fn dedup_state(&self) -> DedupSnapshot {
        let snapshot = self.window.snapshot(*self.shared.end.borrow());
        let (ledger, entries) = match (self.data.writer(), self.current.list.data.last()) {
            (Some(writer), _) => (writer.id(), self.data_ledger.counts.entries),
            (None, Some(last)) => (last.id, last.counts.entries),
            (None, None) => return snapshot,
        };
        DedupSnapshot { ledger: ledger.0, entries, ..snapshot }
    }

    pub(super) fn log_state(&self) -> LogState {
        let cursors = self.shared.cursors.lock().clone();
        LogState { cursors, dedup: self.dedup_state(), lost: 0 }
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.data.is_empty() && self.log.is_empty() && self.settles.is_empty() && !self.want.dedup
    }

    /// Somebody uses the segment: it does not go to rest, unless it was told to close.
    pub(super) fn note_activity(&mut self) {
        self.last_activity = Instant::now();
        self.want.rest &= self.closing.is_some();
    }

    fn on_tick(&mut self) {
        let config = &self.ledgers.parts().config;
        let old = self.data_ledger.opened_at.is_some_and(|at| at.elapsed() >= config.roll_age);
        self.want.roll_data |= old && self.data.is_open() && self.data_ledger.counts.entries > 0;
        let session_idle_ms = config.session_idle.as_millis() as u64;
        if self.last_activity.elapsed() >= config.idle_after
            && (self.data.is_open() || self.log.is_open())
        {
            self.want.rest = true;
        }
        (self.tier.due, self.compact.due) = (true, true);
        self.shared.view.expire_caches();
        self.watch_backlog();
        self.note_ended_streams();
        self.window.expire_sessions(self.now_ms().saturating_sub(session_idle_ms));
    }

    pub(super) fn note_ended_streams(&mut self) {
        let now_ms = self.now_ms();
        for (producer, stream) in std::mem::take(&mut *self.shared.ended_streams.lock()) {
            self.window.disconnected(&producer, stream, now_ms);
        }
    }

    fn begin_close(&mut self, answer: Option<oneshot::Sender<()>>) {
        self.closing.get_or_insert_with(Vec::new).extend(answer);
        self.fail_held(&PublishError::Closed);
        self.compact.stop();
        self.want.rest = true;
    }

    fn is_closed(&self) -> bool {
        self.closing.is_some() && !self.want.rest && self.job.is_none() && self.is_quiet()
    }

    /// Nothing is served any more; what is in flight is indeterminate.
    pub(super) fn fence(&mut self, why: &str) {
        self.fenced.get_or_insert_with(|| why.to_owned());
    }

    fn end(mut self, mut commands: mpsc::Receiver<Command>) {
        let metrics = &self.ledgers.parts().metrics;
        metrics.segments.dec();
        let segment = self.shared.segment;
        let status = match &self.fenced {
            Some(why) => {
                metrics.fenced.inc();
                tracing::warn!(
                    topic = segment.topic.0,
                    segment = segment.segment,
                    why,
                    "segment fenced"
                );
                Status::Fenced(why.clone())
            }
            None => Status::Closed,
        };
        self.shared.status.send_replace(status);
        commands.close();
        while let Ok(command) = commands.try_recv() {
            match command {
                Command::Publish(_, answer) => drop(answer.send(Err(PublishError::Fenced))),
                Command::OpenProducer(_, answer) => drop(answer.send(Err(ProducerError::Fenced))),
                Command::Cursor(_, answer) => drop(answer.send(Err(SettleError::Fenced))),
                Command::Offload(_, watcher) | Command::Compact(watcher) => drop(watcher),
                Command::Roll(_) | Command::Leases(..) => {}
                Command::Close(answer) => drop(answer.send(())),
            }
        }
        self.fail_openings(&ProducerError::Fenced);
        self.fail_held(&PublishError::Fenced);
        self.fail_batches(&PublishError::Fenced);
        self.fail_settles(&SettleError::Fenced);
        for answer in self.closing.take().into_iter().flatten() {
            let _ = answer.send(());
        }
    }

    pub(super) fn now_ms(&self) -> u64 {
        self.ledgers.parts().clock.now().0
    }
}

async fn finished(job: &mut Option<Job>) -> Done {
    match job {
        Some(running) => {
            let done = running.await;
            *job = None;
            done
        }
        None => std::future::pending().await,
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}
