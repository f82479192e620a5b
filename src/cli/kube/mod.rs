//! `geminga kube`: clusters on Kubernetes, with the user's own kubeconfig and rights. As `kubectl-geminga` on the PATH it
//! is `kubectl geminga`.

mod access;
mod archive;
mod drain;
mod forward;
mod plan;
mod plugin;
mod report;
mod status;

use clap::Subcommand;

use self::access::Access;
use super::{Global, exit::Failure};

pub(crate) use self::plugin::as_plugin;

const AFTER_HELP: &str = "\
As a kubectl plugin:  geminga kube plugin install
                      kubectl geminga status";

#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct KubeArgs {
    #[command(flatten)]
    place: Place,
    #[command(subcommand)]
    command: KubeCommand,
}

/// Where to look.
#[derive(Clone, Debug, clap::Args)]
struct Place {
    /// The namespace. Default: that of the kubeconfig's context.
    #[arg(short, long, global = true, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// All namespaces.
    #[arg(short = 'A', long, global = true, conflicts_with = "namespace")]
    all_namespaces: bool,
    /// A context of the kubeconfig. Default: its current one.
    #[arg(long, global = true, value_name = "CONTEXT")]
    context: Option<String>,
}

#[derive(Debug, Subcommand)]
enum KubeCommand {
    /// Show clusters, what is under way, and what keeps them; exit code 0 only when all of it is Ready.
    Status(status::StatusArgs),
    /// Say what the operator would do now, or with another spec, without doing it.
    Plan(plan::PlanArgs),
    /// Have a pool give up bookies: their ledgers are moved away, then they go with their volumes.
    Drain(drain::DrainArgs),
    /// Put objects, events, logs and metrics into one file, for whoever helps. Never a Secret.
    Report(report::ReportArgs),
    /// The kubectl plugin.
    #[command(subcommand)]
    Plugin(plugin::PluginCommand),
}

pub(crate) async fn run(args: KubeArgs, global: &Global) -> Result<(), Failure> {
    let KubeArgs { place, command } = args;
    if let KubeCommand::Plugin(command) = command {
        return plugin::run(&command, global.output);
    }
    let access = Access::open(&place).await?;
    match command {
        KubeCommand::Status(args) => status::run(&args, &access, global.output).await,
        KubeCommand::Plan(args) => Box::pin(plan::run(&args, &access, global)).await,
        KubeCommand::Drain(args) => drain::run(&args, &access, global.output).await,
        KubeCommand::Report(args) => Box::pin(report::run(&args, &access, global.output)).await,
        KubeCommand::Plugin(_) => Ok(()),
    }
}
