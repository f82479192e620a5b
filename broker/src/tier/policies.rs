//! The one who tells segments their policies: after each load, after each change of a level, and now and then in any case.
//!
//! Watches are hints (MD2): they say whose policy is to be read again. What a segment is told was read from the store, all its
//! levels at one revision. What cannot be read leaves the policy as it is, and is read again soon.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use geminga_managed_ledger::{BacklogAction, TierPolicy};
use geminga_metadata::{
    Change, Key, KeyValue, Revision, SharedStore,
    keys::{self, ParsedKey},
};
use geminga_proto::{
    ids::{Epoch, SegmentId, TopicId},
    names::{NamespaceName, TenantName, TopicName},
    v1::{self as pb, Policies},
};
use geminga_runtime::tasks::Tasks;
use parking_lot::Mutex;
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};

use crate::{
    catalog::{BUILT_IN, SetPolicies, TOPICS_PER_READ},
    context::Shared,
    errors::Refusal,
    limits::limits_of,
    mirror::{self, Seen},
    ownership::Segment,
};

/// Every policy is read again this often, whatever the watches say.
const REREAD: Duration = Duration::from_secs(30);
/// Pause between two rounds: many changes make one.
const PAUSE: Duration = Duration::from_millis(200);
/// Pause after a round in which something was not read.
const RETRY: Duration = Duration::from_secs(1);
/// Time for one read of the store.
const READ_DEADLINE: Duration = Duration::from_secs(10);

/// When the levels above the topics were last changed, as last seen. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Levels {
    seen: Arc<Mutex<SeenLevels>>,
    version: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct SeenLevels {
    cluster: Option<Revision>,
    tenants: BTreeMap<TenantName, Revision>,
    namespaces: BTreeMap<NamespaceName, Revision>,
}

impl Levels {
    pub(super) fn start(store: &SharedStore, tasks: &Tasks) -> Self {
        let this = Self { seen: Arc::default(), version: watch::Sender::new(0) };
        let watched = [
            ("tenant watch", keys::tenants()),
            ("namespace watch", keys::namespaces()),
            ("cluster policy watch", keys::cluster_policies()),
        ];
        for (name, prefix) in watched {
            let (range, that) = (prefix.clone(), this.clone());
            let apply = move |seen: Seen<'_>| that.apply(&range, seen);
            tasks.spawn(name, mirror::follow(store.clone(), prefix, apply));
        }
        this
    }

    fn apply(&self, prefix: &Key, seen: Seen<'_>) {
        let mut levels = self.seen.lock();
        match seen {
            Seen::All(all, _) => {
                if *prefix == keys::namespaces() {
                    levels.namespaces.clear();
                } else if *prefix == keys::tenants() {
                    levels.tenants.clear();
                } else {
                    levels.cluster = None;
                }
                all.iter().for_each(|item| levels.put(item));
            }
            Seen::Changes(changes) => {
                for change in changes {
                    match change {
                        Change::Put(item) => levels.put(item),
                        Change::Deleted { key, .. } => levels.delete(key),
                    }
                }
            }
        }
        drop(levels);
        self.version.send_modify(|version| *version += 1);
    }
}

impl SeenLevels {
    fn put(&mut self, item: &KeyValue) {
        match keys::parse(&item.key) {
            Some(ParsedKey::Namespace(name)) => {
                self.namespaces.insert(name, item.mod_revision);
            }
            Some(ParsedKey::Tenant(name)) => {
                self.tenants.insert(name, item.mod_revision);
            }
            _ if item.key == keys::cluster_policies() => self.cluster = Some(item.mod_revision),
            _ => {}
        }
    }

    fn delete(&mut self, key: &Key) {
        match keys::parse(key) {
            Some(ParsedKey::Namespace(name)) => drop(self.namespaces.remove(&name)),
            Some(ParsedKey::Tenant(name)) => drop(self.tenants.remove(&name)),
            _ if *key == keys::cluster_policies() => self.cluster = None,
            _ => {}
        }
    }
}

