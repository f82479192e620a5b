//! Where a ledger's entries are to be had: on bookies, in objects, or in both. The list says which; a copy that cannot give
//! an entry sends the reader to the other one (X5, I16).

use std::sync::Arc;

use geminga_bookie_client::{
    LedgerMetadata, LedgerState, ReadError as LedgerReadError, bookie_rpc::EntryRange, entry::Entry,
};
use geminga_metadata::keys;
use geminga_proto::ids::{EntryId, LedgerId, Offset};

use super::{View, damaged};
use crate::{
    error::ReadError,
    list::{List, Listed, ListedState},
    offload::{
        Stage,
        object::{ColdReader, ObjectLedger},
    },
};

/// A ledger that can be read up to its last entry (RD1, RD2).
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(super) id: LedgerId,
    last: Option<EntryId>,
    /// On bookies.
    metadata: Option<Arc<LedgerMetadata>>,
    /// In cold storage.
    objects: Option<ObjectLedger>,
}

impl Place {
    /// A ledger whose metadata is known, on bookies alone.
    pub(super) fn on_bookies(metadata: Arc<LedgerMetadata>, last: Option<EntryId>) -> Self {
        Self { id: metadata.id, last, metadata: Some(metadata), objects: None }
    }

    /// The last entry that may be read; none for an empty ledger.
    pub(crate) fn last(&self) -> Option<EntryId> {
        self.last
    }
}

impl View {
    /// Where a listed ledger can be read.
    pub(crate) async fn place_of(&self, listed: &Listed) -> Result<Place, ReadError> {
        if listed.state != ListedState::Closed
            && let Some(open) =
                self.open.lock().as_ref().filter(|open| open.writer.id() == listed.id)
        {
            let metadata = Arc::new(open.writer.metadata().value);
            return Ok(Place::on_bookies(metadata, open.last));
        }
        let offloaded = listed.offload.clone().filter(|o| o.stage >= Stage::Uploaded);
        let Some(offload) = offloaded else {
            let (metadata, last) = self.closed_metadata(listed.id).await?;
            return Ok(Place::on_bookies(metadata, last));
        };
        let metadata = match offload.stage {
            // A ledger that cannot be found, or is Deleted since the list was read, is read from its objects (X3).
            Stage::Uploaded => self.closed_metadata(listed.id).await.ok(),
            Stage::Uploading | Stage::LedgerDeleted => None,
        };
        Ok(Place {
            id: listed.id,
            last: listed.counts.entries.checked_sub(1).map(EntryId),
            metadata: metadata.map(|(metadata, _)| metadata),
            objects: Some(ObjectLedger { segment: self.segment, ledger: listed.id, offload }),
        })
    }

    async fn closed_metadata(
        &self,
        id: LedgerId,
    ) -> Result<(Arc<LedgerMetadata>, Option<EntryId>), ReadError> {
        let cached = self.closed.lock().get(&id).cloned();
        let metadata = match cached {
            Some(metadata) => metadata,
            None => self.fetch(id).await?,
        };
        match metadata.state {
            LedgerState::Closed { last, .. } => Ok((metadata, last)),
            // A roll has landed in the store, or is about to; the list will follow.
            _ => Err(ReadError::Unavailable(format!("ledger {id} is being closed"))),
        }
    }

    async fn fetch(&self, id: LedgerId) -> Result<Arc<LedgerMetadata>, ReadError> {
        let unavailable =
            |error: geminga_metadata::StoreError| ReadError::Unavailable(error.to_string());
        let (_, found) =
            self.ledgers.parts().store.get(&keys::ledger(id)).await.map_err(unavailable)?;
        let damaged = |why: String| damaged(id, why);
        let found = found.ok_or_else(|| damaged("it does not exist".to_owned()))?;
        let metadata =
            LedgerMetadata::from_key_value(&found).map_err(|error| damaged(error.to_string()))?;
        let metadata = Arc::new(metadata.value);
        if metadata.is_closed() {
            self.closed.lock().insert(id, Arc::clone(&metadata));
        }
        Ok(metadata)
    }

