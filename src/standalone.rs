//! Everything in one process: metadata store, bookies, broker, health endpoint. A restart is a takeover like any other.
//!
//! ```text
//! DIR/lock           one process at a time
//! DIR/metadata/      the embedded metadata store
//! DIR/bookies/<n>/   one bookie each: journal, index, cookie
//! ```
//! The same wiring serves the command, the demo and the benchmarks.

use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures::future::join_all;
use geminga_bookie::{Bookie, BookieConfig, BookieMetrics, BookieParts};
use geminga_bookie_client::{
    ClientMetrics, LedgerClient, LedgerClientConfig, LedgerClientParts, Quorum,
    bookie_rpc::loopback::Loopback,
};
use geminga_broker::{Broker, BrokerConfig, BrokerParts};
use geminga_managed_ledger::{
    ColdStorage, ColdStorageConfig, ColdStorageError, ManagedLedgerConfig, ManagedLedgerMetrics,
    ManagedLedgers, ManagedLedgersParts,
};
use geminga_metadata::{
    BUNDLES, EmbeddedStore, MetadataMetrics, MeteredStore, SharedStore, Standing, ensure_cluster,
};
use geminga_runtime::{
    clock::{SharedClock, SystemClock},
    disk::RealDisk,
    io::Io,
    random::Random,
    tasks::Tasks,
    telemetry::{MetricsRegistry, serve_health},
};
use tokio::sync::watch;

/// Most bookies in one process.
pub(crate) const BOOKIES_MAX: u32 = 16;
/// Time for tasks to end after the parts they belong to have.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// What to run, and where.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) data_dir: PathBuf,
    /// None: as many as the directory has, or one.
    pub(crate) bookies: Option<u32>,
    pub(crate) listen: SocketAddr,
    pub(crate) health_listen: Option<SocketAddr>,
    /// Object storage for cold ledgers; none: everything stays on bookies.
    pub(crate) tier_url: Option<String>,
}

/// Why it did not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("the data directory {} is in use by another process{holder}", directory.display())]
    InUse { directory: PathBuf, holder: String },
    #[error("the data directory {} cannot be used: {source}", directory.display())]
    Directory { directory: PathBuf, source: io::Error },
    #[error("the data directory {} has {found} bookies, and {asked} were asked for: copies would be missing", directory.display())]
    FewerBookies { directory: PathBuf, found: u32, asked: u32 },
    #[error("the metadata store did not open: {}", with_causes(.0))]
    Metadata(#[from] geminga_metadata::OpenError),
    #[error("bookie {number} did not start: {source}")]
    Bookie { number: u32, source: geminga_bookie::StartError },
    #[error(transparent)]
    Cold(#[from] ColdStorageError),
    #[error("the broker did not start: {}", with_causes(.0))]
    Broker(geminga_broker::StartError),
    #[error("cannot listen on {address} for health and metrics: {source}")]
    Health { address: SocketAddr, source: io::Error },
}

pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        text += &format!(": {source}");
        cause = source.source();
    }
    text
}

/// A running process's worth of Geminga.
pub(crate) struct Standalone {
    broker: Broker,
    bookies: BTreeMap<u32, Bookie>,
    loopback: Loopback,
    store: EmbeddedStore,
    tasks: Tasks,
    ready: watch::Sender<bool>,
    health: Option<SocketAddr>,
    /// Held as long as the process uses the directory.
    _lock: File,
}

impl Standalone {
    /// Starts all parts. It serves when this returns.
    ///
    /// # Errors
    /// [`StartError`]; nothing keeps running then.
    pub(crate) async fn start(settings: Settings) -> Result<Self, StartError> {
        let tasks = Tasks::new("standalone");
        let started = Box::pin(Self::start_in(settings, &tasks)).await;
        if started.is_err() {
            tasks.abort();
        }
        started
    }

