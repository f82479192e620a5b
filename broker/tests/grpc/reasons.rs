//! Every reason of the enum is forced through gRPC and arrives with its code, `ErrorInfo` and, where a retry helps, a delay.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt, future::BoxFuture};
use geminga_broker::auth::{Action, Authorizer, Principal, Resource};
use geminga_metadata::{MetadataStore, Op, Txn, keys};
use geminga_proto::{
    admin::v1::{
        CreateTenantRequest, CreateTopicRequest, DeleteNamespaceRequest, DescribeNamespaceRequest,
        DescribeTenantRequest, DescribeTopicRequest, ListTenantsRequest, OffloadTopicRequest,
        SetPoliciesRequest, VerifyTierRequest,
    },
    reason::Reason,
    v1::{
        Accept, AcceptUpTo, AccessMode, Batch, OffsetRange, OpenConsume, OpenPublish, Policies,
        PublishRequest, Settle, SettleRequest, SubscriptionSettings, SubscriptionType,
        publish_frame, settle::Verb,
    },
};
use geminga_runtime::tasks::Tasks;
use tonic::Status;

use crate::harness::{Client, Cluster, PATIENCE, batch, eventually, fact, open_consume, reason};

const TOPIC: &str = "public/default/t";

#[tokio::test]
async fn every_reason_can_be_forced_and_arrives_typed() {
    let forced = Reason::ALL.iter().map(|wanted| async move {
        let status = force(*wanted).await;
        assert_eq!(reason(&status), *wanted, "{status:?}");
    });
    futures::future::join_all(forced).await;
}

/// What forces each of them; a reason without a line does not compile.
fn force(wanted: Reason) -> BoxFuture<'static, Status> {
    match wanted {
        Reason::InvalidName => invalid_name().boxed(),
        Reason::InvalidRequest => invalid_request().boxed(),
        Reason::UnexpectedFrame => unexpected_frame().boxed(),
        Reason::TenantNotFound => tenant_not_found().boxed(),
        Reason::NamespaceNotFound => namespace_not_found().boxed(),
        Reason::TopicNotFound => topic_not_found().boxed(),
        Reason::SubscriptionNotFound => subscription_not_found().boxed(),
        Reason::SegmentNotFound => segment_not_found().boxed(),
        Reason::AlreadyExists => already_exists().boxed(),
        Reason::NotEmpty => not_empty().boxed(),
        Reason::LayoutChanged => layout_changed().boxed(),
        Reason::NotOwner => not_owner().boxed(),
        Reason::SegmentLoading => segment_loading().boxed(),
        Reason::SegmentFenced => segment_fenced().boxed(),
        Reason::NotEnoughBookies => not_enough_bookies().boxed(),
        Reason::MetadataUnavailable => metadata_unavailable().boxed(),
        Reason::OutOfSequence => out_of_sequence().boxed(),
        Reason::SequenceConflict => sequence_conflict().boxed(),
        Reason::ProducerFenced => producer_fenced().boxed(),
        Reason::ProducerExists => producer_exists().boxed(),
        Reason::UnexpectedOffset => unexpected_offset().boxed(),
        Reason::ProducerExpired => producer_expired().boxed(),
        Reason::TooManyProducers => too_many_producers().boxed(),
        Reason::MessageTooLarge => message_too_large().boxed(),
        Reason::CreditExceeded => credit_exceeded().boxed(),
        Reason::Busy => busy().boxed(),
        Reason::BacklogQuota => backlog_quota().boxed(),
        Reason::RateLimited => rate_limited().boxed(),
        Reason::TooManyTopics => too_many_topics().boxed(),
        Reason::TooManySubscriptions => too_many_subscriptions().boxed(),
        Reason::StreamSilent => stream_silent().boxed(),
        Reason::TooManyStreams => too_many_streams().boxed(),
        Reason::ConsumerExists => consumer_exists().boxed(),
        Reason::ConsumerReplaced => consumer_replaced().boxed(),
        Reason::TooManyConsumers => too_many_consumers().boxed(),
        Reason::InvalidHandle => invalid_handle().boxed(),
        Reason::CursorLimit => cursor_limit().boxed(),
        Reason::NoColdStorage => no_cold_storage().boxed(),
        Reason::ReadDamaged => read_damaged().boxed(),
        Reason::PermissionDenied => permission_denied().boxed(),
        Reason::ShuttingDown => shutting_down().boxed(),
        Reason::DeadlineExceeded => deadline_exceeded().boxed(),
        Reason::Internal => internal().boxed(),
    }
}

