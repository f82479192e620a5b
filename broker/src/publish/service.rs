//! The gRPC service `Publisher`: opens publish streams, and takes single batches.

use std::sync::Arc;

use bytes::Bytes;
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
    listener::{Connection, Outbox, OutboxStream, check_heartbeat, first_frame, not_opened},
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
        self.0.serve_stream("publish", request, |shared, connection, inbound, outbox| async move {
            let served = shared.until_over(serve(&shared, connection, inbound, &outbox)).await;
            outbox.finish(served.clone());
            served
        })
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
        check_heartbeat(open.heartbeat_ms)?;
        let name = TopicName::parse(&open.topic)?;
        let topic = lifecycle::topic_or_create(shared, connection.principal(), &name).await?;
        check_layout(&topic, open.layout_epoch)?;
        let id = topic.segment(open.segment)?;
        match shared.ownership.find(id).await? {
            Found::Here(segment) => {
                let stream_number = open.stream_number;
                let (held_epoch, heartbeat_ms) = (open.held_epoch, open.heartbeat_ms);
                let open = ProducerOpen { identity, stream_number, access, held_epoch };
                let opening = Opening { topic, open, heartbeat_ms };
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
    heartbeat_ms: u32,
}

async fn open_stream<I>(
    shared: &Shared,
    connection: Connection,
    segment: Arc<Segment>,
    opening: Opening,
    inbound: I,
    outbox: &Outbox<PublishReply>,
) -> Result<PublishStream<I>, Refusal> {
    let Opening { topic, open, heartbeat_ms } = opening;
    let stream_number = open.stream_number;
    // Before anything is granted or fenced for it.
    let mut slot = segment.producer_slot(match &open.identity {
        ProducerIdentity::Named(name) => Some(Bytes::from(name.as_str().to_owned())),
        ProducerIdentity::Resume(token) => Some(token.clone()),
        ProducerIdentity::Session => None,
    })?;
    let opened = segment.ledger().open_producer(open).await;
    let producer = opened.map_err(|error| storage_errors::of_producer(&error))?;
    slot.named(&producer.id);
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
        _slot: slot,
        life: shared.life(heartbeat_ms),
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