    async fn start_in(settings: Settings, tasks: &Tasks) -> Result<Self, StartError> {
        let directory = &settings.data_dir;
        let lock = lock(directory)?;
        let count = bookie_count(directory, settings.bookies)?;
        let registry = MetricsRegistry::new();
        let clock: SharedClock = Arc::new(SystemClock);
        let random = Random::from_os();

        let metadata_dir = directory.join("metadata");
        let store = EmbeddedStore::open(&metadata_dir, Io::thread("metadata"), tasks).await?;
        let shared: SharedStore = Arc::new(store.clone());
        let shared: SharedStore =
            Arc::new(MeteredStore::new(shared, registry.with(MetadataMetrics::register)));

        let cluster = ensure_cluster(&shared, &random, clock.now(), BUNDLES)
            .await
            .map_err(|error| StartError::Broker(error.into()))?;
        let cold = match &settings.tier_url {
            Some(url) => {
                Some(ColdStorage::from_url(url, &cluster.id, ColdStorageConfig::default())?)
            }
            None => None,
        };
        let bookies = start_bookies(count, directory, &shared, &clock, &random, &registry).await?;
        let loopback = Loopback::new();
        for bookie in bookies.values() {
            loopback.attach(bookie.incarnation(), Arc::new(bookie.clone()));
        }

        let client = LedgerClient::new(LedgerClientParts {
            store: shared.clone(),
            bookies: Arc::new(loopback.clone()),
            clock: clock.clone(),
            random: random.fork(),
            tasks: tasks.child("ledgers"),
            config: LedgerClientConfig::default(),
            metrics: registry.with(ClientMetrics::register),
            standing: Standing::always(), // an embedded store never goes away alone
        });
        let managed = ManagedLedgers::new(ManagedLedgersParts {
            client,
            store: shared.clone(),
            clock: clock.clone(),
            random: random.fork(),
            tasks: tasks.child("segments"),
            config: ManagedLedgerConfig {
                quorum: quorum(count),
                generation: cluster.generation,
                ..ManagedLedgerConfig::default()
            },
            metrics: registry.with(ManagedLedgerMetrics::register),
            cold,
        });
        let broker = Broker::start(BrokerParts {
            store: shared,
            managed,
            standing: None,
            clock,
            random,
            config: BrokerConfig::new("standalone", settings.listen),
            metrics: registry.with(geminga_broker::metrics::Metrics::register),
        })
        .await
        .map_err(StartError::Broker)?;

        let (ready, is_ready) = watch::channel(false);
        let health = match settings.health_listen {
            Some(address) => Some(
                serve_health(address, registry, is_ready, tasks)
                    .await
                    .map_err(|source| StartError::Health { address, source })?,
            ),
            None => None,
        };
        ready.send_replace(true);
        Ok(Self {
            broker,
            bookies,
            loopback,
            store,
            tasks: tasks.clone(),
            ready,
            health,
            _lock: lock,
        })
    }

    /// Where the gRPC listener is.
    pub(crate) fn address(&self) -> SocketAddr {
        self.broker.address()
    }

    /// Where metrics and health are.
    pub(crate) fn health(&self) -> Option<SocketAddr> {
        self.health
    }

    /// Ends one bookie as `kill -9` would, and cuts its connections.
    pub(crate) fn kill_bookie(&mut self, number: u32) -> bool {
        let Some(bookie) = self.bookies.remove(&number) else { return false };
        bookie.kill();
        self.loopback.detach(bookie.incarnation());
        true
    }

    /// Resolves with a message when the process can no longer do its work: the broker failed, or a bookie when there is no
    /// other. A failed bookie among several is cut off and logged, and its ledgers go on with the others.
    pub(crate) async fn failed(&self) -> String {
        let bookies: futures::stream::FuturesUnordered<_> = self
            .bookies
            .iter()
            .map(|(number, bookie)| {
                let (number, failed) = (*number, bookie.failed());
                async move { (number, failed.await) }
            })
            .collect();
        let mut left = bookies.len();
        let mut bookies = std::pin::pin!(bookies);
        loop {
            tokio::select! {
                biased;
                failure = self.broker.failed() => return failure.to_string(),
                failure = self.tasks.failed() => return failure.to_string(),
                Some((number, cause)) = futures::StreamExt::next(&mut bookies) => {
                    tracing::error!(bookie = number, cause, "bookie failed");
                    if let Some(bookie) = self.bookies.get(&number) {
                        self.loopback.detach(bookie.incarnation());
                    }
                    left -= 1;
                    if left == 0 {
                        return format!("the last bookie failed: {cause}");
                    }
                }
            }
        }
    }

    /// Ends in order: streams drain within `grace`, segments close, bookies write a checkpoint, the directory is free.
    pub(crate) async fn shutdown(self, grace: Duration) {
        self.ready.send_replace(false);
        self.broker.shutdown(grace).await;
        join_all(self.bookies.values().map(Bookie::stop)).await;
        self.store.close().await;
        self.tasks.shutdown(STOP_GRACE).await;
    }
}

