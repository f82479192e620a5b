//! A mirror in memory of `topics/` and `subs/`, kept by two watches: thousands of clients cost the store two. A hint only (MD2):
//! whoever decides reads the store. Who owns what is in `ownership/members.rs`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use geminga_metadata::{
    Change, Key, KeyValue, Revision, SharedStore,
    keys::{self, ParsedKey},
};
use geminga_proto::{
    ids::TopicId,
    names::{NamespaceName, SubscriptionName, TopicName},
    storage::v1::{SubscriptionValue, TopicValue},
};
use geminga_runtime::tasks::Tasks;
use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};

use super::topics::{self, Step, Told};
use crate::{
    catalog::{Record, State, Topic},
    mirror::{self, Seen},
};

/// A subscription of a topic.
pub(crate) type SubscriptionKey = (TopicId, SubscriptionName);

/// The mirror. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Hub {
    mirror: Arc<Mutex<Mirror>>,
    topics: watch::Sender<u64>,
    subscriptions: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Mirror {
    topics: BTreeMap<TopicId, Topic>,
    names: BTreeMap<Arc<TopicName>, TopicId>,
    namespaces: BTreeMap<NamespaceName, Population>,
    /// What was committed up to here to `topics/` is in it.
    topics_seen: Option<Revision>,
    subscriptions: BTreeMap<SubscriptionKey, Revision>,
    subscriptions_of: BTreeMap<TopicId, usize>,
    subscriptions_seen: bool,
    /// Changed since they were last taken.
    changed: BTreeSet<SubscriptionKey>,
    /// Subscriptions being created or deleted (C6).
    unsettled: BTreeMap<SubscriptionKey, Unsettled>,
}

/// The topics of a namespace.
#[derive(Clone, Copy, Debug, Default)]
struct Population {
    topics: usize,
    /// Rises with each change.
    version: u64,
}

/// A subscription whose creation or deletion is half done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Unsettled {
    revision: Revision,
    since: Instant,
}

impl Hub {
    /// Starts to follow the store.
    pub(crate) fn start(store: &SharedStore, tasks: &Tasks) -> Self {
        let hub = Self::new();
        let watched =
            [("topic watch", keys::topics()), ("subscription watch", keys::subscriptions())];
        for (name, prefix) in watched {
            tasks.spawn(name, hub.clone().follow(store.clone(), prefix));
        }
        hub
    }

    fn new() -> Self {
        Self {
            mirror: Arc::default(),
            topics: watch::Sender::new(0),
            subscriptions: watch::Sender::new(0),
        }
    }

    /// Changes with every change of topics.
    pub(crate) fn version(&self) -> watch::Receiver<u64> {
        self.topics.subscribe()
    }

    /// A topic as last seen; none when it was never seen, or is gone.
    pub(crate) fn topic(&self, id: TopicId) -> Option<Topic> {
        self.mirror.lock().topics.get(&id).cloned()
    }

    /// When a topic was last changed, as last seen.
    pub(crate) fn revision(&self, id: TopicId) -> Option<Revision> {
        self.mirror.lock().topics.get(&id).map(|topic| topic.revision)
    }

    /// A topic as last seen, by its name.
    pub(crate) fn topic_named(&self, name: &TopicName) -> Option<Topic> {
        let mirror = self.mirror.lock();
        let found = mirror.topics.get(mirror.names.get(name)?)?;
        (!found.deleting).then(|| found.clone())
    }

    /// Whether everything committed to `topics/` up to this revision was seen.
    pub(crate) fn has_seen(&self, revision: Revision) -> bool {
        self.mirror.lock().topics_seen.is_some_and(|seen| seen >= revision)
    }

    /// Topics of a namespace, as last seen; none: nothing was seen yet.
    pub(crate) fn topics_in(&self, namespace: &NamespaceName) -> Option<usize> {
        let mirror = self.mirror.lock();
        mirror.topics_seen?;
        Some(mirror.namespaces.get(namespace).map_or(0, |population| population.topics))
    }

    /// Rises with every change of a namespace's topics.
    pub(super) fn namespace_version(&self, namespace: &NamespaceName) -> u64 {
        self.mirror.lock().namespaces.get(namespace).map_or(0, |population| population.version)
    }

    /// What is to be told of a namespace's topics whose own name begins so, behind `after`; see [`topics::step`].
    pub(super) fn topics_step(
        &self,
        (namespace, prefix): (&NamespaceName, &str),
        told: &Told,
        after: Option<&TopicName>,
    ) -> Step {
        let mirror = self.mirror.lock();
        let now = topics::names_in(&mirror.names, namespace, prefix, after)
            .filter(|(_, id)| mirror.topics.get(id).is_some_and(|topic| !topic.deleting));
        topics::step(told, now, after)
    }

    /// Subscriptions of a topic, as last seen; none: nothing was seen yet.
    pub(crate) fn subscriptions_of(&self, topic: TopicId) -> Option<usize> {
        let mirror = self.mirror.lock();
        let seen = mirror.subscriptions_seen;
        seen.then(|| mirror.subscriptions_of.get(&topic).copied().unwrap_or(0))
    }

    /// When a subscription was last changed, as last seen.
    pub(crate) fn subscription_revision(&self, of: &SubscriptionKey) -> Option<Revision> {
        self.mirror.lock().subscriptions.get(of).copied()
    }

