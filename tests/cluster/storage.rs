//! Disks that fill up, and cold data in object storage.

use std::{fs, path::PathBuf, process::Command, time::Duration};

use tokio::time::sleep;

use crate::harness::{BookieSpec, Cluster, ClusterSpec, Load, S3, eventually};

/// A small file system of its own, unmounted when dropped. Needs root, as CI is.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(directory: PathBuf, mebibytes: u32) -> Self {
        fs::create_dir_all(&directory).expect("a directory");
        let size = format!("size={mebibytes}m");
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(&directory)
            .status()
            .expect("mount runs");
        assert!(status.success(), "a small file system is mounted (this test needs root)");
        Self(directory)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: cargo cluster"]
async fn a_full_disk_at_one_bookie_stops_nothing_and_space_comes_back() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let small = SmallDisk::mount(directory.path().join("small"), 400);
    let spec = ClusterSpec {
        bookies: vec![
            BookieSpec::default(),
            BookieSpec::default(),
            BookieSpec { data: Some(small.0.clone()), ..BookieSpec::default() },
            BookieSpec::default(),
        ],
        ..ClusterSpec::default()
    };
    let cluster = Cluster::start(spec).await;
    let load = Load::start(&cluster, "orders", 2).await;
    let free = rustix::fs::statvfs(&small.0).expect("it is mounted");
    let filler = small.0.join("filler");
    let bytes = (free.f_bavail * free.f_frsize).saturating_sub(1 << 20);
    fs::write(&filler, vec![1; usize::try_from(bytes).expect("a small disk")]).expect("fills it");
    eventually("the bookie says that it takes nothing", async || {
        let bookies = cluster.cli(&["bookie", "ls"]).await;
        (bookies[2]["state"] == "read-only").then_some(())
    })
    .await;
    load.goes_on("one disk is full").await;
    fs::remove_file(&filler).expect("space comes back");
    eventually("the bookie takes entries again", async || {
        let bookies = cluster.cli(&["bookie", "ls"]).await;
        (bookies[2]["state"] == "writable").then_some(())
    })
    .await;
    load.goes_on("the disk has room again").await;
    load.finish(&cluster).await;
    drop(cluster);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: cargo cluster"]
async fn a_topic_is_read_from_the_start_while_it_is_offloaded_and_its_ledgers_deleted() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let s3 = S3::start(directory.path()).await;
    let cluster = Cluster::start(tiered(&s3)).await;
    let load = Load::start(&cluster, "orders", 2).await;
    set_policy(&cluster, "2000").await;
    eventually("ledgers lie in object storage alone", async || {
        let tier = cluster.cli(&["tier", "status", "orders"]).await;
        let segments = tier.as_array()?;
        let gone = |s: &serde_json::Value| s["object_only"].as_u64().is_some_and(|n| n > 0);
        (!segments.is_empty() && segments.iter().all(gone)).then_some(())
    })
    .await;
    load.goes_on("ledgers were deleted on bookies").await;
    let verified = cluster.cli(&["tier", "verify", "orders"]).await;
    assert_eq!(verified["problems"].as_array().map(Vec::len), Some(0), "{verified}");
    load.finish(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: cargo cluster"]
async fn an_object_store_that_fails_for_a_minute_stops_no_traffic_and_is_caught_up_with() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut s3 = S3::start(directory.path()).await;
    let cluster = Cluster::start(tiered(&s3)).await;
    set_policy(&cluster, "3600000").await;
    let load = Load::start(&cluster, "orders", 1).await;
    s3.process.kill();
    for _ in 0..6 {
        sleep(Duration::from_secs(10)).await;
        load.goes_on("the object store is away").await;
    }
    s3.restart().await;
    load.goes_on("the object store is back").await; // the next upload is tried within half a minute
    eventually("ledgers are uploaded", async || {
        let tier = cluster.cli(&["tier", "status", "orders"]).await;
        tier[0]["both"].as_u64().is_some_and(|both| both > 0).then_some(())
    })
    .await;
    load.finish(&cluster).await;
}

/// Everything goes to object storage soon, and settled messages are kept, so that a new subscription can read all of them.
async fn set_policy(cluster: &Cluster, delete_lag_ms: &str) {
    let keep = ["--retention-ms", "86400000", "--retention-bytes", "1000000000000"];
    let offload = ["--offload-after-ms", "1000", "--delete-lag-ms", delete_lag_ms];
    cluster.cli(&[&["policy", "set"], &offload[..], &keep[..]].concat()).await;
}

/// Small ledgers, so that there is something to offload soon.
fn tiered(s3: &S3) -> ClusterSpec {
    ClusterSpec {
        settings: vec![
            ("tier-url", "s3://geminga/cold".to_owned()),
            ("ledger-roll-ms", "3000".to_owned()),
        ],
        environment: s3.environment(),
        ..ClusterSpec::default()
    }
}
