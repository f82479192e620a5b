//! Calls around a subscription: settle, pull, seek, explain, peek. Each is done by the segment's owner, whoever is asked.

use std::{sync::Arc, time::Duration};

use geminga_proto::{
    ids::SegmentId,
    internal::v1::segment_request::{ExplainSegment, SeekSegment, Verb},
    names::{ConsumerName, SubscriptionName, TopicName},
    reason::Reason,
    v1::{
        ExplainRequest, ExplainResponse, PeekRequest, PeekResponse, PullRequest, PullResponse,
        ReadFrom, SeekRequest, SeekResponse, SegmentExplained, SettleRequest, SettleResponse,
        Settled, seek_response::Place,
    },
};
use tokio::{
    sync::oneshot,
    time::{Instant, timeout},
};

use super::{
    Command, PullAsked,
    dispatchers::Answer,
    reader,
    wanted::{self, SettleWanted},
};
use crate::{
    catalog::{Subscription, Topic},
    context::{Context, Shared},
    errors::Refusal,
    lifecycle,
    listener::Connection,
    ownership::{Found, Segment},
    publish::elsewhere,
    relay,
};

/// Longest wait of a pull.
const PULL_WAIT_MS_MAX: u64 = 30_000;
/// Defaults of a pull.
const PULL_MESSAGES: u32 = 100;
const PULL_BYTES: u64 = 1 << 20;
/// Most messages of a pull.
const PULL_MESSAGES_MAX: u32 = 10_000;
/// A pull that may take any segment waits so long at one of them.
const PULL_TURN_MS: u64 = 500;

/// The topic and the subscription of a call.
pub(super) async fn subscription_of(
    context: &Context,
    topic: &str,
    name: &str,
) -> Result<(Topic, Subscription), Refusal> {
    let topic = context.catalog.topic(&TopicName::parse(topic)?).await?;
    let name = SubscriptionName::parse(name)?;
    let subscription = context.catalog.subscription(&topic, &name).await?;
    Ok((topic, subscription))
}

/// Hands a command to the dispatcher and waits for its answer.
pub(super) async fn ask<T>(
    shared: &Shared,
    segment: &Arc<Segment>,
    subscription: &Subscription,
    command: impl FnOnce(Answer<T>) -> Command,
    deadline: Duration,
) -> Result<T, Refusal> {
    let (answer, answered) = oneshot::channel();
    let asked = async {
        lifecycle::open_cursor(shared, segment, subscription).await?;
        segment.dispatchers().send(shared, segment, subscription, command(answer)).await?;
        match answered.await {
            Ok(result) => result,
            Err(_) => Err(segment.fenced().await),
        }
    };
    match timeout(deadline, asked).await {
        Ok(result) => result,
        Err(_) => Err(Refusal::new(Reason::DeadlineExceeded, "the call was not done in time")),
    }
}

/// A settle outside a stream, with a handle that a delivery carried.
pub(super) async fn settle(
    shared: &Shared,
    connection: &Connection,
    request: SettleRequest,
) -> Result<SettleResponse, Refusal> {
    shared.admit(connection, &request)?;
    let settle = request.settle.clone().ok_or_else(|| Refusal::request("settle is missing"))?;
    let token = settle.token;
    let wanted = SettleWanted::parse(settle, shared.config.limits.settle_ranges_max)?;
    let (topic, subscription) =
        subscription_of(shared, &request.topic, &request.subscription).await?;
    let id = topic.segment(request.segment)?;
    let segment = match shared.ownership.find(id).await? {
        Found::Here(segment) => segment,
        Found::Elsewhere(owner) => {
            return relay::settle(shared, connection, (id, owner), request).await;
        }
    };
    let deadline = shared.config.limits.unary_deadline;
    let command = |answer| Command::Settle(wanted, answer);
    let mark_delete_next = ask(shared, &segment, &subscription, command, deadline).await?;
    Ok(SettleResponse { settled: Some(Settled { token, mark_delete_next }) })
}

