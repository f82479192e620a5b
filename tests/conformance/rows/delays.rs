//! Deliver-at: not before its time, and not skipped.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use geminga_proto::{
    admin::v1::{CancelDelayedRequest, ListDelayedRequest},
    v1::OffsetRange,
};
use geminga_runtime::clock::{Clock, SystemClock};

use super::{offsets, shared, topic};
use crate::{
    client::{Client, Outgoing, settings},
    consumer::open,
    world::World,
};

fn now_ms() -> u64 {
    SystemClock.now().0
}

/// Publishes so many messages, due within `spread` after `from`, not in order of time; when each is due.
async fn publish(
    client: &Client,
    topic: &str,
    count: u64,
    from: u64,
    spread: u64,
) -> BTreeMap<u64, u64> {
    let due = |number: u64| from + number.wrapping_mul(7_919) % spread;
    let messages: Vec<Outgoing> = (0..count)
        .map(|number| Outgoing {
            deliver_at_ms: due(number),
            ..Outgoing::new(format!("{}", due(number)))
        })
        .collect();
    let mut dues = BTreeMap::new();
    for (number, message) in (0..).zip(messages.chunks(1)) {
        dues.insert(client.publish(topic, 0, message).await, due(number));
    }
    dues
}

pub(crate) async fn none_early_none_skipped(world: Arc<World>) {
    let topic = topic("deliver-at");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    let mut a = client.consume(open(&topic, "work", "a"), 1_000).await;
    let mut due = publish(&client, &topic, 40, now_ms() + 1_500, 1_500).await;
    let at_once = client.publish(&topic, 0, &[Outgoing::new("now")]).await;
    assert_eq!(a.next().await.offset, at_once, "what is not delayed is not held up");
    let mut last = 0;
    while !due.is_empty() {
        let got = a.next().await;
        let at = due.remove(&got.offset).expect("each comes once");
        assert!(now_ms() >= at, "{} comes {} ms early", got.offset, at.saturating_sub(now_ms()));
        // Those due within one turn of the timer may come in any order.
        assert!(at + 250 >= last, "{} is due at {at}, after one due at {last}", got.offset);
        last = last.max(at);
        assert_eq!(got.attempt, 1);
        a.accept(&got).await;
    }
    a.gets_nothing("each comes once").await;
}

pub(crate) async fn exclusive_keeps_order(world: Arc<World>) {
    let topic = topic("deliver-at-exclusive");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "one", settings(Default::default())).await;
    publish(&client, &topic, 5, now_ms() + 600_000, 600_000).await;
    let mut a = client.consume(open(&topic, "one", "a"), 1_000).await;
    assert_eq!(offsets(&a.take(5).await), [0, 1, 2, 3, 4]);
}

pub(crate) async fn survive_kills(world: Arc<World>) {
    let topic = topic("deliver-at-kill");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    let mut a = client.consume(open(&topic, "work", "a"), 1_000).await;
    let mut due = publish(&client, &topic, 30, now_ms() + 4_000, 3_000).await;
    // One with a delay of a release, beside those with a time of their own.
    let first = client.publish(&topic, 0, &[Outgoing::new("now")]).await;
    let got = a.next().await;
    assert_eq!(got.offset, first);
    a.release(&got, Some(5_000), true).await;
    due.insert(first, now_ms() + 5_000 - 1_000);
    world.kill_owner(&topic).await;
    let client = world.client().await;
    let mut b = client.consume(open(&topic, "work", "b"), 1_000).await;
    while !due.is_empty() {
        let got = b.next().await;
        let at = due.remove(&got.offset).expect("each comes once");
        assert!(now_ms() >= at, "{} comes {} ms early", got.offset, at.saturating_sub(now_ms()));
        assert_eq!(got.attempt, if got.offset == first { 2 } else { 1 });
        b.accept(&got).await;
    }
    assert_eq!(b.within(Duration::from_millis(200)).await.len(), 0, "each comes once");
}

pub(crate) async fn listed_and_cancelled(world: Arc<World>) {
    let topic = topic("cancel-delayed");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    let mut a = client.consume(open(&topic, "work", "a"), 1_000).await;
    let due = publish(&client, &topic, 6, now_ms() + 3_600_000, 3_600_000).await;
    let list = |page_token: String, page_size| ListDelayedRequest {
        topic: topic.clone(),
        subscription: "work".into(),
        page_size,
        page_token,
        ..ListDelayedRequest::default()
    };
    let listed = crate::harness::eventually("all six are listed", async || {
        let page = client.admin().list_delayed(list(String::new(), 0)).await;
        let page = page.expect("listed").into_inner();
        (page.messages.len() == 6).then_some(page.messages)
    })
    .await;
    assert!(listed.is_sorted_by_key(|message| message.due_ms), "the next due first: {listed:?}");
    for message in &listed {
        assert_eq!((due[&message.offset], message.attempt), (message.due_ms, 1));
    }
    let mut paged = Vec::new();
    let mut token = String::new();
    loop {
        let page = client.admin().list_delayed(list(token, 4)).await.expect("listed").into_inner();
        assert!(page.messages.len() <= 4);
        paged.extend(page.messages);
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(paged, listed, "page by page it is the same");
    let cancel = CancelDelayedRequest {
        topic: topic.clone(),
        subscription: "work".into(),
        segment: 0,
        ranges: vec![OffsetRange { first: 0, last: 3 }],
    };
    let cancelled = client.admin().cancel_delayed(cancel.clone()).await.expect("cancelled");
    assert_eq!(cancelled.into_inner().cancelled, 4);
    let again = client.admin().cancel_delayed(cancel).await.expect("cancelled");
    assert_eq!(again.into_inner().cancelled, 0, "they are gone");
    let left = client.admin().list_delayed(list(String::new(), 0)).await.expect("listed");
    let mut left: Vec<u64> = left.into_inner().messages.iter().map(|m| m.offset).collect();
    left.sort_unstable();
    assert_eq!(left, [4, 5]);
    assert_eq!(client.describe(&topic, "work").await.cursors[0].mark_delete_next, 4);
    a.gets_nothing("none is due").await;
}
