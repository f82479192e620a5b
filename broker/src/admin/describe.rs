//! What the catalog and the segments know, in the words of the admin API.

use std::time::Duration;

use geminga_managed_ledger::{BacklogAction, TierPolicy};
use geminga_proto::{
    admin::v1::{CursorState, Namespace, SegmentState, SegmentTier, Subscription, Tenant, Topic},
    ids::SubscriptionId,
    internal::v1::segment_request::{Describe, Verb},
    v1::{self as pb, Policies, SubscriptionStart},
};

use crate::{
    catalog::{self, Limit, Start},
    context::Shared,
    limits::{Rate, SegmentLimits},
    ownership::Segment,
    relay,
};

pub(super) fn tenant(tenant: &catalog::Tenant, namespaces: Option<usize>) -> Tenant {
    Tenant {
        name: tenant.name.to_string(),
        created_at_ms: tenant.created_at_ms,
        namespaces: namespaces.map(bounded),
    }
}

pub(super) fn namespace(namespace: &catalog::Namespace, topics: Option<usize>) -> Namespace {
    Namespace {
        name: namespace.name.to_string(),
        created_at_ms: namespace.created_at_ms,
        auto_create_topics: namespace.auto_create_topics,
        topics: topics.map(bounded),
    }
}

fn bounded(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

pub(super) fn topic(topic: &catalog::Topic) -> Topic {
    Topic {
        name: topic.name.to_string(),
        id: topic.id.0,
        layout: Some(topic.layout()),
        created_at_ms: topic.created_at_ms,
        segments: Vec::new(),
    }
}

/// With the state of every segment, by its owner; one that nobody has loaded is not loaded for the question.
pub(super) async fn topic_with_segments(context: &Shared, found: &catalog::Topic) -> Topic {
    let states = found.segment_ids().map(|id| async move {
        let reply = relay::ask_if_claimed(context, id, Verb::Describe(Describe {})).await;
        let unknown = SegmentState { segment: id.segment, ..SegmentState::default() };
        reply.and_then(|reply| reply.state).unwrap_or(unknown)
    });
    Topic { segments: futures::future::join_all(states).await, ..topic(found) }
}

pub(crate) fn segment_state(segment: &Segment) -> SegmentState {
    let stats = segment.ledger().stats();
    let compaction = segment.ledger().compaction();
    SegmentState {
        segment: segment.id().segment,
        loaded: true,
        epoch: segment.epoch().0,
        next_offset: segment.ledger().end().borrow().0,
        first_offset: segment.ledger().first_offset().0,
        stored_bytes: stats.stored_bytes,
        ledgers: u32::try_from(stats.ledgers).unwrap_or(u32::MAX),
        compacted_to: compaction.compacted_to.0,
        compacted_messages: compaction.messages,
        compacted_bytes: compaction.bytes,
    }
}

pub(super) fn subscription(
    topic: &catalog::Topic,
    subscription: &catalog::Subscription,
) -> Subscription {
    let start = match subscription.start {
        Start::Earliest => SubscriptionStart::Earliest,
        Start::Latest | Start::Unspecified => SubscriptionStart::Latest,
    };
    Subscription {
        topic: topic.name.to_string(),
        name: subscription.name.to_string(),
        id: subscription.id.0,
        created_at_ms: subscription.created_at_ms,
        start: start.into(),
        cursors: Vec::new(),
        settings: Some(subscription.settings.clone()),
    }
}

/// Where the closed ledgers of a segment that is here lie.
pub(crate) fn tier(segment: &Segment) -> SegmentTier {
    let status = segment.ledger().tier_status();
    SegmentTier {
        segment: segment.id().segment,
        ledgers: status.ledgers,
        ledgers_uploading: status.ledgers_uploading,
        ledgers_uploaded: status.ledgers_uploaded,
        ledgers_object_only: status.ledgers_object_only,
        bytes_bookies: status.bytes_bookies,
        bytes_objects: status.bytes_objects,
        first_offset: status.first_offset.0,
        next_offset: status.next_offset.0,
        last_error: status.last_error,
        in_force: in_force(segment.ledger().policy().as_ref(), &segment.limits().borrow()),
    }
}

/// What of its policies a segment acts by; none if it is nothing.
fn in_force(policy: Option<&TierPolicy>, limits: &SegmentLimits) -> Option<Policies> {
    let per_s = |rate: Option<Rate>| rate.map(|rate| rate.per_s);
    let most = |limit: Option<Limit>| limit.map(|limit| limit.most);
    let in_force = Policies {
        publish_messages_per_s: per_s(limits.publish.messages),
        publish_bytes_per_s: per_s(limits.publish.bytes),
        deliver_messages_per_s: per_s(limits.deliver.messages),
        deliver_bytes_per_s: per_s(limits.deliver.bytes),
        producers_max: most(limits.producers_max),
        consumers_max: most(limits.consumers_max),
        ..policy.map(of_tier).unwrap_or_default()
    };
    (in_force != Policies::default()).then_some(in_force)
}

fn of_tier(policy: &TierPolicy) -> Policies {
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    Policies {
        offload_after_ms: policy.offload_after.map(millis),
        offload_above_bytes: policy.offload_above_bytes,
        delete_lag_ms: Some(millis(policy.delete_lag)),
        retention_ms: policy.retention_ms,
        retention_bytes: policy.retention_bytes,
        ttl_ms: policy.ttl_ms,
        backlog_quota_bytes: policy.backlog_quota_bytes,
        backlog_quota_ms: policy.backlog_quota_ms,
        backlog_action: Some(backlog_action(policy.backlog_action).into()),
        compact_after_bytes: policy.compact_after_bytes,
        ..Policies::default()
    }
}

fn backlog_action(action: BacklogAction) -> pb::BacklogAction {
    match action {
        BacklogAction::Reject => pb::BacklogAction::Reject,
        BacklogAction::Hold => pb::BacklogAction::Hold,
        BacklogAction::EvictOldest => pb::BacklogAction::EvictOldest,
    }
}

/// The cursor of a subscription on a loaded segment.
pub(crate) fn cursor(segment: &Segment, subscription: SubscriptionId) -> Option<CursorState> {
    let cursor = segment.ledger().cursor(subscription)?;
    let seen = segment.dispatchers().seen(subscription).unwrap_or_default();
    Some(CursorState {
        segment: segment.id().segment,
        mark_delete_next: cursor.mark_delete_next.0,
        backlog_messages: cursor.backlog,
        holes: u32::try_from(cursor.holes.len()).unwrap_or(u32::MAX),
        consumer: seen.consumer,
        consumers: seen.consumers,
        dead_letters: crate::subscription::dead_letters(segment, subscription),
    })
}
