//! A small world: one store, some bookies, and brokers that come and go.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::FutureExt;
use geminga_bookie_client::{
    ClientMetrics, LedgerClient, LedgerClientConfig, LedgerClientParts, LedgerMetadata,
    bookie_rpc::{
        AddAnswer, AddRequest, Answer, BookieRpc, EntryAnswer, EntryRange, FenceAnswer,
        FenceRequest, LacAnswer, ListAnswer, ReadAnswer, ReadRequest, SharedBookies,
        faulty::{FaultPlan as NetworkPlan, Faults, FaultyBookies},
        loopback::Loopback,
        memory::MemoryBookie,
    },
};
use geminga_metadata::{
    Cluster, FaultPlan, FaultyStore, Key, MemoryStore, MetadataStore, Op, SharedStore, Standing,
    Txn, TxnOutcome, keys,
};
use geminga_proto::{
    ids::{Bundle, EntryId, Incarnation, LedgerId, Offset, SegmentId, SubscriptionId, TopicId},
    names::ProducerName,
    storage::v1 as wire,
    v1::RecordIndex,
};
use geminga_runtime::{
    budget::ByteBudget,
    clock::{ManualClock, Timestamp},
    random::Random,
    tasks::Tasks,
};
use parking_lot::Mutex;
use prost::Message;
use tokio::time::Instant;

use crate::{
    Claim, ColdStorage, ManagedLedger, ManagedLedgerConfig, ManagedLedgerMetrics, ManagedLedgers,
    ManagedLedgersParts, Outcome, ProducerError, ProducerIdentity, ProducerOpen, PublishBatch,
    PublishError, Status, Stored,
    cursor_log::LogState,
    dedup::ProducerId,
    list::{List, ListedState},
    load::load_cursor_log,
    offload::Stage,
    read::View,
};

pub(super) const SEGMENT: SegmentId = SegmentId { topic: TopicId(7), segment: 0 };
pub(super) const SUB: SubscriptionId = SubscriptionId(1);
pub(super) const OTHER_SUB: SubscriptionId = SubscriptionId(2);

pub(super) struct World {
    pub(super) store: FaultyStore,
    pub(super) loopback: Loopback,
    pub(super) bookies: BTreeMap<u32, MemoryBookie>,
    pub(super) tasks: Tasks,
    pub(super) random: Random,
    pub(super) clock: ManualClock,
    pub(super) claim: Claim,
    /// What nodes made from now on have as cold storage.
    pub(super) cold: Option<ColdStorage>,
    pub(super) standing: Standing,
}

/// The cluster's record.
pub(super) fn cluster(generation: u8, confirmed: u8) -> Vec<u8> {
    let id = "a cluster".to_owned();
    Cluster { id, generation, confirmed, feature_level: 1, bundles: 1_024 }.encode()
}

/// One broker's process.
pub(super) struct Node {
    pub(super) ledgers: ManagedLedgers,
    pub(super) tasks: Tasks,
    pub(super) metrics: ManagedLedgerMetrics,
    claim: Claim,
}

impl World {
    /// Bookies 1..=3, a claim, and an empty segment.
    pub(super) async fn new() -> Self {
        Self::with_bookies(3, 1).await
    }

    pub(super) async fn with_bookies(bookies: u32, seed: u64) -> Self {
        let (tasks, random) = (Tasks::new("world"), Random::from_seed(seed));
        let inner: SharedStore = Arc::new(MemoryStore::new());
        let store = FaultyStore::new(inner, random.fork(), FaultPlan::default(), &tasks);
        let owner = keys::owner(Bundle(3));
        let txn = Txn::new()
            .then(Op::put(owner.clone(), "a broker"))
            .then(Op::put(keys::cluster(), cluster(0, 0)))
            .then(ManagedLedgers::initial_list(SEGMENT));
        let TxnOutcome::Done(create_revision) = store.txn(txn).await.expect("the store answers")
        else {
            panic!("nothing was compared")
        };
        let mut world = Self {
            store,
            loopback: Loopback::new(),
            bookies: BTreeMap::new(),
            tasks,
            random,
            clock: ManualClock::new(Timestamp(1_000_000)),
            claim: Claim { key: owner, create_revision },
            cold: None,
            standing: Standing::always(),
        };
        for bookie in 1..=bookies {
            world.bookies.insert(bookie, MemoryBookie::new(Incarnation(bookie)));
            world.start(bookie);
            world.register(bookie, true).await;
        }
        world
    }

