//! The owner's data side: streams of batches are opened, batches are taken up in order (DD1, DD3, DD5), and confirmed.

use bytes::Bytes;
use geminga_bookie_client::{LedgerWriter, entry::ENTRY_PAYLOAD_BYTES_MAX};
use geminga_proto::{
    ids::{EntryId, Offset},
    storage::v1::{EntryHeader, entry_header::Producer},
};
use geminga_runtime::{budget::Permit, telemetry::TraceContext};
use prost::Message;
use tokio::{sync::oneshot, time::Instant};

use super::{lane::Appended, owner::Owner};
use crate::{
    dedup::{Chain, Opened, ProducerId, Verdict},
    entry_header::HEADER_BYTES_MAX,
    error::{ProducerError, PublishError},
    types::{ProducerIdentity, ProducerOpen, ProducerOpened, PublishBatch, Stored, StoredBatch},
};

pub(super) type Answer<T, E> = oneshot::Sender<Result<T, E>>;

/// A colon is in no name that a user can choose.
const SESSION_PREFIX: &str = "session:";
/// Of an entry header, beyond its record index: numbers, a producer's name, tags.
const HEADER_FIELDS_BYTES: usize = 512;

/// A batch taken up: it has its offset and waits for its acknowledgement.
pub(super) struct Batch {
    producer: ProducerId,
    hi: u64,
    pub(super) header: EntryHeader,
    pub(super) payload: Bytes,
    pub(super) trace: Option<TraceContext>,
    answer: Answer<Stored, PublishError>,
    /// Repeats of the same batch that came meanwhile (DD1).
    attached: Vec<Answer<Stored, PublishError>>,
    taken_at: Instant,
    _permit: Permit,
}

/// What goes into the data log.
pub(super) enum Item {
    Batch(Box<Batch>),
    /// An entry without messages, at the offset of the next batch: it shows that the ledger still takes adds (O3).
    Probe(Offset),
}

/// A stream about to be opened.
pub(super) struct Opening {
    id: ProducerId,
    session: bool,
    may_create: bool,
    stream: u64,
    answer: Answer<ProducerOpened, ProducerError>,
}

impl Owner {
    /// Answers now, or when the batches of the producer's earlier streams are settled.
    pub(super) fn open_producer(
        &mut self,
        open: ProducerOpen,
        answer: Answer<ProducerOpened, ProducerError>,
    ) {
        let opening = match open.identity {
            _ if self.closing.is_some() => Err(ProducerError::Closed),
            ProducerIdentity::Named(name) => {
                Ok((ProducerId::from(name.as_str().to_owned()), false, true))
            }
            ProducerIdentity::Resume(token) if token.starts_with(SESSION_PREFIX.as_bytes()) => {
                Ok((token, true, false))
            }
            ProducerIdentity::Resume(_) => Err(ProducerError::UnknownSession),
            ProducerIdentity::Session => {
                let name: String =
                    self.ledgers.parts().random.uuid().iter().map(|b| format!("{b:02x}")).collect();
                Ok((ProducerId::from(format!("{SESSION_PREFIX}{name}")), true, true))
            }
        };
        let stream = open.stream_number;
        match opening {
            Ok((id, session, may_create)) => {
                self.note_ended_streams();
                self.try_open(Opening { id, session, may_create, stream, answer });
            }
            Err(error) => drop(answer.send(Err(error))),
        }
    }

    /// Opens that waited are tried again: something was settled.
    fn retry_openings(&mut self) {
        for opening in std::mem::take(&mut self.openings) {
            self.try_open(opening);
        }
    }

