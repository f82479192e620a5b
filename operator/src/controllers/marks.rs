//! What an object says of itself, beside its spec.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;

use crate::crd::{DRY_RUN, FINALIZER, PAUSED};

/// Generation, deletion, finalizer, annotations.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Marks {
    /// The generation of its spec.
    pub generation: i64,
    /// When its deletion was asked for.
    pub deleting_since_ms: Option<u64>,
    /// Whether it carries our finalizer.
    pub finalizer: bool,
    /// geminga.io/paused
    pub paused: bool,
    /// geminga.io/dry-run
    pub dry_run: bool,
}

impl Marks {
    /// Of this object.
    #[must_use]
    pub fn of(meta: &ObjectMeta) -> Self {
        let says = |name: &str| {
            meta.annotations
                .as_ref()
                .and_then(|annotations| annotations.get(name))
                .is_some_and(|value| value == "true")
        };
        let deleting = meta.deletion_timestamp.as_ref();
        Self {
            generation: meta.generation.unwrap_or_default(),
            deleting_since_ms: deleting
                .map(|time| u64::try_from(time.0.as_millisecond()).unwrap_or_default()),
            finalizer: meta.finalizers.iter().flatten().any(|name| name == FINALIZER),
            paused: says(PAUSED),
            dry_run: says(DRY_RUN),
        }
    }
}
