//! What the life cycle and the admin API ask of a segment, wherever it is: done here by its owner, else asked of it. The
//! service is the other end.

use std::time::Duration;

use geminga_proto::{
    admin::v1::SegmentState,
    ids::{SegmentId, SubscriptionId, TopicId},
    internal::v1::{
        SegmentReply, SegmentRequest,
        segment_request::{EnsureCursor, Verb},
        segments_server::Segments,
    },
    names::SubscriptionName,
    reason::Reason,
    v1::OwnerHint,
};
use tokio::time::{Instant, sleep, timeout};
use tonic::{Request, Response, Status};

use super::walk::{Steps, in_steps, walk_here};
use crate::{
    admin::describe,
    catalog::State,
    context::{Context, Shared},
    errors::Refusal,
    lifecycle,
    listener::Connection,
    storage_errors, subscription,
};

/// Pause before the owner is looked for again.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Asks the owner of a segment, here or elsewhere; one that is being moved or recovered is waited for.
///
/// # Errors
/// What the owner refuses; SEGMENT_LOADING when it is not reached within the load deadline.
pub(crate) async fn ask(
    context: &Shared,
    id: SegmentId,
    verb: Verb,
) -> Result<SegmentReply, Refusal> {
    at_owner(context, id, |owner| {
        let verb = verb.clone();
        async move {
            match owner {
                Some(owner) => context.peers.ask(&owner.address, request(id, verb)).await,
                None => perform(context, id, &verb).await,
            }
        }
    })
    .await
}

fn request(id: SegmentId, verb: Verb) -> SegmentRequest {
    SegmentRequest { topic: id.topic.0, segment: id.segment, verb: Some(verb) }
}

/// Calls `call` with the other broker that owns the segment, or with none if it is to be done here; again while the owner is
/// another one or not ready.
///
/// # Errors
/// As [`ask`].
pub(super) async fn at_owner<T, F>(
    context: &Context,
    id: SegmentId,
    call: impl Fn(Option<OwnerHint>) -> F,
) -> Result<T, Refusal>
where
    F: Future<Output = Result<T, Refusal>>,
{
    let deadline = Instant::now() + context.config.limits.load_deadline;
    let mut owner = context.ownership.claimed_elsewhere(id);
    loop {
        let refusal = match call(owner.clone()).await {
            Err(refusal)
                if matches!(refusal.reason, Reason::NotOwner | Reason::SegmentLoading)
                    && Instant::now() + LOOK_AGAIN < deadline =>
            {
                refusal
            }
            done => return done,
        };
        sleep(LOOK_AGAIN).await;
        owner = match refusal {
            // By the store: what the mirror said, or the broker asked knows no better.
            Refusal { reason: Reason::NotOwner, owner: found, .. } if owner.is_none() => found,
            _ => None,
        };
    }
}

/// Asks a segment that somebody has claimed; none when nobody has, or the owner does not answer.
pub(crate) async fn ask_if_claimed(
    context: &Shared,
    id: SegmentId,
    verb: Verb,
) -> Option<SegmentReply> {
    if context.ownership.loaded(id).is_some() {
        return perform(context, id, &verb).await.ok();
    }
    let owner = context.ownership.claimed_elsewhere(id)?;
    let asked = context.peers.ask(&owner.address, request(id, verb));
    timeout(context.config.limits.busy_after, asked).await.ok()?.ok()
}