    /// Entries of a place, from `range.first` on: at least one. Bookies first, they are near; objects where bookies have
    /// nothing or nothing good.
    pub(crate) async fn entries(
        &self,
        place: &Place,
        range: EntryRange,
        bytes: usize,
    ) -> Result<Vec<Entry>, ReadError> {
        let from_bookies = match &place.metadata {
            None => None,
            Some(metadata) => match self.bookie_entries(metadata, range, bytes).await {
                Ok(entries) => return Ok(entries),
                Err(error) => Some(error),
            },
        };
        let Some(objects) = &place.objects else {
            let nowhere = || ReadError::Unavailable(format!("ledger {} is nowhere", place.id));
            return Err(from_bookies.unwrap_or_else(nowhere));
        };
        let metrics = &self.ledgers.parts().metrics;
        metrics.object_reads.inc();
        if let Some(error) = &from_bookies {
            metrics.object_fallbacks.inc();
            tracing::warn!(ledger = place.id.0, %error, "read from objects instead of bookies");
        }
        match self.object_entries(objects, range, bytes).await {
            Ok(entries) => Ok(entries),
            Err(error) => Err(worse(from_bookies, error)),
        }
    }

    async fn bookie_entries(
        &self,
        metadata: &LedgerMetadata,
        range: EntryRange,
        bytes: usize,
    ) -> Result<Vec<Entry>, ReadError> {
        let reader = self.ledgers.parts().client.reader(metadata.id);
        let entries = match reader.read(metadata, range, bytes).await {
            // A replicator may have moved copies since the metadata was read.
            Err(LedgerReadError::Damaged { .. } | LedgerReadError::Unavailable { .. })
                if metadata.is_closed() && self.closed.lock().remove(&metadata.id).is_some() =>
            {
                let again = self.fetch(metadata.id).await?;
                reader.read(&again, range, bytes).await
            }
            answer => answer,
        };
        entries.map_err(|error| match error {
            // Deleted by who owns the segment now: that is no damage of ours to skip.
            LedgerReadError::Unavailable { .. } | LedgerReadError::Trimmed { .. } => {
                ReadError::Unavailable(error.to_string())
            }
            other => damaged(metadata.id, other.to_string()),
        })
    }

    async fn object_entries(
        &self,
        objects: &ObjectLedger,
        range: EntryRange,
        bytes: usize,
    ) -> Result<Vec<Entry>, ReadError> {
        let answer = self.cold(objects)?.entries(objects, range, bytes).await;
        self.judge_damage(objects, answer).await
    }

    /// An entry at or before the one that holds `offset`, by the objects' index; none where there is no object.
    pub(super) async fn locate_in_objects(
        &self,
        place: &Place,
        offset: Offset,
    ) -> Option<Result<EntryId, ReadError>> {
        let objects = place.objects.as_ref().filter(|_| place.metadata.is_none())?;
        let cold = match self.cold(objects) {
            Ok(cold) => cold,
            Err(error) => return Some(Err(error)),
        };
        let answer = cold.locate(objects, offset).await;
        Some(self.judge_damage(objects, answer).await)
    }

    /// Damage of objects that the list names no more is none: they were trimmed by who owns the segment now.
    async fn judge_damage<T>(
        &self,
        objects: &ObjectLedger,
        answer: Result<T, ReadError>,
    ) -> Result<T, ReadError> {
        let Err(ReadError::Damaged(why)) = answer else { return answer };
        let key = keys::segment_list(self.segment);
        let named = match self.ledgers.parts().store.get(&key).await {
            Ok((_, Some(found))) => List::decode(&found.value).is_ok_and(|list| {
                let uploads = list.data.iter().filter_map(|listed| listed.offload.as_ref());
                uploads.into_iter().any(|offload| offload.uuid == objects.offload.uuid)
            }),
            Ok((_, None)) => false,
            Err(error) => return Err(ReadError::Unavailable(format!("{why}; {error}"))),
        };
        Err(if named { ReadError::Damaged(why) } else { ReadError::Unavailable(why) })
    }

    fn cold(&self, objects: &ObjectLedger) -> Result<&ColdReader, ReadError> {
        self.ledgers.cold_reader().map(AsRef::as_ref).ok_or_else(|| {
            let id = objects.ledger;
            ReadError::Unavailable(format!("ledger {id} is in cold storage, and none is set up"))
        })
    }
}

/// What two failed copies come to: damage only if both are.
fn worse(first: Option<ReadError>, second: ReadError) -> ReadError {
    let Some(first) = first else { return second };
    let both = format!("{first}; {second}");
    match (first, second) {
        (ReadError::Damaged(_), ReadError::Damaged(_)) => ReadError::Damaged(both),
        _ => ReadError::Unavailable(both),
    }
}
