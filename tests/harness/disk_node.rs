//! A node with the real bookie, on a disk in memory that loses power, fails, flips bits and fills up.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use futures::FutureExt;
use geminga_bookie::{
    Bookie, BookieConfig, BookieMetrics, BookieParts, DiskLimits,
    crash_points::{CrashHook, CrashPoint, CrashPoints},
};
use geminga_metadata::{FaultPlan, LeaseKeeper};
use geminga_runtime::{
    disk::{Disk, DiskFile, Fault, Faults, FaultyDisk, MemoryDisk, OpenMode},
    io::Io,
    random::Random,
};

use super::{coverage::Seen, history::History, nodes::Life, store_view::StoreView, world::World};

/// Room on a disk that is not full.
const CAPACITY_BYTES: u64 = 256 << 20;
/// The last group of a journal file is smaller than this.
const LAST_GROUPS_BYTES: u64 = 24 << 10;
/// A start that takes longer is given up and tried again.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// One node.
#[derive(Debug)]
pub(crate) struct DiskNode {
    disk: MemoryDisk,
    faults: Faults,
    pub(crate) store: StoreView,
    crash: Arc<Countdown>,
    /// How long a disk call takes at most, microseconds; 0 for none.
    slow_us: u64,
    bookie: Option<Bookie>,
    random: Random,
    config: BookieConfig,
}

impl DiskNode {
    /// An empty one.
    pub(crate) fn new(world: &World, number: usize) -> Self {
        let random = world.random.fork();
        let config = BookieConfig {
            id: format!("bookie-{number}"),
            address: format!("bookie-{number}"),
            journal_file_bytes: [8 << 10, 32 << 10, 256 << 10][random.below(3) as usize],
            group_bytes_max: [512, 4 << 10, 1 << 20][random.below(3) as usize],
            write_cache_bytes: [0, 4 << 10, 1 << 20][random.below(3) as usize],
            checkpoint_interval: Duration::from_millis(200 + random.below(30_000)),
            checkpoint_rows_max: 1 + random.below(200) as usize,
            free_files_max: random.below(4) as usize,
            take_new_incarnation: true,
            disk: DiskLimits::default(),
            ..BookieConfig::default()
        };
        Self {
            disk: MemoryDisk::new(CAPACITY_BYTES, random.fork()),
            faults: Faults::none(random.fork()),
            store: world.store_view(FaultPlan::default()),
            crash: Arc::new(Countdown { left: AtomicI64::new(-1), history: world.history.clone() }),
            slow_us: [0, 3_000, 20_000, 100_000][random.below(4) as usize],
            bookie: None,
            random,
            config,
        }
    }

    /// Compares its ledgers with the store often, and is quickly sure of what it found (G1): nothing that is safe rests on how
    /// long that takes.
    pub(crate) fn collect_often(&mut self, random: &Random) {
        let seconds = |max: u64| Duration::from_millis(random.below(max * 1_000));
        self.config.gc_interval = Duration::from_secs(1) + seconds(20);
        self.config.gc_absent_after = seconds(30);
        self.config.gc_unnamed_after = seconds(30);
        // A run has few ledgers: one is often more than a fifth of them (G2).
        self.config.gc_share_max = 1.0;
    }

    /// The lease of its registration, while it serves.
    pub(crate) fn lease(&self) -> Option<LeaseKeeper> {
        self.bookie.as_ref().map(|bookie| bookie.lease().clone())
    }

    pub(crate) async fn start(&mut self, world: &World) -> Option<Life> {
        if self.bookie.take().is_some() {
            // The last life ended by itself: its process is gone, and sometimes the machine with it.
            self.lose(world, self.random.chance(0.5));
        }
        let parts = BookieParts {
            disk: Arc::new(FaultyDisk::over_memory(self.disk.clone(), self.faults.clone())),
            journal_io: self.io(),
            read_io: self.io(),
            store: Arc::new(self.store.clone()),
            clock: world.shared_clock(),
            random: self.random.fork(),
            config: self.config.clone(),
            metrics: BookieMetrics::default(),
            crash_points: CrashPoints::new(Arc::clone(&self.crash) as Arc<dyn CrashHook>),
        };
        match tokio::time::timeout(START_PATIENCE, Bookie::start(parts)).await {
            Ok(Ok(bookie)) => {
                self.bookie = Some(bookie.clone());
                let failed = bookie.failed().boxed();
                Some(Life { incarnation: bookie.incarnation(), bookie: Arc::new(bookie), failed })
            }
            Ok(Err(error)) => {
                world.history.note(format!("{} does not start: {error}", self.config.id));
                self.lose(world, self.random.chance(0.3));
                None
            }
            Err(_) => {
                world.history.note(format!("{} does not start in time", self.config.id));
                self.lose(world, self.random.chance(0.3));
                None
            }
        }
    }

    fn io(&self) -> Io {
        match self.slow_us {
            0 => Io::inline(),
            slow_us => Io::delayed(self.random.fork(), Duration::from_micros(slow_us)),
        }
    }

    pub(crate) fn kill(&mut self, world: &World, power_cut: bool) {
        if let Some(bookie) = self.bookie.take() {
            bookie.kill();
        }
        self.lose(world, power_cut);
    }

