//! The gRPC service `Publisher`: opens publish streams, and takes single batches.

use std::sync::Arc;

use futures::Stream;
use geminga_managed_ledger::{Access, ProducerIdentity, ProducerOpen};
use geminga_proto::{
    names::{ProducerName, TopicName},
    v1::{
        AccessMode, OpenPublish, PublishFrame, PublishOpened, PublishReply, PublishRequest,
        PublishResponse, publish_frame::Frame, publish_reply::Reply, publisher_server::Publisher,
    },
};
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;

use super::{
    check_layout, elsewhere,
    order::Window,
    relays,
    stream::{PublishStream, reply},
    unary,
};
use crate::{
    catalog::Topic,
    context::Shared,
    errors::Refusal,
    lifecycle,
    listener::{Connection, Outbox, OutboxStream, first_frame, not_opened, outbox},
    ownership::{Found, Segment},
    relay, storage_errors,
};

/// The service.
#[derive(Clone, Debug)]
pub(crate) struct PublisherService(pub(crate) Shared);

#[tonic::async_trait]
impl Publisher for PublisherService {
    type PublishStreamStream = OutboxStream<PublishReply>;

    async fn publish(
        &self,
        request: Request<PublishRequest>,
    ) -> Result<Response<PublishResponse>, Status> {
        let connection = Connection::of(&request, &self.0.config.limits);
        let stored = unary::publish(&self.0, &connection, request.into_inner()).await;
        stored.map(Response::new).map_err(|refusal| self.0.refused(refusal))
    }

    async fn publish_stream(
        &self,
        request: Request<Streaming<PublishFrame>>,
    ) -> Result<Response<Self::PublishStreamStream>, Status> {
        let shared = self.0.clone();
        let connection = Connection::of(&request, &shared.config.limits);
        let slot = shared.stream_slot(&connection).map_err(|refusal| shared.refused(refusal))?;
        let (sender, stream) = outbox(shared.config.limits.outbox_bytes_max);
        let inbound = request.into_inner();
        let task = async move {
            let _slot = slot;
            let _open = shared.metrics.stream("publish");
            let result = shared.until_over(serve(&shared, connection, inbound, &sender)).await;
            if let Err(refusal) = &result {
                shared.metrics.refuse(refusal.reason);
                tracing::debug!(
                    reason = refusal.reason.as_str(),
                    message = refusal.message,
                    "publish stream ended"
                );
            }
            sender.finish(result);
        };
        self.0.streams.spawn("publish stream", task);
        Ok(Response::new(stream))
    }
}

async fn serve<I>(
    shared: &Shared,
    connection: Connection,
    mut inbound: I,
    outbox: &Outbox<PublishReply>,
) -> Result<(), Refusal>
where
    I: Stream<Item = Result<PublishFrame, Status>> + Unpin,
{
    let deadline = shared.config.limits.open_deadline;
    let Some(first) = first_frame(&mut inbound, deadline).await? else { return Ok(()) };
    let PublishFrame { frame: Some(Frame::Open(open)) } = first else { return Err(not_opened()) };
    let span = tracing::info_span!("publish", topic = open.topic, segment = open.segment);
    async {
        shared.admit(&connection, &open)?;
        let (identity, access) = (identity(&open)?, access(&open)?);
        let name = TopicName::parse(&open.topic)?;
        let topic = lifecycle::topic_or_create(shared, connection.principal(), &name).await?;
        check_layout(&topic, open.layout_epoch)?;
        let id = topic.segment(open.segment)?;
        match shared.ownership.find(id).await? {
            Found::Here(segment) => {
                let stream_number = open.stream_number;
                let held_epoch = open.held_epoch;
                let open = ProducerOpen { identity, stream_number, access, held_epoch };
                let opening = Opening { topic, open };
                let stream =
                    open_stream(shared, connection, segment, opening, inbound, outbox).await?;
                stream.run(outbox).await
            }
            Found::Elsewhere(owner) if relays(&connection, open.route) => {
                relay::publish(shared, &connection, (id, owner), open, inbound, outbox).await
            }
            Found::Elsewhere(owner) => Err(elsewhere(&topic, id, owner)),
        }
    }
    .instrument(span)
    .await
}

/// What a checked open frame says.
struct Opening {
    topic: Topic,
    open: ProducerOpen,
}

async fn open_stream<I>(
    shared: &Shared,
    connection: Connection,
    segment: Arc<Segment>,
    opening: Opening,
    inbound: I,
    outbox: &Outbox<PublishReply>,
) -> Result<PublishStream<I>, Refusal> {
    let Opening { topic, open } = opening;
    let stream_number = open.stream_number;
    let opened = segment.ledger().open_producer(open).await;
    let producer = opened.map_err(|error| storage_errors::of_producer(&error))?;
    let limits = &shared.config.limits;
    let window = Window::new(limits.publish_window_batches, limits.publish_window_bytes);
    let granted = window.granted();
    let greeting = PublishOpened {
        producer_name: producer.name.clone(),
        resume_token: producer.token.clone(),
        producer_epoch: producer.epoch,
        last_persisted_sequence: producer.persisted,
        layout_epoch: topic.layout_epoch,
        max_batch_bytes: u32::try_from(limits.batch_bytes_max).unwrap_or(u32::MAX),
        max_message_bytes: u32::try_from(limits.message_bytes_max).unwrap_or(u32::MAX),
        granted_batches: granted.granted_batches,
        granted_bytes: granted.granted_bytes,
    };
    outbox.push(reply(Reply::Opened(greeting)), 0);
    Ok(PublishStream {
        shared: shared.clone(),
        connection,
        segment,
        pushed: producer.persisted,
        producer,
        stream_number,
        inbound,
        window,
    })
}

fn identity(open: &OpenPublish) -> Result<ProducerIdentity, Refusal> {
    match (open.producer_name.as_str(), open.resume_token.is_empty()) {
        (_, false) => Ok(ProducerIdentity::Resume(open.resume_token.clone())),
        ("", true) => Ok(ProducerIdentity::Session),
        (name, true) => Ok(ProducerIdentity::Named(ProducerName::parse(name)?)),
    }
}

fn access(open: &OpenPublish) -> Result<Access, Refusal> {
    match AccessMode::try_from(open.access) {
        Ok(AccessMode::Unspecified | AccessMode::Shared) => Ok(Access::Shared),
        Ok(AccessMode::Exclusive) => Ok(Access::Exclusive),
        Ok(AccessMode::ExclusiveWithFencing) => Ok(Access::ExclusiveWithFencing),
        Err(_) => Err(Refusal::request(format!("access mode {} is unknown", open.access))),
    }
}
