//! Key-shared: many consumers, and each key in order.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use geminga_runtime::random::Random;
use parking_lot::Mutex;

use super::{key_shared, lease, offsets, topic};
use crate::{
    client::{Client, Outgoing},
    consumer::{Got, accept, open, release},
    judge::{Judge, Order},
    world::World,
};

const MESSAGES: usize = 240;
const KEYS: usize = 16;

fn keyed(count: usize) -> Vec<Outgoing> {
    (0..count)
        .map(|number| Outgoing::new(format!("m-{number}")).key(format!("k-{}", number * 7 % KEYS)))
        .collect()
}

async fn publish(client: &Client, topic: &str, judge: &Mutex<Judge>) {
    for chunk in keyed(MESSAGES).chunks(12) {
        let base = client.publish(topic, 0, chunk).await;
        judge.lock().published(base, chunk);
    }
}

/// What an agent does now and then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whim {
    Accept,
    Release {
        counts: bool,
    },
    /// Lets the lease run out.
    Stall,
    Leave,
    /// Its stream is reset, and it comes back at once.
    Vanish,
}

fn whim(random: &Random, calm: bool) -> Whim {
    match random.below(40) {
        0 if calm => Whim::Stall,
        1 => Whim::Leave,
        2 => Whim::Vanish,
        3..=5 => Whim::Release { counts: random.chance(0.5) },
        _ => Whim::Accept,
    }
}

/// A consumer that joins, works in order, fails, leaves and comes back, until every message is accepted.
async fn agent(
    world: Arc<World>,
    topic: String,
    name: String,
    (judge, done): (Arc<Mutex<Judge>>, Arc<AtomicBool>),
    seed: u64,
    calm: bool,
) {
    let random = Random::from_seed(seed);
    while !done.load(Ordering::Relaxed) {
        let client = world.client().await;
        let Ok(mut consumer) = client.try_consume(open(&topic, "keys", &name)).await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let leaves = 'stream: loop {
            if done.load(Ordering::Relaxed) {
                break true;
            }
            consumer.has_credit(20).await;
            if consumer.inbox.is_empty() {
                // Nothing to do, for now or for good.
                let got = consumer.within(Duration::from_millis(100)).await;
                consumer.inbox.extend(got);
                if consumer.ended.is_some() {
                    break false;
                }
                continue;
            }
            let got = consumer.inbox.pop_front().expect("not empty");
            judge.lock().delivered(&got);
            match whim(&random, calm) {
                Whim::Leave => break true,
                Whim::Vanish => break false,
                Whim::Stall => {
                    let revoked = |consumer: &crate::consumer::Consumer| {
                        consumer.ended.is_some()
                            || consumer.revoked.iter().any(|revoked| {
                                revoked.handle == got.handle
                                    && revoked
                                        .ranges
                                        .iter()
                                        .any(|r| (r.first..=r.last).contains(&got.offset))
                            })
                    };
                    consumer.revoked.clear();
                    consumer.until("a lease runs out", revoked).await;
                }
                Whim::Release { counts } => {
                    let token = consumer.ask(release(&got, Some(0), counts)).await;
                    match consumer.answer(token).await {
                        // Later ones of the key are revoked, and come again behind it.
                        Ok(_) | Err(Some(_)) => {}
                        Err(None) => break 'stream false,
                    }
                }
                Whim::Accept => {
                    judge.lock().asked(got.offset);
                    let token = consumer.ask(accept(&got)).await;
                    let answer = consumer.answer(token).await;
                    if let Err(None) = answer {
                        judge.lock().unanswered(got.offset);
                        break 'stream false;
                    }
                    judge.lock().answered(got.offset, answer.is_ok());
                }
            }
        };
        if leaves && consumer.ended.is_none() {
            let _ = tokio::time::timeout(Duration::from_secs(10), consumer.leave()).await;
        }
    }
}

/// Waits until everything is settled; says why, if nothing is for long.
async fn all_settled(world: &World, topic: &str) {
    let (mut settled, mut since) = (0, tokio::time::Instant::now());
    while settled < MESSAGES as u64 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let client = world.client().await;
        let now = client.describe(topic, "keys").await.cursors[0].mark_delete_next;
        if now > settled {
            (settled, since) = (now, tokio::time::Instant::now());
        }
        if since.elapsed() > Duration::from_secs(20) {
            let request = geminga_proto::v1::ExplainRequest {
                topic: topic.to_owned(),
                subscription: "keys".into(),
                segment: Some(0),
            };
            let explained = client.subscriber().explain(request).await;
            eprintln!("mark-delete stands at {settled} for {:?}: {explained:?}", since.elapsed());
            since = tokio::time::Instant::now();
        }
    }
}

