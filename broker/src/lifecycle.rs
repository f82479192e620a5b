//! The steps of a topic's and a subscription's life that touch both the catalog and the segments' owners (C6).
//!
//! Each is resumable: what a crash leaves half done, the next call of the same kind, or the next load of a segment,
//! brings to its end.

use std::sync::Arc;

use geminga_managed_ledger::Start as CursorStart;
use geminga_proto::{
    admin::v1::CreateTopicRequest,
    ids::{SegmentId, TopicId},
    internal::v1::segment_request::{Delete, EnsureCursor, RemoveCursor, SettingsChanged, Verb},
    names::{NamespaceName, SubscriptionName, TopicName},
    reason::Reason,
    v1::SubscriptionSettings,
};
use tokio::time::timeout;

use crate::{
    auth::Principal,
    catalog::{Catalog, Limit, Start, State, Subscription, Topic},
    context::Shared,
    errors::Refusal,
    ownership::Segment,
    relay, storage_errors,
    subscription::settings,
};

/// Tries to make a subscription ready; each lost one means that the layout or the key changed meanwhile.
const TRIES_MAX: u32 = 16;

/// Creates a topic where its namespace has room for it.
///
/// # Errors
/// TOO_MANY_TOPICS; as [`create_topic_unlimited`].
pub(crate) async fn create_topic(
    context: &Shared,
    name: &TopicName,
    segments: u32,
) -> Result<Topic, Refusal> {
    if context.catalog.find_topic(name).await?.is_none() {
        room_for_topic(context, name.namespace()).await?;
    }
    create_topic_unlimited(context, name, segments).await
}

/// Exact, up to creations at the same moment.
async fn room_for_topic(context: &Shared, namespace: &NamespaceName) -> Result<(), Refusal> {
    let set = context.catalog.set_policies_in(namespace).await?;
    let Some(limit) = set.limit("topics_max") else { return Ok(()) };
    if context.hub.topics_in(namespace).is_some_and(|seen| far_below(seen, limit)) {
        return Ok(());
    }
    let topics = context.catalog.topic_count(namespace).await?;
    if topics as u64 >= limit.most {
        let message = format!("namespace {namespace} has {topics} topics");
        return Err(limit.reached(Reason::TooManyTopics, "topics_max", &message));
    }
    Ok(())
}

/// Whether a number that was seen, and may be a little late, leaves no doubt that there is room: to count in the store costs
/// a read of them all.
fn far_below(seen: usize, limit: Limit) -> bool {
    (seen as u64).saturating_add((limit.most / 10).max(100)) < limit.most
}

/// Creates a topic; one whose deletion is half done is deleted first.
///
/// # Errors
/// INVALID_REQUEST for too many segments; as [`Catalog::create_topic`].
pub(crate) async fn create_topic_unlimited(
    context: &Shared,
    name: &TopicName,
    segments: u32,
) -> Result<Topic, Refusal> {
    let segments_max = context.config.limits.segments_max;
    if segments > segments_max {
        return Err(Refusal::request(format!(
            "segments is {segments}, at most {segments_max} are allowed"
        ))
        .with("segments_max", segments_max));
    }
    if let Some(topic) = context.catalog.find_topic(name).await?
        && topic.deleting
    {
        finish_delete(context, &topic).await?;
    }
    context.catalog.create_topic(name, segments).await
}

/// The topic; created with one segment if it is missing, its namespace's policy allows it, and the caller may (S1).
///
/// # Errors
/// TOPIC_NOT_FOUND, NAMESPACE_NOT_FOUND, TENANT_NOT_FOUND; PERMISSION_DENIED; TOO_MANY_TOPICS.
pub(crate) async fn topic_or_create(
    context: &Shared,
    principal: &Principal,
    name: &TopicName,
) -> Result<Topic, Refusal> {
    let refusal = match context.catalog.topic(name).await {
        Err(refusal) if refusal.reason == Reason::TopicNotFound => refusal,
        done => return done,
    };
    let namespace = context.catalog.namespace(name.namespace()).await?;
    if !context.config.auto_create_topics || !namespace.auto_create_topics {
        return Err(refusal);
    }
    let request = CreateTopicRequest { name: name.to_string(), segments: 0 };
    context.gate.check(principal, &request)?;
    tracing::info!(topic = %name, "topic created on first use");
    create_topic(context, name, 0).await
}

/// Deletes a topic with all its data. Its streams end with TOPIC_NOT_FOUND.
///
/// # Errors
/// TOPIC_NOT_FOUND; what kept the rest, in which case the call is to be repeated.
pub(crate) async fn delete_topic(context: &Shared, name: &TopicName) -> Result<(), Refusal> {
    let topic = match context.catalog.find_topic(name).await? {
        Some(topic) => topic,
        None => context.catalog.topic(name).await?, // gives the right refusal
    };
    context.catalog.mark_topic_deleting(&topic).await?;
    finish_delete(context, &topic).await
}

