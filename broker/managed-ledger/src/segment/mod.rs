//! A segment in service: a handle for many, and one task that owns the state.
//!
//! ```text
//! publish ─┐                       ┌─► data ledger      ─► end moves, receipt
//! settle  ─┼─► owner: chain, offset ┤
//! open    ─┘                       └─► cursor-log ledger ─► cursor moves, answer
//! read ─────► view of what is confirmed (no owner)
//! ```

mod compact;
mod cursors;
mod jobs;
mod lane;
mod limits;
mod outage;
mod owner;
mod publish;
mod tier;
mod tiering;

use std::{collections::BTreeMap, sync::Arc};

use geminga_proto::{
    ids::{Epoch, LedgerId, Offset, SegmentId, SubscriptionId},
    v1::DurabilityLevel,
};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    backlog::{self, Backlog},
    change::Current,
    cursor::Cursor,
    dedup::{ProducerId, Window},
    error::{ProducerError, PublishError, ReadError, SettleError},
    factory::ManagedLedgers,
    list::{Counts, HandleKey},
    offload::TierPolicy,
    read::View,
    types::{
        CursorView, DeadLetterCounts, LeaseRecord, Outcome, ProducerOpen, ProducerOpened,
        PublishBatch, RedeliveryView, Settlement, Start, Stats, Status, Stored, StoredBatch,
        TierProgress, Waiting,
    },
};

/// A loaded segment. Clones share it; it serves until it is fenced or closed, and closes when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct ManagedLedger {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
}

/// What the owner and its readers share.
#[derive(Debug)]
pub(crate) struct Shared {
    ledgers: ManagedLedgers,
    segment: SegmentId,
    epoch: Epoch,
    ack_quorum: usize,
    handle_key: HandleKey,
    view: Arc<View>,
    /// None until somebody decides (see [`TierPolicy`]).
    policy: watch::Sender<Option<TierPolicy>>,
    tier_errors: Mutex<tier::TierErrors>,
    end: watch::Sender<Offset>,
    /// What is confirmed in the open data ledger.
    open_counts: Mutex<Counts>,
    status: watch::Sender<Status>,
    /// As they are durable.
    cursors: Mutex<BTreeMap<SubscriptionId, Cursor>>,
    /// Messages that the policy settled, of cursors that are there.
    evicted: Mutex<BTreeMap<SubscriptionId, u64>>,
    /// Streams of producers that ended, until the owner takes note: no more than there were streams.
    ended_streams: Mutex<Vec<(ProducerId, u64)>>,
}

/// What the owner is asked.
#[derive(Debug)]
enum Command {
    Publish(PublishBatch, oneshot::Sender<Result<Stored, PublishError>>),
    OpenProducer(ProducerOpen, oneshot::Sender<Result<ProducerOpened, ProducerError>>),
    /// Nobody waits for these (L2).
    Leases(SubscriptionId, Vec<LeaseRecord>),
    Cursor(CursorChange, oneshot::Sender<Result<Offset, SettleError>>),
    /// Whether the open ledger is rolled first; who listens.
    Offload(bool, mpsc::Sender<TierProgress>),
    /// Compact up to the end; who listens.
    Compact(mpsc::Sender<TierProgress>),
    /// Close this ledger and go on in the next, if it is open.
    Roll(LedgerId),
    Close(oneshot::Sender<()>),
}

/// A change of one cursor.
#[derive(Clone, Debug)]
enum CursorChange {
    Create(SubscriptionId, Start),
    Remove(SubscriptionId),
    Settle(SubscriptionId, Settlement),
}

/// What a load found.
pub(crate) struct Loaded {
    pub(crate) current: Current,
    pub(crate) window: Window,
    /// Data bytes that were replayed, as the next load would (DD2).
    pub(crate) replayed_bytes: u64,
    /// Where that began: trims never pass it.
    pub(crate) dedup_next: Offset,
    /// Entries of the cursor log that are lost.
    pub(crate) lost: u64,
}

/// Starts the owner of a loaded segment.
pub(crate) fn start(
    ledgers: ManagedLedgers,
    segment: SegmentId,
    view: Arc<View>,
    cursors: BTreeMap<SubscriptionId, Cursor>,
    loaded: Loaded,
) -> ManagedLedger {
    let config = &ledgers.parts().config;
    let (commands, received) = mpsc::channel(config.commands_max);
    let shared = Arc::new(Shared {
        ledgers: ledgers.clone(),
        segment,
        epoch: loaded.current.list.epoch,
        ack_quorum: config.quorum.ack(),
        handle_key: loaded.current.list.handle_key,
        view,
        policy: watch::Sender::new(None),
        tier_errors: Mutex::default(),
        end: watch::Sender::new(loaded.current.list.closed_end()),
        open_counts: Mutex::default(),
        status: watch::Sender::new(Status::Serving),
        cursors: Mutex::new(cursors),
        evicted: Mutex::default(),
        ended_streams: Mutex::default(),
    });
    let owner = owner::Owner::new(ledgers.clone(), Arc::clone(&shared), loaded);
    ledgers.parts().tasks.spawn("segment", owner.run(received));
    ManagedLedger { shared, commands }
}

