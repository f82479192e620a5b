//! What will never be done goes to the dead-letter topic, once.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use geminga_proto::v1::{OpenConsume, Reject, RetryPolicy, SubscriptionStart, settle::Verb};

use super::{retry, shared, topic};
use crate::{
    client::{Client, Outgoing, numbered},
    consumer::{Consumer, Got, open, range},
    world::World,
};

/// A consumer of a dead-letter topic from its beginning; the topic is there once the first message is.
async fn dead_letters(client: &Client, topic: &str) -> Consumer {
    let open = OpenConsume {
        create_at: Some(SubscriptionStart::Earliest.into()),
        ..open(topic, "look", "look")
    };
    crate::harness::eventually("the dead-letter topic is there", async || {
        let mut consumer = client.try_consume(open.clone()).await.ok()?;
        consumer.grant(10_000).await;
        Some(consumer)
    })
    .await
}

fn check(got: &Got, topic: &str, subscription: &str, offset: u64, attempts: u32, reason: &str) {
    let of = |name: &str| got.headers.get(name).map(String::as_str);
    assert_eq!(of("geminga-origin-topic"), Some(topic));
    assert_eq!(of("geminga-origin-segment"), Some("0"));
    assert_eq!(of("geminga-origin-offset"), Some(offset.to_string().as_str()));
    assert_eq!(of("geminga-subscription"), Some(subscription));
    assert_eq!(of("geminga-attempts"), Some(attempts.to_string().as_str()));
    assert!(of("geminga-reason").is_some_and(|text| text.contains(reason)), "{:?}", got.headers);
    let published = of("geminga-origin-publish-time-ms").and_then(|text| text.parse::<u64>().ok());
    assert!(published.is_some_and(|time| time > 0), "{:?}", got.headers);
}

pub(crate) async fn reject_goes_there_with_its_origin(world: Arc<World>) {
    let topic = topic("reject");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    let sent = Outgoing {
        headers: vec![("colour".into(), "green".into())],
        event_time_ms: Some(123),
        ..Outgoing::new("bad").key("k")
    };
    client.publish(&topic, 0, &[Outgoing::new("good"), sent]).await;
    let mut a = client.consume(open(&topic, "work", "a"), 100).await;
    for got in a.take(2).await {
        if got.text() == "good" {
            a.accept(&got).await;
        } else {
            a.reject(&got, "no such customer").await;
        }
    }
    let mut dead = dead_letters(&client, &format!("{topic}~work~dlq")).await;
    let copy = dead.next().await;
    check(&copy, &topic, "work", 1, 1, "no such customer");
    assert_eq!((copy.text().as_str(), copy.key.as_deref()), ("bad", Some(&b"k"[..])));
    assert_eq!(copy.headers.get("colour").map(String::as_str), Some("green"));
    assert_eq!(copy.event_time_ms, Some(123));
    a.gets_nothing("it is settled").await;
    crate::harness::eventually("mark-delete passes the dead letter", async || {
        (client.describe(&topic, "work").await.cursors[0].mark_delete_next == 2).then_some(())
    })
    .await;
    assert_eq!(client.describe(&topic, "work").await.cursors[0].dead_letters, 1);
}

pub(crate) async fn at_the_maximum_exactly(world: Arc<World>) {
    let (topic, buried) = (topic("maximum"), topic("maximum-buried"));
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.topic(&buried, 1).await;
    let policy = RetryPolicy {
        attempts_max: 3,
        dead_letter_topic: buried.clone(),
        ..RetryPolicy::default()
    };
    client.subscription(&topic, "work", retry(shared(), policy)).await;
    client.publish(&topic, 0, &numbered(5)).await;
    let mut a = client.consume(open(&topic, "work", "a"), 1_000).await;
    let mut deliveries: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
    // Offset 4 is accepted at its last attempt.
    for _ in 0..15 {
        let got = a.next().await;
        deliveries.entry(got.offset).or_default().push(got.attempt);
        if got.offset == 4 && got.attempt == 3 {
            a.accept(&got).await;
        } else {
            a.release(&got, Some(0), true).await;
        }
    }
    assert!(deliveries.values().all(|attempts| attempts == &[1, 2, 3]), "{deliveries:?}");
    a.gets_nothing("no fourth attempt").await;
    let mut dead = dead_letters(&client, &buried).await;
    let mut copies = dead.take(4).await;
    copies.sort_by_key(Got::text);
    for (offset, copy) in (0..).zip(&copies) {
        assert_eq!(copy.text(), format!("m-{offset}"));
        check(copy, &topic, "work", offset, 3, "");
    }
    dead.gets_nothing("the accepted one is not there").await;
}

pub(crate) async fn one_copy_through_kills(world: Arc<World>) {
    const MESSAGES: u64 = 60;
    let topic = topic("buried-once");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    client.publish(&topic, 0, &numbered(MESSAGES as usize)).await;
    let settled = async || {
        let cursor = world.client().await.describe(&topic, "work").await.cursors[0].clone();
        cursor.mark_delete_next == MESSAGES
    };
    let mut kills = 0;
    while !settled().await {
        let client = world.client().await;
        let mut a = client.consume(open(&topic, "work", "a"), 10).await;
        // Ten are asked for at once, and the owner is killed while they are on their way, twice. Rejects without an answer
        // were durable, or the messages come again.
        loop {
            if a.inbox.is_empty() {
                let more = a.within(Duration::from_millis(200)).await;
                a.inbox.extend(more);
            }
            let Some(got) = a.inbox.pop_front() else {
                if a.ended.is_some() || settled().await {
                    break;
                }
                continue;
            };
            a.grant(1).await;
            let reject = Reject {
                ranges: range(got.offset),
                handle: got.handle.clone(),
                reason: "never".into(),
            };
            let token = a.ask(Verb::Reject(reject)).await;
            if kills < 2 && got.offset % 25 == 24 {
                kills += 1;
                world.kill_owner(&topic).await;
                break;
            }
            if a.answer(token).await.is_err() {
                break;
            }
        }
    }
    assert_eq!(kills, 2);
    let client = world.client().await;
    let mut dead = dead_letters(&client, &format!("{topic}~work~dlq")).await;
    let mut copies: Vec<String> =
        dead.take(MESSAGES as usize).await.iter().map(Got::text).collect();
    dead.gets_nothing("one copy of each").await;
    copies.sort_unstable();
    let mut wanted: Vec<String> = (0..MESSAGES).map(|number| format!("m-{number}")).collect();
    wanted.sort_unstable();
    assert_eq!(copies, wanted);
}
