//! Where an incarnation lives: a cache of the registrations, kept fresh by a watch. A hint only (MD2): who answers behind
//! an address is checked with every request, because each carries the incarnation that it is meant for.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use geminga_metadata::{
    Change, Key, KeyValue, RangeRequest, Revision, SharedStore, StoreError, Watch, keys,
};
use geminga_proto::{ids::Incarnation, storage::v1 as wire};
use geminga_runtime::tasks::Tasks;
use parking_lot::RwLock;
use prost::Message;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep_until},
};

/// Pause between two reads of all registrations.
const REREAD_PAUSE: Duration = Duration::from_secs(1);
/// An address whose registration went away is still tried for so long: while the store is away, leases end of bookies that
/// live on.
const FORMER_FOR: Duration = Duration::from_secs(60);

/// Finds the address of an incarnation.
pub trait Resolve: Send + Sync + fmt::Debug + 'static {
    /// `host:port`, as far as is known. Does not wait.
    fn address(&self, incarnation: Incarnation) -> Option<Arc<str>>;
    /// Whether it is registered now, as far as is known.
    fn is_registered(&self, incarnation: Incarnation) -> bool;
    /// What was told of some incarnation seems wrong: look again soon. Bounded however often it is called.
    fn look_again(&self);
}

/// The registrations of all bookies, `available/`, followed by one task.
#[derive(Debug)]
pub struct Directory {
    known: RwLock<Known>,
    again: Notify,
    loaded: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Known {
    by_key: BTreeMap<Key, (Incarnation, Arc<str>)>,
    addresses: BTreeMap<Incarnation, Arc<str>>,
    former: BTreeMap<Incarnation, (Arc<str>, Instant)>,
}

impl Directory {
    /// Starts following the registrations; until the first read all incarnations are unknown, see [`Self::loaded`].
    #[must_use]
    pub fn start(store: SharedStore, tasks: &Tasks) -> Arc<Self> {
        let (known, again) = (RwLock::default(), Notify::new());
        let directory = Arc::new(Self { known, again, loaded: watch::Sender::new(false) });
        let (follower, token) = (Arc::clone(&directory), tasks.token());
        tasks.spawn("bookie directory", async move {
            tokio::select! {
                biased;
                () = token.cancelled() => {}
                () = follower.follow(&store) => {}
            }
        });
        directory
    }

    /// Waits until all registrations were read once; for ever while the store does not answer. Cancel-safe.
    pub async fn loaded(&self) {
        let mut loaded = self.loaded.subscribe();
        if loaded.wait_for(|loaded| *loaded).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Reads everything, then watches from there; a watch that ends, or a wish to look again, starts over.
    async fn follow(&self, store: &SharedStore) {
        loop {
            let not_before = Instant::now() + REREAD_PAUSE;
            match read_all(store).await {
                Ok((revision, all)) => {
                    self.known.write().replace(all);
                    self.loaded.send_replace(true);
                    match store.watch(&keys::availables(), Revision(revision.0 + 1)).await {
                        Ok(watch) => self.watch(watch).await,
                        Err(error) => {
                            tracing::info!(%error, "bookie registrations cannot be watched")
                        }
                    }
                }
                Err(error) => tracing::info!(%error, "bookie registrations cannot be read"),
            }
            sleep_until(not_before).await;
        }
    }

    /// Until the watch ends, or somebody wishes to look again.
    async fn watch(&self, mut watch: Box<dyn Watch>) {
        loop {
            let changes = tokio::select! {
                biased;
                changes = watch.next() => changes,
                () = self.again.notified() => return,
            };
            match changes {
                Ok(changes) => self.known.write().apply(changes),
                Err(error) => {
                    tracing::debug!(%error, "watch of bookie registrations ended");
                    return;
                }
            }
        }
    }
}

impl Resolve for Directory {
    fn address(&self, incarnation: Incarnation) -> Option<Arc<str>> {
        let known = self.known.read();
        if let Some(address) = known.addresses.get(&incarnation) {
            return Some(Arc::clone(address));
        }
        let (address, until) = known.former.get(&incarnation)?;
        (*until > Instant::now()).then(|| Arc::clone(address))
    }

    fn is_registered(&self, incarnation: Incarnation) -> bool {
        self.known.read().addresses.contains_key(&incarnation)
    }

    fn look_again(&self) {
        self.again.notify_one();
    }
}

impl Known {
    fn replace(&mut self, all: Vec<KeyValue>) {
        self.by_key = all.into_iter().filter_map(registration).collect();
        self.index();
    }

