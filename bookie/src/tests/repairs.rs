//! Lost copies come back (A1-A4, I5, I20), and nothing that lives is disturbed for it (T16, T42).

use std::sync::Arc;

use geminga_bookie_client::bookie_rpc::memory::MemoryBookie;
use geminga_metadata::keys;
use geminga_proto::{
    ids::{EntryId, Incarnation, LedgerId},
    storage::v1 as wire,
};
use prost::Message;

use super::cluster::*;

#[tokio::test(start_paused = true)]
async fn the_ledgers_of_a_wiped_bookie_are_copied_and_its_old_incarnation_is_forgotten() {
    let mut cluster = Cluster::new(4).await;
    cluster.ledger(1, 40).await;
    cluster.ledger(2, 0).await;
    let victim = cluster.holders(1).await[1];
    let old = cluster.incarnation(victim);
    cluster.wipe(victim).await;
    assert!(cluster.is_lost(old).await, "in one transaction with its revocation (D7)");
    eventually!(300, cluster.is_whole(1).await && cluster.is_whole(2).await);
    for ledger in [1, 2] {
        let metadata = cluster.metadata(ledger).await;
        assert!(!metadata.fragments.iter().any(|f| f.names(old)), "also of an empty one (A4, T15)");
    }
    assert_eq!(cluster.read_all(1).await, texts(40));
    eventually!(300, !cluster.is_lost(old).await);
}

