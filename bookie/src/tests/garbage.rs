//! What may be dropped, what stands for it afterwards, and what stops it (G1-G3, D13, T11, T13, T45, T51).

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use geminga_bookie_client::bookie_rpc::{
    AddAnswer, BookieRpc, EntryAnswer, EntryRange, EntrySet, ListAnswer, Unknown,
};
use geminga_metadata::{
    Cluster, Key, KeyValue, LeaseId, MemoryStore, MetadataStore, Op, Page, RangeRequest, Revision,
    StoreError, Txn, TxnOutcome, Watch, keys,
};
use geminga_proto::{
    ids::{EntryId, LedgerId},
    storage::v1 as wire,
};
use parking_lot::Mutex;
use prost::Message;

use super::harness::*;
use crate::Bookie;

const DAY: Duration = Duration::from_secs(24 * 3600);

fn world(seed: u64) -> World {
    let mut world = World::new(seed);
    world.config.gc_interval = Duration::from_secs(1_000_000_000); // passes are asked for
    world.config.gc_share_max = 1.0;
    world
}

/// Closed on other incarnations.
async fn move_away(store: &MemoryStore, ledger: u64) {
    use wire::ledger_metadata::{Closed, State};
    let value = wire::LedgerMetadata {
        format: 1,
        id: ledger,
        state: Some(State::Closed(Closed { last: 1, length: 2 })),
        ensemble_size: 1,
        write_quorum: 1,
        ack_quorum: 1,
        digest: wire::Digest::Crc32c as i32,
        fragments: vec![wire::Fragment {
            first_entry: 0,
            nonce: vec![2; 16].into(),
            slots: vec![77],
        }],
        owner: Some(wire::LedgerOwner { topic: 1, segment: 0, epoch: 1 }),
    };
    let txn = Txn::new().then(Op::put(keys::ledger(LedgerId(ledger)), value.encode_to_vec()));
    store.txn(txn).await.expect("the store answers");
}

async fn list(bookie: &Bookie, ledger: u64) -> ListAnswer {
    let range = EntryRange { first: EntryId(0), last: EntryId(9) };
    bookie.list(bookie.incarnation(), LedgerId(ledger), range, deadline()).await
}

fn held(ids: &[u64]) -> ListAnswer {
    ListAnswer::Held(ids.iter().map(|id| EntryId(*id)).collect::<EntrySet>())
}

async fn collect(bookie: &Bookie) -> usize {
    bookie.collect_garbage().await.expect("the store answers")
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_moved_away_leaves_a_fence_and_a_later_copy_is_not_mixed_with_it() {
    let world = world(1);
    let bookie = world.started().await;
    for id in 0..4 {
        assert_eq!(add(&bookie, 5, id).await, AddAnswer::Ok);
    }
    add(&bookie, 6, 0).await;
    world.put_ledger(6, false).await;
    assert!(bookie.checkpoint().await.expect("written"));
    move_away(&world.store, 5).await;
    assert_eq!(collect(&bookie).await, 0);
    tokio::time::sleep(DAY / 2).await;
    assert_eq!(collect(&bookie).await, 0, "not for a day yet");
    tokio::time::sleep(DAY / 2).await;
    assert_eq!(collect(&bookie).await, 1);
    let gone = EntryAnswer::Unknown(Unknown::Dropped);
    assert_eq!(add(&bookie, 5, 9).await, AddAnswer::Fenced, "T45");
    assert_eq!(read(&bookie, 5, 1).await, gone, "unknown, never the explicit no (D13)");
    assert_eq!(recovery_add(&bookie, 5, 3).await, AddAnswer::Ok);
    assert_eq!(recovery_add(&bookie, 5, 2).await, AddAnswer::Ok);
    let check = async |bookie: &Bookie| {
        assert_eq!(list(bookie, 5).await, held(&[2, 3]), "the earlier copy is no part of it");
        assert_eq!(read(bookie, 5, 1).await, gone);
        assert_eq!(read(bookie, 5, 3).await, EntryAnswer::Held(entry(5, 3)));
        assert_eq!(add(bookie, 5, 9).await, AddAnswer::Fenced, "I7");
    };
    check(&bookie).await;
    bookie.kill();
    let bookie = world.started().await;
    check(&bookie).await;
    for id in 1..40 {
        add(&bookie, 6, id).await; // files roll, index files merge, dead files go
        if id % 10 == 0 {
            assert!(bookie.checkpoint().await.expect("written"));
        }
    }
    check(&bookie).await;
    assert_eq!(recovery_add(&bookie, 5, 3).await, AddAnswer::Ok, "held");
    bookie.stop().await;
    let bookie = world.started().await;
    check(&bookie).await;
    tokio::time::sleep(DAY).await;
    assert_eq!(collect(&bookie).await, 0, "a new process sees it for the first time");
    tokio::time::sleep(DAY).await;
    assert_eq!(collect(&bookie).await, 1, "and it may move away once more");
    assert_eq!(list(&bookie, 5).await, held(&[]));
}

#[tokio::test(start_paused = true)]
async fn an_absent_key_must_be_absent_twice_and_too_many_of_them_stop_the_pass() {
    let mut world = world(2);
    world.config.gc_share_max = 0.2;
    let bookie = world.started().await;
    for ledger in 1..=10 {
        assert_eq!(add(&bookie, ledger, 0).await, AddAnswer::Ok);
        if ledger > 3 {
            world.put_ledger(ledger, false).await;
        }
    }
    assert_eq!(collect(&bookie).await, 0);
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(collect(&bookie).await, 0, "G2: three of ten");
    assert_eq!(world.metrics.gc_refused.get(), 1);
    world.put_ledger(2, true).await;
    world.put_ledger(3, true).await;
    assert_eq!(collect(&bookie).await, 3, "two are Deleted, the third is one of ten");
    assert_eq!(read(&bookie, 1, 0).await, EntryAnswer::Unknown(Unknown::Dropped));
    assert_eq!(read(&bookie, 4, 0).await, EntryAnswer::Held(entry(4, 0)));
}

#[tokio::test(start_paused = true)]
async fn an_unconfirmed_restore_stops_garbage_collection() {
    let world = world(3);
    let bookie = world.started().await;
    add(&bookie, 1, 0).await;
    world.put_ledger(1, true).await;
    let (_, found) = world.store.get(&keys::cluster()).await.expect("the store answers");
    let cluster = Cluster::decode(&found.expect("there").value).expect("valid");
    let put = async |cluster: &Cluster| {
        let txn = Txn::new().then(Op::put(keys::cluster(), cluster.encode()));
        world.store.txn(txn).await.expect("the store answers");
    };
    put(&Cluster { generation: 1, ..cluster.clone() }).await;
    assert!(bookie.collect_garbage().await.is_err(), "G3");
    assert_eq!(read(&bookie, 1, 0).await, EntryAnswer::Held(entry(1, 0)));
    put(&Cluster { generation: 1, confirmed: 1, ..cluster }).await;
    assert_eq!(collect(&bookie).await, 1);
}

/// What happens right before the n-th read of several keys from now on.
type Hook = Box<dyn Fn() -> futures::future::BoxFuture<'static, ()> + Send + Sync>;

/// A store in which something happens between two reads of one bookie.
struct Interleaved {
    store: MemoryStore,
    reads_before: AtomicU64,
    hook: Mutex<Option<Hook>>,
}

impl std::fmt::Debug for Interleaved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Interleaved")
    }
}

