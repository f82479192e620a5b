//! Changes of the list value (M1, M2, M4): one at a time per segment, each one transaction carrying the list's revision.
//!
//! Outcomes are settled by MD3: the same transaction is repeated until it is done or conflicts; after a conflict the new
//! ledger's id in the list (or the list itself) says whether an earlier try was ours. While one is unsettled, the owner
//! acknowledges nothing on the ledgers it is about.

use geminga_bookie_client::{
    CloseVerdict, LedgerOwner, LedgerWriter, NewLedger, Sealed, Versioned, settled_close,
};
use geminga_metadata::{Committed, Compare, Key, Op, Revision, Txn, commit, keys};
use geminga_proto::ids::{LedgerId, Offset, SegmentId};

use crate::{
    error::LoadError,
    factory::ManagedLedgers,
    list::{Counts, List, Log, Tombstones},
    offload::Object,
    takeover::LEDGERS_PER_TXN,
};

/// The list as it stands, under our epoch.
#[derive(Clone, Debug)]
pub(crate) struct Current {
    pub(crate) list: List,
    pub(crate) revision: Revision,
}

/// Why a change did not happen.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum ChangeError {
    /// The segment is somebody else's (M1), or we are stopping with the outcome unknown: serve nothing more.
    #[error("{0}")]
    Fenced(String),
    /// Nothing happened: too few writable bookies, or no store. May be repeated.
    #[error("{0}")]
    NotNow(String),
}

/// A list change in the making.
pub(crate) struct Changer {
    pub(crate) ledgers: ManagedLedgers,
    pub(crate) segment: SegmentId,
}

const TRIES_MAX: u32 = 16;

impl Changer {
    fn list_key(&self) -> Key {
        keys::segment_list(self.segment)
    }

    /// M4: a new ledger, created and listed in one transaction.
    pub(crate) async fn open(
        &self,
        current: Current,
        log: Log,
    ) -> Result<(Current, LedgerWriter), ChangeError> {
        let new = self.plan(&current).await?;
        let mut list = current.list;
        list.open(log, new.id).map_err(not_now)?;
        let revision = self
            .commit_list(current.revision, &list, new.txn.clone(), |list| lists(list, new.id))
            .await?;
        let writer = self.ledgers.parts().client.writer(Versioned::created(new.metadata, revision));
        Ok((Current { list, revision }, writer))
    }

    /// M2: {old Open -> Closed; new ledger Open; list}, or without a next ledger where none can be made or none is wanted.
    pub(crate) async fn close(
        &self,
        current: Current,
        log: Log,
        sealed: Sealed,
        counts: Counts,
        open_next: bool,
    ) -> Result<(Current, Option<LedgerWriter>), ChangeError> {
        let mut list = current.list.clone();
        list.close(sealed.id, counts);
        let mut next = None;
        if open_next {
            let planned = match self.plan(&current).await {
                Ok(new) => list.open(log, new.id).map(|()| new).map_err(not_now),
                Err(error) => Err(error),
            };
            match planned {
                Ok(new) => next = Some(new),
                Err(ChangeError::NotNow(why)) => {
                    tracing::warn!(
                        topic = self.segment.topic.0,
                        segment = self.segment.segment,
                        why,
                        "no next ledger yet"
                    );
                }
                Err(error) => return Err(error),
            }
        }
        let lost = |id| ChangeError::Fenced(format!("ledger {id} was taken over"));
        self.commit_close(current.revision, list, sealed, next, lost).await
    }

