//! Retention and offload policies: of the cluster, of a namespace, of a topic. A field that a level does not set is taken
//! from the level above; above the cluster stands what is built in.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use geminga_metadata::{Compare, Key, KeyValue, Op, Revision, TXN_OPS_MAX, Txn, keys};
use geminga_proto::{
    ids::TopicId,
    names::{NamespaceName, TopicName},
    storage::v1::{NamespaceValue, Policies, TopicValue},
    v1::BacklogAction,
};
use prost::Message;

use super::{Catalog, Record, TRIES_MAX, contended, put, topics::topic_not_found};
use crate::errors::Refusal;

/// Ten years: a longer time is a mistake of units.
const TIME_MAX_MS: u64 = 10 * 366 * 24 * 3_600 * 1_000;
/// 1 EiB.
const BYTES_MAX: u64 = 1 << 60;

/// What holds where nobody set a field. One that is absent here too is no rule at all: nothing is offloaded for it, and no
/// retention is in force (which is not a retention of zero). It matters only where some level sets another field; where none
/// does, nothing is trimmed or moved ([`Catalog::set_policies_of`]).
pub const BUILT_IN: Policies = Policies {
    offload_after_ms: None,
    offload_above_bytes: None,
    delete_lag_ms: Some(DELETE_LAG_MS),
    retention_ms: None,
    retention_bytes: None,
    ttl_ms: None,
    backlog_quota_bytes: None,
    backlog_quota_ms: None,
    backlog_action: Some(BacklogAction::Reject as i32),
};

/// From an upload to the deletion on bookies (X3).
const DELETE_LAG_MS: u64 = 4 * 3_600 * 1_000;

/// Where policies are set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    Cluster,
    Namespace(NamespaceName),
    Topic(TopicName),
}

/// A field of [`Policies`].
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// As requests and answers name it.
    pub name: &'static str,
    value_max: u64,
    get: fn(&Policies) -> Option<u64>,
    set: fn(&mut Policies, Option<u64>),
}

macro_rules! fields {
    ($($name:ident <= $max:expr;)*) => {
        /// Every field.
        pub const FIELDS: &[Field] = &[
            $(Field {
                name: stringify!($name),
                value_max: $max,
                get: |policies| policies.$name,
                set: |policies, value| policies.$name = value,
            },)*
            // The one that is no number: by its number on the wire.
            Field {
                name: "backlog_action",
                value_max: BacklogAction::EvictOldest as u64,
                get: |policies| policies.backlog_action.map(|action| u64::from(action.unsigned_abs())),
                set: |policies, value| policies.backlog_action = value.and_then(|v| i32::try_from(v).ok()),
            },
        ];
    };
}

fields! {
    offload_after_ms    <= TIME_MAX_MS;
    offload_above_bytes <= BYTES_MAX;
    delete_lag_ms       <= TIME_MAX_MS;
    retention_ms        <= TIME_MAX_MS;
    retention_bytes     <= BYTES_MAX;
    ttl_ms              <= TIME_MAX_MS;
    backlog_quota_bytes <= BYTES_MAX;
    backlog_quota_ms    <= TIME_MAX_MS;
}

/// What holds at a scope.
#[derive(Clone, Debug, PartialEq)]
pub struct Effective {
    /// Set at the scope itself.
    pub own: Policies,
    /// Every field that is set at some level, or built in.
    pub policies: Policies,
    /// From which level each field comes, in the order of [`FIELDS`]: cluster, namespace, topic or default.
    pub sources: Vec<(&'static str, &'static str)>,
}

impl Scope {
    /// Empty, tenant/namespace, or tenant/namespace/topic.
    ///
    /// # Errors
    /// INVALID_NAME.
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        Ok(match text.matches('/').count() {
            0 if text.is_empty() => Self::Cluster,
            2 => Self::Topic(TopicName::parse(text)?),
            _ => Self::Namespace(NamespaceName::parse(text)?),
        })
    }
}

/// A change of policies, checked.
#[derive(Clone, Debug)]
pub struct PolicyChange {
    set: Policies,
    unset: Vec<Field>,
}

