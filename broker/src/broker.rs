//! Start, orderly end and sudden end of a broker.

use std::{fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use geminga_gateway::Gateway;
use geminga_managed_ledger::ManagedLedgers;
use geminga_metadata::{
    BUNDLES, ClusterError, LeaseKeeper, SharedStore, Standing, StandingSetter, ensure_cluster,
};
use geminga_proto::{
    FILE_DESCRIPTOR_SET,
    admin::v1::admin_server::AdminServer,
    internal::v1::segments_server::SegmentsServer,
    v1::{
        discovery_server::DiscoveryServer, publisher_server::PublisherServer,
        subscriber_server::SubscriberServer,
    },
};
use geminga_runtime::{budget::ByteBudget, clock::SharedClock, random::Random, tasks::Tasks};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{
    server::NamedService,
    service::Routes,
    transport::{Server, server::Router},
};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::layer::util::{Identity, Stack};

use crate::{
    admin::AdminService,
    auth::{AllowAll, Authorizer, Gate},
    catalog::Catalog,
    config::{BrokerConfig, REQUEST_BYTES_MAX},
    context::{Context, Draining, Shared, shutting_down},
    discovery::{DiscoveryService, Hub},
    lifecycle,
    listener::{ListenerParts, TypedErrors, incoming},
    metrics::Metrics,
    ownership::{Ownership, OwnershipParts},
    publish::PublisherService,
    relay::{Peers, RelayBytes, SegmentsService},
    subscription::SubscriberService,
    tier,
};

/// HTTP/2 flow-control windows, bytes.
const WINDOW_BYTES: u32 = 4 * 1024 * 1024;
/// Largest header list of a request, bytes: what may come before anybody is authenticated (S4).
const HEADERS_BYTES_MAX: u32 = 16 * 1024;
/// Streams that HTTP/2 allows beyond ours, so that the refusal is a typed one.
const SPARE_STREAMS: u32 = 64;
/// Time to the first lease.
const LEASE_DEADLINE: Duration = Duration::from_secs(10);
/// Time for tasks to end after the streams have.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// What a broker is made of.
#[derive(Clone)]
pub struct BrokerParts {
    pub store: SharedStore,
    pub managed: ManagedLedgers,
    /// Told whether the broker's claims are confirmed (O3); its other half belongs into the ledger client. None: an embedded
    /// store, which never goes away alone.
    pub standing: Option<StandingSetter>,
    pub clock: SharedClock,
    pub random: Random,
    pub config: BrokerConfig,
    pub metrics: Metrics,
}

/// Why a broker did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The cluster's record cannot be read or made.
    #[error("the cluster cannot be joined")]
    Cluster(#[from] ClusterError),
    /// The address is taken, or not this machine's.
    #[error("cannot listen on {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    /// The metadata store gave no lease in time.
    #[error("the metadata store gave no lease within {LEASE_DEADLINE:?}")]
    Lease,
    /// A part of the gRPC server could not be made.
    #[error("the gRPC server cannot be set up: {0}")]
    Server(String),
}

/// What clients hold of a broker at a moment; all of it is given back when they have left and what they sent is settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Bytes of batches taken and not settled.
    pub publish_bytes: u64,
    /// Payload bytes read for consumers and not taken by their connections.
    pub dispatch_bytes: u64,
    /// Payload bytes on their way to and from other brokers.
    pub relay_bytes: u64,
    /// Publish, consume and watch streams.
    pub streams: usize,
}

/// A running broker. Dropping the handle stops nothing: end it with [`Self::shutdown`] or [`Self::kill`].
pub struct Broker {
    address: SocketAddr,
    shared: Shared,
    lease: LeaseKeeper,
    health: HealthReporter,
    tasks: Tasks,
    /// Owner of the gRPC server's task.
    server: Tasks,
    /// Every connection is cut.
    killed: CancellationToken,
}

