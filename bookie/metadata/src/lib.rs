//! The metadata store seam, with etcd's semantics: revisions, multi-key transactions, leases, watches.
//!
//! It holds little: who owns what, which ledgers exist, where their entries lie. Never anything per message or per
//! acknowledgement. Forms: etcd (a cluster), embedded (one process, on disk), in-memory (tests), faulty (does the work and
//! then times out, or lands it late). All pass one conformance suite, and this trait's docs are the contract.
//!
//! The way of a change: [`commit()`] repeats a [`Txn`] on a [`MetadataStore`] until it is settled (MD3); the in-memory
//! and the embedded form carry it out in one pure state machine (`state.rs` over `data.rs`).
//!
//! What it deliberately does not know: what the values mean, besides the cluster's own.

mod cluster;
mod commit;
pub mod conformance;
mod data;
mod election;
mod embedded;
mod etcd;
mod faulty;
mod id_blocks;
pub mod keys;
mod lease;
mod memory;
pub mod metrics;
mod standing;
mod state;
mod store;

pub use cluster::{BUNDLES, Cluster, ClusterError, FEATURE_LEVEL, ensure_cluster};
pub use commit::{Committed, commit};
pub use data::HistoryLimits;
pub use election::Election;
pub use embedded::{EmbeddedStore, OpenError};
pub use etcd::{EtcdConfig, EtcdConfigError, EtcdStore, EtcdTls, PREFIX_BYTES_MAX, Secret};
pub use faulty::{Fault, FaultPlan, FaultyStore};
pub use id_blocks::{IdBlocks, NextId, next_id};
pub use lease::LeaseKeeper;
pub use memory::MemoryStore;
pub use metrics::{MetadataMetrics, MeteredStore};
pub use standing::{Standing, StandingSetter};
pub use store::*;
