//! `geminga demo`: the main job on real input, with a bookie killed half way, and the proof that it went well.

mod flights;
mod proof;

use std::{net::Ipv4Addr, time::Duration};

use bytes::Bytes;
use futures::{StreamExt, future::try_join_all};
use geminga_client::{Client, Consumer, Message, Pending, Routing, Start, topic_name};
use geminga_runtime::random::Random;
use serde::Serialize;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout},
};

use crate::{
    cli::{
        Global,
        exit::{Code, Failure},
        output::{self, Format, note, progress},
    },
    standalone::{Settings, Standalone},
};
use proof::{Seen, Sent, Verdict};

const TOPIC: &str = "public/default/flights";
const SEGMENTS: u32 = 4;
const BOOKIES: u32 = 3;
/// Carries a flight's place in the input, so that the proof can tell lost from repeated.
const NUMBER_HEADER: &str = "n";
/// Receipts that wait at a time.
const IN_FLIGHT_MAX: usize = 20_000;
/// No message for so long means that something is stuck.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Time for streams to end.
const DRAIN: Duration = Duration::from_secs(5);
/// A consumer settles what it read after so many messages.
const ACCEPT_EVERY: u64 = 2_000;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Leave the data directory in place and print where it is.
    #[arg(long)]
    keep: bool,
}

/// What is printed at the end.
#[derive(Serialize)]
struct Figures {
    flights: u64,
    publish_seconds: f64,
    publish_messages_per_second: f64,
    bookie_killed_after: u64,
    consume_seconds: f64,
    consume_messages_per_second: f64,
    checksum_sent: String,
    checksum_received: String,
    proof: Verdict,
}

pub(crate) async fn run(args: Args, global: &Global) -> Result<(), Failure> {
    let flights = flights::read()?;
    let directory =
        std::env::temp_dir().join(format!("geminga-demo-{:016x}", Random::from_os().u64()));
    note(&format!(
        "one broker and {BOOKIES} bookies in this process, data in {}; {} flights from New York City in 2013",
        directory.display(),
        flights.len()
    ));
    let settings = Settings {
        data_dir: directory.clone(),
        bookies: Some(BOOKIES),
        listen: (Ipv4Addr::LOCALHOST, 0).into(),
        health_listen: None,
        tier_url: None,
    };
    let mut server = Standalone::start(settings).await?;
    let outcome = Box::pin(fly(&mut server, flights)).await;
    server.shutdown(DRAIN).await;
    if args.keep {
        note(&format!("the data stays in {}", directory.display()));
    } else {
        std::fs::remove_dir_all(&directory)?;
    }
    let figures = outcome?;
    report(&figures, global.output)?;
    if figures.proof.holds() && figures.checksum_sent == figures.checksum_received {
        note(&format!(
            "proved: nothing lost, nothing twice, order kept per key; one of {BOOKIES} bookies was killed half way"
        ));
        Ok(())
    } else {
        let message = format!("the proof failed: {:?}", figures.proof);
        Err(Failure::new(Code::ProofFailed, message, "GEMINGA_LOG=debug geminga demo --keep"))
    }
}

async fn fly(server: &mut Standalone, flights: Vec<flights::Flight>) -> Result<Figures, Failure> {
    let client = Client::builder().server(format!("http://{}", server.address())).build().await?;
    client.admin().create_topic(&topic_name(TOPIC)?, SEGMENTS).await?;

    let total = flights.len();
    let bar = progress(total as u64, "publishing");
    let begun = Instant::now();
    let (sent, killed_after) = publish(&client, server, flights, &bar).await?;
    let published = begun.elapsed();
    bar.finish_and_clear();

    let bar = progress(total as u64, "consuming");
    let begun = Instant::now();
    let mut shares = vec![0u64; SEGMENTS as usize];
    for (segment, _) in sent.iter().filter_map(|one| one.receipt) {
        shares[segment as usize] += 1;
    }
    let consumers = shares
        .iter()
        .enumerate()
        .map(|(segment, share)| consume(&client, segment as u32, *share, bar.clone()));
    let seen: Vec<Seen> = try_join_all(consumers).await?.into_iter().flatten().collect();
    let consumed = begun.elapsed();
    bar.finish_and_clear();

    let sum_of = |numbered: &mut dyn Iterator<Item = (usize, &[u8])>| {
        format!("{:016x}", proof::checksum(numbered))
    };
    Ok(Figures {
        flights: total as u64,
        publish_seconds: published.as_secs_f64(),
        publish_messages_per_second: total as f64 / published.as_secs_f64(),
        bookie_killed_after: killed_after,
        consume_seconds: consumed.as_secs_f64(),
        consume_messages_per_second: seen.len() as f64 / consumed.as_secs_f64(),
        checksum_sent: sum_of(&mut sent.iter().enumerate().map(|(n, one)| (n, &one.line[..]))),
        checksum_received: sum_of(&mut seen.iter().map(|one| (one.number, &one.line[..]))),
        proof: proof::judge(&sent, &seen),
    })
}

