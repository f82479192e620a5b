//! The consumer: each test is one conversation.

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use geminga_client::{
    Client, Consumer, Error, MessageId, Position, Reader, Reason, Received, SubscriptionSettings,
};
use geminga_proto::v1::{
    Assigned, Claim, ConsumeOpened, Delivery, OffsetRange, Route, Settle, consume_frame::Frame,
    consume_reply::Reply, read_from, settle::Verb,
};

use crate::server::{ConsumeCall, Server, delivery, go_away, jump, refusal, soon};

/// A consumer and its stream, opened at mark-delete 0.
async fn consumer(server: &Server, client: &Client) -> (Consumer, ConsumeCall) {
    let (consumer, call) =
        tokio::join!(soon(client.consumer("t", "s").build()), server.consume_from(0));
    (consumer.expect("it opened"), call)
}

async fn next(consumer: &mut Consumer) -> Received {
    soon(consumer.next()).await.expect("a message").expect("a message")
}

async fn offsets(consumer: &mut Consumer, count: usize) -> Vec<u64> {
    let mut all = Vec::new();
    for _ in 0..count {
        let received = next(consumer).await;
        assert_eq!(received.value, received.id.offset.to_string());
        all.push(received.id.offset);
    }
    all
}

async fn nothing_comes(consumer: &mut Consumer) {
    let item = tokio::time::timeout(Duration::from_millis(30), consumer.next()).await;
    assert!(item.is_err(), "nothing should come, not {item:?}");
}

fn accepted(settle: &Settle) -> (Vec<(u64, u64)>, Bytes) {
    match settle.verb.clone().expect("a verb") {
        Verb::Accept(accept) => {
            (accept.ranges.iter().map(|range| (range.first, range.last)).collect(), accept.handle)
        }
        Verb::AcceptUpTo(up_to) => (vec![(0, up_to.offset)], up_to.handle),
        other => panic!("{other:?} was never asked for"),
    }
}

fn claimed(call: &ConsumeCall) -> Vec<(u64, u64, Bytes)> {
    let claims = call.open.claims.iter();
    let ranges = claims.flat_map(|claim| claim.ranges.iter().map(|range| (range, &claim.handle)));
    ranges.map(|(range, handle)| (range.first, range.last, handle.clone())).collect()
}

#[tokio::test]
async fn an_accept_is_confirmed_when_the_server_says_it_is_durable_and_not_before() {
    let server = Server::start().await;
    let client = server.client().await;
    let (mut consumer, mut call) = consumer(&server, &client).await;
    call.deliver(delivery(0, 3, "h")).await;
    let received = next(&mut consumer).await;
    let mut accept = received.accept();
    let settle = call.settle().await;
    assert_eq!(accepted(&settle), (vec![(0, 0)], Bytes::from("h")));
    assert!(futures::poll!(&mut accept).is_pending());
    call.settled(&settle, 1).await;
    soon(accept).await.expect("durable");
    assert_eq!(offsets(&mut consumer, 2).await, [1, 2]);
}

#[tokio::test]
async fn what_was_accepted_is_claimed_after_a_break_and_presented_under_the_new_handle() {
    let server = Server::start().await;
    let client = server.client().await;
    let (mut consumer, mut call) = consumer(&server, &client).await;
    call.deliver(delivery(0, 4, "old")).await;
    let first = next(&mut consumer).await;
    let second = next(&mut consumer).await;
    let (one, two) = (first.accept(), second.accept());
    call.settle().await; // the answer gets lost
    drop(call);
    let mut call = server.consume().await;
    assert_eq!(claimed(&call), [(0, 3, Bytes::from("old"))]);
    call.opened_granting_all(0, "granted").await;
    let settle = call.settle().await;
    assert_eq!(accepted(&settle), (vec![(0, 1)], Bytes::from("granted")));
    call.settled(&settle, 2).await;
    let settle = call.settle().await;
    let Some(Verb::Release(release)) = &settle.verb else { panic!("what was not handed out") };
    assert_eq!(release.ranges, [OffsetRange { first: 2, last: 3 }]);
    assert_eq!(
        (&release.handle[..], release.counts, release.delay_ms),
        (&b"granted"[..], false, None)
    );
    call.settled(&settle, 2).await;
    call.deliver(delivery(2, 2, "new")).await;
    assert_eq!(offsets(&mut consumer, 2).await, [2, 3]);
    soon(one).await.expect("durable");
    soon(two).await.expect("durable");
}

