//! What keeps a pod from its work, in the words of Kubernetes.

use std::time::Duration;

use geminga_runtime::clock::Timestamp;
use k8s_openapi::{
    api::core::v1::{ContainerState, ContainerStateTerminated, ContainerStatus, Pod},
    apimachinery::pkg::apis::meta::v1::Time,
};
use kube::{Resource, ResourceExt};

/// What a moment may bring by itself: a pod without a node while its volume is made, one that goes, one whose volume is attached.
const PATIENCE: Duration = Duration::from_secs(60);
/// So many restarts of a pod that is not ready are no accident.
const RESTARTS_MIN: i32 = 3;
/// Longest part of a message that others wrote, characters.
const WORDS_MAX: usize = 300;

/// Whether Kubernetes counts it as ready.
#[must_use]
pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref());
    conditions.unwrap_or_default().iter().any(|c| c.type_ == "Ready" && c.status == "True")
}

/// `pod NAME: REASON: words`; none: nothing that would not pass by itself.
pub(super) fn trouble(pod: &Pod, now: Timestamp) -> Option<String> {
    Some(format!("pod {}: {}", pod.name_any(), why(pod, now)?))
}

/// Whether Kubernetes says that no process of it runs: where it does not say, one may.
pub(super) fn stopped(pod: &Pod) -> bool {
    let Some(status) = &pod.status else { return false };
    let containers = status.container_statuses.as_deref().unwrap_or_default();
    match status.phase.as_deref() {
        Some("Failed" | "Succeeded") => true,
        Some("Pending") => containers.iter().all(stands),
        Some("Running") => !containers.is_empty() && containers.iter().all(stands),
        _ => false,
    }
}

fn stands(container: &ContainerStatus) -> bool {
    container.state.as_ref().is_none_or(|state| state.running.is_none())
}

fn why(pod: &Pod, now: Timestamp) -> Option<String> {
    let status = pod.status.as_ref()?;
    if let Some(end) = &pod.meta().deletion_timestamp {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or("none");
        return long_ago(end, now).then(|| {
            format!(
                "Terminating: node {node} does not confirm its end, which was due at {}; if the node is gone for good, delete it or taint it with node.kubernetes.io/out-of-service",
                end.0
            )
        });
    }
    if status.phase.as_deref() == Some("Failed") {
        let reason = status.reason.as_deref().unwrap_or("Failed");
        return Some(with_words(reason, status.message.as_deref()));
    }
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let unplaced = conditions.iter().find(|c| c.type_ == "PodScheduled" && c.status == "False");
    if let Some(unplaced) = unplaced {
        let late = unplaced.last_transition_time.as_ref().is_some_and(|at| long_ago(at, now));
        let reason = unplaced.reason.as_deref().unwrap_or("Unschedulable");
        return late.then(|| with_words(reason, unplaced.message.as_deref()));
    }
    let late = status.start_time.as_ref().is_some_and(|at| long_ago(at, now));
    let all = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
    all.filter(|container| !container.ready).find_map(|container| of_container(container, late))
}

fn of_container(container: &ContainerStatus, late: bool) -> Option<String> {
    let state = container.state.clone().unwrap_or_default();
    let last = container.last_state.as_ref().and_then(|last| last.terminated.as_ref());
    match state {
        ContainerState { waiting: Some(waiting), .. } => match waiting.reason.as_deref() {
            Some("CrashLoopBackOff") => Some(match last {
                Some(last) => format!("CrashLoopBackOff, it ended with {}", ended(last)),
                None => "CrashLoopBackOff".into(),
            }),
            None | Some("ContainerCreating" | "PodInitializing") => late.then(|| {
                "ContainerCreating for long: a volume or a secret may be missing, kubectl describe pod tells which".into()
            }),
            Some(reason) => Some(with_words(reason, waiting.message.as_deref())),
        },
        ContainerState { terminated: Some(now), .. } => Some(format!("it ended with {}", ended(&now))),
        _ => last
            .filter(|last| {
                container.restart_count >= RESTARTS_MIN || last.reason.as_deref() == Some("OOMKilled")
            })
            .map(|last| format!("{} restarts, it ended with {}", container.restart_count, ended(last))),
    }
}

fn ended(end: &ContainerStateTerminated) -> String {
    let reason =
        format!("{} (exit code {})", end.reason.as_deref().unwrap_or("Error"), end.exit_code);
    // The last words of a log: its last line.
    let last = end.message.as_deref().and_then(|words| words.trim().lines().last());
    with_words(&reason, last)
}