async fn finish_delete(context: &Shared, topic: &Topic) -> Result<(), Refusal> {
    for segment in topic.segment_ids() {
        let verb = Verb::Delete(Delete { name: topic.name.to_string() });
        relay::ask(context, segment, verb).await?;
    }
    context.catalog.remove_topic(topic).await
}

/// Creates a subscription: its key as Creating, a cursor on every segment, then Ready (C6). With `true`
/// beside the start any start of an existing one will do; without settings any settings.
///
/// # Errors
/// ALREADY_EXISTS, TOPIC_NOT_FOUND, TOO_MANY_SUBSCRIPTIONS; what kept a segment from loading.
pub(crate) async fn create_subscription(
    context: &Shared,
    topic: &Topic,
    name: &SubscriptionName,
    start: (Start, bool),
    settings: Option<&SubscriptionSettings>,
) -> Result<Subscription, Refusal> {
    let catalog = &context.catalog;
    if catalog.find_subscription(topic.id, name).await?.is_none() {
        room_for_subscription(context, topic).await?;
    }
    for _ in 0..TRIES_MAX {
        if let Some(found) = catalog.find_subscription(topic.id, name).await?
            && found.state == State::Deleting
        {
            remove_cursors(context, topic, &found).await?;
            catalog.remove_subscription(&found).await?;
        }
        let subscription = catalog.begin_subscription(topic, name, start, settings).await?;
        if subscription.state == State::Ready {
            return Ok(subscription);
        }
        let Some(topic) = catalog.topic_by_id(topic.id).await?.filter(|topic| !topic.deleting)
        else {
            return Err(Refusal::new(
                Reason::TopicNotFound,
                format!("topic {} was deleted", topic.name),
            ));
        };
        if make_cursors(context, &topic, &subscription).await? {
            catalog.subscription_ready(&topic, &subscription).await?;
        }
        // Read again what stands now.
    }
    Err(Refusal::new(
        Reason::MetadataUnavailable,
        "the subscription is being changed by many; try again",
    ))
}

/// Exact, up to creations at the same moment.
async fn room_for_subscription(context: &Shared, topic: &Topic) -> Result<(), Refusal> {
    let set = context.catalog.set_policies(topic).await?;
    let limit = set.limit("subscriptions_max");
    let limit = limit.unwrap_or(Limit::of_server(context.config.limits.subscriptions_max));
    if context.hub.subscriptions_of(topic.id).is_some_and(|seen| far_below(seen, limit)) {
        return Ok(());
    }
    let there = context.catalog.subscription_count(topic.id).await?;
    if there as u64 >= limit.most {
        let message = format!("topic {} has {there} subscriptions", topic.name);
        return Err(limit.reached(Reason::TooManySubscriptions, "subscriptions_max", &message));
    }
    Ok(())
}

