//! The operator as a whole: waits for the lease, runs the controllers while it holds it, and again.

use std::time::Duration;

use geminga_runtime::{clock::SharedClock, random::Random, tasks::Tasks};
use kube::{
    Client,
    runtime::events::{Recorder, Reporter},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    controllers::{
        self,
        context::{Address, Context, Turns},
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

/// Time for turns that are under way to end, when the lease is lost or the process stops; at most a third of the lease's
/// length.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// The controllers of a leader.
struct Leading {
    tasks: Tasks,
    /// The beginning of the last attempt that renewed the lease: it is at least this young.
    renewed: Instant,
}

/// Runs until `stop`. Not cancel-safe: dropped, the controllers go on until `tasks` ends.
pub async fn run(parts: OperatorParts, stop: CancellationToken) {
    let OperatorConfig { id, lease_namespace, lease_name, lease_length, .. } = &parts.config;
    let lease =
        Lease::new(parts.client.clone(), lease_namespace, lease_name.clone(), *lease_length);
    let me = format!("{id}_{:016x}", parts.random.u64());
    let mut election = Election::new(me.clone());
    let pause = lease.length() / 5;
    let mut leading: Option<Leading> = None;
    let mut trouble = String::new();
    loop {
        let begun = Instant::now();
        let event = {
            let (expires, failed) = (expires(leading.as_ref(), &lease), failed(leading.as_ref()));
            let attempt = timeout(pause * 2, lease.attempt(&mut election, parts.clock.now()));
            // The lease runs out in whatever is under way, an attempt that hangs for one.
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = expires => Event::Lost("the lease could not be renewed in time"),
                () = failed => Event::Lost("a controller failed"),
                outcome = attempt => match outcome {
                    Ok(Ok(true)) => Event::Held,
                    Ok(Ok(false)) => Event::Another,
                    Ok(Err(error)) => Event::Unknown(error.to_string()),
                    Err(_) => Event::Unknown("it does not answer".into()),
                },
            }
        };
        match event {
            Event::Held => {
                parts.ready.send_replace(true);
                trouble.clear();
                match &mut leading {
                    Some(leading) => leading.renewed = begun,
                    None => leading = Some(Leading { tasks: begin(&parts, &me), renewed: begun }),
                }
            }
            Event::Another => {
                parts.ready.send_replace(true);
                trouble.clear();
                end(&parts, &lease, &mut leading, "another operator has the lease").await;
            }
            Event::Lost(why) => end(&parts, &lease, &mut leading, why).await,
            Event::Unknown(why) => {
                if why != trouble {
                    tracing::warn!(error = why, "the lease cannot be asked for or renewed");
                }
                trouble = why;
            }
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            () = expires(leading.as_ref(), &lease) => {} // the next round says so
            () = sleep(pause) => {}
        }
    }
    if leading.is_some() {
        end(&parts, &lease, &mut leading, "the operator stops").await;
        if let Err(error) = lease.release(&election, parts.clock.now()).await {
            tracing::warn!(%error, "the lease is not given back and runs out");
        }
    }
}

/// What a round of the election gave.
enum Event {
    /// The lease is ours.
    Held,
    /// Another operator has it.
    Another,
    /// We must not go on: why.
    Lost(&'static str),
    /// Nobody can tell; the last word holds until it runs out.
    Unknown(String),
}

/// Resolves when a leader must have stopped, which leaves it the rest of the lease to stop in.
async fn expires(leading: Option<&Leading>, lease: &Lease) {
    match leading {
        Some(leading) => sleep_until(leading.renewed + holds_for(lease.length())).await,
        None => std::future::pending().await,
    }
}

async fn failed(leading: Option<&Leading>) {
    match leading {
        Some(leading) => drop(leading.tasks.failed().await),
        None => std::future::pending().await,
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
        random: parts.random.fork(),
        turns: Turns::default(),
        recorder: Recorder::new(parts.client.clone(), reporter),
        metrics: parts.metrics.clone(),
        resync: parts.config.resync,
    };
    controllers::start(context, parts.config.namespace.as_deref(), &tasks);
    parts.metrics.set_leader(true);
    tracing::info!(id = me, "leads");
    tasks
}

async fn end(
    parts: &OperatorParts,
    lease: &Lease,
    leading: &mut Option<Leading>,
    why: &'static str,
) {
    if let Some(Leading { tasks, .. }) = leading.take() {
        tracing::info!(why, "controllers end");
        // Half of what is left, so that what has to be aborted is gone in time, too.
        tasks.shutdown(STOP_GRACE.min((lease.length() - holds_for(lease.length())) / 2)).await;
        parts.metrics.set_leader(false);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    };

    use geminga_runtime::clock::SystemClock;
    use kube::client::Body;

    use super::*;
    use crate::server::Clients;

    /// A Kubernetes API that takes every lease, and answers nothing else; nothing at all once it is silent.
    fn api(silent: Arc<AtomicBool>) -> Client {
        let service = tower::service_fn(move |request: http::Request<Body>| {
            let silent = Arc::clone(&silent);
            async move {
                let lease = request.uri().path().contains("/leases");
                if silent.load(Ordering::SeqCst) || !lease {
                    std::future::pending::<()>().await;
                }
                let found = request.method() != http::Method::GET;
                let body = if found {
                    serde_json::json!({"metadata": {"name": "l"}, "spec": {}})
                } else {
                    serde_json::json!({
                        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                        "message": "none", "reason": "NotFound", "code": 404,
                    })
                };
                let status = if found { 201 } else { 404 };
                let body = Body::from(serde_json::to_vec(&body).expect("JSON"));
                Ok::<_, std::io::Error>(
                    http::Response::builder().status(status).body(body).expect("valid"),
                )
            }
        });
        Client::new(service, "default")
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_that_cannot_renew_has_stopped_before_its_lease_runs_out() {
        let silent = Arc::new(AtomicBool::new(false));
        let metrics = Metrics::default();
        let tasks = Tasks::new("test");
        let parts = OperatorParts {
            client: api(Arc::clone(&silent)),
            servers: Arc::new(Clients::new(Duration::from_secs(1), metrics.clone())),
            address: Arc::new(|_, name| name.to_owned()),
            clock: Arc::new(SystemClock),
            random: Random::from_seed(1),
            tasks: tasks.child("controllers"),
            metrics: metrics.clone(),
            ready: watch::channel(false).0,
            config: OperatorConfig {
                namespace: Some("default".into()),
                id: "one".into(),
                lease_namespace: "default".into(),
                lease_name: "l".into(),
                lease_length: Duration::from_secs(15),
                resync: Duration::from_secs(60),
            },
        };
        let length = parts.config.lease_length;
        tasks.spawn("operator", run(parts, CancellationToken::new()));
        while !metrics.leads() {
            sleep(Duration::from_millis(10)).await;
        }
        sleep(length * 4).await;
        assert!(metrics.leads(), "it is renewed");
        silent.store(true, Ordering::SeqCst);
        let last_renewal = Instant::now(); // at the latest
        while metrics.leads() {
            sleep(Duration::from_millis(10)).await;
        }
        let went_on = last_renewal.elapsed();
        assert!(went_on < length, "another one may begin after {length:?}, it went on {went_on:?}");
        tasks.abort();
    }
}
