//! Policies, compaction and patterns by the command line.

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

/// Of one policy: what holds, and where it comes from.
fn of(rows: &Value, policy: &str) -> Option<(Value, String)> {
    let row = rows.as_array()?.iter().find(|row| row["policy"] == policy)?;
    Some((row["effective"].clone(), row["source"].as_str()?.to_owned()))
}

#[test]
fn policies_are_set_with_units_and_each_value_names_its_source() {
    let (_data, server) = server();
    server.ok(&["topic", "create", "orders"]);
    server.ok(&["policy", "set", "--ttl-ms", "30d", "--backlog-quota-bytes", "10MiB"]);
    server.ok(&["policy", "set", "public/default", "--retention-ms", "7d", "--ttl-ms", "1h"]);
    server.ok(&["policy", "set", "public/default/orders", "--backlog-action", "evict-oldest"]);
    let get = ["policy", "get", "--effective", "public/default/orders", "-o", "json"];
    let rows = document(&server.ok(&get));
    let told = |policy| of(&rows, policy);
    assert_eq!(told("ttl_ms"), Some((3_600_000.into(), "namespace".into())));
    assert_eq!(told("retention_ms"), Some((604_800_000.into(), "namespace".into())));
    assert_eq!(told("backlog_quota_bytes"), Some((10_485_760.into(), "cluster".into())));
    assert_eq!(told("backlog_action"), Some(("evict-oldest".into(), "topic".into())));
    assert_eq!(told("retention_bytes"), None, "nothing sets it");
    let shown = server.ok(&["policy", "get", "public/default"]);
    assert!(shown.contains("7d") && shown.contains("10MiB"), "people read units: {shown}");
    server.ok(&["policy", "set", "public/default", "--unset", "ttl-ms"]);
    let rows = document(&server.ok(&get));
    assert_eq!(of(&rows, "ttl_ms"), Some((2_592_000_000_u64.into(), "cluster".into())));
}

#[test]
fn a_tenant_is_a_scope_of_its_own() {
    let (_data, server) = server();
    server.ok(&["topic", "create", "orders"]);
    server.ok(&["policy", "set", "public", "--publish-bytes-per-s", "10MB", "--topics-max", "5"]);
    let get = ["policy", "get", "--effective", "public/default", "-o", "json"];
    let rows = document(&server.ok(&get));
    assert_eq!(of(&rows, "publish_bytes_per_s"), Some((10_000_000.into(), "tenant".into())));
    assert_eq!(of(&rows, "topics_max"), Some((5.into(), "tenant".into())));
}

#[test]
fn a_compacted_topic_is_read_by_its_latest_values() {
    let (_data, server) = server();
    let lines = r#"{"key":"a","value":"1"}
{"key":"b","value":"1"}
{"key":"a","value":"2"}
{"key":"b","value":""}
"#;
    server.ok_with(&["produce", "state", "--ndjson"], lines);
    let done = document(&server.ok(&["topic", "compact", "state", "-o", "json"]));
    let segment = &done["segments"][0];
    assert_eq!((&segment["compacted_to"], &segment["messages"]), (&4.into(), &1.into()), "{done}");
    let described = document(&server.ok(&["topic", "describe", "state", "-o", "json"]));
    assert_eq!(described["segments"][0]["compacted_to"], 4, "{described}");
    server.ok_with(&["produce", "state", "--key", "c"], "3\n");
    let read = ["consume", "state", "--reader", "--compacted", "-n", "2", "-o", "json"];
    let got = json_lines(&server.ok(&read));
    let values: Vec<&str> = got.iter().filter_map(|line| line["value"].as_str()).collect();
    assert_eq!(values, ["2", "3"]);
    assert_eq!(got[0]["offset"], 2, "where it was");
}

#[test]
fn a_pattern_consumes_topics_by_name_and_says_which_a_message_is_from() {
    let (_data, server) = server();
    for topic in ["eu-a", "eu-b", "us-a"] {
        server.ok_with(&["produce", topic], &format!("from {topic}\n"));
    }
    let consume =
        ["consume", "--pattern", "eu-.*", "-s", "work", "--idle-timeout", "2s", "-o", "json"];
    let mut got: Vec<(String, String)> = json_lines(&server.ok(&consume))
        .iter()
        .map(|line| (line["topic"].to_string(), line["value"].to_string()))
        .collect();
    got.sort();
    let from = |topic: &str| (format!("\"public/default/{topic}\""), format!("\"from {topic}\""));
    assert_eq!(got, [from("eu-a"), from("eu-b")]);
    assert_eq!(server.ok(&consume), "", "what was printed was accepted");
}
