//! The crate as a whole: segments over an in-memory store and in-memory bookies, on virtual time.

mod chaos;
mod cursors;
mod dedup;
mod failures;
mod harness;
mod life;
mod log;
mod outage;
mod takeover;
mod tier;
mod tier_faults;
mod trim;