    fn try_open(&mut self, opening: Opening) {
        let Opening { id, session, may_create, stream, answer } = opening;
        let producers_max = self.ledgers.parts().config.producers_max;
        let now_ms = self.now_ms();
        let Ok(name) = String::from_utf8(id.to_vec()) else {
            return drop(answer.send(Err(ProducerError::UnknownSession)));
        };
        let opened = match self.window.open(&id, session, stream, may_create, now_ms, producers_max)
        {
            Err(_) => Err(ProducerError::TooManyProducers { limit: producers_max }),
            Ok(None) => Err(ProducerError::UnknownSession),
            Ok(Some(Opened::OldStream { current })) => Err(ProducerError::StaleStream { current }),
            Ok(Some(Opened::Pending)) => {
                // Whoever asked may be gone by now: then no stream is open, and nobody waits.
                if answer.is_closed() {
                    self.window.disconnected(&id, stream, now_ms);
                } else {
                    self.openings.push(Opening { id, session, may_create, stream, answer });
                }
                return;
            }
            Ok(Some(Opened::At { persisted })) => {
                let token = if session { id.clone() } else { Bytes::new() };
                Ok(ProducerOpened { id: id.clone(), name, token, epoch: 0, persisted })
            }
        };
        if let Err(Ok(_unheard)) = answer.send(opened) {
            self.window.disconnected(&id, stream, now_ms);
        }
    }

    /// Nobody opens anything here any more.
    pub(super) fn fail_openings(&mut self, error: &ProducerError) {
        for opening in std::mem::take(&mut self.openings) {
            let _ = opening.answer.send(Err(error.clone()));
        }
    }

    /// In order: the chain (DD5), the offset, the ledger.
    pub(super) fn publish(&mut self, batch: PublishBatch, answer: Answer<Stored, PublishError>) {
        if self.closing.is_some() {
            let _ = answer.send(Err(PublishError::Closed));
            return;
        }
        let header_bytes = HEADER_FIELDS_BYTES + batch.index.encoded_len();
        let bytes = batch.payload.len() + header_bytes;
        if bytes > ENTRY_PAYLOAD_BYTES_MAX || header_bytes > HEADER_BYTES_MAX {
            let _ = answer.send(Err(PublishError::TooLarge { bytes }));
            return;
        }
        if batch.count == 0 {
            let _ = answer.send(Err(PublishError::Invalid("a batch has at least one message")));
            return;
        }
        let now_ms = self.now_ms();
        let chain = Chain { prev: batch.prev, lo: batch.lo, hi: batch.hi };
        let refusal = match self.window.check(&batch.producer, batch.stream_number, chain, now_ms) {
            Verdict::Accept if self.refuses_batches() => {
                self.window.take_back(&batch.producer, chain);
                PublishError::MetadataUnavailable
            }
            Verdict::Accept => return self.take_up(batch, answer, now_ms),
            Verdict::Stored(base_offset) => {
                let _ =
                    answer.send(Ok(Stored { base_offset, count: batch.count, duplicate: true }));
                return;
            }
            Verdict::Pending => {
                let batches = self.data.pending.iter_mut().filter_map(|item| match item {
                    Item::Batch(batch) => Some(batch),
                    Item::Probe(_) => None,
                });
                let same =
                    |one: &&mut Box<Batch>| one.hi == batch.hi && one.producer == batch.producer;
                match batches.into_iter().find(same) {
                    Some(pending) => pending.attached.push(answer),
                    None => drop(answer.send(Err(PublishError::SequenceConflict))),
                }
                return;
            }
            Verdict::OutOfSequence { pushed } => PublishError::OutOfSequence { pushed },
            Verdict::Conflict => PublishError::SequenceConflict,
            Verdict::Unknown => PublishError::UnknownProducer,
            Verdict::OldStream => PublishError::StaleStream,
        };
        let _ = answer.send(Err(refusal));
    }

    fn take_up(&mut self, batch: PublishBatch, answer: Answer<Stored, PublishError>, now_ms: u64) {
        self.note_activity();
        let name = String::from_utf8_lossy(&batch.producer).into_owned();
        let session = name.starts_with(SESSION_PREFIX);
        let header = EntryHeader {
            base_offset: self.next_offset.0,
            count: batch.count,
            publish_time_ms: now_ms,
            producer: Some(Producer {
                name,
                epoch: 0,
                prev_sequence: batch.prev,
                lo_sequence: batch.lo,
                hi_sequence: batch.hi,
                session,
            }),
            format: batch.format,
            codec: batch.codec,
            uncompressed_size: batch.uncompressed_size,
            index: Some(batch.index),
            control: None,
            traceparent: batch.traceparent,
        };
        self.next_offset = self.next_offset.advance(u64::from(batch.count));
        self.data.pending.push_back(Item::Batch(Box::new(Batch {
            producer: batch.producer,
            hi: batch.hi,
            header,
            payload: batch.payload,
            trace: batch.trace,
            answer,
            attached: Vec::new(),
            taken_at: self.last_activity,
            _permit: batch.permit,
        })));
    }