impl fmt::Debug for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Broker").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Broker {
    /// Starts a broker that lets everybody do everything. It serves when this returns; segments are loaded on first use.
    ///
    /// # Errors
    /// [`StartError`]; nothing keeps running then.
    pub async fn start(parts: BrokerParts) -> Result<Self, StartError> {
        Self::start_with(parts, Arc::new(AllowAll)).await
    }

    /// As [`Self::start`], behind this authorizer.
    ///
    /// # Errors
    /// The same.
    pub async fn start_with(
        parts: BrokerParts,
        authorizer: Arc<dyn Authorizer>,
    ) -> Result<Self, StartError> {
        let tasks = Tasks::new(format!("broker {}", parts.config.id));
        let started = Self::start_in(parts, authorizer, &tasks).await;
        if started.is_err() {
            tasks.abort();
        }
        started
    }

    async fn start_in(
        parts: BrokerParts,
        authorizer: Arc<dyn Authorizer>,
        tasks: &Tasks,
    ) -> Result<Self, StartError> {
        let BrokerParts { store, managed, standing: told, clock, random, config, metrics } = parts;
        let cluster = ensure_cluster(&store, &random, clock.now(), BUNDLES).await?;
        let listen = |source| StartError::Listen { address: config.listen, source };
        let listener = TcpListener::bind(config.listen).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let advertised = config.advertise.clone().unwrap_or_else(|| address.to_string());
        let lease = LeaseKeeper::start(store.clone(), config.lease_ttl, tasks);
        if !matches!(timeout(LEASE_DEADLINE, lease.held()).await, Ok(Some(_))) {
            return Err(StartError::Lease);
        }
        let catalog = Catalog::new(
            store.clone(),
            clock.clone(),
            cluster,
            ManagedLedgers::initial_list,
            tasks.token(),
        );
        let (setter, standing) = Standing::new();
        let catalog = catalog.under(standing.clone());
        let peers = Peers::new(config.limits.clone());
        let ownership = Ownership::start(OwnershipParts {
            config: config.clone(),
            instance: random.uuid(),
            address: advertised,
            started_at_ms: clock.now().0,
            told,
            setter,
            standing,
            peers: peers.clone(),
            store: store.clone(),
            catalog: catalog.clone(),
            managed,
            lease: lease.clone(),
            metrics: metrics.clone(),
            tasks: tasks.child("ownership"),
        });
        // Before that this broker would take itself for the only one.
        let known = async {
            ownership.members().caught_up().await;
            ownership.registered().await;
        };
        if timeout(LEASE_DEADLINE, known).await.is_err() {
            return Err(StartError::Lease);
        }
        let limits = config.limits.clone();
        let shared = Arc::new(Context {
            catalog,
            ownership,
            hub: Hub::start(&store, tasks),
            gate: Gate::new(authorizer),
            metrics: metrics.clone(),
            random,
            streams: tasks.child("streams"),
            draining: Draining::new(CancellationToken::new()),
            stream_slots: Arc::new(Semaphore::new(limits.streams_max)),
            publish_bytes: ByteBudget::new(limits.broker_bytes_max),
            relay_bytes: RelayBytes::new(limits.relay_bytes_max),
            peers,
            dispatch_bytes: ByteBudget::new(limits.dispatch_bytes_max),
            config,
        });
        let driver = lifecycle::drive_stalled_subscriptions(Arc::clone(&shared));
        tasks.spawn("subscription driver", driver);
        let settings = crate::subscription::keep_settings(Arc::clone(&shared));
        tasks.spawn("settings keeper", settings);
        tasks.spawn("dead letters", crate::subscription::resume_dead_letters(Arc::clone(&shared)));
        tier::start(&shared, &store, tasks);
        let (server, killed) = (tasks.child("server"), CancellationToken::new());
        let closing = server.token();
        let listener_parts =
            ListenerParts { limits, metrics, closing: closing.clone(), killed: killed.clone() };
        let (health, router) = router(&shared).await?;
        let incoming = incoming(listener, listener_parts);
        let serve = router.serve_with_incoming_shutdown(incoming, closing.cancelled_owned());
        server.spawn_critical("grpc server", serve);
        tracing::info!(%address, "broker serves");
        Ok(Self { address, shared, lease, health, tasks: tasks.clone(), server, killed })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What clients hold of it now.
    #[must_use]
    pub fn held(&self) -> Held {
        Held {
            publish_bytes: self.shared.publish_bytes.in_use(),
            dispatch_bytes: self.shared.dispatch_bytes.in_use(),
            relay_bytes: self.shared.relay_bytes.in_use(),
            streams: self.shared.config.limits.streams_max
                - self.shared.stream_slots.available_permits(),
        }
    }

    /// Whether it is registered under the lease that it holds, and takes bundles: what a readiness probe asks. False from the
    /// moment that it drains.
    #[must_use]
    pub fn ready(&self) -> watch::Receiver<bool> {
        self.shared.ownership.ready()
    }

    /// Resolves with the failure of a task the broker cannot do without.
    pub async fn failed(&self) -> geminga_runtime::tasks::Failure {
        self.tasks.failed().await
    }

    /// Ends it: it calls itself not serving, hands its bundles to the brokers that are there (their clients are told where
    /// to go, and see no error), then tells what streams are left to go. All of that has until `grace`; then segments are
    /// closed cleanly and the lease is given back, so that the next owner needs no recovery and no wait.
    pub async fn shutdown(self, grace: Duration) {
        let deadline = Instant::now() + grace;
        tell_health(&self.health, ServingStatus::NotServing).await;
        self.shared.ownership.stop(deadline).await;
        let grace = deadline.saturating_duration_since(Instant::now());
        self.shared.draining.begin(grace);
        self.shared.streams.shutdown(grace + STOP_GRACE).await;
        self.shared.ownership.close(shutting_down()).await;
        self.lease.end().await;
        self.server.shutdown(STOP_GRACE).await; // connections end once their last answers are out
        self.killed.cancel();
        self.tasks.abort(); // what is left only watches
        self.tasks.idle().await;
        tracing::info!(address = %self.address, "broker stopped");
    }

    /// Ends it as `kill -9` would: connections are cut, nothing is settled, the lease is left to run out.
    pub fn kill(self) {
        self.killed.cancel();
        self.tasks.abort();
    }
}