/// All of them, side by side; if one does not start, the others are ended.
async fn start_bookies(
    count: u32,
    directory: &Path,
    store: &SharedStore,
    clock: &SharedClock,
    random: &Random,
    registry: &MetricsRegistry,
) -> Result<BTreeMap<u32, Bookie>, StartError> {
    let starting =
        (0..count).map(|number| start_bookie(number, directory, store, clock, random, registry));
    let (mut bookies, mut failure) = (BTreeMap::new(), None);
    for (number, started) in (0..count).zip(join_all(starting).await) {
        match started {
            Ok(bookie) => drop(bookies.insert(number, bookie)),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    match failure {
        None => Ok(bookies),
        Some(error) => {
            bookies.values().for_each(Bookie::kill);
            Err(error)
        }
    }
}

async fn start_bookie(
    number: u32,
    directory: &Path,
    store: &SharedStore,
    clock: &SharedClock,
    random: &Random,
    registry: &MetricsRegistry,
) -> Result<Bookie, StartError> {
    let path = directory.join("bookies").join(number.to_string());
    let disk = RealDisk::open(&path)
        .map_err(|source| StartError::Directory { directory: path, source })?;
    let metrics = registry.with(|registry| {
        let label = ("bookie".into(), number.to_string().into());
        BookieMetrics::register(registry.sub_registry_with_label(label))
    });
    Bookie::start(BookieParts {
        disk: Arc::new(disk),
        journal_io: Io::thread(&format!("journal-{number}")),
        read_io: Io::thread(&format!("read-{number}")),
        store: store.clone(),
        clock: clock.clone(),
        random: random.fork(),
        config: BookieConfig {
            id: format!("bookie-{number}"),
            address: format!("in-process-{number}"),
            ..BookieConfig::default()
        },
        metrics,
        crash_points: geminga_bookie::crash_points::CrashPoints::default(),
    })
    .await
    .map_err(|source| StartError::Bookie { number, source })
}

/// One copy with one bookie, two of two, else two of three synced before a receipt.
fn quorum(bookies: u32) -> Quorum {
    let (ensemble, write, ack) = match bookies {
        0 | 1 => (1, 1, 1),
        2 => (2, 2, 2),
        _ => (3, 3, 2),
    };
    Quorum::new(ensemble, write, ack).expect("1 <= ack <= write <= ensemble")
}

/// Takes the directory for this process.
fn lock(directory: &Path) -> Result<File, StartError> {
    let wrong = |source| StartError::Directory { directory: directory.to_owned(), source };
    fs::create_dir_all(directory).map_err(wrong)?;
    let path = directory.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .map_err(wrong)?;
    match file.try_lock() {
        Ok(()) => {
            file.set_len(0).map_err(wrong)?;
            fs::write(&path, format!("{}\n", std::process::id())).map_err(wrong)?;
            Ok(file)
        }
        Err(TryLockError::WouldBlock) => {
            let holder = fs::read_to_string(&path).unwrap_or_default();
            let holder = match holder.trim().parse::<u32>() {
                Ok(pid) => format!(" (process {pid})"),
                Err(_) => String::new(),
            };
            Err(StartError::InUse { directory: directory.to_owned(), holder })
        }
        Err(TryLockError::Error(source)) => Err(wrong(source)),
    }
}

/// How many bookies to run: never fewer than the directory has, since their copies would be missing.
fn bookie_count(directory: &Path, asked: Option<u32>) -> Result<u32, StartError> {
    let found = (0..BOOKIES_MAX)
        .take_while(|number| directory.join("bookies").join(number.to_string()).is_dir())
        .count() as u32;
    match asked {
        Some(asked) if asked < found => {
            Err(StartError::FewerBookies { directory: directory.to_owned(), found, asked })
        }
        Some(asked) => Ok(asked),
        None => Ok(found.max(1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_one_process_s_at_a_time() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let held = lock(directory.path()).expect("free");
        let refused = lock(directory.path()).expect_err("held");
        assert!(refused.to_string().contains("another process"), "{refused}");
        drop(held);
        lock(directory.path()).expect("free again");
    }

    #[test]
    fn a_directory_is_never_started_with_fewer_bookies_than_it_has() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        assert_eq!(bookie_count(directory.path(), None).expect("new"), 1);
        for number in 0..3 {
            fs::create_dir_all(directory.path().join("bookies").join(number.to_string()))
                .expect("writable");
        }
        assert_eq!(bookie_count(directory.path(), None).expect("as before"), 3);
        assert_eq!(bookie_count(directory.path(), Some(5)).expect("more"), 5);
        let refused = bookie_count(directory.path(), Some(1)).expect_err("fewer");
        assert!(refused.to_string().contains("has 3 bookies, and 1"), "{refused}");
    }
}
