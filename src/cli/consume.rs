//! `geminga consume`: the messages of a subscription, or of a topic without one, one a line.

mod pattern;

use std::{
    collections::BTreeMap,
    io::{self, Write},
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use clap::ValueEnum;
use futures::{FutureExt, StreamExt};
use geminga_client::{
    Client, Consumer, Position, Received, Start, Stored, SubscriptionName, SubscriptionSettings,
    SubscriptionType,
};
use geminga_runtime::units::Period;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{
    Global, args,
    exit::Failure,
    output::{self, Format},
    sub::Kind,
};

/// A quiet time after which the server is asked whether the backlog is empty.
const QUIET: Duration = Duration::from_millis(300);
/// Credit a segment of a consumer that stops after some messages.
const WINDOW_MESSAGES: u64 = 20_000;
const WINDOW_BYTES: u64 = 8 * 1024 * 1024;
/// Messages printed before they are settled, at most.
const SETTLE_EVERY: usize = 1_000;

#[derive(Debug, clap::Args)]
pub(crate) struct ConsumeArgs {
    /// tenant/namespace/topic, or a topic of public/default.
    #[arg(required_unless_present = "pattern")]
    topic: Option<String>,
    /// The subscription: it remembers what was accepted.
    #[arg(short, long, value_name = "NAME", required_unless_present = "reader")]
    subscription: Option<String>,
    /// Read without a subscription: nothing is settled, nothing is remembered.
    #[arg(long, conflicts_with_all = ["subscription", "kind", "then", "no_ack", "exit_when_empty", "name"])]
    reader: bool,
    /// With --reader: below the compaction horizon only the latest message of each key, then everything.
    #[arg(long, requires = "reader", conflicts_with = "subscription")]
    compacted: bool,
    /// Instead of a topic: all topics of the namespace whose whole name matches this regular expression, from their first
    /// message on; also those that come later.
    #[arg(long, value_name = "REGEX", conflicts_with_all = ["topic", "reader", "from", "name", "exit_when_empty", "segments"])]
    pattern: Option<String>,
    /// Of the pattern: tenant/namespace, or a namespace of public.
    #[arg(long, default_value = "public/default", value_name = "NAMESPACE")]
    namespace: String,
    /// Create the subscription here if it is missing: earliest or latest. A reader begins here: it also takes an offset, a
    /// time such as 2026-01-31T12:00:00Z, or a span back such as 15m-ago.
    #[arg(long, value_name = "WHERE", value_parser = args::position)]
    from: Option<Position>,
    /// The type of a subscription that is created.
    #[arg(long = "type", value_enum)]
    kind: Option<Kind>,
    /// A name for this consumer; it replaces another one of the same name.
    #[arg(long)]
    name: Option<String>,
    /// Stop after this many messages.
    #[arg(short = 'n', long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// What becomes of a message that was printed.
    #[arg(long, value_enum, default_value_t = Then::Accept)]
    then: Then,
    /// The reason of `--then reject`.
    #[arg(long, default_value = "rejected by geminga consume", value_name = "TEXT")]
    reason: String,
    /// Do not accept: the messages stay in the backlog. As `--then leave`.
    #[arg(long, conflicts_with = "then")]
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
enum Then {
    /// It is done.
    Accept,
    /// It stays in the backlog; its attempt does not count.
    Leave,
    /// It failed: it comes again after the subscription's backoff, until its attempts are over.
    Release,
    /// It goes to the dead-letter topic.
    Reject,
}

pub(crate) async fn run(args: ConsumeArgs, global: &Global) -> Result<(), Failure> {
    if args.kind.is_some() && args.from.is_none() && args.pattern.is_none() {
        let words = "--type is of a subscription that is created: say where it begins, with --from";
        return Err(Failure::usage(words, "consume"));
    }
    super::init_client_spans()?;
    let client = global.client().await?;
    let topic = args.topic.as_deref().unwrap_or_default();
    let Some(subscription) = &args.subscription else {
        return read(&args, topic, &client, global.output).await;
    };
    if let Some(pattern) = &args.pattern {
        return pattern::run(&args, pattern, subscription, &client, global.output).await;
    }
    let mut builder = client.consumer(topic, subscription);
    if let Some(from) = args.from {
        let start = match from {
            Position::Earliest => Start::Earliest,
            Position::Latest => Start::Latest,
            Position::Offset(_) | Position::TimeMs(_) => {
                let words =
                    "a subscription begins at earliest or latest; move it by geminga sub seek";
                return Err(Failure::usage(words, "consume"));
            }
        };
        builder = builder.start(start).create_topic(true);
    }
    if let Some(kind) = args.kind {
        let r#type = SubscriptionType::from(kind).into();
        builder = builder.settings(SubscriptionSettings { r#type, ..Default::default() });
    }
    if let Some(name) = &args.name {
        builder = builder.name(name);
    }
    if let Some(segments) = &args.segments {
        builder = builder.segments(segments.iter().copied());
    }
    if let Some(count) = args.count {
        // What is not wanted stays with the server, for others.
        builder = builder.window(count.min(WINDOW_MESSAGES), WINDOW_BYTES);
    }
    let mut consumer = builder.build().await?;
    let printed =
        Box::pin(print_all(&args, subscription, &client, &mut consumer, global.output)).await;
    // What was printed and settled is confirmed even if printing failed in the end.
    let closed = consumer.close().await;
    let count = printed?;
    closed?;
    output::note(&format!("consumed {count} messages"));
    Ok(())
}

/// Prints messages without a subscription.
async fn read(
    args: &ConsumeArgs,
    topic: &str,
    client: &Client,
    format: Format,
) -> Result<(), Failure> {
    let mut builder = client.reader(topic).from(args.from.unwrap_or_default());
    if args.compacted {
        builder = builder.compacted();
    }
    if let Some(segments) = &args.segments {
        builder = builder.segments(segments.iter().copied());
    }
    let mut reader = builder.build().await?;
    let (mut out, mut count) = (io::stdout(), 0);
    let idle = args.idle_timeout.as_ref().map_or(Duration::MAX, |period| period.0);
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    while count < args.count.unwrap_or(u64::MAX) {
        let item = match reader.next().now_or_never() {
            Some(item) => item,
            None => {
                out.flush()?;
                tokio::select! {
                    biased;
                    _ = &mut interrupted => break,
                    item = timeout(idle, reader.next()) => match item {
                        Ok(item) => item,
                        Err(_) => break,
                    },
                }
            }
        };
        let Some(stored) = item.transpose()? else { break };
        print(format, &stored, None, None, &mut out)?;
        count += 1;
    }
    out.flush()?;
    output::note(&format!("read {count} messages"));
    Ok(())
}

/// Messages that were printed and not settled yet.
struct Printed<'a> {
    args: &'a ConsumeArgs,
    /// Ordered types are accepted up to the last one of each segment.
    ordered: bool,
    messages: Vec<Received>,
}

impl Printed<'_> {
    /// Asks for what is to become of them; `close` waits for the answers.
    fn settle(&mut self) {
        let then = if self.args.no_ack { Then::Leave } else { self.args.then };
        let mut last: BTreeMap<u32, Received> = BTreeMap::new();
        for message in self.messages.drain(..) {
            match then {
                Then::Leave => {}
                Then::Accept if self.ordered => drop(last.insert(message.id.segment, message)),
                Then::Accept => drop(message.accept()),
                Then::Release => drop(message.release()),
                Then::Reject => drop(message.reject(&self.args.reason)),
            }
        }
        for message in last.into_values() {
            drop(message.accept_up_to());
        }
    }
}

async fn print_all(
    args: &ConsumeArgs,
    subscription: &str,
    client: &Client,
    consumer: &mut Consumer,
    format: Format,
) -> Result<u64, Failure> {
    let wanted = args.count.unwrap_or(u64::MAX);
    let mut out = io::stdout();
    let mut count = 0;
    let kind = consumer.settings().r#type();
    let ordered = !matches!(kind, SubscriptionType::Shared | SubscriptionType::KeyShared);
    let mut printed = Printed { args, ordered, messages: Vec::new() };
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    while count < wanted {
        let next = match consumer.next().now_or_never() {
            Some(ready) => Next::of(ready),
            None => {
                // Nothing is there at once: show and settle what was printed, then wait.
                out.flush()?;
                printed.settle();
                tokio::select! {
                    biased;
                    _ = &mut interrupted => Next::End,
                    next = wait(args, subscription, client, consumer, count) => next?,
                }
            }
        };
        let received = match next {
            Next::Message(received) => *received,
            Next::Failed(error) => {
                out.flush()?;
                printed.settle();
                return Err(error);
            }
            Next::End => break,
        };
        let span = received.process_span();
        print(format, &received.to_stored(), Some(received.attempt), None, &mut out)?;
        drop(span);
        printed.messages.push(received);
        count += 1;
        if printed.messages.len() >= SETTLE_EVERY {
            out.flush()?;
            printed.settle();
        }
    }
    out.flush()?;
    printed.settle();
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
    subscription: &str,
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
        if over
            || (args.exit_when_empty
                && is_empty(args, subscription, client, consumer, count).await?)
        {
            return Ok(Next::End);
        }
    }
}

/// Whether the server has nothing left for this subscription.
async fn is_empty(
    args: &ConsumeArgs,
    subscription: &str,
    client: &Client,
    consumer: &Consumer,
    count: u64,
) -> Result<bool, Failure> {
    let name = SubscriptionName::parse(subscription)?;
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
    let leaves = args.no_ack || args.then == Then::Leave;
    Ok(if leaves { backlog <= count } else { backlog == 0 })
}

/// One message, a line; `topic` where it could be of several.
pub(crate) fn print(
    format: Format,
    message: &Stored,
    attempt: Option<u32>,
    topic: Option<&str>,
    out: &mut impl Write,
) -> io::Result<()> {
    if format == Format::Table {
        out.write_all(&message.value)?;
        return out.write_all(b"\n");
    }
    let mut object = json!({
        "segment": message.id.segment,
        "offset": message.id.offset,
        "key": message.key.as_ref().map(|key| String::from_utf8_lossy(key)),
        "headers": message.headers,
        "publish_time_ms": message.publish_time_ms,
    });
    if let Some(attempt) = attempt {
        object["attempt"] = attempt.into();
    }
    if let Some(topic) = topic {
        object["topic"] = topic.into();
    }
    match std::str::from_utf8(&message.value) {
        Ok(text) => object["value"] = Value::from(text),
        Err(_) => object["value_base64"] = Value::from(BASE64_STANDARD.encode(&message.value)),
    }
    if let Some(time) = message.event_time_ms {
        object["event_time_ms"] = Value::from(time);
    }
    output::element(format, &object, out)
}
