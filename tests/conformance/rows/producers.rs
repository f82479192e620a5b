//! Producers: sequences, access modes, conditional appends, redirects.

use std::sync::Arc;

use geminga_proto::{
    reason::Reason,
    v1::{AccessMode, OpenPublish, Route},
};

use super::topic;
use crate::{
    client::{Outgoing, batch, numbered, reason, refusal, settings},
    consumer,
    producer::open,
    world::{Shape, World},
};

/// What the topic's first segment holds.
async fn stored(world: &World, topic: &str, count: usize) -> Vec<String> {
    let client = world.client().await;
    client.subscription(topic, "judge", settings(Default::default())).await;
    let mut consumer = client.consume(consumer::open(topic, "judge", "judge"), 10_000).await;
    let all = consumer.take(count).await;
    consumer.gets_nothing("there is no more").await;
    all.iter().map(crate::consumer::Got::text).collect()
}

pub(crate) async fn sequences(world: Arc<World>) {
    let topic = topic("sequences");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    let mut producer = client.produce(open(&topic, "writer")).await;
    let one = |sequence: u64| batch(sequence - 1, &[Outgoing::new(format!("s-{sequence}"))]);
    for sequence in 1..=4 {
        producer.send_batch(one(sequence)).await;
        assert_eq!(producer.receipt().await.hi_sequence, sequence);
    }
    // A repeat is answered with success, and not stored.
    producer.send_batch(one(3)).await;
    let repeat = producer.receipt().await;
    assert!(repeat.duplicate && repeat.hi_sequence == 3, "{repeat:?}");
    // 5 is refused for its own fault, and 6 was pipelined behind it: it must not become the place where 5 is forgotten (T41).
    let too_large = vec![0; producer.opened.max_message_bytes as usize + 1];
    producer.send_batch(batch(4, &[Outgoing::new(too_large)])).await;
    producer.send_batch(one(6)).await;
    assert_eq!(producer.refused().await, "MESSAGE_TOO_LARGE");
    assert_eq!(producer.refused().await, "OUT_OF_SEQUENCE");
    producer.send_batch(one(5)).await;
    producer.send_batch(one(6)).await;
    for sequence in [5, 6] {
        let receipt = producer.receipt().await;
        assert_eq!((receipt.hi_sequence, receipt.duplicate), (sequence, false));
    }
    // One that is skipped, and one that comes before its turn.
    producer.send_batch(one(8)).await;
    assert_eq!(producer.refused().await, "OUT_OF_SEQUENCE");
    // Other bounds than the stored ones.
    producer.send_batch(batch(5, &numbered(2))).await;
    assert_eq!(producer.refused().await, "SEQUENCE_CONFLICT");
    producer.send_batch(one(7)).await;
    assert_eq!(producer.receipt().await.hi_sequence, 7);
    let wanted: Vec<String> = (1..=7).map(|sequence| format!("s-{sequence}")).collect();
    assert_eq!(stored(&world, &topic, 7).await, wanted);
    // A newer stream of the same producer fences the older one.
    let newer = OpenPublish { stream_number: 2, ..open(&topic, "writer") };
    let newer = client.produce(newer).await;
    assert_eq!(newer.opened.last_persisted_sequence, 7);
    assert_eq!(producer.fenced().await, "PRODUCER_FENCED");
}

pub(crate) async fn session_producers(world: Arc<World>) {
    let topic = topic("sessions");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    let mut producer = client.produce(open(&topic, "")).await;
    assert!(!producer.opened.producer_name.is_empty(), "the server gives a name");
    producer.send(&numbered(3)).await;
    producer.receipt().await;
    let back = OpenPublish {
        resume_token: producer.opened.resume_token.clone(),
        stream_number: 2,
        ..open(&topic, "")
    };
    drop(producer);
    let mut again = client.produce(back).await;
    assert_eq!(again.opened.last_persisted_sequence, 3, "it is resumed");
    again.send_batch(batch(0, &numbered(3))).await;
    assert!(again.receipt().await.duplicate);
    assert_eq!(stored(&world, &topic, 3).await.len(), 3);
}

