//! Objects that the operator applies, as JSON; and whether what is there still is what was applied.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::quantity;

/// On every object that we apply: a hash of the whole manifest. A field that left the manifest is noticed by it.
const HASH: &str = "geminga.io/manifest";
/// On pods: a hash of their template. A pod with another one is to be replaced.
pub(crate) const TEMPLATE: &str = "geminga.io/template";

/// A Kubernetes object to be applied.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest(Value);

/// The first 16 hexadecimal digits of a hash of the value; the order of keys does not matter.
pub(crate) fn hash(value: &Value) -> String {
    let mut hasher = Sha256::new();
    feed(&mut hasher, value);
    hasher.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// Keys sorted, lengths first: two values give the same bytes only if they are the same.
fn feed(hasher: &mut Sha256, value: &Value) {
    match value {
        Value::Object(fields) => {
            let sorted: BTreeMap<&String, &Value> = fields.iter().collect();
            hasher.update(format!("o{};", sorted.len()));
            for (key, value) in sorted {
                hasher.update(format!("{};{key}", key.len()));
                feed(hasher, value);
            }
        }
        Value::Array(items) => {
            hasher.update(format!("a{};", items.len()));
            items.iter().for_each(|item| feed(hasher, item));
        }
        plain => {
            let text = plain.to_string();
            hasher.update(format!("p{};{text}", text.len()));
        }
    }
}

impl Manifest {
    /// Takes an object and marks it with its hash.
    pub(crate) fn new(mut object: Value) -> Self {
        let hash = hash(&object);
        object["metadata"]["annotations"][HASH] = json!(hash);
        Self(object)
    }

    /// The object.
    #[must_use]
    pub fn object(&self) -> &Value {
        &self.0
    }

    fn text(&self, pointer: &str) -> &str {
        self.0.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
    }

    /// `v1` or `group/version`.
    #[must_use]
    pub fn api_version(&self) -> &str {
        self.text("/apiVersion")
    }

    /// Such as `StatefulSet`.
    #[must_use]
    pub fn kind(&self) -> &str {
        self.text("/kind")
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.text("/metadata/name")
    }

    /// Whether it has to be applied: it is not there, was applied otherwise, or somebody changed a field of it.
    #[must_use]
    pub fn differs_from(&self, live: Option<&Value>) -> bool {
        live.is_none_or(|live| !covers(live, &self.0))
    }
}

/// Whether `live` has everything that `wanted` names, with the same values.
fn covers(live: &Value, wanted: &Value) -> bool {
    match (live, wanted) {
        (Value::Object(live), Value::Object(wanted)) => wanted.iter().all(|(key, wanted)| {
            live.get(key).map_or_else(
                || is_nothing(wanted),
                |live| match key.as_str() {
                    "requests" | "limits" => are_as_much(live, wanted),
                    _ => covers(live, wanted),
                },
            )
        }),
        (Value::Array(live), Value::Array(wanted)) => {
            live.len() == wanted.len()
                && live.iter().zip(wanted).all(|(live, wanted)| covers(live, wanted))
        }
        (live, wanted) => live == wanted,
    }
}

/// As [`covers`], of quantities, which the API server stores in its own words.
fn are_as_much(live: &Value, wanted: &Value) -> bool {
    let (Value::Object(live), Value::Object(wanted)) = (live, wanted) else {
        return live == wanted;
    };
    wanted.iter().all(|(name, wanted)| match (live.get(name), wanted) {
        (Some(Value::String(live)), Value::String(wanted)) => quantity::same(live, wanted),
        _ => false,
    })
}

/// What the API server leaves out when it stores it.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

/// Removes nulls, so that optional parts can be written in place.
pub(crate) fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(fields) => Value::Object(
            fields
                .into_iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(key, value)| (key, without_nulls(value)))
                .collect::<Map<_, _>>(),
        ),
        Value::Array(items) => Value::Array(
            items.into_iter().filter(|item| !item.is_null()).map(without_nulls).collect(),
        ),
        value => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted() -> Manifest {
        Manifest::new(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "a", "labels": {"x": "1"}},
            "spec": {"ports": [{"port": 1}], "selector": {}},
        }))
    }

    #[test]
    fn an_object_that_has_more_than_we_applied_is_left_alone() {
        let mut live = wanted().object().clone();
        live["spec"]["clusterIP"] = json!("10.0.0.1");
        live["spec"]["ports"][0]["protocol"] = json!("TCP");
        live["spec"].as_object_mut().expect("an object").remove("selector");
        assert!(!wanted().differs_from(Some(&live)));
    }

    #[test]
    fn a_changed_field_a_missing_object_and_a_field_that_left_the_manifest_are_noticed() {
        let mut live = wanted().object().clone();
        live["spec"]["ports"][0]["port"] = json!(2);
        assert!(wanted().differs_from(Some(&live)), "somebody changed it");
        assert!(wanted().differs_from(None));
        let before = Manifest::new(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "a", "labels": {"x": "1", "y": "2"}},
            "spec": {"ports": [{"port": 1}], "selector": {}},
        }));
        assert!(wanted().differs_from(Some(before.object())), "label y is to go");
    }

    #[test]
    fn a_quantity_in_the_words_of_the_api_server_is_no_difference() {
        let resources = |cpu: &str, memory: &str| {
            let requests = json!({"cpu": cpu, "memory": memory});
            json!({"spec": {"containers": [{"resources": {"requests": requests, "limits": {}}}]}})
        };
        assert!(covers(&resources("500m", "1Gi"), &resources("0.5", "1024Mi")));
        assert!(covers(&resources("2", "1Gi"), &resources("2000m", "1.0Gi")));
        assert!(!covers(&resources("501m", "1Gi"), &resources("0.5", "1Gi")));
        assert!(!covers(&resources("500m", "1G"), &resources("0.5", "1Gi")));
        let mut less = resources("500m", "1Gi");
        less.pointer_mut("/spec/containers/0/resources/requests")
            .and_then(Value::as_object_mut)
            .expect("there")
            .remove("memory");
        assert!(!covers(&less, &resources("0.5", "1Gi")));
    }

    #[test]
    fn an_empty_text_that_the_api_server_left_out_is_no_difference() {
        let wanted = Manifest::new(
            json!({"metadata": {"name": "a"}, "spec": {"env": [{"name": "X", "value": ""}]}}),
        );
        let mut live = wanted.object().clone();
        live["spec"]["env"] = json!([{"name": "X"}]);
        assert!(!wanted.differs_from(Some(&live)));
    }

    #[test]
    fn the_hash_does_not_depend_on_the_order_of_keys() {
        let one: Value = serde_json::from_str(r#"{"a":1,"b":2}"#).expect("JSON");
        let two: Value = serde_json::from_str(r#"{"b":2,"a":1}"#).expect("JSON");
        assert_eq!(hash(&one), hash(&two));
        assert_ne!(hash(&one), hash(&json!({"a": 1, "b": 3})));
    }
}
