//! O3: an outage of the store longer than the lease stops changes and no traffic; whoever lost a segment meanwhile gets no
//! acknowledgement.

use std::time::Duration;

use geminga_broker::BrokerConfig;
use geminga_proto::{
    admin::v1::{CreateTenantRequest, CreateTopicRequest, ListTenantsRequest},
    reason::Reason,
    v1::{OpenPublish, Route, publish_frame},
};
use tokio::time::{Instant, sleep};

use crate::harness::{Client, Cluster, eventually, reason, refused};

const TOPIC: &str = "public/default/t";
const TTL: Duration = Duration::from_secs(1);

fn short(config: &mut BrokerConfig) {
    config.lease_ttl = TTL;
}

fn open(stream_number: u64, token: bytes::Bytes) -> OpenPublish {
    OpenPublish {
        topic: TOPIC.into(),
        stream_number,
        resume_token: token,
        route: Route::Direct.into(),
        ..OpenPublish::default()
    }
}

#[tokio::test]
async fn an_outage_longer_than_the_lease_ends_no_stream_and_the_claims_are_made_again() {
    let cluster = Cluster::start_with(short).await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    client.topic("public/default/cold", 1).await;
    let mut producer = client.producer(TOPIC).await;
    let epoch = producer.publish(1, "x").await.epoch;
    let mut consumer = client.consumer(TOPIC, "s").await;
    consumer.delivery().await;
    cluster.store.set_partitioned(true);
    let (begun, mut offset) = (Instant::now(), 1);
    while begun.elapsed() < TTL * 3 {
        assert_eq!(producer.publish(1, "x").await.base_offset, offset);
        assert_eq!(consumer.delivery().await, [offset]);
        offset += 1;
        sleep(Duration::from_millis(20)).await;
    }
    let cold = OpenPublish { topic: "public/default/cold".into(), ..open(1, bytes::Bytes::new()) };
    assert_eq!(refused(client.open_producer(cold.clone()).await), Reason::MetadataUnavailable);
    cluster.store.set_partitioned(false);
    eventually("changes are made again", async || {
        let tenant = CreateTenantRequest { name: "acme".into() };
        client.admin().create_tenant(tenant).await.is_ok()
    })
    .await;
    eventually("the claim stands again", async || {
        client.places(TOPIC).await[0].broker == "broker-0"
    })
    .await;
    let receipt = producer.publish(1, "x").await;
    assert_eq!((receipt.base_offset, receipt.epoch), (offset, epoch), "the same owner, unbroken");
    assert_eq!(consumer.delivery().await, [offset]);
    eventually("what was not loaded is", async || client.open_producer(cold.clone()).await.is_ok())
        .await;
}

/// O3, O4, I10: one that is cut off from the store gives receipts until somebody takes over, and none after.
#[tokio::test]
async fn a_frozen_owner_is_fenced_by_the_next_one_and_nothing_is_stored_twice() {
    let mut cluster = Cluster::start_with(short).await;
    cluster.kill().await;
    let frozen_store = cluster.own_store();
    let (frozen, _segments) =
        cluster.broker_behind("broker-0", &frozen_store, |s| short(&mut s.broker)).await;
    let client = Client::of(&frozen).await;
    client.topic(TOPIC, 1).await;
    let mut producer = loop {
        match client.open_producer(open(1, bytes::Bytes::new())).await {
            Ok(producer) => break producer,
            Err(status) => assert_eq!(reason(&status), Reason::SegmentLoading),
        }
        sleep(Duration::from_millis(50)).await;
    };
    producer.publish(1, "x").await;
    let (other, _other) = cluster.another_broker("broker-1", |s| short(&mut s.broker)).await;
    let elsewhere = Client::of(&other).await;
    frozen_store.set_partitioned(true);
    let token = producer.opened.resume_token.clone();
    let mut taken = loop {
        assert!(producer.publish(1, "x").await.base_offset > 0, "open ledgers take more");
        match elsewhere.open_producer(open(2, token.clone())).await {
            Ok(taken) => break taken,
            Err(status) => {
                assert!(matches!(reason(&status), Reason::NotOwner | Reason::SegmentLoading));
            }
        }
        sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(taken.opened.last_persisted_sequence, producer.last, "all that had a receipt");
    let late = producer.next_batch(1, "late");
    producer.raw.send(publish_frame::Frame::Batch(late)).await;
    let status = producer.raw.reply().await.expect_err("no receipt");
    assert_eq!(reason(&status), Reason::SegmentFenced);
    let receipt = taken.publish(1, "y").await;
    assert_eq!(receipt.base_offset, taken.last - 1, "dense: nothing twice, nothing lost");
    frozen_store.set_partitioned(false);
    eventually("it serves again, and knows better", async || {
        let listed = client.admin().list_tenants(ListTenantsRequest::default()).await.is_ok();
        let answer = client.open_producer(open(3, token.clone())).await;
        listed && answer.err().is_some_and(|status| reason(&status) == Reason::NotOwner)
    })
    .await;
    let again = CreateTopicRequest { name: "public/default/new".into(), segments: 1 };
    eventually("it changes things again", async || {
        client.admin().create_topic(again.clone()).await.is_ok()
    })
    .await;
}
