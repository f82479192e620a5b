//! The roles of a cluster as processes: what a broker and a bookie have in common.
//!
//! Order of a start: health endpoint (alive, not ready), metadata store (waited for), the role itself, ready. A process
//! starts in any order with the others and waits for what is missing, saying for what. On SIGTERM or SIGINT it is not ready
//! any more, drains within its grace, and ends; a second signal ends it at once.

pub(crate) mod bookie;
pub(crate) mod broker;
pub(crate) mod operator;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use geminga_bookie_client::{
    Quorum, RpcMetrics,
    bookie_rpc::{
        SharedBookies,
        directory::Directory,
        remote::{RemoteBookies, RemoteConfig},
    },
};
use geminga_metadata::{
    BUNDLES, Cluster, ClusterError, EtcdConfig, EtcdStore, EtcdTls, MetadataMetrics, MeteredStore,
    Secret, SharedStore, StoreError, ensure_cluster,
};
use geminga_runtime::{
    clock::{SharedClock, SystemClock},
    random::Random,
    tasks::Tasks,
    telemetry::{MetricsRegistry, SpanExport, init_spans, serve_health},
};
use prometheus_client::metrics::{family::Family, gauge::Gauge};
use serde_json::json;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
    time::{Instant, sleep},
};

use crate::{
    cli::{
        exit::{Code, Failure},
        output::{self, Format},
    },
    settings::{Effective, SettingsError},
};

/// What a process that waits says so once in this time.
const WAIT_NOTE: Duration = Duration::from_secs(5);
/// Pause between two tries to reach what is missing.
const WAIT_PAUSE: Duration = Duration::from_millis(500);
/// Time for the process's own tasks to end after the role has.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// What every role's process has.
pub(crate) struct Process {
    pub(crate) settings: Effective,
    pub(crate) tasks: Tasks,
    pub(crate) registry: MetricsRegistry,
    pub(crate) clock: SharedClock,
    pub(crate) random: Random,
    pub(crate) store: SharedStore,
    waiting: Family<[(&'static str, &'static str); 1], Gauge>,
    ready: watch::Sender<bool>,
    health: SocketAddr,
    terminate: Signal,
    interrupt: Signal,
}

