//! The store on a real etcd: the exam, and what only a real server and a real network can do to it.

mod connection;
mod harness;
mod members;
mod proxy;
mod space;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use etcd_client::CompactionOptions;
use futures::{FutureExt, future::BoxFuture};
use geminga_metadata::{
    Change, EtcdConfig, EtcdStore, Key, LeaseId, MetadataStore, Op, RangeRequest, Revision,
    SharedStore, StoreError, Txn, TxnOutcome, Watch, WatchError,
    conformance::{Examinee, exam},
    ensure_cluster,
};
use geminga_runtime::{clock::Timestamp, random::Random};
use harness::Etcd;
use tokio::time::sleep;

fn key(name: &str) -> Key {
    Key(Bytes::copy_from_slice(name.as_bytes()))
}

async fn put(store: &dyn MetadataStore, name: &str, value: &str) -> Revision {
    let txn = Txn::new().then(Op::put(key(name), value.to_owned()));
    match store.txn(txn).await.expect("answered") {
        TxnOutcome::Done(revision) => revision,
        conflict @ TxnOutcome::Conflict { .. } => panic!("{conflict:?}"),
    }
}

async fn next_names(watch: &mut dyn Watch) -> Vec<String> {
    let name = |change: Change| match change {
        Change::Put(found) => found.key.to_string(),
        Change::Deleted { key, .. } => format!("-{key}"),
    };
    watch.next().await.expect("the watch goes on").into_iter().map(name).collect()
}

/// One server; a prefix for each question.
struct Server {
    etcd: Etcd,
    questions: AtomicU64,
}

impl Examinee for Server {
    fn store(&self) -> BoxFuture<'_, SharedStore> {
        let number = self.questions.fetch_add(1, Ordering::Relaxed);
        async move {
            let store: SharedStore = Arc::new(self.etcd.store(&format!("/exam/{number}/")).await);
            store
        }
        .boxed()
    }

    fn run_out<'a>(&'a self, _: &'a SharedStore, lease: LeaseId) -> BoxFuture<'a, ()> {
        async move {
            let mut admin = self.etcd.admin(0).await;
            while admin.lease_time_to_live(lease.0, None).await.expect("answered").ttl() > 0 {
                sleep(Duration::from_millis(50)).await;
            }
        }
        .boxed()
    }

    fn compact<'a>(&'a self, _: &'a SharedStore, revision: Revision) -> BoxFuture<'a, bool> {
        async move {
            let options = CompactionOptions::new().with_physical();
            self.etcd.admin(0).await.compact(revision.0, Some(options)).await.expect("compacted");
            true
        }
        .boxed()
    }
}

#[tokio::test]
async fn the_store_in_etcd_passes_the_exam() {
    let etcd = Etcd::start(1, &[]).await;
    exam(&Server { etcd, questions: AtomicU64::new(0) }).await;
}

#[tokio::test]
async fn clusters_with_prefixes_of_their_own_share_an_etcd_without_seeing_each_other() {
    let etcd = Etcd::start(1, &[]).await;
    let (a, b) = (etcd.store("/geminga/a/").await, etcd.store("/geminga/b/").await);
    let start = put(&a, "x/1", "a").await;
    put(&b, "x/1", "b").await;
    put(&b, "x/2", "b").await;
    let all = RangeRequest { prefix: key(""), after: None, limit: 0, at: None };
    let page = a.range(all).await.expect("read");
    assert_eq!(page.items.len(), 1);
    assert_eq!((&page.items[0].key, &page.items[0].value[..]), (&key("x/1"), &b"a"[..]));
    let mut watch = b.watch(&key(""), start).await.expect("watch");
    let mut seen = Vec::new();
    while seen.len() < 2 {
        seen.extend(next_names(&mut *watch).await);
    }
    assert_eq!(seen, ["x/1", "x/2"]);
}

#[tokio::test]
async fn of_three_nodes_that_make_the_cluster_at_once_all_get_one_record() {
    let etcd = Etcd::start(1, &[]).await;
    let node = |seed: u64| {
        let etcd = &etcd;
        async move {
            let store: SharedStore = Arc::new(etcd.store("/geminga/new/").await);
            let random = Random::from_seed(seed);
            ensure_cluster(&store, &random, Timestamp(7), 64).await.expect("made or found")
        }
    };
    let (a, b, c) = tokio::join!(node(1), node(2), node(3));
    assert!(a == b && b == c, "{a:?} {b:?} {c:?}");
}

#[tokio::test]
async fn history_compacted_while_a_watch_was_away_is_told_and_the_range_goes_on_from_there() {
    let etcd = Etcd::start(1, &[]).await;
    let proxy = proxy::Proxy::start(&etcd.endpoints()[0]).await;
    let config = EtcdConfig::new([&proxy.endpoint], "/geminga/a/");
    let store = EtcdStore::connect(config).await.expect("configured");
    let first = put(&store, "w/1", "x").await;
    let mut watch = store.watch(&key("w/"), first).await.expect("watch");
    assert_eq!(next_names(&mut *watch).await, ["w/1"]);
    proxy.cut();
    assert_eq!(watch.next().await, Err(WatchError::Lost));
    assert_eq!(watch.next().await, Err(WatchError::Lost), "and stays so");
    let away = etcd.store("/geminga/a/").await;
    for n in 2..6 {
        put(&away, &format!("w/{n}"), "x").await;
    }
    let (now, _) = away.get(&key("w/1")).await.expect("read");
    etcd.admin(0).await.compact(now.0, None).await.expect("compacted");
    let told = loop {
        match store.watch(&key("w/"), Revision(first.0 + 1)).await {
            Ok(mut watch) => break watch.next().await.err(),
            Err(StoreError::Compacted(at)) => {
                break Some(WatchError::Compacted(at));
            }
            Err(StoreError::Unavailable(_)) => {} // the cut connection
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(told, Some(WatchError::Compacted(now)));
    let all = RangeRequest { prefix: key("w/"), after: None, limit: 0, at: None };
    let page = store.range(all).await.expect("read");
    assert_eq!(page.items.len(), 5);
    let from = Revision(page.revision.0 + 1);
    let mut watch = store.watch(&key("w/"), from).await.expect("watch");
    put(&away, "w/6", "x").await;
    assert_eq!(next_names(&mut *watch).await, ["w/6"]);
}

#[tokio::test]
async fn a_revision_larger_than_an_answer_reaches_a_watch_whole() {
    let etcd = Etcd::start(1, &["--max-txn-ops=1000"]).await;
    let store = etcd.store("/geminga/a/").await;
    let lease = store.grant_lease(Duration::from_secs(60)).await.expect("granted");
    let start = put(&store, "start", "x").await;
    // Many leased keys with long names: their end is one revision that etcd cuts into fragments.
    let long = "n".repeat(8_000);
    for part in 0..3 {
        let txn = (0..100).fold(Txn::new(), |txn, n| {
            let key = key(&format!("w/{part}/{n:03}/{long}"));
            txn.then(Op::Put { key, value: Bytes::new(), lease: Some(lease) })
        });
        assert!(matches!(store.txn(txn).await, Ok(TxnOutcome::Done(_))));
    }
    store.revoke_lease(lease).await.expect("revoked");
    let mut watch = store.watch(&key("w/"), start).await.expect("watch");
    let mut deletions = Vec::new();
    while deletions.is_empty() {
        let batch = watch.next().await.expect("goes on");
        deletions = batch.into_iter().filter(|c| matches!(c, Change::Deleted { .. })).collect();
    }
    assert_eq!(deletions.len(), 300);
}
