//! O6: a request for a segment of another broker is sent to it, or passed on where the client asks for it; and the life of
//! topics and subscriptions whose segments are spread over brokers.

use std::{sync::Arc, time::Duration};

use geminga_broker::auth::{Action, Authorizer, Principal, Resource};
use geminga_proto::{
    admin::v1::{
        CreateSubscriptionRequest, DeleteSubscriptionRequest, DeleteTopicRequest,
        DescribeSubscriptionRequest, DescribeTopicRequest, ListTenantsRequest,
    },
    reason::Reason,
    v1::{
        AcceptUpTo, OpenConsume, OpenPublish, PublishRequest, Route, Settle, SettleRequest,
        SubscriptionStart, consume_frame, consume_reply, settle::Verb,
    },
};
use tonic::Request;

use crate::harness::{
    Client, Cluster, Pair, batch, eventually, fact, open_consume, reason, refused,
};

const TOPIC: &str = "public/default/t";

fn publish_on(segment: u32, route: Route) -> OpenPublish {
    let (topic, route) = (TOPIC.into(), route.into());
    OpenPublish { topic, segment, route, stream_number: 1, ..OpenPublish::default() }
}

fn consume_on(segment: u32, route: Route) -> OpenConsume {
    OpenConsume { segment, route: route.into(), ..open_consume(TOPIC, "s") }
}

fn up_to(offset: u64, handle: &bytes::Bytes) -> Settle {
    let verb = Verb::AcceptUpTo(AcceptUpTo { offset, handle: handle.clone() });
    Settle { token: offset, verb: Some(verb) }
}

#[tokio::test]
async fn a_client_is_sent_to_the_owner_and_served_through_the_wrong_broker_when_it_asks() {
    let pair = Pair::start(|_| {}).await;
    let client = pair.cluster.client().await; // of broker-0, all the time
    client.topic(TOPIC, 16).await;
    let segment = pair.segment_of_other(TOPIC).await;
    let owner = pair.other.address().to_string();
    for route in [Route::Auto, Route::Direct, Route::Unspecified] {
        let status = client.open_producer(publish_on(segment, route)).await.err().expect("refused");
        assert_eq!(reason(&status), Reason::NotOwner);
        assert_eq!(fact(&status, "owner_address"), owner);
        assert_eq!(fact(&status, "layout_epoch"), "1");
        let status = client.open_consumer(consume_on(segment, route)).await.err().expect("refused");
        assert_eq!(
            (reason(&status), fact(&status, "owner_address")),
            (Reason::NotOwner, owner.clone())
        );
    }
    let mut producer =
        client.open_producer(publish_on(segment, Route::Relay)).await.expect("relayed");
    for offset in 0..20 {
        assert_eq!(producer.publish(1, vec![7; 1_000]).await.base_offset, offset);
    }
    let mut consumer =
        client.open_consumer(consume_on(segment, Route::Relay)).await.expect("relayed");
    consumer.credit(1 << 40, 1 << 40).await;
    assert_eq!(consumer.deliveries(20).await, (0..20).collect::<Vec<_>>());
    consumer.send(consume_frame::Frame::Settle(up_to(4, &consumer.handle))).await;
    match consumer.reply().await.expect("no refusal") {
        Some(consume_reply::Reply::Settled(settled)) => assert_eq!(settled.mark_delete_next, 5),
        other => panic!("not settled: {other:?}"),
    }
    // Calls of one request go the same way.
    let (topic, settle) = (TOPIC.into(), Some(up_to(9, &consumer.handle)));
    let request = SettleRequest { topic, segment, subscription: "s".into(), settle };
    let settled = client.subscriber().settle(request).await.expect("settled").into_inner();
    assert_eq!(settled.settled.expect("there").mark_delete_next, 10);
    let request = PublishRequest {
        topic: TOPIC.into(),
        segment: Some(segment),
        batch: Some(batch(0, 1, "x")),
        ..PublishRequest::default()
    };
    let stored = client.publisher().publish(request).await.expect("stored").into_inner();
    assert_eq!(stored.receipt.expect("there").base_offset, 20);
    assert_eq!(consumer.delivery().await, [20]);
    let places = client.places(TOPIC).await;
    assert_eq!(places[segment as usize].broker, "broker-1", "who relays claims nothing");
    drop((producer, consumer));
    eventually("nothing is held", async || pair.cluster.broker().held().relay_bytes == 0).await;
}

