//! Metrics of managed ledgers. Durations in seconds.

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

use geminga_runtime::telemetry::DURATION_BUCKETS_S;

/// All of them; unregistered by default, for tests.
#[derive(Clone, Debug)]
pub struct ManagedLedgerMetrics {
    /// Batches appended and acknowledged.
    pub appends: Counter,
    /// From taking a batch up to its acknowledgement.
    pub append_duration: Histogram,
    /// Data and cursor-log ledgers that were followed by another.
    pub rolls: Counter,
    /// Segments that were fenced under us.
    pub fenced: Counter,
    /// From the first transaction of a takeover to service.
    pub load_duration: Histogram,
    /// Batches read at the tail, from memory, and those that are not there any more.
    pub cache_hits: Counter,
    pub cache_misses: Counter,
    /// Of the latter: those that somebody else had just read or was reading, and those read from bookies or objects.
    pub catch_up_hits: Counter,
    pub catch_up_misses: Counter,
    /// Bytes kept in memory at the tail, and behind it.
    pub cache_bytes: Gauge,
    pub catch_up_bytes: Gauge,
    /// Settle records made durable, and the log entries they took.
    pub settles: Counter,
    pub settle_entries: Counter,
    /// Runs of first deliveries that were not logged (L2).
    pub leases_dropped: Counter,
    /// Full cursor snapshots written.
    pub snapshots: Counter,
    /// Cursor-log entries that could not be read and were skipped on load (C4): a human looks.
    pub damaged_cursor_entries: Counter,
    /// Ledgers uploaded to cold storage and read back whole, and their bytes there.
    pub uploads: Counter,
    pub upload_bytes: Counter,
    /// Uploads that failed; they are repeated.
    pub upload_failures: Counter,
    /// From the first read of a ledger to its last byte read back.
    pub upload_duration: Histogram,
    /// Ledgers deleted on bookies because cold storage has them.
    pub offloaded_deletes: Counter,
    /// Ledgers trimmed.
    pub trimmed_ledgers: Counter,
    /// Reads that went to cold storage, those of them because bookies could not answer, entries and bytes got there.
    pub object_reads: Counter,
    pub object_fallbacks: Counter,
    pub object_entries: Counter,
    pub object_read_bytes: Counter,
    /// Blocks of objects that were not what they should be: a human looks.
    pub object_damage: Counter,
    /// Objects removed because no list names them.
    pub objects_swept: Counter,
    /// Rounds of compactions, those that failed (they are repeated), bytes they read and wrote.
    pub compactions: Counter,
    pub compaction_failures: Counter,
    pub compaction_read_bytes: Counter,
    pub compaction_written_bytes: Counter,
    /// Messages that expired, and that were evicted because of a quota, of each subscription.
    pub expired_messages: Counter,
    pub evicted_messages: Counter,
    /// Segments in service.
    pub segments: Gauge,
}

impl Default for ManagedLedgerMetrics {
    fn default() -> Self {
        let histogram = || Histogram::new(DURATION_BUCKETS_S);
        Self {
            appends: Counter::default(),
            append_duration: histogram(),
            rolls: Counter::default(),
            fenced: Counter::default(),
            load_duration: histogram(),
            cache_hits: Counter::default(),
            cache_misses: Counter::default(),
            catch_up_hits: Counter::default(),
            catch_up_misses: Counter::default(),
            cache_bytes: Gauge::default(),
            catch_up_bytes: Gauge::default(),
            settles: Counter::default(),
            settle_entries: Counter::default(),
            leases_dropped: Counter::default(),
            snapshots: Counter::default(),
            damaged_cursor_entries: Counter::default(),
            uploads: Counter::default(),
            upload_bytes: Counter::default(),
            upload_failures: Counter::default(),
            upload_duration: histogram(),
            offloaded_deletes: Counter::default(),
            trimmed_ledgers: Counter::default(),
            object_reads: Counter::default(),
            object_fallbacks: Counter::default(),
            object_entries: Counter::default(),
            object_read_bytes: Counter::default(),
            object_damage: Counter::default(),
            objects_swept: Counter::default(),
            compactions: Counter::default(),
            compaction_failures: Counter::default(),
            compaction_read_bytes: Counter::default(),
            compaction_written_bytes: Counter::default(),
            expired_messages: Counter::default(),
            evicted_messages: Counter::default(),
            segments: Gauge::default(),
        }
    }
}

