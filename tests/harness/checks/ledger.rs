//! I1, I2, I3, I4, I6, I9 and MD4, for every ledger of the run.

use std::collections::{BTreeMap, BTreeSet};

use super::{Verdict, must};
use crate::harness::history::{AddVerdict, Bytes, Event, LedgerState, LedgerValue, ReadVerdict};

/// What is known of every ledger.
#[derive(Default)]
pub(crate) struct LedgerChecks {
    ledgers: BTreeMap<u64, Known>,
}

/// What is known of one ledger.
#[derive(Default)]
pub(crate) struct Known {
    /// As it stands in the store.
    pub(crate) value: Option<LedgerValue>,
    /// Its end, once it had one.
    pub(crate) closed: Option<(i64, u64)>,
    gone: bool,
    /// The bytes of each entry, fixed by the first time they were seen.
    frozen: BTreeMap<u64, Bytes>,
    /// Who ever confirmed which entry.
    confirmed: BTreeMap<u64, BTreeSet<u32>>,
    /// The highest entry a caller was told is safe, and the highest LAC that anyone could have read; -1 for none.
    acknowledged: i64,
    lac: i64,
    seen_any: bool,
}

impl LedgerChecks {
    /// Ledgers that are or were in the store, with what is known of them.
    pub(crate) fn all(&self) -> impl Iterator<Item = (u64, &Known)> {
        self.ledgers.iter().map(|(id, known)| (*id, known))
    }

    /// The ledger as it stands in the store.
    pub(crate) fn value(&self, ledger: u64) -> Option<&LedgerValue> {
        self.ledgers.get(&ledger)?.value.as_ref()
    }

