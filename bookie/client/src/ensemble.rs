//! Which incarnations take part: the choice for a new ledger (W0) and for a slot that failed (EC6). Pure. Where they stand
//! is [`zones`]'s part.

pub mod zones;

use geminga_metadata::{KeyValue, Revision, StoreError};
use geminga_proto::{
    ids::{Incarnation, LedgerId},
    storage::v1 as wire,
};
use geminga_runtime::random::Random;
use prost::Message;

use crate::{metadata::Holder, quorum::Quorum};

/// A bookie's limbo: every ledger whose key was created at or below it may have lost entries there (D8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimboBound {
    pub generation: u32,
    pub revision: Revision,
}

/// One registered bookie, from `available/<id>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Available {
    pub incarnation: Incarnation,
    pub writable: bool,
    pub draining: bool,
    pub limbo: Option<LimboBound>,
    /// Bytes.
    pub disk_free: u64,
    /// Failure domain. Empty: no zone is known; all bookies without one count as one zone.
    pub zone: String,
}

/// The ledger that needs a slot filled, as far as limbo asks (D8).
#[derive(Clone, Copy, Debug)]
pub struct LedgerAge {
    /// Generation of its id.
    pub generation: u32,
    /// None for a ledger that is yet to be created: it will be above every bound that was read before.
    pub created: Option<Revision>,
}

impl LedgerAge {
    /// Of a ledger whose key was created at `created`; none if it is yet to be created.
    #[must_use]
    pub fn new(ledger: LedgerId, created: Option<Revision>) -> Self {
        Self { generation: (ledger.0 >> 56) as u32, created }
    }
}

/// Why no ensemble was found.
#[derive(Debug, thiserror::Error)]
pub enum EnsembleError {
    /// Fewer bookies are writable than W0 asks; more may come.
    #[error("{writable} bookies are writable, a new ledger needs at least {needed}")]
    NotEnoughBookies { writable: usize, needed: usize },
    /// The store did not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Available {
    /// Reads a registration; none for a value of another format, which then counts as not there.
    #[must_use]
    pub fn from_key_value(found: &KeyValue) -> Option<Self> {
        let value = wire::Available::decode(&found.value[..]).ok()?;
        if value.format != 1 || value.incarnation == 0 {
            return None;
        }
        let limbo = value.limbo.map(|bound| LimboBound {
            generation: bound.generation,
            revision: Revision(bound.revision),
        });
        Some(Self {
            incarnation: Incarnation(value.incarnation),
            writable: value.writable,
            draining: value.draining,
            limbo,
            disk_free: value.disk_free_bytes,
            zone: value.zone,
        })
    }

    /// EC6: writable, not draining, not in limbo for this ledger. The zone rule is about sets of them: [`zones`].
    #[must_use]
    pub fn takes(&self, ledger: LedgerAge) -> bool {
        self.writable && !self.draining && !self.in_limbo(ledger)
    }

    fn in_limbo(&self, ledger: LedgerAge) -> bool {
        self.limbo.is_some_and(|bound| match ledger.generation.cmp(&bound.generation) {
            std::cmp::Ordering::Less => true,
            std::cmp::Ordering::Equal => ledger.created.is_some_and(|at| at <= bound.revision),
            std::cmp::Ordering::Greater => false,
        })
    }
}

/// Candidates for `ledger`, best first: more free space first (in steps of an eighth of the largest), chance among equals.
fn ranked<'a>(
    available: &'a [Available],
    ledger: LedgerAge,
    random: &Random,
) -> Vec<&'a Available> {
    let mut candidates: Vec<&Available> = available.iter().filter(|a| a.takes(ledger)).collect();
    let step = (candidates.iter().map(|a| a.disk_free).max().unwrap_or(0) / 8).max(1);
    random.shuffle(&mut candidates);
    candidates.sort_by_key(|a| std::cmp::Reverse(a.disk_free / step));
    candidates
}

/// The slots of a new ledger (W0): E writable incarnations, or vacant slots, at most Qw-Qa in any write set. Every write set
/// spans as many zones as it can; among choices that are alike in that, the one with more free space.
///
/// # Errors
/// [`EnsembleError::NotEnoughBookies`].
pub fn choose(
    quorum: Quorum,
    available: &[Available],
    ledger: LedgerAge,
    random: &Random,
) -> Result<Vec<Holder>, EnsembleError> {
    let candidates = ranked(available, ledger, random);
    let writable = candidates.len();
    let size = quorum.ensemble();
    let vacant = size.saturating_sub(writable);
    // Vacancies are spread evenly, which keeps the most of them in any window least.
    let vacates = |slot: usize| (slot + 1) * vacant / size > slot * vacant / size;
    let wanted: Vec<usize> = (0..size).filter(|slot| !vacates(*slot)).collect();
    let mut slots = vec![None; size];
    let chosen = zones::assign(quorum, &vec![None; size], &wanted, &candidates);
    // So that slot 0 is not always the emptiest: a turn changes no write set, and neither does a swap within a zone.
    let turn = random.below(size as u64) as usize;
    let mut order: Vec<usize> = (0..chosen.len()).collect();
    random.shuffle(&mut order);
    let mut taken = vec![false; chosen.len()];
    for (slot, bookie) in &chosen {
        let same_zone = |i: &&usize| !taken[**i] && chosen[**i].1.zone == bookie.zone;
        if let Some(i) = order.iter().find(same_zone).copied() {
            taken[i] = true;
            slots[(slot + turn) % size] = Some(chosen[i].1.incarnation);
        }
    }
    if quorum.every_write_set_has(quorum.ack(), |slot| slots[slot.0].is_some()) {
        Ok(slots)
    } else {
        Err(EnsembleError::NotEnoughBookies { writable, needed: needed(quorum) })
    }
}

