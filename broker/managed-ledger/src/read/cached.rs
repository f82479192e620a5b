//! Reading through what is kept in memory: the tail, then what was read behind it a moment ago, then bookies or objects.

use geminga_proto::ids::Offset;

use super::View;
use crate::{
    catch_up::{self, Missed},
    error::ReadError,
    types::StoredBatch,
};

impl View {
    /// Batches from the one that contains `from` on, all below `end`.
    pub(crate) async fn read(
        &self,
        from: Offset,
        end: Offset,
        bytes_max: usize,
        messages_max: usize,
    ) -> Result<Vec<StoredBatch>, ReadError> {
        if from >= end || messages_max == 0 {
            return Ok(Vec::new());
        }
        let first = self.list().first_offset;
        if from < first {
            return Err(ReadError::Trimmed { first });
        }
        let metrics = &self.ledgers.parts().metrics;
        let cached = self.cache.read(from, bytes_max, messages_max);
        if !cached.is_empty() {
            metrics.cache_hits.inc_by(cached.len() as u64);
            return Ok(cached);
        }
        let batches = self.catch_up(from, end, bytes_max, messages_max).await?;
        metrics.cache_misses.inc_by(batches.len() as u64);
        Ok(batches)
    }

    /// Behind the tail: what somebody read a moment ago, or reads now, else from bookies or objects.
    async fn catch_up(
        &self,
        from: Offset,
        end: Offset,
        bytes_max: usize,
        messages_max: usize,
    ) -> Result<Vec<StoredBatch>, ReadError> {
        let metrics = &self.ledgers.parts().metrics;
        let hit = |batches: Vec<StoredBatch>| {
            metrics.catch_up_hits.inc_by(batches.len() as u64);
            Ok(batches)
        };
        let kept = self.catch_up.read(from, bytes_max, messages_max);
        if !kept.is_empty() {
            return hit(kept);
        }
        let reading = match self.catch_up.missed(from, self.about(from, bytes_max)) {
            Missed::Read(reading) => Some(reading),
            Missed::Wait(answer) => {
                let shared = catch_up::wait(answer, from, bytes_max, messages_max).await;
                if !shared.is_empty() {
                    return hit(shared);
                }
                // It failed, or ended before this: no second wait.
                match self.catch_up.missed(from, self.about(from, bytes_max)) {
                    Missed::Read(reading) => Some(reading),
                    Missed::Wait(_) => None,
                }
            }
        };
        let batches = self.read_stored(from, end, bytes_max, messages_max).await?;
        metrics.catch_up_misses.inc_by(batches.len() as u64);
        if let Some(reading) = reading {
            self.catch_up.done(reading, &batches);
            self.note_caches();
        }
        Ok(batches)
    }

    /// How many offsets so many bytes are there, about.
    fn about(&self, from: Offset, bytes: usize) -> u64 {
        let list = self.list();
        let counts = list.holding(from).map(|listed| listed.counts).filter(|c| c.bytes > 0);
        counts.map_or(1, |counts| {
            let about = u128::from(counts.records) * bytes as u128 / u128::from(counts.bytes);
            u64::try_from(about).unwrap_or(u64::MAX)
        })
    }

    /// The newest batch, for who reads at the tail.
    pub(crate) fn keep_at_tail(&self, batch: StoredBatch) {
        self.cache.insert(batch);
        self.note_caches();
    }

    /// Time has passed.
    pub(crate) fn expire_caches(&self) {
        self.catch_up.expire();
        self.note_caches();
    }

    fn note_caches(&self) {
        let metrics = &self.ledgers.parts().metrics;
        metrics.cache_bytes.set(self.ledgers.cache_bytes().in_use() as i64);
        metrics.catch_up_bytes.set(self.ledgers.catch_up_bytes().in_use() as i64);
    }
}
