//! Seek by time: which message was the first published at or after a moment.

use geminga_bookie_client::bookie_rpc::EntryRange;
use geminga_proto::ids::{EntryId, Offset};

use super::{View, damaged};
use crate::{
    entry_header,
    error::ReadError,
    list::{Counts, Listed},
};

impl View {
    /// See [`crate::ManagedLedger::offset_at_time`]. `open` counts what is confirmed in the open ledger, up to `end`.
    pub(crate) async fn offset_at_time(
        &self,
        time_ms: u64,
        open: Counts,
        end: Offset,
    ) -> Result<Offset, ReadError> {
        loop {
            let (list, first) = (self.list(), self.first_offset());
            let counts = |listed: &Listed| if listed.is_open() { open } else { listed.counts };
            let late = |listed: &&Listed| {
                let counts = counts(listed);
                counts.records > 0
                    && counts.last_publish_ms >= time_ms
                    && listed.base_offset.advance(counts.records) > first
            };
            let Some(listed) = list.data.iter().find(late) else { return Ok(end) };
            let found = match counts(listed).first_publish_ms >= time_ms {
                true => Ok(listed.base_offset),
                false => self.halve(listed, time_ms, end).await,
            };
            match found {
                Ok(found) => return Ok(found.clamp(first, end.max(first))),
                // Trimmed while it was searched: what is kept begins behind it.
                Err(_) if self.first_offset() > listed.base_offset => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The base of an entry published at or after the time, the one before it being older: by halving the ledger, whose first
    /// entry is older.
    async fn halve(&self, listed: &Listed, time_ms: u64, end: Offset) -> Result<Offset, ReadError> {
        let place = self.place_of(listed).await?;
        let Some(last) = place.last() else { return Ok(listed.base_offset) };
        // `older` is older, `found` is not, or nobody knows of one.
        let (mut older, mut young, mut found) = (EntryId(0), last.next(), end);
        while older.0 + 1 < young.0 {
            let middle = EntryId(older.0 + (young.0 - older.0) / 2);
            let range = EntryRange { first: middle, last: middle };
            let entries = self.entries(&place, range, 1).await?;
            let entry = entries
                .first()
                .ok_or_else(|| ReadError::Unavailable("an empty answer".to_owned()))?;
            let (header, _) = entry_header::decode(&entry.payload)
                .map_err(|error| damaged(listed.id, error.to_string()))?;
            if header.publish_time_ms < time_ms {
                older = middle;
            } else {
                (young, found) = (middle, Offset(header.base_offset));
            }
        }
        Ok(found)
    }
}
