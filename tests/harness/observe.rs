//! Wrappers at the seams that write the history: around each bookie, below the network, and around the store, below
//! its faults. What they record is what really happened, not what anyone was told.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::FutureExt;
use geminga_bookie::BookieConfig;
use geminga_bookie_client::{
    bookie_rpc::{
        AddAnswer, AddRequest, Answer, BookieRpc, EntryAnswer, EntryRange, EntrySet, FenceAnswer,
        FenceRequest, LacAnswer, ListAnswer, ReadAnswer, ReadRequest, Unknown,
    },
    entry::{Entry, encode_lac},
};
use geminga_metadata::{
    Key, KeyValue, LeaseId, MetadataStore, Op, Page, RangeRequest, Revision, SharedStore,
    StoreError, Txn, TxnOutcome, Watch, keys,
};
use geminga_proto::{
    ids::{EntryId, Incarnation, LedgerId, SegmentId, TopicId},
    storage::v1 as wire,
};
use prost::Message;
use tokio::time::Instant;

use super::{
    coverage::Seen,
    history::{
        AddVerdict, Bytes, Event, Hash, History, LedgerState, LedgerValue, Listed, ReadVerdict,
    },
    store_view::TxnBook,
};

/// The hashes of an entry.
pub(crate) fn entry_bytes(entry: &Entry) -> Bytes {
    let payload = entry.payload.to_bytes();
    let mut whole = Hash::default();
    whole.write(&entry.header());
    whole.write(&payload);
    Bytes { whole: whole.0, payload: Hash::of(&payload) }
}

/// A bookie whose every answer goes into the history.
#[derive(Debug)]
pub(crate) struct ObservedBookie {
    at: Incarnation,
    inner: Arc<dyn BookieRpc>,
    history: History,
}

impl ObservedBookie {
    /// Watches `inner`, which is the incarnation `at`.
    pub(crate) fn new(at: Incarnation, inner: Arc<dyn BookieRpc>, history: History) -> Self {
        Self { at, inner, history }
    }
}

impl BookieRpc for ObservedBookie {
    fn add(&self, request: AddRequest) -> Answer<AddAnswer> {
        let (at, ledger, entry) = (self.at.0, request.entry.ledger.0, request.entry.id.0);
        if request.to != self.at {
            self.history.saw(Seen::OldAddress);
        }
        let recovery = request.recovery;
        let asked = self.history.record(Event::AddAsked {
            at,
            ledger,
            entry,
            bytes: entry_bytes(&request.entry),
            lac: encode_lac(request.entry.lac),
            recovery,
        });
        let history = self.history.clone();
        let answer = self.inner.add(request);
        async move {
            let answer = answer.await;
            match &answer {
                AddAnswer::ReadOnly => history.saw(Seen::ReadOnlyAdd),
                AddAnswer::NoSpace => history.saw(Seen::NoSpaceAdd),
                AddAnswer::Unknown(why) => saw_unknown(&history, why),
                AddAnswer::Ok | AddAnswer::Fenced => {}
            }
            let verdict = match &answer {
                AddAnswer::Ok => AddVerdict::Ok,
                AddAnswer::Fenced => AddVerdict::Fenced,
                _ => AddVerdict::Other,
            };
            history.record(Event::AddAnswered { at, ledger, entry, asked, recovery, verdict });
            answer
        }
        .boxed()
    }

    fn write_lac(&self, to: Incarnation, ledger: LedgerId, lac: EntryId) -> Answer<()> {
        if to == self.at {
            let (ledger, lac) = (ledger.0, lac.0 as i64);
            self.history.record(Event::WriteLacAsked { at: to.0, ledger, lac });
        }
        self.inner.write_lac(to, ledger, lac)
    }

    fn fence(&self, request: FenceRequest) -> Answer<FenceAnswer> {
        let (at, ledger, list) = (self.at.0, request.ledger.0, request.list);
        self.history.record(Event::FenceAsked { at, ledger });
        let history = self.history.clone();
        let answer = self.inner.fence(request);
        async move {
            let answer = answer.await;
            if let FenceAnswer::Fenced { lac, held } = &answer {
                let missing = match (held, list) {
                    (Some(held), Some(range)) => missing(held, range),
                    _ => Vec::new(),
                };
                let lac = encode_lac(*lac);
                if let Some(held) = held {
                    history.record(Event::Shown { at, ledger, runs: runs(held) });
                }
                history.record(Event::FenceAnswered { at, ledger, lac, missing });
            }
            answer
        }
        .boxed()
    }

