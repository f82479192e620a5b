//! Gathers messages into batches. Pure: time comes in, batches come out.
//!
//! A batch is cut when it is full (bytes, or count), when its first message has waited for the linger time, or at once
//! when nothing is in flight: then waiting would only add latency.

use std::{collections::VecDeque, time::Duration};

use bytes::{Bytes, BytesMut};
use geminga_runtime::{budget::Permit, telemetry::TraceContext};
use tokio::{sync::oneshot, time::Instant};

use crate::{
    codec::put_record,
    error::Error,
    message::{Message, Receipt},
};

/// How messages are gathered into batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batching {
    /// A batch is full at this many encoded bytes. A larger message goes alone.
    pub bytes_max: usize,
    /// A batch is full at this many messages.
    pub messages_max: usize,
    /// How long a message may wait for others while batches are in flight.
    pub linger: Duration,
}

impl Default for Batching {
    fn default() -> Self {
        Self { bytes_max: 64 * 1024, messages_max: 4_096, linger: Duration::from_millis(1) }
    }
}

impl Batching {
    /// Within what the server takes: 1 byte to 5 MiB, 1 to 65,536 messages.
    pub(crate) fn bounded(self) -> Self {
        Self {
            bytes_max: self.bytes_max.clamp(1, 5 * 1024 * 1024),
            messages_max: self.messages_max.clamp(1, 65_536),
            linger: self.linger.min(Duration::from_secs(60)),
        }
    }
}

/// Who waits for the receipt of one message.
pub(crate) type Answer = oneshot::Sender<Result<Receipt, Error>>;

/// Who waits for the receipts of a batch, and the bytes that its messages hold of the producer's budget: given back in
/// one step, not message by message.
#[derive(Debug)]
pub(crate) struct Waiters {
    answers: Vec<Answer>,
    permit: Permit,
}

impl Waiters {
    /// Messages of the batch.
    pub(crate) fn len(&self) -> usize {
        self.answers.len()
    }

    /// Answers every message, by its place in the batch; their bytes are free before anybody hears of it.
    pub(crate) fn answer(self, mut result: impl FnMut(u64) -> Result<Receipt, Error>) {
        drop(self.permit);
        for (place, answer) in (0..).zip(self.answers) {
            let _ = answer.send(result(place)); // nobody may wait any more
        }
    }
}

/// What a message asks of its place; such a message is a batch of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Asks {
    /// Stored only if it gets this offset.
    pub(crate) expected_offset: Option<u64>,
    /// Its sequence; above all before it.
    pub(crate) sequence: Option<u64>,
}

impl Asks {
    fn alone(self) -> bool {
        self != Self::default()
    }
}

/// One message on its way to a batch.
#[derive(Debug)]
pub(crate) struct Queued {
    pub(crate) asks: Asks,
    pub(crate) message: Message,
    /// Of the encoded record, bytes.
    pub(crate) size: usize,
    pub(crate) hash: u32,
    pub(crate) deadline: Instant,
    pub(crate) answer: Answer,
    pub(crate) permit: Permit,
}

/// The trace that a message belongs to, if somebody records it.
fn recorded_trace(message: &Message) -> Option<TraceContext> {
    let context = TraceContext::parse(message.headers.get(TraceContext::HEADER)?).ok()?;
    context.is_sampled().then_some(context)
}

/// A batch before it has sequences.
#[derive(Debug)]
pub(crate) struct Cut {
    /// Encoded records, not compressed.
    pub(crate) records: Bytes,
    pub(crate) hashes: Vec<u32>,
    /// Parallel to `hashes`; empty if no record has a key.
    pub(crate) has_key: Vec<bool>,
    /// Parallel to `hashes`; empty if no record waits for a time.
    pub(crate) deliver_at_ms: Vec<u64>,
    /// Of the only message of this batch.
    pub(crate) asks: Asks,
    /// The earliest of its messages.
    pub(crate) deadline: Instant,
    /// The first message's place among all that ever came.
    pub(crate) number: u64,
    pub(crate) waiters: Waiters,
    /// Of its first message whose trace is recorded.
    pub(crate) trace: Option<TraceContext>,
}

