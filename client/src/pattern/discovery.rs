//! Follows the topics of a namespace, and opens a consumer on each that matches.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    future::Future,
    time::Duration,
};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use geminga_proto::{
    names::{NamespaceName, TopicName},
    reason::{Reason, Retry},
    v1::{WatchTopicsReply, WatchTopicsRequest},
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout},
};
use tonic::Streaming;

use super::{
    Opener,
    matcher::Pattern,
    topics::{Change, Topics},
};
use crate::{backoff::Backoff, connection::Connections, consumer::Consumer, error::Error};

/// Consumers opened at a time.
const OPENING_MAX: usize = 16;
/// News that wait for the application; past that no more is looked at.
const NEWS_MAX: usize = 16;
/// Time for one attempt to open a watch.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// Pause before a topic that could not be opened is tried again.
const AGAIN_AFTER: Duration = Duration::from_secs(10);

/// What the application's side hears.
#[derive(Debug)]
pub(super) enum News {
    Opened(TopicName, Box<Consumer>),
    Failed(TopicName, Error),
    Gone(TopicName),
}

/// A topic that was to be opened, with its id then.
type Opened = (TopicName, u64, Result<Consumer, Error>);

pub(super) struct Discovery {
    connections: Connections,
    namespace: NamespaceName,
    pattern: Pattern,
    opener: Opener,
    watch: Watch,
    topics: Topics,
    backoff: Backoff,
    /// To be opened, with the earliest time for it.
    waiting: BTreeMap<TopicName, Instant>,
    opening: FuturesUnordered<BoxFuture<'static, Opened>>,
    /// Topics of which the application knows that they could not be opened.
    told: BTreeSet<TopicName>,
    news: VecDeque<News>,
}

enum Watch {
    Waiting { until: Instant },
    Opening(BoxFuture<'static, Result<Streaming<WatchTopicsReply>, Error>>),
    Open(Box<Streaming<WatchTopicsReply>>),
}

enum Event {
    Retry,
    Watching(Result<Streaming<WatchTopicsReply>, Error>),
    Reply(Result<Option<WatchTopicsReply>, Error>),
    Opened(TopicName, u64, Result<Consumer, Error>),
    Due,
}

impl Watch {
    /// Cancel-safe.
    async fn next(&mut self) -> Event {
        match self {
            Self::Waiting { until } => {
                sleep_until(*until).await;
                Event::Retry
            }
            Self::Opening(opening) => Event::Watching(opening.await),
            Self::Open(replies) => Event::Reply(replies.message().await.map_err(Error::from)),
        }
    }
}

impl Discovery {
    pub(super) fn new(
        connections: Connections,
        backoff: Backoff,
        namespace: NamespaceName,
        pattern: Pattern,
        opener: Opener,
    ) -> Self {
        Self {
            connections,
            namespace,
            pattern,
            opener,
            watch: Watch::Waiting { until: Instant::now() },
            topics: Topics::default(),
            backoff,
            waiting: BTreeMap::new(),
            opening: FuturesUnordered::new(),
            told: BTreeSet::new(),
            news: VecDeque::new(),
        }
    }

    /// Opens a consumer on every topic that matches now.
    ///
    /// # Errors
    /// A refusal of the watch, or of a topic; that the server does not answer until `deadline`.
    pub(super) async fn first(
        &mut self,
        deadline: Instant,
    ) -> Result<BTreeMap<TopicName, Consumer>, Error> {
        let mut consumers = BTreeMap::new();
        let mut trouble = None;
        self.topics.on_watching();
        while !(self.topics.is_synced() && self.waiting.is_empty() && self.opening.is_empty()) {
            let Ok(failed) = tokio::time::timeout_at(deadline, self.turn()).await else {
                let words = "the topics of the namespace were not told in time";
                return Err(trouble.unwrap_or_else(|| Error::Unavailable(words.into())));
            };
            if let Err(error) = failed {
                if error.retry() == Retry::Never {
                    return Err(error);
                }
                trouble = Some(error);
            }
            for news in self.news.drain(..) {
                match news {
                    News::Opened(name, consumer) => drop(consumers.insert(name, *consumer)),
                    News::Failed(_, error) => return Err(error),
                    News::Gone(name) => drop(consumers.remove(&name)),
                }
            }
        }
        Ok(consumers)
    }

