//! No id twice, whatever the store does.

use std::collections::BTreeSet;

use geminga_runtime::{random::Random, tasks::Tasks};

use super::*;
use crate::{Fault, FaultPlan, FaultyStore, MemoryStore, keys};

fn parts(plan: FaultPlan, seed: u64) -> (FaultyStore, SharedStore) {
    let inner = Arc::new(MemoryStore::new());
    let tasks = Tasks::new("network");
    let faulty = FaultyStore::new(inner, Random::from_seed(seed), plan, &tasks);
    (faulty.clone(), Arc::new(faulty))
}

#[tokio::test(start_paused = true)]
async fn ids_are_dense_within_blocks_start_at_one_and_carry_the_generation() {
    let (_, store) = parts(FaultPlan::default(), 1);
    let base = 3 << 56;
    let first = IdBlocks::new(Arc::clone(&store), keys::counter("ledgers"), 10, base);
    let second = IdBlocks::new(store, keys::counter("ledgers"), 10, base);
    for n in 1..=10 {
        assert_eq!(first.next().await.expect("id"), base + n);
    }
    assert_eq!(second.next().await.expect("id"), base + 11);
    assert_eq!(first.next().await.expect("id"), base + 21);
}

#[tokio::test(start_paused = true)]
async fn no_id_is_given_twice_whatever_is_lost_or_lands_late() {
    for seed in 0..20 {
        let plan = FaultPlan {
            unavailable: 0.1,
            unknown_done: 0.2,
            unknown_lost: 0.1,
            unknown_late: 0.2,
            late_max: Duration::from_secs(1),
            delay: 0.3,
            delay_max: Duration::from_millis(100),
            watch_lost: 0.0,
        };
        let (_, store) = parts(plan, seed);
        let taker = |store: SharedStore| async move {
            let ids = IdBlocks::new(store, keys::counter("ledgers"), 3, 0);
            let mut taken = Vec::new();
            for _ in 0..30 {
                taken.extend(ids.next().await.ok());
            }
            taken
        };
        let takers = (0..4).map(|_| taker(Arc::clone(&store)));
        let taken: Vec<u64> = futures::future::join_all(takers).await.concat();
        let distinct: BTreeSet<u64> = taken.iter().copied().collect();
        assert_eq!(distinct.len(), taken.len(), "seed {seed}");
        assert!(taken.len() > 40, "seed {seed}: {}", taken.len());
    }
}

#[tokio::test(start_paused = true)]
async fn an_id_merged_into_a_transaction_cannot_be_created_twice() {
    let (faulty, store) = parts(FaultPlan::default(), 1);
    let counter = keys::counter("topics");
    let next = next_id(&store, &counter, 0).await.expect("id");
    let create = next.txn.then(Op::put(keys::cluster(), "topic"));
    faulty.inject(Fault::UnknownLate(Duration::from_secs(1)));
    assert!(store.txn(create.clone()).await.is_err());
    assert!(matches!(store.txn(create).await, Ok(TxnOutcome::Done(_))));
    store.txn(Txn::new().then(Op::Delete(keys::cluster()))).await.expect("deleted");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(store.get(&keys::cluster()).await.expect("read").1.is_none(), "T49");
    assert_eq!(next_id(&store, &counter, 0).await.expect("id").id, next.id + 1);
}

#[tokio::test(start_paused = true)]
async fn a_damaged_or_used_up_counter_is_refused() {
    let (_, store) = parts(FaultPlan::default(), 1);
    let counter = keys::counter("ledgers");
    let ids = IdBlocks::new(Arc::clone(&store), counter.clone(), 10, 0);
    let set = |value: Vec<u8>| Txn::new().then(Op::put(counter.clone(), value));
    store.txn(set(b"seven".to_vec())).await.expect("set");
    assert!(matches!(ids.next().await, Err(StoreError::Refused(_))));
    store.txn(set((COUNTER_MAX - 3).to_be_bytes().to_vec())).await.expect("set");
    assert!(matches!(ids.next().await, Err(StoreError::Refused(_))));
}
