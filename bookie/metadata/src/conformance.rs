//! One exam for every form of the store. A form that passes fits what the rest of Geminga expects; etcd is the measure.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::future::BoxFuture;

use crate::{
    Change, Compare, Key, LeaseId, Op, Page, RangeRequest, Revision, SharedStore, StoreError,
    TXN_BYTES_MAX, TXN_OPS_MAX, Txn, TxnOutcome, Watch, WatchError,
};

/// Length of the leases that [`Examinee::run_out`] is asked to end.
pub const EXAM_LEASE_TTL: Duration = Duration::from_secs(5);

/// What the exam needs to make happen, besides what the trait offers.
pub trait Examinee: Send + Sync {
    /// A store without any key below `exam/`; called once for each question.
    fn store(&self) -> BoxFuture<'_, SharedStore>;

    /// Lets a lease of this store run out, and returns when it has: by waiting, or by a hook.
    fn run_out<'a>(&'a self, store: &'a SharedStore, lease: LeaseId) -> BoxFuture<'a, ()>;

    /// Makes the store forget its history up to this revision; false if it cannot be made to.
    fn compact<'a>(&'a self, store: &'a SharedStore, revision: Revision) -> BoxFuture<'a, bool>;
}

/// Asks every question.
///
/// # Panics
/// With the first wrong answer.
pub async fn exam(examinee: &dyn Examinee) {
    conditions(&examinee.store().await).await;
    revisions(&examinee.store().await).await;
    atomicity(&examinee.store().await).await;
    limits(&examinee.store().await).await;
    paging(&examinee.store().await).await;
    watching(&examinee.store().await).await;
    waiting(&examinee.store().await).await;
    leases(examinee, &examinee.store().await).await;
    leased_keys_move(&examinee.store().await).await;
    compaction(examinee, &examinee.store().await).await;
    racing(&examinee.store().await).await;
}

fn key(name: &str) -> Key {
    Key(Bytes::from(format!("exam/{name}")))
}

async fn done(store: &SharedStore, txn: Txn) -> Revision {
    match store.txn(txn).await.expect("the transaction is answered") {
        TxnOutcome::Done(revision) => revision,
        conflict @ TxnOutcome::Conflict { .. } => panic!("expected success, got {conflict:?}"),
    }
}

async fn put(store: &SharedStore, name: &str, value: &str) -> Revision {
    done(store, Txn::new().then(Op::put(key(name), value.to_owned()))).await
}

async fn value(store: &SharedStore, name: &str) -> Option<String> {
    let (_, found) = store.get(&key(name)).await.expect("the read is answered");
    found.map(|found| String::from_utf8_lossy(&found.value).into_owned())
}

async fn conflicts(store: &SharedStore, compare: Compare) -> bool {
    let txn = Txn::new().when(compare).then(Op::put(key("probe"), "changed"));
    let before = store.get(&key("probe")).await.expect("read").1;
    match store.txn(txn).await.expect("answered") {
        TxnOutcome::Done(_) => false,
        TxnOutcome::Conflict { .. } => {
            let after = store.get(&key("probe")).await.expect("read").1;
            assert_eq!(before, after, "a conflict changed something");
            true
        }
    }
}

