//! The operator as a whole: waits for the lease, runs the controllers while it holds it, and again.

use std::time::Duration;

use geminga_runtime::{clock::SharedClock, random::Random, tasks::Tasks};
use kube::{
    Client,
    runtime::events::{Recorder, Reporter},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    controllers::{
        self,
        context::{Address, Context},
    },
    leader::{Election, Lease, holds_for},
    metrics::Metrics,
    server::SharedServers,
};

/// Settings of an operator.
#[derive(Clone, Debug)]
pub struct OperatorConfig {
    /// The namespace whose objects it works on; none: all.
    pub namespace: Option<String>,
    /// Its name; a random suffix makes it one of a kind.
    pub id: String,
    /// Where the Lease is.
    pub lease_namespace: String,
    /// The Lease's name.
    pub lease_name: String,
    /// Its length; another operator takes over after this much silence.
    pub lease_length: Duration,
    /// How often everything is compared with its spec, without any event.
    pub resync: Duration,
}

/// What an operator is made of.
#[derive(Clone)]
pub struct OperatorParts {
    /// The Kubernetes API.
    pub client: Client,
    /// The way to Geminga clusters.
    pub servers: SharedServers,
    /// Where a GemingaCluster's brokers are.
    pub address: Address,
    /// Wall time.
    pub clock: SharedClock,
    /// Chance.
    pub random: Random,
    /// Owner of the controllers' tasks.
    pub tasks: Tasks,
    /// Figures.
    pub metrics: Metrics,
    /// Set once the Kubernetes API has answered.
    pub ready: watch::Sender<bool>,
    /// Settings.
    pub config: OperatorConfig,
}

/// Time for turns that are under way to end, when the lease is lost or the process stops.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// Runs until `stop`. Not cancel-safe: dropped, the controllers go on until `tasks` ends.
pub async fn run(parts: OperatorParts, stop: CancellationToken) {
    let OperatorConfig { id, lease_namespace, lease_name, lease_length, .. } = &parts.config;
    let lease =
        Lease::new(parts.client.clone(), lease_namespace, lease_name.clone(), *lease_length);
    let me = format!("{id}_{:016x}", parts.random.u64());
    let mut election = Election::new(me.clone());
    let pause = lease.length() / 5;
    let mut leading: Option<(Tasks, Instant)> = None;
    loop {
        // An attempt that hangs must not outlive the time that a holder may go on.
        let attempt = timeout(pause * 2, lease.attempt(&mut election, parts.clock.now()));
        let now = Instant::now(); // from before the attempt: the lease is at least this young
        let outcome = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            outcome = attempt => outcome,
        };
        match outcome {
            Ok(Ok(true)) => {
                parts.ready.send_replace(true);
                match &mut leading {
                    Some((_, renewed)) => *renewed = now,
                    None => leading = Some((begin(&parts, &me), now)),
                }
            }
            Ok(Ok(false)) => {
                parts.ready.send_replace(true);
                end(&parts, &mut leading, "another operator has the lease").await;
            }
            Ok(Err(error)) => tracing::warn!(%error, "the lease cannot be renewed"),
            Err(_) => tracing::warn!("the Kubernetes API does not answer"),
        }
        if leading.as_ref().is_some_and(|(_, at)| at.elapsed() >= holds_for(lease.length())) {
            end(&parts, &mut leading, "the lease could not be renewed in time").await;
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            () = sleep(pause) => {}
        }
    }
    if leading.is_some() {
        end(&parts, &mut leading, "the operator stops").await;
        if let Err(error) = lease.release(&election, parts.clock.now()).await {
            tracing::warn!(%error, "the lease is not given back and runs out");
        }
    }
}

fn begin(parts: &OperatorParts, me: &str) -> Tasks {
    let tasks = parts.tasks.child("controllers");
    let reporter =
        Reporter { controller: "geminga-operator".into(), instance: Some(me.to_owned()) };
    let context = Context {
        client: parts.client.clone(),
        servers: parts.servers.clone(),
        address: parts.address.clone(),
        clock: parts.clock.clone(),
        recorder: Recorder::new(parts.client.clone(), reporter),
        metrics: parts.metrics.clone(),
        resync: parts.config.resync,
    };
    controllers::start(context, parts.config.namespace.as_deref(), &tasks);
    parts.metrics.set_leader(true);
    tracing::info!(id = me, "leads");
    tasks
}

async fn end(parts: &OperatorParts, leading: &mut Option<(Tasks, Instant)>, why: &'static str) {
    if let Some((tasks, _)) = leading.take() {
        tracing::info!(why, "controllers end");
        tasks.shutdown(STOP_GRACE).await;
        parts.metrics.set_leader(false);
    }
}
