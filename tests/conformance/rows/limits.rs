//! What policies bound: age, backlog, retention, rates, counts, at every level.

use std::{sync::Arc, time::Duration};

use geminga_proto::{
    admin::v1::{
        CreateNamespaceRequest, CreateSubscriptionRequest, CreateTenantRequest, CreateTopicRequest,
        GetPoliciesRequest, PoliciesResponse,
    },
    reason::Reason,
    v1::{BacklogAction, ExplainRequest, HeldBy, OpenConsume, Policies},
};
use tokio::time::{Instant, timeout};

use super::{offsets, shared, topic};
use crate::{
    client::{Client, Outgoing, batch, numbered, reason, refusal, retrying, settings},
    consumer::open,
    harness::eventually,
    producer::{self, Producer},
    world::World,
};

/// Of ten thousand bytes, and a little more.
fn large(number: u64) -> Vec<Outgoing> {
    let mut value = format!("{number}-").into_bytes();
    value.resize(10_000, b'v');
    vec![Outgoing::new(value)]
}

/// A named producer's next message.
async fn send(producer: &mut Producer) {
    let next = producer.last;
    producer.send(&large(next)).await;
}

pub(crate) async fn ttl_expires(world: Arc<World>) {
    const TTL: Duration = Duration::from_millis(4_000);
    let topic = topic("ttl");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    let policies = Policies { ttl_ms: Some(4_000), ..Policies::default() };
    client.set_policies(&topic, policies).await;
    let published = Instant::now();
    client.publish(&topic, 0, &numbered(5)).await;
    eventually("the old ones count as settled", async || {
        let next = client.describe(&topic, "work").await.cursors[0].mark_delete_next;
        assert!(next == 0 || published.elapsed() >= TTL, "none is settled early");
        (next == 5).then_some(())
    })
    .await;
    client.publish(&topic, 0, &numbered(3)).await;
    let mut a = client.consume(open(&topic, "work", "a"), 100).await;
    assert_eq!(offsets(&a.take(3).await), [5, 6, 7], "those that are young are delivered");
}

/// A topic whose slowest subscription may have 100,000 bytes before it, with this action.
async fn with_quota(client: &Client, topic: &str, action: BacklogAction) {
    client.topic(topic, 1).await;
    client.subscription(topic, "slow", settings(Default::default())).await;
    let policies = Policies {
        backlog_quota_bytes: Some(100_000),
        backlog_action: Some(action.into()),
        ..Policies::default()
    };
    client.set_policies(topic, policies).await;
    client.in_force(topic, |policies| policies.backlog_quota_bytes == Some(100_000)).await;
}

/// Accepts everything from the beginning on, of which there are so many; they must be what was acknowledged.
async fn drain(client: &Client, topic: &str, acked: usize) {
    let mut consumer = client.consume(open(topic, "slow", "c"), 1_000).await;
    let all = consumer.take(acked).await;
    assert!(all.iter().enumerate().all(|(at, got)| got.offset == at as u64), "all, in order");
    consumer.accept_up_to(&all[acked - 1]).await;
}

pub(crate) async fn quota_rejects(world: Arc<World>) {
    let topic = topic("quota-reject");
    let client = world.client().await;
    with_quota(&client, &topic, BacklogAction::Reject).await;
    let mut producer = client.produce(producer::open(&topic, "p")).await;
    let mut acked = 0;
    let refused = loop {
        send(&mut producer).await;
        match producer.outcome().await.expect("the stream goes on") {
            Ok(_) => acked += 1,
            Err(refused) => break refused,
        }
        assert!(acked < 100, "ten times the quota was taken");
    };
    assert_eq!((refused.reason.as_str(), refused.retry_safe), ("BACKLOG_QUOTA", true));
    assert!(acked >= 10, "what fits is taken: {acked}");
    drain(&client, &topic, acked).await;
    let request = geminga_proto::v1::PublishRequest {
        topic: topic.clone(),
        segment: Some(0),
        batch: Some(batch(0, &large(0))),
        ..Default::default()
    };
    eventually("there is room again", async || {
        match client.publisher().publish(request.clone()).await {
            Ok(_) => Some(()),
            Err(status) => {
                assert_eq!(reason(&status), Some(Reason::BacklogQuota), "{status:?}");
                None
            }
        }
    })
    .await;
}