/// Every condition, true and false, on keys that are there, were never there, and are gone.
async fn conditions(store: &SharedStore) {
    let created = put(store, "a", "1").await;
    let changed = put(store, "a", "2").await;
    assert!(created < changed);
    put(store, "gone", "x").await;
    done(store, Txn::new().then(Op::Delete(key("gone")))).await;
    for missing in ["never", "gone"] {
        let missing = key(missing);
        assert!(!conflicts(store, Compare::Absent(missing.clone())).await);
        assert!(conflicts(store, Compare::Present(missing.clone())).await);
        assert!(conflicts(store, Compare::ModRevision(missing.clone(), changed)).await);
        assert!(conflicts(store, Compare::CreateRevision(missing.clone(), changed)).await);
    }
    let there = key("a");
    assert!(conflicts(store, Compare::Absent(there.clone())).await);
    assert!(!conflicts(store, Compare::Present(there.clone())).await);
    assert!(!conflicts(store, Compare::ModRevision(there.clone(), changed)).await);
    assert!(conflicts(store, Compare::ModRevision(there.clone(), created)).await);
    assert!(!conflicts(store, Compare::CreateRevision(there.clone(), created)).await);
    assert!(conflicts(store, Compare::CreateRevision(there.clone(), changed)).await);

    let conflict = Txn::new()
        .when(Compare::Present(key("never")))
        .when(Compare::Absent(key("a")))
        .when(Compare::Absent(key("gone")));
    let outcome = store.txn(conflict).await.expect("answered");
    let TxnOutcome::Conflict { revision, found } = outcome else { panic!("{outcome:?}") };
    assert!(revision >= changed);
    assert_eq!(found.len(), 3);
    assert!(found[0].is_none() && found[2].is_none(), "found values come in order");
    assert_eq!(found[1].as_ref().map(|found| found.value.clone()), Some(Bytes::from("2")));
}

/// What counts as a change, and what the revisions of a key say.
async fn revisions(store: &SharedStore) {
    let first = put(store, "a", "1").await;
    let second = put(store, "a", "1").await;
    assert_eq!(second.0, first.0 + 1, "an equal value is a change");
    let (now, found) = store.get(&key("a")).await.expect("read");
    let found = found.expect("present");
    assert_eq!((found.create_revision, found.mod_revision), (first, second));
    assert_eq!(now, second);
    let nothing = done(store, Txn::new().then(Op::Delete(key("never")))).await;
    assert_eq!(nothing, second, "deleting what is absent is no change");
    let nothing = done(store, Txn::new().when(Compare::Present(key("a")))).await;
    assert_eq!(nothing, second, "no changes, no revision");
    let deleted = done(store, Txn::new().then(Op::Delete(key("a")))).await;
    assert_eq!(deleted.0, second.0 + 1);
    assert_eq!(value(store, "a").await, None);
    let again = put(store, "a", "2").await;
    let (_, found) = store.get(&key("a")).await.expect("read");
    assert_eq!(found.expect("present").create_revision, again, "a new life of the key");
}

/// All or nothing, at one revision; reads of several keys at one revision.
async fn atomicity(store: &SharedStore) {
    put(store, "old", "x").await;
    let txn = Txn::new()
        .when(Compare::Absent(key("b")))
        .then(Op::put(key("b"), "1"))
        .then(Op::put(key("c"), "2"))
        .then(Op::Delete(key("old")));
    let revision = done(store, txn.clone()).await;
    let wanted = [key("c"), key("old"), key("b"), key("never")];
    let (now, found) = store.get_many(&wanted).await.expect("read");
    assert_eq!(now, revision);
    let revisions: Vec<Option<Revision>> =
        found.iter().map(|found| found.as_ref().map(|found| found.mod_revision)).collect();
    assert_eq!(revisions, [Some(revision), None, Some(revision), None]);
    let outcome = store.txn(txn).await.expect("answered");
    assert!(matches!(outcome, TxnOutcome::Conflict { revision: at, .. } if at == revision));
}

async fn refused(store: &SharedStore, txn: Txn) {
    let before = store.get(&key("a")).await.expect("read");
    let answer = store.txn(txn).await;
    assert!(matches!(answer, Err(StoreError::Refused(_))), "{answer:?}");
    assert_eq!(store.get(&key("a")).await.expect("read"), before, "a refusal changed something");
}

