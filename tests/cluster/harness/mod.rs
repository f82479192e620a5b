//! What the tests are made of.

mod cluster;
mod etcd;
mod history;
mod load;
mod ports;
mod process;
mod proxy;
mod s3;

pub(crate) use cluster::{BookieSpec, Cluster, ClusterSpec, geminga};
pub(crate) use etcd::Etcd;
#[allow(unused_imports, reason = "each test target uses a part of the harness")]
pub(crate) use load::{Load, client};
pub(crate) use ports::free as free_port;
pub(crate) use process::Process;
pub(crate) use proxy::Proxy;
pub(crate) use s3::S3;

use std::time::Duration;

/// How long a test waits for something that must happen, before it fails loudly.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `condition` gives something.
///
/// # Panics
/// With `what` when it does not within [`PATIENCE`].
pub(crate) async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        if let Some(found) = condition().await {
            return found;
        }
        assert!(tokio::time::Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
