//! Old ledgers go to cold storage and are read from there.

use std::{sync::Arc, time::Duration};

use geminga_bookie_client::LedgerState;
use geminga_metadata::Standing;
use geminga_proto::ids::{EntryId, Offset};
use object_store::{ObjectStore, ObjectStoreExt, memory::InMemory, path::Path};

use super::harness::*;
use crate::{
    ColdStorage, ColdStorageConfig, ManagedLedger, ReadError, Settlement, Start, TierError,
    TierPolicy, TierProgress,
    list::Listed,
    offload::{Stage, format::ObjectId, store::faulty::FaultyObjects},
};

/// Cold storage that tests look into.
pub(super) struct Cold {
    pub(super) memory: Arc<InMemory>,
    pub(super) faulty: FaultyObjects,
    pub(super) storage: ColdStorage,
}

/// A world with cold storage of small blocks and objects.
pub(super) async fn cold_world() -> (World, Cold) {
    let mut world = World::new().await;
    let memory = Arc::new(InMemory::new());
    let faulty = FaultyObjects::new(memory.clone());
    let config = ColdStorageConfig {
        part_bytes: 300,
        object_bytes: 700,
        block_bytes: 250,
        ..ColdStorageConfig::default()
    };
    let storage = ColdStorage::over(Arc::new(faulty.clone()), "", "test", config);
    world.cold = Some(storage.clone());
    (world, Cold { memory, faulty, storage })
}

/// Offload at once, delete soon.
pub(super) fn eager() -> TierPolicy {
    TierPolicy {
        offload_after: Some(Duration::ZERO),
        delete_lag: Duration::from_secs(60),
        ..TierPolicy::default()
    }
}

impl World {
    pub(super) fn cold_node(&self) -> Node {
        self.node_with(|config| {
            config.roll_bytes = 900;
            config.dedup_snapshot_bytes = 500;
            config.segment_cache_bytes = 3_000;
            config.offload_retry = Duration::from_secs(1);
        })
    }

    pub(super) async fn stages(&self) -> Vec<Option<Stage>> {
        self.list().await.data.iter().map(Listed::stage).collect()
    }

    /// Waits, in virtual time, until every listed data ledger but an open one is at this stage.
    pub(super) async fn until_all(&self, stage: Stage) {
        for _ in 0..10_000 {
            let list = self.list().await;
            let mut closed = list.data.iter().filter(|listed| listed.counts.entries > 0);
            if closed.clone().count() > 0 && closed.all(|listed| listed.stage() >= Some(stage)) {
                return;
            }
            pass(1.0).await;
        }
        panic!("{stage:?} was not reached: {:?}", self.stages().await);
    }
}

impl Cold {
    pub(super) async fn names(&self) -> Vec<String> {
        let mut names = Vec::new();
        let prefix = crate::offload::format::segment_prefix(SEGMENT);
        self.storage.list(&prefix, |found| names.push(found.name)).await.expect("listed");
        names
    }

    /// Flips a bit in the middle of an object.
    pub(super) async fn damage(&self, listed: &Listed, part: u32) -> String {
        let uuid = listed.offload.as_ref().expect("offloaded").uuid;
        let name = ObjectId { segment: SEGMENT, ledger: listed.id, uuid, part }.name();
        let path = Path::from(format!("test/{name}"));
        let whole = self.memory.get(&path).await.expect("there").bytes().await.expect("read");
        let mut bytes = whole.to_vec();
        bytes[120] ^= 4;
        self.memory.put(&path, bytes.into()).await.expect("written");
        name
    }
}

/// Many batches over several ledgers.
pub(super) async fn fill(log: &ManagedLedger) -> Producer {
    let mut producer = Producer::named(log, "p", 1).await;
    for _ in 0..12 {
        producer.store(log, 20).await;
    }
    producer
}

pub(super) async fn all_steps(
    mut steps: tokio::sync::mpsc::Receiver<TierProgress>,
) -> Vec<TierProgress> {
    let mut all = Vec::new();
    while let Some(step) = steps.recv().await {
        all.push(step);
    }
    all
}