#[tokio::test]
async fn an_accept_that_was_durable_before_the_break_is_confirmed_by_the_next_open() {
    let server = Server::start().await;
    let client = server.client().await;
    let (mut consumer, mut call) = consumer(&server, &client).await;
    call.deliver(delivery(0, 2, "old")).await;
    let accept = next(&mut consumer).await.accept();
    call.settle().await;
    drop(call);
    let call = server.consume_from(1).await;
    soon(accept).await.expect("durable");
    call.deliver(delivery(1, 1, "new")).await;
    assert_eq!(offsets(&mut consumer, 1).await, [1]);
}

#[tokio::test]
async fn a_message_at_work_over_a_break_is_still_ours_if_it_is_granted_and_else_not() {
    let server = Server::start().await;
    let client = server.client().await;
    let (mut consumer, call) = consumer(&server, &client).await;
    call.deliver(delivery(0, 3, "old")).await;
    let lost = next(&mut consumer).await;
    let at_work = next(&mut consumer).await;
    drop(call);
    let mut call = server.consume().await;
    let range = OffsetRange { first: 1, last: 1 };
    let granted = Claim { handle: "granted".into(), ranges: vec![range] };
    call.opened_granting(0, vec![granted]).await;
    call.credit().await; // so the new stream stands
    assert!(matches!(soon(lost.accept()).await, Err(Error::NotHeld(_))));
    let accept = at_work.accept();
    let settle = call.settle().await;
    assert_eq!(accepted(&settle), (vec![(1, 1)], Bytes::from("granted")));
    call.settled(&settle, 0).await;
    soon(accept).await.expect("durable");
    let again =
        Delivery { deliver: vec![OffsetRange { first: 0, last: 0 }], ..delivery(0, 3, "new") };
    call.deliver(again).await;
    let again = next(&mut consumer).await;
    assert!(matches!(soon(lost.accept()).await, Err(Error::NotHeld(_))), "another delivery");
    let accept = again.accept();
    assert_eq!(accepted(&call.settle().await), (vec![(0, 0)], Bytes::from("new")));
    drop(accept);
}

#[tokio::test]
async fn a_grant_of_what_was_not_claimed_ends_in_a_typed_error() {
    let server = Server::start().await;
    let client = server.client().await;
    for (first, last) in [(0, 3), (5, 9), (2, 1), (0, u64::MAX)] {
        let (mut consumer, call) = consumer(&server, &client).await;
        call.deliver(delivery(0, 3, "old")).await;
        offsets(&mut consumer, 3).await;
        drop(call);
        let call = server.consume().await;
        let ranges = vec![OffsetRange { first, last }];
        call.opened_granting(0, vec![Claim { handle: "new".into(), ranges }]).await;
        let error = soon(consumer.next()).await.expect("an item").expect_err("not claimed");
        assert_eq!(error.reason(), Some(Reason::UnexpectedFrame), "{first}-{last}");
    }
}

#[tokio::test]
async fn claims_that_the_server_does_not_know_are_given_up_and_the_stream_goes_on() {
    let server = Server::start().await;
    let client = server.client().await;
    let (mut consumer, call) = consumer(&server, &client).await;
    call.deliver(delivery(0, 1, "old")).await;
    let lost = next(&mut consumer).await;
    drop(call);
    let call = server.consume().await;
    assert_eq!(claimed(&call).len(), 1);
    call.end(refusal(Reason::InvalidHandle, None)).await;
    let call = server.consume_from(0).await;
    assert!(claimed(&call).is_empty());
    call.deliver(delivery(0, 1, "new")).await;
    assert_eq!(offsets(&mut consumer, 1).await, [0]);
    assert!(matches!(soon(lost.accept()).await, Err(Error::NotHeld(_))));
}

