//! The README's tour works as printed.

use std::process::Command;

/// The `sh` blocks below the heading of the tour, as one script.
fn tour() -> String {
    let readme = include_str!("../../README.md");
    let tour = readme.split("## Five-minute tour").nth(1).expect("the tour");
    let tour = tour.split("\n## ").next().expect("its end");
    let blocks: Vec<&str> = tour
        .split("```sh\n")
        .skip(1)
        .map(|block| block.split("```").next().expect("closed"))
        .collect();
    assert!(blocks.len() >= 5, "the tour has its blocks");
    blocks.concat()
}

#[test]
fn the_tour_runs_as_printed() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let binary = std::path::Path::new(env!("CARGO_BIN_EXE_geminga"));
    // The tour's own ports are moved, so that it can run beside a server; nothing else is changed.
    let port = |_| {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        socket.local_addr().expect("bound").to_string()
    };
    let [listen, health] = [0, 1].map(port);
    let script = format!(
        "set -euo pipefail -m\ntrap 'kill -9 $(jobs -p) 2>/dev/null || true' EXIT\n{}",
        tour()
    );
    let path = format!(
        "{}:{}",
        binary.parent().expect("a directory").display(),
        std::env::var("PATH").expect("a PATH")
    );
    let output = Command::new("bash")
        .args(["-c", &script])
        .current_dir(directory.path())
        .env("PATH", path)
        .env("GEMINGA_LISTEN", &listen)
        .env("GEMINGA_HEALTH_LISTEN", &health)
        .env("GEMINGA_SERVER", format!("http://{listen}"))
        .output()
        .expect("bash runs");
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "stdout:\n{out}\nstderr:\n{err}");
    assert!(out.contains("\"level\":\"quorum\""), "a receipt names its level:\n{out}");
    assert!(out.contains("fourth"), "what was published is consumed:\n{out}");
    assert!(out.contains("\"attempt\":2"), "what failed comes again:\n{out}");
    assert!(
        out.contains("\"geminga-reason\":\"no such customer\""),
        "a dead letter says why:\n{out}"
    );
    assert!(out.contains("messages_per_second"), "the bench prints its document:\n{out}");
}
