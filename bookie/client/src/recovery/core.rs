//! The recoverer's decisions (R2..R6, R8): events in, actions out. No clock, socket or store.
//!
//! ```text
//! Fencing   FENCE ens0; every write set has cover slots fenced or vacant -> LAC0
//! Reading   e = LAC0+1, ...: a positive -> write it back; cover explicit noes -> the end; else abort, never guess
//!           reads run ahead by a window; verdicts are taken in order; write-back goes on beside them
//! Finished  the end is known and everything below it has Qa copies in the private fragments
//! ```
//! Fragments:  `[0 ..) [40 .. f-1] [f .. ens0 ..)`: below f everything is final and never looked at (T4). Reads ask ens0
//! alone; only write-back uses the private fragments, which nobody sees before the close (R5, T5).

use std::collections::{BTreeMap, BTreeSet};

use geminga_proto::ids::{EntryId, Incarnation, Slot};
use geminga_runtime::random::Random;

use crate::{
    ack_tracker::AckTracker,
    bookie_rpc::{AddAnswer, EntryAnswer, EntryRange, EntrySet, FenceAnswer, Unknown},
    ensemble::{self, Available, LedgerAge},
    entry::Entry,
    metadata::{Fragment, LedgerMetadata, Nonce, cut},
    quorum::Quorum,
};

/// What the driver is to do.
#[derive(Clone, Debug)]
pub enum Action {
    /// FENCE, with LIST from the fragment's first entry on; comes back as `on_fenced`.
    Fence { slot: Slot, to: Incarnation, list: EntryRange },
    /// READ{fence}; comes back as `on_read`.
    Read { slot: Slot, to: Incarnation, range: EntryRange },
    /// ADD{recovery}, the bytes as they were read (R4); comes back as `on_written`.
    Write { entry: Entry, slot: Slot, to: Incarnation },
    /// Read the registrations; comes back as `on_candidates`.
    Look,
}

/// Where a recovery stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Answers are awaited.
    Working,
    /// The end is known, and everything up to it has Qa copies. Late answers may still spare the listing (R8).
    Finished,
    /// Neither a positive nor cover explicit noes, or no Qa for a write-back: retry later, nothing was guessed (R3).
    Aborted(String),
}

/// What is to be published (R7, R8).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conclusion {
    pub last: Option<EntryId>,
    /// Payload bytes up to `last`, if an entry above LAC0 was read; else it has to be read from `last`.
    pub length: Option<u64>,
    /// The fragments from f on.
    pub private: Vec<Fragment>,
    /// Not every copy of every published entry from f on was shown (R8).
    pub short: bool,
}

/// What one bookie of a write set said of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Nothing,
    Held,
    No,
    Unknown,
}

#[derive(Debug)]
struct Verdict {
    by_position: Vec<Said>,
    kept: Option<Entry>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Fencing,
    Reading,
}

/// See the module's text.
#[derive(Debug)]
pub struct RecoveryCore {
    quorum: Quorum,
    metadata: LedgerMetadata,
    age: LedgerAge,
    /// (f, ens0): the last fragment as of R1's CAS.
    last: Fragment,
    window: u64,
    stage: Stage,
    fenced: Vec<bool>,
    /// Fences that were neither answered nor given up.
    fences_out: usize,
    told: Option<EntryId>,
    /// The next verdict's entry, and the next to be asked for.
    verdict_at: EntryId,
    asked_to: EntryId,
    verdicts: BTreeMap<EntryId, Verdict>,
    /// The first entry that is not in the ledger.
    end: Option<EntryId>,
    tracker: AckTracker,
    /// Entries that lack Qa copies.
    unwritten: BTreeMap<EntryId, Entry>,
    failed: Vec<bool>,
    /// Incarnations that failed in this attempt's write-back: not tried again.
    tried: BTreeSet<Incarnation>,
    writes_out: usize,
    looking: bool,
    /// Copies shown by LIST or by an answered write-back.
    shown: BTreeMap<Incarnation, EntrySet>,
    length: Option<u64>,
    aborted: Option<String>,
    actions: Vec<Action>,
}

/// An entry id no ledger reaches; ranges end here when they are to have no end.
const FAR: EntryId = EntryId(i64::MAX as u64);

