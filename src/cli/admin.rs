//! `geminga tenant|namespace|topic create|ls|describe|delete`, and a look into a topic.

use clap::Subcommand;
use geminga_client::{Position, TenantName, namespace_name, topic_name};
use geminga_proto::admin::v1::{Namespace, SegmentState, Tenant, Topic};
use serde_json::{Value, json};

use super::{
    Global, args, consume,
    exit::{Code, Failure},
    output, tier,
};

#[derive(Debug, Subcommand)]
pub(crate) enum TenantCommand {
    /// Create a tenant; created twice is no error.
    Create { name: String },
    /// List tenants.
    #[command(alias = "list")]
    Ls,
    /// Show one tenant.
    Describe { name: String },
    /// Delete an empty tenant.
    Delete { name: String },
}

#[derive(Debug, Subcommand)]
pub(crate) enum NamespaceCommand {
    /// Create a namespace; created twice alike is no error.
    Create {
        /// tenant/namespace, or a namespace of public.
        name: String,
        /// Whether a missing topic is created on first use.
        #[arg(long)]
        auto_create_topics: Option<bool>,
    },
    /// List the namespaces of a tenant.
    #[command(alias = "list")]
    Ls {
        #[arg(default_value = "public")]
        tenant: String,
    },
    /// Show one namespace.
    Describe { name: String },
    /// Delete an empty namespace.
    Delete { name: String },
}

#[derive(Debug, Subcommand)]
pub(crate) enum TopicCommand {
    /// Create a topic; created twice alike is no error.
    Create {
        /// tenant/namespace/topic, or a topic of public/default.
        name: String,
        /// Key ranges of equal size, each an ordered log of its own.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
        segments: u32,
    },
    /// List the topics of a namespace.
    #[command(alias = "list")]
    Ls {
        #[arg(default_value = "public/default")]
        namespace: String,
    },
    /// Show one topic with its segments.
    Describe { name: String },
    /// Show which broker serves each segment.
    Where { name: String },
    /// Print messages as they are stored, without a subscription and without a trace in any.
    Peek {
        name: String,
        /// earliest, latest, an offset, a time such as 2026-01-31T12:00:00Z, or a span back such as 15m-ago.
        #[arg(long, default_value = "earliest", value_parser = args::position)]
        from: Position,
        /// Only this segment. Default: all of them.
        #[arg(long)]
        segment: Option<u32>,
        /// At most so many a segment.
        #[arg(short = 'n', long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
        count: u32,
    },
    /// Keep the latest message of each key for compacted readers: what is stored by now, on every segment.
    ///
    /// Messages stay where they are for everybody else. A key whose latest message is empty is gone for compacted readers.
    Compact { name: String },
    /// Delete a topic with everything in it.
    Delete { name: String },
}

pub(crate) async fn tenant(command: TenantCommand, global: &Global) -> Result<(), Failure> {
    let admin = global.client().await?.admin();
    match command {
        TenantCommand::Create { name } => {
            let created = admin.create_tenant(&TenantName::parse(&name)?).await?;
            output::object(global.output, &tenant_row(&created))?;
        }
        TenantCommand::Ls => {
            let rows: Vec<Value> = admin.tenants().await?.iter().map(tenant_row).collect();
            output::list(global.output, &["name", "created_at"], &rows)?;
        }
        TenantCommand::Describe { name } => {
            let found = admin.tenant(&TenantName::parse(&name)?).await?;
            output::object(global.output, &tenant_row(&found))?;
        }
        TenantCommand::Delete { name } => {
            admin.delete_tenant(&TenantName::parse(&name)?).await?;
            output::note(&format!("deleted tenant {name}"));
        }
    }
    Ok(())
}

pub(crate) async fn namespace(command: NamespaceCommand, global: &Global) -> Result<(), Failure> {
    let admin = global.client().await?.admin();
    match command {
        NamespaceCommand::Create { name, auto_create_topics } => {
            let created =
                admin.create_namespace(&namespace_name(&name)?, auto_create_topics).await?;
            output::object(global.output, &namespace_row(&created))?;
        }
        NamespaceCommand::Ls { tenant } => {
            let found = admin.namespaces(&TenantName::parse(&tenant)?).await?;
            let rows: Vec<Value> = found.iter().map(namespace_row).collect();
            output::list(global.output, &["name", "auto_create_topics", "created_at"], &rows)?;
        }
        NamespaceCommand::Describe { name } => {
            let found = admin.namespace(&namespace_name(&name)?).await?;
            output::object(global.output, &namespace_row(&found))?;
        }
        NamespaceCommand::Delete { name } => {
            let name = namespace_name(&name)?;
            admin.delete_namespace(&name).await?;
            output::note(&format!("deleted namespace {name}"));
        }
    }
    Ok(())
}

