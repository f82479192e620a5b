//! What a benchmark prints: one JSON document with fixed field names, or a table.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// Three points of a latency distribution, milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Percentiles {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
}

/// Collects latencies: 1 us to 10 min, three significant digits.
#[derive(Debug)]
pub(crate) struct Latencies(Histogram<u64>);

const LATENCY_US_MAX: u64 = 600_000_000;

impl Latencies {
    pub(crate) fn new() -> Self {
        Self(Histogram::new_with_bounds(1, LATENCY_US_MAX, 3).expect("the bounds are valid"))
    }

    pub(crate) fn record(&mut self, latency: Duration) {
        let micros = u64::try_from(latency.as_micros()).unwrap_or(LATENCY_US_MAX);
        self.0.saturating_record(micros.clamp(1, LATENCY_US_MAX));
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.0.add(&other.0).expect("both have the same bounds");
    }

    /// None if nothing was recorded.
    pub(crate) fn percentiles(&self) -> Option<Percentiles> {
        if self.0.is_empty() {
            return None;
        }
        let at = |quantile| self.0.value_at_quantile(quantile) as f64 / 1000.0;
        Some(Percentiles { p50: at(0.5), p99: at(0.99), p999: at(0.999) })
    }
}

/// The document. A figure that a benchmark does not measure is left out.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Report {
    pub(crate) benchmark: &'static str,
    pub(crate) messages: u64,
    pub(crate) seconds: f64,
    pub(crate) messages_per_second: f64,
    pub(crate) megabytes_per_second: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) publish_ms: Option<Percentiles>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) end_to_end_ms: Option<Percentiles>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) server_cpu_seconds_per_million: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) server_rss_mb: Option<f64>,
    pub(crate) settings: serde_json::Value,
}

impl Report {
    /// Rates from what was counted; `bytes` are message bytes (MB = 1,000,000).
    pub(crate) fn new(
        benchmark: &'static str,
        messages: u64,
        bytes: u64,
        elapsed: Duration,
        settings: serde_json::Value,
    ) -> Self {
        let seconds = elapsed.as_secs_f64().max(1e-9);
        Self {
            benchmark,
            messages,
            seconds,
            messages_per_second: messages as f64 / seconds,
            megabytes_per_second: bytes as f64 / seconds / 1e6,
            settings,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_in_milliseconds() {
        let mut latencies = Latencies::new();
        assert_eq!(latencies.percentiles(), None);
        for micros in 1..=1000 {
            latencies.record(Duration::from_micros(micros * 10));
        }
        let percentiles = latencies.percentiles().expect("recorded");
        assert!((percentiles.p50 - 5.0).abs() < 0.02, "{percentiles:?}");
        assert!((percentiles.p99 - 9.9).abs() < 0.02, "{percentiles:?}");
    }

    #[test]
    fn unmeasured_figures_are_left_out_of_the_document() {
        let report = Report::new(
            "control",
            10,
            1000,
            Duration::from_secs(2),
            serde_json::json!({"size": 100}),
        );
        let text = serde_json::to_string(&report).expect("serializable");
        assert!(
            text.contains("\"messages_per_second\":5.0") && !text.contains("publish_ms"),
            "{text}"
        );
    }
}