impl PolicyChange {
    /// Checks bounds and names.
    ///
    /// # Errors
    /// INVALID_REQUEST naming the field: out of bounds, unknown, both set and unset; or nothing is changed.
    pub fn new(set: Policies, unset: &[String]) -> Result<Self, Refusal> {
        let mut fields = Vec::new();
        for name in unset {
            let field = FIELDS.iter().find(|field| field.name == name);
            let field = field.ok_or_else(|| Refusal::request(format!("no policy {name:?}")))?;
            if (field.get)(&set).is_some() {
                return Err(Refusal::request(format!("{name} is both set and unset")));
            }
            fields.push(*field);
        }
        for field in FIELDS {
            let most = field.value_max;
            if let Some(value) = (field.get)(&set)
                && value > most
            {
                let message = format!("{} is {value}, at most {most} is allowed", field.name);
                return Err(Refusal::request(message).with("value_max", most));
            }
        }
        if fields.is_empty() && set == Policies::default() {
            return Err(Refusal::request("nothing is set or unset"));
        }
        Ok(Self { set, unset: fields })
    }

    fn apply(&self, own: &Policies) -> Policies {
        let mut changed = *own;
        for field in FIELDS {
            if let Some(value) = (field.get)(&self.set) {
                (field.set)(&mut changed, Some(value));
            }
        }
        self.unset.iter().for_each(|field| (field.set)(&mut changed, None));
        changed
    }
}

