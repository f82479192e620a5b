//! Batches into memory. What is read ahead comes out of the broker's budget, so that consumers who do not read cannot fill
//! memory. When it is used up, one batch at a time may be read beyond it, once a connection has taken what it was given:
//! they cannot stop the others either.

use std::{ops::Range, sync::Arc};

use futures::future::{BoxFuture, select_all};
use geminga_managed_ledger::{ReadError, StoredBatch};
use geminga_proto::{
    ids::Offset,
    reason::Reason,
    records,
    storage::v1::EntryHeader,
    v1::{Codec, PayloadFormat},
};
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
/// A smaller batch is not cut.
const CUT_BYTES_MIN: u64 = 1024;
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

    /// Where most of it is for others, or for later, they are not sent along. A compressed batch is sent as it is: to open it
    /// costs more than it saves.
    fn cut(&self, runs: &[(u64, u64)]) -> Self {
        let header = &self.stored.header;
        let wanted: u64 = runs.iter().map(|(start, end)| end - start).sum();
        let plain =
            header.codec() == Codec::Unspecified && header.format() == PayloadFormat::Native;
        if !plain || wanted * 2 > u64::from(header.count) || self.bytes() < CUT_BYTES_MIN {
            return self.clone();
        }
        let base = self.base();
        let runs: Vec<Range<u32>> =
            runs.iter().map(|(start, end)| (start - base) as u32..(end - base) as u32).collect();
        let (Some(first), Some(last)) = (runs.first(), runs.last()) else { return self.clone() };
        // One that cannot be cut is damaged: whoever decodes it will say so.
        let Ok(payload) = records::cut(&self.stored.payload, &runs) else { return self.clone() };
        let base_offset = self.stored.base_offset.advance(first.start.into());
        let header = EntryHeader {
            base_offset: base_offset.0,
            count: last.end - first.start,
            publish_time_ms: header.publish_time_ms,
            producer: header.producer.clone(),
            format: header.format,
            codec: header.codec,
            uncompressed_size: payload.len() as u32,
            traceparent: header.traceparent.clone(),
            ..EntryHeader::default()
        };
        let stored = Arc::new(StoredBatch { base_offset, header, payload });
        Self { stored, held: self.held.clone(), delays: false }
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

#[cfg(test)]
mod tests {
    use geminga_proto::v1::{Record, RecordBatch};
    use prost::Message as _;

    use super::*;

    fn batch(codec: Codec) -> Queued {
        let record = |n: u8| Record { value: vec![n; 200].into(), ..Record::default() };
        let records = (0..100).map(record).collect();
        let payload: bytes::Bytes = RecordBatch { records }.encode_to_vec().into();
        let header = EntryHeader {
            base_offset: 1_000,
            count: 100,
            format: PayloadFormat::Native.into(),
            codec: codec.into(),
            uncompressed_size: payload.len() as u32,
            ..EntryHeader::default()
        };
        let stored = Arc::new(StoredBatch { base_offset: Offset(1_000), header, payload });
        Queued { stored, held: None, delays: true }
    }

    #[test]
    fn a_delivery_of_a_few_messages_carries_little_more_than_them() {
        let whole = batch(Codec::Unspecified);
        let cut = whole.cut(&[(1_010, 1_012), (1_020, 1_021)]);
        assert_eq!((cut.base(), cut.count(), cut.end()), (1_010, 11, 1_021));
        assert!(cut.bytes() < 3 * 210 + 8 * 2, "{}", cut.bytes());
        let header = &cut.stored.header;
        let payload = cut.stored.payload.clone();
        let mut records =
            records::Records::open(Codec::Unspecified, header.uncompressed_size, 11, payload)
                .expect("whole");
        let mut values = Vec::new();
        while let Some(record) = records.read().expect("whole") {
            values.push(record.value.first().copied());
        }
        let none = [None; 8];
        assert_eq!(values, [&[Some(10), Some(11)][..], &none, &[Some(20)]].concat());
    }

    #[test]
    fn most_of_a_batch_and_a_compressed_one_go_as_they_are() {
        let whole = batch(Codec::Unspecified);
        assert!(Arc::ptr_eq(&whole.cut(&[(1_000, 1_060)]).stored, &whole.stored));
        let packed = batch(Codec::Zstd);
        assert!(Arc::ptr_eq(&packed.cut(&[(1_000, 1_001)]).stored, &packed.stored));
    }
}
