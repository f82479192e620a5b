//! `geminga consume --pattern`: the messages of all topics of a namespace that match, also of those that come later.

use std::{
    io::{self, Write},
    time::Duration,
};

use futures::{FutureExt, StreamExt};
use geminga_client::{Client, PatternConsumer, SubscriptionSettings, SubscriptionType};
use tokio::time::timeout;

use super::{ConsumeArgs, Printed, SETTLE_EVERY, WINDOW_BYTES, WINDOW_MESSAGES, print};
use crate::cli::{
    exit::Failure,
    output::{self, Format},
};

/// Consumes until the wanted number is printed, nothing comes for the idle time, or the user stops it.
pub(super) async fn run(
    args: &ConsumeArgs,
    pattern: &str,
    subscription: &str,
    client: &Client,
    format: Format,
) -> Result<(), Failure> {
    let mut builder = client.pattern(&args.namespace, pattern, subscription);
    if let Some(kind) = args.kind {
        let r#type = SubscriptionType::from(kind).into();
        builder = builder.settings(SubscriptionSettings { r#type, ..Default::default() });
    }
    if let Some(count) = args.count {
        // What is not wanted stays with the server, for others.
        builder = builder.window(count.min(WINDOW_MESSAGES), WINDOW_BYTES);
    }
    let mut consumer = builder.build().await?;
    let printed = print_all(args, &mut consumer, format).await;
    // What was printed and settled is confirmed even if printing failed in the end.
    let closed = consumer.close().await;
    let count = printed?;
    closed?;
    output::note(&format!("consumed {count} messages"));
    Ok(())
}

async fn print_all(
    args: &ConsumeArgs,
    consumer: &mut PatternConsumer,
    format: Format,
) -> Result<u64, Failure> {
    let (mut out, mut count) = (io::stdout(), 0);
    let idle = args.idle_timeout.as_ref().map_or(Duration::MAX, |period| period.0);
    // Message by message: those of several topics have no order among them.
    let mut printed = Printed { args, ordered: false, messages: Vec::new() };
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    while count < args.count.unwrap_or(u64::MAX) {
        let item = match consumer.next().now_or_never() {
            Some(item) => item,
            None => {
                // Nothing is there at once: show and settle what was printed, then wait.
                out.flush()?;
                printed.settle();
                tokio::select! {
                    biased;
                    _ = &mut interrupted => break,
                    item = timeout(idle, consumer.next()) => match item {
                        Ok(item) => item,
                        Err(_) => break,
                    },
                }
            }
        };
        let Some((topic, received)) = item else { break };
        let received = match received {
            Ok(received) => received,
            Err(error) => {
                // One topic is no reason to leave the others: its error is told, and it is tried again.
                output::note(&format!("{topic}: {error}"));
                continue;
            }
        };
        let span = received.process_span();
        let name = topic.to_string();
        print(format, &received.to_stored(), Some(received.attempt), Some(&name), &mut out)?;
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
