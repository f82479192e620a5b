//! Which entries are acknowledged: the record of acks and the last-add-confirmed that follows from it. Pure.
//!
//! ```text
//! entries  0 1 2 3 4 5 6 7 8
//! acks     3 2 3 2 2 1 3 0 0      Qa = 2
//! LAC              ^              5 waits for one more; 6 waits for 5 (W2)
//! kept       .   . . . . . .      until every slot of the write set acknowledged or was forgotten
//! ```
//! A confirmed entry stays on record until Qw slots hold it, because whoever ends a fragment has to know whether all of
//! its entries reached Qw (EC3, section 6). The recoverer's write-back uses the same record (R4).

use std::collections::{BTreeMap, BTreeSet};

use geminga_proto::ids::{EntryId, Incarnation, Slot};

use crate::{
    metadata::{Fragment, Holder, fragment_of},
    quorum::Quorum,
};

/// Acks of one entry, by position in its write set, with the incarnation that gave them (W4).
type Acks = Vec<Holder>;

/// See the module's text.
#[derive(Clone, Debug)]
pub struct AckTracker {
    quorum: Quorum,
    fragments: Vec<Fragment>,
    lac: Option<EntryId>,
    next: EntryId,
    entries: BTreeMap<EntryId, Acks>,
    /// First entries of fragments in which an entry was forgotten with fewer than Qw acks.
    short: BTreeSet<EntryId>,
    /// An ensemble change runs: acks are recorded, nothing is acknowledged (EC2).
    changing: bool,
    /// Poisoned or sealed: nothing is acknowledged ever after (W6).
    stopped: bool,
}

impl AckTracker {
    /// For entries after `lac`, in these fragments (not empty, rising from entry 0).
    #[must_use]
    pub fn new(quorum: Quorum, fragments: Vec<Fragment>, lac: Option<EntryId>) -> Self {
        let next = lac.map_or(EntryId(0), EntryId::next);
        Self {
            quorum,
            fragments,
            lac,
            next,
            entries: BTreeMap::new(),
            short: BTreeSet::new(),
            changing: false,
            stopped: false,
        }
    }

    /// Takes up the next entry (ids are dense, W1).
    pub fn push(&mut self) -> EntryId {
        let entry = self.next;
        self.entries.insert(entry, vec![None; self.quorum.write()]);
        self.next = entry.next();
        entry
    }

    /// Records that the incarnation `from` stored `entry` in `slot`; returns the entries this confirms, oldest first.
    /// An entry waits for every entry before it, so the last-add-confirmed never jumps a hole (W2). An ack from an
    /// incarnation that does not hold the slot, in the fragment that contains the entry, counts for nothing (W4).
    pub fn on_stored(&mut self, entry: EntryId, slot: Slot, from: Incarnation) -> Vec<EntryId> {
        if fragment_of(&self.fragments, entry).holder(slot) != Some(from) {
            return Vec::new();
        }
        let Some(position) = self.quorum.position(entry, slot) else {
            return Vec::new();
        };
        if let Some(acks) = self.entries.get_mut(&entry) {
            acks[position] = Some(from); // a set: a repeated ack counts once
        }
        self.drop_if_complete(entry);
        self.confirm()
    }

    /// An ensemble change begins: from now on nothing is acknowledged (EC2). Returns the entry it starts at, LAC+1 (EC3).
    pub fn begin_change(&mut self) -> EntryId {
        self.changing = true;
        self.first_unconfirmed()
    }

    /// The ensemble change landed. Every stored ack of a pending entry is compared with the new fragment slot by slot, and
    /// dropped if the incarnation differs (EC5): against the record, not against a list of who was replaced (T6).
    pub fn finish_change(&mut self, fragments: Vec<Fragment>) -> Vec<EntryId> {
        self.fragments = fragments;
        let first = self.first_unconfirmed();
        for (entry, acks) in self.entries.range_mut(first..) {
            let fragment = fragment_of(&self.fragments, *entry);
            for (ack, slot) in acks.iter_mut().zip(self.quorum.write_set(*entry)) {
                if *ack != fragment.holder(slot) {
                    *ack = None;
                }
            }
        }
        self.changing = false;
        self.confirm()
    }

