//! What this consumer holds of one segment: delivered to it, or granted after a break, and not settled. Pure.
//!
//! ```text
//!   offsets   0        10              30      40
//!             |--run---|               |--run--|        a run: one key, one handle, one lease
//! ```
//! A *key* numbers deliveries within this process. It stays while a message is held, over breaks too, while the handle
//! that is presented for it changes with each stream (L4); a message that is delivered again gets a new key, so that a
//! settle meant for the delivery before it is told from one for this.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use geminga_proto::v1::{Claim, OffsetRange};
use tokio::time::Instant;

/// Ranges named in one frame.
pub(crate) const RANGES_MAX: usize = 1_000;

/// Claims in one open.
const CLAIMS_MAX: usize = 1_000;

/// Inclusive ranges of offsets.
pub(crate) type Ranges = Vec<(u64, u64)>;

/// The lease of a run: kept from running out while the application may be at work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Lease {
    length: Duration,
    renew_at: Instant,
    /// Not extended any more from then on; none: it was not handed out yet.
    until: Option<Instant>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    last: u64,
    pub(crate) key: u64,
    pub(crate) handle: Bytes,
    lease: Option<Lease>,
}

/// All runs of one segment, by their first offset.
#[derive(Debug, Default)]
pub(crate) struct Holds {
    runs: BTreeMap<u64, Run>,
    /// How many runs have a lease.
    leased: usize,
}

impl Holds {
    /// `[first, last]` was delivered. It replaces what was held of it.
    pub(crate) fn insert(
        &mut self,
        (first, last): (u64, u64),
        key: u64,
        handle: &Bytes,
        lease: Duration,
        now: Instant,
    ) {
        self.take(first, last, |_| true);
        let lease = (!lease.is_zero()).then(|| Lease {
            length: lease,
            renew_at: now + lease / 2,
            until: None,
        });
        if let Some((_, before)) = self.runs.range_mut(..first).next_back()
            && before.last + 1 == first
            && before.key == key
            && before.handle == *handle
            && before.lease == lease
        {
            before.last = last;
            return;
        }
        self.put(first, Run { last, key, handle: handle.clone(), lease });
    }

    fn put(&mut self, first: u64, run: Run) {
        self.leased += usize::from(run.lease.is_some());
        self.runs.insert(first, run);
    }

    /// Makes a run begin at `at`, if one reaches over it.
    fn split(&mut self, at: u64) {
        let Some((first, run)) = self.runs.range_mut(..at).next_back() else { return };
        if *first < at && run.last >= at {
            let rest = run.clone();
            run.last = at - 1;
            self.put(at, rest);
        }
    }

    /// Takes out of `[first, last]` what is held and matches; what was taken.
    pub(crate) fn take(&mut self, first: u64, last: u64, matches: impl Fn(&Run) -> bool) -> Ranges {
        self.extract(first, last, matches)
            .into_iter()
            .map(|(first, run)| (first, run.last))
            .collect()
    }

    fn extract(
        &mut self,
        first: u64,
        last: u64,
        matches: impl Fn(&Run) -> bool,
    ) -> Vec<(u64, Run)> {
        if last < first || self.runs.is_empty() {
            return Vec::new();
        }
        self.split(first);
        if let Some(after) = last.checked_add(1) {
            self.split(after);
        }
        let keys: Vec<u64> = self
            .runs
            .range(first..=last)
            .filter(|(_, run)| matches(run))
            .map(|(first, _)| *first)
            .collect();
        let mut taken = Vec::with_capacity(keys.len());
        for first in keys {
            let Some(run) = self.runs.remove(&first) else { continue };
            self.leased -= usize::from(run.lease.is_some());
            taken.push((first, run));
        }
        taken
    }

    /// The run that holds this message.
    pub(crate) fn get(&self, offset: u64) -> Option<&Run> {
        self.runs.range(..=offset).next_back().map(|(_, run)| run).filter(|run| offset <= run.last)
    }

    /// The highest offset held at or below `offset`, with its run.
    pub(crate) fn at_or_below(&self, offset: u64) -> Option<(u64, &Run)> {
        self.runs.range(..=offset).next_back().map(|(_, run)| (run.last.min(offset), run))
    }