    pub(super) async fn register(&self, bookie: u32, writable: bool) {
        let value = wire::Available {
            format: 1,
            incarnation: bookie,
            writable,
            disk_free_bytes: 1_000,
            disk_total_bytes: 1_000,
            ..wire::Available::default()
        };
        let key = keys::available(&format!("b{bookie}"));
        self.put(key, value.encode_to_vec()).await;
    }

    pub(super) async fn put(&self, key: Key, value: Vec<u8>) {
        self.store.txn(Txn::new().then(Op::put(key, value))).await.expect("the store answers");
    }

    pub(super) fn start(&self, bookie: u32) {
        self.loopback.attach(Incarnation(bookie), Arc::new(self.bookies[&bookie].clone()));
    }

    pub(super) fn kill(&self, bookie: u32) {
        self.loopback.detach(Incarnation(bookie));
    }

    pub(super) fn node(&self) -> Node {
        self.node_with(|_| ())
    }

    pub(super) fn node_with(&self, change: impl FnOnce(&mut ManagedLedgerConfig)) -> Node {
        self.node_over(Arc::new(self.loopback.clone()), change)
    }

    pub(super) fn node_over(
        &self,
        bookies: SharedBookies,
        change: impl FnOnce(&mut ManagedLedgerConfig),
    ) -> Node {
        let tasks = self.tasks.child("broker");
        let store: SharedStore = Arc::new(self.store.clone());
        let clock = Arc::new(self.clock.clone());
        let client = LedgerClient::new(LedgerClientParts {
            store: store.clone(),
            bookies,
            clock: clock.clone(),
            random: self.random.fork(),
            tasks: tasks.child("ledgers"),
            config: LedgerClientConfig::default(),
            metrics: ClientMetrics::default(),
            standing: self.standing.clone(),
        });
        let mut config = ManagedLedgerConfig::default();
        change(&mut config);
        let metrics = ManagedLedgerMetrics::default();
        let ledgers = ManagedLedgers::new(ManagedLedgersParts {
            client,
            store,
            clock,
            random: self.random.fork(),
            tasks: tasks.child("segments"),
            config,
            metrics: metrics.clone(),
            cold: self.cold.clone(),
        });
        Node { ledgers, tasks, metrics, claim: self.claim.clone() }
    }

    /// The bookies behind a bad network of one's own.
    pub(super) fn faulty(&self, faults: Faults) -> SharedBookies {
        let inner = Arc::new(self.loopback.clone());
        let plan = NetworkPlan::new(faults);
        Arc::new(FaultyBookies::new(inner, plan, self.random.fork(), self.tasks.clone()))
    }

    pub(super) async fn list(&self) -> List {
        self.find_list().await.expect("the segment exists")
    }

    pub(super) async fn find_list(&self) -> Option<List> {
        let (_, found) =
            self.store.get(&keys::segment_list(SEGMENT)).await.expect("the store answers");
        found.map(|found| List::decode(&found.value).expect("a list"))
    }

    /// Ledgers in the store, listed or not.
    pub(super) async fn ledgers(&self) -> Vec<LedgerMetadata> {
        let request = geminga_metadata::RangeRequest {
            prefix: keys::ledgers(),
            after: None,
            limit: 0,
            at: None,
        };
        let page = self.store.range(request).await.expect("the store answers");
        page.items.iter().map(|item| LedgerMetadata::decode(&item.value).expect("valid")).collect()
    }

    /// The list and the ledgers say the same, nothing is an orphan (M4), and everything listed is there (I16).
    pub(super) async fn check_metadata(&self) {
        let list = self.list().await;
        for ledger in self.ledgers().await {
            let listed = list.all_ledgers().find(|listed| listed.id == ledger.id);
            match listed {
                Some(listed) if listed.stage() == Some(Stage::LedgerDeleted) => assert!(
                    matches!(ledger.state, geminga_bookie_client::LedgerState::Deleted { .. }),
                    "{listed:?}"
                ),
                Some(listed) => {
                    assert_eq!(
                        listed.state == ListedState::Closed,
                        ledger.is_closed(),
                        "{listed:?}"
                    );
                }
                None => assert!(
                    matches!(ledger.state, geminga_bookie_client::LedgerState::Deleted { .. }),
                    "orphan {}",
                    ledger.id
                ),
            }
        }
    }
}

