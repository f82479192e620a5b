//! Errors, one enum per operation; a variant tells what the caller may do next.

use geminga_proto::ids::Offset;

/// Why a segment was not loaded.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LoadError {
    /// There is no list value: the segment was never made, or is deleted.
    #[error("the segment does not exist")]
    NotFound,
    /// The claim is not the one handed in: somebody else may own the bundle. Claim again first.
    #[error("the claim on the segment's bundle is gone")]
    ClaimLost,
    /// Too few bookies or no store right now; load again after a pause.
    #[error("the segment cannot be loaded now: {0}")]
    Unavailable(String),
    /// What is stored cannot be understood. A human looks.
    #[error("the segment's stored state is damaged: {0}")]
    Damaged(String),
    /// This process is stopping.
    #[error("the process is stopping")]
    Stopped,
}

/// Why a segment was not deleted. Repeating the call goes on where it ended.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DeleteError {
    /// Too few bookies or no store right now; call again after a pause.
    #[error("the segment cannot be deleted now: {0}")]
    Unavailable(String),
    /// What is stored cannot be understood. A human looks.
    #[error("the segment's stored state is damaged: {0}")]
    Damaged(String),
    /// This process is stopping.
    #[error("the process is stopping")]
    Stopped,
}

/// Why a producer was not opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProducerError {
    /// A later stream of this producer was opened (DD5).
    #[error("a stream with the higher number {current} was opened")]
    StaleStream { current: u64 },
    /// The session to resume is not remembered: what was in flight is of unknown outcome (DD4).
    #[error("the session to resume is not remembered")]
    UnknownSession,
    /// The segment remembers as many producers as it may (DD4).
    #[error("the segment remembers {limit} producers, as many as it may")]
    TooManyProducers { limit: usize },
    /// Since the epoch it holds another stream of its name was opened, or another producer fenced it. It is over with this
    /// producer; who wants to go on all the same opens without an epoch.
    #[error("the producer was fenced; its epoch is {current} by now")]
    StaleEpoch { current: u64 },
    /// Another producer has the segment for itself: open again when its stream has ended, or fence it.
    #[error("the producer {holder:?} has the segment for itself")]
    Held { holder: String },
    /// It wants the segment for itself, and other producers have streams: open again when these have ended, or fence them.
    #[error("other producers have streams on the segment")]
    OthersConnected,
    /// Only a named producer can fence others.
    #[error("a producer without a name of its own fences nobody")]
    NotNamed,
    /// The epoch could not be granted: a new ledger needs more bookies. Open again after a pause.
    #[error("too few bookies are writable: {0}")]
    NotEnoughBookies(String),
    /// The epoch cannot be granted: no ledger is open, and none can be opened while the metadata store does not answer (O3).
    /// Open again after a pause.
    #[error("no ledger is open, and the metadata store does not answer")]
    MetadataUnavailable,
    /// The segment is no longer served here; reload and open there.
    #[error("the segment is no longer served here")]
    Fenced,
    /// The segment is closing.
    #[error("the segment is closing")]
    Closed,
}

