//! `ledgers/<id>`, typed: what a ledger is, which transitions are legal (MD4), and the shape every value keeps (I9).

use bytes::Bytes;
use geminga_metadata::{KeyValue, Revision};
use geminga_proto::{
    ids::{EntryId, Epoch, Incarnation, LedgerId, SegmentId, Slot, TopicId},
    storage::v1 as wire,
};
use prost::Message;

use crate::quorum::Quorum;

/// The format number of values written now.
const FORMAT: u32 = 1;

/// The most fragments of one ledger; a writer rolls long before.
pub const FRAGMENTS_MAX: usize = 1_000;

/// Who holds a slot; `None` is a vacant slot, which acknowledges nothing (W0).
pub type Holder = Option<Incarnation>;

/// 16 random bytes by which a caller finds its own change again (MD3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Nonce(pub [u8; 16]);

/// Who recovers: the owner's epoch, or 0 for a helper, and a nonce of the attempt (R1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecoveryNonce {
    pub epoch: Epoch,
    pub nonce: Nonce,
}

/// Where a ledger stands (MD4).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LedgerState {
    /// Its writer adds to it.
    Open,
    /// Someone finds out where it ends.
    InRecovery(RecoveryNonce),
    /// Its end is known and never changes.
    Closed {
        /// The last entry; none for an empty ledger.
        last: Option<EntryId>,
        /// Payload bytes of all entries.
        length: u64,
    },
    /// Bookies may drop it.
    Deleted { nonce: Nonce },
}

/// From `first_entry` on (to the next fragment), entries lie on these slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fragment {
    pub first_entry: EntryId,
    /// Of the creation, ensemble change or recovery that made it.
    pub nonce: Nonce,
    pub slots: Vec<Holder>,
}

impl Fragment {
    /// Who holds this slot.
    #[must_use]
    pub fn holder(&self, slot: Slot) -> Holder {
        self.slots.get(slot.0).copied().flatten()
    }

    /// Whether any slot is vacant.
    #[must_use]
    pub fn has_vacancy(&self) -> bool {
        self.slots.contains(&None)
    }

    /// Whether it names this incarnation.
    #[must_use]
    pub fn names(&self, incarnation: Incarnation) -> bool {
        self.slots.contains(&Some(incarnation))
    }

    /// Its slots that are not vacant.
    pub fn holders(&self) -> impl Iterator<Item = (Slot, Incarnation)> + '_ {
        self.slots.iter().enumerate().filter_map(|(i, holder)| Some((Slot(i), (*holder)?)))
    }
}

/// The segment and epoch that created the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LedgerOwner {
    pub segment: SegmentId,
    pub epoch: Epoch,
}

/// The decoded, checked value of `ledgers/<id>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LedgerMetadata {
    pub id: LedgerId,
    pub state: LedgerState,
    pub quorum: Quorum,
    /// Never empty; `first_entry` strictly increases, the first is 0 (I9).
    pub fragments: Vec<Fragment>,
    pub owner: LedgerOwner,
}

/// A value as it stood at a revision of its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned<T> {
    pub value: T,
    /// The revision that made the key; a bound of limbo is compared with it (D8, EC6).
    pub create_revision: Revision,
    /// The revision of its last change: what the next CAS compares (MD1).
    pub mod_revision: Revision,
}

impl<T> Versioned<T> {
    /// A value whose key was made by the transaction that landed at `revision`.
    #[must_use]
    pub fn created(value: T, revision: Revision) -> Self {
        Self { value, create_revision: revision, mod_revision: revision }
    }

    /// The same key with a new value that landed at `revision`.
    #[must_use]
    pub fn changed<U>(&self, value: U, revision: Revision) -> Versioned<U> {
        Versioned { value, create_revision: self.create_revision, mod_revision: revision }
    }
}

/// A stored value that is not ledger metadata. A defect or damage: a human looks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetadataError {
    /// Not decodable, or written by a newer version.
    #[error("ledger metadata cannot be decoded: {0}")]
    Decode(String),
    /// Decodable, but against I9.
    #[error("ledger {ledger} metadata breaks a rule: {why}")]
    Invalid { ledger: LedgerId, why: String },
}

impl LedgerMetadata {
    /// The fragment that contains `entry`.
    #[must_use]
    pub fn fragment_of(&self, entry: EntryId) -> &Fragment {
        fragment_of(&self.fragments, entry)
    }

    /// The fragment that is still being written.
    ///
    /// # Panics
    /// Never on a checked value: there is at least one fragment.
    #[must_use]
    pub fn last_fragment(&self) -> &Fragment {
        self.fragments.last().expect("checked: there is at least one fragment")
    }

    /// The slots that hold `entry` (W1).
    #[must_use]
    pub fn write_set(&self, entry: EntryId) -> Vec<Slot> {
        self.quorum.write_set(entry).collect()
    }

    /// `last` if Closed and not empty.
    #[must_use]
    pub fn last(&self) -> Option<EntryId> {
        match self.state {
            LedgerState::Closed { last, .. } => last,
            _ => None,
        }
    }

