//! Tiers through any broker, and policies that reach the segments wherever they are.

use std::{collections::BTreeSet, time::Duration};

use geminga_managed_ledger::ColdStorage;
use geminga_proto::{
    admin::v1::{
        OffloadTopicRequest, SegmentTier, SetPoliciesRequest, TierProgress, TierStatusRequest,
        VerifyTierRequest,
    },
    reason::Reason,
    v1::{
        AcceptUpTo, BacklogAction, OpenPublish, Policies, Route, Settle, SettleRequest,
        settle::Verb,
    },
};
use tokio::time::timeout;
use tonic::{Status, Streaming};

use crate::harness::{
    Client, Cluster, PATIENCE, Pair, Producer, Settings, eventually, open_consume, refused,
};

pub(crate) const TOPIC: &str = "public/default/t";

/// Small ledgers, over this cold storage.
pub(crate) fn small(cold: &ColdStorage) -> impl Fn(&mut Settings) + use<> {
    let cold = cold.clone();
    move |settings| {
        settings.broker.lease_ttl = Duration::from_secs(1);
        settings.managed.roll_bytes = 1_000;
        settings.managed.dedup_snapshot_bytes = 500;
        settings.cold = Some(cold.clone());
    }
}

async fn pair(cold: &ColdStorage) -> Pair {
    let cluster = Cluster::start_as(small(cold)).await;
    let (other, other_segments) = cluster.another_broker("broker-1", small(cold)).await;
    let pair = Pair { cluster, other, other_segments };
    pair.both_see_both().await;
    pair
}

/// A topic of one segment that belongs to `broker-1`.
async fn topic_of_other(client: &Client) -> String {
    for n in 0..32 {
        let topic = format!("public/default/one{n}");
        client.topic(&topic, 1).await;
        if client.placed(&topic).await == ["broker-1"] {
            return topic;
        }
    }
    panic!("broker-1 has no share");
}

async fn relayed_producer(client: &Client, topic: &str) -> Producer {
    let open = OpenPublish {
        topic: topic.into(),
        stream_number: 1,
        route: Route::Relay.into(),
        ..OpenPublish::default()
    };
    client.open_producer(open).await.expect("opened")
}

const FILLED: u64 = 12;

/// A few ledgers.
pub(crate) async fn fill(producer: &mut Producer) {
    for _ in 0..FILLED {
        producer.publish(1, vec![7; 400]).await;
    }
}

async fn status(client: &Client, topic: &str) -> Result<Vec<SegmentTier>, Status> {
    let request = TierStatusRequest { topic: topic.into() };
    client.admin().tier_status(request).await.map(|status| status.into_inner().segments)
}

async fn one(client: &Client, topic: &str) -> SegmentTier {
    status(client, topic).await.expect("told").pop().expect("it has a segment")
}

pub(crate) async fn all(mut steps: Streaming<TierProgress>) -> Result<Vec<TierProgress>, Status> {
    let mut all = Vec::new();
    while let Some(step) = timeout(PATIENCE, steps.message()).await.expect("in time")? {
        all.push(step);
    }
    Ok(all)
}

pub(crate) async fn offload(client: &Client, topic: &str) -> Result<Vec<TierProgress>, Status> {
    let request = OffloadTopicRequest { topic: topic.into(), roll: true };
    all(client.admin().offload_topic(request).await?.into_inner()).await
}

pub(crate) async fn verify(client: &Client, topic: &str) -> Result<Vec<TierProgress>, Status> {
    let request = VerifyTierRequest { topic: topic.into() };
    all(client.admin().verify_tier(request).await?.into_inner()).await
}

async fn set(client: &Client, scope: &str, policies: Policies, unset: &[&str]) {
    let unset = unset.iter().map(|name| (*name).into()).collect();
    let request = SetPoliciesRequest { scope: scope.into(), policies: Some(policies), unset };
    client.admin().set_policies(request).await.expect("set");
}

/// Offload and delete at once, trim nothing.
fn eager() -> Policies {
    Policies {
        offload_after_ms: Some(0),
        delete_lag_ms: Some(0),
        retention_ms: Some(3_600_000),
        ..Policies::default()
    }
}

async fn in_force(client: &Client, topic: &str, wanted: Option<Policies>) {
    eventually("the policy arrives", async || {
        let told = status(client, topic).await;
        told.is_ok_and(|told| told.iter().all(|segment| segment.in_force == wanted))
    })
    .await;
}

