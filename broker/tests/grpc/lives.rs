//! How streams go on and end: heartbeats both ways, an age, leaving, closing, breaking off.

use std::time::Duration;

use futures::{FutureExt, future::BoxFuture};
use geminga_proto::{
    reason::Reason,
    v1::{
        Claim, Leave, OpenConsume, OpenPublish, Ping, ReadFrom, Route, SubscriptionType,
        WatchRequest, WatchTopicsRequest, consume_frame::Frame, consume_reply::Reply,
        publish_frame, publish_reply, read_from::From as Place,
    },
};
use tokio::time::timeout;

use crate::{
    harness::{Client, Cluster, Consumer, PATIENCE, Pair, RawPublish, reason, refused},
    types::{TOPIC, come_back, consumer, delivery, offsets, open, publish, settings, started},
};

const HEARTBEAT_MS: u32 = 1_000;

fn reads(topic: &str) -> OpenConsume {
    let from = Some(Place::Offset(0));
    let reader = Some(ReadFrom { from });
    OpenConsume {
        topic: topic.into(),
        reader,
        heartbeat_ms: HEARTBEAT_MS,
        ..OpenConsume::default()
    }
}

/// Reads until the stream ends; the heartbeats that came, and the reason.
async fn silent_consumer(mut consumer: Consumer) -> (u32, Reason) {
    let mut beats = 0;
    loop {
        match consumer.reply().await {
            Ok(Some(Reply::Pong(Ping { token: 0 }))) => beats += 1,
            Ok(Some(_)) => {}
            Ok(None) => panic!("it ended well"),
            Err(status) => return (beats, reason(&status)),
        }
    }
}

async fn silent_producer(mut raw: RawPublish) -> (u32, Reason) {
    let mut beats = 0;
    loop {
        match raw.reply().await {
            Ok(Some(publish_reply::Reply::Pong(Ping { token: 0 }))) => beats += 1,
            Ok(Some(_)) => {}
            Ok(None) => panic!("it ended well"),
            Err(status) => return (beats, reason(&status)),
        }
    }
}

