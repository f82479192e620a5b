//! I7 and I8, for every incarnation and ledger.

use std::collections::{BTreeMap, BTreeSet};

use super::{Verdict, must};
use crate::harness::history::{AddVerdict, Event, EventNumber, ReadVerdict};

/// What each incarnation ever said of each ledger.
#[derive(Default)]
pub(crate) struct BookieChecks {
    said: BTreeMap<(u32, u64), Said>,
}

#[derive(Default)]
struct Said {
    /// When it first answered a fence: event, virtual time.
    fenced: Option<(EventNumber, u64)>,
    /// Entries it said it does not hold, after the fence.
    denied: BTreeSet<u64>,
    /// Entries it confirmed, and when.
    confirmed: BTreeMap<u64, EventNumber>,
}

impl BookieChecks {
    /// Whether this incarnation ever confirmed the entry.
    pub(crate) fn has_confirmed(&self, at: u32, ledger: u64, entry: u64) -> bool {
        self.said.get(&(at, ledger)).is_some_and(|said| said.confirmed.contains_key(&entry))
    }

    pub(super) fn observe(&mut self, number: EventNumber, at_us: u64, event: &Event) -> Verdict {
        match event {
            Event::FenceAnswered { at, ledger, missing, .. } => {
                let said = self.said.entry((*at, *ledger)).or_default();
                said.fenced.get_or_insert((number, at_us));
                said.denied.extend(missing);
                Ok(())
            }
            Event::EntryAnswered { verdict: ReadVerdict::Unknown, .. } => Ok(()),
            Event::EntryAnswered { at, ledger, entry, asked, fence, verdict } => {
                let said = self.said.entry((*at, *ledger)).or_default();
                if *fence {
                    said.fenced.get_or_insert((number, at_us));
                }
                if *verdict != ReadVerdict::Absent {
                    return Ok(());
                }
                if *fence {
                    said.denied.insert(*entry);
                }
                let confirmed = said.confirmed.get(entry);
                must!(
                    "I8",
                    confirmed.is_none_or(|before| before > asked),
                    "bookie {at} denies entry {entry} of ledger {ledger}, which it confirmed in event {confirmed:?}"
                );
                Ok(())
            }
            Event::AddAnswered { at, ledger, entry, asked, recovery, verdict: AddVerdict::Ok } => {
                let said = self.said.entry((*at, *ledger)).or_default();
                said.confirmed.entry(*entry).or_insert(number);
                if *recovery {
                    return Ok(());
                }
                if let Some((fence, fenced_us)) = said.fenced {
                    // An add accepted before the fence may be answered in the same instant, never later.
                    must!(
                        "I7",
                        *asked < fence && at_us <= fenced_us,
                        "bookie {at} confirms entry {entry} of ledger {ledger} after its fence in event {fence}"
                    );
                }
                must!(
                    "I7",
                    !said.denied.contains(entry),
                    "bookie {at} confirms entry {entry} of ledger {ledger}, which it denied to a recoverer"
                );
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
