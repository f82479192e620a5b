//! I11 by key, I12 and I14 of a subscription: what consumers were given and told.

use std::collections::{BTreeMap, BTreeSet};

use super::{Verdict, must};
use crate::harness::history::Event;

/// What is durable for sure.
#[derive(Clone, Debug, Default)]
struct Told {
    accepted: BTreeSet<u64>,
    /// By offset: who told it, the least attempt of the next delivery, and when it is due.
    failures: BTreeMap<u64, (u32, u32, u64)>,
    /// Decided: never delivered again.
    dead: BTreeSet<u64>,
}

/// What is known of the run's one subscription.
#[derive(Default)]
pub(crate) struct DispatchChecks {
    promises: Promises,
    told: Told,
    /// What was told when a load began, and what this owner told since.
    of_owner: BTreeMap<u32, Told>,
    /// Deliveries by offset and attempt.
    deliveries: BTreeMap<(u64, u32), u64>,
    /// Deliveries of an offset, and how often it was given back without counting.
    totals: BTreeMap<u64, u64>,
    given_back: BTreeMap<u64, u64>,
    keys: BTreeMap<u64, u32>,
    /// The highest offset of a key whose accept was confirmed; and what it was when an accept was asked for.
    highest: BTreeMap<u32, u64>,
    when_asked: BTreeMap<u64, Option<u64>>,
    asked: BTreeSet<u64>,
    copies: BTreeMap<u64, u64>,
    copied: BTreeSet<u64>,
}

/// What the subscription promises.
#[derive(Clone, Copy, Debug, Default)]
struct Promises {
    key_order: bool,
    /// 0: no limit.
    attempts_max: u32,
    deliver_at: bool,
}

impl DispatchChecks {
    pub(super) fn observe(&mut self, event: &Event) -> Verdict {
        match event {
            Event::Promised { key_order, attempts_max, deliver_at } => {
                let (key_order, attempts_max) = (*key_order, *attempts_max);
                self.promises = Promises { key_order, attempts_max, deliver_at: *deliver_at };
                Ok(())
            }
            Event::LoadBegun { owner, .. } => {
                self.of_owner.insert(*owner, self.told.clone());
                Ok(())
            }
            Event::Dispatched { owner, attempt, now_ms, messages, .. } => {
                for message in messages {
                    self.dispatched(*owner, *attempt, *now_ms, *message)?;
                }
                Ok(())
            }
            Event::GivenBack { offsets } => {
                for offset in offsets {
                    *self.given_back.entry(*offset).or_default() += 1;
                }
                Ok(())
            }
            Event::AcceptAsked { offset, key } => {
                self.asked.insert(*offset);
                self.when_asked.insert(*offset, self.highest.get(key).copied());
                Ok(())
            }
            Event::AcceptTold { owner, offsets } => {
                offsets.iter().try_for_each(|offset| self.accepted(*owner, *offset))
            }
            Event::FailureTold { owner, items } => {
                let own = self.of_owner.entry(*owner).or_default();
                for told in [own, &mut self.told] {
                    for (start, end, attempt, due) in items {
                        for offset in *start..*end {
                            // An answer of an earlier owner may come after one of a later.
                            let known = told.failures.entry(offset).or_default();
                            if known.0 <= *owner {
                                *known = (*owner, *attempt, *due);
                            }
                        }
                    }
                }
                Ok(())
            }
            Event::DeadCopied { owner, number, offset, attempt, rejected } => {
                self.copied(*owner, (*number, *offset), *attempt, *rejected)
            }
            Event::AllDispatched { end } => self.all(*end),
            _ => Ok(()),
        }
    }

