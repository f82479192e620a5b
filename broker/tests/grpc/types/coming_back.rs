//! Consumers and owners that go and come back: claims, attempts, the exact lease table.

use std::time::Duration;

use geminga_proto::{
    reason::Reason,
    v1::{
        Accept, Claim, Delivery, HeldBy, OffsetRange, OpenConsume, Settle, SettleRequest,
        SubscriptionType, settle::Verb,
    },
};
use tokio::time::timeout;
use tonic::Status;

use super::{
    Doomed, TOPIC, come_back, consumer, delivery, explain, held, offsets, one, open, publish,
    release, reopened, settings, settle, started,
};
use crate::harness::{Client, Cluster, Consumer, PATIENCE, eventually, refused};

#[tokio::test]
async fn a_consumer_that_comes_back_goes_on_with_what_it_holds() {
    let (cluster, client) = started().await;
    for kind in [SubscriptionType::Shared, SubscriptionType::Exclusive] {
        let of_kind = settings(kind);
        let sub = format!("s-{}", kind.as_str_name());
        let named = |name: &str| OpenConsume { subscription: sub.clone(), ..open(name, &of_kind) };
        let doomed = Doomed::of(&cluster).await;
        let mut first = doomed.client.open_consumer(named("one")).await.expect("opened");
        first.credit(1 << 40, 1 << 40).await;
        publish(&client, 1, 4).await;
        let got = delivery(&mut first).await;
        let all = OffsetRange { first: got.deliver[0].first, last: got.deliver[0].last };
        drop(doomed);
        let kept = OffsetRange { first: all.first, last: all.last - 1 };
        let claim = Claim { handle: got.handle.clone(), ranges: vec![kept] };
        let (mut again, granted) = come_back(&client, named("one"), vec![claim]).await;
        assert_eq!(granted.len(), 1, "{kind:?}");
        assert_eq!(granted[0].ranges, [kept]);
        again.credit(1 << 40, 1 << 40).await;
        let rest = delivery(&mut again).await;
        assert_eq!(
            (offsets(&rest), rest.attempt),
            (vec![all.last], 1),
            "it lost nothing: {kind:?}"
        );
        let old = Accept { ranges: vec![kept], handle: got.handle };
        assert_eq!(settle(&mut again, Verb::Accept(old)).await, Err("INVALID_HANDLE".into()));
        let new = Accept { ranges: vec![kept], handle: granted[0].handle.clone() };
        settle(&mut again, Verb::Accept(new)).await.expect("under the new handle");
    }
}

#[tokio::test]
async fn after_kill_9_a_handle_of_the_owner_before_stands_for_what_it_was_given_for() {
    let mut cluster = Cluster::start_with(|config| config.lease_ttl = Duration::from_secs(1)).await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let shared = settings(SubscriptionType::Shared);
    let mut before = consumer(&client, "one", &shared).await;
    publish(&client, 1, 4).await;
    let got = delivery(&mut before).await;
    cluster.kill().await;
    cluster.start_broker(|settings| settings.broker.lease_ttl = Duration::from_secs(1)).await;
    let client = cluster.client().await;
    let part = OffsetRange { first: 0, last: 1 };
    let claim = Claim { handle: got.handle.clone(), ranges: vec![part] };
    let (mut after, granted) = come_back(&client, open("one", &shared), vec![claim]).await;
    assert_eq!(granted.iter().map(|claim| claim.ranges.clone()).collect::<Vec<_>>(), [vec![part]]);
    after.credit(1 << 40, 1 << 40).await;
    // And one that calls: the handle is presented by the settle itself.
    let verb = Verb::Accept(Accept { ranges: one(2), handle: got.handle.clone() });
    let request = SettleRequest {
        topic: TOPIC.into(),
        segment: 0,
        subscription: "s".into(),
        settle: Some(Settle { token: 1, verb: Some(verb) }),
    };
    let called = client.subscriber().settle(request).await;
    let rest = if called.is_ok() { vec![3] } else { vec![2, 3] };
    let new = Accept { ranges: vec![part], handle: granted[0].handle.clone() };
    settle(&mut after, Verb::Accept(new)).await.expect("as good as a new one");
    let mut again = Vec::new();
    while again.len() < rest.len() {
        let got = delivery(&mut after).await;
        assert_eq!(got.attempt, 1, "unchanged");
        again.extend(offsets(&got));
    }
    assert_eq!(again, rest);
}

/// What `segment 0` answers to a settle outside a stream.
async fn settle_by_call(client: &Client, verb: Verb) -> Result<u64, Status> {
    let request = SettleRequest {
        topic: TOPIC.into(),
        segment: 0,
        subscription: "s".into(),
        settle: Some(Settle { token: 1, verb: Some(verb) }),
    };
    let answer = client.subscriber().settle(request).await?.into_inner();
    Ok(answer.settled.expect("there").mark_delete_next)
}

#[tokio::test]
async fn a_clean_stop_leaves_the_exact_lease_table_and_its_handles_stand() {
    let mut cluster = Cluster::start().await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let shared = settings(SubscriptionType::Shared);
    let mut first = consumer(&client, "one", &shared).await;
    publish(&client, 1, 3).await;
    let got = delivery(&mut first).await;
    assert_eq!(offsets(&got), [0, 1, 2]);
    let broker = cluster.broker.take().expect("it runs");
    broker.shutdown(Duration::from_millis(300)).await;
    cluster.start_broker(|_| {}).await;
    let client = cluster.client().await;
    let mut other = reopened(&client, open("two", &shared)).await;
    eventually("they wait for the one that has them", async || {
        held(&explain(&client).await, HeldBy::Grace) == 3
    })
    .await;
    assert!(other.quiet().await);
    let verb = Verb::Accept(Accept { ranges: one(0), handle: got.handle.clone() });
    assert_eq!(settle_by_call(&client, verb).await.expect("its handle stands"), 1);
    let counted = Delivery { deliver: one(1), ..got.clone() };
    settle_by_call(&client, release(&counted, true, None)).await.expect("and for a release");
    let again = delivery(&mut other).await;
    assert_eq!((offsets(&again), again.attempt), (vec![1], 2));
    let last = delivery(&mut other).await;
    assert_eq!((offsets(&last), last.attempt), (vec![2], 1), "its attempt never ended");
    let late = Verb::Accept(Accept { ranges: one(2), handle: got.handle });
    assert_eq!(refused(settle_by_call(&client, late).await), Reason::InvalidHandle);
}

#[tokio::test]
async fn messages_of_a_lost_consumer_come_again_as_a_new_attempt_and_of_one_that_left_well_not() {
    let cluster =
        Cluster::start_with(|config| config.limits.consumer_grace = Duration::from_millis(300))
            .await;
    let client = cluster.client().await;
    client.topic(TOPIC, 1).await;
    let shared = settings(SubscriptionType::Shared);
    let doomed = Doomed::of(&cluster).await;
    let mut one = consumer(&doomed.client, "one", &shared).await;
    publish(&client, 1, 1).await;
    assert_eq!(delivery(&mut one).await.attempt, 1);
    let mut two = consumer(&client, "two", &shared).await;
    drop(doomed);
    let lost = delivery(&mut two).await;
    assert_eq!(lost.attempt, 2);
    let mut three = consumer(&client, "three", &shared).await;
    let Consumer { frames, mut replies, .. } = two;
    drop(frames); // half-close
    while timeout(PATIENCE, replies.message()).await.expect("in time").expect("well").is_some() {}
    assert_eq!(delivery(&mut three).await.attempt, 2, "given back, not failed");
}
