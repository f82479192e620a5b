//! What really happened in runs: a kind of fault or of protocol step that never occurs is a hole in the simulation.

use std::collections::BTreeMap;

use super::{
    checks::Checks,
    history::{AddVerdict, Event, LedgerState, LedgerValue, Listed, ReadVerdict},
};

macro_rules! kinds {
    ($($name:ident: $text:literal,)*) => {
        /// A kind of fault, or of protocol step.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub(crate) enum Seen { $($name,)* }

        impl Seen {
            /// All of them.
            pub(crate) const ALL: &[Self] = &[$(Self::$name,)*];

            /// In words.
            pub(crate) fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

kinds! {
    // Faults of processes and disks.
    BookieKilled: "bookie killed (kill -9)",
    PowerCut: "power cut",
    UnsyncedLost: "power cut that lost unsynced bytes",
    Torn: "power cut that tore unsynced bytes",
    BookieRestarted: "bookie restarted on its disk",
    EndedByItself: "bookie ended by a failed write or sync (D3)",
    CrashPoint: "bookie ended between two durable steps",
    StartFailed: "bookie did not start at once",
    DiskWiped: "disk replaced by an empty one (D7)",
    Damage: "bit flipped or sector unreadable",
    DiskFull: "disk full",
    ClockJump: "wall clock jumped",
    ClientKilled: "client or owner killed",
    ClientPaused: "client paused and resumed",
    // Faults of the network.
    CutBoth: "link cut",
    CutAnswers: "link cut one way",
    Isolated: "client cut from all bookies",
    RequestLost: "request lost",
    AnswerLost: "answer lost",
    Repeated: "request repeated",
    Reordered: "request reordered",
    Delayed: "message delayed",
    OldAddress: "request reached a new bookie behind an old address (T7)",
    // Faults of the store.
    StoreCut: "client cut from the store",
    BookieStoreCut: "bookie cut from the store",
    StoreUnavailable: "store call refused",
    TxnUnknown: "transaction of unknown outcome",
    TxnLandedLate: "transaction landed after its caller was told unknown (T49)",
    TxnOwnNonce: "repeat of a transaction conflicted with its own earlier try (MD3)",
    // The protocol, bookies.
    FencedAdd: "plain add refused after a fence",
    FencedHeldAdd: "plain add of a held entry refused after a fence (T52)",
    ReadOnlyAdd: "add refused READ_ONLY",
    NoSpaceAdd: "add refused NO_SPACE",
    LimboAnswer: "answer from limbo (D8)",
    DamagedAnswer: "answer of a damaged copy (D9)",
    ExplicitNo: "explicit no to a recoverer",
    WrongIncarnation: "request refused for its incarnation",
    // The protocol, ledgers.
    VacantSlot: "ledger created with a vacant slot (W0)",
    VacancyFilled: "vacant slot filled by an ensemble change",
    EnsembleChanged: "ensemble change committed, fragment appended (EC3)",
    FragmentReplaced: "ensemble change committed, last fragment replaced (EC3)",
    FragmentDropped: "close dropped a fragment beyond the end (R7)",
    WriterClosed: "ledger closed by its writer",
    WriterLost: "close of a writer lost to a recovery",
    RecoveryClosed: "ledger closed by recovery",
    RecoveryPrivate: "recovery closed with a private fragment (R5)",
    RecoverySuperseded: "recovery superseded by another nonce (R1)",
    RecoveryAborted: "recovery that could not decide (R3)",
    WriteBack: "write-back to a bookie that lacked the entry (R4)",
    LacTold: "LAC told by WRITE_LAC",
    TailRead: "tail read of an Open ledger",
    ListedShort: "ledger listed as under-replicated",
    // The protocol, auto-recovery and GC.
    Unlisted: "ledger unlisted as whole again (A2)",
    SlotMoved: "slot of a closed ledger given to another bookie (A2)",
    SlotFilled: "vacant slot of a closed ledger filled by a copy (A2)",
    FinalMoved: "slot of a final fragment of an open ledger changed (A2)",
    HelperFenced: "listed ledger without an owner fenced for repair (A3)",
    LostDeclared: "incarnation declared lost (A1, D7)",
    LostForgotten: "incarnation not called lost any more (A1)",
    Vanished: "bookie lost for good",
    Drained: "bookie drained, its cookie removed (DC1)",
    LedgerDeleted: "closed ledger deleted",
    LedgerRemoved: "key of a deleted ledger removed",
    DroppedDeleted: "deleted ledger dropped by a bookie (G1)",
    DroppedMoved: "copy that moved away dropped by a bookie (G1)",
    CopyCameBack: "copy made where an earlier one was dropped (T51)",
    // The protocol, segments.
    Takeover: "segment taken over",
    TakeoverOfOpen: "segment taken over from an owner with open ledgers (TK1)",
    OwnerFenced: "owner fenced",
    OwnerClosed: "owner closed cleanly",
    PublishIndeterminate: "publish of unknown outcome",
    BatchRepeated: "batch sent again",
    Duplicate: "batch answered as duplicate",
    OutOfSequence: "batch refused out of sequence (DD5)",
    DataRoll: "data ledger rolled (M2)",
    LogRoll: "cursor-log ledger rolled",
    LogTrimmed: "superseded cursor-log ledger deleted (C4)",
    Settled: "settle confirmed",
    SettleIndeterminate: "settle of unknown outcome",
    Provisional: "claims of an owner provisional (O3)",
    PublishedProvisional: "publish acknowledged while provisional (O3)",
    SettledProvisional: "settle confirmed while provisional (O3)",
    FencedProvisional: "owner ended while provisional (O3)",
    TakenProvisional: "segment taken from an owner while provisional (O3)",
    StaleOwnerAnswered: "superseded owner still held by callers",
    // The protocol, dispatchers.
    FailuresRestored: "dispatcher began with attempts that had ended (L1)",
    LeasesRestored: "dispatcher began with leases of an earlier owner (L2, L4)",
    LeasesHandedOver: "lease table written at a clean end (L4)",
    ClaimGranted: "handle of an earlier stream counted (L4)",
    Revoked: "messages revoked",
    RejectWaits: "reject refused: as many dead letters as may wait do",
    RecordFailed: "record of a dispatcher not durable",
    DispatchQuiet: "dispatcher had nothing to do",
}

/// How often each kind was seen.
#[derive(Clone, Debug, Default)]
pub(crate) struct Coverage(BTreeMap<Seen, u64>);

impl Coverage {
    /// Once more.
    pub(crate) fn saw(&mut self, kind: Seen) {
        *self.0.entry(kind).or_default() += 1;
    }

    /// Adds another run's.
    pub(crate) fn add(&mut self, other: &Self) {
        for (kind, count) in &other.0 {
            *self.0.entry(*kind).or_default() += count;
        }
    }

    /// Kinds never seen. Settling in a store outage is not among them: runs seldom have a cursor log open by then, and whether
    /// it goes on is shown with real processes (`cargo cluster`) and in the managed ledger's own tests.
    pub(crate) fn missing(&self) -> Vec<&'static str> {
        let wanted = Seen::ALL.iter();
        wanted.filter(|kind| !self.0.contains_key(kind)).map(|kind| kind.name()).collect()
    }

    /// A line a kind.
    pub(crate) fn table(&self) -> String {
        let line = |kind: &Seen| {
            format!("{:>9} {}\n", self.0.get(kind).copied().unwrap_or(0), kind.name())
        };
        Seen::ALL.iter().map(line).collect()
    }

    /// What an event shows by itself, or with what `before` it was known.
    pub(crate) fn observe(&mut self, event: &Event, before: &Checks) {
        match event {
            Event::LedgerPut { ledger, value, .. } => {
                self.ledger_step(before.ledgers.value(*ledger), value)
            }
            Event::ListPut { segment, data, log, .. } => {
                let (old_data, old_log) = before.segments.listed(*segment);
                self.list_step(old_data, data, Seen::DataRoll);
                self.list_step(old_log, log, Seen::LogRoll);
            }
            Event::AddAnswered {
                at,
                ledger,
                entry,
                recovery: false,
                verdict: AddVerdict::Fenced,
                ..
            } => {
                self.saw(Seen::FencedAdd);
                if before.bookies.has_confirmed(*at, *ledger, *entry) {
                    self.saw(Seen::FencedHeldAdd);
                }
            }
            Event::AddAnswered {
                at,
                ledger,
                entry,
                recovery: true,
                verdict: AddVerdict::Ok,
                ..
            } if !before.bookies.has_confirmed(*at, *ledger, *entry) => {
                self.saw(Seen::WriteBack);
            }
            Event::AddAnswered { at, ledger, recovery: true, verdict: AddVerdict::Ok, .. }
                if before.copies.has_dropped(*at, *ledger) =>
            {
                self.saw(Seen::CopyCameBack);
            }
            Event::EntryAnswered { fence: true, verdict: ReadVerdict::Absent, .. } => {
                self.saw(Seen::ExplicitNo)
            }
            Event::Listing { listed: false, .. } => self.saw(Seen::Unlisted),
            Event::LostKey { there, .. } => {
                self.saw(if *there { Seen::LostDeclared } else { Seen::LostForgotten });
            }
            Event::RecoveryBegun { ledger, epoch: 0 } if before.copies.is_listed(*ledger) => {
                self.saw(Seen::HelperFenced);
            }
            Event::CookieGone { .. } => self.saw(Seen::Drained),
            Event::LedgerRemoved { .. } => self.saw(Seen::LedgerRemoved),
            Event::Dropped { ledger, .. } => {
                let deleted = |value: &LedgerValue| value.state == LedgerState::Deleted;
                let deleted = before.ledgers.value(*ledger).is_some_and(deleted);
                self.saw(if deleted { Seen::DroppedDeleted } else { Seen::DroppedMoved });
            }
            Event::WriteLacAsked { .. } => self.saw(Seen::LacTold),
            Event::Settled { .. } => self.saw(Seen::Settled),
            Event::Published { duplicate: true, .. } => self.saw(Seen::Duplicate),
            _ => {}
        }
    }

    fn list_step(&mut self, before: &[Listed], after: &[Listed], roll: Seen) {
        let last_open = |row: &[Listed]| row.last().filter(|listed| !listed.closed).copied();
        if let (Some(old), Some(new)) = (last_open(before), last_open(after)) {
            if old.ledger != new.ledger {
                self.saw(roll);
            }
            if roll == Seen::DataRoll && old == new {
                // Neither rolled nor closed, and yet changed: marked for recovery by a rival.
                self.saw(Seen::TakeoverOfOpen);
            }
        }
        if roll == Seen::LogRoll
            && before.iter().any(|old| after.iter().all(|new| new.ledger != old.ledger))
        {
            self.saw(Seen::LogTrimmed);
        }
    }

    fn ledger_step(&mut self, before: Option<&LedgerValue>, after: &LedgerValue) {
        use LedgerState as S;
        let vacant = |value: &LedgerValue| {
            value.fragments.last().is_some_and(|(_, slots)| slots.contains(&0))
        };
        let Some(before) = before else {
            if vacant(after) {
                self.saw(Seen::VacantSlot);
            }
            return;
        };
        match (before.state, after.state) {
            (S::Open | S::InRecovery, S::Open | S::InRecovery)
                if before.fragments.len() == after.fragments.len()
                    && before.fragments.last() == after.fragments.last()
                    && before.fragments != after.fragments =>
            {
                self.saw(Seen::FinalMoved);
            }
            (S::Closed { .. }, S::Closed { .. }) => {
                let vacancies = |value: &LedgerValue| {
                    let slots = value.fragments.iter().flat_map(|(_, slots)| slots);
                    slots.filter(|at| **at == 0).count()
                };
                let filled = vacancies(after) < vacancies(before);
                self.saw(if filled { Seen::SlotFilled } else { Seen::SlotMoved });
            }
            (S::Closed { .. }, S::Deleted) => self.saw(Seen::LedgerDeleted),
            (S::Open, S::Open) => {
                let replaced = before.fragments.len() == after.fragments.len();
                self.saw(if replaced { Seen::FragmentReplaced } else { Seen::EnsembleChanged });
                if vacant(before) && !vacant(after) {
                    self.saw(Seen::VacancyFilled);
                }
            }
            (S::InRecovery, S::InRecovery) => self.saw(Seen::RecoverySuperseded),
            (S::Open, S::Closed { .. }) => self.saw(Seen::WriterClosed),
            (S::InRecovery, S::Closed { .. }) => {
                self.saw(Seen::RecoveryClosed);
                if after.fragments.iter().any(|fragment| !before.fragments.contains(fragment)) {
                    self.saw(Seen::RecoveryPrivate);
                }
            }
            _ => {}
        }
        let closed =
            matches!(after.state, S::Closed { .. }) && !matches!(before.state, S::Closed { .. });
        if closed && after.fragments.len() < before.fragments.len() {
            self.saw(Seen::FragmentDropped);
        }
    }
}