fn refusal<T>(result: Result<T, Status>) -> Status {
    result.map(|_| "an answer").expect_err("refused")
}

async fn cluster_with_topic() -> (Cluster, Client) {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    (cluster, client)
}

fn unary(name: &str, batch: Batch) -> PublishRequest {
    PublishRequest {
        topic: TOPIC.into(),
        producer_name: name.into(),
        batch: Some(batch),
        ..PublishRequest::default()
    }
}

fn named(name: &str, stream_number: u64) -> OpenPublish {
    OpenPublish {
        topic: TOPIC.into(),
        producer_name: name.into(),
        stream_number,
        ..OpenPublish::default()
    }
}

async fn invalid_name() -> Status {
    let cluster = Cluster::start().await;
    let request = CreateTenantRequest { name: "a b".into() };
    refusal(cluster.client().await.admin().create_tenant(request).await)
}

async fn invalid_request() -> Status {
    let cluster = Cluster::start().await;
    let request = CreateTopicRequest { name: TOPIC.into(), segments: 101 };
    let status = refusal(cluster.client().await.admin().create_topic(request).await);
    assert_eq!(fact(&status, "segments_max"), "100");
    status
}

async fn unexpected_frame() -> Status {
    let cluster = Cluster::start().await;
    let mut early = cluster.client().await.raw_publish().await.expect("begun");
    early.send(publish_frame::Frame::Batch(batch(0, 1, "x"))).await;
    refusal(early.reply().await)
}

async fn tenant_not_found() -> Status {
    let cluster = Cluster::start().await;
    let request = DescribeTenantRequest { name: "none".into() };
    refusal(cluster.client().await.admin().describe_tenant(request).await)
}

async fn namespace_not_found() -> Status {
    let cluster = Cluster::start().await;
    let request = DescribeNamespaceRequest { name: "public/none".into() };
    refusal(cluster.client().await.admin().describe_namespace(request).await)
}

async fn topic_not_found() -> Status {
    let cluster = Cluster::start().await;
    let request = DescribeTopicRequest { name: TOPIC.into() };
    refusal(cluster.client().await.admin().describe_topic(request).await)
}

async fn subscription_not_found() -> Status {
    let (_cluster, client) = cluster_with_topic().await;
    let open = OpenConsume { create_at: None, ..open_consume(TOPIC, "s") };
    refusal(client.open_consumer(open).await)
}

async fn segment_not_found() -> Status {
    let (_cluster, client) = cluster_with_topic().await;
    let status = refusal(client.open_producer(OpenPublish { segment: 7, ..named("", 0) }).await);
    assert_eq!(fact(&status, "layout_epoch"), "1");
    status
}

async fn already_exists() -> Status {
    let (_cluster, client) = cluster_with_topic().await;
    let request = CreateTopicRequest { name: TOPIC.into(), segments: 2 };
    let status = refusal(client.admin().create_topic(request).await);
    assert_eq!(fact(&status, "segments"), "1");
    status
}

async fn not_empty() -> Status {
    let (_cluster, client) = cluster_with_topic().await;
    let request = DeleteNamespaceRequest { name: "public/default".into() };
    refusal(client.admin().delete_namespace(request).await)
}

async fn layout_changed() -> Status {
    let (_cluster, client) = cluster_with_topic().await;
    let open = OpenPublish { layout_epoch: 9, ..named("", 0) };
    let status = refusal(client.open_producer(open).await);
    assert_eq!(fact(&status, "layout_epoch"), "1");
    status
}

/// The answer names the owner, so that the client needs no look-up.
async fn not_owner() -> Status {
    let (cluster, client) = cluster_with_topic().await;
    client.producer(TOPIC).await;
    let (other, _segments) = cluster.another_broker("broker-1", |_| {}).await;
    let status = refusal(Client::of(&other).await.open_producer(named("", 0)).await);
    assert_eq!(fact(&status, "owner_address"), cluster.broker().address().to_string());
    assert_eq!(fact(&status, "owner_segment"), "0");
    assert_eq!(fact(&status, "layout_epoch"), "1");
    status
}

/// The claim of the run before stands until its lease has run out.
async fn segment_loading() -> Status {
    let (mut cluster, client) = cluster_with_topic().await;
    client.producer(TOPIC).await;
    cluster.kill().await;
    cluster.start_broker(|_| {}).await;
    refusal(cluster.client().await.open_producer(named("", 0)).await)
}

