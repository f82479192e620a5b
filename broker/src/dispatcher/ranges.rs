//! A set of offsets as disjoint runs; its size follows the holes, not the numbers in it.

use std::collections::BTreeMap;

/// Offsets, kept as half-open runs `[start, end)` that neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    runs: BTreeMap<u64, u64>,
    len: u64,
}

impl RangeSet {
    /// How many offsets are in it.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// How many runs it takes.
    #[must_use]
    pub fn runs(&self) -> usize {
        self.runs.len()
    }

    /// Whether the offset is in it.
    #[must_use]
    pub fn contains(&self, offset: u64) -> bool {
        self.run_at(offset).is_some()
    }

    /// The first offset at or after `from` that is not in it.
    #[must_use]
    pub fn next_outside(&self, from: u64) -> u64 {
        self.run_at(from).map_or(from, |(_, end)| end)
    }

    /// The first offset at or after `from` that is in it.
    #[must_use]
    pub fn next_inside(&self, from: u64) -> Option<u64> {
        if self.contains(from) {
            return Some(from);
        }
        self.runs.range(from..).next().map(|(start, _)| *start)
    }

    /// Adds `[start, end)`.
    pub fn insert(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let (mut start, mut end) = (start, end);
        if let Some((before, until)) = self.runs.range(..=start).next_back().map(|(s, e)| (*s, *e))
            && until >= start
        {
            start = before;
            end = end.max(until);
        }
        while let Some((next, until)) = self.runs.range(start..=end).next().map(|(s, e)| (*s, *e)) {
            end = end.max(until);
            self.runs.remove(&next);
            self.len -= until - next;
        }
        self.runs.insert(start, end);
        self.len += end - start;
    }

    /// Takes `[start, end)` out.
    pub fn remove(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        if let Some((before, until)) = self.runs.range(..start).next_back().map(|(s, e)| (*s, *e))
            && until > start
        {
            self.runs.insert(before, start);
            self.len -= until - start;
            if until > end {
                self.runs.insert(end, until);
                self.len += until - end;
                return;
            }
        }
        while let Some((next, until)) = self.runs.range(start..end).next().map(|(s, e)| (*s, *e)) {
            self.runs.remove(&next);
            self.len -= until - next;
            if until > end {
                self.runs.insert(end, until);
                self.len += until - end;
            }
        }
    }

    /// The runs, in order, as `(start, end)`.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.runs.iter().map(|(start, end)| (*start, *end))
    }

    fn run_at(&self, offset: u64) -> Option<(u64, u64)> {
        let (start, end) = self.runs.range(..=offset).next_back()?;
        (*end > offset).then_some((*start, *end))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_set(ops in prop::collection::vec((any::<bool>(), 0u64..40, 0u64..12), 0..60)) {
            let (mut set, mut model) = (RangeSet::default(), BTreeSet::new());
            for (add, start, len) in ops {
                if add {
                    set.insert(start, start + len);
                    model.extend(start..start + len);
                } else {
                    set.remove(start, start + len);
                    model.retain(|x| !(start..start + len).contains(x));
                }
                prop_assert_eq!(set.len(), model.len() as u64);
                prop_assert_eq!(set.is_empty(), model.is_empty());
                for x in 0..60 {
                    prop_assert_eq!(set.contains(x), model.contains(&x));
                    prop_assert_eq!(set.next_inside(x), model.range(x..).next().copied());
                    prop_assert_eq!(set.next_outside(x), (x..).find(|y| !model.contains(y)).unwrap_or(x));
                }
                let runs: Vec<_> = set.iter().collect();
                prop_assert!(runs.windows(2).all(|w| w[0].1 < w[1].0), "runs neither overlap nor touch");
                prop_assert_eq!(runs.len(), set.runs());
            }
        }
    }
}
