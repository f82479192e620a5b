//! The zone rule: bookies of one zone may fail together, so the copies of an entry lie in as many zones as can be. Pure.
//!
//! **The zone rule** (EC6, A2, DC1). A write set *spans* the zones of the incarnations in its slots; a vacant slot, and a
//! holder that is not registered, count for no zone; bookies without a zone count together as one. Of two fragments the one
//! whose narrowest write set spans more zones is spread better, then the one whose write sets span more in sum ([`Spread`]).
//! - A choice of slots keeps the rule if no other choice of the candidates at hand for the same slots is spread better
//!   ([`spread_kept`]): a new ledger (W0), a change (EC3, R5) and a repaired slot (A2) are chosen so. Free space decides
//!   only between choices that are spread alike, and a slot is rather filled in the wrong zone than left empty.
//! - The bookies at hand meet the rule as far as they allow the spread that all allow: a bookie whose leaving would lower
//!   [`spread_possible`] is not decommissioned (DC1).

use geminga_proto::ids::EntryId;

use super::{Available, LedgerAge};
use crate::{
    metadata::Holder,
    quorum::{ENSEMBLE_SIZE_MAX, Quorum},
};

/// How far the write sets of a fragment are spread over zones; more is better.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Spread {
    /// Zones that the narrowest write set spans.
    pub least: usize,
    /// Zones that all write sets span, in sum.
    pub sum: usize,
}

/// The zone of each slot's holder; none for vacant slots and for holders that are not registered.
#[must_use]
pub fn zones_of<'a>(slots: &[Holder], available: &'a [Available]) -> Vec<Option<&'a str>> {
    let zone = |holder: &Holder| {
        let found = available.iter().find(|a| Some(a.incarnation) == *holder);
        found.map(|found| found.zone.as_str())
    };
    slots.iter().map(zone).collect()
}

/// The spread of a fragment's slots.
#[must_use]
pub fn spread(quorum: Quorum, zones: &[Option<&str>]) -> Spread {
    let mut spread = Spread { least: usize::MAX, sum: 0 };
    for start in 0..quorum.ensemble() as u64 {
        let (mut seen, mut count) = ([""; ENSEMBLE_SIZE_MAX], 0);
        for slot in quorum.write_set(EntryId(start)) {
            if let Some(zone) = zones[slot.0].filter(|zone| !seen[..count].contains(zone)) {
                seen[count] = zone;
                count += 1;
            }
        }
        spread.least = spread.least.min(count);
        spread.sum += count;
    }
    spread
}

/// Whether `after`, which differs from `before` in some slots, keeps the zone rule: none of the registered bookies that
/// may take these slots of `ledger` would have given a better spread. For A2's choice of where to copy to.
#[must_use]
pub fn spread_kept(
    quorum: Quorum,
    before: &[Holder],
    after: &[Holder],
    available: &[Available],
    ledger: LedgerAge,
) -> bool {
    let changed = |slot: &usize| before[*slot] != after[*slot];
    let wanted: Vec<usize> = (0..before.len().min(after.len())).filter(changed).collect();
    let mut candidates: Vec<&Available> = available.iter().filter(|a| a.takes(ledger)).collect();
    candidates.retain(|a| !before.contains(&Some(a.incarnation)));
    let mut fixed = zones_of(before, available);
    for slot in &wanted {
        fixed[*slot] = None;
    }
    let mut best = fixed.clone();
    for (slot, bookie) in assign(quorum, &fixed, &wanted, &candidates) {
        best[slot] = Some(&bookie.zone);
    }
    spread(quorum, &zones_of(after, available)) >= spread(quorum, &best)
}

