//! A bookie as a value: start, serve, stop, kill.

use std::{io, sync::Arc, time::Duration};

use geminga_metadata::{LeaseKeeper, SharedStore};
use geminga_proto::ids::Incarnation;
use geminga_runtime::{clock::SharedClock, disk::SharedDisk, io::Io, random::Random};
use tokio::{sync::watch, time::Instant};

use crate::{
    config::BookieConfig,
    cookie,
    crash_points::CrashPoints,
    disk_guard::{self, DiskGuard},
    gc,
    journal::writer::JournalWriter,
    ledger_storage::checkpointer,
    metrics::BookieMetrics,
    registration,
    start::{self, StartError},
    state::{INTERNAL_PATIENCE, Shared},
};

/// What a bookie is made of. The disk is one directory, and belongs to this bookie alone.
#[derive(Debug)]
pub struct BookieParts {
    pub disk: SharedDisk,
    /// Where the journal is written: a thread of its own.
    pub journal_io: Io,
    /// Where entries are read and checkpoints written.
    pub read_io: Io,
    pub store: SharedStore,
    pub clock: SharedClock,
    pub random: Random,
    pub config: BookieConfig,
    pub metrics: BookieMetrics,
    /// Default: none.
    pub crash_points: CrashPoints,
}

/// A running bookie; clones are handles to the same one. It implements
/// [`BookieRpc`](geminga_bookie_client::bookie_rpc::BookieRpc). Dropping handles does not stop it.
#[derive(Clone, Debug)]
pub struct Bookie {
    shared: Arc<Shared>,
    keeper: LeaseKeeper,
}

impl Bookie {
    /// Locks the directory, checks the cookie (D7), replays the journal (D3-D6), registers, and serves. Takes as long as
    /// `start_timeout` when the metadata store does not answer.
    ///
    /// Not cancel-safe in one way only: a dropped start may leave tasks that end with the runtime; start again.
    ///
    /// # Errors
    /// [`StartError`]; nothing was served then.
    pub async fn start(parts: BookieParts) -> Result<Self, StartError> {
        let (store, random) = (parts.store.clone(), parts.random.clone());
        let started = start::start(parts).await?;
        let shared = started.shared;
        match Self::serve(
            &shared,
            started.current,
            started.next,
            started.checkpoint_first,
            &store,
            &random,
        )
        .await
        {
            Ok(keeper) => {
                let cluster = &started.cluster.id;
                let incarnation = shared.identity.incarnation.0;
                tracing::info!(bookie_id = shared.config.id, incarnation, cluster, "bookie serves");
                Ok(Self { shared, keeper })
            }
            Err(error) => {
                shared.end(None);
                Err(error)
            }
        }
    }

    async fn serve(
        shared: &Arc<Shared>,
        current: crate::journal::writer::Current,
        next: u64,
        checkpoint_first: bool,
        store: &SharedStore,
        random: &Random,
    ) -> Result<LeaseKeeper, StartError> {
        if checkpoint_first {
            checkpointer::run_once(shared).await?;
        }
        let mut guard = DiskGuard::new(shared.config.disk);
        disk_guard::check(shared, &mut guard).await?;
        critical(shared, "journal", JournalWriter::new(Arc::clone(shared), current, next).run());
        critical(shared, "checkpoints", checkpointer::run(Arc::clone(shared)));
        critical(shared, "disk guard", disk_guard::run(Arc::clone(shared), guard));
        critical(shared, "gc", gc::run(Arc::clone(shared)));
        let found = cookie::read_store(store, &shared.config.id).await?;
        let Some(found) = found else {
            return Err(cookie::absent(store, &shared.config.id).await?.into());
        };
        found.check(&shared.identity)?;
        let keeper = LeaseKeeper::start(store.clone(), shared.config.lease_ttl, &shared.tasks);
        let (registered, mut is_registered) = watch::channel(false);
        let run = registration::run(
            Arc::clone(shared),
            keeper.clone(),
            random.uuid(),
            found.revision,
            registered,
        );
        critical(shared, "registration", run);
        let wait = is_registered.wait_for(|registered| *registered);
        match tokio::time::timeout(shared.config.start_timeout, wait).await {
            Ok(Ok(_)) => Ok(keeper),
            Ok(Err(_)) | Err(_) => {
                Err(StartError::Store("the bookie could not register in time".to_owned()))
            }
        }
    }

    /// Which incarnation this is: every request must be meant for it.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.shared.identity.incarnation
    }

    /// Resolves with the cause once the bookie has ended by itself: by a failure (D3, D7), as a failed write or sync or a
    /// revoked cookie; or because it was decommissioned, which [`Self::is_decommissioned`] tells. Pending for ever after `stop` or `kill`. Cancel-safe.
    pub fn failed(&self) -> impl Future<Output = String> + Send + 'static {
        let mut failure = self.shared.failure.subscribe();
        async move {
            match failure.wait_for(Option::is_some).await.ok().and_then(|seen| seen.clone()) {
                Some(cause) => cause,
                None => std::future::pending().await,
            }
        }
    }

    /// Ends cleanly: takes nothing new, answers what was accepted, deregisters, writes a checkpoint. Waits at most half a
    /// minute; what is not done then is left to the next start's replay.
    pub async fn stop(&self) {
        let shared = &self.shared;
        let synced = {
            let mut core = shared.core();
            core.closed = true;
            let (answer, synced) = tokio::sync::oneshot::channel();
            if !core.ended {
                shared.push(&mut core, crate::journal::queue::Item::Barrier { answer });
            }
            synced
        };
        let _flushed = crate::state::until(Instant::now() + INTERNAL_PATIENCE, synced).await;
        let end = async {
            self.keeper.end().await;
            if let Err(error) = checkpointer::run_once(shared).await {
                tracing::warn!(bookie_id = shared.config.id, %error, "no checkpoint at the end");
            }
        };
        let _in_time = tokio::time::timeout(Duration::from_secs(30), end).await;
        shared.end(None);
    }

    /// As `kill -9`: nothing is flushed, nobody is answered, the lease runs out by itself.
    pub fn kill(&self) {
        self.shared.end(None);
    }

    /// Writes a checkpoint now (tests, tools). False if the disk has no room for it.
    ///
    /// # Errors
    /// A failed write; the bookie ends by it (D3).
    pub async fn checkpoint(&self) -> io::Result<bool> {
        checkpointer::run_once(&self.shared).await
    }

    /// Compares local ledgers with the store now (tests, tools); returns how many were dropped (G1).
    ///
    /// # Errors
    /// The store did not answer, or was restored and is not confirmed; nothing more is dropped.
    pub async fn collect_garbage(&self) -> Result<usize, geminga_metadata::StoreError> {
        gc::pass(&self.shared).await
    }

    /// Whether the bookie ended because it was decommissioned (DC1): no failure, and no reason to start it again.
    #[must_use]
    pub fn is_decommissioned(&self) -> bool {
        self.shared.is_decommissioned()
    }

    /// The lease of its registration: what else this process does under a lease may stand or fall with it.
    #[must_use]
    pub fn lease(&self) -> &LeaseKeeper {
        &self.keeper
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

/// Starts a task without which the bookie ends (D3).
fn critical(
    shared: &Arc<Shared>,
    name: &'static str,
    task: impl Future<Output = io::Result<()>> + Send + 'static,
) {
    let ending = Arc::clone(shared);
    shared.tasks.spawn_critical(name, async move {
        let result = task.await;
        if let Err(error) = &result {
            ending.end(Some(&format!("{name}: {error}")));
        }
        result
    });
}
