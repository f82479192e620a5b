//! Seeded runs against a server that follows the protocol and is as unkind as it allows: it cuts streams before and after
//! it stores, refuses, keeps credit back, and moves away. What it holds in the end is exactly what was sent.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use bytes::Bytes;
use futures::{StreamExt, future::join_all};
use geminga_client::{Batching, Message, Reason};
use geminga_proto::v1::{
    Batch, Claim, Delivery, OffsetRange, RecordBatch, consume_frame::Frame, settle::Verb,
};
use geminga_runtime::random::Random;
use parking_lot::Mutex;
use prost::Message as _;

use crate::server::{ConsumeCall, PublishCall, Server, delivery, refusal, soon};

const SEEDS: u64 = 12;
const MESSAGES: u64 = 150;
const KEYS: u64 = 7;

/// What the server remembers of the one producer of a segment (DD1), and the log.
#[derive(Default)]
struct Segment {
    token: Bytes,
    stream: u64,
    persisted: u64,
    /// Bounds and bytes of every batch that ever came (DD3).
    seen: BTreeMap<u64, (u64, Bytes)>,
    log: Vec<(Bytes, u64)>,
}

impl Segment {
    fn store(&mut self, batch: &Batch) {
        self.persisted = batch.hi_sequence;
        let records = RecordBatch::decode(batch.payload.clone()).expect("records").records;
        assert_eq!(records.len() as u64, batch.hi_sequence - batch.lo_sequence + 1);
        self.log.extend(records.into_iter().map(|record| {
            let number =
                std::str::from_utf8(&record.value).expect("digits").parse().expect("a number");
            (record.key.expect("a key"), number)
        }));
    }
}

async fn serve_publish(mut call: PublishCall, segment: Arc<Mutex<Segment>>, random: Random) {
    if random.chance(0.2) {
        let reasons = [Reason::SegmentLoading, Reason::Busy, Reason::NotOwner];
        return call.end(refusal(reasons[random.below(3) as usize], None)).await;
    }
    let persisted = {
        let mut segment = segment.lock();
        assert!(call.open.stream_number > segment.stream, "stream numbers rise (DD5)");
        segment.stream = call.open.stream_number;
        if !segment.token.is_empty() {
            assert_eq!(call.open.resume_token, segment.token, "the same session");
        }
        segment.persisted
    };
    if call.open.resume_token.is_empty() && random.chance(0.2) {
        return; // the first answer is lost: this session was never told
    }
    let mut granted = 1 + random.below(4);
    call.opened(persisted, granted, 1 << 20).await;
    let stream = call.open.stream_number;
    {
        let mut segment = segment.lock();
        if segment.token.is_empty() {
            segment.token = match call.open.resume_token.is_empty() {
                true => format!("session {stream}").into(),
                false => call.open.resume_token.clone(),
            };
        }
    }
    let mut taken = 0;
    while let Some(batch) = call.next().await {
        taken += 1;
        assert!(taken <= granted, "within its credit");
        if random.chance(0.05) {
            return; // cut before it was stored
        }
        let (persisted, follows, refusing) = {
            let mut segment = segment.lock();
            let bounds = (batch.lo_sequence, batch.payload.clone());
            let first = segment.seen.entry(batch.hi_sequence).or_insert_with(|| bounds.clone());
            assert_eq!(*first, bounds, "a batch keeps its bounds and bytes (DD3)");
            assert!(
                batch.lo_sequence > segment.persisted,
                "what is stored is not sent again after an open"
            );
            let follows = batch.prev_sequence == segment.persisted;
            let refusing = !follows || random.chance(0.1);
            if !refusing {
                segment.store(&batch);
            }
            (segment.persisted, follows, refusing)
        };
        if refusing {
            call.refuse(
                &batch,
                if follows { Reason::Busy } else { Reason::OutOfSequence },
                persisted,
            )
            .await;
        } else if random.chance(0.05) {
            return; // cut after it was stored
        } else {
            call.receipt(&batch, 0).await;
        }
        if random.chance(0.03) {
            call.go_away(None).await;
        }
        // A frame may get lost, but not the last one.
        if random.chance(0.5) || taken == granted {
            granted = taken + 1 + random.below(4);
            call.credit(granted, 1 << 20).await;
        }
        call.credit(random.below(granted), 0).await;
    }
}