impl RecoveryCore {
    /// Of a ledger as it stood when R1's CAS landed. `window`: entries read ahead, at least 1.
    #[must_use]
    pub fn new(metadata: LedgerMetadata, age: LedgerAge, window: usize) -> Self {
        let last = metadata.last_fragment().clone();
        let before = last.first_entry.0.checked_sub(1).map(EntryId);
        let mut core = Self {
            quorum: metadata.quorum,
            tracker: AckTracker::new(metadata.quorum, metadata.fragments.clone(), before),
            metadata,
            age,
            window: window.max(1) as u64,
            stage: Stage::Fencing,
            fenced: vec![false; last.slots.len()],
            fences_out: 0,
            told: before,
            verdict_at: last.first_entry,
            asked_to: last.first_entry,
            verdicts: BTreeMap::new(),
            end: None,
            unwritten: BTreeMap::new(),
            failed: vec![false; last.slots.len()],
            tried: BTreeSet::new(),
            writes_out: 0,
            looking: false,
            shown: BTreeMap::new(),
            length: None,
            aborted: None,
            actions: Vec::new(),
            last,
        };
        let list = EntryRange { first: core.last.first_entry, last: FAR };
        for (slot, to) in core.last.holders() {
            core.actions.push(Action::Fence { slot, to, list });
            core.fences_out += 1;
        }
        core
    }

    /// Takes what is to be done since the last call, in order.
    pub fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// Where it stands.
    #[must_use]
    pub fn progress(&self) -> Progress {
        match &self.aborted {
            Some(why) => Progress::Aborted(why.clone()),
            None if self.end.is_some() && self.tracker.all_confirmed() => Progress::Finished,
            None => Progress::Working,
        }
    }

    /// Whether answers are awaited that could spare the listing.
    #[must_use]
    pub fn has_stragglers(&self) -> bool {
        self.fences_out + self.writes_out > 0
    }

    /// R2. A late one still counts for R8, not for LAC0.
    pub fn on_fenced(&mut self, slot: Slot, answer: FenceAnswer) {
        self.fences_out -= 1;
        if let FenceAnswer::Fenced { lac, held } = answer {
            self.fenced[slot.0] = true;
            if let (Some(held), Some(holder)) = (held, self.last.holder(slot)) {
                self.show(holder, &held);
            }
            if self.stage == Stage::Fencing {
                self.told = self.told.max(lac);
            }
        }
        if self.stage != Stage::Fencing {
            return;
        }
        let counts = |slot: Slot| self.fenced[slot.0] || self.last.holder(slot).is_none();
        if self.quorum.every_write_set_has(self.quorum.cover(), counts) {
            self.begin_reading();
        } else if self.fences_out == 0 {
            self.abort("too few bookies could be fenced".to_owned());
        }
    }

    /// R3: what one bookie of ens0 said of `range`. Fewer verdicts than entries: the rest is asked for again.
    pub fn on_read(&mut self, slot: Slot, range: EntryRange, answers: Vec<EntryAnswer>) {
        if self.end.is_some() || self.aborted.is_some() {
            return;
        }
        let answers = if answers.is_empty() {
            vec![EntryAnswer::Unknown(Unknown::Disconnected)]
        } else {
            answers
        };
        let told = answers.len() as u64;
        let mut cut_off = false;
        for (id, answer) in (range.first.0..=range.last.0).map(EntryId).zip(answers) {
            cut_off = matches!(&answer, EntryAnswer::Unknown(why) if is_about_all(why));
            self.note(id, slot, answer);
        }
        let next = range.first.0 + told;
        if cut_off {
            // It answers nothing now; asking for each entry in turn would only take longer.
            for id in next..=range.last.0 {
                self.note(EntryId(id), slot, EntryAnswer::Unknown(Unknown::Disconnected));
            }
        } else if next <= range.last.0
            && let Some(to) = self.last.holder(slot)
        {
            let range = EntryRange { first: EntryId(next), last: range.last };
            self.actions.push(Action::Read { slot, to, range });
        }
        self.judge();
    }

    /// R4: the answer to one `Write`.
    pub fn on_written(&mut self, id: EntryId, slot: Slot, from: Incarnation, answer: AddAnswer) {
        self.writes_out -= 1;
        if answer == AddAnswer::Ok {
            self.shown.entry(from).or_default().insert(id);
            for confirmed in self.tracker.on_stored(id, slot, from) {
                self.unwritten.remove(&confirmed);
                self.tracker.forget(confirmed);
            }
        } else if self.private_holder(slot) == Some(from) {
            self.failed[slot.0] = true;
            self.tried.insert(from);
        }
        self.mend();
        self.judge();
    }

