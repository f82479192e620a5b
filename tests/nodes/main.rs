//! The whole product on real Kubernetes nodes: kubelet, containerd, DNS, volumes. `cargo nodes`, as root.
//!
//! The first run builds Kubernetes (scripts/kubernetes/build). One story in order, because a cluster takes a while to come up:
//! the README's commands install it, then load runs while pods, processes, nodes and images come and go, and the history
//! checker judges what the clients saw. `NODES_KEEP=1` leaves the cluster up, `NODES_IMAGE=FILE` takes another executable
//! (a release build, to measure), and every step prints how long it took.

#![allow(
    clippy::disallowed_methods,
    reason = "real tasks on a real runtime, outside the processes under test"
)]

#[allow(dead_code, unused_imports, reason = "each test target uses a part of the harness")]
#[path = "../cluster/harness/mod.rs"]
mod harness;

mod kubernetes;
mod release;
mod story;
