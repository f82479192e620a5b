//! The deduplication window of a segment: which sequences of which producer are accepted, and which are stored
//! (DD1, DD3, DD5, T32, T41). Pure.
//!
//! ```text
//! sequences   1 2 3 | 4 5 6 | 7 8      persisted = 3, pushed = 8
//!             stored  on its way       next batch: prev = 8, lo > 8
//! ```

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use geminga_proto::{ids::Offset, storage::v1::dedup_snapshot::ProducerState};

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
}

#[derive(Clone, Debug)]
struct Producer {
    session: bool,
    stream: u64,
    /// A stream of it is open.
    connected: bool,
    pushed: u64,
    persisted: u64,
    pending: VecDeque<Chain>,
    /// The last stored batches with their offsets, for the answers to repeats.
    recent: VecDeque<(u64, Offset)>,
    last_seen_ms: u64,
}

/// Stored batches whose offset is remembered, per producer.
const RECENT_MAX: usize = 64;

/// The window is full and nobody may leave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the window holds as many producers as it may")]
pub struct WindowFull;

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub struct Window {
    producers: BTreeMap<ProducerId, Producer>,
}

impl Window {
    /// Opens a stream of a producer; batches of older streams are refused from here on. While some of them are on their way
    /// the answer is `Pending`, and the open is to be repeated when they are settled: who is told a `persisted` below them
    /// could give their sequences to other messages, and would take their receipts for his (DD4). `stream` must not be lower than before (DD5). `None` for an unknown producer when
    /// `may_create` is false (a resume that finds no window).
    ///
    /// # Errors
    /// [`WindowFull`].
    pub fn open(
        &mut self,
        id: &ProducerId,
        session: bool,
        stream: u64,
        may_create: bool,
        now_ms: u64,
        producers_max: usize,
    ) -> Result<Option<Opened>, WindowFull> {
        if let Some(producer) = self.producers.get_mut(id) {
            producer.last_seen_ms = now_ms;
            if stream < producer.stream {
                return Ok(Some(Opened::OldStream { current: producer.stream }));
            }
            (producer.stream, producer.connected) = (stream, true);
            return Ok(Some(match producer.pending.is_empty() {
                true => Opened::At { persisted: producer.persisted },
                false => Opened::Pending,
            }));
        }
        if !may_create {
            return Ok(None);
        }
        if self.producers.len() >= producers_max && !self.evict_oldest_session() {
            return Err(WindowFull);
        }
        let producer = Producer { connected: true, ..Producer::new(session, stream, 0, now_ms) };
        self.producers.insert(id.clone(), producer);
        Ok(Some(Opened::At { persisted: 0 }))
    }

    /// Judges a batch; `Accept` has moved `pushed` (DD1).
    pub fn check(&mut self, id: &ProducerId, stream: u64, chain: Chain, now_ms: u64) -> Verdict {
        let Some(producer) = self.producers.get_mut(id) else { return Verdict::Unknown };
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
        producer.last_seen_ms = producer.last_seen_ms.max(at_ms);
        producer.recent.push_back((hi, offset));
        if producer.recent.len() > RECENT_MAX {
            producer.recent.pop_front();
        }
    }

