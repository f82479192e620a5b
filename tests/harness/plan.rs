//! What a seed stands for: the shape of a cluster, what its callers do, and how often things fail.
//!
//! Numbers are drawn over wide ranges on purpose: a rare order of events is reached by many different runs, not by long ones.

use std::time::Duration;

use geminga_bookie_client::Quorum;
use geminga_broker::dispatcher::Kind;
use geminga_managed_ledger::ManagedLedgerConfig;
use geminga_metadata::FaultPlan;
use geminga_runtime::random::Random;

use super::network::Weather;

/// The bookies of a run, and what goes wrong in it.
#[derive(Clone, Debug)]
pub(crate) struct ClusterPlan {
    pub(crate) bookies: usize,
    /// Bookies that start late, so that the first ledgers get vacant slots (W0).
    pub(crate) late_bookies: usize,
    /// (E, Qw, Qa)
    pub(crate) quorum: (usize, usize, usize),
    /// Helpers that recover whatever is newest, again and again.
    pub(crate) recoverers: u32,
    /// Disks that may be lost or damaged in this run: at most Qa-1 (section 1).
    pub(crate) losses: usize,
    /// How long faults go on.
    pub(crate) faulty_for: Duration,
    /// Mean time between two faults, milliseconds.
    pub(crate) fault_gap_ms: u64,
    /// The weather before the first fault changes it.
    pub(crate) weather: Weather,
    pub(crate) store_faults: FaultPlan,
}

/// One run of the first layer: a writer, tail readers.
#[derive(Clone, Debug)]
pub(crate) struct LedgerPlan {
    pub(crate) quorum: (usize, usize, usize),
    pub(crate) ledgers: u64,
    pub(crate) entries: u64,
    pub(crate) outstanding: usize,
    pub(crate) gap_chance: f64,
    pub(crate) gap_ms_max: u64,
    /// The writer dies after a ledger, or pauses before it closes.
    pub(crate) dies: f64,
    pub(crate) pauses: f64,
    pub(crate) readers: u32,
}

/// One run of the layer of auto-recovery.
#[derive(Clone, Debug)]
pub(crate) struct UpkeepPlan {
    /// Times that all is broken, healed, and made whole.
    pub(crate) rounds: u32,
    /// Bytes change on one disk of the run; else disks and bookies are lost, Qa-1 in each round.
    pub(crate) damages: bool,
    /// The bundle of the ledgers is claimed while they are written (A3).
    pub(crate) claimed: bool,
}

/// One run of the second layer: owners, producers, subscriptions of one segment.
#[derive(Clone, Debug)]
pub(crate) struct SegmentPlan {
    pub(crate) config: ManagedLedgerConfig,
    pub(crate) owners: u32,
    /// Up to so long between two takeovers of one owner, milliseconds.
    pub(crate) takeover_ms: u64,
    pub(crate) producers: u64,
    /// After so many batches a producer cuts no more, and after so many steps a consumer stops.
    pub(crate) steps: usize,
    /// Batches of a producer under way at once, at most.
    pub(crate) outstanding: u64,
    pub(crate) subscriptions: u64,
    /// Up to so long between two steps of a producer or consumer, milliseconds.
    pub(crate) gap_ms: u64,
    /// Messages have keys, and every fourth a time before which it is not to be delivered.
    pub(crate) keyed: bool,
}

/// One run of the layer "subscriptions", beside its segment.
#[derive(Clone, Debug)]
pub(crate) struct DispatchPlan {
    pub(crate) kind: Kind,
    /// Consumers.
    pub(crate) agents: u64,
    pub(crate) attempts_max: u32,
    pub(crate) backoff_ms: u64,
    pub(crate) lease_ms: u64,
    /// Messages with consumers at once, at most.
    pub(crate) unacked_max: u64,
    /// Up to so long between two steps of consumers, milliseconds.
    pub(crate) gap_ms: u64,
}

impl ClusterPlan {
    /// The plan of a seed.
    pub(crate) fn draw(random: &Random) -> Self {
        let shapes = [
            (3, 3, 2),
            (3, 3, 2),
            (3, 3, 2),
            (5, 3, 2),
            (4, 3, 2),
            (2, 2, 2),
            (3, 2, 2),
            (3, 3, 3),
            (3, 2, 1),
            (1, 1, 1),
        ];
        let quorum = shapes[random.below(shapes.len() as u64) as usize];
        let vacancy =
            if quorum.1 > quorum.2 && quorum.0 == 3 { random.below(2) as usize } else { 0 };
        let bookies = quorum.0 + random.below(3) as usize;
        let late_bookies = if vacancy > 0 { bookies - quorum.0 + vacancy } else { 0 };
        let quiet = random.chance(0.2);
        Self {
            bookies,
            late_bookies,
            quorum,
            recoverers: random.below(4) as u32,
            losses: random.below(quorum.2 as u64) as usize,
            faulty_for: Duration::from_millis(500 + random.below(40_000)),
            fault_gap_ms: [20, 300, 2_000][random.below(3) as usize],
            weather: if random.chance(0.5) { weather(random) } else { Weather::default() },
            store_faults: if quiet { FaultPlan::default() } else { store_faults(random) },
        }
    }
}

