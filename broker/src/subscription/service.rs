//! The gRPC service `Subscriber`: opens consume streams and settles outside of them.

use std::{sync::Arc, time::Duration};

use futures::Stream;
use geminga_managed_ledger::SettleError;
use geminga_proto::{
    ids::SegmentId,
    names::{ConsumerName, SubscriptionName, TopicName},
    reason::Reason,
    v1::{
        ConsumeFrame, ConsumeReply, OpenConsume, SettleRequest, SettleResponse, Settled,
        SubscriptionStart, consume_frame::Frame, subscriber_server::Subscriber,
    },
};
use tokio::time::timeout;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;

use super::{
    Handle,
    stream::{ConsumeStream, SettleWanted},
};
use crate::{
    catalog::{Start, Topic},
    context::Shared,
    errors::Refusal,
    lifecycle,
    listener::{Connection, Outbox, OutboxStream, first_frame, not_opened, outbox},
    ownership::{Found, Segment},
    publish::{check_layout, elsewhere, relays},
    relay, storage_errors,
};

/// The service.
#[derive(Clone, Debug)]
pub(crate) struct SubscriberService(pub(crate) Shared);

#[tonic::async_trait]
impl Subscriber for SubscriberService {
    type ConsumeStream = OutboxStream<ConsumeReply>;

    async fn consume(
        &self,
        request: Request<Streaming<ConsumeFrame>>,
    ) -> Result<Response<Self::ConsumeStream>, Status> {
        let shared = self.0.clone();
        let connection = Connection::of(&request, &shared.config.limits);
        let slot = shared.stream_slot(&connection).map_err(|refusal| shared.refused(refusal))?;
        let (sender, stream) = outbox(shared.config.limits.outbox_bytes_max);
        let inbound = request.into_inner();
        let task = async move {
            let _slot = slot;
            let _open = shared.metrics.stream("consume");
            let result = shared.until_over(serve(&shared, &connection, inbound, &sender)).await;
            if let Err(refusal) = &result {
                shared.metrics.refuse(refusal.reason);
                tracing::debug!(
                    reason = refusal.reason.as_str(),
                    message = refusal.message,
                    "consume stream ended"
                );
            }
            sender.finish(result);
        };
        self.0.streams.spawn("consume stream", task);
        Ok(Response::new(stream))
    }

    async fn settle(
        &self,
        request: Request<SettleRequest>,
    ) -> Result<Response<SettleResponse>, Status> {
        let connection = Connection::of(&request, &self.0.config.limits);
        let settled = settle(&self.0, &connection, request.into_inner()).await;
        settled.map(Response::new).map_err(|refusal| self.0.refused(refusal))
    }
}

async fn serve<I>(
    shared: &Shared,
    connection: &Connection,
    mut inbound: I,
    outbox: &Outbox<ConsumeReply>,
) -> Result<(), Refusal>
where
    I: Stream<Item = Result<ConsumeFrame, Status>> + Unpin,
{
    let deadline = shared.config.limits.open_deadline;
    let Some(first) = first_frame(&mut inbound, deadline).await? else { return Ok(()) };
    let ConsumeFrame { frame: Some(Frame::Open(open)) } = first else { return Err(not_opened()) };
    let span = tracing::info_span!(
        "consume",
        topic = open.topic,
        segment = open.segment,
        subscription = open.subscription
    );
    async {
        shared.admit(connection, &open)?;
        let (topic, id) = checked(shared, &open).await?;
        match shared.ownership.find(id).await? {
            Found::Here(segment) => {
                open_stream(shared, topic, segment, open, inbound).await?.run(outbox).await
            }
            Found::Elsewhere(owner) if relays(connection, open.route) => {
                relay::consume(shared, connection, (id, owner), open, inbound, outbox).await
            }
            Found::Elsewhere(owner) => Err(elsewhere(&topic, id, owner)),
        }
    }
    .instrument(span)
    .await
}

