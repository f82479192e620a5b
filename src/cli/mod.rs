//! The command line: arguments in, one of the commands, an exit code out.
//!
//! Data goes to standard output, everything else to standard error; progress only to a terminal. Exit codes: see
//! [`exit::Code`].

mod admin;
mod args;
mod check;
mod cluster;
mod completion;
mod config;
mod consume;
mod context;
pub(crate) mod exit;
mod explain;
mod kube;
mod lines;
pub(crate) mod output;
mod policy;
pub(crate) mod produce;
mod serve;
mod sub;
mod tier;
mod top;

use std::{process::ExitCode, time::Duration};

use clap::{Parser, Subcommand};
use geminga_client::Client;
use geminga_runtime::telemetry::{SpanExport, flush_spans, init_spans};

use self::{exit::Failure, output::Format};

/// A cloud-native messaging platform: durable topics on quorum ledgers, in one binary.
#[derive(Debug, Parser)]
#[command(name = "geminga", version, arg_required_else_help = true, max_term_width = 110, after_help = AFTER_HELP)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

const AFTER_HELP: &str = "\
Start here:  geminga demo
             geminga standalone &
             echo hello | geminga produce orders
             geminga consume orders -s first --from earliest -n 1

Exit codes:  0 ok, 1 failed, 2 wrong usage, 3 not found, 4 refused, 5 server unavailable (retry), 6 data proof failed,
             7 not ready yet";

/// What every command knows.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Global {
    /// The server, for client commands; several brokers of a cluster are separated by commas. Default: that of the current
    /// context, else http://127.0.0.1:8650.
    #[arg(long, global = true, env = "GEMINGA_SERVER", value_name = "URLS")]
    server: Option<String>,
    /// How data is printed.
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    pub(crate) output: Format,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a broker, bookies and the metadata store in one process.
    Standalone(serve::StandaloneArgs),
    /// Run a broker of a cluster, or look at the brokers there are.
    #[command(args_conflicts_with_subcommands = true)]
    Broker(cluster::BrokerArgs),
    /// Run a bookie of a cluster, or look at the bookies there are.
    #[command(args_conflicts_with_subcommands = true)]
    Bookie(cluster::BookieArgs),
    /// Run the Kubernetes operator: custom resources in, a cluster that matches them out.
    Operator(cluster::OperatorArgs),
    /// Look at the cluster as a whole.
    #[command(subcommand)]
    Cluster(cluster::ClusterCommand),
    /// Look at ledgers.
    #[command(subcommand)]
    Ledger(cluster::LedgerCommand),
    /// Retention, limits, offload, compaction: show and change what holds for topics.
    #[command(subcommand)]
    Policy(policy::PolicyCommand),
    /// Cold data in object storage: show, offload, check.
    #[command(subcommand)]
    Tier(tier::TierCommand),
    /// Clusters on Kubernetes: their state, what the operator would do, drains, a report for whoever helps.
    Kube(kube::KubeArgs),
    /// Show the settings that a broker, bookie or operator would run with.
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// Publish 336,776 real flights, kill a bookie half way, consume, and prove that nothing was lost.
    Demo(crate::demo::Args),
    /// Publish the lines of standard input to a topic.
    Produce(produce::ProduceArgs),
    /// Print the messages of a subscription.
    Consume(consume::ConsumeArgs),
    /// Manage tenants.
    #[command(subcommand)]
    Tenant(admin::TenantCommand),
    /// Manage namespaces.
    #[command(subcommand, visible_alias = "ns")]
    Namespace(admin::NamespaceCommand),
    /// Manage topics.
    #[command(subcommand)]
    Topic(admin::TopicCommand),
    /// Manage subscriptions.
    #[command(subcommand, visible_alias = "subscription")]
    Sub(sub::SubCommand),
    /// Watch what goes in and out of topics and subscriptions.
    Top(top::TopArgs),
    /// Named servers.
    #[command(subcommand)]
    Context(context::ContextCommand),
    /// Print what a shell needs to complete commands.
    Completion(completion::CompletionArgs),
    /// Measure a server, or the machine below it.
    #[command(subcommand)]
    Bench(crate::bench::Command),
    /// Say what an error reason means and what to do; without one, list all.
    Explain(explain::ExplainArgs),
}

