//! What a start makes of the groups it found (D3, D4, D8). Pure: facts of the files in, one plan out.
//!
//! ```text
//! file 7:  ... 40 41 42 | torn            42 = the highest valid number
//! file 8:      41 42 | 43 44 45           a start copied 41, 42 forward and wrote 43: `first_live` = 43
//! mark = 40                               plan: 41 42 from file 8, then 43 44 45; file 7 ends in front of 43
//! ```
//! A group may exist twice (a copy and its original); both are the same records, and either will do. A newer file's
//! `first_live` cuts the older ones, so that a second start reaches the same verdict as the first (T46).

use std::collections::BTreeMap;

use super::format::{Bound, GroupHeader};

/// A valid group, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    pub header: GroupHeader,
    /// Position in its file, bytes.
    pub position: u64,
    /// A limbo bound recorded in it (D8).
    pub limbo: Option<Bound>,
}

/// Why something may have been lost in silence (D8).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Damage {
    /// Groups missing between the mark and the highest valid one: first and last number.
    Missing(u64, u64),
    /// The highest valid number is below the mark: highest, mark.
    BelowMark(u64, u64),
    /// A file could not be read.
    Unreadable(u64),
}

/// The verdict.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Groups after the mark, in order of their numbers.
    pub take: Vec<Found>,
    /// Which of them must be copied forward before serving (D3): indexes into `take`.
    pub copy_from: usize,
    /// Every reason for limbo that no earlier start has judged.
    pub damage: Vec<Damage>,
    /// The number of the next group.
    pub next: u64,
    /// Files that hold nothing which a newer, sealed file does not hold too (D10: may be overwritten).
    pub superseded: Vec<u64>,
}

/// Judges the groups of all files scanned. `unreadable` names files with a read error.
#[must_use]
pub fn plan(mark: u64, found: &[Found], unreadable: &[u64]) -> Plan {
    let cuts = cuts(found);
    // The newest file wins among copies of the same group.
    let mut by_number: BTreeMap<u64, Found> = BTreeMap::new();
    for group in found {
        if cuts.get(&group.header.file).is_some_and(|&cut| group.header.number >= cut) {
            continue;
        }
        by_number
            .entry(group.header.number)
            .and_modify(|held| {
                if held.header.file < group.header.file {
                    *held = *group;
                }
            })
            .or_insert(*group);
    }
    let highest = by_number.keys().next_back().copied().unwrap_or(0);
    let take: Vec<Found> = by_number.range(mark + 1..).map(|(_, group)| *group).collect();
    let judged = by_number
        .values()
        .filter(|group| group.limbo.is_some())
        .map(|group| group.header.number)
        .max();
    Plan {
        copy_from: copy_from(&take, found),
        damage: damage(mark, highest, &take, judged.unwrap_or(0), unreadable),
        next: highest.max(mark) + 1,
        superseded: superseded(mark, found, &by_number),
        take,
    }
}

/// For each file the number that a newer file continues at.
fn cuts(found: &[Found]) -> BTreeMap<u64, u64> {
    let mut first_live: BTreeMap<u64, u64> = BTreeMap::new();
    for group in found {
        first_live.insert(group.header.file, group.header.first_live);
    }
    let mut cuts = BTreeMap::new();
    let mut lowest = u64::MAX;
    for (&file, &first) in first_live.iter().rev() {
        cuts.insert(file, lowest);
        lowest = lowest.min(first);
    }
    cuts
}

/// Everything since the newest file that was served from may lie in no more than the page cache: the first index to copy.
fn copy_from(take: &[Found], found: &[Found]) -> usize {
    let last =
        found.iter().filter(|group| !group.header.is_copy()).map(|group| group.header.file).max();
    let first = found
        .iter()
        .filter(|group| Some(group.header.file) >= last)
        .map(|group| group.header.number)
        .min();
    first.map_or(take.len(), |first| take.partition_point(|group| group.header.number < first))
}

fn damage(mark: u64, highest: u64, take: &[Found], judged: u64, unreadable: &[u64]) -> Vec<Damage> {
    let mut damage: Vec<Damage> = unreadable.iter().map(|&file| Damage::Unreadable(file)).collect();
    if highest < mark {
        damage.push(Damage::BelowMark(highest, mark));
    }
    let mut expected = mark + 1;
    for group in take {
        let number = group.header.number;
        if number > expected && number > judged {
            damage.push(Damage::Missing(expected, number - 1));
        } else if number > expected && number <= judged {
            tracing::debug!(
                first = expected,
                last = number - 1,
                "missing groups were judged by an earlier start"
            );
        }
        expected = number + 1;
    }
    damage
}

/// Files whose every group lies, readable, in a newer file that was served from, hence synced.
fn superseded(mark: u64, found: &[Found], chosen: &BTreeMap<u64, Found>) -> Vec<u64> {
    let sealed: Vec<u64> = found
        .iter()
        .filter(|group| !group.header.is_copy())
        .map(|group| group.header.file)
        .collect();
    let mut by_file: BTreeMap<u64, bool> = BTreeMap::new();
    for group in found {
        let number = group.header.number;
        let held_by = chosen.get(&number).map(|held| held.header.file);
        let spare = number > mark
            && held_by.is_some_and(|file| file > group.header.file && sealed.contains(&file));
        *by_file.entry(group.header.file).or_insert(true) &= spare;
    }
    by_file.into_iter().filter(|&(_, spare)| spare).map(|(file, _)| file).collect()
}

#[cfg(test)]
mod tests;
