//! Compaction of a whole segment: by hand and by policy, over rolls, trims, offload, and owners that die in the middle.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use geminga_bookie_client::LedgerState;
use geminga_metadata::{Fault, FaultPlan, keys};
use geminga_proto::{
    ids::Offset,
    records::Records,
    v1::{Codec, Record, RecordBatch, RecordIndex},
};
use geminga_runtime::random::Random;
use prost::Message;

use super::{harness::*, tier::*};
use crate::{
    CompactedReadError, ManagedLedger, PublishBatch, Settlement, Start, Status, StoredBatch,
    TierPolicy, TierProgress,
    list::{List, Listed, ListedState},
};

/// Key and value; an empty value deletes the key.
type Say<'a> = (&'a str, &'a str);
type Table = BTreeMap<String, String>;

pub(super) fn keyed(producer: &mut Producer, says: &[Say<'_>]) -> PublishBatch {
    let record = |(key, value): &Say<'_>| Record {
        key: (!key.is_empty()).then(|| Bytes::copy_from_slice(key.as_bytes())),
        value: Bytes::copy_from_slice(value.as_bytes()),
        ..Record::default()
    };
    let payload = RecordBatch { records: says.iter().map(record).collect() }.encode_to_vec();
    let (prev, hi) = (producer.last, producer.last + says.len() as u64);
    producer.last = hi;
    PublishBatch {
        uncompressed_size: payload.len() as u32,
        payload: payload.into(),
        index: RecordIndex { key_hash: vec![0; says.len()], ..RecordIndex::default() },
        ..producer.batch(prev, prev + 1, hi)
    }
}

/// Stores `count` batches of a few keys; some delete one.
async fn fill_keys(log: &ManagedLedger, producer: &mut Producer, random: &Random, count: u64) {
    for n in 0..count {
        let says: Vec<(String, String)> = (0..1 + random.below(4))
            .map(|_| {
                let key = format!("key-{}", random.below(12));
                let gone = random.chance(0.2);
                (key, if gone { String::new() } else { format!("{n}-{}", random.below(1_000)) })
            })
            .collect();
        let says: Vec<Say<'_>> = says.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        log.publish(keyed(producer, &says)).await.expect("stored");
    }
}

fn apply(table: &mut Table, batches: &[StoredBatch]) {
    for batch in batches {
        let codec = Codec::try_from(batch.header.codec).expect("known");
        let (size, count) = (batch.header.uncompressed_size, batch.header.count);
        let mut records = Records::open(codec, size, count, batch.payload.clone()).expect("good");
        for n in 0..u64::from(count) {
            let record = records.read().expect("good").expect("as many as it says");
            let at = batch.base_offset.advance(n);
            let kept = batch.kept().iter().any(|(first, last)| *first <= at && at <= *last);
            let Some(key) = record.key.filter(|_| kept) else { continue };
            let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
            match record.value.is_empty() {
                true => drop(table.remove(&text(&key))),
                false => drop(table.insert(text(&key), text(&record.value))),
            }
        }
    }
}

/// From all that is stored.
async fn table_of_log(log: &ManagedLedger) -> Table {
    let (mut table, mut next, end) = (Table::new(), log.first_offset(), *log.end().borrow());
    while next < end {
        let batches = log.read(next, 500, 1_000).await.expect("readable");
        next = batches.last().expect("there is more").end();
        apply(&mut table, &batches);
    }
    table
}

/// A reader of what is compacted, a few bytes at a time.
struct TableReader {
    next: Offset,
    since: Offset,
    table: Table,
    messages: u64,
}

impl TableReader {
    fn new(log: &ManagedLedger) -> Self {
        let since = log.compaction().compacted_to;
        Self { next: Offset(0), since, table: Table::new(), messages: 0 }
    }

    async fn step(&mut self, log: &ManagedLedger) {
        let read = log.read_compacted(self.next, Some(self.since), 60, 1_000).await;
        let read = read.expect("readable");
        assert!(read.next > self.next, "it gets on");
        apply(&mut self.table, &read.batches);
        self.messages += read.batches.iter().map(StoredBatch::messages).sum::<u64>();
        self.next = read.next;
    }