#[tokio::test]
async fn every_verb_reaches_the_server_as_it_was_asked() {
    let server = Server::start().await;
    let client = server.client().await;
    let (mut consumer, mut call) = consumer(&server, &client).await;
    call.deliver(Delivery { lease_ms: 60_000, attempt: 3, ..delivery(0, 6, "h") }).await;
    let mut answers = Vec::new();
    for offset in 0..6 {
        let received = next(&mut consumer).await;
        assert_eq!(received.attempt, 3);
        answers.push(match offset {
            0 => received.release(),
            1 => received.release_after(Duration::from_micros(1_500)),
            2 => received.give_back(Duration::ZERO),
            3 => received.reject("bad"),
            4 => received.extend(Duration::from_secs(7)),
            _ => received.accept(),
        });
        let settle = call.settle().await;
        match (offset, settle.verb.clone().expect("a verb")) {
            (0, Verb::Release(release)) => assert!(release.delay_ms.is_none() && release.counts),
            (1, Verb::Release(release)) => {
                assert!(release.delay_ms == Some(2) && release.counts, "never early")
            }
            (2, Verb::Release(release)) => assert!(release.delay_ms.is_none() && !release.counts),
            (3, Verb::Reject(reject)) => assert_eq!(reject.reason, "bad"),
            (4, Verb::Extend(extend)) => assert_eq!(extend.lease_ms, 7_000),
            (5, Verb::Accept(_)) => {}
            (offset, other) => panic!("{offset}: {other:?}"),
        }
        call.settled(&settle, 0).await;
    }
    for answer in answers {
        soon(answer).await.expect("durable");
    }
    call.deliver(delivery(6, 1, "h")).await;
    let refused = soon(next(&mut consumer).await.reject("x".repeat(257))).await;
    assert_eq!(refused.expect_err("too long").reason(), Some(Reason::InvalidRequest));
}

#[tokio::test]
async fn a_released_message_that_comes_again_is_a_delivery_of_its_own() {
    let server = Server::start().await;
    let client = server.client().await;
    let (mut consumer, mut call) = consumer(&server, &client).await;
    call.deliver(delivery(0, 1, "one")).await;
    let first = next(&mut consumer).await;
    let released = first.release();
    let settle = call.settle().await;
    call.settled(&settle, 0).await;
    soon(released).await.expect("durable");
    call.deliver(Delivery { attempt: 2, ..delivery(0, 1, "two") }).await;
    let second = next(&mut consumer).await;
    assert_eq!((second.id.offset, second.attempt), (0, 2));
    assert!(matches!(soon(first.accept()).await, Err(Error::NotHeld(_))));
    let accept = second.accept();
    let settle = call.settle().await;
    assert_eq!(accepted(&settle), (vec![(0, 0)], Bytes::from("two")));
    call.settled(&settle, 1).await;
    soon(accept).await.expect("durable");
}

#[tokio::test]
async fn what_is_revoked_is_not_handed_out_and_its_settle_says_that_it_is_not_held() {
    let server = Server::start().await;
    let client = server.client().await;
    let (mut consumer, mut call) = consumer(&server, &client).await;
    call.credit().await;
    call.deliver(delivery(0, 6, "h")).await;
    let at_work = next(&mut consumer).await;
    call.revoke(0, 0, "h").await;
    call.revoke(2, 3, "h").await;
    call.revoke(4, 4, "another's").await;
    call.revoke(9, u64::MAX, "h").await; // nobody has it
    call.deliver(delivery(2, 1, "again")).await;
    // Frames arrive in order: the answer to this one stands behind them.
    let other = next(&mut consumer).await;
    assert_eq!(other.id.offset, 1);
    let accept = other.accept();
    let settle = call.settle().await;
    call.settled(&settle, 0).await;
    soon(accept).await.expect("durable");
    assert!(matches!(soon(at_work.accept()).await, Err(Error::NotHeld(_))));
    assert_eq!(offsets(&mut consumer, 3).await, [4, 5, 2]);
    nothing_comes(&mut consumer).await;
}

