//! The exam that every form of bookie passes: the rules of section 3 and 9 that a ledger client relies on.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::future::join_all;
use geminga_proto::ids::{EntryId, Incarnation, LedgerId};
use tokio::time::Instant;

use super::{
    AddAnswer, AddRequest, BookieRpc, EntryAnswer, EntryRange, EntrySet, FenceAnswer, FenceRequest,
    LacAnswer, ListAnswer, ReadAnswer, ReadRequest, Unknown,
};
use crate::entry::{Entry, Payload};

const LEDGER: LedgerId = LedgerId(77);

struct Candidate {
    rpc: Arc<dyn BookieRpc>,
    me: Incarnation,
}

/// Examines the bookies that `fresh` makes: each call gives an empty, writable one and its incarnation.
///
/// # Panics
/// When a rule is broken; the message names it.
pub async fn exam<F>(fresh: F)
where
    F: AsyncFn() -> (Arc<dyn BookieRpc>, Incarnation),
{
    let next = async || {
        let (rpc, me) = fresh().await;
        Candidate { rpc, me }
    };
    adds_are_idempotent_and_read_back(next().await).await;
    other_bytes_are_refused(next().await).await;
    damaged_bytes_are_refused(next().await).await;
    the_fence_stops_plain_adds_only(next().await).await;
    a_repeated_add_is_fenced_too(next().await).await;
    a_fencing_read_fences(next().await).await;
    what_was_never_added_is_explicitly_absent(next().await).await;
    another_incarnation_is_unknown(next().await).await;
    lac_is_told_by_entries_and_write_lac(next().await).await;
    write_lac_is_refused_after_a_fence(next().await).await;
    lists_show_what_is_held(next().await).await;
    requests_are_carried_out_in_call_order(next().await).await;
    long_reads_end_early_but_say_something(next().await).await;
}

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn entry(id: u64, lac: Option<u64>, payload: &'static [u8]) -> Entry {
    let payload = Payload::from(Bytes::from_static(payload));
    Entry::seal(LEDGER, EntryId(id), lac.map(EntryId), id, payload)
}

fn ids(first: u64, last: u64) -> EntryRange {
    EntryRange { first: EntryId(first), last: EntryId(last) }
}

impl Candidate {
    fn request(&self, entry: Entry, recovery: bool) -> AddRequest {
        AddRequest { to: self.me, entry, recovery, deadline: deadline() }
    }

    async fn add(&self, entry: Entry) -> AddAnswer {
        self.rpc.add(self.request(entry, false)).await
    }

    async fn recovery_add(&self, entry: Entry) -> AddAnswer {
        self.rpc.add(self.request(entry, true)).await
    }

    async fn fence(&self, list: Option<EntryRange>) -> FenceAnswer {
        let request = FenceRequest { to: self.me, ledger: LEDGER, list, deadline: deadline() };
        self.rpc.fence(request).await
    }

    async fn read_with(
        &self,
        range: EntryRange,
        fence: bool,
        bytes_max: usize,
    ) -> Vec<EntryAnswer> {
        let (to, deadline) = (self.me, deadline());
        let request = ReadRequest { to, ledger: LEDGER, range, fence, bytes_max, deadline };
        self.rpc.read(request).await.entries
    }

    /// All verdicts of the range, however the bookie cuts its answers.
    async fn read(&self, range: EntryRange) -> Vec<EntryAnswer> {
        let mut all = Vec::new();
        while range.first.0 + (all.len() as u64) <= range.last.0 {
            let rest = ids(range.first.0 + all.len() as u64, range.last.0);
            let part = self.read_with(rest, false, usize::MAX).await;
            assert!(!part.is_empty(), "an answer holds at least one verdict");
            all.extend(part);
        }
        assert_eq!(
            all.len() as u64,
            range.last.0 - range.first.0 + 1,
            "no verdict beyond the range"
        );
        all
    }

    async fn lac(&self) -> LacAnswer {
        self.rpc.read_lac(self.me, LEDGER, deadline()).await
    }
}

async fn adds_are_idempotent_and_read_back(bookie: Candidate) {
    let one = entry(0, None, b"one");
    assert_eq!(bookie.add(one.clone()).await, AddAnswer::Ok);
    assert_eq!(bookie.add(one.clone()).await, AddAnswer::Ok, "the same add again");
    assert_eq!(bookie.recovery_add(one.clone()).await, AddAnswer::Ok, "and by a recoverer");
    assert_eq!(bookie.read(ids(0, 0)).await, [EntryAnswer::Held(one)]);
}