/// Why a batch was not stored, or may not have been.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// Nothing was stored: it does not chain to the last accepted one (DD5). Send again from `pushed` on.
    #[error("the batch does not follow sequence {pushed}")]
    OutOfSequence { pushed: u64 },
    /// Nothing was stored: it overlaps stored or pending sequences with other bounds (DD3). Never repeat it like this.
    #[error("the batch overlaps earlier sequences with other bounds")]
    SequenceConflict,
    /// Nothing was stored: a later stream of this producer was opened (DD5).
    #[error("a later stream of this producer was opened")]
    StaleStream,
    /// Nothing was stored: another producer has the segment for itself, or had it since this one opened (see
    /// [`crate::Access`]).
    #[error("another producer has the segment for itself")]
    ProducerFenced,
    /// Nothing was stored, and what is chained behind it is refused as well: it would have got the offset `next`.
    #[error("the next offset is {next}, not the expected one")]
    UnexpectedOffset { next: Offset },
    /// The producer is not remembered; open again. Nothing was stored of this batch.
    #[error("the producer is not open")]
    UnknownProducer,
    /// Nothing was stored: bounds or count make no sense.
    #[error("the batch is not valid: {0}")]
    Invalid(&'static str),
    /// Nothing was stored: header and payload exceed an entry.
    #[error("the batch of {bytes} bytes is larger than an entry may be")]
    TooLarge { bytes: usize },
    /// Nothing was stored, and what is chained behind it is refused as well: a new ledger needs more bookies.
    #[error("too few bookies are writable: {0}")]
    NotEnoughBookies(String),
    /// Nothing was stored, and what is chained behind it is refused as well: no ledger is open, and none can be opened
    /// while the metadata store does not answer (O3). Send again after a pause.
    #[error("no ledger is open, and the metadata store does not answer")]
    MetadataUnavailable,
    /// Nothing was stored, and what is chained behind it is refused as well: too much waits for the slowest subscription.
    /// Send again after a pause, or settle first.
    #[error(
        "{bytes} bytes wait for the slowest subscription, the oldest for {age_ms} ms: more than the quota"
    )]
    BacklogQuota { bytes: u64, age_ms: u64 },
    /// Nothing was stored: the owner has too much to do.
    #[error("the segment's queue is full")]
    Busy,
    /// Indeterminate: the segment was fenced or its ledger could not be closed; the batch may or may not be stored.
    #[error("the segment is no longer served here; the outcome is unknown")]
    Fenced,
    /// Nothing was stored: the segment is closing.
    #[error("the segment is closing")]
    Closed,
}

/// Why nothing was read. Never means "end of the log".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// Trimmed; the first offset kept is `first`.
    #[error("the offset is below {first}, the first one kept")]
    Trimmed { first: Offset },
    /// Try again after a pause.
    #[error("cannot be read now: {0}")]
    Unavailable(String),
    /// No bookie has a good copy (RD4).
    #[error("damaged: {0}")]
    Damaged(String),
    /// The segment is no longer served here.
    #[error("the segment is no longer served here")]
    Fenced,
}

/// Why nothing was read of the compacted view and the log behind it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompactedReadError {
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The reader began with a view that was replaced so long ago that the present one tells no more which keys were deleted
    /// since. Begin anew, without what was read.
    #[error("the compacted view that this reader began with was replaced too long ago")]
    Superseded,
}

/// Why a cursor was not changed, or may not have been.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettleError {
    /// There is no such cursor here.
    #[error("the subscription has no cursor here")]
    UnknownCursor,
    /// Nothing was settled: an offset at or past the end, or a run that ends before it starts.
    #[error("only stored offsets below {end} can be settled")]
    OutOfRange { end: Offset },
    /// Nothing was settled: the cursor would have more than `limit` runs (settled, pending, dead), or the change alone is larger
    /// than a record may be. Settle the oldest first, and deliver no more until there is room.
    #[error("the cursor has {limit} runs of settled offsets, as many as it may")]
    TooManyHoles { limit: usize },
    /// The record could not be written in time for lack of bookies. It may still come into force; settling again is safe.
    #[error("too few bookies are writable: {0}")]
    NotEnoughBookies(String),
    /// Nothing was settled: no cursor log is open, and none can be opened while the metadata store does not answer (O3).
    #[error("no cursor log is open, and the metadata store does not answer")]
    MetadataUnavailable,
    /// Nothing was settled: the owner has too much to do.
    #[error("the segment's queue is full")]
    Busy,
    /// Indeterminate: the segment is no longer served here. Settling again with the next owner is safe.
    #[error("the segment is no longer served here")]
    Fenced,
    /// The segment is closing.
    #[error("the segment is closing")]
    Closed,
}

/// Why an offload or a verification did not begin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TierError {
    /// This broker has no cold storage: configure one first.
    #[error("no cold storage is set up")]
    NoColdStorage,
    /// The owner has too much to do; call again after a pause.
    #[error("the segment's queue is full")]
    Busy,
    /// The segment is no longer served here; load it there.
    #[error("the segment is no longer served here")]
    Fenced,
}
