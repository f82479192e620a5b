//! `geminga sub dlq`: what failed too often, or was rejected.

use std::sync::Arc;

use clap::Subcommand;
use geminga_client::{
    Admin, Client, Position, Reason, Start, SubscriptionName, TopicName, topic_name,
};
use parking_lot::Mutex;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{Failure, Global, args, output};
use crate::cli::exit::Code;

/// How often a replay looks whether anything is left.
const REPLAY_LOOK: std::time::Duration = std::time::Duration::from_millis(300);
/// The subscription of the dead-letter topic that `dlq replay` goes on with.
const REPLAY: &str = "replay";

#[derive(Debug, Subcommand)]
pub(crate) enum DlqCommand {
    /// List dead letters, oldest first: where they come from, how often they were tried, and why they are here.
    #[command(alias = "list")]
    Ls {
        topic: String,
        name: String,
        /// At most so many a segment.
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
        limit: u32,
    },
    /// Publish dead letters to the topic again and take them off; a replay that is interrupted goes on where it stopped, and
    /// publishes nothing twice.
    Replay { topic: String, name: String },
}

pub(super) async fn run(
    command: DlqCommand,
    client: &Client,
    global: &Global,
) -> Result<(), Failure> {
    let admin = client.admin();
    match command {
        DlqCommand::Ls { topic, name, limit } => {
            let (topic, name) = (topic_name(&topic)?, SubscriptionName::parse(&name)?);
            let dead = dead_letter_topic(&admin, &topic, &name).await?;
            let mut rows = Vec::new();
            for segment in dead_segments(&admin, &dead).await? {
                let from = Position::Earliest;
                let found = client.peek(&dead.to_string(), segment, from, limit).await?;
                rows.extend(found.messages.iter().map(|message| {
                    let header = |name: &str| {
                        message.headers.get(&format!("geminga-{name}")).cloned().unwrap_or_default()
                    };
                    json!({
                        "message": message.id.to_string(),
                        "origin": format!("{}:{}", header("origin-segment"), header("origin-offset")),
                        "attempts": header("attempts"),
                        "reason": header("reason"),
                        "died": output::time(message.publish_time_ms),
                        "key": message.key.as_ref().map(|key| String::from_utf8_lossy(key)),
                        "value": args::preview(&message.value),
                    })
                }));
            }
            let columns = ["message", "origin", "attempts", "reason", "died", "key", "value"];
            output::list(global.output, &columns, &rows)?;
        }
        DlqCommand::Replay { topic, name } => {
            let (topic, name) = (topic_name(&topic)?, SubscriptionName::parse(&name)?);
            let dead = dead_letter_topic(&admin, &topic, &name).await?;
            let replayed = if dead_segments(&admin, &dead).await?.is_empty() {
                0
            } else {
                replay(client, &dead, &topic, &name).await?
            };
            output::object(global.output, &json!({ "replayed": replayed }))?;
        }
    }
    Ok(())
}

async fn dead_letter_topic(
    admin: &Admin,
    topic: &TopicName,
    name: &SubscriptionName,
) -> Result<TopicName, Failure> {
    let settings = admin.subscription(topic, name).await?.settings.unwrap_or_default();
    let named = settings.retry.unwrap_or_default().dead_letter_topic;
    let full = if named.is_empty() { format!("{topic}~{name}~dlq") } else { named };
    Ok(topic_name(&full)?)
}

/// None before the first message died.
async fn dead_segments(admin: &Admin, dead: &TopicName) -> Result<Vec<u32>, Failure> {
    match admin.topic(dead).await {
        Ok(found) => {
            let layout = found.layout.unwrap_or_default();
            Ok(layout.segments.iter().map(|info| info.segment).collect())
        }
        Err(error) if error.reason() == Some(Reason::TopicNotFound) => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

/// A copy goes back under a named producer, with its place in the dead-letter topic as sequence: once, however often this
/// is begun.
async fn replay(
    client: &Client,
    dead: &TopicName,
    topic: &TopicName,
    name: &SubscriptionName,
) -> Result<u64, Failure> {
    let stop = CancellationToken::new();
    let foreign: Arc<Mutex<Option<String>>> = Arc::default();
    let processor = client
        .processor(dead.to_string(), REPLAY, topic.to_string())
        .producer_name(format!("{name}~{REPLAY}"))
        .start(Start::Earliest)
        .stop(stop.clone());
    let run = processor.run(|received| {
        let mut message = received.to_message();
        let origin = message.headers.get("geminga-origin-topic").cloned().unwrap_or_default();
        let of = message.headers.get("geminga-subscription").cloned().unwrap_or_default();
        let ours = origin == topic.to_string() && of == name.as_str();
        if !ours {
            *foreign.lock() = Some(format!("{} is of {origin}, subscription {of}", received.id));
        }
        message.headers.retain(|name, _| !name.starts_with("geminga-"));
        std::future::ready(if ours {
            Ok(vec![message])
        } else {
            Err(geminga_client::Error::Closed)
        })
    });
    let empty = async {
        let replay = SubscriptionName::parse(REPLAY)?;
        loop {
            tokio::time::sleep(REPLAY_LOOK).await;
            match client.admin().subscription(dead, &replay).await {
                Ok(found) if found.cursors.iter().all(|cursor| cursor.backlog_messages == 0) => {
                    return Ok::<(), Failure>(());
                }
                Ok(_) => {}
                // The processor creates it; one that cannot ends with the reason.
                Err(error) if error.reason() == Some(Reason::SubscriptionNotFound) => {}
                Err(error) => return Err(error.into()),
            }
        }
    };
    let mut run = Box::pin(run);
    let done = tokio::select! {
        done = &mut run => done,
        looked = empty => {
            stop.cancel();
            looked?;
            run.await
        }
    };
    if let Some(words) = foreign.lock().take() {
        let words = format!("{dead} has dead letters of others, which are left alone: {words}");
        return Err(Failure::new(
            Code::Refused,
            words,
            format!("geminga sub dlq ls {topic} {name}"),
        ));
    }
    Ok(done?.outputs)
}
