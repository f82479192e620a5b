//! The ledgers that a round writes: opened when there is something for them, rolled by size, closed one by one.

use futures::{StreamExt, stream::FuturesOrdered};
use geminga_bookie_client::{AppendError, AppendFuture, LedgerWriter};
use geminga_proto::ids::Offset;

use super::{
    rewrite::Rewritten,
    round::{Change, Compaction, CompactionError},
};
use crate::{
    entry_header,
    list::{Counts, Listed},
    types::StoredBatch,
};

/// Entries on their way to bookies.
const IN_FLIGHT_MAX: usize = 64;

/// The view in the making.
pub(super) struct Output<'a> {
    run: &'a Compaction,
    open: Option<Writing>,
    /// Closed, and their bytes.
    written: Vec<(Listed, u64)>,
}

/// Its open ledger.
struct Writing {
    writer: LedgerWriter,
    in_flight: FuturesOrdered<AppendFuture>,
    base_offset: Offset,
    counts: Counts,
}

impl<'a> Output<'a> {
    pub(super) fn new(run: &'a Compaction) -> Self {
        Self { run, open: None, written: Vec::new() }
    }

    pub(super) async fn take(
        &mut self,
        rewritten: Option<Rewritten>,
    ) -> Result<(), CompactionError> {
        let Some(Rewritten { batch, messages }) = rewritten else {
            tokio::task::yield_now().await;
            return Ok(());
        };
        let roll_bytes = self.run.ledgers.parts().config.roll_bytes;
        if self.open.as_ref().is_some_and(|open| open.counts.bytes >= roll_bytes) {
            self.close().await?;
        }
        let writing = match &mut self.open {
            Some(writing) => writing,
            open => {
                let base_offset = batch.base_offset;
                let writer = self.run.ask(|| Change::Open(base_offset)).await?;
                let writer = writer.ok_or_else(|| {
                    CompactionError::List("a ledger was opened without a writer".to_owned())
                })?;
                let (in_flight, counts) = (FuturesOrdered::new(), Counts::default());
                open.insert(Writing { writer, in_flight, base_offset, counts })
            }
        };
        writing.append(batch, messages).await
    }

    async fn close(&mut self) -> Result<(), CompactionError> {
        let Some(mut writing) = self.open.take() else { return Ok(()) };
        while let Some(answer) = writing.in_flight.next().await {
            answer?;
        }
        let sealed = Box::new(writing.writer.seal().await?);
        let (id, counts) = (sealed.id, Counts { bytes: sealed.length, ..writing.counts });
        self.run.ask(|| Change::Close(sealed.clone(), counts)).await?;
        let list = self.run.view.list();
        let listed = list.compacting.iter().find(|listed| listed.id == id).cloned();
        let listed = listed
            .ok_or_else(|| CompactionError::List(format!("ledger {id} is not listed any more")))?;
        debug_assert_eq!(listed.base_offset, writing.base_offset);
        self.written.push((listed, counts.bytes));
        Ok(())
    }

    pub(super) async fn end(mut self) -> Result<Vec<(Listed, u64)>, CompactionError> {
        self.close().await?;
        Ok(self.written)
    }
}

impl Writing {
    /// Sends the batch, as soon as there is room for it (W5).
    async fn append(&mut self, batch: StoredBatch, messages: u64) -> Result<(), CompactionError> {
        let StoredBatch { header, payload, .. } = batch;
        let entry = entry_header::encode(&header, payload);
        let bytes = entry.len();
        let append = loop {
            let append = self.writer.append(entry.clone());
            match append.refused() {
                Some(AppendError::Full) => self.writer.ready(bytes).await,
                Some(error) => return Err(error.into()),
                None => break append,
            }
        };
        self.in_flight.push_back(append);
        while self.in_flight.len() > IN_FLIGHT_MAX
            && let Some(answer) = self.in_flight.next().await
        {
            answer?;
        }
        let counts = &mut self.counts;
        counts.entries += 1;
        counts.records += messages;
        counts.bytes += bytes as u64;
        counts.last_publish_ms = header.publish_time_ms;
        if counts.first_publish_ms == 0 {
            counts.first_publish_ms = header.publish_time_ms;
        }
        Ok(())
    }
}
