//! How streams live and end: signs of life, leaving, and servers that ask to go.

use std::{collections::BTreeSet, time::Duration};

use futures::StreamExt;
use geminga_client::{Client, Consumer, Message};
use geminga_proto::v1::{
    Ping, consume_frame::Frame, consume_reply::Reply, publish_reply, settle::Verb,
};
use geminga_runtime::random::Random;

use crate::server::{ConsumeCall, PublishCall, Server, delivery, go_away, jump, soon};

async fn client(server: &Server, heartbeat: Duration) -> Client {
    let builder = Client::builder().server(&server.address).random(Random::from_seed(1));
    builder.heartbeat(heartbeat).build().await.expect("a good address")
}

async fn consumer(server: &Server, client: &Client) -> (Consumer, ConsumeCall) {
    let (consumer, call) =
        tokio::join!(soon(client.consumer("t", "s").build()), server.consume_from(0));
    (consumer.expect("it opened"), call)
}

async fn pinged(call: &mut ConsumeCall) {
    while !matches!(soon(call.next()).await.expect("it goes on"), Frame::Ping(_)) {}
    call.reply(Reply::Pong(Ping { token: 0 })).await;
}

/// Lets the answer come in, which no test sees otherwise.
async fn turn() {
    tokio::time::sleep(Duration::from_millis(5)).await;
}

#[tokio::test]
async fn both_kinds_of_stream_promise_a_sign_of_life_and_keep_to_it() {
    let server = Server::start().await;
    let client = server.client().await;
    let (_consumer, mut call) = consumer(&server, &client).await;
    assert_eq!(call.open.heartbeat_ms, 10_000);
    for _ in 0..5 {
        jump(Duration::from_secs(8)).await;
        pinged(&mut call).await;
        turn().await;
    }
    let producer = client.producer("t").build().await.expect("a layout");
    let pending = producer.send(Message::new("a")).await.expect("room");
    let mut call = server.publish_from(0).await;
    assert_eq!(call.open.heartbeat_ms, 10_000);
    let batch = call.batch().await;
    call.receipt(&batch, 0).await;
    soon(pending).await.expect("stored");
    for _ in 0..5 {
        jump(Duration::from_secs(8)).await;
        call.ping().await;
        call.reply(publish_reply::Reply::Pong(Ping { token: 0 })).await;
        turn().await;
    }
}

#[tokio::test]
async fn a_heartbeat_of_zero_promises_nothing() {
    let server = Server::start().await;
    let client = client(&server, Duration::ZERO).await;
    let (_consumer, mut call) = consumer(&server, &client).await;
    assert_eq!(call.open.heartbeat_ms, 0);
    call.credit().await;
    jump(Duration::from_secs(14)).await;
    call.nothing_comes().await;
}

#[tokio::test]
async fn a_server_that_is_silent_for_three_intervals_is_left_though_it_owes_nothing() {
    let server = Server::start().await;
    let client = client(&server, Duration::from_secs(2)).await;
    let (mut consumer, _silent) = consumer(&server, &client).await;
    jump(Duration::from_secs(2)).await;
    turn().await;
    jump(Duration::from_secs(4)).await;
    let call = server.consume_from(0).await;
    call.deliver(delivery(0, 1, "h")).await;
    assert_eq!(soon(consumer.next()).await.expect("goes on").expect("a message").id.offset, 0);

    let producer = client.producer("t").build().await.expect("a layout");
    let pending = producer.send(Message::new("a")).await.expect("room");
    let mut silent = server.publish_from(0).await;
    let batch = silent.batch().await;
    silent.receipt(&batch, 0).await;
    soon(pending).await.expect("stored");
    jump(Duration::from_secs(2)).await;
    turn().await;
    jump(Duration::from_secs(4)).await;
    assert!(soon(silent.next()).await.is_none(), "it is left");
    let pending = producer.send(Message::new("b")).await.expect("room");
    let mut call = server.publish_from(1).await;
    let batch = call.batch().await;
    call.receipt(&batch, 1).await;
    soon(pending).await.expect("stored");
}

#[tokio::test]
async fn a_server_that_holds_a_batch_back_and_lives_is_waited_for() {
    let server = Server::start().await;
    let client = server.client().await;
    let producer = client.producer("t").message_timeout(Duration::from_secs(600)).build();
    let producer = producer.await.expect("a layout");
    let pending = producer.send(Message::new("a")).await.expect("room");
    let mut call = server.publish_from(0).await;
    let batch = call.batch().await;
    for _ in 0..10 {
        jump(Duration::from_secs(8)).await; // a rate limit, say
        call.ping().await;
        call.reply(publish_reply::Reply::Pong(Ping { token: 0 })).await;
        turn().await;
    }
    call.receipt(&batch, 0).await;
    soon(pending).await.expect("stored, on the first stream");
}

#[tokio::test]
async fn a_consumer_that_is_closed_says_that_it_leaves_and_one_that_is_dropped_says_nothing() {
    let server = Server::start().await;
    let client = server.client().await;
    for close in [true, false] {
        let (mut consumer, mut call) = consumer(&server, &client).await;
        call.deliver(delivery(0, 2, "h")).await;
        soon(consumer.next()).await.expect("goes on").expect("a message");
        let left = async {
            let mut left = false;
            while let Some(frame) = soon(call.next()).await {
                left |= matches!(frame, Frame::Leave(_));
            }
            drop(call);
            left
        };
        let closing = async {
            match close {
                true => consumer.close().await.expect("closed"),
                false => drop(consumer),
            }
        };
        let ((), left) = tokio::join!(soon(closing), left);
        assert_eq!(left, close);
    }
    let (reader, mut call) = tokio::join!(soon(client.reader("t").build()), server.consume_from(0));
    drop(reader.expect("it opened"));
    while let Some(frame) = soon(call.next()).await {
        assert!(!matches!(frame, Frame::Leave(_)), "a reader has nothing to give back");
    }
}

