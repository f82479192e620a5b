//! `geminga standalone`: start, say that it is ready, run until a signal, drain.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::ValueEnum;
use geminga_runtime::telemetry::{LogFormat, init_logging};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::{
    Global,
    exit::{Code, Failure},
    output::{self, Format},
};
use crate::standalone::{BOOKIES_MAX, Settings, Standalone, StartError};

/// Time for streams to drain after a signal. A second signal ends the process at once.
const DRAIN: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub(crate) struct StandaloneArgs {
    /// Where everything is kept; made if it is missing.
    #[arg(long, env = "GEMINGA_DATA_DIR", default_value = "./geminga-data", value_name = "DIR")]
    data_dir: PathBuf,
    /// Bookies in this process: with 1 a receipt means one synced copy, with 3 two of three. Default: as many as the
    /// directory has, or 1.
    #[arg(long, env = "GEMINGA_BOOKIES", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(BOOKIES_MAX)))]
    bookies: Option<u32>,
    /// Where clients connect.
    #[arg(long, env = "GEMINGA_LISTEN", default_value = "127.0.0.1:8650", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// Where metrics and health are served.
    #[arg(
        long,
        env = "GEMINGA_HEALTH_LISTEN",
        default_value = "127.0.0.1:8651",
        value_name = "ADDRESS"
    )]
    health_listen: SocketAddr,
    /// Object storage for cold ledgers: s3://bucket/prefix, gs://, az:// or file:///dir; see geminga tier and geminga policy.
    #[arg(long, env = "GEMINGA_TIER_URL", value_name = "URL")]
    tier_url: Option<String>,
    /// How log lines look, on standard error.
    #[arg(long, env = "GEMINGA_LOG_FORMAT", value_enum, default_value_t = LogFormatArg::Pretty)]
    log_format: LogFormatArg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogFormatArg {
    Json,
    Pretty,
}

pub(crate) async fn run(args: StandaloneArgs, global: &Global) -> Result<(), Failure> {
    init_logging(
        match args.log_format {
            LogFormatArg::Json => LogFormat::Json,
            LogFormatArg::Pretty => LogFormat::Pretty,
        },
        "info",
    );
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let settings = Settings {
        data_dir: args.data_dir,
        bookies: args.bookies,
        listen: args.listen,
        health_listen: Some(args.health_listen),
        tier_url: args.tier_url,
    };
    let standalone = Standalone::start(settings).await?;
    say_ready(&standalone, global.output)?;
    let failure = tokio::select! {
        biased;
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        failure = standalone.failed() => Some(failure),
    };
    tracing::info!("stopping: streams drain, a second signal ends at once");
    tokio::select! {
        biased;
        () = standalone.shutdown(DRAIN) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    match failure {
        None => Ok(()),
        Some(failure) => Err(Failure::new(Code::Failed, failure, "geminga standalone")),
    }
}

fn say_ready(standalone: &Standalone, format: Format) -> Result<(), Failure> {
    let listen = standalone.address().to_string();
    let health = standalone.health().map(|address| address.to_string());
    let line = match format {
        Format::Table => format!("geminga is ready on {listen}"),
        Format::Json | Format::Yaml => {
            json!({"ready": true, "listen": listen, "health": health}).to_string()
        }
    };
    Ok(output::line(&line)?)
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        let (code, next) = match &error {
            StartError::InUse { .. } => {
                (Code::Refused, "geminga standalone --data-dir OTHER-DIRECTORY".to_owned())
            }
            StartError::FewerBookies { found, .. } => {
                (Code::Refused, format!("geminga standalone --bookies {found}"))
            }
            StartError::Broker(geminga_broker::StartError::Listen { .. }) => {
                (Code::Failed, "geminga standalone --listen 127.0.0.1:0".to_owned())
            }
            StartError::Cold(_) => {
                (Code::Usage, "geminga standalone --tier-url file:///DIRECTORY".to_owned())
            }
            StartError::Health { .. } => {
                (Code::Failed, "geminga standalone --health-listen 127.0.0.1:0".to_owned())
            }
            _ => (Code::Failed, "geminga standalone --help".to_owned()),
        };
        Self::new(code, error.to_string(), next)
    }
}