/// What every form refuses, and what it takes at the very limit.
async fn limits(store: &SharedStore) {
    put(store, "a", "1").await;
    refused(store, Txn::new().then(Op::put(key("a"), "2")).then(Op::put(key("a"), "3"))).await;
    refused(store, Txn::new().then(Op::put(key("a"), "2")).then(Op::Delete(key("a")))).await;
    let many = |count: usize| {
        (0..count).fold(Txn::new(), |txn, n| txn.then(Op::put(key(&format!("many/{n}")), "x")))
    };
    done(store, many(TXN_OPS_MAX)).await;
    refused(store, many(TXN_OPS_MAX + 1)).await;
    let compares = |count: usize| {
        (0..count).fold(Txn::new(), |txn, n| txn.when(Compare::Absent(key(&format!("no/{n}")))))
    };
    done(store, compares(TXN_OPS_MAX)).await;
    refused(store, compares(TXN_OPS_MAX + 1)).await;
    let big = |bytes: usize| Txn::new().then(Op::put(key("big"), vec![7u8; bytes]));
    done(store, big(TXN_BYTES_MAX - key("big").0.len())).await;
    refused(store, big(TXN_BYTES_MAX - key("big").0.len() + 1)).await;
    let keys: Vec<Key> = (0..=TXN_OPS_MAX).map(|n| key(&format!("many/{n}"))).collect();
    assert!(store.get_many(&keys[..TXN_OPS_MAX]).await.is_ok());
    assert!(matches!(store.get_many(&keys).await, Err(StoreError::Refused(_))));
}

async fn page(
    store: &SharedStore,
    after: Option<Key>,
    limit: usize,
    at: Option<Revision>,
) -> Result<Page, StoreError> {
    store.range(RangeRequest { prefix: key("p/"), after, limit, at }).await
}

fn names(page: &Page) -> Vec<String> {
    let text = |key: &Key| String::from_utf8_lossy(&key.0).replace("exam/p/", "");
    page.items.iter().map(|found| text(&found.key)).collect()
}

/// A scan of several pages at one revision, while keys come, change and go.
async fn paging(store: &SharedStore) {
    for name in ["p/a", "p/b", "p/c", "p/d", "p/e", "q/x", "o/x"] {
        put(store, name, "old").await;
    }
    let first = page(store, None, 2, None).await.expect("page");
    assert_eq!((names(&first), first.more), (vec!["a".to_owned(), "b".to_owned()], true));
    let at = first.revision;
    put(store, "p/bb", "new").await;
    put(store, "p/c", "new").await;
    put(store, "p/c", "newer").await;
    done(store, Txn::new().then(Op::Delete(key("p/d")))).await;
    done(store, Txn::new().then(Op::Delete(key("p/e")))).await;
    put(store, "p/e", "reborn").await;
    put(store, "p/f", "new").await;
    let last = first.items.last().map(|found| found.key.clone());
    let second = page(store, last.clone(), 2, Some(at)).await.expect("page");
    assert_eq!((names(&second), second.more), (vec!["c".to_owned(), "d".to_owned()], true));
    assert_eq!(second.revision, at);
    assert!(second.items.iter().all(|found| found.value == "old"));
    let next = second.items.last().map(|found| found.key.clone());
    let third = page(store, next, 2, Some(at)).await.expect("page");
    assert_eq!((names(&third), third.more), (vec!["e".to_owned()], false));
    assert_eq!(third.items[0].value, "old");
    let now = page(store, None, 0, None).await.expect("page");
    assert_eq!(names(&now), ["a", "b", "bb", "c", "e", "f"]);
    assert!(!now.more);
    let exact = page(store, None, 6, None).await.expect("page");
    assert!(!exact.more, "the last key is the last");
    let empty = page(store, Some(key("p/zz")), 2, None).await.expect("page");
    assert!(empty.items.is_empty() && !empty.more);
    let future = Revision(now.revision.0 + 1_000);
    assert!(matches!(page(store, None, 2, Some(future)).await, Err(StoreError::Refused(_))));
}

/// Collects changes until there are `count`.
async fn collect(watch: &mut dyn Watch, count: usize) -> Vec<Change> {
    let mut changes = Vec::new();
    while changes.len() < count {
        changes.extend(watch.next().await.expect("the watch goes on"));
    }
    assert_eq!(changes.len(), count, "{changes:?}");
    changes
}

fn describe(change: &Change) -> String {
    match change {
        Change::Put(found) => {
            format!("{}={}@{}", found.key, found.value.escape_ascii(), found.mod_revision.0)
        }
        Change::Deleted { key, revision } => format!("{key}-@{}", revision.0),
    }
}

