//! `geminga broker`: owns topics under its lease, keeps nothing.

use std::{net::SocketAddr, time::Duration};

use geminga_bookie_client::{ClientMetrics, LedgerClient, LedgerClientConfig, LedgerClientParts};
use geminga_broker::{Broker, BrokerConfig, BrokerParts, StartError};
use geminga_managed_ledger::{
    ColdStorage, ColdStorageConfig, ManagedLedgerConfig, ManagedLedgerMetrics, ManagedLedgers,
    ManagedLedgersParts,
};
use geminga_metadata::{ClusterError, Standing, StoreError};

use super::{Missing, Process, cannot_listen, member_id, quorum, remote_bookies};
use crate::{
    cli::{
        Global,
        exit::{Code, Failure},
    },
    settings::{Effective, SettingsError},
};

/// How long a broker that stops serves on where no other one is there: the pod that replaces it takes a few seconds.
const SUCCESSOR_WAIT: Duration = Duration::from_secs(10);

/// Runs until a signal, or until it cannot do its work any more.
pub(crate) async fn run(settings: Effective, global: &Global) -> Result<(), Failure> {
    let config = broker_config(&settings)?;
    let grace = settings.millis("broker.drain_grace_ms")?;
    let mut segments = managed_ledger_config(&settings)?;
    let mut process =
        Process::start("broker", &config.id.clone(), settings, "broker.health_listen").await?;
    let Some(cluster) = process.cluster().await? else { return Ok(()) };
    segments.generation = cluster.generation;
    let cold = cold_storage(&process.settings, &cluster.id)?;
    let (standing_setter, standing) = Standing::new();

    let bookies = remote_bookies(&process, &cluster, &process.tasks);
    let client = LedgerClient::new(LedgerClientParts {
        store: process.store.clone(),
        bookies,
        clock: process.clock.clone(),
        random: process.random.fork(),
        tasks: process.tasks.child("ledgers"),
        config: LedgerClientConfig::default(),
        metrics: process.registry.with(ClientMetrics::register),
        standing,
    });
    let managed = ManagedLedgers::new(ManagedLedgersParts {
        client,
        store: process.store.clone(),
        clock: process.clock.clone(),
        random: process.random.fork(),
        tasks: process.tasks.child("segments"),
        config: segments,
        metrics: process.registry.with(ManagedLedgerMetrics::register),
        cold,
    });
    let parts = BrokerParts {
        store: process.store.clone(),
        managed,
        clock: process.clock.clone(),
        random: process.random.fork(),
        config,
        metrics: process.registry.with(geminga_broker::metrics::Metrics::register),
        standing: Some(standing_setter),
    };
    let started = process
        .wait_for("lease", async |process| {
            let started = Box::pin(Broker::start(parts.clone())).await;
            started.map_err(|error| missing(&process.settings, error))
        })
        .await?;
    let Some(broker) = started else { return Ok(()) };
    process.say_ready("broker", &parts.config.id, broker.address(), global.output)?;

    let mut ready = broker.ready();
    let failure = loop {
        tokio::select! {
            biased;
            () = process.signalled() => break None,
            failure = broker.failed() => break Some(failure.to_string()),
            Ok(()) = ready.changed() => process.set_ready(*ready.borrow_and_update()),
        }
    };
    process.drain(broker.shutdown(grace)).await;
    match failure {
        None => Ok(()),
        Some(failure) => Err(Failure::new(Code::Failed, failure, "geminga broker")),
    }
}

fn missing(settings: &Effective, error: StartError) -> Missing {
    match error {
        StartError::Cluster(ClusterError::Store(
            error @ (StoreError::Unavailable(_) | StoreError::Unknown(_)),
        )) => Missing::NotYet(error.to_string()),
        StartError::Lease => Missing::NotYet(StartError::Lease.to_string()),
        StartError::Listen { source, .. } => {
            Missing::Never(cannot_listen(settings, "broker.listen", &source))
        }
        error => Missing::Never(Failure::failed(crate::standalone::with_causes(&error))),
    }
}

fn broker_config(settings: &Effective) -> Result<BrokerConfig, SettingsError> {
    let listen = settings.parse::<SocketAddr>("broker.listen")?;
    let mut config = BrokerConfig::new(member_id(settings, "broker.id")?, listen);
    config.advertise = settings.text("broker.advertise").map(ToOwned::to_owned);
    config.successor_wait = SUCCESSOR_WAIT;
    config.lease_ttl = settings.millis("metadata.lease_ttl_ms")?;
    config.auto_create_topics = settings.parse("broker.auto_create_topics")?;
    Ok(config)
}

fn managed_ledger_config(settings: &Effective) -> Result<ManagedLedgerConfig, SettingsError> {
    Ok(ManagedLedgerConfig {
        quorum: quorum(settings)?,
        roll_bytes: settings.parse("ledger.roll_bytes")?,
        roll_age: settings.millis("ledger.roll_ms")?,
        ..ManagedLedgerConfig::default()
    })
}

fn cold_storage(settings: &Effective, cluster: &str) -> Result<Option<ColdStorage>, SettingsError> {
    let Some(url) = settings.text("tier.url") else { return Ok(None) };
    ColdStorage::from_url(url, cluster, ColdStorageConfig::default())
        .map(Some)
        .map_err(|error| settings.invalid("tier.url", error.to_string()))
}