#[async_trait]
impl MetadataStore for Interleaved {
    async fn get(&self, key: &Key) -> Result<(Revision, Option<KeyValue>), StoreError> {
        self.store.get(key).await
    }

    async fn get_many(
        &self,
        keys: &[Key],
    ) -> Result<(Revision, Vec<Option<KeyValue>>), StoreError> {
        let due = self.reads_before.fetch_sub(1, Ordering::SeqCst) == 0;
        let happens = due.then(|| self.hook.lock().take().map(|hook| hook())).flatten();
        if let Some(happens) = happens {
            happens.await;
        }
        self.store.get_many(keys).await
    }

    async fn range(&self, request: RangeRequest) -> Result<Page, StoreError> {
        self.store.range(request).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        self.store.txn(txn).await
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.store.grant_lease(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.store.keep_alive(lease).await
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.store.revoke_lease(lease).await
    }

    async fn watch(&self, prefix: &Key, from: Revision) -> Result<Box<dyn Watch>, StoreError> {
        self.store.watch(prefix, from).await
    }
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_begins_while_the_old_one_is_leaving_is_refused_or_keeps_it() {
    let mut world = world(4);
    let store = Arc::new(Interleaved {
        store: world.store.clone(),
        reads_before: AtomicU64::new(u64::MAX),
        hook: Mutex::new(None),
    });
    world.seen_store = Some(store.clone());
    let bookie = world.started().await;
    add(&bookie, 5, 0).await;
    move_away(&world.store, 5).await;
    assert_eq!(collect(&bookie).await, 0);
    tokio::time::sleep(DAY).await;
    let (copying, listings) = (bookie.clone(), world.store.clone());
    *store.hook.lock() = Some(Box::new(move || {
        let (bookie, store) = (copying.clone(), listings.clone());
        Box::pin(async move {
            // The ripe verdict has fallen and the mark stands: a replicator lists the ledger and copies to us (A2).
            let key = keys::under_replicated(LedgerId(5));
            store.txn(Txn::new().then(Op::put(key, ""))).await.expect("the store answers");
            let refused = AddAnswer::Unknown(Unknown::Dropped);
            assert_eq!(recovery_add(&bookie, 5, 1).await, refused);
            assert_eq!(list(&bookie, 5).await, ListAnswer::Unknown(Unknown::Dropped));
            assert_eq!(add(&bookie, 5, 1).await, AddAnswer::Fenced);
            let held = EntryAnswer::Held(entry(5, 0));
            assert_eq!(read(&bookie, 5, 0).await, held);
        })
    }));
    store.reads_before.store(1, Ordering::SeqCst); // the pass reads once, then marks, then reads again
    assert_eq!(collect(&bookie).await, 0, "T51: the listing is seen");
    assert!(store.hook.lock().is_none(), "it happened");
    assert_eq!(recovery_add(&bookie, 5, 1).await, AddAnswer::Ok, "the mark is gone");
    assert_eq!(list(&bookie, 5).await, held(&[0, 1]));
}