    /// Whether it is Closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        matches!(self.state, LedgerState::Closed { .. })
    }

    /// Whether any slot of any fragment is vacant.
    #[must_use]
    pub fn has_vacancy(&self) -> bool {
        self.fragments.iter().any(Fragment::has_vacancy)
    }

    /// The value under recovery by `nonce` (R1). From Open or InRecovery.
    #[must_use]
    pub fn in_recovery(&self, nonce: RecoveryNonce) -> Self {
        Self { state: LedgerState::InRecovery(nonce), ..self.clone() }
    }

    /// The closed value: fragments that start after `last` are dropped, the first one stays (R7, section 6).
    #[must_use]
    pub fn closed(&self, last: Option<EntryId>, length: u64) -> Self {
        let mut fragments = self.fragments.clone();
        cut(&mut fragments, last);
        Self { state: LedgerState::Closed { last, length }, fragments, ..self.clone() }
    }

    /// The deleted value. Legal from Closed only: an Open ledger is recovered first, so that its writer is fenced (MD4).
    #[must_use]
    pub fn deleted(&self, nonce: Nonce) -> Option<Self> {
        self.is_closed().then(|| Self { state: LedgerState::Deleted { nonce }, ..self.clone() })
    }

    /// Whether MD4 allows a step from this value to `next`.
    #[must_use]
    pub fn may_become(&self, next: &Self) -> bool {
        use LedgerState as S;
        if (self.id, self.quorum, self.owner) != (next.id, next.quorum, next.owner) {
            return false;
        }
        let (was, is) = (&self.fragments[..], &next.fragments[..]);
        match (&self.state, &next.state) {
            (S::Open, S::Open) => is.len() >= was.len() && finals_stay(was, is),
            (S::Open, S::InRecovery(_)) => was == is,
            (S::InRecovery(_), S::InRecovery(_)) => {
                was.last() == is.last() && one_slot_differs(was, is)
            }
            (S::Open | S::InRecovery(_), S::Closed { .. }) => finals_stay(was, is),
            (S::Closed { last: a, length: n }, S::Closed { last: b, length: m }) => {
                a == b && n == m && one_slot_differs(was, is)
            }
            (S::Closed { .. }, S::Deleted { .. }) => was == is,
            _ => false,
        }
    }

    /// Checks I9 and the quorum.
    ///
    /// # Errors
    /// [`MetadataError::Invalid`].
    pub fn validate(&self) -> Result<(), MetadataError> {
        let invalid = |why: String| Err(MetadataError::Invalid { ledger: self.id, why });
        if self.fragments.is_empty() || self.fragments.len() > FRAGMENTS_MAX {
            return invalid(format!("{} fragments", self.fragments.len()));
        }
        if self.fragments[0].first_entry != EntryId(0) {
            return invalid("the first fragment does not start at entry 0".into());
        }
        for pair in self.fragments.windows(2) {
            if pair[0].first_entry >= pair[1].first_entry {
                return invalid("fragments do not rise".into());
            }
        }
        for fragment in &self.fragments {
            if let Err(why) = check_slots(self.quorum, &fragment.slots) {
                return invalid(why);
            }
        }
        Ok(())
    }

    /// The stored bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        use wire::ledger_metadata as w;
        let state = match &self.state {
            LedgerState::Open => w::State::Open(w::Open {}),
            LedgerState::InRecovery(by) => w::State::InRecovery(w::InRecovery {
                epoch: by.epoch.0,
                nonce: Bytes::copy_from_slice(&by.nonce.0),
            }),
            LedgerState::Closed { last, length } => w::State::Closed(w::Closed {
                last: crate::entry::encode_lac(*last),
                length: *length,
            }),
            LedgerState::Deleted { nonce } => {
                w::State::Deleted(w::Deleted { nonce: Bytes::copy_from_slice(&nonce.0) })
            }
        };
        let fragments = self.fragments.iter().map(|fragment| wire::Fragment {
            first_entry: fragment.first_entry.0,
            nonce: Bytes::copy_from_slice(&fragment.nonce.0),
            slots: fragment.slots.iter().map(|holder| holder.map_or(0, |i| i.0)).collect(),
        });
        let value = wire::LedgerMetadata {
            format: FORMAT,
            id: self.id.0,
            state: Some(state),
            ensemble_size: self.quorum.ensemble() as u32,
            write_quorum: self.quorum.write() as u32,
            ack_quorum: self.quorum.ack() as u32,
            digest: wire::Digest::Crc32c as i32,
            fragments: fragments.collect(),
            owner: Some(wire::LedgerOwner {
                topic: self.owner.segment.topic.0,
                segment: self.owner.segment.segment,
                epoch: self.owner.epoch.0,
            }),
        };
        value.encode_to_vec().into()
    }

    /// Reads and checks a stored value.
    ///
    /// # Errors
    /// [`MetadataError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, MetadataError> {
        use wire::ledger_metadata::State;
        let fail = |why: &str| MetadataError::Decode(why.to_owned());
        let value = wire::LedgerMetadata::decode(bytes)
            .map_err(|error| MetadataError::Decode(error.to_string()))?;
        if value.format != FORMAT {
            return Err(MetadataError::Decode(format!("format {}", value.format)));
        }
        if value.digest != wire::Digest::Crc32c as i32 {
            return Err(fail("unknown digest"));
        }
        let quorum = Quorum::new(
            value.ensemble_size as usize,
            value.write_quorum as usize,
            value.ack_quorum as usize,
        )
        .map_err(|error| MetadataError::Decode(error.to_string()))?;
        let state = match value.state.ok_or_else(|| fail("no state"))? {
            State::Open(_) => LedgerState::Open,
            State::InRecovery(by) => LedgerState::InRecovery(RecoveryNonce {
                epoch: Epoch(by.epoch),
                nonce: nonce(&by.nonce)?,
            }),
            State::Closed(closed) => LedgerState::Closed {
                last: crate::entry::decode_lac(closed.last),
                length: closed.length,
            },
            State::Deleted(deleted) => LedgerState::Deleted { nonce: nonce(&deleted.nonce)? },
        };
        let fragment = |fragment: wire::Fragment| {
            let holder = |slot: u32| (slot != 0).then_some(Incarnation(slot));
            Ok(Fragment {
                first_entry: EntryId(fragment.first_entry),
                nonce: nonce(&fragment.nonce)?,
                slots: fragment.slots.into_iter().map(holder).collect(),
            })
        };
        let owner = value.owner.ok_or_else(|| fail("no owner"))?;
        let metadata = Self {
            id: LedgerId(value.id),
            state,
            quorum,
            fragments: value.fragments.into_iter().map(fragment).collect::<Result<_, _>>()?,
            owner: LedgerOwner {
                segment: SegmentId { topic: TopicId(owner.topic), segment: owner.segment },
                epoch: Epoch(owner.epoch),
            },
        };
        metadata.validate()?;
        Ok(metadata)
    }

    /// Reads and checks a stored key, keeping its revisions.
    ///
    /// # Errors
    /// [`MetadataError`].
    pub fn from_key_value(found: &KeyValue) -> Result<Versioned<Self>, MetadataError> {
        Ok(Versioned {
            value: Self::decode(&found.value)?,
            create_revision: found.create_revision,
            mod_revision: found.mod_revision,
        })
    }
}

