//! Batches into memory. What is read ahead comes out of the broker's budget, so that consumers who do not read cannot fill
//! memory. When it is used up, one batch at a time may be read beyond it, once a connection has taken what it was given:
//! they cannot stop the others either.

use std::sync::Arc;

use futures::future::{BoxFuture, select_all};
use geminga_managed_ledger::{ReadError, StoredBatch};
use geminga_proto::{ids::Offset, reason::Reason};
use geminga_runtime::budget::{ByteBudget, Permit};
use tokio::time::sleep;

use super::{Dispatcher, RETRY};
use crate::{
    dispatcher::{Batch, ReadOf},
    errors::Refusal,
    storage_errors,
};

/// Connections that one read waits for, whichever is first.
const DRAINED_MAX: usize = 16;
/// A read ahead for less is not worth it.
const READ_BYTES_MIN: u64 = 64 * 1024;

/// A stored batch, holding its share of the read-ahead budget until every connection it goes to has taken it.
#[derive(Clone, Debug)]
pub(super) struct Queued {
    pub(super) stored: Arc<StoredBatch>,
    pub(super) held: Option<Arc<Permit>>,
    delays: bool,
}

impl Batch for Queued {
    fn base(&self) -> u64 {
        self.stored.base_offset.0
    }

    fn count(&self) -> u32 {
        self.stored.header.count
    }

    fn bytes(&self) -> u64 {
        self.stored.payload.len() as u64
    }

    fn key_hash(&self, at: u32) -> u32 {
        let index = self.stored.header.index.as_ref();
        index.and_then(|index| index.key_hash.get(at as usize)).copied().unwrap_or(0)
    }

    fn deliver_at(&self, at: u32) -> u64 {
        let index = self.stored.header.index.as_ref();
        index.and_then(|index| index.deliver_at_ms.get(at as usize)).copied().unwrap_or(0)
    }

    fn has_delays(&self) -> bool {
        self.delays
    }
}

/// What a read came to.
pub(super) struct ReadDone {
    of: ReadOf,
    generation: u64,
    result: Result<Vec<Queued>, ReadError>,
}

impl Dispatcher {
    pub(super) fn read(
        &mut self,
        (of, generation): (ReadOf, u64),
        from: u64,
        (bytes_max, messages_max): (u64, u64),
    ) {
        let ledger = self.segment.ledger().clone();
        let budget = self.shared.dispatch_bytes.clone();
        // Waited for only if the budget is used up.
        let drained: Vec<BoxFuture<'static, ()>> =
            self.members.values().take(DRAINED_MAX).map(|member| member.drained()).collect();
        self.reads.push(Box::pin(async move {
            let mut held = share(&budget, bytes_max);
            if held.is_none() && !drained.is_empty() {
                select_all(drained).await;
                held = share(&budget, bytes_max);
            }
            let bytes_max = held.as_ref().map_or(1, Permit::bytes);
            let read = ledger.read(Offset(from), bytes_max as usize, messages_max as usize).await;
            let result = read.map(|batches| {
                batches.into_iter().map(|stored| queued(stored, &mut held, &budget)).collect()
            });
            ReadDone { of, generation, result }
        }));
    }

    pub(super) fn read_done(&mut self, done: ReadDone) -> Result<(), Refusal> {
        let ReadDone { of, generation, result } = done;
        match result {
            Ok(batches) => {
                if batches.is_empty() {
                    self.retry_later();
                }
                self.core.on_read(of, generation, batches);
            }
            Err(ReadError::Trimmed { first }) => self.core.on_trimmed(of, generation, first.0),
            Err(error) => {
                self.read_failed(&error)?;
                self.core.on_read_failed(of, generation);
                self.retry_later();
            }
        }
        Ok(())
    }

    fn retry_later(&mut self) {
        if self.retry.is_none() {
            self.retry = Some(Box::pin(sleep(RETRY)));
        }
    }

    fn read_failed(&mut self, error: &ReadError) -> Result<(), Refusal> {
        let refusal = storage_errors::of_read(error);
        if refusal.reason == Reason::SegmentFenced {
            return Err(refusal);
        }
        let id = self.segment.id();
        tracing::warn!(topic = %id.topic, segment = id.segment, subscription = %self.name, %refusal, "read for a subscription failed");
        self.shared.metrics.refuse(refusal.reason);
        if refusal.reason == Reason::ReadDamaged {
            // Whoever waits for it is told; the next ones find out for themselves.
            self.end(&refusal);
        }
        Ok(())
    }
}

fn queued(stored: StoredBatch, held: &mut Option<Permit>, budget: &ByteBudget) -> Queued {
    let part = held.as_mut().map(|held| {
        let bytes = stored.payload.len() as u64;
        let mut part = held.split(bytes);
        // A batch larger than the read was for counts in full, where there is room.
        if part.bytes() < bytes
            && let Some(rest) = budget.try_acquire(bytes - part.bytes())
        {
            part.merge(rest);
        }
        part
    });
    let index = stored.header.index.as_ref();
    let delays = index.is_some_and(|index| index.deliver_at_ms.iter().any(|at| *at != 0));
    Queued { stored: Arc::new(stored), held: part.map(Arc::new), delays }
}

/// As much of what a read wants as the budget has; none when that is next to nothing.
fn share(budget: &ByteBudget, wanted: u64) -> Option<Permit> {
    let free = budget.total() - budget.in_use();
    (free >= wanted.min(READ_BYTES_MIN)).then(|| budget.try_acquire(wanted.min(free))).flatten()
}
