//! The gRPC service `Subscriber`: opens consume streams, and answers the calls around them.

use std::sync::Arc;

use futures::StreamExt;
use geminga_proto::{
    ids::SegmentId,
    names::{ConsumerName, SubscriptionName, TopicName},
    reason::Reason,
    v1::{
        ConsumeFrame, ConsumeReply, ExplainRequest, ExplainResponse, OpenConsume, PeekRequest,
        PeekResponse, PullRequest, PullResponse, SeekRequest, SeekResponse, SettleRequest,
        SettleResponse, consume_frame::Frame, subscriber_server::Subscriber,
    },
};
use tokio::sync::oneshot;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;

use super::{
    Attach, Command, calls,
    gate::Frames,
    pace::Pace,
    reader::{self, Reader},
    wanted::{self, start_of},
};
use crate::{
    catalog::{Subscription, Topic},
    context::Shared,
    errors::Refusal,
    lifecycle,
    listener::{Connection, Outbox, OutboxStream, check_heartbeat, first_frame, not_opened},
    ownership::{Found, Segment},
    publish::{check_layout, elsewhere, relays},
    relay,
};

/// The service.
#[derive(Clone, Debug)]
pub(crate) struct SubscriberService(pub(crate) Shared);

impl SubscriberService {
    async fn call<R, A, F>(
        &self,
        request: Request<R>,
        call: impl FnOnce(Shared, Connection, R) -> F,
    ) -> Result<Response<A>, Status>
    where
        F: Future<Output = Result<A, Refusal>>,
    {
        let connection = Connection::of(&request, &self.0.config.limits);
        let answer = call(self.0.clone(), connection, request.into_inner()).await;
        answer.map(Response::new).map_err(|refusal| self.0.refused(refusal))
    }
}

#[tonic::async_trait]
impl Subscriber for SubscriberService {
    type ConsumeStream = OutboxStream<ConsumeReply>;

    async fn consume(
        &self,
        request: Request<Streaming<ConsumeFrame>>,
    ) -> Result<Response<Self::ConsumeStream>, Status> {
        self.0.serve_stream("consume", request, |shared, connection, inbound, outbox| async move {
            serve(&shared, &connection, inbound.boxed(), outbox).await
        })
    }

    async fn settle(
        &self,
        request: Request<SettleRequest>,
    ) -> Result<Response<SettleResponse>, Status> {
        self.call(request, |s, c, r| async move { calls::settle(&s, &c, r).await }).await
    }

    async fn pull(&self, request: Request<PullRequest>) -> Result<Response<PullResponse>, Status> {
        self.call(request, |s, c, r| async move { calls::pull(&s, &c, r).await }).await
    }

    async fn seek(&self, request: Request<SeekRequest>) -> Result<Response<SeekResponse>, Status> {
        self.call(request, |s, c, r| async move { calls::seek(&s, &c, r).await }).await
    }

    async fn explain(
        &self,
        request: Request<ExplainRequest>,
    ) -> Result<Response<ExplainResponse>, Status> {
        self.call(request, |s, c, r| async move { calls::explain(&s, &c, r).await }).await
    }

    async fn peek(&self, request: Request<PeekRequest>) -> Result<Response<PeekResponse>, Status> {
        self.call(request, |s, c, r| async move { calls::peek(&s, &c, r).await }).await
    }
}

/// Runs a stream to its end; its outbox has heard the last word then.
async fn serve(
    shared: &Shared,
    connection: &Connection,
    mut inbound: Frames,
    outbox: Outbox<ConsumeReply>,
) -> Result<(), Refusal> {
    let mut outbox = Some(outbox);
    let served = shared.until_over(async {
        let deadline = shared.config.limits.open_deadline;
        let Some(first) = first_frame(&mut inbound, deadline).await? else { return Ok(()) };
        let ConsumeFrame { frame: Some(Frame::Open(open)) } = first else {
            return Err(not_opened());
        };
        let span = tracing::info_span!(
            "consume",
            topic = open.topic,
            segment = open.segment,
            subscription = open.subscription
        );
        open_stream(shared, connection, open, inbound, &mut outbox).instrument(span).await
    });
    let result = served.await;
    if let Some(outbox) = outbox {
        outbox.finish(result.clone());
    }
    result
}

