//! What callers of a managed ledger say and hear.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use geminga_metadata::{Key, Revision};
use geminga_proto::{
    ids::{LedgerId, Offset},
    names::ProducerName,
    storage::v1::EntryHeader,
    v1::RecordIndex,
};
use geminga_runtime::{budget::Permit, telemetry::TraceContext};
use tokio::sync::oneshot;

use crate::{compaction::runs, dedup::ProducerId};

/// The bundle's claim under which a segment is loaded. A hint (O1): it is compared for an early refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    pub key: Key,
    pub create_revision: Revision,
}

/// Whether a managed ledger serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    Serving,
    /// Another owner took it, or its ledger cannot be closed: what was in flight is indeterminate, load it again.
    Fenced(String),
    /// Closed by its owner.
    Closed,
}

/// Who opens a stream of batches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProducerIdentity {
    /// A name the user chose; its window is kept.
    Named(ProducerName),
    /// A new session; the server draws the name (DD4).
    Session,
    /// A session opened before, by its token.
    Resume(Bytes),
}

/// Who may publish to the segment beside a producer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    #[default]
    Shared,
    /// Nobody, while its stream is open. Refused while a stream of another producer is.
    Exclusive,
    /// As exclusive; the others are fenced instead. That outlives the owner: a fenced session, or a named producer that goes on
    /// from an epoch it holds, stays out. Named producers only.
    ExclusiveWithFencing,
}

/// Opens a stream of batches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProducerOpen {
    pub identity: ProducerIdentity,
    /// Must not fall for one producer (DD5). A named producer is granted a new epoch for a higher one (DD4).
    pub stream_number: u64,
    pub access: Access,
    /// A named producer that comes back: the epoch it was told. Refused if the name has got a later one since, or if it was
    /// fenced. None: it begins anew.
    pub held_epoch: Option<u64>,
}

impl ProducerOpen {
    /// A shared stream that begins anew.
    #[must_use]
    pub fn shared(identity: ProducerIdentity, stream_number: u64) -> Self {
        Self { identity, stream_number, access: Access::Shared, held_epoch: None }
    }
}

/// An open stream of batches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProducerOpened {
    pub id: ProducerId,
    pub name: String,
    /// Resumes a session; empty for a named producer, whose name does.
    pub token: Bytes,
    /// Of a named producer, from 1 (DD4); 0 for a session.
    pub epoch: u64,
    /// Everything at or below is stored (DD1).
    pub persisted: u64,
}

/// One batch to store.
#[derive(Debug)]
pub struct PublishBatch {
    pub producer: ProducerId,
    pub stream_number: u64,
    pub prev: u64,
    pub lo: u64,
    pub hi: u64,
    pub count: u32,
    /// `PayloadFormat` and `Codec`, as numbers of the wire.
    pub format: i32,
    pub codec: i32,
    pub uncompressed_size: u32,
    pub index: RecordIndex,
    pub payload: Bytes,
    /// Stored only if its first message gets this offset. A repeat of what is stored is a duplicate all the same.
    pub expected_offset: Option<Offset>,
    /// W3C traceparent of the send, stored with the batch; empty: the trace is not recorded.
    pub traceparent: String,
    /// The span that the adds of this batch are below.
    pub trace: Option<TraceContext>,
    /// The payload's bytes in the caller's budget; given back at the outcome.
    pub permit: Permit,
}

/// The batch is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// None for a duplicate whose place is not remembered.
    pub base_offset: Option<Offset>,
    pub count: u32,
    pub duplicate: bool,
}

/// Where a new cursor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// The oldest message kept.
    Earliest,
    /// After the newest message.
    Latest,
}

/// What a consumer settles.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// These inclusive ranges.
    Accept(Vec<(Offset, Offset)>),
    /// Everything at or below.
    UpTo(Offset),
    /// The attempts of these messages ended: durable before they are delivered again (L1, L3). Replaces pending and lease
    /// entries of the offsets; what is settled or decided to be dead stays so.
    Redeliver(Vec<Redelivery>),
    /// These messages go to the dead-letter topic. Numbers follow [`RedeliveryView::dead_letters`] without a gap, counting
    /// decisions that are still on their way to the log. The message is settled by an `Accept` once its copy is stored.
    DeadLetter(Vec<DeadLetter>),
    /// The whole table of a key-shared subscription (L5): acknowledged before it takes effect. At most 256 KiB encoded.
    Keys(Vec<KeyOwner>),
    /// The exact lease table of a clean end (L4): replaces all.
    Leases(Vec<LeaseRecord>),
    /// A seek to this offset, or to the nearest one between the first kept and the end. Everything below counts as settled,
    /// nothing above; no redelivery state is left but the key table and the count of decisions. Begins a new reset epoch
    /// (C2): settlements called before it count for nothing after it.
    Reset(Offset),
}

/// Messages whose attempt ended: inclusive run, the number of the next delivery (from 1), and when it is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Redelivery {
    pub first: Offset,
    pub last: Offset,
    pub attempt: u32,
    /// Wall clock, ms; 0: at once.
    pub due_ms: u64,
}

/// A message that goes to the dead-letter topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// Dense per cursor, from 1: the sequence of the copy.
    pub number: u64,
    pub offset: Offset,
    /// Deliveries it had.
    pub attempt: u32,
    /// Cut after 256 bytes.
    pub reason: String,
}