#[tokio::test]
async fn any_broker_tells_offloads_and_verifies_and_without_a_policy_an_offload_only_adds_a_copy() {
    let pair = pair(&ColdStorage::in_memory()).await;
    let client = pair.cluster.client().await;
    let topic = topic_of_other(&client).await;
    let mut producer = relayed_producer(&client, &topic).await;
    fill(&mut producer).await;
    let open =
        geminga_proto::v1::OpenConsume { route: Route::Relay.into(), ..open_consume(&topic, "s") };
    let mut consumer = client.open_consumer(open).await.expect("opened");
    consumer.credit(1 << 40, 1 << 40).await;
    consumer.deliveries(FILLED as usize).await;
    let verb = Verb::AcceptUpTo(AcceptUpTo { offset: FILLED - 1, handle: consumer.handle.clone() });
    let settle = Some(Settle { verb: Some(verb), ..Settle::default() });
    let request = SettleRequest {
        topic: topic.clone(),
        subscription: "s".into(),
        settle,
        ..SettleRequest::default()
    };
    client.subscriber().settle(request).await.expect("settled");
    let before = one(&client, &topic).await;
    assert!(before.ledgers >= 2, "{before:?}");
    assert_eq!((before.ledgers_uploading, before.bytes_objects, before.in_force), (0, 0, None));
    assert!(verify(&client, &topic).await.expect("verified").is_empty(), "nothing to verify");
    let steps = offload(&client, &topic).await.expect("offloaded");
    assert!(steps.iter().all(|step| step.problem.is_empty()), "{steps:?}");
    let after = one(&client, &topic).await;
    let walked: BTreeSet<u64> = steps.iter().map(|step| step.ledger).collect();
    assert_eq!(walked.len(), after.ledgers_uploaded as usize, "{after:?}");
    assert_eq!((after.first_offset, after.ledgers_object_only), (0, 0), "nothing went");
    assert!(after.bytes_objects > 0 && after.bytes_bookies >= FILLED * 400, "{after:?}");
    let steps = verify(&client, &topic).await.expect("verified");
    let last = steps.last().expect("there are objects");
    assert_eq!((last.bytes_done, last.bytes_total), (after.bytes_objects, after.bytes_objects));
    assert!(steps.iter().all(|step| step.problem.is_empty()), "{steps:?}");
    let elsewhere = Client::of(&pair.other).await;
    assert_eq!(one(&elsewhere, &topic).await, after, "the owner says the same");
    // Somebody decides: what is settled goes.
    set(&client, "", Policies { delete_lag_ms: Some(3_600_000), ..Policies::default() }, &[]).await;
    eventually("settled ledgers are trimmed", async || one(&client, &topic).await.first_offset > 0)
        .await;
    assert_eq!(refused(status(&client, "public/default/none").await), Reason::TopicNotFound);
}

#[tokio::test]
async fn a_policy_moves_ledgers_wherever_they_are_and_once_it_is_unset_nothing_moves() {
    let pair = pair(&ColdStorage::in_memory()).await;
    let client = pair.cluster.client().await;
    let topic = topic_of_other(&client).await;
    let mut producer = relayed_producer(&client, &topic).await;
    fill(&mut producer).await;
    set(&client, "public/default", eager(), &[]).await;
    eventually("ledgers are in cold storage alone", async || {
        one(&client, &topic).await.ledgers_object_only >= 2
    })
    .await;
    let open =
        geminga_proto::v1::OpenConsume { route: Route::Relay.into(), ..open_consume(&topic, "s") };
    let mut consumer = client.open_consumer(open).await.expect("opened");
    consumer.credit(1 << 40, 1 << 40).await;
    assert_eq!(consumer.deliveries(FILLED as usize).await, (0..FILLED).collect::<Vec<u64>>());
    let names = ["offload_after_ms", "delete_lag_ms", "retention_ms"];
    set(&client, "public/default", Policies::default(), &names).await;
    in_force(&client, &topic, None).await;
    eventually("what was under way has ended", async || {
        one(&client, &topic).await.ledgers_uploading == 0
    })
    .await;
    let before = one(&client, &topic).await;
    fill(&mut producer).await;
    let after = one(&client, &topic).await;
    assert!(after.ledgers >= before.ledgers + 2, "{after:?}");
    assert_eq!(
        (after.ledgers_uploading, after.ledgers_uploaded, after.ledgers_object_only),
        (0, before.ledgers_uploaded, before.ledgers_object_only)
    );
    assert_eq!(after.first_offset, 0);
}

#[tokio::test]
async fn the_next_owner_acts_by_the_same_policy() {
    let mut pair = pair(&ColdStorage::in_memory()).await;
    let client = Client::of(&pair.other).await;
    client.topic(TOPIC, 4).await;
    let retention = Policies { retention_ms: Some(5_000), ..Policies::default() };
    let wanted = Policies {
        delete_lag_ms: Some(4 * 3_600_000),
        backlog_action: Some(BacklogAction::Reject.into()),
        ..retention
    };
    set(&client, TOPIC, retention, &[]).await;
    in_force(&client, TOPIC, Some(wanted)).await;
    pair.cluster.kill().await;
    in_force(&client, TOPIC, Some(wanted)).await;
    let cluster =
        Policies { retention_bytes: Some(9), retention_ms: Some(1), ..Policies::default() };
    set(&client, "", cluster, &[]).await;
    in_force(&client, TOPIC, Some(Policies { retention_bytes: Some(9), ..wanted })).await;
}

#[tokio::test]
async fn an_offload_whose_owner_is_lost_ends_with_a_typed_refusal() {
    let pair = pair(&ColdStorage::in_memory()).await;
    let client = pair.cluster.client().await;
    let topic = topic_of_other(&client).await;
    relayed_producer(&client, &topic).await.publish(1, "x").await;
    eventually("no stream is left", async || pair.other.held().streams == 0).await;
    pair.cluster.cut_bookies_off(true); // the ledger is not closed, so the offload has no end
    let request = OffloadTopicRequest { topic: topic.clone(), roll: true };
    let steps = client.admin().offload_topic(request).await.expect("begun").into_inner();
    eventually("the owner is at it", async || pair.other.held().streams == 1).await;
    pair.other.kill();
    pair.other_segments.abort();
    assert_eq!(refused(all(steps).await), Reason::SegmentFenced);
    eventually("its place is free", async || pair.cluster.broker().held().streams == 0).await;
}
