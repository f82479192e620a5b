//! Never stuck without a named cause.

use std::sync::Arc;

use geminga_proto::v1::{ExplainRequest, HeldBy, SegmentExplained};
use geminga_runtime::clock::{Clock, SystemClock};

use super::{key_shared, lease, shared, topic};
use crate::{
    client::{Client, Mortal, Outgoing, numbered},
    consumer::open,
    harness::eventually,
    world::World,
};

async fn explain(client: &Client, topic: &str) -> SegmentExplained {
    let request =
        ExplainRequest { topic: topic.to_owned(), subscription: "work".into(), segment: Some(0) };
    let response = client.subscriber().explain(request).await.expect("explained").into_inner();
    let segment = response.segments.into_iter().next().expect("the segment asked for");
    assert!(!segment.broker.is_empty(), "it is served");
    segment
}

/// Waits for this picture: causes, with the number of messages of each. The counts must always add up to the backlog.
async fn shows(client: &Client, topic: &str, wanted: &[(HeldBy, u64)]) -> SegmentExplained {
    let mut last = None;
    let found = tokio::time::timeout(std::time::Duration::from_secs(15), async {
        eventually("the picture", async || {
            let explained = explain(client, topic).await;
            let sum: u64 = explained.held.iter().map(|held| held.messages).sum();
            let mut held: Vec<(HeldBy, u64)> =
                explained.held.iter().map(|held| (held.by(), held.messages)).collect();
            held.sort_unstable();
            last = Some((sum, explained.clone()));
            (held == wanted).then_some(explained)
        })
        .await
    })
    .await;
    let Ok(found) = found else { panic!("wanted {wanted:?}, last seen {last:?}") };
    let backlog = client.describe(topic, "work").await.cursors[0].backlog_messages;
    let sum: u64 = found.held.iter().map(|held| held.messages).sum();
    assert_eq!(sum, backlog, "the counts add up: {found:?}");
    if sum > 0 && wanted.iter().all(|(by, _)| *by != HeldBy::Nothing) {
        assert!(!found.summary.is_empty(), "it says in a sentence what to do: {found:?}");
    }
    found
}

pub(crate) async fn names_causes(world: Arc<World>) {
    let topic = topic("explain");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", lease(shared(), 60_000)).await;
    let now = SystemClock.now().0;
    let due = now + 3_600_000;
    let mut messages = numbered(10);
    for message in &mut messages[8..] {
        message.deliver_at_ms = due;
    }
    client.publish(&topic, 0, &messages).await;
    // What nobody has come to yet is not read: it is all one.
    let nobody = shows(&client, &topic, &[(HeldBy::NoConsumer, 10)]).await;
    assert_eq!((nobody.mark_delete_next, nobody.next_offset), (0, 10));

    let process = Mortal::start(&world).await;
    let mut a = process.client.consume(open(&topic, "work", "a"), 0).await;
    let starved = shows(&client, &topic, &[(HeldBy::NoCredit, 10)]).await;
    assert_eq!(starved.consumers.len(), 1);
    assert_eq!((starved.consumers[0].name.as_str(), starved.consumers[0].connected), ("a", true));

    a.grant(3).await;
    let mut got = a.take(3).await;
    // What was read with the first ones is known to wait for a time.
    let leased = [(HeldBy::NoCredit, 5), (HeldBy::Lease, 3), (HeldBy::Delay, 2)];
    let picture = shows(&client, &topic, &leased).await;
    let held = picture.held.iter().find(|held| held.by() == HeldBy::Lease).expect("there");
    assert_eq!((held.consumer.as_str(), held.first_offset), ("a", 0));
    assert!(held.until_ms > now && held.until_ms < now + 120_000, "leased until when: {held:?}");
    assert_eq!(picture.consumers[0].held_messages, 3);

    a.grant(100).await;
    got.extend(a.take(5).await);
    let all = [(HeldBy::Lease, 8), (HeldBy::Delay, 2)];
    let picture = shows(&client, &topic, &all).await;
    let delayed = picture.held.iter().find(|held| held.by() == HeldBy::Delay).expect("there");
    assert_eq!((delayed.first_offset, delayed.until_ms), (8, due));

    a.release(&got[0], Some(3_600_000), true).await;
    a.accept(&got[1]).await;
    let mixed = [(HeldBy::Lease, 6), (HeldBy::Delay, 3)];
    shows(&client, &topic, &mixed).await;
    // Its connection is gone: it may come back for a while.
    drop(process);
    let lost = eventually("its messages wait for it", async || {
        let explained = explain(&client, &topic).await;
        let grace = explained.held.iter().find(|held| held.by() == HeldBy::Grace)?.clone();
        (grace.messages == 6).then_some((grace, explained))
    })
    .await;
    assert_eq!(lost.0.first_offset, 2);
    assert_eq!(lost.1.held.iter().map(|held| held.messages).sum::<u64>(), 9, "{lost:?}");
}

pub(crate) async fn names_the_holder_of_a_key(world: Arc<World>) {
    let topic = topic("explain-key");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", lease(key_shared(), 60_000)).await;
    let mut a = client.consume(open(&topic, "work", "a"), 1).await;
    let same = |number| Outgoing::new(format!("{number}")).key("k");
    client.publish(&topic, 0, &[same(1)]).await;
    let held = a.next().await;
    client.publish(&topic, 0, &[same(2), same(3)]).await;
    // The key's consumer has no credit; another one with credit does not get them.
    let mut b = client.consume(open(&topic, "work", "b"), 100).await;
    b.gets_nothing("its key is with a").await;
    let explained = eventually("the cause is named", async || {
        let explained = explain(&client, &topic).await;
        let by = |held: &geminga_proto::v1::Held| {
            matches!(held.by(), HeldBy::Key | HeldBy::NoCredit) && held.messages == 2
        };
        explained.held.iter().any(by).then_some(explained)
    })
    .await;
    let waiting = explained.held.iter().find(|held| held.messages == 2).expect("there");
    assert_eq!((waiting.first_offset, waiting.consumer.as_str()), (1, "a"), "{explained:?}");
    a.accept(&held).await;
}
