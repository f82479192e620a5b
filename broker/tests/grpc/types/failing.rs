//! What fails too often, or is rejected.

use std::time::Duration;

use geminga_proto::v1::{Delivery, Record, Reject, SubscriptionType, settle::Verb};

use super::{
    TOPIC, consumer, dead_letters, delivery, offsets, one, open, records, release, reopened,
    retrying, settle, started,
};
use crate::harness::{Cluster, eventually};

#[tokio::test]
async fn what_fails_too_often_or_is_rejected_goes_to_the_dead_letter_topic_once() {
    let (cluster, client) = started().await;
    let twice = retrying(SubscriptionType::Shared, 2);
    let mut consumer = consumer(&client, "one", &twice).await;
    client.producer(TOPIC).await.publish(2, records(&["poison", "fine"])).await;
    let first = delivery(&mut consumer).await;
    let verb = Verb::Reject(Reject {
        ranges: one(1),
        handle: first.handle.clone(),
        reason: "not mine".into(),
    });
    settle(&mut consumer, verb).await.expect("rejected");
    let only_0 = Delivery { deliver: one(0), ..first };
    settle(&mut consumer, release(&only_0, true, None)).await.expect("released");
    let second = delivery(&mut consumer).await;
    assert_eq!((offsets(&second), second.attempt), (vec![0], 2));
    settle(&mut consumer, release(&second, true, None)).await.expect("released");
    let dead = dead_letters(&client, 2).await;
    let header =
        |record: &Record, name: &str| record.headers.get(name).cloned().unwrap_or_default();
    let (fine, poison) = (&dead[0], &dead[1]);
    assert_eq!((&fine.value[..], &poison.value[..]), (&b"fine"[..], &b"poison"[..]));
    assert_eq!((fine.key.as_deref(), fine.event_time_ms), (Some(&b"k"[..]), Some(5)));
    assert_eq!(header(fine, "mine"), "kept");
    assert_eq!(header(fine, "geminga-reason"), "not mine");
    assert_eq!(header(fine, "geminga-origin-topic"), TOPIC);
    assert_eq!(header(fine, "geminga-origin-offset"), "1");
    assert_eq!(header(fine, "geminga-origin-segment"), "0");
    assert_eq!(header(fine, "geminga-subscription"), "s");
    assert_eq!(
        (header(fine, "geminga-attempts"), header(poison, "geminga-attempts")),
        ("1".into(), "2".into())
    );
    eventually("both are settled", async || {
        let cursor = &cluster.subscription(TOPIC, "s").await.cursors[0];
        (cursor.mark_delete_next, cursor.dead_letters) == (2, 2)
    })
    .await;
    assert!(consumer.quiet().await);
}

#[tokio::test]
async fn attempts_and_dead_letters_survive_kill_9_of_the_owner() {
    let mut cluster = Cluster::start_with(|config| config.lease_ttl = Duration::from_secs(1)).await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let thrice = retrying(SubscriptionType::Shared, 3);
    let mut before = consumer(&client, "one", &thrice).await;
    client.producer(TOPIC).await.publish(1, records(&["a"])).await;
    for attempt in 1..=2 {
        let got = delivery(&mut before).await;
        assert_eq!(got.attempt, attempt);
        settle(&mut before, release(&got, true, None)).await.expect("released");
    }
    assert_eq!(delivery(&mut before).await.attempt, 3, "delivered, and not settled");
    cluster.kill().await;
    cluster.start_broker(|settings| settings.broker.lease_ttl = Duration::from_secs(1)).await;
    let client = cluster.client().await;
    let mut after = reopened(&client, open("two", &thrice)).await;
    let again = delivery(&mut after).await;
    assert_eq!(again.attempt, 3, "a crash never raises an attempt (L4)");
    settle(&mut after, release(&again, true, None)).await.expect("released");
    let dead = dead_letters(&client, 1).await;
    assert_eq!(dead[0].headers.get("geminga-attempts").map(String::as_str), Some("3"));
}
