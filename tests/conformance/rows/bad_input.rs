//! Input that nobody should send: typed refusals, and nobody else is harmed.

use std::sync::Arc;

use geminga_proto::{
    admin::v1::{CompactTopicRequest, CreateSubscriptionRequest, CreateTopicRequest},
    v1::{
        Accept, AcceptUpTo, ExplainRequest, Extend, OffsetRange, OpenConsume, OpenPublish,
        PeekRequest, PullRequest, ReadFrom, Reject, Release, RetryPolicy, SeekRequest, Settle,
        SettleRequest, SubscriptionSettings, SubscriptionType, settle::Verb,
    },
};
use tonic::Status;

use super::{lease, retry, shared, topic};
use crate::{
    client::{Client, Outgoing, batch, numbered, refusal},
    consumer::{at_offset, open, range},
    producer,
    world::World,
};

/// Names that are none.
fn forbidden() -> Vec<String> {
    let mut names: Vec<String> =
        [".", "..", "a b", "a\0b", "a\nb", "ä", "a%2fb", "a*", "a?b", "\u{202e}x", "a\\b"]
            .iter()
            .map(|name| (*name).to_owned())
            .collect();
    names.push("x".repeat(201));
    names
}

/// Every call that takes the name of a topic.
async fn with_topic(client: &Client, topic: &str) -> Vec<(&'static str, String)> {
    let named = topic.to_owned();
    let mut subscriber = client.subscriber();
    let settle = SettleRequest {
        topic: named.clone(),
        subscription: "work".into(),
        settle: Some(Settle {
            token: 1,
            verb: Some(Verb::Accept(Accept { ranges: range(0), handle: vec![0; 60].into() })),
        }),
        ..SettleRequest::default()
    };
    let work = || "work".to_owned();
    let pull = PullRequest { topic: named.clone(), subscription: work(), ..Default::default() };
    let seek = SeekRequest {
        topic: named.clone(),
        subscription: work(),
        to: Some(at_offset(0)),
        ..SeekRequest::default()
    };
    let explain = ExplainRequest { topic: named.clone(), subscription: work(), segment: None };
    let peek = PeekRequest { topic: named.clone(), from: Some(at_offset(0)), ..Default::default() };
    let create = CreateTopicRequest { name: named.clone(), segments: 1 };
    vec![
        ("consume", refusal(client.try_consume(open(topic, "work", "a")).await)),
        ("settle", refusal(subscriber.settle(settle).await)),
        ("pull", refusal(subscriber.pull(pull).await)),
        ("seek", refusal(subscriber.seek(seek).await)),
        ("explain", refusal(subscriber.explain(explain).await)),
        ("peek", refusal(subscriber.peek(peek).await)),
        ("publish", refusal(client.try_produce(producer::open(topic, "p")).await)),
        ("create topic", refusal(client.admin().create_topic(create).await)),
        ("compact", refusal(compact(client, topic).await)),
    ]
}

/// Compacts to the end; a refusal may come with the first step.
async fn compact(client: &Client, topic: &str) -> Result<(), Status> {
    let request = CompactTopicRequest { topic: topic.to_owned() };
    let mut steps = client.admin().compact_topic(request).await?.into_inner();
    while steps.message().await?.is_some() {}
    Ok(())
}

pub(crate) async fn names(world: Arc<World>) {
    let client = world.client().await;
    let topic = topic("names");
    client.topic(&topic, 1).await;
    let mut wrong = Vec::new();
    let mut expect = |what: String, got: String, wanted: &str| {
        if got != wanted {
            wrong.push(format!("{what}: {wanted} wanted, got {got}"));
        }
    };
    let mut topics: Vec<String> =
        forbidden().iter().map(|name| format!("public/default/{name}")).collect();
    topics.extend(
        ["", "a", "public/default", "public/default/a/b", "/public/default/a"].map(String::from),
    );
    for bad in &topics {
        for (call, got) in with_topic(&client, bad).await {
            expect(format!("{call} with the topic {bad:?}"), got, "INVALID_NAME");
        }
    }
    for bad in forbidden() {
        let consume = client.try_consume(open(&topic, &bad, "a")).await;
        expect(format!("consume {bad:?}"), refusal(consume), "INVALID_NAME");
        let consumer = OpenConsume { create_at: Some(1), ..open(&topic, "made", &bad) };
        let consume = client.try_consume(consumer).await;
        expect(format!("consumer {bad:?}"), refusal(consume), "INVALID_NAME");
        let produce = client.try_produce(producer::open(&topic, &bad)).await;
        expect(format!("producer {bad:?}"), refusal(produce), "INVALID_NAME");
        let create = CreateSubscriptionRequest {
            topic: topic.clone(),
            name: bad.clone(),
            ..CreateSubscriptionRequest::default()
        };
        let created = client.admin().create_subscription(create).await;
        expect(format!("create {bad:?}"), refusal(created), "INVALID_NAME");
        let pull = PullRequest {
            topic: topic.clone(),
            subscription: bad.clone(),
            ..PullRequest::default()
        };
        let pulled = client.subscriber().pull(pull).await;
        expect(format!("pull {bad:?}"), refusal(pulled), "INVALID_NAME");
        let policy = RetryPolicy { dead_letter_topic: bad.clone(), ..RetryPolicy::default() };
        let create = CreateSubscriptionRequest {
            topic: topic.clone(),
            name: "dead".into(),
            settings: Some(retry(shared(), policy)),
            ..CreateSubscriptionRequest::default()
        };
        let created = client.admin().create_subscription(create).await;
        expect(format!("dead-letter topic {bad:?}"), refusal(created), "INVALID_NAME");
    }
    assert!(wrong.is_empty(), "{} of them: {wrong:#?}", wrong.len());
}