fn with_words(reason: &str, words: Option<&str>) -> String {
    match words.map(str::trim).filter(|words| !words.is_empty()) {
        Some(words) => format!("{reason}: {}", words.chars().take(WORDS_MAX).collect::<String>()),
        None => reason.to_owned(),
    }
}

fn long_ago(time: &Time, now: Timestamp) -> bool {
    let time = u64::try_from(time.0.as_millisecond()).unwrap_or_default();
    now.since(Timestamp(time)) >= PATIENCE
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// At 1970-01-01T01:00:00Z.
    const NOW: Timestamp = Timestamp(3_600_000);

    fn pod(status: Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p-0"}, "spec": {"nodeName": "n1", "containers": []}, "status": status,
        }))
        .expect("a pod")
    }

    fn waits(reason: &str, words: &str, last: Value) -> Value {
        let waiting = json!({"reason": reason, "message": words});
        json!({"phase": "Pending", "startTime": "1970-01-01T00:59:30Z", "containerStatuses": [{
            "name": "c", "image": "i", "imageID": "", "ready": false, "restartCount": 4,
            "state": {"waiting": waiting}, "lastState": last,
        }]})
    }

    fn runs(restarts: i32, last: &str) -> Value {
        json!({"phase": "Running", "containerStatuses": [{
            "name": "c", "image": "i", "imageID": "", "ready": false, "restartCount": restarts,
            "state": {"running": {}}, "lastState": {"terminated": {"reason": last, "exitCode": 137}},
        }]})
    }

    #[test]
    fn a_pod_that_cannot_run_is_named_with_the_reason_and_the_words_of_kubernetes() {
        let unplaced = |at: &str| {
            json!({"phase": "Pending", "conditions": [{
                "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                "message": "0/3 nodes are available", "lastTransitionTime": at,
            }]})
        };
        let crashed =
            json!({"terminated": {"reason": "Error", "exitCode": 1, "message": "a\nlast words\n"}});
        for (status, expected) in [
            (
                waits("ImagePullBackOff", "Back-off pulling", json!({})),
                "ImagePullBackOff: Back-off pulling",
            ),
            (
                waits("CreateContainerConfigError", "secret \"s\" not found", json!({})),
                "secret \"s\" not found",
            ),
            (
                waits("CrashLoopBackOff", "back-off 10s", crashed),
                "CrashLoopBackOff, it ended with Error (exit code 1): last words",
            ),
            (runs(1, "OOMKilled"), "1 restarts, it ended with OOMKilled (exit code 137)"),
            (runs(3, "Error"), "3 restarts"),
            (unplaced("1970-01-01T00:58:00Z"), "Unschedulable: 0/3 nodes"),
            (
                json!({"phase": "Failed", "reason": "Evicted", "message": "low on memory"}),
                "Evicted: low on memory",
            ),
        ] {
            let said = trouble(&pod(status.clone()), NOW).unwrap_or_default();
            assert!(said.starts_with("pod p-0: ") && said.contains(expected), "{said}: {status}");
        }
        for passes in [
            unplaced("1970-01-01T00:59:30Z"),
            waits("ContainerCreating", "", json!({})),
            runs(1, "Error"),
            json!({"phase": "Pending"}),
        ] {
            assert_eq!(trouble(&pod(passes.clone()), NOW), None, "{passes}");
        }
        let mut slow = waits("ContainerCreating", "", json!({}));
        slow["startTime"] = json!("1970-01-01T00:50:00Z");
        assert!(trouble(&pod(slow), NOW).is_some_and(|said| said.contains("volume")));
    }

    #[test]
    fn a_pod_that_a_dead_node_keeps_is_told_with_its_node_once_its_grace_is_over() {
        let mut going = pod(runs(0, "Error"));
        going.metadata.deletion_timestamp =
            serde_json::from_value(json!("1970-01-01T00:59:30Z")).ok();
        assert_eq!(trouble(&going, NOW), None);
        going.metadata.deletion_timestamp =
            serde_json::from_value(json!("1970-01-01T00:50:00Z")).ok();
        let said = trouble(&going, NOW).expect("late");
        assert!(said.contains("node n1") && said.contains("out-of-service"), "{said}");
    }

    #[test]
    fn only_what_kubernetes_says_does_not_run_is_stopped() {
        assert!(stopped(&pod(waits("ImagePullBackOff", "", json!({})))));
        assert!(stopped(&pod(json!({"phase": "Pending"}))));
        assert!(stopped(&pod(json!({"phase": "Failed"}))));
        assert!(!stopped(&pod(runs(9, "Error"))));
        assert!(!stopped(&pod(json!({"phase": "Unknown"}))));
        assert!(!stopped(&pod(json!({"phase": "Running"}))), "nothing is said of its container");
        assert!(!stopped(&Pod::default()));
    }
}