pub(crate) async fn quota_holds(world: Arc<World>) {
    let topic = topic("quota-hold");
    let client = world.client().await;
    with_quota(&client, &topic, BacklogAction::Hold).await;
    let mut producer = client.produce(producer::open(&topic, "p")).await;
    let mut acked = 0;
    loop {
        send(&mut producer).await;
        let Ok(outcome) = timeout(Duration::from_secs(2), producer.outcome()).await else { break };
        outcome.expect("the stream goes on").expect("nothing is refused at once");
        acked += 1;
        assert!(acked < 100, "ten times the quota was taken");
    }
    drain(&client, &topic, acked).await;
    let receipt = producer.receipt().await;
    assert_eq!(receipt.base_offset, acked as u64, "it waited for room, and was stored then");
}

pub(crate) async fn quota_evicts(world: Arc<World>) {
    const SENT: u64 = 40;
    let topic = topic("quota-evict");
    let client = world.client().await;
    with_quota(&client, &topic, BacklogAction::EvictOldest).await;
    let mut producer = client.produce(producer::open(&topic, "p")).await;
    for _ in 0..SENT {
        send(&mut producer).await;
        producer.receipt().await;
    }
    let next = eventually("the oldest are gone for it", async || {
        let cursor = client.describe(&topic, "slow").await.cursors[0].clone();
        (cursor.mark_delete_next >= SENT - 15).then_some(cursor.mark_delete_next)
    })
    .await;
    assert!(next < SENT, "the newest stay");
    let mut consumer = client.consume(open(&topic, "slow", "c"), 1_000).await;
    let mut left = vec![consumer.next().await];
    while left.last().is_some_and(|got| got.offset + 1 < SENT) {
        left.push(consumer.next().await);
    }
    // One more may have gone meanwhile: the quota is looked at again.
    assert!(left[0].offset >= next, "{} was evicted", left[0].offset);
    assert!(left.windows(2).all(|pair| pair[0].offset + 1 == pair[1].offset), "and none later");
}

pub(crate) async fn retention_keeps_and_lets_go(world: Arc<World>) {
    let topic = topic("retention");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", settings(Default::default())).await;
    client.publish(&topic, 0, &numbered(10)).await;
    let mut a = client.consume(open(&topic, "work", "a"), 100).await;
    let got = a.take(10).await;
    a.accept_up_to(&got[9]).await;
    a.leave().await;
    // A new owner closes the ledger that they are in; only closed ones go.
    world.move_owner(&topic).await;
    let client = world.client().await;
    client.publish(&topic, 0, &numbered(5)).await;
    let first = async |client: &Client| client.state(&topic, 0).await.first_offset;
    let keep = Policies { retention_ms: Some(3_600_000), ..Policies::default() };
    client.set_policies(&topic, keep).await;
    client.in_force(&topic, |policies| policies.retention_ms == Some(3_600_000)).await;
    let reads = async |client: &Client, wanted: Vec<u64>| {
        let reader =
            OpenConsume { reader: Some(crate::consumer::at_offset(0)), ..open(&topic, "", "") };
        let mut reader = client.consume(reader, 100).await;
        assert_eq!(offsets(&reader.take(wanted.len()).await), wanted);
    };
    reads(&client, (0..15).collect()).await;
    assert_eq!(first(&client).await, 0, "settled, and kept");
    let let_go = Policies { retention_ms: Some(0), ..Policies::default() };
    client.set_policies(&topic, let_go).await;
    eventually("the settled ledger is gone", async || (first(&client).await == 10).then_some(()))
        .await;
    reads(&client, (10..15).collect()).await;
    assert_eq!(client.describe(&topic, "work").await.cursors[0].backlog_messages, 5);
}