type Layers = Stack<TypedErrors, Identity>;

/// What balancers ask about: the whole, and each service.
const HEALTH_OF: [&str; 5] = [
    "",
    PublisherServer::<PublisherService>::NAME,
    SubscriberServer::<SubscriberService>::NAME,
    DiscoveryServer::<DiscoveryService>::NAME,
    AdminServer::<AdminService>::NAME,
];

async fn tell_health(health: &HealthReporter, status: ServingStatus) {
    for service in HEALTH_OF {
        health.set_service_status(service, status).await;
    }
}

async fn router(shared: &Shared) -> Result<(HealthReporter, Router<Layers>), StartError> {
    let limits = &shared.config.limits;
    let frame_bytes_max = limits.frame_bytes_max();
    let streams_max = u32::try_from(limits.streams_per_connection_max).unwrap_or(u32::MAX);
    let (health, health_service) = tonic_health::server::health_reporter();
    tell_health(&health, ServingStatus::Serving).await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|error| StartError::Server(error.to_string()))?;
    let publisher = PublisherService(shared.clone());
    let subscriber = SubscriberService(shared.clone());
    let admin = AdminService(shared.clone());
    let gateway = geminga_gateway::router(Gateway {
        publisher: Arc::new(publisher.clone()),
        subscriber: Arc::new(subscriber.clone()),
        admin: Arc::new(admin.clone()),
        bodies: ByteBudget::new(limits.http_bodies_bytes_max),
        body_bytes_max: frame_bytes_max,
    });
    let mut services = Routes::builder();
    services
        .add_service(
            PublisherServer::new(publisher)
                .max_decoding_message_size(frame_bytes_max)
                .max_encoding_message_size(frame_bytes_max),
        )
        .add_service(
            SubscriberServer::new(subscriber)
                .max_decoding_message_size(limits.settle_frame_bytes_max())
                .max_encoding_message_size(frame_bytes_max),
        )
        .add_service(
            DiscoveryServer::new(DiscoveryService(shared.clone()))
                .max_decoding_message_size(REQUEST_BYTES_MAX),
        )
        .add_service(AdminServer::new(admin).max_decoding_message_size(REQUEST_BYTES_MAX))
        .add_service(
            SegmentsServer::new(SegmentsService(shared.clone()))
                .max_decoding_message_size(limits.settle_frame_bytes_max()),
        )
        .add_service(health_service)
        .add_service(reflection);
    let paths = services.routes().into_axum_router().merge(gateway);
    let router = Server::builder()
        .accept_http1(true) // curl and webhooks
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_concurrent_streams(streams_max.saturating_add(SPARE_STREAMS))
        .http2_keepalive_interval(Some(limits.keepalive_interval))
        .http2_keepalive_timeout(Some(limits.keepalive_timeout))
        .http2_max_header_list_size(HEADERS_BYTES_MAX)
        .layer(TypedErrors)
        .add_routes(Routes::from(paths.fallback(geminga_gateway::unknown)));
    Ok((health, router))
}
