//! A small world for this crate's tests: memory bookies, a memory store, a client.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use geminga_metadata::{MemoryStore, Op, SharedStore, Standing, Txn, TxnOutcome, keys};
use geminga_proto::{
    ids::{EntryId, Epoch, Incarnation, LedgerId, SegmentId, TopicId},
    storage::v1 as wire,
};
use geminga_runtime::{
    clock::{ManualClock, Timestamp},
    random::Random,
    tasks::Tasks,
};
use prost::Message;

use crate::{
    LedgerClient, LedgerClientConfig, LedgerClientParts, LedgerMetadata, LedgerOwner, LedgerWriter,
    Quorum, Versioned,
    bookie_rpc::{EntryRange, SharedBookies, loopback::Loopback, memory::MemoryBookie},
    entry::Payload,
};

pub(crate) const LEDGER: LedgerId = LedgerId(1);

pub(crate) struct World {
    pub(crate) store: SharedStore,
    pub(crate) loopback: Loopback,
    pub(crate) bookies: BTreeMap<u32, MemoryBookie>,
    pub(crate) tasks: Tasks,
    pub(crate) random: Random,
    pub(crate) config: LedgerClientConfig,
    pub(crate) client: LedgerClient,
}

impl World {
    /// Bookies 1..=n, all registered and writable.
    pub(crate) async fn new(n: u32) -> Self {
        Self::with_store(n, Arc::new(MemoryStore::new())).await
    }

    pub(crate) async fn with_store(n: u32, store: SharedStore) -> Self {
        let loopback = Loopback::new();
        let (tasks, random) = (Tasks::new("test"), Random::from_seed(7));
        let config = LedgerClientConfig::default();
        let client = client(&store, &(Arc::new(loopback.clone()) as _), &tasks, &random, &config);
        let bookies = BTreeMap::new();
        let mut world = Self { store, loopback, bookies, tasks, random, config, client };
        for bookie in 1..=n {
            world.add_bookie(bookie).await;
        }
        world
    }

    /// The same world seen by another client: other settings, perhaps another way to the bookies.
    pub(crate) fn client_with(
        &self,
        bookies: Option<SharedBookies>,
        change: impl FnOnce(&mut LedgerClientConfig),
    ) -> LedgerClient {
        let mut config = self.config.clone();
        change(&mut config);
        let bookies = bookies.unwrap_or_else(|| Arc::new(self.loopback.clone()));
        client(&self.store, &bookies, &self.tasks, &self.random, &config)
    }

    /// The same world seen by a client whose claims are confirmed, or not.
    pub(crate) fn client_standing(&self, standing: Standing) -> LedgerClient {
        let bookies: SharedBookies = Arc::new(self.loopback.clone());
        let parts = parts(&self.store, &bookies, &self.tasks, &self.random, &self.config);
        LedgerClient::new(LedgerClientParts { standing, ..parts })
    }

    pub(crate) async fn add_bookie(&mut self, bookie: u32) {
        let memory = MemoryBookie::new(Incarnation(bookie));
        self.bookies.insert(bookie, memory);
        self.start(bookie);
        self.register(bookie, true).await;
    }

    pub(crate) async fn register(&self, bookie: u32, writable: bool) {
        let value = wire::Available {
            format: 1,
            incarnation: bookie,
            writable,
            disk_free_bytes: 1_000,
            disk_total_bytes: 1_000,
            ..wire::Available::default()
        };
        let key = keys::available(&format!("b{bookie}"));
        let txn = Txn::new().then(Op::put(key, value.encode_to_vec()));
        self.store.txn(txn).await.expect("the store answers");
    }

    pub(crate) async fn unregister(&self, bookie: u32) {
        let key = keys::available(&format!("b{bookie}"));
        self.store.txn(Txn::new().then(Op::Delete(key))).await.expect("the store answers");
    }

    pub(crate) fn kill(&self, bookie: u32) {
        self.loopback.detach(Incarnation(bookie));
    }

    pub(crate) fn start(&self, bookie: u32) {
        self.loopback.attach(Incarnation(bookie), Arc::new(self.bookies[&bookie].clone()));
    }

    pub(crate) async fn create(&self) -> LedgerWriter {
        self.create_by(&self.client, Quorum::default()).await
    }

