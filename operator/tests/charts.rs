//! The charts, as far as they can be read without helm: rights, values and their schemas.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use serde_json::Value;

fn chart(path: &str) -> String {
    let path = format!("{}/../charts/{path}", env!("CARGO_MANIFEST_DIR"));
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The words of `key: [a, b]`, or of the list below `key:`.
fn words(lines: &[&str], at: usize, key: &str) -> Option<Vec<String>> {
    let line = lines[at].trim().trim_start_matches("- ");
    let rest = line.strip_prefix(key)?.strip_prefix(':')?.trim();
    let clean = |word: &str| word.trim().trim_matches('"').to_owned();
    if let Some(inline) = rest.strip_prefix('[') {
        return Some(inline.trim_end_matches(']').split(',').map(clean).collect());
    }
    let below = lines[at + 1..].iter().map(|line| line.trim());
    Some(below.map_while(|line| line.strip_prefix("- ")).map(clean).collect())
}

#[test]
fn the_operator_has_these_rights_and_no_others() {
    let text = chart("geminga-operator/templates/rbac.yaml");
    let lines: Vec<&str> = text.lines().collect();
    let mut rights: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let (mut groups, mut resources) = (Vec::new(), Vec::new());
    for at in 0..lines.len() {
        if let Some(found) = words(&lines, at, "apiGroups") {
            groups = found;
        }
        if let Some(found) = words(&lines, at, "resources") {
            resources = found;
        }
        for verb in words(&lines, at, "verbs").into_iter().flatten() {
            for resource in &resources {
                let resource = format!("{}/{resource}", groups.join(","));
                rights.entry(resource).or_default().insert(verb.clone());
            }
        }
    }
    let mut shown: Vec<String> = Vec::new();
    for (resource, verbs) in &rights {
        let verbs: Vec<&str> = verbs.iter().map(String::as_str).collect();
        shown.push(format!("{resource}: {}", verbs.join(" ")));
    }
    let reads = "get list watch";
    let ours = |kind: &str, more: &str| format!("geminga.io/{kind}: get list {more}watch");
    let status = |kind: &str| format!("geminga.io/{kind}/status: patch");
    let mut expected = vec![
        "/persistentvolumeclaims: delete get list patch watch".to_owned(),
        format!("/pods: delete {reads}"),
        "/services: create get list patch watch".to_owned(),
        "apps/deployments: create get list patch watch".to_owned(),
        "apps/statefulsets: create delete get list patch watch".to_owned(),
        "coordination.k8s.io/leases: create get update".to_owned(),
        "events.k8s.io/events: create patch".to_owned(),
        "policy/poddisruptionbudgets: create get list patch watch".to_owned(),
        "geminga.io/bookiepools/finalizers: update".to_owned(),
        "geminga.io/gemingaclusters/finalizers: update".to_owned(),
    ];
    // Of the kinds that describe Kubernetes objects it changes the status alone.
    for kind in ["bookiepools", "gemingaclusters", "gemingaconnections"] {
        expected.extend([ours(kind, ""), status(kind)]);
    }
    for kind in ["subscriptions", "tenants", "topicnamespaces", "topics"] {
        expected.extend([ours(kind, "patch "), status(kind)]);
    }
    expected.sort();
    shown.sort();
    assert_eq!(shown, expected);
}

#[test]
fn every_value_is_in_its_schema_and_every_template_uses_known_values() {
    for name in ["geminga-operator", "geminga-cluster"] {
        let values: Value =
            serde_saphyr::from_str(&chart(&format!("{name}/values.yaml"))).expect("YAML");
        let schema: Value =
            serde_json::from_str(&chart(&format!("{name}/values.schema.json"))).expect("JSON");
        assert_eq!(schema["additionalProperties"], false, "{name}: a misspelt value is refused");
        for key in values.as_object().expect("values").keys() {
            assert!(schema["properties"][key].is_object(), "{name}: {key}");
        }
        let directory = format!("{}/../charts/{name}/templates", env!("CARGO_MANIFEST_DIR"));
        for entry in fs::read_dir(directory).expect("templates") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                continue;
            }
            let text = fs::read_to_string(&path).expect("text");
            for used in text.split(".Values.").skip(1) {
                let word = |c: char| c.is_ascii_alphanumeric() || c == '.';
                let used: String = used.chars().take_while(|c| word(*c)).collect();
                let pointer = format!("/{}", used.trim_end_matches('.').replace('.', "/"));
                assert!(values.pointer(&pointer).is_some(), "{}: {used}", path.display());
            }
        }
    }
}

#[test]
fn no_chart_has_a_job_and_every_container_is_restricted() {
    let text = chart("geminga-operator/templates/deployment.yaml");
    for rule in [
        "runAsNonRoot: true",
        "readOnlyRootFilesystem: true",
        "allowPrivilegeEscalation: false",
        "capabilities: {drop: [ALL]}",
        "seccompProfile: {type: RuntimeDefault}",
    ] {
        assert!(text.contains(rule), "{rule}");
    }
    for file in [
        "geminga-operator/templates/rbac.yaml",
        "geminga-operator/templates/deployment.yaml",
        "geminga-cluster/templates/cluster.yaml",
    ] {
        assert!(!chart(file).contains("kind: Job"), "{file}");
    }
}
