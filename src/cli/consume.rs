//! `geminga consume`: the messages of a subscription, one a line.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use clap::ValueEnum;
use futures::{FutureExt, StreamExt};
use geminga_client::{Client, Consumer, MessageId, Received, Start, SubscriptionName};
use geminga_runtime::units::Period;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{
    Global,
    exit::Failure,
    output::{self, Format},
};

/// A quiet time after which the server is asked whether the backlog is empty.
const QUIET: Duration = Duration::from_millis(300);
/// Messages printed before they are accepted, at most.
const ACCEPT_EVERY: u64 = 1_000;

#[derive(Debug, clap::Args)]
pub(crate) struct ConsumeArgs {
    /// tenant/namespace/topic, or a topic of public/default.
    topic: String,
    /// The subscription: it remembers what was accepted.
    #[arg(short, long, value_name = "NAME")]
    subscription: String,
    /// Create the subscription here if it is missing.
    #[arg(long, value_enum, value_name = "WHERE")]
    from: Option<From>,
    /// Stop after this many messages.
    #[arg(short = 'n', long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Do not accept: the messages stay in the backlog.
    #[arg(long)]
    no_ack: bool,
    /// Stop when everything published so far is consumed.
    #[arg(long)]
    exit_when_empty: bool,
    /// Stop when nothing came for so long, such as 5s.
    #[arg(long, value_name = "TIME")]
    idle_timeout: Option<Period>,
    /// Only these segments.
    #[arg(long, value_delimiter = ',')]
    segments: Option<Vec<u32>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum From {
    Earliest,
    Latest,
}

impl std::convert::From<From> for Start {
    fn from(from: From) -> Self {
        match from {
            From::Earliest => Self::Earliest,
            From::Latest => Self::Latest,
        }
    }
}

pub(crate) async fn run(args: ConsumeArgs, global: &Global) -> Result<(), Failure> {
    super::init_client_spans()?;
    let client = global.client().await?;
    let mut builder = client.consumer(&args.topic, &args.subscription);
    if let Some(from) = args.from {
        builder = builder.start(from.into()).create_topic(true);
    }
    if let Some(segments) = &args.segments {
        builder = builder.segments(segments.iter().copied());
    }
    let mut consumer = builder.build().await?;
    let printed = Box::pin(print_all(&args, &client, &mut consumer, global.output)).await;
    // What was printed and accepted is confirmed even if printing failed in the end.
    let closed = consumer.close().await;
    let count = printed?;
    closed?;
    output::note(&format!("consumed {count} messages"));
    Ok(())
}

async fn print_all(
    args: &ConsumeArgs,
    client: &Client,
    consumer: &mut Consumer,
    format: Format,
) -> Result<u64, Failure> {
    let wanted = args.count.unwrap_or(u64::MAX);
    let mut out = io::stdout();
    let mut count = 0;
    // The last printed message of each segment that is not accepted yet.
    let mut unaccepted: BTreeMap<u32, u64> = BTreeMap::new();
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    while count < wanted {
        let next = match consumer.next().now_or_never() {
            Some(ready) => Next::of(ready),
            None => {
                // Nothing is there at once: show and accept what was printed, then wait.
                out.flush()?;
                accept(args, consumer, &mut unaccepted);
                tokio::select! {
                    biased;
                    _ = &mut interrupted => Next::End,
                    next = wait(args, client, consumer, count) => next?,
                }
            }
        };
        let received = match next {
            Next::Message(received) => *received,
            Next::Failed(error) => {
                out.flush()?;
                accept(args, consumer, &mut unaccepted);
                return Err(error);
            }
            Next::End => break,
        };
        let span = received.process_span();
        print(format, &received, &mut out)?;
        drop(span);
        unaccepted.insert(received.id.segment, received.id.offset);
        count += 1;
        if count % ACCEPT_EVERY == 0 {
            out.flush()?;
            accept(args, consumer, &mut unaccepted);
        }
    }
    out.flush()?;
    accept(args, consumer, &mut unaccepted);
    Ok(count)
}

enum Next {
    Message(Box<Received>),
    Failed(Failure),
    End,
}

impl Next {
    fn of(item: Option<Result<Received, geminga_client::Error>>) -> Self {
        match item {
            Some(Ok(received)) => Self::Message(Box::new(received)),
            Some(Err(error)) => Self::Failed(error.into()),
            None => Self::End,
        }
    }
}

/// Waits for the next message, or for a reason to stop.
async fn wait(
    args: &ConsumeArgs,
    client: &Client,
    consumer: &mut Consumer,
    count: u64,
) -> Result<Next, Failure> {
    let mut idle = Duration::ZERO;
    loop {
        let limit = args.idle_timeout.as_ref().map(|period| period.0.saturating_sub(idle));
        let pause = match (args.exit_when_empty, limit) {
            (true, Some(limit)) => QUIET.min(limit),
            (true, None) => QUIET,
            (false, Some(limit)) => limit,
            (false, None) => return Ok(Next::of(consumer.next().await)),
        };
        if let Ok(item) = timeout(pause, consumer.next()).await {
            return Ok(Next::of(item));
        }
        idle += pause;
        let over = args.idle_timeout.as_ref().is_some_and(|period| idle >= period.0);
        if over || (args.exit_when_empty && is_empty(args, client, consumer, count).await?) {
            return Ok(Next::End);
        }
    }
}

/// Whether the server has nothing left for this subscription.
async fn is_empty(
    args: &ConsumeArgs,
    client: &Client,
    consumer: &Consumer,
    count: u64,
) -> Result<bool, Failure> {
    let name = SubscriptionName::parse(&args.subscription)?;
    let described = client.admin().subscription(consumer.topic(), &name).await?;
    let ours =
        |segment: u32| args.segments.as_ref().is_none_or(|segments| segments.contains(&segment));
    let backlog: u64 = described
        .cursors
        .iter()
        .filter(|cursor| ours(cursor.segment))
        .map(|cursor| cursor.backlog_messages)
        .sum();
    // Without accepts the backlog stays: what was printed is still in it.
    Ok(if args.no_ack { backlog <= count } else { backlog == 0 })
}

fn accept(args: &ConsumeArgs, consumer: &Consumer, unaccepted: &mut BTreeMap<u32, u64>) {
    for (segment, offset) in std::mem::take(unaccepted) {
        if !args.no_ack {
            drop(consumer.accept_up_to(MessageId { segment, offset })); // close() waits for its confirmation
        }
    }
}

fn print(format: Format, received: &Received, out: &mut impl Write) -> io::Result<()> {
    if format == Format::Table {
        out.write_all(&received.value)?;
        return out.write_all(b"\n");
    }
    let mut object = json!({
        "segment": received.id.segment,
        "offset": received.id.offset,
        "key": received.key.as_ref().map(|key| String::from_utf8_lossy(key)),
        "headers": received.headers,
        "publish_time_ms": received.publish_time_ms,
    });
    match std::str::from_utf8(&received.value) {
        Ok(text) => object["value"] = Value::from(text),
        Err(_) => object["value_base64"] = Value::from(BASE64_STANDARD.encode(&received.value)),
    }
    if let Some(time) = received.event_time_ms {
        object["event_time_ms"] = Value::from(time);
    }
    output::element(format, &object, out)
}
