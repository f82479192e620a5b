//! I5, for every final fragment from the moment it is final, and what auto-recovery may not do: A3, DC1.

use std::collections::{BTreeMap, BTreeSet};

use super::{Verdict, ledger::LedgerChecks, must};
use crate::harness::history::{AddVerdict, Event, LedgerState, LedgerValue, ReadVerdict};

/// What is known of copies, listings, and who may serve.
#[derive(Default)]
pub(crate) struct CopyChecks {
    /// Which incarnations ever confirmed or showed an entry of a ledger.
    shown: BTreeMap<(u64, u64), BTreeSet<u32>>,
    listed: BTreeSet<u64>,
    lost: BTreeSet<u32>,
    cookies: BTreeMap<String, u32>,
    /// Incarnations whose cookie is gone: their volume may go, too.
    decommissioned: BTreeSet<u32>,
    /// Whether the run says who claims the bundle of its ledgers: replicators are at work.
    kept_up: bool,
    claimed: bool,
    seen: BTreeSet<u64>,
    /// Ledgers whose bundle has been claimed without a break since they were made.
    owned: BTreeSet<u64>,
    /// Who dropped what, as inspections found it.
    dropped: BTreeSet<(u32, u64)>,
}

impl CopyChecks {
    /// Whether an inspection found that the incarnation dropped the ledger.
    pub(crate) fn has_dropped(&self, at: u32, ledger: u64) -> bool {
        self.dropped.contains(&(at, ledger))
    }

    /// Who ever held anything of the ledger.
    pub(crate) fn holders(&self, ledger: u64) -> Vec<u32> {
        let entries = self.shown.range((ledger, 0)..=(ledger, u64::MAX));
        let holders: BTreeSet<u32> = entries.flat_map(|(_, who)| who.iter().copied()).collect();
        holders.into_iter().collect()
    }

    /// Whether replicators are at work, and this ledger is listed.
    pub(crate) fn is_listed(&self, ledger: u64) -> bool {
        self.kept_up && self.listed.contains(&ledger)
    }

    pub(super) fn observe(&mut self, event: &Event, ledgers: &LedgerChecks) -> Verdict {
        match event {
            Event::AddAnswered { at, ledger, entry, verdict: AddVerdict::Ok, .. }
            | Event::EntryAnswered {
                at, ledger, entry, verdict: ReadVerdict::Held { .. }, ..
            } => {
                self.shows(*at, *ledger, *entry);
                Ok(())
            }
            Event::Shown { at, ledger, runs } => {
                for entry in runs.iter().flat_map(|(first, last)| *first..=*last) {
                    self.shows(*at, *ledger, entry);
                }
                Ok(())
            }
            Event::LedgerPut { ledger, value, .. } => self.put(*ledger, value),
            Event::Listing { ledger, listed: true } => {
                self.listed.insert(*ledger);
                Ok(())
            }
            Event::Listing { ledger, listed: false } => {
                self.listed.remove(ledger);
                match ledgers.value(*ledger) {
                    Some(value) => self.listed_if_short(*ledger, value),
                    None => Ok(()),
                }
            }
            Event::LostKey { at, there: true } => {
                self.lost.insert(*at);
                Ok(())
            }
            Event::LostKey { at, there: false } => {
                self.lost.remove(at);
                Ok(())
            }
            Event::CookiePut { bookie, at } => {
                self.cookies.insert(bookie.clone(), *at);
                Ok(())
            }
            Event::CookieGone { bookie } => self.cookie_gone(bookie, ledgers),
            Event::Claim { there } => {
                self.kept_up = true;
                self.claimed = *there;
                self.owned.clear();
                Ok(())
            }
            Event::RecoveryBegun { ledger, epoch: 0 } => {
                must!(
                    "A3",
                    !self.owned.contains(ledger),
                    "a helper fences ledger {ledger}, whose bundle has been claimed all its life"
                );
                Ok(())
            }
            Event::Dropped { at, ledger } => {
                self.dropped.insert((*at, *ledger));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn shows(&mut self, at: u32, ledger: u64, entry: u64) {
        self.shown.entry((ledger, entry)).or_default().insert(at);
    }

    fn put(&mut self, ledger: u64, value: &LedgerValue) -> Verdict {
        if self.seen.insert(ledger) && self.claimed {
            self.owned.insert(ledger);
        }
        if let (false, Some(gone)) = (
            value.state == LedgerState::Deleted,
            named(value).into_iter().find(|at| self.decommissioned.contains(at)),
        ) {
            must!("DC1", false, "ledger {ledger} names {gone}, whose cookie is gone");
        }
        self.listed_if_short(ledger, value)
    }

    /// DC1: a cookie goes only when no ledger names the incarnation.
    fn cookie_gone(&mut self, bookie: &str, ledgers: &LedgerChecks) -> Verdict {
        let Some(at) = self.cookies.remove(bookie) else { return Ok(()) };
        self.decommissioned.insert(at);
        for (ledger, known) in ledgers.all() {
            let Some(value) = &known.value else { continue };
            must!(
                "DC1",
                value.state == LedgerState::Deleted || !named(value).contains(&at),
                "the cookie of {bookie} goes, and ledger {ledger} names {at}: {:?}",
                value.fragments
            );
        }
        Ok(())
    }

    /// I5
    fn listed_if_short(&self, ledger: u64, value: &LedgerValue) -> Verdict {
        if self.listed.contains(&ledger) {
            return Ok(());
        }
        for (first, end, slots) in finals(value) {
            if slots.iter().any(|at| self.lost.contains(at)) {
                continue;
            }
            for entry in first..end {
                let none = BTreeSet::new();
                let shown = self.shown.get(&(ledger, entry)).unwrap_or(&none);
                let write_set = value.write_set(entry);
                let good = write_set.intersection(shown).count();
                must!(
                    "I5",
                    good >= value.write,
                    "entry {entry} of ledger {ledger} is final in {slots:?}, was shown by {shown:?} only, and is not listed"
                );
            }
        }
        Ok(())
    }
}

fn named(value: &LedgerValue) -> BTreeSet<u32> {
    value.fragments.iter().flat_map(|(_, slots)| slots.iter().copied()).collect()
}

/// The final fragments: first entry, the entry after the last one, slots.
pub(crate) fn finals(value: &LedgerValue) -> Vec<(u64, u64, &[u32])> {
    let count = value.fragments.len();
    let (finals, end) = match value.state {
        LedgerState::Closed { last, .. } => (count, (last + 1) as u64),
        LedgerState::Open | LedgerState::InRecovery => (count - 1, 0),
        LedgerState::Deleted => (0, 0),
    };
    (0..finals)
        .map(|i| {
            let (first, slots) = &value.fragments[i];
            let end = value.fragments.get(i + 1).map_or(end, |next| next.0);
            (*first, end, slots.as_slice())
        })
        .collect()
}