/// Lays levels, the nearest first, over what is below them all.
fn laid_over(
    mut policies: Policies,
    levels: &[(&'static str, Policies)],
) -> (Policies, Vec<(&'static str, &'static str)>) {
    let mut sources = Vec::new();
    for field in FIELDS {
        let found = levels.iter().find_map(|(name, own)| Some((*name, (field.get)(own)?)));
        if let Some((_, value)) = found {
            (field.set)(&mut policies, Some(value));
        }
        sources.push((field.name, found.map_or("default", |(name, _)| name)));
    }
    (policies, sources)
}

/// Topics that [`Catalog::set_policies_of`] takes at a time.
pub(crate) const TOPICS_PER_READ: usize = (TXN_OPS_MAX - 1) / 2;

impl Catalog {
    /// What the levels above each of these topics, and it itself, set: field by field the nearest one. None where nothing is
    /// set, where the topic is deleted, and where a value cannot be read: then nothing may be trimmed or moved. At most
    /// [`TOPICS_PER_READ`].
    ///
    /// All levels are read at one revision: a policy that is moved from one level to another is never missed in between.
    ///
    /// # Errors
    /// What the store answers.
    pub(crate) async fn set_policies_of(
        &self,
        topics: &[(TopicId, TopicName)],
    ) -> Result<Vec<Option<Policies>>, Refusal> {
        let namespaces: BTreeSet<&NamespaceName> =
            topics.iter().map(|(_, name)| name.namespace()).collect();
        let mut keys = vec![keys::cluster_policies()];
        keys.extend(topics.iter().map(|(id, _)| keys::topic(*id)));
        keys.extend(namespaces.iter().map(|name| keys::namespace(name)));
        let (_, found) = self.store().get_many(&keys).await?;
        let cluster = match found.first() {
            Some(Some(found)) => decode(&found.key, found.value.clone())?,
            _ => Policies::default(),
        };
        let (of_topics, of_namespaces) = found[1..].split_at(topics.len());
        let namespaces: BTreeMap<&NamespaceName, &Option<KeyValue>> =
            namespaces.into_iter().zip(of_namespaces).collect();
        let levels = |name: &TopicName, topic: &Option<KeyValue>| {
            let topic = TopicValue::decode_value(topic.as_ref()?).ok()?;
            let namespace = namespaces.get(name.namespace())?.as_ref()?;
            let namespace = NamespaceValue::decode_value(namespace).ok()?;
            let levels = [
                ("topic", topic.policies.unwrap_or_default()),
                ("namespace", namespace.policies.unwrap_or_default()),
                ("cluster", cluster),
            ];
            let set = laid_over(Policies::default(), &levels).0;
            (!topic.deleting && set != Policies::default()).then_some(set)
        };
        Ok(topics.iter().zip(of_topics).map(|((_, name), topic)| levels(name, topic)).collect())
    }

    /// What holds at a scope.
    ///
    /// # Errors
    /// NAMESPACE_NOT_FOUND, TOPIC_NOT_FOUND, TENANT_NOT_FOUND.
    pub async fn policies(&self, scope: &Scope) -> Result<Effective, Refusal> {
        let mut levels = Vec::new();
        let namespace = match scope {
            Scope::Cluster => None,
            Scope::Namespace(name) => Some(name),
            Scope::Topic(name) => {
                levels.push(("topic", self.topic(name).await?.policies.unwrap_or_default()));
                Some(name.namespace())
            }
        };
        if let Some(name) = namespace {
            let policies = self.namespace(name).await?.policies;
            levels.push(("namespace", policies.unwrap_or_default()));
        }
        let (own, _) = self.cluster_policies().await?;
        levels.push(("cluster", own));
        let (policies, sources) = laid_over(BUILT_IN, &levels);
        Ok(Effective { own: levels[0].1, policies, sources })
    }

    /// Changes the policies of a scope.
    ///
    /// # Errors
    /// As [`Self::policies`].
    pub async fn change_policies(
        &self,
        scope: &Scope,
        change: &PolicyChange,
    ) -> Result<(), Refusal> {
        for _ in 0..TRIES_MAX {
            let (key, revision, op) = match scope {
                Scope::Cluster => {
                    let (own, revision) = self.cluster_policies().await?;
                    let key = keys::cluster_policies();
                    let value = change.apply(&own).encode_to_vec();
                    (key.clone(), revision, Op::put(key, value))
                }
                Scope::Namespace(name) => {
                    self.namespace(name).await?; // gives the right refusal
                    let key = keys::namespace(name);
                    let Some((mut value, revision)) = self.get::<NamespaceValue>(&key).await?
                    else {
                        continue;
                    };
                    value.policies = Some(change.apply(&value.policies.unwrap_or_default()));
                    (key.clone(), Some(revision), put(key, &value))
                }
                Scope::Topic(name) => {
                    let key = keys::topic(self.topic(name).await?.id);
                    let Some((mut value, revision)) = self.get::<TopicValue>(&key).await? else {
                        continue;
                    };
                    if value.deleting {
                        return Err(topic_not_found(name));
                    }
                    value.policies = Some(change.apply(&value.policies.unwrap_or_default()));
                    (key.clone(), Some(revision), put(key, &value))
                }
            };
            if self.commit(&Txn::new().when(as_read(key, revision)).then(op)).await? {
                return Ok(());
            }
        }
        Err(contended("the policies"))
    }

    async fn cluster_policies(&self) -> Result<(Policies, Option<Revision>), Refusal> {
        let key = keys::cluster_policies();
        let (_, found) = self.store().get(&key).await?;
        let Some(found) = found else { return Ok((Policies::default(), None)) };
        Ok((decode(&key, found.value)?, Some(found.mod_revision)))
    }
}

fn decode(key: &Key, value: Bytes) -> Result<Policies, Refusal> {
    Policies::decode(value)
        .map_err(|error| Refusal::internal(format!("{key} cannot be read: {error}")))
}

fn as_read(key: Key, revision: Option<Revision>) -> Compare {
    match revision {
        Some(revision) => Compare::ModRevision(key, revision),
        None => Compare::Absent(key),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retention(ms: u64) -> Policies {
        Policies { retention_ms: Some(ms), ..Policies::default() }
    }

    #[test]
    fn the_nearest_level_decides_field_by_field() {
        let topic = Policies { retention_ms: Some(1), ..Policies::default() };
        let cluster =
            Policies { retention_ms: Some(2), retention_bytes: Some(3), ..Policies::default() };
        let levels = [("topic", topic), ("namespace", Policies::default()), ("cluster", cluster)];
        let (policies, sources) = laid_over(BUILT_IN, &levels);
        assert_eq!((policies.retention_ms, policies.retention_bytes), (Some(1), Some(3)));
        assert_eq!(policies.delete_lag_ms, BUILT_IN.delete_lag_ms);
        assert!(sources.contains(&("retention_ms", "topic")));
        assert!(sources.contains(&("retention_bytes", "cluster")));
        assert!(sources.contains(&("delete_lag_ms", "default")));
        assert!(sources.contains(&("offload_after_ms", "default")));
        assert_eq!(policies.offload_after_ms, None, "no such rule");
        let nothing = [("cluster", Policies::default())];
        assert_eq!(laid_over(BUILT_IN, &nothing).0, BUILT_IN);
    }

    #[test]
    fn a_change_sets_and_unsets_what_it_names_and_keeps_the_rest() {
        let own = Policies { retention_bytes: Some(7), ..retention(5) };
        let set = PolicyChange::new(retention(6), &["retention_bytes".into()]).expect("valid");
        assert_eq!(set.apply(&own), retention(6));
        for (set, unset) in [
            (retention(TIME_MAX_MS + 1), None),
            (retention(1), Some("retention_ms")),
            (Policies::default(), Some("colour")),
            (Policies::default(), None),
        ] {
            let unset: Vec<String> = unset.into_iter().map(Into::into).collect();
            PolicyChange::new(set, &unset).expect_err("refused");
        }
    }
}
