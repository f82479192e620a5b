//! `geminga cluster check`: it passes on a cluster that works, and says which step failed on one that does not.

use std::{net::TcpListener, process::Stdio};

use serde_json::Value;

use crate::harness::{Standalone, geminga, text};

fn document(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn messages_come_back_and_nothing_of_several_checks_at_once_stays_behind() {
    let data = tempfile::tempdir().expect("a temporary directory");
    let server = Standalone::start(data.path(), 3);
    let checks: Vec<_> = (0..3)
        .map(|_| {
            let mut command =
                server.client(&["cluster", "check", "--messages", "50", "-o", "json"]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts")
        })
        .collect();
    for check in checks {
        let output = check.wait_with_output().expect("it ends");
        assert!(output.status.success(), "{}", text(&output.stderr));
        let said = document(&text(&output.stdout));
        assert_eq!(said["healthy"], true, "{said}");
        assert_eq!(said["topic"], "public/default/geminga-check");
        let steps: Vec<&str> = said["steps"]
            .as_array()
            .expect("steps")
            .iter()
            .map(|step| step["step"].as_str().expect("a name"))
            .collect();
        let expected =
            ["connect", "topic", "subscription", "publish", "consume", "accept", "clean up"];
        assert_eq!(steps, expected);
        assert!(said["steps"][3]["took_ms"].as_f64().expect("a time") > 0.0, "{said}");
        assert!(text(&output.stderr).contains("healthy: 50 messages"), "{}", text(&output.stderr));
    }
    assert_eq!(server.ok(&["sub", "ls", "geminga-check", "-o", "json"]).trim(), "[]");
    let policies = server.ok(&["policy", "get", "public/default/geminga-check", "-o", "json"]);
    assert!(policies.contains("ttl_ms") && policies.contains("3600000"), "{policies}");
}

#[test]
fn a_topic_that_others_use_can_be_checked_and_a_missing_one_is_named_and_not_made() {
    let data = tempfile::tempdir().expect("a temporary directory");
    let server = Standalone::start(data.path(), 3);
    server.ok(&["topic", "create", "orders", "--segments", "3"]);
    server.ok(&["sub", "create", "orders", "billing", "--from", "earliest"]);
    server.ok_with(&["produce", "orders"], "from before\n");
    let table = server.ok(&["cluster", "check", "--topic", "orders"]);
    assert!(table.contains("10 messages, each once and unchanged"), "{table}");
    let billing = server.ok(&["consume", "orders", "-s", "billing", "-n", "11"]);
    assert_eq!(billing.lines().filter(|line| line.contains("of check")).count(), 10, "{billing}");

    let output = server.run(&["cluster", "check", "--topic", "oders"]);
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{error}");
    assert!(error.contains("topic: TOPIC_NOT_FOUND"), "the step is named: {error}");
    assert!(error.contains("next: geminga topic ls"), "{error}");
    assert!(!server.ok(&["topic", "ls", "-o", "json"]).contains("oders"), "a typo makes nothing");
}

#[test]
fn a_server_that_is_away_is_asked_until_the_timeout_and_one_that_starts_is_waited_for() {
    let away = "http://127.0.0.1:1";
    let args = ["--server", away, "cluster", "check", "--timeout", "1s", "-o", "json"];
    let output = geminga().args(args).output().expect("the binary starts");
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "{error}");
    assert!(error.contains("connect: not done within 1s"), "{error}");
    assert!(error.contains("next: geminga cluster wait"), "{error}");
    let said = document(&text(&output.stdout));
    assert_eq!((&said["healthy"], &said["steps"][0]["step"]), (&false.into(), &"connect".into()));

    let data = tempfile::tempdir().expect("a temporary directory");
    let socket = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = socket.local_addr().expect("bound").to_string();
    drop(socket);
    let server = format!("http://{address}");
    let mut check = geminga()
        .args(["--server", &server, "cluster", "check"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    // Its first word says that it has met nobody.
    let mut said = std::io::BufReader::new(check.stderr.take().expect("piped"));
    let mut word = String::new();
    std::io::BufRead::read_line(&mut said, &mut word).expect("readable");
    assert!(word.contains("not yet"), "{word}");
    let _server = Standalone::start_at(data.path(), 3, &address);
    std::io::Read::read_to_string(&mut said, &mut word).expect("readable");
    assert!(check.wait().expect("it ends").success(), "{word}");
}

#[test]
fn a_check_that_is_stopped_deletes_its_subscription() {
    let data = tempfile::tempdir().expect("a temporary directory");
    let server = Standalone::start(data.path(), 1);
    let mut command = server.client(&["cluster", "check", "--messages", "100000"]);
    let check = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let subscriptions = || {
        let output = server.run(&["sub", "ls", "geminga-check", "-o", "json"]);
        text(&output.stdout).trim().to_owned()
    };
    assert!((0..1_000).any(|_| subscriptions().contains("check-")), "it subscribes");
    let pid = rustix::process::Pid::from_child(&check);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it lives");
    let output = check.wait_with_output().expect("it ends");
    let error = text(&output.stderr);
    assert!(
        output.status.code() == Some(1) || output.status.success(),
        "it ends by itself: {error}"
    );
    assert_eq!(subscriptions(), "[]", "{error}");
}
