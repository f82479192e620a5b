//! A mirror of `brokers/`, `draining/brokers/` and `owners/`: who is there, who is to go, and who claims what. A hint only
//! (MD2): it says where to send a client and whose a bundle should be, never that a claim is ours.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use geminga_metadata::{
    Change, Key, KeyValue, Revision, SharedStore,
    keys::{self, ParsedKey},
};
use geminga_proto::{
    ids::Bundle,
    storage::v1::{Broker, Claim},
};
use geminga_runtime::tasks::Tasks;
use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};

use super::placement::{Member, Vacated, Verdict, View};
use crate::{
    catalog::Record,
    mirror::{self, Seen},
};

/// A vacated claim is remembered for so long.
const VACATED_KEPT: Duration = Duration::from_secs(2);

/// A claim as last seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ClaimSeen {
    pub(crate) broker: String,
    pub(crate) instance: Bytes,
    pub(crate) address: String,
    pub(crate) create_revision: Revision,
}

/// The mirror. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Members {
    me: Arc<(String, Member)>,
    mirror: Arc<Mutex<Mirror>>,
    version: watch::Sender<u64>,
    /// Ranges read at least once.
    seen: watch::Sender<BTreeSet<Key>>,
}

#[derive(Debug)]
struct Mirror {
    view: View,
    claims: BTreeMap<Bundle, ClaimSeen>,
    vacated: BTreeMap<Bundle, Vacated>,
    /// Brokers whose last registration said that they drain.
    left_draining: BTreeSet<String>,
    stable_since: Instant,
}

impl Members {
    /// Starts to follow the store. `me` counts as registered as long as this broker asks.
    pub(crate) fn start(store: &SharedStore, me: (String, Member), tasks: &Tasks) -> Self {
        let view = View { brokers: BTreeMap::from([me.clone()]), wishes: BTreeSet::new() };
        let mirror = Mirror {
            view,
            claims: BTreeMap::new(),
            vacated: BTreeMap::new(),
            left_draining: BTreeSet::new(),
            stable_since: Instant::now(),
        };
        let this = Self {
            me: Arc::new(me),
            mirror: Arc::new(Mutex::new(mirror)),
            version: watch::Sender::new(0),
            seen: watch::Sender::new(BTreeSet::new()),
        };
        let watched = [
            ("broker watch", keys::brokers()),
            ("broker drain watch", keys::draining_brokers()),
            ("owner watch", keys::owners()),
        ];
        for (name, prefix) in watched {
            let (range, that) = (prefix.clone(), this.clone());
            let apply = move |seen: Seen<'_>| that.apply(&range, seen);
            tasks.spawn(name, mirror::follow(store.clone(), prefix, apply));
        }
        this
    }

    /// Resolves when every range was read once: before that this broker would take itself for the only one. Cancel-safe.
    pub(crate) async fn caught_up(&self) {
        let mut seen = self.seen.subscribe();
        let _ended = seen.wait_for(|seen| seen.len() == 3).await;
    }

