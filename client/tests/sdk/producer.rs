//! The producer: each test is one conversation.

use std::time::Duration;

use futures::future::join_all;
use geminga_client::{
    Access, Batching, Client, Error, Level, Message, Pending, Producer, Reason, Receipt,
};
use geminga_proto::v1::{AccessMode, Batch, Route};

use crate::server::{PublishCall, Server, jump, refusal, soon};

/// A producer of one message a batch.
async fn producer(client: &Client) -> Producer {
    let batching = Batching { messages_max: 1, ..Batching::default() };
    client
        .producer("t")
        .batching(batching)
        .message_timeout(Duration::from_secs(600))
        .build()
        .await
        .expect("a layout")
}

async fn send(producer: &Producer, value: &str) -> Pending {
    producer.send(Message::new(value.to_owned())).await.expect("taken")
}

async fn stored(pending: Pending) -> Receipt {
    soon(pending).await.expect("stored")
}

fn bounds(batch: &Batch) -> (u64, u64, u64) {
    (batch.prev_sequence, batch.lo_sequence, batch.hi_sequence)
}

async fn batches<const N: usize>(call: &mut PublishCall) -> [Batch; N] {
    let mut all = Vec::new();
    for _ in 0..N {
        all.push(call.batch().await);
    }
    all.try_into().expect("as many")
}

#[tokio::test]
async fn a_receipt_tells_where_and_how_safe() {
    let server = Server::start().await;
    let producer = producer(&server.client().await).await;
    let pending = send(&producer, "a").await;
    let mut call = server.publish_from(0).await;
    let batch = call.batch().await;
    assert_eq!(bounds(&batch), (0, 1, 1));
    call.receipt(&batch, 41).await;
    let receipt = stored(pending).await;
    assert_eq!(receipt.id.map(|id| id.to_string()).as_deref(), Some("0:41"));
    assert_eq!((receipt.level, receipt.epoch, receipt.duplicate), (Level::OneCopy, 7, false));
}

#[tokio::test]
async fn nothing_is_sent_before_the_open_is_answered() {
    let server = Server::start().await;
    let producer = producer(&server.client().await).await;
    let _pending = send(&producer, "a").await;
    let mut call = server.publish().await;
    call.nothing_comes().await;
    call.opened(0, 10, 1_000).await;
    call.batch().await;
}

#[tokio::test]
async fn a_batch_whose_receipt_was_lost_is_settled_by_the_next_open() {
    let server = Server::start().await;
    let producer = producer(&server.client().await).await;
    let pending = send(&producer, "a").await;
    let mut call = server.publish_from(0).await;
    let (first, token) = (call.open.clone(), format!("session {}", call.open.stream_number));
    call.batch().await;
    drop(call);
    let call = server.publish_from(1).await;
    assert_eq!(call.open.resume_token, token.as_bytes());
    assert!(call.open.stream_number > first.stream_number);
    let receipt = stored(pending).await;
    assert_eq!((receipt.id, receipt.level, receipt.duplicate), (None, Level::Unknown, true));
}

#[tokio::test]
async fn what_the_server_does_not_have_is_sent_again_with_the_same_bounds_and_bytes() {
    let server = Server::start().await;
    let producer = producer(&server.client().await).await;
    let pending =
        [send(&producer, "a").await, send(&producer, "b").await, send(&producer, "c").await];
    let mut call = server.publish_from(0).await;
    let sent = batches::<3>(&mut call).await;
    call.end(refusal(Reason::SegmentFenced, None)).await;
    let mut call = server.publish_from(1).await;
    let again = batches::<2>(&mut call).await;
    assert_eq!(again, [sent[1].clone(), sent[2].clone()]);
    for batch in &again {
        call.receipt(batch, batch.lo_sequence - 1).await;
    }
    let receipts = join_all(pending.map(stored)).await;
    assert_eq!(
        receipts.iter().map(|receipt| receipt.duplicate).collect::<Vec<_>>(),
        [true, false, false]
    );
}

