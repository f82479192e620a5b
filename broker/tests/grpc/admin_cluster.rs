//! The admin API of the cluster: brokers, bookies, ledgers, policies.

use geminga_metadata::{MetadataStore, Op, Txn, keys};
use geminga_proto::{
    admin::v1::{
        CreateTopicRequest, DeleteTopicRequest, DescribeClusterRequest, DescribeLedgerRequest,
        DescribeTopicRequest, DrainBookieRequest, DrainBrokerRequest, GetPoliciesRequest,
        ListBookiesRequest, ListBrokersRequest, ListLedgersRequest, SetPoliciesRequest,
    },
    ids::{Incarnation, LedgerId},
    reason::Reason,
    storage::v1::{Available, Cookie, Lost, UnderReplicated},
    v1::Policies,
};
use prost::Message;

use crate::harness::{Cluster, Pair, refused};

const TOPIC: &str = "public/default/t";

async fn write(cluster: &Cluster, key: geminga_metadata::Key, value: impl Message) {
    let put = Op::put(key, value.encode_to_vec());
    cluster.store.txn(Txn::new().then(put)).await.expect("written");
}

#[tokio::test]
async fn any_broker_describes_the_cluster_and_its_brokers() {
    let pair = Pair::start(|_| {}).await;
    let client = pair.cluster.client().await;
    client.topic(TOPIC, 1).await;
    write(&pair.cluster, keys::lost(Incarnation(9)), Lost { format: 1, at_ms: 1 }).await;
    let cluster = client.admin().describe_cluster(DescribeClusterRequest {}).await;
    let cluster = cluster.expect("described").into_inner();
    assert_eq!((cluster.brokers, cluster.bookies, cluster.bookies_writable), (2, 3, 3));
    assert_eq!((cluster.bundles, cluster.incarnations_lost), (1_024, 1));
    assert!(cluster.revision > 0 && !cluster.id.is_empty());
    let brokers = client.admin().list_brokers(ListBrokersRequest {}).await.expect("listed");
    let brokers = brokers.into_inner().brokers;
    assert_eq!(brokers.iter().map(|b| b.id.as_str()).collect::<Vec<_>>(), ["broker-0", "broker-1"]);
    assert_eq!(brokers[1].address, pair.other.address().to_string());
    assert!(brokers.iter().all(|b| !b.draining && b.started_at_ms > 0 && !b.version.is_empty()));
    let unknown = DrainBrokerRequest { id: "none".into(), cancel: false };
    assert_eq!(refused(client.admin().drain_broker(unknown).await), Reason::InvalidRequest);
}

#[tokio::test]
async fn bookies_are_joined_from_all_that_is_known_and_too_few_are_never_drained() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    let drain = |id: &str, cancel| DrainBookieRequest { id: id.into(), cancel };
    let cookie = |id: &str, incarnation| Cookie {
        format: 1,
        bookie_id: id.into(),
        incarnation,
        ..Cookie::default()
    };
    write(&cluster, keys::cookie("gone"), cookie("gone", 8)).await;
    write(&cluster, keys::lost(Incarnation(8)), Lost { format: 1, at_ms: 1 }).await;
    let list = async || {
        let listed = client.admin().list_bookies(ListBookiesRequest {}).await.expect("listed");
        listed.into_inner().bookies
    };
    let bookies = list().await;
    assert_eq!(bookies.len(), 4);
    let gone = bookies.iter().find(|b| b.id == "gone").expect("it has a cookie");
    assert!(gone.lost && !gone.registered && gone.address.is_empty());
    assert_eq!(
        refused(client.admin().drain_bookie(drain("b1", false)).await),
        Reason::NotEnoughBookies
    );
    assert_eq!(
        refused(client.admin().drain_bookie(drain("no", false)).await),
        Reason::InvalidRequest
    );
    let fourth = Available { format: 1, incarnation: 4, writable: true, ..Available::default() };
    write(&cluster, keys::available("b4"), fourth).await;
    let drained = client.admin().drain_bookie(drain("b1", false)).await.expect("wished");
    let drained = drained.into_inner().bookie.expect("there");
    assert!(drained.draining && drained.drain.is_some_and(|d| d.since_ms > 0 && !d.proven));
    client.admin().drain_bookie(drain("b1", false)).await.expect("it stands already");
    assert_eq!(
        refused(client.admin().drain_bookie(drain("b2", false)).await),
        Reason::NotEnoughBookies
    );
    client.admin().drain_bookie(drain("b1", true)).await.expect("taken back");
    assert!(list().await.iter().all(|b| b.drain.is_none()));
    client.admin().drain_bookie(drain("b2", false)).await.expect("there are enough again");
}

