//! The metrics of a process, shared by its roles.

use std::{fmt, sync::Arc};

use parking_lot::Mutex;
use prometheus_client::{encoding::text, metrics::histogram::Histogram, registry::Registry};

use super::ProcessMetrics;

/// Bounds of duration histograms, seconds: 10 us to 10 s.
pub const DURATION_BUCKETS_S: [f64; 19] = [
    0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025,
    0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// Bounds of size histograms, bytes: 1 KiB to 16 MiB.
pub const SIZE_BUCKETS_BYTES: [f64; 8] =
    [1_024.0, 4_096.0, 16_384.0, 65_536.0, 262_144.0, 1_048_576.0, 4_194_304.0, 16_777_216.0];

/// Shared handle to a registry. All names start with `geminga_` (see [`metric_name`]; the registry adds nothing), but for
/// the conventional `process_` ones.
#[derive(Clone)]
pub struct MetricsRegistry(Arc<Mutex<Registry>>);

impl Default for MetricsRegistry {
    fn default() -> Self {
        Self::new()
    }
}

impl MetricsRegistry {
    /// A registry that knows the process's CPU time, memory and start.
    #[must_use]
    pub fn new() -> Self {
        let mut registry = Registry::default();
        ProcessMetrics::register(&mut registry);
        Self(Arc::new(Mutex::new(registry)))
    }

    /// Registers a crate's metrics: `registry.with(BookieMetrics::register)`.
    pub fn with<T>(&self, register: impl FnOnce(&mut Registry) -> T) -> T {
        register(&mut self.0.lock())
    }

    /// All metrics now, as OpenMetrics text.
    ///
    /// # Panics
    /// Never: text is written to memory.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut page = String::new();
        text::encode(&mut page, &self.0.lock()).expect("memory takes text");
        page
    }
}

impl fmt::Debug for MetricsRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MetricsRegistry")
    }
}

/// The exported name of a metric's dotted name, without its unit: `bookie.journal.sync.duration` becomes
/// `geminga_bookie_journal_sync_duration`. Register with the unit, which adds `_seconds` or `_bytes`; counters get `_total`.
#[must_use]
pub fn metric_name(dotted: &str) -> String {
    format!("geminga_{}", dotted.replace(['.', '-'], "_"))
}

/// A histogram of durations in seconds, with [`DURATION_BUCKETS_S`].
#[must_use]
pub fn duration_histogram() -> Histogram {
    Histogram::new(DURATION_BUCKETS_S)
}

/// A histogram of sizes in bytes, with [`SIZE_BUCKETS_BYTES`].
#[must_use]
pub fn bytes_histogram() -> Histogram {
    Histogram::new(SIZE_BUCKETS_BYTES)
}

#[cfg(test)]
mod tests {
    use prometheus_client::{metrics::counter::Counter, registry::Unit};

    use super::*;

    #[test]
    fn metrics_are_written_with_prefix_unit_and_short_bounds() {
        let registry = MetricsRegistry::new();
        let (histogram, counter) = (duration_histogram(), Counter::<u64>::default());
        registry.with(|registry| {
            let name = metric_name("bookie.journal.sync.duration");
            registry.register_with_unit(name, "Time of a sync", Unit::Seconds, histogram.clone());
            registry.register(metric_name("bookie.adds"), "Adds", counter.clone());
        });
        histogram.observe(0.000_02);
        counter.inc_by(3);
        let page = registry.clone().encode();
        assert!(page.contains("# UNIT geminga_bookie_journal_sync_duration_seconds seconds"));
        assert!(
            page.contains("geminga_bookie_journal_sync_duration_seconds_bucket{le=\"0.00001\"} 0"),
            "{page}"
        );
        assert!(
            page.contains("geminga_bookie_journal_sync_duration_seconds_bucket{le=\"0.000025\"} 1")
        );
        assert!(page.contains("seconds_bucket{le=\"10.0\"} 1"));
        assert_eq!(page.matches("_bucket").count(), 20);
        assert!(page.contains("geminga_bookie_adds_total 3"));
        assert!(page.ends_with("# EOF\n"));
    }

    #[test]
    fn size_buckets_end_at_16_mib() {
        let registry = MetricsRegistry::new();
        registry.with(|registry| registry.register("size", "Size", bytes_histogram()));
        assert!(registry.encode().contains("le=\"16777216.0\""));
    }
}
