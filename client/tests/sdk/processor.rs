//! The processor: inputs of one scripted stream, outputs of another.

use futures::future::ready;
use geminga_client::{Client, Error, Message, OUTPUTS_MAX, Processed, Reason, Received};
use geminga_proto::v1::{
    ConsumeOpened, Settle, SubscriptionSettings, SubscriptionType, settle::Verb,
};
use geminga_runtime::tasks::Tasks;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::server::{ConsumeCall, Server, delivery, refusal, soon};

/// Two outputs an input.
fn doubled(input: &Received) -> Vec<Message> {
    let value = String::from_utf8_lossy(&input.value).into_owned();
    vec![Message::new(format!("{value}a")), Message::new(format!("{value}b"))]
}

/// A processor that runs until it is stopped, and what it says then.
fn start(client: &Client, stop: &CancellationToken) -> oneshot::Receiver<Result<Processed, Error>> {
    let processor = client.processor("in", "job", "out").stop(stop.clone());
    let (done, ended) = oneshot::channel();
    let tasks = Tasks::new("processor");
    tasks.spawn("processor", async move {
        let _ = done.send(processor.run(|input| ready(Ok(doubled(&input)))).await);
    });
    std::mem::forget(tasks); // it runs as long as the test
    ended
}

fn up_to(settle: &Settle) -> u64 {
    match settle.verb.as_ref().expect("a verb") {
        Verb::AcceptUpTo(up_to) => up_to.offset,
        other => panic!("{other:?} was never asked for"),
    }
}

async fn finished(mut inputs: ConsumeCall) {
    while soon(inputs.next()).await.is_some() {}
}

#[tokio::test]
async fn an_input_is_accepted_when_all_its_outputs_are_stored_under_sequences_that_follow_from_it()
{
    let server = Server::start().await;
    let client = server.client().await;
    let stop = CancellationToken::new();
    let ended = start(&client, &stop);
    let mut inputs = server.consume_from(0).await;
    inputs.credit().await;
    inputs.deliver(delivery(40, 2, "h")).await;
    let mut outputs = server.publish_from(0).await;
    assert_eq!(outputs.open.producer_name, "job~1~0", "subscription, id of the input, segment");
    let mut batches = Vec::new();
    for (offset, index) in [(40u64, 0), (40, 1), (41, 0), (41, 1)] {
        let batch = outputs.batch().await;
        assert_eq!((batch.lo_sequence, batch.count), ((offset << 14 | index) + 1, 1));
        batches.push(batch);
    }
    assert_eq!(batches[2].prev_sequence, batches[1].hi_sequence, "a chain over gaps (DD5)");
    for batch in &batches[..3] {
        outputs.receipt(batch, 0).await;
    }
    let settle = inputs.settle().await;
    assert_eq!(up_to(&settle), 40, "one output of 41 is not stored yet");
    inputs.settled(&settle, 41).await;
    outputs.receipt(&batches[3], 0).await;
    let settle = inputs.settle().await;
    assert_eq!(up_to(&settle), 41);
    inputs.settled(&settle, 42).await;
    stop.cancel();
    finished(inputs).await;
    let processed = soon(ended).await.expect("it ended").expect("without an error");
    assert_eq!(processed, Processed { inputs: 2, outputs: 4, restarts: 0 });
}

#[tokio::test]
async fn after_a_restart_outputs_that_are_stored_are_passed_by_and_the_others_sent() {
    let server = Server::start().await;
    let client = server.client().await;
    let stop = CancellationToken::new();
    let ended = start(&client, &stop);
    let mut inputs = server.consume_from(5).await;
    inputs.deliver(delivery(5, 2, "h")).await;
    let mut outputs = server.publish_from((5 << 14 | 1) + 1).await; // all of 5, nothing of 6
    for index in 0..2 {
        let batch = outputs.batch().await;
        assert_eq!(batch.lo_sequence, (6 << 14 | index) + 1);
        outputs.receipt(&batch, 0).await;
    }
    let mut settled = 0;
    while settled < 6 {
        let settle = inputs.settle().await;
        settled = up_to(&settle);
        inputs.settled(&settle, settled + 1).await;
    }
    stop.cancel();
    finished(inputs).await;
    let processed = soon(ended).await.expect("it ended").expect("without an error");
    assert_eq!((processed.inputs, processed.outputs), (2, 4));
}

