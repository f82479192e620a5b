//! The admin API and discovery.

use std::time::Duration;

use geminga_proto::{
    admin::v1::{
        CreateNamespaceRequest, CreateSubscriptionRequest, CreateTenantRequest, CreateTopicRequest,
        DeleteNamespaceRequest, DeleteSubscriptionRequest, DeleteTenantRequest, DeleteTopicRequest,
        DescribeSubscriptionRequest, DescribeTenantRequest, DescribeTopicRequest,
        ListTopicsRequest,
    },
    reason::Reason,
    v1::{OpenConsume, SubscriptionStart, WatchRequest},
};
use tokio::time::timeout;

use crate::harness::{Cluster, PATIENCE, open_consume, reason, refused};

#[tokio::test]
async fn the_life_of_a_tenant_a_namespace_a_topic_and_a_subscription() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    let mut admin = client.admin();
    admin.create_tenant(CreateTenantRequest { name: "acme".into() }).await.expect("created");
    let namespace = CreateNamespaceRequest { name: "acme/shop".into(), auto_create_topics: None };
    let namespace = admin.create_namespace(namespace).await.expect("created").into_inner();
    assert!(!namespace.auto_create_topics, "off unless asked for");
    let topic = CreateTopicRequest { name: "acme/shop/orders".into(), segments: 4 };
    let topic = admin.create_topic(topic).await.expect("created").into_inner();
    assert_eq!(topic.layout.expect("there").segments.len(), 4);
    let subscription = CreateSubscriptionRequest {
        topic: topic.name.clone(),
        name: "billing".into(),
        start: SubscriptionStart::Earliest.into(),
        ..Default::default()
    };
    admin.create_subscription(subscription.clone()).await.expect("created");
    admin.create_subscription(subscription.clone()).await.expect("the same again");
    let other =
        CreateSubscriptionRequest { start: SubscriptionStart::Latest.into(), ..subscription };
    assert_eq!(refused(admin.create_subscription(other).await), Reason::AlreadyExists);
    client.producer(&topic.name).await.publish(3, "abc").await;
    let describe =
        DescribeSubscriptionRequest { topic: topic.name.clone(), name: "billing".into() };
    let described = admin.describe_subscription(describe).await.expect("described").into_inner();
    assert_eq!(described.cursors.len(), 4);
    assert_eq!(described.cursors[0].backlog_messages, 3);
    let described = admin.describe_topic(DescribeTopicRequest { name: topic.name.clone() }).await;
    let described = described.expect("described").into_inner();
    assert_eq!((described.segments.len(), described.segments[0].next_offset), (4, 3));
    assert_eq!(
        refused(admin.delete_tenant(DeleteTenantRequest { name: "acme".into() }).await),
        Reason::NotEmpty
    );
    let gone = DeleteSubscriptionRequest { topic: topic.name.clone(), name: "billing".into() };
    admin.delete_subscription(gone.clone()).await.expect("deleted");
    assert_eq!(refused(admin.delete_subscription(gone).await), Reason::SubscriptionNotFound);
    admin.delete_topic(DeleteTopicRequest { name: topic.name.clone() }).await.expect("deleted");
    assert_eq!(
        refused(admin.describe_topic(DescribeTopicRequest { name: topic.name }).await),
        Reason::TopicNotFound
    );
    admin
        .delete_namespace(DeleteNamespaceRequest { name: "acme/shop".into() })
        .await
        .expect("deleted");
    admin.delete_tenant(DeleteTenantRequest { name: "acme".into() }).await.expect("deleted");
    assert_eq!(
        refused(admin.describe_tenant(DescribeTenantRequest { name: "acme".into() }).await),
        Reason::TenantNotFound
    );
}

