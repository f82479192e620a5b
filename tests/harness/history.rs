//! What happened in one run, as seen at the seams and by the callers: the only thing the checkers look at.
//!
//! A run's history is hashed event by event, so that two runs of one seed can be compared.

use std::{
    collections::VecDeque,
    fmt::{self, Write},
    sync::{Arc, Mutex, MutexGuard},
};

use tokio::time::Instant;

use super::{
    checks::{Checks, Violation},
    coverage::{Coverage, Seen},
};

/// More events than any sound run has: something turns in circles (I19).
const EVENTS_MAX: u64 = 300_000;
/// Events kept for the report of a failure.
const KEPT_EVENTS: usize = 120;

/// The number of an event in its history.
pub(crate) type EventNumber = u64;

/// Ledger metadata as stored, read here without the product's decoder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LedgerValue {
    pub(crate) state: LedgerState,
    pub(crate) ensemble: usize,
    pub(crate) write: usize,
    pub(crate) ack: usize,
    /// (first entry, incarnation numbers; 0 = vacant)
    pub(crate) fragments: Vec<(u64, Vec<u32>)>,
}

/// Where a ledger stands. `last` is -1 for an empty ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LedgerState {
    Open,
    InRecovery,
    Closed { last: i64, length: u64 },
    Deleted,
}

/// An entry's bytes: all of them, and the payload alone, as hashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bytes {
    pub(crate) whole: u64,
    pub(crate) payload: u64,
}

/// What a bookie said to an ADD, as far as the checkers care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AddVerdict {
    Ok,
    Fenced,
    Other,
}

/// What a bookie said of one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadVerdict {
    Held { bytes: Bytes, lac: i64 },
    Absent,
    Unknown,
}

/// An entry in the log of a segment, as an owner read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LogBatch {
    pub(crate) offset: u64,
    pub(crate) count: u64,
    pub(crate) producer: String,
    pub(crate) low: u64,
    pub(crate) high: u64,
    pub(crate) payload: u64,
}

/// A ledger in a list value: its number, and whether the list says that it is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) ledger: u64,
    pub(crate) closed: bool,
}

/// A cursor as an owner shows it: the first open offset, and the inclusive runs settled above it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CursorShown {
    pub(crate) next: u64,
    pub(crate) holes: Vec<(u64, u64)>,
}

/// One thing that happened. `at` is the incarnation that was asked or answered; `asked` the number of the asking event.
#[derive(Clone, Debug)]
#[expect(dead_code, reason = "some fields are there to be seen in a trace")]
pub(crate) enum Event {
    /// A fault, a step of the scenario, an outcome no checker needs.
    Note(String),
    /// This incarnation's disk is gone, or bytes on it were changed behind its back.
    DiskLost {
        at: u32,
    },

    LedgerPut {
        ledger: u64,
        revision: i64,
        value: LedgerValue,
    },
    LedgerRemoved {
        ledger: u64,
        revision: i64,
    },
    ListPut {
        segment: (u64, u32),
        revision: i64,
        epoch: u64,
        nonce: u64,
        data: Vec<Listed>,
        log: Vec<Listed>,
    },

    AddAsked {
        at: u32,
        ledger: u64,
        entry: u64,
        bytes: Bytes,
        lac: i64,
        recovery: bool,
    },
    AddAnswered {
        at: u32,
        ledger: u64,
        entry: u64,
        asked: EventNumber,
        recovery: bool,
        verdict: AddVerdict,
    },
    WriteLacAsked {
        at: u32,
        ledger: u64,
        lac: i64,
    },
    FenceAsked {
        at: u32,
        ledger: u64,
    },
    /// The flag is synced there. `missing` are the entries of the listed range that it says it does not hold.
    FenceAnswered {
        at: u32,
        ledger: u64,
        lac: i64,
        missing: Vec<u64>,
    },
    ReadAsked {
        at: u32,
        ledger: u64,
        first: u64,
        last: u64,
        fence: bool,
    },
    EntryAnswered {
        at: u32,
        ledger: u64,
        entry: u64,
        asked: EventNumber,
        fence: bool,
        verdict: ReadVerdict,
    },
    LacAnswered {
        at: u32,
        ledger: u64,
        lac: i64,
    },