#[tokio::test]
async fn whoever_is_silent_loses_the_stream_and_hears_the_server_until_then() {
    let pair = Pair::start(|_| {}).await;
    let client = pair.cluster.client().await;
    client.topic(TOPIC, 8).await;
    let segment = pair.segment_of_other(TOPIC).await;
    let own = client.placed(TOPIC).await.iter().position(|id| id == "broker-0").expect("a share");
    let own = u32::try_from(own).expect("few segments");
    let mut silent: Vec<BoxFuture<'_, (u32, Reason)>> = Vec::new();
    for segment in [own, segment] {
        let (topic, route) = (TOPIC.to_owned(), Route::Relay.into());
        let shared = settings(SubscriptionType::Shared);
        let attach =
            OpenConsume { segment, route, heartbeat_ms: HEARTBEAT_MS, ..open("one", &shared) };
        silent.push(silent_consumer(client.open_consumer(attach).await.expect("opened")).boxed());
        let read = OpenConsume { segment, route, ..reads(TOPIC) };
        silent.push(silent_consumer(client.open_consumer(read).await.expect("opened")).boxed());
        let heartbeat_ms = HEARTBEAT_MS;
        let produce = OpenPublish { topic, segment, route, heartbeat_ms, ..OpenPublish::default() };
        silent.push(
            silent_producer(client.open_producer(produce).await.expect("opened").raw).boxed(),
        );
    }
    let open =
        OpenPublish { topic: TOPIC.into(), heartbeat_ms: HEARTBEAT_MS, ..OpenPublish::default() };
    let mut speaks =
        client.open_producer(OpenPublish { segment: own, ..open }).await.expect("opened");
    let all = futures::future::join_all(silent);
    let mut pings = tokio::time::interval(Duration::from_millis(u64::from(HEARTBEAT_MS)));
    let mut all = std::pin::pin!(all);
    let ended = loop {
        tokio::select! {
            ended = &mut all => break ended,
            _ = pings.tick() => {
                let ping = publish_frame::Frame::Ping(Ping { token: 7 });
                speaks.raw.send(ping).await;
            }
        }
    };
    for (beats, reason) in ended {
        assert_eq!(reason, Reason::StreamSilent);
        assert!(beats >= 3, "{beats}");
    }
    speaks.send(1, "still here").await;
    loop {
        match speaks.raw.reply().await.expect("it speaks, and stays") {
            Some(publish_reply::Reply::Receipt(_)) => break,
            Some(publish_reply::Reply::Pong(_)) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_heartbeat_below_a_second_is_refused() {
    let (_cluster, client) = started().await;
    let attach = OpenConsume { heartbeat_ms: 999, ..reads(TOPIC) };
    assert_eq!(refused(client.open_consumer(attach).await), Reason::InvalidRequest);
    let open = OpenPublish { topic: TOPIC.into(), heartbeat_ms: 1, ..OpenPublish::default() };
    assert_eq!(refused(client.open_producer(open).await), Reason::InvalidRequest);
}

async fn young(age: Duration) -> (Cluster, Client) {
    let cluster = Cluster::start_with(|config| {
        config.limits.stream_age_max = age;
    })
    .await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    (cluster, client)
}

#[tokio::test]
async fn an_old_publish_stream_is_told_to_go_takes_what_comes_and_ends_well() {
    let (cluster, client) = young(Duration::from_millis(300)).await;
    let mut producer = client.producer(TOPIC).await;
    let told = match producer.raw.reply().await.expect("well") {
        Some(publish_reply::Reply::GoAway(told)) => told,
        other => panic!("not told: {other:?}"),
    };
    let owner = told.owner.expect("named").address;
    assert_eq!(owner, cluster.broker().address().to_string(), "it may come back at once");
    assert!(told.drain_by_ms > 0 && told.drain_by_ms <= 2_000);
    producer.publish(1, "on its way").await;
    loop {
        match producer.raw.reply().await.expect("well") {
            None => break,
            Some(publish_reply::Reply::Credit(_)) => {}
            other => panic!("not the end: {other:?}"),
        }
    }
    client.producer(TOPIC).await;
}

/// Until it is told to go, and then to the end.
async fn told_and_ended(consumer: &mut Consumer) {
    let mut told = false;
    while let Some(reply) = consumer.reply().await.expect("well") {
        told |= matches!(reply, Reply::GoAway(_));
    }
    assert!(told);
}

#[tokio::test]
async fn an_old_consumer_comes_back_to_what_it_held_with_its_attempts_unchanged() {
    let (_cluster, client) = young(Duration::from_secs(1)).await;
    publish(&client, 1, 1).await;
    let shared = settings(SubscriptionType::Shared);
    let mut one = consumer(&client, "one", &shared).await;
    let got = delivery(&mut one).await;
    let mut reader = client
        .open_consumer(OpenConsume { heartbeat_ms: 0, ..reads(TOPIC) })
        .await
        .expect("opened");
    told_and_ended(&mut reader).await;
    told_and_ended(&mut one).await;
    let claims = vec![Claim { handle: got.handle.clone(), ranges: got.deliver.clone() }];
    let (mut again, granted) = come_back(&client, open("one", &shared), claims).await;
    assert_eq!(granted.len(), 1, "it was not a clean end, and not a loss");
    again.send(Frame::Leave(Leave {})).await;
    while again.reply().await.expect("well").is_some() {}
    let mut two = consumer(&client, "two", &shared).await;
    assert_eq!(delivery(&mut two).await.attempt, 1);
}

#[tokio::test]
async fn old_watches_end_well() {
    let (_cluster, client) = young(Duration::from_millis(200)).await;
    let watch = WatchRequest { topic: TOPIC.into(), create_if_missing: false };
    let mut watch = client.discovery().watch(watch).await.expect("watched").into_inner();
    let topics = WatchTopicsRequest { namespace: "public/default".into(), ..Default::default() };
    let mut topics = client.discovery().watch_topics(topics).await.expect("watched").into_inner();
    while timeout(PATIENCE, watch.message()).await.expect("in time").expect("well").is_some() {}
    while timeout(PATIENCE, topics.message()).await.expect("in time").expect("well").is_some() {}
}

/// A grace that nobody waits for.
async fn patient() -> (Cluster, Client) {
    let cluster =
        Cluster::start_with(|config| config.limits.consumer_grace = Duration::from_secs(600)).await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    (cluster, client)
}

#[tokio::test]
async fn what_a_consumer_that_leaves_holds_is_free_at_once_with_its_attempt_unchanged() {
    for kind in [SubscriptionType::Shared, SubscriptionType::KeyShared, SubscriptionType::Failover]
    {
        let (_cluster, client) = patient().await;
        publish(&client, 1, 2).await;
        let kind = settings(kind);
        let mut one = consumer(&client, "one", &kind).await;
        assert_eq!(offsets(&delivery(&mut one).await), [0, 1]);
        let mut two = consumer(&client, "two", &kind).await;
        one.send(Frame::Leave(Leave {})).await;
        let again = delivery(&mut two).await;
        assert_eq!((offsets(&again), again.attempt), (vec![0, 1], 1));
        while one.reply().await.expect("it ends well").is_some() {}
    }
}

#[tokio::test]
async fn a_stream_dropped_with_both_halves_is_no_clean_leave() {
    let cluster =
        Cluster::start_with(|config| config.limits.consumer_grace = Duration::from_millis(50))
            .await;
    let client = cluster.client().await;
    let shared = settings(SubscriptionType::Shared);
    for round in 0..20 {
        let topic = format!("public/default/t{round}");
        client.topic(&topic, 1).await;
        client.producer(&topic).await.publish(1, "x").await;
        let open = |name: &str| OpenConsume { topic: topic.clone(), ..open(name, &shared) };
        let mut one = client.open_consumer(open("one")).await.expect("opened");
        one.credit(1, 1 << 20).await;
        delivery(&mut one).await;
        let mut two = client.open_consumer(open("two")).await.expect("opened");
        two.credit(1, 1 << 20).await;
        drop(one);
        assert_eq!(delivery(&mut two).await.attempt, 2, "lost, in round {round}");
    }
}
