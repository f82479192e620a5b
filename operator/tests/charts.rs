//! The charts, as far as they can be read without helm: rights, values and their schemas.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use geminga_operator::crd::definitions;
use serde_json::{Map, Value, json};

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
    let ours = |kind: &str, more: &str| format!("geminga.io/{kind}: get list {more}watch");
    let status = |kind: &str| format!("geminga.io/{kind}/status: patch");
    let mut expected = vec![
        "/persistentvolumeclaims: delete list patch watch".to_owned(),
        "/pods: delete list watch".to_owned(),
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
        for (file, text) in templates(&format!("{name}/templates")) {
            for used in text.split(".Values.").skip(1) {
                let word = |c: char| c.is_ascii_alphanumeric() || c == '.';
                let used: String = used.chars().take_while(|c| word(*c)).collect();
                let pointer = format!("/{}", used.trim_end_matches('.').replace('.', "/"));
                assert!(values.pointer(&pointer).is_some(), "{file}: {used}");
            }
        }
    }
}

/// The schema of a kind's spec.
fn spec_of(kind: &str) -> Value {
    let crd = definitions().into_iter().find(|crd| crd.spec.names.kind == kind).expect("a kind");
    let schema = crd.spec.versions[0].schema.as_ref().expect("a schema");
    json!(schema)["openAPIV3Schema"]["properties"]["spec"].clone()
}

/// A part of a definition as a schema of values: what the API server would say of a field, helm says before. Nothing is required
/// (a preset may have it), and nothing else is allowed.
fn of_values(schema: &Value) -> Value {
    const KEPT: &[&str] = &[
        "description",
        "type",
        "enum",
        "pattern",
        "minLength",
        "maxLength",
        "minimum",
        "maximum",
        "minItems",
        "maxItems",
        "items",
        "properties",
        "additionalProperties",
    ];
    let mut kept = Map::new();
    for (key, value) in schema.as_object().expect("a schema") {
        let value = match key.as_str() {
            key if !KEPT.contains(&key) => continue,
            "items" | "additionalProperties" => of_values(value),
            "properties" => {
                let fields = value.as_object().expect("properties").iter();
                fields.map(|(name, field)| (name.clone(), of_values(field))).collect()
            }
            "minimum" | "maximum" => json!(value.as_f64().expect("a number") as i64),
            _ => value.clone(),
        };
        kept.insert(key.clone(), value);
    }
    if kept.contains_key("properties") {
        kept.insert("additionalProperties".into(), json!(false));
    }
    Value::Object(kept)
}

#[test]
fn fields_of_the_kinds_are_in_the_values_schema_as_their_definitions_have_them() {
    let file = "geminga-cluster/values.schema.json";
    let found: Value = serde_json::from_str(&chart(file)).expect("JSON");
    let mut expected = found.clone();
    let values = &mut expected["properties"];
    let cluster = spec_of("GemingaCluster");
    for part in ["brokers", "ledgers", "service", "tiering", "policies"] {
        values[part] = of_values(&cluster["properties"][part]);
    }
    values["tiering"]["dependencies"] = json!({"credentialsSecret": ["url"]});
    let mut pool = of_values(&spec_of("BookiePool"));
    pool["properties"].as_object_mut().expect("fields").remove("cluster"); // it is the release's
    values["pools"]["additionalProperties"] = pool;
    if std::env::var_os("UPDATE_DOCS").is_some() {
        let text = serde_json::to_string_pretty(&expected).expect("JSON");
        let path = format!("{}/../charts/{file}", env!("CARGO_MANIFEST_DIR"));
        fs::write(path, format!("{text}\n")).expect("written");
    } else {
        let again = "UPDATE_DOCS=1 cargo test --workspace --test charts";
        assert!(found == expected, "{file} does not follow operator/src/crd: {again}");
    }
}

#[test]
fn every_value_says_what_it_is_and_no_object_takes_what_it_does_not_know() {
    for name in ["geminga-operator", "geminga-cluster"] {
        let schema: Value =
            serde_json::from_str(&chart(&format!("{name}/values.schema.json"))).expect("JSON");
        described(&schema, name);
        // A comment stands above every value but those of `resources`, which are Kubernetes' own.
        let text = chart(&format!("{name}/values.yaml"));
        let mut before = "";
        let mut own = usize::MAX;
        for line in text.lines().filter(|line| !line.is_empty()) {
            let depth = line.len() - line.trim_start().len();
            if depth <= own {
                own = if line.trim() == "resources:" { depth } else { usize::MAX };
                let comment = line.trim().starts_with('#');
                let said = before.trim().starts_with('#');
                assert!(comment || said, "{name}/values.yaml says nothing of: {line}");
            }
            before = line;
        }
    }
}

/// Objects of Kubernetes whose fields are not ours to know.
const OPEN: &[&str] = &["global", "podSelector", "namespaceSelector", "ipBlock"];

fn described(schema: &Value, path: &str) {
    assert!(schema["description"].is_string(), "{path} has no description: {schema}");
    let name = path.rsplit('.').next().unwrap_or_default();
    if schema["type"] == "object" && !OPEN.contains(&name) {
        let more = &schema["additionalProperties"];
        assert!(*more == false || more.is_object(), "{path} takes anything");
        if more.is_object() && more["type"] == "object" {
            described(more, &format!("{path}.*"));
        }
    }
    if schema["items"]["type"] == "object" {
        described(&schema["items"], &format!("{path}[]"));
    }
    for (field, property) in schema["properties"].as_object().into_iter().flatten() {
        described(property, &format!("{path}.{field}"));
    }
}

#[test]
fn no_chart_has_a_job_and_every_container_is_restricted() {
    let rules = [
        "runAsNonRoot: true",
        "readOnlyRootFilesystem: true",
        "allowPrivilegeEscalation: false",
        "capabilities: {drop: [ALL]}",
        "seccompProfile: {type: RuntimeDefault}",
    ];
    for file in
        ["geminga-operator/templates/deployment.yaml", "geminga-cluster/templates/_helpers.tpl"]
    {
        for rule in rules {
            assert!(chart(file).contains(rule), "{file}: {rule}");
        }
    }
    for name in ["geminga-operator", "geminga-cluster"] {
        for (file, text) in templates(&format!("{name}/templates")) {
            assert!(
                !text.contains("kind: Job"),
                "{file}: what an init Job does hangs or is done twice"
            );
        }
    }
    // `cargo kube` asks a real API server whether it admits them; this is for files that nobody renders there.
    for file in ["etcd.yaml", "tests/check.yaml"] {
        let text = chart(&format!("geminga-cluster/templates/{file}"));
        for rule in [
            "cluster.podSecurity",
            "cluster.containerSecurity",
            "automountServiceAccountToken: false",
        ] {
            assert!(text.contains(rule), "{file}: {rule}");
        }
    }
}

/// Every file below a directory of the charts, with its text.
fn templates(directory: &str) -> Vec<(String, String)> {
    let mut all = Vec::new();
    let path = format!("{}/../charts/{directory}", env!("CARGO_MANIFEST_DIR"));
    for entry in fs::read_dir(path).expect("templates") {
        let entry = entry.expect("an entry");
        let file = format!("{directory}/{}", entry.file_name().to_string_lossy());
        if entry.path().is_dir() {
            all.extend(templates(&file));
        } else {
            let text = chart(&file);
            all.push((file, text));
        }
    }
    all
}
