//! S1: every call asks for its permission, on every way to the same action.

use std::{collections::BTreeSet, sync::Arc};

use geminga_broker::auth::{Action, Authorizer, Principal, Resource};
use geminga_proto::{
    admin::v1::{
        CreateNamespaceRequest, CreateSubscriptionRequest, CreateTenantRequest, CreateTopicRequest,
        DeleteNamespaceRequest, DeleteSubscriptionRequest, DeleteTenantRequest, DeleteTopicRequest,
        DescribeClusterRequest, DescribeLedgerRequest, DescribeNamespaceRequest,
        DescribeSubscriptionRequest, DescribeTenantRequest, DescribeTopicRequest,
        DrainBookieRequest, DrainBrokerRequest, GetPoliciesRequest, ListBookiesRequest,
        ListBrokersRequest, ListLedgersRequest, ListNamespacesRequest, ListSubscriptionsRequest,
        ListTenantsRequest, ListTopicsRequest, LocateTopicRequest, OffloadTopicRequest,
        SetPoliciesRequest, TierStatusRequest, VerifyTierRequest,
    },
    internal::v1::{SegmentRequest, segments_client::SegmentsClient},
    reason::Reason,
    v1::{
        OpenConsume, OpenPublish, PublishRequest, SettleRequest, WatchRequest, WatchTopicsRequest,
    },
};
use parking_lot::Mutex;
use tonic::Status;

use crate::harness::{Client, Cluster, batch, open_consume, refused};

/// Permits what is in it, and remembers what was asked.
#[derive(Debug, Default)]
struct Book {
    permitted: BTreeSet<Action>,
    asked: Mutex<Vec<String>>,
}

impl Authorizer for Book {
    fn allows(&self, principal: &Principal, action: Action, resource: &Resource) -> bool {
        assert_eq!(*principal, Principal::Anonymous);
        self.asked.lock().push(format!("{action:?} {resource}"));
        self.permitted.contains(&action)
    }
}

async fn behind(permitted: &[Action]) -> (Cluster, Client, Arc<Book>) {
    let permitted = permitted.iter().copied().collect();
    let book = Arc::new(Book { permitted, ..Book::default() });
    let authorizer = Arc::clone(&book);
    let cluster = Cluster::start_as(move |settings| settings.authorizer = authorizer).await;
    let client = cluster.client().await;
    (cluster, client, book)
}

const TOPIC: &str = "a/b/t";

