//! The ledger client: one writer per ledger, readers, and recovery, over bookies it reaches through one seam.
//!
//! Promise: an entry this crate reports as acknowledged is synced on Qa bookies of its write set, in order, and recovery
//! by anyone will keep it (invariants I1..I6 of ledger-protocol.md).
//!
//! Main path: [`writer`] gives an entry its id and write set, [`bookie_rpc`] carries it, [`ack_tracker`] moves the LAC.
//! What it deliberately does not know: topics, offsets, cursors; it treats payloads as bytes.

pub mod bookie_rpc;
pub mod entry;
