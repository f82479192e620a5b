//! Programs that tests run beside ours.

use std::{collections::BTreeMap, path::Path, process::Command, sync::Mutex};

/// The path that `scripts/NAME` prints. Asked once in a process; the first answer on a machine may take minutes.
pub(crate) fn tool(name: &'static str) -> &'static str {
    static KNOWN: Mutex<BTreeMap<&str, &str>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().expect("every script gave its program");
    known.entry(name).or_insert_with(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(name);
        let output = Command::new(script).output().expect("the script runs");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "scripts/{name} gives none:\n{error}");
        // One for each script, and for as long as the tests run.
        String::from_utf8_lossy(&output.stdout).trim().to_owned().leak()
    })
}
