//! What the core hears and says.

use super::super::{KeyRange, RangeSet};

/// A stored batch in memory.
pub trait Batch: Clone {
    /// Its first offset.
    fn base(&self) -> u64;
    /// Its number of messages, at least 1.
    fn count(&self) -> u32;
    /// Its payload, bytes.
    fn bytes(&self) -> u64;
    /// The key hash of its message number `at`; any, where it has none.
    fn key_hash(&self, at: u32) -> u32;
    /// When its message number `at` is to be delivered by shared types; 0: at once.
    fn deliver_at(&self, at: u32) -> u64;
    /// Whether any of its messages has such a time.
    fn has_delays(&self) -> bool;
    /// What a delivery of these runs needs of it: a smaller batch with the same messages in them under the same offsets, or
    /// itself.
    fn cut(&self, runs: &[(u64, u64)]) -> Self {
        let _all_of_it = runs;
        self.clone()
    }
    /// The offset behind its last message.
    fn end(&self) -> u64 {
        self.base() + u64::from(self.count())
    }
}

/// Who gets messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Exclusive,
    Failover,
    Shared,
    KeyShared,
}

impl Kind {
    /// Whether any consumer may get any message, each for a time.
    #[must_use]
    pub fn is_shared(self) -> bool {
        matches!(self, Self::Shared | Self::KeyShared)
    }
}

/// A subscription's settings, defaults filled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    pub kind: Kind,
    /// 0: no limit.
    pub attempts_max: u32,
    pub backoff_ms: u64,
    pub backoff_ms_max: u64,
    pub lease_ms: u64,
}

impl Policy {
    /// The pause after attempt number `attempt` failed.
    #[must_use]
    pub fn backoff(&self, attempt: u32) -> u64 {
        let doubled = attempt.saturating_sub(1).min(40);
        self.backoff_ms.saturating_mul(1 << doubled).min(self.backoff_ms_max)
    }
}

/// What one core may hold.
#[derive(Clone, Copy, Debug)]
pub struct CoreLimits {
    /// Delivered and unsettled messages of all consumers.
    pub unacked_messages_max: u64,
    /// Of one consumer.
    pub unacked_per_consumer_max: u64,
    pub consumers_max: usize,
    /// Bytes read and not delivered.
    pub read_ahead_bytes_max: u64,
    /// Messages that wait for a time, a key or a consumer, below the frontier. On shared subscriptions those past it wait as
    /// runs, not told apart (L6); else no fresh ones are looked at.
    pub parked_messages_max: u64,
    /// A run of waiting messages that are not told apart is read again at most this often: they may be so late.
    pub run_pause_ms: u64,
    /// Dead letters whose copy is not stored yet: past it rejects are refused.
    pub dead_letters_max: usize,
    /// How long a consumer may be away.
    pub grace_ms: u64,
}

/// Where the core is.
#[derive(Clone, Copy, Debug)]
pub struct Owner {
    /// The segment's owner epoch.
    pub epoch: u64,
    pub segment: u32,
    pub segments: u32,
}

/// Messages whose attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Redelivery {
    pub start: u64,
    pub end: u64,
    /// The number of the next delivery.
    pub attempt: u32,
    /// 0: at once.
    pub due_ms: u64,
}

/// Messages with a consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    pub consumer: u64,
    pub name: String,
    /// Half-open.
    pub runs: Vec<(u64, u64)>,
    pub attempt: u32,
    /// 0: as long as it is connected.
    pub left_ms: u64,
}

/// A message for the dead-letter topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    pub number: u64,
    pub offset: u64,
    /// Deliveries that it had.
    pub attempt: u32,
    pub reason: String,
}

/// The state of a subscription as it is durable.
#[derive(Clone, Debug, Default)]
pub struct Restored {
    pub mark_delete: u64,
    /// Above it.
    pub settled: RangeSet,
    pub pending: Vec<Redelivery>,
    pub leases: Vec<Lease>,
    pub dead: Vec<DeadLetter>,
    /// The number of the last decision.
    pub dead_letters: u64,
    pub keys: Vec<KeyRange>,
}

