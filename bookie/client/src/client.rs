//! The handle everything starts from: creates, writes, recovers and reads ledgers.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use geminga_metadata::{
    Compare, Op, RangeRequest, SharedStore, Standing, StoreError, Txn, commit, keys,
};
use geminga_proto::ids::{EntryId, Epoch, LedgerId};
use geminga_runtime::{clock::SharedClock, random::Random, tasks::Tasks};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::{
    bookie_rpc::SharedBookies,
    config::LedgerClientConfig,
    ensemble::{self, Available, EnsembleError, LedgerAge},
    memory::ClientMemory,
    metadata::{
        Fragment, LedgerMetadata, LedgerOwner, LedgerState, Nonce, RecoveryNonce, Versioned,
    },
    metrics::ClientMetrics,
    quorum::Quorum,
    read_times::ReadTimes,
    reader::{LedgerReader, SharedSilent},
    recovery::{ClosedLedger, Recovered, RecoveryError, RecoveryStart},
    settle::listing_op,
    writer::LedgerWriter,
};

/// What a client is made of.
#[derive(Debug)]
pub struct LedgerClientParts {
    pub store: SharedStore,
    pub bookies: SharedBookies,
    pub clock: SharedClock,
    pub random: Random,
    /// Owner of the writers' tasks: `abort` on it is the client's kill -9.
    pub tasks: Tasks,
    pub config: LedgerClientConfig,
    pub metrics: ClientMetrics,
    /// While it is provisional no metadata change is started (O3, EC7).
    pub standing: Standing,
}

/// Handle to ledgers. Clones share everything.
#[derive(Clone, Debug)]
pub struct LedgerClient {
    pub(crate) parts: Arc<LedgerClientParts>,
    pub(crate) memory: Arc<ClientMemory>,
    pub(crate) silent: SharedSilent,
    pub(crate) read_times: Arc<ReadTimes>,
    hint: Arc<Mutex<Option<Hint>>>,
    /// How long the client's last recovery took (R1).
    last_recovery: Arc<Mutex<Duration>>,
    /// Ledgers reported for repair in this process.
    reported: Arc<Mutex<BTreeSet<LedgerId>>>,
}

/// Reports that are remembered; then it starts afresh, and a ledger may be reported once more.
const REPORTED_MAX: usize = 10_000;

/// Registrations as read a little while ago.
#[derive(Clone, Debug)]
struct Hint {
    at: Instant,
    available: Arc<Vec<Available>>,
}

/// A ledger to be: the caller merges `txn` with the change of a key that is never deleted (MD3, M4), commits it, and asks
/// for its writer with the revision of that transaction.
#[derive(Clone, Debug)]
pub struct NewLedger {
    pub id: LedgerId,
    pub metadata: LedgerMetadata,
    /// Absent -> Open.
    pub txn: Txn,
}

impl LedgerClient {
    /// A client.
    #[must_use]
    pub fn new(parts: LedgerClientParts) -> Self {
        let gauge = parts.metrics.held_bytes.clone();
        Self {
            memory: Arc::new(ClientMemory::new(parts.config.client_bytes_max, gauge)),
            parts: Arc::new(parts),
            silent: Arc::default(),
            read_times: Arc::default(),
            hint: Arc::default(),
            last_recovery: Arc::default(),
            reported: Arc::default(),
        }
    }

    /// Whether metadata changes may be started now (O3).
    #[must_use]
    pub fn standing(&self) -> &Standing {
        &self.parts.standing
    }

    /// Chooses the slots of a new ledger (W0, EC6), by a linearizable read of the registrations (MD2). Writes nothing.
    ///
    /// # Errors
    /// [`EnsembleError`]; [`StoreError::Unavailable`] on a provisional claim, because no creation is started then (O3).
    pub async fn plan_create(
        &self,
        id: LedgerId,
        quorum: Quorum,
        owner: LedgerOwner,
    ) -> Result<NewLedger, EnsembleError> {
        if !self.parts.standing.confirmed() {
            let why = "the claim is provisional, no ledger is created".to_owned();
            return Err(StoreError::Unavailable(why).into());
        }
        let available = self.available().await?;
        let random = &self.parts.random;
        let slots = ensemble::choose(quorum, &available, LedgerAge::new(id, None), random)?;
        let fragment = Fragment { first_entry: EntryId(0), nonce: Nonce(random.uuid()), slots };
        let metadata = LedgerMetadata {
            id,
            state: LedgerState::Open,
            quorum,
            fragments: vec![fragment],
            owner,
        };
        let key = keys::ledger(id);
        let txn =
            Txn::new().when(Compare::Absent(key.clone())).then(Op::put(key, metadata.encode()));
        Ok(NewLedger { id, metadata, txn })
    }

