//! The broker: it owns segments, takes messages in and gives them out, and keeps the catalog. gRPC on one port.
//!
//! Promises: a receipt is given only for what the managed ledger calls stored (promise 1 of the design); a subscription
//! never gets stuck, because the dispatcher's core is level-triggered (promise 2); memory, queues, connections and streams
//! are bounded, and past a bound the answer is a typed refusal or back-pressure (promise 5).
//!
//! The way of a message:
//! ```text
//! listener ──► publish/stream ──► managed ledger ──► receipt
//!   budgets      check, order       (sequence chain, ledgers)
//!
//! managed ledger ──► dispatcher/core ──► subscription/stream ──► outbox ──► consumer
//!   end, read           credit, holes      settle ──► cursor log
//! ```
//! [`ownership`] decides which segments are here, [`catalog`] what exists, [`auth`] who may, [`errors`] how a refusal
//! looks. Everything reaches a segment through [`ownership::Ownership::segment`], and every request passes
//! [`auth::Gate::check`].
//!
//! What it deliberately does not know: ledgers, bookies, ensembles, journals; nor what is inside a payload.

mod admin;
pub mod auth;
mod broker;
pub mod catalog;
pub mod config;
mod context;
mod discovery;
pub mod dispatcher;
pub mod errors;
mod lifecycle;
pub mod limits;
pub mod listener;
pub mod metrics;
mod mirror;
pub mod ownership;
mod publish;
mod relay;
mod spans;
mod storage_errors;
pub mod subscription;
mod tier;

pub use broker::{Broker, BrokerParts, Held, StartError};
pub use config::{BrokerConfig, Limits};
