//! Ensemble size, write quorum, ack quorum, and the arithmetic that follows from them.

use geminga_proto::ids::{EntryId, Slot};

/// The largest ensemble. A write set is kept per entry, so it stays small.
pub const ENSEMBLE_SIZE_MAX: usize = 16;

/// `1 <= ack <= write <= ensemble`. Default 3, 3, 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quorum {
    ensemble: usize,
    write: usize,
    ack: usize,
}

/// Numbers that make no quorum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "ensemble {ensemble}, write quorum {write}, ack quorum {ack}: needs 1 <= ack <= write <= ensemble <= {ENSEMBLE_SIZE_MAX}"
)]
pub struct QuorumError {
    pub ensemble: usize,
    pub write: usize,
    pub ack: usize,
}

impl Quorum {
    /// A checked quorum.
    ///
    /// # Errors
    /// [`QuorumError`] unless `1 <= ack <= write <= ensemble <= ENSEMBLE_SIZE_MAX`.
    pub fn new(ensemble: usize, write: usize, ack: usize) -> Result<Self, QuorumError> {
        if 1 <= ack && ack <= write && write <= ensemble && ensemble <= ENSEMBLE_SIZE_MAX {
            Ok(Self { ensemble, write, ack })
        } else {
            Err(QuorumError { ensemble, write, ack })
        }
    }

    /// `E`: slots of a fragment.
    #[must_use]
    pub fn ensemble(self) -> usize {
        self.ensemble
    }

    /// `Qw`: slots each entry is sent to.
    #[must_use]
    pub fn write(self) -> usize {
        self.write
    }

    /// `Qa`: synced copies before an entry is acknowledged.
    #[must_use]
    pub fn ack(self) -> usize {
        self.ack
    }

    /// `Qw - Qa + 1`: so many slots of a write set meet every set of `Qa`.
    #[must_use]
    pub fn cover(self) -> usize {
        self.write - self.ack + 1
    }

    /// The most vacant slots in any write set (W0).
    #[must_use]
    pub fn vacant_max(self) -> usize {
        self.write - self.ack
    }

    /// The slots that hold `entry` (W1): `(entry + i) mod E`, `0 <= i < Qw`.
    pub fn write_set(self, entry: EntryId) -> impl Iterator<Item = Slot> + Clone {
        let start = (entry.0 % self.ensemble as u64) as usize;
        (0..self.write).map(move |i| Slot((start + i) % self.ensemble))
    }

    /// Where `slot` stands in the write set of `entry`, if it is part of it.
    #[must_use]
    pub fn position(self, entry: EntryId, slot: Slot) -> Option<usize> {
        if slot.0 >= self.ensemble {
            return None;
        }
        let start = (entry.0 % self.ensemble as u64) as usize;
        let position = (slot.0 + self.ensemble - start) % self.ensemble;
        (position < self.write).then_some(position)
    }

    /// Whether every write set has at least `needed` slots of which `counts` is true.
    pub fn every_write_set_has(self, needed: usize, counts: impl Fn(Slot) -> bool) -> bool {
        (0..self.ensemble as u64).all(|start| {
            self.write_set(EntryId(start)).filter(|slot| counts(*slot)).count() >= needed
        })
    }
}

impl Default for Quorum {
    fn default() -> Self {
        Self { ensemble: 3, write: 3, ack: 2 }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn any_quorum() -> impl Strategy<Value = Quorum> {
        (1usize..6)
            .prop_flat_map(|e| (Just(e), 1..=e))
            .prop_flat_map(|(e, w)| (Just(e), Just(w), 1..=w))
            .prop_map(|(e, w, a)| Quorum::new(e, w, a).expect("in order"))
    }

    proptest! {
        #[test]
        fn position_is_the_inverse_of_the_write_set(quorum in any_quorum(), entry in 0u64..100) {
            let set: Vec<Slot> = quorum.write_set(EntryId(entry)).collect();
            for slot in 0..quorum.ensemble() + 1 {
                let expected = set.iter().position(|s| s.0 == slot);
                prop_assert_eq!(quorum.position(EntryId(entry), Slot(slot)), expected);
            }
        }
    }

    #[test]
    fn impossible_quorums_are_refused() {
        for (e, w, a) in [(0, 0, 0), (3, 3, 0), (3, 2, 3), (2, 3, 2), (17, 3, 2)] {
            assert!(Quorum::new(e, w, a).is_err());
        }
        assert_eq!(Quorum::default().cover(), 2);
    }
}
