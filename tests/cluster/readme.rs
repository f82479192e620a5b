//! The README's cluster by hand works as printed.

use std::process::Command;

use crate::harness::Etcd;

/// The `sh` blocks below the heading, as one script.
fn by_hand() -> String {
    let readme = include_str!("../../README.md");
    let section = readme.split("## A cluster by hand").nth(1).expect("the section");
    let section = section.split("\n## ").next().expect("its end");
    section
        .split("```sh\n")
        .skip(1)
        .map(|block| block.split("```").next().expect("closed"))
        .collect()
}

/// In a network namespace of its own, so that the printed ports are free; nothing is changed but the end.
#[test]
fn the_cluster_by_hand_runs_as_printed() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let script = format!(
        "set -euo pipefail -m\ntrap 'kill -9 $(jobs -p) 2>/dev/null || true' EXIT\nip link set lo up\n{}",
        by_hand()
    );
    let binary = std::path::Path::new(env!("CARGO_BIN_EXE_geminga"));
    let etcd = std::path::Path::new(Etcd::binary());
    let folder = |path: &std::path::Path| path.parent().expect("a directory").display().to_string();
    let path = std::env::var("PATH").expect("a PATH");
    let output = Command::new("unshare")
        .args(["--net", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-c", &script])
        .current_dir(directory.path())
        .env("PATH", format!("{}:{}:{path}", folder(binary), folder(etcd)))
        .output()
        .expect("unshare runs");
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "stdout:\n{out}\nstderr:\n{err}");
    assert_eq!(out.matches("\"level\":\"quorum\"").count(), 4, "four receipts:\n{out}");
    for word in ["first", "second", "third"] {
        assert!(out.contains(word), "what was published is consumed:\n{out}");
    }
    assert!(out.contains("down"), "the dead bookie is shown:\n{out}");
}
