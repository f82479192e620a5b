//! The producer behind unary calls that name none: one session producer per segment, whose sequences the broker draws.
//! Nothing is deduplicated across such calls; the chain only keeps their order.

use geminga_managed_ledger::{ManagedLedger, ProducerIdentity, ProducerOpen, ProducerOpened};
use geminga_proto::v1::Batch;
use tokio::sync::Mutex;

use crate::{errors::Refusal, storage_errors};

/// The session of one loaded segment; opened by the first call, again after it was given up.
#[derive(Debug, Default)]
pub(crate) struct Anonymous {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Counts the sessions opened.
    number: u64,
    session: Option<Session>,
}

#[derive(Clone, Debug)]
struct Session {
    producer: ProducerOpened,
    pushed: u64,
}

impl Anonymous {
    /// Gives the batch the next sequences and calls `publish` with it before anybody else gets the ones after; with the
    /// number of the session.
    ///
    /// # Errors
    /// What kept the session from being opened.
    pub(super) async fn publish<T>(
        &self,
        ledger: &ManagedLedger,
        mut batch: Batch,
        publish: impl FnOnce(Batch, &ProducerOpened) -> T,
    ) -> Result<(u64, T), Refusal> {
        let mut state = self.state.lock().await;
        if state.session.is_none() {
            let open = ProducerOpen::shared(ProducerIdentity::Session, 0);
            let opened = ledger.open_producer(open).await;
            let producer = opened.map_err(|error| storage_errors::of_producer(&error))?;
            // No stream holds it: when the window is full, or nobody called for long, it may leave.
            ledger.producer_gone(&producer.id, 0);
            state.number += 1;
            state.session = Some(Session { producer, pushed: 0 });
        }
        let number = state.number;
        let session = state.session.as_mut().expect("opened above");
        batch.prev_sequence = session.pushed;
        batch.lo_sequence = session.pushed + 1;
        batch.hi_sequence = session.pushed + u64::from(batch.count.max(1));
        session.pushed = batch.hi_sequence;
        Ok((number, publish(batch, &session.producer)))
    }

    /// The chain of this session is broken: a batch was refused or of unknown outcome. The next call opens a new one.
    pub(super) async fn give_up(&self, number: u64) {
        let mut state = self.state.lock().await;
        if state.number == number {
            state.session = None;
        }
    }
}