/// Replay from a revision, in order, none left out, nothing from elsewhere; then what comes live.
async fn watching(store: &SharedStore) {
    put(store, "w/before", "x").await;
    let a = put(store, "w/a", "1").await;
    put(store, "elsewhere", "x").await;
    let both =
        done(store, Txn::new().then(Op::put(key("w/b"), "2")).then(Op::Delete(key("w/a")))).await;
    let mut watch = store.watch(&key("w/"), a).await.expect("watch");
    let mut late = store.watch(&key("w/"), Revision(both.0 + 1)).await.expect("watch");
    let mut replayed: Vec<String> = collect(&mut *watch, 3).await.iter().map(describe).collect();
    replayed[1..].sort(); // within one revision the order is free
    let expected = [
        format!("exam/w/a=1@{}", a.0),
        format!("exam/w/a-@{}", both.0),
        format!("exam/w/b=2@{}", both.0),
    ];
    assert_eq!(replayed, expected);
    let mut live = Vec::new();
    for n in 0..20 {
        let revision = put(store, "w/live", &n.to_string()).await;
        live.push(format!("exam/w/live={n}@{}", revision.0));
    }
    for watch in [&mut watch, &mut late] {
        let seen: Vec<String> = collect(&mut **watch, 20).await.iter().map(describe).collect();
        assert_eq!(seen, live);
    }
}

/// A watch waits, may be dropped while it waits, and wakes for a change.
async fn waiting(store: &SharedStore) {
    let start = put(store, "w/a", "1").await;
    let mut watch = store.watch(&key("w/"), Revision(start.0 + 1)).await.expect("watch");
    let early = tokio::select! {
        biased;
        changes = watch.next() => Some(changes),
        () = tokio::task::yield_now() => None,
    };
    assert!(early.is_none(), "nothing has changed yet: {early:?}");
    let (changes, revision) = tokio::join!(collect(&mut *watch, 1), async {
        tokio::task::yield_now().await;
        put(store, "w/b", "2").await
    });
    assert_eq!(describe(&changes[0]), format!("exam/w/b=2@{}", revision.0));
}

fn leased(name: &str, lease: LeaseId) -> Op {
    Op::Put { key: key(name), value: Bytes::from("x"), lease: Some(lease) }
}

/// Keys live and die with their lease, in one revision, and watches see it.
async fn leases(examinee: &dyn Examinee, store: &SharedStore) {
    for by_time in [true, false] {
        let lease = store.grant_lease(EXAM_LEASE_TTL).await.expect("granted");
        let other = store.grant_lease(Duration::from_secs(600)).await.expect("granted");
        assert_ne!(lease, other);
        let txn = Txn::new()
            .then(leased("l/a", lease))
            .then(leased("l/b", lease))
            .then(leased("l/other", other))
            .then(Op::put(key("l/free"), "x"));
        let made = done(store, txn).await;
        let (_, found) = store.get(&key("l/a")).await.expect("read");
        assert_eq!(found.and_then(|found| found.lease), Some(lease));
        store.keep_alive(lease).await.expect("alive");
        let mut watch = store.watch(&key("l/"), Revision(made.0 + 1)).await.expect("watch");
        if by_time {
            examinee.run_out(store, lease).await;
        } else {
            store.revoke_lease(lease).await.expect("revoked");
        }
        let mut gone: Vec<String> = collect(&mut *watch, 2).await.iter().map(describe).collect();
        gone.sort();
        let at = made.0 + 1;
        assert_eq!(gone, [format!("exam/l/a-@{at}"), format!("exam/l/b-@{at}")]);
        assert_eq!(value(store, "l/a").await, None);
        assert!(value(store, "l/other").await.is_some() && value(store, "l/free").await.is_some());
        let is_gone = |error: StoreError| matches!(error, StoreError::LeaseGone(id) if id == lease);
        assert!(is_gone(store.keep_alive(lease).await.expect_err("gone")));
        assert!(is_gone(store.revoke_lease(lease).await.expect_err("gone")));
        let txn = Txn::new().then(Op::put(key("l/free"), "y")).then(leased("l/a", lease));
        assert!(is_gone(store.txn(txn).await.expect_err("gone")));
        assert_eq!(value(store, "l/free").await.as_deref(), Some("x"), "nothing happened");
        let late = Txn::new().when(Compare::Present(key("l/a"))).then(leased("l/a", lease));
        let outcome = store.txn(late).await.expect("conditions are looked at first");
        assert!(matches!(outcome, TxnOutcome::Conflict { .. }));
    }
}

