//! One bookie, its disk and its store, and short ways to ask it.

use std::{
    collections::BTreeSet,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use geminga_bookie_client::{
    bookie_rpc::{
        AddAnswer, AddRequest, BookieRpc, EntryAnswer, EntryRange, FenceAnswer, FenceRequest,
        ReadRequest,
    },
    entry::{Entry, Payload},
};
use geminga_metadata::{MemoryStore, MetadataStore, Op, SharedStore, Txn, keys};
use geminga_proto::{
    ids::{EntryId, LedgerId},
    storage::v1 as wire,
};
use geminga_runtime::{
    clock::{ManualClock, Timestamp},
    disk::{MemoryDisk, SharedDisk},
    io::Io,
    random::Random,
};
use parking_lot::Mutex;
use prost::Message;
use tokio::time::Instant;

use crate::{
    Bookie, BookieConfig, BookieMetrics, BookieParts, StartError,
    crash_points::{CrashHook, CrashPoint, CrashPoints},
};

/// What outlives a bookie.
pub(super) struct World {
    pub(super) disk: MemoryDisk,
    /// Between the bookie and the disk, if not the disk itself.
    pub(super) seen_disk: Option<SharedDisk>,
    pub(super) store: MemoryStore,
    /// Between the bookie and the store, if not the store itself.
    pub(super) seen_store: Option<SharedStore>,
    pub(super) random: Random,
    pub(super) config: BookieConfig,
    pub(super) crash_points: CrashPoints,
    pub(super) metrics: BookieMetrics,
    pub(super) read_io: Io,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let random = Random::from_seed(seed);
        let config = BookieConfig {
            id: "b1".to_owned(),
            journal_file_bytes: 64 << 10,
            group_bytes_max: 16 << 10,
            write_cache_bytes: 8 << 10,
            start_timeout: Duration::from_secs(5),
            ..BookieConfig::default()
        };
        Self {
            disk: MemoryDisk::new(64 << 20, random.fork()),
            seen_disk: None,
            store: MemoryStore::new(),
            seen_store: None,
            random,
            config,
            crash_points: CrashPoints::default(),
            metrics: BookieMetrics::default(),
            read_io: Io::inline(),
        }
    }

    /// Bytes on the disk.
    pub(super) fn used(&self) -> u64 {
        use geminga_runtime::disk::Disk;
        let space = self.disk.space().expect("known");
        space.total - space.free
    }

    pub(super) async fn start(&self) -> Result<Bookie, StartError> {
        let disk = self.seen_disk.clone().unwrap_or_else(|| Arc::new(self.disk.clone()));
        Bookie::start(BookieParts {
            disk,
            journal_io: Io::inline(),
            read_io: self.read_io.clone(),
            store: self.seen_store.clone().unwrap_or_else(|| Arc::new(self.store.clone())),
            clock: Arc::new(ManualClock::new(Timestamp(1_000))),
            random: self.random.clone(),
            config: self.config.clone(),
            metrics: self.metrics.clone(),
            crash_points: self.crash_points.clone(),
        })
        .await
    }

    pub(super) async fn started(&self) -> Bookie {
        self.start().await.expect("the bookie starts")
    }

    /// Puts a ledger's metadata into the store.
    pub(super) async fn put_ledger(&self, ledger: u64, deleted: bool) {
        use wire::ledger_metadata::{Deleted, Open, State};
        let state = if deleted {
            State::Deleted(Deleted { nonce: vec![1; 16].into() })
        } else {
            State::Open(Open {})
        };
        let value = wire::LedgerMetadata {
            format: 1,
            id: ledger,
            state: Some(state),
            ensemble_size: 1,
            write_quorum: 1,
            ack_quorum: 1,
            digest: wire::Digest::Crc32c as i32,
            fragments: vec![wire::Fragment {
                first_entry: 0,
                nonce: vec![2; 16].into(),
                slots: vec![1],
            }],
            owner: Some(wire::LedgerOwner { topic: 1, segment: 0, epoch: 1 }),
        };
        let txn = Txn::new().then(Op::put(keys::ledger(LedgerId(ledger)), value.encode_to_vec()));
        self.store.txn(txn).await.expect("the store answers");
    }

    pub(super) fn names(&self, prefix: &str) -> Vec<String> {
        use geminga_runtime::disk::Disk;
        self.disk
            .list()
            .expect("listable")
            .into_iter()
            .filter(|name| name.starts_with(prefix))
            .collect()
    }
}