    async fn read_to_end(mut self, log: &ManagedLedger) -> (Table, u64) {
        while self.next < *log.end().borrow() {
            self.step(log).await;
        }
        (self.table, self.messages)
    }
}

async fn compacted_table(log: &ManagedLedger) -> Table {
    TableReader::new(log).read_to_end(log).await.0
}

/// Waits for the end of a compaction; its steps.
async fn compact(log: &ManagedLedger) -> Vec<TierProgress> {
    let mut steps = log.compact_now().expect("taken up");
    let mut all = Vec::new();
    while let Some(step) = steps.recv().await {
        all.push(step);
    }
    all
}

fn small(config: &mut crate::ManagedLedgerConfig) {
    config.roll_bytes = 700;
    config.dedup_snapshot_bytes = 500;
    config.segment_cache_bytes = 2_000;
}

#[tokio::test(start_paused = true)]
async fn a_compacted_read_gives_the_latest_of_each_key_and_then_everything() {
    let world = World::new().await;
    let node = world.node_with(small);
    let log = node.load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    let random = Random::from_seed(3);
    fill_keys(&log, &mut producer, &random, 60).await;
    let says = [("a", "1"), ("b", "2"), ("", "no key"), ("a", "3"), ("b", "")];
    log.publish(keyed(&mut producer, &says)).await.expect("stored");
    let all = table_of_log(&log).await;
    assert_eq!(compacted_table(&log).await, all, "nothing is compacted yet");

    let steps = compact(&log).await;
    assert!(steps.iter().all(|step| step.problem.is_empty() && step.ledger.0 == 0), "{steps:?}");
    let last = steps.last().expect("it told of its steps");
    assert!(last.bytes_done > 1_000 && last.bytes_done == last.bytes_total, "{last:?}");
    assert!(
        steps.is_sorted_by(|a, b| a.bytes_done <= b.bytes_done && b.bytes_done <= b.bytes_total)
    );
    let status = log.compaction();
    assert_eq!(status.compacted_to, *log.end().borrow());
    assert_eq!(status.messages, all.len() as u64);
    let list = world.list().await;
    assert!(list.compacting.is_empty() && !list.compacted.is_empty());
    assert_eq!(status.bytes, list.compacted.iter().map(|l| l.counts.bytes).sum::<u64>());
    let (table, messages) = TableReader::new(&log).read_to_end(&log).await;
    assert_eq!((table, messages), (all.clone(), all.len() as u64), "each key once, no deleted one");
    assert_eq!(table_of_log(&log).await, all, "the log is as it was");
    world.check_metadata().await;

    // What comes after the horizon is read whole, and goes into the next view.
    fill_keys(&log, &mut producer, &random, 40).await;
    assert_eq!(compacted_table(&log).await, table_of_log(&log).await);
    let before = world.list().await.compacted;
    assert!(compact(&log).await.iter().all(|step| step.problem.is_empty()));
    let after = world.list().await;
    assert!(before.iter().all(|old| after.all_ledgers().all(|one| one.id != old.id)));
    for ledger in world.ledgers().await {
        let was_view = before.iter().any(|old| old.id == ledger.id);
        assert!(!was_view || matches!(ledger.state, LedgerState::Deleted { .. }), "{ledger:?}");
    }
    assert_eq!(compacted_table(&log).await, table_of_log(&log).await);
    assert_eq!(compact(&log).await, [], "there is nothing to do");
    assert_eq!(world.list().await, after);
    world.check_metadata().await;
    // The next owner has the same view.
    let all = table_of_log(&log).await;
    node.kill();
    assert_eq!(compacted_table(&world.node_with(small).load().await).await, all);
}

