//! Taking a segment over (O2, O4): two transactions with a recovery between them, and nothing served before.
//!
//! ```text
//! read list ──► TK1 {epoch+1, nonce; each open ledger -> InRecovery} ──► recover all (R2..R6) ──► TK2 {each -> Closed; list with counts}
//! ```
//! The old owner is harmless from TK1 on: its list changes conflict (M1), and its ledgers are being fenced.

use std::time::Duration;

use futures::future::try_join_all;
use geminga_bookie_client::{
    CloseVerdict, LedgerMetadata, LedgerState, Nonce, ReadError as LedgerReadError, Recovered,
    RecoveryError, RecoveryStart, Versioned, bookie_rpc::EntryRange, settled_recovery,
};
use geminga_metadata::{Committed, Compare, KeyValue, Op, Revision, StoreError, Txn, commit, keys};
use geminga_proto::ids::{EntryId, Epoch, LedgerId, SegmentId, generation_base_64};
use tokio::time::Instant;

use crate::{
    entry_header,
    error::{DeleteError, LoadError},
    factory::ManagedLedgers,
    list::{Counts, HandleKey, List, ListedState, Log},
    types::Claim,
};

/// Restarts of TK1 after a conflict that is not ours.
const TRIES_MAX: u32 = 8;
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// A segment that is ours, with everything listed closed.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) list: List,
    /// The list key's revision.
    pub(crate) revision: Revision,
}

fn not_ready(error: impl std::fmt::Display) -> LoadError {
    LoadError::Unavailable(error.to_string())
}

impl From<StoreError> for LoadError {
    fn from(error: StoreError) -> Self {
        not_ready(error)
    }
}

/// A ledger to recover, as of TK1.
struct Started {
    log: Log,
    current: Versioned<LedgerMetadata>,
    start: Option<RecoveryStart>,
}

impl ManagedLedgers {
    /// Runs a takeover to its end. May be repeated after any error.
    pub(crate) async fn take_over(
        &self,
        segment: SegmentId,
        claim: Option<&Claim>,
    ) -> Result<Taken, LoadError> {
        let deadline = Instant::now() + self.parts().config.load_patience;
        for _ in 0..TRIES_MAX {
            match self.try_take_over(segment, claim, deadline).await? {
                Some(taken) => return Ok(taken),
                None if Instant::now() >= deadline => break,
                None => tokio::time::sleep(RETRY_PAUSE).await,
            }
        }
        Err(LoadError::Unavailable("the segment's metadata keeps changing".to_owned()))
    }

    /// None: somebody else changed what was read; start again.
    async fn try_take_over(
        &self,
        segment: SegmentId,
        claim: Option<&Claim>,
        deadline: Instant,
    ) -> Result<Option<Taken>, LoadError> {
        let store = &self.parts().store;
        let list_key = keys::segment_list(segment);
        let (_, found) = store.get(&list_key).await?;
        let Some(found) = found else { return Err(LoadError::NotFound) };
        let mut list =
            List::decode(&found.value).map_err(|error| LoadError::Damaged(error.to_string()))?;
        let read_epoch = list.epoch;

        let mut started = self.read_open_ledgers(&list).await?;
        let nonce = self.parts().random.uuid();
        let generation = Epoch(generation_base_64(self.parts().config.generation));
        list.epoch = Epoch(read_epoch.max(generation).0 + 1); // O2
        list.epoch_nonce = nonce;
        if !list.has_handle_key() {
            let random = &self.parts().random;
            let key = [random.uuid(), random.uuid()].concat();
            list.handle_key = HandleKey(key.try_into().expect("16 + 16"));
        }
        let mut txn = Txn::new();
        if let Some(claim) = claim {
            txn = txn.when(Compare::CreateRevision(claim.key.clone(), claim.create_revision));
        }
        txn = txn.when(Compare::ModRevision(list_key.clone(), found.mod_revision));
        for one in &mut started {
            one.start = self.parts().client.begin_recovery(&one.current, list.epoch);
            if let Some(start) = &one.start {
                list.recover(one.current.value.id);
                txn = txn.and(start.txn.clone());
            }
        }
        txn = txn.then(Op::put(list_key.clone(), encode(&list)?));

        let revision = match commit(store, &txn, &self.cancel()).await {
            Committed::Done(revision) => revision,
            Committed::Conflict { found, .. } => {
                if claim.is_some_and(|claim| !holds(found.first(), claim)) {
                    return Err(LoadError::ClaimLost);
                }
                // MD3: an earlier try of this very transaction may be the conflict; its nonce tells.
                let (_, now) = store.get(&list_key).await?;
                match now {
                    Some(now) if carries(&now, &nonce) => now.mod_revision,
                    _ => return Ok(None),
                }
            }
            Committed::Unsettled => return Err(LoadError::Stopped),
            Committed::Refused(error) => return Err(not_ready(error)),
        };
        tracing::info!(
            topic = segment.topic.0,
            segment = segment.segment,
            epoch = list.epoch.0,
            ledgers = started.len(),
            "segment taken over"
        );

        let recovered =
            try_join_all(started.iter().map(|one| self.recover_one(one, revision, deadline)))
                .await?;
        self.close_all(&list_key, list, revision, recovered).await.map(Some)
    }

