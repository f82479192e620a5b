//! Members that come, go, are replaced, and are refused.

use rustix::process::Signal;

use crate::{
    faults::fully_replicated,
    harness::{BookieSpec, Cluster, ClusterSpec, Load, eventually},
};

#[tokio::test(flavor = "multi_thread")]
async fn members_start_in_any_order_and_a_drained_broker_shows_no_error() {
    let spec = ClusterSpec { brokers: 1, bookies: Vec::new(), ..ClusterSpec::default() };
    let mut cluster = Cluster::start(spec).await;
    for number in 0..3 {
        cluster.add_bookie(&format!("bookie-{number}"), &BookieSpec::default()).await;
    }
    let load = Load::start(&cluster, "orders", 4).await;
    cluster.add_broker("broker-1").await;
    cluster.ready("broker-1").await;
    eventually("the new broker gets its share", async || {
        let brokers = cluster.cli(&["broker", "ls"]).await;
        let has = |at: usize| brokers[at]["bundles"].as_u64().is_some_and(|bundles| bundles > 0);
        (has(0) && has(1)).then_some(())
    })
    .await;
    load.goes_on("topics have moved").await;
    cluster.cli(&["broker", "drain", "broker-0"]).await;
    eventually("the drained broker has nothing", async || {
        let brokers = cluster.cli(&["broker", "ls"]).await;
        (brokers[0]["bundles"].as_u64() == Some(0)).then_some(())
    })
    .await;
    load.goes_on("the other broker serves everything").await;
    cluster.terminate("broker-0").await;
    load.goes_on("the drained broker is gone").await;
    load.finish(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_only_broker_serves_on_until_the_next_one_takes_over() {
    let mut cluster = Cluster::start(ClusterSpec { brokers: 1, ..ClusterSpec::default() }).await;
    let load = Load::start(&cluster, "orders", 4).await;
    cluster.process("broker-0").signal(Signal::TERM);
    cluster.process("broker-0").wrote("no other broker is there").await;
    load.goes_on("the only broker was told to stop").await;
    cluster.add_broker("broker-1").await;
    assert_eq!(cluster.process("broker-0").ended().await, Some(0));
    load.goes_on("the next broker has taken over").await;
    load.finish(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: cargo cluster"]
async fn a_rolling_restart_of_everything_loses_nothing() {
    let mut cluster =
        Cluster::start(ClusterSpec { etcd_members: 3, ..ClusterSpec::default() }).await;
    let load = Load::start(&cluster, "orders", 3).await;
    for member in 0..3 {
        cluster.etcd.kill_member(member);
        cluster.etcd.start_member(member);
        cluster.etcd.healthy().await;
    }
    for id in cluster.bookies().into_iter().chain(cluster.brokers()) {
        cluster.terminate(&id).await;
        load.goes_on("a member is away").await;
        cluster.start_member(&id);
        cluster.ready(&id).await;
        load.goes_on("a member is back").await;
    }
    load.finish(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: cargo cluster"]
async fn a_wiped_bookie_is_refused_and_a_new_incarnation_gets_its_copies() {
    let mut cluster = Cluster::start(ClusterSpec {
        bookies: vec![BookieSpec::default(); 4],
        settings: vec![("bookie-scan-ms", "5000".into())],
        ..ClusterSpec::default()
    })
    .await;
    let load = Load::start(&cluster, "orders", 2).await;
    cluster.kill("bookie-0");
    std::fs::remove_dir_all(cluster.data("bookie-0")).expect("its disk is wiped");
    cluster.start_member("bookie-0");
    let code = cluster.process("bookie-0").ended().await;
    assert_eq!(code, Some(4), "refused (D7): {}", cluster.process("bookie-0").log());
    load.goes_on("the bookie is refused").await;
    cluster.start_member_with("bookie-0", &[("bookie-take-new-incarnation", "true")]);
    cluster.ready("bookie-0").await;
    fully_replicated(&cluster).await;
    load.finish(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: cargo cluster"]
async fn a_bookie_is_added_and_another_one_drained_with_proof() {
    let mut cluster = Cluster::start(ClusterSpec {
        settings: vec![("bookie-scan-ms", "5000".into())],
        ..ClusterSpec::default()
    })
    .await;
    let load = Load::start(&cluster, "orders", 3).await;
    let refused = cluster.cli_output(&["bookie", "drain", "bookie-1"]).await;
    assert_eq!(refused.status.code(), Some(5), "too few bookies would be left");
    cluster.add_bookie("bookie-3", &BookieSpec::default()).await;
    cluster.ready("bookie-3").await;
    eventually("the drain begins", async || {
        cluster.cli_output(&["bookie", "drain", "bookie-1"]).await.status.success().then_some(())
    })
    .await;
    eventually("the drain is proven", async || {
        let bookies = cluster.cli(&["bookie", "ls"]).await;
        let drained = bookies
            .as_array()?
            .iter()
            .all(|bookie| bookie["id"] != "bookie-1" || bookie["state"] == "drained");
        drained.then_some(())
    })
    .await;
    load.goes_on("a bookie was drained").await;
    let ledgers = cluster.cli(&["ledger", "ls"]).await;
    for ledger in ledgers.as_array().expect("a list") {
        let id = ledger["id"].to_string();
        let described = cluster.cli(&["ledger", "describe", &id]).await.to_string();
        assert!(!described.contains("bookie-1#"), "{described}");
    }
    load.finish(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: cargo cluster"]
async fn a_member_of_another_cluster_is_refused() {
    let mut cluster = Cluster::start(ClusterSpec::default()).await;
    let load = Load::start(&cluster, "orders", 1).await;
    cluster.kill("bookie-0");
    cluster.start_member_with("bookie-0", &[("metadata-prefix", "/another/")]);
    let code = cluster.process("bookie-0").ended().await;
    assert_eq!(code, Some(4), "refused (D7): {}", cluster.process("bookie-0").log());
    cluster.start_member("bookie-0");
    cluster.ready("bookie-0").await;
    load.finish(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: cargo cluster"]
async fn a_process_that_waits_for_etcd_says_so_and_goes_on_when_it_comes() {
    let mut cluster = Cluster::start(ClusterSpec::default()).await;
    cluster.kill("broker-0");
    cluster.etcd.stop_all();
    cluster.start_member("broker-0");
    cluster.process("broker-0").wrote("waiting").await;
    assert_eq!(cluster.metric("broker-0", "geminga_process_waiting").await, Some(1.0));
    cluster.etcd.start_all().await;
    cluster.ready("broker-0").await;
    assert_eq!(cluster.metric("broker-0", "geminga_process_waiting").await, Some(0.0));
    cluster.process("broker-0").signal(Signal::INT);
    assert_eq!(cluster.process("broker-0").ended().await, Some(0));
}
