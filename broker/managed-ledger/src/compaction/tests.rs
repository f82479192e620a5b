//! The core of a compaction against a plain model: a log in memory, views made of it round by round, readers in between.

use std::collections::BTreeMap;

use bytes::Bytes;
use geminga_proto::{
    ids::Offset,
    records::Records,
    storage::v1::EntryHeader,
    v1::{Codec, PayloadFormat, Record, RecordBatch},
};
use proptest::prelude::*;
use prost::Message;

use super::{
    keys::KeyTable,
    rewrite::{as_read, observe, rewrite},
};
use crate::{list::Tombstones, types::StoredBatch};

/// One message: a key or none, and a value; 0 is the empty one.
type Say = (Option<u8>, u8);

fn record((key, value): Say) -> Record {
    Record {
        key: key.map(|key| Bytes::from(vec![b'k', key])),
        value: Bytes::from(vec![b'v'; usize::from(value)]),
        headers: [("h".to_owned(), "x".to_owned())].into(),
        ..Record::default()
    }
}

fn batch(base: u64, says: &[Say], codec: Codec) -> StoredBatch {
    let records = says.iter().copied().map(record).collect();
    let plain = RecordBatch { records }.encode_to_vec();
    let payload = match codec {
        Codec::Zstd => zstd::bulk::compress(&plain, 1).expect("memory"),
        _ => plain.clone(),
    };
    let header = EntryHeader {
        base_offset: base,
        count: says.len() as u32,
        publish_time_ms: 1_000 + base,
        format: PayloadFormat::Native.into(),
        codec: codec.into(),
        uncompressed_size: plain.len() as u32,
        ..EntryHeader::default()
    };
    StoredBatch { base_offset: Offset(base), header, payload: payload.into() }
}

/// A log in memory, and its view.
struct Segment {
    log: Vec<StoredBatch>,
    view: Vec<StoredBatch>,
    horizon: Offset,
    tombstones: Tombstones,
}

impl Segment {
    fn new() -> Self {
        Self {
            log: Vec::new(),
            view: Vec::new(),
            horizon: Offset(0),
            tombstones: Tombstones::default(),
        }
    }

    fn end(&self) -> Offset {
        self.log.last().map_or(Offset(0), StoredBatch::end)
    }

    /// As a round does it, up to `target` or as far as the table goes.
    fn round(&mut self, target: Offset, table_bytes: u64, now_ms: u64) {
        let mut table = KeyTable::new(table_bytes);
        let mut horizon = self.horizon;
        let new = |batch: &&StoredBatch| batch.base_offset >= self.horizon;
        for batch in self.log.iter().filter(new) {
            if table.is_full() || batch.base_offset >= target {
                break;
            }
            observe(&mut table, batch);
            horizon = batch.end();
        }
        let tombstones = self.tombstones.after_round(horizon, now_ms, KEPT_MS);
        let old = self.view.iter().map(|batch| (batch, true));
        let new = self.log.iter().filter(new).filter(|b| b.base_offset < horizon);
        let all = old.chain(new.map(|batch| (batch, false)));
        let view = all.filter_map(|(batch, of_view)| {
            rewrite(&table, batch.clone(), of_view, tombstones.from).map(|rewritten| {
                let fresh = as_read(rewritten.batch.clone(), Offset(0), horizon);
                assert_eq!(fresh.map_or(0, |batch| batch.messages()), rewritten.messages);
                rewritten.batch
            })
        });
        self.view = view.collect();
        (self.horizon, self.tombstones) = (horizon, tombstones);
    }

    /// At most `most` batches from an offset on, and where to go on.
    fn read(&self, from: Offset, since: Offset, most: usize) -> (Vec<StoredBatch>, Offset) {
        let below = from < self.horizon;
        let (source, behind) = match below {
            true => (&self.view, self.horizon),
            false => (&self.log, self.end()),
        };
        let mut found = Vec::new();
        for batch in source.iter().filter(|batch| batch.end() > from) {
            let batch = match below {
                true => as_read(batch.clone(), from, since),
                false => Some(batch.clone()),
            };
            let Some(batch) = batch else { continue };
            if found.len() == most {
                return (found, batch.base_offset);
            }
            found.push(batch);
        }
        (found, behind)
    }
}

const KEPT_MS: u64 = 10;