    /// Changes when there is something to take by [`Self::take_changed`].
    pub(crate) fn subscriptions_version(&self) -> watch::Receiver<u64> {
        self.subscriptions.subscribe()
    }

    /// Subscriptions that were changed since the last call. There is one caller.
    pub(crate) fn take_changed(&self) -> BTreeSet<SubscriptionKey> {
        std::mem::take(&mut self.mirror.lock().changed)
    }

    /// Somebody has settings of this revision: he is told if the mirror knows later ones.
    pub(crate) fn has_settings_of(&self, of: SubscriptionKey, revision: Revision) {
        let mut mirror = self.mirror.lock();
        if mirror.subscriptions.get(&of).is_some_and(|seen| *seen > revision) {
            mirror.changed.insert(of);
            drop(mirror);
            self.subscriptions.send_modify(|version| *version += 1);
        }
    }

    /// Subscriptions whose creation or deletion stands half done for so long, as last seen.
    pub(crate) fn stalled(&self, for_at_least: Duration) -> Vec<SubscriptionKey> {
        let mirror = self.mirror.lock();
        let stalled = |(_, of): &(_, &Unsettled)| of.since.elapsed() >= for_at_least;
        mirror.unsettled.iter().filter(stalled).map(|(key, _)| key.clone()).collect()
    }

    async fn follow(self, store: SharedStore, prefix: Key) {
        let range = prefix.clone();
        mirror::follow(store, prefix, move |seen| self.apply(&range, seen)).await;
    }

    fn apply(&self, prefix: &Key, seen: Seen<'_>) {
        let of_topics = *prefix == keys::topics();
        let mut mirror = self.mirror.lock();
        match seen {
            Seen::All(all, revision) => {
                mirror.forget_all(of_topics);
                all.iter().for_each(|item| mirror.put(item));
                if of_topics {
                    mirror.topics_seen = Some(revision);
                } else {
                    mirror.subscriptions_seen = true;
                }
            }
            Seen::Changes(changes) => {
                for change in changes {
                    let revision = match change {
                        Change::Put(item) => {
                            mirror.put(item);
                            item.mod_revision
                        }
                        Change::Deleted { key, revision } => {
                            mirror.delete(key);
                            *revision
                        }
                    };
                    if of_topics {
                        mirror.topics_seen = mirror.topics_seen.max(Some(revision));
                    }
                }
            }
        }
        drop(mirror);
        let version = if of_topics { &self.topics } else { &self.subscriptions };
        version.send_modify(|version| *version += 1);
    }
}

impl Mirror {
    fn forget_all(&mut self, of_topics: bool) {
        if of_topics {
            self.topics.clear();
            self.names.clear();
            for population in self.namespaces.values_mut() {
                *population = Population { topics: 0, version: population.version + 1 };
            }
        } else {
            self.subscriptions.clear();
            self.subscriptions_of.clear();
            self.unsettled.clear();
        }
    }

    fn put(&mut self, item: &KeyValue) {
        match keys::parse(&item.key) {
            Some(ParsedKey::Topic(id)) => {
                let topic = TopicValue::decode_value(item)
                    .and_then(|value| Topic::of(id, &value, item.mod_revision));
                if let Ok(topic) = topic {
                    self.put_topic(topic);
                }
            }
            Some(ParsedKey::Subscription(topic, name)) => {
                self.put_subscription((topic, name), item);
            }
            _ => {}
        }
    }

    fn put_topic(&mut self, topic: Topic) {
        let population = self.namespaces.entry(topic.name.namespace().clone()).or_default();
        population.version += 1;
        if self.names.insert(Arc::new(topic.name.clone()), topic.id).is_none() {
            population.topics += 1;
        }
        self.topics.insert(topic.id, topic);
    }

    fn put_subscription(&mut self, key: SubscriptionKey, item: &KeyValue) {
        if self.subscriptions.insert(key.clone(), item.mod_revision).is_none() {
            *self.subscriptions_of.entry(key.0).or_default() += 1;
        }
        let settled = SubscriptionValue::decode_value(item)
            .is_ok_and(|value| value.state == i32::from(State::Ready));
        if settled {
            self.unsettled.remove(&key);
            self.changed.insert(key);
        } else {
            let seen = Unsettled { revision: item.mod_revision, since: Instant::now() };
            let known = self.unsettled.entry(key).or_insert(seen);
            if known.revision != seen.revision {
                *known = seen;
            }
        }
    }

    fn delete(&mut self, key: &Key) {
        match keys::parse(key) {
            Some(ParsedKey::Topic(id)) => {
                if let Some(topic) = self.topics.remove(&id)
                    && self.names.get(&topic.name) == Some(&id)
                {
                    self.names.remove(&topic.name);
                    let population =
                        self.namespaces.entry(topic.name.namespace().clone()).or_default();
                    population.topics = population.topics.saturating_sub(1);
                    population.version += 1;
                }
            }
            Some(ParsedKey::Subscription(topic, name)) => {
                let key = (topic, name);
                if self.subscriptions.remove(&key).is_some()
                    && let Some(count) = self.subscriptions_of.get_mut(&topic)
                {
                    *count -= 1;
                    if *count == 0 {
                        self.subscriptions_of.remove(&topic);
                    }
                }
                self.changed.remove(&key);
                self.unsettled.remove(&key);
            }
            _ => {}
        }
    }
}
