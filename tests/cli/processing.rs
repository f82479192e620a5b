//! Consume, transform, publish, with the server killed and the job stopped in the middle: one output per input (TX8).

use std::{collections::BTreeMap, time::Duration};

use futures::{StreamExt, future::ready};
use geminga_client::{Client, Error, Message, Start};
use geminga_runtime::random::Random;
use tokio_util::sync::CancellationToken;

use crate::harness::{PATIENCE, Standalone};

const INPUTS: u64 = 4_000;
const KILLS: u32 = 4;
/// Lives of the job between two kills of the server.
const LIVES: u32 = 3;

async fn client(server: &str) -> Client {
    let patience = Duration::from_secs(20);
    let builder = Client::builder().server(server).wait_for_server(patience);
    builder.build().await.expect("it listens")
}

/// One life of the job: killed after a random time, which is no clean end.
async fn live(client: &Client, random: &Random) {
    let job =
        client.processor("in", "job", "out").name("worker").start(Start::Earliest).run(|input| {
            let value = format!("{} {}", input.id, String::from_utf8_lossy(&input.value));
            ready(Ok(vec![Message::new(value)]))
        });
    let life = Duration::from_millis(50 + random.below(400));
    if let Ok(ended) = tokio::time::timeout(life, Box::pin(job)).await {
        panic!("it runs until it is stopped, and not: {ended:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_is_killed_again_and_again_leaves_one_output_per_input() {
    let data = tempfile::tempdir().expect("a temporary directory");
    let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let listen = port.local_addr().expect("bound").to_string();
    drop(port);
    let mut server = Standalone::start_at(data.path(), 1, &listen);
    server.ok(&["topic", "create", "in", "--segments", "2"]);
    server.ok(&["topic", "create", "out", "--segments", "3"]);
    let random = Random::from_seed(7);
    let client = client(&server.server).await;
    let producer = client.producer("in").build().await.expect("a layout");
    let mut pending = Vec::new();
    for number in 0..INPUTS {
        pending.push(producer.send(Message::new(number.to_string())).await.expect("taken"));
    }
    for pending in pending {
        pending.await.expect("stored");
    }
    producer.close().await.expect("drained");

    for _ in 0..KILLS {
        for _ in 0..LIVES {
            live(&client, &random).await;
        }
        server.kill();
        server = Standalone::start_at(data.path(), 1, &listen);
    }
    // The last life is left to finish.
    let stop = CancellationToken::new();
    let job = client.processor("in", "job", "out").name("worker").start(Start::Earliest);
    let job = job.stop(stop.clone()).run(|input| {
        let value = format!("{} {}", input.id, String::from_utf8_lossy(&input.value));
        ready(Ok::<_, Error>(vec![Message::new(value)]))
    });
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    let reading = async {
        let mut reader = client.reader("out").build().await.expect("it opens");
        while (counts.len() as u64) < INPUTS {
            let next = tokio::time::timeout(PATIENCE, reader.next()).await.unwrap_or_else(|_| {
                panic!("{} of {INPUTS} outputs came", counts.len());
            });
            let stored = next.expect("it does not end").expect("readable");
            let value = String::from_utf8_lossy(&stored.value).into_owned();
            *counts.entry(value).or_default() += 1;
        }
        // Nothing is behind the last one: what was sent twice would be.
        while let Ok(Some(stored)) =
            tokio::time::timeout(Duration::from_secs(1), reader.next()).await
        {
            let value = String::from_utf8_lossy(&stored.expect("readable").value).into_owned();
            *counts.entry(value).or_default() += 1;
        }
        stop.cancel();
    };
    let (ended, ()) = tokio::join!(Box::pin(job), reading);
    ended.expect("it was stopped");
    let twice: Vec<_> = counts.iter().filter(|(_, count)| **count != 1).take(5).collect();
    assert!(twice.is_empty(), "outputs that are there more than once: {twice:?}");
    assert_eq!(counts.len() as u64, INPUTS);
}
