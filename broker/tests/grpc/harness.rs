//! A broker in this process on the real managed ledger, over in-memory bookies and an in-memory store that fail when a test
//! says so; and clients that speak the protocol frame by frame.

use std::{
    collections::VecDeque,
    future::Future,
    net::SocketAddr,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use bytes::Bytes;
use geminga_bookie_client::{
    ClientMetrics, LedgerClient, LedgerClientConfig, LedgerClientParts,
    bookie_rpc::{
        faulty::{FaultPlan as Network, FaultyBookies},
        loopback::Loopback,
        memory::MemoryBookie,
    },
};
use geminga_broker::{
    Broker, BrokerConfig, BrokerParts,
    auth::{AllowAll, Authorizer},
};
use geminga_managed_ledger::{
    Claim, ColdStorage, ManagedLedger, ManagedLedgerConfig, ManagedLedgerMetrics, ManagedLedgers,
    ManagedLedgersParts,
};
use geminga_metadata::{
    FaultPlan, FaultyStore, MemoryStore, MetadataStore, Op, SharedStore, Standing, Txn, keys,
};
use geminga_proto::{
    admin::v1::{
        CreateTopicRequest, DescribeSubscriptionRequest, DescribeTopicRequest, LocateTopicRequest,
        SegmentPlace, Subscription, admin_client::AdminClient,
    },
    ids::{Incarnation, SegmentId, TopicId},
    key_hash::key_hash,
    reason::{Reason, Retry},
    storage::v1::Available,
    v1::{
        Batch, ConsumeFrame, ConsumeReply, Credit, Delivery, OpenConsume, OpenPublish,
        PayloadFormat, PublishFrame, PublishOpened, PublishReply, Receipt, RecordIndex,
        SubscriptionStart, consume_frame, consume_reply, discovery_client::DiscoveryClient,
        publish_frame, publish_reply, publisher_client::PublisherClient,
        subscriber_client::SubscriberClient,
    },
};
use geminga_runtime::{
    clock::{SharedClock, SystemClock},
    random::Random,
    tasks::Tasks,
    telemetry::MetricsRegistry,
};
use prost::Message;
use tokio::{net::TcpListener, sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, transport::Channel};
use tonic_types::StatusExt;

use crate::counted::Counted;

/// Nothing here takes longer unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// Bundles of a new cluster.
const BUNDLES: u32 = 1_024;

/// Everything below the broker, and the broker.
pub(crate) struct Cluster {
    /// The store that every part sees.
    pub(crate) store: FaultyStore,
    pub(crate) bookies: Vec<MemoryBookie>,
    /// Between the ledger client and the bookies.
    pub(crate) network: Network,
    pub(crate) broker: Option<Broker>,
    pub(crate) registry: MetricsRegistry,
    /// Values read of the store.
    pub(crate) read: Arc<AtomicU64>,
    /// Below every faulty store.
    memory: SharedStore,
    loopback: Loopback,
    random: Random,
    tasks: Tasks,
    /// Owner of the segments of the broker that runs.
    segments: Tasks,
}

/// What a test may set before a broker starts.
pub(crate) struct Settings {
    pub(crate) broker: BrokerConfig,
    pub(crate) managed: ManagedLedgerConfig,
    pub(crate) cold: Option<ColdStorage>,
    /// Of the managed ledgers.
    pub(crate) clock: SharedClock,
    pub(crate) authorizer: Arc<dyn Authorizer>,
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub(crate) async fn start_with(change: impl FnOnce(&mut BrokerConfig)) -> Self {
        Self::start_as(|settings| change(&mut settings.broker)).await
    }

    pub(crate) async fn start_as(change: impl FnOnce(&mut Settings)) -> Self {
        let (random, tasks) = (Random::from_seed(1), Tasks::new("test"));
        let read = Arc::default();
        let store = Arc::new(MemoryStore::new());
        let memory: SharedStore = Arc::new(Counted { store, read: Arc::clone(&read) });
        let store = FaultyStore::new(memory.clone(), random.fork(), FaultPlan::default(), &tasks);
        let (loopback, bookies) =
            (Loopback::new(), (1..=3).map(Incarnation).map(MemoryBookie::new));
        let mut cluster = Self {
            store,
            bookies: bookies.collect(),
            network: Network::default(),
            broker: None,
            registry: MetricsRegistry::new(),
            read,
            memory,
            loopback,
            random,
            segments: tasks.child("none yet"),
            tasks,
        };
        for bookie in &cluster.bookies {
            cluster.loopback.attach(bookie.incarnation(), Arc::new(bookie.clone()));
        }
        cluster.register_bookies(true).await;
        cluster.start_broker(change).await;
        cluster
    }

    /// Starts a broker in place of the one before.
    pub(crate) async fn start_broker(&mut self, change: impl FnOnce(&mut Settings)) {
        let (broker, segments) = self.another_broker("broker-0", change).await;
        (self.broker, self.segments) = (Some(broker), segments);
    }

    /// Starts a broker of this name beside the one that runs; with the owner of its segments' tasks.
    pub(crate) async fn another_broker(
        &self,
        name: &str,
        change: impl FnOnce(&mut Settings),
    ) -> (Broker, Tasks) {
        self.broker_behind(name, &self.store, change).await
    }

    /// A store that only one broker sees through: it can be cut off alone.
    pub(crate) fn own_store(&self) -> FaultyStore {
        let (memory, random) = (self.memory.clone(), self.random.fork());
        FaultyStore::new(memory, random, FaultPlan::default(), &self.tasks)
    }

    /// Starts a broker of this name that sees the cluster's state through this store.
    pub(crate) async fn broker_behind(
        &self,
        name: &str,
        store: &FaultyStore,
        change: impl FnOnce(&mut Settings),
    ) -> (Broker, Tasks) {
        let broker = BrokerConfig::new(name, SocketAddr::from(([127, 0, 0, 1], 0)));
        let managed = ManagedLedgerConfig {
            create_patience: Duration::from_millis(300),
            load_patience: Duration::from_secs(2),
            ..ManagedLedgerConfig::default()
        };
        let mut settings = Settings {
            broker,
            managed,
            cold: None,
            clock: Arc::new(SystemClock),
            authorizer: Arc::new(AllowAll),
        };
        change(&mut settings);
        let segments = self.tasks.child(name);
        let (setter, standing) = Standing::new();
        let store: SharedStore = Arc::new(store.clone());
        let (config, clock) = (settings.managed, settings.clock);
        let parts = BrokerParts {
            managed: self.managed(&store, config, (settings.cold, clock), standing, &segments),
            store,
            standing: Some(setter),
            clock: Arc::new(SystemClock),
            random: self.random.fork(),
            config: settings.broker,
            metrics: self.registry.with(geminga_broker::metrics::Metrics::register),
        };
        let broker = Broker::start_with(parts, settings.authorizer).await;
        (broker.expect("the broker starts"), segments)
    }

    fn managed(
        &self,
        store: &SharedStore,
        config: ManagedLedgerConfig,
        (cold, clock): (Option<ColdStorage>, SharedClock),
        standing: Standing,
        tasks: &Tasks,
    ) -> ManagedLedgers {
        let bookies = Arc::new(self.loopback.clone());
        let (network, random) = (self.network.clone(), self.random.fork());
        let bookies = FaultyBookies::new(bookies, network, random, tasks.child("network"));
        let client = LedgerClient::new(LedgerClientParts {
            store: store.clone(),
            standing,
            bookies: Arc::new(bookies),
            clock: Arc::new(SystemClock),
            random: self.random.fork(),
            tasks: tasks.child("ledgers"),
            config: LedgerClientConfig {
                add_timeout: Duration::from_millis(300),
                read_timeout: Duration::from_millis(300),
                short_patience: Duration::from_secs(60),
                seal_patience: Duration::from_millis(300),
                straggler_patience: Duration::from_millis(50),
                ..LedgerClientConfig::default()
            },
            metrics: ClientMetrics::default(),
        });
        ManagedLedgers::new(ManagedLedgersParts {
            client,
            store: store.clone(),
            clock,
            random: self.random.fork(),
            tasks: tasks.child("segments"),
            config,
            metrics: ManagedLedgerMetrics::default(),
            cold,
        })
    }

    fn shared_store(&self) -> SharedStore {
        Arc::new(self.store.clone())
    }

    /// Ends the broker and everything it runs, as `kill -9` would; when this returns, its address is free.
    pub(crate) async fn kill(&mut self) {
        let broker = self.broker.take().expect("it runs");
        let address = broker.address();
        broker.kill();
        self.segments.abort();
        eventually("nobody listens", async || TcpListener::bind(address).await.is_ok()).await;
    }

    /// All bookies are, or are not, there for new ledgers.
    pub(crate) async fn register_bookies(&self, there: bool) {
        for bookie in &self.bookies {
            let incarnation = bookie.incarnation().0;
            let key = keys::available(&format!("b{incarnation}"));
            let value = Available {
                format: 1,
                incarnation,
                writable: true,
                disk_free_bytes: 1_000,
                disk_total_bytes: 1_000,
                ..Available::default()
            };
            let op = if there { Op::put(key, value.encode_to_vec()) } else { Op::Delete(key) };
            self.store.txn(Txn::new().then(op)).await.expect("the store answers");
        }
    }

    /// Requests to bookies do, or do not, arrive.
    pub(crate) fn cut_bookies_off(&self, cut_off: bool) {
        let all = self.bookies.iter().map(MemoryBookie::incarnation);
        let partitioned = if cut_off { all.collect() } else { Default::default() };
        self.network.change(|faults| faults.partitioned = partitioned);
    }

    /// Somebody else takes segment 0 of the topic over, under the claim that stands: a stale owner's fate (O1, O4).
    pub(crate) async fn take_over(&self, topic: &str) -> ManagedLedger {
        let segment = SegmentId { topic: self.topic_id(topic).await, segment: 0 };
        let key = keys::owner(segment.bundle(BUNDLES));
        let (_, claim) = self.store.get(&key).await.expect("the store answers");
        let create_revision = claim.expect("the bundle is claimed").create_revision;
        let (store, tasks) = (self.shared_store(), self.tasks.child("rival"));
        let (config, clock) = (ManagedLedgerConfig::default(), Arc::new(SystemClock));
        let managed = self.managed(&store, config, (None, clock), Standing::always(), &tasks);
        managed.load(segment, Claim { key, create_revision }).await.expect("taken over")
    }

    /// Topics with objects, as a janitor finds them.
    pub(crate) async fn topics_with_objects(&self, cold: &ColdStorage) -> Vec<TopicId> {
        let (store, tasks) = (self.shared_store(), self.tasks.child("census"));
        let (config, clock) = (ManagedLedgerConfig::default(), Arc::new(SystemClock));
        let cold = (Some(cold.clone()), clock as SharedClock);
        let managed = self.managed(&store, config, cold, Standing::always(), &tasks);
        managed.topics_with_objects().await.expect("listed")
    }

    pub(crate) async fn topic_id(&self, topic: &str) -> TopicId {
        let request = DescribeTopicRequest { name: topic.into() };
        let described = self.client().await.admin().describe_topic(request).await;
        TopicId(described.expect("described").into_inner().id)
    }

    pub(crate) async fn subscription(&self, topic: &str, name: &str) -> Subscription {
        let request = DescribeSubscriptionRequest { topic: topic.into(), name: name.into() };
        let described = self.client().await.admin().describe_subscription(request).await;
        described.expect("described").into_inner()
    }

    /// Every bookie is replaced by an empty one that does not know of its loss: no copy of anything is left.
    pub(crate) fn lose_all_copies(&self) {
        for bookie in &self.bookies {
            let incarnation = bookie.incarnation();
            self.loopback.attach(incarnation, Arc::new(MemoryBookie::new(incarnation)));
        }
    }

    pub(crate) fn broker(&self) -> &Broker {
        self.broker.as_ref().expect("it runs")
    }

    pub(crate) async fn client(&self) -> Client {
        Client::of(self.broker()).await
    }
}

/// Waits until it holds; every test that needs this waits for an event that it cannot await.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, holds: impl Fn() -> F) {
    let poll = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, poll).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// One connection.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) channel: Channel,
}

