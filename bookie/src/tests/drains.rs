//! A bookie goes only with a proof that no ledger needs it (DC1, D7, T17).

use geminga_metadata::keys;

use super::cluster::*;
use crate::{CookieError, StartError, auto_recovery::WAITS};

#[tokio::test(start_paused = true)]
async fn a_drained_bookie_ends_with_a_proof_and_its_data_elsewhere() {
    let mut cluster = Cluster::new(4).await;
    for ledger in 1..=8 {
        cluster.ledger(ledger, 10).await;
    }
    let going = cluster.holders(1).await[0];
    let incarnation = cluster.incarnation(going);
    cluster.drain(going, 1).await;
    eventually!(30, cluster.registration(going).await.is_some_and(|found| found.draining));
    eventually!(600, cluster.wish(going).await.proof_revision > 0);
    let wish = cluster.wish(going).await;
    assert!(wish.bytes_total > 0 && wish.bytes_left == 0 && wish.ledgers_left == 0);
    assert!(cluster.value(&keys::cookie(&format!("b{going}"))).await.is_none());
    for ledger in 1..=8 {
        assert!(!cluster.metadata(ledger).await.fragments.iter().any(|f| f.names(incarnation)));
        eventually!(60, cluster.is_whole(ledger).await);
        assert_eq!(cluster.read_all(ledger).await, texts(10));
    }
    let bookie = cluster.nodes[&going].bookie.clone();
    let cause = tokio::time::timeout(std::time::Duration::from_secs(30), bookie.failed()).await;
    assert!(cause.expect("it ends").contains("decommissioned") && bookie.is_decommissioned());
    assert!(cluster.registration(going).await.is_none(), "it deregistered");
    let error = cluster.restart(going).await.expect_err("it is gone for good");
    assert!(matches!(error, StartError::Cookie(CookieError::Decommissioned { .. })), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_drain_with_nothing_to_move_is_proven_as_soon_as_two_scans_are_far_enough_apart() {
    let cluster = Cluster::new(4).await;
    pass(30).await;
    cluster.drain(4, 1).await;
    let least = cluster.config.proof_apart.as_secs();
    let looks = 3 * cluster.config.audit_interval.as_secs();
    eventually!(least + looks, cluster.wish(4).await.proof_revision > 0);
}

#[tokio::test(start_paused = true)]
async fn a_drain_that_would_leave_too_few_bookies_waits_and_goes_on_when_there_is_one_more() {
    let mut cluster = Cluster::new(3).await;
    cluster.ledger(1, 10).await;
    cluster.drain(1, 1).await;
    eventually!(60, cluster.wish(1).await.blocked.starts_with(WAITS));
    eventually!(30, !cluster.registration(1).await.expect("registered").draining);
    pass(300).await;
    assert!(cluster.holders(1).await.contains(&1) && !cluster.is_listed(1).await);
    cluster.drain(2, 2).await;
    cluster.add(4).await;
    eventually!(60, cluster.wish(2).await.blocked.contains("b1 is drained first"));
    eventually!(600, cluster.wish(1).await.proof_revision > 0);
    eventually!(60, cluster.wish(2).await.blocked.contains("2 bookies would stay writable"));
    assert!(cluster.is_whole(1).await);
}

#[tokio::test(start_paused = true)]
async fn a_drain_goes_on_under_the_next_auditor() {
    let mut cluster = Cluster::new(0).await;
    cluster.config.bytes_per_second = 100;
    for bookie in 1..=5 {
        cluster.add(bookie).await;
    }
    for ledger in 1..=10 {
        cluster.ledger(ledger, 20).await;
    }
    eventually!(60, cluster.auditor().await.is_some());
    let auditor = cluster.auditor().await.expect("looked at just now");
    let going = if auditor == 1 { 2 } else { 1 };
    let before = cluster.incarnation(going);
    cluster.drain(going, 1).await;
    eventually!(120, cluster.wish(going).await.ledgers_left > 0);
    cluster.kill(auditor);
    pass(60).await;
    assert_eq!(cluster.wish(going).await.proof_revision, 0, "it was under way");
    eventually!(3_600, cluster.wish(going).await.proof_revision > 0);
    assert_ne!(cluster.auditor().await, Some(auditor));
    for ledger in 1..=10 {
        assert!(!cluster.metadata(ledger).await.fragments[0].names(before));
        assert_eq!(cluster.read_all(ledger).await, texts(20));
    }
}

#[tokio::test(start_paused = true)]
async fn an_open_ledger_keeps_the_proof_away_and_a_withdrawn_wish_leaves_the_bookie_in_service() {
    let cluster = Cluster::new(4).await;
    let claim = keys::owner(SEGMENT.bundle(cluster.nodes[&1].world.config.bundles));
    cluster.put(claim, b"broker".to_vec()).await;
    cluster.create_only(1).await;
    let going = cluster.holders(1).await[0];
    let incarnation = cluster.incarnation(going);
    cluster.drain(going, 1).await;
    eventually!(120, cluster.wish(going).await.blocked.contains("1 ledgers are open"));
    pass(900).await;
    assert_eq!(cluster.wish(going).await.proof_revision, 0);
    assert!(cluster.metadata(1).await.fragments[0].names(incarnation));
    cluster.delete(keys::draining_bookie(&format!("b{going}"))).await;
    eventually!(30, !cluster.registration(going).await.expect("registered").draining);
    pass(300).await;
    assert!(cluster.value(&keys::cookie(&format!("b{going}"))).await.is_some());
    assert!(cluster.value(&keys::draining_bookie(&format!("b{going}"))).await.is_none());
}

#[tokio::test(start_paused = true)]
async fn the_next_bookie_of_the_name_of_a_drained_one_stays_in_service_and_goes_only_with_a_proof_of_its_own()
 {
    let mut cluster = Cluster::new(4).await;
    for ledger in 1..=4 {
        cluster.ledger(ledger, 10).await;
    }
    let going = cluster.holders(1).await[0];
    let before = cluster.incarnation(going);
    cluster.drain(going, 1).await;
    eventually!(600, cluster.wish(going).await.proof_revision > 0);
    eventually!(60, cluster.registration(going).await.is_none());
    cluster.renew(going).await;
    assert_ne!(cluster.incarnation(going), before);
    let wish = keys::draining_bookie(&format!("b{going}"));
    assert!(cluster.value(&wish).await.is_none(), "it went as the new cookie came");
    for ledger in 5..=12 {
        cluster.ledger(ledger, 10).await;
    }
    pass(600).await;
    assert!(!cluster.registration(going).await.expect("registered").draining);
    assert!(cluster.value(&keys::cookie(&format!("b{going}"))).await.is_some());

    // And once more: what it holds by now is moved away first.
    let incarnation = cluster.incarnation(going);
    let named = async |cluster: &Cluster| {
        let mut named = 0;
        for ledger in 1..=12 {
            let metadata = cluster.metadata(ledger).await;
            named += u32::from(metadata.fragments.iter().any(|f| f.names(incarnation)));
        }
        named
    };
    assert!(named(&cluster).await > 0);
    cluster.drain(going, 2).await;
    eventually!(900, cluster.wish(going).await.proof_revision > 0);
    assert_eq!(named(&cluster).await, 0);
    for ledger in 1..=12 {
        assert_eq!(cluster.read_all(ledger).await, texts(10));
    }
}