    /// R5: a bookie that fails in write-back changes the private fragments only. EC6 holds for them.
    pub fn on_candidates(&mut self, available: Option<&[Available]>, random: &Random) {
        self.looking = false;
        if !self.lacks_quorum() {
            return;
        }
        let slots = self.private_slots();
        let failed: Vec<usize> =
            (0..slots.len()).filter(|i| slots[*i].is_none() || self.failed[*i]).collect();
        // Those already tried take no part, but where they stand counts for the zone rule.
        let untried = |a: &Available| {
            let writable = a.writable && !self.tried.contains(&a.incarnation);
            Available { writable, ..a.clone() }
        };
        let available: Vec<Available> = available.unwrap_or_default().iter().map(untried).collect();
        let quorum = self.metadata.quorum;
        let chosen = ensemble::replacements(quorum, &slots, &failed, &available, self.age, random);
        if chosen.is_empty() {
            return self.abort("too few bookies take the write-back".to_owned());
        }
        let mut slots = slots;
        for (slot, incarnation) in &chosen {
            slots[*slot] = Some(*incarnation);
            self.failed[*slot] = false;
        }
        let first = self.tracker.begin_change();
        let mut fragments = self.tracker.fragments().to_vec();
        if fragments.last().is_some_and(|fragment| fragment.first_entry == first) {
            fragments.pop();
        }
        fragments.push(Fragment { first_entry: first, nonce: Nonce(random.uuid()), slots });
        self.tracker.finish_change(fragments);
        let unwritten: Vec<Entry> = self.unwritten.values().cloned().collect();
        for entry in unwritten {
            for (slot, _) in &chosen {
                self.write(&entry, Slot(*slot));
            }
        }
        self.mend();
    }

    /// R7 and R8. Call when `Finished`.
    ///
    /// # Panics
    /// When it is not.
    #[must_use]
    pub fn conclude(&self) -> Conclusion {
        let end = self.end.expect("finished: the end is known");
        let last = end.0.checked_sub(1).map(EntryId);
        let mut fragments = self.tracker.fragments().to_vec();
        cut(&mut fragments, last);
        let from_f = |fragment: &&Fragment| fragment.first_entry >= self.last.first_entry;
        let short = fragments.iter().enumerate().filter(|(_, f)| from_f(f)).any(|(i, fragment)| {
            let end = fragments.get(i + 1).map_or(end, |next| next.first_entry);
            !self.is_shown_complete(fragment, end)
        });
        let private: Vec<Fragment> =
            self.tracker.fragments().iter().filter(|f| from_f(f)).cloned().collect();
        Conclusion { last, length: self.length.or(last.is_none().then_some(0)), private, short }
    }

    // ---- verdicts ----

    fn begin_reading(&mut self) {
        self.stage = Stage::Reading;
        // LAC0 = max(f-1, highest LAC told).
        self.verdict_at = self.told.map_or(EntryId(0), EntryId::next);
        self.asked_to = self.verdict_at;
        self.tracker = AckTracker::new(self.quorum, self.metadata.fragments.clone(), self.told);
        self.read_ahead();
        self.judge(); // with enough vacant slots there may be nobody to wait for
    }

    fn read_ahead(&mut self) {
        let until = self.verdict_at.0 + self.window;
        // In halves of a window, so that a verdict does not cost a request each.
        if self.asked_to.0 + self.window.div_ceil(2) > until {
            return;
        }
        let range = EntryRange { first: self.asked_to, last: EntryId(until - 1) };
        for id in range.first.0..until {
            let by_position = self
                .quorum
                .write_set(EntryId(id))
                // A vacant slot is an explicit no (W0, R3).
                .map(|slot| if self.last.holder(slot).is_none() { Said::No } else { Said::Nothing })
                .collect();
            self.verdicts.insert(EntryId(id), Verdict { by_position, kept: None });
        }
        for (slot, to) in self.last.holders() {
            self.actions.push(Action::Read { slot, to, range });
        }
        self.asked_to = EntryId(until);
    }

    fn note(&mut self, id: EntryId, slot: Slot, answer: EntryAnswer) {
        let Some(position) = self.quorum.position(id, slot) else { return };
        let Some(verdict) = self.verdicts.get_mut(&id) else { return };
        let said = match answer {
            EntryAnswer::Held(entry) if is_good(&entry, id, &self.metadata) => {
                if verdict.kept.as_ref().is_some_and(|kept| kept.digest != entry.digest) {
                    let ledger = self.metadata.id.0;
                    tracing::error!(
                        ledger,
                        entry = id.0,
                        "two bookies hold different bytes of one entry"
                    );
                }
                verdict.kept.get_or_insert(entry);
                Said::Held
            }
            EntryAnswer::Absent => Said::No,
            EntryAnswer::Held(_) | EntryAnswer::Unknown(_) => Said::Unknown,
        };
        let known = &mut verdict.by_position[position];
        if matches!(known, Said::Nothing | Said::Unknown) {
            *known = said;
        }
    }