/// Serves batches and says go away behind every third one, like a server that rotates its streams.
async fn rotate_publish(server: &Server, wanted: usize) -> (Vec<String>, usize) {
    let (mut stored, mut persisted, mut streams) = (Vec::new(), 0, 0);
    while stored.len() < wanted {
        let mut call: PublishCall = server.publish_from(persisted).await;
        streams += 1;
        let mut batches = 0;
        while let Some(batch) = call.next().await {
            if batches == 2 {
                call.go_away(None).await;
            }
            batches += 1;
            assert_eq!(batch.prev_sequence, persisted, "nothing is skipped or repeated");
            persisted = batch.hi_sequence;
            call.receipt(&batch, stored.len() as u64).await;
            stored.extend((batch.lo_sequence..=batch.hi_sequence).map(|number| number.to_string()));
            if stored.len() >= wanted {
                break;
            }
        }
    }
    (stored, streams)
}

#[tokio::test]
async fn a_producer_goes_on_over_every_go_away_without_an_error_or_a_repeat() {
    const MESSAGES: usize = 200;
    let server = Server::start().await;
    let producer = server.client().await.producer("t").build().await.expect("a layout");
    let sending = async {
        for number in 0..MESSAGES {
            let pending = producer.send(Message::new(number.to_string())).await.expect("room");
            let receipt = pending.await.expect("no error is seen");
            assert!(!receipt.duplicate, "and no repeat");
        }
    };
    let ((), (stored, streams)) = tokio::join!(soon(sending), rotate_publish(&server, MESSAGES));
    assert_eq!(stored.len(), MESSAGES);
    assert!(streams > MESSAGES / 10, "it went on over {streams} streams");
}

#[tokio::test]
async fn a_consumer_goes_on_over_every_go_away_without_an_error_or_a_repeat() {
    const MESSAGES: u64 = 200;
    let server = Server::start().await;
    let client = server.client().await;
    let consuming = async {
        let mut consumer =
            client.consumer("t", "s").window(8, 1 << 20).build().await.expect("open");
        let (mut seen, mut answers) = (BTreeSet::new(), Vec::new());
        while (seen.len() as u64) < MESSAGES {
            let received = consumer.next().await.expect("goes on").expect("no error is seen");
            assert!(seen.insert(received.id.offset), "{} is seen twice", received.id);
            answers.push(received.accept());
        }
        for answer in answers {
            answer.await.expect("every accept is confirmed");
        }
    };
    // Says go away behind every few deliveries, and ends the stream when everything it heard until then is answered.
    let serving = async {
        let mut ready: BTreeSet<u64> = (0..MESSAGES).collect();
        let (mut held, mut streams) = (BTreeSet::new(), 0);
        while !(ready.is_empty() && held.is_empty()) {
            streams += 1;
            let handle = format!("stream {streams}");
            let mut call = server.consume().await;
            let ranges = call.open.claims.iter().flat_map(|claim| &claim.ranges);
            let claimed: BTreeSet<u64> =
                ranges.flat_map(|range| range.first..=range.last).collect();
            assert_eq!(claimed, held, "everything that it has, seen or not");
            let settled = |ready: &BTreeSet<u64>, held: &BTreeSet<u64>| {
                ready
                    .first()
                    .copied()
                    .unwrap_or(MESSAGES)
                    .min(held.first().copied().unwrap_or(MESSAGES))
            };
            call.opened_granting_all(settled(&ready, &held), &handle).await;
            let (mut delivered, mut granted) = (0, 0);
            loop {
                while delivered < granted.min(3)
                    && let Some(offset) = ready.pop_first()
                {
                    held.insert(offset);
                    call.deliver(delivery(offset, 1, &handle)).await;
                    delivered += 1;
                    if delivered == 3 {
                        call.reply(Reply::GoAway(go_away(None))).await;
                    }
                }
                let quiet = Duration::from_millis(if delivered == 3 { 10 } else { 20_000 });
                let Ok(frame) = tokio::time::timeout(quiet, call.next()).await else { break };
                match frame {
                    None => break,
                    Some(Frame::Credit(credit)) => granted = granted.max(credit.messages),
                    Some(Frame::Settle(settle)) => {
                        let (ranges, ends) = match settle.verb.clone().expect("a verb") {
                            Verb::Accept(accept) => (accept.ranges, true),
                            Verb::Release(release) if !release.counts => (release.ranges, false),
                            other => panic!("{other:?} was never asked for"),
                        };
                        for offset in ranges.iter().flat_map(|range| range.first..=range.last) {
                            assert!(held.remove(&offset), "{offset} is settled by who has it");
                            if !ends {
                                ready.insert(offset);
                            }
                        }
                        call.settled(&settle, settled(&ready, &held)).await;
                        if ready.is_empty() && held.is_empty() {
                            turn().await;
                            break;
                        }
                    }
                    Some(_) => {}
                }
            }
        }
        streams
    };
    let ((), streams) = tokio::join!(soon(consuming), serving);
    assert!(streams > 10, "it went on over {streams} streams");
}