    /// This incarnation showed that it holds these runs of entries (LIST, or FENCE with a range).
    Shown {
        at: u32,
        ledger: u64,
        runs: Vec<(u64, u64)>,
    },
    /// An inspection found that this incarnation dropped a ledger it once held entries of.
    Dropped {
        at: u32,
        ledger: u64,
    },
    /// The ledger is listed as under-replicated, or is not any more.
    Listing {
        ledger: u64,
        listed: bool,
    },
    /// The store calls this incarnation lost, or does not any more.
    LostKey {
        at: u32,
        there: bool,
    },
    /// The cookie of a bookie names this incarnation.
    CookiePut {
        bookie: String,
        at: u32,
    },
    CookieGone {
        bookie: String,
    },
    /// Somebody claims the bundle of the ledgers, or nobody does any more.
    Claim {
        there: bool,
    },
    /// Somebody is about to fence a ledger, with this epoch; 0 for helpers (R1).
    RecoveryBegun {
        ledger: u64,
        epoch: u64,
    },

    /// A caller was told that its append is safe.
    Acknowledged {
        ledger: u64,
        entry: u64,
        payload: u64,
    },
    /// A caller was told where the ledger ends.
    EndTold {
        ledger: u64,
        last: i64,
        length: u64,
    },
    /// A reader got this entry.
    ReadByCaller {
        ledger: u64,
        entry: u64,
        payload: u64,
    },

    /// A producer was told that its batch is stored.
    Published {
        segment: (u64, u32),
        epoch: u64,
        owner: u32,
        producer: String,
        high: u64,
        offset: Option<u64>,
        duplicate: bool,
        payload: u64,
    },
    /// An owner gave this batch to a reader.
    BatchRead {
        segment: (u64, u32),
        batch: LogBatch,
    },
    /// The whole log, read when all is healed.
    LogRead {
        segment: (u64, u32),
        first: u64,
        end: u64,
        batches: Vec<LogBatch>,
    },
    /// A load begins: what was confirmed until now must be seen by this owner.
    LoadBegun {
        segment: (u64, u32),
        owner: u32,
    },
    /// Everything of the producer up to `persisted` is stored, says an owner.
    ProducerOpened {
        segment: (u64, u32),
        owner: u32,
        producer: String,
        persisted: u64,
    },
    /// A cursor was made, durably.
    CursorMade {
        segment: (u64, u32),
        subscription: u64,
    },
    /// Somebody wants these offsets (inclusive) settled.
    SettleAsked {
        segment: (u64, u32),
        subscription: u64,
        first: u64,
        last: u64,
    },
    /// A settle was confirmed: these offsets (inclusive) stay settled for ever.
    Settled {
        segment: (u64, u32),
        epoch: u64,
        owner: u32,
        subscription: u64,
        asked: EventNumber,
        first: u64,
        last: u64,
        next: u64,
    },
    /// A cursor as an owner found it when it loaded; none if there is no such cursor. One that was superseded meanwhile
    /// may find anything: nothing of it can be confirmed.
    CursorSeen {
        segment: (u64, u32),
        epoch: u64,
        owner: u32,
        subscription: u64,
        shown: Option<CursorShown>,
    },

    /// What the run's subscription promises: each key in order, at most so many attempts (0: any number), nothing before its
    /// deliver-at.
    Promised {
        key_order: bool,
        attempts_max: u32,
        deliver_at: bool,
    },
    /// A dispatcher gave these messages, each with its key and deliver-at, to a consumer.
    Dispatched {
        owner: u32,
        consumer: u64,
        attempt: u32,
        now_ms: u64,
        messages: Vec<(u64, u32, u64)>,
    },
    /// These may be delivered once more with their attempt unchanged.
    GivenBack {
        offsets: Vec<u64>,
    },
    /// A consumer wants to accept a message.
    AcceptAsked {
        offset: u64,
        key: u32,
    },
    /// A dispatcher was told that these are settled.
    AcceptTold {
        owner: u32,
        offsets: Vec<u64>,
    },
    /// A dispatcher was told that the attempts of these ended: half-open runs, the next attempt, when it is due.
    FailureTold {
        owner: u32,
        items: Vec<(u64, u64, u32, u64)>,
    },
    /// The copy of a dead letter is stored.
    DeadCopied {
        owner: u32,
        number: u64,
        offset: u64,
        attempt: u32,
        rejected: bool,
    },
    /// Everything below is settled, when all is healed.
    AllDispatched {
        end: u64,
    },
}