#[tokio::test(start_paused = true)]
async fn ledgers_move_to_cold_storage_and_readers_do_not_notice() {
    let (world, cold) = cold_world().await;
    let node = world.cold_node();
    let log = node.load().await;
    fill(&log).await;
    let before = read_all(&log).await;
    let ledgers = world.list().await.data.len();
    assert!(ledgers > 4, "{ledgers}");
    assert!(cold.names().await.is_empty(), "without a policy nothing moves");

    log.set_policy(eager());
    world.until_all(Stage::Uploaded).await;
    let list = world.list().await;
    let objects: usize =
        list.data.iter().filter_map(|l| l.offload.as_ref()).map(|o| o.objects.len()).sum();
    assert!(objects > ledgers, "some ledgers have several objects: {objects}");
    assert_eq!(cold.names().await.len(), objects);
    assert_eq!(read_all(&log).await, before, "from bookies");
    assert_eq!(node.metrics.object_reads.get(), 0);

    world.until_all(Stage::LedgerDeleted).await;
    world.check_metadata().await;
    let status = log.tier_status();
    assert_eq!(status.ledgers_object_only + 1, status.ledgers);
    assert!(status.bytes_bookies == 0 && status.bytes_objects > 0, "{status:?}");
    for bytes_max in [1, 300, 1 << 20] {
        assert_eq!(read_in_steps(&log, bytes_max, 1_000).await, before);
    }
    assert!(node.metrics.object_reads.get() > 0);
    // From any offset on, as a seek would.
    for at in (0..log.end().borrow().0).step_by(7) {
        let found = log.read(offset(at), 100, 10).await.expect("readable");
        let end = found[0].base_offset.advance(u64::from(found[0].header.count));
        assert!(found[0].base_offset <= offset(at) && offset(at) < end);
    }
    node.kill();
    let log = world.cold_node().load().await;
    assert_eq!(read_all(&log).await, before, "the next owner reads them too");
    assert_eq!(Producer::named(&log, "p", 2).await.last, 468);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_read_in_one_tier_is_read_in_the_other() {
    let (world, cold) = cold_world().await;
    let node = world.cold_node();
    let log = node.load().await;
    fill(&log).await;
    let before = read_all(&log).await;
    log.set_policy(TierPolicy { delete_lag: Duration::from_secs(1 << 20), ..eager() });
    world.until_all(Stage::Uploaded).await;
    let listed = world.list().await.data[1].clone();
    // Damage on bookies alone.
    let lost = world.forgetful();
    lost.lock().extend((0..5).map(|entry| (listed.id, EntryId(entry))));
    assert_eq!(read_all(&log).await, before);
    assert!(node.metrics.object_fallbacks.get() > 0);
    // In the objects as well: another ledger, whose bookies are whole.
    let other = world.list().await.data[2].clone();
    cold.damage(&other, 0).await;
    assert_eq!(read_all(&log).await, before);
    // All bookies away.
    for bookie in 1..=3 {
        world.kill(bookie);
    }
    let first = log.read(Offset(0), 100, 10).await.expect("from the object");
    assert_eq!(first[0].base_offset, Offset(0));
    // Neither can answer now: that is no damage.
    let error = log.read(other.base_offset, 100, 10).await.expect_err("nowhere to be had");
    assert!(matches!(error, ReadError::Unavailable(_)), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn damage_of_the_only_copy_names_ledger_and_object() {
    let (world, cold) = cold_world().await;
    let node = world.cold_node();
    let log = node.load().await;
    fill(&log).await;
    log.set_policy(eager());
    world.until_all(Stage::LedgerDeleted).await;
    let listed = world.list().await.data[1].clone();
    let object = cold.damage(&listed, 0).await;
    let error = log.read(listed.base_offset, 100, 10).await.expect_err("damaged");
    let ReadError::Damaged(why) = &error else { panic!("{error:?}") };
    assert!(why.contains(&object) && why.contains(&listed.id.to_string()), "{why}");
    assert_eq!(log.read(Offset(0), 100, 10).await.expect("whole")[0].base_offset, Offset(0));
    let steps = all_steps(log.verify_tier().expect("begun")).await;
    let bad: Vec<_> = steps.iter().filter(|step| !step.problem.is_empty()).collect();
    assert!(bad.len() == 1 && bad[0].ledger == listed.id, "{bad:?}");
    assert!(bad[0].problem.contains(&object));
    assert_eq!(steps.last().expect("steps").bytes_done, log.tier_status().bytes_objects);
}

#[tokio::test(start_paused = true)]
async fn an_offload_on_demand_rolls_and_tells_its_progress() {
    let (world, _cold) = cold_world().await;
    let node = world.cold_node();
    let log = node.load().await;
    let mut producer = fill(&log).await;
    let steps = all_steps(log.offload_now(false).expect("begun")).await;
    let last = steps.last().expect("steps");
    assert_eq!(last.bytes_done, last.bytes_total);
    assert!(steps.windows(2).all(|pair| pair[0].bytes_done <= pair[1].bytes_done));
    assert!(steps.iter().all(|step| step.problem.is_empty()), "{steps:?}");
    producer.store(&log, 2).await;
    let steps = all_steps(log.offload_now(true).expect("begun")).await;
    assert!(!steps.is_empty());
    world.until_all(Stage::Uploaded).await;
    let list = world.list().await;
    assert_eq!(list.closed_end(), *log.end().borrow(), "the open ledger went along");
    assert!(all_steps(log.offload_now(true).expect("begun")).await.is_empty(), "nothing is left");
    pass(1e6).await;
    for ledger in world.ledgers().await {
        let data = list.data.iter().any(|listed| listed.id == ledger.id);
        let deleted = matches!(ledger.state, LedgerState::Deleted { .. });
        assert!(!data || !deleted, "nobody set a policy: bookies keep all");
    }
}

#[tokio::test(start_paused = true)]
async fn without_cold_storage_or_with_a_provisional_claim_nothing_moves() {
    let (mut world, cold) = cold_world().await;
    let (setter, standing) = Standing::new();
    world.standing = standing;
    let node = world.cold_node();
    let log = node.load().await;
    fill(&log).await;
    setter.set(false);
    log.set_policy(eager());
    pass(100.0).await;
    assert!(world.stages().await.iter().all(Option::is_none), "O3");
    setter.set(true);
    world.until_all(Stage::Uploaded).await;
    drop(cold);
    node.kill();

    world.cold = None;
    let log = world.cold_node().load().await;
    assert_eq!(log.offload_now(true).expect_err("none"), TierError::NoColdStorage);
    assert_eq!(read_all(&log).await.len(), 240, "bookies have it still");
}

#[tokio::test(start_paused = true)]
async fn offload_trim_and_readers_from_the_start_get_along() {
    let (world, cold) = cold_world().await;
    let node = world.cold_node();
    let log = node.load().await;
    log.create_cursor(SUB, Start::Earliest).await.expect("made");
    log.create_cursor(OTHER_SUB, Start::Earliest).await.expect("made");
    log.set_policy(TierPolicy { delete_lag: Duration::from_secs(20), ..eager() });
    let mut producer = Producer::named(&log, "p", 1).await;
    // One reads and settles at once, one is far behind: both get every message, in order.
    let mut next = [Offset(0), Offset(0)];
    for round in 0..200u64 {
        if round < 120 {
            producer.store(&log, 10).await;
        }
        pass(5.0).await;
        let end = *log.end().borrow();
        for (n, sub, step) in [(0, SUB, 10_000usize), (1, OTHER_SUB, 60)] {
            if next[n] >= end {
                continue;
            }
            assert!(log.first_offset() <= next[n], "a cursor was trimmed away");
            let batches = log.read(next[n], step, 1_000).await.expect("readable");
            for batch in batches {
                assert_eq!(batch.base_offset, next[n], "dense");
                next[n] = batch.base_offset.advance(u64::from(batch.header.count));
            }
            let up_to = Settlement::UpTo(Offset(next[n].0 - 1));
            log.settle(sub, up_to).await.expect("settled");
        }
        world.check_metadata().await;
    }
    assert_eq!(next[0], *log.end().borrow());
    assert!(next[1].0 > 500, "{}", next[1]);
    assert!(node.metrics.object_reads.get() > 0, "the slow one read from objects");
    assert!(node.metrics.trimmed_ledgers.get() > 3);
    log.settle(OTHER_SUB, Settlement::UpTo(Offset(next[0].0 - 1))).await.expect("settled");
    let trimmed = async {
        while world.list().await.data.len() > 2 {
            pass(10.0).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10_000), trimmed).await.expect("trimmed");
    // What the trim left behind is the janitor's after a day.
    let names = cold.names().await;
    assert!(names.len() > 10);
    assert_eq!(node.ledgers.sweep_objects(SEGMENT).await.expect("swept"), 0, "too young");
    let newest = cold.storage.modified_ms(&names[0]).await;
    world.clock.set(geminga_runtime::clock::Timestamp(newest + 25 * 3_600_000));
    node.ledgers.sweep_objects(SEGMENT).await.expect("swept");
    let named: u64 = world.list().await.data.iter().filter(|l| l.offload.is_some()).count() as u64;
    assert!(cold.names().await.len() as u64 <= named * 8);
    assert!(read_all(&log).await.len() < 120);
    let _: &dyn ObjectStore = &cold.faulty;
}
