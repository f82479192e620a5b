//! Queues by the command line: failures, dead letters, delays, and reading without a trace.

use serde_json::Value;

use crate::harness::{Standalone, json_lines};

fn server() -> (tempfile::TempDir, Standalone) {
    let data = tempfile::tempdir().expect("a temporary directory");
    let server = Standalone::start(data.path(), 1);
    (data, server)
}

fn document(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn values(text: &str) -> Vec<String> {
    let mut values: Vec<_> = json_lines(text)
        .iter()
        .map(|line| line["value"].as_str().expect("a value").to_owned())
        .collect();
    values.sort();
    values
}

#[test]
fn what_fails_comes_again_and_what_is_rejected_can_be_played_back_once() {
    let (_data, server) = server();
    server.ok_with(&["produce", "jobs"], "a\nb\nc\n");
    server.ok(&[
        "sub",
        "create",
        "jobs",
        "w",
        "--type",
        "shared",
        "--attempts-max",
        "9",
        "--from",
        "earliest",
    ]);
    let failed =
        server.ok(&["consume", "jobs", "-s", "w", "-n", "1", "--then", "release", "-o", "json"]);
    assert_eq!(json_lines(&failed)[0]["attempt"], 1);
    let rest = server.ok(&[
        "consume", "jobs", "-s", "w", "-n", "3", "--then", "reject", "--reason", "bad", "-o",
        "json",
    ]);
    assert_eq!(values(&rest), ["a", "b", "c"]);
    assert!(json_lines(&rest).iter().any(|line| line["attempt"] == 2), "{rest}");

    // The copies are there when three can be read.
    let dead = "jobs~w~dlq";
    let copies =
        server.ok(&["consume", dead, "-s", "look", "--from", "earliest", "-n", "3", "-o", "json"]);
    assert_eq!(json_lines(&copies)[0]["headers"]["geminga-reason"], "bad");
    let listed = document(&server.ok(&["sub", "dlq", "ls", "jobs", "w", "-o", "json"]));
    let listed = listed.as_array().expect("rows");
    assert_eq!(listed.len(), 3);
    assert!(listed.iter().all(|row| row["reason"] == "bad" && row["origin"] != ":"), "{listed:?}");

    let replayed = document(&server.ok(&["sub", "dlq", "replay", "jobs", "w", "-o", "json"]));
    assert_eq!(replayed["replayed"], 3);
    let again = document(&server.ok(&["sub", "dlq", "replay", "jobs", "w", "-o", "json"]));
    assert_eq!(again["replayed"], 0, "each once");
    let back = server.ok(&["consume", "jobs", "-s", "w", "-n", "3", "-o", "json"]);
    assert_eq!(values(&back), ["a", "b", "c"]);
    let headers = &json_lines(&back)[0]["headers"];
    assert_eq!(headers.as_object().map(serde_json::Map::len), Some(0), "as it was published");
}

#[test]
fn delayed_messages_are_listed_cancelled_and_explained() {
    let (_data, server) = server();
    server.ok(&["topic", "create", "jobs"]);
    server.ok(&["sub", "create", "jobs", "w", "--type", "shared"]);
    server.ok_with(&["produce", "jobs", "--delay", "1h"], "later\nnever\n");
    server.ok_with(&["produce", "jobs"], "now\n");
    let got = server.ok(&["consume", "jobs", "-s", "w", "-n", "1", "-o", "json"]);
    assert_eq!(values(&got), ["now"]);
    let listed = document(&server.ok(&["sub", "delayed", "ls", "jobs", "w", "-o", "json"]));
    let listed = listed.as_array().expect("rows").clone();
    assert_eq!(listed.len(), 2, "{listed:?}");
    let explained = document(&server.ok(&["sub", "explain", "jobs", "w", "-o", "json"]));
    let held = explained[0]["held"].as_array().expect("causes");
    let messages: u64 = held.iter().filter_map(|cause| cause["messages"].as_u64()).sum();
    assert_eq!(messages, 2, "the counts add up to the backlog: {explained}");
    let first = listed[0]["message"].as_str().expect("a place").to_owned();
    let cancelled =
        document(&server.ok(&["sub", "delayed", "cancel", "jobs", "w", &first, "-o", "json"]));
    assert_eq!(cancelled["cancelled"], 1);
    let left = document(&server.ok(&["sub", "delayed", "ls", "jobs", "w", "-o", "json"]));
    assert_eq!(left.as_array().map(Vec::len), Some(1));
}

#[test]
fn a_topic_is_looked_at_without_a_trace_and_a_subscription_moved() {
    let (_data, server) = server();
    server.ok_with(&["produce", "log"], "a\nb\nc\nd\n");
    let read = server.ok(&["consume", "log", "--reader", "-n", "4", "-o", "json"]);
    assert_eq!(values(&read), ["a", "b", "c", "d"]);
    let read = server.ok(&["consume", "log", "--reader", "--from", "2", "-n", "2", "-o", "json"]);
    assert_eq!(values(&read), ["c", "d"]);
    let peeked = server.ok(&["topic", "peek", "log", "--from", "1", "-n", "2", "-o", "json"]);
    assert_eq!(values(&peeked), ["b", "c"]);
    assert_eq!(server.ok(&["sub", "ls", "log", "-o", "json"]).trim(), "[]", "no trace");

    server.ok(&["consume", "log", "-s", "s", "--from", "earliest", "-n", "4"]);
    let moved = document(&server.ok(&["sub", "seek", "log", "s", "--to", "3", "-o", "json"]));
    assert_eq!(moved[0]["mark_delete_next"], 3);
    let again = server.ok(&["consume", "log", "-s", "s", "-n", "1", "-o", "json"]);
    assert_eq!(values(&again), ["d"]);
    let top = document(&server.ok(&["top", "log", "--once", "--interval", "100ms", "-o", "json"]));
    assert_eq!(top[0]["messages"], 4, "{top}");
    assert_eq!(top[1]["subscription"], "s");
    assert_eq!(top[1]["backlog"], 0);
}
