//! A segment as one endless log: managed ledgers.
//!
//! Promise: what [`ManagedLedger::publish`] reports as stored is acknowledged by a quorum, has dense offsets, is stored once
//! per producer and sequence (I11, I13), and is found again by whoever takes the segment over; what
//! [`ManagedLedger::settle`] reports is durable (C3). A stale owner gets no acknowledgement any more (I10).
//!
//! Main path: [`segment`]'s owner task checks the chain ([`dedup`]), gives the offset, appends to the open ledger, and rolls
//! it through list changes ([`change`]); [`takeover`] and [`load`] bring a segment back; `read.rs` serves readers beside it;
//! [`offload`] moves old ledgers to object storage, and `segment/tier.rs` trims what nobody needs; [`compaction`] keeps the
//! latest message of each key beside the log.
//! The decisions are plain synchronous code: [`dedup`], [`cursor`] and `redelivery.rs`, [`list`],
//! `cursor_log.rs`.
//! What it deliberately does not know: topics' names, subscriptions' names, consumers, gRPC.

mod backlog;
mod catch_up;
mod change;
mod compaction;
mod config;
pub mod cursor;
mod cursor_log;
pub mod dedup;
mod entry_cache;
pub mod entry_header;
mod error;
mod factory;
mod limits;
pub mod list;
mod load;
mod mark_delete;
mod metrics;
pub mod offload;
mod read;
mod redelivery;
mod run_map;
mod segment;
mod takeover;
#[cfg(test)]
mod tests;
mod types;

pub use backlog::Backlog;
pub use config::ManagedLedgerConfig;
pub use error::{
    CompactedReadError, DeleteError, LoadError, ProducerError, PublishError, ReadError,
    SettleError, TierError,
};
pub use factory::{ManagedLedgers, ManagedLedgersParts};
pub use metrics::ManagedLedgerMetrics;
pub use offload::{
    BacklogAction, ColdStorage, ColdStorageConfig, ColdStorageError, SweepError, TierPolicy,
};
pub use redelivery::{CONSUMER_BYTES_MAX, REASON_BYTES_MAX};
pub use segment::ManagedLedger;
pub use types::{
    Access, Claim, CompactedRead, CompactionStatus, CursorView, DeadLetter, DeadLetterCounts,
    KeyOwner, LeaseRecord, Outcome, ProducerIdentity, ProducerOpen, ProducerOpened, PublishBatch,
    Redelivery, RedeliveryView, Settlement, Start, Stats, Status, Stored, StoredBatch,
    TierProgress, TierStatus,
};
