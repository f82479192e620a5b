//! Pattern subscriptions: one subscription name on every topic of a namespace whose name matches.
//!
//! The server pushes topics as they come and go. A topic that appears is consumed from its first message; one that is deleted
//! leaves; one that is created again under its name is another topic, and is consumed anew.
//!
//! ```text
//! WatchTopics -> topics.rs: what comes and goes, over breaks too -> discovery.rs: a consumer for each -> PatternConsumer
//! ```

mod discovery;
mod matcher;
mod topics;

use std::{
    collections::BTreeMap,
    future::Future,
    ops::Bound::{Excluded, Included, Unbounded},
    pin::Pin,
    task::{Context, Poll},
};

use futures::Stream;
use geminga_proto::{names::TopicName, reason::Reason, v1::SubscriptionSettings};
use geminga_runtime::tasks::Tasks;
use tokio::{sync::mpsc, time::Instant};

use self::{
    discovery::{Discovery, News},
    matcher::Pattern,
};
use crate::{
    backoff::Backoff,
    builder::Client,
    consumer::{Consumer, Received, Start},
    error::Error,
    message::namespace_name,
};

/// News that wait to be taken in.
const NEWS_MAX: usize = 16;

/// Settings of a [`PatternConsumer`].
#[derive(Clone, Debug)]
pub struct PatternBuilder {
    client: Client,
    namespace: String,
    pattern: String,
    opener: Opener,
}

/// How a consumer of one topic is opened.
#[derive(Clone, Debug)]
struct Opener {
    client: Client,
    subscription: String,
    /// Of the consumer: the same on every topic, and of one pattern consumer alone. On a topic that was made again it
    /// replaces the one that still holds on to its name.
    name: String,
    settings: Option<SubscriptionSettings>,
    window: (u64, u64),
}

impl Opener {
    fn open(
        &self,
        topic: &TopicName,
    ) -> impl Future<Output = Result<Consumer, Error>> + Send + use<> {
        let mut builder = self
            .client
            .consumer(topic.to_string(), self.subscription.clone())
            .name(self.name.clone())
            .start(Start::Earliest)
            .window(self.window.0, self.window.1);
        if let Some(settings) = &self.settings {
            builder = builder.settings(settings.clone());
        }
        builder.build()
    }
}

impl PatternBuilder {
    pub(crate) fn new(client: Client, namespace: String, pattern: String, sub: String) -> Self {
        let opener = Opener {
            client: client.clone(),
            name: String::new(),
            subscription: sub,
            settings: None,
            window: (1_000, 1 << 20),
        };
        Self { client, namespace, pattern, opener }
    }

    /// Type, retry policy and lease of the subscriptions that are created. Default: exclusive.
    #[must_use]
    pub fn settings(mut self, settings: SubscriptionSettings) -> Self {
        self.opener.settings = Some(settings);
        self
    }

    /// The credit a segment of each topic. Default 1,000 messages, 1 MiB.
    #[must_use]
    pub fn window(mut self, messages: u64, bytes: u64) -> Self {
        self.opener.window = (messages, bytes);
        self
    }

    /// Opens a consumer on every topic that matches now, and follows what comes and goes. At most 10,000 topics at a time.
    ///
    /// # Errors
    /// A pattern that is none; a refusal of the namespace or of a topic; that the server does not tell the topics within the
    /// client's open timeout.
    pub async fn build(mut self) -> Result<PatternConsumer, Error> {
        self.opener.name = format!("pattern-{:016x}", self.client.random().u64());
        let namespace = namespace_name(&self.namespace)?;
        let pattern = Pattern::new(&self.pattern)?;
        let deadline = Instant::now() + self.client.open_timeout();
        let backoff = Backoff::new(self.client.random());
        let connections = self.client.connections();
        let mut discovery = Discovery::new(connections, backoff, namespace, pattern, self.opener);
        let consumers = discovery.first(deadline).await?;
        let (found, news) = mpsc::channel(NEWS_MAX);
        let tasks = Tasks::new("pattern");
        tasks.spawn("pattern", discovery.run(found));
        Ok(PatternConsumer { consumers, turn: None, news, tasks })
    }
}

/// A stream of the messages of all topics that match, each with its topic. It does not end by itself.
#[derive(Debug)]
pub struct PatternConsumer {
    consumers: BTreeMap<TopicName, Consumer>,
    /// The topic that was served last.
    turn: Option<TopicName>,
    news: mpsc::Receiver<News>,
    tasks: Tasks,
}

impl Drop for PatternConsumer {
    fn drop(&mut self) {
        self.tasks.abort();
    }
}

impl PatternConsumer {
    /// The topics that are consumed now.
    pub fn topics(&self) -> impl Iterator<Item = &TopicName> {
        self.consumers.keys()
    }

    /// As [`Consumer::close`], of all topics.
    ///
    /// # Errors
    /// The first one that could not confirm its settles.
    pub async fn close(mut self) -> Result<(), Error> {
        let consumers = std::mem::take(&mut self.consumers);
        let closed = futures::future::join_all(consumers.into_values().map(Consumer::close)).await;
        closed.into_iter().collect()
    }

    /// Takes in what came and went; the error of a topic that could not be opened.
    fn poll_news(&mut self, context: &mut Context<'_>) -> Option<(TopicName, Error)> {
        while let Poll::Ready(Some(news)) = self.news.poll_recv(context) {
            match news {
                News::Opened(name, consumer) => drop(self.consumers.insert(name, *consumer)),
                News::Gone(name) => drop(self.consumers.remove(&name)),
                News::Failed(name, error) => return Some((name, error)),
            }
        }
        None
    }
}

/// Whether a consumer ended because its topic was deleted, or because another one of its name takes its place.
fn is_gone(error: &Error) -> bool {
    matches!(error.reason(), Some(Reason::TopicNotFound | Reason::ConsumerReplaced))
}

impl Stream for PatternConsumer {
    type Item = (TopicName, Result<Received, Error>);

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if let Some((name, error)) = this.poll_news(context) {
            return Poll::Ready(Some((name, Err(error))));
        }
        // From behind the topic that was served last, around to it.
        let last = this.turn.clone();
        let behind = (last.as_ref().map_or(Unbounded, Excluded), Unbounded);
        let up_to = (Unbounded, last.as_ref().map_or(Unbounded, Included));
        let mut gone = Vec::new();
        let mut found = None;
        'topics: for range in [behind, up_to] {
            for (name, consumer) in this.consumers.range_mut::<TopicName, _>(range) {
                loop {
                    match Pin::new(&mut *consumer).poll_next(context) {
                        Poll::Pending => break,
                        Poll::Ready(None) => {
                            gone.push(name.clone());
                            break;
                        }
                        Poll::Ready(Some(Err(error))) if is_gone(&error) => {} // of a segment; the others say so too
                        Poll::Ready(Some(item)) => {
                            found = Some((name.clone(), item));
                            break 'topics;
                        }
                    }
                }
            }
        }
        for name in gone {
            this.consumers.remove(&name);
        }
        match found {
            Some((name, item)) => {
                this.turn = Some(name.clone());
                Poll::Ready(Some((name, item)))
            }
            None => Poll::Pending,
        }
    }
}