/// Cuts the power at a point, the n-th time it is passed; remembers all points passed.
pub(super) struct CutAt {
    pub(super) disk: MemoryDisk,
    pub(super) point: CrashPoint,
    pub(super) passes_before: AtomicU64,
    pub(super) seen: Mutex<BTreeSet<CrashPoint>>,
    pub(super) cut: std::sync::atomic::AtomicBool,
}

impl CutAt {
    pub(super) fn new(disk: &MemoryDisk, point: CrashPoint, passes_before: u64) -> Arc<Self> {
        Arc::new(Self {
            disk: disk.clone(),
            point,
            passes_before: AtomicU64::new(passes_before),
            seen: Mutex::default(),
            cut: false.into(),
        })
    }
}

impl CrashHook for CutAt {
    fn reached(&self, point: CrashPoint) -> io::Result<()> {
        self.seen.lock().insert(point);
        if point == self.point && !self.cut.load(Ordering::SeqCst) {
            let left = self.passes_before.load(Ordering::SeqCst);
            if left == 0 {
                self.cut.store(true, Ordering::SeqCst);
                self.disk.crash();
                return Err(io::Error::other("power cut"));
            }
            self.passes_before.store(left - 1, Ordering::SeqCst);
        }
        Ok(())
    }
}

pub(super) fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

/// The entry that tests store under these ids: its bytes follow from them.
pub(super) fn entry(ledger: u64, id: u64) -> Entry {
    let length = 50 + (ledger * 131 + id * 977) % 3000;
    let payload = Bytes::from(vec![(ledger * 7 + id) as u8; length as usize]);
    Entry::seal(
        LedgerId(ledger),
        EntryId(id),
        id.checked_sub(1).map(EntryId),
        length,
        Payload::from(payload),
    )
}

pub(super) fn add_request(bookie: &Bookie, ledger: u64, id: u64, recovery: bool) -> AddRequest {
    AddRequest {
        to: bookie.incarnation(),
        entry: entry(ledger, id),
        recovery,
        deadline: deadline(),
    }
}

pub(super) async fn add(bookie: &Bookie, ledger: u64, id: u64) -> AddAnswer {
    bookie.add(add_request(bookie, ledger, id, false)).await
}

pub(super) async fn recovery_add(bookie: &Bookie, ledger: u64, id: u64) -> AddAnswer {
    bookie.add(add_request(bookie, ledger, id, true)).await
}

pub(super) async fn fence(bookie: &Bookie, ledger: u64) -> FenceAnswer {
    let (to, ledger) = (bookie.incarnation(), LedgerId(ledger));
    bookie.fence(FenceRequest { to, ledger, list: None, deadline: deadline() }).await
}

pub(super) async fn read_with(
    bookie: &Bookie,
    ledger: u64,
    first: u64,
    last: u64,
    fence: bool,
) -> Vec<EntryAnswer> {
    let range = EntryRange { first: EntryId(first), last: EntryId(last) };
    let request = ReadRequest {
        to: bookie.incarnation(),
        ledger: LedgerId(ledger),
        range,
        fence,
        bytes_max: 1 << 20,
        deadline: deadline(),
    };
    bookie.read(request).await.entries
}

pub(super) async fn read(bookie: &Bookie, ledger: u64, id: u64) -> EntryAnswer {
    read_with(bookie, ledger, id, id, false).await.into_iter().next().expect("at least one verdict")
}