    /// One transaction {Open -> Closed; the next ledger, if any; list}, built anew while only a replicator moves the key.
    /// `lost`: what it means that somebody else closed the ledger.
    async fn commit_close(
        &self,
        read_at: Revision,
        list: List,
        mut sealed: Sealed,
        next: Option<NewLedger>,
        lost: fn(LedgerId) -> ChangeError,
    ) -> Result<(Current, Option<LedgerWriter>), ChangeError> {
        let value = encode(&list)?;
        let shows = |stored: &List| {
            next.as_ref().map_or_else(|| *stored == list, |new| lists(stored, new.id))
        };
        let mut close_txn = sealed.txn.clone();
        for _ in 0..TRIES_MAX {
            let mut txn = Txn::new()
                .when(Compare::ModRevision(self.list_key(), read_at))
                .then(Op::put(self.list_key(), value.clone()))
                .and(close_txn.clone());
            if let Some(new) = &next {
                txn = txn.and(new.txn.clone());
            }
            match self.settle(&txn, read_at, &list, &shows).await? {
                Settled::Done(revision) => {
                    let writer = next.map(|new: NewLedger| {
                        self.ledgers
                            .parts()
                            .client
                            .writer(Versioned::created(new.metadata, revision))
                    });
                    return Ok((Current { list, revision }, writer));
                }
                Settled::ListUnmoved => {
                    // Only the ledger's key moved: by the replicator, or it is not ours any more.
                    let found = self.get(&keys::ledger(sealed.id)).await?;
                    match settled_close(found.as_ref(), &sealed) {
                        CloseVerdict::Ours | CloseVerdict::SameEnd => close_txn = Txn::new(),
                        CloseVerdict::Rebuild(again) => {
                            sealed = *again;
                            close_txn = sealed.txn.clone();
                        }
                        CloseVerdict::Lost => return Err(lost(sealed.id)),
                    }
                }
            }
        }
        Err(ChangeError::Fenced("the ledger's metadata keeps changing".to_owned()))
    }

    /// C4, C6: closed cursor-log ledgers leave the list and are deleted, in one transaction; `inline` replaces the inline
    /// snapshot.
    pub(crate) async fn drop_cursor_ledgers(
        &self,
        current: Current,
        ledgers: &[LedgerId],
        inline: Vec<u8>,
    ) -> Result<Current, ChangeError> {
        let deletes = self.ledgers.delete_ledgers(ledgers).await.map_err(|error| match error {
            LoadError::Damaged(why) => ChangeError::Fenced(why),
            other => ChangeError::NotNow(other.to_string()),
        })?;
        let mut list = current.list;
        for id in ledgers {
            list.drop_cursor_ledger(*id);
        }
        list.inline_snapshot = inline.into();
        let revision =
            self.commit_list(current.revision, &list, deletes, |stored| *stored == list).await?;
        Ok(Current { list, revision })
    }

    /// X1: an upload of a closed ledger begins under this uuid. Its first object is written after this, never before.
    pub(crate) async fn begin_upload(
        &self,
        current: Current,
        ledger: LedgerId,
        uuid: [u8; 16],
        at_ms: u64,
        objects: usize,
    ) -> Result<Current, ChangeError> {
        let mut list = current.list;
        list.begin_upload(ledger, uuid, at_ms, objects).map_err(not_now)?;
        self.commit_upload(current.revision, list, uuid).await
    }

    /// X2: the objects of this upload were read back whole.
    pub(crate) async fn uploaded(
        &self,
        current: Current,
        ledger: LedgerId,
        uuid: [u8; 16],
        at_ms: u64,
        objects: &[Object],
    ) -> Result<Current, ChangeError> {
        let mut list = current.list;
        list.uploaded(ledger, uuid, at_ms, objects).map_err(not_now)?;
        self.commit_upload(current.revision, list, uuid).await
    }

    async fn commit_upload(
        &self,
        read_at: Revision,
        list: List,
        uuid: [u8; 16],
    ) -> Result<Current, ChangeError> {
        // The uuid tells an earlier try of ours (MD3); so does the whole list, which nobody else writes in our epoch.
        let shows = |stored: &List| {
            let uploads = stored.data.iter().filter_map(|listed| listed.offload.as_ref());
            uploads.into_iter().any(|offload| offload.uuid == uuid) && *stored == list
        };
        let revision = self.commit_list(read_at, &list, Txn::new(), shows).await?;
        Ok(Current { list, revision })
    }

