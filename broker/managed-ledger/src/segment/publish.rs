//! The owner's data side: streams of batches are opened, batches are taken up in order (DD1, DD3, DD5), and confirmed.

use bytes::Bytes;
use geminga_bookie_client::{LedgerWriter, entry::ENTRY_PAYLOAD_BYTES_MAX};
use geminga_proto::{
    ids::{EntryId, Offset},
    storage::v1::{
        EntryHeader,
        entry_header::{Control, Grant, Producer, control::Kind},
    },
};
use geminga_runtime::{budget::Permit, telemetry::TraceContext};
use prost::Message;
use tokio::{sync::oneshot, time::Instant};

use super::{lane::Appended, owner::Owner};
use crate::{
    dedup::{Chain, Open, OpenRefused, Opened, ProducerId, Verdict},
    entry_header::HEADER_BYTES_MAX,
    error::{ProducerError, PublishError},
    types::{ProducerIdentity, ProducerOpen, ProducerOpened, PublishBatch, Stored, StoredBatch},
};

pub(super) type Answer<T, E> = oneshot::Sender<Result<T, E>>;

/// A clock that is behind by no more than this does not turn publish times back.
const CLOCK_STEP_MS_MAX: u64 = 3_600_000;
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
    /// An entry without messages, at the offset of the next batch: a probe (O3) or a grant (DD4); and who waits for it.
    Control(Box<EntryHeader>, Option<Opening>),
}

