//! `geminga operator`: custom resources in, a cluster that matches them out. Keeps nothing.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use geminga_operator::{
    metrics::Metrics,
    operator::{OperatorConfig, OperatorParts, run as run_operator},
    server::Clients,
    workloads::broker_address,
};
use geminga_runtime::{
    clock::SystemClock,
    random::Random,
    tasks::Tasks,
    telemetry::{MetricsRegistry, serve_health},
};
use serde_json::json;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tokio_util::sync::CancellationToken;

use super::{STOP_GRACE, cannot_listen, member_id};
use crate::{
    cli::{
        Global,
        exit::{Code, Failure},
        output::{self, Format},
    },
    settings::{Effective, SettingsError},
};

/// How long a Geminga server may take to answer.
const SERVER_TIMEOUT: Duration = Duration::from_secs(10);
/// The shortest lease: the object counts in whole seconds.
const LEASE_MIN: Duration = Duration::from_secs(1);
/// The shortest time between two looks at everything.
const RESYNC_MIN: Duration = Duration::from_millis(100);

/// Runs until a signal. Several may run: one works, the others stand by.
pub(crate) async fn run(settings: Effective, global: &Global) -> Result<(), Failure> {
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let config = config(&settings)?;
    let id = config.id.clone();
    let registry = MetricsRegistry::new();
    let metrics = registry.with(Metrics::register);
    let client = geminga_operator::connect_counted(&metrics).await.map_err(|why| {
        Failure::new(
            Code::Usage,
            format!("there is no way to Kubernetes, neither in a pod nor by KUBECONFIG: {why}"),
            "KUBECONFIG=FILE geminga operator",
        )
    })?;
    let tasks = Tasks::new("operator");
    let (ready, is_ready) = watch::channel(false);
    let listen = settings.parse::<SocketAddr>("operator.health_listen")?;
    let health = serve_health(listen, registry.clone(), is_ready, &tasks)
        .await
        .map_err(|error| cannot_listen(&settings, "operator.health_listen", &error))?;
    let parts = OperatorParts {
        client,
        servers: Arc::new(Clients::new(SERVER_TIMEOUT, metrics.clone())),
        address: Arc::new(broker_address),
        clock: Arc::new(SystemClock),
        random: Random::from_os(),
        tasks: tasks.child("controllers"),
        metrics,
        ready,
        config,
    };
    let line = match global.output {
        Format::Table => format!("operator {id} runs, health on {health}"),
        Format::Json | Format::Yaml => {
            json!({"role": "operator", "id": id, "health": health.to_string()}).to_string()
        }
    };
    output::line(&line)?;
    let stop = CancellationToken::new();
    let mut running = std::pin::pin!(run_operator(parts, stop.clone()));
    tokio::select! {
        () = &mut running => {}
        _ = terminate.recv() => stop.cancel(),
        _ = interrupt.recv() => stop.cancel(),
    }
    if stop.is_cancelled() {
        tokio::select! {
            () = running => {}
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        }
    }
    tasks.shutdown(STOP_GRACE).await;
    Ok(())
}

fn config(settings: &Effective) -> Result<OperatorConfig, SettingsError> {
    let at_least = |key, least: Duration| {
        let value = settings.millis(key)?;
        if value < least {
            return Err(settings.invalid(key, format!("at least {} ms", least.as_millis())));
        }
        Ok(value)
    };
    let text = |key| settings.text(key).unwrap_or_default().to_owned();
    Ok(OperatorConfig {
        namespace: settings.text("operator.namespace").map(ToOwned::to_owned),
        id: member_id(settings, "operator.id")?,
        lease_namespace: text("operator.lease_namespace"),
        lease_name: text("operator.lease_name"),
        lease_length: at_least("operator.lease_ttl_ms", LEASE_MIN)?,
        resync: at_least("operator.resync_ms", RESYNC_MIN)?,
    })
}
