//! Servers that die and come back.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use geminga_metadata::{
    Change, Committed, Compare, EtcdConfig, EtcdStore, LeaseKeeper, MetadataStore, Op, Revision,
    SharedStore, Txn, Watch, WatchError, commit,
};
use geminga_runtime::tasks::Tasks;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::{harness::Etcd, key, next_names, put};

const PREFIX: &str = "/geminga/a/";
const WRITERS: usize = 4;
const TTL: Duration = Duration::from_secs(6);

/// Counts one key up until told to stop; returns how far it came. The only writer of its key, so a conflict means that
/// an earlier try of the same transaction landed.
async fn count_up(store: SharedStore, name: String, settled: &AtomicU64, stop: &AtomicBool) -> u64 {
    let (mut value, mut condition) = (0_u64, Compare::Absent(key(&name)));
    while !stop.load(Ordering::SeqCst) {
        let next = value + 1;
        let txn = Txn::new().when(condition).then(Op::put(key(&name), next.to_string()));
        let revision = match commit(&store, &txn, &CancellationToken::new()).await {
            Committed::Done(revision) => revision,
            Committed::Conflict { found, .. } => {
                let found = found[0].clone().expect("an earlier try made it");
                assert_eq!(found.value, next.to_string(), "another value than the one tried");
                found.mod_revision
            }
            other => panic!("{other:?}"),
        };
        condition = Compare::ModRevision(key(&name), revision);
        value = next;
        settled.fetch_add(1, Ordering::SeqCst);
    }
    value
}

async fn settles(settled: &AtomicU64, count: u64) {
    let target = settled.load(Ordering::SeqCst) + count;
    while settled.load(Ordering::SeqCst) < target {
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn the_death_of_the_leader_loses_and_repeats_no_transaction_and_no_lease() {
    let mut etcd = Etcd::start(3, &[]).await;
    let (settled, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut writers = Vec::new();
    for n in 0..WRITERS {
        let mut config = EtcdConfig::new(etcd.endpoints(), PREFIX);
        config.first = n;
        let store: SharedStore = Arc::new(EtcdStore::connect(config).await.expect("configured"));
        writers.push(count_up(store, format!("count/{n}"), &settled, &stop));
    }
    let tasks = Tasks::new("lease");
    let keeper = LeaseKeeper::start(Arc::new(etcd.store(PREFIX).await), TTL, &tasks);
    let lease = keeper.held().await;
    let faults = async {
        settles(&settled, 100).await;
        let leader = etcd.leader().await;
        etcd.kill(leader);
        settles(&settled, 100).await;
        stop.store(true, Ordering::SeqCst);
    };
    let everything = async { tokio::join!(futures::future::join_all(writers), faults).0 };
    let reached = timeout(Duration::from_secs(60), everything).await.expect("a leader is elected");
    assert!(keeper.current() == lease && keeper.confirmed_within(TTL), "{keeper:?}");
    keeper.end().await;

    // Every value was written exactly once, in order, whatever its writer was told.
    let store = etcd.store(PREFIX).await;
    let (now, _) = store.get(&key("count/0")).await.expect("read");
    let mut watch = store.watch(&key("count/"), Revision(1)).await.expect("watch");
    let mut counts = [0_u64; WRITERS];
    while counts.iter().sum::<u64>() < reached.iter().sum() {
        for change in watch.next().await.expect("goes on") {
            let Change::Put(found) = change else { panic!("{change:?}") };
            assert!(found.mod_revision <= now);
            let name = found.key.to_string();
            let writer = name.trim_start_matches("count/").parse::<usize>().expect("a number");
            counts[writer] += 1;
            assert_eq!(found.value, counts[writer].to_string(), "of writer {writer}");
        }
    }
    assert_eq!(counts[..], reached[..]);
}

#[tokio::test]
async fn a_watch_goes_on_after_the_server_restarted() {
    let mut etcd = Etcd::start(1, &[]).await;
    let store = etcd.store(PREFIX).await;
    let first = put(&store, "w/1", "x").await;
    let mut watch = store.watch(&key("w/"), first).await.expect("watch");
    assert_eq!(next_names(&mut *watch).await, ["w/1"]);
    etcd.kill(0);
    assert_eq!(watch.next().await, Err(WatchError::Lost));
    assert!(store.watch(&key("w/"), first).await.is_err(), "nobody is there");
    etcd.run(0);
    etcd.ready().await;
    let second = put(&*retried(&etcd).await, "w/2", "x").await;
    assert!(second > first);
    let mut watch: Box<dyn Watch> = loop {
        match store.watch(&key("w/"), Revision(first.0 + 1)).await {
            Ok(watch) => break watch,
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    };
    assert_eq!(next_names(&mut *watch).await, ["w/2"]);
}

/// A store whose connection is of now.
async fn retried(etcd: &Etcd) -> SharedStore {
    Arc::new(etcd.store(PREFIX).await)
}