pub(crate) async fn topic(command: TopicCommand, global: &Global) -> Result<(), Failure> {
    let client = global.client().await?;
    let admin = client.admin();
    match command {
        TopicCommand::Peek { name, from, segment, count } => {
            let found = admin.topic(&topic_name(&name)?).await?;
            let layout = found.layout.unwrap_or_default();
            let segments = layout.segments.iter().map(|info| info.segment);
            for of in segments.filter(|of| segment.is_none_or(|segment| segment == *of)) {
                let peeked = client.peek(&found.name, of, from, count).await?;
                let mut out = std::io::stdout().lock();
                for message in &peeked.messages {
                    consume::print(global.output, message, None, None, &mut out)?;
                }
                std::io::Write::flush(&mut out)?;
                output::note(&format!(
                    "segment {of}: {} of the messages {} to {}",
                    peeked.messages.len(),
                    peeked.first_offset,
                    peeked.next_offset
                ));
            }
        }
        TopicCommand::Create { name, segments } => {
            let created = admin.create_topic(&topic_name(&name)?, segments).await?;
            output::object(global.output, &topic_row(&created, false))?;
        }
        TopicCommand::Ls { namespace } => {
            let found = admin.topics(&namespace_name(&namespace)?).await?;
            let rows: Vec<Value> = found.iter().map(|topic| topic_row(topic, false)).collect();
            output::list(
                global.output,
                &["name", "segments", "layout_epoch", "created_at"],
                &rows,
            )?;
        }
        TopicCommand::Describe { name } => {
            let found = admin.topic(&topic_name(&name)?).await?;
            output::object(global.output, &topic_row(&found, true))?;
        }
        TopicCommand::Where { name } => {
            let places = admin.locate_topic(&topic_name(&name)?).await?;
            let rows: Vec<Value> = places
                .iter()
                .map(|place| {
                    json!({
                        "segment": place.segment,
                        "bundle": place.bundle,
                        "broker": place.broker,
                        "address": place.address,
                        "placed": place.placed,
                    })
                })
                .collect();
            let columns = ["segment", "bundle", "broker", "address", "placed"];
            output::list(global.output, &columns, &rows)?;
        }
        TopicCommand::Compact { name } => {
            let name = topic_name(&name)?;
            let walked = tier::watch("compact", admin.compact_topic(&name).await?).await?;
            let segments = admin.topic(&name).await?.segments;
            let rows: Vec<Value> = segments.iter().map(compacted_row).collect();
            let row = json!({
                "topic": name.to_string(),
                "bytes_read": walked.bytes,
                "segments": rows,
                "problems": walked.problems,
            });
            output::object(global.output, &row)?;
            if !walked.problems.is_empty() {
                let message = format!("compaction met {} problems", walked.problems.len());
                return Err(Failure::new(Code::Failed, message, "geminga ledger ls"));
            }
        }
        TopicCommand::Delete { name } => {
            let name = topic_name(&name)?;
            admin.delete_topic(&name).await?;
            output::note(&format!("deleted topic {name}"));
        }
    }
    Ok(())
}

fn tenant_row(tenant: &Tenant) -> Value {
    let mut row = json!({ "name": tenant.name, "created_at": output::time(tenant.created_at_ms) });
    if let Some(namespaces) = tenant.namespaces {
        row["namespaces"] = namespaces.into();
    }
    row
}

fn namespace_row(namespace: &Namespace) -> Value {
    let mut row = json!({
        "name": namespace.name,
        "auto_create_topics": namespace.auto_create_topics,
        "created_at": output::time(namespace.created_at_ms),
    });
    if let Some(topics) = namespace.topics {
        row["topics"] = topics.into();
    }
    row
}

/// What compaction made of a segment.
fn compacted_row(state: &SegmentState) -> Value {
    json!({
        "segment": state.segment,
        "compacted_to": state.compacted_to,
        "next_offset": state.next_offset,
        "messages": state.compacted_messages,
        "bytes": state.compacted_bytes,
    })
}

fn topic_row(topic: &Topic, full: bool) -> Value {
    let layout = topic.layout.clone().unwrap_or_default();
    let mut row = json!({
        "name": topic.name,
        "id": topic.id,
        "segments": layout.segments.len(),
        "layout_epoch": layout.epoch,
        "created_at": output::time(topic.created_at_ms),
    });
    if full {
        let states: Vec<Value> = layout
            .segments
            .iter()
            .map(|info| {
                let keys = info.keys.unwrap_or_default();
                let mut state = json!({
                    "segment": info.segment,
                    "keys": format!("{:08x}-{:08x}", keys.first, keys.last),
                });
                if let Some(found) =
                    topic.segments.iter().find(|state| state.segment == info.segment)
                {
                    state["loaded"] = found.loaded.into();
                    state["epoch"] = found.epoch.into();
                    state["first_offset"] = found.first_offset.into();
                    state["next_offset"] = found.next_offset.into();
                    state["stored_bytes"] = found.stored_bytes.into();
                    state["ledgers"] = found.ledgers.into();
                    if found.compacted_to > 0 {
                        state["compacted_to"] = found.compacted_to.into();
                        state["compacted_messages"] = found.compacted_messages.into();
                        state["compacted_bytes"] = found.compacted_bytes.into();
                    }
                }
                state
            })
            .collect();
        row["segments"] = states.into();
    }
    row
}