/// The topic and the segment of an open frame, before anything is loaded or sent elsewhere for it.
async fn checked(shared: &Shared, open: &OpenConsume) -> Result<(Topic, SegmentId), Refusal> {
    let topic_name = TopicName::parse(&open.topic)?;
    let name = SubscriptionName::parse(&open.subscription)?;
    if !open.consumer_name.is_empty() {
        ConsumerName::parse(&open.consumer_name)?;
    }
    let topic = shared.catalog.topic(&topic_name).await?;
    check_layout(&topic, open.layout_epoch)?;
    let id = topic.segment(open.segment)?;
    match open.create_at {
        Some(start) => drop(start_of(start)?),
        None => drop(shared.catalog.subscription(&topic, &name).await?),
    }
    Ok((topic, id))
}

async fn open_stream<I>(
    shared: &Shared,
    topic: Topic,
    segment: Arc<Segment>,
    open: OpenConsume,
    inbound: I,
) -> Result<ConsumeStream<I>, Refusal> {
    let name = SubscriptionName::parse(&open.subscription)?;
    let subscription = match open.create_at {
        Some(start) => {
            let start = start_of(start)?;
            lifecycle::create_subscription(shared, &topic, &name, start, true).await?
        }
        None => shared.catalog.subscription(&topic, &name).await?,
    };
    lifecycle::open_cursor(shared, &segment, &subscription).await?;
    let handle = Handle {
        epoch: segment.epoch(),
        subscription: subscription.id,
        consumer: shared.random.u64(),
    };
    let attached = segment.consumers().attach(handle, &open.consumer_name)?;
    Ok(ConsumeStream {
        shared: shared.clone(),
        segment,
        subscription: subscription.id,
        attached,
        inbound,
        layout_epoch: topic.layout_epoch,
    })
}

/// A settle outside a stream, with a handle that a delivery carried.
async fn settle(
    shared: &Shared,
    connection: &Connection,
    request: SettleRequest,
) -> Result<SettleResponse, Refusal> {
    shared.admit(connection, &request)?;
    let settle = request.settle.clone().ok_or_else(|| Refusal::request("settle is missing"))?;
    let token = settle.token;
    let wanted = SettleWanted::parse(settle, shared.config.limits.settle_ranges_max)?;
    let topic = shared.catalog.topic(&TopicName::parse(&request.topic)?).await?;
    let subscription = shared
        .catalog
        .subscription(&topic, &SubscriptionName::parse(&request.subscription)?)
        .await?;
    let id = topic.segment(request.segment)?;
    let segment = match shared.ownership.find(id).await? {
        Found::Here(segment) => segment,
        Found::Elsewhere(owner) => {
            return relay::settle(shared, connection, (id, owner), request).await;
        }
    };
    segment.consumers().check(subscription.id, &wanted.handle, wanted.end)?;
    let settled = segment.ledger().settle(subscription.id, wanted.settlement);
    let mark_delete_next = within(shared.config.limits.unary_deadline, settled).await?;
    segment.consumers().cursor_changed(subscription.id);
    let settled = Settled { token, mark_delete_next: mark_delete_next.0 };
    Ok(SettleResponse { settled: Some(settled) })
}

async fn within<T>(
    deadline: Duration,
    settled: impl Future<Output = Result<T, SettleError>>,
) -> Result<T, Refusal> {
    match timeout(deadline, settled).await {
        Ok(result) => result.map_err(|error| storage_errors::of_settle(&error)),
        Err(_) => Err(Refusal::new(Reason::DeadlineExceeded, "the settle was not durable in time")),
    }
}

/// Where a new subscription begins.
pub(crate) fn start_of(start: i32) -> Result<Start, Refusal> {
    match SubscriptionStart::try_from(start) {
        Ok(SubscriptionStart::Earliest) => Ok(Start::Earliest),
        Ok(SubscriptionStart::Latest | SubscriptionStart::Unspecified) => Ok(Start::Latest),
        Err(_) => Err(Refusal::request(format!("start {start} is unknown"))),
    }
}