#[tokio::test]
async fn everything_behind_a_refused_batch_is_sent_again_in_order() {
    let server = Server::start().await;
    let producer = producer(&server.client().await).await;
    let pending =
        [send(&producer, "a").await, send(&producer, "b").await, send(&producer, "c").await];
    let mut call = server.publish_from(0).await;
    let sent = batches::<3>(&mut call).await;
    call.receipt(&sent[0], 0).await;
    call.refuse(&sent[1], Reason::Busy, 1).await;
    call.nothing_comes().await;
    call.refuse(&sent[2], Reason::OutOfSequence, 1).await;
    let again = batches::<2>(&mut call).await;
    assert_eq!(again, [sent[1].clone(), sent[2].clone()]);
    call.receipt(&again[0], 1).await;
    call.receipt(&again[1], 2).await;
    join_all(pending.map(stored)).await;
}

#[tokio::test]
async fn a_batch_refused_for_good_leaves_the_chain_and_its_sequence_is_not_used_again() {
    let server = Server::start().await;
    let producer = producer(&server.client().await).await;
    let [a, b, c] =
        [send(&producer, "a").await, send(&producer, "b").await, send(&producer, "c").await];
    let mut call = server.publish_from(0).await;
    let sent = batches::<3>(&mut call).await;
    call.receipt(&sent[0], 0).await;
    call.refuse(&sent[1], Reason::MessageTooLarge, 1).await;
    call.refuse(&sent[2], Reason::OutOfSequence, 1).await;
    assert_eq!(soon(b).await.expect_err("refused").reason(), Some(Reason::MessageTooLarge));
    let again = call.batch().await;
    assert_eq!((bounds(&again), &again.payload), ((1, 3, 3), &sent[2].payload));
    call.receipt(&again, 1).await;
    stored(a).await;
    stored(c).await;
}

#[tokio::test]
async fn credit_counts_as_totals_so_stale_and_repeated_frames_change_nothing() {
    let server = Server::start().await;
    let producer = producer(&server.client().await).await;
    let first = send(&producer, "a").await;
    let _more = [send(&producer, "b").await, send(&producer, "c").await];
    let mut call = server.publish().await;
    call.opened(0, 1, 1 << 20).await;
    let batch = call.batch().await;
    for _ in 0..3 {
        call.credit(1, 1 << 20).await;
        call.credit(0, 0).await;
    }
    call.receipt(&batch, 0).await;
    stored(first).await;
    call.nothing_comes().await;
    call.credit(2, 1 << 20).await;
    call.batch().await;
    call.nothing_comes().await;
}

#[tokio::test]
async fn a_batch_larger_than_the_byte_window_goes_while_any_credit_is_left() {
    let server = Server::start().await;
    let producer = producer(&server.client().await).await;
    let large = "x".repeat(1_000);
    let [a, b] = [send(&producer, &large).await, send(&producer, &large).await];
    let mut call = server.publish().await;
    call.opened(0, 100, 10).await;
    let batch = call.batch().await;
    let sent = batch.payload.len() as u64;
    call.receipt(&batch, 0).await;
    stored(a).await;
    call.nothing_comes().await;
    call.credit(100, sent + 10).await;
    let batch = call.batch().await;
    call.receipt(&batch, 1).await;
    stored(b).await;
}

#[tokio::test]
async fn a_credit_frame_that_got_lost_costs_a_new_stream_not_the_messages() {
    let server = Server::start().await;
    let producer = producer(&server.client().await).await;
    let pending = send(&producer, "a").await;
    let mut call = server.publish().await;
    call.opened(0, 0, 0).await;
    call.nothing_comes().await;
    jump(Duration::from_secs(31)).await;
    let mut call = server.publish_from(0).await;
    let batch = call.batch().await;
    call.receipt(&batch, 0).await;
    stored(pending).await;
}

#[tokio::test]
async fn a_stream_that_rested_is_as_good_as_before() {
    let server = Server::start().await;
    let producer = producer(&server.client().await).await;
    let mut call = None;
    for offset in 0..3 {
        let pending = send(&producer, "a").await;
        if call.is_none() {
            call = Some(server.publish_from(0).await);
        }
        let call = call.as_mut().expect("open");
        let batch = call.batch().await;
        call.nothing_comes().await;
        call.receipt(&batch, offset).await;
        assert_eq!(
            stored(pending).await.id.map(|id| id.offset),
            Some(offset),
            "on the first stream"
        );
        jump(Duration::from_secs(100)).await;
    }
}

