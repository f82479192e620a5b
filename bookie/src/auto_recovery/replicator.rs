//! Walks the listed ledgers and makes them whole (A2-A4): one at a time per bookie, under a lock that only saves work.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use geminga_bookie_client::metadata::LedgerMetadata;
use geminga_metadata::{
    Compare, Op, RangeRequest, Revision, StoreError, Txn, TxnOutcome,
    keys::{self, ParsedKey},
};
use geminga_proto::ids::{Epoch, LedgerId};
use tokio::time::Instant;

use super::{
    AutoRecoveryParts,
    pace::Pace,
    repair::{Bookies, Repaired, repair},
    view::View,
};

/// Listed ledgers of one page; the view of the cluster is read anew for each.
const PAGE: usize = 100;
/// Longest pause before a ledger is looked at again.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Listed ledgers of which something is remembered.
const REMEMBERED_MAX: usize = 100_000;

/// The task's state: only what may be lost with it.
pub(crate) struct Replicator {
    parts: AutoRecoveryParts,
    pace: Pace,
    /// Since when nobody was seen to claim the bundle of a ledger that is not Closed (A3).
    unclaimed: BTreeMap<LedgerId, Instant>,
    /// Ledgers with entries that no peer gave when this bookie last looked (A4); logged once.
    alarmed: BTreeSet<LedgerId>,
    /// Ledgers that are left alone for a while, since there was nothing to be done for them.
    later: BTreeMap<LedgerId, Later>,
}

/// When to look again, and the pause before that; it doubles.
#[derive(Clone, Copy)]
struct Later {
    at: Instant,
    pause: Duration,
}

impl Replicator {
    pub(crate) fn new(parts: AutoRecoveryParts) -> Self {
        let pace = Pace::new(parts.config.bytes_per_second);
        Self {
            parts,
            pace,
            unclaimed: BTreeMap::new(),
            alarmed: BTreeSet::new(),
            later: BTreeMap::new(),
        }
    }

    /// Looks for work at the interval, until cancelled.
    pub(crate) async fn run(mut self) {
        let cancelled = self.parts.tasks.token();
        loop {
            tokio::select! {
                biased;
                () = cancelled.cancelled() => return,
                () = tokio::time::sleep(self.parts.config.repair_interval) => {}
            }
            tokio::select! {
                biased;
                () = cancelled.cancelled() => return,
                result = self.walk() => if let Err(error) = result {
                    tracing::debug!(%error, "replication ended early");
                }
            }
        }
    }

    /// One walk over all listed ledgers, page by page, each page in an order of this bookie's own.
    async fn walk(&mut self) -> Result<(), StoreError> {
        let (mut after, mut listed) = (None, BTreeSet::new());
        loop {
            let view = View::read(&self.parts.store).await?;
            let prefix = keys::under_replicateds();
            let request = RangeRequest { prefix, after: after.take(), limit: PAGE, at: None };
            let page = self.parts.store.range(request).await?;
            let mut ledgers: Vec<_> = page
                .items
                .iter()
                .filter_map(|item| match keys::parse(&item.key) {
                    Some(ParsedKey::UnderReplicated(ledger)) => Some(ledger),
                    _ => None,
                })
                .collect();
            listed.extend(ledgers.iter().copied());
            let now = Instant::now();
            ledgers.retain(|ledger| self.later.get(ledger).is_none_or(|later| later.at <= now));
            self.parts.metrics.listed.set(listed.len() as i64);
            if view.paused {
                return Ok(());
            }
            let bookies = Bookies { condemned: view.condemned(), candidates: view.candidates() };
            self.parts.random.shuffle(&mut ledgers);
            for ledger in ledgers {
                let done = match self.locked(ledger, &bookies, view.bundles).await {
                    Ok(done) => done,
                    Err(error) => {
                        tracing::info!(ledger_id = ledger.0, %error, "ledger is repaired later");
                        false
                    }
                };
                self.note(ledger, done);
            }
            after = page.items.last().map(|last| last.key.clone());
            if !page.more || after.is_none() || listed.len() >= REMEMBERED_MAX {
                break;
            }
        }
        self.unclaimed.retain(|ledger, _| listed.contains(ledger));
        self.alarmed.retain(|ledger| listed.contains(ledger));
        self.later.retain(|ledger, _| listed.contains(ledger));
        self.parts.metrics.unreadable.set(self.alarmed.len() as i64);
        Ok(())
    }

