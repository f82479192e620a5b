//! Mark-delete and the runs settled above it: the size follows the holes, not the backlog (C1, C2).

use std::collections::BTreeMap;

/// Settled offsets: everything below `next`, and disjoint runs above it that do not touch it or each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct MarkDelete {
    next: u64,
    /// First offset -> end (exclusive).
    runs: BTreeMap<u64, u64>,
    /// Offsets in `runs`.
    above: u64,
}

impl MarkDelete {
    /// Everything below `next` is settled, nothing else.
    #[must_use]
    pub(crate) fn new(next: u64) -> Self {
        Self { next, ..Self::default() }
    }

    /// The first offset that is not settled.
    #[must_use]
    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    /// Settled runs above: first offset and end (exclusive), ascending.
    pub(crate) fn runs(&self) -> impl ExactSizeIterator<Item = (u64, u64)> + '_ {
        self.runs.iter().map(|(first, end)| (*first, *end))
    }

    /// Offsets settled above mark-delete.
    #[must_use]
    pub(crate) fn above(&self) -> u64 {
        self.above
    }

    /// Settles everything below `end`. Mark-delete never falls (C2).
    pub(crate) fn settle_below(&mut self, end: u64) {
        self.next = self.next.max(end);
        self.absorb();
    }

    /// Settles `first..end`.
    pub(crate) fn settle(&mut self, first: u64, end: u64) {
        let mut first = first.max(self.next);
        let mut end = end;
        if first >= end {
            return;
        }
        // Join with a run that touches from the left, then with all that start inside or right behind.
        if let Some((&left, &left_end)) = self.runs.range(..=first).next_back()
            && left_end >= first
        {
            first = left;
            end = end.max(left_end);
        }
        while let Some((&run, &run_end)) = self.runs.range(first..=end).next() {
            end = end.max(run_end);
            self.above -= run_end - run;
            self.runs.remove(&run);
        }
        self.runs.insert(first, end);
        self.above += end - first;
        self.absorb();
    }

    /// The parts of `first..end` that are not settled, ascending.
    #[must_use]
    pub(crate) fn open_within(&self, first: u64, end: u64) -> Vec<(u64, u64)> {
        let mut at = first.max(self.next);
        let mut open = Vec::new();
        if at >= end {
            return open;
        }
        let left = self.runs.range(..at).next_back();
        for (&run, &run_end) in left.into_iter().chain(self.runs.range(at..end)) {
            if at < run {
                open.push((at, run));
            }
            at = at.max(run_end);
        }
        if at < end {
            open.push((at, end));
        }
        open
    }

    /// Gap, length, gap, length ... from mark-delete on (the stored form).
    #[must_use]
    pub(crate) fn encode_runs(&self) -> Vec<u64> {
        let mut at = self.next;
        let mut encoded = Vec::with_capacity(self.runs.len() * 2);
        for (first, end) in self.runs() {
            encoded.extend([first - at, end - first]);
            at = end;
        }
        encoded
    }

    /// Reads the stored form. Numbers that overflow end it: what is not understood is not settled.
    #[must_use]
    pub(crate) fn decode(next: u64, encoded: &[u64]) -> Self {
        let mut decoded = Self::new(next);
        let mut at = next;
        for pair in encoded.chunks_exact(2) {
            let first = at.checked_add(pair[0]);
            let end = first.and_then(|first| first.checked_add(pair[1]));
            let (Some(first), Some(end)) = (first, end) else { break };
            decoded.settle(first, end);
            at = end;
        }
        decoded
    }

    fn absorb(&mut self) {
        while let Some((&first, &end)) = self.runs.first_key_value() {
            if first > self.next {
                break;
            }
            self.next = self.next.max(end);
            self.above -= end - first;
            self.runs.remove(&first);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_settles_exactly_what_a_naive_set_settles(
            steps in prop::collection::vec((any::<bool>(), 0u64..80, 0u64..12), 0..60)
        ) {
            let (mut marks, mut naive) = (MarkDelete::default(), BTreeSet::new());
            for (below, first, length) in steps {
                let before = marks.next();
                if below {
                    marks.settle_below(first);
                    naive.extend(0..first);
                } else {
                    marks.settle(first, first + length);
                    naive.extend(first..first + length);
                }
                prop_assert!(marks.next() >= before, "mark-delete fell (C2)");
                let next = (0..).find(|offset| !naive.contains(offset)).expect("finite");
                prop_assert_eq!(marks.next(), next);
                for offset in 0..100 {
                    let settled = offset < marks.next() || marks.runs().any(|(first, end)| first <= offset && offset < end);
                    prop_assert_eq!(settled, naive.contains(&offset), "{}", offset);
                }
                prop_assert_eq!(marks.above(), naive.range(next..).count() as u64);
                let mut at = marks.next();
                for (first, end) in marks.runs() {
                    prop_assert!(at < first && first < end, "runs touch");
                    at = end;
                }
                let decoded = MarkDelete::decode(marks.next(), &marks.encode_runs());
                prop_assert_eq!(&decoded, &marks);
                let open: Vec<u64> =
                    marks.open_within(first, first + length).into_iter().flat_map(|(f, e)| f..e).collect();
                let expected: Vec<u64> = (first..first + length).filter(|o| !naive.contains(o)).collect();
                prop_assert_eq!(open, expected);
            }
        }

        #[test]
        fn foreign_runs_never_panic(next: u64, runs: Vec<u64>) {
            prop_assert!(MarkDelete::decode(next, &runs).next() >= next);
        }
    }
}