#[tokio::test(start_paused = true)]
async fn keys_that_do_not_fit_make_more_rounds_and_a_large_view_several_ledgers() {
    let world = World::new().await;
    let node = world.node_with(|config| {
        config.roll_bytes = 90;
        config.compaction_table_bytes = 5 * 48;
    });
    let log = node.load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    for n in 0..130 {
        let (key, value) = (format!("key-{n}"), "some text that takes a few bytes".to_owned());
        let says = [(key.as_str(), value.as_str()), ("same", value.as_str())];
        log.publish(keyed(&mut producer, &says)).await.expect("stored");
    }
    assert!(compact(&log).await.iter().all(|step| step.problem.is_empty()));
    assert!(node.metrics.compactions.get() > 20, "{}", node.metrics.compactions.get());
    let list = world.list().await;
    assert_eq!(list.compacted_to, *log.end().borrow());
    assert!(list.compacted.len() > 60, "{}", list.compacted.len());
    assert!(list.compacting.is_empty(), "more than fifty went, in several changes");
    assert_eq!(log.compaction().messages, 131);
    assert_eq!(compacted_table(&log).await, table_of_log(&log).await);
    world.check_metadata().await;
}

#[tokio::test(start_paused = true)]
async fn by_policy_a_segment_is_compacted_and_nothing_is_trimmed_before() {
    let (world, _cold) = cold_world().await;
    let node = world.node_with(small);
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    let mut producer = Producer::named(&log, "p", 1).await;
    let random = Random::from_seed(5);
    fill_keys(&log, &mut producer, &random, 60).await;
    let all = table_of_log(&log).await;
    let last = Offset(log.end().borrow().0 - 1);
    log.settle(SUB, Settlement::UpTo(last)).await.expect("settled");
    let after = |bytes| TierPolicy { compact_after_bytes: Some(bytes), ..TierPolicy::default() };
    log.set_policy(after(1 << 20));
    pass(60.0).await;
    assert_eq!(log.compaction().compacted_to, Offset(0), "not enough was published");
    assert_eq!(log.first_offset(), Offset(0), "all is settled, and not compacted");
    log.set_policy(after(1_000));
    pass(60.0).await;
    assert_eq!(log.compaction().compacted_to, *log.end().borrow());
    assert!(log.first_offset() > Offset(60), "{:?}", log.first_offset());
    assert_eq!(compacted_table(&log).await, all, "the view has what the log lost");
    // And again, once as much was published behind the horizon; by another owner.
    node.kill();
    let log = world.node_with(small).load().await;
    log.set_policy(after(1_000));
    let mut producer = Producer::named(&log, "p", 2).await;
    let before = log.compaction().compacted_to;
    fill_keys(&log, &mut producer, &random, 3).await;
    let late = table_of_log(&log).await;
    pass(60.0).await;
    assert_eq!(log.compaction().compacted_to, before);
    fill_keys(&log, &mut producer, &random, 60).await;
    let mut expected = all;
    let rest = TableReader { next: before, since: before, table: expected.clone(), messages: 0 };
    expected = rest.read_to_end(&log).await.0;
    assert!(expected.len() >= late.len());
    pass(60.0).await;
    assert_eq!(log.compaction().compacted_to, *log.end().borrow());
    assert_eq!(compacted_table(&log).await, expected);
    world.check_metadata().await;
}

#[tokio::test(start_paused = true)]
async fn messages_in_cold_storage_are_compacted_from_there() {
    let (world, _cold) = cold_world().await;
    let node = world.cold_node();
    let log = node.load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    fill_keys(&log, &mut producer, &Random::from_seed(8), 90).await;
    log.set_policy(eager());
    world.until_all(crate::offload::Stage::LedgerDeleted).await;
    assert!(compact(&log).await.iter().all(|step| step.problem.is_empty()));
    assert_eq!(compacted_table(&log).await, table_of_log(&log).await);
    assert!(world.list().await.compacted.iter().all(|l| l.offload.is_none()), "it stays near");
    pass(100.0).await;
    assert!(world.list().await.compacted.iter().all(|l| l.offload.is_none()), "it stays near");
    world.check_metadata().await;
}