#[tokio::test]
async fn a_server_that_owes_a_receipt_and_is_silent_is_given_up_for_a_new_stream() {
    let server = Server::start().await;
    let producer = producer(&server.client().await).await;
    let pending = send(&producer, "a").await;
    let mut silent = server.publish_from(0).await;
    let sent = silent.batch().await;
    jump(Duration::from_secs(31)).await;
    let mut call = server.publish_from(0).await;
    let again = call.batch().await;
    assert_eq!(sent, again);
    call.receipt(&again, 0).await;
    stored(pending).await;
}

#[tokio::test]
async fn a_message_has_an_answer_by_its_deadline_that_tells_whether_it_was_sent() {
    let server = Server::start().await;
    let client = server.client().await;
    let producer = client
        .producer("t")
        .message_timeout(Duration::from_secs(5))
        .build()
        .await
        .expect("a layout");
    let unsent = send(&producer, "a").await;
    let never_opened = server.publish().await;
    jump(Duration::from_secs(6)).await;
    let within = Duration::from_secs(5);
    assert_eq!(soon(unsent).await, Err(Error::NotSent { within, trouble: None }));
    drop(never_opened);

    let sent = send(&producer, "b").await;
    let mut call = server.publish_from(0).await;
    let batch = call.batch().await;
    let refused = send(&producer, "c").await;
    let behind = call.batch().await;
    call.refuse(&batch, Reason::Busy, 0).await;
    call.refuse(&behind, Reason::OutOfSequence, 0).await;
    let again = call.batch().await;
    assert_eq!(again, batch);
    let behind = call.batch().await;
    call.refuse(&behind, Reason::OutOfSequence, 0).await;
    call.nothing_comes().await;
    jump(Duration::from_secs(6)).await;
    assert!(matches!(soon(sent).await, Err(Error::Indeterminate(_))), "it is in flight");
    let Err(error @ Error::NotSent { .. }) = soon(refused).await else {
        panic!("it was refused each time")
    };
    assert!(error.to_string().contains("nothing was stored: "), "the reason is told: {error}");
}

#[tokio::test]
async fn a_wait_for_room_ends_by_the_message_timeout() {
    let server = Server::start().await;
    let client = server.client().await;
    let builder = client.producer("t").memory(1).message_timeout(Duration::from_secs(5));
    let producer = builder.build().await.expect("a layout");
    let first = send(&producer, "a").await;
    let mut call = server.publish_from(0).await;
    call.batch().await;
    let (second, ()) =
        tokio::join!(soon(producer.send(Message::new("b"))), jump(Duration::from_secs(6)));
    // Its room came back when the first one's time was over, which was just before its own.
    if let Ok(second) = second {
        assert!(matches!(soon(second).await, Err(Error::NotSent { .. })));
    }
    assert!(matches!(soon(first).await, Err(Error::Indeterminate(_))));
}

#[tokio::test]
async fn go_away_drains_what_is_in_flight_and_the_rest_goes_to_the_new_owner() {
    let (server, other) = (Server::start().await, Server::start().await);
    let producer = producer(&server.client().await).await;
    let [a, b] = [send(&producer, "a").await, send(&producer, "b").await];
    let mut call = server.publish_from(0).await;
    let sent = batches::<2>(&mut call).await;
    call.go_away(Some(&other.address)).await;
    call.receipt(&sent[0], 0).await;
    stored(a).await; // so it has heard of the end
    let c = send(&producer, "c").await;
    call.nothing_comes().await;
    call.receipt(&sent[1], 1).await;
    stored(b).await;
    let mut call = other.publish_from(2).await;
    assert_eq!(call.open.resume_token, "session 1");
    let batch = call.batch().await;
    assert_eq!(bounds(&batch), (2, 3, 3));
    call.receipt(&batch, 2).await;
    stored(c).await;
}

#[tokio::test]
async fn a_redirect_is_followed_with_the_same_session_and_bounds() {
    let (server, other) = (Server::start().await, Server::start().await);
    let producer = producer(&server.client().await).await;
    let pending = send(&producer, "a").await;
    let mut call = server.publish_from(0).await;
    let sent = call.batch().await;
    drop(call);
    server.publish().await.end(refusal(Reason::NotOwner, Some(&other.address))).await;
    let mut call = other.publish_from(0).await;
    let again = call.batch().await;
    assert_eq!((again.clone(), call.open.resume_token.as_ref()), (sent, &b"session 1"[..]));
    call.receipt(&again, 0).await;
    stored(pending).await;
}