impl Client {
    pub(crate) async fn of(broker: &Broker) -> Self {
        Self::at(&broker.address().to_string()).await
    }

    pub(crate) async fn at(address: &str) -> Self {
        let endpoint = Channel::from_shared(format!("http://{address}"));
        Self { channel: endpoint.expect("valid").connect().await.expect("connects") }
    }

    pub(crate) fn admin(&self) -> AdminClient<Channel> {
        AdminClient::new(self.channel.clone())
    }

    pub(crate) fn publisher(&self) -> PublisherClient<Channel> {
        let most = 64 * 1024 * 1024;
        PublisherClient::new(self.channel.clone())
            .max_encoding_message_size(most)
            .max_decoding_message_size(most)
    }

    pub(crate) fn subscriber(&self) -> SubscriberClient<Channel> {
        SubscriberClient::new(self.channel.clone()).max_decoding_message_size(64 * 1024 * 1024)
    }

    pub(crate) fn discovery(&self) -> DiscoveryClient<Channel> {
        DiscoveryClient::new(self.channel.clone())
    }

    pub(crate) async fn topic(&self, name: &str, segments: u32) {
        let request = CreateTopicRequest { name: name.into(), segments };
        self.admin().create_topic(request).await.expect("created");
    }

    /// A producer on segment 0.
    pub(crate) async fn producer(&self, topic: &str) -> Producer {
        self.open_producer(OpenPublish {
            topic: topic.into(),
            stream_number: 1,
            ..OpenPublish::default()
        })
        .await
        .expect("opened")
    }

