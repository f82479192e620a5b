//! Which local ledgers may go, and why (G1, G2). Pure: what the store said in, verdicts out.

use std::{collections::BTreeMap, time::Duration};

use geminga_bookie_client::metadata::{LedgerMetadata, LedgerState, MetadataError, Versioned};
use geminga_metadata::Revision;
use geminga_proto::ids::{Incarnation, LedgerId};
use tokio::time::Instant;

/// How sure GC must be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// A key must be absent twice, at least so far apart.
    pub(crate) absent_for: Duration,
    /// No fragment may have named this incarnation for so long.
    pub(crate) unnamed_for: Duration,
    /// The largest share of ledgers or bytes that one pass drops on grounds other than Deleted (G2), 0.0 to 1.0.
    pub(crate) share_max: f64,
}

/// What becomes of a local ledger in this pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It stays.
    Keep,
    /// Deleted: it goes at once.
    Deleted,
    /// Absent at two reads, far enough apart.
    Absent,
    /// Closed, and nobody has counted on this copy for long: it may be marked leaving and judged once more.
    MovedAway,
}

/// What earlier passes saw. Lost with the process, which only makes GC later.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// The highest revision of the store that this process knows (G3).
    pub(crate) highest: Revision,
    absent: BTreeMap<LedgerId, Instant>,
    /// Since when a ledger as of this revision does not name us.
    unnamed: BTreeMap<LedgerId, (Instant, Revision)>,
}

/// A ledger as a point read found it.
pub(crate) type Found = Option<Result<Versioned<LedgerMetadata>, MetadataError>>;

impl Memory {
    /// G1 for one ledger, as the store had it at one revision, read at `now`.
    pub(crate) fn judge(
        &mut self,
        ledger: LedgerId,
        found: &Found,
        listed: bool,
        own: Incarnation,
        now: Instant,
        limits: &Limits,
    ) -> Verdict {
        let found = match found {
            None => {
                self.unnamed.remove(&ledger);
                let since = *self.absent.entry(ledger).or_insert(now);
                let ripe = now.duration_since(since) >= limits.absent_for && now > since;
                return if ripe { Verdict::Absent } else { Verdict::Keep };
            }
            Some(found) => found,
        };
        self.absent.remove(&ledger);
        let Ok(found) = found else {
            self.unnamed.remove(&ledger);
            return Verdict::Keep; // damaged metadata proves nothing
        };
        if matches!(found.value.state, LedgerState::Deleted { .. }) {
            return Verdict::Deleted;
        }
        if listed || !has_left(&found.value, own) {
            self.unnamed.remove(&ledger);
            return Verdict::Keep;
        }
        // Any change in between may have named us for a while: the time starts again.
        let known = self.unnamed.get(&ledger).filter(|known| known.1 == found.mod_revision);
        let since = known.map_or(now, |known| known.0);
        self.unnamed.insert(ledger, (since, found.mod_revision));
        if now.duration_since(since) >= limits.unnamed_for {
            Verdict::MovedAway
        } else {
            Verdict::Keep
        }
    }

    /// Forgets what is not here any more.
    pub(crate) fn retain(&mut self, here: impl Fn(LedgerId) -> bool) {
        self.absent.retain(|ledger, _| here(*ledger));
        self.unnamed.retain(|ledger, _| here(*ledger));
    }
}

/// Closed, and no fragment names this incarnation.
pub(crate) fn has_left(metadata: &LedgerMetadata, own: Incarnation) -> bool {
    metadata.is_closed() && !metadata.fragments.iter().any(|fragment| fragment.names(own))
}

/// G2: whether a pass may drop `(ledgers, bytes)` out of `all` on grounds other than Deleted.
pub(crate) fn is_modest(dropped: (usize, u64), all: (usize, u64), share_max: f64) -> bool {
    let within = |part: f64, whole: f64| part <= whole * share_max;
    within(dropped.0 as f64, all.0 as f64) && within(dropped.1 as f64, all.1 as f64)
}

