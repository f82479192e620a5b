//! The two releases that the README installs, and what is done with them.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::kubernetes::{Kubernetes, run, until};

/// The namespace, the cluster's release, the operator's.
pub(crate) const NAMESPACE: &str = "messaging";
pub(crate) const CLUSTER: &str = "demo";
/// The image that the charts ask for, and its successor.
pub(crate) const IMAGE: &str = concat!("geminga:", env!("CARGO_PKG_VERSION"));
pub(crate) const NEXT_IMAGE: &str = "geminga:next";

pub(crate) const BROKERS: &str = "geminga.io/cluster=demo,app.kubernetes.io/component=broker";
pub(crate) const BOOKIES: &str = "geminga.io/cluster=demo,app.kubernetes.io/component=bookie";
pub(crate) const OPERATOR: &str = "app.kubernetes.io/name=geminga-operator";

/// The `sh` blocks of the README's section, command by command.
pub(crate) fn commands() -> Vec<String> {
    let readme = include_str!("../../README.md");
    let section = readme.split("## On Kubernetes").nth(1).expect("the section");
    let section = section.split("\n## ").next().expect("its end");
    let blocks =
        section.split("```sh\n").skip(1).map(|block| block.split("```").next().expect("closed"));
    let text: String = blocks.collect();
    text.replace("\\\n", " ")
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .map(ToOwned::to_owned)
        .collect()
}

/// What `helm upgrade` changes, with everything else as it is.
pub(crate) fn upgrade(kubernetes: &Kubernetes, release: &str, chart: &str, values: &[&str]) {
    let mut args = vec!["upgrade", release, chart, "--namespace", NAMESPACE, "--reuse-values"];
    for value in values {
        args.extend(["--set", value]);
    }
    kubernetes.helm(&args);
}

/// Runs a README command as printed.
pub(crate) fn shell(kubernetes: &Kubernetes, command: &str) -> String {
    run(&mut kubernetes.command("bash", &["-euo", "pipefail", "-c", command]))
}

fn condition<'a>(object: &'a Value, type_: &str) -> Option<&'a Value> {
    object["status"]["conditions"].as_array()?.iter().find(|condition| condition["type"] == type_)
}

/// What is not yet as it should be: the cluster and its pools say Ready about their present spec, and nothing is under way.
pub(crate) fn unsettled(kubernetes: &Kubernetes) -> Option<String> {
    for kind in ["gemingaclusters", "bookiepools"] {
        let list = kubernetes.object(NAMESPACE, &[kind]);
        for object in list["items"].as_array().expect("a list") {
            let generation = &object["metadata"]["generation"];
            let holds = |type_: &str, status: &str| {
                condition(object, type_).is_some_and(|condition| {
                    condition["status"] == status && condition["observedGeneration"] == *generation
                })
            };
            if !(holds("Ready", "True") && holds("Reconciling", "False")) {
                return Some(format!(
                    "{kind} {}: {}",
                    object["metadata"]["name"], object["status"]
                ));
            }
        }
    }
    None
}

/// Waits until nothing is unsettled.
pub(crate) async fn settled(kubernetes: &Kubernetes) {
    until(async || unsettled(kubernetes).map_or(Ok(()), Err)).await;
}

/// What the operator says of the pool.
pub(crate) fn pool(kubernetes: &Kubernetes) -> Value {
    kubernetes.object(NAMESPACE, &["bookiepool", "demo-main"])
}

/// A step of the story: told with its time.
pub(crate) struct Step {
    name: &'static str,
    begun: Instant,
}

impl Step {
    pub(crate) fn begin(name: &'static str) -> Self {
        println!("nodes: {name} ...");
        Self { name, begun: Instant::now() }
    }

    pub(crate) fn end(self, more: &str) -> Duration {
        let took = self.begun.elapsed();
        println!("nodes: {:>6.1} s  {}  {more}", took.as_secs_f64(), self.name);
        took
    }
}
