//! Several bookies over one store, each with auto-recovery, and a client that writes ledgers.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use geminga_bookie_client::{
    ClientMetrics, LedgerClient, LedgerClientConfig, LedgerClientParts, LedgerMetadata,
    LedgerOwner, LedgerWriter, Quorum, Versioned,
    bookie_rpc::{BookieRpc, EntryRange, ListAnswer, loopback::Loopback},
    entry::Payload,
};
use geminga_metadata::{
    Key, MemoryStore, MetadataStore, Op, SharedStore, Standing, Txn, TxnOutcome, keys,
};
use geminga_proto::{
    ids::{EntryId, Epoch, Incarnation, LedgerId, SegmentId, TopicId},
    storage::v1 as wire,
};
use geminga_runtime::{
    clock::{ManualClock, Timestamp},
    disk::MemoryDisk,
    random::Random,
    tasks::Tasks,
};
use prost::Message;

use super::harness::{World, deadline};
use crate::{AutoRecoveryConfig, AutoRecoveryMetrics, AutoRecoveryParts, Bookie, StartError};

pub(super) const SEGMENT: SegmentId = SegmentId { topic: TopicId(1), segment: 0 };

pub(super) struct Node {
    pub(super) world: World,
    pub(super) bookie: Bookie,
    pub(super) tasks: Tasks,
    pub(super) metrics: AutoRecoveryMetrics,
}

pub(super) struct Cluster {
    pub(super) store: MemoryStore,
    pub(super) loopback: Loopback,
    pub(super) random: Random,
    pub(super) config: AutoRecoveryConfig,
    pub(super) nodes: BTreeMap<u32, Node>,
    pub(super) client: LedgerClient,
}

impl Cluster {
    /// Bookies b1..=bn.
    pub(super) async fn new(n: u32) -> Self {
        let (store, loopback, random) =
            (MemoryStore::new(), Loopback::new(), Random::from_seed(u64::from(n)));
        let tasks = Tasks::new("client");
        let client = client(&store, &loopback, &random, &tasks);
        let config = AutoRecoveryConfig::default();
        let mut cluster = Self { store, loopback, random, config, nodes: BTreeMap::new(), client };
        for bookie in 1..=n {
            cluster.add(bookie).await;
        }
        cluster
    }

    pub(super) async fn add(&mut self, bookie: u32) {
        let mut world = World::new(u64::from(bookie) + 100);
        world.store = self.store.clone();
        world.config.id = format!("b{bookie}");
        self.start_in(bookie, world).await.expect("the bookie starts");
    }

    async fn start_in(&mut self, number: u32, world: World) -> Result<(), StartError> {
        let bookie = world.start().await?;
        self.loopback.attach(bookie.incarnation(), Arc::new(bookie.clone()));
        let tasks = Tasks::new(format!("auto-recovery b{number}"));
        let metrics = AutoRecoveryMetrics::default();
        let random = self.random.fork();
        AutoRecoveryParts {
            store: Arc::new(self.store.clone()),
            client: client(&self.store, &self.loopback, &random, &tasks),
            bookies: Arc::new(self.loopback.clone()),
            clock: Arc::new(ManualClock::new(Timestamp(1_000))),
            instance: random.uuid(),
            random,
            tasks: tasks.clone(),
            keeper: bookie.lease().clone(),
            bookie_id: world.config.id.clone(),
            config: self.config.clone(),
            metrics: metrics.clone(),
        }
        .start();
        self.nodes.insert(number, Node { world, bookie, tasks, metrics });
        Ok(())
    }

    /// As `kill -9` of the process.
    pub(super) fn kill(&self, bookie: u32) {
        let node = &self.nodes[&bookie];
        self.loopback.detach(node.bookie.incarnation());
        node.bookie.kill();
        node.tasks.abort();
    }

    pub(super) async fn restart(&mut self, bookie: u32) -> Result<(), StartError> {
        let node = self.nodes.remove(&bookie).expect("known");
        self.start_in(bookie, node.world).await
    }

    /// Kills it and starts it again on an empty volume, as a new incarnation.
    pub(super) async fn wipe(&mut self, bookie: u32) {
        self.kill(bookie);
        let mut node = self.nodes.remove(&bookie).expect("known");
        node.world.disk = MemoryDisk::new(64 << 20, self.random.fork());
        node.world.config.take_new_incarnation = true;
        self.start_in(bookie, node.world).await.expect("repair of D7");
    }