/// A stream about to be opened: it waits for what is on its way, or for its grant.
pub(super) struct Opening {
    id: ProducerId,
    session: bool,
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
        let opening = match &open.identity {
            _ if self.closing.is_some() => Err(ProducerError::Closed),
            ProducerIdentity::Named(name) => {
                Ok((ProducerId::from(name.as_str().to_owned()), false, true))
            }
            ProducerIdentity::Resume(token) if token.starts_with(SESSION_PREFIX.as_bytes()) => {
                Ok((token.clone(), true, false))
            }
            ProducerIdentity::Resume(_) => Err(ProducerError::UnknownSession),
            ProducerIdentity::Session => {
                let name: String =
                    self.ledgers.parts().random.uuid().iter().map(|b| format!("{b:02x}")).collect();
                Ok((ProducerId::from(format!("{SESSION_PREFIX}{name}")), true, true))
            }
        };
        match opening {
            Ok((id, session, may_create)) => {
                self.note_ended_streams();
                self.open_stream(&open, id, session, may_create, answer);
            }
            Err(error) => drop(answer.send(Err(error))),
        }
    }

    fn open_stream(
        &mut self,
        open: &ProducerOpen,
        id: ProducerId,
        session: bool,
        may_create: bool,
        answer: Answer<ProducerOpened, ProducerError>,
    ) {
        let producers_max = self.ledgers.parts().config.producers_max;
        // A grant goes into the ledger; the window does not know yet whether there will be one.
        if !session && self.refuses_batches() {
            return drop(answer.send(Err(ProducerError::MetadataUnavailable)));
        }
        if str::from_utf8(&id).is_err() {
            return drop(answer.send(Err(ProducerError::UnknownSession)));
        }
        let stream = open.stream_number;
        let opened = self.window.open(&Open {
            id: &id,
            session,
            stream,
            may_create,
            access: open.access,
            held_epoch: open.held_epoch,
            now_ms: self.now_ms(),
            producers_max,
        });
        let opening = Opening { id, session, stream, answer };
        match opened {
            Ok(Opened::Grant(grant)) => self.grant(grant, opening),
            opened => self.go_on(opened, opening),
        }
    }

    /// DD4: behind all that is on its way; the stream opens when it is durable.
    fn grant(&mut self, grant: Grant, opening: Opening) {
        self.note_activity();
        let header = self.control(Kind::Grant(grant));
        self.data.pending.push_back(Item::Control(Box::new(header), Some(opening)));
    }

    /// The header of an entry without messages: it consumes no offset.
    pub(super) fn control(&mut self, kind: Kind) -> EntryHeader {
        let now_ms = self.now_ms();
        EntryHeader {
            base_offset: self.next_offset.0,
            publish_time_ms: self.stamp(now_ms),
            control: Some(Control { kind: Some(kind) }),
            ..EntryHeader::default()
        }
    }

    /// Opens that waited for earlier streams are tried again: something was settled.
    fn retry_openings(&mut self) {
        for opening in std::mem::take(&mut self.openings) {
            self.retry(opening);
        }
    }

    fn retry(&mut self, opening: Opening) {
        let opened = self.window.reopen(&opening.id, opening.stream);
        self.go_on(opened, opening);
    }

    fn go_on(&mut self, opened: Result<Opened, OpenRefused>, opening: Opening) {
        let now_ms = self.now_ms();
        let opened = match opened {
            Ok(Opened::At { epoch, persisted }) => {
                let token = if opening.session { opening.id.clone() } else { Bytes::new() };
                let name = String::from_utf8_lossy(&opening.id).into_owned();
                Ok(ProducerOpened { id: opening.id.clone(), name, token, epoch, persisted })
            }
            Ok(Opened::Pending | Opened::Grant(_)) => {
                // Whoever asked may be gone by now: then no stream is open, and nobody waits.
                match opening.answer.is_closed() {
                    true => self.window.disconnected(&opening.id, opening.stream, now_ms),
                    false => self.openings.push(opening),
                }
                return;
            }
            Err(refused) => Err(self.refusal_of(refused)),
        };
        if let Err(Ok(_unheard)) = opening.answer.send(opened) {
            self.window.disconnected(&opening.id, opening.stream, now_ms);
        }
    }

    fn refusal_of(&self, refused: OpenRefused) -> ProducerError {
        match refused {
            OpenRefused::Full => {
                ProducerError::TooManyProducers { limit: self.ledgers.parts().config.producers_max }
            }
            OpenRefused::Unknown => ProducerError::UnknownSession,
            OpenRefused::OldStream { current } => ProducerError::StaleStream { current },
            OpenRefused::OldEpoch { current } => ProducerError::StaleEpoch { current },
            OpenRefused::Held { holder } => {
                ProducerError::Held { holder: String::from_utf8_lossy(&holder).into_owned() }
            }
            OpenRefused::OthersConnected => ProducerError::OthersConnected,
            OpenRefused::NotNamed => ProducerError::NotNamed,
        }
    }

    /// Nobody opens anything here any more.
    pub(super) fn fail_openings(&mut self, error: &ProducerError) {
        for opening in std::mem::take(&mut self.openings) {
            let _ = opening.answer.send(Err(error.clone()));
        }
    }

    /// In order: behind those that are held, or if they must be.
    pub(super) fn publish(&mut self, batch: PublishBatch, answer: Answer<Stored, PublishError>) {
        match self.closing.is_none() && (self.limits.held() > 0 || self.holds()) {
            true => self.hold(batch, answer),
            false => self.take(batch, answer),
        }
    }

    /// In order: the chain (DD5), the offset, the ledger.
    pub(super) fn take(&mut self, batch: PublishBatch, answer: Answer<Stored, PublishError>) {
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
            Verdict::Accept => match self.refusal_of_new(&batch) {
                None => return self.take_up(batch, answer, now_ms),
                Some(refusal) => {
                    self.window.take_back(&batch.producer, chain);
                    refusal
                }
            },
            Verdict::Stored(base_offset) => {
                let _ =
                    answer.send(Ok(Stored { base_offset, count: batch.count, duplicate: true }));
                return;
            }
            Verdict::Pending => {
                let batches = self.data.pending.iter_mut().filter_map(|item| match item {
                    Item::Batch(batch) => Some(batch),
                    Item::Control(..) => None,
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
            Verdict::Fenced => PublishError::ProducerFenced,
        };
        let _ = answer.send(Err(refusal));
    }

    /// Why a batch that follows is not taken up, if it is not.
    fn refusal_of_new(&self, batch: &PublishBatch) -> Option<PublishError> {
        let next = self.next_offset;
        if self.refuses_batches() {
            Some(PublishError::MetadataUnavailable)
        } else if batch.expected_offset.is_some_and(|expected| expected != next) {
            Some(PublishError::UnexpectedOffset { next })
        } else {
            self.over_quota()
        }
    }

    fn take_up(&mut self, batch: PublishBatch, answer: Answer<Stored, PublishError>, now_ms: u64) {
        self.note_activity();
        let publish_time_ms = self.stamp(now_ms);
        let name = String::from_utf8_lossy(&batch.producer).into_owned();
        let session = name.starts_with(SESSION_PREFIX);
        let epoch = self.window.epoch(&batch.producer);
        let header = EntryHeader {
            base_offset: self.next_offset.0,
            count: batch.count,
            publish_time_ms,
            producer: Some(Producer {
                name,
                epoch,
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
            ..EntryHeader::default()
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

    /// The publish time of an entry taken up now. Times do not fall (see [`crate::ManagedLedger::offset_at_time`]), unless the
    /// clock was set back by so much that no honest one could have stamped what is stored.
    pub(super) fn stamp(&mut self, now_ms: u64) -> u64 {
        let behind_ms = self.last_publish_ms.saturating_sub(now_ms);
        if behind_ms == 0 || behind_ms > CLOCK_STEP_MS_MAX {
            self.last_publish_ms = now_ms;
        }
        self.last_publish_ms
    }

    pub(super) fn data_appended(&mut self, outcome: Appended) {
        // Only who consumes here is served from memory.
        let keep = !self.shared.cursors.lock().is_empty();
        let mut last = None;
        let mut outcome = Some(outcome);
        while let Some(appended) = outcome {
            match appended {
                Appended::Stored(entry) => {
                    let before = last.map_or(Offset(0), |(_, end)| end);
                    last = self.confirm(entry, keep).map(|end| (entry, end.max(before))).or(last)
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
        for opening in std::mem::take(&mut self.granted) {
            self.retry(opening);
        }
        self.retry_openings();
        self.after_data();
    }

    /// The oldest batch is durable; the end after it.
    fn confirm(&mut self, entry: EntryId, keep: bool) -> Option<Offset> {
        let item = self.data.pending.pop_front()?;
        let batch = match item {
            Item::Batch(batch) => batch,
            Item::Control(_, opening) => {
                self.data_ledger.counts.entries = entry.0 + 1;
                self.granted.extend(opening);
                return Some(*self.shared.end.borrow());
            }
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
        self.stored_bytes += batch.payload.len() as u64;
        let metrics = &self.ledgers.parts().metrics;
        metrics.appends.inc();
        metrics.append_duration.observe(batch.taken_at.elapsed().as_secs_f64());
        if keep {
            let stored =
                StoredBatch { base_offset: base, header: batch.header, payload: batch.payload };
            self.shared.view.keep_at_tail(stored);
        }
        let stored = Stored { base_offset: Some(base), count, duplicate: false };
        self.receipts.push((batch.answer, stored));
        let duplicate = Stored { duplicate: true, ..stored };
        self.receipts.extend(batch.attached.into_iter().map(|answer| (answer, duplicate)));
        Some(base.advance(u64::from(count)))
    }

    fn after_data(&mut self) {
        let stored = std::mem::take(&mut self.stored_bytes);
        self.ledgers.note_traffic(stored);
        self.note_stored(stored);
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
            match item {
                Item::Batch(batch) => {
                    for answer in batch.attached.into_iter().chain([batch.answer]) {
                        let _ = answer.send(Err(error.clone()));
                    }
                }
                Item::Control(_, None) => {}
                Item::Control(_, Some(opening)) => {
                    let now_ms = self.now_ms();
                    self.window.disconnected(&opening.id, opening.stream, now_ms);
                    let error = match error {
                        PublishError::NotEnoughBookies(why) => {
                            ProducerError::NotEnoughBookies(why.clone())
                        }
                        _ => ProducerError::Fenced,
                    };
                    let _ = opening.answer.send(Err(error));
                }
            }
        }
        self.retry_openings();
    }
}