async fn open_stream(
    shared: &Shared,
    connection: &Connection,
    open: OpenConsume,
    inbound: Frames,
    outbox: &mut Option<Outbox<ConsumeReply>>,
) -> Result<(), Refusal> {
    shared.admit(connection, &open)?;
    let (topic, id) = checked(shared, &open).await?;
    let segment = match shared.ownership.find(id).await? {
        Found::Here(segment) => segment,
        Found::Elsewhere(owner) if relays(connection, open.route) => {
            let Some(outbox) = outbox else { return Ok(()) };
            return relay::consume(shared, connection, (id, owner), open, inbound, outbox).await;
        }
        Found::Elsewhere(owner) => return Err(elsewhere(&topic, id, owner)),
    };
    if open.reader.is_some() {
        let (next, compacted) = reader::begin(&segment, &open).await?;
        let (shared, layout_epoch) = (shared.clone(), topic.layout_epoch);
        let pace = Pace::new(&shared, &segment, open.heartbeat_ms);
        let (granted, used) = ((0, 0), (0, 0));
        let reader = Reader { shared, segment, layout_epoch, next, compacted, granted, used, pace };
        let Some(outbox) = outbox else { return Ok(()) };
        return reader.run(inbound, outbox).await;
    }
    let subscription = subscription(shared, &topic, &open).await?;
    lifecycle::open_cursor(shared, &segment, &subscription).await?;
    attach(shared, (&topic, &segment, &subscription), open, inbound, outbox).await
}

/// Hands the stream to the dispatcher, and waits for its end.
async fn attach(
    shared: &Shared,
    (topic, segment, subscription): (&Topic, &Arc<Segment>, &Subscription),
    open: OpenConsume,
    frames: Frames,
    outbox: &mut Option<Outbox<ConsumeReply>>,
) -> Result<(), Refusal> {
    let Some(outbox) = outbox.take() else { return Ok(()) };
    let (ended, end) = oneshot::channel();
    let attach = Attach {
        open,
        layout_epoch: topic.layout_epoch,
        segments: u32::try_from(topic.segments.len()).unwrap_or(u32::MAX),
        frames,
        outbox,
        ended,
    };
    let command = Command::Attach(Box::new(attach));
    segment.dispatchers().send(shared, segment, subscription, command).await?;
    match end.await {
        Ok(result) => result,
        Err(_) => Err(Refusal::new(Reason::Internal, "the dispatcher ended early")),
    }
}

/// The topic and the segment of an open frame, before anything is loaded or sent elsewhere for it.
async fn checked(shared: &Shared, open: &OpenConsume) -> Result<(Topic, SegmentId), Refusal> {
    let topic_name = TopicName::parse(&open.topic)?;
    check_heartbeat(open.heartbeat_ms)?;
    if !open.consumer_name.is_empty() {
        ConsumerName::parse(&open.consumer_name)?;
    }
    let limits = &shared.config.limits;
    if open.claims.len() > limits.claims_max {
        let message = format!("an open has at most {} claims", limits.claims_max);
        return Err(Refusal::request(message).with("claims_max", limits.claims_max));
    }
    if let Some(settings) = &open.settings {
        wanted::settings(settings)?;
    }
    let topic = shared.catalog.topic(&topic_name).await?;
    check_layout(&topic, open.layout_epoch)?;
    let id = topic.segment(open.segment)?;
    if open.reader.is_some() {
        if !open.subscription.is_empty() || open.create_at.is_some() || !open.claims.is_empty() {
            return Err(Refusal::request("a reader has no subscription, and claims nothing"));
        }
        return Ok((topic, id));
    }
    if open.compacted {
        return Err(Refusal::request("only a reader can read what is compacted"));
    }
    let name = SubscriptionName::parse(&open.subscription)?;
    match open.create_at {
        Some(start) => drop(start_of(start)?),
        None => drop(shared.catalog.subscription(&topic, &name).await?),
    }
    Ok((topic, id))
}

async fn subscription(
    shared: &Shared,
    topic: &Topic,
    open: &OpenConsume,
) -> Result<Subscription, Refusal> {
    let name = SubscriptionName::parse(&open.subscription)?;
    match open.create_at {
        Some(start) => {
            let start = (start_of(start)?, true);
            let settings = open.settings.as_ref().map(wanted::settings).transpose()?;
            lifecycle::create_subscription(shared, topic, &name, start, settings.as_ref()).await
        }
        None => shared.catalog.subscription(topic, &name).await,
    }
}