    /// Starts a bookie of the same name on an empty volume, with no word about an earlier one.
    pub(super) async fn renew(&mut self, bookie: u32) {
        let node = self.nodes.remove(&bookie).expect("known");
        node.tasks.abort();
        let mut world = World::new(self.random.u64());
        world.store = self.store.clone();
        world.config = node.world.config;
        self.start_in(bookie, world).await.expect("the bookie starts");
    }

    pub(super) fn incarnation(&self, bookie: u32) -> Incarnation {
        self.nodes[&bookie].bookie.incarnation()
    }

    /// The number of the bookie that holds a slot.
    pub(super) fn number(&self, incarnation: Incarnation) -> Option<u32> {
        self.nodes.iter().find(|node| node.1.bookie.incarnation() == incarnation).map(|n| *n.0)
    }

    pub(super) async fn open(&self, ledger: u64) -> LedgerWriter {
        let owner = LedgerOwner { segment: SEGMENT, epoch: Epoch(1) };
        let plan = self.client.plan_create(LedgerId(ledger), Quorum::default(), owner);
        let new = plan.await.expect("bookies are there");
        match self.store.txn(new.txn).await.expect("the store answers") {
            TxnOutcome::Done(at) => self.client.writer(Versioned::created(new.metadata, at)),
            TxnOutcome::Conflict { .. } => panic!("the ledger is new"),
        }
    }

    /// An open ledger whose writer does nothing.
    pub(super) async fn create_only(&self, ledger: u64) {
        let owner = LedgerOwner { segment: SEGMENT, epoch: Epoch(1) };
        let plan = self.client.plan_create(LedgerId(ledger), Quorum::default(), owner);
        let txn = plan.await.expect("bookies are there").txn;
        self.store.txn(txn).await.expect("the store answers");
    }

    pub(super) async fn close(&self, writer: &LedgerWriter) {
        let sealed = writer.seal().await.expect("sealed");
        let outcome = self.store.txn(sealed.txn).await.expect("the store answers");
        assert!(matches!(outcome, TxnOutcome::Done(_)));
    }

    /// A closed ledger of so many entries.
    pub(super) async fn ledger(&self, ledger: u64, entries: u64) {
        let writer = self.open(ledger).await;
        append(&writer, 0..entries).await;
        self.close(&writer).await;
    }

    pub(super) async fn metadata(&self, ledger: u64) -> LedgerMetadata {
        let found = self.value(&keys::ledger(LedgerId(ledger))).await.expect("it is there");
        LedgerMetadata::decode(&found).expect("valid")
    }

    pub(super) async fn holders(&self, ledger: u64) -> Vec<u32> {
        let metadata = self.metadata(ledger).await;
        let holders = metadata.fragments[0].holders();
        holders.filter_map(|(_, incarnation)| self.number(incarnation)).collect()
    }

    pub(super) async fn value(&self, key: &Key) -> Option<Bytes> {
        self.store.get(key).await.expect("the store answers").1.map(|found| found.value)
    }

    pub(super) async fn put(&self, key: Key, value: Vec<u8>) {
        self.store.txn(Txn::new().then(Op::put(key, value))).await.expect("the store answers");
    }

    pub(super) async fn delete(&self, key: Key) {
        self.store.txn(Txn::new().then(Op::Delete(key))).await.expect("the store answers");
    }

    pub(super) async fn is_listed(&self, ledger: u64) -> bool {
        self.value(&keys::under_replicated(LedgerId(ledger))).await.is_some()
    }

    pub(super) async fn is_lost(&self, incarnation: Incarnation) -> bool {
        self.value(&keys::lost(incarnation)).await.is_some()
    }