/// Dead-letter decisions of a cursor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeadLetterCounts {
    /// The number of the last decision.
    pub decided: u64,
    /// Some are not settled: their copies may be missing.
    pub waiting: bool,
}

/// Who gets the messages whose key hash is in `first..=last`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyOwner {
    pub first: u32,
    pub last: u32,
    /// At most 256 bytes.
    pub consumer: String,
}

/// Messages that are with a consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseRecord {
    /// The instance.
    pub consumer: u64,
    /// At most 256 bytes.
    pub name: String,
    /// Inclusive runs.
    pub ranges: Vec<(Offset, Offset)>,
    /// The number of this delivery.
    pub attempt: u32,
    /// Restarted in full by whoever loads it; 0: as long as it is connected.
    pub left_ms: u64,
}

/// The redelivery state of a cursor, as it is durable now. Settled messages are in none of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RedeliveryView {
    /// Ascending, disjoint. Also below a lease of the same attempt: the attempt holds when the lease is lost.
    pub pending: Vec<Redelivery>,
    /// By consumer; first deliveries may be missing (L2).
    pub leases: Vec<LeaseRecord>,
    /// The last owner closed cleanly, and `leases` is all there was (L4).
    pub leases_exact: bool,
    /// Decided and not settled, by number: their copies may be missing.
    pub dead: Vec<DeadLetter>,
    /// The number of the last decision.
    pub dead_letters: u64,
    pub keys: Vec<KeyOwner>,
    /// Rises with each reset (C2).
    pub reset_epoch: u64,
}

/// A cursor as it is durable now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CursorView {
    /// The first offset that is not settled.
    pub mark_delete_next: Offset,
    /// What is settled above it: inclusive runs, ascending.
    pub holes: Vec<(Offset, Offset)>,
    /// Messages not settled.
    pub backlog: u64,
}

/// A stored batch.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredBatch {
    pub base_offset: Offset,
    pub header: EntryHeader,
    pub payload: Bytes,
}

impl StoredBatch {
    /// The offset after its last message.
    #[must_use]
    pub fn end(&self) -> Offset {
        self.base_offset.advance(u64::from(self.header.count))
    }

    /// The messages in it that are meant, as inclusive runs, ascending: all of them, or in a compacted view what is kept.
    #[must_use]
    pub fn kept(&self) -> Vec<(Offset, Offset)> {
        let (runs, count) = (&self.header.kept_runs, self.header.count);
        let at = |n: u32| self.base_offset.advance(u64::from(n));
        match (runs.is_empty(), count.checked_sub(1)) {
            (_, None) => Vec::new(),
            (true, Some(last)) => vec![(at(0), at(last))],
            (false, Some(_)) => {
                runs::ranges(runs, count).into_iter().map(|(f, l)| (at(f), at(l))).collect()
            }
        }
    }

    /// How many those are.
    #[must_use]
    pub fn messages(&self) -> u64 {
        self.kept().iter().map(|(first, last)| last.0 + 1 - first.0).sum()
    }
}

/// What a compacted read found.
#[derive(Clone, Debug, PartialEq)]
pub struct CompactedRead {
    /// In offset order, with gaps below the horizon; [`StoredBatch::kept`] says which of their messages are meant.
    pub batches: Vec<StoredBatch>,
    /// Where to read on: at least where this read began, and behind all of `batches`.
    pub next: Offset,
}

/// Where a segment's compaction stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompactionStatus {
    /// The horizon: below it a compacted reader gets the latest message of each key. 0: never compacted.
    pub compacted_to: Offset,
    /// What a compacted reader gets below it.
    pub messages: u64,
    /// What the view takes, bytes.
    pub bytes: u64,
    /// Of the last one, if it failed; empty: it did not.
    pub last_error: String,
}

/// Figures of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    pub first_offset: Offset,
    pub next_offset: Offset,
    pub ledgers: usize,
    pub stored_bytes: u64,
}

/// Where a segment's closed ledgers are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierStatus {
    pub ledgers: u32,
    pub ledgers_uploading: u32,
    /// In both tiers.
    pub ledgers_uploaded: u32,
    pub ledgers_object_only: u32,
    /// Payload bytes of closed ledgers on bookies.
    pub bytes_bookies: u64,
    /// Bytes in cold storage.
    pub bytes_objects: u64,
    pub first_offset: Offset,
    pub next_offset: Offset,
    /// Of the last step that failed; empty when the last one did not.
    pub last_error: String,
}

/// A step of an offload or a verification.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierProgress {
    pub ledger: LedgerId,
    pub bytes_done: u64,
    pub bytes_total: u64,
    /// What is wrong with this ledger or object; the walk goes on. Empty: nothing.
    pub problem: String,
}

/// The outcome of a publish or a settle. Dropping it abandons the answer, not the request.
#[derive(Debug)]
pub struct Outcome<T, E>(pub(crate) Waiting<T, E>);

#[derive(Debug)]
pub(crate) enum Waiting<T, E> {
    Now(Option<Result<T, E>>),
    Later(oneshot::Receiver<Result<T, E>>, fn() -> E),
}

impl<T: Unpin, E: Unpin> Future for Outcome<T, E> {
    type Output = Result<T, E>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Waiting::Now(result) => Poll::Ready(result.take().expect("polled after it was ready")),
            Waiting::Later(answer, gone) => {
                let gone = *gone;
                Pin::new(answer).poll(context).map(|answer| answer.unwrap_or_else(|_| Err(gone())))
            }
        }
    }
}
