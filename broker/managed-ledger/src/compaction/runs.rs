//! Which records of a batch are meant, as run lengths: left out, kept, left out ... Pure.

/// The run lengths of `flags`; trailing records that are left out need none.
pub(crate) fn encode(flags: &[bool]) -> Vec<u32> {
    let mut runs = Vec::new();
    let (mut kept, mut length) = (false, 0u32);
    for flag in flags {
        if *flag != kept {
            runs.push(length);
            (kept, length) = (*flag, 0);
        }
        length += 1;
    }
    if kept {
        runs.push(length);
    }
    runs
}

/// The kept ones among `count` records, as runs (first, last) within the batch, ascending. Runs that do not fit are cut.
pub(crate) fn ranges(runs: &[u32], count: u32) -> Vec<(u32, u32)> {
    let (mut ranges, mut at) = (Vec::new(), 0u32);
    for (n, length) in runs.iter().enumerate() {
        let end = at.saturating_add(*length).min(count);
        if n % 2 == 1 && end > at {
            ranges.push((at, end - 1));
        }
        at = end;
    }
    ranges
}

/// A flag for each of `count` records.
pub(crate) fn flags(runs: &[u32], count: u32) -> Vec<bool> {
    let mut flags = vec![false; count as usize];
    for (first, last) in ranges(runs, count) {
        flags[first as usize..=last as usize].fill(true);
    }
    flags
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn flags_survive_encoding_and_foreign_runs_do_no_harm(
            kept in prop::collection::vec(any::<bool>(), 0..60),
            foreign in prop::collection::vec(any::<u32>(), 0..6),
        ) {
            let runs = encode(&kept);
            prop_assert_eq!(&flags(&runs, kept.len() as u32), &kept);
            prop_assert_eq!(ranges(&runs, kept.len() as u32).iter().map(|(f, l)| l - f + 1).sum::<u32>() as usize,
                kept.iter().filter(|kept| **kept).count());
            for (first, last) in ranges(&foreign, 1_000) {
                prop_assert!(first <= last && last < 1_000);
            }
        }
    }
}