async fn agents_finish(
    world: &Arc<World>,
    topic: &str,
    judge: &Arc<Mutex<Judge>>,
    calm: bool,
    harm: impl AsyncFnOnce(),
) {
    let done = Arc::new(AtomicBool::new(false));
    let agents: Vec<_> = (0..4)
        .map(|number| {
            let (world, judge) = (Arc::clone(world), (Arc::clone(judge), Arc::clone(&done)));
            let (topic, name) = (topic.to_owned(), format!("agent-{number}"));
            tokio::task::spawn_local(agent(world, topic, name, judge, number, calm))
        })
        .collect();
    harm().await;
    all_settled(world, topic).await;
    done.store(true, Ordering::Relaxed);
    for agent in agents {
        if let Err(error) = agent.await {
            panic!("an agent: {:?}", error.into_panic().downcast_ref::<String>());
        }
    }
    assert_eq!(judge.lock().unfinished(Order::Key), Vec::<String>::new());
}

pub(crate) async fn order_through_changes(world: Arc<World>) {
    let topic = topic("keys-changes");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "keys", lease(key_shared(), 1_000)).await;
    let judge = Arc::new(Mutex::new(Judge::default()));
    publish(&client, &topic, &judge).await;
    agents_finish(&world, &topic, &judge, true, async || {}).await;
}

pub(crate) async fn order_through_kills(world: Arc<World>) {
    let topic = topic("keys-kills");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "keys", lease(key_shared(), 5_000)).await;
    let judge = Arc::new(Mutex::new(Judge::default()));
    publish(&client, &topic, &judge).await;
    let watched = Arc::clone(&judge);
    let harmed = Arc::clone(&world);
    let place = topic.clone();
    agents_finish(&world, &topic, &judge, false, async move || {
        for harm in 1..=3 {
            crate::harness::eventually("the agents go on", async || {
                (watched.lock().accepted().len() >= harm * MESSAGES / 5).then_some(())
            })
            .await;
            if harm == 2 {
                harmed.move_owner(&place).await;
            } else {
                harmed.kill_owner(&place).await;
            }
        }
    })
    .await;
}

pub(crate) async fn held_keys_hold_up_no_other(world: Arc<World>) {
    let topic = topic("keys-held");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "keys", key_shared()).await;
    let mut a = client.consume(open(&topic, "keys", "a"), 1).await;
    client.publish(&topic, 0, &[Outgoing::new("first").key("held")]).await;
    let held = a.next().await;
    let mut b = client.consume(open(&topic, "keys", "b"), 100).await;
    let mut messages = vec![Outgoing::new("second").key("held")];
    messages.extend((0..30).map(|number| Outgoing::new("other").key(format!("o-{number}"))));
    client.publish(&topic, 0, &messages).await;
    a.grant(100).await;
    // Between the two of them everything comes but the held key's second message, unless a has it: one consumer may have
    // several messages of a key.
    let mut others = 0;
    while others < 30 {
        let got = tokio::select! {
            got = a.next() => got,
            got = b.next() => {
                assert_ne!(got.text(), "second", "its key is with a");
                got
            }
        };
        others += usize::from(got.text() == "other");
    }
    a.accept(&held).await;
}

pub(crate) async fn followers_are_revoked(world: Arc<World>) {
    let topic = topic("keys-followers");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "keys", key_shared()).await;
    let messages: Vec<Outgoing> =
        ["k", "other", "k", "k"].iter().map(|key| Outgoing::new("v").key(key)).collect();
    client.publish(&topic, 0, &messages).await;
    let mut a = client.consume(open(&topic, "keys", "a"), 4).await;
    let held: Vec<Got> = a.take(4).await;
    a.release(&held[0], Some(0), true).await;
    a.until("the later ones of the key are revoked", |a| !a.revoked.is_empty()).await;
    let revoked: Vec<u64> = a
        .revoked
        .iter()
        .flat_map(|revoked| &revoked.ranges)
        .flat_map(|range| range.first..=range.last)
        .collect();
    assert_eq!(revoked, [2, 3], "and the other key's is not");
    a.accept(&held[1]).await;
    assert_eq!(a.refused(accept(&held[2])).await, "INVALID_HANDLE");
    a.grant(10).await;
    let again = a.take(3).await;
    assert_eq!(offsets(&again), [0, 2, 3]);
    let attempts: Vec<u32> = again.iter().map(|got| got.attempt).collect();
    assert_eq!(attempts, [2, 1, 1], "revoked ones did not fail");
    for got in &again {
        a.accept(got).await;
    }
    assert_eq!(client.describe(&topic, "keys").await.cursors[0].mark_delete_next, 4);
}
