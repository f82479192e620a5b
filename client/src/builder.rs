//! The client: where the server is, and what producers and consumers share.

use std::{sync::Arc, time::Duration};

use geminga_runtime::{random::Random, tasks::Tasks};
use tokio::time::Instant;

use crate::{
    admin::Admin, backoff::Backoff, connection::Connections, consumer::ConsumerBuilder,
    error::Error, producer::ProducerBuilder,
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
        }
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

    /// Makes the client.
    ///
    /// # Errors
    /// When the server's address is none; when the server was waited for in vain.
    pub async fn build(self) -> Result<Client, Error> {
        let connections = Connections::new(&self.server)?;
        let random = self.random.unwrap_or_else(Random::from_os);
        if !self.wait_for_server.is_zero() {
            let deadline = Instant::now() + self.wait_for_server;
            connections.reach(Backoff::new(random.clone()), deadline).await?;
        }
        let (open_timeout, tasks) = (self.open_timeout, Tasks::new("client"));
        Ok(Client(Arc::new(Shared { connections, random, open_timeout, tasks })))
    }
}