impl ManagedLedgerMetrics {
    /// Registers all of them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let mut counter = |name: &str, help: &str, metric: &Counter| {
            registry.register(format!("geminga_managed_ledger_{name}"), help, metric.clone());
        };
        counter("appends", "Batches appended and acknowledged", &metrics.appends);
        counter("rolls", "Ledgers that were followed by another", &metrics.rolls);
        counter("fenced", "Segments that were fenced", &metrics.fenced);
        counter("cache_hits", "Batches read at the tail, from memory", &metrics.cache_hits);
        counter("cache_misses", "Batches read behind the tail", &metrics.cache_misses);
        counter(
            "catch_up_hits",
            "Batches behind the tail that another reader had read or was reading",
            &metrics.catch_up_hits,
        );
        counter(
            "catch_up_misses",
            "Batches behind the tail that were read from bookies or cold storage",
            &metrics.catch_up_misses,
        );
        counter("settles", "Settles made durable", &metrics.settles);
        counter("settle_entries", "Cursor-log entries written", &metrics.settle_entries);
        counter("leases_dropped", "Runs of first deliveries not logged", &metrics.leases_dropped);
        counter("snapshots", "Cursor snapshots written", &metrics.snapshots);
        counter(
            "damaged_cursor_entries",
            "Cursor-log entries skipped on load",
            &metrics.damaged_cursor_entries,
        );
        counter("uploads", "Ledgers uploaded to cold storage", &metrics.uploads);
        counter("upload_bytes", "Bytes uploaded to cold storage", &metrics.upload_bytes);
        counter("upload_failures", "Uploads that failed", &metrics.upload_failures);
        counter(
            "offloaded_deletes",
            "Ledgers deleted on bookies because cold storage has them",
            &metrics.offloaded_deletes,
        );
        counter("trimmed_ledgers", "Ledgers trimmed", &metrics.trimmed_ledgers);
        counter("object_reads", "Reads from cold storage", &metrics.object_reads);
        counter(
            "object_fallbacks",
            "Reads from cold storage because bookies could not answer",
            &metrics.object_fallbacks,
        );
        counter("object_entries", "Entries read from cold storage", &metrics.object_entries);
        counter("object_read_bytes", "Bytes read from cold storage", &metrics.object_read_bytes);
        counter("object_damage", "Damaged blocks in cold storage", &metrics.object_damage);
        counter("objects_swept", "Objects removed that no list names", &metrics.objects_swept);
        counter("compactions", "Rounds of compactions", &metrics.compactions);
        counter(
            "compaction_failures",
            "Compactions that failed and are repeated",
            &metrics.compaction_failures,
        );
        counter(
            "compaction_read_bytes",
            "Payload bytes read by compactions",
            &metrics.compaction_read_bytes,
        );
        counter(
            "compaction_written_bytes",
            "Bytes of compacted views written",
            &metrics.compaction_written_bytes,
        );
        counter("expired_messages", "Messages that outlived their time", &metrics.expired_messages);
        counter("evicted_messages", "Messages evicted by a quota", &metrics.evicted_messages);
        for (name, help, gauge) in [
            ("segments", "Segments in service", &metrics.segments),
            ("cache_bytes", "Bytes kept in memory at the tail", &metrics.cache_bytes),
            ("catch_up_bytes", "Bytes kept in memory behind the tail", &metrics.catch_up_bytes),
        ] {
            registry.register(format!("geminga_managed_ledger_{name}"), help, gauge.clone());
        }
        for (name, help, histogram) in [
            ("append_duration", "Append, from batch to acknowledgement", &metrics.append_duration),
            ("load_duration", "Takeover and load of a segment", &metrics.load_duration),
            ("upload_duration", "Upload of a ledger to cold storage", &metrics.upload_duration),
        ] {
            let name = format!("geminga_managed_ledger_{name}");
            registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
        }
        metrics
    }
}
