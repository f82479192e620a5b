//! The state machine against a naive model: one map, copied at every revision.

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::{Change, HistoryLimits, RangeRequest, WatchError, data::FIRST_REVISION};

type Snapshot = BTreeMap<Key, KeyValue>;

/// What is done to the store. Leases are named by the order of their grants; times are seconds.
#[derive(Clone, Debug)]
enum Step {
    Txn { compares: Vec<(u8, u8)>, changes: Vec<(u8, Option<usize>, bool)> },
    Grant(u64),
    KeepAlive(usize),
    Revoke(usize),
    Pass(u64),
    Compact(i64),
}

fn step() -> impl Strategy<Value = Step> {
    let compares = prop::collection::vec((0u8..5, 0u8..4), 0..3);
    let changes = prop::collection::vec(
        (0u8..5, prop::option::weighted(0.4, 0usize..6), prop::bool::weighted(0.7)),
        0..4,
    );
    prop_oneof![
        8 => (compares, changes).prop_map(|(compares, changes)| Step::Txn { compares, changes }),
        2 => (1u64..9).prop_map(Step::Grant),
        1 => (0usize..6).prop_map(Step::KeepAlive),
        1 => (0usize..6).prop_map(Step::Revoke),
        2 => (1u64..5).prop_map(Step::Pass),
        1 => (0i64..6).prop_map(Step::Compact),
    ]
}

fn key(n: u8) -> Key {
    Key(Bytes::from(format!("k/{n}")))
}

#[derive(Default)]
struct Model {
    /// By revision; the last one is the present.
    snapshots: BTreeMap<Revision, Snapshot>,
    /// Length and deadline of the leases alive.
    leases: BTreeMap<LeaseId, (u64, u64)>,
    granted: Vec<LeaseId>,
    now: u64,
}

impl Model {
    fn present(&self) -> (Revision, Snapshot) {
        let (revision, snapshot) = self.snapshots.last_key_value().expect("never empty");
        (*revision, snapshot.clone())
    }

    fn lease(&self, n: usize) -> LeaseId {
        self.granted.get(n).copied().unwrap_or(LeaseId(9_999))
    }

    fn replace(&mut self, next: Snapshot) {
        let (revision, present) = self.present();
        if present != next {
            self.snapshots.insert(Revision(revision.0 + 1), next);
        }
    }

    fn end(&mut self, lease: LeaseId) -> bool {
        let mut next = self.present().1;
        next.retain(|_, found| found.lease != Some(lease));
        self.replace(next);
        self.leases.remove(&lease).is_some()
    }

    fn txn(&mut self, txn: &Txn) -> Result<TxnOutcome, LeaseId> {
        let (revision, mut next) = self.present();
        let holds = |compare: &Compare| match (compare, next.get(compare.key())) {
            (Compare::Absent(_), found) => found.is_none(),
            (Compare::Present(_), found) => found.is_some(),
            (Compare::ModRevision(_, at), Some(found)) => found.mod_revision == *at,
            (Compare::CreateRevision(_, at), Some(found)) => found.create_revision == *at,
            (_, None) => false,
        };
        if !txn.compares.iter().all(holds) {
            let found = txn.compares.iter().map(|c| next.get(c.key()).cloned()).collect();
            return Ok(TxnOutcome::Conflict { revision, found });
        }
        let at = Revision(revision.0 + 1);
        for change in &txn.changes {
            match change {
                Op::Delete(key) => drop(next.remove(key)),
                Op::Put { key, value, lease } => {
                    if let Some(lease) = lease.filter(|lease| !self.leases.contains_key(lease)) {
                        return Err(lease);
                    }
                    let create_revision = next.get(key).map_or(at, |found| found.create_revision);
                    let (key, value, lease) = (key.clone(), value.clone(), *lease);
                    let found = KeyValue {
                        key: key.clone(),
                        value,
                        create_revision,
                        mod_revision: at,
                        lease,
                    };
                    next.insert(key, found);
                }
            }
        }
        self.replace(next);
        Ok(TxnOutcome::Done(self.present().0))
    }

    fn expire(&mut self) {
        let mut due: Vec<(u64, LeaseId)> =
            self.leases.iter().map(|(id, (_, deadline))| (*deadline, *id)).collect();
        due.retain(|(deadline, _)| *deadline <= self.now);
        due.sort_unstable();
        for (_, lease) in due {
            self.end(lease);
        }
    }
}