async fn segment_fenced() -> Status {
    let (cluster, client) = cluster_with_topic().await;
    let mut producer = client.producer(TOPIC).await;
    producer.publish(1, "ours").await;
    cluster.take_over(TOPIC).await;
    producer.send(1, "too late").await;
    refusal(producer.raw.reply().await)
}

async fn not_enough_bookies() -> Status {
    let (cluster, client) = cluster_with_topic().await;
    cluster.register_bookies(false).await;
    refusal(client.publisher().publish(unary("", batch(0, 1, "x"))).await)
}

async fn metadata_unavailable() -> Status {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    cluster.store.set_partitioned(true);
    refusal(client.admin().list_tenants(ListTenantsRequest::default()).await)
}

async fn out_of_sequence() -> Status {
    let (_cluster, client) = cluster_with_topic().await;
    let status = refusal(client.publisher().publish(unary("p", batch(5, 1, "x"))).await);
    assert_eq!(fact(&status, "pushed_sequence"), "0");
    status
}

async fn sequence_conflict() -> Status {
    let (_cluster, client) = cluster_with_topic().await;
    client.publisher().publish(unary("p", batch(0, 3, "abc"))).await.expect("stored");
    refusal(client.publisher().publish(unary("p", batch(0, 5, "abcde"))).await)
}

async fn producer_exists() -> Status {
    let (_cluster, client) = cluster_with_topic().await;
    let access = |mode: AccessMode| move |open| OpenPublish { access: mode.into(), ..open };
    let alone = access(AccessMode::Exclusive)(named("alone", 1));
    let mut holder = client.open_producer(alone).await.expect("nobody is there");
    holder.publish(1, "x").await;
    let batch = batch(0, 1, "without a stream");
    let unary = refusal(client.publisher().publish(unary("", batch)).await);
    assert_eq!(reason(&unary), Reason::ProducerExists);
    let refused = refusal(client.open_producer(named("other", 1)).await);
    // Whoever fences needs a name, and then the one that was there is out.
    let fencing = access(AccessMode::ExclusiveWithFencing);
    let nameless = refusal(client.open_producer(fencing(named("", 1))).await);
    assert_eq!(reason(&nameless), Reason::InvalidRequest);
    client.open_producer(fencing(named("third", 1))).await.expect("it fences");
    holder.send(1, "y").await;
    assert_eq!(reason(&holder.raw.reply().await.expect_err("ended")), Reason::ProducerFenced);
    refused
}

async fn unexpected_offset() -> Status {
    let (_cluster, client) = cluster_with_topic().await;
    let at = |offset| Batch { expected_offset: Some(offset), ..batch(0, 1, "x") };
    client.publisher().publish(unary("", at(0))).await.expect("the first one");
    let status = refusal(client.publisher().publish(unary("", at(0))).await);
    assert_eq!(fact(&status, "next_offset"), "1");
    client.publisher().publish(unary("", at(1))).await.expect("the next one");
    status
}

async fn producer_fenced() -> Status {
    let (_cluster, client) = cluster_with_topic().await;
    let _newer = client.open_producer(named("p", 5)).await.expect("opened");
    let status = refusal(client.open_producer(named("p", 4)).await);
    assert_eq!(fact(&status, "stream_number"), "5");
    status
}

async fn producer_expired() -> Status {
    let (_cluster, client) = cluster_with_topic().await;
    let open = OpenPublish { resume_token: "session:forgotten".into(), ..named("", 1) };
    refusal(client.open_producer(open).await)
}

async fn too_many_producers() -> Status {
    let cluster = Cluster::start_as(|settings| settings.managed.producers_max = 1).await;
    let client = cluster.client().await;
    client.open_producer(named("one", 1)).await.expect("opened");
    let status = refusal(client.open_producer(named("two", 1)).await);
    assert_eq!(fact(&status, "producers_max"), "1");
    status
}

async fn message_too_large() -> Status {
    let cluster = Cluster::start_with(|config| config.limits.message_bytes_max = 100).await;
    let request = unary("", batch(0, 1, vec![0; 101]));
    let status = refusal(cluster.client().await.publisher().publish(request).await);
    assert_eq!(fact(&status, "message_bytes_max"), "100");
    status
}

async fn credit_exceeded() -> Status {
    let cluster = Cluster::start_with(|config| config.limits.publish_window_batches = 0).await;
    let mut producer = cluster.client().await.producer(TOPIC).await;
    producer.send(1, "x").await;
    refusal(producer.raw.reply().await)
}

