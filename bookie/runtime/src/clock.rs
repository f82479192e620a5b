//! Wall time. Used for liveness and for what users see, never for safety (ledger-protocol.md section 1).

use std::sync::Arc;

/// Milliseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub u64);

/// A wall clock. It may jump in both directions.
pub trait Clock: Send + Sync + std::fmt::Debug + 'static {
    /// The wall time now.
    fn now(&self) -> Timestamp;
}

/// Shared handle to the clock of a process.
pub type SharedClock = Arc<dyn Clock>;
