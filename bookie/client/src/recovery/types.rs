//! What recovery's callers see.

use geminga_metadata::{StoreError, Txn};
use geminga_proto::ids::{EntryId, Epoch, LedgerId};

use crate::metadata::{Fragment, LedgerMetadata, MetadataError, RecoveryNonce, Versioned};

/// R1: the transition into recovery, to be merged into the caller's transaction (TK1).
#[derive(Clone, Debug)]
pub struct RecoveryStart {
    pub id: LedgerId,
    pub nonce: RecoveryNonce,
    /// Compares the ledger's revision; puts the value under recovery.
    pub txn: Txn,
    /// What `txn` writes; `Versioned::changed` with the transaction's revision gives what `recover` takes.
    pub metadata: LedgerMetadata,
}

/// R7 and R8: where the ledger ends; the caller merges `txn` into its own transaction (TK2).
#[derive(Clone, Debug)]
pub struct Recovered {
    pub id: LedgerId,
    /// The end; none for an empty ledger.
    pub last: Option<EntryId>,
    /// Payload bytes up to `last`.
    pub length: u64,
    /// Compares the ledger's revision; puts the closed value, and the listing unless every copy was shown (R8).
    pub txn: Txn,
    /// What `txn` writes.
    pub closed: LedgerMetadata,
    /// Whose recovery this is.
    pub nonce: RecoveryNonce,
    pub(crate) base: Versioned<LedgerMetadata>,
    pub(crate) private: Vec<Fragment>,
    pub(crate) short: bool,
}

impl Recovered {
    /// The value under recovery this close was built on, with the revision that `txn` compares.
    #[must_use]
    pub fn base(&self) -> &Versioned<LedgerMetadata> {
        &self.base
    }
}

/// A ledger that is closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClosedLedger {
    pub id: LedgerId,
    /// The end; none for an empty ledger.
    pub last: Option<EntryId>,
    /// Payload bytes.
    pub length: u64,
    pub metadata: LedgerMetadata,
}

/// Why a ledger was not recovered.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// Too few bookies answered with certainty; nothing was guessed (R3). Try again later.
    #[error("ledger {ledger} cannot be recovered now: {why}")]
    Incomplete { ledger: LedgerId, why: String },
    /// A later owner recovers it (R1): give up.
    #[error("ledger {ledger} is being recovered by epoch {by}")]
    Superseded { ledger: LedgerId, by: Epoch },
    /// The ledger is deleted, or never was.
    #[error("ledger {ledger} is gone")]
    Gone { ledger: LedgerId },
    /// The process is stopping; a transaction may be unsettled (MD3).
    #[error("recovery of ledger {ledger} was stopped")]
    Stopped { ledger: LedgerId },
    /// The store did not answer. Try again later.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The stored metadata is damaged. A human looks.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
}
