//! The owner's watch over its backlog: messages that are too old expire, and where too much waits producers are refused, made
//! to wait, or the slowest subscriptions lose the oldest messages. The judgements stand in `limits.rs`.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use futures::{FutureExt, future::BoxFuture};
use geminga_proto::ids::{Offset, SubscriptionId};
use tokio::time::Instant;

use super::{owner::Owner, publish::Answer};
use crate::{
    backlog::{self, Backlog},
    error::{PublishError, ReadError},
    limits,
    offload::BacklogAction,
    types::{PublishBatch, Settlement, Stored},
};

/// The backlog is judged anew after this part of its quota was published.
const QUOTA_PARTS: u64 = 16;

/// What the owner knows of its backlog.
#[derive(Default)]
pub(super) struct Limits {
    /// Over quota, as last judged.
    over: Option<Backlog>,
    bytes_unjudged: u64,
    /// Batches whose answers come late, in order; the clock of each runs from when it came.
    held: VecDeque<Held>,
    /// Looks for the oldest message that has not expired.
    search: Option<BoxFuture<'static, Result<Offset, ReadError>>>,
    /// Cursors that the policy moves, until that is durable.
    moving: BTreeSet<SubscriptionId>,
    /// Messages are being evicted: said once.
    evicting: bool,
}

struct Held {
    batch: PublishBatch,
    answer: Answer<Stored, PublishError>,
    since: Instant,
}

impl Limits {
    /// The search has an end. Cancel-safe.
    pub(super) async fn searched(&mut self) -> Result<Offset, ReadError> {
        match &mut self.search {
            Some(search) => {
                let found = search.await;
                self.search = None;
                found
            }
            None => std::future::pending().await,
        }
    }

    /// When the oldest batch held is refused.
    pub(super) fn hold_ends(&self, patience: Duration) -> Option<Instant> {
        self.held.front().map(|held| held.since + patience)
    }

    /// What the policy decided for this cursor is durable, or nothing of it is on its way.
    pub(super) fn moved(&mut self, id: SubscriptionId) {
        self.moving.remove(&id);
    }

    pub(super) fn none_moves(&mut self) {
        self.moving.clear();
    }

    pub(super) fn held(&self) -> usize {
        self.held.len()
    }
}

impl Owner {
    /// Time has passed, or the policy is another one.
    pub(super) fn watch_backlog(&mut self) {
        self.judge_backlog();
        let Some(policy) = self.shared.policy.borrow().clone() else { return };
        let Some(cutoff_ms) = limits::expires_before(&policy, self.now_ms()) else { return };
        let Some(slowest) = self.slowest_cursor() else { return };
        let (open, end) = (*self.shared.open_counts.lock(), *self.shared.end.borrow());
        let busy = self.limits.search.is_some() || self.closing.is_some();
        if !busy && limits::may_have_expired(&self.current.list, &open, slowest, cutoff_ms) {
            let shared = Arc::clone(&self.shared);
            let search = async move { shared.view.offset_at_time(cutoff_ms, open, end).await };
            self.limits.search = Some(search.boxed());
        }
    }

    /// Everything below counts as settled for every subscription; what could not be read is looked for again later.
    pub(super) fn expire(&mut self, found: Result<Offset, ReadError>) {
        match found {
            Ok(below) => {
                let expired = self.settle_all_below(below);
                self.ledgers.parts().metrics.expired_messages.inc_by(expired);
            }
            Err(error) => tracing::info!(
                topic = self.shared.segment.topic.0,
                segment = self.shared.segment.segment,
                %error,
                "expired messages not found yet"
            ),
        }
    }

    /// An `UpTo` for each cursor that is behind; how many messages that settles.
    fn settle_all_below(&mut self, below: Offset) -> u64 {
        let Some(last) = below.0.checked_sub(1).map(Offset) else { return 0 };
        let behind: Vec<(SubscriptionId, u64)> = {
            let cursors = self.shared.cursors.lock();
            let behind = cursors.iter().filter(|(id, cursor)| {
                cursor.mark_delete_next() < below && !self.limits.moving.contains(id)
            });
            behind.map(|(id, cursor)| (*id, cursor.unsettled_below(below))).collect()
        };
        let mut settled = 0;
        for (id, messages) in behind {
            if self.settle_by_policy(id, Settlement::UpTo(last)) {
                self.limits.moving.insert(id);
                *self.shared.evicted.lock().entry(id).or_default() += messages;
                settled += messages;
            }
        }
        let cursors = self.shared.cursors.lock();
        self.shared.evicted.lock().retain(|id, _| cursors.contains_key(id));
        settled
    }

