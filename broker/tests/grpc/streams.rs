//! Streams and connections: frames out of turn, bounds, permission, the end of a broker.

use std::{sync::Arc, time::Duration};

use geminga_broker::auth::{Action, Authorizer, Principal, Resource};
use geminga_proto::{
    admin::v1::{CreateTenantRequest, ListTenantsRequest},
    reason::Reason,
    v1::{
        OpenPublish, Ping, WatchRequest, consume_frame, consume_reply, publish_frame, publish_reply,
    },
};
use geminga_runtime::tasks::Tasks;
use tokio::{io::AsyncReadExt, net::TcpStream, time::timeout};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::harness::{Cluster, PATIENCE, batch, open_consume, reason, refused};

const TOPIC: &str = "public/default/t";

#[tokio::test]
async fn frames_out_of_turn_end_the_stream() {
    let cluster =
        Cluster::start_with(|config| config.limits.open_deadline = Duration::from_millis(200))
            .await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let mut early = client.raw_publish().await.expect("begun");
    early.send(publish_frame::Frame::Batch(batch(0, 1, "x"))).await;
    assert_eq!(reason(&early.reply().await.expect_err("ended")), Reason::UnexpectedFrame);
    let mut silent = client.raw_consume().await.expect("begun");
    assert_eq!(reason(&silent.reply().await.expect_err("ended")), Reason::UnexpectedFrame);
    let mut twice = client.producer(TOPIC).await;
    twice.raw.send(publish_frame::Frame::Open(OpenPublish::default())).await;
    assert_eq!(reason(&twice.raw.reply().await.expect_err("ended")), Reason::UnexpectedFrame);
}

#[tokio::test]
async fn pings_are_answered_with_their_token() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let mut producer = client.producer(TOPIC).await;
    producer.raw.send(publish_frame::Frame::Ping(Ping { token: 42 })).await;
    assert_eq!(
        producer.raw.reply().await.expect("ok"),
        Some(publish_reply::Reply::Pong(Ping { token: 42 }))
    );
    let mut consumer = client.consumer(TOPIC, "s").await;
    consumer.send(consume_frame::Frame::Ping(Ping { token: 43 })).await;
    assert_eq!(
        consumer.reply().await.expect("ok"),
        Some(consume_reply::Reply::Pong(Ping { token: 43 }))
    );
}

#[tokio::test]
async fn a_connection_has_only_so_many_streams() {
    let cluster = Cluster::start_with(|config| config.limits.streams_per_connection_max = 2).await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let _one = client.producer(TOPIC).await;
    let _two = client.consumer(TOPIC, "s").await;
    assert_eq!(refused(client.raw_publish().await.map(drop)), Reason::TooManyStreams);
    cluster.client().await.producer(TOPIC).await; // another connection has its own
}

#[tokio::test]
async fn a_connection_that_says_nothing_is_closed() {
    let cluster =
        Cluster::start_with(|config| config.limits.open_deadline = Duration::from_millis(200))
            .await;
    let mut silent = TcpStream::connect(cluster.broker().address()).await.expect("connects");
    let mut bytes = Vec::new();
    let end = timeout(PATIENCE, silent.read_to_end(&mut bytes)).await.expect("closed in time");
    assert!(
        end.is_ok() || end.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset)
    );
}

#[tokio::test]
async fn at_shutdown_streams_are_told_to_go_and_new_calls_refused() {
    let mut cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let mut producer = client.producer(TOPIC).await;
    let mut consumer = client.consumer(TOPIC, "s").await;
    let broker = cluster.broker.take().expect("it runs");
    let tasks = Tasks::new("test");
    let stopping = tasks.spawn_returning("shutdown", broker.shutdown(Duration::from_millis(800)));
    match producer.raw.reply().await.expect("told") {
        Some(publish_reply::Reply::GoAway(go)) => {
            assert!(go.drain_by_ms > 0 && go.drain_by_ms <= 800)
        }
        other => panic!("not told: {other:?}"),
    }
    assert!(matches!(consumer.reply().await.expect("told"), Some(consume_reply::Reply::GoAway(_))));
    producer.publish(1, "still taken").await;
    let open = OpenPublish { topic: TOPIC.into(), ..OpenPublish::default() };
    assert_eq!(refused(client.open_producer(open).await), Reason::ShuttingDown);
    assert_eq!(refused(client.open_consumer(open_consume(TOPIC, "t")).await), Reason::ShuttingDown);
    assert_eq!(consumer.delivery().await, [0]);
    drop(consumer);
    assert_eq!(reason(&producer.raw.reply().await.expect_err("ended")), Reason::ShuttingDown);
    timeout(PATIENCE, stopping).await.expect("stopped in time").expect("no panic");
}

#[tokio::test]
async fn a_broker_waits_for_no_watch_when_it_stops() {
    let mut cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let request = WatchRequest { topic: TOPIC.into(), create_if_missing: false };
    let mut watch = client.discovery().watch(request).await.expect("watched").into_inner();
    watch.message().await.expect("ok").expect("the layout");
    let broker = cluster.broker.take().expect("it runs");
    timeout(PATIENCE, broker.shutdown(PATIENCE * 10)).await.expect("stopped long before");
    assert_eq!(refused(watch.message().await), Reason::ShuttingDown);
}

#[tokio::test]
async fn a_killed_broker_cuts_its_connections() {
    let mut cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let mut consumer = client.consumer(TOPIC, "s").await;
    cluster.kill().await;
    timeout(PATIENCE, consumer.replies.message())
        .await
        .expect("cut")
        .expect_err("never a good end");
}

/// Lets nobody create anything.
#[derive(Debug)]
struct NoCreation;

impl Authorizer for NoCreation {
    fn allows(&self, principal: &Principal, action: Action, _: &Resource) -> bool {
        assert_eq!(*principal, Principal::Anonymous);
        action != Action::Create
    }
}

#[tokio::test]
async fn what_is_not_permitted_is_refused_on_every_way_to_it() {
    let cluster = Cluster::start_as(|settings| settings.authorizer = Arc::new(NoCreation)).await;
    let client = cluster.client().await;
    let tenant = client.admin().create_tenant(CreateTenantRequest { name: "a".into() }).await;
    assert_eq!(refused(tenant), Reason::PermissionDenied);
    client.admin().list_tenants(ListTenantsRequest::default()).await.expect("allowed");
    let on_the_way = client.open_consumer(open_consume(TOPIC, "s")).await;
    assert_eq!(
        refused(on_the_way),
        Reason::PermissionDenied,
        "a consumer that creates needs the permission too"
    );
}

#[tokio::test]
async fn health_and_reflection_answer() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    let mut health = HealthClient::new(client.channel.clone());
    let request = HealthCheckRequest { service: "geminga.v1.Publisher".into() };
    assert_eq!(health.check(request).await.expect("answers").into_inner().status, 1);
    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut reflection = ServerReflectionClient::new(client.channel.clone());
    let asks = tokio_stream::iter([ask]);
    let mut answers = reflection.server_reflection_info(asks).await.expect("answers").into_inner();
    let answer = answers.message().await.expect("ok").expect("an answer").message_response;
    let Some(MessageResponse::ListServicesResponse(list)) = answer else { panic!("{answer:?}") };
    for service in ["v1.Publisher", "v1.Subscriber", "v1.Discovery", "admin.v1.Admin"] {
        let name = format!("geminga.{service}");
        assert!(list.service.iter().any(|known| known.name == name), "{name}");
    }
}
