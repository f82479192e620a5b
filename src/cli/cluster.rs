//! `geminga broker|bookie|cluster|ledger`: the roles, and what an operator asks about them.

use std::time::Duration;

use clap::Subcommand;
use geminga_client::{Client, Retry, topic_name};
use geminga_proto::admin::v1 as pb;
use geminga_runtime::telemetry::{LogFormat, init_logging};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::{
    Global, check,
    exit::{Code, Failure},
    output,
};
use crate::{
    roles,
    settings::{BookieFlags, BrokerFlags, Effective, Flags, OperatorFlags, Reader},
};

#[derive(Debug, clap::Args)]
pub(crate) struct BrokerArgs {
    #[command(subcommand)]
    command: Option<BrokerCommand>,
    #[command(flatten)]
    flags: BrokerFlags,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BrokerCommand {
    /// List the registered brokers.
    #[command(alias = "list")]
    Ls,
    /// Have a broker give its topics to the others, without an error at any client.
    Drain {
        id: String,
        /// Take the wish back: it gets its share again.
        #[arg(long)]
        cancel: bool,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct BookieArgs {
    #[command(subcommand)]
    command: Option<BookieCommand>,
    #[command(flatten)]
    flags: BookieFlags,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BookieCommand {
    /// List every bookie that has ever joined and was not removed.
    #[command(alias = "list")]
    Ls,
    /// Move a bookie's ledgers away for good; shows how far that is. Its volume may go when it is proven that no ledger
    /// names it any more.
    Drain {
        id: String,
        /// Take the wish back.
        #[arg(long)]
        cancel: bool,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct OperatorArgs {
    #[command(flatten)]
    flags: OperatorFlags,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ClusterCommand {
    /// Show the cluster in figures.
    Status,
    /// Wait until so many members are there.
    Wait {
        /// Registered brokers.
        #[arg(long, default_value_t = 1)]
        brokers: u32,
        /// Bookies that take entries.
        #[arg(long, default_value_t = 3)]
        bookies: u32,
        /// How long to wait, seconds.
        #[arg(long, default_value_t = 60, value_name = "SECONDS")]
        timeout: u64,
    },
    /// Publish, consume and accept messages through the server, and say how long each step took.
    Check(check::CheckArgs),
}

#[derive(Debug, Subcommand)]
pub(crate) enum LedgerCommand {
    /// List ledgers.
    #[command(alias = "list")]
    Ls {
        /// Only those of a topic.
        #[arg(long)]
        topic: Option<String>,
        /// Only those that lack copies.
        #[arg(long)]
        under_replicated: bool,
    },
    /// Show one ledger with its fragments and the bookies that hold them.
    Describe { id: u64 },
}

fn settings(role: Reader, flags: &Flags) -> Result<Effective, Failure> {
    let settings = Effective::load(role, flags, |name| std::env::var(name).ok())?;
    let format = match settings.text("log.format") {
        Some("json") => LogFormat::Json,
        Some("pretty") => LogFormat::Pretty,
        _ => return Err(settings.invalid("log.format", "expected pretty or json").into()),
    };
    init_logging(format, settings.text("log.level").unwrap_or("info"));
    Ok(settings)
}

pub(crate) async fn broker(args: BrokerArgs, global: &Global) -> Result<(), Failure> {
    let Some(command) = args.command else {
        let settings = settings(Reader::Broker, &args.flags.0)?;
        return Box::pin(roles::broker::run(settings, global)).await;
    };
    let admin = global.client().await?.admin();
    match command {
        BrokerCommand::Ls => {
            let rows: Vec<Value> = admin.brokers().await?.iter().map(broker_row).collect();
            let columns = ["id", "address", "bundles", "draining", "started_at", "version"];
            output::list(global.output, &columns, &rows)?;
        }
        BrokerCommand::Drain { id, cancel } => {
            let bundles_left = admin.drain_broker(&id, cancel).await?;
            let row = json!({"id": id, "draining": !cancel, "bundles_left": bundles_left});
            output::object(global.output, &row)?;
        }
    }
    Ok(())
}

pub(crate) async fn bookie(args: BookieArgs, global: &Global) -> Result<(), Failure> {
    let Some(command) = args.command else {
        let settings = settings(Reader::Bookie, &args.flags.0)?;
        return Box::pin(roles::bookie::run(settings, global)).await;
    };
    let admin = global.client().await?.admin();
    match command {
        BookieCommand::Ls => {
            let rows: Vec<Value> = admin.bookies().await?.iter().map(bookie_row).collect();
            let columns =
                ["id", "incarnation", "state", "address", "zone", "disk_free_bytes", "drain"];
            output::list(global.output, &columns, &rows)?;
        }
        BookieCommand::Drain { id, cancel } => {
            let bookie = admin.drain_bookie(&id, cancel).await?;
            output::object(global.output, &bookie_row(&bookie))?;
        }
    }
    Ok(())
}

pub(crate) async fn operator(args: OperatorArgs, global: &Global) -> Result<(), Failure> {
    let settings = settings(Reader::Operator, &args.flags.0)?;
    Box::pin(roles::operator::run(settings, global)).await
}

pub(crate) async fn cluster(command: ClusterCommand, global: &Global) -> Result<(), Failure> {
    let status = match command {
        ClusterCommand::Status => global.client().await?.admin().cluster().await?,
        ClusterCommand::Wait { brokers, bookies, timeout } => {
            wait(brokers, bookies, Duration::from_secs(timeout), global).await?
        }
        ClusterCommand::Check(args) => return Box::pin(check::run(args, global)).await,
    };
    Ok(output::object(global.output, &cluster_row(&status))?)
}

/// Asks until so many members are there.
async fn wait(
    brokers: u32,
    bookies: u32,
    patience: Duration,
    global: &Global,
) -> Result<pb::Cluster, Failure> {
    let deadline = Instant::now() + patience;
    let builder = Client::builder().server(global.server()?).wait_for_server(patience);
    let admin = builder.build().await?.admin();
    loop {
        let last = match admin.cluster().await {
            Ok(status) if status.brokers >= brokers && status.bookies_writable >= bookies => {
                return Ok(status);
            }
            Ok(status) => format!(
                "{} of {brokers} brokers and {} of {bookies} writable bookies are there",
                status.brokers, status.bookies_writable
            ),
            Err(error) if error.retry() == Retry::Never => return Err(error.into()),
            Err(error) => error.to_string(),
        };
        if Instant::now() >= deadline {
            return Err(Failure::new(Code::Unavailable, last, "geminga bookie ls"));
        }
        sleep(Duration::from_millis(200)).await;
    }
}

fn cluster_row(cluster: &pb::Cluster) -> Value {
    json!({
        "id": cluster.id,
        "generation": cluster.generation,
        "confirmed": cluster.confirmed,
        "feature_level": cluster.feature_level,
        "brokers": cluster.brokers,
        "bundles": cluster.bundles,
        "bundles_claimed": cluster.bundles_claimed,
        "bookies": cluster.bookies,
        "bookies_writable": cluster.bookies_writable,
        "ledgers_under_replicated": cluster.ledgers_under_replicated,
        "incarnations_lost": cluster.incarnations_lost,
        "revision": cluster.revision,
    })
}

pub(crate) async fn ledger(command: LedgerCommand, global: &Global) -> Result<(), Failure> {
    let admin = global.client().await?.admin();
    match command {
        LedgerCommand::Ls { topic, under_replicated } => {
            let topic = topic.as_deref().map(topic_name).transpose()?;
            let found = admin.ledgers(topic.as_ref(), under_replicated).await?;
            let rows: Vec<Value> = found.iter().map(ledger_row).collect();
            let columns = [
                "id",
                "state",
                "topic_id",
                "segment",
                "last_entry",
                "length_bytes",
                "copies",
                "under_replicated",
            ];
            output::list(global.output, &columns, &rows)?;
        }
        LedgerCommand::Describe { id } => {
            let ledger = admin.ledger(id).await?;
            let mut row = ledger_row(&ledger);
            row["fragments"] = ledger.fragments.iter().map(fragment_row).collect();
            output::object(global.output, &row)?;
        }
    }
    Ok(())
}

fn broker_row(broker: &pb::Broker) -> Value {
    json!({
        "id": broker.id,
        "address": broker.address,
        "bundles": broker.bundles,
        "draining": broker.draining,
        "started_at": output::time(broker.started_at_ms),
        "version": broker.version,
    })
}

fn bookie_row(bookie: &pb::Bookie) -> Value {
    let state = match bookie {
        pb::Bookie { drain: Some(drain), .. } if drain.proven => "drained",
        pb::Bookie { lost: true, .. } => "lost",
        pb::Bookie { registered: false, .. } => "down",
        pb::Bookie { draining: true, .. } => "draining",
        pb::Bookie { limbo: true, .. } => "limbo",
        pb::Bookie { writable: false, .. } => "read-only",
        _ => "writable",
    };
    let drain = bookie.drain.as_ref().map(|drain| {
        json!({
            "bytes_total": drain.bytes_total,
            "bytes_left": drain.bytes_left,
            "ledgers_left": drain.ledgers_left,
            "blocked": drain.blocked,
            "proven": drain.proven,
        })
    });
    json!({
        "id": bookie.id,
        "incarnation": bookie.incarnation,
        "state": state,
        "address": bookie.address,
        "zone": bookie.zone,
        "disk_free_bytes": bookie.disk_free_bytes,
        "disk_total_bytes": bookie.disk_total_bytes,
        "version": bookie.version,
        "drain": drain,
    })
}

fn ledger_row(ledger: &pb::Ledger) -> Value {
    json!({
        "id": ledger.id,
        "state": ledger.state,
        "topic_id": ledger.topic_id,
        "segment": ledger.segment,
        "epoch": ledger.epoch,
        "last_entry": ledger.last_entry,
        "length_bytes": ledger.length_bytes,
        "copies": format!("{}/{}/{}", ledger.ensemble_size, ledger.write_quorum, ledger.ack_quorum),
        "under_replicated": ledger.under_replicated,
    })
}

fn fragment_row(fragment: &pb::ledger::Fragment) -> Value {
    let slots: Vec<String> = fragment
        .slots
        .iter()
        .map(|slot| match (slot.incarnation, slot.bookie.as_str()) {
            (0, _) => "vacant".to_owned(),
            (incarnation, "") => format!("#{incarnation}"),
            (incarnation, bookie) => format!("{bookie}#{incarnation}"),
        })
        .collect();
    json!({"first_entry": fragment.first_entry, "slots": slots.join(" ")})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_of_a_bookie_is_the_worst_that_is_known() {
        let sound = pb::Bookie { registered: true, writable: true, ..pb::Bookie::default() };
        let state = |bookie: pb::Bookie| bookie_row(&bookie)["state"].clone();
        assert_eq!(state(sound.clone()), "writable");
        assert_eq!(state(pb::Bookie { writable: false, ..sound.clone() }), "read-only");
        assert_eq!(state(pb::Bookie { registered: false, ..sound.clone() }), "down");
        let drain = pb::bookie::Drain { proven: true, ..Default::default() };
        assert_eq!(
            state(pb::Bookie { registered: false, lost: true, drain: Some(drain), ..sound }),
            "drained"
        );
    }
}
