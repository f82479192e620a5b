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

use crate::dedup::ProducerId;

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

/// Opens a stream of batches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProducerOpen {
    pub identity: ProducerIdentity,
    /// Must not fall for one producer (DD5).
    pub stream_number: u64,
}

/// An open stream of batches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProducerOpened {
    pub id: ProducerId,
    pub name: String,
    /// Resumes a session; empty for a named producer, whose name does.
    pub token: Bytes,
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
