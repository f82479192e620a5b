//! Planned moves: new brokers get their share, draining ones give everything away, and clients see no error.

use std::{sync::Arc, time::Duration};

use geminga_broker::BrokerConfig;
use geminga_proto::{
    admin::v1::{DrainBrokerRequest, ListBrokersRequest},
    v1::{OpenPublish, Route, publish_frame, publish_reply::Reply},
};
use geminga_runtime::tasks::Tasks;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::harness::{Client, Cluster, Pair, Producer, eventually, open_consume};

const TOPIC: &str = "public/default/t";
const SEGMENTS: u32 = 8;

/// A producer as an SDK has it: it leaves when it is told to, and goes on where it is sent. Every refusal is a failure.
struct Steady {
    segment: u32,
    producer: Producer,
    receipts: Vec<u64>,
    moves: u32,
    stop: CancellationToken,
}

impl Steady {
    fn open(segment: u32, stream_number: u64, token: bytes::Bytes) -> OpenPublish {
        OpenPublish {
            topic: TOPIC.into(),
            segment,
            stream_number,
            resume_token: token,
            route: Route::Relay.into(),
            ..OpenPublish::default()
        }
    }

    async fn start(client: &Client, segment: u32, stop: CancellationToken) -> JoinHandle<Self> {
        let open = Self::open(segment, 1, bytes::Bytes::new());
        let producer = client.open_producer(open).await.expect("opened");
        let steady = Self { segment, producer, receipts: Vec::new(), moves: 0, stop };
        Tasks::new("test").spawn_returning("steady producer", steady.run())
    }

    async fn run(mut self) -> Self {
        while !self.stop.is_cancelled() {
            self.producer.send(1, "x").await;
            let mut leave_for = None;
            loop {
                match self.producer.raw.reply().await.expect("no refusal") {
                    Some(Reply::Receipt(receipt)) => {
                        self.receipts.push(receipt.base_offset);
                        break;
                    }
                    Some(Reply::Credit(_)) => {}
                    Some(Reply::GoAway(go_away)) => {
                        leave_for = Some(go_away.owner.expect("where to"));
                    }
                    other => panic!("not expected: {other:?}"),
                }
            }
            if let Some(owner) = leave_for {
                self.moves += 1;
                let token = self.producer.opened.resume_token.clone();
                let client = Client::at(&owner.address).await;
                let open = Self::open(self.segment, u64::from(self.moves) + 1, token);
                let last = self.producer.last;
                self.producer = client.open_producer(open).await.expect("opened there");
                assert_eq!(self.producer.last, last, "everything was answered before");
            }
            tokio::task::yield_now().await;
        }
        self
    }
}

async fn all_steady(client: &Client, stop: &CancellationToken) -> Vec<JoinHandle<Steady>> {
    let mut steady = Vec::new();
    for segment in 0..SEGMENTS {
        steady.push(Steady::start(client, segment, stop.clone()).await);
    }
    steady
}

/// Every receipt has its place, and a consumer finds each message once.
async fn check(client: &Client, steady: Vec<JoinHandle<Steady>>) -> u32 {
    let mut moves = 0;
    for steady in steady {
        let steady = steady.await.expect("no failure");
        let expected: Vec<u64> = (0..steady.receipts.len() as u64).collect();
        assert_eq!(steady.receipts, expected, "segment {}", steady.segment);
        moves += steady.moves;
        let open = geminga_proto::v1::OpenConsume {
            segment: steady.segment,
            route: Route::Relay.into(),
            ..open_consume(TOPIC, "s")
        };
        let mut consumer = client.open_consumer(open).await.expect("opened");
        consumer.credit(1 << 40, 1 << 40).await;
        assert_eq!(consumer.deliveries(expected.len()).await, expected);
    }
    moves
}

async fn owners(client: &Client) -> Vec<String> {
    client.places(TOPIC).await.into_iter().map(|place| place.broker).collect()
}

fn short(config: &mut BrokerConfig) {
    config.lease_ttl = Duration::from_secs(1);
}

#[tokio::test]
async fn a_new_broker_gets_its_share_under_load_without_an_error() {
    let cluster = Cluster::start_with(short).await;
    let client = cluster.client().await;
    client.topic(TOPIC, SEGMENTS).await;
    let stop = CancellationToken::new();
    let steady = all_steady(&client, &stop).await;
    assert!(owners(&client).await.iter().all(|owner| owner == "broker-0"));
    let (other, _segments) =
        cluster.another_broker("broker-1", |settings| short(&mut settings.broker)).await;
    eventually("everybody has its share", async || {
        let placed = client.placed(TOPIC).await;
        placed.contains(&"broker-1".into()) && owners(&client).await == placed
    })
    .await;
    stop.cancel();
    let moves = check(&client, steady).await;
    let share = owners(&client).await.iter().filter(|owner| *owner == "broker-1").count();
    assert_eq!(moves as usize, share, "I20: each moved once, the others not at all");
    drop(other);
}

