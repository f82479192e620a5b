//! A mirror in memory of `topics/`, `owners/`, and what is half done of `subs/`, kept by three watches: thousands of clients
//! cost the store three.
//!
//! A hint only (MD2): whoever decides reads the store. After a cut the watch resumes behind what was seen; after a
//! compaction the range is read again.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use geminga_metadata::{
    Change, Key, KeyValue, RangeRequest, Revision, SharedStore, WatchError,
    keys::{self, ParsedKey},
};
use geminga_proto::{
    ids::{Bundle, TopicId},
    names::{SubscriptionName, TopicName},
    storage::v1::{Claim, SubscriptionValue, TopicValue},
};
use geminga_runtime::tasks::Tasks;
use parking_lot::Mutex;
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use crate::catalog::{Record, State, Topic};

/// Pause before the store is asked again.
const RETRY: Duration = Duration::from_millis(200);

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
    owners: BTreeMap<Bundle, String>,
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
        let watched = [
            ("topic watch", keys::topics()),
            ("owner watch", keys::owners()),
            ("subscription watch", keys::subscriptions()),
        ];
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

    /// A topic as last seen, by its name.
    pub(crate) fn topic_named(&self, name: &TopicName) -> Option<Topic> {
        let mirror = self.mirror.lock();
        let found = mirror.topics.get(mirror.names.get(name)?)?;
        (!found.deleting).then(|| found.clone())
    }

    /// The address of a bundle's owner as last seen.
    pub(crate) fn owner(&self, bundle: Bundle) -> Option<String> {
        self.mirror.lock().owners.get(&bundle).cloned()
    }

    /// Subscriptions whose creation or deletion stands half done for so long, as last seen.
    pub(crate) fn stalled(&self, for_at_least: Duration) -> Vec<(TopicId, SubscriptionName)> {
        let mirror = self.mirror.lock();
        let stalled = |(_, of): &(_, &Unsettled)| of.since.elapsed() >= for_at_least;
        mirror.unsettled.iter().filter(stalled).map(|(key, _)| key.clone()).collect()
    }

    async fn follow(self, store: SharedStore, prefix: Key) {
        loop {
            let Some(revision) = self.reread(&store, &prefix).await else {
                sleep(RETRY).await;
                continue;
            };
            self.watch(&store, &prefix, revision).await;
        }
    }

    /// Replaces everything below the prefix by what stands; none when the store does not answer.
    async fn reread(&self, store: &SharedStore, prefix: &Key) -> Option<Revision> {
        let (mut all, mut after, mut at) = (Vec::new(), None, None);
        let revision = loop {
            let request = RangeRequest { prefix: prefix.clone(), after, limit: 1_000, at };
            let page = store.range(request).await.ok()?;
            at = Some(page.revision);
            after = page.items.last().map(|item| item.key.clone());
            all.extend(page.items);
            if !page.more {
                break page.revision;
            }
        };
        let mut mirror = self.mirror.lock();
        if *prefix == keys::topics() {
            mirror.topics.clear();
            mirror.names.clear();
        } else if *prefix == keys::owners() {
            mirror.owners.clear();
        } else {
            mirror.unsettled.clear();
        }
        all.iter().for_each(|item| mirror.put(item));
        drop(mirror);
        self.tell(prefix);
        Some(revision)
    }

    /// Wakes whoever shows what is below the prefix; nobody shows subscriptions.
    fn tell(&self, prefix: &Key) {
        if *prefix != keys::subscriptions() {
            self.version.send_modify(|version| *version += 1);
        }
    }

    /// Follows the changes after `seen` until history is lost.
    async fn watch(&self, store: &SharedStore, prefix: &Key, mut seen: Revision) {
        loop {
            let mut watch = match store.watch(prefix, Revision(seen.0 + 1)).await {
                Ok(watch) => watch,
                Err(geminga_metadata::StoreError::Compacted(_)) => return,
                Err(_) => {
                    sleep(RETRY).await;
                    continue;
                }
            };
            loop {
                match watch.next().await {
                    Ok(changes) => {
                        seen = self.apply(&changes).unwrap_or(seen);
                        self.tell(prefix);
                    }
                    Err(WatchError::Compacted(_)) => return,
                    Err(WatchError::Lost) => break,
                }
            }
            sleep(RETRY).await;
        }
    }

    fn apply(&self, changes: &[Change]) -> Option<Revision> {
        let mut mirror = self.mirror.lock();
        let mut seen = None;
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
            seen = seen.max(Some(revision));
        }
        seen
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
            Some(ParsedKey::Owner(bundle)) => {
                if let Ok(claim) = Claim::decode_value(item) {
                    self.owners.insert(bundle, claim.address);
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
            Some(ParsedKey::Owner(bundle)) => drop(self.owners.remove(&bundle)),
            Some(ParsedKey::Subscription(topic, name)) => {
                self.unsettled.remove(&(topic, name));
            }
            _ => {}
        }
    }
}