    /// Every message held in `[first, last]`, with its run.
    pub(crate) fn each(&self, first: u64, last: u64) -> impl Iterator<Item = (u64, &Run)> {
        let begin = self.runs.range(..=first).next_back().map_or(first, |(begin, _)| *begin);
        let runs = self.runs.range(begin..=last.max(begin));
        let inside = move |of: u64, run: &Run| of.max(first)..=run.last.min(last);
        runs.flat_map(move |(of, run)| inside(*of, run).map(move |offset| (offset, run)))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// What is held, as a consumer that comes back presents it: by handle, within what an open may name. The lowest
    /// messages go first; what is left out is delivered again.
    pub(crate) fn claims(&self, ranges_max: usize) -> Vec<Claim> {
        let mut claims: Vec<Claim> = Vec::new();
        let mut at: BTreeMap<&Bytes, usize> = BTreeMap::new();
        for (first, run) in self.runs.iter().take(ranges_max) {
            let open = at.get(&run.handle).copied();
            let open = open.filter(|claim| claims[*claim].ranges.len() < RANGES_MAX);
            let claim = match open {
                Some(claim) => claim,
                None if claims.len() == CLAIMS_MAX => break,
                None => {
                    claims.push(Claim { handle: run.handle.clone(), ranges: Vec::new() });
                    at.insert(&run.handle, claims.len() - 1);
                    claims.len() - 1
                }
            };
            let ranges = &mut claims[claim].ranges;
            match ranges.last_mut() {
                Some(range) if range.last.checked_add(1) == Some(*first) => range.last = run.last,
                _ => ranges.push(OffsetRange { first: *first, last: run.last }),
            }
        }
        claims
    }

    /// Nothing is held any more.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    /// A stream is open that grants this of what was claimed: it is held under the new handles from now on, with leases
    /// that begin again. Everything else is held no more.
    ///
    /// # Errors
    /// Words, if a grant is none of what was claimed. Nothing is held then.
    pub(crate) fn regrant(&mut self, granted: &[Claim], now: Instant) -> Result<(), &'static str> {
        let mut kept = Self::default();
        for claim in granted {
            for range in &claim.ranges {
                let pieces = self.extract(range.first, range.last, |_| true);
                let messages = pieces.iter().map(|(first, run)| run.last - first + 1).sum::<u64>();
                if range.last < range.first
                    || messages != (range.last - range.first).saturating_add(1)
                {
                    *self = Self::default();
                    return Err("the server granted messages that were not claimed");
                }
                for (first, mut run) in pieces {
                    run.handle = claim.handle.clone();
                    if let Some(lease) = &mut run.lease {
                        lease.renew_at = now + lease.length / 2;
                    }
                    kept.put(first, run);
                }
            }
        }
        *self = kept;
        Ok(())
    }

    /// These were handed out: they are extended for as long as the application has asked.
    pub(crate) fn on_handed_out(&mut self, ranges: &[(u64, u64)], until: Instant) {
        if self.leased == 0 {
            return;
        }
        for (first, last) in ranges {
            for (first, mut run) in self.extract(*first, *last, |run| run.lease.is_some()) {
                if let Some(lease) = &mut run.lease {
                    lease.until.get_or_insert(until);
                }
                self.put(first, run);
            }
        }
    }

    /// The application asked for so much time for this message: it is not taken back before.
    pub(crate) fn on_extended(&mut self, offset: u64, key: u64, time: Duration, now: Instant) {
        for (first, mut run) in self.extract(offset, offset, |run| run.key == key) {
            if let Some(lease) = &mut run.lease {
                lease.until = lease.until.max(Some(now + time));
                lease.renew_at = now + time / 2;
            }
            self.put(first, run);
        }
    }

    /// How often leases are to be looked at; none while there is none.
    pub(crate) fn tick(&self) -> Option<Duration> {
        const LONGEST: Duration = Duration::from_secs(5);
        if self.leased == 0 {
            return None;
        }
        let shortest =
            self.runs.values().filter_map(|run| run.lease).map(|lease| lease.length).min();
        Some((shortest? / 8).clamp(Duration::from_millis(10), LONGEST))
    }

