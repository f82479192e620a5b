//! What clients may hold and send, and that they harm nobody past it (S4, S6, S7): budgets, connections, streams, frames.

use std::{net::SocketAddr, time::Duration};

use geminga_proto::{
    admin::v1::{CreateSubscriptionRequest, CreateTenantRequest, ListTenantsRequest, Tenant},
    reason::Reason,
    v1::{
        Accept, AcceptUpTo, OffsetRange, Ping, PublishRequest, RecordIndex, Settle,
        consume_frame::Frame, consume_reply::Reply, settle::Verb,
    },
};
use geminga_runtime::tasks::Tasks;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use tonic::{Request, client::Grpc, codegen::http::uri::PathAndQuery};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_prost::ProstCodec;

use crate::harness::{Cluster, PATIENCE, batch, eventually, fact, reason, refused};

const TOPIC: &str = "public/default/t";

#[tokio::test]
async fn clients_that_vanish_mid_publish_leave_nothing_behind() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let mut producer = client.producer(TOPIC).await;
    producer.publish(1, "stored").await;
    cluster.cut_bookies_off(true);
    for _ in 0..20 {
        producer.send(1, vec![0; 1_000]).await;
    }
    let request = PublishRequest {
        topic: TOPIC.into(),
        batch: Some(batch(0, 1, vec![0; 5_000])),
        ..PublishRequest::default()
    };
    let held = || cluster.broker().held();
    {
        let mut publisher = client.publisher();
        let mut call = Box::pin(publisher.publish(request));
        let all_held = eventually("25 KB are held", async || held().publish_bytes > 25_000);
        tokio::select! {
            _ = &mut call => panic!("nothing can be stored"),
            () = all_held => {} // and the call is dropped
        }
    }
    assert_eq!(held().streams, 1);
    drop(producer);
    eventually("the stream is gone", async || held().streams == 0).await;
    cluster.cut_bookies_off(false);
    eventually("the budget is whole", async || held().publish_bytes == 0).await;
    client.producer(TOPIC).await.publish(1, "goes on").await;
}

#[tokio::test]
async fn a_batch_is_held_with_its_index() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    let mut producer = client.producer(TOPIC).await;
    cluster.cut_bookies_off(true);
    producer.send(60_000, "one byte a hundred records").await;
    eventually("the index counts", async || cluster.broker().held().publish_bytes > 240_000).await;
}

#[tokio::test]
async fn readers_that_read_nothing_hold_no_more_than_the_budget_and_give_it_back() {
    const BUDGET: u64 = 2 * 1024 * 1024;
    let cluster = Cluster::start_with(|config| {
        config.limits.dispatch_bytes_max = BUDGET;
        config.limits.read_ahead_bytes_max = 64 * 1024; // a batch: the rest lies in the outgoing buffers
    })
    .await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let mut producer = client.producer(TOPIC).await;
    for _ in 0..80 {
        producer.publish(1, vec![0; 256 * 1024]).await;
    }
    let mut lazy = Vec::new();
    for i in 0..3 {
        lazy.push(cluster.client().await.consumer(TOPIC, &format!("lazy-{i}")).await);
    }
    let held = || cluster.broker().held();
    eventually("much is read ahead", async || held().dispatch_bytes > BUDGET / 2).await;
    let mut eager = cluster.client().await.consumer(TOPIC, "eager").await;
    assert_eq!(eager.deliveries(80).await, (0..80).collect::<Vec<_>>());
    assert!(held().dispatch_bytes > BUDGET / 2, "what lies in their buffers still counts");
    drop((lazy, eager, producer));
    eventually("all is given back", async || held().dispatch_bytes == 0 && held().streams == 0)
        .await;
}

/// A connection from another address of this machine.
async fn from_elsewhere(to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(SocketAddr::from(([127, 0, 0, 2], 0))).expect("a loopback address");
    socket.connect(to).await.expect("connects")
}

async fn until_closed(mut stream: TcpStream) {
    let mut bytes = Vec::new();
    let _closed_or_reset =
        timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("closed in time");
}

#[tokio::test]
async fn many_half_open_connections_of_one_address_leave_room_for_the_others() {
    let cluster = Cluster::start_with(|config| {
        config.limits.connections_max = 30;
        config.limits.connections_per_address_max = 20;
        config.limits.open_deadline = Duration::from_millis(500);
    })
    .await;
    let address = cluster.broker().address();
    let mut half_open = Vec::new();
    for _ in 0..200 {
        half_open.push(from_elsewhere(address).await);
    }
    let client = cluster.client().await; // needs one of the 10 places that one address cannot take
    client.producer(TOPIC).await.publish(1, "x").await;
    futures::future::join_all(half_open.into_iter().map(until_closed)).await;
    // Their places are free again.
    eventually("one from there is served", async || {
        let mut again = from_elsewhere(address).await;
        again.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.is_ok()
            && matches!(again.read_u8().await, Ok(0))
    })
    .await;
}

#[tokio::test]
async fn the_broker_has_only_so_many_streams() {
    let cluster = Cluster::start_with(|config| config.limits.streams_max = 1).await;
    let one = cluster.client().await.producer(TOPIC).await;
    let other = cluster.client().await;
    assert_eq!(refused(other.raw_consume().await), Reason::TooManyStreams);
    drop(one);
    eventually("its place is free", async || cluster.broker().held().streams == 0).await;
    other.producer(TOPIC).await;
}