/// The best spread that a new ledger can have on the bookies that take new ledgers. For DC1: compare with and without one.
#[must_use]
pub fn spread_possible(quorum: Quorum, available: &[Available]) -> Spread {
    let new = LedgerAge { generation: u32::MAX, created: None };
    let candidates: Vec<&Available> = available.iter().filter(|a| a.takes(new)).collect();
    let size = quorum.ensemble();
    let mut zones = vec![None; size];
    let vacant = size.saturating_sub(candidates.len());
    let vacates = |slot: usize| (slot + 1) * vacant / size > slot * vacant / size;
    let wanted: Vec<usize> = (0..size).filter(|slot| !vacates(*slot)).collect();
    for (slot, bookie) in assign(quorum, &vec![None; size], &wanted, &candidates) {
        zones[slot] = Some(bookie.zone.as_str());
    }
    spread(quorum, &zones)
}

/// The search gives up looking for something better after this many steps. Ensembles of up to five slots never need so
/// many; larger ones get a good choice instead of the best.
const STEPS_MAX: usize = 5_000;

/// Assigns candidates (best first) to the wanted slots: the best spread together with `fixed`, then the best candidates.
/// There are at least as many candidates as wanted slots.
pub(super) fn assign<'a>(
    quorum: Quorum,
    fixed: &[Option<&'a str>],
    wanted: &[usize],
    candidates: &[&'a Available],
) -> Vec<(usize, &'a Available)> {
    // By zone, each with its best first; the zone of the best candidate first.
    let mut zones: Vec<(&str, Vec<usize>)> = Vec::new();
    for (rank, candidate) in candidates.iter().enumerate() {
        match zones.iter_mut().find(|(zone, _)| *zone == candidate.zone) {
            Some((_, ranks)) => ranks.push(rank),
            None => zones.push((&candidate.zone, vec![rank])),
        }
    }
    // More zones than slots, none of which is taken: the best of the first ones give all there is to have.
    let is_taken = |zone: &str| fixed.contains(&Some(zone));
    let mut untaken = 0;
    zones.retain(|(zone, _)| {
        untaken += usize::from(!is_taken(zone));
        is_taken(zone) || untaken <= wanted.len()
    });
    let known = zones.iter().filter(|(zone, _)| !is_taken(zone)).count();
    let taken = fixed.iter().enumerate().filter_map(|(i, zone)| zone.map(|zone| (i, zone)));
    let taken = taken.clone().filter(|(i, zone)| !fixed[..*i].contains(&Some(zone))).count();
    let least = (known + taken).min(quorum.write());
    let mut search = Search {
        quorum,
        full: Spread { least, sum: least * quorum.ensemble() },
        wanted,
        used: vec![0; zones.len()],
        zones,
        now: fixed.to_vec(),
        path: Vec::new(),
        cost: 0,
        best: None,
        steps: 0,
    };
    search.descend();
    let path = search.best.map(|(_, _, path)| path).unwrap_or_default();
    wanted.iter().zip(path).map(|(slot, rank)| (*slot, candidates[rank])).collect()
}

struct Search<'s, 'a> {
    quorum: Quorum,
    /// No choice can be spread better than this.
    full: Spread,
    wanted: &'s [usize],
    zones: Vec<(&'a str, Vec<usize>)>,
    /// Candidates taken of each zone.
    used: Vec<usize>,
    now: Vec<Option<&'a str>>,
    path: Vec<usize>,
    /// Sum of the ranks on the path.
    cost: usize,
    best: Option<(Spread, usize, Vec<usize>)>,
    steps: usize,
}

impl Search<'_, '_> {
    fn descend(&mut self) {
        self.steps += 1;
        if self
            .best
            .as_ref()
            .is_some_and(|(best, cost, _)| *best >= self.full && self.cost >= *cost)
        {
            return; // from here it can only be as well spread, by worse candidates
        }
        let Some(slot) = self.wanted.get(self.path.len()).copied() else {
            let spread = spread(self.quorum, &self.now);
            let better = self.best.as_ref().is_none_or(|(best, cost, _)| {
                spread > *best || (spread == *best && self.cost < *cost)
            });
            if better {
                self.best = Some((spread, self.cost, self.path.clone()));
            }
            return;
        };
        // First the zone that widens the write sets of this slot most, so that the first choice found is a good one.
        let mut order: Vec<(usize, usize)> = Vec::with_capacity(self.zones.len());
        for zone in 0..self.zones.len() {
            if self.used[zone] < self.zones[zone].1.len() {
                self.now[slot] = Some(self.zones[zone].0);
                order.push((spread(self.quorum, &self.now).sum, zone));
            }
        }
        order.sort_by_key(|(sum, zone)| (std::cmp::Reverse(*sum), *zone));
        for (_, zone) in order {
            if self.best.is_some() && self.steps >= STEPS_MAX {
                break;
            }
            let (name, ranks) = &self.zones[zone];
            let rank = ranks[self.used[zone]];
            self.now[slot] = Some(name);
            self.used[zone] += 1;
            self.cost += rank;
            self.path.push(rank);
            self.descend();
            self.path.pop();
            self.cost -= rank;
            self.used[zone] -= 1;
        }
        self.now[slot] = None;
    }
}

#[cfg(test)]
mod tests {
    use geminga_proto::ids::Incarnation;
    use geminga_runtime::random::Random;
    use proptest::prelude::*;

    use super::*;
    use crate::ensemble::{choose, replacements};

    const NEW: LedgerAge = LedgerAge { generation: 0, created: None };
    const NAMES: [&str; 5] = ["", "a", "b", "c", "d"];

    fn bookies(zones: &[usize]) -> Vec<Available> {
        let bookie = |(i, zone): (usize, &usize)| Available {
            incarnation: Incarnation(i as u32 + 1),
            writable: true,
            draining: false,
            limbo: None,
            disk_free: 100 * (i as u64 % 4),
            zone: NAMES[*zone].to_owned(),
        };
        zones.iter().enumerate().map(bookie).collect()
    }

    /// The best spread of all ways to fill the slots `open` from `free`, by trying them all.
    fn brute_force<'a>(
        quorum: Quorum,
        zones: &mut Vec<Option<&'a str>>,
        open: &[usize],
        free: &mut Vec<&'a Available>,
    ) -> Spread {
        let Some((slot, rest)) = open.split_first() else { return spread(quorum, zones) };
        let mut best = Spread::default();
        for i in 0..free.len() {
            let bookie = free.remove(i);
            zones[*slot] = Some(&bookie.zone);
            best = best.max(brute_force(quorum, zones, rest, free));
            zones[*slot] = None;
            free.insert(i, bookie);
        }
        best
    }

    fn any_quorum() -> impl Strategy<Value = Quorum> {
        (1usize..=5, 1usize..=5, 1usize..=5)
            .prop_filter_map("in order", |(e, w, a)| Quorum::new(e, w, a).ok())
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

        #[test]
        fn a_new_ledger_is_spread_as_well_as_can_be(
            quorum in any_quorum(), zones in prop::collection::vec(0usize..5, 1..7), seed: u64,
        ) {
            let all = bookies(&zones);
            let Ok(slots) = choose(quorum, &all, NEW, &Random::from_seed(seed)) else { return Ok(()) };
            let open: Vec<usize> = (0..slots.len()).filter(|i| slots[*i].is_some()).collect();
            let mut free: Vec<&Available> = all.iter().collect();
            let best = brute_force(quorum, &mut vec![None; slots.len()], &open, &mut free);
            prop_assert_eq!(spread(quorum, &zones_of(&slots, &all)), best);
            prop_assert_eq!(spread_possible(quorum, &all), best);
        }

        #[test]
        fn replacements_keep_the_zone_rule(
            quorum in any_quorum(),
            zones in prop::collection::vec(0usize..5, 5..9),
            wanted in prop::collection::btree_set(0usize..5, 0..4),
            gone: bool, seed: u64,
        ) {
            let all = bookies(&zones);
            let before: Vec<Holder> =
                (1..=quorum.ensemble() as u32).map(|i| (i != 2).then_some(Incarnation(i))).collect();
            let wanted: Vec<usize> =
                wanted.into_iter().filter(|slot| *slot < quorum.ensemble()).rev().collect();
            // Perhaps the first holder's registration is gone: it counts for no zone.
            let all = &all[usize::from(gone)..];
            let random = Random::from_seed(seed);
            let chosen = replacements(quorum, &before, &wanted, all, NEW, &random);
            let mut free: Vec<&Available> =
                all.iter().filter(|a| !before.contains(&Some(a.incarnation))).collect();
            prop_assert_eq!(chosen.len(), wanted.len().min(free.len()), "rather filled than empty");
            let filled: Vec<usize> = chosen.iter().map(|(slot, _)| *slot).collect();
            prop_assert_eq!(&filled[..], &wanted[..filled.len()], "the most urgent first");
            let mut after = before.clone();
            let mut open = zones_of(&before, all);
            for (slot, incarnation) in &chosen {
                prop_assert!(!before.contains(&Some(*incarnation)) && !after.contains(&Some(*incarnation)));
                after[*slot] = Some(*incarnation);
                open[*slot] = None;
            }
            let best = brute_force(quorum, &mut open, &filled, &mut free);
            prop_assert_eq!(spread(quorum, &zones_of(&after, all)), best);
            prop_assert!(spread_kept(quorum, &before, &after, all, NEW));
        }

        #[test]
        fn large_ensembles_are_chosen_in_bounded_time_and_never_badly(
            zones in prop::collection::vec(1usize..5, 16..40), seed: u64,
        ) {
            let quorum = Quorum::new(16, 4, 3).expect("in order");
            let all = bookies(&zones);
            let slots = choose(quorum, &all, NEW, &Random::from_seed(seed)).expect("enough");
            let at_hand = zones.iter().collect::<std::collections::BTreeSet<_>>().len();
            let spread = spread(quorum, &zones_of(&slots, &all));
            prop_assert!(spread.least >= at_hand.min(2), "{:?} of {} zones", spread, at_hand);
        }
    }

    #[test]
    fn three_zones_hold_one_copy_each_and_the_lost_zone_is_filled_from_itself() {
        let random = Random::from_seed(1);
        let quorum = Quorum::default();
        let all = bookies(&[1, 1, 1, 2, 3, 3]);
        for _ in 0..20 {
            let slots = choose(quorum, &all, NEW, &random).expect("enough");
            let zones = zones_of(&slots, &all);
            assert_eq!(spread(quorum, &zones), Spread { least: 3, sum: 9 }, "{zones:?}");
            let lost = zones.iter().position(|zone| *zone == Some("c")).expect("one in c");
            let chosen = replacements(quorum, &slots, &[lost], &all, NEW, &random);
            assert_eq!(zones_of(&[Some(chosen[0].1)], &all), [Some("c")]);
        }
    }

    #[test]
    fn a_copy_in_the_wrong_zone_and_a_decommission_that_costs_a_zone_are_noticed() {
        let quorum = Quorum::default();
        let all = bookies(&[1, 2, 3, 1, 3]);
        let i = |n| Some(Incarnation(n));
        let kept = |after: &[Holder]| spread_kept(quorum, &[i(1), i(2), i(3)], after, &all, NEW);
        assert!(kept(&[i(1), i(2), i(5)]), "c for c");
        assert!(!kept(&[i(1), i(2), i(4)]), "a for c, though c has another");
        let without = |n| {
            let rest: Vec<_> =
                all.iter().filter(|a| Some(a.incarnation) != i(n)).cloned().collect();
            spread_possible(quorum, &rest)
        };
        assert_eq!(without(1), spread_possible(quorum, &all));
        assert!(without(2) < spread_possible(quorum, &all), "the last one of its zone");
    }

    #[test]
    fn among_equal_spreads_more_free_space_comes_first() {
        let quorum = Quorum::default();
        let mut all = bookies(&[1, 1, 2, 2, 3, 3]);
        for (i, bookie) in all.iter_mut().enumerate() {
            bookie.disk_free = if i % 2 == 0 { 1_000 } else { 10 };
        }
        let mut slots = choose(quorum, &all, NEW, &Random::from_seed(4)).expect("enough");
        slots.sort();
        assert_eq!(slots, [1, 3, 5].map(|i| Some(Incarnation(i))));
    }
}