/// An outage of the store stops no traffic, relayed traffic neither.
#[tokio::test]
async fn relaying_goes_on_while_the_store_is_away() {
    let pair = Pair::start(|_| {}).await;
    let client = pair.cluster.client().await;
    client.topic(TOPIC, 16).await;
    let segment = Some(pair.segment_of_other(TOPIC).await);
    let request = || PublishRequest {
        topic: TOPIC.into(),
        segment,
        batch: Some(batch(0, 1, "x")),
        ..PublishRequest::default()
    };
    client.publisher().publish(request()).await.expect("stored");
    eventually("the claim is seen", async || {
        let seen = client.publisher().publish(request()).await.expect("stored").into_inner();
        seen.receipt.is_some_and(|receipt| receipt.base_offset > 1)
    })
    .await;
    pair.cluster.store.set_partitioned(true);
    client.publisher().publish(request()).await.expect("stored");
    pair.cluster.store.set_partitioned(false);
}

#[tokio::test]
async fn a_relayed_request_is_not_relayed_again_and_speaks_for_nobody_else() {
    let pair = Pair::start(|_| {}).await;
    let client = pair.cluster.client().await;
    client.topic(TOPIC, 16).await;
    let segment = pair.segment_of_other(TOPIC).await;
    let publish = |relayed_for: &str| {
        let mut request = Request::new(PublishRequest {
            topic: TOPIC.into(),
            segment: Some(segment),
            batch: Some(batch(0, 1, "x")),
            ..PublishRequest::default()
        });
        let name = relayed_for.parse().expect("ASCII");
        request.metadata_mut().insert("geminga-relayed-for", name);
        request
    };
    let status = client.publisher().publish(publish("anonymous")).await.expect_err("refused");
    assert_eq!(reason(&status), Reason::NotOwner);
    assert_eq!(fact(&status, "owner_address"), pair.other.address().to_string());
    let at_owner = Client::of(&pair.other).await;
    at_owner.publisher().publish(publish("anonymous")).await.expect("stored");
    for name in ["broker", "root", ""] {
        let answer = at_owner.publisher().publish(publish(name)).await;
        assert_eq!(refused(answer), Reason::PermissionDenied, "{name:?}");
    }
}

#[derive(Debug)]
struct AllButServe;

impl Authorizer for AllButServe {
    fn allows(&self, _: &Principal, action: Action, _: &Resource) -> bool {
        action != Action::Serve
    }
}

/// S2: whoever is not a broker passes nothing on for others, though it may do the thing itself.
#[tokio::test]
async fn only_a_broker_may_pass_requests_on() {
    let cluster = Cluster::start_as(|settings| settings.authorizer = Arc::new(AllButServe)).await;
    let client = cluster.client().await;
    client.admin().list_tenants(ListTenantsRequest::default()).await.expect("permitted");
    let mut relayed = Request::new(ListTenantsRequest::default());
    relayed.metadata_mut().insert("geminga-relayed-for", "anonymous".parse().expect("ASCII"));
    assert_eq!(refused(client.admin().list_tenants(relayed).await), Reason::PermissionDenied);
}

/// O6: a relay has its own byte budget, and a consumer that does not read neither exceeds it nor stops another one.
#[tokio::test]
async fn relayed_bytes_are_bounded_and_who_does_not_read_stops_nobody() {
    const RELAY_BYTES: u64 = 256 * 1024;
    let pair = Pair::start(|config| config.limits.relay_bytes_max = RELAY_BYTES).await;
    let client = pair.cluster.client().await;
    client.topic(TOPIC, 16).await;
    let segment = pair.segment_of_other(TOPIC).await;
    let mut producer =
        client.open_producer(publish_on(segment, Route::Relay)).await.expect("relayed");
    for _ in 0..200 {
        producer.publish(1, vec![1; 60_000]).await;
    }
    let lazy = Client::of(pair.cluster.broker()).await;
    let stuck = lazy.open_consumer(consume_on(segment, Route::Relay)).await.expect("relayed");
    stuck.credit(1 << 40, 1 << 40).await; // and never reads
    eventually("its bytes are held", async || {
        pair.cluster.broker().held().relay_bytes > RELAY_BYTES / 4
    })
    .await;
    let open = OpenConsume { subscription: "other".into(), ..consume_on(segment, Route::Relay) };
    let mut consumer = client.open_consumer(open).await.expect("relayed");
    consumer.credit(1 << 40, 1 << 40).await;
    let mut got = 0;
    while got < 200 {
        got += consumer.delivery().await.len();
        assert!(pair.cluster.broker().held().relay_bytes <= RELAY_BYTES);
    }
    producer.publish(1, vec![1; 60_000]).await; // the other way is not stopped either
}

