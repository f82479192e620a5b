//! Settings, and what makes no sense.

use geminga_metadata::{MetadataStore, Op, Txn, keys};
use geminga_proto::{
    admin::v1::UpdateSubscriptionRequest,
    names::SubscriptionName,
    reason::Reason,
    storage::v1::SubscriptionValue,
    v1::{
        Accept, Claim, OffsetRange, OpenConsume, PullRequest, Reject, Release,
        SubscriptionSettings, SubscriptionType, settle::Verb,
    },
};
use prost::Message;

use super::{
    TOPIC, accept, consumer, dead_letters, delivery, explain, one, open, publish, records, release,
    retrying, settings, settle, started,
};
use crate::harness::{eventually, refused};

#[tokio::test]
async fn settings_are_kept_shown_compared_and_changed_but_never_the_type() {
    let (cluster, client) = started().await;
    let twice = retrying(SubscriptionType::Shared, 2);
    let mut consumer = consumer(&client, "one", &twice).await;
    let stored = cluster.subscription(TOPIC, "s").await.settings.expect("shown");
    assert_eq!((stored.lease_ms, stored.r#type), (300_000, i32::from(SubscriptionType::Shared)));
    let other = open("two", &settings(SubscriptionType::Exclusive));
    assert_eq!(refused(client.open_consumer(other).await), Reason::AlreadyExists);
    let any = OpenConsume { settings: None, ..open("two", &twice) };
    client.open_consumer(any).await.expect("any will do");
    let update = |settings| UpdateSubscriptionRequest {
        topic: TOPIC.into(),
        name: "s".into(),
        settings: Some(settings),
    };
    let failover = update(settings(SubscriptionType::Failover));
    assert_eq!(refused(client.admin().update_subscription(failover).await), Reason::InvalidRequest);
    let unknown = SubscriptionSettings { r#type: 99, ..SubscriptionSettings::default() };
    assert_eq!(
        refused(client.admin().update_subscription(update(unknown)).await),
        Reason::InvalidRequest
    );
    let once = retrying(SubscriptionType::Unspecified, 1);
    let updated = client.admin().update_subscription(update(once)).await.expect("updated");
    let kept = updated.into_inner().settings.expect("shown").r#type;
    assert_eq!(kept, i32::from(SubscriptionType::Shared));
    // It is in force for what is delivered already.
    client.producer(TOPIC).await.publish(1, records(&["a"])).await;
    let got = delivery(&mut consumer).await;
    settle(&mut consumer, release(&got, true, None)).await.expect("released");
    dead_letters(&client, 1).await;
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_and_harms_nobody() {
    let (_cluster, client) = started().await;
    let mut consumer = consumer(&client, "one", &settings(SubscriptionType::Shared)).await;
    publish(&client, 1, 4).await;
    let got = delivery(&mut consumer).await;
    let long = Reject { ranges: one(0), handle: got.handle.clone(), reason: "x".repeat(257) };
    assert_eq!(settle(&mut consumer, Verb::Reject(long)).await, Err("INVALID_REQUEST".into()));
    let far = Release {
        ranges: one(0),
        handle: got.handle.clone(),
        delay_ms: Some(u64::MAX),
        counts: true,
    };
    assert_eq!(settle(&mut consumer, Verb::Release(far)).await, Err("INVALID_REQUEST".into()));
    let up_to = geminga_proto::v1::AcceptUpTo { offset: 3, handle: got.handle.clone() };
    assert_eq!(
        settle(&mut consumer, Verb::AcceptUpTo(up_to)).await,
        Err("INVALID_REQUEST".into()),
        "shared types settle by ranges"
    );
    let beyond = Release {
        ranges: vec![OffsetRange { first: 0, last: 9 }],
        handle: got.handle.clone(),
        delay_ms: None,
        counts: false,
    };
    assert_eq!(settle(&mut consumer, Verb::Release(beyond)).await, Err("INVALID_HANDLE".into()));
    let mut forged = got.handle.to_vec();
    forged[27] ^= 1; // another attempt
    let forged = Accept { ranges: one(0), handle: forged.into() };
    assert_eq!(settle(&mut consumer, Verb::Accept(forged)).await, Err("INVALID_HANDLE".into()));
    let claims = vec![Claim { handle: vec![1; 44].into(), ranges: one(0) }];
    let with_forged = OpenConsume { claims, ..open("two", &settings(SubscriptionType::Shared)) };
    assert_eq!(refused(client.open_consumer(with_forged).await), Reason::InvalidHandle);
    let claims = vec![Claim { handle: got.handle.clone(), ranges: one(0) }; 1_001];
    let with_many = OpenConsume { claims, ..open("two", &settings(SubscriptionType::Shared)) };
    assert_eq!(refused(client.open_consumer(with_many).await), Reason::InvalidRequest);
    let pull = PullRequest {
        topic: TOPIC.into(),
        subscription: "s".into(),
        wait_ms: u64::MAX,
        ..PullRequest::default()
    };
    assert_eq!(refused(client.subscriber().pull(pull).await), Reason::InvalidRequest);
    assert_eq!(settle(&mut consumer, accept(&got)).await, Ok(4), "nothing of it counted");
}

/// Another broker changed them, and its word to this one was lost.
#[tokio::test]
async fn changed_settings_reach_a_dispatcher_that_nobody_tells() {
    let (cluster, client) = started().await;
    let mut consumer = consumer(&client, "one", &retrying(SubscriptionType::Shared, 9)).await;
    publish(&client, 1, 1).await;
    let got = delivery(&mut consumer).await;
    let name = SubscriptionName::parse("s").expect("valid");
    let key = keys::subscription(cluster.topic_id(TOPIC).await, &name);
    let (_, found) = cluster.store.get(&key).await.expect("the store answers");
    let mut value = SubscriptionValue::decode(found.expect("there").value).expect("sound");
    value.settings =
        Some(SubscriptionSettings { lease_ms: 7_000, ..retrying(SubscriptionType::Shared, 1) });
    let put = Op::put(key, value.encode_to_vec());
    cluster.store.txn(Txn::new().then(put)).await.expect("written");
    eventually("they are in force", async || {
        explain(&client).await.settings.is_some_and(|settings| settings.lease_ms == 7_000)
    })
    .await;
    settle(&mut consumer, release(&got, true, None)).await.expect("released");
    dead_letters(&client, 1).await;
}
