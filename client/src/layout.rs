//! The watched layout of a topic: read once before anything is routed, then kept current by a task.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use geminga_proto::{
    names::TopicName,
    reason::Retry,
    v1::{WatchReply, WatchRequest},
};
use geminga_runtime::{random::Random, tasks::Tasks};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout, timeout_at},
};
use tonic::Streaming;

use crate::{
    backoff::Backoff,
    connection::{Connections, StreamPlace},
    error::Error,
    routing::Table,
};

/// One answer of the server, prepared for use.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    pub(crate) table: Table,
    /// Of the topic that has the name now.
    pub(crate) topic_id: u64,
    /// Segment to `host:port`, where known.
    owners: BTreeMap<u32, String>,
}

impl Known {
    /// Where this segment was last known to be served; a hint.
    pub(crate) fn owner(&self, segment: u32) -> Option<&str> {
        self.owners.get(&segment).map(String::as_str).filter(|address| !address.is_empty())
    }

    fn of(reply: &WatchReply) -> Option<Self> {
        let table = Table::new(reply.layout.as_ref()?);
        let owners = reply.owners.iter().map(|hint| (hint.segment, hint.address.clone())).collect();
        Some(Self { table, topic_id: reply.topic_id, owners })
    }
}

/// The layout as last heard; clones share it. The task that keeps it current belongs to the given owner.
#[derive(Clone, Debug)]
pub(crate) struct LayoutWatch(watch::Receiver<Arc<Known>>);

/// Time for one attempt to get a first answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

impl LayoutWatch {
    /// Reads the layout; a server that does not answer is asked again until `deadline`.
    ///
    /// # Errors
    /// The refusal, or what kept it from being read in time.
    pub(crate) async fn start(
        connections: &Connections,
        topic: &TopicName,
        create_if_missing: bool,
        random: &Random,
        tasks: &Tasks,
        deadline: Instant,
    ) -> Result<Self, Error> {
        let request = WatchRequest { topic: topic.to_string(), create_if_missing };
        let mut backoff = Backoff::new(random.clone());
        let (stream, first) = loop {
            let attempt = timeout(ANSWER_TIMEOUT, open(connections, &request));
            let error = match timeout_at(deadline, attempt).await {
                Ok(Ok(Ok(opened))) => break opened,
                Ok(Ok(Err(error))) => error,
                _ => Error::Unavailable("the server did not answer in time".into()),
            };
            let pause = backoff.pause(error.retry_after());
            if error.retry() == Retry::Never || Instant::now() + pause >= deadline {
                return Err(error);
            }
            sleep(pause).await;
        };
        let (known, watch) = watch::channel(Arc::new(first));
        let keeper = keep(
            connections.clone(),
            WatchRequest { create_if_missing: false, ..request },
            backoff,
            stream,
            known,
        );
        let stop = tasks.token();
        tasks.spawn("layout", async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = keeper => {}
            }
        });
        Ok(Self(watch))
    }

    pub(crate) fn get(&self) -> Arc<Known> {
        Arc::clone(&self.0.borrow())
    }

    /// Looks at it for a moment. Nothing that waits may happen inside.
    pub(crate) fn with<T>(&self, look: impl FnOnce(&Known) -> T) -> T {
        look(&self.0.borrow())
    }
}

/// A watch, and its place on a connection.
type Watching = (Streaming<WatchReply>, StreamPlace);

async fn open(
    connections: &Connections,
    request: &WatchRequest,
) -> Result<(Watching, Known), Error> {
    let (mut client, place) = connections.discovery();
    let mut stream = client.watch(request.clone()).await?.into_inner();
    while let Some(reply) = stream.message().await? {
        if let Some(known) = Known::of(&reply) {
            return Ok(((stream, place), known));
        }
    }
    Err(Error::Unavailable("the server ended the watch without an answer".into()))
}

/// Follows changes; after a break it reads everything again. An older layout never replaces a newer one.
async fn keep(
    connections: Connections,
    request: WatchRequest,
    mut backoff: Backoff,
    mut stream: Watching,
    known: watch::Sender<Arc<Known>>,
) {
    let learn = |news: Known| {
        known.send_if_modified(|now| {
            let newer = news.table.epoch >= now.table.epoch;
            if newer {
                *now = Arc::new(news);
            }
            newer
        });
    };
    loop {
        while let Ok(Some(reply)) = stream.0.message().await {
            if let Some(news) = Known::of(&reply) {
                learn(news);
            }
        }
        stream = loop {
            sleep(backoff.pause(None)).await;
            if let Ok(Ok((stream, news))) =
                timeout(ANSWER_TIMEOUT, open(&connections, &request)).await
            {
                learn(news);
                backoff.reset();
                break stream;
            }
        };
    }
}
