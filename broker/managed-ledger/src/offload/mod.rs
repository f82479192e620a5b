//! Offload: closed ledgers move to object storage and are read from there (section 13, X1..X5).
//!
//! Promise: a ledger is deleted on bookies only after its objects were read back whole and the lag has passed (X2, X3); an
//! object is deleted only by [`janitor`], which must have read the list and found its uuid nowhere (X4). Whatever fails or
//! stays unknown in between leaves more copies than needed, never fewer.
//!
//! Main path: [`plan`] says what is due; the segment's owner (`segment/tier.rs`) makes each arrow of [`state`] one change of
//! the list; [`upload`] writes the objects in the format of [`format`] into [`store`]; [`object`] reads them back for
//! `read.rs`.
//! What it deliberately does not know: topics' names, tenants, who reads.

mod census;
pub(crate) mod format;
pub(crate) mod janitor;
mod lru;
pub(crate) mod object;
pub(crate) mod plan;
mod policy;
mod state;
pub mod store;
pub(crate) mod upload;
pub(crate) mod verify;

pub use janitor::SweepError;
pub use policy::{BacklogAction, TierPolicy};
pub use state::{Object, Offload, Stage};
pub use store::{ColdStorage, ColdStorageConfig, ColdStorageError};