    /// X3: uploaded ledgers leave bookies, in one transaction with the list that says so.
    pub(crate) async fn delete_offloaded(
        &self,
        current: Current,
        ledgers: &[LedgerId],
        at_ms: u64,
    ) -> Result<Current, ChangeError> {
        let deletes = self.deletes(ledgers).await?;
        let mut list = current.list;
        list.ledgers_deleted(ledgers, at_ms);
        let revision =
            self.commit_list(current.revision, &list, deletes, |stored| *stored == list).await?;
        Ok(Current { list, revision })
    }

    /// M3: the first `count` data ledgers leave the list, and bookies, in one transaction. Objects of theirs become the
    /// janitor's (X4).
    pub(crate) async fn trim(
        &self,
        current: Current,
        count: usize,
    ) -> Result<Current, ChangeError> {
        let ledgers: Vec<LedgerId> =
            current.list.data[..count].iter().map(|listed| listed.id).collect();
        let deletes = self.deletes(&ledgers).await?;
        let mut list = current.list;
        list.drop_ledgers(&ledgers);
        let revision =
            self.commit_list(current.revision, &list, deletes, |stored| *stored == list).await?;
        Ok(Current { list, revision })
    }

    /// M4: a ledger of a compacted view that is being written, created and listed in one transaction.
    pub(crate) async fn open_view(
        &self,
        current: Current,
        base_offset: Offset,
    ) -> Result<(Current, LedgerWriter), ChangeError> {
        let new = self.plan(&current).await?;
        let mut list = current.list;
        list.open_view(new.id, base_offset).map_err(not_now)?;
        let revision = self
            .commit_list(current.revision, &list, new.txn.clone(), |list| lists(list, new.id))
            .await?;
        let writer = self.ledgers.parts().client.writer(Versioned::created(new.metadata, revision));
        Ok((Current { list, revision }, writer))
    }

    /// A ledger of a view that is being written ends. One that somebody else closed is of no use, and no harm: it is no
    /// ledger of the log.
    pub(crate) async fn close_view(
        &self,
        current: Current,
        sealed: Sealed,
        counts: Counts,
    ) -> Result<Current, ChangeError> {
        let mut list = current.list;
        list.close(sealed.id, counts);
        let lost = |id| not_now(format!("ledger {id} was closed by somebody else"));
        Ok(self.commit_close(current.revision, list, sealed, None, lost).await?.0)
    }

    /// The view that was written takes the place of the one before, whose ledgers are deleted in the same transaction, as
    /// many as one may hold.
    pub(crate) async fn swap_view(
        &self,
        current: Current,
        horizon: Offset,
        tombstones: Tombstones,
    ) -> Result<Current, ChangeError> {
        let mut list = current.list;
        let gone = list.swap_view(horizon, tombstones, LEDGERS_PER_TXN);
        let deletes = self.deletes(&gone).await?;
        let revision =
            self.commit_list(current.revision, &list, deletes, |stored| *stored == list).await?;
        Ok(Current { list, revision })
    }

    /// Ledgers of a view that nobody reads are deleted, as many as a transaction may hold; each is closed.
    pub(crate) async fn drop_view(&self, current: Current) -> Result<Current, ChangeError> {
        let mut list = current.list;
        let ledgers: Vec<LedgerId> =
            list.compacting.iter().map(|listed| listed.id).take(LEDGERS_PER_TXN).collect();
        let deletes = self.deletes(&ledgers).await?;
        list.compacting.retain(|listed| !ledgers.contains(&listed.id));
        let revision =
            self.commit_list(current.revision, &list, deletes, |stored| *stored == list).await?;
        Ok(Current { list, revision })
    }

    /// Closed -> Deleted for each, unless the cluster was restored and nobody has confirmed that yet (G3).
    async fn deletes(&self, ledgers: &[LedgerId]) -> Result<Txn, ChangeError> {
        let confirmed = self.ledgers.is_confirmed().await.map_err(not_now)?;
        let deletes = self.ledgers.delete_ledgers(ledgers).await.map_err(|error| match error {
            LoadError::Damaged(why) => ChangeError::Fenced(why),
            other => ChangeError::NotNow(other.to_string()),
        })?;
        Ok(Txn::new().when(Compare::ModRevision(keys::cluster(), confirmed)).and(deletes))
    }

