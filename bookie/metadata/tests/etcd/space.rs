//! An etcd that is full.

use std::time::Duration;

use etcd_client::{AlarmAction, AlarmOptions, AlarmType};
use geminga_metadata::{
    Compare, EtcdStore, LeaseId, MetadataStore, Op, StoreError, Txn, TxnOutcome,
};

use crate::{harness::Etcd, key};

const PREFIX: &str = "/geminga/a/";
const VALUE_BYTES: usize = 600 << 10;
const AT_ONCE: usize = 8;

fn create(name: &str) -> Txn {
    let put = Op::put(key(name), vec![7; VALUE_BYTES]);
    Txn::new().when(Compare::Absent(key(name))).then(put)
}

async fn there(store: &EtcdStore, name: &str) -> bool {
    store.get(&key(name)).await.expect("reads go on").1.is_some()
}

/// Fills etcd with several transactions at once, so that some are let in and then found to be too much. What each was
/// told must be true.
async fn fill(store: &EtcdStore) -> Vec<String> {
    let mut made = Vec::new();
    for round in 0.. {
        let names: Vec<String> = (0..AT_ONCE).map(|n| format!("fill/{round}/{n}")).collect();
        let tries = names.iter().map(|name| store.txn(create(name)));
        let answers = futures::future::join_all(tries).await;
        let mut full = false;
        for (name, answer) in names.into_iter().zip(answers) {
            let there = there(store, &name).await;
            match answer {
                Ok(TxnOutcome::Done(_)) => assert!(there, "{name} was done"),
                Err(StoreError::Refused(why)) => {
                    assert!(why.contains("compact"), "{why}");
                    assert!(!there, "{name} was refused, and carried out all the same");
                    full = true;
                }
                Err(StoreError::Unknown(_)) => full = true,
                other => panic!("{other:?}"),
            }
            if there {
                made.push(name);
            }
        }
        if full {
            break;
        }
    }
    made
}

#[tokio::test]
async fn a_full_etcd_refuses_changes_and_says_what_to_do_until_an_operator_made_space() {
    let etcd = Etcd::start(1, &["--quota-backend-bytes=16777216"]).await;
    let store = etcd.store(PREFIX).await;
    let made = fill(&store).await;
    let refused = store.txn(create("more")).await;
    assert!(
        matches!(&refused, Err(StoreError::Refused(why)) if why.contains("disarm")),
        "{refused:?}"
    );
    let blind = store.txn(Txn::new().then(Op::put(key("blind"), "x"))).await;
    assert!(
        matches!(blind, Err(StoreError::Unknown(_))),
        "nothing tells whether it was carried out: {blind:?}"
    );
    let lease = store.grant_lease(Duration::from_secs(5)).await;
    assert!(matches!(lease, Err(StoreError::Refused(_))), "{lease:?}");
    let unknown = store.keep_alive(LeaseId(12_345)).await;
    assert!(matches!(unknown, Err(StoreError::LeaseGone(LeaseId(12_345)))), "{unknown:?}");
    for name in &made {
        let delete = Txn::new().when(Compare::Present(key(name))).then(Op::Delete(key(name)));
        let deleted = store.txn(delete).await;
        assert!(matches!(deleted, Ok(TxnOutcome::Done(_))), "deletions go on: {deleted:?}");
    }

    let (now, _) = store.get(&key("more")).await.expect("reads go on");
    let mut admin = etcd.admin(0).await;
    let physical = etcd_client::CompactionOptions::new().with_physical();
    admin.compact(now.0, Some(physical)).await.expect("compacted");
    admin.defragment().await.expect("defragmented");
    let raised = admin.alarm(AlarmAction::Get, AlarmType::Nospace, None).await.expect("listed");
    for alarm in raised.0.alarms {
        let mut member = AlarmOptions::new();
        member.with_member(alarm.member_id);
        let disarmed = admin.alarm(AlarmAction::Deactivate, AlarmType::Nospace, Some(member));
        disarmed.await.expect("disarmed");
    }
    let again = store.txn(create("more")).await;
    assert!(matches!(again, Ok(TxnOutcome::Done(_))), "{again:?}");
    assert!(there(&store, "more").await);
}