    /// Changes with every change of the mirror.
    pub(crate) fn version(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Who is there.
    pub(crate) fn view(&self) -> View {
        self.mirror.lock().view.clone()
    }

    /// Since when the members are the ones that they are.
    pub(crate) fn stable_since(&self) -> Instant {
        self.mirror.lock().stable_since
    }

    /// Whether this run of a broker is registered.
    pub(crate) fn is_registered(&self, broker: &str, instance: &Bytes) -> bool {
        let mirror = self.mirror.lock();
        mirror.view.brokers.get(broker).is_some_and(|member| member.instance == *instance)
    }

    /// The claim on a bundle.
    pub(crate) fn claim_of(&self, bundle: Bundle) -> Option<ClaimSeen> {
        self.mirror.lock().claims.get(&bundle).cloned()
    }

    /// Whether another instance claims one of these.
    pub(crate) fn any_foreign(&self, mine: impl IntoIterator<Item = (Bundle, Revision)>) -> bool {
        let mirror = self.mirror.lock();
        mine.into_iter().any(|(bundle, revision)| {
            mirror.claims.get(&bundle).is_some_and(|claim| {
                claim.instance != self.me.1.instance && claim.create_revision > revision
            })
        })
    }

    /// The preferred owner of a bundle, this broker left out if asked.
    pub(crate) fn preferred(&self, bundle: Bundle, not_me: bool) -> Option<(String, Member)> {
        let mirror = self.mirror.lock();
        let without = not_me.then_some(self.me.0.as_str());
        mirror.view.preferred(bundle, without).map(|(id, member)| (id.clone(), member.clone()))
    }

    /// What this broker does with a bundle that nobody claims.
    pub(crate) fn unclaimed(&self, bundle: Bundle) -> Verdict {
        let mirror = self.mirror.lock();
        mirror.view.unclaimed(&self.me.0, bundle, mirror.vacated.get(&bundle), Instant::now())
    }

    /// Whether the operator wishes this broker to drain.
    pub(crate) fn wished_away(&self) -> bool {
        self.mirror.lock().view.wishes.contains(&self.me.0)
    }

    fn apply(&self, prefix: &Key, seen: Seen<'_>) {
        let mut mirror = self.mirror.lock();
        let before = mirror.view.clone();
        match seen {
            Seen::All(all, _) => {
                mirror.keep_only(prefix, all);
                all.iter().for_each(|item| mirror.put(item));
                self.seen.send_if_modified(|seen| seen.insert(prefix.clone()));
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
        let (id, own) = &*self.me;
        mirror.view.brokers.entry(id.clone()).or_insert_with(|| own.clone());
        if mirror.view != before {
            mirror.stable_since = Instant::now();
        }
        mirror.vacated.retain(|_, vacated| vacated.at.elapsed() < VACATED_KEPT);
        drop(mirror);
        self.version.send_modify(|version| *version += 1);
    }
}

impl Mirror {
    fn put(&mut self, item: &KeyValue) {
        match keys::parse(&item.key) {
            Some(ParsedKey::Broker(id)) => {
                let Ok(Broker { instance, address, draining, .. }) = Broker::decode_value(item)
                else {
                    return;
                };
                if draining {
                    self.left_draining.insert(id.clone());
                } else {
                    self.left_draining.remove(&id);
                }
                self.view.brokers.insert(id, Member { instance, address, draining });
            }
            Some(ParsedKey::DrainingBroker(id)) => drop(self.view.wishes.insert(id)),
            Some(ParsedKey::Owner(bundle)) => {
                let Ok(Claim { broker, instance, address, .. }) = Claim::decode_value(item) else {
                    return;
                };
                let create_revision = item.create_revision;
                let seen = ClaimSeen { broker, instance, address, create_revision };
                self.vacated.remove(&bundle);
                self.claims.insert(bundle, seen);
            }
            _ => {}
        }
    }

    fn delete(&mut self, key: &Key) {
        match keys::parse(key) {
            Some(ParsedKey::Broker(id)) => drop(self.view.brokers.remove(&id)),
            Some(ParsedKey::DrainingBroker(id)) => drop(self.view.wishes.remove(&id)),
            Some(ParsedKey::Owner(bundle)) => self.vacate(bundle),
            _ => {}
        }
    }

    fn vacate(&mut self, bundle: Bundle) {
        let Some(ClaimSeen { broker: by, .. }) = self.claims.remove(&bundle) else { return };
        let given = self.view.drains(&by) || self.left_draining.contains(&by);
        self.vacated.insert(bundle, Vacated { by, at: Instant::now(), given });
    }

    /// What a full reading does not show is gone.
    fn keep_only(&mut self, prefix: &Key, all: &[KeyValue]) {
        if *prefix == keys::brokers() {
            self.view.brokers.clear();
        } else if *prefix == keys::draining_brokers() {
            self.view.wishes.clear();
        } else {
            let stand: BTreeSet<&Key> = all.iter().map(|item| &item.key).collect();
            let known: Vec<Bundle> = self.claims.keys().copied().collect();
            known
                .into_iter()
                .filter(|b| !stand.contains(&keys::owner(*b)))
                .for_each(|b| self.vacate(b));
        }
    }
}