    /// Takes verdicts in order as far as the answers allow.
    fn judge(&mut self) {
        while self.stage == Stage::Reading && self.end.is_none() && self.aborted.is_none() {
            let id = self.verdict_at;
            let Some(verdict) = self.verdicts.get(&id) else { return };
            let noes = verdict.by_position.iter().filter(|said| **said == Said::No).count();
            if verdict.kept.is_some() {
                if self.unwritten.len() as u64 >= self.window {
                    return; // the write-back is behind
                }
                let verdict = self.verdicts.remove(&id);
                let entry = verdict.and_then(|verdict| verdict.kept).expect("looked at just now");
                self.verdict_at = id.next();
                self.keep(entry);
                self.read_ahead();
            } else if noes >= self.quorum.cover() {
                self.end = Some(id);
                self.verdicts.clear();
            } else if verdict.by_position.iter().all(|said| *said != Said::Nothing) {
                let why = format!("entry {id}: {noes} explicit noes, no copy");
                self.abort(why);
            } else {
                return;
            }
        }
    }

    // ---- write-back ----

    fn keep(&mut self, entry: Entry) {
        let id = self.tracker.push();
        debug_assert_eq!(id, entry.id);
        self.length = Some(entry.acc_length);
        self.unwritten.insert(id, entry.clone());
        for slot in self.quorum.write_set(id) {
            self.write(&entry, slot);
        }
        self.mend();
    }

    fn write(&mut self, entry: &Entry, slot: Slot) {
        if self.failed[slot.0] || self.quorum.position(entry.id, slot).is_none() {
            return;
        }
        if let Some(to) = self.private_holder(slot) {
            self.writes_out += 1;
            self.actions.push(Action::Write { entry: entry.clone(), slot, to });
        }
    }

    fn private_slots(&self) -> Vec<Option<Incarnation>> {
        self.tracker.fragments().last().map(|f| f.slots.clone()).unwrap_or_default()
    }

    fn private_holder(&self, slot: Slot) -> Option<Incarnation> {
        self.tracker.fragments().last().and_then(|fragment| fragment.holder(slot))
    }

    fn lacks_quorum(&self) -> bool {
        let hopeful = |slot: Slot| !self.failed[slot.0] && self.private_holder(slot).is_some();
        self.tracker.short_of_quorum(hopeful).is_some()
    }

    fn mend(&mut self) {
        if self.lacks_quorum() && !self.looking && self.aborted.is_none() {
            self.looking = true;
            self.actions.push(Action::Look);
        }
    }

    fn show(&mut self, holder: Incarnation, held: &EntrySet) {
        // What was written back before the list was answered may not be in it.
        let written = self.shown.remove(&holder).unwrap_or_default();
        let mut all = held.clone();
        for (first, last) in written.runs() {
            for id in first.0..=last.0 {
                all.insert(EntryId(id));
            }
        }
        self.shown.insert(holder, all);
    }

    /// R8, for the fragment's own entries, below `end`.
    fn is_shown_complete(&self, fragment: &Fragment, end: EntryId) -> bool {
        fragment.slots.iter().enumerate().all(|(slot, holder)| {
            let Some(holder) = holder else { return false };
            // Of ens0 a list must have been heard; a replacement has what was written to it.
            let heard = self.last.slots.get(slot) != Some(&Some(*holder)) || self.fenced[slot];
            let none = EntrySet::default();
            let shown = self.shown.get(holder).unwrap_or(&none);
            heard
                && (fragment.first_entry.0..end.0)
                    .map(EntryId)
                    .all(|id| self.quorum.position(id, Slot(slot)).is_none() || shown.contains(id))
        })
    }

    fn abort(&mut self, why: String) {
        self.aborted.get_or_insert(why);
    }
}

/// The request failed, not the one entry: what follows would fail as well.
fn is_about_all(why: &Unknown) -> bool {
    matches!(
        why,
        Unknown::Timeout | Unknown::Disconnected | Unknown::WrongIncarnation | Unknown::Busy
    )
}

/// A positive counts only with the digest, the ledger and the entry id it should have: misplaced bytes are as bad as
/// flipped ones.
fn is_good(entry: &Entry, id: EntryId, metadata: &LedgerMetadata) -> bool {
    entry.id == id && entry.ledger == metadata.id && entry.verify().is_ok()
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