    /// The writer of a ledger this caller created, or whose creation it knows to be its own (W1). `metadata` as of the
    /// transaction that made it.
    #[must_use]
    pub fn writer(&self, metadata: Versioned<LedgerMetadata>) -> LedgerWriter {
        LedgerWriter::start(self, metadata)
    }

    /// R1 for an owner: the step into recovery, from Open or InRecovery. None if the ledger is Closed or Deleted: there is
    /// nothing to recover, accept what stands.
    #[must_use]
    pub fn begin_recovery(
        &self,
        current: &Versioned<LedgerMetadata>,
        epoch: Epoch,
    ) -> Option<RecoveryStart> {
        if !matches!(current.value.state, LedgerState::Open | LedgerState::InRecovery(_)) {
            return None;
        }
        let nonce = RecoveryNonce { epoch, nonce: Nonce(self.parts.random.uuid()) };
        let metadata = current.value.in_recovery(nonce);
        let txn = crate::settle::ledger_txn(current, &metadata, None);
        Some(RecoveryStart { id: metadata.id, nonce, txn, metadata })
    }

    /// R2..R6 on a ledger that stands InRecovery by `nonce`, as of `started`. Writes nothing to the store: the end it finds
    /// is published by the caller's transaction alone (R7, T5).
    ///
    /// # Errors
    /// [`RecoveryError::Incomplete`] may be repeated with the same arguments while the nonce stands.
    pub async fn recover(
        &self,
        started: Versioned<LedgerMetadata>,
        nonce: RecoveryNonce,
    ) -> Result<Recovered, RecoveryError> {
        crate::recovery::recover(self, started, nonce).await
    }

    /// R1..R8 as one call, with R1's patience towards rivals. `epoch` 0 for helpers.
    ///
    /// # Errors
    /// [`RecoveryError`].
    pub async fn recover_and_close(
        &self,
        id: LedgerId,
        epoch: Epoch,
    ) -> Result<ClosedLedger, RecoveryError> {
        crate::recovery::recover_and_close(self, id, epoch).await
    }

    /// A reader of one ledger.
    #[must_use]
    pub fn reader(&self, id: LedgerId) -> LedgerReader {
        LedgerReader { client: self.clone(), id }
    }

    pub(crate) fn note_recovery(&self, took: Duration) {
        *self.last_recovery.lock() = took;
    }

    pub(crate) fn last_recovery(&self) -> Duration {
        *self.last_recovery.lock()
    }

    /// RD4: writes `underreplicated/<ledger>`, once per ledger, in the background. Exempt from MD3.
    pub(crate) fn list_for_repair(&self, ledger: LedgerId) {
        {
            let mut reported = self.reported.lock();
            if reported.len() >= REPORTED_MAX {
                reported.clear();
            }
            if !reported.insert(ledger) {
                return;
            }
        }
        let store = Arc::clone(&self.parts.store);
        let token = self.parts.tasks.token();
        let txn = Txn::new().then(listing_op(ledger, "a reader met damage"));
        self.parts.tasks.spawn("report damage", async move {
            drop(commit(&store, &txn, &token).await);
        });
    }

    /// Registrations as they stood at most `look_interval / 2` ago: one read serves all writers. A hint, for no decision
    /// (MD2).
    pub(crate) async fn available_hint(&self) -> Result<Arc<Vec<Available>>, StoreError> {
        let fresh = |hint: &Hint| hint.at + self.parts.config.look_interval / 2 > Instant::now();
        if let Some(hint) = self.hint.lock().as_ref().filter(|hint| fresh(hint)) {
            return Ok(Arc::clone(&hint.available));
        }
        let available = Arc::new(self.available().await?);
        let hint = Hint { at: Instant::now(), available: Arc::clone(&available) };
        *self.hint.lock() = Some(hint);
        Ok(available)
    }

    /// All registrations, read linearizably (MD2).
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn available(&self) -> Result<Vec<Available>, StoreError> {
        let mut available = Vec::new();
        let mut after = None;
        let mut at = None;
        loop {
            let prefix = keys::availables();
            let request = RangeRequest { prefix, after: after.take(), limit: 0, at };
            let page = self.parts.store.range(request).await?;
            at = Some(page.revision);
            available.extend(page.items.iter().filter_map(Available::from_key_value));
            match page.items.last() {
                Some(last) if page.more => after = Some(last.key.clone()),
                _ => return Ok(available),
            }
        }
    }
}