/// The messages that are meant.
fn kept(batch: &StoredBatch) -> Vec<(u64, Record)> {
    let codec = Codec::try_from(batch.header.codec).expect("known");
    let (declared, count) = (batch.header.uncompressed_size, batch.header.count);
    let mut records = Records::open(codec, declared, count, batch.payload.clone()).expect("good");
    let mut all = Vec::new();
    let kept = batch.kept();
    for n in 0..u64::from(count) {
        let offset = batch.base_offset.0 + n;
        let record = records.read().expect("good").expect("as many as it says");
        if kept.iter().any(|(first, last)| (first.0..=last.0).contains(&offset)) {
            all.push((offset, record));
        }
    }
    all
}

type Table = BTreeMap<Bytes, Record>;

fn apply(table: &mut Table, batch: &StoredBatch) {
    for (_, record) in kept(batch) {
        let Some(key) = record.key.clone() else { continue };
        match record.value.is_empty() {
            true => drop(table.remove(&key)),
            false => drop(table.insert(key, record)),
        }
    }
}

fn table(batches: &[StoredBatch]) -> Table {
    let mut all = Table::new();
    batches.iter().for_each(|batch| apply(&mut all, batch));
    all
}

#[derive(Clone, Debug)]
enum Step {
    Publish(Vec<Say>, bool),
    /// How far of the way to the end, in 16ths; how many keys fit.
    Round(u64, u64),
    /// So many batches by a reader that goes on.
    Read(usize),
    Begin,
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let say = (prop::option::weighted(0.9, 0u8..6), 0u8..3);
    prop_oneof![
        4 => (prop::collection::vec(say, 1..8), any::<bool>()).prop_map(|(s, z)| Step::Publish(s, z)),
        3 => (1u64..=16, 1u64..8).prop_map(|(part, keys)| Step::Round(part, keys)),
        3 => (1usize..4).prop_map(Step::Read),
        1 => Just(Step::Begin),
        1 => (0u64..6).prop_map(Step::Pass),
    ]
}

proptest! {
    #[test]
    fn the_table_of_a_compacted_read_is_the_table_of_the_log(steps in prop::collection::vec(step(), 1..60)) {
        let mut segment = Segment::new();
        let mut now_ms = 1_000;
        // A reader in the middle: its place, the horizon when it began, what it built, when it began.
        let (mut at, mut since, mut built, mut began_ms) = (Offset(0), Offset(0), Table::new(), now_ms);
        for step in steps {
            match step {
                Step::Publish(says, zstd) => {
                    let codec = if zstd { Codec::Zstd } else { Codec::Unspecified };
                    segment.log.push(batch(segment.end().0, &says, codec));
                }
                Step::Round(part, keys) => {
                    let ahead = segment.end().0 - segment.horizon.0;
                    let target = Offset(segment.horizon.0 + (ahead * part).div_ceil(16));
                    let before = segment.horizon;
                    segment.round(target, keys * 48, now_ms);
                    prop_assert!(segment.horizon > before || ahead == 0, "a round gets on");
                    // A crash in the middle of the next round leaves nothing.
                    let mut lost = Segment { log: segment.log.clone(), view: segment.view.clone(), ..Segment::new() };
                    (lost.horizon, lost.tombstones) = (segment.horizon, segment.tombstones);
                    lost.round(segment.end(), 48, now_ms);
                    let (fresh, next) = segment.read(Offset(0), segment.horizon, usize::MAX);
                    if next == segment.horizon && segment.horizon > Offset(0) {
                        let below: Vec<_> = segment.log.iter().filter(|b| b.base_offset < segment.horizon).cloned().collect();
                        prop_assert_eq!(table(&fresh), table(&below));
                        // The latest of each key once, in order, no deleted one.
                        let all: Vec<_> = fresh.iter().flat_map(kept).collect();
                        prop_assert!(all.is_sorted_by(|a, b| a.0 < b.0));
                        prop_assert_eq!(all.len(), table(&fresh).len());
                    }
                }
                Step::Read(most) => {
                    let told_from = segment.tombstones.from;
                    if at < told_from && since < told_from {
                        // It is told to begin anew; that takes longer than tombstones are kept.
                        prop_assert!(now_ms >= began_ms + KEPT_MS);
                        (at, since, built, began_ms) = (Offset(0), segment.horizon, Table::new(), now_ms);
                    }
                    let (found, next) = segment.read(at, since, most);
                    found.iter().for_each(|batch| apply(&mut built, batch));
                    prop_assert!(next >= at);
                    at = next;
                    if at >= segment.end() {
                        prop_assert_eq!(&built, &table(&segment.log));
                    }
                }
                Step::Begin => (at, since, built, began_ms) = (Offset(0), segment.horizon, Table::new(), now_ms),
                Step::Pass(ms) => now_ms += ms,
            }
        }
        for _ in 0..100 {
            let told_from = segment.tombstones.from;
            if at < told_from && since < told_from {
                (at, since, built) = (Offset(0), segment.horizon, Table::new());
            }
            let (found, next) = segment.read(at, since, 1_000);
            found.iter().for_each(|batch| apply(&mut built, batch));
            at = next;
            if at >= segment.end() {
                break;
            }
        }
        prop_assert_eq!(&built, &table(&segment.log));
    }
}