async fn publish_run(seed: u64) {
    let random = Random::from_seed(seed);
    let server = Server::with_layout(2, None).await;
    let client = server.client().await;
    let batching = Batching { messages_max: 3, ..Batching::default() };
    let producer = client.producer("t").batching(batching).build().await.expect("a layout");
    let segments: [Arc<Mutex<Segment>>; 2] = Default::default();
    let sending = async {
        let mut pending = Vec::new();
        for number in 0..MESSAGES {
            let key = format!("key-{}", random.below(KEYS));
            let message = Message::new(number.to_string()).with_key(key);
            pending.push(producer.send(message).await.expect("taken"));
        }
        for pending in pending {
            pending.await.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        }
        producer.close().await.expect("drained");
    };
    let serving = async {
        let mut streams = futures::stream::FuturesUnordered::new();
        loop {
            tokio::select! {
                call = server.publish() => {
                    let segment = Arc::clone(&segments[call.open.segment as usize]);
                    streams.push(serve_publish(call, segment, random.fork()));
                }
                Some(()) = streams.next() => {}
            }
        }
    };
    tokio::select! {
        () = soon(sending) => {}
        () = serving => unreachable!("it serves for ever"),
    }
    let logs = segments.map(|segment| std::mem::take(&mut segment.lock().log));
    let mut all: Vec<u64> = logs.iter().flatten().map(|(_, number)| *number).collect();
    all.sort_unstable();
    assert_eq!(all, (0..MESSAGES).collect::<Vec<_>>(), "seed {seed}: every message once");
    let mut last: BTreeMap<&Bytes, u64> = BTreeMap::new();
    for (key, number) in logs.iter().flatten() {
        let before = last.insert(key, *number);
        assert!(
            before.is_none_or(|before| before < *number),
            "seed {seed}: {key:?} kept its order"
        );
    }
}

#[tokio::test]
async fn over_breaks_and_refusals_every_message_is_stored_once_and_in_the_order_of_its_key() {
    join_all((0..SEEDS).map(publish_run)).await;
}

/// The server's cursor, and what is durable of it.
#[derive(Default)]
struct Cursor {
    settled: BTreeSet<u64>,
    /// With the consumer, under this handle.
    held: BTreeMap<u64, String>,
    streams: u64,
}

impl Cursor {
    fn next(&self) -> u64 {
        (0..).find(|offset| !self.settled.contains(offset)).expect("finite")
    }

    /// What of this the consumer goes on holding, under a new handle; the rest is delivered again (L4).
    fn claimed(&mut self, claims: &[Claim], handle: &str) -> Vec<Claim> {
        let before = std::mem::take(&mut self.held);
        for claim in claims {
            for offset in claim.ranges.iter().flat_map(|range| range.first..=range.last) {
                let ours = before.get(&offset).is_some_and(|held| held.as_bytes() == claim.handle);
                if ours && !self.settled.contains(&offset) {
                    self.held.insert(offset, handle.to_owned());
                }
            }
        }
        let ranges = self.held.keys().map(|offset| OffsetRange { first: *offset, last: *offset });
        vec![Claim { handle: handle.to_owned().into(), ranges: ranges.collect() }]
    }
}

