//! The metadata store seam, with etcd's semantics: revisions, multi-key transactions, leases, watches.
//!
//! It holds little: who owns what, which ledgers exist, where their entries lie. Never anything per message or per
//! acknowledgement. Forms: embedded (one process, on disk), in-memory (tests), faulty (does the work and then times
//! out, or lands it late); etcd is the clustered form. All pass one conformance suite, and this trait's docs are the contract.

mod store;

pub use store::*;
