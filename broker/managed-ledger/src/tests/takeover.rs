//! Two owners of one segment (O2, O4, I10).

use std::time::Duration;

use geminga_bookie_client::bookie_rpc::faulty::Faults;
use geminga_proto::ids::Offset;
use tokio::time::Instant;

use super::harness::*;
use crate::{
    Claim, LoadError, ProducerIdentity, PublishError, SettleError, Settlement, Start, Status,
};

/// What an owner told a producer, and when.
type Receipt = (u64, Result<Offset, PublishError>, Instant);

#[tokio::test(start_paused = true)]
async fn a_stale_owner_gives_no_receipt_and_loses_none() {
    for seed in 0..12 {
        let world = World::with_bookies(3, seed).await;
        let late = Faults { delay: 0.6, delay_max: Duration::from_millis(25), ..Faults::default() };
        let old = world.node_over(world.faulty(late.clone()), |config| config.roll_bytes = 3_000);
        let old_log = old.load().await;
        old_log.create_cursor(SUB, Start::Earliest).await.expect("made");
        let mut producer = Producer::named(&old_log, "p", 1).await;
        let (log, tasks) = (old_log.clone(), world.tasks.clone());
        let writing = world.tasks.spawn_returning("producer", async move {
            let mut answers = Vec::new();
            for n in 0..400u64 {
                let hi = producer.last + n % 3 + 1;
                let outcome = producer.send(&log, n % 3 + 1);
                answers.push(tasks.spawn_returning("receipt", async move {
                    let answer = outcome.await.map(|stored| stored.base_offset.expect("new"));
                    (hi, answer, Instant::now())
                }));
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            futures::future::join_all(answers).await
        });
        pass(0.05 + 0.02 * seed as f64).await;
        let new_log = world.node_over(world.faulty(late.clone()), |_| ()).load().await;
        let taken_at = Instant::now();

        let receipts: Vec<Result<Receipt, _>> = writing.await.expect("runs");
        let all = read_all(&new_log).await;
        let mut given = 0;
        for receipt in receipts {
            let (hi, answer, at) = receipt.expect("runs");
            match answer {
                Ok(base) => {
                    given += 1;
                    assert!(at <= taken_at, "seed {seed}: a receipt after the takeover");
                    assert!(
                        all.iter().any(|(b, _, h)| (*b, *h) == (base.0, hi)),
                        "seed {seed}: {hi} lost"
                    );
                }
                Err(error) => assert_eq!(error, PublishError::Fenced, "seed {seed}"),
            }
        }
        assert!(given > 0 && given < 400, "seed {seed}: {given}");
        let stored: Vec<u64> = all.iter().map(|(_, _, hi)| *hi).collect();
        assert!(stored.is_sorted_by(|a, b| a < b), "seed {seed}: in order, once (I11, I13)");
        until_fenced(&old_log).await;
        assert_eq!(
            old_log.settle(SUB, Settlement::UpTo(offset(0))).await,
            Err(SettleError::Fenced)
        );

        // The producer goes on with the new owner.
        let mut producer = Producer::named(&new_log, "p", 2).await;
        assert_eq!(Some(&producer.last), stored.last());
        producer.store(&new_log, 10).await;
        assert_eq!(read_all(&new_log).await.len(), all.len() + 10);
        world.check_metadata().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_stale_owner_finds_out_at_its_next_step() {
    let world = World::new().await;
    let old = world.node().load().await;
    old.create_cursor(SUB, Start::Earliest).await.expect("made");
    let mut producer = Producer::named(&old, "p", 1).await;
    producer.store(&old, 3).await;
    let new = world.node().load().await;
    assert_eq!(*old.status().borrow(), Status::Serving);
    assert_eq!(old.settle(SUB, Settlement::UpTo(offset(1))).await, Err(SettleError::Fenced));
    assert!(matches!(*old.status().borrow(), Status::Fenced(_)));
    assert_eq!(new.cursor(SUB).expect("there").mark_delete_next, offset(0));
    assert_eq!(sequences(&new).await, [1, 3, 6]);
}

#[tokio::test(start_paused = true)]
async fn an_owner_without_an_open_ledger_is_fenced_by_the_list() {
    let world = World::new().await;
    let old = world.node().load().await;
    let new = world.node().load().await;
    let mut producer = Producer::open(&old, ProducerIdentity::Session, 1).await;
    assert_eq!(producer.send(&old, 1).await, Err(PublishError::Fenced));
    let mut producer = Producer::named(&new, "p", 1).await;
    producer.store(&new, 2).await;
    world.check_metadata().await;
}

#[tokio::test(start_paused = true)]
async fn without_its_claim_nobody_loads() {
    let world = World::new().await;
    let before = world.list().await;
    let claim = Claim { create_revision: geminga_metadata::Revision(99), ..world.claim.clone() };
    let refused = world.node().ledgers.load(SEGMENT, claim).await;
    assert!(matches!(refused, Err(LoadError::ClaimLost)), "{refused:?}");
    assert_eq!(world.list().await, before);
}

#[tokio::test(start_paused = true)]
async fn a_load_waits_for_bookies_and_may_be_repeated() {
    let world = World::new().await;
    let node = world.node();
    let log = node.load().await;
    Producer::named(&log, "p", 1).await.store(&log, 5).await;
    let all = read_all(&log).await;
    node.kill();
    world.kill(1);
    world.kill(2);
    let node = world.node_with(|config| config.load_patience = Duration::from_secs(5));
    let refused = node.ledgers.load(SEGMENT, world.claim.clone()).await;
    assert!(matches!(refused, Err(LoadError::Unavailable(_))), "{refused:?}");
    world.start(1);
    let log = node.load().await;
    assert_eq!(read_all(&log).await, all);
    world.check_metadata().await;
}