#[tokio::test]
async fn an_owner_that_cannot_be_reached_is_asked_through_the_configured_server() {
    let gone = Server::start().await.address.clone();
    let server = Server::with_layout(1, Some(&gone)).await;
    let producer = producer(&server.client().await).await;
    let pending = send(&producer, "a").await;
    let mut call = server.publish_from(0).await;
    assert_eq!(call.open.route, i32::from(Route::Relay));
    let batch = call.batch().await;
    call.receipt(&batch, 0).await;
    stored(pending).await;
}

#[tokio::test]
async fn what_is_refused_only_for_now_is_opened_again() {
    let server = Server::start().await;
    let producer = producer(&server.client().await).await;
    let pending = send(&producer, "a").await;
    for reason in
        [Reason::SegmentLoading, Reason::LayoutChanged, Reason::Busy, Reason::TooManyStreams]
    {
        server.publish().await.end(refusal(reason, None)).await;
    }
    server.publish().await.go_away(None).await;
    let mut call = server.publish_from(0).await;
    let batch = call.batch().await;
    call.receipt(&batch, 0).await;
    stored(pending).await;
}

#[tokio::test]
async fn an_expired_session_makes_what_was_in_flight_indeterminate_and_starts_a_new_one() {
    let server = Server::start().await;
    let producer = producer(&server.client().await).await;
    let lost = send(&producer, "a").await;
    let mut call = server.publish_from(0).await;
    call.batch().await;
    drop(call);
    server.publish().await.end(refusal(Reason::ProducerExpired, None)).await;
    assert!(matches!(soon(lost).await, Err(Error::Indeterminate(_))));
    let next = send(&producer, "b").await;
    let mut call = server.publish_from(0).await;
    assert!(call.open.resume_token.is_empty(), "a session of its own");
    let batch = call.batch().await;
    assert_eq!(batch.prev_sequence, 0);
    call.receipt(&batch, 0).await;
    stored(next).await;
}

#[tokio::test]
async fn a_fenced_producer_sends_nothing_more() {
    let server = Server::start().await;
    let client = server.client().await;
    let producer = client.producer("t").name("p").build().await.expect("a layout");
    let first = send(&producer, "a").await;
    let mut call = server.publish_from(5).await;
    assert_eq!(call.open.producer_name, "p");
    assert_eq!(
        bounds(&call.batch().await),
        (5, 6, 6),
        "it goes on where the last one of its name stopped"
    );
    call.end(refusal(Reason::ProducerFenced, None)).await;
    assert!(matches!(soon(first).await, Err(Error::Indeterminate(_))));
    let refused = soon(send(&producer, "b").await).await.expect_err("fenced");
    assert_eq!(refused.reason(), Some(Reason::ProducerFenced));
}

#[tokio::test]
async fn a_named_producer_that_gave_up_never_uses_a_sequence_that_may_be_on_its_way() {
    let server = Server::start().await;
    let client = server.client().await;
    let producer = client.producer("t").name("p").build().await.expect("a layout");
    let lost = send(&producer, "a").await;
    let mut call = server.publish_from(0).await;
    call.batch().await;
    drop(call);
    server.publish().await.end(refusal(Reason::PermissionDenied, None)).await;
    assert!(matches!(soon(lost).await, Err(Error::Indeterminate(_))));
    let _next = send(&producer, "b").await;
    let mut call = server.publish_from(0).await;
    assert_eq!(bounds(&call.batch().await), (0, 2, 2));
}

#[tokio::test]
async fn a_message_over_the_limit_is_refused_before_it_is_taken() {
    let server = Server::start().await;
    let producer = producer(&server.client().await).await;
    let limit = 5 << 20;
    let framing = 1 + 4 + 1 + 4; // tag and length of the record, and of its value
    let refused =
        producer.send(Message::new(vec![0; limit - framing + 1])).await.expect_err("too large");
    assert_eq!(refused.reason(), Some(Reason::MessageTooLarge));
    let pending = producer.send(Message::new(vec![0; limit - framing])).await.expect("just fits");
    let mut call = server.publish_from(0).await;
    let batch = call.batch().await;
    assert_eq!(
        (batch.uncompressed_size as usize, batch.payload.len()),
        (limit, limit),
        "as the server counts"
    );
    call.receipt(&batch, 0).await;
    stored(pending).await;
}

