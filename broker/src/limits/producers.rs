//! The producers of a segment that are there. The segment remembers more of them, for their sequences; those are not counted.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use geminga_proto::reason::Reason;
use parking_lot::Mutex;

use crate::{catalog::Limit, errors::Refusal};

/// Streams, and calls under way, by producer. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Producers(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    open: BTreeMap<Bytes, usize>,
    /// Sessions that have no name yet, by number.
    sessions: u64,
}

/// One stream or call, until dropped.
#[derive(Debug)]
pub(crate) struct ProducerSlot {
    producers: Producers,
    of: Bytes,
}

impl Producers {
    /// A place for a stream of this producer; none: of one that will be named when it is opened. One that is there already, for
    /// instance by the stream that this one follows, needs no other place.
    ///
    /// # Errors
    /// TOO_MANY_PRODUCERS.
    pub(crate) fn slot(
        &self,
        of: Option<Bytes>,
        limit: Option<Limit>,
    ) -> Result<ProducerSlot, Refusal> {
        let mut state = self.0.lock();
        let of = of.unwrap_or_else(|| {
            state.sessions += 1;
            // A space is in no producer's name, and in no session's.
            Bytes::from(format!("new {}", state.sessions))
        });
        let there = state.open.len();
        if let Some(limit) = limit
            && there as u64 >= limit.most
            && !state.open.contains_key(&of)
        {
            let message = format!("the segment has {there} producers");
            return Err(limit.reached(Reason::TooManyProducers, "producers_max", &message));
        }
        *state.open.entry(of.clone()).or_default() += 1;
        Ok(ProducerSlot { producers: self.clone(), of })
    }
}

impl ProducerSlot {
    /// The producer is called so.
    pub(crate) fn named(&mut self, name: &Bytes) {
        if self.of == *name {
            return;
        }
        let mut state = self.producers.0.lock();
        state.leave(&self.of);
        *state.open.entry(name.clone()).or_default() += 1;
        self.of = name.clone();
    }
}

impl State {
    fn leave(&mut self, of: &Bytes) {
        if let Some(streams) = self.open.get_mut(of) {
            *streams -= 1;
            if *streams == 0 {
                self.open.remove(of);
            }
        }
    }
}

impl Drop for ProducerSlot {
    fn drop(&mut self) {
        self.producers.0.lock().leave(&self.of);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_producer_counts_once_and_goes_with_its_last_stream() {
        let producers = Producers::default();
        let limit = Some(Limit { most: 1, level: "topic" });
        let name = |name: &'static str| Some(Bytes::from_static(name.as_bytes()));
        let first = producers.slot(name("a"), limit).expect("the first");
        let again = producers.slot(name("a"), limit).expect("the same");
        let refused = producers.slot(name("b"), limit).expect_err("another");
        assert_eq!(refused.reason, Reason::TooManyProducers);
        assert_eq!(refused.facts[1].1, "topic");
        drop(first);
        producers.slot(None, limit).expect_err("it is still there");
        drop(again);
        let mut session = producers.slot(None, limit).expect("it is gone");
        session.named(&Bytes::from_static(b"session:1"));
        drop(producers.slot(name("session:1"), limit).expect("it came back"));
        drop(session);
        assert!(producers.0.lock().open.is_empty());
        let none = Some(Limit { most: 0, level: "topic" });
        producers.slot(name("a"), none).expect_err("nobody");
        producers.slot(name("a"), None).expect("anybody");
    }
}
