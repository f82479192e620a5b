//! Who gets which message of a subscription's segment, and when: a pure core, and the task that carries out what it says.
//!
//! ```text
//! consume streams ─┐ frames                                ┌─► deliveries, answers ─► outboxes
//! Settle, Pull ... ┼─► task: one select loop ─► core ──────┼─► records  ─► cursor log (L1, L3)
//! clock, log's end ┘            ▲   events in, actions out └─► reads    ─► entry cache, bookies
//!                               └── outcomes of records and reads
//! ```
//! One core for all types; a type chooses the consumer, the order, and what keys mean (`core/`). Where an offset is:
//! ```text
//!  mark-delete                          frontier                    end
//!      | settled · held · waits · ready · dead |  fresh: never delivered  |
//! ```
//! What it deliberately does not know: who owns the segment, names of topics, how a record is stored.

mod core;
mod failover;
mod key_table;
mod ranges;
mod runs;

pub use self::core::{
    Action, AttachRefused, Attached, Batch, Change, Claimed, ConsumerSeen, Core, CoreLimits,
    DeadLetter, Decision, Delivery, Explained, HeldBy, HeldUp, Kind, Lease, Owner, Policy,
    Presented, ReadOf, RecordFailed, Redelivery, Restored, SettleRefused, Tally, Verb,
};
pub use failover::active_on;
pub use key_table::{KeyRange, hash_owner, rebalanced};
pub use ranges::RangeSet;
pub use runs::{Run, RunMap};
