//! Recent entries for tail readers, bounded in bytes, oldest out first. Only synced entries go in.

use std::collections::{BTreeMap, VecDeque};

use geminga_bookie_client::entry::Entry;
use geminga_proto::ids::{EntryId, LedgerId};

/// The cache.
#[derive(Debug)]
pub(crate) struct WriteCache {
    entries: BTreeMap<(LedgerId, EntryId), Entry>,
    order: VecDeque<((LedgerId, EntryId), usize)>,
    bytes: usize,
    bytes_max: usize,
}

impl WriteCache {
    /// An empty cache of this many bytes.
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { entries: BTreeMap::new(), order: VecDeque::new(), bytes: 0, bytes_max }
    }

    /// Takes an entry; payloads are shared, not copied.
    pub(crate) fn insert(&mut self, entry: Entry) {
        let key = (entry.ledger, entry.id);
        let bytes = entry.encoded_len();
        if bytes > self.bytes_max {
            return;
        }
        if self.entries.insert(key, entry).is_none() {
            self.order.push_back((key, bytes));
            self.bytes += bytes;
        }
        while self.bytes > self.bytes_max {
            let Some((key, bytes)) = self.order.pop_front() else { break };
            self.entries.remove(&key);
            self.bytes -= bytes;
        }
    }

    /// An entry, if it is recent.
    pub(crate) fn get(&self, ledger: LedgerId, entry: EntryId) -> Option<Entry> {
        self.entries.get(&(ledger, entry)).cloned()
    }

    /// Forgets a ledger. Its places in the order of age stay until their turn comes.
    pub(crate) fn forget(&mut self, ledger: LedgerId) {
        let range = (ledger, EntryId(0))..=(ledger, EntryId(u64::MAX));
        let keys: Vec<_> = self.entries.range(range).map(|(key, _)| *key).collect();
        for key in keys {
            self.entries.remove(&key);
        }
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use geminga_bookie_client::entry::Payload;

    use super::*;

    #[test]
    fn the_oldest_entries_leave_first_and_the_bound_holds() {
        let mut cache = WriteCache::new(1000);
        for id in 0..100 {
            let payload = Payload::from(Bytes::from(vec![0u8; 100]));
            cache.insert(Entry::seal(LedgerId(1), EntryId(id), None, 0, payload));
            assert!(cache.bytes() <= 1000);
        }
        assert!(cache.get(LedgerId(1), EntryId(0)).is_none());
        assert!(cache.get(LedgerId(1), EntryId(99)).is_some());
        assert_eq!(cache.entries.len(), cache.order.len());
    }
}
