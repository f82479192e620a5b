//! How long messages are kept, and where; how many may wait. Plain data, set per segment.

use std::time::Duration;

/// Tiering and retention of a segment. As long as none was set nothing is trimmed, offloaded or deleted: dropping a message
/// is always somebody's decision, and nothing expires or is held to a quota.
///
/// Messages that every subscription has settled are *settled*. Without retention a ledger goes once all of it is settled and
/// there is at least one subscription; without a subscription it stays. With retention a settled ledger is kept while it is
/// younger than `retention_ms` *and* the ledgers after it hold less than `retention_bytes`; a topic without subscriptions
/// counts as settled, so retention alone makes a log of bounded length. A message that some subscription has not settled is
/// never trimmed, whatever retention says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierPolicy {
    /// Closed ledgers whose last message is older than this are offloaded.
    pub offload_after: Option<Duration>,
    /// Closed ledgers are offloaded, oldest first, while more bytes than this lie on bookies alone.
    pub offload_above_bytes: Option<u64>,
    /// From the end of an upload to the deletion of the ledger on bookies (X3).
    pub delete_lag: Duration,
    /// Settled messages are kept no longer than this. Zero: not at all.
    pub retention_ms: Option<u64>,
    /// And no more than so many bytes, over both tiers.
    pub retention_bytes: Option<u64>,
    /// Messages older than this count as settled for every subscription: looked at every 10 s, late rather than early.
    pub ttl_ms: Option<u64>,
    /// So many bytes may wait for the slowest subscription, about.
    pub backlog_quota_bytes: Option<u64>,
    /// The oldest message that waits may be so old, about.
    pub backlog_quota_ms: Option<u64>,
    /// What happens when more waits.
    pub backlog_action: BacklogAction,
    /// The segment is compacted when so many bytes were published behind its horizon; looked at every 10 s. Nothing is trimmed
    /// before it is compacted then.
    pub compact_after_bytes: Option<u64>,
}

/// What happens when more waits for the slowest subscription than a quota allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BacklogAction {
    /// Batches are refused.
    #[default]
    Reject,
    /// Batches are answered late: when there is room again, or after 10 s with a refusal.
    Hold,
    /// The slowest subscriptions lose the oldest messages: these count as settled.
    EvictOldest,
}

impl Default for TierPolicy {
    /// Nothing is offloaded; what all subscriptions have settled is trimmed.
    fn default() -> Self {
        Self {
            offload_after: None,
            offload_above_bytes: None,
            delete_lag: Duration::from_secs(4 * 3600),
            retention_ms: None,
            retention_bytes: None,
            ttl_ms: None,
            backlog_quota_bytes: None,
            backlog_quota_ms: None,
            backlog_action: BacklogAction::Reject,
            compact_after_bytes: None,
        }
    }
}
