//! `geminga sub delayed`: messages that wait for their time.

use clap::Subcommand;
use geminga_client::{Admin, SubscriptionName, TopicName, topic_name};
use serde_json::{Value, json};

use super::{Failure, Global, args, output};

#[derive(Debug, Subcommand)]
pub(crate) enum DelayedCommand {
    /// List them, the next due first.
    #[command(alias = "list")]
    Ls {
        topic: String,
        name: String,
        /// Only this segment.
        #[arg(long)]
        segment: Option<u32>,
        /// At most so many a segment.
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
        limit: u32,
    },
    /// Settle some, so that they are never delivered.
    Cancel {
        topic: String,
        name: String,
        /// As `ls` prints them: SEGMENT:OFFSET, or SEGMENT:FIRST-LAST.
        #[arg(required = true, value_parser = args::range)]
        messages: Vec<args::Range>,
    },
}

pub(super) async fn run(
    command: DelayedCommand,
    admin: &Admin,
    global: &Global,
) -> Result<(), Failure> {
    match command {
        DelayedCommand::Ls { topic, name, segment, limit } => {
            let (topic, name) = (topic_name(&topic)?, SubscriptionName::parse(&name)?);
            let mut rows: Vec<(u64, Value)> = Vec::new();
            for segment in segments(admin, &topic, segment).await? {
                let found = admin.delayed(&topic, &name, segment, limit as usize).await?;
                rows.extend(found.iter().map(|message| {
                    let row = json!({
                        "message": format!("{segment}:{}", message.offset),
                        "due": output::time(message.due_ms),
                        "attempt": message.attempt,
                    });
                    (message.due_ms, row)
                }));
            }
            rows.sort_by_key(|(due, _)| *due);
            let rows: Vec<Value> = rows.into_iter().map(|(_, row)| row).collect();
            output::list(global.output, &["message", "due", "attempt"], &rows)?;
        }
        DelayedCommand::Cancel { topic, name, messages } => {
            let (topic, name) = (topic_name(&topic)?, SubscriptionName::parse(&name)?);
            let mut cancelled = 0;
            for args::Range { segment, first, last } in messages {
                let ranges = [(first, last)];
                cancelled += admin.cancel_delayed(&topic, &name, segment, &ranges).await?;
            }
            output::object(global.output, &json!({ "cancelled": cancelled }))?;
        }
    }
    Ok(())
}

/// The one that is named, or all.
async fn segments(
    admin: &Admin,
    topic: &TopicName,
    segment: Option<u32>,
) -> Result<Vec<u32>, Failure> {
    if let Some(segment) = segment {
        return Ok(vec![segment]);
    }
    let layout = admin.topic(topic).await?.layout.unwrap_or_default();
    Ok(layout.segments.iter().map(|info| info.segment).collect())
}
