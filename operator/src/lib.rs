//! The Kubernetes operator: custom resources in, a cluster that matches them out, and data never at risk.
//!
//! What it promises:
//! - A bookie's volume goes only after a proof that no ledger names the bookie (DC1); a bookie is replaced only while every
//!   copy is whole (U1). Both gates are pure functions with a table of cases (`tests/plans/`).
//! - `spec` is never written. Finalizers exist only where a deletion deletes something, and always let go.
//! - Level-triggered: every turn reads the object anew, reads what there is, decides, acts; a restart between any two steps
//!   loses nothing, since what must not be forgotten is written to the status before it is acted upon.
//!
//! The main path: [`operator::run`] holds the lease and starts [`controllers`]; `controllers/cycle.rs` is one turn of any
//! kind; `controllers/<kind>/plan.rs` decides, `observe.rs` reads. [`workloads`] makes manifests from specs.
//!
//! What it deliberately does not know: ledgers, metadata keys, etcd. It asks a Geminga cluster through the admin API only
//! ([`server`]).

pub mod controllers;
pub mod crd;
mod kubernetes;
pub mod leader;
pub mod manifest;
pub mod metrics;
pub mod operator;
mod quantity;
pub mod server;
pub mod thing;
pub mod workloads;

pub use kubernetes::{FIELD_MANAGER, connect, connect_counted};