impl Node {
    pub(super) async fn load(&self) -> ManagedLedger {
        self.ledgers.load(SEGMENT, self.claim.clone()).await.expect("loads")
    }

    /// What the cursor log holds, as a load would find it; and the end of the log.
    pub(super) async fn log_state(&self) -> (LogState, Offset) {
        let taken = self.ledgers.take_over(SEGMENT, None).await.expect("taken over");
        let view = View::new(self.ledgers.clone(), SEGMENT, taken.list.clone());
        let state = load_cursor_log(&self.ledgers, &view, &taken.list).await.expect("readable");
        (state, taken.list.closed_end())
    }

    /// As `kill -9`.
    pub(super) fn kill(&self) {
        self.tasks.abort();
    }
}

/// A producer that numbers its batches.
pub(super) struct Producer {
    pub(super) id: ProducerId,
    pub(super) token: Bytes,
    pub(super) stream: u64,
    pub(super) last: u64,
}

impl Producer {
    pub(super) async fn named(log: &ManagedLedger, name: &str, stream: u64) -> Self {
        Self::try_named(log, name, stream).await.expect("opens")
    }

    pub(super) async fn try_named(
        log: &ManagedLedger,
        name: &str,
        stream: u64,
    ) -> Result<Self, ProducerError> {
        let name = ProducerName::parse(name).expect("a valid name");
        Self::try_open(log, ProducerIdentity::Named(name), stream).await
    }

    pub(super) async fn open(log: &ManagedLedger, identity: ProducerIdentity, stream: u64) -> Self {
        Self::try_open(log, identity, stream).await.expect("opens")
    }

    async fn try_open(
        log: &ManagedLedger,
        identity: ProducerIdentity,
        stream: u64,
    ) -> Result<Self, ProducerError> {
        let open = ProducerOpen::shared(identity, stream);
        let opened = log.open_producer(open).await?;
        Ok(Self { id: opened.id, token: opened.token, stream, last: opened.persisted })
    }

    pub(super) fn batch(&self, prev: u64, lo: u64, hi: u64) -> PublishBatch {
        let payload = Bytes::from(text(hi));
        let permit = ByteBudget::new(1 << 20).try_acquire(payload.len() as u64).expect("room");
        PublishBatch {
            producer: self.id.clone(),
            stream_number: self.stream,
            prev,
            lo,
            hi,
            count: (hi - lo + 1) as u32,
            format: 1,
            codec: 0,
            uncompressed_size: payload.len() as u32,
            index: RecordIndex::default(),
            payload,
            expected_offset: None,
            traceparent: String::new(),
            trace: None,
            permit,
        }
    }

    /// The next batch of `count` messages.
    pub(super) fn send(
        &mut self,
        log: &ManagedLedger,
        count: u64,
    ) -> Outcome<Stored, PublishError> {
        let (prev, hi) = (self.last, self.last + count);
        self.last = hi;
        log.publish(self.batch(prev, prev + 1, hi))
    }

    /// Sends batches of 1, 2, 3, 1, ... messages at once and awaits all.
    pub(super) async fn store(&mut self, log: &ManagedLedger, batches: u64) -> Vec<Stored> {
        let sent: Vec<_> = (0..batches).map(|n| self.send(log, n % 3 + 1)).collect();
        let mut stored = Vec::new();
        for outcome in sent {
            stored.push(outcome.await.expect("stored"));
        }
        stored
    }
}

/// What a batch that ends in this sequence carries.
pub(super) fn text(hi: u64) -> String {
    format!("payload of {hi}")
}

/// Everything stored, as (base offset, count, last sequence); offsets are dense (I11) and bytes are as sent (I6).
pub(super) async fn read_all(log: &ManagedLedger) -> Vec<(u64, u32, u64)> {
    read_in_steps(log, 1 << 20, 1_000).await
}

pub(super) async fn read_in_steps(
    log: &ManagedLedger,
    bytes_max: usize,
    messages_max: usize,
) -> Vec<(u64, u32, u64)> {
    let end = *log.end().borrow();
    let mut next = log.first_offset();
    let mut all = Vec::new();
    while next < end {
        let batches = log.read(next, bytes_max, messages_max).await.expect("readable");
        assert!(!batches.is_empty(), "there is more up to {end}, at {next}");
        for batch in batches {
            assert_eq!(batch.base_offset, next, "dense");
            let hi = batch.header.producer.as_ref().expect("has a producer").hi_sequence;
            assert_eq!(batch.payload, Bytes::from(text(hi)));
            all.push((next.0, batch.header.count, hi));
            next = next.advance(u64::from(batch.header.count));
        }
    }
    assert_eq!(next, end);
    all
}

