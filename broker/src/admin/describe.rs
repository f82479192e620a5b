//! What the catalog and the segments know, in the words of the admin API.

use geminga_proto::{
    admin::v1::{CursorState, Namespace, SegmentState, Subscription, Tenant, Topic},
    v1::SubscriptionStart,
};

use crate::{
    catalog::{self, Start},
    context::Context,
    ownership::Segment,
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

/// With the state of every segment; one that is not loaded here is not loaded for the question.
pub(super) fn topic_with_segments(context: &Context, found: &catalog::Topic) -> Topic {
    let segments = found.segment_ids().map(|id| match context.ownership.loaded(id) {
        Some(segment) => segment_state(&segment),
        None => SegmentState { segment: id.segment, ..SegmentState::default() },
    });
    Topic { segments: segments.collect(), ..topic(found) }
}

fn segment_state(segment: &Segment) -> SegmentState {
    let stats = segment.ledger().stats();
    SegmentState {
        segment: segment.id().segment,
        loaded: true,
        epoch: segment.epoch().0,
        next_offset: segment.ledger().end().borrow().0,
        first_offset: segment.ledger().first_offset().0,
        stored_bytes: stats.stored_bytes,
        ledgers: u32::try_from(stats.ledgers).unwrap_or(u32::MAX),
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
    }
}

/// The cursor of a subscription on a loaded segment.
pub(super) fn cursor(segment: &Segment, found: &catalog::Subscription) -> Option<CursorState> {
    let cursor = segment.ledger().cursor(found.id)?;
    Some(CursorState {
        segment: segment.id().segment,
        mark_delete_next: cursor.mark_delete_next.0,
        backlog_messages: cursor.backlog,
        holes: u32::try_from(cursor.holes.len()).unwrap_or(u32::MAX),
        consumer: segment.consumers().name(found.id),
    })
}
