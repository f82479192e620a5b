//! The topics of a namespace, watched.

use std::collections::BTreeMap;

use geminga_proto::{
    admin::v1::{CreateNamespaceRequest, CreateTenantRequest, DeleteTopicRequest},
    reason::Reason,
    v1::{WatchTopicsReply, WatchTopicsRequest},
};
use tokio::time::timeout;
use tonic::Streaming;

use crate::harness::{Client, Cluster, PATIENCE, refused};

const NAMESPACE: &str = "public/default";

/// What a watcher knows.
struct Watcher {
    replies: Streaming<WatchTopicsReply>,
    topics: BTreeMap<String, u64>,
    synced: bool,
    /// Most changes in one reply.
    most: usize,
}

impl Watcher {
    async fn of(client: &Client, namespace: &str, prefix: &str) -> Self {
        let request = WatchTopicsRequest { namespace: namespace.into(), prefix: prefix.into() };
        let replies = client.discovery().watch_topics(request).await.expect("watched").into_inner();
        Self { replies, topics: BTreeMap::new(), synced: false, most: 0 }
    }

    async fn next(&mut self) {
        let reply = timeout(PATIENCE, self.replies.message()).await.expect("in time");
        let reply = reply.expect("well").expect("it goes on");
        self.most = self.most.max(reply.come.len() + reply.gone.len());
        for gone in reply.gone {
            assert_eq!(self.topics.remove(&gone.name), Some(gone.id), "it was told of");
        }
        for come in reply.come {
            assert_eq!(self.topics.insert(come.name, come.id), None, "once");
        }
        assert!(reply.synced || !self.synced, "complete once is complete");
        self.synced = reply.synced;
    }

    async fn until(&mut self, holds: impl Fn(&Self) -> bool) {
        while !holds(self) {
            self.next().await;
        }
    }

    fn names(&self) -> Vec<&str> {
        self.topics.keys().map(String::as_str).collect()
    }
}

async fn delete(client: &Client, name: &str) {
    client.admin().delete_topic(DeleteTopicRequest { name: name.into() }).await.expect("deleted");
}

#[tokio::test]
async fn a_watcher_learns_of_all_topics_and_of_each_that_comes_or_goes() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    let name = |own: &str| format!("{NAMESPACE}/{own}");
    let mut empty = Watcher::of(&client, NAMESPACE, "").await;
    empty.next().await;
    assert!(empty.synced && empty.topics.is_empty(), "an empty list is complete too");
    for own in ["orders-eu", "orders-us", "audit"] {
        client.topic(&name(own), 1).await;
    }
    let mut all = Watcher::of(&client, NAMESPACE, "").await;
    let mut orders = Watcher::of(&client, NAMESPACE, "orders-").await;
    for watcher in [&mut all, &mut orders] {
        watcher.until(|watcher| watcher.synced).await;
    }
    assert_eq!(all.topics.len(), 3, "what was made before is in a complete list");
    assert_eq!(orders.names(), [name("orders-eu"), name("orders-us")]);
    empty.until(|empty| empty.topics.len() == 3).await;
    let first = all.topics[&name("audit")];
    delete(&client, &name("audit")).await;
    client.topic(&name("audit"), 1).await;
    all.until(|all| all.topics.get(&name("audit")).is_some_and(|id| *id != first)).await;
    delete(&client, &name("orders-us")).await;
    client.topic(&name("orders-asia"), 1).await;
    orders.until(|orders| orders.names() == [name("orders-asia"), name("orders-eu")]).await;
}

#[tokio::test]
async fn other_namespaces_are_not_told_of_and_one_that_is_missing_is_refused() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    let mut admin = client.admin();
    admin.create_tenant(CreateTenantRequest { name: "a".into() }).await.expect("created");
    for name in ["a/b", "a/bb"] {
        let create = CreateNamespaceRequest { name: name.into(), auto_create_topics: None };
        admin.create_namespace(create).await.expect("created");
    }
    client.topic("a/bb/x", 1).await;
    let mut watcher = Watcher::of(&client, "a/b", "").await;
    watcher.until(|watcher| watcher.synced).await;
    client.topic("a/bb/y", 1).await;
    client.topic("a/b/z", 1).await;
    watcher.next().await;
    assert_eq!(watcher.names(), ["a/b/z"]);
    let watch = async |namespace: &str, prefix: &str| {
        let request = WatchTopicsRequest { namespace: namespace.into(), prefix: prefix.into() };
        client.discovery().watch_topics(request).await
    };
    assert_eq!(refused(watch("a/none", "").await), Reason::NamespaceNotFound);
    assert_eq!(refused(watch("none/none", "").await), Reason::TenantNotFound);
    assert_eq!(refused(watch("a", "").await), Reason::InvalidName);
    assert_eq!(refused(watch("a/b", "x/y").await), Reason::InvalidName);
}

#[tokio::test]
async fn a_long_list_comes_in_bounded_frames_and_a_slow_reader_gets_many_changes_as_one() {
    let cluster = Cluster::start_with(|config| config.limits.outbox_bytes_max = 1_000).await;
    let client = cluster.client().await;
    let name = |n: u32| format!("{NAMESPACE}/topic-{n:04}");
    for n in 0..600 {
        client.topic(&name(n), 1).await;
    }
    let mut slow = Watcher::of(&client, NAMESPACE, "topic-").await;
    slow.next().await;
    for n in 0..20 {
        delete(&client, &name(n)).await;
        client.topic(&name(n), 1).await;
        delete(&client, &name(n)).await;
    }
    slow.until(|slow| slow.synced && slow.topics.len() == 580).await;
    assert!(slow.most <= 500, "{}", slow.most);
}
