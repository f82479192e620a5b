//! The bookie-RPC seam: what a ledger client may ask of a bookie, and the three classes of answer (section 3).
//!
//! Every form (loopback in one process, remote over one ordered stream, scripted, faulty) passes the same conformance
//! suite. Rules that hold for all of them:
//! - Calls to one handle are *sent* in the order in which the methods are called: a method enqueues before it returns, and
//!   its future only waits for the answer. Dropping the future abandons the answer, not the request.
//! - Every future ends by the request's deadline, with `Unknown` at the latest. Nothing waits for ever.
//! - Only `Absent` and `Fenced` are certain knowledge; `Unknown` is never turned into either.

pub mod conformance;
pub mod directory;
pub mod faulty;
pub mod frame;
pub mod handshake;
pub mod loopback;
pub mod memory;
pub mod remote;
pub mod scripted;
pub mod serve;
mod transfer;
mod wire;
mod wire_values;

use std::{fmt, sync::Arc};

use futures::future::BoxFuture;
use geminga_proto::ids::{EntryId, Incarnation, LedgerId};
use tokio::time::Instant;

use crate::entry::Entry;

/// A pending answer.
pub type Answer<T> = BoxFuture<'static, T>;

/// Entries `first..=last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryRange {
    pub first: EntryId,
    pub last: EntryId,
}

/// Why nothing is known. For logs and metrics; a decision may only use that it is unknown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unknown {
    /// No answer within the deadline.
    Timeout,
    /// The bookie is not there, or went away before it answered.
    Disconnected,
    /// Another incarnation lives at the address.
    WrongIncarnation,
    /// The bookie is overloaded (D12).
    Busy,
    /// The ledger is in limbo there (D8).
    Limbo,
    /// The ledger was dropped there (D13), or a file of it is quarantined (D9).
    Dropped,
    /// The stored bytes fail their checksum.
    Damaged,
    /// The disk answered with an error.
    Io(String),
    /// The entry was refused: same id with other bytes, or bytes that fail their digest.
    Refused(String),
}

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Timeout => f.write_str("no answer in time"),
            Self::Disconnected => f.write_str("not connected"),
            Self::WrongIncarnation => f.write_str("another incarnation"),
            Self::Busy => f.write_str("busy"),
            Self::Limbo => f.write_str("the ledger is in limbo"),
            Self::Dropped => f.write_str("the ledger was dropped or is quarantined"),
            Self::Damaged => f.write_str("damaged on disk"),
            Self::Io(error) => write!(f, "disk error: {error}"),
            Self::Refused(why) => write!(f, "refused: {why}"),
        }
    }
}

/// ADD
#[derive(Clone, Debug)]
pub struct AddRequest {
    /// The incarnation it is meant for.
    pub to: Incarnation,
    pub entry: Entry,
    /// A recovery add passes a fence (R4).
    pub recovery: bool,
    pub deadline: Instant,
}

/// Answers to ADD.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AddAnswer {
    /// Synced (D1).
    Ok,
    /// The ledger is fenced; a plain add will never be accepted again.
    Fenced,
    /// The bookie takes no plain adds now (disk, limbo).
    ReadOnly,
    /// No room; not stored.
    NoSpace,
    /// Anything else, `Busy` and `WrongIncarnation` included.
    Unknown(Unknown),
}

/// FENCE
#[derive(Clone, Debug)]
pub struct FenceRequest {
    pub to: Incarnation,
    pub ledger: LedgerId,
    /// Also answer LIST of this range, evaluated after the fence is synced (D2).
    pub list: Option<EntryRange>,
    pub deadline: Instant,
}

/// Answers to FENCE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FenceAnswer {
    /// The flag is synced.
    Fenced {
        /// The highest LAC that any accepted entry or WRITE_LAC told this bookie.
        lac: Option<EntryId>,
        /// Present if a list was asked for.
        held: Option<EntrySet>,
    },
    Unknown(Unknown),
}

/// READ of a range. The answer may be shorter than the range, but holds at least one verdict.
#[derive(Clone, Debug)]
pub struct ReadRequest {
    pub to: Incarnation,
    pub ledger: LedgerId,
    pub range: EntryRange,
    /// Fence first (R3); the verdicts are evaluated after the flag is synced.
    pub fence: bool,
    /// Payload bytes after which the answer ends early.
    pub bytes_max: usize,
    pub deadline: Instant,
}

/// What a bookie says of one entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryAnswer {
    /// Positive. The receiver checks the digest again.
    Held(Entry),
    /// Explicit no: the bookie is certain that it never acknowledged this entry.
    Absent,
    Unknown(Unknown),
}

/// Verdicts for `range.first`, `range.first + 1`, ...
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadAnswer {
    pub entries: Vec<EntryAnswer>,
}

