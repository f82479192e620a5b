//! What waits for the journal, bounded in bytes and requests (D12), in the order in which it was accepted.

use std::collections::VecDeque;

use geminga_bookie_client::{
    bookie_rpc::{AddAnswer, Unknown},
    entry::Entry,
};
use geminga_proto::ids::{EntryId, LedgerId};
use tokio::{sync::oneshot, time::Instant};

/// Told when everything accepted before is synced.
pub(crate) type Synced = oneshot::Sender<Result<(), Unknown>>;

/// One request in the queue.
#[derive(Debug)]
pub(crate) enum Item {
    /// An accepted add, pending under its ticket.
    Add {
        entry: Entry,
        recovery: bool,
        deadline: Instant,
        ticket: u64,
        answer: oneshot::Sender<AddAnswer>,
    },
    /// A repeated add whose first copy is pending: OK only if it is held when its turn comes.
    Repeat { ledger: LedgerId, entry: EntryId, digest: u32, answer: oneshot::Sender<AddAnswer> },
    /// A fence flag.
    Fence { ledger: LedgerId, answer: Synced },
    /// The ledger was Deleted (D13).
    Tombstone { ledger: LedgerId, answer: Synced },
    /// The ledger moved away (D13).
    MovedAway { ledger: LedgerId, answer: Synced },
    /// Nothing to write: wait for what was accepted before.
    Barrier { answer: Synced },
}

impl Item {
    fn bytes(&self) -> usize {
        match self {
            Self::Add { entry, .. } => entry.encoded_len(),
            _ => 0,
        }
    }
}

/// The queue.
#[derive(Debug)]
pub(crate) struct Queue {
    items: VecDeque<Item>,
    bytes: usize,
    bytes_max: usize,
    items_max: usize,
}

impl Queue {
    pub(crate) fn new(bytes_max: usize, items_max: usize) -> Self {
        Self { items: VecDeque::new(), bytes: 0, bytes_max, items_max }
    }

    /// Whether an add of this size still fits. A single one always fits an empty queue.
    pub(crate) fn has_room(&self, bytes: usize) -> bool {
        self.items.len() < self.items_max
            && (self.bytes == 0 || self.bytes + bytes <= self.bytes_max)
    }

    pub(crate) fn push(&mut self, item: Item) {
        self.bytes += item.bytes();
        self.items.push_back(item);
    }

    pub(crate) fn pop(&mut self) -> Option<Item> {
        let item = self.items.pop_front()?;
        self.bytes -= item.bytes();
        Some(item)
    }

    /// Bytes of the next item.
    pub(crate) fn next_bytes(&self) -> Option<usize> {
        self.items.front().map(Item::bytes)
    }

    /// Drops everything; who waits learns that the bookie is gone.
    pub(crate) fn clear(&mut self) {
        self.items.clear();
        self.bytes = 0;
    }
}