/// A key belongs to the lease of its last put.
async fn leased_keys_move(store: &SharedStore) {
    let first = store.grant_lease(Duration::from_secs(600)).await.expect("granted");
    let second = store.grant_lease(Duration::from_secs(600)).await.expect("granted");
    let txn = Txn::new().then(leased("l/moved", first)).then(leased("l/freed", first));
    done(store, txn).await;
    done(store, Txn::new().then(leased("l/moved", second))).await;
    let freed = put(store, "l/freed", "x").await;
    store.revoke_lease(first).await.expect("revoked");
    let (now, _) = store.get(&key("l/moved")).await.expect("read");
    assert_eq!(now, freed, "a lease without keys ends without a revision");
    assert!(value(store, "l/moved").await.is_some() && value(store, "l/freed").await.is_some());
    store.revoke_lease(second).await.expect("revoked");
    assert!(value(store, "l/moved").await.is_none() && value(store, "l/freed").await.is_some());
}

/// After compaction, the past is told to be gone, and the present is as before.
async fn compaction(examinee: &dyn Examinee, store: &SharedStore) {
    let first = put(store, "p/a", "1").await;
    for n in 0..5 {
        put(store, "p/a", &n.to_string()).await;
    }
    let (now, _) = store.get(&key("p/a")).await.expect("read");
    let mut stale = store.watch(&key("p/"), first).await.expect("watch");
    if !examinee.compact(store, now).await {
        return;
    }
    let old = page(store, None, 0, Some(first)).await;
    assert!(matches!(old, Err(StoreError::Compacted(_))), "{old:?}");
    match store.watch(&key("p/"), first).await {
        Err(StoreError::Compacted(at)) => assert!(at > first),
        Err(other) => panic!("{other}"),
        // etcd tells only when the watch is asked
        Ok(mut watch) => {
            assert!(matches!(watch.next().await, Err(WatchError::Compacted(at)) if at > first));
        }
    }
    let replay = stale.next().await;
    assert!(
        replay.is_ok() || matches!(replay, Err(WatchError::Compacted(_))),
        "a watch gives the whole past or says that it is gone: {replay:?}"
    );
    if let Ok(changes) = replay {
        assert_eq!(changes.first().map(describe), Some(format!("exam/p/a=1@{}", first.0)));
    }
    let present = page(store, None, 0, Some(now)).await.expect("the present is kept");
    assert_eq!(present.items[0].value, "4");
    let mut watch = store.watch(&key("p/"), Revision(now.0 + 1)).await.expect("resumed");
    let next = put(store, "p/b", "x").await;
    assert_eq!(describe(&collect(&mut *watch, 1).await[0]), format!("exam/p/b=x@{}", next.0));
}

/// Of many who change a counter at once, each revision has one winner, and no increment is lost.
async fn racing(store: &SharedStore) {
    const RACERS: usize = 8;
    const ROUNDS: usize = 5;
    put(store, "n", "0").await;
    let racer = |store: SharedStore| async move {
        for _ in 0..ROUNDS {
            loop {
                let found = store.get(&key("n")).await.expect("read").1.expect("present");
                let text = String::from_utf8_lossy(&found.value).into_owned();
                let next = text.parse::<u64>().expect("a number") + 1;
                let txn = Txn::new()
                    .when(Compare::ModRevision(key("n"), found.mod_revision))
                    .then(Op::put(key("n"), next.to_string()));
                if matches!(store.txn(txn).await.expect("answered"), TxnOutcome::Done(_)) {
                    break;
                }
            }
        }
    };
    futures::future::join_all((0..RACERS).map(|_| racer(Arc::clone(store)))).await;
    assert_eq!(value(store, "n").await, Some((RACERS * ROUNDS).to_string()));
}
