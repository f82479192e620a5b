//! The writer of one open ledger: a handle with a bounded queue, and the one task that owns the state.
//!
//! ```text
//! LedgerWriter::append --queue--> Owner: WriterCore (pure) --Send--> bookies
//!        AppendFuture <--Confirm, in order--        ^------ answers, registrations, the store's verdict, time
//! ```

mod change;
pub mod core;
mod owner;
mod slot;
mod slowness;
mod types;

use std::{collections::VecDeque, sync::Arc};

use geminga_metadata::Standing;
use geminga_proto::ids::{EntryId, LedgerId};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, oneshot, watch},
    time::Instant,
};

use self::types::Outcome;
pub use self::types::{AppendError, AppendFuture, Poison, SealError, Sealed};
use crate::{
    client::LedgerClient,
    config::LedgerClientConfig,
    entry::{ENTRY_HEADER_BYTES, ENTRY_PAYLOAD_BYTES_MAX, Payload},
    memory::ClientMemory,
    metadata::{LedgerMetadata, Versioned},
};

/// Handle to the writer of one ledger (W1: there is one). Clones share it; when all are gone and nothing is pending, the
/// writer's task ends. That closes nothing: an open ledger without a writer is recovered by whoever needs it next.
#[derive(Clone, Debug)]
pub struct LedgerWriter {
    handle: Arc<Handle>,
}

/// Dropped with the last clone.
#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    id: LedgerId,
    bytes_max: usize,
    entries_max: usize,
    standing: Standing,
    memory: Arc<ClientMemory>,
    state: Mutex<State>,
    /// The owner has something to do.
    wake: Notify,
    /// Memory was given back, or the writer ended.
    room: Notify,
    poison: watch::Sender<Option<Poison>>,
}

#[derive(Debug)]
struct State {
    appends: VecDeque<Append>,
    seals: Vec<oneshot::Sender<Result<Sealed, SealError>>>,
    sealed: Option<Box<Sealed>>,
    /// No more appends: sealing, poisoned, or over.
    ended: bool,
    /// The owner's task is gone.
    over: bool,
    /// The last handle is gone.
    abandoned: bool,
    held_bytes: usize,
    held_entries: usize,
    pushed: u64,
    lac: Option<EntryId>,
    length: u64,
    metadata: Versioned<LedgerMetadata>,
}

#[derive(Debug)]
struct Append {
    payload: Payload,
    at: Instant,
    answer: oneshot::Sender<Result<EntryId, AppendError>>,
}

/// What an entry is charged for (W5).
fn charge(payload: &Payload) -> usize {
    payload.len() + ENTRY_HEADER_BYTES
}

impl LedgerWriter {
    pub(crate) fn start(client: &LedgerClient, metadata: Versioned<LedgerMetadata>) -> Self {
        let config: &LedgerClientConfig = &client.parts.config;
        let shared = Arc::new(Shared {
            id: metadata.value.id,
            bytes_max: config.writer_bytes_max,
            entries_max: config.writer_entries_max,
            standing: client.parts.standing.clone(),
            memory: Arc::clone(&client.memory),
            state: Mutex::new(State {
                appends: VecDeque::new(),
                seals: Vec::new(),
                sealed: None,
                ended: false,
                over: false,
                abandoned: false,
                held_bytes: 0,
                held_entries: 0,
                pushed: 0,
                lac: None,
                length: 0,
                metadata: metadata.clone(),
            }),
            wake: Notify::new(),
            room: Notify::new(),
            poison: watch::Sender::new(None),
        });
        let owner = owner::Owner::new(client.clone(), Arc::clone(&shared), metadata);
        client.parts.tasks.spawn("ledger writer", owner.run());
        Self { handle: Arc::new(Handle { shared }) }
    }

    /// Takes up an entry; entries are written in the order of the calls (W1). Does not wait: beyond the limit the answer is
    /// [`AppendError::Full`] and nothing was sent; await [`Self::ready`] first. The future resolves when the entry is
    /// acknowledged (W2), in order, or will not be; dropping it abandons the answer, not the entry.
    #[must_use]
    pub fn append(&self, payload: Payload) -> AppendFuture {
        let shared = &self.handle.shared;
        if payload.len() > ENTRY_PAYLOAD_BYTES_MAX {
            return AppendFuture(Outcome::Refused(AppendError::TooLarge));
        }
        let bytes = charge(&payload);
        let mut state = shared.state.lock();
        if state.ended {
            return AppendFuture(Outcome::Refused(AppendError::Ended));
        }
        if !shared.has_room(&state, bytes) {
            return AppendFuture(Outcome::Refused(AppendError::Full));
        }
        state.held_bytes += bytes;
        state.held_entries += 1;
        state.pushed += 1;
        shared.memory.take(bytes);
        let (answer, outcome) = oneshot::channel();
        let wake = state.appends.is_empty();
        state.appends.push_back(Append { payload, at: Instant::now(), answer });
        drop(state);
        if wake {
            shared.wake.notify_one();
        }
        AppendFuture(Outcome::Pending(outcome))
    }

