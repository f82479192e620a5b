//! The rounds of one compaction, beside the segment's owner: reads, writes, and asks the owner for list changes.

use std::{sync::Arc, time::Duration};

use geminga_bookie_client::{AppendError, LedgerWriter, Sealed, bookie_rpc::EntryRange};
use geminga_proto::ids::{EntryId, LedgerId, Offset};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{sleep, timeout},
};

use super::{
    keys::KeyTable,
    output::Output,
    pace::Pacer,
    progress::Progress,
    rewrite::{observe, rewrite},
};
use crate::{
    backlog, entry_header,
    error::{LoadError, ReadError},
    factory::ManagedLedgers,
    list::{Counts, List, Listed, Tombstones},
    read::View,
    types::StoredBatch,
};

/// Bytes read at a time, at most.
const READ_BYTES: usize = 1 << 20;
/// And no more than this part of a second's.
const READS_PER_S: u64 = 4;
/// A list change that finds a ledger's metadata moved is asked for again so often: a replicator is quick.
const TRIES_MAX: u32 = 5;
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// Who waits for its turn shows this often that it is there.
const SIGN_OF_LIFE: Duration = Duration::from_secs(60);

/// Why a compaction did not reach its end. What it wrote is nobody's; it may be begun again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CompactionError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("the view could not be written: {0}")]
    Append(#[from] AppendError),
    #[error("a ledger of the view could not be sealed: {0}")]
    Seal(#[from] geminga_bookie_client::SealError),
    #[error("the list was not changed: {0}")]
    List(String),
    #[error("ledger {ledger} was read back with {got} instead of {expected}")]
    NotWhole { ledger: LedgerId, got: String, expected: String },
    #[error(transparent)]
    Abandoned(#[from] LoadError),
}

/// A list change that the owner makes.
#[derive(Debug)]
pub(crate) enum Change {
    /// A ledger for a view, from this offset on.
    Open(Offset),
    Close(Box<Sealed>, Counts),
    /// What was written takes the place of the view; the new horizon.
    Swap(Offset, Tombstones),
    /// Ledgers listed as being written are deleted: at most 50, all closed.
    Drop,
}

/// What the owner is asked; the answer has a writer if one was asked for, or says why nothing happened.
#[derive(Debug)]
pub(crate) struct Ask {
    pub(crate) change: Change,
    pub(crate) answer: oneshot::Sender<Result<Option<LedgerWriter>, String>>,
}

/// One compaction of a segment.
pub(crate) struct Compaction {
    pub(crate) ledgers: ManagedLedgers,
    pub(crate) view: Arc<View>,
    pub(crate) asks: mpsc::Sender<Ask>,
    /// The horizon to reach, a confirmed end; it may rise meanwhile.
    pub(crate) target: watch::Receiver<Offset>,
    pub(crate) progress: Arc<Progress>,
    /// What was confirmed in the open ledger when it began.
    pub(crate) open: Counts,
}

impl Compaction {
    /// Removes what an earlier one left, then goes round by round until the horizon is where it should be.
    pub(crate) async fn run(self) -> Result<(), CompactionError> {
        self.clear().await?;
        if self.is_done() {
            return Ok(());
        }
        let turn = self.ledgers.compaction_turn();
        let mut turn = std::pin::pin!(turn);
        let _turn = loop {
            match timeout(SIGN_OF_LIFE, &mut turn).await {
                Ok(turn) => break turn,
                Err(_) => self.progress.read(0),
            }
        };
        let mut pacer = Pacer::new(self.ledgers.clone());
        while !self.is_done() {
            self.round(&mut pacer).await?;
            self.clear().await?; // of a large view before
        }
        Ok(())
    }

    fn is_done(&self) -> bool {
        self.view.list().compacted_to >= *self.target.borrow()
    }

    /// Deletes what the list names as being written: nobody writes it any more.
    async fn clear(&self) -> Result<(), CompactionError> {
        loop {
            let list = self.view.list();
            if list.compacting.is_empty() {
                return Ok(());
            }
            self.ledgers.close_views(&list).await?;
            self.ask(|| Change::Drop).await?;
        }
    }

    async fn round(&self, pacer: &mut Pacer) -> Result<(), CompactionError> {
        let metrics = &self.ledgers.parts().metrics;
        let config = &self.ledgers.parts().config;
        let (list, target) = (self.view.list(), *self.target.borrow());
        let from = list.compacted_to.max(list.first_offset);
        let (_, view_bytes) = list.view_counts();
        self.progress.expect(view_bytes + 2 * self.log_bytes(&list, from));

        let mut table = KeyTable::new(config.compaction_table_bytes);
        let mut horizon = from;
        while horizon < target && !table.is_full() {
            let batches = self.read(horizon, target).await?;
            let bytes = self.note_read(&batches);
            for batch in batches {
                if table.is_full() {
                    break;
                }
                observe(&mut table, &batch);
                horizon = batch.end();
                tokio::task::yield_now().await;
            }
            pacer.step(bytes).await;
        }

        let kept_ms = config.tombstones_kept.as_millis() as u64;
        let tombstones = list.tombstones.after_round(horizon, self.view.now_ms(), kept_ms);
        let mut output = Output::new(self);
        for listed in &list.compacted {
            let mut next = EntryId(0);
            while let Some((batches, after)) =
                self.view.batches(listed, next, self.read_bytes()).await?
            {
                next = after;
                let bytes = self.note_read(&batches);
                for batch in batches {
                    output.take(rewrite(&table, batch, true, tombstones.from)).await?;
                }
                pacer.step(bytes).await;
            }
        }
        let mut next = from;
        while next < horizon {
            let batches = self.read(next, horizon).await?;
            let bytes = self.note_read(&batches);
            for batch in batches {
                next = batch.end();
                output.take(rewrite(&table, batch, false, tombstones.from)).await?;
            }
            pacer.step(bytes).await;
        }
        let written = output.end().await?;
        for (listed, bytes) in written {
            self.read_back(&listed).await?;
            metrics.compaction_written_bytes.inc_by(bytes);
        }
        self.ask(|| Change::Swap(horizon, tombstones)).await?;
        metrics.compactions.inc();
        let (messages, bytes) = self.view.list().view_counts();
        let segment = self.view.segment();
        tracing::info!(
            topic = segment.topic.0,
            segment = segment.segment,
            horizon = horizon.0,
            messages,
            bytes,
            "segment compacted"
        );
        Ok(())
    }

    /// Payload bytes of the log from an offset on, about.
    fn log_bytes(&self, list: &List, from: Offset) -> u64 {
        backlog::estimate(list, &self.open, from).bytes
    }

    /// The log, without a trace in what other readers share.
    async fn read(&self, from: Offset, end: Offset) -> Result<Vec<StoredBatch>, CompactionError> {
        Ok(self.view.read_stored(from, end, self.read_bytes(), usize::MAX).await?)
    }

    /// Small steps of a slow one, so that it sees traffic come and go.
    fn read_bytes(&self) -> usize {
        let part = self.ledgers.parts().config.compaction_bytes_per_s / READS_PER_S;
        usize::try_from(part).unwrap_or(READ_BYTES).clamp(1, READ_BYTES)
    }

    fn note_read(&self, batches: &[StoredBatch]) -> u64 {
        let bytes = batches.iter().map(|batch| batch.payload.len() as u64).sum();
        self.progress.read(bytes);
        self.ledgers.parts().metrics.compaction_read_bytes.inc_by(bytes);
        bytes
    }

    /// As an upload: what counts is what can be read (X2).
    async fn read_back(&self, listed: &Listed) -> Result<(), CompactionError> {
        let expected = (listed.counts.entries, listed.counts.bytes);
        let (mut entries, mut bytes) = (0, 0);
        let place = self.view.place_of(listed).await?;
        let last = place.last();
        let mut next = EntryId(0);
        while last.is_some_and(|last| next <= last) {
            let range = EntryRange { first: next, last: last.unwrap_or(next) };
            for entry in self.view.entries(&place, range, READ_BYTES).await? {
                next = entry.id.next();
                entries += 1;
                bytes += entry.payload.len() as u64;
                let whole = entry_header::decode(&entry.payload);
                whole.map_err(|error| CompactionError::NotWhole {
                    ledger: listed.id,
                    got: error.to_string(),
                    expected: "an entry".to_owned(),
                })?;
            }
            tokio::task::yield_now().await;
        }
        if (entries, bytes) == expected {
            return Ok(());
        }
        let say = |(entries, bytes)| format!("{entries} entries of {bytes} bytes");
        let (got, expected) = (say((entries, bytes)), say(expected));
        Err(CompactionError::NotWhole { ledger: listed.id, got, expected })
    }

    /// One list change, made by the owner between its own.
    pub(super) async fn ask(
        &self,
        change: impl Fn() -> Change,
    ) -> Result<Option<LedgerWriter>, CompactionError> {
        let gone = || CompactionError::List("the segment's owner has ended".to_owned());
        let mut tries = 1;
        loop {
            let (answer, answered) = oneshot::channel();
            let ask = Ask { change: change(), answer };
            self.asks.send(ask).await.map_err(|_| gone())?;
            match answered.await.map_err(|_| gone())? {
                Ok(writer) => return Ok(writer),
                Err(why) if tries >= TRIES_MAX => return Err(CompactionError::List(why)),
                Err(_) => sleep(RETRY_PAUSE).await,
            }
            tries += 1;
        }
    }
}
