//! A small correct bookie in memory, for tests of everything above the seam. What it accepts counts as synced at once.

use std::{collections::BTreeMap, sync::Arc};

use futures::{FutureExt, future::ready};
use geminga_proto::ids::{EntryId, Incarnation, LedgerId};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::{
    AddAnswer, AddRequest, Answer, BookieRpc, EntryAnswer, EntryRange, EntrySet, FenceAnswer,
    FenceRequest, LacAnswer, ListAnswer, ReadAnswer, ReadRequest, Unknown,
};
use crate::entry::Entry;

/// How it treats plain adds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AddMode {
    /// Takes them.
    #[default]
    Writable,
    /// Answers `ReadOnly`.
    ReadOnly,
    /// Answers `NoSpace`.
    NoSpace,
    /// Answers `Unknown(Busy)`.
    Busy,
}

/// The bookie; clones are handles to the same one. To kill it, detach it from its `Loopback`; to restart it, attach it again.
#[derive(Clone, Debug)]
pub struct MemoryBookie {
    incarnation: Incarnation,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    ledgers: BTreeMap<LedgerId, Ledger>,
    mode: AddMode,
}

#[derive(Debug, Default)]
struct Ledger {
    fenced: bool,
    limbo: bool,
    /// In memory only, as WRITE_LAC is; entries carry theirs.
    lac: Option<EntryId>,
    entries: BTreeMap<EntryId, Entry>,
}

impl MemoryBookie {
    /// An empty bookie.
    #[must_use]
    pub fn new(incarnation: Incarnation) -> Self {
        Self { incarnation, state: Arc::default() }
    }

    /// Its incarnation.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// From now on plain adds are treated so; recovery adds are always taken.
    pub fn set_mode(&self, mode: AddMode) {
        self.state.lock().mode = mode;
    }

    /// As after a crash and restart: forgets what is kept in memory only (WRITE_LAC).
    pub fn restart(&self) {
        for ledger in self.state.lock().ledgers.values_mut() {
            ledger.lac = ledger.entries.values().filter_map(|entry| entry.lac).max();
        }
    }

    /// Loses all entries silently, and knows it (D8): every ledger is fenced and in limbo.
    pub fn lose_entries(&self) {
        for ledger in self.state.lock().ledgers.values_mut() {
            ledger.entries.clear();
            ledger.lac = None;
            ledger.fenced = true;
            ledger.limbo = true;
        }
    }

    /// Flips a bit of a stored entry's payload at rest.
    pub fn damage(&self, ledger: LedgerId, entry: EntryId) {
        let mut state = self.state.lock();
        if let Some(held) = state.ledgers.get_mut(&ledger).and_then(|l| l.entries.get_mut(&entry)) {
            held.digest ^= 1;
        }
    }

    /// Loses one entry and does not know it.
    pub fn forget(&self, ledger: LedgerId, entry: EntryId) {
        if let Some(ledger) = self.state.lock().ledgers.get_mut(&ledger) {
            ledger.entries.remove(&entry);
        }
    }

    /// The stored entries of a ledger, as they are.
    #[must_use]
    pub fn held(&self, ledger: LedgerId) -> BTreeMap<EntryId, Entry> {
        self.state.lock().ledgers.get(&ledger).map(|l| l.entries.clone()).unwrap_or_default()
    }

    /// Whether the ledger is fenced here.
    #[must_use]
    pub fn is_fenced(&self, ledger: LedgerId) -> bool {
        self.state.lock().ledgers.get(&ledger).is_some_and(|l| l.fenced)
    }

    fn with<T: Send + 'static>(
        &self,
        to: Incarnation,
        unknown: fn(Unknown) -> T,
        work: impl FnOnce(&mut State) -> T,
    ) -> Answer<T> {
        if to != self.incarnation {
            return ready(unknown(Unknown::WrongIncarnation)).boxed();
        }
        ready(work(&mut self.state.lock())).boxed()
    }
}

