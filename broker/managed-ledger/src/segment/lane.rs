//! One of a segment's two logs, as its owner drives it: the open ledger, and what waits for an acknowledgement in it.
//!
//! ```text
//! pending   a b c | d e        a b c are sent to the open ledger, in order; d e wait (no ledger, no room, or a roll)
//!           `sent`
//! ```
//! After a write failure everything not acknowledged is sent again to the next ledger, once the old one is closed (M2).

use std::{collections::VecDeque, time::Duration};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesOrdered};
use geminga_bookie_client::{AppendError, AppendFuture, LedgerWriter, Poison, entry::Payload};
use geminga_proto::ids::EntryId;
use tokio::time::Instant;

/// See the module's text.
pub(super) struct Lane<T> {
    pub(super) phase: Phase,
    pub(super) pending: VecDeque<T>,
    sent: usize,
    in_flight: FuturesOrdered<AppendFuture>,
    /// The writer took no more; its room is waited for.
    blocked: Option<usize>,
    poisoned: Option<BoxFuture<'static, Poison>>,
    /// Since when something waits and no ledger is open for it.
    waiting_since: Option<Instant>,
    /// Since when no entry in flight was answered; none while nothing is.
    silent_since: Option<Instant>,
}

/// Where the log's ledger is.
#[derive(Clone, Debug)]
pub(super) enum Phase {
    /// No ledger is open.
    Idle,
    /// A list change that will open one runs.
    Opening,
    /// Entries are sent.
    Open(LedgerWriter),
    /// No more entries: it is being sealed, then closed by a list change.
    Closing(LedgerWriter),
}

/// What happens in a log.
pub(super) enum LaneEvent {
    /// The open ledger's writer acknowledges nothing any more.
    Poisoned(Poison),
    /// The outcome of the oldest entry sent.
    Appended(Appended),
    /// There is room for what was refused.
    Room,
}

/// What became of the oldest entry sent.
pub(super) enum Appended {
    Stored(EntryId),
    /// Not acknowledged, and certain not to be once the ledger is closed by us (M2).
    NotStored,
    /// Nobody knows (W6).
    Indeterminate,
}

impl<T> Lane<T> {
    pub(super) fn new() -> Self {
        Self {
            phase: Phase::Idle,
            pending: VecDeque::new(),
            sent: 0,
            in_flight: FuturesOrdered::new(),
            blocked: None,
            poisoned: None,
            waiting_since: None,
            silent_since: None,
        }
    }

    /// A ledger is open from now on.
    pub(super) fn open(&mut self, writer: LedgerWriter) {
        let watched = writer.clone();
        self.poisoned = Some(async move { watched.poisoned().await }.boxed());
        self.phase = Phase::Open(writer);
        self.blocked = None;
    }

    /// The open ledger takes no more entries.
    pub(super) fn begin_closing(&mut self) -> Option<LedgerWriter> {
        let Phase::Open(writer) = &self.phase else { return None };
        let writer = writer.clone();
        self.phase = Phase::Closing(writer.clone());
        self.blocked = None;
        Some(writer)
    }

    /// No ledger: whatever was sent and not acknowledged is to be sent again.
    pub(super) fn idle(&mut self) {
        debug_assert!(self.in_flight.is_empty());
        (self.phase, self.sent, self.poisoned, self.blocked) = (Phase::Idle, 0, None, None);
        self.silent_since = None;
    }

    /// The open ledger's writer.
    pub(super) fn writer(&self) -> Option<&LedgerWriter> {
        match &self.phase {
            Phase::Open(writer) | Phase::Closing(writer) => Some(writer),
            Phase::Idle | Phase::Opening => None,
        }
    }

    pub(super) fn is_open(&self) -> bool {
        matches!(self.phase, Phase::Open(_))
    }

    /// Nothing waits in this log.
    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// How much was never sent to the open ledger.
    pub(super) fn waiting(&self) -> usize {
        self.pending.len() - self.sent
    }

    /// Remembers since when something waits for a ledger. While one is being closed nobody knows what is stored, so that
    /// does not count (MD3).
    pub(super) fn note_waiting(&mut self, something: bool) {
        let waits = something && matches!(self.phase, Phase::Idle | Phase::Opening);
        self.waiting_since = waits.then(|| self.waiting_since.unwrap_or_else(Instant::now));
    }

    /// Whether entries are in flight and none was answered for this long.
    pub(super) fn overdue(&self, patience: Duration) -> bool {
        self.silent_since.is_some_and(|since| since.elapsed() > patience)
    }

    pub(super) fn waiting_since(&self) -> Option<Instant> {
        self.waiting_since
    }

    /// Sends what waits, in order, as far as there is room (W5).
    pub(super) fn send(&mut self, encode: impl Fn(&T) -> Payload) {
        let Phase::Open(writer) = &self.phase else { return };
        while self.blocked.is_none() && self.sent < self.pending.len() {
            let payload = encode(&self.pending[self.sent]);
            let bytes = payload.len();
            let append = writer.append(payload);
            // A refusal is known at once; an entry behind a refused one must not overtake it. One that was taken may be
            // answered by now, if this thread was kept waiting: its answer is judged in its turn all the same.
            match append.refused() {
                Some(AppendError::Full) => self.blocked = Some(bytes),
                Some(AppendError::Ended) => return, // `poisoned` tells why
                // One that is too large was refused at the door: its answer says so to whoever sent it.
                Some(_) | None => {
                    self.in_flight.push_back(append);
                    self.sent += 1;
                    self.silent_since.get_or_insert_with(Instant::now);
                }
            }
        }
    }

    /// What happens next in this log. Cancel-safe; pending for ever if nothing can.
    pub(super) async fn next(&mut self) -> LaneEvent {
        let Self { phase, in_flight, blocked, poisoned, .. } = self;
        let answer = tokio::select! {
            biased;
            poison = or_never(poisoned.as_mut()) => {
                *poisoned = None;
                return LaneEvent::Poisoned(poison);
            }
            Some(answer) = in_flight.next() => answer,
            () = room(phase, *blocked) => {
                *blocked = None;
                return LaneEvent::Room;
            }
            else => std::future::pending().await,
        };
        LaneEvent::Appended(self.judge(answer))
    }

    /// The outcome of the oldest entry sent, if it is there already.
    pub(super) fn appended_now(&mut self) -> Option<Appended> {
        let answer = self.in_flight.next().now_or_never().flatten()?;
        Some(self.judge(answer))
    }

    /// All outcomes, after a seal: every append is answered by then.
    pub(super) async fn appended_or_empty(&mut self) -> Option<Appended> {
        let answer = self.in_flight.next().await?;
        Some(self.judge(answer))
    }

    fn judge(&mut self, answer: Result<EntryId, AppendError>) -> Appended {
        self.silent_since = (!self.in_flight.is_empty()).then(Instant::now);
        match answer {
            Ok(entry) => {
                self.sent -= 1;
                Appended::Stored(entry)
            }
            Err(AppendError::NotAcknowledged | AppendError::Ended | AppendError::Full) => {
                Appended::NotStored
            }
            Err(AppendError::Indeterminate | AppendError::TooLarge) => Appended::Indeterminate,
        }
    }
}

/// Waits until the writer has room for the entry it refused.
async fn room(phase: &Phase, blocked: Option<usize>) {
    match (phase, blocked) {
        (Phase::Open(writer), Some(bytes)) => writer.ready(bytes).await,
        _ => std::future::pending().await,
    }
}

async fn or_never<T>(future: Option<&mut BoxFuture<'static, T>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}