    /// A stream of the producer ended, and unless a newer one was opened, nobody is connected: a session may leave some time
    /// after (DD4).
    pub fn disconnected(&mut self, id: &ProducerId, stream: u64, now_ms: u64) {
        if let Some(producer) = self.producers.get_mut(id).filter(|one| one.stream == stream) {
            (producer.connected, producer.last_seen_ms) = (false, now_ms);
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

    /// What is stored, for a snapshot (DD2).
    #[must_use]
    pub fn snapshot(&self) -> Vec<ProducerState> {
        self.producers
            .iter()
            .map(|(id, producer)| ProducerState {
                name: String::from_utf8_lossy(id).into_owned(),
                epoch: 0,
                persisted: producer.persisted,
                session: producer.session,
                stream_number: producer.stream,
                last_seen_ms: producer.last_seen_ms,
            })
            .collect()
    }

    /// The window as a snapshot holds it.
    #[must_use]
    pub fn restore(states: &[ProducerState]) -> Self {
        let producers = states.iter().map(|state| {
            let mut producer = Producer::new(
                state.session,
                state.stream_number,
                state.persisted,
                state.last_seen_ms,
            );
            producer.pushed = state.persisted;
            (Bytes::from(state.name.clone()), producer)
        });
        Self { producers: producers.collect() }
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

/// How an open ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opened {
    /// The stream may start after this sequence.
    At { persisted: u64 },
    /// Batches of an earlier stream are on their way.
    Pending,
    /// The stream number is lower than that of a stream opened before (DD5).
    OldStream { current: u64 },
}

impl Producer {
    fn new(session: bool, stream: u64, persisted: u64, last_seen_ms: u64) -> Self {
        let (pending, recent) = Default::default();
        let connected = false;
        Self {
            session,
            stream,
            connected,
            pushed: persisted,
            persisted,
            pending,
            recent,
            last_seen_ms,
        }
    }

    fn may_leave(&self) -> bool {
        self.session && !self.connected && self.pending.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAX: usize = 10;

    fn opened() -> (Window, ProducerId) {
        let mut window = Window::default();
        let id = ProducerId::from_static(b"p");
        assert_eq!(window.open(&id, true, 0, true, 0, MAX), Ok(Some(Opened::At { persisted: 0 })));
        (window, id)
    }

    fn batch(prev: u64, lo: u64, hi: u64) -> Chain {
        Chain { prev, lo, hi }
    }

    #[test]
    fn a_repeat_of_what_is_only_pushed_is_no_duplicate() {
        // T32: it waits for the first one's outcome, and after a failure it may be sent again.
        let (mut window, id) = opened();
        assert_eq!(window.check(&id, 0, batch(0, 1, 5), 0), Verdict::Accept);
        assert_eq!(window.check(&id, 0, batch(0, 1, 5), 0), Verdict::Pending);
        window.forget_pending();
        assert_eq!(window.check(&id, 0, batch(0, 1, 5), 0), Verdict::Accept);
        window.on_stored(&id, 5, Offset(0));
        assert_eq!(window.check(&id, 0, batch(0, 1, 5), 0), Verdict::Stored(Some(Offset(0))));
    }

    #[test]
    fn what_was_pipelined_behind_a_refusal_is_refused() {
        // T41: 1..2 was refused elsewhere (quota); 3..4 must not slip in before it.
        let (mut window, id) = opened();
        assert_eq!(window.check(&id, 0, batch(2, 3, 4), 0), Verdict::OutOfSequence { pushed: 0 });
        assert_eq!(window.check(&id, 0, batch(0, 1, 2), 0), Verdict::Accept);
        assert_eq!(window.check(&id, 0, batch(2, 3, 4), 0), Verdict::Accept);
    }

    #[test]
    fn another_cut_of_the_same_sequences_is_a_conflict() {
        let (mut window, id) = opened();
        assert_eq!(window.check(&id, 0, batch(0, 1, 5), 0), Verdict::Accept);
        assert_eq!(window.check(&id, 0, batch(0, 1, 7), 0), Verdict::Conflict);
        window.on_stored(&id, 5, Offset(0));
        assert_eq!(window.check(&id, 0, batch(2, 3, 7), 0), Verdict::Conflict);
        for bad in [batch(5, 0, 0), batch(5, 8, 7), batch(9, 9, 9)] {
            assert_eq!(window.check(&id, 0, bad, 0), Verdict::Conflict);
        }
    }

    #[test]
    fn an_older_stream_is_refused_and_an_unknown_resume_is_not_a_new_producer() {
        let (mut window, id) = opened();
        assert_eq!(window.open(&id, true, 3, false, 0, MAX), Ok(Some(Opened::At { persisted: 0 })));
        assert_eq!(window.check(&id, 2, batch(0, 1, 1), 0), Verdict::OldStream);
        assert_eq!(
            window.open(&id, true, 2, false, 0, MAX),
            Ok(Some(Opened::OldStream { current: 3 }))
        );
        let other = ProducerId::from_static(b"other");
        assert_eq!(window.open(&other, true, 0, false, 0, MAX), Ok(None));
    }

    #[test]
    fn a_full_window_lets_the_oldest_idle_session_go_but_no_named_producer() {
        let mut window = Window::default();
        for n in 0..MAX as u64 {
            let id = ProducerId::from(format!("p{n}"));
            let opened = window.open(&id, n != 0, 0, true, n, MAX);
            assert_eq!(opened, Ok(Some(Opened::At { persisted: 0 })));
            if n < 3 {
                window.disconnected(&id, 0, n);
            }
        }
        let late = ProducerId::from_static(b"late");
        assert!(window.open(&late, true, 0, true, 99, MAX).is_ok());
        assert_eq!(window.len(), MAX);
        assert_eq!(window.open(&ProducerId::from_static(b"p1"), true, 0, false, 99, MAX), Ok(None));
        assert!(
            window
                .open(&ProducerId::from_static(b"p0"), false, 0, false, 99, MAX)
                .expect("room")
                .is_some()
        );
    }

    #[test]
    fn a_session_leaves_only_some_time_after_its_last_stream_ended() {
        let (mut window, id) = opened();
        window.expire_sessions(1_000);
        assert_eq!(window.len(), 1, "connected, however long it is silent");
        assert!(window.open(&id, true, 1, false, 1_000, MAX).is_ok());
        window.disconnected(&id, 0, 1_000);
        window.expire_sessions(5_000);
        assert_eq!(window.len(), 1, "an older stream's end says nothing of the newer one");
        window.disconnected(&id, 1, 6_000);
        window.expire_sessions(6_000);
        assert_eq!(window.len(), 1);
        let mut loaded = Window::restore(&window.snapshot());
        loaded.begin_absences(9_000);
        loaded.expire_sessions(8_000);
        assert_eq!(loaded.len(), 1, "a load gives it time to come back");
        loaded.expire_sessions(9_001);
        assert!(loaded.is_empty());
    }

    #[test]
    fn a_stream_opens_only_when_what_is_on_its_way_is_settled() {
        let (mut window, id) = opened();
        assert_eq!(window.check(&id, 0, batch(0, 1, 5), 0), Verdict::Accept);
        assert_eq!(window.open(&id, true, 1, false, 0, MAX), Ok(Some(Opened::Pending)));
        assert_eq!(window.check(&id, 0, batch(5, 6, 6), 0), Verdict::OldStream);
        window.on_stored(&id, 5, Offset(0));
        let at = Opened::At { persisted: 5 };
        assert_eq!(window.open(&id, true, 1, false, 0, MAX), Ok(Some(at)));
    }

    proptest! {
        /// A producer that re-sends at random, over random failures: each sequence is stored once, in order.
        #[test]
        fn every_sequence_is_stored_once_and_in_order(
            actions in prop::collection::vec((0u64..4, 1u64..4, any::<bool>()), 1..60)
        ) {
            let (mut window, id) = opened();
            let mut cut: Vec<Chain> = Vec::new();   // batches as first sent
            let mut waiting: VecDeque<Chain> = VecDeque::new();
            let mut stored: Vec<u64> = Vec::new();
            for (action, size, flag) in actions {
                match action {
                    0 | 1 => {
                        let prev = cut.last().map_or(0, |chain| chain.hi);
                        cut.push(batch(prev, prev + 1, prev + size));
                    }
                    2 => if let Some(chain) = waiting.pop_front() {
                        stored.extend(chain.lo..=chain.hi);
                        window.on_stored(&id, chain.hi, Offset(chain.lo));
                    },
                    _ => if flag { waiting.clear(); window.forget_pending(); },
                }
                // Everything not yet stored is sent again, in order, as it was cut.
                for chain in &cut {
                    match window.check(&id, 0, *chain, 0) {
                        Verdict::Accept => waiting.push_back(*chain),
                        Verdict::Stored(_) => prop_assert!(stored.contains(&chain.hi), "I13"),
                        Verdict::Pending => prop_assert!(waiting.contains(chain)),
                        other => prop_assert!(false, "{other:?}"),
                    }
                }
            }
            prop_assert!(stored.iter().copied().eq(1..=stored.len() as u64), "{stored:?}");
            let restored = Window::restore(&window.snapshot());
            prop_assert_eq!(restored.snapshot(), window.snapshot());
        }
    }
}
