//! Pattern subscriptions: one subscription name on every topic of a namespace whose name matches.
//!
//! Topics are found by listing the namespace again and again ([`PatternBuilder::look_every`]); the server does not push
//! them. A topic that appears is consumed within that time, from its first message; one that is deleted leaves.

use std::{
    collections::BTreeMap,
    ops::Bound::{Excluded, Included, Unbounded},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures::Stream;
use geminga_proto::{
    names::{NamespaceName, TopicName},
    reason::Reason,
    v1::SubscriptionSettings,
};
use geminga_runtime::tasks::Tasks;
use regex::{Regex, RegexBuilder};
use tokio::{sync::mpsc, time::sleep};

use crate::{
    builder::Client,
    consumer::{Consumer, Received, Start},
    error::Error,
    message::{namespace_name, topic_name},
};

/// Compiled size of a pattern, bytes.
const PATTERN_BYTES_MAX: usize = 1 << 20;
/// Topics consumed at a time: each has a stream a segment.
const TOPICS_MAX: usize = 10_000;
/// Consumers that wait to be taken in.
const NEW_MAX: usize = 16;

/// Settings of a [`PatternConsumer`].
#[derive(Clone, Debug)]
pub struct PatternBuilder {
    client: Client,
    namespace: String,
    pattern: String,
    subscription: String,
    settings: Option<SubscriptionSettings>,
    look_every: Duration,
    window: (u64, u64),
}

impl PatternBuilder {
    pub(crate) fn new(client: Client, namespace: String, pattern: String, sub: String) -> Self {
        Self {
            client,
            namespace,
            pattern,
            subscription: sub,
            settings: None,
            look_every: Duration::from_secs(10),
            window: (1_000, 1 << 20),
        }
    }

    /// Type, retry policy and lease of the subscriptions that are created. Default: exclusive.
    #[must_use]
    pub fn settings(mut self, settings: SubscriptionSettings) -> Self {
        self.settings = Some(settings);
        self
    }

    /// The time between two looks for topics. Default 10 s, at least 100 ms.
    #[must_use]
    pub fn look_every(mut self, time: Duration) -> Self {
        self.look_every = time.max(Duration::from_millis(100));
        self
    }

    /// The credit a segment of each topic. Default 1,000 messages, 1 MiB.
    #[must_use]
    pub fn window(mut self, messages: u64, bytes: u64) -> Self {
        self.window = (messages, bytes);
        self
    }

    /// Opens a consumer on every topic that matches now, and goes on looking.
    ///
    /// # Errors
    /// A pattern that is none; a refusal of the listing or of a topic; that the server does not answer.
    pub async fn build(self) -> Result<PatternConsumer, Error> {
        let namespace = namespace_name(&self.namespace)?;
        let pattern = Pattern::new(&self.pattern)?;
        let mut known = BTreeMap::new();
        for name in matching(&self.client, &namespace, &pattern).await? {
            if let Some(consumer) = self.open(&name).await? {
                known.insert(name, consumer);
            }
        }
        let (found, news) = mpsc::channel(NEW_MAX);
        let tasks = Tasks::new("pattern");
        let names: Vec<TopicName> = known.keys().cloned().collect();
        tasks.spawn("pattern", self.look(namespace, pattern, names, found));
        Ok(PatternConsumer { consumers: known, turn: None, news, tasks })
    }

    /// None for a topic that was deleted meanwhile.
    async fn open(&self, name: &TopicName) -> Result<Option<Consumer>, Error> {
        let mut builder = self
            .client
            .consumer(name.to_string(), self.subscription.clone())
            .start(Start::Earliest)
            .window(self.window.0, self.window.1);
        if let Some(settings) = &self.settings {
            builder = builder.settings(settings.clone());
        }
        match builder.build().await {
            Ok(consumer) => Ok(Some(consumer)),
            Err(error) if error.reason() == Some(Reason::TopicNotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Looks for topics until nobody listens. A look that fails is repeated; a topic that cannot be opened is told once,
    /// and tried again as long as it is there.
    async fn look(
        self,
        namespace: NamespaceName,
        pattern: Pattern,
        mut known: Vec<TopicName>,
        found: mpsc::Sender<(TopicName, Result<Consumer, Error>)>,
    ) {
        let mut told: Vec<TopicName> = Vec::new();
        loop {
            tokio::select! {
                biased;
                () = found.closed() => return,
                () = sleep(self.look_every) => {}
            }
            let Ok(now) = matching(&self.client, &namespace, &pattern).await else { continue };
            known.retain(|name| now.contains(name));
            told.retain(|name| now.contains(name));
            for name in now {
                if known.contains(&name) {
                    continue;
                }
                let news = match self.open(&name).await {
                    Ok(None) => continue,
                    Ok(Some(consumer)) => {
                        known.push(name.clone());
                        Ok(consumer)
                    }
                    Err(_) if told.contains(&name) => continue,
                    Err(error) => {
                        told.push(name.clone());
                        Err(error)
                    }
                };
                if found.send((name, news)).await.is_err() {
                    return;
                }
            }
        }
    }
}

async fn matching(
    client: &Client,
    namespace: &NamespaceName,
    pattern: &Pattern,
) -> Result<Vec<TopicName>, Error> {
    let mut names = Vec::new();
    for topic in client.admin().topics(namespace).await? {
        let name = topic_name(&topic.name)?;
        if pattern.matches(&name) && names.len() < TOPICS_MAX {
            names.push(name);
        }
    }
    Ok(names)
}

/// Which topics are meant.
#[derive(Clone, Debug)]
struct Pattern {
    regex: Regex,
    /// Dead-letter topics, whose names have a `~`, are meant only by a pattern that says so.
    tilde: bool,
}

impl Pattern {
    fn new(text: &str) -> Result<Self, Error> {
        let whole = format!("^(?:{text})$");
        let regex = RegexBuilder::new(&whole).size_limit(PATTERN_BYTES_MAX).build();
        let regex = regex.map_err(|error| {
            Error::refused(Reason::InvalidRequest, format!("{text:?} is no pattern: {error}"))
        })?;
        Ok(Self { regex, tilde: text.contains('~') })
    }

    fn matches(&self, name: &TopicName) -> bool {
        let topic = name.topic();
        self.regex.is_match(topic) && (self.tilde || !topic.contains('~'))
    }
}

/// A stream of the messages of all topics that match, each with its topic. It does not end by itself.
#[derive(Debug)]
pub struct PatternConsumer {
    consumers: BTreeMap<TopicName, Consumer>,
    /// The topic that was served last.
    turn: Option<TopicName>,
    news: mpsc::Receiver<(TopicName, Result<Consumer, Error>)>,
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

    /// Takes in what was found; the error of a topic that could not be opened.
    fn poll_news(&mut self, context: &mut Context<'_>) -> Option<(TopicName, Error)> {
        while let Poll::Ready(Some((name, news))) = self.news.poll_recv(context) {
            match news {
                Ok(consumer) => drop(self.consumers.insert(name, consumer)),
                Err(error) => return Some((name, error)),
            }
        }
        None
    }
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
        for range in [behind, up_to] {
            for (name, consumer) in this.consumers.range_mut::<TopicName, _>(range) {
                match Pin::new(consumer).poll_next(context) {
                    Poll::Pending => {}
                    Poll::Ready(Some(item)) => {
                        this.turn = Some(name.clone());
                        return Poll::Ready(Some((name.clone(), item)));
                    }
                    Poll::Ready(None) => gone.push(name.clone()),
                }
            }
        }
        for name in gone {
            this.consumers.remove(&name);
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_of_the_whole_name_and_leaves_dead_letters_alone() {
        let matches = |pattern: &str, topic: &str| {
            let name = topic_name(topic).expect("a name");
            Pattern::new(pattern).expect("a pattern").matches(&name)
        };
        assert!(matches("orders-.*", "orders-eu") && matches("a|b", "b"));
        assert!(!matches("orders", "orders-eu") && !matches("a|b", "ab"));
        assert!(!matches(".*", "orders~billing~dlq") && matches(".*~dlq", "orders~billing~dlq"));
        for bad in ["(", "[a", &"a{1000}".repeat(50)] {
            let error = Pattern::new(bad).expect_err("no pattern");
            assert_eq!(error.reason(), Some(Reason::InvalidRequest), "{bad:?}");
        }
    }
}
