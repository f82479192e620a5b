//! Ids from CAS counters (protocol section 2), never reused.
//!
//! A counter's value is the next number, 8 bytes big-endian; a missing counter stands at 1, so 0 is never handed out.
//! The cluster generation goes into the high bits, so that a store restored from a backup cannot repeat an id.

use std::{fmt, ops::Range, sync::Arc, time::Duration};

use tokio::sync::Mutex;

use crate::{Compare, Key, KeyValue, Op, SharedStore, StoreError, Txn, TxnOutcome};

/// Numbers of one generation that a counter may give: 56 bits.
const COUNTER_MAX: u64 = (1 << 56) - 1;
/// Tries of one call before it gives up; each lost one means that another took a block, or an answer was lost.
const TRIES_MAX: u32 = 16;

/// Hands out ids from blocks, one store transaction per block. Clones share the block.
#[derive(Clone)]
pub struct IdBlocks {
    inner: Arc<Inner>,
}

struct Inner {
    store: SharedStore,
    counter: Key,
    block: u64,
    generation_base: u64,
    left: Mutex<Range<u64>>,
}

impl fmt::Debug for IdBlocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdBlocks").field("counter", &self.inner.counter).finish_non_exhaustive()
    }
}

impl IdBlocks {
    /// Ids of this counter in blocks of `block` (at least 1; 1,000 for ledgers), each with `generation_base` added.
    #[must_use]
    pub fn new(store: SharedStore, counter: Key, block: u64, generation_base: u64) -> Self {
        let block = block.max(1);
        let left = Mutex::new(0..0);
        Self { inner: Arc::new(Inner { store, counter, block, generation_base, left }) }
    }

    /// The next id. Cancel-safe; a call dropped while it fetches a block may waste the block, never an id twice.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] or `Unknown`: no id was taken, call again after a pause. `Refused`: the counter is
    /// used up or damaged.
    pub async fn next(&self) -> Result<u64, StoreError> {
        let mut left = self.inner.left.lock().await;
        if left.is_empty() {
            *left = self.inner.fetch().await?;
        }
        let id = left.next().expect("a fetched block is not empty");
        Ok(self.inner.generation_base + id)
    }
}

impl Inner {
    async fn fetch(&self) -> Result<Range<u64>, StoreError> {
        let mut pause = Duration::from_millis(10);
        for _ in 0..TRIES_MAX {
            let (_, found) = self.store.get(&self.counter).await?;
            let (block, txn) = take(&self.counter, found.as_ref(), self.block)?;
            match self.store.txn(txn).await {
                Ok(TxnOutcome::Done(_)) => return Ok(block),
                // Somebody took a block; or a lost answer of ours did, and that block is wasted.
                Ok(TxnOutcome::Conflict { .. }) => {}
                // At most one transaction from this revision lands, and we never use its block: no harm if late.
                Err(StoreError::Unknown(_)) => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(1));
                }
                Err(error) => return Err(error),
            }
        }
        Err(StoreError::Unavailable(format!("counter {} is contended", self.counter)))
    }
}

/// One id, with the conditions and changes to merge into the transaction that uses it: the counter is a key that is never
/// deleted, so such a creation cannot land late a second time (MD3).
#[derive(Clone, Debug)]
pub struct NextId {
    /// The id, generation included. It is taken only if the transaction lands.
    pub id: u64,
    /// Compares and changes the counter.
    pub txn: Txn,
}

/// Reads a counter and prepares to take one id from it.
///
/// # Errors
/// As [`MetadataStore::get`](crate::MetadataStore::get); `Refused` when the counter is used up or damaged.
pub async fn next_id(
    store: &SharedStore,
    counter: &Key,
    generation_base: u64,
) -> Result<NextId, StoreError> {
    let (_, found) = store.get(counter).await?;
    let (block, txn) = take(counter, found.as_ref(), 1)?;
    Ok(NextId { id: generation_base + block.start, txn })
}

fn take(
    counter: &Key,
    found: Option<&KeyValue>,
    count: u64,
) -> Result<(Range<u64>, Txn), StoreError> {
    let (next, condition) = match found {
        None => (1, Compare::Absent(counter.clone())),
        Some(found) => {
            let value = <[u8; 8]>::try_from(&found.value[..]).map_err(|_| {
                StoreError::Refused(format!("counter {counter} does not hold 8 bytes"))
            })?;
            let at = Compare::ModRevision(counter.clone(), found.mod_revision);
            (u64::from_be_bytes(value), at)
        }
    };
    let end = next.checked_add(count).filter(|end| *end <= COUNTER_MAX);
    let end = end.ok_or_else(|| StoreError::Refused(format!("counter {counter} is used up")))?;
    let change = Op::put(counter.clone(), end.to_be_bytes().to_vec());
    Ok((next..end, Txn::new().when(condition).then(change)))
}

#[cfg(test)]
mod tests;
