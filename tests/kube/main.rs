//! The operator against a real kube-apiserver on a real etcd: schemas, rules, server-side apply, permissions, leases; and the
//! charts, by helm. Operators work with the rights that the chart gives them, and no others.
//!
//! `cargo kube` runs them; the first run builds the API server and helm (scripts/). There are no nodes and no controller
//! manager: a test plays the StatefulSet's controller where it needs pods. Server objects are those of a real
//! `geminga standalone` outside Kubernetes; the cluster behind bookie pools is scripted, so that a test chooses its answers.

#![allow(
    clippy::disallowed_methods,
    reason = "real tasks on a real runtime, outside the processes under test"
)]

#[allow(dead_code, unused_imports, reason = "each test target uses a part of the harness")]
#[path = "../cluster/harness/mod.rs"]
mod harness;

mod apiserver;
mod charts;
mod command;
mod helm;
mod leaders;
mod pools;
mod resources;
mod schemas;
mod scripted;