/// Some messages at once.
pub(super) async fn pull(
    shared: &Shared,
    connection: &Connection,
    request: PullRequest,
) -> Result<PullResponse, Refusal> {
    shared.admit(connection, &request)?;
    if !request.consumer_name.is_empty() {
        ConsumerName::parse(&request.consumer_name)?;
    }
    if request.wait_ms > PULL_WAIT_MS_MAX {
        let message = format!("wait_ms is at most {PULL_WAIT_MS_MAX}");
        return Err(Refusal::request(message).with("wait_ms_max", PULL_WAIT_MS_MAX));
    }
    if request.messages_max > PULL_MESSAGES_MAX {
        let message = format!("messages_max is at most {PULL_MESSAGES_MAX}");
        return Err(Refusal::request(message).with("messages_max", PULL_MESSAGES_MAX));
    }
    wanted::lease(request.lease_ms)?;
    let (topic, subscription) =
        subscription_of(shared, &request.topic, &request.subscription).await?;
    if let Some(segment) = request.segment {
        let id = topic.segment(segment)?;
        return pull_at(shared, connection, (id, &subscription), request).await;
    }
    let ids: Vec<SegmentId> = topic.segment_ids().collect();
    let deadline = Instant::now() + Duration::from_millis(request.wait_ms);
    let mut turn = usize::try_from(shared.random.u64() % ids.len().max(1) as u64).unwrap_or(0);
    loop {
        // One look at each without a wait, then a short wait at one of them, in turn.
        for step in 0..=ids.len() {
            let left = deadline.saturating_duration_since(Instant::now()).as_millis() as u64;
            let wait_ms =
                if step < ids.len() && ids.len() > 1 { 0 } else { left.min(PULL_TURN_MS) };
            let id = ids[(turn + step) % ids.len()];
            let request = PullRequest { segment: Some(id.segment), wait_ms, ..request.clone() };
            let pulled = pull_at(shared, connection, (id, &subscription), request).await?;
            if !pulled.deliveries.is_empty() || (step == ids.len() && Instant::now() >= deadline) {
                return Ok(pulled);
            }
        }
        turn += 1;
    }
}

async fn pull_at(
    shared: &Shared,
    connection: &Connection,
    (id, subscription): (SegmentId, &Subscription),
    request: PullRequest,
) -> Result<PullResponse, Refusal> {
    let segment = match shared.ownership.find(id).await? {
        Found::Here(segment) => segment,
        Found::Elsewhere(owner) => {
            return relay::pull(shared, connection, (id, owner), request).await;
        }
    };
    let or = |value: u64, default: u64| if value == 0 { default } else { value };
    let asked = PullAsked {
        consumer_name: request.consumer_name,
        messages_max: or(u64::from(request.messages_max), u64::from(PULL_MESSAGES)),
        bytes_max: or(request.bytes_max, PULL_BYTES)
            .min(shared.config.limits.outbox_bytes_max as u64),
        wait_ms: request.wait_ms,
        lease_ms: request.lease_ms,
    };
    let deadline = shared.config.limits.unary_deadline + Duration::from_millis(request.wait_ms);
    let command = |answer| Command::Pull(asked, answer);
    let deliveries = ask(shared, &segment, subscription, command, deadline).await?;
    Ok(PullResponse { segment: id.segment, deliveries })
}

/// Moves a subscription, segment by segment; each is done or not, and the call may be repeated.
pub(super) async fn seek(
    shared: &Shared,
    connection: &Connection,
    request: SeekRequest,
) -> Result<SeekResponse, Refusal> {
    shared.admit(connection, &request)?;
    let to = request.to.ok_or_else(|| Refusal::request("the place to seek to is missing"))?;
    if to.from.is_none() {
        return Err(Refusal::request("the place to seek to is missing"));
    }
    let (topic, subscription) =
        subscription_of(shared, &request.topic, &request.subscription).await?;
    let ids = match request.segment {
        Some(segment) => vec![topic.segment(segment)?],
        None => topic.segment_ids().collect(),
    };
    let mut response = SeekResponse::default();
    for id in ids {
        let name = subscription.name.to_string();
        let verb = Verb::Seek(SeekSegment { name, to: Some(to) });
        let mark_delete_next = relay::ask(shared, id, verb).await?.mark_delete_next;
        response.segments.push(Place { segment: id.segment, mark_delete_next });
    }
    Ok(response)
}

