//! `geminga tier`: the data in object storage.

use clap::Subcommand;
use geminga_client::{TierWalk, topic_name};
use geminga_proto::admin::v1 as pb;
use serde_json::{Value, json};

use super::{
    Global,
    exit::{Code, Failure},
    output,
};

#[derive(Debug, Subcommand)]
pub(crate) enum TierCommand {
    /// Show where a topic's closed ledgers lie.
    Status { topic: String },
    /// Offload every closed ledger of a topic now.
    Offload {
        topic: String,
        /// Close the open ledger first, so that all that is stored by now goes.
        #[arg(long)]
        roll: bool,
    },
    /// Read every object of a topic and check it.
    Verify { topic: String },
}

pub(crate) async fn tier(command: TierCommand, global: &Global) -> Result<(), Failure> {
    let admin = global.client().await?.admin();
    match command {
        TierCommand::Status { topic } => {
            let segments = admin.tier_status(&topic_name(&topic)?).await?;
            let rows: Vec<Value> = segments.iter().map(segment_row).collect();
            let columns = [
                "segment",
                "ledgers",
                "uploading",
                "both",
                "object_only",
                "bytes_bookies",
                "bytes_objects",
                "last_error",
            ];
            Ok(output::list(global.output, &columns, &rows)?)
        }
        TierCommand::Offload { topic, roll } => {
            let walk = admin.offload_topic(&topic_name(&topic)?, roll).await?;
            follow("offload", walk, global, &topic).await
        }
        TierCommand::Verify { topic } => {
            let walk = admin.verify_tier(&topic_name(&topic)?).await?;
            follow("verify", walk, global, &topic).await
        }
    }
}

/// Shows progress on standard error, and on standard output what came of it.
async fn follow(
    what: &'static str,
    walk: TierWalk,
    global: &Global,
    topic: &str,
) -> Result<(), Failure> {
    let Walked { segments, bytes, problems } = watch(what, walk).await?;
    let row = json!({"topic": topic, "segments": segments, "bytes": bytes, "problems": problems});
    output::object(global.output, &row)?;
    if problems.is_empty() {
        return Ok(());
    }
    let message = format!("{what} found {} problems", problems.len());
    let code = if what == "verify" { Code::ProofFailed } else { Code::Failed };
    Err(Failure::new(code, message, format!("geminga tier status {topic}")))
}

/// What came of a walk over a topic.
pub(super) struct Walked {
    pub(super) segments: usize,
    pub(super) bytes: u64,
    pub(super) problems: Vec<Value>,
}

/// Follows a walk to its end, with progress on standard error.
pub(super) async fn watch(what: &'static str, mut walk: TierWalk) -> Result<Walked, Failure> {
    let bar = output::progress(0, what);
    let mut segments = std::collections::BTreeMap::new();
    let mut problems = Vec::new();
    while let Some(step) = walk.next().await? {
        segments.insert(step.segment, (step.bytes_done, step.bytes_total));
        let (done, total) = segments.values().fold((0, 0), |sum, of| (sum.0 + of.0, sum.1 + of.1));
        bar.set_length(total);
        bar.set_position(done);
        if !step.problem.is_empty() {
            problems.push(json!({
                "segment": step.segment,
                "ledger": step.ledger,
                "problem": step.problem,
            }));
        }
    }
    bar.finish_and_clear();
    let bytes = segments.values().map(|of| of.0).sum();
    Ok(Walked { segments: segments.len(), bytes, problems })
}

fn segment_row(segment: &pb::SegmentTier) -> Value {
    json!({
        "segment": segment.segment,
        "ledgers": segment.ledgers,
        "uploading": segment.ledgers_uploading,
        "both": segment.ledgers_uploaded,
        "object_only": segment.ledgers_object_only,
        "bytes_bookies": segment.bytes_bookies,
        "bytes_objects": segment.bytes_objects,
        "first_offset": segment.first_offset,
        "next_offset": segment.next_offset,
        "last_error": segment.last_error,
    })
}
