//! Policies: the fields of the contract's table under their camel-case names, with its bounds.

use std::collections::BTreeMap;

use geminga_proto::{
    policies::{FIELDS, Field},
    v1::Policies,
};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What happens when more waits for the slowest subscription than the backlog quota allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum BacklogActionSpec {
    /// Batches are refused.
    Reject,
    /// Batches are answered late: when there is room again, or after ten seconds with a refusal.
    Hold,
    /// The slowest subscriptions lose the oldest messages.
    EvictOldest,
}

/// Retention, offload, quotas and rates. A field that is absent is taken from the level above: topic, namespace, tenant,
/// cluster, built in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicySpec {
    /// Closed ledgers older than this are offloaded to object storage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 316_224_000_000_i64))]
    pub offload_after_ms: Option<i64>,
    /// Closed ledgers are offloaded, oldest first, while more bytes than this lie on bookies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_152_921_504_606_846_976_i64))]
    pub offload_above_bytes: Option<i64>,
    /// Time from an upload to the deletion of the ledger on bookies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 316_224_000_000_i64))]
    pub delete_lag_ms: Option<i64>,
    /// Messages that every subscription has settled are kept this long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 316_224_000_000_i64))]
    pub retention_ms: Option<i64>,
    /// Messages that every subscription has settled are kept up to so many bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_152_921_504_606_846_976_i64))]
    pub retention_bytes: Option<i64>,
    /// Messages older than this count as settled for every subscription.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 316_224_000_000_i64))]
    pub ttl_ms: Option<i64>,
    /// What may wait for the slowest subscription of a segment, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_152_921_504_606_846_976_i64))]
    pub backlog_quota_bytes: Option<i64>,
    /// What may wait for the slowest subscription of a segment, by the age of the oldest message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 316_224_000_000_i64))]
    pub backlog_quota_ms: Option<i64>,
    /// What happens when a backlog quota is used up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backlog_action: Option<BacklogActionSpec>,
    /// Messages a second that may be published to a topic; 0: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000_000_000_i64))]
    pub publish_messages_per_s: Option<i64>,
    /// Payload bytes a second that may be published to a topic; 0: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_152_921_504_606_846_976_i64))]
    pub publish_bytes_per_s: Option<i64>,
    /// Messages a second that each subscription of a topic gets; 0: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000_000_000_i64))]
    pub deliver_messages_per_s: Option<i64>,
    /// Payload bytes a second that each subscription of a topic gets; 0: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_152_921_504_606_846_976_i64))]
    pub deliver_bytes_per_s: Option<i64>,
    /// Producers of a segment at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000_000_000_i64))]
    pub producers_max: Option<i64>,
    /// Consumers of a subscription on a segment at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000_000_000_i64))]
    pub consumers_max: Option<i64>,
    /// Subscriptions of a topic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000_000_000_i64))]
    pub subscriptions_max: Option<i64>,
    /// Topics of each namespace; not a policy of a topic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000_000_000_i64))]
    pub topics_max: Option<i64>,
    /// A segment is compacted when so many bytes were published behind its horizon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_152_921_504_606_846_976_i64))]
    pub compact_after_bytes: Option<i64>,
}

/// Policies by their names on the wire.
pub type PolicyValues = BTreeMap<String, u64>;

impl PolicySpec {
    /// The fields that are set, by their names on the wire.
    #[must_use]
    pub fn values(&self) -> PolicyValues {
        let Ok(Value::Object(fields)) = serde_json::to_value(self) else {
            return PolicyValues::new();
        };
        fields
            .into_iter()
            .filter_map(|(name, value)| Some((snake_case(&name), number(&value)?)))
            .collect()
    }
}

fn number(value: &Value) -> Option<u64> {
    match value.as_str() {
        Some("Reject") => Some(1),
        Some("Hold") => Some(2),
        Some("EvictOldest") => Some(3),
        _ => value.as_u64(),
    }
}

fn snake_case(name: &str) -> String {
    let mut snake = String::with_capacity(name.len() + 4);
    for letter in name.chars() {
        if letter.is_ascii_uppercase() {
            snake.push('_');
        }
        snake.push(letter.to_ascii_lowercase());
    }
    snake
}

/// What a level has set for itself.
pub(crate) fn own_values(policies: &Policies) -> PolicyValues {
    FIELDS
        .iter()
        .filter_map(|field| Some((field.name.to_owned(), (field.get)(policies)?)))
        .collect()
}

/// As a request carries them. A name that the contract does not have is left out.
pub(crate) fn on_the_wire(values: &PolicyValues) -> Policies {
    let mut policies = Policies::default();
    for Field { name, set, .. } in FIELDS {
        if let Some(value) = values.get(*name) {
            set(&mut policies, Some(*value));
        }
    }
    policies
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn camel_case(name: &str) -> String {
        let mut words = name.split('_');
        let mut camel = words.next().unwrap_or_default().to_owned();
        for word in words {
            camel.extend(word.chars().next().map(|c| c.to_ascii_uppercase()));
            camel.push_str(word.get(1..).unwrap_or_default());
        }
        camel
    }

    #[test]
    fn the_spec_has_every_policy_of_the_contract_and_no_other() {
        let mut spec = serde_json::Map::new();
        for (n, field) in (1..).zip(FIELDS) {
            let value =
                if field.name == "backlog_action" { json!("EvictOldest") } else { json!(n) };
            spec.insert(camel_case(field.name), value);
        }
        let spec: PolicySpec = serde_json::from_value(Value::Object(spec)).expect("known fields");
        let values = spec.values();
        assert_eq!(values.len(), FIELDS.len());
        assert_eq!(values.get("backlog_action"), Some(&3));
        assert_eq!(own_values(&on_the_wire(&values)), values, "nothing is lost on the wire");
    }

    #[test]
    fn the_bounds_are_those_of_the_contract() {
        let schema = serde_json::to_value(schemars::schema_for!(PolicySpec)).expect("a schema");
        for field in FIELDS.iter().filter(|field| field.name != "backlog_action") {
            let property = &schema["properties"][camel_case(field.name)];
            assert_eq!(property["maximum"].as_f64(), Some(field.value_max as f64), "{property}");
            assert_eq!(property["minimum"].as_f64(), Some(0.0), "{}", field.name);
        }
        assert_eq!(schema["properties"].as_object().map(serde_json::Map::len), Some(FIELDS.len()));
    }

    #[test]
    fn an_absent_field_is_not_a_zero() {
        let spec = PolicySpec { retention_ms: Some(0), ..PolicySpec::default() };
        assert_eq!(spec.values(), PolicyValues::from([("retention_ms".to_owned(), 0)]));
        assert!(PolicySpec::default().values().is_empty());
    }
}