    /// What is to be extended now, for one frame: its handle and ranges. It counts as done; what comes due within `slack`
    /// goes along.
    pub(crate) fn due(
        &mut self,
        now: Instant,
        slack: Duration,
    ) -> Option<(Bytes, Vec<OffsetRange>)> {
        let mut handle: Option<Bytes> = None;
        let mut ranges: Vec<OffsetRange> = Vec::new();
        for (first, run) in &mut self.runs {
            let Some(lease) = &mut run.lease else { continue };
            let wanted =
                lease.renew_at <= now + slack && lease.until.is_none_or(|until| now < until);
            if !wanted || handle.as_ref().is_some_and(|handle| *handle != run.handle) {
                continue;
            }
            let full = ranges.len() == RANGES_MAX;
            match ranges.last_mut() {
                Some(range) if range.last + 1 == *first => range.last = run.last,
                _ if full => break,
                _ => ranges.push(OffsetRange { first: *first, last: run.last }),
            }
            lease.renew_at = now + lease.length / 2;
            handle.get_or_insert_with(|| run.handle.clone());
        }
        Some((handle?, ranges))
    }

    /// An extension of these was refused for now: asked again before their lease is over.
    pub(crate) fn on_extension_refused(&mut self, ranges: &[OffsetRange], now: Instant) {
        for range in ranges {
            for (_, run) in self.runs.range_mut(range.first..=range.last.max(range.first)) {
                if let Some(lease) = &mut run.lease {
                    lease.renew_at = now + lease.length / 8;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEASE: Duration = Duration::from_secs(8);

    fn handle(name: u64) -> Bytes {
        Bytes::from(format!("handle {name}"))
    }

    fn claim(name: u64, ranges: &[(u64, u64)]) -> Claim {
        let ranges = ranges.iter().map(|(first, last)| OffsetRange { first: *first, last: *last });
        Claim { handle: handle(name), ranges: ranges.collect() }
    }

    proptest! {
        /// A map from offset to (key, handle) says what the runs must say.
        #[test]
        fn runs_are_the_map_from_offset_to_delivery(
            steps in prop::collection::vec((0u64..60, 1u64..12, 0u8..4, 1u64..4), 1..80),
        ) {
            let now = Instant::now();
            let (mut holds, mut model) = (Holds::default(), BTreeMap::new());
            for (key, (first, count, act, name)) in (1u64..).zip(steps) {
                let last = first + count - 1;
                match act {
                    0 | 1 => {
                        holds.insert((first, last), key, &handle(name), LEASE * u32::from(act), now);
                        model.extend((first..=last).map(|offset| (offset, (key, handle(name)))));
                    }
                    2 => {
                        let taken = holds.take(first, last, |run| run.handle == handle(name));
                        let taken: u64 = taken.into_iter().map(|(first, last)| last - first + 1).sum();
                        let before = model.len();
                        model.retain(|offset, (_, of)| !(first..=last).contains(offset) || *of != handle(name));
                        prop_assert_eq!(taken, (before - model.len()) as u64);
                    }
                    _ => {
                        holds.on_handed_out(&[(first, last)], now + LEASE);
                    }
                }
                for offset in 0..80 {
                    let found = holds.get(offset).map(|run| (run.key, run.handle.clone()));
                    prop_assert_eq!(found.as_ref(), model.get(&offset), "{}", offset);
                }
                let claimed: u64 =
                    holds.claims(usize::MAX).iter().flat_map(|claim| &claim.ranges).map(|r| r.last - r.first + 1).sum();
                prop_assert_eq!(claimed, model.len() as u64);
                prop_assert_eq!(holds.leased, holds.runs.values().filter(|run| run.lease.is_some()).count());
            }
        }
    }

    #[test]
    fn what_is_granted_keeps_its_key_under_the_new_handle_and_the_rest_is_gone() {
        let now = Instant::now();
        let mut holds = Holds::default();
        holds.insert((0, 9), 1, &handle(1), Duration::ZERO, now);
        holds.insert((20, 29), 2, &handle(1), Duration::ZERO, now);
        assert_eq!(holds.claims(usize::MAX), [claim(1, &[(0, 9), (20, 29)])]);
        holds.regrant(&[claim(7, &[(5, 9)]), claim(8, &[(20, 20)])], now).expect("was claimed");
        assert_eq!(holds.get(5).map(|run| (run.key, run.handle.clone())), Some((1, handle(7))));
        assert_eq!(holds.get(20).map(|run| (run.key, run.handle.clone())), Some((2, handle(8))));
        for gone in [0, 4, 10, 21, 29] {
            assert!(holds.get(gone).is_none(), "{gone}");
        }
    }

    #[test]
    fn claims_stay_within_what_an_open_may_name() {
        let now = Instant::now();
        let mut holds = Holds::default();
        for offset in 0..3_500 {
            holds.insert((2 * offset, 2 * offset), 1, &handle(1), Duration::ZERO, now);
        }
        let sizes = |holds: &Holds, most| {
            holds.claims(most).iter().map(|claim| claim.ranges.len()).collect::<Vec<_>>()
        };
        assert_eq!(sizes(&holds, usize::MAX), [1_000, 1_000, 1_000, 500]);
        assert_eq!(sizes(&holds, 1_200), [1_000, 200]);
        for offset in 0..1_500 {
            holds.insert((offset, offset), offset, &handle(offset), Duration::ZERO, now);
        }
        assert_eq!(sizes(&holds, usize::MAX).len(), CLAIMS_MAX);
        holds.clear();
        assert!(holds.is_empty() && holds.tick().is_none());
    }

    #[test]
    fn a_grant_of_what_was_not_claimed_is_an_error() {
        let now = Instant::now();
        for bad in [(0, 10), (9, 5), (100, 100), (0, u64::MAX)] {
            let mut holds = Holds::default();
            holds.insert((0, 9), 1, &handle(1), Duration::ZERO, now);
            assert!(holds.regrant(&[claim(2, &[bad])], now).is_err(), "{bad:?}");
        }
        let mut holds = Holds::default();
        holds.insert((0, 9), 1, &handle(1), Duration::ZERO, now);
        assert!(holds.regrant(&[claim(2, &[(0, 4)]), claim(3, &[(4, 4)])], now).is_err(), "twice");
    }

    #[test]
    fn leases_are_extended_at_half_their_time_until_the_application_had_its_own() {
        let start = Instant::now();
        let slack = Duration::from_secs(1);
        let mut holds = Holds::default();
        holds.insert((0, 9), 1, &handle(1), LEASE, start);
        assert_eq!(holds.tick(), Some(slack));
        assert!(holds.due(start + Duration::from_secs(2), slack).is_none(), "too early");
        holds.on_handed_out(&[(0, 3)], start + Duration::from_secs(10));
        let renewed = |holds: &mut Holds, after| {
            let due = holds.due(start + Duration::from_secs(after), slack);
            due.map(|(_, ranges)| ranges.iter().map(|range| (range.first, range.last)).collect())
        };
        assert_eq!(renewed(&mut holds, 4), Some(vec![(0, 9)]));
        assert_eq!(renewed(&mut holds, 4), None::<Ranges>, "it was done");
        assert_eq!(renewed(&mut holds, 8), Some(vec![(0, 9)]));
        assert_eq!(renewed(&mut holds, 12), Some(vec![(4, 9)]), "the others had their time");
        holds.on_extended(2, 1, Duration::from_secs(20), start + Duration::from_secs(13));
        assert_eq!(renewed(&mut holds, 23), Some(vec![(2, 2), (4, 9)]));
        holds.on_extension_refused(
            &[OffsetRange { first: 4, last: 9 }],
            start + Duration::from_secs(23),
        );
        assert_eq!(renewed(&mut holds, 24), Some(vec![(4, 9)]), "again, before it is over");
        holds.take(0, 9, |_| true);
        assert_eq!(holds.tick(), None);
    }
}