#[tokio::test]
async fn leases_are_extended_until_the_application_had_its_time() {
    let server = Server::start().await;
    let client = server.client().await;
    let building = client.consumer("t", "s").processing_time_max(Duration::from_secs(20)).build();
    let (consumer, mut call) = tokio::join!(soon(building), server.consume_from(0));
    let mut consumer = consumer.expect("it opened");
    call.deliver(Delivery { lease_ms: 8_000, ..delivery(0, 4, "h") }).await;
    next(&mut consumer).await;
    let mut extended = Vec::new();
    for _ in 0..40 {
        jump(Duration::from_secs(1)).await;
        loop {
            match tokio::time::timeout(Duration::from_millis(20), call.next()).await {
                Ok(Some(Frame::Settle(settle))) => {
                    let Some(Verb::Extend(extend)) = &settle.verb else { panic!("{settle:?}") };
                    assert_eq!((extend.lease_ms, &extend.handle[..]), (0, &b"h"[..]));
                    extended.push((extend.ranges[0].first, extend.ranges[0].last));
                    call.settled(&settle, 0).await;
                }
                Ok(Some(Frame::Ping(ping))) => call.reply(Reply::Pong(ping)).await,
                Ok(Some(_)) => {}
                Ok(None) => panic!("it stays"),
                Err(_) => break,
            }
        }
    }
    assert_eq!(extended.first(), Some(&(0, 3)), "buffered, and handed out");
    assert_eq!(extended.last(), Some(&(1, 3)), "the one at work had its time: {extended:?}");
    assert!((8..=14).contains(&extended.len()), "about every half lease: {extended:?}");
}