    /// The process is gone, and with a power cut what was not synced, all of it or by sectors.
    fn lose(&mut self, world: &World, power_cut: bool) {
        self.crash.left.store(-1, Ordering::Relaxed);
        if !power_cut {
            return self.disk.kill();
        }
        let synced = self.disk.copy(self.random.fork());
        synced.crash_losing_all_unsynced();
        let before = contents(&self.disk);
        if self.random.chance(0.3) {
            self.disk.crash_losing_all_unsynced();
        } else {
            self.disk.crash();
        }
        let after = contents(&self.disk);
        if after != before {
            world.history.saw(Seen::UnsyncedLost);
            if after != contents(&synced) {
                world.history.saw(Seen::Torn);
            }
        }
    }

    pub(crate) fn wipe(&mut self, world: &World) {
        self.disk = MemoryDisk::new(CAPACITY_BYTES, world.random.fork());
    }

    /// A sector cannot be read, or one bit flips in some file. Not in the last groups of the newest journal file: a flip in the
    /// very last one cannot be told from a torn tail (D4), and no more than that is promised.
    pub(crate) fn damage(&mut self, world: &World) {
        if self.random.chance(0.3) {
            // A read error; at a start that is damage as well.
            world.history.note(format!("a read of {} fails", self.config.id));
            return self.faults.plan(Fault::Read, self.random.below(10));
        }
        let Some((name, bits)) = self.damageable() else { return };
        let bit = self.random.below(bits);
        let done = self.disk.flip_bit(&name, bit).is_ok();
        world.history.note(format!("bit {bit} of {name} of {} flips: {done}", self.config.id));
    }

    /// A file, and how many of its bits, from the first on, may flip.
    fn damageable(&self) -> Option<(String, u64)> {
        let length = |name: &String| self.disk.open_file(name, OpenMode::Read).ok()?.len().ok();
        let files = self.disk.list().ok()?;
        let newest = files.iter().filter(|name| name.starts_with("journal")).max().cloned();
        // What is lost in the newest file, between the mark and the newest group, is lost in silence (D8).
        if let Some(newest) = &newest
            && let Some(bytes) =
                length(newest)?.checked_sub(LAST_GROUPS_BYTES).filter(|bytes| *bytes > 0)
            && self.random.chance(0.7)
        {
            return Some((newest.clone(), bytes * 8));
        }
        let in_use = |name: &String| {
            ["journal", "index", "checkpoint"].iter().any(|kind| name.starts_with(kind))
        };
        let older: Vec<_> = files
            .into_iter()
            .filter(|name| in_use(name) && Some(name) != newest.as_ref())
            .collect();
        let name = older.get(self.random.below(older.len().max(1) as u64) as usize)?;
        Some((name.clone(), length(name)? * 8))
    }

    pub(crate) fn fill(&mut self, full: bool) {
        let Ok(space) = self.disk.space() else { return };
        let used = space.total - space.free.min(space.total);
        let room = self.random.below(16 << 10);
        self.disk.set_capacity(if full { used + room } else { CAPACITY_BYTES });
    }

    pub(crate) fn break_disk(&mut self, world: &World) {
        if self.random.chance(0.5) {
            let steps = self.random.below(12) as i64;
            world.history.note(format!("{} ends after {steps} durable steps", self.config.id));
            return self.crash.left.store(steps, Ordering::Relaxed);
        }
        let faults = [Fault::Write, Fault::WriteFull, Fault::Sync, Fault::SyncDir, Fault::Names];
        let fault = faults[self.random.below(faults.len() as u64) as usize];
        let after = self.random.below(10);
        world.history.note(format!(
            "{} of {} fails after {after} calls",
            format_args!("{fault:?}"),
            self.config.id
        ));
        self.faults.plan(fault, after);
    }

    /// The disk does not fail any more, and after the next start it is quick. True if that start is still to come.
    pub(crate) fn mend(&mut self) -> bool {
        let was_slow = std::mem::take(&mut self.slow_us) > 0;
        self.faults.clear();
        self.crash.left.store(-1, Ordering::Relaxed);
        was_slow
    }
}

/// Every file with its bytes, unsynced ones included.
fn contents(disk: &MemoryDisk) -> BTreeMap<String, Vec<u8>> {
    let names = disk.list().unwrap_or_default();
    let content = |name: &String| {
        let file = disk.open_file(name, OpenMode::Read).ok()?;
        let mut bytes = vec![0; file.len().ok()? as usize];
        let read = file.read_at(&mut bytes, 0).ok()?;
        bytes.truncate(read);
        Some(bytes)
    };
    names.into_iter().filter_map(|name| Some((name.clone(), content(&name)?))).collect()
}

/// Ends a bookie after so many durable steps; below 0 it does not.
#[derive(Debug)]
struct Countdown {
    left: AtomicI64,
    history: History,
}

impl CrashHook for Countdown {
    fn reached(&self, point: CrashPoint) -> io::Result<()> {
        let left = self.left.load(Ordering::Relaxed);
        if left < 0 {
            return Ok(());
        }
        self.left.store(left - 1, Ordering::Relaxed);
        if left > 0 {
            return Ok(());
        }
        self.history.saw(Seen::CrashPoint);
        self.history.note(format!("a bookie ends at {point:?}"));
        Err(io::Error::other("ended by the plan"))
    }
}
