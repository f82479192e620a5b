//! Which of a failover subscription's consumers has a segment: a pure function, so that each segment's owner finds the same.

use std::collections::BTreeMap;

use geminga_proto::key_hash::key_hash;

/// The consumer that has `segment` of `segments`: shares differ by one at most, and a consumer that comes or goes moves few
/// segments but its own. Names must be distinct; their order does not count. None without a name.
///
/// Every pair of name and segment has a rank drawn by their hash; the best pairs are taken first, within the shares.
#[must_use]
pub fn active_on<'a>(names: &[&'a str], segment: u32, segments: u32) -> Option<&'a str> {
    let segments = segments.max(segment.saturating_add(1));
    match names {
        [] => return None,
        [one] => return Some(one),
        _ => {}
    }
    let rank = |name: &str, segment: u32| key_hash(format!("{segment}/{name}").as_bytes());
    let mut pairs: Vec<(u32, &str, u32)> = Vec::with_capacity(names.len() * segments as usize);
    for name in names {
        pairs.extend((0..segments).map(|number| (rank(name, number), *name, number)));
    }
    pairs.sort_unstable();
    let (share, mut larger) = (segments as usize / names.len(), segments as usize % names.len());
    let mut taken: BTreeMap<&str, usize> = BTreeMap::new();
    let mut of: BTreeMap<u32, &'a str> = BTreeMap::new();
    for (_, name, number) in pairs {
        let name = names.iter().copied().find(|known| *known == name)?;
        let has = taken.entry(name).or_default();
        let room = *has < share || (*has == share && larger > 0);
        if room && !of.contains_key(&number) {
            larger -= usize::from(*has == share);
            *has += 1;
            of.insert(number, name);
        }
    }
    of.get(&segment).copied()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all<'a>(names: &[&'a str], segments: u32) -> Vec<&'a str> {
        (0..segments).map(|segment| active_on(names, segment, segments).expect("some")).collect()
    }

    proptest! {
        #[test]
        fn every_segment_has_one_and_shares_differ_by_one(names in 1usize..9, segments in 1u32..33) {
            let names: Vec<String> = (0..names).map(|n| format!("consumer-{n}")).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let mut turned = names.clone();
            turned.reverse();
            let places = all(&names, segments);
            prop_assert_eq!(&places, &all(&turned, segments), "the order does not count");
            let shares = names.iter().map(|name| places.iter().filter(|of| *of == name).count());
            let (least, most) = shares.fold((usize::MAX, 0), |(l, m), n| (l.min(n), m.max(n)));
            prop_assert!(most - least <= 1);
        }
    }

    #[test]
    fn a_consumer_that_comes_moves_little_beyond_its_own_share() {
        let names: Vec<String> = (0..9).map(|n| format!("consumer-{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let (before, after) = (all(&names[..8], 96), all(&names, 96));
        let moved = before.iter().zip(&after).filter(|(a, b)| a != b).count();
        assert!((10..=30).contains(&moved), "{moved} of 96 moved for a share of 10 or 11");
    }
}
