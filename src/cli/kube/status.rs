//! `geminga kube status`: clusters with what is under way in them, and everything that is not Ready.

mod facts;
mod view;

use std::time::Duration;

use geminga_runtime::units::Period;
use tokio::time::{Instant, sleep};

use self::facts::State;
pub(super) use self::view::drain_words;
use super::Access;
use crate::cli::{
    exit::{Code, Failure},
    output::{self, Format},
};

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);

const AFTER_HELP: &str = "\
Exit codes: 0 everything is Ready, 7 something is not, 3 there is no such cluster, 4 Kubernetes refused, 5 no answer";

#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct StatusArgs {
    /// Only this GemingaCluster, with its pools and what is on it.
    name: Option<String>,
    /// Wait until everything is Ready.
    #[arg(long)]
    wait_ready: bool,
    /// With --wait-ready: how long.
    #[arg(long, default_value = "5m", value_name = "TIME", requires = "wait_ready")]
    timeout: Period,
}

pub(super) async fn run(args: &StatusArgs, access: &Access, format: Format) -> Result<(), Failure> {
    let deadline = Instant::now() + args.timeout.0;
    let mut told = String::new();
    let state = loop {
        let state = State::read(access, args.name.as_deref()).await;
        if !args.wait_ready || Instant::now() + LOOK_EVERY >= deadline {
            break state?;
        }
        let words = match state {
            Ok(state) => match state.first_trouble() {
                None => break state,
                Some(trouble) => trouble,
            },
            // What is not there may come; a refusal stays one.
            Err(failure) if failure.code == Code::Refused || failure.code == Code::Usage => {
                return Err(failure);
            }
            Err(failure) => failure.message,
        };
        if words != told {
            output::note(&words);
            told = words;
        }
        sleep(LOOK_EVERY).await;
    };
    match format {
        Format::Table => view::print(&state)?,
        Format::Json | Format::Yaml => output::document(format, &state)?,
    }
    match state.first_trouble() {
        None => Ok(()),
        Some(trouble) => {
            let words = if args.wait_ready {
                format!("not Ready within {}: {trouble}", args.timeout)
            } else {
                format!("not Ready: {trouble}")
            };
            Err(Failure::new(Code::NotReady, words, state.next(&access.flags())))
        }
    }
}