impl State {
    fn add(&mut self, entry: Entry, recovery: bool) -> AddAnswer {
        let ledger = self.ledgers.entry(entry.ledger).or_default();
        // The fence is checked before the repeated add: a recovery add may have brought the same bytes (T52).
        if ledger.fenced && !recovery {
            return AddAnswer::Fenced;
        }
        if !recovery {
            match self.mode {
                AddMode::Writable => {}
                AddMode::ReadOnly => return AddAnswer::ReadOnly,
                AddMode::NoSpace => return AddAnswer::NoSpace,
                AddMode::Busy => return AddAnswer::Unknown(Unknown::Busy),
            }
        }
        if let Err(damage) = entry.verify() {
            return AddAnswer::Unknown(Unknown::Refused(damage.to_string()));
        }
        match ledger.entries.get(&entry.id) {
            Some(held) if held.digest == entry.digest => return AddAnswer::Ok,
            Some(held) if held.verify().is_ok() => {
                let why = format!("entry {} is held with another digest", entry.id);
                return AddAnswer::Unknown(Unknown::Refused(why));
            }
            _ => {} // absent, or the held copy fails its own digest: then it is replaced
        }
        ledger.lac = ledger.lac.max(entry.lac);
        ledger.entries.insert(entry.id, entry);
        AddAnswer::Ok
    }

    fn read(&mut self, request: &ReadRequest) -> ReadAnswer {
        if request.fence {
            self.ledgers.entry(request.ledger).or_default().fenced = true;
        }
        let ledger = self.ledgers.get(&request.ledger);
        let mut entries = Vec::new();
        let mut bytes = 0;
        for id in request.range.first.0..=request.range.last.0 {
            let answer = match ledger.and_then(|ledger| ledger.entries.get(&EntryId(id))) {
                Some(entry) if entry.verify().is_ok() => EntryAnswer::Held(entry.clone()),
                Some(_) => EntryAnswer::Unknown(Unknown::Damaged),
                None if ledger.is_some_and(|ledger| ledger.limbo) => {
                    EntryAnswer::Unknown(Unknown::Limbo)
                }
                None => EntryAnswer::Absent,
            };
            if let EntryAnswer::Held(entry) = &answer {
                bytes += entry.payload.len();
            }
            entries.push(answer);
            if bytes >= request.bytes_max || entries.len() >= 1_000 {
                break;
            }
        }
        ReadAnswer { entries }
    }

    fn list(&self, ledger: LedgerId, range: EntryRange) -> EntrySet {
        let Some(ledger) = self.ledgers.get(&ledger) else {
            return EntrySet::default();
        };
        let held = ledger.entries.range(range.first..=range.last);
        held.filter(|(_, entry)| entry.verify().is_ok()).map(|(id, _)| *id).collect()
    }
}

impl BookieRpc for MemoryBookie {
    fn add(&self, request: AddRequest) -> Answer<AddAnswer> {
        let AddRequest { to, entry, recovery, .. } = request;
        self.with(to, AddAnswer::Unknown, |state| state.add(entry, recovery))
    }

    fn write_lac(&self, to: Incarnation, ledger: LedgerId, lac: EntryId) -> Answer<()> {
        self.with(
            to,
            |_| (),
            |state| {
                let ledger = state.ledgers.entry(ledger).or_default();
                if !ledger.fenced {
                    ledger.lac = ledger.lac.max(Some(lac));
                }
            },
        )
    }

    fn fence(&self, request: FenceRequest) -> Answer<FenceAnswer> {
        self.with(request.to, FenceAnswer::Unknown, |state| {
            let ledger = state.ledgers.entry(request.ledger).or_default();
            ledger.fenced = true;
            let lac = ledger.lac;
            let held = request.list.map(|range| state.list(request.ledger, range));
            FenceAnswer::Fenced { lac, held }
        })
    }

    fn read(&self, request: ReadRequest) -> Answer<ReadAnswer> {
        self.with(request.to, ReadAnswer::unknown, |state| state.read(&request))
    }

    fn read_lac(&self, to: Incarnation, ledger: LedgerId, _deadline: Instant) -> Answer<LacAnswer> {
        self.with(to, LacAnswer::Unknown, |state| {
            LacAnswer::Known(state.ledgers.get(&ledger).and_then(|ledger| ledger.lac))
        })
    }

    fn list(
        &self,
        to: Incarnation,
        ledger: LedgerId,
        range: EntryRange,
        _deadline: Instant,
    ) -> Answer<ListAnswer> {
        self.with(to, ListAnswer::Unknown, |state| {
            // In limbo what is missing may have been here: no list is better than a short one.
            match state.ledgers.get(&ledger) {
                Some(found) if found.limbo => ListAnswer::Unknown(Unknown::Limbo),
                _ => ListAnswer::Held(state.list(ledger, range)),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bookie_rpc::conformance;

    #[tokio::test(start_paused = true)]
    async fn passes_the_exam_of_every_bookie() {
        conformance::exam(async || {
            let bookie = MemoryBookie::new(Incarnation(5));
            (Arc::new(bookie) as Arc<dyn BookieRpc>, Incarnation(5))
        })
        .await;
    }
}
