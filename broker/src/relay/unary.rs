//! One call, a batch, a settle, a pull, passed on to the segment's owner.

use std::time::Duration;

use geminga_proto::{
    ids::SegmentId,
    reason::Reason,
    v1::{
        OwnerHint, PeekRequest, PeekResponse, PublishRequest, PublishResponse, PullRequest,
        PullResponse, SettleRequest, SettleResponse, subscriber_client::SubscriberClient,
    },
};
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;

use super::relayed;
use crate::{
    context::Shared,
    errors::Refusal,
    listener::Connection,
    ownership::{Found, loading, not_owner},
};

type Subscribers = SubscriberClient<Channel>;

/// Owners that one call is passed on to; each but the last said that it is not.
const OWNERS_MAX: u32 = 5;
/// Pause before the owner is looked for again.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Passes a batch on. Its segment is named, so that the owner routes nothing.
///
/// # Errors
/// What the owner refuses; BUSY within the byte budget; SEGMENT_LOADING when the owner cannot be reached; NOT_OWNER when the
/// call was relayed already; DEADLINE_EXCEEDED when the outcome is unknown.
pub(crate) async fn publish(
    shared: &Shared,
    connection: &Connection,
    (id, owner): (SegmentId, OwnerHint),
    request: PublishRequest,
) -> Result<PublishResponse, Refusal> {
    let request = PublishRequest { segment: Some(id.segment), ..request };
    let bytes = request.batch.as_ref().map_or(0, |batch| batch.payload.len() as u64);
    let reserve = shared.relay_bytes.to_owner.acquire(bytes);
    let Ok(_permit) = timeout(shared.config.limits.busy_after, reserve).await else {
        let message = "the bytes being relayed are at their limit; nothing of the batch was stored";
        return Err(Refusal::new(Reason::Busy, message));
    };
    shared.metrics.relayed_bytes.inc_by(bytes);
    at_owner(shared, connection, (id, owner), |address| {
        let request = relayed(request.clone(), connection);
        async move {
            let answer = shared.peers.publisher(&address).await?.publish(request).await;
            answer.map_err(|status| shared.peers.failed(&address, &status))
        }
    })
    .await
}

/// Passes a settle on.
///
/// # Errors
/// As [`publish`].
pub(crate) async fn settle(
    shared: &Shared,
    connection: &Connection,
    (id, owner): (SegmentId, OwnerHint),
    request: SettleRequest,
) -> Result<SettleResponse, Refusal> {
    let call = |mut client: Subscribers, request| async move { client.settle(request).await };
    at_subscriber(shared, connection, (id, owner), request, call).await
}

/// Passes a pull on. Its segment is named.
///
/// # Errors
/// As [`publish`].
pub(crate) async fn pull(
    shared: &Shared,
    connection: &Connection,
    (id, owner): (SegmentId, OwnerHint),
    request: PullRequest,
) -> Result<PullResponse, Refusal> {
    let call = |mut client: Subscribers, request| async move { client.pull(request).await };
    at_subscriber(shared, connection, (id, owner), request, call).await
}

/// Passes a peek on.
///
/// # Errors
/// As [`publish`].
pub(crate) async fn peek(
    shared: &Shared,
    connection: &Connection,
    (id, owner): (SegmentId, OwnerHint),
    request: PeekRequest,
) -> Result<PeekResponse, Refusal> {
    let call = |mut client: Subscribers, request| async move { client.peek(request).await };
    at_subscriber(shared, connection, (id, owner), request, call).await
}

/// A call of the owner's `Subscriber`.
async fn at_subscriber<Q, T, A>(
    shared: &Shared,
    connection: &Connection,
    place: (SegmentId, OwnerHint),
    request: Q,
    call: impl Fn(Subscribers, tonic::Request<Q>) -> A,
) -> Result<T, Refusal>
where
    Q: Clone,
    A: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
{
    at_owner(shared, connection, place, |address| {
        let request = relayed(request.clone(), connection);
        let call = &call;
        async move {
            let answer = call(shared.peers.subscriber(&address).await?, request).await;
            answer.map_err(|status| shared.peers.failed(&address, &status))
        }
    })
    .await
}

async fn at_owner<T, A>(
    shared: &Shared,
    connection: &Connection,
    (id, mut owner): (SegmentId, OwnerHint),
    call: impl Fn(String) -> A,
) -> Result<T, Refusal>
where
    A: Future<Output = Result<tonic::Response<T>, Refusal>>,
{
    if connection.is_relayed() {
        return Err(not_owner(id, &owner));
    }
    for _ in 0..OWNERS_MAX {
        // A pull may wait as long again.
        let deadline = shared.config.limits.unary_deadline * 2;
        match timeout(deadline, call(owner.address.clone())).await {
            Ok(Ok(answer)) => {
                shared.metrics.relayed.inc();
                return Ok(answer.into_inner());
            }
            Ok(Err(refusal)) if refusal.reason == Reason::NotOwner => {}
            Ok(Err(refusal)) => return Err(refusal),
            Err(_) => {
                let message = "the owner did not answer in time; the call may still take effect";
                return Err(Refusal::new(Reason::DeadlineExceeded, message));
            }
        }
        sleep(LOOK_AGAIN).await;
        match shared.ownership.find_again(id).await? {
            Found::Elsewhere(found) => owner = found,
            Found::Here(_) => return Err(loading(id).after(LOOK_AGAIN)),
        }
    }
    Err(loading(id))
}