    fn read(&self, request: ReadRequest) -> Answer<ReadAnswer> {
        let (at, ledger, fence) = (self.at.0, request.ledger.0, request.fence);
        let (first, last) = (request.range.first.0, request.range.last.0);
        let asked = self.history.record(Event::ReadAsked { at, ledger, first, last, fence });
        let history = self.history.clone();
        let answer = self.inner.read(request);
        async move {
            let answer = answer.await;
            for (entry, verdict) in (first..).zip(&answer.entries) {
                let verdict = match verdict {
                    EntryAnswer::Held(entry) => {
                        ReadVerdict::Held { bytes: entry_bytes(entry), lac: encode_lac(entry.lac) }
                    }
                    EntryAnswer::Absent => ReadVerdict::Absent,
                    EntryAnswer::Unknown(why) => {
                        saw_unknown(&history, why);
                        ReadVerdict::Unknown
                    }
                };
                history.record(Event::EntryAnswered { at, ledger, entry, asked, fence, verdict });
            }
            answer
        }
        .boxed()
    }

    fn read_lac(&self, to: Incarnation, ledger: LedgerId, deadline: Instant) -> Answer<LacAnswer> {
        let at = self.at.0;
        let history = self.history.clone();
        let answer = self.inner.read_lac(to, ledger, deadline);
        async move {
            let answer = answer.await;
            if let LacAnswer::Known(lac) = &answer {
                let lac = encode_lac(*lac);
                history.record(Event::LacAnswered { at, ledger: ledger.0, lac });
            }
            answer
        }
        .boxed()
    }

    fn list(
        &self,
        to: Incarnation,
        ledger: LedgerId,
        range: EntryRange,
        deadline: Instant,
    ) -> Answer<ListAnswer> {
        let (at, history) = (self.at.0, self.history.clone());
        let answer = self.inner.list(to, ledger, range, deadline);
        async move {
            let answer = answer.await;
            if let ListAnswer::Held(held) = &answer {
                history.record(Event::Shown { at, ledger: ledger.0, runs: runs(held) });
            }
            answer
        }
        .boxed()
    }
}

fn runs(held: &EntrySet) -> Vec<(u64, u64)> {
    held.runs().map(|(first, last)| (first.0, last.0)).collect()
}

fn saw_unknown(history: &History, why: &Unknown) {
    match why {
        Unknown::WrongIncarnation => history.saw(Seen::WrongIncarnation),
        Unknown::Limbo => history.saw(Seen::LimboAnswer),
        Unknown::Damaged => history.saw(Seen::DamagedAnswer),
        _ => {}
    }
}

/// At most so many entries of an open-ended list are looked at.
const LISTED_MAX: u64 = 10_000;

fn missing(held: &EntrySet, range: EntryRange) -> Vec<u64> {
    let last = range.last.0.min(range.first.0.saturating_add(LISTED_MAX));
    (range.first.0..=last).filter(|entry| !held.contains(EntryId(*entry))).collect()
}

/// A store whose every transaction that happened goes into the history, in revision order.
#[derive(Debug)]
pub(crate) struct ObservedStore {
    inner: SharedStore,
    history: History,
    book: TxnBook,
}

impl ObservedStore {
    /// Watches `inner`.
    pub(crate) fn new(inner: SharedStore, history: History, book: TxnBook) -> Self {
        Self { inner, history, book }
    }

    fn happened(&self, revision: Revision, changes: &[Op]) {
        // One transaction is one step: ledgers are judged with the listings it makes, and lists, deletions of listings and
        // of cookies with the ledgers as it leaves them.
        let order = |change: &&Op| match (change, change.key().0.as_ref()) {
            (Op::Put { .. }, key) if key.starts_with(b"underreplicated/") => 0,
            (_, key) if key.starts_with(b"segments/") => 2,
            (Op::Delete(_), key) if !key.starts_with(b"ledgers/") => 3,
            _ => 1,
        };
        let mut ordered: Vec<&Op> = changes.iter().collect();
        ordered.sort_by_key(order);
        for change in ordered {
            let Ok(key) = std::str::from_utf8(&change.key().0) else { continue };
            let parts: Vec<&str> = key.split('/').collect();
            match (parts.as_slice(), change) {
                (["ledgers", id], Op::Put { value, .. }) => {
                    self.ledger_put(revision, hex(id), value)
                }
                (["ledgers", id], Op::Delete(_)) => {
                    let ledger = hex(id);
                    self.history.record(Event::LedgerRemoved { ledger, revision: revision.0 });
                }
                (["segments", topic, segment, "ledgers"], Op::Put { value, .. }) => {
                    self.list_put(revision, (hex(topic), hex(segment) as u32), value);
                }
                (["underreplicated", ledger], Op::Put { .. }) => {
                    self.history.saw(Seen::ListedShort);
                    self.history.record(Event::Listing { ledger: hex(ledger), listed: true });
                }
                (["underreplicated", ledger], Op::Delete(_)) => {
                    self.history.record(Event::Listing { ledger: hex(ledger), listed: false });
                }
                (["lost", at], change) => {
                    let there = matches!(change, Op::Put { .. });
                    self.history.record(Event::LostKey { at: hex(at) as u32, there });
                }
                (["bookies", bookie], Op::Put { value, .. }) => {
                    let at = wire::Cookie::decode(&value[..]).map_or(0, |c| c.incarnation);
                    self.history.record(Event::CookiePut { bookie: (*bookie).to_owned(), at });
                }
                (["bookies", bookie], Op::Delete(_)) => {
                    self.history.record(Event::CookieGone { bookie: (*bookie).to_owned() });
                }
                (["owners", _], change) if *change.key() == claim() => {
                    let there = matches!(change, Op::Put { .. });
                    self.history.record(Event::Claim { there });
                }
                (_, Op::Put { .. }) => self.history.note(format!("store {revision:?}: put {key}")),
                (_, Op::Delete(_)) => {
                    self.history.note(format!("store {revision:?}: delete {key}"))
                }
            }
        }
    }