/// Asks each segment's owner for the cursor. False: the subscription was deleted meanwhile.
async fn make_cursors(
    context: &Shared,
    topic: &Topic,
    subscription: &Subscription,
) -> Result<bool, Refusal> {
    for id in topic.segment_ids() {
        let name = subscription.name.to_string();
        let verb = Verb::EnsureCursor(EnsureCursor { name, subscription: subscription.id.0 });
        if !relay::ask(context, id, verb).await?.stands {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Changes a subscription's settings; dispatchers that run learn of it from the mirror. Owners that are reached read them at
/// once, so that they hold when this returns.
///
/// # Errors
/// SUBSCRIPTION_NOT_FOUND; INVALID_REQUEST for another type.
pub(crate) async fn update_subscription(
    context: &Shared,
    topic: &Topic,
    name: &SubscriptionName,
    asked: &SubscriptionSettings,
) -> Result<Subscription, Refusal> {
    let found = context.catalog.subscription(topic, name).await?;
    let mut asked = asked.clone();
    if asked.r#type == 0 {
        asked.r#type = found.settings.r#type; // as it is
    }
    let settings = settings(&asked)?;
    let updated = context.catalog.update_subscription(topic, name, &settings).await?;
    for id in topic.segment_ids() {
        let (subscription, settings) = (updated.id.0, Some(updated.settings.clone()));
        let verb = Verb::SettingsChanged(SettingsChanged { subscription, settings });
        let _not_served_now = relay::ask_if_claimed(context, id, verb).await;
    }
    Ok(updated)
}

/// Deletes a subscription: Deleting, its cursors, then the key. Its consumers' streams end.
///
/// # Errors
/// SUBSCRIPTION_NOT_FOUND; what kept a segment from loading, in which case the call is to be repeated.
pub(crate) async fn delete_subscription(
    context: &Shared,
    topic: &Topic,
    name: &SubscriptionName,
) -> Result<(), Refusal> {
    let Some(marked) = context.catalog.mark_subscription_deleting(topic.id, name).await? else {
        return context.catalog.subscription(topic, name).await.map(drop); // gives the right refusal
    };
    remove_cursors(context, topic, &marked).await?;
    context.catalog.remove_subscription(&marked).await
}

/// Asks each segment's owner to take the cursor away.
async fn remove_cursors(
    context: &Shared,
    topic: &Topic,
    subscription: &Subscription,
) -> Result<(), Refusal> {
    for id in topic.segment_ids() {
        let verb = Verb::RemoveCursor(RemoveCursor { subscription: subscription.id.0 });
        relay::ask(context, id, verb).await?;
    }
    Ok(())
}

/// Makes the cursor on a segment that is here. If the subscription was deleted meanwhile, the cursor may have come after the
/// deletion's look at it, and would stay for ever: whoever made it looks again, and takes it away. True if the subscription
/// stands.
///
/// # Errors
/// SEGMENT_FENCED and the like.
pub(crate) async fn make_cursor(
    context: &Shared,
    segment: &Segment,
    subscription: &Subscription,
) -> Result<bool, Refusal> {
    if !ensure_cursor(segment, subscription).await? {
        return Ok(true);
    }
    let topic = segment.id().topic;
    let now = context.catalog.find_subscription(topic, &subscription.name).await?;
    let stands = now.is_some_and(|now| now.id == subscription.id && now.state != State::Deleting);
    if !stands {
        let removed = segment.ledger().remove_cursor(subscription.id).await;
        removed.map_err(|error| storage_errors::of_settle(&error))?;
        segment.forget_subscription(subscription.id);
    }
    Ok(stands)
}

/// A cursor for a consumer to open. Streams open where the record is, never when Deleting (C6).
///
/// # Errors
/// SUBSCRIPTION_NOT_FOUND when it was deleted meanwhile; SEGMENT_FENCED and the like.
pub(crate) async fn open_cursor(
    context: &Shared,
    segment: &Segment,
    subscription: &Subscription,
) -> Result<(), Refusal> {
    if !make_cursor(context, segment, subscription).await? {
        let message = format!("subscription {} was deleted", subscription.name);
        return Err(Refusal::new(Reason::SubscriptionNotFound, message));
    }
    Ok(())
}

/// Makes the cursor of a subscription on a segment, if it is missing. One missing under Creating begins at `start`, one
/// missing under Ready at the oldest entry kept (C4, C6). True if it was missing.
///
/// # Errors
/// SEGMENT_FENCED and the like.
async fn ensure_cursor(segment: &Segment, subscription: &Subscription) -> Result<bool, Refusal> {
    segment.name_subscription(subscription.id, subscription.name.clone());
    if segment.ledger().cursor(subscription.id).is_some() {
        return Ok(false);
    }
    let start = match (subscription.state, subscription.start) {
        (State::Creating, Start::Latest | Start::Unspecified) => CursorStart::Latest,
        _ => CursorStart::Earliest,
    };
    segment
        .ledger()
        .create_cursor(subscription.id, start)
        .await
        .map(|()| true)
        .map_err(|error| storage_errors::of_settle(&error))
}

/// C6: what stood half done for too long is driven on by the owner of segment 0: its maker died, or gave up.
pub(crate) async fn drive_stalled_subscriptions(context: Shared) {
    let stall = context.config.limits.subscription_stall;
    loop {
        tokio::time::sleep(stall / 4).await;
        for (topic, name) in context.hub.stalled(stall) {
            if context.ownership.loaded(SegmentId { topic, segment: 0 }).is_none() {
                continue;
            }
            let driven = timeout(
                context.config.limits.unary_deadline,
                drive_subscription(&context, topic, &name),
            );
            match driven.await {
                Ok(Ok(())) => {}
                Ok(Err(refusal)) => {
                    tracing::warn!(%topic, subscription = %name, %refusal, "half-done subscription stays so");
                }
                Err(_) => {
                    tracing::warn!(%topic, subscription = %name, "half-done subscription stays so for now");
                }
            }
        }
    }
}

async fn drive_subscription(
    context: &Shared,
    topic: TopicId,
    name: &SubscriptionName,
) -> Result<(), Refusal> {
    let catalog = &context.catalog;
    let Some(topic) = catalog.topic_by_id(topic).await?.filter(|topic| !topic.deleting) else {
        return Ok(()); // goes with its topic
    };
    let Some(found) = catalog.find_subscription(topic.id, name).await? else { return Ok(()) };
    tracing::info!(topic = %topic.name, subscription = %name, state = ?found.state, "subscription driven on");
    match found.state {
        State::Creating => {
            create_subscription(context, &topic, name, (found.start, true), None).await.map(drop)
        }
        State::Deleting => delete_subscription(context, &topic, name).await,
        State::Ready | State::Unspecified => Ok(()),
    }
}

/// Before a segment is served: every subscription's key has its cursor here, and none that is being deleted (C6).
///
/// # Errors
/// What kept it; the segment is not served then.
pub(crate) async fn restore_cursors(
    catalog: &Catalog,
    segment: &Arc<Segment>,
) -> Result<(), Refusal> {
    for subscription in catalog.all_subscriptions_of(segment.id().topic).await? {
        match subscription.state {
            State::Creating | State::Ready => {
                ensure_cursor(segment, &subscription).await?;
            }
            State::Deleting | State::Unspecified => {
                let removed = segment.ledger().remove_cursor(subscription.id).await;
                removed.map_err(|error| storage_errors::of_settle(&error))?;
            }
        }
    }
    Ok(())
}