/// The fragment that contains `entry`; `fragments` is not empty and starts at 0.
pub(crate) fn fragment_of(fragments: &[Fragment], entry: EntryId) -> &Fragment {
    let after = fragments.partition_point(|fragment| fragment.first_entry <= entry);
    &fragments[after.max(1) - 1]
}

/// Drops the fragments that start after `last`; the first one stays (R7).
pub(crate) fn cut(fragments: &mut Vec<Fragment>, last: Option<EntryId>) {
    let keep = fragments
        .iter()
        .take_while(|fragment| last.is_some_and(|last| fragment.first_entry <= last))
        .count();
    fragments.truncate(keep.max(1));
}

/// I9 for one ensemble: E slots, no incarnation twice, vacant slots at most Qw-Qa per write set.
///
/// # Errors
/// What is wrong.
pub(crate) fn check_slots(quorum: Quorum, slots: &[Holder]) -> Result<(), String> {
    if slots.len() != quorum.ensemble() {
        return Err(format!("{} slots where E is {}", slots.len(), quorum.ensemble()));
    }
    for (i, holder) in slots.iter().enumerate() {
        if let Some(incarnation) = holder
            && slots[..i].contains(holder)
        {
            return Err(format!("incarnation {incarnation} twice in a fragment"));
        }
    }
    if quorum.every_write_set_has(quorum.ack(), |slot| slots[slot.0].is_some()) {
        Ok(())
    } else {
        Err("more vacant slots than Qw-Qa in a write set".into())
    }
}

fn nonce(bytes: &[u8]) -> Result<Nonce, MetadataError> {
    let bytes = bytes.try_into().map_err(|_| MetadataError::Decode("nonce length".into()))?;
    Ok(Nonce(bytes))
}

/// All but the last fragment are final: they keep their place, unless a close cuts them off with what follows.
fn finals_stay(was: &[Fragment], is: &[Fragment]) -> bool {
    let finals = &was[..was.len().saturating_sub(1)];
    finals.iter().zip(is).all(|(was, is)| was.first_entry == is.first_entry)
}

/// Closed -> Closed: the replicator fills or swaps one slot.
fn one_slot_differs(a: &[Fragment], b: &[Fragment]) -> bool {
    let same_shape =
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.first_entry == b.first_entry);
    let differing: usize = a
        .iter()
        .zip(b)
        .map(|(a, b)| a.slots.iter().zip(&b.slots).filter(|(a, b)| a != b).count())
        .sum();
    same_shape && differing <= 1
}

#[cfg(test)]
#[path = "metadata_tests.rs"]
mod tests;
