//! Compressed sets of ledger ids: tombstones, fenced set, ledgers of a journal file (D13).

use geminga_proto::ids::LedgerId;

/// Ledger ids as sorted, disjoint, inclusive runs. Ids are handed out in blocks, so neighbours live and die together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LedgerSet(Vec<(u64, u64)>);

impl LedgerSet {
    /// Adds one.
    pub fn insert(&mut self, ledger: LedgerId) {
        let id = ledger.0;
        let at = self.0.partition_point(|run| run.1 < id);
        if self.0.get(at).is_some_and(|run| run.0 <= id) {
            return;
        }
        let joins_left = at > 0 && self.0[at - 1].1 + 1 == id;
        let joins_right = self.0.get(at).is_some_and(|run| id + 1 == run.0);
        match (joins_left, joins_right) {
            (true, true) => self.0[at - 1].1 = self.0.remove(at).1,
            (true, false) => self.0[at - 1].1 = id,
            (false, true) => self.0[at].0 = id,
            (false, false) => self.0.insert(at, (id, id)),
        }
    }

    /// Whether it is in.
    #[must_use]
    pub fn contains(&self, ledger: LedgerId) -> bool {
        let at = self.0.partition_point(|run| run.1 < ledger.0);
        self.0.get(at).is_some_and(|run| run.0 <= ledger.0)
    }

    /// Whether every member is in `other`.
    #[must_use]
    pub fn is_within(&self, other: &Self) -> bool {
        self.0.iter().all(|&(first, last)| {
            let at = other.0.partition_point(|run| run.1 < first);
            other.0.get(at).is_some_and(|run| run.0 <= first && last <= run.1)
        })
    }

    /// The inclusive runs, ascending.
    #[must_use]
    pub fn runs(&self) -> &[(u64, u64)] {
        &self.0
    }

    /// A set from its runs; none if they are not ascending and disjoint.
    #[must_use]
    pub fn from_runs(runs: Vec<(u64, u64)>) -> Option<Self> {
        let sound = runs.iter().all(|run| run.0 <= run.1)
            && runs.windows(2).all(|pair| pair[0].1 < pair[1].0);
        sound.then_some(Self(runs))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn set(ids: &[u64]) -> LedgerSet {
        let mut set = LedgerSet::default();
        ids.iter().for_each(|id| set.insert(LedgerId(*id)));
        set
    }

    proptest! {
        #[test]
        fn a_ledger_set_is_a_set(ids in prop::collection::vec(0u64..50, 0..40), others in prop::collection::vec(0u64..50, 0..60)) {
            let (expected, other): (BTreeSet<_>, BTreeSet<_>) = (ids.iter().collect(), others.iter().collect());
            for id in 0..51 {
                prop_assert_eq!(set(&ids).contains(LedgerId(id)), expected.contains(&id));
            }
            prop_assert_eq!(set(&ids).is_within(&set(&others)), expected.is_subset(&other));
            prop_assert_eq!(LedgerSet::from_runs(set(&ids).runs().to_vec()), Some(set(&ids)));
        }
    }
}
