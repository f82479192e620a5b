//! Reading the compacted view below its horizon, and the log from there on.

use geminga_bookie_client::bookie_rpc::EntryRange;
use geminga_proto::ids::{EntryId, Offset};

use super::{SCAN_BYTES, View, decode};
use crate::{
    compaction::rewrite::as_read,
    error::{CompactedReadError, ReadError},
    list::{List, Listed},
    types::{CompactedRead, StoredBatch},
};

/// How often a read begins again because the view was replaced under it.
const TRIES_MAX: u32 = 8;

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub(crate) from: Offset,
    pub(crate) since: Option<Offset>,
    /// The confirmed end.
    pub(crate) end: Offset,
    pub(crate) bytes_max: usize,
    pub(crate) messages_max: usize,
}

impl View {
    /// See [`crate::ManagedLedger::read_compacted`].
    pub(crate) async fn read_compacted(
        &self,
        wanted: Wanted,
    ) -> Result<CompactedRead, CompactedReadError> {
        if wanted.messages_max == 0 {
            return Ok(CompactedRead { batches: Vec::new(), next: wanted.from });
        }
        let mut tries = 1;
        loop {
            let list = self.list();
            if wanted.from >= list.compacted_to {
                return self.read_on(wanted.from, &wanted).await;
            }
            // Keys that were deleted meanwhile, and that the view tells of no more: whoever saw them cannot know.
            let told_from = list.tombstones.from;
            if wanted.from < told_from && wanted.since.is_some_and(|since| since < told_from) {
                return Err(CompactedReadError::Superseded);
            }
            let horizon = list.compacted_to;
            match self.read_view(&list, &wanted).await {
                Ok(read) if read.batches.is_empty() => return self.read_on(horizon, &wanted).await,
                // The view was replaced, and its ledgers are gone.
                Err(_) if self.list().compacted_to != horizon && tries < TRIES_MAX => tries += 1,
                read => return Ok(read?),
            }
        }
    }

    /// The log, from the horizon on.
    async fn read_on(
        &self,
        from: Offset,
        wanted: &Wanted,
    ) -> Result<CompactedRead, CompactedReadError> {
        let read = self.read(from, wanted.end, wanted.bytes_max, wanted.messages_max).await;
        match read {
            Ok(batches) => {
                let next = batches.last().map_or(from, StoredBatch::end);
                Ok(CompactedRead { batches, next })
            }
            // What was trimmed before it was compacted is in neither.
            Err(ReadError::Trimmed { first }) => {
                Ok(CompactedRead { batches: Vec::new(), next: first })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Batches of the view; empty if there is nothing from there on.
    async fn read_view(&self, list: &List, wanted: &Wanted) -> Result<CompactedRead, ReadError> {
        let mut read = CompactedRead { batches: Vec::new(), next: wanted.from };
        let (mut bytes_left, mut messages_left) = (wanted.bytes_max, wanted.messages_max as u64);
        let since = wanted.since.unwrap_or(Offset(0));
        let after = list.compacted.partition_point(|listed| listed.base_offset <= wanted.from);
        for listed in &list.compacted[after.saturating_sub(1)..] {
            let mut next = match self.locate_in_view(listed, read.next).await {
                Ok(found) => found,
                Err(error) if read.batches.is_empty() => return Err(error),
                Err(_) => return Ok(read),
            };
            let budget = bytes_left.clamp(1, SCAN_BYTES);
            loop {
                let batches = match self.batches(listed, next, budget).await {
                    Ok(Some((batches, after))) => {
                        next = after;
                        batches
                    }
                    Ok(None) => break,
                    Err(error) if read.batches.is_empty() => return Err(error),
                    Err(_) => return Ok(read),
                };
                for batch in batches {
                    let end = batch.end();
                    if end <= read.next {
                        continue;
                    }
                    let Some(batch) = as_read(batch, wanted.from, since) else { continue };
                    let bytes = batch.payload.len();
                    let full = bytes > bytes_left || messages_left == 0;
                    if full && !read.batches.is_empty() {
                        return Ok(read);
                    }
                    bytes_left = bytes_left.saturating_sub(bytes);
                    messages_left = messages_left.saturating_sub(batch.messages());
                    read.next = end;
                    read.batches.push(batch);
                }
                if !read.batches.is_empty() && (bytes_left == 0 || messages_left == 0) {
                    return Ok(read);
                }
            }
        }
        read.next = list.compacted_to;
        Ok(read)
    }

    async fn locate_in_view(&self, listed: &Listed, from: Offset) -> Result<EntryId, ReadError> {
        let place = self.place_of(listed).await?;
        let Some(last) = place.last() else { return Ok(EntryId(0)) };
        self.locate(&place, listed, last, from).await
    }

    /// Batches of a closed ledger from this entry on, about so many bytes, and the entry after them; none at its end.
    pub(crate) async fn batches(
        &self,
        listed: &Listed,
        first: EntryId,
        bytes: usize,
    ) -> Result<Option<(Vec<StoredBatch>, EntryId)>, ReadError> {
        let place = self.place_of(listed).await?;
        let Some(last) = place.last().filter(|last| first <= *last) else { return Ok(None) };
        let entries = self.entries(&place, EntryRange { first, last }, bytes).await?;
        let (mut batches, mut next) = (Vec::new(), first);
        for entry in entries {
            next = entry.id.next();
            if let Some(batch) = decode(listed.id, &entry)? {
                self.index(listed.id, batch.base_offset, entry.id);
                batches.push(batch);
            }
        }
        if next == first {
            return Err(ReadError::Unavailable("an empty answer".to_owned()));
        }
        Ok(Some((batches, next)))
    }
}
