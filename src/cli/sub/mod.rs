//! `geminga sub`: subscriptions, what holds their messages up, and what failed.

mod delayed;
mod dlq;
mod explain;

use clap::{Subcommand, ValueEnum};
use geminga_client::{
    Position, RetryPolicy, SubscriptionName, SubscriptionSettings, SubscriptionType, topic_name,
};
use geminga_proto::{admin::v1::Subscription, v1::SubscriptionStart};
use geminga_runtime::units::Period;
use serde_json::{Value, json};

use super::{Global, args, exit::Failure, output};

#[derive(Debug, Subcommand)]
pub(crate) enum SubCommand {
    /// Create a subscription; created twice alike is no error.
    Create {
        topic: String,
        name: String,
        /// Where it begins.
        #[arg(long, value_enum, default_value_t = args::From::Latest)]
        from: args::From,
        /// Who gets a message; never changes.
        #[arg(long = "type", value_enum, default_value_t = Kind::Exclusive)]
        kind: Kind,
        #[command(flatten)]
        policy: PolicyArgs,
    },
    /// Change retry policy and lease; what is not given stays.
    Update {
        topic: String,
        name: String,
        #[command(flatten)]
        policy: PolicyArgs,
    },
    /// List the subscriptions of a topic.
    #[command(alias = "list")]
    Ls { topic: String },
    /// Show one subscription with its backlog.
    Describe { topic: String, name: String },
    /// Delete a subscription; what it had not accepted is forgotten.
    Delete { topic: String, name: String },
    /// Say why messages are not delivered.
    Explain {
        topic: String,
        name: String,
        /// Only this segment.
        #[arg(long)]
        segment: Option<u32>,
    },
    /// Move a subscription; consumers go on from there.
    Seek {
        topic: String,
        name: String,
        /// earliest, latest, an offset, a time such as 2026-01-31T12:00:00Z, or a span back such as 15m-ago.
        #[arg(long, value_parser = args::position)]
        to: Position,
        /// Only this segment.
        #[arg(long)]
        segment: Option<u32>,
    },
    /// Messages that wait for their time.
    #[command(subcommand)]
    Delayed(delayed::DelayedCommand),
    /// Messages that failed too often, or were rejected.
    #[command(subcommand)]
    Dlq(dlq::DlqCommand),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// One consumer a segment, in order.
    Exclusive,
    /// One active consumer a segment, in order; others stand by. Consumers share the segments out.
    Failover,
    /// Any consumer, in no order.
    Shared,
    /// Any consumer, each key in order.
    KeyShared,
}

impl From<Kind> for SubscriptionType {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Exclusive => Self::Exclusive,
            Kind::Failover => Self::Failover,
            Kind::Shared => Self::Shared,
            Kind::KeyShared => Self::KeyShared,
        }
    }
}

/// What happens to messages that are not accepted.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct PolicyArgs {
    /// Deliveries of a message before it goes to the dead-letter topic; 0: no limit.
    #[arg(long, value_name = "COUNT")]
    pub(crate) attempts_max: Option<u32>,
    /// Pause before a failed message comes again, doubled each time; with a maximum: 1s..10m.
    #[arg(long, value_name = "TIME[..TIME]", value_parser = args::backoff)]
    pub(crate) backoff: Option<args::Backoff>,
    /// How long a message belongs to its consumer (shared types).
    #[arg(long, value_name = "TIME")]
    pub(crate) lease: Option<Period>,
    /// Where dead letters go. Default: TOPIC~SUBSCRIPTION~dlq beside the topic.
    #[arg(long, value_name = "TOPIC")]
    pub(crate) dead_letter_topic: Option<String>,
}

impl PolicyArgs {
    /// `before` with what was given.
    pub(crate) fn over(
        &self,
        mut before: SubscriptionSettings,
    ) -> Result<SubscriptionSettings, Failure> {
        let mut retry: RetryPolicy = before.retry.take().unwrap_or_default();
        if let Some(attempts) = self.attempts_max {
            retry.attempts_max = attempts;
        }
        if let Some(backoff) = self.backoff {
            retry.backoff_ms = backoff.first_ms;
            retry.backoff_ms_max = backoff.max_ms;
        }
        if let Some(topic) = &self.dead_letter_topic {
            retry.dead_letter_topic = topic_name(topic)?.to_string();
        }
        if let Some(lease) = self.lease {
            before.lease_ms = args::millis(lease);
        }
        before.retry = (retry != RetryPolicy::default()).then_some(retry);
        Ok(before)
    }
}

