//! The definitions in the chart are those of the Rust types. `cargo crds` writes them.

use std::{fs, path::PathBuf};

use geminga_operator::crd::definitions;

const HEAD: &str = "\
{{- /* Made by `cargo crds` from operator/src/crd. Do not edit. */}}
{{- if .Values.crds.install }}
";
const TAIL: &str = "{{- end }}\n";

/// File name and text of every definition, as a template that `helm upgrade` applies and `helm uninstall` leaves.
fn templates() -> Vec<(String, String)> {
    definitions()
        .into_iter()
        .map(|mut crd| {
            let file = format!("{}.yaml", crd.spec.names.plural);
            let annotations = crd.metadata.annotations.get_or_insert_default();
            annotations.insert("helm.sh/resource-policy".into(), "keep".into());
            let yaml = serde_saphyr::to_string(&crd).expect("a definition is YAML");
            assert!(!yaml.contains("{{"), "{file}: nothing that helm would take for a template");
            (file, format!("{HEAD}{yaml}{TAIL}"))
        })
        .collect()
}

fn directory() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/geminga-operator/templates/crds"))
}

#[test]
fn the_definitions_in_the_chart_are_those_of_the_types() {
    let mut there: Vec<String> = fs::read_dir(directory())
        .expect("run: cargo crds")
        .map(|entry| entry.expect("read").file_name().to_string_lossy().into_owned())
        .collect();
    there.sort();
    let mut made: Vec<String> = Vec::new();
    for (file, text) in templates() {
        let found = fs::read_to_string(directory().join(&file)).unwrap_or_default();
        assert!(found == text, "{file} differs: run cargo crds");
        made.push(file);
    }
    made.sort();
    assert_eq!(there, made, "no other definitions lie there");
}

#[test]
fn every_field_has_a_description_and_every_kind_its_short_name_columns_and_status() {
    for crd in definitions() {
        let name = crd.spec.names.kind;
        assert!(crd.spec.names.short_names.is_some_and(|names| names.len() == 1), "{name}");
        let version = &crd.spec.versions[0];
        assert!(
            version.additional_printer_columns.as_ref().is_some_and(|c| c.len() >= 3),
            "{name}"
        );
        assert!(version.subresources.as_ref().is_some_and(|s| s.status.is_some()), "{name}");
        let scales = version.subresources.as_ref().is_some_and(|s| s.scale.is_some());
        assert_eq!(scales, matches!(name.as_str(), "GemingaCluster" | "BookiePool"), "{name}");
        let schema = version.schema.as_ref().and_then(|s| s.open_api_v3_schema.as_ref());
        let schema = serde_json::to_value(schema).expect("JSON");
        described(&schema, &name);
        for part in ["spec", "status"] {
            assert!(schema["properties"][part]["properties"].is_object(), "{name}.{part}");
        }
    }
}

fn described(schema: &serde_json::Value, path: &str) {
    for (field, property) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{field}");
        let top = path.matches('.').count() == 1;
        let words = property["description"].as_str().unwrap_or_default();
        assert!(top || words.len() > 4, "{path} has no description: {property}");
        let format = property["format"].as_str().unwrap_or_default();
        let known = ["", "int32", "int64", "date-time"].contains(&format);
        assert!(known, "{path}: kubectl warns of the unknown format {format}");
        described(property, &path);
        described(&property["items"], &path);
        described(&property["additionalProperties"], &path);
    }
}

/// `cargo crds`
#[test]
#[ignore = "writes files: cargo crds"]
fn write_the_definitions() {
    let directory = directory();
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory).expect("made");
    for (file, text) in templates() {
        fs::write(directory.join(file), text).expect("written");
    }
}