pub(crate) async fn access_modes(world: Arc<World>) {
    let topic = topic("access");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    let with = |name: &str, access: AccessMode| OpenPublish {
        access: access.into(),
        ..open(&topic, name)
    };
    let mut first = client.produce(with("first", AccessMode::Exclusive)).await;
    first.send(&numbered(1)).await;
    first.receipt().await;
    // Nobody else gets in, in whatever mode, and the unary call is no way around.
    for access in [AccessMode::Shared, AccessMode::Exclusive] {
        let refused = refusal(client.try_produce(with("second", access)).await);
        assert!(refused.contains("PRODUCER"), "{access:?}: {refused}");
    }
    let unary = geminga_proto::v1::PublishRequest {
        topic: topic.clone(),
        segment: Some(0),
        batch: Some(batch(0, &numbered(1))),
        ..Default::default()
    };
    let refused = refusal(client.publisher().publish(unary).await);
    assert!(refused.contains("PRODUCER"), "unary: {refused}");
    // Fencing ends the one that is there, and nothing of it is stored from then on.
    let mut fencing = client.produce(with("third", AccessMode::ExclusiveWithFencing)).await;
    assert_eq!(first.fenced().await, "PRODUCER_FENCED");
    fencing.send(&numbered(1)).await;
    fencing.receipt().await;
    let nameless = refusal(client.try_produce(with("", AccessMode::ExclusiveWithFencing)).await);
    assert_eq!(nameless, "INVALID_REQUEST", "fencing needs a name");
    // Once it has gone, others may come.
    drop(fencing);
    let mut last = crate::harness::eventually("the topic is free again", async || {
        client.try_produce(with("second", AccessMode::Shared)).await.ok()
    })
    .await;
    last.send(&numbered(1)).await;
    last.receipt().await;
    assert_eq!(stored(&world, &topic, 3).await.len(), 3);
}

pub(crate) async fn conditional_append(world: Arc<World>) {
    let topic = topic("conditional");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    let mut a = client.produce(open(&topic, "a")).await;
    let mut b = client.produce(open(&topic, "b")).await;
    let expecting = |prev: u64, offset: u64, value: &str| {
        let mut batch = batch(prev, &[Outgoing::new(value)]);
        batch.expected_offset = Some(offset);
        batch
    };
    a.send_batch(expecting(0, 0, "a-0")).await;
    assert_eq!(a.receipt().await.base_offset, 0);
    // b believes the log to be as it was.
    b.send_batch(expecting(0, 0, "b-0")).await;
    let refused = b.outcome().await.expect("the stream goes on").expect_err("refused");
    assert!(refused.message.contains('1'), "it says which offset it would have got: {refused:?}");
    assert!(Reason::parse(&refused.reason).is_some(), "{refused:?}");
    b.send_batch(expecting(0, 1, "b-1")).await;
    assert_eq!(b.receipt().await.base_offset, 1);
    a.send_batch(expecting(1, 7, "a-7")).await;
    assert!(a.outcome().await.expect("the stream goes on").is_err(), "from beyond the end");
    assert_eq!(stored(&world, &topic, 2).await, ["a-0", "b-1"]);
}

pub(crate) async fn redirect(world: Arc<World>) {
    const SEGMENTS: u32 = 8;
    let topic = topic("redirect");
    let client = world.client().await;
    client.topic(&topic, SEGMENTS).await;
    let mut redirected = 0;
    for segment in 0..SEGMENTS {
        client.publish(&topic, segment, &numbered(1)).await; // loads it, and works through any broker
        let direct = OpenPublish {
            segment,
            route: Route::Direct.into(),
            ..open(&topic, &format!("p-{segment}"))
        };
        let relayed = OpenPublish {
            route: Route::Relay.into(),
            stream_number: 1,
            ..OpenPublish { producer_name: format!("r-{segment}"), ..direct.clone() }
        };
        let mut through = client.produce(relayed).await;
        through.send(&numbered(1)).await;
        through.receipt().await;
        match client.try_produce(direct.clone()).await {
            Ok(mut producer) => {
                producer.send(&numbered(1)).await;
                producer.receipt().await;
            }
            Err(status) => {
                redirected += 1;
                assert_eq!(reason(&status), Some(Reason::NotOwner), "{status:?}");
                let mut producer = world.owner(&topic, segment).await.produce(direct).await;
                producer.send(&numbered(1)).await;
                producer.receipt().await;
            }
        }
    }
    if world.shape() == Shape::Standalone {
        assert_eq!(redirected, 0, "one process owns everything");
    }
}
