//! Owners, bookies and etcd that die, freeze, or are cut off.

use std::time::Duration;

use rustix::process::Signal;
use tokio::time::sleep;

use crate::harness::{BookieSpec, Cluster, ClusterSpec, Load, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_owner_is_replaced_and_nothing_acknowledged_is_lost() {
    let mut cluster = Cluster::start(ClusterSpec::default()).await;
    let load = Load::start(&cluster, "orders", 1).await;
    let owner = cluster.owner(load.topic()).await;
    cluster.kill(&owner);
    load.goes_on("another broker serves the topic").await;
    assert_ne!(cluster.owner(load.topic()).await, owner);
    cluster.start_member(&owner);
    cluster.ready(&owner).await;
    load.goes_on("the killed broker is back").await;
    assert!(load.finish(&cluster).await > 0);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: cargo cluster"]
async fn a_frozen_owner_that_wakes_after_its_lease_does_no_harm() {
    let mut cluster = Cluster::start(ClusterSpec::default()).await;
    let load = Load::start(&cluster, "orders", 2).await;
    let owner = cluster.owner(load.topic()).await;
    for _ in 0..2 {
        cluster.process(&owner).signal(Signal::STOP);
        load.goes_on("another broker serves the topic").await;
        cluster.process(&owner).signal(Signal::CONT);
        load.goes_on("the frozen broker wakes").await;
    }
    load.finish(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: cargo cluster"]
async fn with_exactly_e_bookies_one_may_be_down_and_topics_are_created_and_served() {
    let mut cluster = Cluster::start(ClusterSpec::default()).await;
    let load = Load::start(&cluster, "orders", 1).await;
    cluster.kill("bookie-1");
    load.goes_on("one bookie is dead").await;
    let other = Load::start(&cluster, "created-meanwhile", 1).await;
    let owner = cluster.owner(load.topic()).await;
    cluster.kill(&owner);
    load.goes_on("a new owner loads the topic without the bookie").await;
    other.goes_on("both topics are served").await;
    cluster.start_member("bookie-1");
    cluster.ready("bookie-1").await;
    other.finish(&cluster).await;
    load.finish(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: cargo cluster"]
async fn two_of_five_bookies_die_in_sequence_and_what_they_held_is_copied() {
    let spec = ClusterSpec {
        bookies: vec![BookieSpec::default(); 5],
        settings: vec![("bookie-lost-after-ms", "5000".into()), ("bookie-scan-ms", "5000".into())],
        ..ClusterSpec::default()
    };
    let mut cluster = Cluster::start(spec).await;
    let load = Load::start(&cluster, "orders", 4).await;
    for bookie in ["bookie-1", "bookie-3"] {
        cluster.kill(bookie);
        load.goes_on("one more bookie is dead").await;
        fully_replicated(&cluster).await;
    }
    load.finish(&cluster).await;
}

/// Waits until nothing is listed as short of copies, and every incarnation that is gone was dealt with.
pub(crate) async fn fully_replicated(cluster: &Cluster) {
    sleep(Duration::from_secs(8)).await; // the time after which a bookie counts as lost, and a little
    eventually("nothing lacks copies", async || {
        let status = cluster.cli(&["cluster", "status"]).await;
        let zero = |name: &str| status[name].as_u64() == Some(0);
        (zero("ledgers_under_replicated") && zero("incarnations_lost")).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: cargo cluster"]
async fn a_killed_etcd_leader_costs_no_message() {
    let spec = ClusterSpec { etcd_members: 3, ..ClusterSpec::default() };
    let mut cluster = Cluster::start(spec).await;
    let load = Load::start(&cluster, "orders", 2).await;
    for _ in 0..2 {
        let leader = cluster.etcd.leader().await;
        cluster.etcd.kill_member(leader);
        load.goes_on("etcd elects a leader").await;
        cluster.etcd.start_member(leader);
        cluster.etcd.healthy().await;
    }
    let owner = cluster.owner(load.topic()).await;
    cluster.kill(&owner);
    load.goes_on("a takeover after the elections").await;
    load.finish(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: cargo cluster"]
async fn traffic_goes_on_while_all_of_etcd_is_stopped_for_a_minute() {
    let mut cluster = Cluster::start(ClusterSpec::default()).await;
    let load = Load::start(&cluster, "orders", 1).await;
    cluster.etcd.stop_all();
    for _ in 0..6 {
        sleep(Duration::from_secs(10)).await;
        load.goes_on("etcd is away").await;
    }
    let refused = cluster.cli_output(&["topic", "create", "not-now"]).await;
    assert_eq!(refused.status.code(), Some(5), "a new topic waits and says so");
    cluster.etcd.start_all().await;
    load.goes_on("etcd is back").await;
    eventually("a topic is created again", async || {
        cluster.cli_output(&["topic", "create", "now"]).await.status.success().then_some(())
    })
    .await;
    load.finish(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: cargo cluster"]
async fn a_broker_cut_off_from_etcd_loses_its_topics_only_to_others_and_harms_nobody() {
    let cluster = Cluster::start(ClusterSpec::default()).await;
    let load = Load::start(&cluster, "orders", 2).await;
    let owner = cluster.owner(load.topic()).await;
    cluster.path(&owner).cut();
    sleep(Duration::from_secs(12)).await;
    load.goes_on("the owner does not reach etcd").await;
    cluster.path(&owner).mend();
    load.goes_on("it reaches etcd again").await;
    load.finish(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: cargo cluster"]
async fn a_bookie_cut_off_from_everybody_stops_nothing() {
    let spec = ClusterSpec { bookies: vec![BookieSpec::default(); 4], ..ClusterSpec::default() };
    let cluster = Cluster::start(spec).await;
    let load = Load::start(&cluster, "orders", 2).await;
    cluster.path("bookie-2").cut();
    sleep(Duration::from_secs(15)).await;
    load.goes_on("one bookie is not reached").await;
    cluster.path("bookie-2").mend();
    load.goes_on("it is reached again").await;
    load.finish(&cluster).await;
}