    pub(super) fn data_appended(&mut self, outcome: Appended) {
        // Only who consumes here is served from memory.
        let keep = !self.shared.cursors.lock().is_empty();
        let mut last = None;
        let mut outcome = Some(outcome);
        while let Some(appended) = outcome {
            match appended {
                Appended::Stored(entry) => {
                    last = self.confirm(entry, keep).map(|end| (entry, end)).or(last)
                }
                Appended::NotStored => {} // `poisoned` starts the roll that sends it again (M2)
                Appended::Indeterminate => {
                    self.fence("an append of unknown outcome");
                    break;
                }
            }
            outcome = self.data.appended_now();
        }
        // The end moves before the receipts go out: who has one finds its message.
        if let Some((entry, end)) = last {
            let mut counts = self.data_ledger.counts;
            counts.bytes = self.data.writer().map_or(0, LedgerWriter::length);
            *self.shared.open_counts.lock() = counts;
            self.shared.view.confirmed(entry);
            self.shared.end.send_replace(end);
        }
        for (answer, stored) in self.receipts.drain(..) {
            let _ = answer.send(Ok(stored));
        }
        self.retry_openings();
        self.after_data();
    }

    /// The oldest batch is durable; the end after it.
    fn confirm(&mut self, entry: EntryId, keep: bool) -> Option<Offset> {
        let item = self.data.pending.pop_front()?;
        let Item::Batch(batch) = item else {
            self.data_ledger.counts.entries = entry.0 + 1;
            return Some(*self.shared.end.borrow());
        };
        let ledger = self.data.writer().map(LedgerWriter::id)?;
        let (base, count) = (Offset(batch.header.base_offset), batch.header.count);
        self.window.on_stored(&batch.producer, batch.hi, base);
        self.shared.view.place(ledger, base, entry);
        let counts = &mut self.data_ledger.counts;
        counts.entries = entry.0 + 1;
        counts.records += u64::from(count);
        counts.last_publish_ms = batch.header.publish_time_ms;
        if counts.first_publish_ms == 0 {
            counts.first_publish_ms = batch.header.publish_time_ms;
        }
        self.data_since_dedup += batch.payload.len() as u64;
        let metrics = &self.ledgers.parts().metrics;
        metrics.appends.inc();
        metrics.append_duration.observe(batch.taken_at.elapsed().as_secs_f64());
        if keep {
            let stored =
                StoredBatch { base_offset: base, header: batch.header, payload: batch.payload };
            self.shared.view.cache.insert(stored);
        }
        let stored = Stored { base_offset: Some(base), count, duplicate: false };
        self.receipts.push((batch.answer, stored));
        let duplicate = Stored { duplicate: true, ..stored };
        self.receipts.extend(batch.attached.into_iter().map(|answer| (answer, duplicate)));
        Some(base.advance(u64::from(count)))
    }

    fn after_data(&mut self) {
        let config = &self.ledgers.parts().config;
        // One that is being closed is full already, and the next one is not.
        if self.data.is_open() {
            let length = self.data.writer().map_or(0, LedgerWriter::length);
            self.want.roll_data |= length >= config.roll_bytes;
        }
        self.want.dedup |= self.data_since_dedup >= config.dedup_snapshot_bytes;
    }

    /// Ends everything taken up; the caller knows what that means for each.
    pub(super) fn fail_batches(&mut self, error: &PublishError) {
        for item in std::mem::take(&mut self.data.pending) {
            let Item::Batch(batch) = item else { continue };
            for answer in batch.attached.into_iter().chain([batch.answer]) {
                let _ = answer.send(Err(error.clone()));
            }
        }
        self.retry_openings();
    }
}