impl Process {
    /// Health endpoint and metadata store; nothing of them is waited for.
    pub(crate) async fn start(
        name: &'static str,
        instance: &str,
        settings: Effective,
        health_key: &'static str,
    ) -> Result<Self, Failure> {
        let (terminate, interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        if let Some(endpoint) = settings.text("telemetry.otlp_endpoint") {
            let export = SpanExport {
                endpoint: endpoint.to_owned(),
                service: if name == "broker" { "geminga-broker" } else { "geminga-bookie" },
                instance: instance.to_owned(),
                ratio: settings.parse("telemetry.sample_ratio")?,
            };
            init_spans(export)
                .map_err(|error| settings.invalid("telemetry.otlp_endpoint", error))?;
        }
        let tasks = Tasks::new(name);
        let registry = MetricsRegistry::new();
        let waiting: Family<[(&'static str, &'static str); 1], Gauge> = Family::default();
        registry.with(|registry| {
            let help = "1 while the process waits for this part before it can serve";
            registry.register("geminga_process_waiting", help, waiting.clone());
        });
        let store = EtcdStore::connect(etcd_config(&settings)?)
            .await
            .map_err(|error| Failure::new(Code::Usage, error.to_string(), "geminga config show"))?;
        let metrics = registry.with(MetadataMetrics::register);
        let (ready, is_ready) = watch::channel(false);
        let listen = settings.parse::<SocketAddr>(health_key)?;
        let health = serve_health(listen, registry.clone(), is_ready, &tasks)
            .await
            .map_err(|error| cannot_listen(&settings, health_key, &error))?;
        Ok(Self {
            store: Arc::new(MeteredStore::new(Arc::new(store), metrics)),
            settings,
            tasks,
            registry,
            clock: Arc::new(SystemClock),
            random: Random::from_os(),
            waiting,
            ready,
            health,
            terminate,
            interrupt,
        })
    }

    /// Repeats `attempt` while it says what is missing; says so in the log and in a metric. None: a signal came first.
    pub(crate) async fn wait_for<T>(
        &mut self,
        what: &'static str,
        mut attempt: impl AsyncFnMut(&Self) -> Result<T, Missing>,
    ) -> Result<Option<T>, Failure> {
        let gauge = self.waiting.get_or_create(&[("for", what)]).clone();
        let mut said: Option<Instant> = None;
        loop {
            let outcome = attempt(self).await;
            match outcome {
                Ok(found) => {
                    if said.is_some() {
                        tracing::info!(what, "found");
                    }
                    gauge.set(0);
                    return Ok(Some(found));
                }
                Err(Missing::NotYet(why)) => {
                    gauge.set(1);
                    if said.is_none_or(|at| at.elapsed() >= WAIT_NOTE) {
                        tracing::warn!(what, why, "waiting");
                        said = Some(Instant::now());
                    }
                }
                Err(Missing::Never(failure)) => return Err(failure),
            }
            tokio::select! {
                biased;
                () = self.signalled() => return Ok(None),
                () = sleep(WAIT_PAUSE) => {}
            }
        }
    }

    /// The cluster's record; made if nobody has. Waits for the metadata store.
    pub(crate) async fn cluster(&mut self) -> Result<Option<Cluster>, Failure> {
        self.wait_for("metadata", async |process| {
            ensure_cluster(&process.store, &process.random, process.clock.now(), BUNDLES)
                .await
                .map_err(|error| match error {
                    ClusterError::Store(
                        error @ (StoreError::Unavailable(_) | StoreError::Unknown(_)),
                    ) => Missing::NotYet(error.to_string()),
                    error => Missing::Never(Failure::failed(error.to_string())),
                })
        })
        .await
    }

    /// Says that it serves, on standard output and at the health endpoint.
    pub(crate) fn say_ready(
        &self,
        role: &str,
        id: &str,
        listen: SocketAddr,
        format: Format,
    ) -> Result<(), Failure> {
        self.ready.send_replace(true);
        let (listen, health) = (listen.to_string(), self.health.to_string());
        let line = match format {
            Format::Table => format!("{role} {id} is ready on {listen}"),
            Format::Json | Format::Yaml => {
                json!({"ready": true, "role": role, "id": id, "listen": listen, "health": health})
                    .to_string()
            }
        };
        Ok(output::line(&line)?)
    }

    /// Ready, or not: what a load balancer may send here.
    pub(crate) fn set_ready(&self, ready: bool) {
        self.ready.send_replace(ready);
    }

    /// Resolves when a signal asks the process to end.
    pub(crate) async fn signalled(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    /// Drains with `drain`; a second signal ends it at once.
    pub(crate) async fn drain(mut self, drain: impl Future<Output = ()>) {
        self.ready.send_replace(false);
        tracing::info!("draining: a second signal ends at once");
        tokio::select! {
            biased;
            () = drain => {}
            () = self.signalled() => return,
        }
        self.tasks.shutdown(STOP_GRACE).await;
    }
}

/// Why an attempt of [`Process::wait_for`] gave nothing.
pub(crate) enum Missing {
    /// It may come: for what.
    NotYet(String),
    /// Waiting does not help.
    Never(Failure),
}

/// Quorums of new ledgers.
pub(crate) fn quorum(settings: &Effective) -> Result<Quorum, SettingsError> {
    let (ensemble, write, ack) = (
        settings.parse("ledger.ensemble")?,
        settings.parse("ledger.write_quorum")?,
        settings.parse("ledger.ack_quorum")?,
    );
    if ack < 2 {
        return Err(settings.invalid(
            "ledger.ack_quorum",
            "a receipt of a cluster means at least 2 synced copies",
        ));
    }
    Quorum::new(ensemble, write, ack)
        .map_err(|error| settings.invalid("ledger.ensemble", error.to_string()))
}

/// The process's name in the cluster: as configured, else the host's.
pub(crate) fn member_id(settings: &Effective, key: &'static str) -> Result<String, SettingsError> {
    let id = match settings.text(key) {
        Some(id) => id.to_owned(),
        None => rustix::system::uname().nodename().to_string_lossy().into_owned(),
    };
    let sound = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '~' | '-');
    if id.is_empty() || id.len() > 200 || !id.chars().all(sound) {
        return Err(
            settings.invalid(key, format!("{id:?}: 1 to 200 characters of A-Z a-z 0-9 . _ ~ -"))
        );
    }
    Ok(id)
}

/// The failure of a listener, with the flag that gives it another address.
pub(crate) fn cannot_listen(
    settings: &Effective,
    key: &'static str,
    error: &std::io::Error,
) -> Failure {
    let address = settings.text(key).unwrap_or_default();
    let flag = key.replace(['.', '_'], "-");
    Failure::new(
        Code::Failed,
        format!("cannot listen on {address}: {error}"),
        format!("the same command with --{flag} 127.0.0.1:0"),
    )
}

fn etcd_config(settings: &Effective) -> Result<EtcdConfig, Failure> {
    let endpoints: Vec<String> = settings
        .text("metadata.endpoints")
        .unwrap_or_default()
        .split(',')
        .map(|endpoint| endpoint.trim().to_owned())
        .filter(|endpoint| !endpoint.is_empty())
        .collect();
    if endpoints.is_empty() {
        return Err(settings.invalid("metadata.endpoints", "at least one URL is needed").into());
    }
    let path = |key| settings.text(key).map(PathBuf::from);
    let mut config = EtcdConfig::new(endpoints, settings.text("metadata.prefix").unwrap_or("/"));
    config.first = std::process::id() as usize;
    if let Some(user) = settings.text("metadata.user") {
        let password = match settings.text("metadata.password_file") {
            None => String::new(),
            Some(file) => std::fs::read_to_string(file)
                .map_err(|error| settings.invalid("metadata.password_file", error.to_string()))?,
        };
        config.user = Some((user.to_owned(), Secret::new(password.trim_end())));
    }
    if let Some(ca_file) = path("metadata.ca_file") {
        let client = path("metadata.cert_file").zip(path("metadata.key_file"));
        config.tls = Some(EtcdTls { ca_file, client, domain: None });
    }
    Ok(config)
}

/// The bookies of the cluster over the network.
fn remote_bookies(process: &Process, cluster: &Cluster, tasks: &Tasks) -> SharedBookies {
    Arc::new(RemoteBookies::new(
        RemoteConfig::new(&cluster.id),
        Directory::start(process.store.clone(), tasks),
        process.random.fork(),
        tasks.child("bookie connections"),
        process.registry.with(|registry| RpcMetrics::register(registry, "client")),
    ))
}
