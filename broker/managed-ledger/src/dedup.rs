//! The deduplication window of a segment: which sequences of which producer are accepted, and which are stored
//! (DD1, DD3, DD5, T32, T41), and which producers may publish at all (DD4, `dedup/access.rs`). Pure.
//!
//! ```text
//! sequences   1 2 3 | 4 5 6 | 7 8      persisted = 3, pushed = 8
//!             stored  on its way       next batch: prev = 8, lo > 8
//! ```

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use geminga_proto::{
    ids::Offset,
    storage::v1::{DedupSnapshot, dedup_snapshot::ProducerState},
};

pub use access::{Open, OpenRefused, Opened};

mod access;

/// A producer's name in the window; cheap to clone.
pub type ProducerId = Bytes;

/// One batch's place in its producer's sequence: `[lo, hi]`, sent after `prev` (DD3, DD5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain {
    pub prev: u64,
    pub lo: u64,
    pub hi: u64,
}

/// What is to be done with a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It follows: append it.
    Accept,
    /// It is stored (DD1); where, if that is still remembered.
    Stored(Option<Offset>),
    /// The same batch is on its way: wait for its outcome (DD1).
    Pending,
    /// It does not follow `pushed` (DD5).
    OutOfSequence { pushed: u64 },
    /// It overlaps stored or pending sequences with other bounds (DD3), or is no range at all.
    Conflict,
    /// The producer is not in the window.
    Unknown,
    /// A newer stream of this producer was opened (DD5).
    OldStream,
    /// Another producer has the segment for itself, or had it since this one was admitted.
    Fenced,
}

#[derive(Clone, Debug)]
struct Producer {
    session: bool,
    /// Rises with each stream of a named producer (DD4); 0 for sessions.
    epoch: u64,
    /// [`Window::fence`] when it was admitted.
    admitted: u64,
    stream: u64,
    /// How many streams of this number are open.
    streams: u32,
    pushed: u64,
    persisted: u64,
    pending: VecDeque<Chain>,
    /// The last stored batches with their offsets, for the answers to repeats.
    recent: VecDeque<(u64, Offset)>,
    last_seen_ms: u64,
}

/// Stored batches whose offset is remembered, per producer.
const RECENT_MAX: usize = 64;

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub struct Window {
    producers: BTreeMap<ProducerId, Producer>,
    /// How many times producers were fenced: who was admitted before the last time stays out.
    fence: u64,
    /// Who has the segment for itself, and the number of its stream.
    hold: Option<(ProducerId, u64)>,
}

impl Window {
    /// Judges a batch; `Accept` has moved `pushed` (DD1).
    pub fn check(&mut self, id: &ProducerId, stream: u64, chain: Chain, now_ms: u64) -> Verdict {
        let held = self.hold.as_ref().is_some_and(|(holder, _)| holder != id);
        let Some(producer) = self.producers.get_mut(id) else { return Verdict::Unknown };
        if held || producer.admitted < self.fence {
            return Verdict::Fenced;
        }
        if stream < producer.stream {
            return Verdict::OldStream;
        }
        producer.last_seen_ms = now_ms;
        if chain.lo == 0 || chain.lo > chain.hi || chain.prev >= chain.lo {
            return Verdict::Conflict;
        }
        if chain.hi <= producer.persisted {
            let known = producer.recent.iter().find(|(hi, _)| *hi == chain.hi);
            return Verdict::Stored(known.map(|(_, offset)| *offset));
        }
        if chain.lo <= producer.pushed {
            // Overlaps what is stored or on its way: only the very same batch may come again (DD3).
            let same = producer
                .pending
                .iter()
                .any(|pending| (pending.lo, pending.hi) == (chain.lo, chain.hi));
            return if same { Verdict::Pending } else { Verdict::Conflict };
        }
        if chain.prev != producer.pushed {
            return Verdict::OutOfSequence { pushed: producer.pushed };
        }
        producer.pushed = chain.hi;
        producer.pending.push_back(chain);
        Verdict::Accept
    }

    /// The batch just accepted cannot be taken up after all: as if it had not come.
    pub fn take_back(&mut self, id: &ProducerId, chain: Chain) {
        let Some(producer) = self.producers.get_mut(id) else { return };
        if producer.pending.pop_back_if(|last| *last == chain).is_some() {
            producer.pushed = chain.prev;
        }
    }

    /// The oldest pending batch of the producer is stored at `offset`.
    pub fn on_stored(&mut self, id: &ProducerId, hi: u64, offset: Offset) {
        let Some(producer) = self.producers.get_mut(id) else { return };
        while producer.pending.front().is_some_and(|chain| chain.hi <= hi) {
            producer.pending.pop_front();
        }
        producer.persisted = producer.persisted.max(hi);
        producer.recent.push_back((hi, offset));
        if producer.recent.len() > RECENT_MAX {
            producer.recent.pop_front();
        }
    }

