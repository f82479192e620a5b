//! Compaction: of a prefix of the log, the latest message of each key, as a log of its own that readers may ask for.
//!
//! ```text
//! view      [k1@3] [k2@17] [k3@21]            latest of each key below the horizon
//! log                        | 25 26 27 28    everything, below and above the horizon
//!                            ▲ horizon
//! ```
//! Promise: at any time, a table built from a compacted read is the table built from all messages, also when the view is
//! replaced in the middle of the read. The log stays as it is: what settles, trims or expires messages knows nothing of the
//! view, and the view keeps messages that the log has lost.
//!
//! A round reads the log from the horizon on and notes where the latest message of each key is ([`keys`]), then writes what
//! stays of the old view and of that part of the log ([`rewrite`]) into ledgers of its own, reads them back, and asks the
//! segment's owner for the one list change that replaces the view (`segment/compact.rs`). Until that change nobody reads what
//! it wrote; a round that does not get there leaves ledgers that the list names as being written, and that are deleted by the
//! next round or the next owner.

pub(crate) mod keys;
mod output;
mod pace;
pub(crate) mod progress;
pub(crate) mod rewrite;
pub(crate) mod round;
pub(crate) mod runs;
#[cfg(test)]
mod tests;