    /// Looks at the backlog of the slowest cursor. Over quota the oldest messages are evicted, or producers hear of it;
    /// under it those that were held go on.
    fn judge_backlog(&mut self) {
        self.limits.bytes_unjudged = 0;
        let policy = self.shared.policy.borrow().clone();
        let over = policy.as_ref().and_then(|policy| {
            policy.backlog_quota_bytes.or(policy.backlog_quota_ms)?;
            let open = *self.shared.open_counts.lock();
            let slowest = self.slowest_cursor()?;
            let backlog = backlog::estimate(&self.current.list, &open, slowest);
            limits::is_over(policy, &backlog, self.now_ms()).then_some(backlog)
        });
        match policy.filter(|policy| policy.backlog_action == BacklogAction::EvictOldest) {
            Some(policy) => {
                self.limits.over = None;
                self.evict(over, policy.backlog_quota_bytes);
            }
            None => (self.limits.over, self.limits.evicting) = (over, false),
        }
        self.release_held();
    }

    /// By size; by age [`Self::watch_backlog`] does it.
    fn evict(&mut self, over: Option<Backlog>, bytes_max: Option<u64>) {
        let Some(backlog) = over else {
            self.limits.evicting = false;
            return;
        };
        if !std::mem::replace(&mut self.limits.evicting, true) {
            tracing::warn!(
                topic = self.shared.segment.topic.0,
                segment = self.shared.segment.segment,
                backlog_bytes = backlog.bytes,
                backlog_messages = backlog.messages,
                "the backlog is over its quota: the slowest subscriptions lose the oldest messages"
            );
        }
        if let Some(bytes_max) = bytes_max {
            let open = *self.shared.open_counts.lock();
            let below = limits::evict_below(&self.current.list, &open, bytes_max);
            let evicted = self.settle_all_below(below);
            self.ledgers.parts().metrics.evicted_messages.inc_by(evicted);
        }
    }

    /// So much was stored.
    pub(super) fn note_stored(&mut self, bytes: u64) {
        self.limits.bytes_unjudged += bytes;
        let quota = self.shared.policy.borrow().as_ref().and_then(|one| one.backlog_quota_bytes);
        if quota.is_some_and(|quota| self.limits.bytes_unjudged > quota / QUOTA_PARTS) {
            self.judge_backlog();
        }
    }

    /// Cursors moved.
    pub(super) fn note_settled(&mut self) {
        if self.limits.over.is_some() {
            self.judge_backlog();
        }
    }

    /// Why a new batch is not taken up, if it is not.
    pub(super) fn over_quota(&self) -> Option<PublishError> {
        let over = self.limits.over?;
        let age_ms = over.oldest_publish_ms.map_or(0, |at| self.now_ms().saturating_sub(at));
        Some(PublishError::BacklogQuota { bytes: over.bytes, age_ms })
    }

    /// Whether batches wait instead of being refused.
    pub(super) fn holds(&self) -> bool {
        let policy = self.shared.policy.borrow();
        self.limits.over.is_some()
            && policy.as_ref().is_some_and(|one| one.backlog_action == BacklogAction::Hold)
    }

    /// Holds the batch, behind those that are held; past the bound it is refused.
    pub(super) fn hold(&mut self, batch: PublishBatch, answer: Answer<Stored, PublishError>) {
        if self.limits.held.len() >= self.ledgers.parts().config.commands_max {
            return drop(answer.send(Err(PublishError::Busy)));
        }
        self.limits.held.push_back(Held { batch, answer, since: Instant::now() });
    }

    fn release_held(&mut self) {
        if self.limits.held.is_empty() || self.holds() {
            return;
        }
        for Held { batch, answer, .. } in std::mem::take(&mut self.limits.held) {
            self.take(batch, answer);
        }
    }

    /// The oldest batches held have waited long enough: they are judged, and refused if they are new.
    pub(super) fn refuse_held(&mut self) {
        let patience = self.ledgers.parts().config.create_patience;
        while self.limits.held.front().is_some_and(|held| held.since.elapsed() >= patience) {
            let Some(Held { batch, answer, .. }) = self.limits.held.pop_front() else { return };
            self.take(batch, answer);
        }
    }

    /// Nothing held is taken up any more.
    pub(super) fn fail_held(&mut self, error: &PublishError) {
        for held in std::mem::take(&mut self.limits.held) {
            let _ = held.answer.send(Err(error.clone()));
        }
    }
}