    /// Everything pending of all producers is certain not to be stored: pushed := persisted (DD1).
    pub fn forget_pending(&mut self) {
        for producer in self.producers.values_mut() {
            producer.pending.clear();
            producer.pushed = producer.persisted;
        }
    }

    /// Replays an entry's header while a segment is loaded (DD2).
    pub fn replay(&mut self, id: &ProducerId, session: bool, hi: u64, offset: Offset, at_ms: u64) {
        let producer =
            self.producers.entry(id.clone()).or_insert_with(|| Producer::new(session, 0, 0, at_ms));
        producer.persisted = producer.persisted.max(hi);
        producer.pushed = producer.persisted;
        // Whoever was fenced by then had nothing stored any more.
        producer.admitted = producer.admitted.max(self.fence);
        producer.last_seen_ms = producer.last_seen_ms.max(at_ms);
        producer.recent.push_back((hi, offset));
        if producer.recent.len() > RECENT_MAX {
            producer.recent.pop_front();
        }
    }

    /// A stream of the producer ended, and unless another one is open, nobody is connected: a session may leave some time
    /// after (DD4), and the segment is nobody's own any more.
    pub fn disconnected(&mut self, id: &ProducerId, stream: u64, now_ms: u64) {
        if let Some(producer) = self.producers.get_mut(id).filter(|one| one.stream == stream) {
            producer.streams = producer.streams.saturating_sub(1);
            producer.last_seen_ms = now_ms;
            if producer.streams == 0 && self.hold.as_ref().is_some_and(|(holder, _)| holder == id) {
                self.hold = None;
            }
        }
    }

    /// Nobody had time to come back before `now_ms`: a load starts everybody's absence anew.
    pub fn begin_absences(&mut self, now_ms: u64) {
        for producer in self.producers.values_mut() {
            producer.last_seen_ms = producer.last_seen_ms.max(now_ms);
        }
    }

    /// Sessions without a stream, not seen since `before_ms`, leave (DD4).
    pub fn expire_sessions(&mut self, before_ms: u64) {
        self.producers
            .retain(|_, producer| !(producer.may_leave() && producer.last_seen_ms < before_ms));
    }

    fn evict_oldest_session(&mut self) -> bool {
        let oldest = self
            .producers
            .iter()
            .filter(|(_, producer)| producer.may_leave())
            .min_by_key(|(_, producer)| producer.last_seen_ms)
            .map(|(id, _)| id.clone());
        oldest.is_some_and(|id| self.producers.remove(&id).is_some())
    }

    /// What is stored, for a snapshot at an offset (DD2); its place is put in by who knows it.
    #[must_use]
    pub fn snapshot(&self, next_offset: Offset) -> DedupSnapshot {
        let producers = self.states();
        DedupSnapshot {
            next_offset: next_offset.0,
            producers,
            fence: self.fence,
            ..DedupSnapshot::default()
        }
    }

    fn states(&self) -> Vec<ProducerState> {
        self.producers
            .iter()
            .map(|(id, producer)| ProducerState {
                name: String::from_utf8_lossy(id).into_owned(),
                epoch: producer.epoch,
                admitted: producer.admitted,
                persisted: producer.persisted,
                session: producer.session,
                stream_number: producer.stream,
                last_seen_ms: producer.last_seen_ms,
            })
            .collect()
    }

    /// The window as a snapshot holds it.
    #[must_use]
    pub fn restore(snapshot: &DedupSnapshot) -> Self {
        let producers = snapshot.producers.iter().map(|state| {
            let mut producer = Producer::new(
                state.session,
                state.stream_number,
                state.persisted,
                state.last_seen_ms,
            );
            producer.pushed = state.persisted;
            (producer.epoch, producer.admitted) = (state.epoch, state.admitted);
            (Bytes::from(state.name.clone()), producer)
        });
        Self { producers: producers.collect(), fence: snapshot.fence, hold: None }
    }

    /// Producers in the window.
    #[must_use]
    pub fn len(&self) -> usize {
        self.producers.len()
    }

    /// Whether nobody is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.producers.is_empty()
    }
}

impl Producer {
    fn new(session: bool, stream: u64, persisted: u64, last_seen_ms: u64) -> Self {
        let (pending, recent) = Default::default();
        Self {
            session,
            epoch: 0,
            admitted: 0,
            stream,
            streams: 0,
            pushed: persisted,
            persisted,
            pending,
            recent,
            last_seen_ms,
        }
    }

    fn may_leave(&self) -> bool {
        self.session && self.streams == 0 && self.pending.is_empty()
    }
}

#[cfg(test)]
mod tests;
