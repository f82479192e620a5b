//! `geminga bookie`: keeps ledgers on its disk, and takes part in copying those that lack copies.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use geminga_bookie::{
    AutoRecoveryMetrics, Bookie, BookieConfig, BookieMetrics, BookieParts, StartError,
    auto_recovery::{AutoRecoveryConfig, AutoRecoveryParts},
};
use geminga_bookie_client::{
    ClientMetrics, LedgerClient, LedgerClientConfig, LedgerClientParts, RpcMetrics,
    bookie_rpc::serve::{ServeConfig, serve},
};
use geminga_metadata::{Cluster, Standing};
use geminga_runtime::{disk::RealDisk, io::Io};
use tokio::net::TcpListener;

use super::{Missing, Process, cannot_listen, member_id, quorum, remote_bookies};
use crate::{
    cli::{
        Global,
        exit::{Code, Failure},
    },
    settings::{Effective, SettingsError},
};

/// Runs until a signal, or until it cannot do its work any more.
pub(crate) async fn run(settings: Effective, global: &Global) -> Result<(), Failure> {
    let id = member_id(&settings, "bookie.id")?;
    let grace = settings.millis("bookie.drain_grace_ms")?;
    let mut process = Process::start("bookie", &id, settings, "bookie.health_listen").await?;
    let Some(cluster) = process.cluster().await? else { return Ok(()) };

    let listen = process.settings.parse::<SocketAddr>("bookie.listen")?;
    let listener = TcpListener::bind(listen)
        .await
        .map_err(|error| cannot_listen(&process.settings, "bookie.listen", &error))?;
    let address = listener.local_addr()?;
    let config = bookie_config(&process.settings, &id, address)?;
    let metrics = process.registry.with(BookieMetrics::register);
    let started = process
        .wait_for("registration", async |process| {
            let parts = parts(process, config.clone(), metrics.clone())?;
            Bookie::start(parts).await.map_err(missing)
        })
        .await?;
    let Some(bookie) = started else { return Ok(()) };
    let connections = process.tasks.child("connections");
    let (served, owner) = (Arc::new(bookie.clone()), connections.clone());
    let metrics = process.registry.with(|registry| RpcMetrics::register(registry, "server"));
    let config = ServeConfig::new(&cluster.id);
    connections.spawn("bookie listener", async move {
        serve(listener, served, config, metrics, &owner, owner.token()).await;
    });
    if process.settings.parse("bookie.auto_recovery")? {
        start_auto_recovery(&process, &cluster, &bookie, &id)?;
    }
    process.say_ready("bookie", &id, address, global.output)?;

    let failure = tokio::select! {
        biased;
        () = process.signalled() => None,
        failure = bookie.failed() => Some(failure),
    };
    let stop = async {
        if tokio::time::timeout(grace, bookie.stop()).await.is_err() {
            tracing::warn!("not everything was finished within the grace");
        }
    };
    process.drain(stop).await;
    match failure {
        None => Ok(()),
        // DC1: it was asked for, and its volume may go.
        Some(why) if bookie.is_decommissioned() => {
            tracing::info!(why, "decommissioned");
            Ok(())
        }
        Some(failure) => Err(Failure::new(Code::Failed, failure, "geminga bookie ls")),
    }
}

fn parts(
    process: &Process,
    config: BookieConfig,
    metrics: BookieMetrics,
) -> Result<BookieParts, Missing> {
    let directory = PathBuf::from(process.settings.text("bookie.data_dir").unwrap_or("."));
    let disk = RealDisk::open(&directory).map_err(|error| {
        Missing::Never(Failure::new(
            Code::Failed,
            format!("the data directory {} cannot be used: {error}", directory.display()),
            "geminga bookie --bookie-data-dir OTHER-DIRECTORY",
        ))
    })?;
    Ok(BookieParts {
        disk: Arc::new(disk),
        journal_io: Io::thread("journal"),
        read_io: Io::thread("read"),
        store: process.store.clone(),
        clock: process.clock.clone(),
        random: process.random.fork(),
        config,
        metrics,
        crash_points: geminga_bookie::crash_points::CrashPoints::default(),
    })
}

fn missing(error: StartError) -> Missing {
    match error {
        StartError::Store(why) => Missing::NotYet(why),
        error => Missing::Never(Failure::new(
            Code::Refused,
            format!("the bookie did not start: {}", crate::standalone::with_causes(&error)),
            "geminga bookie ls",
        )),
    }
}

fn bookie_config(
    settings: &Effective,
    id: &str,
    address: SocketAddr,
) -> Result<BookieConfig, SettingsError> {
    Ok(BookieConfig {
        id: id.to_owned(),
        address: settings
            .text("bookie.advertise")
            .map_or_else(|| address.to_string(), ToOwned::to_owned),
        zone: settings.text("bookie.zone").unwrap_or_default().to_owned(),
        lease_ttl: settings.millis("metadata.lease_ttl_ms")?,
        take_new_incarnation: settings.parse("bookie.take_new_incarnation")?,
        ..BookieConfig::default()
    })
}

fn start_auto_recovery(
    process: &Process,
    cluster: &Cluster,
    bookie: &Bookie,
    id: &str,
) -> Result<(), Failure> {
    let tasks = process.tasks.child("auto-recovery");
    let bookies = remote_bookies(process, cluster, &tasks);
    let client = LedgerClient::new(LedgerClientParts {
        store: process.store.clone(),
        bookies: bookies.clone(),
        clock: process.clock.clone(),
        random: process.random.fork(),
        tasks: tasks.child("ledgers"),
        config: LedgerClientConfig::default(),
        metrics: process.registry.with(ClientMetrics::register),
        standing: Standing::always(),
    });
    let scan = process.settings.millis("bookie.scan_ms")?;
    let config = AutoRecoveryConfig {
        ensemble_size: quorum(&process.settings)?.ensemble(),
        lost_after: process.settings.millis("bookie.lost_after_ms")?,
        scan_interval: scan,
        proof_apart: scan,
        bytes_per_second: process.settings.parse("bookie.copy_bytes_per_second")?,
        ..AutoRecoveryConfig::default()
    };
    AutoRecoveryParts {
        store: process.store.clone(),
        client,
        bookies,
        clock: process.clock.clone(),
        random: process.random.fork(),
        tasks,
        keeper: bookie.lease().clone(),
        bookie_id: id.to_owned(),
        instance: process.random.uuid(),
        config,
        metrics: process.registry.with(AutoRecoveryMetrics::register),
    }
    .start();
    Ok(())
}
