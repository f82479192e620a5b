//! What was acknowledged survives: kill -9 in the middle of publishing, a damaged journal file, a clean stop.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use serde_json::Value;

use crate::harness::{Standalone, json_lines, text};

const KILLS: usize = 20;

/// Publishes `prefix-0`, `prefix-1`, ... until the server is killed after `kill_after` receipts; returns the receipts.
fn publish_until_killed(
    server: &mut Standalone,
    prefix: &str,
    kill_after: usize,
) -> Vec<(u64, u64, String)> {
    let mut produce = server
        .client(&["produce", "survivors", "-o", "json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary starts");
    let mut stdin = produce.stdin.take().expect("piped");
    let name = prefix.to_owned();
    let feeder = thread::spawn(move || {
        for number in 0.. {
            if writeln!(stdin, "{name}-{number}").is_err() {
                break;
            }
        }
    });
    let mut receipts = Vec::new();
    let mut lines = BufReader::new(produce.stdout.take().expect("piped")).lines();
    while receipts.len() < kill_after {
        let line = lines.next().expect("more receipts").expect("readable");
        receipts.push(line);
    }
    server.kill();
    produce.kill().expect("it lives");
    receipts.extend(lines.map_while(Result::ok));
    produce.wait().expect("it can be waited for");
    feeder.join().expect("the feeder ends");
    receipts
        .iter()
        .enumerate()
        // The last line may be cut by the kill.
        .filter_map(|(i, line)| Some((i, serde_json::from_str::<Value>(line).ok()?)))
        .map(|(i, receipt)| {
            let number = |name: &str| receipt[name].as_u64().expect("a number");
            (number("segment"), number("offset"), format!("{prefix}-{i}"))
        })
        .collect()
}

#[test]
fn every_receipt_survives_twenty_kills_in_order() {
    let data = tempfile::tempdir().expect("a temporary directory");
    let mut receipts = Vec::new();
    for round in 0..KILLS {
        let mut server = Standalone::start(data.path(), 3);
        if round == 0 {
            server.ok(&["topic", "create", "survivors", "--segments", "1"]);
        }
        // Different amounts, so that the kill falls into different states of files and ledgers.
        receipts.extend(publish_until_killed(
            &mut server,
            &format!("round{round}"),
            50 + round * 211,
        ));
    }
    let server = Standalone::start(data.path(), 3);
    server.ok(&["sub", "create", "survivors", "all", "--from", "earliest"]);
    let consumed =
        server.ok(&["consume", "survivors", "-s", "all", "--exit-when-empty", "-o", "json"]);
    let mut by_place = BTreeMap::new();
    let mut next_in_round: BTreeMap<String, u64> = BTreeMap::new();
    for (message, expected_offset) in json_lines(&consumed).into_iter().zip(0..) {
        let offset = message["offset"].as_u64().expect("a number");
        assert_eq!(offset, expected_offset, "offsets are dense");
        let value = message["value"].as_str().expect("text").to_owned();
        let (round, number) = value.split_once('-').expect("round-number");
        let next = next_in_round.entry(round.to_owned()).or_default();
        assert_eq!(
            number.parse::<u64>().expect("a number"),
            *next,
            "{round}: in order, none twice"
        );
        *next += 1;
        by_place.insert((message["segment"].as_u64().expect("a number"), offset), value);
    }
    for (segment, offset, value) in receipts {
        assert_eq!(
            by_place.get(&(segment, offset)),
            Some(&value),
            "the message a receipt was printed for"
        );
    }
}

#[test]
fn settled_messages_stay_settled_over_a_kill_and_a_clean_stop() {
    let data = tempfile::tempdir().expect("a temporary directory");
    let mut server = Standalone::start(data.path(), 3);
    let lines: String = (0..100).map(|i| format!("line {i}\n")).collect();
    server.ok(&["topic", "create", "orders"]);
    server.ok(&["sub", "create", "orders", "billing", "--from", "earliest"]);
    server.ok_with(&["produce", "orders"], &lines);
    let first = server.ok(&["consume", "orders", "-s", "billing", "-n", "40"]);
    assert_eq!(first.lines().count(), 40);
    server.kill();
    let server = Standalone::start(data.path(), 3);
    let second = server.ok(&["consume", "orders", "-s", "billing", "-n", "30"]);
    assert_eq!(second.lines().next(), Some("line 40"));
    assert_eq!(server.terminate(), Some(0));
    let server = Standalone::start(data.path(), 3);
    let third = server.ok(&["consume", "orders", "-s", "billing", "-n", "30"]);
    assert_eq!(third.lines().next(), Some("line 70"));
    assert_eq!(third.lines().last(), Some("line 99"));
}

/// Files of a bookie that may hold journal groups, largest first.
fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(next).expect("readable") {
            let path = entry.expect("readable").path();
            if path.is_dir() { open.push(path) } else { found.push(path) }
        }
    }
    found
}

/// In every line that [`damage`] may hit.
const MARK: &[u8] = b"the-one-to-damage";

