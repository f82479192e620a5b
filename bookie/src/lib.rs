//! The bookie: stores entries of ledgers, durably, and says only what it is certain of.
//!
//! Promise: OK means synced (D1). A fence, once answered, holds for ever (D2, I7). The explicit no is given only for an entry
//! that was never acknowledged here (D9, I8); everything doubtful is *unknown*. A damaged journal is found at the start and
//! puts in limbo what it may have hidden (D8).
//!
//! Main path of an add:
//! ```text
//! rpc.rs            for us? in time? digest right?
//! fencing.rs        one step: fence checked, entry pending, place in the journal's order taken (D2)
//! journal/writer.rs group, one write, one sync, and only then OK (D1, D4)
//! ledger_storage/   write cache for tail readers; memory table, then index files at a checkpoint (D5)
//! ```
//! And of a start: `start.rs`, with the verdict in `journal/replay.rs` (D3, D4).
//!
//! Beside it runs [`auto_recovery`]: the same process, none of the same state. It finds what is lost, copies, and proves
//! that a bookie may go.
//!
//! What the bookie itself deliberately does not know: topics, offsets, cursors, quorums. It never talks to another bookie.

pub mod auto_recovery;
mod bookie;
pub mod config;
mod cookie;
pub mod crash_points;
pub mod disk_guard;
pub mod fencing;
mod gc;
pub mod journal;
pub mod ledger_set;
mod ledger_storage;
mod limbo;
pub mod metrics;
mod registration;
mod rpc;
mod start;
mod state;
pub mod validity;

pub use auto_recovery::{AutoRecoveryConfig, AutoRecoveryParts};
pub use bookie::{Bookie, BookieParts};
pub use config::{BookieConfig, DiskLimits};
pub use cookie::{CookieError, INCARNATION_COUNTER};
pub use metrics::{AutoRecoveryMetrics, BookieMetrics};
pub use start::StartError;

#[cfg(test)]
mod tests;
