//! The client: where the server is, and what producers and consumers share.

use std::{sync::Arc, time::Duration};

use geminga_proto::v1::SegmentExplained;
use geminga_runtime::{random::Random, tasks::Tasks};
use tokio::time::Instant;

use crate::{
    admin::Admin,
    backoff::Backoff,
    calls::{self, Peeked, Place, PullBuilder},
    connection::Connections,
    consumer::{ConsumerBuilder, Position, ReaderBuilder},
    error::Error,
    heartbeat::Interval,
    pattern::PatternBuilder,
    processor::ProcessorBuilder,
    producer::ProducerBuilder,
    table::TableBuilder,
};

/// Where a client looks for a server unless told otherwise.
const DEFAULT_SERVER: &str = "http://127.0.0.1:8650";

/// A handle to one server or cluster; clones share its connections. Connections are made when first used.
#[derive(Clone, Debug)]
pub struct Client(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    connections: Connections,
    random: Random,
    open_timeout: Duration,
    heartbeat: Interval,
    tasks: Tasks,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.tasks.abort();
    }
}

/// What producers and consumers need of their client. Holding it keeps the client's connections.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
    pub(crate) connections: Connections,
    pub(crate) random: Random,
    pub(crate) open_timeout: Duration,
    pub(crate) heartbeat: Interval,
    pub(crate) tasks: Tasks,
    _client: Client,
}

/// Settings of a [`Client`].
#[derive(Clone, Debug)]
pub struct ClientBuilder {
    server: String,
    random: Option<Random>,
    open_timeout: Duration,
    wait_for_server: Duration,
    heartbeat: Interval,
}

impl Client {
    /// Starts with the defaults: the server at `http://127.0.0.1:8650`.
    #[must_use]
    pub fn builder() -> ClientBuilder {
        ClientBuilder {
            server: DEFAULT_SERVER.to_owned(),
            random: None,
            open_timeout: Duration::from_secs(30),
            wait_for_server: Duration::ZERO,
            heartbeat: Interval::default(),
        }
    }

    /// Whether this names servers: `http://host:port`, several separated by commas. Nothing is connected.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check_server(server: &str) -> Result<(), Error> {
        Connections::new(server).map(drop)
    }

    /// A producer for a topic: `tenant/namespace/topic`, or a bare topic of `public/default`.
    #[must_use]
    pub fn producer(&self, topic: impl Into<String>) -> ProducerBuilder {
        ProducerBuilder::new(self.parts("producer"), topic.into())
    }

    /// A consumer of a subscription.
    #[must_use]
    pub fn consumer(
        &self,
        topic: impl Into<String>,
        subscription: impl Into<String>,
    ) -> ConsumerBuilder {
        ConsumerBuilder::new(self.parts("consumer"), topic.into(), subscription.into())
    }

    /// A reader of a topic: no subscription, nothing is settled.
    #[must_use]
    pub fn reader(&self, topic: impl Into<String>) -> ReaderBuilder {
        ReaderBuilder::new(self.parts("reader"), topic.into())
    }

    /// A job that consumes, transforms and publishes, with each output stored exactly once (TX8).
    #[must_use]
    pub fn processor(
        &self,
        input: impl Into<String>,
        subscription: impl Into<String>,
        output: impl Into<String>,
    ) -> ProcessorBuilder {
        ProcessorBuilder::new(self.clone(), input.into(), subscription.into(), output.into())
    }

    /// The latest value of each key of a topic, kept current.
    #[must_use]
    pub fn table(&self, topic: impl Into<String>) -> TableBuilder {
        TableBuilder::new(self.clone(), topic.into())
    }

    /// A subscription on every topic of a namespace whose name matches a regular expression, as a whole; also on those
    /// that are created later.
    #[must_use]
    pub fn pattern(
        &self,
        namespace: impl Into<String>,
        pattern: impl Into<String>,
        subscription: impl Into<String>,
    ) -> PatternBuilder {
        PatternBuilder::new(self.clone(), namespace.into(), pattern.into(), subscription.into())
    }

    pub(crate) fn random(&self) -> Random {
        self.0.random.clone()
    }

    pub(crate) fn connections(&self) -> Connections {
        self.0.connections.clone()
    }

    pub(crate) fn open_timeout(&self) -> Duration {
        self.0.open_timeout
    }

    /// Some messages of a subscription at once, without a stream: for jobs that run now and then.
    #[must_use]
    pub fn pull(&self, topic: impl Into<String>, subscription: impl Into<String>) -> PullBuilder {
        PullBuilder::new(self.parts("pull"), topic.into(), subscription.into())
    }

    /// At most `messages_max` messages of a segment as they are stored (0: one), without a trace in any subscription.
    ///
    /// # Errors
    /// A refusal, or that the server does not answer within the open timeout.
    pub async fn peek(
        &self,
        topic: &str,
        segment: u32,
        from: Position,
        messages_max: u32,
    ) -> Result<Peeked, Error> {
        calls::peek(&self.parts("peek"), topic, segment, from, messages_max).await
    }

    /// Moves a subscription, on all segments or one; where it stands then. What consumers hold is taken back, and they go
    /// on from there.
    ///
    /// # Errors
    /// A refusal, or that the server does not answer within the open timeout: it may have moved then.
    pub async fn seek(
        &self,
        topic: &str,
        subscription: &str,
        segment: Option<u32>,
        to: Position,
    ) -> Result<Vec<Place>, Error> {
        calls::seek(&self.parts("seek"), topic, subscription, segment, to).await
    }

    /// Why messages of a subscription are not delivered, a segment each.
    ///
    /// # Errors
    /// A refusal, or that the server does not answer within the open timeout.
    pub async fn explain(
        &self,
        topic: &str,
        subscription: &str,
        segment: Option<u32>,
    ) -> Result<Vec<SegmentExplained>, Error> {
        calls::explain(&self.parts("explain"), topic, subscription, segment).await
    }

    /// Tenants, namespaces, topics, subscriptions.
    #[must_use]
    pub fn admin(&self) -> Admin {
        Admin::new(self.0.connections.clone(), self.0.open_timeout)
    }

    fn parts(&self, name: &str) -> Parts {
        Parts {
            connections: self.0.connections.clone(),
            random: self.0.random.clone(),
            open_timeout: self.0.open_timeout,
            heartbeat: self.0.heartbeat,
            tasks: self.0.tasks.child(name),
            _client: self.clone(),
        }
    }
}

