//! Recent batches of a segment in memory, so that a consumer at the tail asks no bookie. Bounded per segment, and over all
//! segments by one budget.

use std::collections::BTreeMap;

use geminga_proto::ids::Offset;
use geminga_runtime::budget::{ByteBudget, Permit};
use parking_lot::Mutex;

use crate::types::StoredBatch;

/// See the module's text.
#[derive(Debug)]
pub(crate) struct EntryCache {
    shared: ByteBudget,
    bytes_max: u64,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    batches: BTreeMap<u64, (StoredBatch, Permit)>,
    bytes: u64,
}

/// What a batch costs beyond its payload.
pub(crate) const OVERHEAD_BYTES: u64 = 512;

impl EntryCache {
    pub(crate) fn new(shared: ByteBudget, bytes_max: u64) -> Self {
        Self { shared, bytes_max, held: Mutex::default() }
    }

    /// Keeps the newest batch; the oldest ones leave for it. Without room it is not kept.
    pub(crate) fn insert(&self, batch: StoredBatch) {
        let bytes = batch.payload.len() as u64 + OVERHEAD_BYTES;
        let mut held = self.held.lock();
        let permit = loop {
            let fits = held.bytes + bytes <= self.bytes_max;
            if let Some(permit) = fits.then(|| self.shared.try_acquire(bytes)).flatten() {
                break permit;
            }
            match held.batches.pop_first() {
                Some((_, (_, permit))) => held.bytes -= permit.bytes(),
                None => return,
            }
        };
        held.bytes += permit.bytes();
        held.batches.insert(batch.base_offset.0, (batch, permit));
    }

    /// Neighbouring batches from the one that contains `from` on; empty if that one is not here.
    pub(crate) fn read(
        &self,
        from: Offset,
        bytes_max: usize,
        messages_max: usize,
    ) -> Vec<StoredBatch> {
        let held = self.held.lock();
        let Some((base, _)) = held.batches.range(..=from.0).next_back() else { return Vec::new() };
        let mut taken = Taken::new(from, bytes_max, messages_max);
        for (batch, _) in held.batches.range(*base..).map(|(_, kept)| kept) {
            if !taken.take(batch) {
                break;
            }
        }
        taken.batches
    }
}

/// Collects neighbouring batches up to a limit; always at least one.
pub(crate) struct Taken {
    pub(crate) batches: Vec<StoredBatch>,
    next: u64,
    bytes_left: usize,
    messages_left: usize,
}

impl Taken {
    pub(crate) fn new(from: Offset, bytes_max: usize, messages_max: usize) -> Self {
        Self {
            batches: Vec::new(),
            next: from.0,
            bytes_left: bytes_max,
            messages_left: messages_max,
        }
    }

    /// Takes the batch if it contains the next offset and fits; false if the collection ends before it.
    pub(crate) fn take(&mut self, batch: &StoredBatch) -> bool {
        let end = batch.base_offset.0 + u64::from(batch.header.count);
        let fits = self.batches.is_empty()
            || (batch.payload.len() <= self.bytes_left && self.messages_left > 0);
        if batch.base_offset.0 > self.next || end <= self.next || !fits {
            return false;
        }
        self.bytes_left = self.bytes_left.saturating_sub(batch.payload.len());
        self.messages_left = self.messages_left.saturating_sub((end - self.next) as usize);
        self.next = end;
        self.batches.push(batch.clone());
        true
    }

    pub(crate) fn next(&self) -> Offset {
        Offset(self.next)
    }

    pub(crate) fn is_full(&self) -> bool {
        !self.batches.is_empty() && (self.bytes_left == 0 || self.messages_left == 0)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use geminga_proto::storage::v1::EntryHeader;

    use super::*;

    fn batch(base: u64, count: u32) -> StoredBatch {
        let header = EntryHeader { base_offset: base, count, ..EntryHeader::default() };
        StoredBatch { base_offset: Offset(base), header, payload: Bytes::from(vec![0; 488]) }
    }

    #[test]
    fn the_oldest_leave_first_and_the_budget_is_never_exceeded() {
        let budget = ByteBudget::new(10_000);
        let cache = EntryCache::new(budget.clone(), 5_000);
        for n in 0..20 {
            cache.insert(batch(n * 10, 10));
            assert!(budget.in_use() <= 5_000);
        }
        assert!(cache.read(Offset(0), 10_000, 100).is_empty());
        let tail = cache.read(Offset(165), 100_000, 1_000);
        assert_eq!(tail.iter().map(|b| b.base_offset.0).collect::<Vec<_>>(), [160, 170, 180, 190]);
        assert_eq!(cache.read(Offset(165), 1, 1_000).len(), 1);
        assert_eq!(cache.read(Offset(165), 100_000, 6).len(), 2);
        assert!(cache.read(Offset(200), 100_000, 1_000).is_empty());
    }

    #[test]
    fn a_gap_ends_what_is_served_from_memory() {
        let cache = EntryCache::new(ByteBudget::new(100_000), 100_000);
        cache.insert(batch(0, 10));
        cache.insert(batch(20, 10));
        assert_eq!(cache.read(Offset(3), 100_000, 1_000).len(), 1);
        assert!(cache.read(Offset(12), 100_000, 1_000).is_empty());
    }
}