    /// Goes on until nobody listens. A watch that fails is opened again; a topic that cannot be opened is told once, and
    /// tried again as long as it is there.
    pub(super) async fn run(mut self, news: mpsc::Sender<News>) {
        loop {
            let has_news = !self.news.is_empty();
            tokio::select! {
                biased;
                () = news.closed() => return,
                room = news.reserve(), if has_news => match (room, self.news.pop_front()) {
                    (Ok(room), Some(first)) => room.send(first),
                    _ => return,
                },
                failed = self.turn() => if let Err(error) = failed {
                    tracing::debug!(namespace = %self.namespace, %error, "topic watch broken");
                },
            }
        }
    }

    /// One thing happens. Cancel-safe.
    ///
    /// # Errors
    /// Why the watch has to be opened again.
    async fn turn(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        self.open_some(now);
        let room = self.news.len() < NEWS_MAX;
        let due = self.waiting.values().min().copied();
        let due = due.filter(|_| self.opening.len() < OPENING_MAX);
        let event = tokio::select! {
            biased;
            event = self.watch.next(), if room => event,
            Some((name, id, opened)) = self.opening.next(), if room && !self.opening.is_empty() => {
                Event::Opened(name, id, opened)
            }
            () = sleep_until(due.unwrap_or(now)), if due.is_some() => Event::Due,
            else => std::future::pending().await, // until there is room
        };
        self.apply(event, Instant::now())
    }

    fn apply(&mut self, event: Event, now: Instant) -> Result<(), Error> {
        match event {
            Event::Due => {}
            Event::Retry => {
                let opening = watch(self.connections.clone(), &self.namespace, &self.pattern);
                self.watch = Watch::Opening(opening.boxed());
            }
            Event::Watching(Ok(replies)) => {
                self.topics.on_watching();
                self.watch = Watch::Open(Box::new(replies));
            }
            Event::Reply(Ok(Some(reply))) => {
                for change in self.topics.on_reply(reply, &self.pattern) {
                    self.on_change(change, now);
                }
                if self.topics.is_synced() {
                    self.backoff.reset();
                }
            }
            Event::Reply(Ok(None)) => {
                // Streams end in bounded time: the next one tells what differs.
                self.watch = Watch::Waiting { until: now + self.backoff.pause(None) };
            }
            Event::Watching(Err(error)) | Event::Reply(Err(error)) => {
                let pause = self.backoff.pause(error.retry_after());
                self.watch = Watch::Waiting { until: now + pause };
                return Err(error);
            }
            Event::Opened(name, id, opened) => self.on_opened(name, id, opened, now),
        }
        Ok(())
    }

    fn on_change(&mut self, change: Change, now: Instant) {
        match change {
            Change::Gone(name) => {
                self.waiting.remove(&name);
                self.told.remove(&name);
                self.news.push_back(News::Gone(name));
            }
            Change::Come(name, _) => drop(self.waiting.insert(name, now)),
        }
    }

    fn on_opened(
        &mut self,
        name: TopicName,
        id: u64,
        opened: Result<Consumer, Error>,
        now: Instant,
    ) {
        if self.topics.id(&name) != Some(id) {
            return; // it has gone meanwhile; another one of its name is opened on its own
        }
        match opened {
            Ok(consumer) => {
                self.told.remove(&name);
                self.news.push_back(News::Opened(name, Box::new(consumer)));
            }
            Err(error) => {
                let gone = error.reason() == Some(Reason::TopicNotFound);
                if !gone && self.told.insert(name.clone()) {
                    self.news.push_back(News::Failed(name.clone(), error));
                }
                self.waiting.insert(name, now + AGAIN_AFTER);
            }
        }
    }

    /// Begins to open what is due.
    fn open_some(&mut self, now: Instant) {
        while self.opening.len() < OPENING_MAX {
            let due = self.waiting.iter().find(|(_, at)| **at <= now).map(|(name, _)| name.clone());
            let Some(name) = due else { return };
            self.waiting.remove(&name);
            let Some(id) = self.topics.id(&name) else { continue };
            let opening = self.opener.open(&name);
            self.opening.push(async move { (name, id, opening.await) }.boxed());
        }
    }
}

fn watch(
    connections: Connections,
    namespace: &NamespaceName,
    pattern: &Pattern,
) -> impl Future<Output = Result<Streaming<WatchTopicsReply>, Error>> + use<> {
    let (namespace, prefix) = (namespace.to_string(), pattern.prefix().to_owned());
    async move {
        let (mut discovery, _not_counted) = connections.discovery(); // one a pattern
        let opening = discovery.watch_topics(WatchTopicsRequest { namespace, prefix });
        match timeout(ANSWER_TIMEOUT, opening).await {
            Ok(opened) => Ok(opened?.into_inner()),
            Err(_) => Err(Error::Unavailable("the server did not answer in time".into())),
        }
    }
}