#[cfg(test)]
mod tests {
    use geminga_bookie_client::{
        Fragment, LedgerOwner, Nonce, Quorum, metadata::LedgerState as State,
    };
    use geminga_proto::ids::{EntryId, Epoch, SegmentId, TopicId};

    use super::*;

    const OWN: Incarnation = Incarnation(7);
    const LEDGER: LedgerId = LedgerId(1);
    const HOUR: Duration = Duration::from_secs(3600);
    const LIMITS: Limits =
        Limits { absent_for: HOUR, unnamed_for: Duration::from_secs(24 * 3600), share_max: 0.2 };

    fn found(state: State, holders: [u32; 3], revision: i64) -> Found {
        let value = LedgerMetadata {
            id: LEDGER,
            state,
            quorum: Quorum::default(),
            fragments: vec![Fragment {
                first_entry: EntryId(0),
                nonce: Nonce([0; 16]),
                slots: holders.map(|i| Some(Incarnation(i))).to_vec(),
            }],
            owner: LedgerOwner {
                segment: SegmentId { topic: TopicId(1), segment: 0 },
                epoch: Epoch(1),
            },
        };
        let mut found = Versioned::created(value, Revision(1));
        found.mod_revision = Revision(revision);
        Some(Ok(found))
    }

    fn closed(holders: [u32; 3], revision: i64) -> Found {
        found(State::Closed { last: None, length: 0 }, holders, revision)
    }

    #[tokio::test(start_paused = true)]
    async fn an_absent_key_must_be_absent_twice_an_hour_apart() {
        let mut memory = Memory::default();
        let start = Instant::now();
        let mut at = |after: Duration, found: &Found| {
            memory.judge(LEDGER, found, false, OWN, start + after, &LIMITS)
        };
        assert_eq!(at(Duration::ZERO, &None), Verdict::Keep);
        assert_eq!(at(HOUR / 2, &None), Verdict::Keep);
        assert_eq!(at(HOUR, &closed([1, 2, OWN.0], 5)), Verdict::Keep, "it is back");
        assert_eq!(at(HOUR * 2, &None), Verdict::Keep, "the hour starts again");
        assert_eq!(at(HOUR * 3, &None), Verdict::Absent);
    }

    #[tokio::test(start_paused = true)]
    async fn a_moved_ledger_goes_after_a_day_in_which_nothing_of_it_changed() {
        let mut memory = Memory::default();
        let start = Instant::now();
        let mut at = |hours: u32, found: &Found, listed: bool| {
            memory.judge(LEDGER, found, listed, OWN, start + HOUR * hours, &LIMITS)
        };
        let moved = closed([1, 2, 3], 5);
        assert_eq!(at(0, &moved, false), Verdict::Keep);
        assert_eq!(at(23, &moved, true), Verdict::Keep, "a replication is listed");
        assert_eq!(at(24, &moved, false), Verdict::Keep);
        assert_eq!(at(40, &closed([1, 2, 4], 6), false), Verdict::Keep, "it changed");
        assert_eq!(at(63, &closed([1, 2, 4], 6), false), Verdict::Keep);
        assert_eq!(at(64, &closed([1, 2, 4], 6), false), Verdict::MovedAway);
        assert_eq!(at(65, &closed([1, OWN.0, 4], 7), false), Verdict::Keep, "named again");
        assert_eq!(at(200, &found(State::Open, [1, 2, 3], 8), false), Verdict::Keep, "not closed");
        let deleted = State::Deleted { nonce: Nonce([0; 16]) };
        assert_eq!(at(201, &found(deleted, [1, OWN.0, 3], 9), true), Verdict::Deleted, "at once");
        let damaged = Some(Err(MetadataError::Decode("?".to_owned())));
        assert_eq!(at(900, &damaged, false), Verdict::Keep);
    }

    #[test]
    fn a_pass_that_would_drop_more_than_a_fifth_is_refused() {
        assert!(is_modest((2, 10), (10, 100), 0.2));
        assert!(!is_modest((3, 10), (10, 100), 0.2), "ledgers");
        assert!(!is_modest((1, 21), (10, 100), 0.2), "bytes");
        assert!(is_modest((0, 0), (0, 0), 0.2));
    }
}