    /// The listed ledgers that are not closed.
    async fn read_open_ledgers(&self, list: &List) -> Result<Vec<Started>, LoadError> {
        let open: Vec<(Log, LedgerId)> = list
            .ledgers()
            .filter(|(_, listed)| listed.state != ListedState::Closed)
            .map(|(log, listed)| (log, listed.id))
            .collect();
        let ledger_keys: Vec<_> = open.iter().map(|(_, id)| keys::ledger(*id)).collect();
        if ledger_keys.is_empty() {
            return Ok(Vec::new());
        }
        let (_, found) = self.parts().store.get_many(&ledger_keys).await?;
        let started = open.iter().zip(found).map(|((log, id), found)| {
            let found = found
                .ok_or_else(|| LoadError::Damaged(format!("listed ledger {id} does not exist")))?;
            let current = LedgerMetadata::from_key_value(&found)
                .map_err(|e| LoadError::Damaged(e.to_string()))?;
            Ok(Started { log: *log, current, start: None })
        });
        started.collect()
    }

    /// R2..R6, again and again until the deadline; then what the ledger holds.
    async fn recover_one(
        &self,
        one: &Started,
        tk1: Revision,
        deadline: Instant,
    ) -> Result<(Closing, Counts), LoadError> {
        let Some(start) = &one.start else {
            // Closed meanwhile by a helper: accept it.
            let counts = self.count(one.log, &one.current.value).await?;
            return Ok((Closing::Closed(one.current.value.clone()), counts));
        };
        let as_of_tk1 = one.current.changed(start.metadata.clone(), tk1);
        let recovered = loop {
            match self.parts().client.recover(as_of_tk1.clone(), start.nonce).await {
                Ok(recovered) => break recovered,
                Err(RecoveryError::Incomplete { ledger, why }) if Instant::now() < deadline => {
                    tracing::warn!(ledger = ledger.0, why, "ledger not recovered yet");
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                Err(RecoveryError::Superseded { .. }) => return Err(LoadError::ClaimLost),
                Err(error) => return Err(not_ready(error)),
            }
        };
        let counts = self.count(one.log, &recovered.closed).await?;
        Ok((Closing::Recovered(Box::new(recovered)), counts))
    }

    /// What a closed ledger holds: from the headers of its first and last entries.
    async fn count(&self, log: Log, metadata: &LedgerMetadata) -> Result<Counts, LoadError> {
        let LedgerState::Closed { last, length } = metadata.state else {
            return Err(LoadError::Damaged(format!("ledger {} is not closed", metadata.id)));
        };
        let Some(last) = last else { return Ok(Counts::default()) };
        let mut counts = Counts { entries: last.0 + 1, bytes: length, ..Counts::default() };
        if log == Log::Data {
            let reader = self.parts().client.reader(metadata.id);
            let mut headers = Vec::new();
            for id in [EntryId(0), last] {
                let range = EntryRange { first: id, last: id };
                let entries =
                    reader.read(metadata, range, usize::MAX).await.map_err(
                        |error| match error {
                            LedgerReadError::Unavailable { .. } => not_ready(error),
                            other => LoadError::Damaged(other.to_string()),
                        },
                    )?;
                let entry = entries.first().ok_or_else(|| not_ready("an empty answer"))?;
                let (header, _) = entry_header::decode(&entry.payload)
                    .map_err(|e| LoadError::Damaged(e.to_string()))?;
                headers.push(header);
            }
            let [first, end] = &headers[..] else { unreachable!("two entries were read") };
            counts.records = end.base_offset + u64::from(end.count) - first.base_offset;
            (counts.first_publish_ms, counts.last_publish_ms) =
                (first.publish_time_ms, end.publish_time_ms);
        }
        Ok(counts)
    }

    /// TK2: every recovered ledger Closed, and the list with what they hold.
    async fn close_all(
        &self,
        list_key: &geminga_metadata::Key,
        mut list: List,
        revision: Revision,
        mut recovered: Vec<(Closing, Counts)>,
    ) -> Result<Taken, LoadError> {
        if recovered.is_empty() {
            return Ok(Taken { list, revision });
        }
        for (closing, counts) in &recovered {
            list.close(closing.id(), *counts);
        }
        let value = encode(&list)?;
        for _ in 0..TRIES_MAX {
            let mut txn = Txn::new()
                .when(Compare::ModRevision(list_key.clone(), revision))
                .then(Op::put(list_key.clone(), value.clone()));
            for (closing, _) in &recovered {
                if let Closing::Recovered(recovered) = closing {
                    txn = txn.and(recovered.txn.clone());
                }
            }
            match commit(&self.parts().store, &txn, &self.cancel()).await {
                Committed::Done(revision) => return Ok(Taken { list, revision }),
                Committed::Conflict { found, .. } => {
                    let now = found.first().cloned().flatten();
                    match now {
                        Some(now) if now.mod_revision == revision => {}
                        // Ours from an earlier try: the same epoch nonce, and everything closed.
                        Some(now) if carries(&now, &list.epoch_nonce) => {
                            return Ok(Taken { list, revision: now.mod_revision });
                        }
                        _ => return Err(LoadError::ClaimLost),
                    }
                    self.rebuild(&mut recovered).await?;
                }
                Committed::Unsettled => return Err(LoadError::Stopped),
                Committed::Refused(error) => return Err(not_ready(error)),
            }
        }
        Err(not_ready("ledgers keep changing while they are closed"))
    }

    /// The list is as read, so a ledger key moved: by a replicator (rebuild), or by a rival helper (accept or give up).
    async fn rebuild(&self, recovered: &mut [(Closing, Counts)]) -> Result<(), LoadError> {
        for (closing, _) in recovered {
            let Closing::Recovered(one) = closing else { continue };
            let (_, found) = self.parts().store.get(&keys::ledger(one.id)).await?;
            match settled_recovery(found.as_ref(), one) {
                CloseVerdict::Ours => *closing = Closing::Closed(one.closed.clone()),
                // The same end may lie on other bookies: what stands is accepted.
                CloseVerdict::SameEnd => {
                    let stands = found.as_ref().expect("its end was compared");
                    let stands = LedgerMetadata::from_key_value(stands)
                        .map_err(|error| LoadError::Damaged(error.to_string()))?;
                    *closing = Closing::Closed(stands.value);
                }
                CloseVerdict::Rebuild(again) => *closing = Closing::Recovered(again),
                // A rival closed it elsewhere: recover again from what stands (R7).
                CloseVerdict::Lost => {
                    return Err(not_ready(format!("ledger {} was closed by a rival", one.id)));
                }
            }
        }
        Ok(())
    }

    /// Deletes a segment: takes it over (so that every ledger is closed and its writer fenced, MD4), then moves its ledgers
    /// to Deleted, at most 50 at a time (M3), and removes the list. Safe to repeat.
    ///
    /// # Errors
    /// [`DeleteError`]. A segment that does not exist is none: there is nothing to delete.
    pub async fn delete(&self, segment: SegmentId) -> Result<(), DeleteError> {
        self.try_delete(segment).await.map_err(|error| match error {
            LoadError::Damaged(why) => DeleteError::Damaged(why),
            LoadError::Stopped => DeleteError::Stopped,
            other => DeleteError::Unavailable(other.to_string()),
        })
    }

    async fn try_delete(&self, segment: SegmentId) -> Result<(), LoadError> {
        let mut taken = match self.take_over(segment, None).await {
            Ok(taken) => taken,
            Err(LoadError::NotFound) => return Ok(()),
            Err(error) => return Err(error),
        };
        let list_key = keys::segment_list(segment);
        self.close_views(&taken.list).await?;
        loop {
            let ledgers: Vec<LedgerId> =
                taken.list.all_ledgers().map(|listed| listed.id).take(LEDGERS_PER_TXN).collect();
            let mut txn = Txn::new().when(Compare::ModRevision(list_key.clone(), taken.revision));
            txn = txn.and(self.delete_ledgers(&ledgers).await?);
            taken.list.drop_ledgers(&ledgers);
            let emptied = taken.list.all_ledgers().next().is_none();
            txn = txn.then(if emptied {
                Op::Delete(list_key.clone())
            } else {
                Op::put(list_key.clone(), encode(&taken.list)?)
            });
            match commit(&self.parts().store, &txn, &self.cancel()).await {
                Committed::Done(_) if emptied => return Ok(()),
                Committed::Done(revision) => taken.revision = revision,
                // Our own earlier try, or a replicator: what is left is seen by another round.
                Committed::Conflict { .. } => return Box::pin(self.try_delete(segment)).await,
                Committed::Unsettled => return Err(LoadError::Stopped),
                Committed::Refused(error) => return Err(not_ready(error)),
            }
        }
    }

    /// What a compaction that did not end left open is closed, and its writer thereby fenced (MD4): it can be deleted then. A
    /// takeover does without: nobody reads such a ledger, and no list change of the owner that wrote it succeeds any more.
    pub(crate) async fn close_views(&self, list: &List) -> Result<(), LoadError> {
        for listed in &list.compacting {
            if listed.state == ListedState::Closed {
                continue;
            }
            match self.parts().client.recover_and_close(listed.id, list.epoch).await {
                // Its key says Deleted, or nothing: there is nothing to delete.
                Ok(_) | Err(RecoveryError::Gone { .. }) => {}
                Err(RecoveryError::Superseded { .. }) => return Err(LoadError::ClaimLost),
                Err(RecoveryError::Stopped { .. }) => return Err(LoadError::Stopped),
                Err(RecoveryError::Metadata(error)) => {
                    return Err(LoadError::Damaged(error.to_string()));
                }
                Err(error) => return Err(not_ready(error)),
            }
        }
        Ok(())
    }

    /// Closed -> Deleted for each of these (MD4, M3).
    pub(crate) async fn delete_ledgers(&self, ledgers: &[LedgerId]) -> Result<Txn, LoadError> {
        let ledger_keys: Vec<_> = ledgers.iter().map(|id| keys::ledger(*id)).collect();
        if ledger_keys.is_empty() {
            return Ok(Txn::new());
        }
        let (_, found) = self.parts().store.get_many(&ledger_keys).await?;
        let mut txn = Txn::new();
        for (key, found) in ledger_keys.into_iter().zip(found) {
            let Some(found) = found else { continue };
            let current = LedgerMetadata::from_key_value(&found)
                .map_err(|e| LoadError::Damaged(e.to_string()))?;
            // Its objects are the only copy: the janitor's, once no list names them (X4).
            if matches!(current.value.state, LedgerState::Deleted { .. }) {
                continue;
            }
            let Some(deleted) = current.value.deleted(Nonce(self.parts().random.uuid())) else {
                return Err(not_ready(format!("ledger {} is not closed", current.value.id)));
            };
            txn = txn
                .when(Compare::ModRevision(key.clone(), current.mod_revision))
                .then(Op::put(key, deleted.encode()));
        }
        Ok(txn)
    }
}

/// Ledgers moved in one transaction (M3).
pub(crate) const LEDGERS_PER_TXN: usize = 50;

/// How a ledger gets closed by TK2.
enum Closing {
    Recovered(Box<Recovered>),
    /// It is already.
    Closed(LedgerMetadata),
}

impl Closing {
    fn id(&self) -> LedgerId {
        match self {
            Self::Recovered(recovered) => recovered.id,
            Self::Closed(metadata) => metadata.id,
        }
    }
}

fn encode(list: &List) -> Result<Vec<u8>, LoadError> {
    list.encode().map_err(|error| LoadError::Damaged(error.to_string()))
}

fn holds(found: Option<&Option<KeyValue>>, claim: &Claim) -> bool {
    matches!(found, Some(Some(found)) if found.create_revision == claim.create_revision)
}

/// Whether a list value carries our epoch nonce.
pub(crate) fn carries(found: &KeyValue, nonce: &[u8; 16]) -> bool {
    List::decode(&found.value).is_ok_and(|list| list.epoch_nonce == *nonce)
}
