//! The clustered shape with real parts: etcd, brokers and bookies as processes, real files, faults from outside.
//!
//! The short tests run with `cargo test --workspace`; `cargo cluster` runs all of them. Every test publishes and consumes
//! while its fault happens, and the history checker judges what clients saw: nothing acknowledged is lost, changed, or
//! reordered within its key, and nothing is stuck a minute after the fault has healed.

#![allow(
    clippy::disallowed_methods,
    reason = "real tasks on a real runtime, outside the processes under test"
)]

mod faults;
mod harness;
mod members;
mod readme;
mod storage;
mod telemetry;