/// When cluster, tenant, namespace and topic were last changed, as last seen: another hint means another read.
type Hint = [Option<Revision>; 4];

/// Tells segments their policies until it is dropped.
pub(super) async fn keep(shared: Shared, levels: Levels) {
    let (mut topics, mut loads) = (shared.hub.version(), shared.ownership.loads());
    let mut above = levels.version.subscribe();
    let mut keeper = Keeper { shared, levels, told: BTreeMap::new() };
    let mut reread_at = Instant::now() + REREAD;
    loop {
        topics.borrow_and_update();
        loads.borrow_and_update();
        above.borrow_and_update();
        let all = Instant::now() >= reread_at;
        if all {
            reread_at = Instant::now() + REREAD;
        }
        let done = keeper.round(all).await;
        sleep(if done { PAUSE } else { RETRY }).await;
        if done {
            tokio::select! {
                Ok(()) = topics.changed() => {}
                Ok(()) = loads.changed() => {}
                Ok(()) = above.changed() => {}
                () = sleep_until(reread_at) => {}
            }
        }
    }
}

struct Keeper {
    shared: Shared,
    levels: Levels,
    /// Segments that know their policy, and the hint that stood before it was read.
    told: BTreeMap<(SegmentId, Epoch), Hint>,
}

impl Keeper {
    /// Tells those whose policy may have changed, or all. False: something was not read, and waits.
    async fn round(&mut self, all: bool) -> bool {
        let served = self.shared.ownership.served();
        let mut stand = BTreeMap::new();
        let mut due: BTreeMap<TopicId, Vec<(Arc<Segment>, Hint)>> = BTreeMap::new();
        for segment in served {
            let (key, hint) = ((segment.id(), segment.epoch()), self.hint(&segment));
            match self.told.get(&key) {
                Some(told) if *told == hint && !all => drop(stand.insert(key, hint)),
                _ => due.entry(segment.id().topic).or_default().push((segment, hint)),
            }
        }
        self.told = stand;
        let due: Vec<_> = due.into_values().collect();
        let mut done = true;
        for topics in due.chunks(TOPICS_PER_READ) {
            match self.read(topics).await {
                Ok(policies) => {
                    for (segments, set) in topics.iter().zip(policies) {
                        for (segment, hint) in segments {
                            tell(segment, set.as_ref());
                            self.told.insert((segment.id(), segment.epoch()), *hint);
                        }
                    }
                }
                Err(refusal) => {
                    tracing::debug!(%refusal, "policies not read; they are tried again");
                    done = false;
                }
            }
        }
        done
    }

    fn hint(&self, segment: &Segment) -> Hint {
        let levels = self.levels.seen.lock();
        let name = segment.topic().namespace();
        let namespace = levels.namespaces.get(name).copied();
        let tenant = levels.tenants.get(name.tenant()).copied();
        [levels.cluster, tenant, namespace, self.shared.hub.revision(segment.id().topic)]
    }

    async fn read(
        &self,
        topics: &[Vec<(Arc<Segment>, Hint)>],
    ) -> Result<Vec<Option<SetPolicies>>, Refusal> {
        let first = |segments: &Vec<(Arc<Segment>, Hint)>| {
            let (segment, _) = segments.first()?;
            Some((segment.id().topic, segment.topic().clone()))
        };
        let names: Vec<(TopicId, TopicName)> = topics.iter().filter_map(first).collect();
        let reading = self.shared.catalog.set_policies_of(&names);
        let late = |_| {
            Refusal::new(
                geminga_proto::reason::Reason::MetadataUnavailable,
                "the metadata store did not answer in time",
            )
        };
        timeout(READ_DEADLINE, reading).await.map_err(late)?
    }
}