impl ClientBuilder {
    /// `http://host:port` of any broker; several, separated by commas, are tried in turn.
    #[must_use]
    pub fn server(mut self, server: impl Into<String>) -> Self {
        self.server = server.into();
        self
    }

    /// Where chance comes from; for tests that repeat by a seed.
    #[must_use]
    pub fn random(mut self, random: Random) -> Self {
        self.random = Some(random);
        self
    }

    /// How long opening a producer or consumer, and an administrative call, may take. Default 30 s.
    #[must_use]
    pub fn open_timeout(mut self, timeout: Duration) -> Self {
        self.open_timeout = timeout;
        self
    }

    /// Connects when the client is built, and asks a server that cannot be reached again for so long: for one that is
    /// starting at the same time. Default zero: connections are made when first used.
    #[must_use]
    pub fn wait_for_server(mut self, time: Duration) -> Self {
        self.wait_for_server = time;
        self
    }

    /// How often both sides of a producer's or consumer's stream give a sign of life. One that is silent for three times that
    /// is ended, and opened again: a server whose process hangs is left, and a consumer whose process hangs gives its messages
    /// back. Held between a second and a day; zero: no such promise. Default 10 s.
    #[must_use]
    pub fn heartbeat(mut self, interval: Duration) -> Self {
        self.heartbeat = Interval::new(interval);
        self
    }

    /// Makes the client.
    ///
    /// # Errors
    /// When the server's address is none; when the server was waited for in vain.
    pub async fn build(self) -> Result<Client, Error> {
        let connections = Connections::new(&self.server)?;
        let random = self.random.clone().unwrap_or_else(Random::from_os);
        if !self.wait_for_server.is_zero() {
            let deadline = Instant::now() + self.wait_for_server;
            connections.reach(Backoff::new(random.clone()), deadline).await?;
        }
        let Self { open_timeout, heartbeat, .. } = self;
        let tasks = Tasks::new("client");
        Ok(Client(Arc::new(Shared { connections, random, open_timeout, heartbeat, tasks })))
    }
}
