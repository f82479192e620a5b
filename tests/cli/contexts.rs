//! Contexts: which server a command goes to.

use std::path::Path;

use crate::harness::{Standalone, geminga, text};

/// Runs a command with contexts of its own; its exit code, output and errors.
fn run(home: &Path, args: &[&str]) -> (Option<i32>, String, String) {
    let output =
        geminga().env("XDG_CONFIG_HOME", home).args(args).output().expect("the binary starts");
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn a_context_is_used_until_a_flag_or_the_environment_says_otherwise() {
    let (data, home) = (tempfile::tempdir(), tempfile::tempdir());
    let (data, home) = (data.expect("a directory"), home.expect("a directory"));
    let server = Standalone::start(data.path(), 1);
    server.ok(&["topic", "create", "orders"]);
    let home = home.path();
    assert_eq!(run(home, &["context", "set", "here", &server.server]).0, Some(0));
    assert_eq!(run(home, &["context", "set", "nowhere", "http://127.0.0.1:1"]).0, Some(0));
    let (_, listed, _) = run(home, &["context", "ls", "-o", "json"]);
    assert!(listed.contains("nowhere"), "{listed}");
    let (code, topics, error) = run(home, &["topic", "ls"]);
    assert_eq!(code, Some(0), "the first one is used: {error}");
    assert!(topics.contains("public/default/orders"));

    assert_eq!(run(home, &["context", "use", "nowhere"]).0, Some(0));
    assert_eq!(run(home, &["topic", "ls"]).0, Some(5));
    assert_eq!(run(home, &["--server", &server.server, "topic", "ls"]).0, Some(0));
    let named = geminga()
        .env("XDG_CONFIG_HOME", home)
        .env("GEMINGA_SERVER", &server.server)
        .args(["topic", "ls"])
        .output();
    assert_eq!(named.expect("the binary starts").status.code(), Some(0));

    let (code, _, error) = run(home, &["context", "use", "lost"]);
    assert_eq!(code, Some(3));
    assert!(error.contains("geminga context ls"), "{error}");
    assert_eq!(run(home, &["context", "rm", "nowhere"]).0, Some(0));
    assert_eq!(run(home, &["context", "rm", "nowhere"]).0, Some(3));
    assert_eq!(run(home, &["context", "set", "bad", "ftp://x"]).0, Some(5), "told at once");
    std::fs::write(home.join("geminga/contexts.yaml"), "[broken").expect("written");
    let (code, _, error) = run(home, &["topic", "ls"]);
    assert_eq!(code, Some(1));
    assert!(error.contains("contexts.yaml"), "the file is named: {error}");
}

#[test]
fn every_shell_gets_its_script() {
    let home = tempfile::tempdir().expect("a directory");
    for shell in ["bash", "zsh", "fish"] {
        let (code, script, _) = run(home.path(), &["completion", shell]);
        assert_eq!(code, Some(0), "{shell}");
        assert!(script.contains("geminga") && script.contains("dlq"), "{shell}");
    }
}