async fn busy() -> Status {
    let cluster = Cluster::start_with(|config| {
        config.limits.broker_bytes_max = 1_000;
        config.limits.busy_after = Duration::from_millis(50);
    })
    .await;
    let client = cluster.client().await;
    let mut producer = client.producer(TOPIC).await;
    cluster.cut_bookies_off(true);
    producer.send(1, vec![0; 1_000]).await;
    eventually("the batch holds the budget", async || cluster.broker().held().publish_bytes > 0)
        .await;
    refusal(client.publisher().publish(unary("", batch(0, 1, "x"))).await)
}

async fn backlog_quota() -> Status {
    let (_cluster, client) = cluster_with_topic().await;
    let quota = Policies { backlog_quota_bytes: Some(10), ..Policies::default() };
    let set = SetPoliciesRequest { scope: TOPIC.into(), policies: Some(quota), unset: vec![] };
    client.admin().set_policies(set).await.expect("set");
    client.consumer(TOPIC, "slow").await;
    // The owner hears of a policy within seconds; until then it takes what comes.
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        match client.publisher().publish(unary("", batch(0, 1, "more than ten bytes"))).await {
            Ok(_) => assert!(tokio::time::Instant::now() < deadline, "never over its quota"),
            Err(refused) => return refused,
        }
    }
}

async fn set(client: &Client, scope: &str, policies: Policies) {
    let set = SetPoliciesRequest { scope: scope.into(), policies: Some(policies), unset: vec![] };
    client.admin().set_policies(set).await.expect("set");
}

async fn rate_limited() -> Status {
    let cluster =
        Cluster::start_with(|config| config.limits.busy_after = Duration::from_millis(50)).await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    set(&client, TOPIC, Policies { publish_messages_per_s: Some(1), ..Policies::default() }).await;
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        match client.publisher().publish(unary("", batch(0, 2, "xy"))).await {
            Ok(_) => assert!(tokio::time::Instant::now() < deadline, "never past its rate"),
            Err(refused) => return refused,
        }
    }
}

async fn too_many_topics() -> Status {
    let (_cluster, client) = cluster_with_topic().await;
    set(&client, "public", Policies { topics_max: Some(1), ..Policies::default() }).await;
    client.topic(TOPIC, 1).await; // the one that is there
    let create = CreateTopicRequest { name: "public/default/second".into(), segments: 1 };
    let status = refusal(client.admin().create_topic(create).await);
    assert_eq!(
        (fact(&status, "topics_max"), fact(&status, "level")),
        ("1".into(), "tenant".into())
    );
    status
}

async fn too_many_subscriptions() -> Status {
    let (_cluster, client) = cluster_with_topic().await;
    set(&client, TOPIC, Policies { subscriptions_max: Some(1), ..Policies::default() }).await;
    client.consumer(TOPIC, "s").await;
    client.consumer(TOPIC, "s").await; // the one that is there
    let status = refusal(client.open_consumer(open_consume(TOPIC, "t")).await);
    assert_eq!(fact(&status, "subscriptions_max"), "1");
    assert_eq!(fact(&status, "level"), "topic");
    status
}

async fn stream_silent() -> Status {
    let (_cluster, client) = cluster_with_topic().await;
    let open = OpenPublish { heartbeat_ms: 1_000, ..named("", 1) };
    let mut producer = client.open_producer(open).await.expect("opened");
    loop {
        // Its own heartbeats come until then.
        if let Err(status) = producer.raw.reply().await {
            return status;
        }
    }
}

async fn too_many_streams() -> Status {
    let cluster = Cluster::start_with(|config| config.limits.streams_per_connection_max = 1).await;
    let client = cluster.client().await;
    let _only = client.producer(TOPIC).await;
    let status = refusal(client.raw_publish().await);
    assert_eq!(fact(&status, "streams_max"), "1");
    status
}

async fn consumer_exists() -> Status {
    let (_cluster, client) = cluster_with_topic().await;
    let _first = client.consumer(TOPIC, "s").await;
    let open = OpenConsume { consumer_name: "other".into(), ..open_consume(TOPIC, "s") };
    let status = refusal(client.open_consumer(open).await);
    assert_eq!(fact(&status, "consumer"), "tester");
    status
}

async fn consumer_replaced() -> Status {
    let (_cluster, client) = cluster_with_topic().await;
    let mut first = client.consumer(TOPIC, "s").await;
    let _again = client.consumer(TOPIC, "s").await;
    refusal(first.reply().await)
}

