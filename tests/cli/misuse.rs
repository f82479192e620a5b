//! Wrong use gets a clear error, a meaningful exit code, and the next command to try.

use crate::harness::{Standalone, geminga, text};

const USAGE: i32 = 2;
const NOT_FOUND: i32 = 3;
const REFUSED: i32 = 4;
const UNAVAILABLE: i32 = 5;

#[test]
fn a_wrong_flag_or_value_is_a_usage_error() {
    for args in [
        &["--nonsense"][..],
        &["standalone", "--bookies", "0"],
        &["standalone", "--bookies", "many"],
        &["topic", "create", "orders", "--segments", "-1"],
        &["consume", "orders"],
        &["consume", "orders", "--reader", "-s", "billing"],
        &["consume", "orders", "-s", "billing", "--type", "shared"],
        &["consume", "orders", "-s", "billing", "--then", "lose"],
        &["consume", "orders", "--reader", "--from", "yesterday"],
        &["consume", "orders", "-s", "billing", "--compacted"],
        &["consume", "orders", "-s", "billing", "--pattern", ".*"],
        &["consume", "--pattern", ".*"],
        &["policy", "set", "--retention-ms", "7 weeks"],
        &["policy", "set", "--retention-bytes", "7d"],
        &["policy", "set", "--backlog-action", "drop"],
        &["policy", "set", "--unset", "retention"],
        &["produce", "orders", "--expected-offset", "5"],
        &["produce", "orders", "--delay", "1s", "--deliver-at", "2026-01-31T12:00:00Z"],
        &["sub", "create", "orders", "billing", "--type", "fanout"],
        &["sub", "create", "orders", "billing", "--backoff", "10s..1s"],
        &["sub", "seek", "orders", "billing"],
        &["sub", "delayed", "cancel", "orders", "billing", "0:9-1"],
        &["completion", "tcsh"],
        &["cluster", "check", "--messages", "0"],
        &["cluster", "check", "--timeout", "soon"],
        &["cluster", "check", "--topic", "a/b/c/d"],
        &["kube", "status", "-n", "messaging", "-A"],
        &["kube", "status", "--timeout", "5s"],
        &["kube", "plan", "topic/orders", "-f", "orders.yaml"],
        &["kube", "drain"],
        &["kube", "drain", "main", "--cancel", "--force"],
        &["kube", "drain", "main", "--replicas", "-1"],
        &["kube", "report", "--log-lines", "0"],
        &["top", "--interval", "0s"],
        &["-o", "xml", "topic", "ls"],
        &["explain", "NO_SUCH_REASON"],
        &[],
    ] {
        let output = geminga().args(args).output().expect("the binary starts");
        assert_eq!(output.status.code(), Some(USAGE), "{args:?}: {}", text(&output.stderr));
        assert!(output.stdout.is_empty(), "{args:?}: data only on stdout");
        assert!(!output.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn no_server_is_unavailable_and_names_the_command_to_start_one() {
    let output = geminga()
        .args(["--server", "http://127.0.0.1:1", "topic", "ls"])
        .output()
        .expect("the binary starts");
    assert_eq!(output.status.code(), Some(UNAVAILABLE));
    assert!(text(&output.stderr).contains("geminga standalone"), "{}", text(&output.stderr));
}

#[test]
fn refused_requests_say_why_and_what_next() {
    let data = tempfile::tempdir().expect("a temporary directory");
    let server = Standalone::start(data.path(), 1);
    server.ok(&["topic", "create", "orders", "--segments", "2"]);
    let long = "x".repeat(201);
    for (args, code, reason) in [
        (&["topic", "create", "nobody/default/orders"][..], NOT_FOUND, "TENANT_NOT_FOUND"),
        (&["topic", "create", "public/nowhere/orders"], NOT_FOUND, "NAMESPACE_NOT_FOUND"),
        (&["topic", "create", "public/default/.."], USAGE, "INVALID_NAME"),
        (&["topic", "create", "public/default/a b"], USAGE, "INVALID_NAME"),
        (&["topic", "create", "public/default/a\u{1b}[31m"], USAGE, "INVALID_NAME"),
        (&["topic", "create", &long], USAGE, "INVALID_NAME"),
        (&["topic", "create", "a/b/c/d"], USAGE, "INVALID_NAME"),
        (&["topic", "create", "orders", "--segments", "3"], REFUSED, "ALREADY_EXISTS"),
        (&["topic", "describe", "missing"], NOT_FOUND, "TOPIC_NOT_FOUND"),
        (&["sub", "describe", "orders", "missing"], NOT_FOUND, "SUBSCRIPTION_NOT_FOUND"),
        (&["tenant", "delete", "public"], REFUSED, "NOT_EMPTY"),
    ] {
        let output = server.run(args);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
        assert!(error.contains(reason), "{args:?}: {error}");
        assert!(error.contains("geminga "), "{args:?} names the next command: {error}");
        assert!(!error.contains('\u{1b}'), "{args:?}: no control characters reach the terminal");
    }
    // Created twice alike is no error.
    server.ok(&["topic", "create", "orders", "--segments", "2"]);
    assert!(server.ok(&["topic", "ls", "-o", "json"]).contains("public/default/orders"));
}

#[test]
fn a_message_over_the_limit_is_refused_and_the_next_one_goes_through() {
    let data = tempfile::tempdir().expect("a temporary directory");
    let server = Standalone::start(data.path(), 1);
    let too_large = "x".repeat(5 * 1024 * 1024 + 1);
    let output = server.run_with(&["produce", "orders"], &too_large);
    assert_eq!(output.status.code(), Some(REFUSED), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("MESSAGE_TOO_LARGE"), "{}", text(&output.stderr));
    let framing = 32;
    let largest = "y".repeat(5 * 1024 * 1024 - framing);
    server.ok_with(&["produce", "orders"], &largest);
    let consumed = server.ok(&["consume", "orders", "-s", "all", "--from", "earliest", "-n", "1"]);
    assert_eq!(consumed.trim_end().len(), largest.len());
}

#[test]
fn a_second_process_on_one_data_directory_is_refused() {
    let data = tempfile::tempdir().expect("a temporary directory");
    let first = Standalone::start(data.path(), 1);
    let refusal = Standalone::try_start(data.path(), 1).err().expect("the second does not start");
    assert!(refusal.contains("another process"), "{refusal}");
    first.ok_with(&["produce", "orders"], "still here\n");
}