/// What holds for a scope.
async fn policies(client: &Client, scope: &str) -> PoliciesResponse {
    let request = GetPoliciesRequest { scope: scope.to_owned() };
    retrying("get policies", async || client.admin().get_policies(request.clone()).await).await
}

/// Waits until this is what holds for the topic, and by which level.
async fn holds(client: &Client, topic: &str, ttl_ms: u64, source: &str) {
    eventually("the level decides", async || {
        let told = policies(client, topic).await;
        let effective = told.effective.unwrap_or_default().ttl_ms;
        let of = told.sources.get("ttl_ms").map(String::as_str);
        (effective == Some(ttl_ms) && of == Some(source)).then_some(())
    })
    .await;
}

pub(crate) async fn a_tenant_decides_for_its_topics(world: Arc<World>) {
    let client = world.client().await;
    let (namespace, topic) = ("levels/one", "levels/one/t");
    retrying("create the tenant", async || {
        client.admin().create_tenant(CreateTenantRequest { name: "levels".into() }).await
    })
    .await;
    retrying("create the namespace", async || {
        let name = namespace.to_owned();
        let request = CreateNamespaceRequest { name, auto_create_topics: None };
        client.admin().create_namespace(request).await
    })
    .await;
    client.topic(topic, 1).await;
    client.subscription(topic, "work", shared()).await;
    let ttl = |ttl_ms| Policies { ttl_ms: Some(ttl_ms), ..Policies::default() };
    client.set_policies("levels", ttl(3_600_000)).await;
    holds(&client, topic, 3_600_000, "tenant").await;
    client.set_policies(namespace, ttl(7_200_000)).await;
    holds(&client, topic, 7_200_000, "namespace").await;
    client.set_policies(topic, ttl(1_000)).await;
    holds(&client, topic, 1_000, "topic").await;
    for scope in [topic, namespace] {
        client.unset_policies(scope, &["ttl_ms"]).await;
    }
    holds(&client, topic, 3_600_000, "tenant").await;
    // And it is what happens, not only what is told.
    client.set_policies("levels", ttl(1_000)).await;
    client.publish(topic, 0, &numbered(4)).await;
    eventually("the tenant's time to live is over", async || {
        (client.describe(topic, "work").await.cursors[0].mark_delete_next == 4).then_some(())
    })
    .await;
}

pub(crate) async fn publish_rate(world: Arc<World>) {
    const MESSAGES: u64 = 200;
    let topic = topic("publish-rate");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "judge", settings(Default::default())).await;
    let policies = Policies { publish_messages_per_s: Some(40), ..Policies::default() };
    client.set_policies(&topic, policies).await;
    client.in_force(&topic, |policies| policies.publish_messages_per_s == Some(40)).await;
    let mut producer = client.produce(producer::open(&topic, "p")).await;
    let began = Instant::now();
    for first in (0..MESSAGES).step_by(10) {
        let messages: Vec<Outgoing> =
            (first..first + 10).map(|number| Outgoing::new(format!("m-{number}"))).collect();
        producer.send(&messages).await;
    }
    for last in (10..=MESSAGES).step_by(10) {
        let receipt = producer.receipt().await;
        assert_eq!((receipt.hi_sequence, receipt.duplicate), (last, false), "none lost, in order");
    }
    // A second's worth may go at once, and the last batch on credit of the next one.
    let took = began.elapsed();
    assert!(took >= Duration::from_secs(3), "{MESSAGES} messages at 40 a second took {took:?}");
    let mut judge = client.consume(open(&topic, "judge", "judge"), 1_000).await;
    for (number, got) in judge.take(MESSAGES as usize).await.iter().enumerate() {
        assert_eq!((got.offset, got.text()), (number as u64, format!("m-{number}")));
    }
    judge.gets_nothing("each once").await;
}

