//! What each offset is, as runs: its size follows the changes of value, not the offsets in it.

use std::collections::BTreeMap;

/// A value for some offsets, kept as half-open runs that do not overlap; neighbours of one value are one run.
#[derive(Clone, Debug)]
pub struct RunMap<T> {
    runs: BTreeMap<u64, (u64, T)>,
}

/// A run `[start, end)` with its value.
pub type Run<T> = (u64, u64, T);

impl<T> Default for RunMap<T> {
    fn default() -> Self {
        Self { runs: BTreeMap::new() }
    }
}

impl<T: Copy + PartialEq> RunMap<T> {
    /// How many runs it takes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    /// Whether no offset has a value.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The run that the offset is in.
    #[must_use]
    pub fn get(&self, offset: u64) -> Option<Run<T>> {
        let (start, (end, value)) = self.runs.range(..=offset).next_back()?;
        (*end > offset).then_some((*start, *end, *value))
    }

    /// The first run that ends behind the offset.
    #[must_use]
    pub fn next(&self, offset: u64) -> Option<Run<T>> {
        self.get(offset).or_else(|| {
            self.runs.range(offset..).next().map(|(start, (end, value))| (*start, *end, *value))
        })
    }

    /// The runs within `[start, end)`, cut to it.
    pub fn within(&self, start: u64, end: u64) -> impl Iterator<Item = Run<T>> + '_ {
        let first = self.get(start).map_or(start, |run| run.0);
        self.runs
            .range(first..end.max(first))
            .map(move |(s, (e, value))| ((*s).max(start), (*e).min(end), *value))
            .filter(|(s, e, _)| s < e)
    }

    /// All runs, in order.
    pub fn iter(&self) -> impl Iterator<Item = Run<T>> + '_ {
        self.runs.iter().map(|(start, (end, value))| (*start, *end, *value))
    }

    /// Gives `[start, end)` this value, or none. Returns the whole runs that are gone and those that came.
    pub fn put(&mut self, start: u64, end: u64, value: Option<T>) -> (Vec<Run<T>>, Vec<Run<T>>) {
        let (mut gone, mut came) = (Vec::new(), Vec::new());
        if start >= end {
            return (gone, came);
        }
        // Also the neighbours, which may join.
        let from = match self.runs.range(..start).next_back() {
            Some((s, (e, _))) if *e >= start => *s,
            _ => start,
        };
        gone.extend(self.runs.range(from..=end).map(|(s, (e, value))| (*s, *e, *value)));
        let (mut left, mut right) = (start, end);
        for (s, e, old) in &gone {
            self.runs.remove(s);
            if *s < start {
                match value {
                    Some(value) if value == *old => left = *s,
                    _ => came.push((*s, (*e).min(start), *old)),
                }
            }
            if *e > end {
                match value {
                    Some(value) if value == *old => right = *e,
                    _ => came.push(((*s).max(end), *e, *old)),
                }
            }
        }
        if let Some(value) = value {
            came.push((left, right, value));
        }
        for (s, e, value) in &came {
            self.runs.insert(*s, (*e, *value));
        }
        (gone, came)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_map_and_says_which_runs_changed(
            ops in prop::collection::vec((0u64..40, 0u64..12, prop::option::of(0u8..3)), 0..60)
        ) {
            let (mut runs, mut model) = (RunMap::default(), BTreeMap::new());
            let mut known = std::collections::BTreeSet::new();
            for (start, len, value) in ops {
                let (gone, came) = runs.put(start, start + len, value);
                for run in gone {
                    prop_assert!(known.remove(&run), "{run:?} was never there");
                }
                for run in came {
                    prop_assert!(known.insert(run), "{run:?} came twice");
                }
                for offset in start..start + len {
                    match value {
                        Some(value) => model.insert(offset, value),
                        None => model.remove(&offset),
                    };
                }
                for offset in 0..60 {
                    prop_assert_eq!(runs.get(offset).map(|run| run.2), model.get(&offset).copied());
                    let next = model.range(offset..).next().map(|(at, value)| (*at, *value));
                    prop_assert_eq!(runs.next(offset).map(|run| (run.0.max(offset), run.2)), next);
                }
                let all: Vec<_> = runs.iter().collect();
                prop_assert!(all.windows(2).all(|w| w[0].1 < w[1].0 || (w[0].1 == w[1].0 && w[0].2 != w[1].2)));
                prop_assert_eq!(all.iter().copied().collect::<std::collections::BTreeSet<_>>(), known.clone());
                let cut: u64 = runs.within(5, 20).map(|(s, e, _)| e - s).sum();
                prop_assert_eq!(cut, model.range(5..20).count() as u64);
            }
        }
    }
}
