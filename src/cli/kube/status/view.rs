//! A status for people.

use std::{fmt::Write, io};

use geminga_operator::crd::{ConditionStatus, DrainNote};

use super::facts::{Cluster, Pool, Said, State, Warning};
use crate::cli::output;

/// Objects that are not Ready and that are shown, of each status.
const SHOWN_MAX: usize = 50;

pub(super) fn print(state: &State) -> io::Result<()> {
    output::line(&text(state))
}

fn text(state: &State) -> String {
    let mut out = String::new();
    for cluster in &state.clusters {
        cluster_text(&mut out, cluster);
    }
    for thing in &state.connections {
        let head = format!("connection {}/{}", thing.namespace, thing.name);
        row(&mut out, 0, &head, &verdict(&thing.said));
    }
    let ready = state.objects.saturating_sub(state.not_ready.len());
    if state.objects > 0 {
        row(&mut out, 0, "objects", &format!("{ready} of {} ready", state.objects));
    }
    for thing in state.not_ready.iter().take(SHOWN_MAX) {
        let head = format!("{} {}/{}", thing.kind, thing.namespace, thing.name);
        row(&mut out, 1, &head, &verdict(&thing.said));
    }
    if state.not_ready.len() > SHOWN_MAX {
        row(&mut out, 1, "and more", &format!("{}", state.not_ready.len() - SHOWN_MAX));
    }
    if !state.warnings.is_empty() {
        row(&mut out, 0, "warnings", "");
    }
    for warning in &state.warnings {
        row(&mut out, 1, &warning_head(warning), &warning.message);
    }
    out
}

/// `head   words`, indented; words begin in one column where heads are short.
fn row(out: &mut String, depth: usize, head: &str, words: &str) {
    let indent = "  ".repeat(depth);
    let width = 24usize.saturating_sub(indent.len());
    let words = words.replace('\n', " ");
    let _ = writeln!(out, "{indent}{head:width$}  {words}"); // a String takes all
}

fn cluster_text(out: &mut String, cluster: &Cluster) {
    let head = format!("cluster {}/{}", cluster.namespace, cluster.name);
    row(out, 0, &head, &verdict(&cluster.said));
    row(out, 1, "image", &image(cluster));
    let brokers = &cluster.brokers;
    row(out, 1, "brokers", &format!("{} of {} ready", brokers.ready, brokers.wanted));
    let bookies = &cluster.bookies;
    row(
        out,
        1,
        "bookies",
        &format!(
            "{} registered, {} wanted, {} ledgers under-replicated",
            bookies.ready, bookies.wanted, cluster.under_replicated_ledgers
        ),
    );
    for pool in &cluster.pools {
        row(out, 1, &format!("pool {}", pool.name), &pool_words(pool));
        for drain in &pool.drains {
            row(out, 2, &format!("drain {}", drain.bookie), &drain_words(drain));
        }
    }
    for pod in &cluster.pods_not_ready {
        row(out, 1, &format!("pod {}", pod.pod), &pod.why);
    }
}

fn verdict(said: &Said) -> String {
    let ready = match (said.stalled, said.ready) {
        (true, _) => "stalled",
        (false, ConditionStatus::True) => "Ready",
        (false, ConditionStatus::False) => "not ready",
        (false, ConditionStatus::Unknown) => "unknown",
    };
    format!("{ready}, {}", said.words())
}

fn image(cluster: &Cluster) -> String {
    let mut words = cluster.image.clone();
    let others: Vec<&str> = cluster
        .images_running
        .iter()
        .filter(|image| **image != cluster.image)
        .map(String::as_str)
        .collect();
    if !others.is_empty() {
        words = format!("{words}; pods still run {}", others.join(", "));
    }
    if cluster.rolling { format!("{words}; a roll is under way") } else { words }
}

fn pool_words(pool: &Pool) -> String {
    let Pool { bookies, updated, zone, .. } = pool;
    let mut words = format!("{} of {} ready", bookies.ready, bookies.wanted);
    if *updated < bookies.wanted {
        words = format!("{words}, {updated} up to date");
    }
    if !zone.is_empty() {
        words = format!("{words}, zone {zone}");
    }
    format!("{words}; {}", verdict(&pool.said))
}

/// How far a drain is.
pub(in crate::cli::kube) fn drain_words(drain: &DrainNote) -> String {
    if drain.proven {
        return "proven: no ledger names it; its pod goes, then its volume".into();
    }
    let left = format!("{} ledgers, {} left", drain.ledgers_left, size(drain.bytes_left));
    if drain.blocked.is_empty() { left } else { format!("{left}; blocked: {}", drain.blocked) }
}

/// A size as people say it.
fn size(bytes: i64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1_024 {
        return format!("{bytes} bytes");
    }
    let mut value = bytes as f64 / 1_024.0;
    let mut unit = UNITS[0];
    for larger in &UNITS[1..] {
        if value < 1_024.0 {
            break;
        }
        (value, unit) = (value / 1_024.0, larger);
    }
    format!("{value:.1} {unit}")
}

fn warning_head(warning: &Warning) -> String {
    let age = match warning.age_s {
        s if s < 120 => format!("{} s", s.max(0)),
        s if s < 7_200 => format!("{} min", s / 60),
        s => format!("{} h", s / 3_600),
    };
    let times =
        if warning.times > 1 { format!(", {} times", warning.times) } else { String::new() };
    format!("{age} ago{times}  {}  {}", warning.about, warning.reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drain_says_what_is_left_and_what_keeps_it() {
        let drain = DrainNote { bytes_left: 2048, ledgers_left: 3, ..DrainNote::default() };
        assert_eq!(drain_words(&drain), "3 ledgers, 2.0 KiB left");
        let blocked = DrainNote { blocked: "too few".into(), ..drain.clone() };
        assert_eq!(drain_words(&blocked), "3 ledgers, 2.0 KiB left; blocked: too few");
        assert_eq!(size(5_368_709_120), "5.0 GiB");
        assert!(drain_words(&DrainNote { proven: true, ..drain }).starts_with("proven"));
    }
}
