//! The history checkers: one small state machine an invariant group, none of which uses the product's code.
//!
//! - [`ledger`]: I1, I2, I3, I4, I6, I9 and the legal steps of ledger metadata (MD4)
//! - [`bookie`]: I7, I8
//! - [`copies`]: I5, and what auto-recovery may not do (A3, DC1)
//! - [`dispatch`]: I11 by key, I12 and I14 of what a dispatcher delivers
//! - [`segment`]: I10..I14, and M2: what a list value says of its ledgers
//!
//! Each looks at every event as it comes, so that a violation stands beside its cause in the trace.

mod bookie;
mod copies;
mod dispatch;
mod ledger;
mod segment;
#[cfg(test)]
mod tests;

use std::{collections::BTreeSet, fmt};

pub(crate) use copies::finals as copies_finals;

use super::history::{Event, EventNumber};

/// A broken invariant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Violation {
    /// Its number in the ledger protocol, such as `I1`.
    pub(crate) invariant: &'static str,
    /// What was seen.
    pub(crate) what: String,
}

impl Violation {
    /// For `invariant`.
    pub(crate) fn new(invariant: &'static str, what: impl Into<String>) -> Self {
        Self { invariant, what: what.into() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is broken: {}", self.invariant, self.what)
    }
}

/// The verdict of a checker.
pub(crate) type Verdict = Result<(), Violation>;

/// Fails with the invariant's number unless the condition holds.
macro_rules! must {
    ($invariant:literal, $holds:expr, $($what:tt)+) => {
        if !$holds {
            return Err($crate::harness::checks::Violation::new($invariant, format!($($what)+)));
        }
    };
}
pub(crate) use must;

/// All checkers of one run.
#[derive(Default)]
pub(crate) struct Checks {
    pub(crate) ledgers: ledger::LedgerChecks,
    pub(crate) bookies: bookie::BookieChecks,
    pub(crate) copies: copies::CopyChecks,
    pub(crate) segments: segment::SegmentChecks,
    dispatch: dispatch::DispatchChecks,
    /// Incarnations whose disk was lost or changed behind their back.
    pub(crate) lost: BTreeSet<u32>,
}

impl Checks {
    /// Looks at the next event; `at_us` is virtual time, microseconds.
    pub(crate) fn observe(&mut self, number: EventNumber, at_us: u64, event: &Event) -> Verdict {
        if let Event::DiskLost { at } = event {
            self.lost.insert(*at);
        }
        self.ledgers.observe(event)?;
        self.bookies.observe(number, at_us, event)?;
        self.copies.observe(event, &self.ledgers)?;
        self.dispatch.observe(event)?;
        self.segments.observe(number, event, &self.ledgers)
    }
}