/// As [`seek`], on a segment that is here.
///
/// # Errors
/// What kept it.
pub(crate) async fn seek_here(
    shared: &Shared,
    segment: &Arc<Segment>,
    name: &str,
    to: Option<ReadFrom>,
) -> Result<u64, Refusal> {
    let subscription = here(shared, segment, name).await?;
    let to = reader::offset_of(segment, to).await?;
    let deadline = shared.config.limits.unary_deadline;
    ask(shared, segment, &subscription, |answer| Command::Seek(to, answer), deadline).await
}

/// The subscription of a segment that is here.
pub(super) async fn here(
    shared: &Shared,
    segment: &Arc<Segment>,
    name: &str,
) -> Result<Subscription, Refusal> {
    let name = SubscriptionName::parse(name)?;
    let found = shared.catalog.find_subscription(segment.id().topic, &name).await?;
    let stands = found.filter(|found| found.state != crate::catalog::State::Deleting);
    stands.ok_or_else(super::dispatchers::deleted)
}

/// Why messages are not delivered, on all segments or one.
pub(super) async fn explain(
    shared: &Shared,
    connection: &Connection,
    request: ExplainRequest,
) -> Result<ExplainResponse, Refusal> {
    shared.admit(connection, &request)?;
    let (topic, subscription) =
        subscription_of(shared, &request.topic, &request.subscription).await?;
    let ids = match request.segment {
        Some(segment) => vec![topic.segment(segment)?],
        None => topic.segment_ids().collect(),
    };
    let patience = shared.config.limits.busy_after;
    let asked = ids.into_iter().map(|id| {
        let verb = Verb::Explain(ExplainSegment { name: subscription.name.to_string() });
        async move {
            match timeout(patience, relay::ask(shared, id, verb)).await {
                Ok(Ok(reply)) => reply.explained.unwrap_or_else(|| explain_moving(id)),
                _ => explain_moving(id),
            }
        }
    });
    Ok(ExplainResponse { segments: futures::future::join_all(asked).await })
}

/// Nobody serves the segment at this moment.
pub(crate) fn explain_moving(id: SegmentId) -> SegmentExplained {
    SegmentExplained {
        segment: id.segment,
        summary: "the segment is moving: nobody serves it at this moment".to_owned(),
        ..SegmentExplained::default()
    }
}

/// As [`explain`], on a segment that is here.
///
/// # Errors
/// What kept it.
pub(crate) async fn explain_here(
    shared: &Shared,
    segment: &Arc<Segment>,
    name: &str,
) -> Result<SegmentExplained, Refusal> {
    let subscription = here(shared, segment, name).await?;
    let deadline = shared.config.limits.unary_deadline;
    ask(shared, segment, &subscription, Command::Explain, deadline).await
}

/// Messages as they are stored.
pub(super) async fn peek(
    shared: &Shared,
    connection: &Connection,
    request: PeekRequest,
) -> Result<PeekResponse, Refusal> {
    shared.admit(connection, &request)?;
    let topic = shared.catalog.topic(&TopicName::parse(&request.topic)?).await?;
    let id = topic.segment(request.segment)?;
    match shared.ownership.find(id).await? {
        Found::Here(segment) => {
            let peeked = reader::peek(shared, &segment, request);
            match timeout(shared.config.limits.unary_deadline, peeked).await {
                Ok(peeked) => peeked,
                Err(_) => Err(Refusal::new(Reason::DeadlineExceeded, "nothing was read in time")),
            }
        }
        Found::Elsewhere(owner) if connection.is_relayed() => Err(elsewhere(&topic, id, owner)),
        Found::Elsewhere(owner) => relay::peek(shared, connection, (id, owner), request).await,
    }
}
