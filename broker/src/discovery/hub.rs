//! A mirror in memory of `topics/`, and of what is half done of `subs/`, kept by two watches: thousands of clients cost the
//! store two. A hint only (MD2): whoever decides reads the store. Who owns what is in `ownership/members.rs`.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use geminga_metadata::{
    Change, Key, KeyValue, Revision, SharedStore,
    keys::{self, ParsedKey},
};
use geminga_proto::{
    ids::TopicId,
    names::{SubscriptionName, TopicName},
    storage::v1::{SubscriptionValue, TopicValue},
};
use geminga_runtime::tasks::Tasks;
use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};

use crate::{
    catalog::{Record, State, Topic},
    mirror::{self, Seen},
};

/// The mirror. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Hub {
    mirror: Arc<Mutex<Mirror>>,
    version: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Mirror {
    topics: BTreeMap<TopicId, Topic>,
    names: BTreeMap<TopicName, TopicId>,
    /// Subscriptions being created or deleted (C6).
    unsettled: BTreeMap<(TopicId, SubscriptionName), Unsettled>,
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
        let hub = Self { mirror: Arc::default(), version: watch::Sender::new(0) };
        let watched =
            [("topic watch", keys::topics()), ("subscription watch", keys::subscriptions())];
        for (name, prefix) in watched {
            tasks.spawn(name, hub.clone().follow(store.clone(), prefix));
        }
        hub
    }

    /// Changes with every change of the mirror.
    pub(crate) fn version(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
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

    /// Subscriptions whose creation or deletion stands half done for so long, as last seen.
    pub(crate) fn stalled(&self, for_at_least: Duration) -> Vec<(TopicId, SubscriptionName)> {
        let mirror = self.mirror.lock();
        let stalled = |(_, of): &(_, &Unsettled)| of.since.elapsed() >= for_at_least;
        mirror.unsettled.iter().filter(stalled).map(|(key, _)| key.clone()).collect()
    }

    async fn follow(self, store: SharedStore, prefix: Key) {
        let range = prefix.clone();
        mirror::follow(store, prefix, move |seen| self.apply(&range, seen)).await;
    }

    fn apply(&self, prefix: &Key, seen: Seen<'_>) {
        let mut mirror = self.mirror.lock();
        match seen {
            Seen::All(all) => {
                if *prefix == keys::topics() {
                    mirror.topics.clear();
                    mirror.names.clear();
                } else {
                    mirror.unsettled.clear();
                }
                all.iter().for_each(|item| mirror.put(item));
            }
            Seen::Changes(changes) => {
                for change in changes {
                    match change {
                        Change::Put(item) => mirror.put(item),
                        Change::Deleted { key, .. } => mirror.delete(key),
                    }
                }
            }
        }
        drop(mirror);
        // Nobody shows subscriptions.
        if *prefix == keys::topics() {
            self.version.send_modify(|version| *version += 1);
        }
    }
}

impl Mirror {
    fn put(&mut self, item: &KeyValue) {
        match keys::parse(&item.key) {
            Some(ParsedKey::Topic(id)) => {
                let topic = TopicValue::decode_value(item)
                    .and_then(|value| Topic::of(id, &value, item.mod_revision));
                if let Ok(topic) = topic {
                    self.names.insert(topic.name.clone(), id);
                    self.topics.insert(id, topic);
                }
            }
            Some(ParsedKey::Subscription(topic, name)) => self.put_subscription(topic, name, item),
            _ => {}
        }
    }

    fn put_subscription(&mut self, topic: TopicId, name: SubscriptionName, item: &KeyValue) {
        let settled = SubscriptionValue::decode_value(item)
            .is_ok_and(|value| value.state == i32::from(State::Ready));
        if settled {
            self.unsettled.remove(&(topic, name));
        } else {
            let seen = Unsettled { revision: item.mod_revision, since: Instant::now() };
            let known = self.unsettled.entry((topic, name)).or_insert(seen);
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
                }
            }
            Some(ParsedKey::Subscription(topic, name)) => {
                self.unsettled.remove(&(topic, name));
            }
            _ => {}
        }
    }
}