    fn apply(&mut self, changes: Vec<Change>) {
        for change in changes {
            match change {
                Change::Put(found) => match registration(found.clone()) {
                    Some((key, lives)) => drop(self.by_key.insert(key, lives)),
                    None => drop(self.by_key.remove(&found.key)),
                },
                Change::Deleted { key, .. } => drop(self.by_key.remove(&key)),
            }
        }
        self.index();
    }

    fn index(&mut self) {
        let now = Instant::now();
        let addresses = self.by_key.values().cloned().collect();
        let before = std::mem::replace(&mut self.addresses, addresses);
        self.former.retain(|_, (_, until)| *until > now);
        for (incarnation, address) in before {
            if !self.addresses.contains_key(&incarnation) {
                self.former.insert(incarnation, (address, now + FORMER_FOR));
            }
        }
    }
}

fn registration(found: KeyValue) -> Option<(Key, (Incarnation, Arc<str>))> {
    let value = wire::Available::decode(&found.value[..]).ok()?;
    let usable = value.format == 1 && value.incarnation != 0 && !value.address.is_empty();
    usable.then(|| (found.key, (Incarnation(value.incarnation), value.address.into())))
}

async fn read_all(store: &SharedStore) -> Result<(Revision, Vec<KeyValue>), StoreError> {
    let mut all = Vec::new();
    let (mut after, mut at) = (None, None);
    loop {
        let request =
            RangeRequest { prefix: keys::availables(), after: after.take(), limit: 0, at };
        let page = store.range(request).await?;
        at = Some(page.revision);
        after = page.items.last().map(|last| last.key.clone());
        all.extend(page.items);
        if !page.more || after.is_none() {
            return Ok((page.revision, all));
        }
    }
}

/// Waits for what follows a change some time later; for tests.
#[cfg(test)]
pub(crate) async fn until(what: impl Fn() -> bool) {
    for _ in 0..10_000 {
        if what() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("it never came about");
}

#[cfg(test)]
mod tests {
    use geminga_metadata::{MemoryStore, MetadataStore, Op, Txn};

    use super::*;

    async fn put(store: &MemoryStore, bookie: &str, incarnation: u32, address: &str) {
        let value = wire::Available {
            format: 1,
            incarnation,
            address: address.to_owned(),
            ..wire::Available::default()
        };
        let op = Op::put(keys::available(bookie), value.encode_to_vec());
        store.txn(Txn::new().then(op)).await.expect("the store answers");
    }

    async fn delete(store: &MemoryStore, bookie: &str) {
        let txn = Txn::new().then(Op::Delete(keys::available(bookie)));
        store.txn(txn).await.expect("the store answers");
    }

    #[tokio::test(start_paused = true)]
    async fn it_follows_registrations_through_cut_watches_and_compactions() {
        let store = Arc::new(MemoryStore::new());
        put(&store, "b1", 1, "a:1").await;
        let directory = Directory::start(store.clone(), &Tasks::new("test"));
        assert_eq!(directory.address(Incarnation(1)), None, "nothing was read yet");
        directory.loaded().await;
        assert_eq!(directory.address(Incarnation(1)).as_deref(), Some("a:1"));
        put(&store, "b1", 1, "a:2").await; // it moved
        until(|| directory.address(Incarnation(1)).as_deref() == Some("a:2")).await;
        store.cut_watches();
        put(&store, "b2", 2, "b:1").await;
        store.compact(store.revision());
        until(|| directory.address(Incarnation(2)).is_some()).await;
        put(&store, "b1", 3, "a:3").await; // a new incarnation of the same bookie
        until(|| directory.address(Incarnation(3)).is_some()).await;
        assert!(!directory.is_registered(Incarnation(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn who_lost_its_registration_is_still_tried_for_a_while() {
        let store = Arc::new(MemoryStore::new());
        put(&store, "b1", 1, "a:1").await;
        let directory = Directory::start(store.clone(), &Tasks::new("test"));
        directory.loaded().await;
        delete(&store, "b1").await;
        until(|| !directory.is_registered(Incarnation(1))).await;
        assert_eq!(directory.address(Incarnation(1)).as_deref(), Some("a:1"));
        tokio::time::sleep(FORMER_FOR).await;
        assert_eq!(directory.address(Incarnation(1)), None);
    }

    #[tokio::test(start_paused = true)]
    async fn wishes_to_look_again_are_bounded() {
        let inner = Arc::new(MemoryStore::new());
        let directory = Directory::start(inner, &Tasks::new("test"));
        directory.loaded().await;
        let start = Instant::now();
        let mut reads = 0;
        while start.elapsed() < Duration::from_secs(10) {
            directory.loaded.send_replace(false);
            directory.look_again();
            directory.loaded().await;
            reads += 1;
        }
        assert!(reads <= 11, "{reads} reads in ten seconds");
    }
}