/// The batch being gathered, and those already full.
#[derive(Debug)]
pub(crate) struct Batcher {
    settings: Batching,
    open: Option<Open>,
    full: VecDeque<Cut>,
    /// Where records are encoded; a cut batch takes its part of it, the next one goes on behind it.
    buffer: BytesMut,
    /// Messages that ever came.
    count: u64,
    /// Bytes and messages of the last batch: the next one is expected to be like it. Small batches then share memory,
    /// instead of each holding the room of a full one while it is in flight.
    expected: (usize, usize),
}

#[derive(Debug)]
struct Open {
    since: Instant,
    hashes: Vec<u32>,
    has_key: Vec<bool>,
    any_key: bool,
    /// Empty until a message names a time; then parallel to `hashes`.
    deliver_at_ms: Vec<u64>,
    asks: Asks,
    number: u64,
    deadline: Instant,
    waiters: Waiters,
    trace: Option<TraceContext>,
}

impl Open {
    /// The time before which the message that came last is not delivered; 0 on the wire: at once.
    fn put_time(&mut self, time: Option<u64>) {
        if time.is_some_and(|time| time > 0) || !self.deliver_at_ms.is_empty() {
            self.deliver_at_ms.resize(self.hashes.len() - 1, 0);
            self.deliver_at_ms.push(time.unwrap_or_default());
        }
    }
}

impl Batcher {
    pub(crate) fn new(settings: Batching) -> Self {
        Self {
            settings: settings.bounded(),
            open: None,
            full: VecDeque::new(),
            buffer: BytesMut::new(),
            count: 0,
            expected: (0, 0),
        }
    }

    /// Takes a message, in order.
    pub(crate) fn push(&mut self, queued: Queued, now: Instant) {
        let Queued { asks, message, size, hash, deadline, answer, permit } = queued;
        if self.buffer.len() + size > self.settings.bytes_max || asks.alone() {
            self.close();
        }
        let has_key = message.key.is_some();
        let trace = recorded_trace(&message);
        match &mut self.open {
            Some(open) => {
                open.hashes.push(hash);
                open.has_key.push(has_key);
                open.any_key |= has_key;
                open.trace = open.trace.or(trace);
                open.deadline = open.deadline.min(deadline);
                open.waiters.answers.push(answer);
                open.waiters.permit.merge(permit);
            }
            None => {
                let (bytes, messages) = self.expected;
                self.buffer.reserve(bytes.max(size));
                let mut open = Open {
                    since: now,
                    deliver_at_ms: Vec::new(),
                    asks,
                    hashes: Vec::with_capacity(messages),
                    has_key: Vec::with_capacity(messages),
                    any_key: has_key,
                    number: self.count,
                    deadline,
                    waiters: Waiters { answers: Vec::with_capacity(messages), permit },
                    trace,
                };
                open.hashes.push(hash);
                open.has_key.push(has_key);
                open.waiters.answers.push(answer);
                self.open = Some(open);
            }
        }
        self.count += 1;
        put_record(&mut self.buffer, &message);
        let messages = self.open.as_mut().map_or(0, |open| {
            open.put_time(message.deliver_at_ms);
            open.waiters.len()
        });
        let full =
            messages >= self.settings.messages_max || self.buffer.len() >= self.settings.bytes_max;
        if full || asks.alone() {
            self.close();
        }
    }

    fn close(&mut self) {
        let Some(open) = self.open.take() else { return };
        self.expected = (self.buffer.len(), open.waiters.len());
        self.full.push_back(Cut {
            records: self.buffer.split().freeze(),
            hashes: open.hashes,
            has_key: if open.any_key { open.has_key } else { Vec::new() },
            deliver_at_ms: open.deliver_at_ms,
            asks: open.asks,
            deadline: open.deadline,
            number: open.number,
            waiters: open.waiters,
            trace: open.trace,
        });
    }

