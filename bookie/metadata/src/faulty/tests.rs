//! What the faults do, and what a caller sees of them.

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{Committed, Compare, MemoryStore, Op, commit, keys};

fn parts(plan: FaultPlan, seed: u64) -> (MemoryStore, FaultyStore, SharedStore) {
    let memory = MemoryStore::new();
    let random = Random::from_seed(seed);
    let inner: SharedStore = Arc::new(memory.clone());
    let faulty = FaultyStore::new(inner, random, plan, &Tasks::new("network"));
    (memory, faulty.clone(), Arc::new(faulty))
}

fn create(value: &'static str) -> Txn {
    let key = keys::cluster();
    Txn::new().when(Compare::Absent(key.clone())).then(Op::put(key, value))
}

#[tokio::test(start_paused = true)]
async fn a_late_transaction_lands_after_it_was_read_back_as_absent() {
    let (memory, faulty, _) = parts(FaultPlan::default(), 1);
    faulty.inject(Fault::UnknownLate(Duration::from_secs(3)));
    assert!(matches!(faulty.txn(create("a")).await, Err(StoreError::Unknown(_))));
    assert!(faulty.get(&keys::cluster()).await.expect("read").1.is_none());
    assert_eq!(faulty.under_way(), 1);
    sleep(Duration::from_secs(4)).await;
    assert_eq!(memory.get(&keys::cluster()).await.expect("read").1.expect("late").value, "a");
    assert_eq!(faulty.under_way(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_repeated_transaction_wins_and_its_late_twin_changes_nothing() {
    let (memory, faulty, store) = parts(FaultPlan::default(), 1);
    faulty.inject(Fault::UnknownLate(Duration::from_secs(3)));
    let committed = commit(&store, &create("a"), &CancellationToken::new()).await;
    assert!(matches!(committed, Committed::Done(Revision(2))), "{committed:?}");
    sleep(Duration::from_secs(4)).await;
    assert_eq!((faulty.under_way(), memory.revision()), (0, Revision(2)));
}

#[tokio::test(start_paused = true)]
async fn a_commit_that_landed_before_its_answer_was_lost_conflicts_with_itself() {
    let (_, faulty, store) = parts(FaultPlan::default(), 1);
    faulty.inject(Fault::UnknownDone);
    let committed = commit(&store, &create("mine"), &CancellationToken::new()).await;
    let Committed::Conflict { found, .. } = committed else { panic!("{committed:?}") };
    assert_eq!(found[0].as_ref().expect("found").value, "mine");
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_commit_is_unsettled_only_if_a_try_may_have_landed() {
    let (_, faulty, store) = parts(FaultPlan::default(), 1);
    let cancel = CancellationToken::new();
    let stop_after = |cancel: &CancellationToken| {
        let cancel = cancel.clone();
        async move {
            sleep(Duration::from_secs(5)).await;
            cancel.cancel();
        }
    };
    faulty.set_partitioned(true);
    let txn = create("a");
    let (committed, ()) = tokio::join!(commit(&store, &txn, &cancel), stop_after(&cancel));
    assert!(matches!(committed, Committed::Refused(StoreError::Unavailable(_))), "{committed:?}");

    faulty.set_partitioned(false);
    faulty.set_plan(FaultPlan { unknown_lost: 1.0, ..FaultPlan::default() });
    let cancel = CancellationToken::new();
    let (committed, ()) = tokio::join!(commit(&store, &txn, &cancel), stop_after(&cancel));
    assert!(matches!(committed, Committed::Unsettled), "{committed:?}");

    faulty.set_plan(FaultPlan::default());
    faulty.inject(Fault::SlowAnswer(Duration::from_secs(60)));
    let cancel = CancellationToken::new();
    let (committed, ()) = tokio::join!(commit(&store, &txn, &cancel), stop_after(&cancel));
    assert!(matches!(committed, Committed::Unsettled), "{committed:?}");
}

#[tokio::test(start_paused = true)]
async fn a_commit_pauses_longer_and_longer_and_ends_when_the_store_is_back() {
    let (_, faulty, store) = parts(FaultPlan::default(), 1);
    for _ in 0..10 {
        faulty.inject(Fault::Unavailable);
    }
    let start = Instant::now();
    let committed = commit(&store, &create("a"), &CancellationToken::new()).await;
    assert!(matches!(committed, Committed::Done(_)));
    // 10 + 20 + ... + 640 ms, then 1 s three times
    assert_eq!(start.elapsed(), Duration::from_millis(1_270 + 3_000));
}

#[tokio::test(start_paused = true)]
async fn a_scripted_fault_waits_for_the_transaction_it_is_meant_for() {
    let (_, faulty, _) = parts(FaultPlan::default(), 1);
    faulty.inject_below(keys::brokers(), Fault::Unavailable);
    faulty.txn(create("a")).await.expect("not meant");
    let put = Txn::new().then(Op::put(keys::broker("b"), "x"));
    assert!(faulty.txn(put.clone()).await.is_err());
    faulty.txn(put).await.expect("once only");
}

#[tokio::test(start_paused = true)]
async fn a_partition_refuses_calls_and_cuts_watches() {
    let (_, faulty, _) = parts(FaultPlan::default(), 1);
    let mut watch = faulty.watch(&keys::brokers(), Revision(2)).await.expect("watch");
    faulty.set_partitioned(true);
    assert_eq!(watch.next().await, Err(WatchError::Lost));
    assert!(faulty.get(&keys::cluster()).await.is_err());
    assert!(matches!(faulty.txn(create("a")).await, Err(StoreError::Unavailable(_))));
    faulty.set_partitioned(false);
    assert_eq!(watch.next().await, Err(WatchError::Lost));
    faulty.txn(create("a")).await.expect("healed");
}

#[tokio::test(start_paused = true)]
async fn one_seed_is_one_run() {
    async fn run(seed: u64) -> Vec<String> {
        let plan = FaultPlan {
            unavailable: 0.2,
            unknown_done: 0.2,
            unknown_lost: 0.2,
            unknown_late: 0.2,
            late_max: Duration::from_secs(2),
            delay: 0.5,
            delay_max: Duration::from_millis(500),
            watch_lost: 0.0,
        };
        let (memory, faulty, _) = parts(plan, seed);
        let start = Instant::now();
        let mut log = Vec::new();
        for n in 0..60 {
            let answer = faulty.txn(Txn::new().then(Op::put(keys::cluster(), vec![n]))).await;
            let at = start.elapsed();
            log.push(format!("{at:?} {answer:?} {:?}", memory.get(&keys::cluster()).await));
        }
        log
    }
    let first = run(7).await;
    assert_eq!(first, run(7).await);
    assert_ne!(first, run(8).await);
}
