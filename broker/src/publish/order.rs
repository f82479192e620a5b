//! The order of one publish stream: batches go in one after the other, answers come out in the same order, and credit is
//! given back as they do. No I/O of its own.

use std::pin::Pin;

use futures::{Stream, stream::FuturesOrdered};
use geminga_managed_ledger::Stored;
use geminga_proto::v1::PublishCredit;
use tokio::time::Instant;

use crate::errors::Refusal;

/// How one batch ended.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) hi_sequence: u64,
    pub(super) payload_bytes: u64,
    pub(super) began: Instant,
    /// What the segment had accepted of the producer when it refused.
    pub(super) pushed: Option<u64>,
    pub(super) result: Result<Stored, Refusal>,
}

type Pending = Pin<Box<dyn Future<Output = Outcome> + Send>>;

/// Batches between their arrival and their answer.
#[derive(Default)]
pub(super) struct InFlight {
    pending: FuturesOrdered<Pending>,
}

impl InFlight {
    pub(super) fn push(&mut self, outcome: impl Future<Output = Outcome> + Send + 'static) {
        self.pending.push_back(Box::pin(outcome));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// The next answer, in the order of arrival. Waits for ever while nothing is in flight. Cancel-safe.
    pub(super) async fn next(&mut self) -> Outcome {
        std::future::poll_fn(|cx| match Pin::new(&mut self.pending).poll_next(cx) {
            std::task::Poll::Ready(Some(outcome)) => std::task::Poll::Ready(outcome),
            std::task::Poll::Ready(None) | std::task::Poll::Pending => std::task::Poll::Pending,
        })
        .await
    }

    /// An answer that is there already.
    pub(super) fn ready(&mut self) -> Option<Outcome> {
        futures::FutureExt::now_or_never(self.next())
    }
}

/// What a producer may have sent, as totals of its stream. A batch may begin while some byte credit is left.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    batches: u64,
    bytes: u64,
    taken: Totals,
    answered: Totals,
    granted: Totals,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Totals {
    batches: u64,
    bytes: u64,
}

impl Window {
    pub(super) fn new(batches: u64, bytes: u64) -> Self {
        let granted = Totals { batches, bytes };
        Self { batches, bytes, taken: Totals::default(), answered: Totals::default(), granted }
    }

    /// The totals granted so far.
    pub(super) fn granted(&self) -> PublishCredit {
        PublishCredit { granted_batches: self.granted.batches, granted_bytes: self.granted.bytes }
    }

    /// A batch came. False: it is beyond what was granted.
    pub(super) fn take(&mut self, payload_bytes: u64) -> bool {
        if self.taken.batches >= self.granted.batches || self.taken.bytes >= self.granted.bytes {
            return false;
        }
        self.taken.batches += 1;
        self.taken.bytes += payload_bytes;
        true
    }

    /// A batch was answered.
    pub(super) fn answered(&mut self, payload_bytes: u64) {
        self.answered.batches += 1;
        self.answered.bytes += payload_bytes;
    }

    /// New totals, if they are worth a frame: a quarter of the window in either.
    pub(super) fn grant(&mut self) -> Option<PublishCredit> {
        let batches = self.answered.batches + self.batches;
        let bytes = self.answered.bytes + self.bytes;
        let worth = (batches - self.granted.batches) * 4 >= self.batches
            || (bytes - self.granted.bytes) * 4 >= self.bytes;
        worth.then(|| {
            self.granted = Totals { batches, bytes };
            self.granted()
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_producer_within_its_credit_is_never_refused_nor_stuck(sizes in prop::collection::vec(0u64..900, 1..200)) {
            let mut window = Window::new(8, 1_000);
            let (mut granted, mut sent) = (window.granted(), (0u64, 0u64));
            let mut in_flight = std::collections::VecDeque::new();
            for size in sizes {
                while sent.0 >= granted.granted_batches || sent.1 >= granted.granted_bytes {
                    let Some(answered) = in_flight.pop_front() else {
                        return Err(TestCaseError::fail("stuck: nothing in flight and no credit"));
                    };
                    window.answered(answered);
                    if let Some(more) = window.grant() {
                        prop_assert!(more.granted_batches >= granted.granted_batches);
                        prop_assert!(more.granted_bytes >= granted.granted_bytes);
                        granted = more;
                    }
                }
                prop_assert!(window.take(size));
                sent = (sent.0 + 1, sent.1 + size);
                in_flight.push_back(size);
                prop_assert!(in_flight.len() <= 8);
            }
        }
    }

    #[test]
    fn one_batch_more_than_granted_is_noticed() {
        let mut window = Window::new(2, 100);
        assert!(window.take(1) && window.take(1) && !window.take(1));
        let mut window = Window::new(100, 10);
        assert!(window.take(10) && !window.take(1));
    }

    #[tokio::test(start_paused = true)]
    async fn answers_come_in_the_order_of_the_batches() {
        let mut in_flight = InFlight::default();
        for hi_sequence in 0..4u64 {
            in_flight.push(async move {
                tokio::time::sleep(std::time::Duration::from_millis(100 - hi_sequence)).await;
                let result = Err(Refusal::request("any"));
                Outcome {
                    hi_sequence,
                    payload_bytes: 0,
                    began: Instant::now(),
                    pushed: None,
                    result,
                }
            });
        }
        assert!(in_flight.ready().is_none());
        for expected in 0..4 {
            assert_eq!(in_flight.next().await.hi_sequence, expected);
        }
        assert!(in_flight.is_empty());
    }
}