#[tokio::test(start_paused = true)]
async fn two_of_five_bookies_lost_one_after_the_other_cost_nothing_and_a_short_absence_moves_nothing()
 {
    let cluster = Cluster::new(5).await;
    for ledger in 1..=6 {
        cluster.ledger(ledger, 20).await;
    }
    pass(60).await;
    for _ in 0..2 {
        let victim = cluster.holders(1).await[0];
        let lost = cluster.incarnation(victim);
        cluster.kill(victim);
        pass(595).await;
        assert!(!cluster.is_lost(lost).await, "T16: not before it was missing for 10 min");
        assert!(!cluster.is_listed(1).await);
        eventually!(200, cluster.is_lost(lost).await);
        eventually!(300, !cluster.is_lost(lost).await);
        for ledger in 1..=6 {
            eventually!(300, cluster.is_whole(ledger).await);
            assert!(!cluster.metadata(ledger).await.fragments[0].names(lost));
            assert_eq!(cluster.read_all(ledger).await, texts(20));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_bookie_that_returns_is_lost_no_more_and_keeps_its_slots() {
    let mut cluster = Cluster::new(3).await;
    cluster.ledger(1, 10).await;
    let before = cluster.metadata(1).await;
    let victim = cluster.holders(1).await[0];
    let incarnation = cluster.incarnation(victim);
    cluster.kill(victim);
    eventually!(800, cluster.is_lost(incarnation).await && cluster.is_listed(1).await);
    pass(120).await;
    assert_eq!(cluster.metadata(1).await, before, "there is no replacement");
    cluster.restart(victim).await.expect("it starts");
    eventually!(60, !cluster.is_lost(incarnation).await && cluster.is_whole(1).await);
    assert_eq!(cluster.metadata(1).await, before);
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_is_alive_but_short_is_filled_in_place() {
    let mut cluster = Cluster::new(3).await;
    let writer = cluster.open(1).await;
    append(&writer, 0..5).await;
    let victim = cluster.number(writer.metadata().value.fragments[0].slots[2].expect("held"));
    let victim = victim.expect("known");
    cluster.kill(victim);
    append(&writer, 5..12).await;
    cluster.close(&writer).await;
    let before = cluster.metadata(1).await;
    assert!(cluster.is_listed(1).await, "section 6");
    pass(60).await;
    assert!(cluster.is_listed(1).await, "nobody showed the third copy");
    cluster.restart(victim).await.expect("it starts");
    eventually!(60, cluster.is_whole(1).await);
    assert_eq!(cluster.metadata(1).await, before, "nothing moved");
    assert!(cluster.nodes.values().map(|node| node.metrics.bytes.get()).sum::<u64>() > 0);
}

#[tokio::test(start_paused = true)]
async fn a_claimed_ledger_is_never_fenced_for_repair_and_an_unclaimed_one_is_closed_after_a_minute()
{
    let cluster = Cluster::new(3).await;
    let claim = keys::owner(SEGMENT.bundle(cluster.nodes[&1].world.config.bundles));
    cluster.put(claim.clone(), b"broker".to_vec()).await;
    let writer = cluster.open(1).await;
    append(&writer, 0..5).await;
    cluster.kill(3);
    append(&writer, 5..10).await;
    eventually!(1_000, cluster.is_listed(1).await);
    pass(1_800).await;
    append(&writer, 10..15).await; // T42: a lost copy is no outage
    assert!(!cluster.metadata(1).await.is_closed());
    cluster.delete(claim).await;
    pass(50).await;
    assert!(!cluster.metadata(1).await.is_closed(), "an owner may still come");
    eventually!(120, cluster.metadata(1).await.is_closed());
    assert_eq!(cluster.read_all(1).await, texts(15), "I1");
    assert!(cluster.is_listed(1).await, "there is no third bookie");
}

#[tokio::test(start_paused = true)]
async fn what_no_peer_can_give_stays_listed_and_named_until_somebody_comes_back_with_it() {
    let mut cluster = Cluster::new(6).await;
    cluster.ledger(1, 10).await;
    let before = cluster.metadata(1).await;
    let victims = cluster.holders(1).await;
    for victim in &victims {
        cluster.kill(*victim);
    }
    eventually!(1_000, cluster.is_listed(1).await);
    pass(300).await;
    assert_eq!(cluster.metadata(1).await, before, "A4: metadata is not edited to end the alarm");
    let alive = cluster.nodes.iter().filter(|node| !victims.contains(node.0));
    assert!(alive.map(|node| node.1.metrics.unreadable.get()).max() == Some(1), "the alarm");
    cluster.restart(victims[1]).await.expect("it starts");
    eventually!(300, cluster.is_whole(1).await);
    assert_eq!(cluster.read_all(1).await, texts(10));
}

#[tokio::test(start_paused = true)]
async fn while_an_operator_pauses_it_nothing_is_lost_and_nothing_copied() {
    let cluster = Cluster::new(4).await;
    cluster.ledger(1, 10).await;
    cluster.put(keys::auto_recovery_pause(), Vec::new()).await;
    let victim = cluster.holders(1).await[0];
    let incarnation = cluster.incarnation(victim);
    cluster.kill(victim);
    pass(1_200).await;
    assert!(!cluster.is_lost(incarnation).await && !cluster.is_listed(1).await);
    cluster.delete(keys::auto_recovery_pause()).await;
    eventually!(300, !cluster.is_lost(incarnation).await && cluster.is_whole(1).await);
}

#[tokio::test(start_paused = true)]
async fn the_listing_of_a_deleted_ledger_goes() {
    let cluster = Cluster::new(3).await;
    cluster.ledger(1, 3).await;
    let deleted = cluster.metadata(1).await.deleted(geminga_bookie_client::Nonce([1; 16]));
    cluster.put(keys::ledger(LedgerId(1)), deleted.expect("closed").encode().to_vec()).await;
    for ledger in [1, 77] {
        cluster.put(keys::under_replicated(LedgerId(ledger)), Vec::new()).await;
    }
    eventually!(30, !cluster.is_listed(1).await && !cluster.is_listed(77).await);
}

#[tokio::test(start_paused = true)]
async fn the_periodic_check_finds_a_copy_that_its_holder_lost_without_knowing() {
    let mut cluster = Cluster::new(0).await;
    cluster.config.check_interval = std::time::Duration::from_secs(700);
    for bookie in 1..=2 {
        cluster.add(bookie).await;
    }
    let third = MemoryBookie::new(Incarnation(900));
    cluster.loopback.attach(third.incarnation(), Arc::new(third.clone()));
    let registration =
        wire::Available { format: 1, incarnation: 900, writable: true, ..Default::default() };
    cluster.put(keys::available("b900"), registration.encode_to_vec()).await;
    cluster.ledger(1, 10).await;
    third.forget(LedgerId(1), EntryId(3));
    pass(60).await;
    assert!(!third.held(LedgerId(1)).contains_key(&EntryId(3)), "nobody looked yet");
    eventually!(300, third.held(LedgerId(1)).contains_key(&EntryId(3)));
    eventually!(60, !cluster.is_listed(1).await);
}

#[tokio::test(start_paused = true)]
async fn a_bookie_in_limbo_gets_back_what_it_may_have_lost() {
    let mut cluster = Cluster::new(3).await;
    cluster.ledger(1, 30).await;
    pass(1).await;
    cluster.kill(2);
    let disk = cluster.nodes[&2].world.disk.clone();
    let journal = cluster.nodes[&2].world.names("journal-").pop().expect("a journal");
    // The first group that holds entries.
    disk.flip_bit(&journal, (4096 + 70) * 8).expect("within");
    cluster.restart(2).await.expect("it starts");
    let limbo = cluster.registration(2).await.expect("registered").limbo;
    assert!(limbo.is_some(), "damage was found");
    eventually!(300, cluster.nodes.values().map(|n| n.metrics.ledgers.get()).sum::<u64>() > 0);
    assert!(cluster.is_whole(1).await);
    assert_eq!(cluster.holders(1).await.len(), 3, "filled in place, nothing moved");
}

#[tokio::test(start_paused = true)]
async fn a_slot_is_not_given_to_a_copy_whose_listing_went_while_it_was_made() {
    let mut cluster = Cluster::new(0).await;
    (cluster.config.bytes_per_second, cluster.config.chunk_bytes) = (50, 10);
    for bookie in 1..=4 {
        cluster.add(bookie).await;
    }
    cluster.ledger(1, 40).await;
    let before = cluster.metadata(1).await;
    let victim = cluster.holders(1).await[0];
    cluster.kill(victim);
    eventually!(900, cluster.nodes.values().any(|node| node.metrics.bytes.get() > 100));
    // From here on the target's GC may take the copy for one that nobody counts on (G1, T51).
    cluster.put(keys::auto_recovery_pause(), Vec::new()).await;
    cluster.delete(keys::under_replicated(LedgerId(1))).await;
    pass(300).await;
    let copied: u64 = cluster.nodes.values().map(|node| node.metrics.bytes.get()).sum();
    assert!(copied > 40 * 40, "the copy went on to its end");
    assert_eq!(cluster.metadata(1).await, before);
    cluster.delete(keys::auto_recovery_pause()).await;
    eventually!(600, cluster.is_whole(1).await);
}