async fn other_bytes_are_refused(bookie: Candidate) {
    let one = entry(0, None, b"one");
    assert_eq!(bookie.add(one.clone()).await, AddAnswer::Ok);
    for other in
        [entry(0, None, b"two"), Entry::seal(LEDGER, EntryId(0), None, 9, one.payload.clone())]
    {
        for recovery in [false, true] {
            let answer = bookie.rpc.add(bookie.request(other.clone(), recovery)).await;
            assert!(matches!(answer, AddAnswer::Unknown(Unknown::Refused(_))), "T44: {answer:?}");
        }
    }
    assert_eq!(bookie.read(ids(0, 0)).await, [EntryAnswer::Held(one)], "the first bytes stand");
}

async fn damaged_bytes_are_refused(bookie: Candidate) {
    let mut damaged = entry(0, None, b"one");
    damaged.digest ^= 1;
    let answer = bookie.add(damaged).await;
    assert!(matches!(answer, AddAnswer::Unknown(_)), "a digest that does not fit: {answer:?}");
    assert_eq!(bookie.read(ids(0, 0)).await, [EntryAnswer::Absent]);
}

async fn the_fence_stops_plain_adds_only(bookie: Candidate) {
    assert_eq!(bookie.add(entry(0, None, b"a")).await, AddAnswer::Ok);
    assert!(matches!(bookie.fence(None).await, FenceAnswer::Fenced { held: None, .. }));
    assert_eq!(bookie.add(entry(1, None, b"b")).await, AddAnswer::Fenced);
    assert_eq!(bookie.read(ids(1, 1)).await, [EntryAnswer::Absent], "a fenced add leaves nothing");
    assert_eq!(bookie.recovery_add(entry(1, None, b"b")).await, AddAnswer::Ok, "R4");
    assert!(
        matches!(bookie.fence(None).await, FenceAnswer::Fenced { .. }),
        "fencing again is fine"
    );
    let other = LedgerId(LEDGER.0 + 1);
    let elsewhere = Entry::seal(other, EntryId(0), None, 0, Payload::default());
    assert_eq!(bookie.add(elsewhere).await, AddAnswer::Ok, "other ledgers go on");
}

async fn a_repeated_add_is_fenced_too(bookie: Candidate) {
    assert!(matches!(bookie.fence(None).await, FenceAnswer::Fenced { lac: None, .. }));
    let one = entry(0, None, b"one");
    assert_eq!(bookie.recovery_add(one.clone()).await, AddAnswer::Ok);
    assert_eq!(bookie.add(one).await, AddAnswer::Fenced, "T52: the fence is checked first");
}

async fn a_fencing_read_fences(bookie: Candidate) {
    assert_eq!(bookie.add(entry(0, None, b"a")).await, AddAnswer::Ok);
    let answer = bookie.read_with(ids(0, 0), true, usize::MAX).await;
    assert!(matches!(answer[..], [EntryAnswer::Held(_)]));
    assert_eq!(bookie.add(entry(1, None, b"b")).await, AddAnswer::Fenced, "D2");
}

async fn what_was_never_added_is_explicitly_absent(bookie: Candidate) {
    assert_eq!(bookie.read(ids(0, 1)).await, [EntryAnswer::Absent, EntryAnswer::Absent], "D9");
    assert_eq!(bookie.add(entry(1, None, b"b")).await, AddAnswer::Ok);
    let answers = bookie.read(ids(0, 2)).await;
    assert!(matches!(
        answers[..],
        [EntryAnswer::Absent, EntryAnswer::Held(_), EntryAnswer::Absent]
    ));
}

async fn another_incarnation_is_unknown(bookie: Candidate) {
    let wrong = Incarnation(bookie.me.0 + 1);
    let unknown = Unknown::WrongIncarnation;
    let rpc = &bookie.rpc;
    let request = AddRequest { to: wrong, ..bookie.request(entry(0, None, b"a"), false) };
    assert_eq!(rpc.add(request).await, AddAnswer::Unknown(unknown.clone()), "T7");
    let request = FenceRequest { to: wrong, ledger: LEDGER, list: None, deadline: deadline() };
    assert_eq!(rpc.fence(request).await, FenceAnswer::Unknown(unknown.clone()));
    let (range, deadline) = (ids(0, 0), deadline());
    let request =
        ReadRequest { to: wrong, ledger: LEDGER, range, fence: true, bytes_max: 1, deadline };
    assert_eq!(
        rpc.read(request).await,
        ReadAnswer::unknown(unknown.clone()),
        "never an explicit no"
    );
    let lac = rpc.read_lac(wrong, LEDGER, deadline).await;
    assert_eq!(lac, LacAnswer::Unknown(unknown.clone()));
    let list = rpc.list(wrong, LEDGER, range, deadline).await;
    assert_eq!(list, ListAnswer::Unknown(unknown));
    rpc.write_lac(wrong, LEDGER, EntryId(5)).await;
    assert_eq!(bookie.lac().await, LacAnswer::Known(None));
    assert_eq!(
        bookie.add(entry(0, None, b"a")).await,
        AddAnswer::Ok,
        "nothing of it had any effect"
    );
}

