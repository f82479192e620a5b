//! helm, as its users run it.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::{apiserver::NAMESPACE, harness::tool};

/// The two charts.
pub(crate) const CLUSTER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/charts/geminga-cluster");
pub(crate) const OPERATOR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/charts/geminga-operator");

/// What it wrote.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs it in the tests' namespace, with no settings of whoever runs the tests; without a kubeconfig it reaches nobody.
///
/// # Errors
/// What it wrote to standard error, when it fails.
pub(crate) fn helm(kubeconfig: Option<&Path>, args: &[&str]) -> Result<Said, String> {
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join("helm");
    let output = Command::new(tool("helm"))
        .args(args)
        .env("KUBECONFIG", kubeconfig.unwrap_or(Path::new("/dev/null")))
        .env("HELM_NAMESPACE", NAMESPACE)
        .env("HELM_CONFIG_HOME", &home)
        .env("HELM_CACHE_HOME", &home)
        .env("HELM_DATA_HOME", &home)
        .stdin(Stdio::null())
        .output()
        .expect("helm runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let said = Said { stdout: text(&output.stdout), stderr: text(&output.stderr) };
    if output.status.success() { Ok(said) } else { Err(said.stderr) }
}

/// What a chart renders, as text.
///
/// # Errors
/// Why it does not.
pub(crate) fn rendered(release: &str, chart: &str, args: &[&str]) -> Result<String, String> {
    let said = helm(None, &[&["template", release, chart], args].concat())?;
    Ok(said.stdout)
}

/// The documents of a YAML text.
pub(crate) fn documents(yaml: &str) -> Vec<Value> {
    let all: Vec<Value> = serde_saphyr::from_multiple(yaml).expect("YAML");
    all.into_iter().filter(|document| !document.is_null()).collect()
}