impl LedgerPlan {
    /// The plan of a seed.
    pub(crate) fn draw(random: &Random, quorum: (usize, usize, usize)) -> Self {
        Self {
            quorum,
            ledgers: 1 + random.below(4),
            entries: 1 + random.below(60),
            outstanding: 1 + random.below(20) as usize,
            gap_chance: if random.chance(0.5) { 0.1 } else { 0.8 },
            gap_ms_max: [3, 50, 1_000][random.below(3) as usize],
            dies: 0.3,
            pauses: 0.2,
            readers: random.below(3) as u32,
        }
    }
}

impl SegmentPlan {
    /// The plan of a seed.
    pub(crate) fn draw(random: &Random, quorum: (usize, usize, usize)) -> Self {
        let pick = |of: [u64; 3]| of[random.below(3) as usize];
        let config = ManagedLedgerConfig {
            quorum: Quorum::new(quorum.0, quorum.1, quorum.2).expect("plans are legal"),
            roll_bytes: pick([300, 3_000, 1 << 20]),
            // Well above a snapshot, which every cursor-log ledger starts with (C5).
            cursor_roll_bytes: pick([500, 3_000, 1 << 20]),
            snapshot_after_bytes: pick([50, 1_000, 1 << 20]),
            dedup_snapshot_bytes: pick([100, 2_000, 1 << 20]),
            idle_after: Duration::from_millis(pick([500, 5_000, 600_000])),
            cache_bytes: pick([0, 1_000, 1 << 20]),
            segment_cache_bytes: 1 << 20,
            load_patience: Duration::from_millis(2_000 + random.below(30_000)),
            create_patience: Duration::from_millis(500 + random.below(10_000)),
            ..ManagedLedgerConfig::default()
        };
        Self {
            config,
            owners: 2 + random.below(3) as u32,
            takeover_ms: pick([500, 5_000, 20_000]),
            producers: 1 + random.below(3),
            steps: 10 + random.below(200) as usize,
            outstanding: 1 + random.below(8),
            subscriptions: random.below(3),
            gap_ms: pick([5, 100, 1_000]),
            keyed: false,
        }
    }
}

impl DispatchPlan {
    /// The plan of a seed.
    pub(crate) fn draw(random: &Random) -> Self {
        let pick = |of: [u64; 4]| of[random.below(4) as usize];
        let kinds = [Kind::Exclusive, Kind::Failover, Kind::Shared, Kind::Shared];
        let kinds = [kinds, [Kind::KeyShared; 4]].concat();
        Self {
            kind: kinds[random.below(8) as usize],
            agents: 1 + random.below(5),
            attempts_max: pick([0, 1, 2, 4]) as u32,
            backoff_ms: pick([0, 0, 100, 2_000]),
            lease_ms: pick([200, 2_000, 20_000, 20_000]),
            unacked_max: pick([3, 20, 1_000, 1_000]),
            gap_ms: pick([3, 10, 50, 200]),
        }
    }
}

/// A store with a bad day.
pub(crate) fn store_faults(random: &Random) -> FaultPlan {
    let part = |max: f64| max * random.below(100) as f64 / 100.0;
    FaultPlan {
        unavailable: part(0.2),
        unknown_done: part(0.3),
        unknown_lost: part(0.2),
        unknown_late: part(0.4),
        late_max: Duration::from_millis(1 + random.below(20_000)),
        delay: part(0.5),
        delay_max: Duration::from_millis(1 + random.below(2_000)),
        watch_lost: part(0.2),
    }
}

/// A network with a bad day.
pub(crate) fn weather(random: &Random) -> Weather {
    let part = |max: f64| max * random.below(100) as f64 / 100.0;
    Weather {
        delay_max: [0, 3, 100, 2_000][random.below(4) as usize],
        lose_request: part(0.2),
        lose_answer: part(0.2),
        repeat: part(0.3),
        reorder: part(0.2),
        late_max: [10, 1_000, 30_000][random.below(3) as usize],
    }
}
