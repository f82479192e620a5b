//! Which consumer of a key-shared subscription has which key hashes (L5): a table over all hashes, kept as ranges.

/// Key hashes `first..=last` go to this consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRange {
    pub first: u32,
    pub last: u32,
    pub consumer: String,
}

/// Hashes move in this many equal slots.
const SLOTS: usize = 1_024;
const SLOT_BITS: u32 = 22;

/// The consumer that has a hash.
#[must_use]
pub fn hash_owner(table: &[KeyRange], hash: u32) -> Option<&str> {
    let at = table.partition_point(|range| range.last < hash);
    table.get(at).filter(|range| range.first <= hash).map(|range| range.consumer.as_str())
}

/// The table for these consumers, at most 1,024 of distinct names in order: shares differ by one slot at most, and no more
/// moves than has to. Empty without a consumer.
#[must_use]
pub fn rebalanced(table: &[KeyRange], members: &[&str]) -> Vec<KeyRange> {
    if members.is_empty() {
        return Vec::new();
    }
    let members = &members[..members.len().min(SLOTS)];
    let index = |name: &str| members.iter().position(|member| *member == name);
    let mut slots: Vec<Option<usize>> = (0..SLOTS)
        .map(|slot| hash_owner(table, (slot as u32) << SLOT_BITS).and_then(index))
        .collect();
    let mut has = vec![0usize; members.len()];
    slots.iter().flatten().for_each(|member| has[*member] += 1);
    // The larger shares go to those who have most now: nothing moves for the sake of one slot.
    let mut order: Vec<usize> = (0..members.len()).collect();
    order.sort_by_key(|member| std::cmp::Reverse(has[*member]));
    let mut share = vec![SLOTS / members.len(); members.len()];
    for member in &order[..SLOTS % members.len()] {
        share[*member] += 1;
    }
    for slot in slots.iter_mut().rev() {
        if let Some(member) = *slot
            && has[member] > share[member]
        {
            has[member] -= 1;
            *slot = None;
        }
    }
    let mut next = 0;
    for slot in &mut slots {
        if slot.is_none() {
            while has[next] >= share[next] {
                next += 1;
            }
            has[next] += 1;
            *slot = Some(next);
        }
    }
    let mut ranges: Vec<KeyRange> = Vec::new();
    for (slot, member) in slots.into_iter().enumerate() {
        let consumer = members[member.expect("every slot was given")];
        let first = (slot as u32) << SLOT_BITS;
        let last = first | ((1 << SLOT_BITS) - 1);
        match ranges.last_mut() {
            Some(range) if range.consumer == consumer => range.last = last,
            _ => ranges.push(KeyRange { first, last, consumer: consumer.to_owned() }),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    fn shares(table: &[KeyRange]) -> BTreeMap<String, u64> {
        let mut shares = BTreeMap::new();
        for range in table {
            *shares.entry(range.consumer.clone()).or_default() +=
                (u64::from(range.last) + 1 - u64::from(range.first)) >> SLOT_BITS;
        }
        shares
    }

    proptest! {
        #[test]
        fn every_hash_has_one_consumer_shares_are_even_and_the_minimum_moves(
            steps in prop::collection::vec(prop::collection::btree_set(0u8..40, 1..20), 1..8)
        ) {
            let mut table: Vec<KeyRange> = Vec::new();
            let mut before: BTreeSet<String> = BTreeSet::new();
            for step in steps {
                let names: Vec<String> = step.iter().map(|n| format!("c{n}")).collect();
                let members: Vec<&str> = names.iter().map(String::as_str).collect();
                let next = rebalanced(&table, &members);
                prop_assert_eq!((next[0].first, next[next.len() - 1].last), (0, u32::MAX));
                prop_assert!(next.windows(2).all(|w| w[0].last + 1 == w[1].first && w[0].consumer != w[1].consumer));
                let now = shares(&next);
                let (least, most) = (now.values().min().copied(), now.values().max().copied());
                prop_assert_eq!(now.len(), members.len());
                prop_assert!(most.zip(least).is_some_and(|(m, l)| m - l <= 1));
                if !table.is_empty() {
                    let moved = (0..SLOTS as u32).filter(|slot| {
                        hash_owner(&table, slot << SLOT_BITS) != hash_owner(&next, slot << SLOT_BITS)
                    }).count() as u64;
                    let was = shares(&table);
                    let gone: u64 = was.iter().filter(|(name, _)| !now.contains_key(*name)).map(|(_, n)| n).sum();
                    let grown: u64 = now.iter().map(|(name, n)| n.saturating_sub(was.get(name).copied().unwrap_or(0))).sum();
                    prop_assert!(moved <= gone.max(grown), "{moved} slots moved, {gone} were free, {grown} were wanted");
                }
                before.extend(names);
                table = next;
            }
        }
    }
}