    /// What is not done is looked at again after a pause: a survey asks every holder.
    fn note(&mut self, ledger: LedgerId, done: bool) {
        if done {
            self.later.remove(&ledger);
            return;
        }
        let first = self.parts.config.repair_interval;
        let pause = self.later.get(&ledger).map_or(first, |later| later.pause * 2);
        let pause = pause.min(PAUSE_MAX.max(first));
        self.later.insert(ledger, Later { at: Instant::now() + pause, pause });
    }

    /// Works on a ledger under its lock, unless another bookie does. True if nothing is left to be done for it.
    async fn locked(
        &mut self,
        ledger: LedgerId,
        bookies: &Bookies,
        bundles: u32,
    ) -> Result<bool, StoreError> {
        let Some(lock) = self.lock(ledger).await? else { return Ok(false) };
        let result = self.one(ledger, bookies, bundles).await;
        let key = keys::replication_lock(ledger);
        let ours = Compare::ModRevision(key.clone(), lock);
        self.parts.store.txn(Txn::new().when(ours).then(Op::Delete(key))).await?;
        result
    }

    /// The lock of a ledger as of its revision; none if another bookie holds it. One of our own that stands here was left by a
    /// try whose outcome we did not learn, or by an unlocking that failed: it would stand as long as this process lives.
    async fn lock(&self, ledger: LedgerId) -> Result<Option<Revision>, StoreError> {
        let lease = self.parts.keeper.current();
        if lease.is_none() {
            return Ok(None);
        }
        let key = keys::replication_lock(ledger);
        let value = self.parts.bookie_id.clone().into_bytes().into();
        let put = Op::Put { key: key.clone(), value, lease };
        let txn = Txn::new().when(Compare::Absent(key)).then(put);
        match self.parts.store.txn(txn).await? {
            TxnOutcome::Done(revision) => Ok(Some(revision)),
            TxnOutcome::Conflict { found, .. } => {
                let found = found.into_iter().flatten().find(|found| found.lease == lease);
                Ok(found.map(|found| found.mod_revision))
            }
        }
    }

    async fn one(
        &mut self,
        ledger: LedgerId,
        bookies: &Bookies,
        bundles: u32,
    ) -> Result<bool, StoreError> {
        let repaired = repair(&self.parts, &mut self.pace, ledger, bookies).await?;
        if !matches!(repaired, Repaired::Short { lost: 1.. }) {
            self.alarmed.remove(&ledger);
        }
        match repaired {
            Repaired::Whole => {
                tracing::info!(ledger_id = ledger.0, "ledger is whole again");
                Ok(true)
            }
            Repaired::Gone => Ok(true),
            Repaired::Open(metadata) => {
                self.close_if_unclaimed(&metadata, bundles).await?;
                Ok(false)
            }
            Repaired::Short { lost: 0 } => {
                // Finals that wait for a bookie must not keep an unowned ledger open (A3).
                let (_, found) = self.parts.store.get(&keys::ledger(ledger)).await?;
                let metadata = found.and_then(|f| LedgerMetadata::from_key_value(&f).ok());
                if let Some(found) = metadata.filter(|found| !found.value.is_closed()) {
                    self.close_if_unclaimed(&found.value, bundles).await?;
                }
                Ok(false)
            }
            Repaired::Short { lost } => {
                if self.alarmed.insert(ledger) {
                    tracing::error!(
                        ledger_id = ledger.0,
                        entries = lost,
                        "no bookie gives some entries: the ledger stays listed"
                    );
                }
                Ok(false)
            }
        }
    }

    /// A3: a ledger whose bundle has a live claim is left to its owner, who reads the listing and the registrations as we
    /// do. With no live claim for long enough it is recovered, which fences and closes it.
    async fn close_if_unclaimed(
        &mut self,
        metadata: &LedgerMetadata,
        bundles: u32,
    ) -> Result<(), StoreError> {
        let claim = keys::owner(metadata.owner.segment.bundle(bundles));
        if self.parts.store.get(&claim).await?.1.is_some() {
            self.unclaimed.remove(&metadata.id);
            return Ok(());
        }
        let since = *self.unclaimed.entry(metadata.id).or_insert_with(Instant::now);
        if since.elapsed() < self.parts.config.unclaimed_for {
            return Ok(());
        }
        // Another fresh 60 s before the next try: an owner that came and went in between is not overlooked.
        self.unclaimed.remove(&metadata.id);
        match self.parts.client.recover_and_close(metadata.id, Epoch(0)).await {
            Ok(closed) => {
                tracing::info!(
                    ledger_id = closed.id.0,
                    "ledger without an owner is closed for repair"
                );
            }
            Err(error) => {
                tracing::info!(ledger_id = metadata.id.0, %error, "ledger is recovered later");
            }
        }
        Ok(())
    }
}