    /// The next batch to send: a full one; or the one being gathered if nothing is in flight, if its linger time is over,
    /// or if it is flushed.
    pub(crate) fn cut(
        &mut self,
        now: Instant,
        nothing_in_flight: bool,
        flush: bool,
    ) -> Option<Cut> {
        let ripe = self.full.is_empty()
            && self.open.as_ref().is_some_and(|open| {
                nothing_in_flight || flush || now.duration_since(open.since) >= self.settings.linger
            });
        if ripe {
            self.close();
        }
        self.full.pop_front()
    }

    /// When the batch being gathered is over its linger time; none while full ones go before it.
    pub(crate) fn due(&self) -> Option<Instant> {
        let open = self.open.as_ref().filter(|_| self.full.is_empty())?;
        Some(open.since + self.settings.linger)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.open.is_none() && self.full.is_empty()
    }

    /// Full batches that nobody took yet.
    pub(crate) fn full(&self) -> usize {
        self.full.len()
    }

    /// When the time of the first batch is over. Times rise from batch to batch but for what concurrent senders waited.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.full.front().map(|cut| cut.deadline).or(self.open.as_ref().map(|open| open.deadline))
    }

    /// Messages that ever came.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// The place of the first message that is still here.
    pub(crate) fn oldest(&self) -> Option<u64> {
        self.full.front().map(|cut| cut.number).or(self.open.as_ref().map(|open| open.number))
    }

    /// Takes out the batches whose time is over at `now`.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<Waiters> {
        let mut expired = Vec::new();
        while self.deadline().is_some_and(|deadline| deadline <= now) {
            if self.full.is_empty() {
                self.close();
            }
            expired.extend(self.full.pop_front().map(|cut| cut.waiters));
        }
        expired
    }

    /// Takes everything out, for an end by error.
    pub(crate) fn drain(&mut self) -> Vec<Waiters> {
        self.close();
        self.full.drain(..).map(|cut| cut.waiters).collect()
    }
}

#[cfg(test)]
mod tests {
    use geminga_proto::v1::RecordBatch;
    use geminga_runtime::budget::ByteBudget;
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;
    use crate::codec::record_len;

    fn queued(value: Vec<u8>, key: bool, now: Instant) -> Queued {
        queued_of(&ByteBudget::new(1 << 20), value, key, now)
    }

    fn queued_of(budget: &ByteBudget, value: Vec<u8>, key: bool, now: Instant) -> Queued {
        let message = Message {
            key: key.then(|| Bytes::from_static(b"k")),
            value: value.into(),
            ..Message::default()
        };
        let size = record_len(&message);
        let permit = budget.try_acquire(10).expect("free");
        let deadline = now + Duration::from_secs(60);
        let (asks, answer) = (Asks::default(), oneshot::channel().0);
        Queued { asks, message, size, hash: 7, deadline, answer, permit }
    }

    fn settings(bytes_max: usize, messages_max: usize) -> Batching {
        Batching { bytes_max, messages_max, linger: Duration::from_millis(5) }
    }

    proptest! {
        #[test]
        fn every_message_leaves_once_in_order_in_batches_within_the_bounds(
            sizes in prop::collection::vec((0usize..300, any::<bool>(), 0u8..4), 1..200),
            bytes_max in 1usize..1_000,
            messages_max in 1usize..20,
        ) {
            let now = Instant::now();
            let budget = ByteBudget::new(1 << 20);
            let mut batcher = Batcher::new(settings(bytes_max, messages_max));
            let mut cuts = Vec::new();
            for (number, (size, key, act)) in sizes.iter().enumerate() {
                let mut value = (number as u32).to_le_bytes().to_vec();
                value.resize(4 + size, 0);
                batcher.push(queued_of(&budget, value, *key, now), now);
                if *act == 0 {
                    cuts.extend(batcher.cut(now, true, false));
                }
            }
            while let Some(cut) = batcher.cut(now, false, true) {
                cuts.push(cut);
            }
            prop_assert!(batcher.is_empty());
            let mut number = 0;
            for cut in cuts {
                let records = RecordBatch::decode(cut.records.clone()).expect("records").records;
                prop_assert_eq!(records.len(), cut.waiters.len());
                prop_assert_eq!(records.len(), cut.hashes.len());
                prop_assert!(records.len() <= messages_max);
                prop_assert!(records.len() == 1 || cut.records.len() <= bytes_max);
                let keys: Vec<bool> = records.iter().map(|record| record.key.is_some()).collect();
                prop_assert!(cut.has_key == keys || (cut.has_key.is_empty() && !keys.contains(&true)));
                for record in records {
                    prop_assert_eq!(&record.value[..4], &(number as u32).to_le_bytes()[..]);
                    number += 1;
                }
            }
            prop_assert_eq!(number, sizes.len());
        }
    }