    /// Nothing is acknowledged ever after (W6).
    pub fn stop(&mut self) {
        self.stopped = true;
    }

    /// Nobody waits for more acks of a confirmed entry: it is short of Qw, and its fragment remembers that.
    pub fn forget(&mut self, entry: EntryId) {
        if self.lac.is_some_and(|lac| entry <= lac) && self.entries.remove(&entry).is_some() {
            self.short.insert(fragment_of(&self.fragments, entry).first_entry);
        }
    }

    /// Whether an entry up to `last` in the fragment that starts at `first` has fewer than Qw acks.
    #[must_use]
    pub fn is_short(&self, first: EntryId, last: Option<EntryId>) -> bool {
        let Some(last) = last else { return false };
        let end = self.fragments.iter().map(|f| f.first_entry).find(|f| *f > first);
        let pending =
            |(entry, _): (&EntryId, &Acks)| *entry <= last && end.is_none_or(|end| *entry < end);
        self.short.contains(&first) || self.entries.range(first..).any(pending)
    }

    /// Whether any entry up to the LAC has fewer than Qw acks, in any fragment (section 6).
    #[must_use]
    pub fn any_short(&self) -> bool {
        self.fragments.iter().any(|fragment| self.is_short(fragment.first_entry, self.lac))
    }

    /// Whether the slot's ack is on record. True for entries no longer tracked.
    #[must_use]
    pub fn is_stored(&self, entry: EntryId, slot: Slot) -> bool {
        let position = self.quorum.position(entry, slot);
        match (self.entries.get(&entry), position) {
            (Some(acks), Some(position)) => acks[position].is_some(),
            (None, _) => true,
            (Some(_), None) => false,
        }
    }

    /// Entries not yet confirmed for which fewer than Qa slots have acknowledged or are `hopeful`.
    pub fn short_of_quorum(&self, hopeful: impl Fn(Slot) -> bool) -> Option<EntryId> {
        let reach = |entry: EntryId, acks: &Acks| {
            let slots = self.quorum.write_set(entry);
            acks.iter().zip(slots).filter(|(ack, slot)| ack.is_some() || hopeful(*slot)).count()
        };
        self.entries
            .range(self.first_unconfirmed()..)
            .find(|(entry, acks)| reach(**entry, acks) < self.quorum.ack())
            .map(|(entry, _)| *entry)
    }

    /// The last-add-confirmed (W3).
    #[must_use]
    pub fn lac(&self) -> Option<EntryId> {
        self.lac
    }

    /// The entry that `push` will give next.
    #[must_use]
    pub fn next(&self) -> EntryId {
        self.next
    }

    /// LAC+1.
    #[must_use]
    pub fn first_unconfirmed(&self) -> EntryId {
        self.lac.map_or(EntryId(0), EntryId::next)
    }

    /// Whether every entry is confirmed.
    #[must_use]
    pub fn all_confirmed(&self) -> bool {
        self.first_unconfirmed() == self.next
    }

    /// The fragments acks are judged by.
    #[must_use]
    pub fn fragments(&self) -> &[Fragment] {
        &self.fragments
    }

    fn confirm(&mut self) -> Vec<EntryId> {
        let mut confirmed = Vec::new();
        if self.changing || self.stopped {
            return confirmed; // recorded, not yet counted (W2, EC2)
        }
        while let Some(acks) = self.entries.get(&self.first_unconfirmed()) {
            if acks.iter().flatten().count() < self.quorum.ack() {
                break;
            }
            let entry = self.first_unconfirmed();
            self.lac = Some(entry);
            confirmed.push(entry);
            self.drop_if_complete(entry);
        }
        confirmed
    }

    fn drop_if_complete(&mut self, entry: EntryId) {
        let confirmed = self.lac.is_some_and(|lac| entry <= lac);
        if confirmed
            && self.entries.get(&entry).is_some_and(|acks| acks.iter().all(Option::is_some))
        {
            self.entries.remove(&entry);
        }
    }
}

#[cfg(test)]
#[path = "ack_tracker_tests.rs"]
mod tests;