#[tokio::test]
async fn a_request_larger_than_its_call_allows_is_refused_before_it_is_decoded() {
    let cluster = Cluster::start_with(|config| config.limits.settle_ranges_max = 10).await;
    let client = cluster.client().await;
    let request = CreateTenantRequest { name: "a".repeat(70_000) };
    let status = client.admin().create_tenant(request).await.expect_err("refused");
    assert_eq!(reason(&status), Reason::MessageTooLarge);
    assert_eq!(fact(&status, "frame_bytes_max"), "65536");
    client.topic(TOPIC, 1).await;
    let mut consumer = client.consumer(TOPIC, "s").await;
    let ranges = vec![OffsetRange { first: 1 << 40, last: 1 << 40 }; 100_000];
    let verb = Some(Verb::Accept(Accept { ranges, handle: vec![0; 24].into() }));
    consumer.send(Frame::Settle(Settle { token: 1, verb })).await;
    assert_eq!(reason(&consumer.reply().await.expect_err("ended")), Reason::MessageTooLarge);
}

#[tokio::test]
async fn bytes_that_are_no_request_get_a_typed_refusal() {
    let cluster = Cluster::start().await;
    let mut grpc = Grpc::new(cluster.client().await.channel);
    grpc.ready().await.expect("connected");
    let path = PathAndQuery::from_static("/geminga.admin.v1.Admin/CreateTenant");
    let codec = ProstCodec::<Ping, Tenant>::default(); // a number where a name belongs
    let answer = grpc.unary(Request::new(Ping { token: 7 }), path, codec).await;
    assert_eq!(refused(answer), Reason::InvalidRequest);
}

#[tokio::test]
async fn what_is_asked_beyond_a_cap_is_refused_and_no_number_overflows() {
    let cluster = Cluster::start_with(|config| {
        config.limits.subscriptions_max = 1;
        config.limits.settle_ranges_max = 2;
    })
    .await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    client.producer(TOPIC).await.publish(3, "abc").await;
    let mut consumer = client.consumer(TOPIC, "s").await;
    consumer.credit(u64::MAX, u64::MAX).await;
    consumer.credit(0, 0).await; // a lower total takes nothing back
    consumer.deliveries(3).await;
    let one = OffsetRange { first: 0, last: 0 };
    let handle = consumer.handle.clone();
    let up_to = |offset| Verb::AcceptUpTo(AcceptUpTo { offset, handle: handle.clone() });
    let ranges = |ranges| Verb::Accept(Accept { ranges, handle: handle.clone() });
    let everything = OffsetRange { first: 0, last: u64::MAX };
    let wrong = [up_to(u64::MAX), ranges(vec![everything]), ranges(vec![one; 3]), ranges(vec![])];
    for (token, verb) in (1..).zip(wrong) {
        consumer.send(Frame::Settle(Settle { token, verb: Some(verb) })).await;
        match consumer.reply().await.expect("the stream goes on") {
            Some(Reply::SettleRefused(refused)) => {
                assert_eq!((refused.token, refused.reason.as_str()), (token, "INVALID_REQUEST"));
            }
            other => panic!("not refused: {other:?}"),
        }
    }
    let second = CreateSubscriptionRequest {
        topic: TOPIC.into(),
        name: "t".into(),
        start: 0,
        ..Default::default()
    };
    let second = client.admin().create_subscription(second).await.expect_err("one too many");
    assert_eq!(reason(&second), Reason::TooManySubscriptions);
    assert_eq!(fact(&second, "level"), "server");
    let mut contradicting = batch(0, 2, "x");
    contradicting.index = Some(RecordIndex::default());
    let request = PublishRequest {
        topic: TOPIC.into(),
        batch: Some(contradicting),
        ..PublishRequest::default()
    };
    assert_eq!(refused(client.publisher().publish(request).await), Reason::InvalidRequest);
}

#[tokio::test]
async fn a_broker_that_stops_says_so_to_balancers_and_waits_for_no_stream_that_is_not_open() {
    let mut cluster = Cluster::start().await;
    let client = cluster.client().await;
    let mut never_opened = client.raw_publish().await.expect("begun");
    let mut producer = client.producer(TOPIC).await;
    let broker = cluster.broker.take().expect("it runs");
    let stopping =
        Tasks::new("test").spawn_returning("shutdown", broker.shutdown(Duration::from_millis(400)));
    producer.raw.reply().await.expect("told to go");
    for service in ["", "geminga.v1.Publisher", "geminga.admin.v1.Admin"] {
        let request = HealthCheckRequest { service: service.into() };
        let answer = HealthClient::new(client.channel.clone()).check(request).await;
        assert_eq!(answer.expect("answers").into_inner().status, 2, "{service:?} is not serving");
    }
    assert_eq!(reason(&never_opened.reply().await.expect_err("ended")), Reason::ShuttingDown);
    timeout(PATIENCE, stopping).await.expect("stopped in time").expect("no panic");
    client.admin().list_tenants(ListTenantsRequest::default()).await.expect_err("gone");
}