#[tokio::test]
async fn a_failover_consumer_says_which_segments_are_its_own() {
    let server = Server::with_layout(2, None).await;
    let client = server.client().await;
    let script = async {
        let mut calls = [server.consume().await, server.consume().await];
        calls.sort_by_key(|call| call.open.segment);
        for call in &calls {
            let settings = SubscriptionSettings { r#type: 2, ..Default::default() };
            let settings = Some(settings);
            call.opened_as(ConsumeOpened { settings, ..Default::default() }).await;
        }
        calls
    };
    let (consumer, calls) = tokio::join!(soon(client.consumer("t", "s").build()), script);
    let mut consumer = consumer.expect("it opened");
    assert!(consumer.active_segments().is_empty(), "nobody said so");
    for (active, epoch) in [(true, 7), (false, 6)] {
        calls[1].reply(Reply::Assigned(Assigned { active, epoch })).await;
    }
    calls[1].deliver(delivery(0, 1, "h")).await;
    next(&mut consumer).await;
    assert_eq!(consumer.active_segments(), [1], "an older word does not count");
    calls[1].reply(Reply::Assigned(Assigned { active: false, epoch: 8 })).await;
    calls[1].deliver(delivery(1, 1, "h")).await;
    next(&mut consumer).await;
    assert!(consumer.active_segments().is_empty());
}

#[tokio::test]
async fn close_ends_our_side_only_when_everything_asked_is_answered() {
    let server = Server::start().await;
    let client = server.client().await;
    let (mut consumer, mut call) = consumer(&server, &client).await;
    call.deliver(delivery(0, 3, "h")).await;
    let accept = next(&mut consumer).await.accept();
    let mut closing = Box::pin(consumer.close());
    assert!(futures::poll!(&mut closing).is_pending());
    let settle = call.settle().await;
    assert!(futures::poll!(&mut closing).is_pending());
    call.settled(&settle, 1).await;
    soon(accept).await.expect("durable");
    let (closed, ()) = tokio::join!(soon(closing), async {
        while soon(call.next()).await.is_some() {}
        drop(call); // the server answers the end by its own
    });
    closed.expect("confirmed");
}

#[tokio::test]
async fn what_a_consumer_is_to_create_and_hold_travels_with_its_open() {
    let server = Server::start().await;
    let client = server.client().await;
    let settings = SubscriptionSettings { r#type: 3, lease_ms: 5_000, ..Default::default() };
    let building = client
        .consumer("t", "s")
        .name("worker-1")
        .start(geminga_client::Start::Earliest)
        .settings(settings.clone())
        .build();
    let (consumer, call) = tokio::join!(soon(building), server.consume_from(0));
    let _consumer = consumer.expect("it opened");
    assert_eq!(call.open.settings, Some(settings));
    assert_eq!((call.open.consumer_name.as_str(), call.open.create_at), ("worker-1", Some(1)));
    assert!(call.open.claims.is_empty() && call.open.reader.is_none());
}

#[tokio::test]
async fn a_refused_settle_is_told_or_repeated_as_its_reason_says() {
    let server = Server::start().await;
    let client = server.client().await;
    let (mut consumer, mut call) = consumer(&server, &client).await;
    call.deliver(delivery(0, 2, "h")).await;
    let never = next(&mut consumer).await.accept();
    let settle = call.settle().await;
    call.refuse(&settle, Reason::InvalidHandle).await;
    assert_eq!(soon(never).await.expect_err("refused").reason(), Some(Reason::InvalidHandle));

    let again = next(&mut consumer).await.accept();
    let settle = call.settle().await;
    call.refuse(&settle, Reason::Busy).await;
    let mut repeated = call.settle().await;
    for _ in 0..3 {
        call.refuse(&repeated, Reason::Busy).await;
        repeated = call.settle().await;
    }
    call.refuse(&repeated, Reason::Busy).await;
    call.nothing_comes().await; // the pauses have grown past this look
    repeated = call.settle().await;
    assert_eq!(accepted(&repeated), accepted(&settle));
    assert_ne!(repeated.token, settle.token);
    call.settled(&repeated, 2).await;
    soon(again).await.expect("durable");
}

#[tokio::test]
async fn an_accept_that_nobody_answers_is_told_as_indeterminate() {
    let server = Server::start().await;
    let client = server.client().await;
    let (mut consumer, mut call) = consumer(&server, &client).await;
    call.deliver(delivery(0, 1, "h")).await;
    let accept = next(&mut consumer).await.accept();
    call.settle().await;
    jump(Duration::from_secs(70)).await;
    assert!(matches!(soon(accept).await, Err(Error::Indeterminate(_))));
}

#[tokio::test]
async fn only_what_was_handed_out_can_be_accepted_by_its_place() {
    let server = Server::start().await;
    let client = server.client().await;
    let (mut consumer, mut call) = consumer(&server, &client).await;
    let id = |offset| MessageId { segment: 0, offset };
    call.deliver(delivery(0, 3, "h")).await;
    offsets(&mut consumer, 2).await;
    for not_ours in [id(2), MessageId { segment: 9, offset: 0 }] {
        assert!(matches!(soon(consumer.accept_up_to(not_ours)).await, Err(Error::Refused(_))));
    }
    let accept = consumer.accept_up_to(id(1));
    let settle = call.settle().await;
    assert_eq!(accepted(&settle), (vec![(0, 1)], Bytes::from("h")));
    call.settled(&settle, 2).await;
    soon(accept).await.expect("durable");
}

#[tokio::test]
async fn settled_records_of_a_batch_are_passed_by() {
    let server = Server::start().await;
    let client = server.client().await;
    let (mut consumer, call) = consumer(&server, &client).await;
    let range = |first, last| OffsetRange { first, last };
    call.deliver(Delivery {
        deliver: vec![range(11, 12), range(15, 15), range(18, 18)],
        ..delivery(10, 10, "h")
    })
    .await;
    call.deliver(delivery(20, 1, "h")).await;
    assert_eq!(offsets(&mut consumer, 5).await, [11, 12, 15, 18, 20]);
}

#[tokio::test]
async fn what_a_broken_stream_left_behind_is_not_handed_out_twice() {
    let server = Server::start().await;
    let client = server.client().await;
    let (mut consumer, call) = consumer(&server, &client).await;
    call.deliver(delivery(0, 3, "old")).await;
    call.deliver(delivery(3, 3, "old")).await;
    assert_eq!(offsets(&mut consumer, 1).await, [0]);
    drop(call);
    let mut call = server.consume_from(0).await;
    call.credit().await; // so the new stream stands
    call.deliver(delivery(0, 3, "new")).await;
    assert_eq!(offsets(&mut consumer, 1).await, [0], "not accepted: at least once");
    drop(call);
    let mut call = server.consume_from(2).await;
    call.credit().await;
    call.deliver(delivery(2, 2, "newest")).await;
    assert_eq!(offsets(&mut consumer, 2).await, [2, 3]);
    nothing_comes(&mut consumer).await;
}

#[tokio::test]
async fn credit_is_granted_again_as_messages_are_handed_out_and_told_again_in_silence() {
    let server = Server::start().await;
    let client = server.client().await;
    let building = client.consumer("t", "s").window(4, 1 << 20).build();
    let (consumer, mut call) = tokio::join!(soon(building), server.consume_from(0));
    let mut consumer = consumer.expect("it opened");
    assert_eq!(call.credit().await, (4, 1 << 20));
    call.deliver(delivery(0, 2, "h")).await;
    call.deliver(delivery(2, 2, "h")).await;
    assert_eq!(offsets(&mut consumer, 2).await, [0, 1]);
    let (messages, bytes) = call.credit().await;
    assert_eq!(messages, 6);
    jump(Duration::from_secs(16)).await;
    assert_eq!(call.credit().await, (messages, bytes), "a frame may have been lost");
    assert!(matches!(soon(call.next()).await, Some(Frame::Ping(_))));
}

#[tokio::test]
async fn a_server_that_gives_no_sign_of_life_is_given_up_for_a_new_stream() {
    let server = Server::start().await;
    let client = server.client().await;
    let (mut consumer, mut silent) = consumer(&server, &client).await;
    jump(Duration::from_secs(16)).await;
    while !matches!(soon(silent.next()).await, Some(Frame::Ping(_))) {}
    jump(Duration::from_secs(16)).await;
    let call = server.consume_from(0).await;
    call.deliver(delivery(0, 1, "h")).await;
    assert_eq!(offsets(&mut consumer, 1).await, [0]);
}

#[tokio::test]
async fn a_batch_that_cannot_be_what_it_says_is_a_typed_error() {
    let bomb = zstd::bulk::compress(&vec![0u8; 5_000_000], 1).expect("compressed");
    let range = |first, last| OffsetRange { first, last };
    let good = || delivery(0, 3, "h");
    let bad = [
        Delivery { codec: 2, uncompressed_size: 100, payload: bomb.clone().into(), ..good() },
        Delivery { codec: 2, uncompressed_size: 6_000_000, payload: bomb.clone().into(), ..good() },
        Delivery { codec: 2, uncompressed_size: u32::MAX, payload: bomb.into(), ..good() },
        Delivery { codec: 1, payload: Bytes::from_static(b"not lz4"), ..good() },
        Delivery { codec: 77, ..good() },
        Delivery { format: 0, ..good() },
        Delivery { count: 4, ..good() },
        Delivery { uncompressed_size: 3, ..good() },
        Delivery { payload: Bytes::from_static(b"\x0a\xff"), uncompressed_size: 2, ..good() },
        Delivery { deliver: vec![], ..good() },
        Delivery { deliver: vec![range(0, 3)], ..good() },
        Delivery { deliver: vec![range(2, 1)], ..good() },
        Delivery { deliver: vec![range(1, 2), range(0, 0)], ..good() },
        Delivery { deliver: vec![range(0, 1), range(1, 2)], ..good() },
        Delivery { base_offset: u64::MAX, ..good() },
    ];
    let server = Server::start().await;
    let client = server.client().await;
    for delivery in bad {
        let (mut consumer, call) = consumer(&server, &client).await;
        let what = format!("{delivery:?}");
        call.deliver(delivery).await;
        let error = soon(consumer.next()).await.expect("an item").expect_err(&what);
        assert!(matches!(error, Error::Damaged(_)), "{error}");
        assert!(soon(consumer.next()).await.is_none(), "it has ended");
    }
}

#[tokio::test]
async fn a_server_that_delivers_more_than_was_granted_is_told_so() {
    let server = Server::start().await;
    let client = server.client().await;
    for over in ["messages", "bytes"] {
        let building = client.consumer("t", "s").window(3, 64 << 10).build();
        let (consumer, mut call) = tokio::join!(soon(building), server.consume_from(0));
        let mut consumer = consumer.expect("it opened");
        let large = || {
            let mut payload = vec![0x0a, 0x85, 0x80, 0x04, 0x12, 0x81, 0x80, 0x04];
            payload.resize(8 + (64 << 10) + 1, b'x');
            Delivery {
                uncompressed_size: payload.len() as u32,
                payload: payload.into(),
                ..delivery(0, 1, "h")
            }
        };
        match over {
            "messages" => call.deliver(delivery(0, 4, "h")).await,
            _ => {
                call.deliver(large()).await;
                let end = OffsetRange { first: 1, last: 1 };
                call.deliver(Delivery { base_offset: 1, deliver: vec![end], ..large() }).await;
            }
        }
        while soon(call.next()).await.is_some() {} // until the client has left
        let error = loop {
            match soon(consumer.next()).await.expect("an error, not the end") {
                Ok(received) => assert_eq!((over, received.id.offset), ("bytes", 0)),
                Err(error) => break error,
            }
        };
        assert_eq!(error.reason(), Some(Reason::CreditExceeded), "{over}");
    }
}

#[tokio::test]
async fn a_frame_over_the_limit_is_a_typed_error() {
    let server = Server::start().await;
    let client = server.client().await;
    let (mut consumer, call) = consumer(&server, &client).await;
    call.deliver(Delivery { payload: vec![0; 17 << 20].into(), ..delivery(0, 1, "h") }).await;
    let error = soon(consumer.next()).await.expect("an item").expect_err("too large");
    assert_eq!(error.reason(), Some(Reason::MessageTooLarge));
}

#[tokio::test]
async fn a_server_that_never_answers_the_open_keeps_a_builder_no_longer_than_it_was_told() {
    let server = Server::start().await;
    let address = server.address.clone();
    let client = Client::builder()
        .server(address)
        .open_timeout(Duration::from_secs(3))
        .build()
        .await
        .expect("good");
    let unanswered = async {
        let call = server.consume().await;
        jump(Duration::from_secs(4)).await;
        call
    };
    let (built, _call) = tokio::join!(soon(client.consumer("t", "s").build()), unanswered);
    assert!(matches!(built, Err(Error::Unavailable(_))));
}

#[tokio::test]
async fn a_builder_that_fails_leaves_nothing_running() {
    let server = Server::start().await;
    let client = server.client().await;
    let refused =
        soon(client.consumer("t", "s").segments([9]).build()).await.expect_err("no such segment");
    assert_eq!(refused.reason(), Some(Reason::SegmentNotFound));
    soon(server.watch().await.closed()).await;
}

#[tokio::test]
async fn redirects_go_away_and_refusals_for_now_end_in_a_new_stream() {
    let (server, other) = (Server::start().await, Server::start().await);
    let client = server.client().await;
    let building = soon(client.consumer("t", "s").build());
    let script = async {
        for reason in
            [Reason::SegmentLoading, Reason::LayoutChanged, Reason::ConsumerExists, Reason::Busy]
        {
            server.consume().await.end(refusal(reason, None)).await;
        }
        server.consume().await.end(refusal(Reason::NotOwner, Some(&other.address))).await;
        other.consume_from(0).await
    };
    let (consumer, call) = tokio::join!(building, script);
    let mut consumer = consumer.expect("it opened");
    call.deliver(delivery(0, 1, "h")).await;
    call.reply(Reply::GoAway(go_away(Some(&server.address)))).await;
    call.deliver(delivery(1, 1, "h")).await;
    assert_eq!(offsets(&mut consumer, 2).await, [0, 1], "the old stream is good until it ends");
    jump(Duration::from_secs(6)).await;
    let call = server.consume_from(2).await;
    call.deliver(delivery(2, 1, "new")).await;
    assert_eq!(offsets(&mut consumer, 1).await, [2]);
}

#[tokio::test]
async fn an_owner_that_cannot_be_reached_is_asked_through_the_configured_server() {
    let gone = Server::start().await.address.clone();
    let server = Server::with_layout(1, Some(&gone)).await;
    let client = server.client().await;
    let (_consumer, call) = consumer(&server, &client).await;
    assert_eq!(call.open.route, i32::from(Route::Relay));
}

#[tokio::test]
async fn what_no_retry_helps_is_told_behind_what_was_delivered() {
    let server = Server::start().await;
    let client = server.client().await;
    let (mut consumer, mut call) = consumer(&server, &client).await;
    call.deliver(delivery(0, 2, "h")).await;
    let accept = next(&mut consumer).await.accept();
    call.settle().await;
    call.end(refusal(Reason::SubscriptionNotFound, None)).await;
    assert_eq!(soon(accept).await.expect_err("gone").reason(), Some(Reason::SubscriptionNotFound));
    assert_eq!(offsets(&mut consumer, 1).await, [1]);
    let error = soon(consumer.next()).await.expect("an item").expect_err("gone");
    assert_eq!(error.reason(), Some(Reason::SubscriptionNotFound));
    assert!(soon(consumer.next()).await.is_none());
}

#[tokio::test]
async fn close_waits_until_accepts_are_confirmed_over_a_break_too() {
    let server = Server::start().await;
    let client = server.client().await;
    let (mut consumer, mut call) = consumer(&server, &client).await;
    call.deliver(delivery(0, 2, "old")).await;
    let accept = next(&mut consumer).await.accept();
    call.settle().await;
    let mut closing = Box::pin(consumer.close());
    assert!(futures::poll!(&mut closing).is_pending());
    drop(call);
    let mut call = server.consume().await;
    call.opened_granting_all(0, "new").await;
    let settle = call.settle().await;
    assert_eq!(accepted(&settle), (vec![(0, 0)], Bytes::from("new")));
    call.settled(&settle, 1).await;
    while soon(call.next()).await.is_some() {}
    drop(call);
    soon(closing).await.expect("confirmed");
    soon(accept).await.expect("durable");
}

#[tokio::test]
async fn accepts_become_durable_after_a_break_though_nobody_asks_for_more_messages() {
    let server = Server::start().await;
    let client = server.client().await;
    let (mut consumer, call) = consumer(&server, &client).await;
    let mut accepts = Vec::new();
    for offset in 0..4 {
        call.deliver(delivery(offset, 1, "old")).await;
        accepts.push(next(&mut consumer).await.accept()); // settles are never answered
    }
    drop(call);
    let mut call = server.consume().await;
    call.opened_granting_all(0, "new").await;
    let settle = call.settle().await;
    assert_eq!(accepted(&settle), (vec![(0, 3)], Bytes::from("new")));
    call.settled(&settle, 4).await;
    for accept in accepts {
        soon(accept).await.expect("durable");
    }
}

/// A reader and its stream.
async fn reader(server: &Server, client: &Client, from: Position) -> (Reader, ConsumeCall) {
    let (reader, call) =
        tokio::join!(soon(client.reader("t").from(from).build()), server.consume_from(0));
    (reader.expect("it opened"), call)
}

#[tokio::test]
async fn a_reader_names_no_subscription_and_goes_on_behind_what_it_handed_out() {
    let server = Server::start().await;
    let client = server.client().await;
    let (mut reader, call) = reader(&server, &client, Position::TimeMs(77)).await;
    assert!(call.open.subscription.is_empty() && call.open.create_at.is_none());
    let from = |call: &ConsumeCall| call.open.reader.expect("a place").from.expect("a place");
    assert_eq!(from(&call), read_from::From::TimeMs(77));
    call.deliver(delivery(10, 3, "")).await;
    for offset in [10, 11] {
        assert_eq!(soon(reader.next()).await.expect("one").expect("one").id.offset, offset);
    }
    drop(call);
    let call = server.consume_from(0).await;
    assert_eq!(from(&call), read_from::From::Offset(12), "once each");
    drop(call);
    let call = server.consume_from(0).await;
    assert_eq!(from(&call), read_from::From::Offset(12));
    call.deliver(delivery(12, 1, "")).await;
    assert_eq!(soon(reader.next()).await.expect("one").expect("one").value, "12");
}

#[tokio::test]
async fn a_reader_that_got_nothing_begins_again_where_the_server_had_placed_it() {
    let server = Server::start().await;
    let client = server.client().await;
    let building = client.reader("t").from(Position::Latest).build();
    let (_reader, call) = tokio::join!(soon(building), server.consume_from(40));
    drop(call);
    let call = server.consume().await;
    let from = call.open.reader.expect("a place").from;
    assert_eq!(from, Some(read_from::From::Offset(40)), "nothing published meanwhile is skipped");
}
