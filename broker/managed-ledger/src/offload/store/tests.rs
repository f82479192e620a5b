//! The exam of cold storage: every form passes it.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use geminga_runtime::tasks::Tasks;
use object_store::memory::InMemory;

use super::{
    faulty::{FaultyObjects, ObjectFault},
    *,
};

fn bytes(length: usize) -> Bytes {
    (0..length).map(|n| (n * 7 % 251) as u8).collect::<Vec<_>>().into()
}

async fn listed(cold: &ColdStorage, prefix: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    cold.list(prefix, |one| found.push((one.rest, one.name))).await.expect("listed");
    found.sort();
    found
}

async fn exam(cold: &ColdStorage) {
    let small = bytes(1_000);
    cold.put("00a/0/x-1/0", small.clone()).await.expect("written");
    assert_eq!(cold.size("00a/0/x-1/0").await.expect("there"), 1_000);
    assert_eq!(cold.read("00a/0/x-1/0", 0..1_000).await.expect("read"), small);
    assert_eq!(cold.read("00a/0/x-1/0", 990..1_000).await.expect("read"), small.slice(990..));
    let beyond = cold.read("00a/0/x-1/0", 990..1_010).await;
    assert!(beyond.is_err(), "never fewer bytes than asked for");

    // A name is taken once: the same again is an earlier try of ours, anything else is refused.
    cold.put("00a/0/x-1/0", small.clone()).await.expect("it is there");
    let other = cold.put("00a/0/x-1/0", bytes(7)).await;
    assert!(matches!(other, Err(ColdError::Conflict { .. })), "{other:?}");
    assert_eq!(cold.read("00a/0/x-1/0", 0..1_000).await.expect("unchanged"), small);

    let missing = cold.read("00a/0/x-1/1", 0..10).await;
    assert!(matches!(missing, Err(ColdError::NotFound { .. })), "{missing:?}");
    assert!(matches!(cold.size("00a/0/x-1/1").await, Err(ColdError::NotFound { .. })));

    // In parts, the last one short; and one that ends with a part.
    for (name, length) in [("00a/0/x-2/0", 12_000_001usize), ("00a/0/x-2/1", 10 << 20)] {
        let large = bytes(length);
        let mut write = ObjectWrite::new(cold, name.to_owned());
        for chunk in large.chunks(700_000) {
            write.write(Bytes::copy_from_slice(chunk)).await.expect("written");
        }
        write.finish().await.expect("whole");
        assert_eq!(cold.size(name).await.expect("there"), length as u64);
        assert_eq!(cold.read(name, 0..length as u64).await.expect("read"), large);
    }
    // One that is never finished is never there.
    let mut write = ObjectWrite::new(cold, "00a/0/x-3/0".to_owned());
    write.write(bytes(6 << 20)).await.expect("written");
    drop(write);
    assert!(matches!(cold.size("00a/0/x-3/0").await, Err(ColdError::NotFound { .. })));

    cold.put("00a/01/x-4/0", bytes(1)).await.expect("written");
    let names: Vec<_> = listed(cold, "00a/0").await;
    let rests: Vec<_> = names.iter().map(|(rest, _)| rest.as_str()).collect();
    assert_eq!(rests, ["x-1/0", "x-2/0", "x-2/1"], "one segment's, not its neighbour's");
    assert_eq!(names[0].1, "00a/0/x-1/0");

    cold.delete("00a/0/x-1/0").await.expect("gone");
    cold.delete("00a/0/x-1/0").await.expect("gone already");
    assert_eq!(listed(cold, "00a/0").await.len(), 2);
}

fn config() -> ColdStorageConfig {
    let retry_pause = Duration::from_millis(1);
    ColdStorageConfig { part_bytes: 5 << 20, retry_pause, ..ColdStorageConfig::default() }
}

#[tokio::test]
async fn memory_keeps_the_contract() {
    let store = Arc::new(InMemory::new());
    exam(&ColdStorage::over(store.clone(), "", "one", config())).await;
    exam(&ColdStorage::over(store, "/a/prefix/", "two", config())).await;
}

#[tokio::test]
async fn a_directory_keeps_the_contract() {
    let directory = tempfile::tempdir().expect("a directory");
    let url = format!("file://{}", directory.path().join("new").display());
    exam(&ColdStorage::from_url(&url, "cluster", config()).expect("a store")).await;
}

#[tokio::test]
async fn an_s3_bucket_keeps_the_contract() {
    let directory = tempfile::tempdir().expect("a directory");
    let tasks = Tasks::new("test");
    let builder = s3_server::start(directory.path(), &tasks).await;
    let store = connect::s3(builder, s3_server::BUCKET, &config()).expect("a store");
    exam(&ColdStorage::over(Arc::new(store), "prefix", "cluster", config())).await;
    tasks.abort();
}

#[tokio::test(start_paused = true)]
async fn the_faulty_form_without_faults_keeps_the_contract() {
    let faulty = FaultyObjects::new(Arc::new(InMemory::new()));
    exam(&ColdStorage::over(Arc::new(faulty), "", "cluster", config())).await;
}

#[tokio::test(start_paused = true)]
async fn what_may_pass_is_tried_again_and_what_was_done_counts() {
    let faulty = FaultyObjects::new(Arc::new(InMemory::new()));
    let cold = ColdStorage::over(Arc::new(faulty.clone()), "", "cluster", config());
    faulty.fail_writes([ObjectFault::Refused, ObjectFault::DoneThenLost]);
    cold.put("a/0/b/0", bytes(100)).await.expect("the third try finds it");
    faulty.fail_reads([
        ObjectFault::Truncated,
        ObjectFault::Refused,
        ObjectFault::Slow(Duration::from_secs(3600)),
    ]);
    assert_eq!(cold.read("a/0/b/0", 10..90).await.expect("read"), bytes(100).slice(10..90));

    faulty.set_down(true);
    let before = faulty.requests();
    let refused = cold.read("a/0/b/0", 0..1).await;
    assert!(matches!(refused, Err(ColdError::Unavailable { .. })), "{refused:?}");
    assert_eq!(faulty.requests() - before, u64::from(config().tries));
}

#[test]
fn only_urls_without_credentials_are_understood() {
    let refused = |url: &str| {
        let error = ColdStorage::from_url(url, "cluster", config()).expect_err(url);
        assert!(matches!(error, ColdStorageError::Url { .. }), "{error}");
    };
    for url in ["", "cold", "ftp://host/x", "s3://", "s3:///prefix", "file://relative"] {
        refused(url);
    }
    refused("s3://key:secret@bucket/prefix");
    refused("s3://bucket/prefix?secret=x");
}