    async fn plan(&self, current: &Current) -> Result<NewLedger, ChangeError> {
        let parts = self.ledgers.parts();
        let id = LedgerId(self.ledgers.ledger_ids().next().await.map_err(not_now)?);
        let owner = LedgerOwner { segment: self.segment, epoch: current.list.epoch };
        let planned = parts.client.plan_create(id, parts.config.quorum, owner).await;
        planned.map_err(not_now)
    }

    /// One transaction {list; more}, where nobody but another owner can be in the way.
    async fn commit_list(
        &self,
        read_at: Revision,
        list: &List,
        more: Txn,
        shows: impl Fn(&List) -> bool,
    ) -> Result<Revision, ChangeError> {
        let txn = Txn::new()
            .when(Compare::ModRevision(self.list_key(), read_at))
            .then(Op::put(self.list_key(), encode(list)?))
            .and(more);
        match self.settle(&txn, read_at, list, &shows).await? {
            Settled::Done(revision) => Ok(revision),
            Settled::ListUnmoved => {
                Err(ChangeError::NotNow("a ledger's metadata moved meanwhile".to_owned()))
            }
        }
    }

    /// Carries a transaction that writes `written` to an end (MD3) and judges a conflict (M1). A list that shows the change
    /// is ours only under our own epoch: a later owner's list still names the ledgers we opened.
    async fn settle(
        &self,
        txn: &Txn,
        read_at: Revision,
        written: &List,
        shows: &impl Fn(&List) -> bool,
    ) -> Result<Settled, ChangeError> {
        let ours = |stored: &List| {
            (stored.epoch, stored.epoch_nonce) == (written.epoch, written.epoch_nonce)
                && shows(stored)
        };
        match commit(&self.ledgers.parts().store, txn, &self.ledgers.cancel()).await {
            Committed::Done(revision) => Ok(Settled::Done(revision)),
            Committed::Conflict { .. } => {
                let now = self.get(&self.list_key()).await?;
                match now {
                    Some(now) if now.mod_revision == read_at => Ok(Settled::ListUnmoved),
                    Some(now) if List::decode(&now.value).is_ok_and(|list| ours(&list)) => {
                        Ok(Settled::Done(now.mod_revision))
                    }
                    _ => Err(ChangeError::Fenced(
                        "another owner changed the segment's list".to_owned(),
                    )),
                }
            }
            Committed::Unsettled => {
                Err(ChangeError::Fenced("stopped while a change was unsettled".to_owned()))
            }
            Committed::Refused(error) => Err(ChangeError::NotNow(error.to_string())),
        }
    }

    /// Reads until the store answers: what stands in the way of a verdict is waited for (M1: "unknown: jobs wait").
    async fn get(&self, key: &Key) -> Result<Option<geminga_metadata::KeyValue>, ChangeError> {
        let cancel = self.ledgers.cancel();
        let mut pause = std::time::Duration::from_millis(10);
        loop {
            match self.ledgers.parts().store.get(key).await {
                Ok((_, found)) => return Ok(found),
                Err(error) => {
                    tracing::debug!(%error, "waiting for the metadata store");
                    tokio::select! {
                        biased;
                        () = cancel.cancelled() => return Err(ChangeError::Fenced("stopped".to_owned())),
                        () = tokio::time::sleep(pause) => pause = (pause * 2).min(std::time::Duration::from_secs(1)),
                    }
                }
            }
        }
    }
}

enum Settled {
    Done(Revision),
    /// A condition failed, but the list is as it was read.
    ListUnmoved,
}

fn lists(list: &List, id: LedgerId) -> bool {
    list.all_ledgers().any(|listed| listed.id == id)
}

fn encode(list: &List) -> Result<Vec<u8>, ChangeError> {
    list.encode().map_err(not_now)
}

fn not_now(error: impl std::fmt::Display) -> ChangeError {
    ChangeError::NotNow(error.to_string())
}
