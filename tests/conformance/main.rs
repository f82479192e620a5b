//! The promises of Geminga as rows of one table, each run against both shapes: the standalone, and a cluster of real parts.
//!
//! `cargo test` runs all rows in the standalone; `cargo conformance` runs them in the cluster as well. Which rows
//! passed stands in docs/semantics.md beside what other systems promise; `UPDATE_DOCS=1` writes that part anew.
//! `ROWS=text` runs only the rows whose promise or name has the text, and leaves the page alone.
//!
//! The rows speak the protocol frame by frame, so that they see what any client may see, and say nothing of the SDK.

#![allow(
    clippy::disallowed_methods,
    reason = "real tasks on a real runtime, outside the processes under test"
)]

#[allow(dead_code, unused_imports, reason = "each test target uses a part of the harness")]
#[path = "../cluster/harness/mod.rs"]
mod harness;

mod client;
mod consumer;
mod http;
mod judge;
mod page;
mod producer;
mod rows;
mod run;
mod world;

use world::Shape;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_standalone_keeps_every_promise() {
    run::all_rows(Shape::Standalone).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "long: cargo conformance"]
async fn the_cluster_keeps_every_promise() {
    run::all_rows(Shape::Cluster).await;
}