    pub(crate) async fn open_producer(&self, open: OpenPublish) -> Result<Producer, Status> {
        let mut raw = self.raw_publish().await?;
        raw.send(publish_frame::Frame::Open(open)).await;
        match raw.reply().await? {
            Some(publish_reply::Reply::Opened(opened)) => {
                let last = opened.last_persisted_sequence;
                Ok(Producer { raw, opened, last })
            }
            other => panic!("not opened: {other:?}"),
        }
    }

    pub(crate) async fn raw_publish(&self) -> Result<RawPublish, Status> {
        let (frames, outbound) = mpsc::channel(64);
        let replies =
            self.publisher().publish_stream(ReceiverStream::new(outbound)).await?.into_inner();
        Ok(RawPublish { frames, replies })
    }

    /// A consumer on segment 0 with plenty of credit, from the earliest message on.
    pub(crate) async fn consumer(&self, topic: &str, subscription: &str) -> Consumer {
        let consumer = self.open_consumer(open_consume(topic, subscription)).await.expect("opened");
        consumer.credit(1 << 40, 1 << 40).await;
        consumer
    }

    pub(crate) async fn open_consumer(&self, open: OpenConsume) -> Result<Consumer, Status> {
        let mut consumer = self.raw_consume().await?;
        consumer.send(consume_frame::Frame::Open(open)).await;
        match consumer.reply().await? {
            Some(consume_reply::Reply::Opened(_)) => Ok(consumer),
            other => panic!("not opened: {other:?}"),
        }
    }

