//! How many bookies there are to be: a bookie goes only with a proof (DC1). Pure.

use super::plan::{Action, View, Work, bookie, ordinal};
use crate::{
    crd::{DrainNote, Reason},
    server::{BookieFacts, ClusterFacts},
};

impl View<'_> {
    /// How many bookies there are to be now: notes, drains, volumes of those that are gone.
    pub(super) fn members(&self, work: &mut Work) -> i32 {
        let wanted = self.spec.replicas;
        work.notes.clone_from(&self.before.drains);
        let Some(set) = &self.observed.set else { return self.first_members(work, wanted) };
        let facts = match self.same_cluster() {
            Ok(facts) => facts,
            // More need nobody's word.
            Err(_) if set.replicas <= wanted && work.notes.is_empty() => return wanted,
            Err((reason, why)) => {
                work.working.push((reason, why));
                return set.replicas; // neither fewer nor, while a removal may be half done, more
            }
        };
        self.refresh(facts, work);
        // A proven one goes, whatever is wanted now; those above it go first, each through its own drain.
        let wanted = wanted.min(self.lowest_proven(&work.notes));
        let mut replicas = set.replicas.max(wanted);
        self.take_back(facts, replicas.min(wanted), work);
        if replicas > wanted {
            replicas = self.drain_highest(facts, replicas, work);
        } else {
            self.drain_strays(facts, replicas, work);
        }
        self.delete_claims(facts, work);
        let known = |notes: &[DrainNote]| -> Vec<(String, bool)> {
            notes.iter().map(|note| (note.bookie.clone(), note.proven)).collect()
        };
        if known(&work.notes) != known(&self.before.drains) {
            work.noted.push(Action::Note(work.notes.clone()));
        }
        replicas
    }

    fn lowest_proven(&self, notes: &[DrainNote]) -> i32 {
        let proven = notes.iter().filter(|note| note.proven);
        proven.filter_map(|note| ordinal(&self.set, &note.bookie)).min().unwrap_or(i32::MAX)
    }

    /// Without a StatefulSet: a new pool, or one whose set was orphaned for larger volumes or deleted by somebody. It comes
    /// back with as many as there were: fewer is a matter of drains.
    fn first_members(&self, work: &mut Work, wanted: i32) -> i32 {
        let there = self.observed.pods.iter().filter_map(|pod| ordinal(&self.set, &pod.name)).max();
        let there = there.map_or(0, |highest| highest + 1).max(self.before.replicas);
        wanted.min(self.lowest_proven(&work.notes)).max(there)
    }

    /// What the notes say now. A bookie whose drain we asked for and that has no cookie any more went with a proof.
    fn refresh(&self, facts: &ClusterFacts, work: &mut Work) {
        for note in &mut work.notes {
            match bookie(facts, &note.bookie) {
                Some(BookieFacts { drain: Some(drain), .. }) => {
                    note.bytes_left = i64::try_from(drain.bytes_left).unwrap_or(i64::MAX);
                    note.ledgers_left = i64::try_from(drain.ledgers_left).unwrap_or(i64::MAX);
                    note.blocked.clone_from(&drain.blocked);
                    note.proven |= drain.proven;
                }
                Some(_) => {}
                None => {
                    note.proven = true;
                    (note.bytes_left, note.ledgers_left) = (0, 0);
                    note.blocked.clear();
                }
            }
        }
        // The pod, then its volume; then the ordinal is free, and the note has done its work.
        let gone = |name: &str| self.pod(name).is_none() && self.claim(name).is_none();
        work.notes.retain(|note| {
            !(note.proven && gone(&note.bookie) && bookie(facts, &note.bookie).is_none())
        });
    }

    /// Drains of bookies that are wanted after all.
    fn take_back(&self, facts: &ClusterFacts, wanted: i32, work: &mut Work) {
        for ordinal in 0..wanted {
            let name = self.name(ordinal);
            let Some(found) = bookie(facts, &name) else { continue };
            let noted = work.notes.iter().position(|note| note.bookie == name && !note.proven);
            match noted {
                Some(_) if found.draining => work.then.push(Action::CancelDrain(name)),
                Some(noted) => drop(work.notes.remove(noted)), // taken back, and seen to be
                None => {}
            }
        }
    }

    /// One bookie at a time, from the highest ordinal down; returns how many there are to be now.
    fn drain_highest(&self, facts: &ClusterFacts, current: i32, work: &mut Work) -> i32 {
        let name = self.name(current - 1);
        let Some(found) = bookie(facts, &name) else {
            // It never joined. Its pod may go; its volume stays, since nobody can vouch for what is on it.
            return current - 1;
        };
        if self.drain(found, work) { current - 1 } else { current }
    }

    /// A bookie that has a cookie and no place any more: it joined while its pod was being taken away, or somebody took the
    /// pod. Its ledgers are moved off it like those of any other, from the copies that others have.
    fn drain_strays(&self, facts: &ClusterFacts, replicas: i32, work: &mut Work) {
        let stray = |bookie: &&BookieFacts| {
            ordinal(&self.set, &bookie.id).is_some_and(|ordinal| ordinal >= replicas)
                && !bookie.registered
                && self.pod(&bookie.id).is_none()
        };
        let highest = facts.bookies.iter().filter(stray).max_by_key(|b| ordinal(&self.set, &b.id));
        if let Some(highest) = highest {
            self.drain(highest, work);
        }
    }

    /// One step of a drain; whether there is the proof.
    fn drain(&self, found: &BookieFacts, work: &mut Work) -> bool {
        let name = found.id.as_str();
        match &found.drain {
            Some(drain) if drain.proven => {
                work.note(name, 0, 0, "", true);
                return true;
            }
            Some(drain) if !drain.blocked.is_empty() => {
                work.note(name, drain.bytes_left, drain.ledgers_left, &drain.blocked, false);
                let why = format!("the drain of {name} does not go on: {}", drain.blocked);
                work.working.push((Reason::DrainBlocked, why));
            }
            Some(drain) => {
                work.note(name, drain.bytes_left, drain.ledgers_left, "", false);
                let why = match (drain.ledgers_left, drain.bytes_left) {
                    (0, _) => format!(
                        "{name} is drained: no ledger names it; a second look, a minute later, proves that"
                    ),
                    (ledgers, bytes) => {
                        format!("{name} is drained: {ledgers} ledgers and {bytes} bytes are left")
                    }
                };
                work.working.push((Reason::Draining, why));
            }
            None => {
                work.note(name, 0, 0, "", false);
                work.then.push(Action::Drain(name.to_owned()));
                work.working.push((Reason::Draining, format!("{name} is to be drained")));
            }
        }
        false
    }

    /// Volumes of bookies that went with a proof: once the pod is gone and the server knows them no more.
    fn delete_claims(&self, facts: &ClusterFacts, work: &mut Work) {
        for note in work.notes.iter().filter(|note| note.proven) {
            let pod_gone = self.pod(&note.bookie).is_none();
            let claim = self.claim(&note.bookie).filter(|claim| !claim.terminating);
            if let Some(claim) = claim.filter(|_| pod_gone && bookie(facts, &note.bookie).is_none())
            {
                work.then.push(Action::DeleteClaim(claim.name.clone()));
            }
            let why =
                format!("{} is proven to be empty: its pod goes, then its volume", note.bookie);
            work.working.push((Reason::Draining, why));
        }
    }
}
