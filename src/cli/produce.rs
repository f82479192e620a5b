//! `geminga produce`: standard input to a topic; receipts in the order of the input.

use std::io::{self, Write};

use base64::{Engine, prelude::BASE64_STANDARD};
use clap::ValueEnum;
use futures::FutureExt;
use geminga_client::{
    Access, Batching, Compression, Error, Message, Pending, Producer, Receipt, Routing,
};
use geminga_runtime::units::Period;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{
    Global, args,
    exit::Failure,
    lines::Lines,
    output::{self, Format},
};

/// Receipts awaited at a time; the bytes are bounded by the producer's own budget.
const AWAITED_MAX: usize = 100_000;

#[derive(Debug, clap::Args)]
pub(crate) struct ProduceArgs {
    /// tenant/namespace/topic, or a topic of public/default.
    topic: String,
    /// Each line is an object {"key": ..., "value": ..., "headers": {...}}; "value_base64" for bytes that are not text.
    #[arg(long)]
    ndjson: bool,
    /// The key of all messages.
    #[arg(short, long, conflicts_with = "ndjson")]
    key: Option<String>,
    /// A producer name: the server goes on where this name stopped.
    #[arg(long)]
    name: Option<String>,
    #[arg(long, value_enum, default_value_t = CompressionArg::None)]
    compression: CompressionArg,
    /// Publish to this segment only.
    #[arg(long)]
    segment: Option<u32>,
    /// How messages are spread over segments.
    #[arg(long, value_enum, default_value_t = RoutingArg::KeyHash, conflicts_with = "segment")]
    routing: RoutingArg,
    /// Shared and key-shared subscriptions get the messages so long after now, such as 30s.
    #[arg(long, value_name = "TIME")]
    delay: Option<Period>,
    /// Shared and key-shared subscriptions get the messages at this time, such as 2026-01-31T12:00:00Z.
    #[arg(long, value_name = "WHEN", value_parser = args::time_ms, conflicts_with = "delay")]
    deliver_at: Option<u64>,
    /// Publish only if the first message gets this offset, the next one the one behind it, and so on.
    #[arg(long, value_name = "OFFSET", requires = "segment")]
    expected_offset: Option<u64>,
    /// Who else may publish to the segments meanwhile.
    #[arg(long, value_enum, default_value_t = AccessArg::Shared)]
    access: AccessArg,
    /// How long a message waits for others while batches are in flight.
    #[arg(long, default_value = "1ms", value_name = "TIME")]
    linger: Period,
    /// How long one message may take until its receipt; what was not sent by then was not stored.
    #[arg(long, default_value = "60s", value_name = "TIME")]
    timeout: Period,
    /// Add a W3C traceparent header to each message that has none.
    #[arg(long)]
    trace: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum CompressionArg {
    None,
    Lz4,
    Zstd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RoutingArg {
    /// Equal keys to one segment; messages without a key as sticky-batch.
    KeyHash,
    /// To one segment until a batch of it is full, then to the next.
    StickyBatch,
    /// Each message to the next segment.
    RoundRobin,
    /// Each message to a segment drawn for it.
    Random,
}

impl From<RoutingArg> for Routing {
    fn from(arg: RoutingArg) -> Self {
        match arg {
            RoutingArg::KeyHash => Self::KeyHash,
            RoutingArg::StickyBatch => Self::StickyBatch,
            RoutingArg::RoundRobin => Self::RoundRobin,
            RoutingArg::Random => Self::Random,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum AccessArg {
    /// Anybody.
    Shared,
    /// Nobody: refused while another producer is there.
    Exclusive,
    /// Nobody: producers that are there are fenced. Needs --name.
    ExclusiveWithFencing,
}

impl From<AccessArg> for Access {
    fn from(arg: AccessArg) -> Self {
        match arg {
            AccessArg::Shared => Self::Shared,
            AccessArg::Exclusive => Self::Exclusive,
            AccessArg::ExclusiveWithFencing => Self::ExclusiveWithFencing,
        }
    }
}

impl From<CompressionArg> for Compression {
    fn from(arg: CompressionArg) -> Self {
        match arg {
            CompressionArg::None => Self::None,
            CompressionArg::Lz4 => Self::Lz4,
            CompressionArg::Zstd => Self::Zstd,
        }
    }
}

pub(crate) async fn run(args: ProduceArgs, global: &Global) -> Result<(), Failure> {
    super::init_client_spans()?;
    let client = global.client().await?;
    let mut builder = client
        .producer(&args.topic)
        .compression(args.compression.into())
        .routing(args.routing.into())
        .access(args.access.into())
        .trace_ratio(if args.trace { 1.0 } else { 0.0 })
        .message_timeout(args.timeout.0)
        .batching(Batching { linger: args.linger.0, ..Batching::default() });
    if let Some(name) = &args.name {
        builder = builder.name(name);
    }
    if let Some(segment) = args.segment {
        builder = builder.routing(Routing::Segment(segment));
    }
    let producer = builder.build().await?;
    let (awaited, receipts) = mpsc::channel(AWAITED_MAX);
    let (sent, printed) = tokio::join!(
        Box::pin(send_all(&args, &producer, awaited)),
        print_all(global.output, receipts)
    );
    let count = printed?;
    sent?;
    producer.close().await?;
    output::note(&format!("published {count} messages to {}", producer.topic()));
    Ok(())
}

/// Sends every line, until one is refused.
async fn send_all(
    args: &ProduceArgs,
    producer: &Producer,
    awaited: mpsc::Sender<Pending>,
) -> Result<(), Failure> {
    let lines = Lines::new();
    let mut number = 0u64;
    loop {
        let chunk = tokio::select! {
            biased;
            // Receipts failed: there is no point in sending on.
            () = awaited.closed() => return Ok(()),
            chunk = lines.next() => chunk?,
        };
        if chunk.is_empty() {
            return Ok(());
        }
        for line in chunk {
            number += 1;
            let message = if args.ndjson { parse(&line, number)? } else { Message::new(line) };
            let message = match &args.key {
                Some(key) => message.with_key(key.clone()),
                None => message,
            };
            let message = match (args.deliver_at, args.delay) {
                (Some(time), _) => message.with_deliver_at_ms(time),
                (None, Some(delay)) => message.with_delay(delay.0),
                (None, None) => message,
            };
            let pending = match args.expected_offset {
                None => producer.send(message).await?,
                Some(first) => {
                    let expected = first.saturating_add(number - 1);
                    producer.send_expecting(message, expected).await?
                }
            };
            if awaited.send(pending).await.is_err() {
                return Ok(());
            }
        }
    }
}

/// Prints receipts in order; returns how many there were.
async fn print_all(format: Format, mut receipts: mpsc::Receiver<Pending>) -> Result<u64, Failure> {
    let mut count = 0;
    let mut out = io::stdout();
    while let Some(mut pending) = receipts.recv().await {
        let receipt = match (&mut pending).now_or_never() {
            Some(ready) => ready,
            None => {
                out.flush()?; // what is printed is seen before we wait
                pending.await
            }
        };
        let receipt = match receipt {
            Ok(receipt) => receipt,
            Err(error) => {
                out.flush()?;
                receipts.close();
                return Err(failed(error, count));
            }
        };
        count += 1;
        if format != Format::Table {
            output::element(format, &receipt_value(&receipt), &mut out)?;
        }
    }
    out.flush()?;
    Ok(count)
}

fn failed(error: Error, printed: u64) -> Failure {
    let mut failure = Failure::from(error);
    failure.message = format!("message {}: {}", printed + 1, failure.message);
    failure
}

fn receipt_value(receipt: &Receipt) -> Value {
    json!({
        "segment": receipt.segment,
        "offset": receipt.id.map(|id| id.offset),
        "level": receipt.level.as_str(),
        "epoch": receipt.epoch,
        "duplicate": receipt.duplicate,
    })
}

/// One NDJSON line as a message.
fn parse(line: &[u8], number: u64) -> Result<Message, Failure> {
    let wrong = |what: String| Failure::usage(format!("line {number}: {what}"), "produce");
    let object: Value =
        serde_json::from_slice(line).map_err(|error| wrong(format!("not JSON: {error}")))?;
    let Value::Object(fields) = object else { return Err(wrong("not an object".into())) };
    let mut message = Message::default();
    let mut has_value = false;
    for (name, value) in fields {
        match (name.as_str(), value) {
            ("key", Value::Null) => {}
            ("key", Value::String(key)) => message.key = Some(key.into_bytes().into()),
            ("value", value) => {
                has_value = true;
                message.value = match value {
                    Value::String(text) => text.into_bytes().into(),
                    other => other.to_string().into_bytes().into(),
                };
            }
            ("value_base64", Value::String(text)) => {
                has_value = true;
                let bytes = BASE64_STANDARD
                    .decode(&text)
                    .map_err(|_| wrong("value_base64 is not base64".into()))?;
                message.value = bytes.into();
            }
            ("headers", Value::Object(headers)) => {
                for (name, value) in headers {
                    let Value::String(value) = value else {
                        return Err(wrong(format!("header {name:?} is not a string")));
                    };
                    message.headers.insert(name, value);
                }
            }
            ("event_time_ms", Value::Number(time)) if time.is_u64() => {
                message.event_time_ms = time.as_u64()
            }
            ("deliver_at_ms", Value::Number(time)) if time.is_u64() => {
                message.deliver_at_ms = time.as_u64()
            }
            // What `consume -o json` prints can be published again.
            ("segment" | "offset" | "publish_time_ms" | "attempt", _) => {}
            (name, _) => {
                return Err(wrong(format!("the field {name:?} is unknown or of the wrong type")));
            }
        }
    }
    if has_value { Ok(message) } else { Err(wrong("there is no \"value\"".into())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_becomes_a_message() {
        let line = br#"{"key":"k","value":"v","headers":{"a":"b"},"event_time_ms":5}"#;
        let message = parse(line, 1).expect("valid");
        assert_eq!(
            message,
            Message {
                event_time_ms: Some(5),
                ..Message::new("v").with_key("k").with_header("a", "b")
            }
        );
        assert_eq!(parse(br#"{"value":{"x":[1,2]}}"#, 1).expect("valid").value, r#"{"x":[1,2]}"#);
        assert_eq!(parse(br#"{"value_base64":"AP8="}"#, 1).expect("valid").value, &[0u8, 255][..]);
    }

    #[test]
    fn a_wrong_line_names_its_number_and_what_is_wrong() {
        for (line, what) in [
            (&b"nonsense"[..], "not JSON"),
            (b"[1]", "not an object"),
            (b"{}", "no \"value\""),
            (br#"{"value":"v","keey":"k"}"#, "keey"),
            (br#"{"value":"v","headers":{"a":1}}"#, "not a string"),
            (br#"{"value_base64":"%"}"#, "base64"),
        ] {
            let failure = parse(line, 7).expect_err("wrong");
            assert!(
                failure.message.starts_with("line 7: ") && failure.message.contains(what),
                "{failure:?}"
            );
        }
    }
}
