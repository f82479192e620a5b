//! What a bookie counts. Dotted names with units; `register` makes OpenMetrics of them.

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

/// Seconds from the start of a group's write to the end of its sync.
pub const JOURNAL_SYNC_DURATION: &str = "bookie.journal.sync.duration"; // s
/// Bytes of a group.
pub const JOURNAL_GROUP_BYTES: &str = "bookie.journal.group.bytes"; // B
/// Adds answered OK.
pub const ADDS: &str = "bookie.adds"; // 1
/// Adds refused or of unknown outcome.
pub const ADDS_FAILED: &str = "bookie.adds.failed"; // 1
/// Requests refused as busy (D12).
pub const BUSY: &str = "bookie.busy"; // 1
/// Entries read, positive.
pub const READS: &str = "bookie.reads"; // 1
/// Entries read from the write cache.
pub const READS_CACHED: &str = "bookie.reads.cached"; // 1
/// Times that stored bytes failed their check or could not be read (D9).
pub const DAMAGE_FOUND: &str = "bookie.damage.found"; // 1
/// The same entry id with other bytes: an alarm.
pub const DIGEST_CONFLICTS: &str = "bookie.digest.conflicts"; // 1
/// Ledgers in limbo (D8).
pub const LIMBO_LEDGERS: &str = "bookie.limbo.ledgers"; // 1
/// Share of the file system in use, in thousandths.
pub const DISK_USED: &str = "bookie.disk.used.permille"; // 1
/// Checkpoints written.
pub const CHECKPOINTS: &str = "bookie.checkpoints"; // 1
/// Journal files released for reuse or removed.
pub const FILES_RELEASED: &str = "bookie.journal.files.released"; // 1
/// Ledgers dropped because they were Deleted.
pub const LEDGERS_DROPPED: &str = "bookie.ledgers.dropped"; // 1
/// Ledgers dropped because they moved away (G1).
pub const LEDGERS_MOVED: &str = "bookie.ledgers.moved"; // 1
/// GC passes that stopped since they would have dropped too much (G2): an alarm.
pub const GC_REFUSED: &str = "bookie.gc.refused"; // 1
/// Bytes of the write cache.
pub const WRITE_CACHE_BYTES: &str = "bookie.write.cache.bytes"; // B

/// The bookie's metrics. `default()` is not registered anywhere.
#[derive(Clone, Debug)]
pub struct BookieMetrics {
    pub journal_sync_duration: Histogram,
    pub journal_group_bytes: Histogram,
    pub adds: Counter,
    pub adds_failed: Counter,
    pub busy: Counter,
    pub reads: Counter,
    pub reads_cached: Counter,
    pub damage_found: Counter,
    pub digest_conflicts: Counter,
    pub limbo_ledgers: Gauge,
    pub disk_used: Gauge,
    pub checkpoints: Counter,
    pub files_released: Counter,
    pub ledgers_dropped: Counter,
    pub ledgers_moved: Counter,
    pub gc_refused: Counter,
    pub write_cache_bytes: Gauge,
}

impl Default for BookieMetrics {
    fn default() -> Self {
        Self {
            journal_sync_duration: Histogram::new([
                0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05,
                0.1, 0.5, 1.0,
            ]),
            journal_group_bytes: Histogram::new([
                4096.0,
                16_384.0,
                65_536.0,
                262_144.0,
                1_048_576.0,
                4_194_304.0,
            ]),
            adds: Counter::default(),
            adds_failed: Counter::default(),
            busy: Counter::default(),
            reads: Counter::default(),
            reads_cached: Counter::default(),
            damage_found: Counter::default(),
            digest_conflicts: Counter::default(),
            limbo_ledgers: Gauge::default(),
            disk_used: Gauge::default(),
            checkpoints: Counter::default(),
            files_released: Counter::default(),
            ledgers_dropped: Counter::default(),
            ledgers_moved: Counter::default(),
            gc_refused: Counter::default(),
            write_cache_bytes: Gauge::default(),
        }
    }
}