/// Only somebody's decision lets anything be trimmed or moved: without one the segment has no policy at all. Limits stay as they
/// were where nothing could be read.
fn tell(segment: &Segment, set: Option<&SetPolicies>) {
    if let Some(set) = set {
        segment.set_limits(limits_of(set));
    }
    let policy = set.and_then(|set| tier_policy(&set.policies));
    if segment.ledger().policy() == policy {
        return;
    }
    tracing::info!(
        topic = %segment.topic(),
        segment = segment.id().segment,
        ?policy,
        "tier policy changed"
    );
    match policy {
        Some(policy) => segment.ledger().set_policy(policy),
        None => segment.ledger().clear_policy(),
    }
}

/// What is set, over what is built in. An absent retention is no retention, not one of zero: a topic without subscriptions
/// keeps everything under the one, and nothing under the other. None where nothing is said of keeping: limits of rates and
/// counts let nothing go.
fn tier_policy(set: &Policies) -> Option<TierPolicy> {
    let limits = Policies {
        publish_messages_per_s: set.publish_messages_per_s,
        publish_bytes_per_s: set.publish_bytes_per_s,
        deliver_messages_per_s: set.deliver_messages_per_s,
        deliver_bytes_per_s: set.deliver_bytes_per_s,
        producers_max: set.producers_max,
        consumers_max: set.consumers_max,
        subscriptions_max: set.subscriptions_max,
        topics_max: set.topics_max,
        ..Policies::default()
    };
    if *set == limits {
        return None;
    }
    let built_in = TierPolicy::default();
    Some(TierPolicy {
        offload_after: set
            .offload_after_ms
            .or(BUILT_IN.offload_after_ms)
            .map(Duration::from_millis),
        offload_above_bytes: set.offload_above_bytes.or(BUILT_IN.offload_above_bytes),
        delete_lag: set
            .delete_lag_ms
            .or(BUILT_IN.delete_lag_ms)
            .map_or(built_in.delete_lag, Duration::from_millis),
        retention_ms: set.retention_ms.or(BUILT_IN.retention_ms),
        retention_bytes: set.retention_bytes.or(BUILT_IN.retention_bytes),
        ttl_ms: set.ttl_ms.or(BUILT_IN.ttl_ms),
        backlog_quota_bytes: set.backlog_quota_bytes.or(BUILT_IN.backlog_quota_bytes),
        backlog_quota_ms: set.backlog_quota_ms.or(BUILT_IN.backlog_quota_ms),
        backlog_action: match set.backlog_action() {
            pb::BacklogAction::Unspecified | pb::BacklogAction::Reject => BacklogAction::Reject,
            pb::BacklogAction::Hold => BacklogAction::Hold,
            pb::BacklogAction::EvictOldest => BacklogAction::EvictOldest,
        },
        compact_after_bytes: set.compact_after_bytes.or(BUILT_IN.compact_after_bytes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_set_is_the_default_of_the_managed_ledger_and_zero_is_not_absent() {
        assert_eq!(tier_policy(&Policies::default()), None);
        let limits = Policies {
            producers_max: Some(3),
            deliver_bytes_per_s: Some(0),
            ..Policies::default()
        };
        assert_eq!(tier_policy(&limits), None, "a limit lets nothing be trimmed");
        let empty = Policies { delete_lag_ms: BUILT_IN.delete_lag_ms, ..limits };
        assert_eq!(tier_policy(&empty), Some(TierPolicy::default()));
        let set = Policies {
            offload_after_ms: Some(5),
            delete_lag_ms: Some(6),
            retention_bytes: Some(0),
            ..Policies::default()
        };
        let expected = TierPolicy {
            offload_after: Some(Duration::from_millis(5)),
            offload_above_bytes: None,
            delete_lag: Duration::from_millis(6),
            retention_ms: None,
            retention_bytes: Some(0),
            ..TierPolicy::default()
        };
        assert_eq!(tier_policy(&set), Some(expected));
    }
}