    #[test]
    fn a_message_waits_only_while_something_is_in_flight_and_at_most_the_linger_time() {
        let now = Instant::now();
        let mut batcher = Batcher::new(settings(1_000, 100));
        batcher.push(queued(vec![1], false, now), now);
        assert!(batcher.cut(now, false, false).is_none(), "others may join");
        assert_eq!(batcher.due(), Some(now + Duration::from_millis(5)));
        assert!(
            batcher.cut(now + Duration::from_millis(5), false, false).is_some(),
            "its time is over"
        );
        batcher.push(queued(vec![2], false, now), now);
        assert!(batcher.cut(now, true, false).is_some(), "nothing is in flight");
        assert!(batcher.cut(now, true, true).is_none() && batcher.is_empty());
    }

    #[test]
    fn the_times_of_a_batch_run_parallel_to_its_messages_and_are_left_out_where_none_has_one() {
        let now = Instant::now();
        let budget = ByteBudget::new(1_000);
        let mut batcher = Batcher::new(settings(1_000, 100));
        let mut cut = |times: &[Option<u64>]| {
            for time in times {
                let mut queued = queued_of(&budget, vec![1], false, now);
                queued.message.deliver_at_ms = *time;
                batcher.push(queued, now);
            }
            batcher.cut(now, true, false).expect("one batch").deliver_at_ms
        };
        assert!(cut(&[None, None, Some(0)]).is_empty());
        assert_eq!(cut(&[None, None, Some(7), None, Some(9)]), [0, 0, 7, 0, 9]);
        assert_eq!(cut(&[Some(3)]), [3]);
    }

    #[test]
    fn a_message_that_asks_for_its_place_goes_alone() {
        let now = Instant::now();
        let budget = ByteBudget::new(1_000);
        let mut batcher = Batcher::new(settings(1_000, 100));
        for expected_offset in [None, None, Some(5), Some(6), None] {
            let mut queued = queued_of(&budget, vec![1], false, now);
            queued.asks.expected_offset = expected_offset;
            batcher.push(queued, now);
        }
        let mut cuts = Vec::new();
        while let Some(cut) = batcher.cut(now, true, true) {
            cuts.push((cut.waiters.len(), cut.asks.expected_offset));
        }
        assert_eq!(cuts, [(2, None), (1, Some(5)), (1, Some(6)), (1, None)]);
    }

    #[test]
    fn the_bytes_of_a_batch_are_free_before_its_first_answer() {
        let now = Instant::now();
        let budget = ByteBudget::new(1_000);
        let mut batcher = Batcher::new(settings(1_000, 100));
        for value in 0..5 {
            batcher.push(queued_of(&budget, vec![value], false, now), now);
        }
        assert_eq!(budget.in_use(), 50);
        let cut = batcher.cut(now, true, false).expect("one batch");
        cut.waiters.answer(|_| {
            assert_eq!(budget.in_use(), 0);
            Err(Error::Closed)
        });
    }

    #[test]
    fn small_batches_in_flight_do_not_hold_the_room_of_full_ones() {
        let now = Instant::now();
        let mut batcher = Batcher::new(settings(5 << 20, 100));
        let mut cuts = Vec::new();
        let mut held = std::collections::BTreeSet::new();
        for _ in 0..1_000 {
            batcher.push(queued(vec![0; 100], false, now), now);
            held.insert(batcher.buffer.capacity().next_multiple_of(1 << 10));
            cuts.push(batcher.cut(now, true, false).expect("one batch"));
        }
        assert!(
            held.last().expect("some") <= &(64 << 10),
            "no batch takes room that it does not need: {held:?}"
        );
    }
}