    pub(crate) async fn raw_consume(&self) -> Result<Consumer, Status> {
        let (frames, outbound) = mpsc::channel(64);
        let replies = self.subscriber().consume(ReceiverStream::new(outbound)).await?.into_inner();
        Ok(Consumer { frames, replies, handle: Bytes::new(), later: VecDeque::new() })
    }
}

pub(crate) fn open_consume(topic: &str, subscription: &str) -> OpenConsume {
    OpenConsume {
        topic: topic.into(),
        subscription: subscription.into(),
        consumer_name: "tester".into(),
        create_at: Some(SubscriptionStart::Earliest.into()),
        ..OpenConsume::default()
    }
}

/// A publish stream, frame by frame.
pub(crate) struct RawPublish {
    pub(crate) frames: mpsc::Sender<PublishFrame>,
    pub(crate) replies: Streaming<PublishReply>,
}

impl RawPublish {
    pub(crate) async fn send(&self, frame: publish_frame::Frame) {
        let _ = self.frames.send(PublishFrame { frame: Some(frame) }).await;
    }

    pub(crate) async fn reply(&mut self) -> Result<Option<publish_reply::Reply>, Status> {
        let reply = timeout(PATIENCE, self.replies.message()).await.expect("a reply in time")?;
        Ok(reply.map(|reply| reply.reply.expect("a known kind")))
    }
}

