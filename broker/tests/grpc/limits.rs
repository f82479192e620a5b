//! Rates and counts: what is past a rate waits, what is past a count is refused, and a change holds within seconds.

use std::time::Duration;

use geminga_proto::{
    admin::v1::{CreateTopicRequest, SetPoliciesRequest},
    reason::Reason,
    v1::{
        HeldBy, OpenConsume, OpenPublish, Policies, PublishRequest, ReadFrom, Reject, Route,
        SubscriptionStart, SubscriptionType, consume_reply::Reply, publish_frame, publish_reply,
        read_from::From as Place, settle::Verb,
    },
};
use tokio::time::timeout;

use crate::{
    harness::{
        Client, Cluster, PATIENCE, Pair, batch, eventually, fact, open_consume, reason, refused,
    },
    types::{
        TOPIC, consumer, dead_letters, delivery, explain, held, offsets, open, records, settings,
        settle, started,
    },
};

async fn set(client: &Client, scope: &str, policies: Policies, unset: &[&str]) {
    let unset = unset.iter().map(|name| (*name).into()).collect();
    let request = SetPoliciesRequest { scope: scope.into(), policies: Some(policies), unset };
    client.admin().set_policies(request).await.expect("set");
}

fn unary(topic: &str, payload: &'static str) -> PublishRequest {
    let batch = Some(batch(0, 1, payload));
    PublishRequest { topic: topic.into(), batch, ..PublishRequest::default() }
}

async fn impatient() -> (Cluster, Client) {
    let cluster =
        Cluster::start_with(|config| config.limits.busy_after = Duration::from_millis(50)).await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    (cluster, client)
}

/// Nothing may be published to the topic, or in its namespace; what was stored until the owner heard of it.
async fn stop_publishing(client: &Client, scope: &str, topic: &str) -> u64 {
    let nothing = Policies { publish_bytes_per_s: Some(0), ..Policies::default() };
    set(client, scope, nothing, &[]).await;
    let mut stored = 0;
    let stopped = async {
        while client.publisher().publish(unary(topic, "x")).await.is_ok() {
            stored += 1;
        }
    };
    timeout(PATIENCE, stopped).await.expect("in force within seconds");
    let refused = client.publisher().publish(unary(topic, "x")).await;
    assert_eq!(reason(&refused.expect_err("still")), Reason::RateLimited);
    stored
}

#[tokio::test]
async fn a_publish_stream_waits_and_nothing_of_it_is_refused_lost_or_reordered() {
    let (cluster, client) = impatient().await;
    let stored = stop_publishing(&client, "public", TOPIC).await;
    let mut one = client.producer(TOPIC).await;
    let mut two = client.producer(TOPIC).await;
    for producer in [&mut one, &mut two] {
        for _ in 0..5 {
            producer.send(1, "waits").await;
        }
    }
    let early = timeout(Duration::from_millis(200), one.raw.replies.message()).await;
    assert!(early.is_err(), "{early:?}");
    let held = cluster.broker().held().publish_bytes;
    assert_eq!(held, 0, "what waits holds nothing of the budget");
    set(&client, "public", Policies::default(), &["publish_bytes_per_s"]).await;
    let mut offsets = Vec::new();
    for producer in [&mut one, &mut two] {
        for sequence in 1..=5 {
            let receipt = producer.receipt().await;
            assert_eq!(receipt.hi_sequence, sequence);
            offsets.push(receipt.base_offset);
        }
    }
    assert!(offsets[..5].is_sorted() && offsets[5..].is_sorted(), "{offsets:?}");
    offsets.sort_unstable();
    assert_eq!(offsets, (stored..stored + 10).collect::<Vec<_>>());
    client.publisher().publish(unary(TOPIC, "x")).await.expect("calls go on too");
}

#[tokio::test]
async fn a_stream_past_its_rate_goes_on_by_time_alone() {
    let (_cluster, client) = impatient().await;
    let rate = Policies { publish_messages_per_s: Some(5), ..Policies::default() };
    set(&client, TOPIC, rate, &[]).await;
    let refused = async { while client.publisher().publish(unary(TOPIC, "x")).await.is_ok() {} };
    timeout(PATIENCE, refused).await.expect("in force within seconds");
    let mut producer = client.producer(TOPIC).await;
    for _ in 0..8 {
        producer.send(1, "x").await;
    }
    for _ in 0..8 {
        producer.receipt().await;
    }
}

