//! Offsets with a value, kept as runs: the size follows the runs, not the offsets. Pure.

use std::collections::BTreeMap;

/// Disjoint runs of offsets, each with a value; runs of equal values never touch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RunMap<V> {
    /// First offset -> end (exclusive), value.
    runs: BTreeMap<u64, (u64, V)>,
}

impl<V> Default for RunMap<V> {
    fn default() -> Self {
        Self { runs: BTreeMap::new() }
    }
}

impl<V: Clone + Eq> RunMap<V> {
    /// How many runs there are.
    pub(crate) fn len(&self) -> usize {
        self.runs.len()
    }

    /// First offset, end (exclusive), value; ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u64, &V)> + '_ {
        self.runs.iter().map(|(first, (end, value))| (*first, *end, value))
    }

    /// The parts of runs that lie in `first..end`, ascending.
    pub(crate) fn within(&self, first: u64, end: u64) -> impl Iterator<Item = (u64, u64, &V)> + '_ {
        let left = self.runs.range(..first).next_back();
        let left = left.filter(move |(_, (run_end, _))| *run_end > first && first < end);
        let inside = (first < end).then(|| self.runs.range(first..end)).into_iter().flatten();
        left.into_iter()
            .chain(inside)
            .map(move |(run, (run_end, value))| ((*run).max(first), (*run_end).min(end), value))
    }

    /// Whether one run reaches beyond `first..end` on both sides: removing that range leaves one run more.
    pub(crate) fn splits(&self, first: u64, end: u64) -> bool {
        let left = self.runs.range(..first).next_back();
        first < end && left.is_some_and(|(_, (run_end, _))| *run_end > end)
    }

    /// How many runs lie in `first..end` as a whole.
    pub(crate) fn covered(&self, first: u64, end: u64) -> usize {
        let inside = (first < end).then(|| self.runs.range(first..end)).into_iter().flatten();
        inside.filter(|(_, (run_end, _))| *run_end <= end).count()
    }

    /// Takes `first..end` out.
    pub(crate) fn remove(&mut self, first: u64, end: u64) {
        if first >= end {
            return;
        }
        if let Some((&left, (left_end, value))) = self.runs.range_mut(..first).next_back()
            && *left_end > first
        {
            let (rest, value) = (*left_end, value.clone());
            *left_end = first;
            debug_assert!(left < first);
            if rest > end {
                self.runs.insert(end, (rest, value));
                return;
            }
        }
        while let Some((&run, _)) = self.runs.range(first..end).next() {
            let Some((run_end, value)) = self.runs.remove(&run) else { return };
            if run_end > end {
                self.runs.insert(end, (run_end, value));
                return;
            }
        }
    }

    /// Gives `first..end` this value, whatever they had.
    pub(crate) fn insert(&mut self, first: u64, end: u64, value: V) {
        if first >= end {
            return;
        }
        self.remove(first, end);
        let (mut first, mut end) = (first, end);
        if let Some((&left, (left_end, same))) = self.runs.range(..first).next_back()
            && *left_end == first
            && *same == value
        {
            first = left;
        }
        if let Some((right_end, same)) = self.runs.get(&end)
            && *same == value
        {
            let right_end = *right_end;
            self.runs.remove(&end);
            end = right_end;
        }
        self.runs.insert(first, (end, value));
    }

    /// Takes out everything.
    pub(crate) fn clear(&mut self) {
        self.runs.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_holds_exactly_what_a_naive_map_holds(
            steps in prop::collection::vec((0u8..4, 0u64..40, 0u64..12), 0..60)
        ) {
            let (mut runs, mut naive) = (RunMap::default(), BTreeMap::new());
            for (value, first, length) in steps {
                let end = first + length;
                let before = runs.len();
                let (splits, covered) = (runs.splits(first, end), runs.covered(first, end));
                if value == 0 {
                    runs.remove(first, end);
                    naive.retain(|offset, _| *offset < first || *offset >= end);
                    prop_assert_eq!(runs.len(), before + usize::from(splits) - covered);
                } else {
                    runs.insert(first, end, value);
                    naive.extend((first..end).map(|offset| (offset, value)));
                    prop_assert!(runs.len() <= before + 1 + usize::from(splits) - covered);
                }
                let held: BTreeMap<u64, u8> =
                    runs.iter().flat_map(|(first, end, v)| (first..end).map(|o| (o, *v))).collect();
                prop_assert_eq!(&held, &naive);
                let all: Vec<_> = runs.iter().map(|(first, end, v)| (first, end, *v)).collect();
                for pair in all.windows(2) {
                    prop_assert!(pair[0].1 < pair[1].0 || (pair[0].1 == pair[1].0 && pair[0].2 != pair[1].2));
                }
                let within: Vec<(u64, u8)> =
                    runs.within(first, end).flat_map(|(f, e, v)| (f..e).map(|o| (o, *v))).collect();
                let expected: Vec<(u64, u8)> =
                    naive.range(first..end).map(|(offset, v)| (*offset, *v)).collect();
                prop_assert_eq!(within, expected);
            }
        }
    }
}
