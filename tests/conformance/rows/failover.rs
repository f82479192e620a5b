//! Failover subscriptions: one active consumer a segment; the consumers share the segments out.

use std::sync::Arc;

use geminga_proto::v1::SubscriptionType;

use super::{offsets, topic};
use crate::{
    client::{Client, numbered, settings},
    consumer::{Consumer, open},
    world::World,
};

fn failover() -> geminga_proto::v1::SubscriptionSettings {
    settings(SubscriptionType::Failover)
}

fn is_active(consumer: &Consumer) -> bool {
    consumer.assigned.is_some_and(|assigned| assigned.active)
}

pub(crate) async fn takes_over(world: Arc<World>) {
    let topic = topic("failover-takes-over");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "group", failover()).await;
    let mut a = client.consume(open(&topic, "group", "a"), 100).await;
    a.until("the only one is active", is_active).await;
    let mut b = client.consume(open(&topic, "group", "b"), 100).await;
    // Which of the two is active is a matter of the names: sort them.
    for consumer in [&mut a, &mut b] {
        consumer.in_step().await;
    }
    let a_leads = is_active(&a);
    assert_ne!(a_leads, is_active(&b), "exactly one is active");
    let (mut active, mut standby) = if a_leads { (a, b) } else { (b, a) };
    client.publish(&topic, 0, &numbered(6)).await;
    let got = active.take(6).await;
    standby.gets_nothing("it stands by").await;
    for got in &got[..3] {
        active.accept(got).await;
    }
    let before = standby.assigned.map_or(0, |assigned| assigned.epoch);
    active.leave().await;
    standby.until("it takes over", is_active).await;
    assert!(standby.assigned.expect("told").epoch > before, "each change has a new epoch");
    assert_eq!(offsets(&standby.take(3).await), [3, 4, 5], "what was not settled, in order");
}

/// A consumer's streams, one a segment.
struct Member {
    streams: Vec<Consumer>,
}

impl Member {
    async fn join(client: &Client, topic: &str, name: &str, segments: u32) -> Self {
        let mut streams = Vec::new();
        for segment in 0..segments {
            let open = geminga_proto::v1::OpenConsume { segment, ..open(topic, "group", name) };
            streams.push(client.consume(open, 100).await);
        }
        Self { streams }
    }

    /// The segments that it is active on, as far as it was told.
    async fn active(&mut self) -> Vec<usize> {
        let mut active = Vec::new();
        for (segment, stream) in self.streams.iter_mut().enumerate() {
            stream.in_step().await;
            if is_active(stream) {
                active.push(segment);
            }
        }
        active
    }

    async fn leave(self) {
        for stream in self.streams {
            stream.leave().await;
        }
    }
}

/// Which member is active on each segment, once every segment has exactly one.
async fn assignment(members: &mut [Member], segments: usize) -> Vec<usize> {
    let deadline = tokio::time::Instant::now() + crate::harness::PATIENCE;
    loop {
        let mut owners = vec![Vec::new(); segments];
        for (number, member) in members.iter_mut().enumerate() {
            for segment in member.active().await {
                owners[segment].push(number);
            }
        }
        assert!(owners.iter().all(|owners| owners.len() <= 1), "two are active: {owners:?}");
        if owners.iter().all(|owners| owners.len() == 1) {
            return owners.into_iter().map(|owners| owners[0]).collect();
        }
        assert!(tokio::time::Instant::now() < deadline, "a segment has nobody: {owners:?}");
    }
}

/// Waits until each member is active on a fair share.
async fn balanced(members: &mut [Member], segments: usize) -> Vec<usize> {
    let (least, most) = (segments / members.len(), segments.div_ceil(members.len()));
    let deadline = tokio::time::Instant::now() + crate::harness::PATIENCE;
    loop {
        let owners = assignment(members, segments).await;
        let shares: Vec<usize> = (0..members.len())
            .map(|member| owners.iter().filter(|owner| **owner == member).count())
            .collect();
        if shares.iter().all(|share| (least..=most).contains(share)) {
            return owners;
        }
        assert!(tokio::time::Instant::now() < deadline, "not balanced: {owners:?}");
    }
}

pub(crate) async fn shares_the_segments_out(world: Arc<World>) {
    const SEGMENTS: usize = 6;
    let topic = topic("failover-shares");
    let client = world.client().await;
    client.topic(&topic, SEGMENTS as u32).await;
    client.subscription(&topic, "group", failover()).await;
    let mut members = vec![Member::join(&client, &topic, "m-0", SEGMENTS as u32).await];
    let alone = balanced(&mut members, SEGMENTS).await;
    assert_eq!(alone, vec![0; SEGMENTS]);
    members.push(Member::join(&client, &topic, "m-1", SEGMENTS as u32).await);
    let two = balanced(&mut members, SEGMENTS).await;
    members.push(Member::join(&client, &topic, "m-2", SEGMENTS as u32).await);
    let three = balanced(&mut members, SEGMENTS).await;
    let moved = two.iter().zip(&three).filter(|(before, after)| before != after).count();
    assert_eq!(moved, 2, "the third one's share and nothing else: {two:?}, then {three:?}");
    members.remove(1).leave().await;
    let left = balanced(&mut members, SEGMENTS).await;
    // Of the two that are left, 0 is as before and 2 is now number 1.
    let kept = three.iter().zip(&left).filter(|(before, _)| **before != 1);
    for (before, after) in kept {
        assert_eq!(usize::from(*before == 2), *after, "{three:?}, then {left:?}");
    }
}

pub(crate) async fn waits_for_what_is_held(world: Arc<World>) {
    let topic = topic("failover-held");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "group", failover()).await;
    // Of these names one precedes the other in every order that a server may choose from: whichever joins second and
    // becomes active is the case to look at. If the first one stays active there is nothing to wait for.
    client.publish(&topic, 0, &numbered(4)).await;
    let mut former = None;
    for name in ["m", "a", "z", "0", "zz"] {
        let mut joining = client.consume(open(&topic, "group", name), 100).await;
        let Some((mut active, held)): Option<(Consumer, Vec<crate::consumer::Got>)> = former.take()
        else {
            let held = joining.take(4).await;
            former = Some((joining, held));
            continue;
        };
        joining.gets_nothing("the other one holds everything").await;
        assert!(!is_active(&joining), "not before the former one has settled");
        for got in &held[..held.len() - 1] {
            active.accept(got).await;
        }
        client.publish(&topic, 0, &numbered(3)).await;
        active.accept(&held[held.len() - 1]).await;
        active.in_step().await;
        joining.in_step().await;
        if is_active(&active) && !is_active(&joining) {
            let held = active.take(3).await;
            joining.leave().await;
            former = Some((active, held));
        } else {
            joining.until("it is active", is_active).await;
            let mut next = active.within(std::time::Duration::from_millis(50)).await;
            assert!(next.is_empty(), "the former one gets nothing new: {next:?}");
            next.extend(joining.take(3).await);
            assert!(next.is_sorted_by_key(|got| got.offset));
            active.leave().await;
            former = Some((joining, next));
        }
    }
}
