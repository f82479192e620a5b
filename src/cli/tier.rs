//! `geminga policy` and `geminga tier`: retention, offload, and the data in object storage.

use clap::Subcommand;
use geminga_client::{TierWalk, topic_name};
use geminga_proto::{admin::v1 as pb, v1 as wire};
use serde_json::{Value, json};

use super::{
    Global,
    exit::{Code, Failure},
    output,
};

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Show what holds for a scope, and from which level each value comes.
    Get {
        /// tenant/namespace or tenant/namespace/topic; without one, the cluster.
        scope: Option<String>,
    },
    /// Change a scope's own values.
    Set {
        /// tenant/namespace or tenant/namespace/topic; without one, the cluster.
        scope: Option<String>,
        /// Closed ledgers older than this are offloaded.
        #[arg(long, value_name = "MS")]
        offload_after_ms: Option<u64>,
        /// Closed ledgers are offloaded, oldest first, while more bytes than this lie on bookies.
        #[arg(long, value_name = "BYTES")]
        offload_above_bytes: Option<u64>,
        /// Time from an upload to the deletion of the ledger on bookies.
        #[arg(long, value_name = "MS")]
        delete_lag_ms: Option<u64>,
        /// Messages that every subscription has settled are kept this long.
        #[arg(long, value_name = "MS")]
        retention_ms: Option<u64>,
        /// Messages that every subscription has settled are kept up to so many bytes.
        #[arg(long, value_name = "BYTES")]
        retention_bytes: Option<u64>,
        /// Messages older than this count as settled for every subscription.
        #[arg(long, value_name = "MS")]
        ttl_ms: Option<u64>,
        /// So much may wait for the slowest subscription of a segment.
        #[arg(long, value_name = "BYTES")]
        backlog_quota_bytes: Option<u64>,
        /// The oldest message that waits may be so old.
        #[arg(long, value_name = "MS")]
        backlog_quota_ms: Option<u64>,
        /// What happens when more waits.
        #[arg(long, value_enum)]
        backlog_action: Option<BacklogAction>,
        /// Take a value from the level above again; may be repeated.
        #[arg(long, value_name = "NAME")]
        unset: Vec<String>,
    },
}

/// What happens when more waits than a quota allows.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum BacklogAction {
    /// Publishing is refused.
    Reject,
    /// Publishing waits for room, at most ten seconds.
    Hold,
    /// The slowest subscriptions lose the oldest messages.
    EvictOldest,
}

impl From<BacklogAction> for wire::BacklogAction {
    fn from(action: BacklogAction) -> Self {
        match action {
            BacklogAction::Reject => Self::Reject,
            BacklogAction::Hold => Self::Hold,
            BacklogAction::EvictOldest => Self::EvictOldest,
        }
    }
}

impl BacklogAction {
    fn name(action: wire::BacklogAction) -> &'static str {
        match action {
            wire::BacklogAction::Unspecified | wire::BacklogAction::Reject => "reject",
            wire::BacklogAction::Hold => "hold",
            wire::BacklogAction::EvictOldest => "evict-oldest",
        }
    }
}

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

pub(crate) async fn policy(command: PolicyCommand, global: &Global) -> Result<(), Failure> {
    let admin = global.client().await?.admin();
    let answer = match command {
        PolicyCommand::Get { scope } => admin.policies(&scope.unwrap_or_default()).await?,
        PolicyCommand::Set {
            scope,
            offload_after_ms,
            offload_above_bytes,
            delete_lag_ms,
            retention_ms,
            retention_bytes,
            ttl_ms,
            backlog_quota_bytes,
            backlog_quota_ms,
            backlog_action,
            unset,
        } => {
            let policies = pb::Policies {
                offload_after_ms,
                offload_above_bytes,
                delete_lag_ms,
                retention_ms,
                retention_bytes,
                ttl_ms,
                backlog_quota_bytes,
                backlog_quota_ms,
                backlog_action: backlog_action
                    .map(|action| wire::BacklogAction::from(action).into()),
            };
            let unset = unset.iter().map(|name| name.replace('-', "_")).collect();
            admin.set_policies(&scope.unwrap_or_default(), policies, unset).await?
        }
    };
    let (own, effective) = (answer.own.unwrap_or_default(), answer.effective.unwrap_or_default());
    let row = |name: &str, own: Option<u64>, effective: Option<u64>| {
        let source = answer.sources.get(name).map_or("default", String::as_str);
        json!({"policy": name, "own": own, "effective": effective, "source": source})
    };
    let rows = [
        row("offload_after_ms", own.offload_after_ms, effective.offload_after_ms),
        row("offload_above_bytes", own.offload_above_bytes, effective.offload_above_bytes),
        row("delete_lag_ms", own.delete_lag_ms, effective.delete_lag_ms),
        row("retention_ms", own.retention_ms, effective.retention_ms),
        row("retention_bytes", own.retention_bytes, effective.retention_bytes),
        row("ttl_ms", own.ttl_ms, effective.ttl_ms),
        row("backlog_quota_bytes", own.backlog_quota_bytes, effective.backlog_quota_bytes),
        row("backlog_quota_ms", own.backlog_quota_ms, effective.backlog_quota_ms),
        json!({
            "policy": "backlog_action",
            "own": own.backlog_action.map(|_| BacklogAction::name(own.backlog_action())),
            "effective": BacklogAction::name(effective.backlog_action()),
            "source": answer.sources.get("backlog_action").map_or("default", String::as_str),
        }),
    ];
    Ok(output::list(global.output, &["policy", "effective", "source", "own"], &rows)?)
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
    mut walk: TierWalk,
    global: &Global,
    topic: &str,
) -> Result<(), Failure> {
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
    let bytes: u64 = segments.values().map(|of| of.0).sum();
    let row =
        json!({"topic": topic, "segments": segments.len(), "bytes": bytes, "problems": problems});
    output::object(global.output, &row)?;
    if problems.is_empty() {
        return Ok(());
    }
    let message = format!("{what} found {} problems", problems.len());
    let code = if what == "verify" { Code::ProofFailed } else { Code::Failed };
    Err(Failure::new(code, message, format!("geminga tier status {topic}")))
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