/// The fewest writable bookies that W0 accepts.
fn needed(quorum: Quorum) -> usize {
    let (e, w) = (quorum.ensemble(), quorum.write());
    let fits = |vacant: usize| vacant == 0 || (vacant * w).div_ceil(e) <= quorum.vacant_max();
    e - (0..=e).take_while(|vacant| fits(*vacant)).last().unwrap_or(0)
}

/// Replacements for some slots of a fragment (EC3, EC6), in the order of `wanted`; none where there is no more candidate.
/// What the fragment holds is never chosen again, not even what is being replaced. Keeps the zone rule, see [`zones`].
#[must_use]
pub fn replacements(
    quorum: Quorum,
    slots: &[Holder],
    wanted: &[usize],
    available: &[Available],
    ledger: LedgerAge,
    random: &Random,
) -> Vec<(usize, Incarnation)> {
    let mut free = ranked(available, ledger, random);
    free.retain(|candidate| !slots.contains(&Some(candidate.incarnation)));
    let wanted = &wanted[..wanted.len().min(free.len())];
    let mut fixed = zones::zones_of(slots, available);
    for slot in wanted {
        fixed[*slot] = None;
    }
    let chosen = zones::assign(quorum, &fixed, wanted, &free);
    chosen.into_iter().map(|(slot, bookie)| (slot, bookie.incarnation)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::metadata::check_slots;

    fn bookie(incarnation: u32, free: u64) -> Available {
        Available {
            incarnation: Incarnation(incarnation),
            writable: true,
            draining: false,
            limbo: None,
            disk_free: free,
            zone: String::new(),
        }
    }

    const NEW: LedgerAge = LedgerAge { generation: 0, created: None };

    #[test]
    fn with_one_bookie_missing_a_slot_stays_vacant_and_with_two_there_is_no_ledger() {
        let random = Random::from_seed(1);
        let q = Quorum::default();
        let two = choose(q, &[bookie(1, 9), bookie(2, 9)], NEW, &random).expect("T42: Qa is there");
        assert_eq!(two.iter().flatten().count(), 2);
        let one = choose(q, &[bookie(1, 9)], NEW, &random);
        assert!(matches!(one, Err(EnsembleError::NotEnoughBookies { writable: 1, needed: 2 })));
    }

    #[test]
    fn who_is_read_only_draining_or_in_limbo_is_not_chosen() {
        let random = Random::from_seed(1);
        let bound = LimboBound { generation: 0, revision: Revision(10) };
        let bookies = [
            Available { writable: false, ..bookie(1, 9) },
            Available { draining: true, ..bookie(2, 9) },
            Available { limbo: Some(bound), ..bookie(3, 9) },
            bookie(4, 9),
        ];
        let chosen = |created| {
            let age = LedgerAge { generation: 0, created };
            let two = Quorum::new(2, 2, 1).expect("in order");
            replacements(two, &[Some(Incarnation(4)), None], &[1], &bookies, age, &random)
        };
        assert_eq!(chosen(Some(Revision(10))), []);
        assert_eq!(chosen(Some(Revision(11))), [(1, Incarnation(3))], "created above the bound");
        assert_eq!(chosen(None), [(1, Incarnation(3))], "not created yet: above every bound");
        let later = LedgerAge { generation: 1, created: Some(Revision(1)) };
        assert!(bookies[2].takes(later), "a later generation is above the bound");
    }

    #[test]
    fn more_free_space_comes_first() {
        let random = Random::from_seed(3);
        let bookies: Vec<_> = (1..=6).map(|i| bookie(i, if i > 3 { 1_000 } else { 100 })).collect();
        let mut chosen = choose(Quorum::default(), &bookies, NEW, &random).expect("enough");
        chosen.sort();
        assert_eq!(chosen, [4, 5, 6].map(|i| Some(Incarnation(i))));
    }

    proptest! {
        #[test]
        fn every_choice_keeps_i9(e in 1usize..7, w in 1usize..7, a in 1usize..7, n in 0u32..9, seed: u64) {
            prop_assume!(Quorum::new(e, w, a).is_ok());
            let quorum = Quorum::new(e, w, a).expect("assumed");
            let bookies: Vec<_> = (1..=n).map(|i| bookie(i, u64::from(i) * 100)).collect();
            match choose(quorum, &bookies, NEW, &Random::from_seed(seed)) {
                Ok(slots) => prop_assert_eq!(check_slots(quorum, &slots), Ok(())),
                Err(EnsembleError::NotEnoughBookies { writable, needed }) => prop_assert!(writable < needed),
                Err(other) => prop_assert!(false, "{}", other),
            }
        }
    }
}