    pub(crate) async fn create_by(&self, client: &LedgerClient, quorum: Quorum) -> LedgerWriter {
        client.writer(self.create_metadata(quorum).await)
    }

    pub(crate) async fn create_metadata(&self, quorum: Quorum) -> Versioned<LedgerMetadata> {
        let new =
            self.client.plan_create(LEDGER, quorum, owner()).await.expect("bookies are there");
        match self.store.txn(new.txn).await.expect("the store answers") {
            TxnOutcome::Done(revision) => Versioned::created(new.metadata, revision),
            TxnOutcome::Conflict { .. } => panic!("the ledger is new"),
        }
    }

    pub(crate) async fn metadata(&self) -> Versioned<LedgerMetadata> {
        let (_, found) = self.store.get(&keys::ledger(LEDGER)).await.expect("the store answers");
        LedgerMetadata::from_key_value(&found.expect("the ledger exists")).expect("valid")
    }

    /// Moves the first copy of the first fragment, as the replicator does with one that is final (A2).
    pub(crate) async fn replicate(&self, to: u32) {
        let before = self.metadata().await;
        let mut moved = before.value.clone();
        moved.fragments[0].slots[0] = Some(Incarnation(to));
        let txn = crate::settle::ledger_txn(&before, &moved, None);
        let outcome = self.store.txn(txn).await.expect("the store answers");
        assert!(matches!(outcome, TxnOutcome::Done(_)));
    }

    pub(crate) async fn is_listed(&self) -> bool {
        let key = keys::under_replicated(LEDGER);
        self.store.get(&key).await.expect("the store answers").1.is_some()
    }

    /// How many bookies hold these very bytes of the entry.
    pub(crate) fn copies(&self, entry: u64) -> usize {
        self.bookies.values().filter(|b| b.held(LEDGER).contains_key(&EntryId(entry))).count()
    }

    /// All payloads of the closed ledger.
    pub(crate) async fn read_all(&self) -> Vec<String> {
        let metadata = self.metadata().await.value;
        let Some(last) = metadata.last() else { return Vec::new() };
        let mut payloads = Vec::new();
        while payloads.len() as u64 <= last.0 {
            let range = EntryRange { first: EntryId(payloads.len() as u64), last };
            let entries = self.client.reader(LEDGER).read(&metadata, range, 1 << 20).await;
            for entry in entries.expect("readable") {
                payloads.push(String::from_utf8_lossy(&entry.payload.to_bytes()).into_owned());
            }
        }
        payloads
    }
}

fn client(
    store: &SharedStore,
    bookies: &SharedBookies,
    tasks: &Tasks,
    random: &Random,
    config: &LedgerClientConfig,
) -> LedgerClient {
    LedgerClient::new(parts(store, bookies, tasks, random, config))
}

fn parts(
    store: &SharedStore,
    bookies: &SharedBookies,
    tasks: &Tasks,
    random: &Random,
    config: &LedgerClientConfig,
) -> LedgerClientParts {
    LedgerClientParts {
        store: Arc::clone(store),
        bookies: Arc::clone(bookies),
        clock: Arc::new(ManualClock::new(Timestamp(0))),
        random: random.clone(),
        tasks: tasks.clone(),
        config: config.clone(),
        metrics: crate::ClientMetrics::default(),
        standing: Standing::always(),
    }
}

pub(crate) fn owner() -> LedgerOwner {
    LedgerOwner { segment: SegmentId { topic: TopicId(1), segment: 0 }, epoch: Epoch(1) }
}

pub(crate) fn payload(text: impl Into<String>) -> Payload {
    Payload::from(Bytes::from(text.into()))
}

pub(crate) fn names(count: u64) -> Vec<String> {
    (0..count).map(|i| format!("entry {i}")).collect()
}

/// Appends `entry <i>` for the range and awaits them all.
pub(crate) async fn append(writer: &LedgerWriter, range: std::ops::Range<u64>) {
    let appends: Vec<_> =
        range.clone().map(|i| writer.append(payload(format!("entry {i}")))).collect();
    for (id, append) in range.zip(appends) {
        assert_eq!(append.await, Ok(EntryId(id)));
    }
}

/// Lets virtual time pass.
pub(crate) async fn pass(seconds: f64) {
    tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
}
