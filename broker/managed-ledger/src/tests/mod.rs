//! The crate as a whole: segments over an in-memory store and in-memory bookies, on virtual time.

mod access;
mod catch_up;
mod chaos;
mod compaction;
mod cursors;
mod dedup;
mod failures;
mod harness;
mod life;
mod limits;
mod log;
mod outage;
mod redelivery;
mod takeover;
mod tier;
mod tier_faults;
mod time;
mod trim;