#[tokio::test(start_paused = true)]
async fn a_reader_in_the_middle_of_a_view_that_is_replaced_still_ends_with_the_right_table() {
    for seed in 0..20 {
        let world = World::with_bookies(3, seed).await;
        let node = world.node_with(small);
        let log = node.load().await;
        let random = Random::from_seed(seed);
        let mut producer = Producer::named(&log, "p", 1).await;
        let mut readers = Vec::new();
        for _ in 0..6 {
            fill_keys(&log, &mut producer, &random, 12).await;
            readers.push(TableReader::new(&log));
            for reader in &mut readers {
                for _ in 0..random.below(4) {
                    if reader.next < *log.end().borrow() {
                        reader.step(&log).await;
                    }
                }
            }
            if random.chance(0.7) {
                compact(&log).await;
            }
        }
        let all = table_of_log(&log).await;
        for (n, reader) in readers.into_iter().enumerate() {
            let since = reader.since;
            let (table, _) = reader.read_to_end(&log).await;
            assert_eq!(table, all, "seed {seed}: reader {n} since {since:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_takes_longer_than_deleted_keys_are_told_of_is_sent_back() {
    let world = World::new().await;
    let node = world.node_with(small);
    let log = node.load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    for n in 0..40 {
        let key = format!("key-{n}");
        let says = [(key.as_str(), "a value of some length, so that it is not all in one read")];
        log.publish(keyed(&mut producer, &says)).await.expect("stored");
    }
    compact(&log).await;
    let mut reader = TableReader::new(&log);
    reader.step(&log).await;
    let day = Duration::from_secs(24 * 3_600);
    for key in ["key-1", "key-2", "key-3"] {
        log.publish(keyed(&mut producer, &[(key, "")])).await.expect("stored");
        compact(&log).await;
        world.clock.jump(day.as_millis() as i64);
    }
    let from = log.read_compacted(reader.next, Some(reader.since), 60, 9).await;
    assert_eq!(from, Err(CompactedReadError::Superseded));
    assert_eq!(compacted_table(&log).await, table_of_log(&log).await, "one that begins anew");
    assert!(log.read_compacted(reader.next, None, 60, 9).await.is_ok(), "nobody can know");
}

#[tokio::test(start_paused = true)]
async fn whoever_takes_over_in_the_middle_of_a_compaction_leaves_nothing_of_it() {
    let mut interrupted = 0;
    for seed in 0..40 {
        let world = World::with_bookies(3, seed).await;
        let random = Random::from_seed(seed);
        world.store.set_plan(FaultPlan {
            delay: 1.0,
            delay_max: Duration::from_millis(40),
            ..FaultPlan::default()
        });
        let node = world.node_with(small);
        let old = node.load().await;
        let mut producer = Producer::named(&old, "p", 1).await;
        fill_keys(&old, &mut producer, &random, 50).await;
        compact(&old).await;
        fill_keys(&old, &mut producer, &random, 50).await;
        let all = table_of_log(&old).await;
        drop(old.compact_now().expect("taken up"));
        pass(0.001 * random.below(250) as f64).await;
        let before = world.list().await;
        interrupted += u32::from(!before.compacting.is_empty());
        // Dead, closing, or still at it.
        match random.below(3) {
            0 => node.kill(),
            1 => old.close().await,
            _ => {}
        }
        let new_node = world.node_with(small);
        let log = new_node.load().await;
        assert_eq!(compacted_table(&log).await, all, "seed {seed}: as far as it got");
        pass(30.0).await;
        let list = world.list().await;
        assert!(list.compacting.is_empty(), "seed {seed}: {list:?}");
        assert_eq!(list.epoch, log.epoch(), "seed {seed}");
        world.check_metadata().await;
        let steps = compact(&log).await;
        assert!(steps.iter().all(|step| step.problem.is_empty()), "seed {seed}: {steps:?}");
        assert_eq!(compacted_table(&log).await, all, "seed {seed}");
        assert_eq!(*log.status().borrow(), Status::Serving, "seed {seed}");
        pass(30.0).await;
        world.check_metadata().await;
    }
    assert!(interrupted > 10, "{interrupted}");
}

#[tokio::test(start_paused = true)]
async fn a_stale_owner_that_goes_on_compacting_changes_nothing() {
    let world = World::new().await;
    let old_node = world.node_with(|config| {
        small(config);
        config.compaction_bytes_per_s = 100; // it takes its time
    });
    let old = old_node.load().await;
    let mut producer = Producer::named(&old, "p", 1).await;
    fill_keys(&old, &mut producer, &Random::from_seed(4), 60).await;
    let all = table_of_log(&old).await;
    let mut steps = old.compact_now().expect("taken up");
    let until = |list: &List| list.compacting.iter().any(Listed::is_open);
    while !until(&world.list().await) {
        pass(1.0).await;
    }
    let log = world.node_with(small).load().await;
    pass(20.0).await;
    assert!(world.list().await.compacting.is_empty(), "the new owner deleted it");
    compact(&log).await;
    let list = world.list().await;
    while steps.recv().await.is_some() {}
    pass(100.0).await;
    assert_eq!(world.list().await, list);
    assert!(matches!(*old.status().borrow(), Status::Serving | Status::Fenced(_)));
    assert_eq!(compacted_table(&log).await, all);
    world.check_metadata().await;
}

#[tokio::test(start_paused = true)]
async fn a_compaction_that_fails_says_why_leaves_nothing_and_is_repeated_by_policy() {
    let world = World::new().await;
    let node = world.node_with(small);
    let log = node.load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    fill_keys(&log, &mut producer, &Random::from_seed(4), 60).await;
    let all = table_of_log(&log).await;
    for bookie in 1..=3 {
        world.register(bookie, false).await;
    }
    let steps = compact(&log).await;
    let problem = &steps.last().expect("it says why").problem;
    assert!(problem.contains("list was not changed"), "{problem}");
    assert_eq!(log.compaction().last_error, *problem);
    assert_eq!(node.metrics.compaction_failures.get(), 1);
    log.set_policy(TierPolicy { compact_after_bytes: Some(1), ..TierPolicy::default() });
    pass(20.0).await;
    for bookie in 1..=3 {
        world.register(bookie, true).await;
    }
    pass(400.0).await;
    assert_eq!(log.compaction().compacted_to, *log.end().borrow());
    assert_eq!(log.compaction().last_error, "");
    assert_eq!(compacted_table(&log).await, all);
    assert_eq!(*log.status().borrow(), Status::Serving);
    world.check_metadata().await;
}

#[tokio::test(start_paused = true)]
async fn unknown_outcomes_of_list_changes_do_not_fork_the_view() {
    for seed in 0..15 {
        let world = World::with_bookies(3, seed).await;
        let node = world.node_with(small);
        let log = node.load().await;
        let random = Random::from_seed(seed);
        let mut producer = Producer::named(&log, "p", 1).await;
        fill_keys(&log, &mut producer, &random, 30).await;
        world.store.set_plan(FaultPlan {
            unknown_done: 0.2,
            unknown_lost: 0.1,
            unknown_late: 0.1,
            late_max: Duration::from_millis(300),
            ..FaultPlan::default()
        });
        for _ in 0..3 {
            compact(&log).await;
            fill_keys(&log, &mut producer, &random, 10).await;
        }
        world.store.set_plan(FaultPlan::default());
        pass(10.0).await;
        compact(&log).await;
        assert_eq!(compacted_table(&log).await, table_of_log(&log).await, "seed {seed}");
        assert!(world.list().await.compacting.is_empty(), "seed {seed}");
        world.check_metadata().await;
    }
}

#[tokio::test(start_paused = true)]
async fn one_segment_of_a_broker_is_compacted_at_a_time_and_traffic_slows_it() {
    let world = World::new().await;
    let node = world.node_with(|config| {
        small(config);
        config.compaction_bytes_per_s = 1_600;
    });
    let log = node.load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    fill_keys(&log, &mut producer, &Random::from_seed(4), 60).await;
    let turn = node.ledgers.compaction_turn().await;
    let mut steps = log.compact_now().expect("taken up");
    for _ in 0..3 {
        let step = steps.recv().await.expect("a sign of life");
        assert_eq!((step.bytes_done, &step.problem[..]), (0, ""));
    }
    assert_eq!(log.compaction().compacted_to, Offset(0));
    drop(turn);
    let begun = tokio::time::Instant::now();
    while steps.recv().await.is_some() {}
    let alone = begun.elapsed();
    assert!(alone > Duration::from_secs(1), "{alone:?}");
    fill_keys(&log, &mut producer, &Random::from_seed(4), 60).await;
    let busy = world.tasks.child("traffic");
    let ledgers = node.ledgers.clone();
    busy.spawn("traffic", async move {
        loop {
            pass(0.01).await;
            ledgers.note_traffic(14);
        }
    });
    let begun = tokio::time::Instant::now();
    assert!(compact(&log).await.iter().all(|step| step.problem.is_empty()));
    assert!(begun.elapsed() > 3 * alone, "{:?} beside traffic, {alone:?} without", begun.elapsed());
    busy.abort();
}

#[tokio::test(start_paused = true)]
async fn deleting_a_segment_deletes_its_view_and_the_one_being_written() {
    let world = World::new().await;
    let node = world.node_with(|config| {
        small(config);
        config.compaction_bytes_per_s = 2_000;
    });
    let log = node.load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    fill_keys(&log, &mut producer, &Random::from_seed(4), 60).await;
    compact(&log).await;
    fill_keys(&log, &mut producer, &Random::from_seed(4), 60).await;
    drop(log.compact_now().expect("taken up"));
    let open = |list: &List| list.compacting.iter().any(|one| one.state == ListedState::Open);
    while !open(&world.list().await) {
        pass(0.1).await;
    }
    node.kill();
    world.node().ledgers.delete(SEGMENT).await.expect("deleted");
    assert_eq!(world.find_list().await, None);
    for ledger in world.ledgers().await {
        assert!(matches!(ledger.state, LedgerState::Deleted { .. }), "{ledger:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_read_whose_view_is_replaced_and_deleted_meanwhile_goes_on_in_the_new_one() {
    let world = World::new().await;
    let node = world.node_with(small);
    let log = node.load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    fill_keys(&log, &mut producer, &Random::from_seed(4), 60).await;
    compact(&log).await;
    let old = world.list().await.compacted;
    let (lost, slow) = world.slow_and_forgetful();
    *slow.lock() = Duration::from_secs(3);
    let (reading, tasks) = (log.clone(), world.tasks.child("reader"));
    let read = tasks.spawn_returning("read", async move {
        reading.read_compacted(Offset(0), None, 1 << 20, 1_000).await
    });
    pass(1.0).await;
    *slow.lock() = Duration::ZERO;
    fill_keys(&log, &mut producer, &Random::from_seed(6), 20).await;
    compact(&log).await;
    for listed in old {
        let entries = (0..listed.counts.entries).map(geminga_proto::ids::EntryId);
        lost.lock().extend(entries.map(|entry| (listed.id, entry)));
    }
    let read = read.await.expect("runs").expect("it reads the new view");
    assert_eq!(read.next, log.compaction().compacted_to);
    let mut table = Table::new();
    apply(&mut table, &read.batches);
    assert_eq!(table, table_of_log(&log).await);
    // A slow store does not keep readers from what is there.
    world.store.inject_below(keys::segment_list(SEGMENT), Fault::Slow(Duration::from_secs(3)));
    assert_eq!(compacted_table(&log).await, table);
}

#[tokio::test(start_paused = true)]
async fn a_view_that_cannot_be_read_back_takes_no_place() {
    let world = World::new().await;
    let node = world.node_with(small);
    let log = node.load().await;
    let mut producer = Producer::named(&log, "p", 1).await;
    fill_keys(&log, &mut producer, &Random::from_seed(4), 60).await;
    let all = table_of_log(&log).await;
    let (lost, slow) = world.slow_and_forgetful();
    *slow.lock() = Duration::from_millis(20);
    let mut steps = log.compact_now().expect("taken up");
    let mut written = None;
    for _ in 0..10_000 {
        pass(0.001).await;
        let list = world.list().await;
        written = list.compacting.iter().find(|one| !one.is_open()).map(|closed| closed.id);
        if written.is_some() || list.compacted_to > Offset(0) {
            break;
        }
    }
    let written = written.expect("it is read back before it takes its place");
    lost.lock().push((written, geminga_proto::ids::EntryId(0)));
    let mut problem = String::new();
    while let Some(step) = steps.recv().await {
        problem = step.problem;
    }
    assert!(!problem.is_empty());
    assert_eq!(log.compaction().compacted_to, Offset(0));
    assert_eq!(compacted_table(&log).await, all);
    pass(60.0).await;
    assert!(world.list().await.compacting.is_empty(), "what was written is gone");
    assert!(compact(&log).await.iter().all(|step| step.problem.is_empty()));
    assert_eq!(compacted_table(&log).await, all);
    world.check_metadata().await;
}