pub(crate) async fn run(command: SubCommand, global: &Global) -> Result<(), Failure> {
    let client = global.client().await?;
    let admin = client.admin();
    match command {
        SubCommand::Create { topic, name, from, kind, policy } => {
            let name = SubscriptionName::parse(&name)?;
            let r#type = SubscriptionType::from(kind).into();
            let settings = SubscriptionSettings { r#type, ..Default::default() };
            let settings = policy.over(settings)?;
            let topic = topic_name(&topic)?;
            let created =
                admin.create_subscription_as(&topic, &name, from.into(), Some(settings)).await?;
            output::object(global.output, &row(&created, false))?;
        }
        SubCommand::Update { topic, name, policy } => {
            let (topic, name) = (topic_name(&topic)?, SubscriptionName::parse(&name)?);
            let before = admin.subscription(&topic, &name).await?.settings.unwrap_or_default();
            let settings = policy.over(before)?;
            let updated = admin.update_subscription(&topic, &name, settings).await?;
            output::object(global.output, &row(&updated, false))?;
        }
        SubCommand::Ls { topic } => {
            let found = admin.subscriptions(&topic_name(&topic)?).await?;
            let rows: Vec<Value> = found.iter().map(|sub| row(sub, false)).collect();
            let columns = ["name", "topic", "type", "start", "created_at"];
            output::list(global.output, &columns, &rows)?;
        }
        SubCommand::Describe { topic, name } => {
            let name = SubscriptionName::parse(&name)?;
            let found = admin.subscription(&topic_name(&topic)?, &name).await?;
            output::object(global.output, &row(&found, true))?;
        }
        SubCommand::Delete { topic, name } => {
            let topic = topic_name(&topic)?;
            admin.delete_subscription(&topic, &SubscriptionName::parse(&name)?).await?;
            output::note(&format!("deleted subscription {name} of {topic}"));
        }
        SubCommand::Explain { topic, name, segment } => {
            let segments = client.explain(&topic, &name, segment).await?;
            explain::print(&segments, global)?;
        }
        SubCommand::Seek { topic, name, to, segment } => {
            let places = client.seek(&topic, &name, segment, to).await?;
            let place = |place: &geminga_client::Place| json!({ "segment": place.segment, "mark_delete_next": place.mark_delete_next });
            let rows: Vec<Value> = places.iter().map(place).collect();
            output::list(global.output, &["segment", "mark_delete_next"], &rows)?;
        }
        SubCommand::Delayed(command) => delayed::run(command, &admin, global).await?,
        SubCommand::Dlq(command) => dlq::run(command, &client, global).await?,
    }
    Ok(())
}

fn row(sub: &Subscription, full: bool) -> Value {
    let start = match sub.start() {
        SubscriptionStart::Earliest => "earliest",
        _ => "latest",
    };
    let settings = sub.settings.clone().unwrap_or_default();
    let mut row = json!({
        "topic": sub.topic,
        "name": sub.name,
        "id": sub.id,
        "type": kind(settings.r#type()),
        "start": start,
        "created_at": output::time(sub.created_at_ms),
    });
    if let Some(retry) = &settings.retry {
        row["attempts_max"] = retry.attempts_max.into();
        row["backoff_ms"] = retry.backoff_ms.into();
        row["backoff_ms_max"] = retry.backoff_ms_max.into();
        if !retry.dead_letter_topic.is_empty() {
            row["dead_letter_topic"] = retry.dead_letter_topic.clone().into();
        }
    }
    if settings.lease_ms > 0 {
        row["lease_ms"] = settings.lease_ms.into();
    }
    if full {
        row["backlog_messages"] =
            sub.cursors.iter().map(|cursor| cursor.backlog_messages).sum::<u64>().into();
        row["dead_letters"] =
            sub.cursors.iter().map(|cursor| cursor.dead_letters).sum::<u64>().into();
        let cursors: Vec<Value> = sub
            .cursors
            .iter()
            .map(|cursor| {
                json!({
                    "segment": cursor.segment,
                    "mark_delete_next": cursor.mark_delete_next,
                    "backlog_messages": cursor.backlog_messages,
                    "holes": cursor.holes,
                    "consumer": cursor.consumer,
                    "consumers": cursor.consumers,
                })
            })
            .collect();
        row["cursors"] = cursors.into();
    }
    row
}

pub(crate) fn kind(kind: SubscriptionType) -> &'static str {
    match kind {
        SubscriptionType::Unspecified | SubscriptionType::Exclusive => "exclusive",
        SubscriptionType::Failover => "failover",
        SubscriptionType::Shared => "shared",
        SubscriptionType::KeyShared => "key-shared",
    }
}
