//! Recovery: finds out where a ledger ends, and closes it there (R1..R8). Any node may, any number at once.

pub mod core;
mod drive;
mod rivals;
mod types;

pub use types::{ClosedLedger, Recovered, RecoveryError, RecoveryStart};

pub(crate) use drive::recover;
pub(crate) use rivals::recover_and_close;

#[cfg(test)]
mod tests;