/// Builds the transaction a step means, with conditions that are sometimes true.
fn txn_of(model: &Model, compares: &[(u8, u8)], changes: &[(u8, Option<usize>, bool)]) -> Txn {
    let present = model.present().1;
    let mut txn = Txn::new();
    for (n, kind) in compares {
        let found = present.get(&key(*n));
        let (made, changed) = found.map_or((Revision(3), Revision(3)), |found| {
            (found.create_revision, found.mod_revision)
        });
        txn = txn.when(match kind {
            0 => Compare::Absent(key(*n)),
            1 => Compare::Present(key(*n)),
            2 => Compare::ModRevision(key(*n), changed),
            _ => Compare::CreateRevision(key(*n), made),
        });
    }
    for (n, lease, puts) in changes {
        let lease = lease.map(|lease| model.lease(lease));
        let value = Bytes::from(txn.changes.len().to_string());
        txn = txn.then(if *puts {
            Op::Put { key: key(*n), value, lease }
        } else {
            Op::Delete(key(*n))
        });
    }
    txn
}

fn twice(txn: &Txn) -> bool {
    let keys: BTreeSet<&Key> = txn.changes.iter().map(Op::key).collect();
    keys.len() < txn.changes.len()
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn apply(state: &mut State, model: &mut Model, step: Step) -> Result<(), TestCaseError> {
    let now = seconds(model.now);
    match step {
        Step::Txn { compares, changes } => {
            let txn = txn_of(model, &compares, &changes);
            let answer = state.txn(&txn);
            if twice(&txn) {
                prop_assert!(matches!(answer, Err(StoreError::Refused(_))));
                return Ok(());
            }
            match (answer, model.txn(&txn)) {
                (Ok(outcome), Ok(expected)) => prop_assert_eq!(outcome, expected),
                (Err(StoreError::LeaseGone(_)), Err(_)) => {}
                (answer, expected) => prop_assert!(false, "{answer:?}, expected {expected:?}"),
            }
        }
        Step::Grant(ttl) => {
            let lease = state.grant(now, seconds(ttl));
            prop_assert!(!model.granted.contains(&lease));
            model.granted.push(lease);
            model.leases.insert(lease, (ttl, model.now + ttl));
        }
        Step::KeepAlive(n) => {
            let lease = model.lease(n);
            let alive = model.leases.get_mut(&lease);
            prop_assert_eq!(state.keep_alive(now, lease).is_ok(), alive.is_some());
            if let Some((ttl, deadline)) = alive {
                *deadline = model.now + *ttl;
            }
        }
        Step::Revoke(n) => {
            let lease = model.lease(n);
            let known = model.leases.contains_key(&lease);
            prop_assert_eq!(state.revoke(lease).is_ok(), known);
            if known {
                model.end(lease);
            }
        }
        Step::Pass(time) => {
            model.now += time;
            model.expire();
            state.expire(seconds(model.now));
        }
        Step::Compact(back) => state.compact(Revision(model.present().0.0 - back)),
    }
    Ok(())
}

fn page(state: &State, at: Revision) -> Result<Snapshot, StoreError> {
    let request =
        RangeRequest { prefix: Key(Bytes::from("k/")), after: None, limit: 2, at: Some(at) };
    let mut found = Snapshot::new();
    let mut request = request;
    loop {
        let page = state.data().range(&request)?;
        found.extend(page.items.into_iter().map(|item| (item.key.clone(), item)));
        if !page.more {
            return Ok(found);
        }
        request.after = found.last_key_value().map(|(key, _)| key.clone());
    }
}

fn limits() -> HistoryLimits {
    HistoryLimits { revisions_max: 8, bytes_max: 1 << 20 }
}

proptest! {
    #[test]
    fn every_step_does_what_the_naive_model_does(steps in prop::collection::vec(step(), 1..60)) {
        let mut state = State::new(Data::new(limits()), 1).recording();
        let mut model = Model::default();
        model.snapshots.insert(FIRST_REVISION, Snapshot::new());
        let mut told = FIRST_REVISION;
        for step in steps {
            apply(&mut state, &mut model, step)?;
            let (revision, present) = model.present();
            prop_assert_eq!(state.data().revision(), revision);
            prop_assert_eq!(state.data().keys(), &present);
            // Revisions are dense, and each is handed out once to be made durable.
            for applied in state.take_fresh() {
                prop_assert_eq!(applied.revision.0, told.0 + 1);
                told = applied.revision;
            }
            prop_assert_eq!(told, revision);
            let deadline = model.leases.values().map(|(_, deadline)| seconds(*deadline)).min();
            prop_assert_eq!(state.next_deadline(), deadline);
        }
        let compacted = state.data().compacted();
        let (last, present) = model.present();
        for (at, snapshot) in &model.snapshots {
            match page(&state, *at) {
                Ok(found) => prop_assert!(*at >= compacted && found == *snapshot, "at {at:?}"),
                Err(StoreError::Compacted(_)) => prop_assert!(*at < compacted),
                Err(other) => prop_assert!(false, "{other}"),
            }
            // Changes from `at + 1` on turn the snapshot at `at` into the present.
            match state.data().changes(&Key(Bytes::from("k/")), Revision(at.0 + 1)) {
                Err(WatchError::Compacted(_)) => prop_assert!(*at < compacted),
                Err(WatchError::Lost) => prop_assert!(false),
                Ok((changes, next)) => {
                    let mut replayed = snapshot.clone();
                    for change in changes {
                        match change {
                            Change::Put(found) => drop(replayed.insert(found.key.clone(), found)),
                            Change::Deleted { key, .. } => {
                                prop_assert!(replayed.remove(&key).is_some());
                            }
                        }
                    }
                    prop_assert_eq!(&replayed, &present);
                    prop_assert_eq!(next.0, last.0 + 1);
                }
            }
        }
    }

    #[test]
    fn dropping_all_leases_takes_one_revision_and_all_leased_keys(
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let mut state = State::new(Data::new(limits()), 1);
        let mut model = Model::default();
        model.snapshots.insert(FIRST_REVISION, Snapshot::new());
        for step in steps {
            apply(&mut state, &mut model, step)?;
        }
        let (revision, mut rest) = model.present();
        let before = rest.len();
        rest.retain(|_, found| found.lease.is_none());
        state.drop_leases();
        prop_assert_eq!(state.data().keys(), &rest);
        let moved = i64::from(before != rest.len());
        prop_assert_eq!(state.data().revision().0, revision.0 + moved);
        prop_assert_eq!(state.next_deadline(), None);
    }
}

#[test]
fn history_is_bounded_by_bytes_as_well() {
    let limits = HistoryLimits { revisions_max: 1_000, bytes_max: 10_000 };
    let mut state = State::new(Data::new(limits), 1);
    for _ in 0..20 {
        let put = Op::put(key(0), vec![0u8; 3_000]);
        state.txn(&Txn::new().then(put)).expect("put");
    }
    assert_eq!(state.data().revision(), Revision(21));
    assert_eq!(state.data().compacted(), Revision(18));
}

#[test]
fn a_lease_past_its_deadline_is_gone_before_anybody_swept_it() {
    let mut state = State::new(Data::new(limits()), 1);
    let lease = state.grant(seconds(0), seconds(5));
    state.keep_alive(seconds(4), lease).expect("alive");
    state.keep_alive(seconds(8), lease).expect("renewed to its full length");
    assert!(matches!(state.keep_alive(seconds(13), lease), Err(StoreError::LeaseGone(_))));
}

#[test]
fn leases_that_are_due_together_end_in_the_order_of_their_deadlines() {
    let mut state = State::new(Data::new(limits()), 1).recording();
    let long = state.grant(seconds(0), seconds(9));
    let short = state.grant(seconds(0), seconds(5));
    let put = |n, lease| Op::Put { key: key(n), value: Bytes::new(), lease: Some(lease) };
    state.txn(&Txn::new().then(put(0, long)).then(put(1, short))).expect("put");
    drop(state.take_fresh());
    state.expire(seconds(20));
    let ended = state.take_fresh();
    let keys: Vec<&Key> = ended.iter().map(|applied| &applied.events[0].key).collect();
    assert_eq!(keys, [&key(1), &key(0)]);
}