/// Flips one bit in each copy of the mark that `which` chooses (by its place among all in its file), in one bookie's files.
fn damage(bookie: &Path, which: impl Fn(usize, usize) -> bool) {
    let mut flipped = 0;
    for path in files_below(bookie) {
        let bytes = std::fs::read(&path).expect("readable");
        let places: Vec<usize> = (0..bytes.len().saturating_sub(MARK.len()))
            .filter(|at| bytes[*at..].starts_with(MARK))
            .collect();
        let file = std::fs::OpenOptions::new().write(true).open(&path).expect("writable");
        for (_, at) in places.iter().enumerate().filter(|(place, _)| which(*place, places.len())) {
            file.write_all_at(&[bytes[*at] ^ 1], *at as u64).expect("written");
            flipped += 1;
        }
    }
    assert!(flipped > 0, "the payload lies in a file below {}", bookie.display());
}

/// Whether a metric of the page stands above 0.
fn counted(metrics: &str, name: &str) -> bool {
    metrics.lines().any(|line| line.starts_with(name) && !line.ends_with(" 0"))
}

fn marked_lines(count: usize) -> String {
    (0..count).map(|i| format!("line {i} the-one-to-damage\n")).collect()
}

#[test]
fn a_bit_flipped_at_rest_is_found_when_it_is_read_and_the_message_comes_from_another_copy() {
    let data = tempfile::tempdir().expect("a temporary directory");
    let server = Standalone::start(data.path(), 3);
    let lines = marked_lines(20_000);
    server.ok(&["topic", "create", "orders"]);
    server.ok_with(&["produce", "orders"], &lines);
    // A clean stop: its checkpoint covers the journal, so that the next start does not read these groups.
    assert_eq!(server.terminate(), Some(0));
    // Another third in each bookie: whichever a reader asks, it meets damage, and two good copies of everything are left.
    for bookie in 0..3 {
        let directory = data.path().join("bookies").join(bookie.to_string());
        damage(&directory, |place, places| place * 3 / places == bookie);
    }
    let server = Standalone::start(data.path(), 3);
    let consumed =
        server.ok(&["consume", "orders", "-s", "all", "--from", "earliest", "-n", "20000"]);
    assert_eq!(consumed, lines);
    let metrics = server.metrics();
    assert!(counted(&metrics, "geminga_bookie_damage_found_total"), "{metrics}");
    assert!(counted(&metrics, "geminga_ledger_read_damage_total"), "{metrics}");
    let log = server.log();
    assert!(log.contains("stored entry is damaged") && log.contains("ledger_id"), "{log}");
}

#[test]
fn a_bit_flipped_below_the_end_of_the_journal_is_found_at_the_start_and_nothing_is_lost() {
    let data = tempfile::tempdir().expect("a temporary directory");
    let mut server = Standalone::start(data.path(), 3);
    let (lines, later) = (marked_lines(2_000), "after the damage\n");
    server.ok(&["topic", "create", "orders"]);
    server.ok_with(&["produce", "orders"], &lines);
    // A later group, so that the damaged one is not the journal's torn end.
    server.ok_with(&["produce", "orders"], later);
    server.kill();
    damage(&data.path().join("bookies").join("1"), |place, places| place == places / 2);
    let server = Standalone::start(data.path(), 3);
    let metrics = server.metrics();
    assert!(counted(&metrics, "geminga_bookie_damage_found_total{bookie=\"1\"}"), "{metrics}");
    let consumed =
        server.ok(&["consume", "orders", "-s", "all", "--from", "earliest", "-n", "2001"]);
    assert_eq!(consumed, lines + later);
}

/// A file system of its own, gone with the test.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(megabytes: u32) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let size = format!("size={megabytes}m");
        let mount = ["-t", "tmpfs", "-o", size.as_str(), "tmpfs"];
        let status =
            Command::new("mount").args(mount).arg(directory.path()).status().expect("mount runs");
        assert!(
            status.success(),
            "this test mounts a small file system, for which it must be root"
        );
        Self(directory)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_refuses_what_is_new_keeps_what_is_stored_and_recovers_with_its_space() {
    let disk = SmallDisk::mount(400);
    let data = disk.0.path().join("data");
    let mut server = Standalone::start(&data, 1);
    server.ok_with(&["produce", "small"], "stays\n");
    // 300 MB into a disk that has room for about 230.
    let line = format!("{}\n", "x".repeat(1_000_000));
    let output = server.run_with(&["produce", "large", "--timeout", "12s"], &line.repeat(300));
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("NOT_ENOUGH_BOOKIES"), "{}", text(&output.stderr));
    // It does not end, and a restart is no way into a crash loop.
    server.kill();
    let server = Standalone::start(&data, 1);
    assert!(server.ok(&["topic", "describe", "large", "-o", "json"]).contains("next_offset"));
    server.ok(&["topic", "delete", "large"]);
    let back = ["produce", "small", "--timeout", "60s"];
    server.ok_with(&back, "back\n");
    let consumed = server.ok(&["consume", "small", "-s", "all", "--from", "earliest", "-n", "2"]);
    assert_eq!(consumed, "stays\nback\n");
}
