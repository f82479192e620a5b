//! What the tests are made of.

mod cluster;
mod etcd;
mod history;
mod load;
mod ports;
mod process;
mod proxy;
mod s3;
mod tools;

#[allow(unused_imports, reason = "each test target uses a part of the harness")]
pub(crate) use cluster::{BookieSpec, Cluster, ClusterSpec, geminga, http_get};
pub(crate) use etcd::Etcd;
#[allow(unused_imports, reason = "each test target uses a part of the harness")]
pub(crate) use load::{Load, client};
pub(crate) use ports::free as free_port;
pub(crate) use process::Process;
pub(crate) use proxy::Proxy;
pub(crate) use s3::S3;
pub(crate) use tools::tool;

use std::time::Duration;

/// How long a test waits for something that must happen, before it fails loudly.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `condition` gives something.
///
/// # Panics
/// With `what` when it does not within [`PATIENCE`].
pub(crate) async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    eventually_ok(async || condition().await.ok_or_else(|| what.to_owned())).await
}

/// As [`eventually`]; until it gives something, `condition` says what is missing.
pub(crate) async fn eventually_ok<T>(condition: impl AsyncFnMut() -> Result<T, String>) -> T {
    within(PATIENCE, Duration::from_millis(100), condition).await
}

/// As [`eventually_ok`], with another patience and another pause between two looks.
pub(crate) async fn within<T>(
    patience: Duration,
    pause: Duration,
    mut condition: impl AsyncFnMut() -> Result<T, String>,
) -> T {
    let deadline = tokio::time::Instant::now() + patience;
    loop {
        let missing = match condition().await {
            Ok(found) => return found,
            Err(missing) => missing,
        };
        assert!(tokio::time::Instant::now() < deadline, "not within {patience:?}: {missing}");
        tokio::time::sleep(pause).await;
    }
}
