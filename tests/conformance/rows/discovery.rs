//! The topics of a namespace, pushed as they come and go.

use std::{collections::BTreeMap, sync::Arc};

use geminga_proto::{
    admin::v1::{CreateNamespaceRequest, DeleteTopicRequest},
    v1::{WatchTopicsReply, WatchTopicsRequest, discovery_client::DiscoveryClient},
};
use tonic::{Status, Streaming};

use crate::{
    client::{Client, in_time, refusal, retrying},
    world::World,
};

/// The topics as one watch tells of them.
struct Watch {
    replies: Streaming<WatchTopicsReply>,
    topics: BTreeMap<String, u64>,
    synced: bool,
}

impl Watch {
    async fn open(client: &Client, namespace: &str, prefix: &str) -> Result<Self, Status> {
        let mut discovery = DiscoveryClient::new(client.channel());
        let (namespace, prefix) = (namespace.to_owned(), prefix.to_owned());
        let request = WatchTopicsRequest { namespace, prefix };
        let replies = discovery.watch_topics(request).await?.into_inner();
        let mut watch = Self { replies, topics: BTreeMap::new(), synced: false };
        while !watch.synced {
            watch.turn().await?;
        }
        Ok(watch)
    }

    async fn turn(&mut self) -> Result<(), Status> {
        let reply = in_time("the watch tells something", self.replies.message()).await?;
        let reply = reply.ok_or_else(|| Status::unavailable("the watch ended"))?;
        for gone in reply.gone {
            assert_eq!(self.topics.remove(&gone.name), Some(gone.id), "it was there");
        }
        for come in reply.come {
            assert_eq!(self.topics.insert(come.name, come.id), None, "it was not there");
        }
        self.synced |= reply.synced;
        Ok(())
    }

    /// The names, once there are so many.
    async fn names(&mut self, wanted: &[&str]) {
        let wanted: Vec<String> =
            wanted.iter().map(|name| format!("public/watched/{name}")).collect();
        while self.topics.keys().cloned().collect::<Vec<_>>() != wanted {
            self.turn().await.unwrap_or_else(|error| panic!("{wanted:?}: {error:?}"));
        }
    }
}

pub(crate) async fn topics_are_pushed(world: Arc<World>) {
    let client = world.client().await;
    retrying("create the namespace", async || {
        let name = "public/watched".to_owned();
        let request = CreateNamespaceRequest { name, auto_create_topics: None };
        client.admin().create_namespace(request).await
    })
    .await;
    let topic = |name: &str| format!("public/watched/{name}");
    for name in ["eu-a", "us-a"] {
        client.topic(&topic(name), 1).await;
    }
    let mut all =
        in_time("a watch", Watch::open(&client, "public/watched", "")).await.expect("open");
    all.names(&["eu-a", "us-a"]).await;
    let mut eu = Watch::open(&client, "public/watched", "eu-").await.expect("open");
    eu.names(&["eu-a"]).await;
    client.topic(&topic("eu-b"), 1).await;
    client.topic(&topic("us-b"), 1).await;
    eu.names(&["eu-a", "eu-b"]).await;
    all.names(&["eu-a", "eu-b", "us-a", "us-b"]).await;
    let before = eu.topics[&topic("eu-b")];
    retrying("delete the topic", async || {
        client.admin().delete_topic(DeleteTopicRequest { name: topic("eu-b") }).await
    })
    .await;
    client.topic(&topic("eu-b"), 1).await;
    while eu.topics.get(&topic("eu-b")).is_none_or(|id| *id == before) {
        eu.turn().await.expect("it goes on");
    }
    client.topic(&topic("us-c"), 1).await;
    all.names(&["eu-a", "eu-b", "us-a", "us-b", "us-c"]).await;

    let missing = Watch::open(&client, "public/nowhere", "").await.map(drop);
    assert_eq!(refusal(missing), "NAMESPACE_NOT_FOUND");
    for bad in ["", "public", "public/a/b", "public/..", "public/a b"] {
        let refused = Watch::open(&client, bad, "").await.map(drop);
        assert_eq!(refusal(refused), "INVALID_NAME", "{bad:?}");
    }
}