    fn dispatched(
        &mut self,
        owner: u32,
        attempt: u32,
        now_ms: u64,
        (offset, key, deliver_at): (u64, u32, u64),
    ) -> Verdict {
        let told = self.of_owner.entry(owner).or_default();
        must!(
            "I14",
            !told.accepted.contains(&offset),
            "{offset} is delivered by owner {owner} though its accept was confirmed before"
        );
        must!(
            "I14",
            !told.dead.contains(&offset),
            "{offset} is delivered by owner {owner} though it was a dead letter before"
        );
        if let Some((_, least, due)) = told.failures.get(&offset) {
            must!(
                "I14",
                attempt >= *least,
                "{offset} is delivered as attempt {attempt}, and {least} was to be the next"
            );
            // Wall clocks go back: what was once delivered when it was due may be delivered again.
            let again = self.deliveries.contains_key(&(offset, attempt));
            must!(
                "I14",
                attempt > *least || now_ms >= *due || again,
                "{offset} is delivered at {now_ms}, and was not due before {due}"
            );
        }
        must!(
            "I14",
            !self.promises.deliver_at || now_ms >= deliver_at || self.totals.contains_key(&offset),
            "{offset} is delivered at {now_ms}, and not to be before {deliver_at}"
        );
        must!(
            "I14",
            attempt == 1 || self.deliveries.contains_key(&(offset, attempt - 1)),
            "{offset} is delivered as attempt {attempt}, and never was as the one before"
        );
        self.keys.insert(offset, key);
        *self.deliveries.entry((offset, attempt)).or_default() += 1;
        let total = self.totals.entry(offset).or_default();
        *total += 1;
        let max = self.promises.attempts_max;
        let more = self.of_owner.len() as u64 + self.given_back.get(&offset).copied().unwrap_or(0);
        must!(
            "I14",
            max == 0 || *total <= u64::from(max) + more,
            "{offset} is delivered {total} times, at most {max} are allowed and {more} by crashes and give-backs"
        );
        must!(
            "I14",
            max == 0 || attempt <= max,
            "{offset} is delivered as attempt {attempt} of {max}"
        );
        Ok(())
    }

    fn accepted(&mut self, owner: u32, offset: u64) -> Verdict {
        let own = self.of_owner.entry(owner).or_default();
        own.accepted.insert(offset);
        self.told.accepted.insert(offset);
        let Some(key) = self.keys.get(&offset).copied().filter(|_| self.asked.contains(&offset))
        else {
            return Ok(());
        };
        let before = self.when_asked.get(&offset).copied().flatten();
        must!(
            "I11",
            !self.promises.key_order || before.is_none_or(|before| before <= offset),
            "{offset} was accepted after {before:?} of its key"
        );
        let highest = self.highest.entry(key).or_default();
        *highest = (*highest).max(offset);
        Ok(())
    }

    fn copied(
        &mut self,
        owner: u32,
        (number, offset): (u64, u64),
        attempt: u32,
        rejected: bool,
    ) -> Verdict {
        let attempts_max = self.promises.attempts_max;
        let of = self.copies.insert(number, offset).unwrap_or(offset);
        must!("I14", of == offset, "dead letter {number} is {of}, and then {offset}");
        let known = self.copies.iter().find(|(n, o)| **o == offset && **n != number);
        must!("I14", known.is_none(), "{offset} is dead letter {number}, and {known:?}");
        must!(
            "I14",
            rejected || (attempts_max > 0 && attempt >= attempts_max),
            "{offset} is a dead letter after attempt {attempt} of {attempts_max}"
        );
        for before in 1..=attempt {
            must!(
                "I14",
                self.deliveries.contains_key(&(offset, before)),
                "{offset} is a dead letter after {attempt} attempts, and {before} never was"
            );
        }
        self.copied.insert(offset);
        self.told.dead.insert(offset);
        self.of_owner.entry(owner).or_default().dead.insert(offset);
        Ok(())
    }

    /// Nothing is left below `end`.
    fn all(&self, end: u64) -> Verdict {
        for offset in 0..end {
            must!(
                "I12",
                self.totals.contains_key(&offset),
                "{offset} was settled, and never delivered to anybody"
            );
            must!(
                "I12",
                self.asked.contains(&offset) || self.copied.contains(&offset),
                "{offset} was settled, though nobody accepted it and it is no dead letter"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "dispatch_tests.rs"]
mod tests;