    /// Waits until a payload of `bytes` may be appended (W5), or the writer has ended. Room found stays found for a single
    /// caller that appends next. Cancel-safe.
    pub async fn ready(&self, bytes: usize) {
        let shared = &self.handle.shared;
        loop {
            shared.memory.room().await;
            let mut room = std::pin::pin!(shared.room.notified());
            room.as_mut().enable();
            {
                let state = shared.state.lock();
                if state.ended || shared.has_room(&state, bytes + ENTRY_HEADER_BYTES) {
                    return;
                }
            }
            room.await;
        }
    }

    /// The ledger.
    #[must_use]
    pub fn id(&self) -> LedgerId {
        self.handle.shared.id
    }

    /// Last-add-confirmed (W3).
    #[must_use]
    pub fn lac(&self) -> Option<EntryId> {
        self.handle.shared.state.lock().lac
    }

    /// Payload bytes up to the LAC.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.handle.shared.state.lock().length
    }

    /// Entries taken up so far, acknowledged or not.
    #[must_use]
    pub fn entries_pushed(&self) -> u64 {
        self.handle.shared.state.lock().pushed
    }

    /// Bytes held until every slot answered (W5).
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.handle.shared.state.lock().held_bytes
    }

    /// The metadata as it now stands, as far as this writer knows.
    #[must_use]
    pub fn metadata(&self) -> Versioned<LedgerMetadata> {
        self.handle.shared.state.lock().metadata.clone()
    }

    /// Resolves when the writer is poisoned (W6); never after a clean seal. Cancel-safe.
    pub async fn poisoned(&self) -> Poison {
        let mut poison = self.handle.shared.poison.subscribe();
        let found = poison.wait_for(Option::is_some).await.ok().and_then(|found| *found);
        match found {
            Some(poison) => poison,
            None => std::future::pending().await,
        }
    }

    /// The poison, if it already is.
    #[must_use]
    pub fn poison(&self) -> Option<Poison> {
        *self.handle.shared.poison.borrow()
    }

    /// Section 6, as far as the writer goes: stops adds; waits for the pending ones (up to `seal_patience`) and a moment for
    /// the answers beyond Qa; fails the rest with [`AppendError::NotAcknowledged`]; never while a change is unsettled (MD3).
    /// After a write failure it ends at the LAC at once. The ledger is closed when the returned transaction lands; on a
    /// conflict ask [`crate::settled_close`]. Repeated calls give the same answer. Cancel-safe: the sealing goes on.
    ///
    /// O3: on a provisional claim no close is started. This waits until it is confirmed, and stops nothing before.
    ///
    /// # Errors
    /// [`SealError`].
    pub async fn seal(&self) -> Result<Sealed, SealError> {
        let shared = &self.handle.shared;
        shared.may_close().await;
        let answer = {
            let mut state = shared.state.lock();
            state.ended = true;
            if let Some(sealed) = &state.sealed {
                return Ok((**sealed).clone());
            }
            if state.over {
                return Err(shared.seal_error());
            }
            let (answer, outcome) = oneshot::channel();
            state.seals.push(answer);
            outcome
        };
        shared.wake.notify_one();
        shared.room.notify_waiters();
        answer.await.unwrap_or_else(|_| Err(shared.seal_error()))
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.state.lock().abandoned = true;
        self.shared.wake.notify_one();
    }
}

impl Shared {
    fn has_room(&self, state: &State, bytes: usize) -> bool {
        state.held_entries < self.entries_max
            && (state.held_bytes == 0 || state.held_bytes + bytes <= self.bytes_max)
    }

    /// Waits while a close must not be started (O3); a writer that has ended closes nothing.
    async fn may_close(&self) {
        let over = {
            let state = self.state.lock();
            state.sealed.is_some() || state.over
        };
        if over || self.standing.confirmed() {
            return;
        }
        let mut poison = self.poison.subscribe();
        tokio::select! {
            biased;
            () = self.standing.until_confirmed() => {}
            _ = poison.wait_for(|poison| matches!(poison, Some(Poison::Fenced | Poison::Stopped))) => {}
        }
    }

    fn seal_error(&self) -> SealError {
        match *self.poison.borrow() {
            Some(Poison::Fenced) => SealError::Fenced,
            _ => SealError::Ended,
        }
    }
}

#[cfg(test)]
mod tests;