#[tokio::test]
async fn a_broker_that_is_to_drain_gives_everything_away_and_takes_it_again_when_it_may() {
    let pair = Pair::start(|_| {}).await;
    let client = Client::of(&pair.other).await;
    client.topic(TOPIC, SEGMENTS).await;
    let stop = CancellationToken::new();
    let steady = all_steady(&client, &stop).await;
    assert!(owners(&client).await.contains(&"broker-0".into()));
    let mut ready = pair.cluster.broker().ready();
    ready.wait_for(|ready| *ready).await.expect("it runs");
    let drain = |cancel| DrainBrokerRequest { id: "broker-0".into(), cancel };
    client.admin().drain_broker(drain(false)).await.expect("wished");
    ready.wait_for(|ready| !ready).await.expect("it runs");
    eventually("it has nothing left", async || {
        let left = client.admin().drain_broker(drain(false)).await.expect("wished");
        left.into_inner().bundles_left == 0
    })
    .await;
    eventually("the other has all that is used", async || {
        owners(&client).await.iter().all(|owner| owner == "broker-1")
    })
    .await;
    let brokers = client.admin().list_brokers(ListBrokersRequest {}).await.expect("listed");
    let brokers = brokers.into_inner().brokers;
    assert_eq!(brokers.iter().map(|b| b.draining).collect::<Vec<_>>(), [true, false]);
    assert!(brokers[1].bundles > 0 && brokers[0].bundles == 0);
    client.admin().drain_broker(drain(true)).await.expect("taken back");
    ready.wait_for(|ready| *ready).await.expect("it runs");
    eventually("it has its share again", async || {
        let placed = client.placed(TOPIC).await;
        placed.contains(&"broker-0".into()) && owners(&client).await == placed
    })
    .await;
    stop.cancel();
    assert!(check(&client, steady).await >= 2);
}

#[tokio::test]
async fn a_shutdown_sends_every_client_on_and_leaves_nothing_to_recover() {
    let Pair { mut cluster, other, .. } = Pair::start(|_| {}).await;
    let client = cluster.client().await;
    client.topic(TOPIC, SEGMENTS).await;
    let elsewhere = Client::of(&other).await;
    let stop = CancellationToken::new();
    // At the owners themselves: a stream through the broker that stops would end with it.
    let mut steady = Vec::new();
    for (segment, placed) in (0..).zip(client.placed(TOPIC).await) {
        let at = if placed == "broker-0" { &client } else { &elsewhere };
        steady.push(Steady::start(at, segment, stop.clone()).await);
    }
    let broker = cluster.broker.take().expect("it runs");
    broker.shutdown(Duration::from_secs(10)).await;
    eventually("the other has all that is used", async || {
        owners(&elsewhere).await.iter().all(|owner| owner == "broker-1")
    })
    .await;
    stop.cancel();
    assert!(check(&elsewhere, steady).await > 0);
}

/// A client that does not leave in time loses its stream, with the way to go, and nothing that was accepted.
#[tokio::test]
async fn who_does_not_leave_is_sent_on() {
    let pair = Pair::start(|config| config.move_drain = Duration::from_millis(100)).await;
    let client = pair.cluster.client().await;
    client.topic(TOPIC, SEGMENTS).await;
    let segment = client.placed(TOPIC).await.iter().position(|id| id == "broker-0");
    let segment = segment.expect("it has a share") as u32;
    let open = Steady::open(segment, 1, bytes::Bytes::new());
    let mut producer = client.open_producer(open).await.expect("opened");
    producer.publish(1, "x").await;
    let drain = DrainBrokerRequest { id: "broker-0".into(), cancel: false };
    client.admin().drain_broker(drain).await.expect("wished");
    let batch = producer.next_batch(1, "y");
    match producer.raw.reply().await.expect("told") {
        Some(Reply::GoAway(go_away)) => {
            let owner = go_away.owner.expect("where to");
            assert_eq!(owner.address, pair.other.address().to_string());
        }
        other => panic!("not told to go: {other:?}"),
    }
    producer.raw.send(publish_frame::Frame::Batch(batch)).await; // accepted: the drain has not ended
    assert_eq!(producer.receipt().await.base_offset, 1);
    let status = producer.raw.reply().await.expect_err("ended");
    assert_eq!(crate::harness::reason(&status), geminga_proto::reason::Reason::NotOwner);
    assert_eq!(crate::harness::fact(&status, "owner_address"), pair.other.address().to_string());
    let shared = Arc::new(Client::of(&pair.other).await);
    let open = Steady::open(segment, 2, producer.opened.resume_token.clone());
    let mut producer = shared.open_producer(open).await.expect("opened there");
    assert_eq!(producer.publish(1, "z").await.base_offset, 2);
}