pub(crate) async fn fields(world: Arc<World>) {
    let topic = topic("fields");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    client.publish(&topic, 0, &numbered(3)).await;
    let mut wrong = Vec::new();
    let mut expect = |what: &str, got: String, wanted: &str| {
        if got != wanted {
            wrong.push(format!("{what}: {wanted} wanted, got {got}"));
        }
    };

    let opens: [(&str, &str, OpenConsume); 9] = [
        (
            "a segment that is none",
            "SEGMENT_NOT_FOUND",
            OpenConsume { segment: 9, ..open(&topic, "work", "a") },
        ),
        (
            "a namespace that is none",
            "NAMESPACE_NOT_FOUND",
            OpenConsume { ..open("public/nowhere/t", "work", "a") },
        ),
        ("a subscription that is none", "SUBSCRIPTION_NOT_FOUND", open(&topic, "none", "a")),
        (
            "a layout of another epoch",
            "LAYOUT_CHANGED",
            OpenConsume { layout_epoch: 77, ..open(&topic, "work", "a") },
        ),
        (
            "a start that is none",
            "INVALID_REQUEST",
            OpenConsume { create_at: Some(9), ..open(&topic, "made", "a") },
        ),
        (
            "a type that is none",
            "INVALID_REQUEST",
            OpenConsume {
                create_at: Some(1),
                settings: Some(SubscriptionSettings { r#type: 9, ..Default::default() }),
                ..open(&topic, "made", "a")
            },
        ),
        (
            "another type than it has",
            "ALREADY_EXISTS",
            OpenConsume {
                create_at: Some(1),
                settings: Some(crate::client::settings(SubscriptionType::Exclusive)),
                ..open(&topic, "work", "a")
            },
        ),
        ("neither subscription nor reader", "INVALID_NAME", open(&topic, "", "a")),
        (
            "a reader from nowhere",
            "INVALID_REQUEST",
            OpenConsume { reader: Some(ReadFrom { from: None }), ..open(&topic, "", "") },
        ),
    ];
    for (what, wanted, open) in opens {
        expect(what, refusal(client.try_consume(open).await), wanted);
    }

    let settings: [(&str, SubscriptionSettings); 3] = [
        (
            "a backoff above its maximum",
            retry(
                shared(),
                RetryPolicy { backoff_ms: 2_000, backoff_ms_max: 1_000, ..RetryPolicy::default() },
            ),
        ),
        ("a lease for ever", lease(shared(), u64::MAX)),
        (
            "a backoff for ever",
            retry(shared(), RetryPolicy { backoff_ms: u64::MAX, ..RetryPolicy::default() }),
        ),
    ];
    for (what, settings) in settings {
        let create = CreateSubscriptionRequest {
            topic: topic.clone(),
            name: "made".into(),
            settings: Some(settings),
            ..CreateSubscriptionRequest::default()
        };
        expect(what, refusal(client.admin().create_subscription(create).await), "INVALID_REQUEST");
    }

    unary_fields(&client, &topic, &mut expect).await;

    // In a stream a wrong settle is refused, and the stream goes on.
    let mut a = client.consume(open(&topic, "work", "a"), 100).await;
    let got = a.take(3).await;
    let handle = || got[0].handle.clone();
    let ranges = |first, last| vec![OffsetRange { first, last }];
    let verbs: [(&str, &str, Verb); 7] = [
        (
            "a range upside down",
            "INVALID_REQUEST",
            Verb::Accept(Accept { ranges: ranges(2, 1), handle: handle() }),
        ),
        (
            "no range",
            "INVALID_REQUEST",
            Verb::Accept(Accept { ranges: Vec::new(), handle: handle() }),
        ),
        (
            "more ranges than a settle may have",
            "INVALID_REQUEST",
            Verb::Accept(Accept {
                ranges: vec![OffsetRange { first: 0, last: 0 }; 10_001],
                handle: handle(),
            }),
        ),
        (
            "up to, on a shared subscription",
            "INVALID_REQUEST",
            Verb::AcceptUpTo(AcceptUpTo { offset: 1, handle: handle() }),
        ),
        (
            "a delay for ever",
            "INVALID_REQUEST",
            Verb::Release(Release {
                ranges: ranges(0, 0),
                handle: handle(),
                delay_ms: Some(u64::MAX),
                counts: true,
            }),
        ),
        (
            "a reason of 257 bytes",
            "INVALID_REQUEST",
            Verb::Reject(Reject {
                ranges: ranges(0, 0),
                handle: handle(),
                reason: "r".repeat(257),
            }),
        ),
        (
            "a lease for ever",
            "INVALID_REQUEST",
            Verb::Extend(Extend { ranges: ranges(0, 0), handle: handle(), lease_ms: u64::MAX }),
        ),
    ];
    for (what, wanted, verb) in verbs {
        let token = a.ask(verb).await;
        match a.answer(token).await {
            Ok(_) => expect(what, "nothing: it was taken".into(), wanted),
            Err(Some(refused)) => expect(what, refused.reason, wanted),
            Err(None) => {
                let end = a.ends_with().await;
                expect(what, format!("the end of the stream: {end}"), wanted);
                break;
            }
        }
    }
    if a.ended.is_none() {
        for got in &got {
            a.accept(got).await;
        }
    }
    assert!(wrong.is_empty(), "{} of them: {wrong:#?}", wrong.len());
}

/// Fields of the calls without a stream.
async fn unary_fields(client: &Client, topic: &str, expect: &mut impl FnMut(&str, String, &str)) {
    let subscriber = || client.subscriber();
    let settle = |verb: Option<Verb>, segment: u32| SettleRequest {
        topic: topic.to_owned(),
        segment,
        subscription: "work".into(),
        settle: Some(Settle { token: 1, verb }),
    };
    let good = Verb::Accept(Accept { ranges: range(0), handle: vec![0; 60].into() });
    let none = SettleRequest { settle: None, ..settle(None, 0) };
    expect("no settle", refusal(subscriber().settle(none).await), "INVALID_REQUEST");
    let verbless = settle(None, 0);
    expect("no verb", refusal(subscriber().settle(verbless).await), "INVALID_REQUEST");
    let elsewhere = settle(Some(good.clone()), 9);
    expect("settle segment 9", refusal(subscriber().settle(elsewhere).await), "SEGMENT_NOT_FOUND");
    let junk = settle(Some(good), 0);
    expect("a made-up handle", refusal(subscriber().settle(junk).await), "INVALID_HANDLE");

    let pull = PullRequest {
        topic: topic.to_owned(),
        subscription: "work".into(),
        ..PullRequest::default()
    };
    let pulls: [(&str, &str, PullRequest); 4] = [
        ("pull segment 9", "SEGMENT_NOT_FOUND", PullRequest { segment: Some(9), ..pull.clone() }),
        ("pull for a minute", "INVALID_REQUEST", PullRequest { wait_ms: 60_000, ..pull.clone() }),
        (
            "pull with a lease for ever",
            "INVALID_REQUEST",
            PullRequest { lease_ms: u64::MAX, ..pull.clone() },
        ),
        (
            "pull of nothing",
            "SUBSCRIPTION_NOT_FOUND",
            PullRequest { subscription: "none".into(), ..pull.clone() },
        ),
    ];
    for (what, wanted, request) in pulls {
        expect(what, refusal(subscriber().pull(request).await), wanted);
    }

    let seek = SeekRequest {
        topic: topic.to_owned(),
        segment: Some(0),
        subscription: "work".into(),
        to: Some(at_offset(0)),
    };
    let seeks: [(&str, &str, SeekRequest); 4] = [
        ("seek to nowhere", "INVALID_REQUEST", SeekRequest { to: None, ..seek.clone() }),
        (
            "seek to an empty place",
            "INVALID_REQUEST",
            SeekRequest { to: Some(ReadFrom { from: None }), ..seek.clone() },
        ),
        ("seek segment 9", "SEGMENT_NOT_FOUND", SeekRequest { segment: Some(9), ..seek.clone() }),
        (
            "seek of nothing",
            "SUBSCRIPTION_NOT_FOUND",
            SeekRequest { subscription: "none".into(), ..seek.clone() },
        ),
    ];
    for (what, wanted, request) in seeks {
        expect(what, refusal(subscriber().seek(request).await), wanted);
    }

    let peek =
        PeekRequest { topic: topic.to_owned(), from: Some(at_offset(0)), ..Default::default() };
    let nowhere = PeekRequest { from: None, ..peek.clone() };
    expect("peek nowhere", refusal(subscriber().peek(nowhere).await), "INVALID_REQUEST");
    let segment = PeekRequest { segment: 9, ..peek.clone() };
    expect("peek segment 9", refusal(subscriber().peek(segment).await), "SEGMENT_NOT_FOUND");
    let all = PeekRequest { messages_max: u32::MAX, ..peek };
    let peeked: Result<_, Status> = subscriber().peek(all).await;
    // Bounded either way: refused, or what fits into an answer.
    if let Err(status) = peeked {
        expect("peek at everything", refusal::<()>(Err(status)), "INVALID_REQUEST");
    }
    let explain =
        ExplainRequest { topic: topic.to_owned(), subscription: "work".into(), segment: Some(9) };
    expect("explain segment 9", refusal(subscriber().explain(explain).await), "SEGMENT_NOT_FOUND");
}

pub(crate) async fn sizes(world: Arc<World>) {
    let topic = topic("sizes");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", shared()).await;
    let mut producer = client.produce(producer::open(&topic, "writer")).await;
    let limit = producer.opened.max_message_bytes as usize;
    // The limit is on key, value and headers with their framing: the payload of a batch of one.
    let sent = |bytes: usize| {
        let with = |value: usize| {
            let mut message = Outgoing::new(vec![b'v'; value]).key("12345");
            message.headers = vec![("name".into(), "text".into())];
            vec![message]
        };
        let framing = batch(0, &with(limit - 100)).payload.len() - (limit - 100);
        with(bytes - framing)
    };
    assert_eq!(batch(0, &sent(limit)).payload.len(), limit);
    producer.send(&sent(limit)).await;
    producer.receipt().await;
    producer.send(&sent(limit + 1)).await;
    assert_eq!(producer.refused().await, "MESSAGE_TOO_LARGE");
    let refused = client
        .publisher()
        .publish(geminga_proto::v1::PublishRequest {
            topic: topic.clone(),
            segment: Some(0),
            batch: Some(batch(0, &sent(limit + 1))),
            ..Default::default()
        })
        .await;
    assert_eq!(refusal(refused), "MESSAGE_TOO_LARGE");
    let mut a = client.consume(open(&topic, "work", "a"), 100).await;
    assert_eq!(a.next().await.value[..], sent(limit)[0].value, "it comes as it was sent");
    a.gets_nothing("nothing of the other was stored").await;
    let stream = OpenPublish { stream_number: 2, ..producer::open(&topic, "writer") };
    let mut producer = client.produce(stream).await;
    producer.send(&numbered(1)).await;
    producer.receipt().await;
}

pub(crate) async fn idle_consumers(world: Arc<World>) {
    const MESSAGES: usize = 400;
    let topic = topic("idle-consumers");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", lease(shared(), 2_000)).await;
    client.subscription(&topic, "other", shared()).await;
    // One never reads what it gets, one reads and never settles; each over a connection of its own.
    let deaf = world.client().await.consume(open(&topic, "work", "deaf"), 50).await;
    let mut lazy = world.client().await.consume(open(&topic, "work", "lazy"), 50).await;
    for chunk in numbered(MESSAGES).chunks(20) {
        client.publish(&topic, 0, chunk).await;
    }
    lazy.take(50).await;
    let mut other = client.consume(open(&topic, "other", "o"), 10_000).await;
    assert_eq!(other.take(MESSAGES).await.len(), MESSAGES, "another subscription is not held up");
    // One that works gets everything, what the two held included, once their leases run out.
    let mut works = client.consume(open(&topic, "work", "works"), 10_000).await;
    let mut accepted = std::collections::BTreeSet::new();
    while accepted.len() < MESSAGES {
        let got = works.next().await;
        works.accept(&got).await;
        accepted.insert(got.offset);
        works.grant(1).await;
    }
    let cursor = client.describe(&topic, "work").await.cursors[0].clone();
    assert_eq!(cursor.mark_delete_next, MESSAGES as u64);
    drop(deaf);
}