async fn serve_consume(mut call: ConsumeCall, cursor: Arc<Mutex<Cursor>>, random: Random) {
    if random.chance(0.2) {
        return call.end(refusal(Reason::SegmentLoading, None)).await;
    }
    let (mut next, handle, granted) = {
        let mut cursor = cursor.lock();
        cursor.streams += 1;
        let handle = format!("stream {}", cursor.streams);
        let granted = cursor.claimed(&call.open.claims, &handle);
        (cursor.next(), handle, granted)
    };
    call.opened_granting(next, granted).await;
    let (mut granted, mut used) = (0, 0);
    loop {
        while used < granted && next < MESSAGES {
            if random.chance(0.03) {
                return;
            }
            let count = (1 + random.below(5)).min(granted - used).min(MESSAGES - next);
            let deliver: Vec<_> = (next..next + count)
                .filter(|offset| {
                    let cursor = cursor.lock();
                    !cursor.settled.contains(offset) && !cursor.held.contains_key(offset)
                })
                .map(|offset| OffsetRange { first: offset, last: offset })
                .collect();
            used += deliver.len() as u64;
            cursor.lock().held.extend(deliver.iter().map(|range| (range.first, handle.clone())));
            if !deliver.is_empty() {
                call.deliver(Delivery { deliver, ..delivery(next, count as u32, &handle) }).await;
            }
            next += count;
        }
        match call.next().await {
            None => return,
            Some(Frame::Credit(credit)) => granted = granted.max(credit.messages),
            Some(Frame::Settle(settle)) => {
                if random.chance(0.1) {
                    return; // cut before it was durable
                }
                if random.chance(0.1) {
                    call.refuse(&settle, Reason::Busy).await;
                    continue;
                }
                if let Some(Verb::Release(release)) = &settle.verb {
                    assert!(!release.counts, "only what nobody has seen is given back");
                    let mark_delete_next = {
                        let mut cursor = cursor.lock();
                        for offset in release.ranges.iter().flat_map(|of| of.first..=of.last) {
                            let held = cursor.held.remove(&offset);
                            assert!(held.is_some_and(|held| held.as_bytes() == release.handle));
                            next = next.min(offset);
                        }
                        cursor.next()
                    };
                    call.settled(&settle, mark_delete_next).await;
                    continue;
                }
                let (ranges, presented) = match settle.verb.clone().expect("a verb") {
                    Verb::Accept(accept) => (accept.ranges, accept.handle),
                    Verb::AcceptUpTo(up_to) => {
                        (vec![OffsetRange { first: 0, last: up_to.offset }], up_to.handle)
                    }
                    other => panic!("{other:?} was never asked for"),
                };
                let mark_delete_next = {
                    let mut cursor = cursor.lock();
                    for offset in ranges.iter().flat_map(|range| range.first..=range.last) {
                        let held = cursor.held.remove(&offset);
                        let settled = !cursor.settled.insert(offset);
                        // What was durable before a break may be presented once more.
                        let ours = held.is_some_and(|held| held.as_bytes() == presented);
                        assert!(settled || ours, "{offset} is not held under this handle");
                    }
                    cursor.next()
                };
                if random.chance(0.1) {
                    return; // cut after it was durable
                }
                call.settled(&settle, mark_delete_next).await;
            }
            Some(_) => {}
        }
    }
}

async fn consume_run(seed: u64) {
    let random = Random::from_seed(seed);
    let server = Server::start().await;
    let client = server.client().await;
    let cursor = Arc::new(Mutex::new(Cursor::default()));
    let consuming = async {
        let mut consumer =
            client.consumer("t", "s").window(10, 1 << 20).build().await.expect("it opens");
        let (mut held, mut accepted, mut answers) = (Vec::new(), BTreeSet::new(), Vec::new());
        while (accepted.len() as u64) < MESSAGES {
            // Some messages are held for a while, over breaks too.
            if held.len() < 20 && (held.is_empty() || random.chance(0.6)) {
                if let Some(Some(received)) = futures::FutureExt::now_or_never(consumer.next()) {
                    let received: geminga_client::Received = received.expect("a message");
                    let offset = received.id.offset;
                    assert!(
                        !accepted.contains(&offset),
                        "seed {seed}: {offset} was accepted before"
                    );
                    held.push(received);
                }
            } else {
                let received = held.swap_remove(random.below(held.len() as u64) as usize);
                if random.chance(0.05) && received.id.offset < 40 {
                    accepted.extend(0..=received.id.offset);
                    answers.push(received.accept_up_to());
                } else {
                    accepted.insert(received.id.offset);
                    answers.push(received.accept());
                }
                held.retain(|received| !accepted.contains(&received.id.offset));
            }
            tokio::task::yield_now().await;
        }
        for answer in answers {
            answer.await.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        }
        assert_eq!(cursor.lock().next(), MESSAGES, "seed {seed}: everything is durably settled");
        consumer.close().await.expect("closed");
    };
    let serving = async {
        loop {
            serve_consume(server.consume().await, Arc::clone(&cursor), random.fork()).await;
        }
    };
    tokio::select! {
        () = soon(consuming) => {}
        () = serving => unreachable!("it serves for ever"),
    }
}

#[tokio::test]
async fn over_breaks_and_refusals_every_accept_becomes_durable_and_is_not_handed_out_again() {
    join_all((0..SEEDS).map(consume_run)).await;
}