#[tokio::test]
async fn ledgers_are_listed_by_page_by_topic_and_by_lack_of_copies() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    client.topic("public/default/u", 1).await;
    client.producer(TOPIC).await.publish(1, "x").await;
    client.producer("public/default/u").await.publish(1, "x").await;
    let list = async |request: ListLedgersRequest| {
        client.admin().list_ledgers(request).await.expect("listed").into_inner()
    };
    let mut all = Vec::new();
    let mut token = String::new();
    loop {
        let page_token = token;
        let page =
            list(ListLedgersRequest { page_size: 1, page_token, ..Default::default() }).await;
        all.extend(page.ledgers);
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(all, list(ListLedgersRequest::default()).await.ledgers);
    let of_topic = list(ListLedgersRequest { topic: TOPIC.into(), ..Default::default() }).await;
    assert!(!of_topic.ledgers.is_empty() && of_topic.ledgers.len() < all.len());
    let one = &of_topic.ledgers[0];
    assert_eq!((one.state.as_str(), one.last_entry, one.segment), ("Open", None, 0));
    assert_eq!(one.fragments[0].slots.len(), 3);
    assert!(one.fragments[0].slots.iter().all(|slot| slot.bookie.starts_with('b')));
    let lacks = || ListLedgersRequest { under_replicated: true, ..Default::default() };
    assert!(list(lacks()).await.ledgers.is_empty());
    let listing = UnderReplicated { format: 1, reason: "test".into(), at_ms: 1 };
    write(&cluster, keys::under_replicated(LedgerId(one.id)), listing).await;
    let found = list(lacks()).await.ledgers;
    assert_eq!(found.iter().map(|ledger| ledger.id).collect::<Vec<_>>(), [one.id]);
    let described = client.admin().describe_ledger(DescribeLedgerRequest { id: one.id }).await;
    assert!(described.expect("described").into_inner().under_replicated);
    let none = DescribeLedgerRequest { id: 1 << 40 };
    assert_eq!(refused(client.admin().describe_ledger(none).await), Reason::InvalidRequest);
    let token = ListLedgersRequest { page_token: "x".into(), ..Default::default() };
    assert_eq!(refused(client.admin().list_ledgers(token).await), Reason::InvalidRequest);
}

#[tokio::test]
async fn policies_are_taken_from_the_nearest_level_and_outlive_other_changes() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let set = async |scope: &str, policies: Policies, unset: &[&str]| {
        let unset = unset.iter().map(|name| (*name).into()).collect();
        let request = SetPoliciesRequest { scope: scope.into(), policies: Some(policies), unset };
        client.admin().set_policies(request).await.map(tonic::Response::into_inner)
    };
    let get = async |scope: &str| {
        let request = GetPoliciesRequest { scope: scope.into() };
        client.admin().get_policies(request).await.map(tonic::Response::into_inner)
    };
    let retention = |ms| Policies { retention_ms: Some(ms), ..Policies::default() };
    set("", retention(1), &[]).await.expect("set");
    set("public/default", Policies { retention_bytes: Some(2), ..retention(3) }, &[])
        .await
        .expect("set");
    set(TOPIC, retention(4), &[]).await.expect("set");
    let of_tenant = Policies { ttl_ms: Some(7), retention_bytes: Some(8), ..retention(2) };
    set("public", of_tenant, &[]).await.expect("set");
    let found = get("public").await.expect("found");
    assert_eq!(found.own, Some(of_tenant));
    assert_eq!(found.sources.get("ttl_ms").map(String::as_str), Some("tenant"));
    assert_eq!(refused(get("nobody").await), Reason::TenantNotFound);
    let topics = Policies { topics_max: Some(3), ..Policies::default() };
    assert_eq!(refused(set(TOPIC, topics, &[]).await), Reason::InvalidRequest);
    let found = get(TOPIC).await.expect("found");
    assert_eq!(found.effective.expect("there").ttl_ms, Some(7));
    assert_eq!(found.sources.get("ttl_ms").map(String::as_str), Some("tenant"));
    let effective = found.effective.expect("there");
    assert_eq!((effective.retention_ms, effective.retention_bytes), (Some(4), Some(2)));
    assert_eq!(found.own, Some(retention(4)));
    let source = |name: &str| found.sources.get(name).cloned().unwrap_or_default();
    assert_eq!(
        (source("retention_ms"), source("retention_bytes")),
        ("topic".into(), "namespace".into())
    );
    assert_eq!(source("delete_lag_ms"), "default");
    let found = set("public/default", Policies::default(), &["retention_ms"]).await.expect("unset");
    assert_eq!(found.effective.expect("there").retention_ms, Some(2), "of the tenant now");
    set("public", Policies::default(), &["retention_ms"]).await.expect("unset");
    let found = get("public/default").await.expect("found");
    assert_eq!(found.effective.expect("there").retention_ms, Some(1), "of the cluster again");
    assert_eq!(found.own, Some(Policies { retention_bytes: Some(2), ..Policies::default() }));
    for (scope, policies, unset) in [
        (TOPIC, retention(u64::MAX), &[][..]),
        (TOPIC, Policies::default(), &["colour"][..]),
        (TOPIC, Policies::default(), &[][..]),
    ] {
        assert_eq!(refused(set(scope, policies, unset).await), Reason::InvalidRequest);
    }
    assert_eq!(refused(get("public/none").await), Reason::NamespaceNotFound);
    assert_eq!(refused(get("public/default/none").await), Reason::TopicNotFound);
    // A topic's other changes carry them along.
    let describe = DescribeTopicRequest { name: TOPIC.into() };
    let id = client.admin().describe_topic(describe).await.expect("there").into_inner().id;
    cluster.cut_bookies_off(true); // the deletion is marked, and stays half done
    let delete = DeleteTopicRequest { name: TOPIC.into() };
    let mut admin = client.admin();
    client.producer("public/default/other").await;
    let deleting = geminga_runtime::tasks::Tasks::new("test");
    deleting.spawn("delete", async move { drop(admin.delete_topic(delete).await) });
    crate::harness::eventually("it is marked, and keeps its policies", async || {
        let key = keys::topic(geminga_proto::ids::TopicId(id));
        let (_, found) = cluster.store.get(&key).await.expect("the store answers");
        found.is_none_or(|found| {
            let value = geminga_proto::storage::v1::TopicValue::decode(found.value).expect("valid");
            value.deleting
                && value.policies.is_some_and(|policies| policies.retention_ms == Some(4))
        })
    })
    .await;
    cluster.cut_bookies_off(false);
    let again = CreateTopicRequest { name: "public/default/v".into(), segments: 1 };
    client.admin().create_topic(again).await.expect("created");
}
