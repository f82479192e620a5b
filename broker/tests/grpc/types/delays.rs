//! Delivery at a time.

use std::collections::BTreeSet;

use geminga_proto::{
    admin::v1::{CancelDelayedRequest, ListDelayedRequest},
    reason::Reason,
    v1::{OffsetRange, SubscriptionType},
};

use super::{TOPIC, consumer, delivery, keyed, offsets, publish_batch, settings, started};
use crate::harness::{eventually, refused};

/// A batch whose messages are to be delivered so long after now.
fn delayed(after_ms: &[u64]) -> geminga_proto::v1::Batch {
    let now = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_millis() as u64;
    let mut batch = keyed(&vec![1; after_ms.len()]);
    let due = |after: &u64| if *after == 0 { 0 } else { now + after };
    batch.index.as_mut().expect("set").deliver_at_ms = after_ms.iter().map(due).collect();
    batch
}

#[tokio::test]
async fn delayed_messages_are_never_early_and_can_be_listed_and_cancelled() {
    let (cluster, client) = started().await;
    let mut consumer = consumer(&client, "one", &settings(SubscriptionType::Shared)).await;
    publish_batch(&client, delayed(&[3_600_000, 0, 400, 7_200_000])).await;
    assert_eq!(offsets(&delivery(&mut consumer).await), [1]);
    let list = ListDelayedRequest {
        topic: TOPIC.into(),
        subscription: "s".into(),
        page_size: 2,
        ..ListDelayedRequest::default()
    };
    let page = client.admin().list_delayed(list.clone()).await.expect("listed").into_inner();
    assert_eq!(
        page.messages.iter().map(|m| m.offset).collect::<Vec<_>>(),
        [2, 0],
        "next due first"
    );
    let next = ListDelayedRequest { page_token: page.next_page_token, ..list.clone() };
    let rest = client.admin().list_delayed(next).await.expect("listed").into_inner();
    assert_eq!(rest.messages.iter().map(|m| m.offset).collect::<Vec<_>>(), [3]);
    assert_eq!(rest.next_page_token, "");
    let due = delivery(&mut consumer).await;
    let now = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_millis() as u64;
    assert_eq!(offsets(&due), [2]);
    assert!(now >= page.messages[0].due_ms, "never early");
    let cancel = CancelDelayedRequest {
        topic: TOPIC.into(),
        subscription: "s".into(),
        segment: 0,
        ranges: vec![OffsetRange { first: 0, last: 2 }],
    };
    let cancelled = client.admin().cancel_delayed(cancel.clone()).await.expect("done");
    assert_eq!(cancelled.into_inner().cancelled, 1);
    let again = client.admin().cancel_delayed(cancel).await.expect("done");
    assert_eq!(again.into_inner().cancelled, 0);
    assert_eq!(cluster.subscription(TOPIC, "s").await.cursors[0].mark_delete_next, 1);
    let bad = ListDelayedRequest { page_token: "x".into(), ..list };
    assert_eq!(refused(client.admin().list_delayed(bad).await), Reason::InvalidRequest);
    drop(consumer);
    // One that no consumer has come to is known as well.
    publish_batch(&client, delayed(&[3_600_000])).await;
    eventually("both that are left are listed", async || {
        let all = ListDelayedRequest {
            topic: TOPIC.into(),
            subscription: "s".into(),
            ..ListDelayedRequest::default()
        };
        let all = client.admin().list_delayed(all).await.expect("listed").into_inner();
        all.messages.iter().map(|m| m.offset).collect::<BTreeSet<_>>() == BTreeSet::from([3, 4])
    })
    .await;
}