/// The owner's registration stands until its lease has run out: until then nobody takes what is its.
#[tokio::test]
async fn a_dead_owners_segment_is_taken_when_its_lease_has_run_out_and_not_before() {
    let Pair { cluster, other, other_segments } = Pair::start(|_| {}).await;
    let client = cluster.client().await;
    client.topic(TOPIC, 16).await;
    let placed = client.placed(TOPIC).await;
    let segment = placed.iter().position(|id| id == "broker-1").expect("it has a share") as u32;
    let mut producer =
        client.open_producer(publish_on(segment, Route::Relay)).await.expect("relayed");
    producer.publish(3, "abc").await;
    let token = producer.opened.resume_token.clone();
    other.kill();
    other_segments.abort();
    let status = producer.raw.reply().await.expect_err("it broke");
    assert_eq!(reason(&status), Reason::SegmentFenced, "what was in flight is of unknown outcome");
    let again =
        OpenPublish { resume_token: token, stream_number: 2, ..publish_on(segment, Route::Relay) };
    let status = client.open_producer(again.clone()).await.err().expect("not yet");
    assert_eq!(reason(&status), Reason::SegmentLoading);
    assert_eq!(client.places(TOPIC).await[segment as usize].broker, "broker-1");
    let mut reopened = None;
    for _ in 0..200 {
        match client.open_producer(again.clone()).await {
            Ok(producer) => {
                reopened = Some(producer);
                break;
            }
            Err(status) => assert_eq!(reason(&status), Reason::SegmentLoading),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut producer = reopened.expect("taken over in time");
    assert_eq!(producer.opened.last_persisted_sequence, 3);
    assert_eq!(producer.publish(1, "d").await.base_offset, 3);
    assert_eq!(client.places(TOPIC).await[segment as usize].broker, "broker-0");
}

/// C6: any broker creates and deletes what is spread over all of them.
#[tokio::test]
async fn topics_and_subscriptions_over_several_brokers_live_and_die_through_any_of_them() {
    let pair = Pair::start(|_| {}).await;
    let (one, two) = (pair.cluster.client().await, Client::of(&pair.other).await);
    one.topic(TOPIC, 16).await;
    let create = |name: &str| CreateSubscriptionRequest {
        topic: TOPIC.into(),
        name: name.into(),
        start: SubscriptionStart::Earliest.into(),
        ..Default::default()
    };
    two.admin().create_subscription(create("s")).await.expect("created");
    one.admin().create_subscription(create("other")).await.expect("created");
    for segment in 0..16 {
        let request = PublishRequest {
            topic: TOPIC.into(),
            segment: Some(segment),
            batch: Some(batch(0, 2, "xy")),
            ..PublishRequest::default()
        };
        one.publisher().publish(request).await.expect("stored");
    }
    let claimed: Vec<String> = one.places(TOPIC).await.into_iter().map(|p| p.broker).collect();
    assert_eq!(claimed, one.placed(TOPIC).await, "everybody has its own");
    for client in [&one, &two] {
        let describe = DescribeTopicRequest { name: TOPIC.into() };
        let described = client.admin().describe_topic(describe).await.expect("described");
        let segments = described.into_inner().segments;
        assert!(segments.iter().all(|s| s.loaded && s.next_offset == 2), "{segments:?}");
        let describe = DescribeSubscriptionRequest { topic: TOPIC.into(), name: "s".into() };
        let described = client.admin().describe_subscription(describe).await.expect("described");
        let cursors = described.into_inner().cursors;
        assert_eq!(cursors.len(), 16);
        assert!(cursors.iter().all(|cursor| cursor.backlog_messages == 2));
    }
    let gone = DeleteSubscriptionRequest { topic: TOPIC.into(), name: "s".into() };
    two.admin().delete_subscription(gone.clone()).await.expect("deleted");
    assert_eq!(refused(one.admin().delete_subscription(gone).await), Reason::SubscriptionNotFound);
    let delete = DeleteTopicRequest { name: TOPIC.into() };
    two.admin().delete_topic(delete.clone()).await.expect("deleted");
    assert_eq!(refused(one.admin().delete_topic(delete).await), Reason::TopicNotFound);
    one.topic(TOPIC, 2).await;
    assert_eq!(two.places(TOPIC).await.len(), 2);
}