#[tokio::test]
async fn what_is_relayed_waits_at_the_owner() {
    let pair = Pair::start(|config| config.limits.busy_after = Duration::from_millis(50)).await;
    let client = pair.cluster.client().await;
    client.topic(TOPIC, 8).await;
    let segment = pair.segment_of_other(TOPIC).await;
    let nothing = Policies { publish_messages_per_s: Some(0), ..Policies::default() };
    set(&client, "public/default", nothing, &[]).await;
    let call = || PublishRequest { segment: Some(segment), ..unary(TOPIC, "x") };
    let refused = async {
        loop {
            if let Err(status) = client.publisher().publish(call()).await {
                return status;
            }
        }
    };
    let status = timeout(PATIENCE, refused).await.expect("in force within seconds");
    assert_eq!(reason(&status), Reason::RateLimited);
    let route = Route::Relay.into();
    let topic = TOPIC.into();
    let open = OpenPublish { topic, segment, route, stream_number: 1, ..OpenPublish::default() };
    let mut producer = client.open_producer(open).await.expect("opened");
    producer.send(1, "waits").await;
    set(&client, "public/default", Policies::default(), &["publish_messages_per_s"]).await;
    producer.receipt().await;
}

#[tokio::test]
async fn deliveries_past_their_rate_wait_are_explained_and_go_on_when_it_changes() {
    let (_cluster, client) = started().await;
    client.producer(TOPIC).await.publish(5, "x").await;
    let nothing = Policies { deliver_messages_per_s: Some(0), ..Policies::default() };
    set(&client, TOPIC, nothing, &[]).await;
    let shared = settings(SubscriptionType::Shared);
    let waits = client.open_consumer(open("one", &shared)).await.expect("opened");
    waits.credit(1 << 20, 1 << 30).await;
    let (mut consumer, mut producer) = (waits, client.producer(TOPIC).await);
    // Until the owner has heard of it they are delivered.
    eventually("in force within seconds", async || {
        held(&explain(&client).await, HeldBy::RateLimit) > 0
            || client.publisher().publish(unary(TOPIC, "x")).await.is_err()
    })
    .await;
    let next = producer.publish(5, "x").await.base_offset;
    let open = OpenConsume {
        topic: TOPIC.into(),
        reader: Some(ReadFrom { from: Some(Place::Offset(next)) }),
        ..OpenConsume::default()
    };
    let mut reader = client.open_consumer(open).await.expect("opened");
    reader.credit(1 << 20, 1 << 30).await;
    assert!(reader.quiet().await, "readers count too");
    let summary = explain(&client).await.summary;
    assert!(summary.contains("delivery rate"), "{summary}");
    let some = Policies { deliver_messages_per_s: Some(1_000), ..Policies::default() };
    set(&client, TOPIC, some, &[]).await;
    let mut seen = Vec::new();
    while !seen.contains(&(next + 4)) {
        seen.extend(offsets(&delivery(&mut consumer).await));
    }
    assert_eq!(reader.delivery().await, (next..next + 5).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_dispatcher_past_its_rate_wakes_by_time_alone() {
    let (_cluster, client) = started().await;
    let rate = Policies { deliver_messages_per_s: Some(20), ..Policies::default() };
    set(&client, TOPIC, rate, &[]).await;
    let mut consumer = consumer(&client, "one", &settings(SubscriptionType::Shared)).await;
    let mut producer = client.producer(TOPIC).await;
    let mut stored = 0;
    // A batch of more than a second at a time, until it shows.
    loop {
        producer.publish(30, "x").await;
        stored += 30;
        let explained = explain(&client).await;
        let waits = explained.held.iter().find(|held| held.by == i32::from(HeldBy::RateLimit));
        if let Some(waits) = waits {
            assert!(waits.until_ms > 0, "it says when it goes on");
            break;
        }
    }
    let mut seen = 0;
    while seen < stored {
        seen += offsets(&delivery(&mut consumer).await).len();
    }
}

#[tokio::test]
async fn dead_letters_are_kept_whatever_is_limited() {
    let (_cluster, client) = impatient().await;
    let mut consumer = consumer(&client, "one", &settings(SubscriptionType::Shared)).await;
    client.producer(TOPIC).await.publish(1, records(&["bad"])).await;
    let got = delivery(&mut consumer).await;
    set(&client, "public", Policies { topics_max: Some(0), ..Policies::default() }, &[]).await;
    let create = CreateTopicRequest { name: "public/default/new".into(), segments: 1 };
    let refused = client.admin().create_topic(create).await.expect_err("no room");
    assert_eq!(reason(&refused), Reason::TooManyTopics);
    let publish = client.publisher().publish(unary("public/default/other", "x")).await;
    assert_eq!(reason(&publish.expect_err("not on first use either")), Reason::TooManyTopics);
    stop_publishing(&client, "public/default", TOPIC).await;
    let reason = "bad".into();
    let reject = Reject { ranges: got.deliver.clone(), handle: got.handle.clone(), reason };
    settle(&mut consumer, Verb::Reject(reject)).await.expect("rejected");
    dead_letters(&client, 1).await;
}

#[tokio::test]
async fn counts_are_limited_by_the_nearest_level_and_who_is_there_stays() {
    let (_cluster, client) = started().await;
    let mut first = client.producer(TOPIC).await;
    let shared = settings(SubscriptionType::Shared);
    let mut one = consumer(&client, "one", &shared).await;
    let one_each =
        Policies { producers_max: Some(1), consumers_max: Some(1), ..Policies::default() };
    set(&client, "public", one_each, &[]).await;
    let named = |name: &str| OpenPublish {
        topic: TOPIC.into(),
        producer_name: name.into(),
        stream_number: 1,
        ..OpenPublish::default()
    };
    let second = async {
        loop {
            if let Err(status) = client.open_producer(named("second")).await {
                return status;
            }
        }
    };
    let status = timeout(PATIENCE, second).await.expect("in force within seconds");
    assert_eq!(reason(&status), Reason::TooManyProducers);
    assert_eq!(
        (fact(&status, "producers_max"), fact(&status, "level")),
        ("1".into(), "tenant".into())
    );
    let call = PublishRequest { producer_name: "third".into(), ..unary(TOPIC, "x") };
    assert_eq!(refused(client.publisher().publish(call).await), Reason::TooManyProducers);
    eventually("consumers too", async || {
        let attached = client.open_consumer(open("two", &shared)).await;
        attached.is_err_and(|status| {
            fact(&status, "level") == "tenant" && reason(&status) == Reason::TooManyConsumers
        })
    })
    .await;
    let zero = Policies { producers_max: Some(0), consumers_max: Some(0), ..Policies::default() };
    set(&client, TOPIC, zero, &[]).await;
    let stored = first.publish(1, "it stays").await.base_offset;
    assert!(offsets(&delivery(&mut one).await).contains(&stored));
    set(&client, TOPIC, Policies::default(), &["producers_max", "consumers_max"]).await;
    first.raw.send(publish_frame::Frame::Ping(geminga_proto::v1::Ping { token: 9 })).await;
    let pong = first.raw.reply().await.expect("goes on");
    assert!(matches!(pong, Some(publish_reply::Reply::Pong(_) | publish_reply::Reply::Credit(_))));
    drop(first);
    eventually("its place is free", async || client.open_producer(named("second")).await.is_ok())
        .await;
}

#[tokio::test]
async fn a_policy_raises_what_the_server_allows_by_default() {
    let cluster = Cluster::start_with(|config| config.limits.subscriptions_max = 1).await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    client.consumer(TOPIC, "a").await;
    let more = client.open_consumer(open_consume(TOPIC, "b")).await;
    assert_eq!(reason(&more.err().expect("refused")), Reason::TooManySubscriptions);
    set(&client, "", Policies { subscriptions_max: Some(2), ..Policies::default() }, &[]).await;
    client.consumer(TOPIC, "b").await;
    let start = SubscriptionStart::Earliest.into();
    let open = OpenConsume { create_at: Some(start), ..open_consume(TOPIC, "c") };
    let refused = client.open_consumer(open).await.err().expect("refused");
    assert_eq!(
        (fact(&refused, "subscriptions_max"), fact(&refused, "level")),
        ("2".into(), "cluster".into())
    );
    let mut known = client.consumer(TOPIC, "a").await;
    client.producer(TOPIC).await.publish(1, "x").await;
    assert!(matches!(known.reply().await, Ok(Some(Reply::Delivery(_)))));
}