#[tokio::test]
async fn a_processor_that_was_taken_over_accepts_nothing_more_and_begins_again() {
    let server = Server::start().await;
    let client = server.client().await;
    let stop = CancellationToken::new();
    let ended = start(&client, &stop);
    let inputs = server.consume_from(0).await;
    inputs.deliver(delivery(0, 2, "h")).await;
    let mut outputs = server.publish_from(0).await;
    let batch = outputs.batch().await;
    outputs.receipt(&batch, 0).await;
    outputs.end(refusal(Reason::ProducerFenced, None)).await;
    let (mut again, ()) = tokio::join!(server.consume_from(0), finished(inputs));
    again.deliver(delivery(0, 1, "new")).await;
    let mut outputs = server.publish_from(1).await;
    let batch = outputs.batch().await;
    assert_eq!(batch.lo_sequence, 2, "the first output is stored");
    outputs.receipt(&batch, 0).await;
    let settle = again.settle().await;
    assert_eq!(up_to(&settle), 0);
    again.settled(&settle, 1).await;
    stop.cancel();
    finished(again).await;
    let processed = soon(ended).await.expect("it ended").expect("without an error");
    assert_eq!((processed.inputs, processed.restarts), (1, 1));
}

#[tokio::test]
async fn an_input_that_comes_out_of_its_order_is_never_taken_for_done() {
    let server = Server::start().await;
    let client = server.client().await;
    let stop = CancellationToken::new();
    let _ended = start(&client, &stop);
    let inputs = server.consume_from(0).await;
    inputs.deliver(delivery(7, 1, "h")).await;
    let mut outputs = server.publish_from(0).await;
    for _ in 0..2 {
        let batch = outputs.batch().await;
        outputs.receipt(&batch, 0).await;
    }
    inputs.deliver(delivery(5, 1, "h")).await;
    let (again, ()) = tokio::join!(server.consume(), async {
        let mut inputs = inputs;
        while let Some(frame) = soon(inputs.next()).await {
            if let geminga_proto::v1::consume_frame::Frame::Settle(settle) = frame {
                assert_eq!(up_to(&settle), 7);
                inputs.refuse(&settle, Reason::InvalidHandle).await;
            }
        }
    });
    assert!(again.open.claims.is_empty(), "it begins from what is accepted");
}

#[tokio::test]
async fn a_shared_subscription_and_too_many_outputs_are_refused() {
    let server = Server::start().await;
    let client = server.client().await;
    for kind in [SubscriptionType::Shared, SubscriptionType::KeyShared] {
        let script = async {
            let call = server.consume().await;
            let settings = SubscriptionSettings { r#type: kind.into(), ..Default::default() };
            let settings = Some(settings);
            call.opened_as(ConsumeOpened { settings, ..Default::default() }).await;
            call
        };
        let run = client.processor("in", "job", "out").run(|input| ready(Ok(doubled(&input))));
        let (refused, _call) = tokio::join!(soon(run), script);
        let reason = refused.expect_err("out of order").reason();
        assert_eq!(reason, Some(Reason::InvalidRequest), "{kind:?}");
    }
    let run = client
        .processor("in", "job", "out")
        .run(|_| ready(Ok(vec![Message::new("x"); OUTPUTS_MAX + 1])));
    let script = async {
        let inputs = server.consume_from(0).await;
        inputs.deliver(delivery(0, 1, "h")).await;
        let mut outputs = server.publish().await;
        outputs.opened(0, 1 << 20, 1 << 30).await;
        let drained = async { while outputs.next().await.is_some() {} };
        tokio::select! { () = drained => {}, () = finished(inputs) => {} }
    };
    let (refused, ()) = tokio::join!(soon(run), script);
    assert_eq!(refused.expect_err("too many").reason(), Some(Reason::InvalidRequest));
}