async fn lac_is_told_by_entries_and_write_lac(bookie: Candidate) {
    assert_eq!(bookie.lac().await, LacAnswer::Known(None));
    assert_eq!(bookie.add(entry(3, Some(2), b"a")).await, AddAnswer::Ok);
    assert_eq!(bookie.lac().await, LacAnswer::Known(Some(EntryId(2))));
    bookie.rpc.write_lac(bookie.me, LEDGER, EntryId(3)).await;
    assert_eq!(bookie.lac().await, LacAnswer::Known(Some(EntryId(3))));
    assert_eq!(bookie.add(entry(1, Some(0), b"b")).await, AddAnswer::Ok);
    assert_eq!(bookie.lac().await, LacAnswer::Known(Some(EntryId(3))), "it never falls");
    let FenceAnswer::Fenced { lac, .. } = bookie.fence(None).await else {
        panic!("a healthy bookie fences");
    };
    assert_eq!(lac, Some(EntryId(3)), "FENCE tells the highest LAC");
}

async fn write_lac_is_refused_after_a_fence(bookie: Candidate) {
    assert_eq!(bookie.add(entry(1, Some(0), b"a")).await, AddAnswer::Ok);
    assert!(matches!(bookie.fence(None).await, FenceAnswer::Fenced { .. }));
    bookie.rpc.write_lac(bookie.me, LEDGER, EntryId(1)).await;
    assert_eq!(bookie.lac().await, LacAnswer::Known(Some(EntryId(0))));
}

async fn lists_show_what_is_held(bookie: Candidate) {
    for id in [0, 1, 4, 9] {
        assert_eq!(bookie.add(entry(id, None, b"x")).await, AddAnswer::Ok);
    }
    let set = |ids: &[u64]| ids.iter().map(|id| EntryId(*id)).collect::<EntrySet>();
    let list = bookie.rpc.list(bookie.me, LEDGER, ids(1, 8), deadline()).await;
    assert_eq!(list, ListAnswer::Held(set(&[1, 4])));
    let empty = bookie.rpc.list(bookie.me, LedgerId(1), ids(0, 8), deadline()).await;
    assert_eq!(empty, ListAnswer::Held(EntrySet::default()));
    let open = EntryRange { first: EntryId(1), last: EntryId(i64::MAX as u64) };
    let FenceAnswer::Fenced { held, .. } = bookie.fence(Some(open)).await else {
        panic!("a healthy bookie fences");
    };
    assert_eq!(held, Some(set(&[1, 4, 9])), "FENCE answers LIST with it, however wide the range");
}

async fn requests_are_carried_out_in_call_order(bookie: Candidate) {
    let adds: Vec<_> =
        (0..50u64).map(|id| bookie.rpc.add(bookie.request(entry(id, None, b"x"), false))).collect();
    let fence = FenceRequest { to: bookie.me, ledger: LEDGER, list: None, deadline: deadline() };
    let fence = bookie.rpc.fence(fence);
    let late = bookie.rpc.add(bookie.request(entry(50, None, b"x"), false));
    // Polled in the reverse order: what counts is the order of the calls.
    assert_eq!(late.await, AddAnswer::Fenced);
    assert!(matches!(fence.await, FenceAnswer::Fenced { .. }));
    for answer in join_all(adds).await {
        assert_eq!(answer, AddAnswer::Ok, "called before the fence");
    }
}

async fn long_reads_end_early_but_say_something(bookie: Candidate) {
    for id in 0..4 {
        assert_eq!(bookie.add(entry(id, None, b"twelve bytes")).await, AddAnswer::Ok);
    }
    let answers = bookie.read_with(ids(0, 3), false, 1).await;
    assert!(matches!(answers[..], [EntryAnswer::Held(_), ..]), "at least one verdict");
    assert!(answers.len() < 4, "the byte limit ends the answer");
}