    fn ledger_put(&self, revision: Revision, ledger: u64, value: &[u8]) {
        if let Ok(wire::LedgerMetadata {
            state: Some(wire::ledger_metadata::State::InRecovery(by)),
            ..
        }) = wire::LedgerMetadata::decode(value)
        {
            self.history.record(Event::RecoveryBegun { ledger, epoch: by.epoch });
        }
        let Some(value) = decode_ledger(value) else {
            self.history.fail("I9", format!("the value of ledger {ledger} cannot be decoded"));
            return;
        };
        self.history.record(Event::LedgerPut { ledger, revision: revision.0, value });
    }

    fn list_put(&self, revision: Revision, segment: (u64, u32), value: &[u8]) {
        let Ok(list) = wire::ListValue::decode(value) else {
            self.history.fail("M1", format!("the list value of {segment:?} cannot be decoded"));
            return;
        };
        let nonce = Hash::of(&list.epoch_nonce);
        let (revision, epoch) = (revision.0, list.epoch);
        let row = |entries: &[wire::LedgerEntry]| {
            let closed =
                |entry: &wire::LedgerEntry| entry.state() == wire::ledger_entry::State::Closed;
            entries
                .iter()
                .map(|entry| Listed { ledger: entry.ledger, closed: closed(entry) })
                .collect()
        };
        let (data, log) = (row(&list.data), row(&list.cursor_log));
        self.history.record(Event::ListPut { segment, revision, epoch, nonce, data, log });
    }
}

/// The claim that the replicators look at: of the bundle of the ledgers which the writers of a run make.
pub(crate) fn claim() -> Key {
    let segment = SegmentId { topic: TopicId(1), segment: 0 };
    keys::owner(segment.bundle(BookieConfig::default().bundles))
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text, 16).expect("keys carry ids as hex digits")
}

/// Reads ledger metadata without the product's checks, which would hide a bad value from I9.
pub(crate) fn decode_ledger(value: &[u8]) -> Option<LedgerValue> {
    use wire::ledger_metadata::State;
    let value = wire::LedgerMetadata::decode(value).ok()?;
    let state = match value.state? {
        State::Open(_) => LedgerState::Open,
        State::InRecovery(_) => LedgerState::InRecovery,
        State::Closed(closed) => LedgerState::Closed { last: closed.last, length: closed.length },
        State::Deleted(_) => LedgerState::Deleted,
    };
    Some(LedgerValue {
        state,
        ensemble: value.ensemble_size as usize,
        write: value.write_quorum as usize,
        ack: value.ack_quorum as usize,
        fragments: value.fragments.into_iter().map(|f| (f.first_entry, f.slots)).collect(),
    })
}

#[async_trait]
impl MetadataStore for ObservedStore {
    async fn get(&self, key: &Key) -> Result<(Revision, Option<KeyValue>), StoreError> {
        self.inner.get(key).await
    }

    async fn get_many(
        &self,
        keys: &[Key],
    ) -> Result<(Revision, Vec<Option<KeyValue>>), StoreError> {
        self.inner.get_many(keys).await
    }

    async fn range(&self, request: RangeRequest) -> Result<Page, StoreError> {
        self.inner.range(request).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        let (changes, print) = (txn.changes.clone(), TxnBook::print(&txn));
        let outcome = self.inner.txn(txn).await;
        if let Ok(TxnOutcome::Done(revision)) = &outcome {
            self.book.landed(print, &self.history);
            self.happened(*revision, &changes);
        }
        outcome
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.inner.grant_lease(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.inner.keep_alive(lease).await
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.inner.revoke_lease(lease).await
    }

    async fn watch(&self, prefix: &Key, from: Revision) -> Result<Box<dyn Watch>, StoreError> {
        self.inner.watch(prefix, from).await
    }
}