impl ManagedLedger {
    /// The ownership epoch (O2).
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.shared.epoch
    }

    /// What a receipt of this segment promises.
    #[must_use]
    pub fn level(&self) -> DurabilityLevel {
        if self.shared.ack_quorum >= 2 { DurabilityLevel::Quorum } else { DurabilityLevel::OneCopy }
    }

    /// Whether it serves.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Status> {
        self.shared.status.subscribe()
    }

    /// The confirmed end: the offset after the last acknowledged message. Wakes whoever waits for more.
    #[must_use]
    pub fn end(&self) -> watch::Receiver<Offset> {
        self.shared.end.subscribe()
    }

    /// The first offset kept.
    #[must_use]
    pub fn first_offset(&self) -> Offset {
        self.shared.view.first_offset()
    }

    /// Figures.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let list = self.shared.view.list();
        let closed: u64 = list.data.iter().map(|listed| listed.counts.bytes).sum();
        Stats {
            first_offset: self.first_offset(),
            next_offset: *self.shared.end.borrow(),
            ledgers: list.data.len(),
            stored_bytes: closed + self.shared.view.open_bytes(),
        }
    }

    /// Stores a batch (DD1, DD3, DD5). Batches are taken up in the order of the calls; the future resolves when the batch is
    /// durable, or is certain or unable to be. Dropping it abandons the answer, not the batch.
    #[must_use]
    pub fn publish(&self, batch: PublishBatch) -> Outcome<Stored, PublishError> {
        let (answer, outcome) = oneshot::channel();
        let busy = PublishError::Busy;
        self.command(Command::Publish(batch, answer), outcome, busy, || PublishError::Fenced)
    }

    /// Opens a stream of batches.
    ///
    /// # Errors
    /// [`ProducerError`].
    pub async fn open_producer(&self, open: ProducerOpen) -> Result<ProducerOpened, ProducerError> {
        let (answer, outcome) = oneshot::channel();
        let asked = self.commands.send(Command::OpenProducer(open, answer)).await;
        asked.map_err(|_| ProducerError::Fenced)?;
        outcome.await.unwrap_or(Err(ProducerError::Fenced))
    }

    /// The stream that was opened under this number has ended. A session producer is remembered for a time after its last
    /// stream (DD4).
    pub fn producer_gone(&self, producer: &ProducerId, stream_number: u64) {
        self.shared.ended_streams.lock().push((producer.clone(), stream_number));
    }

    /// Settles messages; resolves with the first unsettled offset once the record is durable (C3). In order of the calls.
    #[must_use]
    pub fn settle(
        &self,
        subscription: SubscriptionId,
        settlement: Settlement,
    ) -> Outcome<Offset, SettleError> {
        self.change_cursor(CursorChange::Settle(subscription, settlement))
    }

    /// Logs messages that were delivered (L2): asynchronous, in the order of the calls with [`Self::settle`], never waited
    /// for, and dropped first under pressure: when the owner has much to do, at a cursor's limit, with a ledger that fails.
    pub fn log_leases(&self, subscription: SubscriptionId, leases: Vec<LeaseRecord>) {
        // The other half of the queue is for those who wait.
        if self.commands.capacity() > self.commands.max_capacity() / 2 {
            let _dropped = self.commands.try_send(Command::Leases(subscription, leases));
        }
    }

    /// The redelivery state of a cursor as it is durable now; none without a cursor.
    #[must_use]
    pub fn redelivery(&self, subscription: SubscriptionId) -> Option<RedeliveryView> {
        self.shared.cursors.lock().get(&subscription).map(Cursor::redelivery)
    }

    /// How many messages of a cursor were decided to be dead letters, and whether some still wait for their copy.
    #[must_use]
    pub fn dead_letters(&self, subscription: SubscriptionId) -> Option<DeadLetterCounts> {
        self.shared.cursors.lock().get(&subscription).map(Cursor::dead_letters)
    }

    /// How many messages of a cursor the time to live or a backlog quota settled, and not a consumer, since this owner loaded
    /// the segment.
    #[must_use]
    pub fn evicted(&self, subscription: SubscriptionId) -> u64 {
        self.shared.evicted.lock().get(&subscription).copied().unwrap_or(0)
    }

    /// The first offset that a cursor has not settled, as it is durable now.
    #[must_use]
    pub fn mark_delete_next(&self, subscription: SubscriptionId) -> Option<Offset> {
        self.shared.cursors.lock().get(&subscription).map(Cursor::mark_delete_next)
    }

    /// Signs the handles of deliveries (L4): drawn once, the same for all owners of the segment. A secret.
    #[must_use]
    pub fn handle_key(&self) -> [u8; 32] {
        self.shared.handle_key.0
    }

    /// Makes a cursor, durably; one that exists stays as it is.
    ///
    /// # Errors
    /// [`SettleError`].
    pub async fn create_cursor(
        &self,
        subscription: SubscriptionId,
        start: Start,
    ) -> Result<(), SettleError> {
        self.change_cursor(CursorChange::Create(subscription, start)).await.map(drop)
    }

    /// Removes a cursor, durably; a missing one is fine.
    ///
    /// # Errors
    /// [`SettleError`].
    pub async fn remove_cursor(&self, subscription: SubscriptionId) -> Result<(), SettleError> {
        self.change_cursor(CursorChange::Remove(subscription)).await.map(drop)
    }

    fn change_cursor(&self, change: CursorChange) -> Outcome<Offset, SettleError> {
        let (answer, outcome) = oneshot::channel();
        self.command(Command::Cursor(change, answer), outcome, SettleError::Busy, || {
            SettleError::Fenced
        })
    }

    /// The cursor as it is durable now.
    #[must_use]
    pub fn cursor(&self, subscription: SubscriptionId) -> Option<CursorView> {
        let end = *self.shared.end.borrow();
        self.shared.cursors.lock().get(&subscription).map(|cursor| cursor.view(end))
    }

    /// What lies from `from` to the end, for metrics: bytes and age are estimates.
    #[must_use]
    pub fn backlog(&self, from: Offset) -> Backlog {
        let open = *self.shared.open_counts.lock();
        backlog::estimate(&self.shared.view.list(), &open, from)
    }

    /// Confirmed batches from the one that contains `from` on: at least one if there is any, about `bytes_max` payload bytes
    /// or `messages_max` messages. Cancel-safe.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn read(
        &self,
        from: Offset,
        bytes_max: usize,
        messages_max: usize,
    ) -> Result<Vec<StoredBatch>, ReadError> {
        let end = *self.shared.end.borrow();
        let answer = self.shared.view.read(from, end, bytes_max, messages_max).await;
        match (&answer, &*self.shared.status.borrow()) {
            (Err(_), Status::Fenced(_)) => Err(ReadError::Fenced),
            (Ok(batches), _) => {
                self.note_read(batches);
                answer
            }
            _ => answer,
        }
    }

    fn note_read(&self, batches: &[StoredBatch]) {
        let bytes = batches.iter().map(|batch| batch.payload.len() as u64).sum();
        self.shared.ledgers.note_traffic(bytes);
    }

    /// The first message published at or after `time_ms` (wall clock, ms): where a seek by time goes. The first kept if all
    /// are younger, the confirmed end if all are older. Reads about log2 of one ledger's entries. Cancel-safe.
    ///
    /// Publish times of a segment do not fall, also from owner to owner: a clock that is behind by less than an hour stamps the
    /// time stamped last. So the answer is exact. Where a clock was set back further, times fall once; then the answer is a
    /// message published at or after the time whose predecessor was not, in the oldest ledger that ends at or after it.
    ///
    /// # Errors
    /// [`ReadError`]; call again after [`ReadError::Unavailable`].
    pub async fn offset_at_time(&self, time_ms: u64) -> Result<Offset, ReadError> {
        let open = *self.shared.open_counts.lock();
        let end = *self.shared.end.borrow();
        let answer = self.shared.view.offset_at_time(time_ms, open, end).await;
        match (&answer, &*self.shared.status.borrow()) {
            (Err(_), Status::Fenced(_)) => Err(ReadError::Fenced),
            _ => answer,
        }
    }

    /// Closes this ledger, data or cursor log, and goes on in the next, if it is the open one: its missing copies can be made
    /// then (A3). Asks only; whoever needs it asks again.
    pub fn roll(&self, ledger: LedgerId) {
        let _asked_again_later = self.commands.try_send(Command::Roll(ledger));
    }

    /// Clean end: what is pending is finished, the ledgers are closed. Idempotent.
    pub async fn close(&self) {
        let (answer, done) = oneshot::channel();
        if self.commands.send(Command::Close(answer)).await.is_ok() {
            let _ = done.await;
        }
    }

    fn command<T, E>(
        &self,
        command: Command,
        outcome: oneshot::Receiver<Result<T, E>>,
        busy: E,
        gone: fn() -> E,
    ) -> Outcome<T, E> {
        match self.commands.try_send(command) {
            Ok(()) => Outcome(Waiting::Later(outcome, gone)),
            Err(mpsc::error::TrySendError::Full(_)) => Outcome(Waiting::Now(Some(Err(busy)))),
            Err(mpsc::error::TrySendError::Closed(_)) => Outcome(Waiting::Now(Some(Err(gone())))),
        }
    }
}
