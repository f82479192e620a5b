//! What every role runs on: the seams to the machine, and nothing that knows a ledger or a topic.
//!
//! - [`clock`] and [`random`]: wall time and chance. Monotonic time is `tokio::time`, which tests pause.
//! - [`disk`]: one directory of files behind a trait; real, in-memory (with power cuts) and faulty forms.
//! - [`io`]: where blocking disk work runs: a thread of its own, or inline in the simulation.
//! - [`tasks`]: every task has an owner that cancels it, waits for it and learns of its failure.
//! - [`budget`]: bytes taken at the front door and given back when they are no longer held.
//! - [`telemetry`]: logs, the metrics registry, the health endpoint, trace context.
//! - [`units`]: sizes and times in configuration.
//!
//! What it deliberately does not know: messages, ledgers, metadata keys.

pub mod budget;
pub mod clock;
pub mod disk;
pub mod io;
pub mod random;
pub mod tasks;
pub mod telemetry;
pub mod units;
