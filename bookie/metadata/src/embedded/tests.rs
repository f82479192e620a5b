//! What a restart keeps, what it drops, and what it refuses.

use std::fs;

use tempfile::TempDir;

use super::*;
use crate::{Compare, Op, keys};

async fn open(directory: &TempDir) -> Result<EmbeddedStore, OpenError> {
    EmbeddedStore::open(directory.path(), Io::inline(), &Tasks::new("test")).await
}

async fn put(store: &EmbeddedStore, name: &str, lease: Option<LeaseId>) -> Revision {
    let put = Op::Put { key: keys::broker(name), value: "x".into(), lease };
    match store.txn(Txn::new().then(put)).await.expect("answered") {
        TxnOutcome::Done(revision) => revision,
        conflict @ TxnOutcome::Conflict { .. } => panic!("{conflict:?}"),
    }
}

#[tokio::test]
async fn a_reopened_store_goes_on_where_it_stood_and_drops_all_leases_in_one_revision() {
    let directory = TempDir::new().expect("made");
    let store = open(&directory).await.expect("opened");
    let first = put(&store, "kept", None).await;
    let lease = store.grant_lease(Duration::from_secs(600)).await.expect("granted");
    put(&store, "leased-1", Some(lease)).await;
    let last = put(&store, "leased-2", Some(lease)).await;
    store.close().await;
    assert!(matches!(store.get(&keys::cluster()).await, Err(StoreError::Unavailable(_))));

    let store = open(&directory).await.expect("reopened");
    assert_eq!(store.revision(), Revision(last.0 + 1));
    let (_, kept) = store.get(&keys::broker("kept")).await.expect("read");
    assert_eq!(kept.expect("kept").create_revision, first);
    let mut watch = store.watch(&keys::brokers(), first).await.expect("history is kept");
    let changes = watch.next().await.expect("replayed");
    assert_eq!(changes.len(), 5);
    let gone = |change: &Change| matches!(change, Change::Deleted { revision, .. } if revision.0 == last.0 + 1);
    assert!(changes[3..].iter().all(gone), "{changes:?}");
    let error = store.keep_alive(lease).await.expect_err("its holder is dead");
    assert!(matches!(error, StoreError::LeaseGone(_)));
    let next = store.grant_lease(Duration::from_secs(1)).await.expect("granted");
    assert!(next > lease, "lease ids of an earlier life do not come back");
}