/// An open producer, which numbers its batches.
pub(crate) struct Producer {
    pub(crate) raw: RawPublish,
    pub(crate) opened: PublishOpened,
    pub(crate) last: u64,
}

impl Producer {
    pub(crate) fn next_batch(&mut self, messages: u32, payload: impl Into<Bytes>) -> Batch {
        let prev = self.last;
        self.last += u64::from(messages);
        batch(prev, messages, payload)
    }

    pub(crate) async fn send(&mut self, messages: u32, payload: impl Into<Bytes>) {
        let batch = self.next_batch(messages, payload);
        self.raw.send(publish_frame::Frame::Batch(batch)).await;
    }

    pub(crate) async fn receipt(&mut self) -> Receipt {
        loop {
            match self.raw.reply().await.expect("no refusal") {
                Some(publish_reply::Reply::Receipt(receipt)) => return receipt,
                Some(publish_reply::Reply::Credit(_)) => {}
                other => panic!("not a receipt: {other:?}"),
            }
        }
    }

    pub(crate) async fn publish(&mut self, messages: u32, payload: impl Into<Bytes>) -> Receipt {
        self.send(messages, payload).await;
        self.receipt().await
    }
}

pub(crate) fn batch(prev: u64, messages: u32, payload: impl Into<Bytes>) -> Batch {
    let payload = payload.into();
    Batch {
        prev_sequence: prev,
        lo_sequence: prev + 1,
        hi_sequence: prev + u64::from(messages),
        format: PayloadFormat::Native.into(),
        codec: 0,
        uncompressed_size: payload.len() as u32,
        index: Some(RecordIndex {
            key_hash: vec![key_hash(b"k"); messages as usize],
            has_key: vec![],
            ..Default::default()
        }),
        count: messages,
        payload,
        traceparent: String::new(),
        ..Default::default()
    }
}

/// A consume stream, frame by frame.
pub(crate) struct Consumer {
    pub(crate) frames: mpsc::Sender<ConsumeFrame>,
    pub(crate) replies: Streaming<ConsumeReply>,
    pub(crate) handle: Bytes,
    /// Deliveries that came while something else was waited for.
    pub(crate) later: VecDeque<Delivery>,
}

impl Consumer {
    pub(crate) async fn send(&self, frame: consume_frame::Frame) {
        let _ = self.frames.send(ConsumeFrame { frame: Some(frame) }).await;
    }

    pub(crate) async fn credit(&self, messages: u64, bytes: u64) {
        self.send(consume_frame::Frame::Credit(Credit { messages, bytes })).await;
    }

    pub(crate) async fn reply(&mut self) -> Result<Option<consume_reply::Reply>, Status> {
        let reply = timeout(PATIENCE, self.replies.message()).await.expect("a reply in time")?;
        Ok(reply.map(|reply| reply.reply.expect("a known kind")))
    }

    /// The next delivery's offsets, one by one.
    pub(crate) async fn delivery(&mut self) -> Vec<u64> {
        match self.reply().await.expect("no refusal") {
            Some(consume_reply::Reply::Delivery(delivery)) => {
                self.handle = delivery.handle.clone();
                delivery.deliver.iter().flat_map(|range| range.first..=range.last).collect()
            }
            other => panic!("not a delivery: {other:?}"),
        }
    }

