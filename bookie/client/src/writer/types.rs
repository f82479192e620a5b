//! What a writer's callers see: errors, the poison, and a sealed ledger.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use geminga_metadata::Txn;
use geminga_proto::ids::{EntryId, LedgerId};
use tokio::sync::oneshot;

use crate::metadata::{LedgerMetadata, Versioned};

/// Why an append did not end in an acknowledgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// Nothing was sent: the writer holds as much as it may (W5). Await `ready`, then append again.
    #[error("the writer holds as many bytes as it may")]
    Full,
    /// Nothing was sent, and never will be: the payload is larger than an entry may be.
    #[error("the payload is larger than an entry may be")]
    TooLarge,
    /// Nothing was sent: the writer was sealed or poisoned before.
    #[error("the ledger takes no more entries")]
    Ended,
    /// Sent, but not acknowledged when the writer ended at its LAC. Once *this owner's* close at that LAC has landed, the
    /// entry is certain not to be in the ledger and may be sent again, as a new entry (M2). Until then it is indeterminate.
    #[error("the entry was not acknowledged before the ledger ended")]
    NotAcknowledged,
    /// The ledger was fenced, closed or deleted by somebody else, or this process is stopping: the entry may or may not
    /// appear after recovery (W6, W7).
    #[error("the ledger was taken over; the entry may or may not have been stored")]
    Indeterminate,
}

/// Why a writer acknowledges nothing any more (W6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Poison {
    /// A bookie answered FENCED, or a CAS showed a state other than Open, or another writer's fragment.
    #[error("the ledger was fenced or taken over")]
    Fenced,
    /// Too few bookies answer and none can replace them (EC7): close at the LAC, roll, send again (M2).
    #[error("too few bookies store the ledger's entries, and none can take their place")]
    WriteFailure,
    /// The process is stopping, perhaps with a change unsettled (MD3).
    #[error("the writer was stopped")]
    Stopped,
}

/// Why a ledger could not be sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// Somebody else took the ledger: what is not acknowledged is indeterminate, reload.
    #[error("the ledger was fenced or taken over")]
    Fenced,
    /// The writer stopped, or was sealed before.
    #[error("the writer has ended")]
    Ended,
}

/// A ledger whose writer stopped at `last`; the caller merges `txn` into its own transaction (section 6, M2).
#[derive(Clone, Debug)]
pub struct Sealed {
    pub id: LedgerId,
    /// The LAC; none for an empty ledger.
    pub last: Option<EntryId>,
    /// Payload bytes up to `last`.
    pub length: u64,
    /// Compares the ledger's revision; puts the closed value, and the listing if any entry or slot is short.
    pub txn: Txn,
    /// What `txn` writes.
    pub closed: LedgerMetadata,
    pub(crate) base: Versioned<LedgerMetadata>,
    pub(crate) short: bool,
}

impl Sealed {
    /// The open value this close was built on, with the revision that `txn` compares.
    #[must_use]
    pub fn base(&self) -> &Versioned<LedgerMetadata> {
        &self.base
    }
}

/// The outcome of an append. Dropping it abandons the answer, not the entry.
#[derive(Debug)]
pub struct AppendFuture(pub(super) Outcome);

#[derive(Debug)]
pub(super) enum Outcome {
    Refused(AppendError),
    Pending(oneshot::Receiver<Result<EntryId, AppendError>>),
}

impl AppendFuture {
    /// Why nothing was sent; none: the entry was taken, and may have been answered already.
    #[must_use]
    pub fn refused(&self) -> Option<AppendError> {
        match &self.0 {
            Outcome::Refused(error) => Some(*error),
            Outcome::Pending(_) => None,
        }
    }
}

impl Future for AppendFuture {
    type Output = Result<EntryId, AppendError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Outcome::Refused(error) => Poll::Ready(Err(*error)),
            Outcome::Pending(answer) => Pin::new(answer)
                .poll(context)
                .map(|answer| answer.unwrap_or(Err(AppendError::Indeterminate))),
        }
    }
}
