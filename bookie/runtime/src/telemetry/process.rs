//! What the operating system knows of this process: memory, CPU, start.

use std::fs;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};

/// What `/proc` says of this process. Names are those every Prometheus dashboard knows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProcessMetrics {
    /// Memory in RAM.
    pub resident_memory_bytes: u64,
    /// Time on all CPUs, user and system.
    pub cpu_seconds: f64,
    /// Seconds since the Unix epoch.
    pub start_time_seconds: f64,
}

impl ProcessMetrics {
    /// Reads them; none where there is no `/proc`.
    #[must_use]
    pub fn read() -> Option<Self> {
        let (stat, statm) = (
            fs::read_to_string("/proc/self/stat").ok()?,
            fs::read_to_string("/proc/self/statm").ok()?,
        );
        let machine = fs::read_to_string("/proc/stat").ok()?;
        let (page_bytes, ticks) =
            (rustix::param::page_size() as u64, rustix::param::clock_ticks_per_second());
        Self::parse(&stat, &statm, &machine, page_bytes, ticks as f64)
    }

    /// Makes every scrape of the registry read them.
    pub fn register(registry: &mut Registry) {
        registry.register_collector(Box::new(FromProc));
    }

    fn parse(
        stat: &str,
        statm: &str,
        machine: &str,
        page_bytes: u64,
        ticks_per_second: f64,
    ) -> Option<Self> {
        // The process's own name stands in brackets and may contain anything; field 3, its state, follows.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
        let seconds = |number: usize| {
            Some(fields.get(number - 3)?.parse::<u64>().ok()? as f64 / ticks_per_second)
        };
        let resident_pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
        let boot: u64 =
            machine.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
        Some(Self {
            resident_memory_bytes: resident_pages.checked_mul(page_bytes)?,
            cpu_seconds: seconds(14)? + seconds(15)?,
            start_time_seconds: boot as f64 + seconds(22)?,
        })
    }
}

#[derive(Debug)]
struct FromProc;

impl Collector for FromProc {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Some(found) = ProcessMetrics::read() else { return Ok(()) };
        let memory = i64::try_from(found.resident_memory_bytes).unwrap_or(i64::MAX);
        let (cpu, start) =
            (ConstCounter::new(found.cpu_seconds), ConstGauge::new(found.start_time_seconds));
        let memory = ConstGauge::new(memory);
        let name = "process_resident_memory";
        memory.encode(encoder.encode_descriptor(
            name,
            "Memory in RAM",
            Some(&Unit::Bytes),
            memory.metric_type(),
        )?)?;
        let name = "process_cpu";
        cpu.encode(encoder.encode_descriptor(
            name,
            "Time on all CPUs",
            Some(&Unit::Seconds),
            cpu.metric_type(),
        )?)?;
        let (name, help) = ("process_start_time", "Start, since the epoch");
        start.encode(encoder.encode_descriptor(
            name,
            help,
            Some(&Unit::Seconds),
            start.metric_type(),
        )?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::MetricsRegistry;

    #[test]
    fn a_name_with_brackets_and_spaces_does_not_shift_fields() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 20 0 0 0 150 50 0 0 20 0 9 0 12345 99 88";
        let found = ProcessMetrics::parse(
            stat,
            "500 30 20 1 0 9 0",
            "cpu 1 2\nbtime 1000\nx 1",
            4096,
            100.0,
        );
        let expected = ProcessMetrics {
            resident_memory_bytes: 122_880,
            cpu_seconds: 2.0,
            start_time_seconds: 1123.45,
        };
        assert_eq!(found, Some(expected));
        assert_eq!(ProcessMetrics::parse("7 (a) S 1", "1 2", "btime 1", 1, 1.0), None);
    }

    #[test]
    fn this_process_is_told_in_every_scrape() {
        let registry = MetricsRegistry::new();
        let page = registry.encode();
        for name in [
            "process_resident_memory_bytes ",
            "process_cpu_seconds_total ",
            "process_start_time_seconds ",
        ] {
            assert!(page.contains(&format!("\n{name}")), "{page}");
        }
        assert!(ProcessMetrics::read().unwrap().start_time_seconds > 1.7e9);
    }
}
