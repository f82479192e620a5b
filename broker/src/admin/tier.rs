//! Where a topic's closed ledgers lie, and work on them. Any broker answers; each segment's owner does it.

use futures::{StreamExt, TryStreamExt, stream};
use geminga_proto::{
    admin::v1::{TierStatusRequest, TierStatusResponse},
    internal::v1::segment_request::{TierStatus, Verb},
    names::TopicName,
};

use crate::{
    auth::Authorized,
    context::Shared,
    errors::Refusal,
    listener::Connection,
    relay::{self, Steps},
};

/// Segments of a topic that are worked on at a time.
const SEGMENTS_AT_ONCE: usize = 4;

pub(super) async fn status(
    context: &Shared,
    request: &TierStatusRequest,
) -> Result<TierStatusResponse, Refusal> {
    let topic = context.catalog.topic(&TopicName::parse(&request.topic)?).await?;
    let asked = topic.segment_ids().map(|id| async move {
        let reply = relay::ask(context, id, Verb::TierStatus(TierStatus {})).await?;
        reply.tier.ok_or_else(|| Refusal::internal("an owner said nothing about its tiers"))
    });
    let asked = stream::iter(asked.collect::<Vec<_>>()).buffered(SEGMENTS_AT_ONCE);
    Ok(TierStatusResponse { segments: asked.try_collect().await? })
}

/// Walks over every segment of a topic, a few at a time; the first one that cannot go on ends all.
///
/// # Errors
/// PERMISSION_DENIED, TOO_MANY_STREAMS, TOPIC_NOT_FOUND; what comes later ends the stream.
pub(super) async fn walk<R: Authorized>(
    shared: &Shared,
    connection: &Connection,
    request: &R,
    topic: &str,
    verb: Verb,
) -> Result<Steps, Refusal> {
    shared.admit(connection, request)?;
    let slot = shared.stream_slot(connection)?;
    let topic = shared.catalog.topic(&TopicName::parse(topic)?).await?;
    let walking = shared.clone();
    Ok(relay::in_steps(shared, slot, |to| async move {
        let segments: Vec<_> = topic.segment_ids().collect();
        let walks = segments.into_iter().map(|id| {
            let (shared, verb, to) = (walking.clone(), verb.clone(), to.clone());
            async move { relay::walk(&shared, id, verb, &to).await }
        });
        stream::iter(walks).buffer_unordered(SEGMENTS_AT_ONCE).try_collect().await
    }))
}