impl BookieMetrics {
    /// Metrics registered under `geminga_bookie_...`. Several bookies in one process: register one and clone it, or give
    /// each a sub-registry with a label.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let name = |dotted: &str, unit: &str| {
            let base = format!("geminga_{}", dotted.replace('.', "_"));
            if unit.is_empty() { base } else { format!("{base}_{unit}") }
        };
        let sync = metrics.journal_sync_duration.clone();
        registry.register(
            name(JOURNAL_SYNC_DURATION, "seconds"),
            "Write and sync of one journal group",
            sync,
        );
        let bytes = metrics.journal_group_bytes.clone();
        registry.register(name(JOURNAL_GROUP_BYTES, ""), "Bytes of one journal group", bytes);
        for (dotted, help, counter) in [
            (ADDS, "Adds answered OK", &metrics.adds),
            (ADDS_FAILED, "Adds refused or of unknown outcome", &metrics.adds_failed),
            (BUSY, "Requests refused as busy", &metrics.busy),
            (READS, "Entries read", &metrics.reads),
            (READS_CACHED, "Entries read from the write cache", &metrics.reads_cached),
            (
                DAMAGE_FOUND,
                "Stored bytes that failed their check or could not be read",
                &metrics.damage_found,
            ),
            (DIGEST_CONFLICTS, "Entries refused for another digest", &metrics.digest_conflicts),
            (CHECKPOINTS, "Checkpoints written", &metrics.checkpoints),
            (FILES_RELEASED, "Journal files released", &metrics.files_released),
            (LEDGERS_DROPPED, "Deleted ledgers dropped", &metrics.ledgers_dropped),
            (LEDGERS_MOVED, "Ledgers dropped that moved away", &metrics.ledgers_moved),
            (GC_REFUSED, "Passes that would have dropped too much", &metrics.gc_refused),
        ] {
            registry.register(name(dotted, ""), help, counter.clone());
        }
        for (dotted, help, gauge) in [
            (LIMBO_LEDGERS, "Ledgers in limbo", &metrics.limbo_ledgers),
            (DISK_USED, "File system in use, thousandths", &metrics.disk_used),
            (WRITE_CACHE_BYTES, "Bytes of the write cache", &metrics.write_cache_bytes),
        ] {
            registry.register(name(dotted, ""), help, gauge.clone());
        }
        metrics
    }
}

/// Incarnations that are lost, as the auditor sees it (A1).
pub const AUDIT_LOST: &str = "bookie.audit.lost"; // 1
/// Ledgers that the auditor listed for repair.
pub const AUDIT_LISTED: &str = "bookie.audit.listed"; // 1
/// Full scans of the ledgers.
pub const AUDIT_SCANS: &str = "bookie.audit.scans"; // 1
/// Ledgers whose copies were compared with the metadata in the periodic check.
pub const AUDIT_CHECKED: &str = "bookie.audit.checked"; // 1
/// Ledgers that wait for a copy, as listed in the store.
pub const REPAIR_LISTED: &str = "bookie.repair.listed"; // 1
/// Payload bytes copied to make ledgers whole.
pub const REPAIR_BYTES: &str = "bookie.repair.bytes"; // B
/// Ledgers made whole and unlisted.
pub const REPAIR_LEDGERS: &str = "bookie.repair.ledgers"; // 1
/// Slots that got another holder (A2).
pub const REPAIR_SLOTS: &str = "bookie.repair.slots"; // 1
/// Ledgers with entries that no peer could give when this bookie last looked (A4): an alarm.
pub const REPAIR_UNREADABLE: &str = "bookie.repair.unreadable"; // 1

/// What auto-recovery counts. `default()` is not registered anywhere.
#[derive(Clone, Debug, Default)]
pub struct AutoRecoveryMetrics {
    pub lost: Gauge,
    pub listed_by_audit: Counter,
    pub scans: Counter,
    pub checked: Counter,
    pub listed: Gauge,
    pub bytes: Counter,
    pub ledgers: Counter,
    pub slots: Counter,
    pub unreadable: Gauge,
}

impl AutoRecoveryMetrics {
    /// Metrics registered under `geminga_bookie_audit_...` and `geminga_bookie_repair_...`; see [`BookieMetrics::register`].
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let name = |dotted: &str| format!("geminga_{}", dotted.replace('.', "_"));
        for (dotted, help, counter) in [
            (AUDIT_LISTED, "Ledgers listed for repair", &metrics.listed_by_audit),
            (AUDIT_SCANS, "Full scans of the ledgers", &metrics.scans),
            (AUDIT_CHECKED, "Ledgers compared with their copies", &metrics.checked),
            (REPAIR_BYTES, "Payload bytes copied", &metrics.bytes),
            (REPAIR_LEDGERS, "Ledgers made whole", &metrics.ledgers),
            (REPAIR_SLOTS, "Slots that got another holder", &metrics.slots),
        ] {
            registry.register(name(dotted), help, counter.clone());
        }
        for (dotted, help, gauge) in [
            (AUDIT_LOST, "Lost incarnations", &metrics.lost),
            (REPAIR_LISTED, "Ledgers that wait for a copy", &metrics.listed),
            (REPAIR_UNREADABLE, "Ledgers with entries that no peer gives", &metrics.unreadable),
        ] {
            registry.register(name(dotted), help, gauge.clone());
        }
        metrics
    }
}
