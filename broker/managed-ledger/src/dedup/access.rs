//! Who may publish (DD4): streams of producers are opened, named ones under an epoch of their own; one producer may have the
//! segment for itself.
//!
//! ```text
//! epoch    of a named producer: rises with each of its streams; a Grant in the log says so before the stream begins
//! fence    of the segment: rises when a producer fences all others; whoever was admitted under a lower one stays out
//! hold     in memory: the one producer with an exclusive stream; as long as that is open nobody else publishes
//! ```
//! Epochs and fences only rise, so replaying a Grant that a snapshot has seen changes nothing.

use geminga_proto::storage::v1::entry_header::Grant;

use super::{Producer, ProducerId, Window};
use crate::types::Access;

/// A stream to be opened.
#[derive(Clone, Copy, Debug)]
pub struct Open<'a> {
    pub id: &'a ProducerId,
    pub session: bool,
    /// Must not be lower than before (DD5).
    pub stream: u64,
    /// False for a resume: one that finds no window is refused.
    pub may_create: bool,
    pub access: Access,
    /// The epoch that this producer was told by an earlier owner or for an earlier stream, if it goes on from there.
    pub held_epoch: Option<u64>,
    pub now_ms: u64,
    pub producers_max: usize,
}

/// How an open goes on.
#[derive(Clone, Debug, PartialEq)]
pub enum Opened {
    /// The stream may start after this sequence.
    At { epoch: u64, persisted: u64 },
    /// Batches of an earlier stream are on their way: see [`Window::reopen`].
    Pending,
    /// Once this is stored, behind what is on its way: see [`Window::reopen`].
    Grant(Grant),
}

/// Why a stream was not opened. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpenRefused {
    /// The window holds as many producers as it may, and none may leave.
    Full,
    /// A resume that finds no window.
    Unknown,
    /// The stream number is lower than that of a stream opened before (DD5).
    OldStream { current: u64 },
    /// Since the epoch it holds another stream of its name was opened, or it was fenced.
    OldEpoch { current: u64 },
    /// This producer has the segment for itself.
    Held { holder: ProducerId },
    /// Others are there; it wants the segment for itself.
    OthersConnected,
    /// A session fences nobody.
    NotNamed,
}

impl Window {
    /// Opens a stream; batches of the producer's older streams are refused from here on. While some of them are on their way
    /// nothing is answered: who is told a `persisted` below them could give their sequences to other messages, and would
    /// take their receipts for his (DD4).
    ///
    /// # Errors
    /// [`OpenRefused`].
    pub fn open(&mut self, open: &Open<'_>) -> Result<Opened, OpenRefused> {
        let &Open { id, session, stream, access, now_ms, .. } = open;
        self.admit(open)?;
        let fence = self.fence;
        let known = self.producers.get_mut(id);
        let is_new = known.as_ref().is_none_or(|known| stream > known.stream);
        match known {
            Some(known) if known.stream == stream => known.streams += 1,
            Some(known) => (known.stream, known.streams) = (stream, 1),
            None => {
                if self.producers.len() >= open.producers_max && !self.evict_oldest_session() {
                    return Err(OpenRefused::Full);
                }
                let mut new = Producer::new(session, stream, 0, now_ms);
                new.streams = 1;
                self.producers.insert(id.clone(), new);
            }
        }
        match access {
            Access::Shared if is_new && self.holds(id) => self.hold = None,
            Access::Shared => {}
            Access::Exclusive | Access::ExclusiveWithFencing => {
                self.hold = Some((id.clone(), stream));
            }
        }
        self.fence = fence + u64::from(access == Access::ExclusiveWithFencing);
        let fence = self.fence;
        let producer = self.producers.get_mut(id).expect("inserted or found above");
        producer.last_seen_ms = now_ms;
        producer.admitted = fence;
        if session || !(is_new || access == Access::ExclusiveWithFencing) {
            return Ok(producer.opened());
        }
        producer.epoch += 1;
        Ok(Opened::Grant(Grant {
            producer: String::from_utf8_lossy(id).into_owned(),
            epoch: producer.epoch,
            stream_number: stream,
            fence,
        }))
    }

    /// Goes on with an open that waited for what was on its way, or for its grant.
    ///
    /// # Errors
    /// [`OpenRefused`]: a later stream was opened meanwhile, or somebody took the segment for itself.
    pub fn reopen(&self, id: &ProducerId, stream: u64) -> Result<Opened, OpenRefused> {
        let producer = self.producers.get(id).ok_or(OpenRefused::Unknown)?;
        if stream < producer.stream {
            return Err(OpenRefused::OldStream { current: producer.stream });
        }
        if producer.admitted < self.fence {
            return Err(OpenRefused::OldEpoch { current: producer.epoch });
        }
        Ok(producer.opened())
    }

    fn admit(&self, open: &Open<'_>) -> Result<(), OpenRefused> {
        let known = self.producers.get(open.id);
        if known.is_none() && !open.may_create {
            return Err(OpenRefused::Unknown);
        }
        if let Some(known) = known {
            let fenced = known.admitted < self.fence;
            let resumes = open.session || open.held_epoch.is_some();
            if (fenced && resumes) || open.held_epoch.is_some_and(|held| held < known.epoch) {
                return Err(OpenRefused::OldEpoch { current: known.epoch });
            }
            if open.stream < known.stream {
                return Err(OpenRefused::OldStream { current: known.stream });
            }
        }
        let holder =
            self.hold.as_ref().map(|(holder, _)| holder).filter(|holder| *holder != open.id);
        match (open.access, holder) {
            (Access::ExclusiveWithFencing, _) if open.session => Err(OpenRefused::NotNamed),
            (Access::ExclusiveWithFencing, _) => Ok(()),
            (_, Some(holder)) => Err(OpenRefused::Held { holder: holder.clone() }),
            (Access::Shared, None) => Ok(()),
            (Access::Exclusive, None) => {
                let others = |(id, one): (&ProducerId, &Producer)| id != open.id && one.streams > 0;
                match self.producers.iter().any(others) {
                    true => Err(OpenRefused::OthersConnected),
                    false => Ok(()),
                }
            }
        }
    }

    fn holds(&self, id: &ProducerId) -> bool {
        self.hold.as_ref().is_some_and(|(holder, _)| holder == id)
    }

    /// Replays a grant while a segment is loaded (DD2).
    pub fn replay_grant(&mut self, grant: &Grant, at_ms: u64) {
        self.fence = self.fence.max(grant.fence);
        let new = || Producer::new(false, grant.stream_number, 0, at_ms);
        let id = ProducerId::from(grant.producer.clone());
        let producer = self.producers.entry(id).or_insert_with(new);
        if grant.epoch > producer.epoch {
            (producer.epoch, producer.admitted) = (grant.epoch, grant.fence);
            producer.stream = producer.stream.max(grant.stream_number);
        }
        producer.last_seen_ms = producer.last_seen_ms.max(at_ms);
    }

    /// The epoch that entries of this producer carry.
    #[must_use]
    pub fn epoch(&self, id: &ProducerId) -> u64 {
        self.producers.get(id).map_or(0, |producer| producer.epoch)
    }
}

impl Producer {
    fn opened(&self) -> Opened {
        match self.pending.is_empty() {
            true => Opened::At { epoch: self.epoch, persisted: self.persisted },
            false => Opened::Pending,
        }
    }
}
