//! Objects of topics that are gone are found and removed, those of others stay.

use std::{sync::Arc, time::Duration};

use geminga_managed_ledger::ColdStorage;
use geminga_proto::admin::v1::DeleteTopicRequest;
use geminga_runtime::clock::{Clock, ManualClock, SystemClock};

use crate::{
    harness::{Cluster, eventually},
    tier::{TOPIC, fill, offload, small, verify},
};

#[tokio::test]
async fn objects_of_a_deleted_topic_go_after_a_day_and_those_of_others_stay() {
    let cold = ColdStorage::in_memory();
    let mut cluster = Cluster::start_as(small(&cold)).await;
    let client = cluster.client().await;
    let gone = "public/default/gone";
    for topic in [TOPIC, gone] {
        client.topic(topic, 1).await;
        fill(&mut client.producer(topic).await).await;
        offload(&client, topic).await.expect("offloaded");
    }
    let (kept, gone_id) = (cluster.topic_id(TOPIC).await, cluster.topic_id(gone).await);
    client.admin().delete_topic(DeleteTopicRequest { name: gone.into() }).await.expect("deleted");
    let mut found = cluster.topics_with_objects(&cold).await;
    found.sort_unstable();
    assert_eq!(found, [kept, gone_id], "no younger than a day");
    // Whoever deleted it dies; another broker comes two days later.
    cluster.kill().await;
    let two_days = Duration::from_secs(2 * 24 * 3600);
    cluster
        .start_broker(|settings| {
            small(&cold)(settings);
            settings.clock = Arc::new(ManualClock::new(SystemClock.now().plus(two_days)));
            settings.broker.sweep_interval = Duration::from_millis(100);
        })
        .await;
    eventually("the janitor comes by", async || cluster.topics_with_objects(&cold).await == [kept])
        .await;
    let steps = verify(&cluster.client().await, TOPIC).await.expect("verified");
    assert!(!steps.is_empty() && steps.iter().all(|step| step.problem.is_empty()), "{steps:?}");
}