/// Publishes all flights and kills a bookie when half of the receipts are in; returns what was sent, with its receipts.
async fn publish(
    client: &Client,
    server: &mut Standalone,
    flights: Vec<flights::Flight>,
    bar: &indicatif::ProgressBar,
) -> Result<(Vec<Sent>, u64), Failure> {
    let producer = client.producer(TOPIC).routing(Routing::KeyHash).build().await?;
    let total = flights.len();
    let (waiting, mut receipts) = mpsc::channel::<(Sent, Pending)>(IN_FLIGHT_MAX);
    let (half_done, half) = oneshot::channel();
    let send = async {
        let waiting = waiting;
        for (number, flight) in flights.into_iter().enumerate() {
            let mut message =
                Message::new(flight.line.clone()).with_header(NUMBER_HEADER, number.to_string());
            if let Some(key) = &flight.key {
                message = message.with_key(key.clone());
            }
            let pending = producer.send(message).await?;
            let sent = Sent { key: flight.key, line: flight.line, receipt: None };
            if waiting.send((sent, pending)).await.is_err() {
                break; // the other half failed, and tells why
            }
        }
        Ok::<_, Failure>(())
    };
    let settle = async {
        let mut half_done = Some(half_done);
        let mut done = Vec::with_capacity(total);
        while let Some((mut sent, pending)) = receipts.recv().await {
            let receipt = pending.await?;
            sent.receipt = receipt.id.map(|id| (id.segment, id.offset));
            done.push(sent);
            bar.inc(1);
            if done.len() * 2 >= total
                && let Some(half_done) = half_done.take()
            {
                // Without a listener the run has failed already.
                let _ = half_done.send(done.len() as u64);
            }
        }
        Ok::<_, Failure>(done)
    };
    let kill = async {
        let after = half.await.unwrap_or_default();
        server.kill_bookie(0);
        Ok::<_, Failure>(after)
    };
    let ((), sent, killed_after) = tokio::try_join!(send, settle, kill)?;
    producer.close().await?;
    Ok((sent, killed_after))
}

/// One exclusive consumer of one segment.
async fn consume(
    client: &Client,
    segment: u32,
    expected: u64,
    bar: indicatif::ProgressBar,
) -> Result<Vec<Seen>, Failure> {
    let mut consumer: Consumer =
        client.consumer(TOPIC, "proof").segments([segment]).start(Start::Earliest).build().await?;
    let mut seen = Vec::with_capacity(expected as usize);
    let mut settling = Vec::new();
    while (seen.len() as u64) < expected {
        let stuck = || {
            let silence = SILENCE_MAX.as_secs();
            let count = seen.len();
            let message = format!(
                "segment {segment} gave {count} of {expected} messages, then nothing for {silence} s"
            );
            Failure::new(Code::ProofFailed, message, "GEMINGA_LOG=debug geminga demo --keep")
        };
        let Some(message) = timeout(SILENCE_MAX, consumer.next()).await.map_err(|_| stuck())?
        else {
            break;
        };
        let message = message?;
        let number = message.headers.get(NUMBER_HEADER).and_then(|number| number.parse().ok());
        seen.push(Seen {
            segment: message.id.segment,
            offset: message.id.offset,
            number: number.unwrap_or(usize::MAX),
            key: message.key.clone(),
            line: Bytes::clone(&message.value),
        });
        bar.inc(1);
        if (seen.len() as u64).is_multiple_of(ACCEPT_EVERY) || seen.len() as u64 == expected {
            settling.push(consumer.accept_up_to(message.id));
        }
    }
    for settled in settling {
        settled.await?;
    }
    consumer.close().await?;
    Ok(seen)
}

fn report(figures: &Figures, format: Format) -> Result<(), Failure> {
    if format != Format::Table {
        return Ok(output::document(format, figures)?);
    }
    let proof = &figures.proof;
    let rate = |messages: f64, seconds: f64| format!("{messages:.0} messages/s, {seconds:.2} s");
    Ok(output::fields(&[
        ("flights published", figures.flights.to_string()),
        ("publish", rate(figures.publish_messages_per_second, figures.publish_seconds)),
        ("bookie killed after", format!("{} receipts", figures.bookie_killed_after)),
        ("consume", rate(figures.consume_messages_per_second, figures.consume_seconds)),
        ("lost", proof.lost.to_string()),
        ("twice", proof.repeated.to_string()),
        ("changed", proof.changed.to_string()),
        ("out of order within a key", proof.reordered.to_string()),
        (
            "checksum sent / received",
            format!("{} / {}", figures.checksum_sent, figures.checksum_received),
        ),
    ])?)
}