    pub(super) fn observe(&mut self, event: &Event) -> Verdict {
        match event {
            Event::LedgerPut { ledger, value, .. } => self.of(*ledger).put(*ledger, value),
            Event::LedgerRemoved { ledger, .. } => {
                let known = self.of(*ledger);
                let deleted = matches!(&known.value, Some(v) if v.state == LedgerState::Deleted);
                must!("MD4", deleted, "ledger {ledger} was removed without being Deleted");
                known.gone = true;
                Ok(())
            }
            Event::AddAsked { ledger, entry, bytes, lac, .. } => {
                let known = self.of(*ledger);
                known.same_bytes(*ledger, *entry, *bytes)?;
                known.lac_told(*ledger, *lac)
            }
            Event::AddAnswered { at, ledger, entry, verdict: AddVerdict::Ok, .. } => {
                self.of(*ledger).confirmed.entry(*entry).or_default().insert(*at);
                Ok(())
            }
            Event::WriteLacAsked { ledger, lac, .. }
            | Event::FenceAnswered { ledger, lac, .. }
            | Event::LacAnswered { ledger, lac, .. } => self.of(*ledger).lac_told(*ledger, *lac),
            Event::EntryAnswered {
                ledger,
                entry,
                verdict: ReadVerdict::Held { bytes, lac },
                ..
            } => {
                let known = self.of(*ledger);
                known.same_bytes(*ledger, *entry, *bytes)?;
                known.lac_told(*ledger, *lac)
            }
            Event::Acknowledged { ledger, entry, payload } => {
                let known = self.of(*ledger);
                known.same_payload(*ledger, *entry, *payload)?;
                known.acknowledged = known.acknowledged.max(*entry as i64);
                known.not_cut(*ledger)?;
                known.enough_copies(*ledger, *entry)
            }
            Event::EndTold { ledger, last, length } => {
                let closed = self.of(*ledger).closed;
                must!(
                    "I2",
                    closed == Some((*last, *length)),
                    "a caller was told that ledger {ledger} ends at {last} with {length} bytes, the store has {closed:?}"
                );
                Ok(())
            }
            Event::ReadByCaller { ledger, entry, payload } => {
                let known = self.of(*ledger);
                known.same_payload(*ledger, *entry, *payload)?;
                let readable = match known.closed {
                    Some((last, _)) => *entry as i64 <= last,
                    None => *entry as i64 <= known.lac.max(known.acknowledged),
                };
                must!(
                    "I3",
                    readable,
                    "entry {entry} of ledger {ledger} was given to a reader beyond its end"
                );
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn of(&mut self, ledger: u64) -> &mut Known {
        let known = self.ledgers.entry(ledger).or_default();
        if !known.seen_any {
            known.seen_any = true;
            known.acknowledged = -1;
            known.lac = -1;
        }
        known
    }

    /// I4 on the disks as they are at the end: `held` are the verified copies found of each (ledger, entry).
    pub(crate) fn check_copies(
        &self,
        held: &BTreeMap<(u64, u64), BTreeSet<u32>>,
        lost: &BTreeSet<u32>,
    ) -> Verdict {
        for (ledger, known) in self.all() {
            let Some(value) = &known.value else { continue };
            let end = match value.state {
                LedgerState::Closed { last, .. } => last,
                LedgerState::Deleted => continue,
                LedgerState::Open | LedgerState::InRecovery => known.acknowledged.max(known.lac),
            };
            for entry in 0..=end {
                let entry = entry as u64;
                let copies = held.get(&(ledger, entry));
                let write_set = value.write_set(entry);
                let good = write_set
                    .iter()
                    .filter(|at| lost.contains(at) || copies.is_some_and(|held| held.contains(at)))
                    .count();
                must!(
                    "I4",
                    good >= value.ack,
                    "entry {entry} of ledger {ledger} lies on {copies:?} of {write_set:?} at the end (lost disks {lost:?}), {} are needed",
                    value.ack
                );
            }
        }
        Ok(())
    }
}

impl Known {
    /// Whether its key was removed.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone
    }

    /// The highest entry that must survive; -1 for none.
    pub(crate) fn promised(&self) -> i64 {
        self.acknowledged.max(self.lac)
    }

    fn put(&mut self, ledger: u64, value: &LedgerValue) -> Verdict {
        well_formed(ledger, value)?;
        must!("MD4", !self.gone, "ledger {ledger} came back after its removal");
        legal_step(ledger, self.value.as_ref(), value)?;
        if let LedgerState::Closed { last, length } = value.state {
            if let Some(before) = self.closed {
                must!(
                    "I2",
                    before == (last, length),
                    "the end of ledger {ledger} moved from {before:?} to {:?}",
                    (last, length)
                );
            }
            self.closed = Some((last, length));
        }
        self.value = Some(value.clone());
        self.not_cut(ledger)?;
        let end = match value.state {
            LedgerState::Closed { last, .. } => last,
            LedgerState::Deleted => -1,
            LedgerState::Open | LedgerState::InRecovery => self.promised(),
        };
        for entry in 0..=end {
            self.enough_copies(ledger, entry as u64)?;
        }
        Ok(())
    }

    /// I1 and I3: nothing promised lies beyond the end.
    fn not_cut(&self, ledger: u64) -> Verdict {
        let Some((last, _)) = self.closed else { return Ok(()) };
        must!(
            "I1",
            last >= self.acknowledged,
            "ledger {ledger} ends at {last}, but entry {} was acknowledged",
            self.acknowledged
        );
        must!(
            "I3",
            last >= self.lac,
            "ledger {ledger} ends at {last}, but readers could have learned the LAC {}",
            self.lac
        );
        Ok(())
    }

    fn lac_told(&mut self, ledger: u64, lac: i64) -> Verdict {
        self.lac = self.lac.max(lac);
        self.not_cut(ledger)
    }

    /// I6
    fn same_bytes(&mut self, ledger: u64, entry: u64, bytes: Bytes) -> Verdict {
        let first = *self.frozen.entry(entry).or_insert(bytes);
        must!(
            "I6",
            first == bytes,
            "entry {entry} of ledger {ledger} has the bytes {bytes:?}, it had {first:?}"
        );
        Ok(())
    }

    fn same_payload(&self, ledger: u64, entry: u64, payload: u64) -> Verdict {
        let sent = self.frozen.get(&entry).map(|bytes| bytes.payload);
        must!(
            "I6",
            sent == Some(payload),
            "the payload of entry {entry} of ledger {ledger} is {payload:x} to a caller, {sent:x?} to bookies"
        );
        Ok(())
    }

    /// I4, by what bookies said: Qa incarnations of the write set, as the metadata stands, have confirmed the entry.
    fn enough_copies(&self, ledger: u64, entry: u64) -> Verdict {
        let Some(value) = &self.value else {
            must!(
                "I4",
                false,
                "entry {entry} of ledger {ledger} was acknowledged, but the ledger is not in the store"
            );
            return Ok(());
        };
        if value.state == LedgerState::Deleted {
            return Ok(());
        }
        let none = BTreeSet::new();
        let confirmed = self.confirmed.get(&entry).unwrap_or(&none);
        let write_set = value.write_set(entry);
        let good = write_set.iter().filter(|at| confirmed.contains(at)).count();
        must!(
            "I4",
            good >= value.ack,
            "entry {entry} of ledger {ledger} was confirmed by {confirmed:?}, its write set is {write_set:?}, {} are needed",
            value.ack
        );
        Ok(())
    }
}

impl LedgerValue {
    /// The incarnations that should hold `entry`.
    pub(crate) fn write_set(&self, entry: u64) -> BTreeSet<u32> {
        let fragment = self.fragments.iter().rev().find(|fragment| fragment.0 <= entry);
        let Some((_, slots)) = fragment else { return BTreeSet::new() };
        (0..self.write)
            .map(|i| slots[(entry as usize + i) % self.ensemble])
            .filter(|at| *at != 0)
            .collect()
    }
}

/// I9
fn well_formed(ledger: u64, value: &LedgerValue) -> Verdict {
    let LedgerValue { ensemble, write, ack, fragments, .. } = value;
    must!(
        "I9",
        1 <= *ack && ack <= write && write <= ensemble,
        "ledger {ledger} has E={ensemble} Qw={write} Qa={ack}"
    );
    must!(
        "I9",
        fragments.first().is_some_and(|first| first.0 == 0),
        "ledger {ledger} does not begin at entry 0: {fragments:?}"
    );
    must!(
        "I9",
        fragments.windows(2).all(|pair| pair[0].0 < pair[1].0),
        "the fragments of ledger {ledger} do not rise: {fragments:?}"
    );
    for (first, slots) in fragments {
        must!(
            "I9",
            slots.len() == *ensemble,
            "fragment {first} of ledger {ledger} has {} slots",
            slots.len()
        );
        let named: Vec<u32> = slots.iter().copied().filter(|at| *at != 0).collect();
        let distinct: BTreeSet<u32> = named.iter().copied().collect();
        must!(
            "I9",
            named.len() == distinct.len(),
            "fragment {first} of ledger {ledger} names an incarnation twice: {slots:?}"
        );
        for start in 0..*ensemble {
            let vacant = (0..*write).filter(|i| slots[(start + i) % ensemble] == 0).count();
            must!(
                "I9",
                vacant <= write - ack,
                "fragment {first} of ledger {ledger} has too many vacant slots: {slots:?}"
            );
        }
    }
    Ok(())
}

/// MD4: the legal steps, and which fragments each may touch.
fn legal_step(ledger: u64, from: Option<&LedgerValue>, to: &LedgerValue) -> Verdict {
    use LedgerState as S;
    let Some(from) = from else {
        must!("MD4", to.state == S::Open, "ledger {ledger} was created as {:?}", to.state);
        return Ok(());
    };
    let quorums = |v: &LedgerValue| (v.ensemble, v.write, v.ack);
    must!("MD4", quorums(from) == quorums(to), "the quorums of ledger {ledger} changed");
    let fragments_may = match (from.state, to.state) {
        (S::Open, S::Open) => last_replaced_or_one_added(from, to) || final_slot_changed(from, to),
        (S::Open, S::InRecovery) => from.fragments == to.fragments,
        (S::InRecovery, S::InRecovery) => {
            from.fragments == to.fragments || final_slot_changed(from, to)
        }
        (S::Open | S::InRecovery, S::Closed { .. }) => final_ones_kept(from, to),
        (S::Closed { .. }, S::Closed { .. }) => one_slot_changed(&from.fragments, &to.fragments),
        (S::Closed { .. }, S::Deleted) => true,
        (before, after) => {
            must!("MD4", false, "ledger {ledger} went from {before:?} to {after:?}");
            false
        }
    };
    must!(
        "MD4",
        fragments_may,
        "ledger {ledger} changed its fragments from {:?} ({:?}) to {:?} ({:?})",
        from.fragments,
        from.state,
        to.fragments,
        to.state
    );
    Ok(())
}

fn last_replaced_or_one_added(from: &LedgerValue, to: &LedgerValue) -> bool {
    let (old, new) = (&from.fragments, &to.fragments);
    let earlier = old.len() - 1;
    let kept = new.len() >= old.len() && new[..earlier] == old[..earlier];
    let replaced = new.len() == old.len() && new[earlier].0 == old[earlier].0;
    let added = new.len() == old.len() + 1 && new[earlier] == old[earlier];
    kept && (replaced || added)
}

/// The replicator's step in a ledger that is not Closed (A2, A3): the last fragment is not its own.
fn final_slot_changed(from: &LedgerValue, to: &LedgerValue) -> bool {
    let last = from.fragments.len() - 1;
    to.fragments.len() == last + 1
        && from.fragments[last] == to.fragments[last]
        && one_slot_changed(&from.fragments[..last], &to.fragments[..last])
}

/// At most one slot has another holder, and nothing else is different.
fn one_slot_changed(from: &[(u64, Vec<u32>)], to: &[(u64, Vec<u32>)]) -> bool {
    let bounds = |fragments: &[(u64, Vec<u32>)]| -> Vec<(u64, usize)> {
        fragments.iter().map(|(first, slots)| (*first, slots.len())).collect()
    };
    let slots = |fragments: &[(u64, Vec<u32>)]| -> Vec<u32> {
        fragments.iter().flat_map(|(_, slots)| slots.iter().copied()).collect()
    };
    let (old, new) = (slots(from), slots(to));
    let changed: Vec<_> = old.iter().zip(&new).filter(|(old, new)| old != new).collect();
    bounds(from) == bounds(to)
        && (changed.is_empty() || matches!(changed[..], [(_, new)] if *new != 0))
}

/// All but the last fragment are final: they are kept, or dropped because they start after the end.
fn final_ones_kept(from: &LedgerValue, to: &LedgerValue) -> bool {
    let LedgerState::Closed { last, .. } = to.state else { return false };
    let none_beyond = to.fragments.iter().skip(1).all(|fragment| fragment.0 as i64 <= last);
    let finals = &from.fragments[..from.fragments.len() - 1];
    let kept = finals
        .iter()
        .enumerate()
        .filter(|(i, fragment)| *i == 0 || fragment.0 as i64 <= last)
        .all(|(i, fragment)| to.fragments.get(i) == Some(fragment));
    none_beyond && kept
}
