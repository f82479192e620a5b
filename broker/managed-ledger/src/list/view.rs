//! The compacted view in the list: one that is being written beside it, and the swap.
//!
//! ```text
//! compacting   [new 1] [new 2 open]          a round writes
//! compacted    [old 1] [old 2]               readers read
//!                                            swap: compacting takes the place of compacted, the horizon rises
//! ```

use geminga_proto::ids::{LedgerId, Offset};
use prost::Message;

use super::{Counts, LIST_BYTES_MAX, List, ListError, Listed, ListedState};

/// Which deleted keys a view still tells of: messages with an empty value at or above `from` are in it, for readers that
/// began with an earlier view and must hear that the key is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tombstones {
    pub from: Offset,
    /// Takes the place of `from` at a swap that comes long enough after `next_at_ms`.
    pub next: Offset,
    /// When the horizon stood at `next`; wall clock, ms.
    pub next_at_ms: u64,
}

impl Default for Tombstones {
    /// Of a segment that was never compacted.
    fn default() -> Self {
        Self { from: Offset(0), next: Offset(0), next_at_ms: 0 }
    }
}

impl Tombstones {
    /// After a round that moves the horizon to `horizon`: a tombstone leaves the view once it has been in one for `kept_ms`.
    /// A clock that jumps ahead lets them go early, which can harm only a reader in the middle of a view.
    #[must_use]
    pub fn after_round(self, horizon: Offset, now_ms: u64, kept_ms: u64) -> Self {
        match now_ms >= self.next_at_ms.saturating_add(kept_ms) {
            true => Self { from: self.next, next: horizon, next_at_ms: now_ms },
            false => self,
        }
    }
}

impl List {
    /// Lists a ledger of a view that is being written (M4); its first message has this offset.
    ///
    /// # Errors
    /// [`ListError`] when the list is more than half full: what is left is for the log.
    ///
    /// # Panics
    /// When the one before is not Closed.
    pub fn open_view(&mut self, id: LedgerId, base_offset: Offset) -> Result<(), ListError> {
        let bytes = self.to_wire().encoded_len();
        if bytes > LIST_BYTES_MAX / 2 {
            let why = format!("has {bytes} bytes, which leaves no room for a compacted view");
            return Err(ListError(why));
        }
        assert!(
            self.compacting.iter().all(|listed| listed.state == ListedState::Closed),
            "a view has one open ledger at most"
        );
        let (state, counts, offload) = (ListedState::Open, Counts::default(), None);
        self.compacting.push(Listed { id, base_offset, state, counts, offload });
        Ok(())
    }

    /// The view that was written takes the place of the one before. Of that one the ledgers that are returned, at most `max`,
    /// are unlisted: they are to be deleted with this change. What exceeds that is left to be deleted by later ones.
    pub fn swap_view(
        &mut self,
        horizon: Offset,
        tombstones: Tombstones,
        max: usize,
    ) -> Vec<LedgerId> {
        let new = std::mem::take(&mut self.compacting);
        let mut old = std::mem::replace(&mut self.compacted, new);
        self.compacting = old.split_off(max.min(old.len()));
        (self.compacted_to, self.tombstones) = (horizon, tombstones);
        old.into_iter().map(|listed| listed.id).collect()
    }

    /// Messages and bytes of the compacted view.
    #[must_use]
    pub fn view_counts(&self) -> (u64, u64) {
        let counts = self.compacted.iter().map(|listed| listed.counts);
        counts.fold((0, 0), |(records, bytes), one| (records + one.records, bytes + one.bytes))
    }

    pub(super) fn validate_view(&self) -> Result<(), ListError> {
        let closed = |listed: &Listed| listed.state == ListedState::Closed;
        if let Some(open) = self.compacted.iter().find(|listed| !closed(listed)) {
            return Err(ListError(format!("has ledger {} in its view, which is open", open.id)));
        }
        let unordered = self.compacted.windows(2).find(|p| p[0].base_offset > p[1].base_offset);
        if let Some(pair) = unordered {
            return Err(ListError(format!("has ledger {} out of order in its view", pair[1].id)));
        }
        if let Some(last) = self.compacted.last().filter(|l| l.base_offset >= self.compacted_to) {
            return Err(ListError(format!("has ledger {} behind its horizon", last.id)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tombstone_stays_for_the_time_it_is_kept_after_it_came_into_a_view() {
        let at = |from, next, next_at_ms| Tombstones {
            from: Offset(from),
            next: Offset(next),
            next_at_ms,
        };
        let first = Tombstones::default().after_round(Offset(10), 1_000, 100);
        assert_eq!(first, at(0, 10, 1_000), "all are new");
        let second = first.after_round(Offset(20), 1_099, 100);
        assert_eq!(second, first, "those below 10 have been there for 99 ms");
        let third = second.after_round(Offset(30), 1_100, 100);
        assert_eq!(third, at(10, 30, 1_100), "those between 10 and 20 came later");
        assert_eq!(third.after_round(Offset(40), 500, 100), third, "a clock that was set back");
    }

    #[test]
    fn a_full_list_takes_no_view_and_keeps_room_for_the_log() {
        let mut list = List::empty();
        let mut id = 1 << 60;
        while list.open_view(LedgerId(id), Offset(0)).is_ok() {
            list.close(LedgerId(id), Counts { entries: u64::MAX, ..Counts::default() });
            id += 1;
        }
        assert!(list.compacting.len() > 1_000);
        list.open(super::super::Log::Data, LedgerId(id)).expect("room for the log");
    }

    #[test]
    fn a_view_that_is_open_out_of_order_or_behind_its_horizon_is_refused() {
        let mut list = List::empty();
        for (id, base) in [(1, 3), (2, 5)] {
            list.open_view(LedgerId(id), Offset(base)).expect("room");
            list.close(LedgerId(id), Counts { records: 1, ..Counts::default() });
        }
        assert_eq!(list.swap_view(Offset(6), Tombstones::default(), 50), []);
        assert!(List::decode(&list.encode().expect("small")).is_ok());
        let refused = |change: fn(&mut List)| {
            let mut list = list.clone();
            change(&mut list);
            assert!(List::decode(&list.encode().expect("small")).is_err(), "{list:?}");
        };
        refused(|list| list.compacted[1].state = ListedState::Open);
        refused(|list| list.compacted.swap(0, 1));
        refused(|list| list.compacted_to = Offset(5));
        refused(|list| list.compacted[1].id = LedgerId(1));
    }
}