/// The record of one run. Clones share it.
#[derive(Clone)]
pub(crate) struct History(Arc<Mutex<Inner>>);

struct Inner {
    started: Instant,
    trace: bool,
    count: u64,
    hash: Hash,
    kept: VecDeque<String>,
    checks: Checks,
    coverage: Coverage,
    violation: Option<Violation>,
}

impl fmt::Debug for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("History")
    }
}

impl History {
    /// Starts empty. With `trace` every event is printed as it comes.
    pub(crate) fn new(trace: bool) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            started: Instant::now(),
            trace,
            count: 0,
            hash: Hash::default(),
            kept: VecDeque::new(),
            checks: Checks::default(),
            coverage: Coverage::default(),
            violation: None,
        })))
    }

    /// Appends an event and lets every checker look at it.
    pub(crate) fn record(&self, event: Event) -> EventNumber {
        let mut inner = self.lock();
        let number = inner.count;
        inner.count += 1;
        let at_us = Instant::now().duration_since(inner.started).as_micros() as u64;
        let line = format!("{number:>6} {:>10.3} ms  {event:?}", at_us as f64 / 1000.0);
        inner.hash.write(line.as_bytes());
        if inner.trace {
            eprintln!("{line}");
        }
        if inner.kept.len() == KEPT_EVENTS {
            inner.kept.pop_front();
        }
        inner.kept.push_back(line);
        let Inner { checks, coverage, .. } = &mut *inner;
        coverage.observe(&event, checks);
        let verdict = checks.observe(number, at_us, &event);
        if let Err(violation) = verdict
            && inner.violation.is_none()
        {
            inner.kept.push_back(format!("       ^ {violation}"));
            if inner.trace {
                eprintln!("       ^ {violation}");
            }
            inner.violation = Some(violation);
        }
        if inner.count >= EVENTS_MAX {
            drop(inner);
            self.fail("I19", format!("{EVENTS_MAX} events, and no end"));
            panic!("what makes so many events is stopped");
        }
        number
    }

    /// Appends a remark.
    pub(crate) fn note(&self, text: impl Into<String>) {
        self.record(Event::Note(text.into()));
    }

    /// Counts a fault or a step that no event shows.
    pub(crate) fn saw(&self, kind: Seen) {
        self.lock().coverage.saw(kind);
    }

    /// Counts it if it happened; says whether it did.
    pub(crate) fn saw_if(&self, happened: bool, kind: Seen) -> bool {
        if happened {
            self.saw(kind);
        }
        happened
    }

    /// What happened, by kinds.
    pub(crate) fn coverage(&self) -> Coverage {
        self.lock().coverage.clone()
    }

    /// Reports something that is wrong by itself, such as an end that never came (I20).
    pub(crate) fn fail(&self, invariant: &'static str, what: impl Into<String>) {
        let violation = Violation::new(invariant, what);
        let mut inner = self.lock();
        if inner.violation.is_none() {
            inner.kept.push_back(format!("       ^ {violation}"));
            inner.violation = Some(violation);
        }
    }

    /// The first broken invariant.
    pub(crate) fn violation(&self) -> Option<Violation> {
        self.lock().violation.clone()
    }

    /// Number and hash of all events so far.
    pub(crate) fn fingerprint(&self) -> (u64, u64) {
        let inner = self.lock();
        (inner.count, inner.hash.0)
    }

    /// The last events, as text.
    pub(crate) fn tail(&self) -> Vec<String> {
        self.lock().kept.iter().cloned().collect()
    }

    /// Runs `look` on what the checkers know.
    pub(crate) fn with_checks<T>(&self, look: impl FnOnce(&Checks) -> T) -> T {
        look(&self.lock().checks)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("nothing panics while it holds the history")
    }
}

/// FNV-1a, 64 bits: no seed, no state outside.
#[derive(Clone, Copy)]
pub(crate) struct Hash(pub(crate) u64);

impl Default for Hash {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hash {
    /// Takes in more bytes.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// Of one piece.
    pub(crate) fn of(bytes: &[u8]) -> u64 {
        let mut hash = Self::default();
        hash.write(bytes);
        hash.0
    }
}

impl Write for Hash {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.write(text.as_bytes());
        Ok(())
    }
}