#[tokio::test]
async fn close_waits_for_every_answer_takes_nothing_more_and_may_be_repeated() {
    let server = Server::start().await;
    let producer = producer(&server.client().await).await;
    let pending = send(&producer, "a").await;
    let mut call = server.publish_from(0).await;
    let batch = call.batch().await;
    let twin = producer.clone();
    let mut closing = Box::pin(async { tokio::join!(producer.close(), twin.close()) });
    assert!(futures::poll!(&mut closing).is_pending());
    assert_eq!(producer.send(Message::new("late")).await.expect_err("closed"), Error::Closed);
    call.receipt(&batch, 0).await;
    assert_eq!(soon(closing).await, (Ok(()), Ok(())));
    stored(pending).await;
    assert!(soon(call.next()).await.is_none(), "the stream has ended");
    soon(producer.close()).await.expect("closed already");
}

#[tokio::test]
async fn a_flush_waits_for_what_was_taken_before_it_and_for_nothing_else() {
    let server = Server::start().await;
    let producer = producer(&server.client().await).await;
    let first = send(&producer, "a").await;
    let mut call = server.publish_from(0).await;
    let batch = call.batch().await;
    let mut flush = Box::pin(producer.flush());
    assert!(futures::poll!(&mut flush).is_pending());
    let _second = send(&producer, "b").await;
    call.batch().await;
    assert!(futures::poll!(&mut flush).is_pending());
    call.receipt(&batch, 0).await;
    soon(flush).await.expect("the first is answered");
    stored(first).await;
}

#[tokio::test]
async fn a_time_to_deliver_travels_beside_the_payload() {
    let server = Server::start().await;
    let client = server.client().await;
    let batching = Batching { linger: Duration::from_secs(60), ..Batching::default() };
    let producer = client.producer("t").batching(batching).build().await.expect("a layout");
    let first = producer.send(Message::new("x")).await.expect("taken");
    let mut call = server.publish_from(0).await;
    let batch = call.batch().await;
    assert!(batch.index.as_ref().expect("an index").deliver_at_ms.is_empty());
    // While one is in flight the others gather.
    let late = producer.send(Message::new("y").with_deliver_at_ms(77)).await.expect("taken");
    let plain = producer.send(Message::new("z")).await.expect("taken");
    call.receipt(&batch, 0).await;
    let batch = call.batch().await;
    assert_eq!(batch.index.as_ref().expect("an index").deliver_at_ms, [77, 0]);
    call.receipt(&batch, 1).await;
    for pending in [first, late, plain] {
        stored(pending).await;
    }
    let delayed = Message::new("d").with_delay(Duration::from_secs(60));
    assert!(delayed.deliver_at_ms.is_some_and(|time| time > 1_700_000_000_000));
}

#[tokio::test]
async fn a_conditional_append_names_the_offset_and_is_told_what_it_met() {
    let server = Server::start().await;
    let producer = producer(&server.client().await).await;
    let pending = producer.send_expecting(Message::new("x"), 41).await.expect("taken");
    let mut call = server.publish_from(0).await;
    let batch = call.batch().await;
    assert_eq!((batch.expected_offset, batch.count), (Some(41), 1));
    call.refuse(&batch, Reason::InvalidRequest, 0).await;
    assert_eq!(soon(pending).await.expect_err("refused").reason(), Some(Reason::InvalidRequest));
    let next = send(&producer, "y").await;
    let batch = call.batch().await;
    assert_eq!(batch.expected_offset, None);
    call.receipt(&batch, 50).await;
    stored(next).await;
}

#[tokio::test]
async fn the_access_mode_travels_with_the_open_and_fencing_needs_a_name() {
    let server = Server::start().await;
    let client = server.client().await;
    let nameless = client.producer("t").access(Access::ExclusiveWithFencing).build();
    let refused = soon(nameless).await.expect_err("no name");
    assert_eq!(refused.reason(), Some(Reason::InvalidRequest));
    for (access, wire) in [
        (Access::Shared, AccessMode::Shared),
        (Access::Exclusive, AccessMode::Exclusive),
        (Access::ExclusiveWithFencing, AccessMode::ExclusiveWithFencing),
    ] {
        let builder = client.producer("t").name("n").access(access);
        let producer = soon(builder.build()).await.expect("a layout");
        let _pending = send(&producer, "x").await;
        assert_eq!(server.publish().await.open.access(), wire);
    }
}