#[test]
fn what_is_left_out_is_an_empty_record_and_the_rest_is_as_it_was_sent() {
    let says = [(Some(1), 200), (Some(2), 200), (Some(1), 7), (None, 9), (Some(3), 0)];
    let sent = batch(40, &says, Codec::Unspecified);
    let mut table = KeyTable::new(1 << 10);
    observe(&mut table, &sent);
    let rewritten = rewrite(&table, sent.clone(), false, Offset(0)).expect("some are kept");
    assert_eq!(rewritten.messages, 2, "the deleted key is none");
    let batch = rewritten.batch;
    assert_eq!(
        (&batch.header.kept_runs[..], &batch.header.tombstone_runs[..]),
        (&[1, 2, 1, 1][..], &[4, 1][..])
    );
    assert_eq!((batch.base_offset, batch.header.count), (Offset(40), 5));
    assert_eq!(batch.header.publish_time_ms, sent.header.publish_time_ms);
    assert!(batch.payload.len() < sent.payload.len());
    let codec = Codec::try_from(batch.header.codec).expect("known");
    let declared = batch.header.uncompressed_size;
    let mut records = Records::open(codec, declared, 5, batch.payload.clone()).expect("good");
    let mut all = Vec::new();
    while let Some(record) = records.read().expect("good") {
        all.push(record);
    }
    let empty = Record::default();
    let expected = [empty.clone(), record(says[1]), record(says[2]), empty, record(says[4])];
    assert_eq!(all, expected);
    // A later round that drops tombstones of old, and one that finds nothing to keep.
    let later =
        rewrite(&KeyTable::new(48), batch.clone(), true, Offset(45)).expect("some are kept");
    assert_eq!((&later.batch.header.kept_runs[..], later.messages), (&[1, 2][..], 2));
    let mut all_newer = KeyTable::new(1 << 10);
    for key in 1..=3 {
        all_newer.observe(super::keys::KeyHash::of(&[b'k', key]), Offset(90));
    }
    assert!(rewrite(&all_newer, batch, true, Offset(0)).is_none());
}

#[test]
fn a_reader_gets_a_deleted_key_if_it_began_before_and_nothing_below_its_place() {
    let says = [(Some(1), 2), (Some(2), 0), (Some(3), 2), (Some(4), 0)];
    let sent = batch(10, &says, Codec::Zstd);
    let mut table = KeyTable::new(1 << 10);
    observe(&mut table, &sent);
    let view = rewrite(&table, sent, false, Offset(0)).expect("kept").batch;
    let offsets = |from, since| {
        let read = as_read(view.clone(), Offset(from), Offset(since));
        read.map_or(Vec::new(), |batch| kept(&batch).iter().map(|(offset, _)| *offset).collect())
    };
    assert_eq!(offsets(0, 14), [10, 12], "it began with this view");
    assert_eq!(offsets(0, 0), [10, 11, 12, 13]);
    assert_eq!(offsets(0, 12), [10, 12, 13]);
    assert_eq!(offsets(12, 12), [12, 13]);
    assert_eq!(offsets(13, 14), [0; 0]);
}

#[test]
fn a_batch_that_cannot_be_understood_stays_as_it_is() {
    let mut odd = batch(5, &[(Some(1), 3), (Some(1), 4)], Codec::Unspecified);
    odd.payload = Bytes::from_static(b"\xFF\xFF\xFF");
    let mut table = KeyTable::new(1 << 10);
    observe(&mut table, &odd);
    for of_view in [false, true] {
        let kept = rewrite(&table, odd.clone(), of_view, Offset(99)).expect("kept");
        assert_eq!((&kept.batch.payload, kept.messages), (&odd.payload, 2));
        assert_eq!(kept.batch.kept(), [(Offset(5), Offset(6))]);
        odd = kept.batch;
    }
}