impl ReadAnswer {
    /// One `Unknown` for the first entry asked for.
    #[must_use]
    pub fn unknown(why: Unknown) -> Self {
        Self { entries: vec![EntryAnswer::Unknown(why)] }
    }
}

/// Answers to READ_LAC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LacAnswer {
    Known(Option<EntryId>),
    Unknown(Unknown),
}

/// Answers to LIST.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListAnswer {
    Held(EntrySet),
    Unknown(Unknown),
}

/// Entries of one ledger as sorted, disjoint, inclusive runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EntrySet {
    runs: Vec<(u64, u64)>,
}

impl EntrySet {
    /// Adds one entry; cheap when entries come in order.
    pub fn insert(&mut self, entry: EntryId) {
        let id = entry.0;
        let at = self.runs.partition_point(|run| run.1 < id);
        if self.runs.get(at).is_some_and(|run| run.0 <= id) {
            return;
        }
        let joins_left = at > 0 && self.runs[at - 1].1 + 1 == id;
        let joins_right = self.runs.get(at).is_some_and(|run| id + 1 == run.0);
        match (joins_left, joins_right) {
            (true, true) => {
                self.runs[at - 1].1 = self.runs[at].1;
                self.runs.remove(at);
            }
            (true, false) => self.runs[at - 1].1 = id,
            (false, true) => self.runs[at].0 = id,
            (false, false) => self.runs.insert(at, (id, id)),
        }
    }

    /// Appends the run `first..=last`; false, and nothing happens, unless it lies behind all others with a gap.
    #[must_use]
    pub fn push_run(&mut self, first: EntryId, last: EntryId) -> bool {
        let behind = self.runs.last().is_none_or(|run| run.1.saturating_add(1) < first.0);
        if behind && first <= last {
            self.runs.push((first.0, last.0));
        }
        behind && first <= last
    }

    /// Whether the entry is in it.
    #[must_use]
    pub fn contains(&self, entry: EntryId) -> bool {
        let at = self.runs.partition_point(|run| run.1 < entry.0);
        self.runs.get(at).is_some_and(|run| run.0 <= entry.0)
    }

    /// The inclusive runs, ascending.
    pub fn runs(&self) -> impl Iterator<Item = (EntryId, EntryId)> + '_ {
        self.runs.iter().map(|&(first, last)| (EntryId(first), EntryId(last)))
    }
}

impl FromIterator<EntryId> for EntrySet {
    fn from_iter<I: IntoIterator<Item = EntryId>>(entries: I) -> Self {
        let mut set = Self::default();
        for entry in entries {
            set.insert(entry);
        }
        set
    }
}

/// One bookie, reached somehow.
pub trait BookieRpc: Send + Sync + fmt::Debug + 'static {
    /// ADD: store one entry, durably, before `Ok`.
    fn add(&self, request: AddRequest) -> Answer<AddAnswer>;
    /// WRITE_LAC: remember in memory that entries up to `lac` are acknowledged. Best effort; refused after a fence.
    fn write_lac(&self, to: Incarnation, ledger: LedgerId, lac: EntryId) -> Answer<()>;
    /// FENCE: no plain add to this ledger is accepted any more.
    fn fence(&self, request: FenceRequest) -> Answer<FenceAnswer>;
    /// READ: entries, explicit noes, or unknown.
    fn read(&self, request: ReadRequest) -> Answer<ReadAnswer>;
    /// READ_LAC: the highest LAC told so far.
    fn read_lac(&self, to: Incarnation, ledger: LedgerId, deadline: Instant) -> Answer<LacAnswer>;
    /// LIST: which entries of the range are held and synced.
    fn list(
        &self,
        to: Incarnation,
        ledger: LedgerId,
        range: EntryRange,
        deadline: Instant,
    ) -> Answer<ListAnswer>;
}

/// Finds bookies by incarnation. A bookie that cannot be reached answers `Unknown`, through the same handle.
pub trait Bookies: Send + Sync + fmt::Debug + 'static {
    /// The handle to send to this incarnation.
    fn bookie(&self, incarnation: Incarnation) -> Arc<dyn BookieRpc>;
}

/// Shared handle to the bookies.
pub type SharedBookies = Arc<dyn Bookies>;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_entry_set_holds_exactly_what_was_inserted(ids in prop::collection::vec(0u64..60, 0..60)) {
            let expected: BTreeSet<u64> = ids.iter().copied().collect();
            let set: EntrySet = ids.into_iter().map(EntryId).collect();
            for id in 0..61 {
                prop_assert_eq!(set.contains(EntryId(id)), expected.contains(&id));
            }
            for pair in set.runs.windows(2) {
                prop_assert!(pair[0].1 + 1 < pair[1].0);
            }
        }
    }
}
