//! The gRPC service `Discovery`: the layout and owners of a topic, and the topics of a namespace; once, then at every change.

use std::time::Duration;

use geminga_metadata::Revision;
use geminga_proto::{
    names::{NamespaceName, TopicName},
    reason::Reason,
    v1::{
        WatchReply, WatchRequest, WatchTopicsReply, WatchTopicsRequest, discovery_server::Discovery,
    },
};
use tokio::time::{Instant, sleep, sleep_until};
use tonic::{Request, Response, Status};

use super::topics::Told;
use crate::{
    catalog::Topic,
    context::{Shared, shutting_down},
    errors::Refusal,
    lifecycle,
    listener::{Connection, Outbox, OutboxStream, outbox},
};

/// Pause between two looks at a namespace: many changes make one.
const PAUSE: Duration = Duration::from_millis(100);

/// The service.
#[derive(Clone, Debug)]
pub(crate) struct DiscoveryService(pub(crate) Shared);

impl DiscoveryService {
    /// A stream that only says: `open` checks the request, `follow` runs until its end.
    async fn watch<Q, T, R, F>(
        &self,
        request: Request<Q>,
        open: impl AsyncFnOnce(&Shared, &Connection, &Q) -> Result<T, Refusal>,
        follow: impl FnOnce(Shared, T, Outbox<R>) -> F,
    ) -> Result<Response<OutboxStream<R>>, Status>
    where
        R: Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let shared = self.0.clone();
        let connection = Connection::of(&request, &shared.config.limits);
        let slot = shared.stream_slot(&connection).map_err(|refusal| shared.refused(refusal))?;
        let opened = open(&shared, &connection, request.get_ref()).await;
        let opened = opened.map_err(|refusal| shared.refused(refusal))?;
        let (sender, stream) = outbox(shared.config.limits.outbox_bytes_max);
        let following = follow(shared.clone(), opened, sender);
        self.0.streams.spawn("watch stream", async move {
            let _slot = slot;
            let _open = shared.metrics.stream("watch");
            following.await;
        });
        Ok(Response::new(stream))
    }
}

#[tonic::async_trait]
impl Discovery for DiscoveryService {
    type WatchStream = OutboxStream<WatchReply>;

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let follow = |shared: Shared, topic, outbox: Outbox<_>| async move {
            let result = follow(&shared, topic, &outbox).await;
            outbox.finish(result);
        };
        self.watch(request, open, follow).await
    }

    type WatchTopicsStream = OutboxStream<WatchTopicsReply>;

    async fn watch_topics(
        &self,
        request: Request<WatchTopicsRequest>,
    ) -> Result<Response<Self::WatchTopicsStream>, Status> {
        let follow = |shared: Shared, watched, outbox: Outbox<_>| async move {
            let result = follow_topics(&shared, watched, &outbox).await;
            outbox.finish(result);
        };
        self.watch(request, open_topics, follow).await
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

/// Until the client leaves, the topic is deleted, the stream is old, or the broker stops.
async fn follow(
    shared: &Shared,
    mut topic: Topic,
    outbox: &Outbox<WatchReply>,
) -> Result<(), Refusal> {
    let mut version = shared.hub.version();
    let mut owners = shared.ownership.members().version();
    let mut told: Option<WatchReply> = None;
    let ends = Instant::now() + shared.stream_age();
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
            () = sleep_until(ends) => return Ok(()),
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

/// A namespace that is watched.
struct Watched {
    namespace: NamespaceName,
    prefix: String,
    /// What was created before that must have been told before the list is called complete.
    created_at: Revision,
}

async fn open_topics(
    shared: &Shared,
    connection: &Connection,
    request: &WatchTopicsRequest,
) -> Result<Watched, Refusal> {
    shared.admit(connection, request)?;
    let namespace = NamespaceName::parse(&request.namespace)?;
    let prefix = request.prefix.clone();
    if !matches!(prefix.as_str(), "" | "." | "..") {
        TopicName::parse(&format!("{namespace}/{prefix}"))?;
    }
    shared.catalog.namespace(&namespace).await?;
    let created_at = shared.catalog.topics_created_at().await?;
    Ok(Watched { namespace, prefix, created_at })
}

/// Until the client leaves, the stream is old, or the broker stops.
async fn follow_topics(
    shared: &Shared,
    watched: Watched,
    outbox: &Outbox<WatchTopicsReply>,
) -> Result<(), Refusal> {
    let mut version = shared.hub.version();
    let (mut told, mut synced, mut after) = (Told::new(), false, None);
    // Of the mirror, when the pass that goes on was begun; none: there is none.
    let mut pass: Option<(u64, bool)> = None;
    let mut done: Option<u64> = None;
    let ends = Instant::now() + shared.stream_age();
    loop {
        version.borrow_and_update();
        let (complete, now) = (
            shared.hub.has_seen(watched.created_at),
            shared.hub.namespace_version(&watched.namespace),
        );
        if pass.is_none() && (done != Some(now) || complete != synced) {
            (pass, after) = (Some((now, complete)), None);
        }
        let mut more = false;
        if let Some((of, complete)) = pass
            && outbox.is_open()
        {
            let place = (&watched.namespace, watched.prefix.as_str());
            let step = shared.hub.topics_step(place, &told, after.as_deref());
            after.clone_from(&step.next);
            more = after.is_some();
            let news = !more && complete && !synced;
            if !more {
                (pass, done, synced) = (None, Some(of), synced || complete);
            }
            if !step.is_empty() || news {
                let reply = step.tell(&mut told, synced);
                let bytes = prost::Message::encoded_len(&reply);
                outbox.push(reply, bytes);
            }
        }
        tokio::select! {
            biased;
            () = shared.draining.started() => return Err(shutting_down()),
            () = sleep_until(ends) => return Ok(()),
            () = outbox.changed() => {
                if outbox.is_gone() {
                    return Ok(());
                }
            }
            () = std::future::ready(()), if more => {}
            changed = version.changed(), if pass.is_none() => match changed {
                Ok(()) if synced => sleep(PAUSE).await,
                Ok(()) => {}
                Err(_) => return Err(shutting_down()),
            },
        }
    }
}