    /// I5: Closed, unlisted, and every slot of every fragment is held by a bookie that shows all of it.
    pub(super) async fn is_whole(&self, ledger: u64) -> bool {
        let metadata = self.metadata(ledger).await;
        if self.is_listed(ledger).await || !metadata.is_closed() || metadata.has_vacancy() {
            return false;
        }
        for (at, fragment) in metadata.fragments.iter().enumerate() {
            let last = metadata.last().map_or(0, |last| last.0 + 1);
            let end = metadata.fragments.get(at + 1).map_or(last, |next| next.first_entry.0);
            if fragment.first_entry.0 == end {
                continue;
            }
            let range = EntryRange { first: fragment.first_entry, last: EntryId(end - 1) };
            for (slot, holder) in fragment.holders() {
                let Some(number) = self.number(holder) else { return false };
                let bookie = &self.nodes[&number].bookie;
                let list = bookie.list(holder, metadata.id, range, deadline()).await;
                let ListAnswer::Held(held) = list else { return false };
                let ours = |id: u64| metadata.quorum.position(EntryId(id), slot).is_some();
                if (range.first.0..end).any(|id| ours(id) && !held.contains(EntryId(id))) {
                    return false;
                }
            }
        }
        true
    }

    /// Every payload of a closed ledger, from any bookie.
    pub(super) async fn read_all(&self, ledger: u64) -> Vec<String> {
        let metadata = self.metadata(ledger).await;
        let Some(last) = metadata.last() else { return Vec::new() };
        let mut payloads = Vec::new();
        while payloads.len() as u64 <= last.0 {
            let range = EntryRange { first: EntryId(payloads.len() as u64), last };
            let read = self.client.reader(metadata.id).read(&metadata, range, 1 << 20).await;
            for entry in read.expect("readable") {
                payloads.push(String::from_utf8_lossy(&entry.payload.to_bytes()).into_owned());
            }
        }
        payloads
    }

    pub(super) async fn wish(&self, bookie: u32) -> wire::Draining {
        let value = self.value(&keys::draining_bookie(&format!("b{bookie}"))).await;
        wire::Draining::decode(&value.expect("it stands")[..]).expect("valid")
    }

    /// An operator wishes that the bookie goes.
    pub(super) async fn drain(&self, bookie: u32, at_ms: u64) {
        let wish = wire::Draining { format: 1, at_ms, ..Default::default() };
        self.put(keys::draining_bookie(&format!("b{bookie}")), wish.encode_to_vec()).await;
    }

    pub(super) async fn registration(&self, bookie: u32) -> Option<wire::Available> {
        let value = self.value(&keys::available(&format!("b{bookie}"))).await?;
        Some(wire::Available::decode(&value[..]).expect("valid"))
    }

    /// Who audits now.
    pub(super) async fn auditor(&self) -> Option<u32> {
        let value = self.value(&keys::election("auditor")).await?;
        let holder = wire::Election::decode(&value[..]).expect("valid").holder;
        self.nodes.iter().find(|node| node.1.world.config.id == holder).map(|node| *node.0)
    }
}

fn client(
    store: &MemoryStore,
    loopback: &Loopback,
    random: &Random,
    tasks: &Tasks,
) -> LedgerClient {
    let store: SharedStore = Arc::new(store.clone());
    LedgerClient::new(LedgerClientParts {
        store,
        bookies: Arc::new(loopback.clone()),
        clock: Arc::new(ManualClock::new(Timestamp(1_000))),
        random: random.clone(),
        tasks: tasks.clone(),
        config: LedgerClientConfig::default(),
        metrics: ClientMetrics::default(),
        standing: Standing::always(),
    })
}

/// Appends `entry <i>` for the range and awaits them all.
pub(super) async fn append(writer: &LedgerWriter, range: std::ops::Range<u64>) {
    let appends: Vec<_> = range
        .clone()
        .map(|i| writer.append(Payload::from(Bytes::from(format!("entry {i}")))))
        .collect();
    for (id, append) in range.zip(appends) {
        assert_eq!(append.await, Ok(EntryId(id)));
    }
}

pub(super) fn texts(count: u64) -> Vec<String> {
    (0..count).map(|i| format!("entry {i}")).collect()
}

/// Virtual time goes on.
pub(super) async fn pass(seconds: u64) {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
}

/// Waits until it holds; at most so many seconds of virtual time.
macro_rules! eventually {
    ($seconds:expr, $condition:expr) => {{
        let mut held = false;
        for _ in 0..$seconds {
            if $condition {
                held = true;
                break;
            }
            crate::tests::cluster::pass(1).await;
        }
        assert!(held, "not within {} s: {}", $seconds, stringify!($condition));
    }};
}
pub(super) use eventually;