#[tokio::test]
async fn deleting_ends_the_streams_and_the_same_name_begins_empty() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    let topic = "public/default/t";
    client.topic(topic, 2).await;
    client.producer(topic).await.publish(5, "x").await;
    let mut consumer = client.consumer(topic, "s").await;
    consumer.deliveries(5).await;
    let gone = DeleteSubscriptionRequest { topic: topic.into(), name: "s".into() };
    client.admin().delete_subscription(gone).await.expect("deleted");
    assert_eq!(reason(&consumer.reply().await.expect_err("ended")), Reason::SubscriptionNotFound);
    let mut producer = client.producer(topic).await;
    client.admin().delete_topic(DeleteTopicRequest { name: topic.into() }).await.expect("deleted");
    assert_eq!(reason(&producer.raw.reply().await.expect_err("ended")), Reason::TopicNotFound);
    client.topic(topic, 1).await;
    let receipt = client.producer(topic).await.publish(1, "y").await;
    assert_eq!(receipt.base_offset, 0);
}

#[tokio::test]
async fn names_and_numbers_out_of_bounds_are_refused() {
    let cluster = Cluster::start().await;
    let mut admin = cluster.client().await.admin();
    for name in ["", "a/b", "..", "a\u{7}", "a b"] {
        let result = admin.create_tenant(CreateTenantRequest { name: name.into() }).await;
        assert_eq!(refused(result), Reason::InvalidName, "{name:?}");
    }
    let wide = CreateTopicRequest { name: "public/default/t".into(), segments: 101 };
    assert_eq!(refused(admin.create_topic(wide).await), Reason::InvalidRequest);
    let token = ListTopicsRequest {
        namespace: "public/default".into(),
        page_token: "../x".into(),
        page_size: 0,
    };
    assert_eq!(refused(admin.list_topics(token).await), Reason::InvalidRequest);
}

#[tokio::test]
async fn a_stream_needs_a_topic_a_segment_and_a_layout_that_stand() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic("public/default/t", 2).await;
    let open = open_consume("public/default/t", "s");
    let cases = [
        (
            OpenConsume { topic: "public/default/none".into(), ..open.clone() },
            Reason::TopicNotFound,
        ),
        (OpenConsume { segment: 2, ..open.clone() }, Reason::SegmentNotFound),
        (OpenConsume { layout_epoch: 9, ..open.clone() }, Reason::LayoutChanged),
        (OpenConsume { create_at: None, ..open.clone() }, Reason::SubscriptionNotFound),
        (OpenConsume { subscription: "a/b".into(), ..open.clone() }, Reason::InvalidName),
        (OpenConsume { create_at: Some(77), ..open }, Reason::InvalidRequest),
    ];
    for (open, expected) in cases {
        assert_eq!(refused(client.open_consumer(open).await), expected);
    }
}

#[tokio::test]
async fn a_watch_tells_the_layout_and_owners_once_and_that_the_topic_is_gone() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    let topic = "public/default/t";
    client.topic(topic, 3).await;
    let request = WatchRequest { topic: topic.into(), create_if_missing: false };
    let mut watch = client.discovery().watch(request).await.expect("watched").into_inner();
    let reply =
        timeout(PATIENCE, watch.message()).await.expect("in time").expect("ok").expect("a reply");
    assert_eq!(reply.layout.expect("there").segments.len(), 3);
    assert_eq!(reply.owners.len(), 3);
    assert_eq!(reply.owners[0].address, cluster.broker().address().to_string());
    client.producer(topic).await.publish(1, "x").await;
    let more = timeout(Duration::from_millis(300), watch.message()).await;
    assert!(more.is_err(), "the owner's claim changes nothing that was told");
    client.admin().delete_topic(DeleteTopicRequest { name: topic.into() }).await.expect("deleted");
    let end = timeout(PATIENCE, watch.message()).await.expect("in time").expect_err("the end");
    assert_eq!(reason(&end), Reason::TopicNotFound);
    let missing = WatchRequest { topic: "public/default/new".into(), create_if_missing: true };
    client.discovery().watch(missing).await.expect("created on the way");
}