#[tokio::test]
async fn a_second_opener_is_told_which_directory_is_in_use() {
    let directory = TempDir::new().expect("made");
    let store = open(&directory).await.expect("opened");
    let error = open(&directory).await.expect_err("in use");
    assert!(matches!(error, OpenError::AlreadyLocked { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains(&directory.path().display().to_string()), "{text}");
    assert!(text.contains("another process"), "{text}");
    store.close().await;
    open(&directory).await.expect("given back");
}

#[tokio::test]
async fn a_killed_store_keeps_every_answered_transaction() {
    let directory = TempDir::new().expect("made");
    let tasks = Tasks::new("killed");
    let store = EmbeddedStore::open(directory.path(), Io::inline(), &tasks).await.expect("opened");
    let mut last = Revision(0);
    for n in 0..20 {
        last = put(&store, &n.to_string(), None).await;
    }
    tasks.abort();
    tasks.idle().await;
    let txn = Txn::new().then(Op::put(keys::cluster(), "late"));
    assert!(matches!(store.txn(txn).await, Err(StoreError::Unavailable(_))));
    let store = open(&directory).await.expect("reopened");
    assert_eq!(store.revision(), last);
    for n in 0..20 {
        let (_, found) = store.get(&keys::broker(&n.to_string())).await.expect("read");
        assert!(found.is_some(), "{n}");
    }
}

#[tokio::test]
async fn history_beyond_the_bound_is_told_to_be_compacted_also_after_a_reopen() {
    let directory = TempDir::new().expect("made");
    let limits = HistoryLimits { revisions_max: 3, bytes_max: 1 << 20 };
    let tasks = Tasks::new("test");
    let io = Io::inline();
    let open = || EmbeddedStore::open_with_limits(directory.path(), io.clone(), &tasks, limits);
    let store = open().await.expect("opened");
    for _ in 0..9 {
        put(&store, "a", None).await;
    }
    let last = store.revision();
    store.close().await;
    let store = open().await.expect("reopened");
    let watch = store.watch(&keys::brokers(), Revision(last.0 - 3)).await;
    assert!(matches!(watch.err(), Some(StoreError::Compacted(at)) if at.0 == last.0 - 3));
    let mut watch = store.watch(&keys::brokers(), Revision(last.0 - 2)).await.expect("kept");
    assert_eq!(watch.next().await.expect("replayed").len(), 3);
    let request = |at| RangeRequest { prefix: keys::brokers(), after: None, limit: 0, at };
    let past = store.range(request(Some(Revision(last.0 - 1)))).await;
    assert!(matches!(past, Err(StoreError::Compacted(_))), "values before the open are gone");
    assert_eq!(store.range(request(Some(last))).await.expect("now").items.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_lease_runs_out_by_itself_and_wakes_a_watch() {
    let directory = TempDir::new().expect("made");
    let store = open(&directory).await.expect("opened");
    let lease = store.grant_lease(Duration::from_secs(5)).await.expect("granted");
    let at = put(&store, "a", Some(lease)).await;
    let mut watch = store.watch(&keys::brokers(), Revision(at.0 + 1)).await.expect("watch");
    let start = Instant::now();
    assert_eq!(watch.next().await.expect("woken").len(), 1);
    let took = start.elapsed();
    assert!(took > Duration::from_secs(4) && took < Duration::from_secs(6), "{took:?}");
}

#[tokio::test]
async fn transactions_given_at_once_share_a_commit_and_have_their_own_revisions() {
    let directory = TempDir::new().expect("made");
    let store = open(&directory).await.expect("opened");
    let puts = (0..100).map(|n| {
        let store = store.clone();
        async move { put(&store, &n.to_string(), None).await }
    });
    let mut revisions = futures::future::join_all(puts).await;
    revisions.sort();
    let dense: Vec<Revision> = (2..102).map(Revision).collect();
    assert_eq!(revisions, dense);
    let txn = Txn::new().when(Compare::Present(keys::broker("99")));
    assert!(matches!(store.txn(txn).await, Ok(TxnOutcome::Done(Revision(101)))));
}

#[tokio::test]
async fn a_foreign_file_is_refused_and_left_as_it_was() {
    let directory = TempDir::new().expect("made");
    let path = directory.path().join("metadata.redb");
    for content in [b"hello".to_vec(), vec![7u8; 5_000]] {
        fs::write(&path, &content).expect("written");
        let error = open(&directory).await.expect_err("foreign");
        assert!(matches!(error, OpenError::Foreign { .. } | OpenError::Damaged { .. }), "{error}");
        assert_eq!(fs::read(&path).expect("read"), content);
    }
    fs::remove_file(&path).expect("removed");
    drop(redb::Database::create(&path).expect("made"));
    let error = open(&directory).await.expect_err("not ours");
    assert!(matches!(error, OpenError::Foreign { .. }), "{error}");
}

#[tokio::test]
async fn damage_at_rest_is_an_error_or_harmless_but_never_other_data() {
    let directory = TempDir::new().expect("made");
    let store = open(&directory).await.expect("opened");
    for n in 0..50 {
        put(&store, &n.to_string(), None).await;
    }
    let last = store.revision();
    store.close().await;
    drop(store);
    let path = directory.path().join("metadata.redb");
    let good = fs::read(&path).expect("read");
    let mut refused = 0;
    for n in 0..60 {
        let mut bad = good.clone();
        let at = n * good.len() / 60 + n;
        bad[at] ^= 0x10;
        fs::write(&path, &bad).expect("written");
        match open(&directory).await {
            Err(OpenError::Damaged { .. } | OpenError::Foreign { .. }) => refused += 1,
            Err(other) => panic!("byte {at}: {other}"),
            Ok(store) => {
                assert_eq!(store.revision(), last, "byte {at}");
                let request =
                    RangeRequest { prefix: keys::brokers(), after: None, limit: 0, at: None };
                let page = store.range(request).await.expect("read");
                assert_eq!(page.items.len(), 50, "byte {at}");
                assert!(page.items.iter().all(|found| found.value == "x"), "byte {at}");
                store.close().await;
            }
        }
    }
    assert!(refused > 0, "no byte mattered");
    for bytes in [0, 100, 4096, good.len() / 2, good.len() - 1] {
        fs::write(&path, &good[..bytes]).expect("written");
        if let Ok(store) = open(&directory).await {
            assert_eq!(store.revision(), last, "{bytes} bytes");
        }
    }
}

#[tokio::test]
async fn a_failed_write_is_unknown_to_its_caller_invisible_to_readers_and_ends_the_store() {
    let directory = TempDir::new().expect("made");
    let store = open(&directory).await.expect("opened");
    let last = put(&store, "a", None).await;
    let mut watch = store.watch(&keys::brokers(), Revision(last.0 + 1)).await.expect("watch");
    store.shared.disk_fails.store(true, std::sync::atomic::Ordering::SeqCst);
    let create = |name| {
        let key = keys::broker(name);
        store.txn(Txn::new().when(Compare::Absent(key.clone())).then(Op::put(key, "x")))
    };
    let (first, second) = tokio::join!(create("b"), create("b"));
    assert!(matches!(first, Err(StoreError::Unknown(_))), "{first:?}");
    assert!(matches!(second, Err(StoreError::Unknown(_))), "{second:?}");
    assert_eq!(store.revision(), last);
    assert!(matches!(create("c").await, Err(StoreError::Unavailable(_))));
    assert!(matches!(store.get(&keys::broker("a")).await, Err(StoreError::Unavailable(_))));
    assert_eq!(watch.next().await, Err(WatchError::Lost));
}