/// Makes each call that there is, and gives its answer and what it must have asked for.
async fn every_call(client: &Client) -> Vec<(Result<(), Status>, &'static str)> {
    let mut admin = client.admin();
    let s = String::from;
    let mut calls = Vec::new();
    macro_rules! call {
        ($call:ident, $request:expr, $asks:literal) => {
            calls.push((admin.$call($request).await.map(drop), $asks));
        };
    }
    let (name, topic) = (s("s"), s(TOPIC));
    call!(create_tenant, CreateTenantRequest { name: s("a") }, "Create the cluster");
    call!(list_tenants, ListTenantsRequest::default(), "List the cluster");
    call!(describe_tenant, DescribeTenantRequest { name: s("a") }, "Describe tenant a");
    call!(delete_tenant, DeleteTenantRequest { name: s("a") }, "Delete the cluster");
    call!(
        create_namespace,
        CreateNamespaceRequest { name: s("a/b"), auto_create_topics: None },
        "Create tenant a"
    );
    call!(
        list_namespaces,
        ListNamespacesRequest { tenant: s("a"), ..Default::default() },
        "List tenant a"
    );
    call!(
        describe_namespace,
        DescribeNamespaceRequest { name: s("a/b") },
        "Describe namespace a/b"
    );
    call!(delete_namespace, DeleteNamespaceRequest { name: s("a/b") }, "Delete tenant a");
    call!(create_topic, CreateTopicRequest { name: s(TOPIC), segments: 1 }, "Create namespace a/b");
    call!(
        list_topics,
        ListTopicsRequest { namespace: s("a/b"), ..Default::default() },
        "List namespace a/b"
    );
    call!(describe_topic, DescribeTopicRequest { name: s(TOPIC) }, "Describe topic a/b/t");
    call!(delete_topic, DeleteTopicRequest { name: s(TOPIC) }, "Delete namespace a/b");
    call!(
        create_subscription,
        CreateSubscriptionRequest {
            topic: topic.clone(),
            name: name.clone(),
            start: 0,
            ..Default::default()
        },
        "Create topic a/b/t"
    );
    call!(
        list_subscriptions,
        ListSubscriptionsRequest { topic: topic.clone(), ..Default::default() },
        "List topic a/b/t"
    );
    call!(
        describe_subscription,
        DescribeSubscriptionRequest { topic: topic.clone(), name: name.clone() },
        "Describe subscription s of a/b/t"
    );
    call!(
        delete_subscription,
        DeleteSubscriptionRequest { topic: topic.clone(), name: name.clone() },
        "Delete topic a/b/t"
    );
    call!(describe_cluster, DescribeClusterRequest {}, "Describe the cluster");
    call!(list_brokers, ListBrokersRequest {}, "List the cluster");
    call!(drain_broker, DrainBrokerRequest::default(), "Operate the cluster");
    call!(list_bookies, ListBookiesRequest {}, "List the cluster");
    call!(drain_bookie, DrainBookieRequest::default(), "Operate the cluster");
    call!(locate_topic, LocateTopicRequest { name: s(TOPIC) }, "Lookup topic a/b/t");
    call!(list_ledgers, ListLedgersRequest::default(), "List the cluster");
    let of_topic = ListLedgersRequest { topic: s(TOPIC), ..Default::default() };
    call!(list_ledgers, of_topic, "List topic a/b/t");
    call!(describe_ledger, DescribeLedgerRequest { id: 1 }, "Describe the cluster");
    call!(get_policies, GetPoliciesRequest { scope: s("") }, "Describe the cluster");
    call!(get_policies, GetPoliciesRequest { scope: s("a") }, "Describe tenant a");
    call!(get_policies, GetPoliciesRequest { scope: s("a/b") }, "Describe namespace a/b");
    let set = |scope: &str| SetPoliciesRequest { scope: scope.into(), ..Default::default() };
    call!(set_policies, set(""), "Configure the cluster");
    call!(set_policies, set("a"), "Configure tenant a");
    call!(set_policies, set(TOPIC), "Configure topic a/b/t");
    call!(tier_status, TierStatusRequest { topic: topic.clone() }, "Describe topic a/b/t");
    let offload = OffloadTopicRequest { topic: topic.clone(), roll: false };
    call!(offload_topic, offload, "Operate topic a/b/t");
    call!(verify_tier, VerifyTierRequest { topic: topic.clone() }, "Operate topic a/b/t");
    let mut segments = SegmentsClient::new(client.channel.clone());
    calls.push((segments.ask(SegmentRequest::default()).await.map(drop), "Serve the cluster"));
    calls.push((segments.walk(SegmentRequest::default()).await.map(drop), "Serve the cluster"));
    let publish = PublishRequest {
        topic: topic.clone(),
        batch: Some(batch(0, 1, "x")),
        ..Default::default()
    };
    calls.push((client.publisher().publish(publish).await.map(drop), "Publish topic a/b/t"));
    let open = OpenPublish { topic: topic.clone(), ..Default::default() };
    calls.push((client.open_producer(open).await.map(drop), "Publish topic a/b/t"));
    let open = OpenConsume { create_at: None, ..open_consume(TOPIC, "s") };
    calls.push((client.open_consumer(open).await.map(drop), "Consume subscription s of a/b/t"));
    let settle = SettleRequest { topic: topic.clone(), subscription: name, ..Default::default() };
    calls.push((
        client.subscriber().settle(settle).await.map(drop),
        "Consume subscription s of a/b/t",
    ));
    let watch = WatchRequest { topic, create_if_missing: false };
    calls.push((client.discovery().watch(watch).await.map(drop), "Lookup topic a/b/t"));
    let watch = WatchTopicsRequest { namespace: s("a/b"), ..Default::default() };
    calls.push((client.discovery().watch_topics(watch).await.map(drop), "List namespace a/b"));
    calls
}

#[tokio::test]
async fn a_principal_without_permissions_can_do_nothing_and_each_call_asks_for_its_own_row() {
    let (_cluster, client, book) = behind(&[]).await;
    let calls = every_call(&client).await;
    let rows: Vec<&str> = calls.iter().map(|(_, row)| *row).collect();
    for (answer, row) in calls {
        assert_eq!(refused(answer), Reason::PermissionDenied, "{row}");
    }
    assert_eq!(*book.asked.lock(), rows);
}

#[tokio::test]
async fn with_one_action_permitted_only_its_calls_get_further() {
    use Action::{
        Configure, Consume, Create, Delete, Describe, List, Lookup, Operate, Publish, Serve,
    };
    for action in
        [Publish, Consume, Lookup, Create, List, Describe, Delete, Configure, Operate, Serve]
    {
        let (_cluster, client, _book) = behind(&[action]).await;
        for (answer, row) in every_call(&client).await {
            let denied = answer.err().map(|status| crate::harness::reason(&status));
            let denied = denied == Some(Reason::PermissionDenied);
            assert_eq!(denied, !row.starts_with(&format!("{action:?} ")), "{row} with {action:?}");
        }
    }
}

/// T: a check that one of several paths to the same action lacked.
#[tokio::test]
async fn whoever_may_publish_but_not_create_makes_no_topic_by_publishing_or_looking() {
    let (_cluster, client, _book) = behind(&[Action::Publish, Action::Lookup, Action::List]).await;
    let topic = String::from("public/default/new");
    let publish = PublishRequest {
        topic: topic.clone(),
        batch: Some(batch(0, 1, "x")),
        ..Default::default()
    };
    assert_eq!(refused(client.publisher().publish(publish).await), Reason::PermissionDenied);
    let open = OpenPublish { topic: topic.clone(), ..Default::default() };
    assert_eq!(refused(client.open_producer(open).await), Reason::PermissionDenied);
    let watch = WatchRequest { topic, create_if_missing: true };
    assert_eq!(refused(client.discovery().watch(watch).await), Reason::PermissionDenied);
    let list = ListTopicsRequest { namespace: "public/default".into(), ..Default::default() };
    let topics = client.admin().list_topics(list).await.expect("permitted").into_inner().topics;
    assert!(topics.is_empty(), "{topics:?}");
}