async fn too_many_consumers() -> Status {
    let cluster = Cluster::start_with(|config| config.limits.consumers_max = 1).await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let settings = Some(SubscriptionSettings {
        r#type: SubscriptionType::Shared.into(),
        ..SubscriptionSettings::default()
    });
    let open = |name: &str| OpenConsume {
        consumer_name: name.into(),
        settings: settings.clone(),
        ..open_consume(TOPIC, "s")
    };
    let _first = client.open_consumer(open("one")).await.expect("opened");
    let status = refusal(client.open_consumer(open("two")).await);
    assert_eq!(fact(&status, "consumers_max"), "1");
    status
}

fn settle(verb: Verb) -> SettleRequest {
    let settle = Some(Settle { token: 1, verb: Some(verb) });
    SettleRequest { topic: TOPIC.into(), segment: 0, subscription: "s".into(), settle }
}

async fn invalid_handle() -> Status {
    let (_cluster, client) = cluster_with_topic().await;
    let _consumer = client.consumer(TOPIC, "s").await;
    let verb = Verb::AcceptUpTo(AcceptUpTo { offset: 0, handle: vec![1; 24].into() });
    refusal(client.subscriber().settle(settle(verb)).await)
}

async fn cursor_limit() -> Status {
    let cluster = Cluster::start_as(|settings| settings.managed.holes_max = 1).await;
    let client = cluster.client().await;
    client.producer(TOPIC).await.publish(10, "x").await;
    let mut consumer = client.consumer(TOPIC, "s").await;
    consumer.deliveries(10).await;
    let ranges = [2, 4, 6].map(|offset| OffsetRange { first: offset, last: offset }).to_vec();
    let verb = Verb::Accept(Accept { ranges, handle: consumer.handle.clone() });
    let status = refusal(client.subscriber().settle(settle(verb)).await);
    assert_eq!(fact(&status, "holes_max"), "1");
    status
}

async fn no_cold_storage() -> Status {
    let (_cluster, client) = cluster_with_topic().await;
    let verify = VerifyTierRequest { topic: TOPIC.into() };
    let mut steps = client.admin().verify_tier(verify).await.expect("begun").into_inner();
    assert_eq!(reason(&refusal(steps.message().await)), Reason::NoColdStorage);
    let offload = OffloadTopicRequest { topic: TOPIC.into(), roll: true };
    let mut steps = client.admin().offload_topic(offload).await.expect("begun").into_inner();
    refusal(steps.message().await)
}

async fn read_damaged() -> Status {
    let (cluster, client) = cluster_with_topic().await;
    client.producer(TOPIC).await.publish(1, "lost").await; // nobody consumes: it is not kept in memory
    cluster.lose_all_copies();
    let mut consumer = client.consumer(TOPIC, "s").await;
    refusal(consumer.reply().await)
}

#[derive(Debug)]
struct Nothing;

impl Authorizer for Nothing {
    fn allows(&self, _: &Principal, _: Action, _: &Resource) -> bool {
        false
    }
}

async fn permission_denied() -> Status {
    let cluster = Cluster::start_as(|settings| settings.authorizer = Arc::new(Nothing)).await;
    let client = cluster.client().await;
    let status = refusal(client.admin().list_tenants(ListTenantsRequest::default()).await);
    assert_eq!(
        (fact(&status, "action").as_str(), fact(&status, "resource").as_str()),
        ("List", "the cluster")
    );
    status
}

async fn shutting_down() -> Status {
    let (mut cluster, client) = cluster_with_topic().await;
    let mut producer = client.producer(TOPIC).await;
    let broker = cluster.broker.take().expect("it runs");
    Tasks::new("test").spawn("shutdown", broker.shutdown(Duration::from_secs(5)));
    producer.raw.reply().await.expect("told to go");
    refusal(client.admin().list_tenants(ListTenantsRequest::default()).await)
}

async fn deadline_exceeded() -> Status {
    let cluster = Cluster::start_with(|config| {
        config.limits.unary_deadline = Duration::from_millis(50);
    })
    .await;
    cluster.cut_bookies_off(true);
    let request = unary("p", batch(0, 1, "x"));
    refusal(cluster.client().await.publisher().publish(request).await)
}

async fn internal() -> Status {
    let (cluster, client) = cluster_with_topic().await;
    let key = keys::topic(cluster.topic_id(TOPIC).await);
    cluster.store.txn(Txn::new().then(Op::put(key, vec![0xff]))).await.expect("written");
    refusal(client.admin().describe_topic(DescribeTopicRequest { name: TOPIC.into() }).await)
}