pub(crate) async fn deliver_rate(world: Arc<World>) {
    const MESSAGES: u64 = 120;
    let topic = topic("deliver-rate");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    let policies = Policies { deliver_messages_per_s: Some(20), ..Policies::default() };
    client.set_policies(&topic, policies).await;
    client.in_force(&topic, |policies| policies.deliver_messages_per_s == Some(20)).await;
    for chunk in numbered(MESSAGES as usize).chunks(5) {
        client.publish(&topic, 0, chunk).await;
    }
    let began = Instant::now();
    let mut a = client.consume(open(&topic, "work", "a"), 10_000).await;
    a.take(1).await;
    let held = eventually("the rate limit is named", async || {
        let request =
            ExplainRequest { topic: topic.clone(), subscription: "work".into(), segment: Some(0) };
        let explained = client.subscriber().explain(request).await.expect("explained");
        let segment = explained.into_inner().segments.into_iter().next().expect("one");
        segment.held.into_iter().find(|held| held.by() == HeldBy::RateLimit)
    })
    .await;
    assert!(held.messages > 0 && held.until_ms > 0, "it says until when: {held:?}");
    let mut seen = a.take(MESSAGES as usize - 1).await;
    let took = began.elapsed();
    assert!(took >= Duration::from_secs(4), "{MESSAGES} messages at 20 a second took {took:?}");
    seen.sort_by_key(|got| got.offset);
    assert_eq!(offsets(&seen), (1..MESSAGES).collect::<Vec<_>>(), "every one, once");
}

pub(crate) async fn counts(world: Arc<World>) {
    let client = world.client().await;
    let namespace = "public/counted";
    retrying("create the namespace", async || {
        let name = namespace.to_owned();
        let request = CreateNamespaceRequest { name, auto_create_topics: Some(true) };
        client.admin().create_namespace(request).await
    })
    .await;
    let few = Policies {
        producers_max: Some(1),
        consumers_max: Some(1),
        subscriptions_max: Some(2),
        topics_max: Some(2),
        ..Policies::default()
    };
    client.set_policies(namespace, few).await;
    let topic = "public/counted/one".to_owned();
    client.topic(&topic, 1).await;
    client.topic("public/counted/two", 1).await;
    let third = || CreateTopicRequest { name: "public/counted/three".into(), segments: 1 };
    let refused = eventually("the limit of topics is known", async || {
        match client.admin().create_topic(third()).await {
            Ok(_) => panic!("a third topic"),
            Err(status) => Some(status),
        }
    })
    .await;
    assert_eq!(refusal::<()>(Err(refused)), "TOO_MANY_TOPICS");
    let auto = producer::open("public/counted/four", "p");
    let refused = refusal(client.try_produce(auto).await);
    assert!(refused.starts_with("TOO_MANY") || refused == "TOPIC_NOT_FOUND", "{refused}");
    client.in_force(&topic, |policies| policies.producers_max == Some(1)).await;

    let mut first = client.produce(producer::open(&topic, "first")).await;
    let second = refusal(client.try_produce(producer::open(&topic, "second")).await);
    assert_eq!(second, "TOO_MANY_PRODUCERS");
    first.send(&numbered(1)).await;
    first.receipt().await;

    client.subscription(&topic, "work", shared()).await;
    client.subscription(&topic, "more", shared()).await;
    let create = CreateSubscriptionRequest {
        topic: topic.clone(),
        name: "third".into(),
        ..CreateSubscriptionRequest::default()
    };
    let third = refusal(client.admin().create_subscription(create).await);
    assert_eq!(third, "TOO_MANY_SUBSCRIPTIONS");
    let mut a = client.consume(open(&topic, "work", "a"), 100).await;
    let b = refusal(client.try_consume(open(&topic, "work", "b")).await);
    assert_eq!(b, "TOO_MANY_CONSUMERS");
    assert_eq!(a.next().await.offset, 0, "who is there goes on");
    // Room comes back.
    drop(first);
    a.leave().await;
    let mut again = client.produce(producer::open(&topic, "second")).await;
    again.send(&numbered(1)).await;
    again.receipt().await;
    let mut b = client.consume(open(&topic, "work", "b"), 100).await;
    b.take(2).await;
}