/// Parses the command line, runs the command, prints an error with the next command to try.
pub(crate) fn main() -> ExitCode {
    let cli = match Cli::try_parse_from(kube::as_plugin(std::env::args_os().collect())) {
        Ok(cli) => cli,
        Err(error) => {
            let code = error.exit_code();
            // Help and version go to standard output, errors to standard error; a closed one is no reason to panic.
            let _ = error.print();
            return ExitCode::from(u8::try_from(code).unwrap_or(2));
        }
    };
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(format!("the runtime did not start: {error}")))?;
    let done = runtime.block_on(Box::pin(dispatch(cli)));
    flush_spans();
    // A blocking read of standard input must not keep the process.
    runtime.shutdown_timeout(Duration::from_millis(100));
    done
}

async fn dispatch(cli: Cli) -> Result<(), Failure> {
    let Cli { global, command } = cli;
    match command {
        Command::Standalone(args) => Box::pin(serve::run(args, &global)).await,
        Command::Broker(args) => Box::pin(cluster::broker(args, &global)).await,
        Command::Bookie(args) => Box::pin(cluster::bookie(args, &global)).await,
        Command::Operator(args) => Box::pin(cluster::operator(args, &global)).await,
        Command::Cluster(command) => cluster::cluster(command, &global).await,
        Command::Ledger(command) => cluster::ledger(command, &global).await,
        Command::Policy(command) => Box::pin(policy::policy(command, &global)).await,
        Command::Tier(command) => tier::tier(command, &global).await,
        Command::Kube(args) => Box::pin(kube::run(args, &global)).await,
        Command::Config(command) => config::run(command, &global),
        Command::Demo(args) => Box::pin(crate::demo::run(args, &global)).await,
        Command::Produce(args) => Box::pin(produce::run(args, &global)).await,
        Command::Consume(args) => Box::pin(consume::run(args, &global)).await,
        Command::Tenant(command) => admin::tenant(command, &global).await,
        Command::Namespace(command) => admin::namespace(command, &global).await,
        Command::Topic(command) => admin::topic(command, &global).await,
        Command::Sub(command) => Box::pin(sub::run(command, &global)).await,
        Command::Top(args) => Box::pin(top::run(args, &global)).await,
        Command::Context(command) => context::run(command, &global),
        Command::Completion(args) => completion::run(&args),
        Command::Bench(command) => Box::pin(crate::bench::run(command, &global)).await,
        Command::Explain(args) => explain::run(&args, global.output),
    }
}

/// How long opening a producer, a consumer or an administrative call may take.
const OPEN_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a server that refuses connections may still be starting.
const START_PATIENCE: Duration = Duration::from_secs(5);

/// Starts to export spans where the environment names a collector, as it does for the roles.
pub(crate) fn init_client_spans() -> Result<(), Failure> {
    const VARIABLE: &str = "GEMINGA_TELEMETRY_OTLP_ENDPOINT";
    let Some(endpoint) = std::env::var(VARIABLE).ok().filter(|text| !text.is_empty()) else {
        return Ok(());
    };
    let instance = std::process::id().to_string();
    init_spans(SpanExport { endpoint, service: "geminga-client", instance, ratio: 1.0 })
        .map_err(|error| Failure::usage(format!("{VARIABLE}: {error}"), "produce"))
}

/// Where a server listens unless it was told otherwise.
const DEFAULT_SERVER: &str = "http://127.0.0.1:8650";

impl Global {
    /// The server for client commands: as given, else of the current context, else where one listens by default.
    pub(crate) fn server(&self) -> Result<String, Failure> {
        match &self.server {
            Some(server) => Ok(server.clone()),
            None => Ok(context::current_server()?.unwrap_or_else(|| DEFAULT_SERVER.to_owned())),
        }
    }

    /// The server, if one was named for this command: neither the current context's nor the default.
    pub(crate) fn given_server(&self) -> Option<&str> {
        self.server.as_deref()
    }

    /// A client for the server. One that was started a moment ago is waited for; one that is not there is an error within
    /// seconds.
    pub(crate) async fn client(&self) -> Result<Client, Failure> {
        let builder = Client::builder().server(self.server()?).open_timeout(OPEN_TIMEOUT);
        Ok(builder.wait_for_server(START_PATIENCE).build().await?)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