/// The sequences, in stored order.
pub(super) async fn sequences(log: &ManagedLedger) -> Vec<u64> {
    read_all(log).await.into_iter().map(|(_, _, hi)| hi).collect()
}

pub(super) async fn until_fenced(log: &ManagedLedger) {
    let mut status = log.status();
    let fenced = status.wait_for(|status| matches!(status, Status::Fenced(_))).await;
    fenced.expect("the segment's task tells");
}

/// Lets virtual time pass.
pub(super) async fn pass(seconds: f64) {
    tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
}

pub(super) fn offset(offset: u64) -> Offset {
    Offset(offset)
}

/// Entries that bookies lost.
pub(super) type Lost = Arc<Mutex<Vec<(LedgerId, EntryId)>>>;

/// A bookie that lost some entries, and does not know: it says no to them; or whose reads take their time.
#[derive(Clone, Debug)]
pub(super) struct Forgetful {
    inner: MemoryBookie,
    lost: Lost,
    reads_take: Arc<Mutex<Duration>>,
}

impl World {
    /// From now on all bookies may forget entries.
    pub(super) fn forgetful(&self) -> Lost {
        let lost = Lost::default();
        for (id, bookie) in &self.bookies {
            let (lost, reads_take) = (Arc::clone(&lost), Arc::default());
            let bookie = Forgetful { inner: bookie.clone(), lost, reads_take };
            self.loopback.attach(Incarnation(*id), Arc::new(bookie));
        }
        lost
    }

    /// Both, as long as the test says.
    pub(super) fn slow_and_forgetful(&self) -> (Lost, Arc<Mutex<Duration>>) {
        let (lost, reads_take) = (Lost::default(), Arc::default());
        for (id, bookie) in &self.bookies {
            let (lost, reads_take) = (Arc::clone(&lost), Arc::clone(&reads_take));
            let bookie = Forgetful { inner: bookie.clone(), lost, reads_take };
            self.loopback.attach(Incarnation(*id), Arc::new(bookie));
        }
        (lost, reads_take)
    }

    /// From now on every read takes so long.
    pub(super) fn slow_reads(&self, each: Duration) {
        for (id, bookie) in &self.bookies {
            let (lost, reads_take) = (Arc::default(), Arc::new(Mutex::new(each)));
            let bookie = Forgetful { inner: bookie.clone(), lost, reads_take };
            self.loopback.attach(Incarnation(*id), Arc::new(bookie));
        }
    }
}

impl BookieRpc for Forgetful {
    fn add(&self, request: AddRequest) -> Answer<AddAnswer> {
        self.inner.add(request)
    }

    fn write_lac(&self, to: Incarnation, ledger: LedgerId, lac: EntryId) -> Answer<()> {
        self.inner.write_lac(to, ledger, lac)
    }

    fn fence(&self, request: FenceRequest) -> Answer<FenceAnswer> {
        self.inner.fence(request)
    }

    fn read(&self, request: ReadRequest) -> Answer<ReadAnswer> {
        let lost = Arc::clone(&self.lost);
        let (ledger, first) = (request.ledger, request.range.first.0);
        let (answer, reads_take) = (self.inner.read(request), *self.reads_take.lock());
        let late = async move {
            tokio::time::sleep(reads_take).await;
            answer.await
        };
        late.map(move |mut answer| {
            for (n, entry) in answer.entries.iter_mut().enumerate() {
                if lost.lock().contains(&(ledger, EntryId(first + n as u64))) {
                    *entry = EntryAnswer::Absent;
                }
            }
            answer
        })
        .boxed()
    }

    fn read_lac(&self, to: Incarnation, ledger: LedgerId, deadline: Instant) -> Answer<LacAnswer> {
        self.inner.read_lac(to, ledger, deadline)
    }

    fn list(
        &self,
        to: Incarnation,
        ledger: LedgerId,
        range: EntryRange,
        deadline: Instant,
    ) -> Answer<ListAnswer> {
        self.inner.list(to, ledger, range, deadline)
    }
}