/// What a consumer brings back from an earlier stream; its handle's signature was good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claimed {
    pub presented: Presented,
    /// Half-open.
    pub runs: Vec<(u64, u64)>,
}

/// A handle that was presented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Presented {
    pub consumer: u64,
    pub attempt: u32,
    /// It was given by an earlier owner.
    pub earlier: bool,
}

/// A consumer is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attached {
    /// What it goes on holding: half-open runs, by attempt.
    pub granted: Vec<(u32, Vec<(u64, u64)>)>,
}

/// A settle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verb {
    Accept {
        runs: Vec<(u64, u64)>,
    },
    /// Everything below `end`.
    UpTo {
        end: u64,
    },
    Release {
        runs: Vec<(u64, u64)>,
        delay_ms: Option<u64>,
        counts: bool,
    },
    Reject {
        runs: Vec<(u64, u64)>,
        reason: String,
    },
    Extend {
        runs: Vec<(u64, u64)>,
        lease_ms: u64,
    },
}

/// What becomes of a settle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It needs no record.
    Now,
    /// Answered once this record is durable.
    Recorded(u64),
}

/// Why a settle was refused; nothing happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettleRefused {
    #[error("offset {0} is not held under this handle")]
    NotHeld(u64),
    #[error("a shared subscription settles by ranges only")]
    NotInOrder,
    #[error("the subscription is being moved to another place")]
    Seeking,
    #[error("as many dead letters as may wait for their copy do")]
    TooManyDead,
}

/// What is to be made durable; answer with [`super::Core::on_recorded`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Half-open runs.
    Accept(Vec<(u64, u64)>),
    /// Everything below.
    UpTo(u64),
    Redeliver(Vec<Redelivery>),
    DeadLetter(Vec<DeadLetter>),
    Keys(Vec<KeyRange>),
    Reset(u64),
}

/// A record did not become durable, as far as is known; nothing was acted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordFailed;

/// What a read is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadOf {
    /// What comes next.
    Fresh,
    /// Messages to be delivered again.
    Replay,
}

/// What is to be done now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action<B> {
    /// Read from this offset on; answer with `on_read`, `on_trimmed` or `on_read_failed`.
    Read {
        of: ReadOf,
        generation: u64,
        from: u64,
        bytes_max: u64,
        messages_max: u64,
    },
    /// Give these messages to a consumer.
    Deliver(Delivery<B>),
    Record {
        id: u64,
        change: Change,
    },
    /// Tell a consumer that these are no longer its own.
    Revoke {
        consumer: u64,
        attempt: u32,
        runs: Vec<(u64, u64)>,
    },
    /// Tell a consumer whether it is the active one.
    Assign {
        consumer: u64,
        active: bool,
        epoch: u64,
    },
    /// A consumer of the same name took its place: its stream ends.
    Replaced {
        consumer: u64,
    },
    /// To be written without waiting (L2).
    LogLeases(Vec<Lease>),
    /// Store its copy; answer with `on_published`.
    PublishDead(DeadLetter),
}

/// Messages of one batch for a consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery<B> {
    pub consumer: u64,
    /// The whole batch.
    pub batch: B,
    /// The offsets of it that are delivered, half-open runs in order.
    pub runs: Vec<(u64, u64)>,
    /// How many messages that are.
    pub messages: u64,
    pub attempt: u32,
    /// 0: as long as it is connected.
    pub lease_ms: u64,
}

/// What happened, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub redelivered: u64,
    pub dead_lettered: u64,
    pub leases_expired: u64,
    pub key_ranges_moved: u64,
    /// Time that something deliverable waited for the rate.
    pub throttled_ms: u64,
    /// Payload bytes of deliveries that did.
    pub throttled_bytes: u64,
}
