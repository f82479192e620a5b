//! Producers and a consumer that work while a test does its harm.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, stream::FuturesOrdered};
use geminga_client::{Client, Error, Message, Retry, Start};
use tokio::{task::JoinHandle, time::Instant};

use super::{
    Cluster, PATIENCE, eventually, eventually_ok,
    history::{Delivered, History, Outcome, Sent, key_of, value_of},
};

const PRODUCERS: usize = 3;
/// Pause between two messages of a producer.
const PACE: Duration = Duration::from_millis(4);
const KEYS: u64 = 8;
/// Bytes of a message.
const LENGTH: usize = 200;
/// Messages of a producer in flight.
const IN_FLIGHT: usize = 256;
/// How long a message may wait for its receipt. Longer than any fault of a test.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(180);

/// Under way.
pub(crate) struct Load {
    topic: String,
    /// Its connections serve producers and consumer.
    _client: Client,
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    delivered: Arc<AtomicU64>,
    history: Arc<Mutex<History>>,
    pause: Arc<Mutex<Pause>>,
    producers: Vec<JoinHandle<()>>,
    consumer: JoinHandle<()>,
}

/// The longest time without a receipt.
struct Pause {
    last: Instant,
    longest: Duration,
}

impl Pause {
    fn receipt(&mut self) {
        self.longest = self.longest.max(self.last.elapsed());
        self.last = Instant::now();
    }
}

impl Load {
    /// Creates the topic and its subscription, and begins; returns once every producer has a receipt.
    pub(crate) async fn start(cluster: &Cluster, topic: &str, segments: u32) -> Self {
        Self::at(&cluster.servers(), topic, segments).await
    }

    /// As [`Self::start`], at these addresses.
    pub(crate) async fn at(servers: &str, topic: &str, segments: u32) -> Self {
        let client = client_of(servers).await;
        let name = geminga_client::topic_name(topic).expect("a name");
        retrying("create the topic", async || client.admin().create_topic(&name, segments).await)
            .await;
        let history = Arc::new(Mutex::new(History::default()));
        let (stop, acknowledged, delivered) =
            (Arc::new(AtomicBool::new(false)), Arc::default(), Arc::default());
        let pause = Arc::new(Mutex::new(Pause { last: Instant::now(), longest: Duration::ZERO }));
        let consumer = consume(&client, topic, "judge", &history, &delivered).await;
        let mut producers = Vec::new();
        for producer in 0..PRODUCERS {
            let made = retrying("open a producer", async || {
                let builder = client.producer(topic).name(format!("producer-{producer}"));
                builder.message_timeout(MESSAGE_TIMEOUT).build().await
            })
            .await;
            let work = produce(
                made,
                producer,
                Arc::clone(&history),
                Arc::clone(&acknowledged),
                Arc::clone(&pause),
                Arc::clone(&stop),
            );
            producers.push(tokio::spawn(work));
        }
        let load = Self {
            topic: topic.to_owned(),
            _client: client,
            stop,
            acknowledged,
            delivered,
            history,
            pause,
            producers,
            consumer,
        };
        load.goes_on("the load begins").await;
        load
    }

    pub(crate) fn topic(&self) -> &str {
        &self.topic
    }

    pub(crate) fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    /// The longest time without a receipt since this was last asked.
    #[allow(dead_code, reason = "the test on nodes asks")]
    pub(crate) fn longest_pause(&self) -> Duration {
        let mut pause = self.pause.lock().expect("no panic");
        pause.receipt();
        std::mem::take(&mut pause.longest)
    }

    /// Messages that were not acknowledged: what an application had to handle.
    #[allow(dead_code, reason = "the test on nodes asks")]
    pub(crate) fn failed(&self) -> usize {
        self.history.lock().expect("no panic").not_acknowledged().len()
    }

    /// Waits until a good number of new receipts and deliveries have come: nothing is stuck.
    ///
    /// # Panics
    /// With `when` if they do not within a minute.
    pub(crate) async fn goes_on(&self, when: &str) {
        let (acknowledged, delivered) =
            (self.acknowledged(), self.delivered.load(Ordering::SeqCst));
        eventually_ok(async || {
            let receipts = self.acknowledged() - acknowledged;
            let deliveries = self.delivered.load(Ordering::SeqCst) - delivered;
            let enough = receipts > 100 && deliveries > 100;
            enough.then_some(()).ok_or_else(|| {
                format!("{receipts} new receipts and {deliveries} deliveries only: {when}")
            })
        })
        .await;
    }

    /// Ends the load, waits until every message sent has its outcome and every acknowledged one was delivered, reads the
    /// topic once more from the start under another subscription, and judges all of it. Returns the messages acknowledged.
    ///
    /// # Panics
    /// With what clients saw that may not be.
    pub(crate) async fn finish(self, cluster: &Cluster) -> usize {
        self.finish_at(&cluster.servers()).await
    }

