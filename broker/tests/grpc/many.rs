//! Many subscriptions on one topic: what one costs does not grow with their number.

use std::sync::atomic::Ordering;

use geminga_proto::{
    admin::v1::{CreateSubscriptionRequest, ListSubscriptionsRequest, SetPoliciesRequest},
    v1::{Policies, SubscriptionStart},
};

use crate::{
    harness::{Client, Cluster},
    types::TOPIC,
};

/// In each of three parts.
const PART: u64 = 500;

async fn create(client: &Client, n: u64) {
    let request = CreateSubscriptionRequest {
        topic: TOPIC.into(),
        name: format!("s{n:05}"),
        start: SubscriptionStart::Latest.into(),
        settings: None,
    };
    client.admin().create_subscription(request).await.expect("created");
}

#[tokio::test]
async fn a_subscription_costs_the_store_the_same_however_many_there_are() {
    let mut cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let many = Policies { subscriptions_max: Some(100_000), ..Policies::default() };
    let set = SetPoliciesRequest { scope: String::new(), policies: Some(many), unset: vec![] };
    client.admin().set_policies(set).await.expect("set");
    let read = || cluster.read.load(Ordering::Relaxed);
    let mut costs = Vec::new();
    for part in 0..3 {
        let before = read();
        for n in 0..PART {
            create(&client, part * PART + n).await;
        }
        costs.push(read() - before);
    }
    // What goes on beside it is counted too.
    assert!(costs[2] <= costs[0] + costs[0] / 2, "{costs:?}");
    let (before, mut listed, mut page_token) = (read(), 0, String::new());
    loop {
        let (topic, page_size) = (TOPIC.into(), 100);
        let request = ListSubscriptionsRequest { topic, page_size, page_token };
        let page = client.admin().list_subscriptions(request).await.expect("listed").into_inner();
        listed += page.subscriptions.len() as u64;
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(listed, 3 * PART);
    let cost = read() - before;
    assert!(cost < 2 * listed, "{cost} values for a list of {listed}");
    // A load reads each once, and the mirror once more.
    let before = cluster.read.load(Ordering::Relaxed);
    cluster.kill().await;
    cluster.start_broker(|settings| settings.broker.id = "broker-1".into()).await;
    let client = cluster.client().await;
    crate::harness::eventually("served again", async || {
        client
            .open_producer(geminga_proto::v1::OpenPublish {
                topic: TOPIC.into(),
                ..Default::default()
            })
            .await
            .is_ok()
    })
    .await;
    let cost = cluster.read.load(Ordering::Relaxed) - before;
    assert!(cost < 4 * listed + 2_000, "{cost} values for a load of {listed}");
}
