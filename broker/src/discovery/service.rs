//! The gRPC service `Discovery`: the layout and owners of a topic, once and then at every change.

use geminga_proto::{
    names::TopicName,
    reason::Reason,
    v1::{WatchReply, WatchRequest, discovery_server::Discovery},
};
use tonic::{Request, Response, Status};

use crate::{
    catalog::Topic,
    context::{Shared, shutting_down},
    errors::Refusal,
    lifecycle,
    listener::{Connection, Outbox, OutboxStream, outbox},
};

/// The service.
#[derive(Clone, Debug)]
pub(crate) struct DiscoveryService(pub(crate) Shared);

#[tonic::async_trait]
impl Discovery for DiscoveryService {
    type WatchStream = OutboxStream<WatchReply>;

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let shared = self.0.clone();
        let connection = Connection::of(&request, &shared.config.limits);
        let slot = shared.stream_slot(&connection).map_err(|refusal| shared.refused(refusal))?;
        let topic = open(&shared, &connection, &request.into_inner()).await;
        let topic = topic.map_err(|refusal| shared.refused(refusal))?;
        let (sender, stream) = outbox(shared.config.limits.outbox_bytes_max);
        let task = async move {
            let _slot = slot;
            let _open = shared.metrics.stream("watch");
            let result = follow(&shared, topic, &sender).await;
            sender.finish(result);
        };
        self.0.streams.spawn("watch stream", task);
        Ok(Response::new(stream))
    }
}

async fn open(
    shared: &Shared,
    connection: &Connection,
    request: &WatchRequest,
) -> Result<Topic, Refusal> {
    shared.admit(connection, request)?;
    let name = TopicName::parse(&request.topic)?;
    if request.create_if_missing {
        lifecycle::topic_or_create(shared, connection.principal(), &name).await
    } else {
        shared.catalog.topic(&name).await
    }
}

async fn follow(
    shared: &Shared,
    mut topic: Topic,
    outbox: &Outbox<WatchReply>,
) -> Result<(), Refusal> {
    let mut version = shared.hub.version();
    let mut owners = shared.ownership.members().version();
    let mut told: Option<WatchReply> = None;
    // The mirror may lag behind the topic just read (or created); it counts once it has caught up.
    let read_at = topic.revision;
    loop {
        version.borrow_and_update();
        owners.borrow_and_update();
        match shared.hub.topic(topic.id) {
            Some(seen) if seen.revision >= read_at => topic = seen,
            Some(_) => {}
            None if told.is_some() && gone(shared, &topic).await? => topic.deleting = true,
            None => {}
        }
        if topic.deleting {
            return Err(Refusal::new(
                Reason::TopicNotFound,
                format!("topic {} was deleted", topic.name),
            ));
        }
        let reply = reply(shared, &topic);
        if told.as_ref() != Some(&reply) && outbox.is_open() {
            outbox.push(reply.clone(), 100 * topic.segments.len());
            told = Some(reply);
        }
        tokio::select! {
            biased;
            // Nothing of it is half done, so a stop need not wait for it.
            () = shared.draining.started() => return Err(shutting_down()),
            () = outbox.changed() => {
                if outbox.is_gone() {
                    return Ok(());
                }
            }
            changed = version.changed() => if changed.is_err() {
                return Err(shutting_down());
            },
            changed = owners.changed() => if changed.is_err() {
                return Err(shutting_down());
            },
        }
    }
}

/// The mirror does not show the topic: is it really gone?
async fn gone(shared: &Shared, topic: &Topic) -> Result<bool, Refusal> {
    Ok(shared.catalog.topic_by_id(topic.id).await?.is_none())
}

fn reply(shared: &Shared, topic: &Topic) -> WatchReply {
    let owner = |id| shared.ownership.hint(id, topic.layout_epoch);
    WatchReply {
        topic_id: topic.id.0,
        layout: Some(topic.layout()),
        owners: topic.segment_ids().map(owner).collect(),
    }
}