/// Does it here.
///
/// # Errors
/// NOT_OWNER with the owner; as the verb says.
async fn perform(context: &Shared, id: SegmentId, verb: &Verb) -> Result<SegmentReply, Refusal> {
    let ownership = &context.ownership;
    let mut reply = SegmentReply::default();
    match verb {
        Verb::Expect(expect) => {
            ownership.expect(id, Duration::from_millis(u64::from(expect.within_ms)))?;
        }
        Verb::Take(_) => drop(ownership.segment(id).await?),
        Verb::Describe(_) => {
            reply.state = Some(match ownership.loaded(id) {
                Some(segment) => describe::segment_state(&segment),
                None => SegmentState { segment: id.segment, ..SegmentState::default() },
            });
        }
        Verb::DescribeCursor(asked) => {
            let segment = ownership.segment(id).await?;
            reply.cursor = describe::cursor(&segment, SubscriptionId(asked.subscription));
        }
        Verb::EnsureCursor(asked) => reply.stands = ensure_cursor(context, id, asked).await?,
        Verb::RemoveCursor(asked) => {
            // First the cursor, then the consumer: one that comes in between finds no cursor, or is ended.
            let (segment, subscription) =
                (ownership.segment(id).await?, SubscriptionId(asked.subscription));
            let removed = segment.ledger().remove_cursor(subscription).await;
            removed.map_err(|error| storage_errors::of_settle(&error))?;
            segment.forget_subscription(subscription);
        }
        Verb::Seek(asked) => {
            let segment = ownership.segment(id).await?;
            let sought = subscription::seek_here(context, &segment, &asked.name, asked.to).await?;
            reply.mark_delete_next = sought;
        }
        Verb::Explain(asked) => {
            let segment = ownership.segment(id).await?;
            let explained = subscription::explain_here(context, &segment, &asked.name).await?;
            reply.explained = Some(explained);
        }
        Verb::ListDelayed(asked) => {
            let segment = ownership.segment(id).await?;
            let listed = subscription::list_delayed_here(context, &segment, asked).await?;
            reply.delayed = Some(listed);
        }
        Verb::CancelDelayed(asked) => {
            let segment = ownership.segment(id).await?;
            let (name, ranges) = (&asked.name, &asked.ranges);
            reply.cancelled =
                subscription::cancel_delayed_here(context, &segment, name, ranges).await?;
        }
        // A hint: the store says what they are.
        Verb::SettingsChanged(asked) => {
            if let Some(segment) = ownership.loaded(id)
                && let Some(name) = segment.subscription_name(SubscriptionId(asked.subscription))
            {
                subscription::reread_settings(context, &segment, &name).await?;
            }
        }
        Verb::TierStatus(_) => {
            let segment = ownership.segment(id).await?;
            reply.tier = Some(describe::tier(&segment));
        }
        Verb::OffloadTier(_) | Verb::VerifyTier(_) | Verb::Compact(_) => {
            return Err(Refusal::request("this is a walk, and is not asked for"));
        }
        Verb::Delete(asked) => {
            let topic = context.catalog.topic_by_id(id.topic).await?;
            if topic.is_some_and(|topic| !topic.deleting) {
                return Err(Refusal::request("only a topic that is being deleted loses segments"));
            }
            let message = format!("topic {} was deleted", asked.name);
            ownership.delete_segment(id, Refusal::new(Reason::TopicNotFound, message)).await?;
        }
    }
    Ok(reply)
}

/// C6: the owner reads the key, makes the cursor, and looks at the key again: a request that was late makes no cursor that
/// nobody knows.
async fn ensure_cursor(
    context: &Shared,
    id: SegmentId,
    asked: &EnsureCursor,
) -> Result<bool, Refusal> {
    let name = SubscriptionName::parse(&asked.name)?;
    let segment = context.ownership.segment(id).await?;
    let found = context.catalog.find_subscription(id.topic, &name).await?;
    let stands = found.filter(|found| {
        found.id == SubscriptionId(asked.subscription) && found.state != State::Deleting
    });
    match stands {
        Some(subscription) => lifecycle::make_cursor(context, &segment, &subscription).await,
        None => Ok(false),
    }
}

/// The service.
#[derive(Clone, Debug)]
pub(crate) struct SegmentsService(pub(crate) Shared);

#[tonic::async_trait]
impl Segments for SegmentsService {
    type WalkStream = Steps;

    async fn walk(&self, request: Request<SegmentRequest>) -> Result<Response<Steps>, Status> {
        let shared = &self.0;
        let connection = Connection::of(&request, &shared.config.limits);
        let begin = || {
            let request = request.into_inner();
            shared.admit(&connection, &request)?;
            let verb = request.verb.ok_or_else(|| Refusal::request("verb is missing"))?;
            let id = SegmentId { topic: TopicId(request.topic), segment: request.segment };
            let slot = shared.stream_slot(&connection)?;
            let here = shared.clone();
            Ok(in_steps(shared, slot, |to| async move { walk_here(&here, id, &verb, &to).await }))
        };
        begin().map(Response::new).map_err(|refusal| shared.refused(refusal))
    }

    async fn ask(
        &self,
        request: Request<SegmentRequest>,
    ) -> Result<Response<SegmentReply>, Status> {
        let shared = &self.0;
        let connection = Connection::of(&request, &shared.config.limits);
        let reply = async {
            let request = request.into_inner();
            shared.admit(&connection, &request)?;
            let verb = request.verb.ok_or_else(|| Refusal::request("verb is missing"))?;
            let id = SegmentId { topic: TopicId(request.topic), segment: request.segment };
            match timeout(shared.config.limits.unary_deadline, perform(shared, id, &verb)).await {
                Ok(reply) => reply,
                Err(_) => {
                    let message = "not done in time; the call may be repeated";
                    Err(Refusal::new(Reason::DeadlineExceeded, message))
                }
            }
        };
        reply.await.map(Response::new).map_err(|refusal| shared.refused(refusal))
    }
}
