//! `geminga bench`: measures a running server from outside, and the bare disk and socket beside it.

mod control;
mod load;
mod report;
mod server;

use std::{path::PathBuf, time::Duration};

use serde_json::json;

use crate::cli::{
    Global,
    exit::Failure,
    output::{self, Format},
    produce::CompressionArg,
};
use report::Report;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Publish as fast as the server takes it, or at a rate.
    Produce(LoadArgs),
    /// Publish, then measure reading all of it from the start.
    Consume(LoadArgs),
    /// Publish at a rate and measure the time from send to receive.
    E2e(LoadArgs),
    /// The same bytes through a bare journal (append + sync) and a bare socket.
    Control(ControlArgs),
}

/// The load. All benches use topics of their own: bench-<id>-<n> in public/default.
#[derive(Clone, Debug, clap::Args, serde::Serialize)]
pub(crate) struct LoadArgs {
    /// Bytes of a message's value.
    #[arg(long, default_value_t = 1024)]
    pub(crate) size: usize,
    /// Messages a second over all producers; 0 = as fast as possible. End to end: 10,000 when left out.
    #[arg(long)]
    pub(crate) rate: Option<u64>,
    /// Messages in all.
    #[arg(long, default_value_t = 1_000_000)]
    pub(crate) count: u64,
    /// Stop after so many seconds, whatever the count.
    #[arg(long)]
    pub(crate) duration: Option<u64>,
    /// Topics.
    #[arg(long, default_value_t = 1)]
    pub(crate) topics: u32,
    /// Segments of each topic.
    #[arg(long, default_value_t = 1)]
    pub(crate) segments: u32,
    /// Producers of each topic.
    #[arg(long, default_value_t = 1)]
    pub(crate) producers: u32,
    /// Bytes after which a batch is sent.
    #[arg(long, default_value_t = 65_536)]
    pub(crate) batch_bytes: usize,
    /// Milliseconds a batch may wait for more messages.
    #[arg(long, default_value_t = 1)]
    pub(crate) linger_ms: u64,
    /// How batches are compressed.
    #[arg(long, value_enum, default_value_t = CompressionArg::None)]
    pub(crate) compression: CompressionArg,
    /// Where the server's metrics are, for its CPU time and memory; empty: not asked.
    #[arg(long, default_value = "127.0.0.1:8651", env = "GEMINGA_METRICS")]
    pub(crate) metrics: String,
}

#[derive(Clone, Debug, clap::Args, serde::Serialize)]
pub(crate) struct ControlArgs {
    /// Bytes of one message.
    #[arg(long, default_value_t = 1024)]
    size: usize,
    /// Messages in all.
    #[arg(long, default_value_t = 1_000_000)]
    count: u64,
    /// Bytes of one write + sync, and of one send.
    #[arg(long, default_value_t = 65_536)]
    batch_bytes: usize,
    /// Files written and synced for each batch.
    #[arg(long, default_value_t = 1)]
    copies: usize,
    /// The directory whose disk is measured.
    #[arg(long, default_value = ".")]
    dir: PathBuf,
}

pub(crate) async fn run(command: Command, global: &Global) -> Result<(), Failure> {
    match command {
        Command::Produce(args) => print(&load::produce(&args, global).await?, global.output),
        Command::Consume(args) => print(&load::consume(&args, global).await?, global.output),
        Command::E2e(args) => print(&load::end_to_end(&args, global).await?, global.output),
        Command::Control(args) => run_control(&args, global).await,
    }
}

fn print(report: &Report, format: Format) -> Result<(), Failure> {
    if format != Format::Table {
        return Ok(output::document(format, report)?);
    }
    let mut rows = vec![
        ("messages", report.messages.to_string()),
        ("messages/s", format!("{:.0}", report.messages_per_second)),
        ("MB/s", format!("{:.1}", report.megabytes_per_second)),
    ];
    let percentiles = [
        ("publish p50/p99/p99.9", report.publish_ms),
        ("end to end p50/p99/p99.9", report.end_to_end_ms),
    ];
    for (name, percentiles) in percentiles {
        if let Some(p) = percentiles {
            rows.push((name, format!("{:.2} / {:.2} / {:.2} ms", p.p50, p.p99, p.p999)));
        }
    }
    if let Some(cpu) = report.server_cpu_seconds_per_million {
        rows.push(("server CPU-s per million", format!("{cpu:.2}")));
    }
    if let Some(rss) = report.server_rss_mb {
        rows.push(("server RSS MB", format!("{rss:.0}")));
    }
    Ok(output::fields(&rows)?)
}

async fn run_control(args: &ControlArgs, global: &Global) -> Result<(), Failure> {
    if args.size == 0 || args.batch_bytes < args.size || args.copies == 0 || args.copies > 16 {
        return Err(Failure::usage(
            "control needs 1 <= size <= batch-bytes, and 1 to 16 copies",
            "bench control",
        ));
    }
    let per_batch = (args.batch_bytes / args.size) as u64;
    let batches = args.count.div_ceil(per_batch);
    let bytes = batches * args.batch_bytes as u64;
    let (dir, batch_bytes, copies) = (args.dir.clone(), args.batch_bytes, args.copies);
    // Only this command runs: blocking its thread hurts nobody.
    let journal =
        tokio::task::block_in_place(|| control::journal(&dir, batch_bytes, batches, copies))?;
    let socket = control::socket(args.batch_bytes, batches).await?;
    let settings = |what: &str| json!({"what": what, "size": args.size, "batch_bytes": args.batch_bytes, "copies": args.copies});
    let messages = batches * per_batch;
    let mut disk =
        Report::new("control journal", messages, bytes, journal.elapsed, settings("append + sync"));
    disk.publish_ms = journal.batch_ms;
    let wire =
        Report::new("control socket", messages, bytes, socket.elapsed, settings("loopback socket"));
    if global.output != Format::Table {
        return Ok(output::document(global.output, &json!({"journal": disk, "socket": wire}))?);
    }
    print(&disk, global.output)?;
    print(&wire, global.output)
}

impl LoadArgs {
    /// When to stop, if a duration was given.
    fn time_limit(&self) -> Duration {
        self.duration.map_or(Duration::MAX, Duration::from_secs)
    }

    fn check(&self) -> Result<(), Failure> {
        if self.size < load::STAMP_BYTES || self.size > 5 * 1024 * 1024 {
            return Err(Failure::usage("--size must be 16 to 5242880 bytes", "bench"));
        }
        if self.topics == 0 || self.producers == 0 || self.segments == 0 || self.count == 0 {
            return Err(Failure::usage(
                "--topics, --segments, --producers and --count must be at least 1",
                "bench",
            ));
        }
        Ok(())
    }
}