    /// As [`Self::finish`], at these addresses.
    pub(crate) async fn finish_at(self, servers: &str) -> usize {
        self.stop.store(true, Ordering::SeqCst);
        for producer in self.producers {
            tokio::time::timeout(MESSAGE_TIMEOUT + PATIENCE, producer)
                .await
                .expect("every message has its outcome in time")
                .expect("the producer does not panic");
        }
        let expected = self.history.lock().expect("no panic").acknowledged();
        let distinct = |history: &Mutex<History>| {
            let history = history.lock().expect("no panic");
            let ids: std::collections::BTreeSet<_> =
                history.deliveries.iter().map(|d| (d.id.segment, d.id.offset)).collect();
            ids.len()
        };
        eventually("the consumer catches up", async || {
            (distinct(&self.history) >= expected).then_some(())
        })
        .await;
        self.consumer.abort();
        let _ = self.consumer.await;
        let history = self.history.lock().expect("no panic").clone();
        assert_sound(&history, "as consumed");

        let again = Arc::new(Mutex::new(History {
            outcomes: history.outcomes.clone(),
            deliveries: Vec::new(),
        }));
        let counter = Arc::new(AtomicU64::new(0));
        let client = client_of(servers).await; // the brokers may be others by now
        let reader = consume(&client, &self.topic, "second-look", &again, &counter).await;
        eventually("a new subscription reads all of it", async || {
            (distinct(&again) >= expected).then_some(())
        })
        .await;
        reader.abort();
        let _ = reader.await;
        assert_sound(&again.lock().expect("no panic"), "as read again from the start");
        expected
    }
}

fn assert_sound(history: &History, when: &str) {
    let wrong = history.violations(LENGTH);
    let shown: Vec<&String> = wrong.iter().take(20).collect();
    assert!(
        wrong.is_empty(),
        "{when}: {} violations: {shown:#?}\nnot acknowledged: {:?}",
        wrong.len(),
        history.not_acknowledged().iter().take(10).collect::<Vec<_>>()
    );
}

/// A client of all brokers.
#[allow(dead_code, reason = "the measurements ask")]
pub(crate) async fn client(cluster: &Cluster) -> Client {
    client_of(&cluster.servers()).await
}

async fn client_of(servers: &str) -> Client {
    Client::builder()
        .server(servers)
        .wait_for_server(PATIENCE)
        .build()
        .await
        .expect("a broker answers")
}

/// Repeats what may be repeated, for a minute.
async fn retrying<T>(what: &str, mut attempt: impl AsyncFnMut() -> Result<T, Error>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match attempt().await {
            Ok(done) => return done,
            Err(error) => {
                assert!(
                    error.retry() != Retry::Never && Instant::now() < deadline,
                    "{what}: {error}"
                );
            }
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn consume(
    client: &Client,
    topic: &str,
    subscription: &str,
    history: &Arc<Mutex<History>>,
    delivered: &Arc<AtomicU64>,
) -> JoinHandle<()> {
    let mut consumer = retrying("open a consumer", async || {
        client.consumer(topic, subscription).start(Start::Earliest).build().await
    })
    .await;
    let (history, delivered) = (Arc::clone(history), Arc::clone(delivered));
    tokio::spawn(async move {
        while let Some(received) = consumer.next().await {
            let received = received.expect("a consumer goes on through every fault");
            let accepted = received.accept();
            drop(accepted); // asked for; what is not confirmed comes again
            history.lock().expect("no panic").deliveries.push(Delivered {
                id: received.id,
                value: received.value.to_vec(),
                key: received.key.as_deref().unwrap_or_default().to_vec(),
            });
            delivered.fetch_add(1, Ordering::SeqCst);
        }
    })
}

async fn produce(
    made: geminga_client::Producer,
    producer: usize,
    history: Arc<Mutex<History>>,
    acknowledged: Arc<AtomicU64>,
    pause: Arc<Mutex<Pause>>,
    stop: Arc<AtomicBool>,
) {
    let mut number = 0;
    let mut pending = FuturesOrdered::new();
    let mut pace = tokio::time::interval(PACE);
    pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let record = |sent: Sent, outcome: Outcome| {
        if matches!(outcome, Outcome::Acknowledged(_)) {
            acknowledged.fetch_add(1, Ordering::SeqCst);
            pause.lock().expect("no panic").receipt();
        }
        history.lock().expect("no panic").outcomes.insert(sent, outcome);
    };
    loop {
        let stopping = stop.load(Ordering::SeqCst);
        if stopping && pending.is_empty() {
            break;
        }
        tokio::select! {
            Some((sent, outcome)) = pending.next() => record(sent, outcome),
            _ = pace.tick(), if !stopping && pending.len() < IN_FLIGHT => {
                let sent = Sent { producer, number };
                number += 1;
                let message = Message::new(value_of(&sent, LENGTH)).with_key(key_of(&sent, KEYS));
                match made.send(message).await {
                    Ok(receipt) => pending.push_back(async move {
                        let outcome = match receipt.await {
                            Ok(receipt) => Outcome::Acknowledged(receipt.id),
                            Err(error) => outcome_of(&error),
                        };
                        (sent, outcome)
                    }),
                    Err(error) => record(sent, outcome_of(&error)),
                }
            }
        }
    }
}

fn outcome_of(error: &Error) -> Outcome {
    match error {
        Error::NotSent { .. } | Error::Closed => Outcome::Refused(error.to_string()),
        Error::Refused(refused) if refused.reason.retry() != Retry::SameSequence => {
            Outcome::Refused(error.to_string())
        }
        _ => Outcome::Unknown(error.to_string()),
    }
}