    /// At least so many offsets.
    pub(crate) async fn deliveries(&mut self, messages: usize) -> Vec<u64> {
        let mut offsets = Vec::new();
        while offsets.len() < messages {
            offsets.extend(self.delivery().await);
        }
        offsets
    }

    /// Nothing comes within a moment.
    pub(crate) async fn quiet(&mut self) -> bool {
        timeout(Duration::from_millis(200), self.replies.message()).await.is_err()
    }
}

/// The reason a call was refused for; its code and details must be those of the reason.
pub(crate) fn reason(status: &Status) -> Reason {
    let info = status.get_details_error_info().unwrap_or_else(|| panic!("typed: {status:?}"));
    assert_eq!(info.domain, geminga_proto::reason::DOMAIN);
    let reason = Reason::parse(&info.reason).expect("a known reason");
    assert_eq!(status.code(), reason.code(), "{status:?}");
    assert_ne!(status.code(), Code::Ok);
    assert!(!status.message().is_empty(), "{reason:?} says nothing");
    if reason.retry() == Retry::Safe {
        let retry = status.get_details_retry_info().and_then(|info| info.retry_delay);
        assert!(retry.is_some_and(|delay| delay <= Duration::from_secs(5)), "{status:?}");
    }
    reason
}

/// A fact in the details of a refusal.
pub(crate) fn fact(status: &Status, name: &str) -> String {
    let info = status.get_details_error_info().expect("typed");
    info.metadata.get(name).unwrap_or_else(|| panic!("no {name} in {status:?}")).clone()
}

/// The reason of a result that must be a refusal.
pub(crate) fn refused<T>(result: Result<T, Status>) -> Reason {
    match result {
        Ok(_) => panic!("not refused"),
        Err(status) => reason(&status),
    }
}

/// Two brokers, `broker-0` of the cluster and `broker-1`, with a lease of 1 s.
pub(crate) struct Pair {
    pub(crate) cluster: Cluster,
    pub(crate) other: Broker,
    pub(crate) other_segments: Tasks,
}

impl Pair {
    pub(crate) async fn start(change: impl Fn(&mut BrokerConfig)) -> Self {
        let short = |config: &mut BrokerConfig| {
            config.lease_ttl = Duration::from_secs(1);
            change(config);
        };
        let cluster = Cluster::start_with(short).await;
        let (other, other_segments) =
            cluster.another_broker("broker-1", |settings| short(&mut settings.broker)).await;
        let pair = Self { cluster, other, other_segments };
        pair.both_see_both().await;
        pair
    }

    /// Waits until each broker knows of the other.
    pub(crate) async fn both_see_both(&self) {
        let client = self.cluster.client().await;
        client.topic("public/default/both", 16).await;
        for broker in [self.cluster.broker(), &self.other] {
            let client = Client::of(broker).await;
            eventually("the other is seen", async || {
                let placed = client.placed("public/default/both").await;
                placed.contains(&"broker-0".to_owned()) && placed.contains(&"broker-1".to_owned())
            })
            .await;
        }
    }

    /// A segment of the topic that belongs to `broker-1`.
    pub(crate) async fn segment_of_other(&self, topic: &str) -> u32 {
        let placed = self.cluster.client().await.placed(topic).await;
        let found = placed.iter().position(|id| id == "broker-1").expect("it has a share");
        u32::try_from(found).expect("few segments")
    }
}

impl Client {
    /// By segment: the broker that should have it.
    pub(crate) async fn placed(&self, topic: &str) -> Vec<String> {
        let places = self.places(topic).await;
        places
            .into_iter()
            .map(|place| if place.placed.is_empty() { place.broker } else { place.placed })
            .collect()
    }

    pub(crate) async fn places(&self, topic: &str) -> Vec<SegmentPlace> {
        let request = LocateTopicRequest { name: topic.into() };
        let located = self.admin().locate_topic(request).await.expect("located");
        located.into_inner().segments
    }
}
