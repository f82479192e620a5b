//! The ledger client: one writer per ledger, readers, and recovery, over bookies it reaches through one seam.
//!
//! Promise: an entry this crate reports as acknowledged is synced on Qa bookies of its write set, in order, and recovery
//! by anyone will keep it (invariants I1..I6 of ledger-protocol.md).
//!
//! Main path: [`writer`] gives an entry its id and write set, [`bookie_rpc`] carries it, [`ack_tracker`] moves the LAC.
//! The decisions are synchronous code without clock or socket: [`ack_tracker`], [`ensemble`], [`writer::core`],
//! [`recovery::core`]; the tasks around them only carry their actions out.
//! What it deliberately does not know: topics, offsets, cursors; it treats payloads as bytes.

pub mod ack_tracker;
pub mod bookie_rpc;
#[cfg(test)]
mod chaos_tests;
mod client;
mod config;
pub mod ensemble;
pub mod entry;
mod memory;
pub mod metadata;
pub mod metrics;
mod quorum;
mod read_times;
mod reader;
pub mod recovery;
mod settle;
#[cfg(test)]
mod testing;
pub mod writer;

pub use client::{LedgerClient, LedgerClientParts, NewLedger};
pub use config::LedgerClientConfig;
pub use ensemble::EnsembleError;
pub use metadata::{
    Fragment, Holder, LedgerMetadata, LedgerOwner, LedgerState, MetadataError, Nonce,
    RecoveryNonce, Versioned,
};
pub use metrics::{ClientMetrics, RpcMetrics};
pub use quorum::{ENSEMBLE_SIZE_MAX, Quorum, QuorumError};
pub use reader::{LedgerReader, ReadError};
pub use recovery::{ClosedLedger, Recovered, RecoveryError, RecoveryStart};
pub use settle::{CloseVerdict, settled_close, settled_recovery};
pub use writer::{AppendError, AppendFuture, LedgerWriter, Poison, SealError, Sealed};
