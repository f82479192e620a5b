//! What every role runs on: the seams to the machine, and nothing that knows a ledger or a topic.
//!
//! - [`clock`] and [`random`]: wall time and chance. Monotonic time is `tokio::time`, which tests pause.
//! - [`disk`]: one directory of files behind a trait; real, in-memory (with power cuts) and faulty forms.
//! - [`io`]: where blocking disk work runs: a thread of its own, or inline in the simulation.
//!
//! What it deliberately does not know: messages, ledgers, metadata keys.

pub mod clock;
pub mod disk;
pub mod io;
pub mod random;
