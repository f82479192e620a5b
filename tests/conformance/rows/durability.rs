//! A receipt means that the message is there.

use std::sync::Arc;

use geminga_proto::v1::DurabilityLevel;

use super::topic;
use crate::{
    client::{Outgoing, numbered, settings},
    consumer,
    producer::{self, Producer},
    world::World,
};

/// Batches of a round.
const ROUND: u64 = 200;

/// The message with this sequence.
fn message(sequence: u64) -> Vec<Outgoing> {
    vec![Outgoing::new(format!("s-{sequence}")).key(format!("k-{}", sequence % 7))]
}

/// Opens the named producer's next stream; sends everything from the first sequence without a receipt on, as it was.
async fn resume(world: &World, topic: &str, stream: u64, acked: u64, to: u64) -> Producer {
    let mut open = producer::open(topic, "writer");
    open.stream_number = stream;
    let mut producer = world.client().await.produce(open).await;
    assert!(producer.opened.last_persisted_sequence >= acked, "a receipt is not forgotten");
    for sequence in acked + 1..=to {
        producer.send_batch(crate::client::batch(sequence - 1, &message(sequence))).await;
    }
    producer
}

pub(crate) async fn receipts_survive_kills(world: Arc<World>) {
    let topic = topic("receipts");
    world.client().await.topic(&topic, 1).await;
    let mut offsets = vec![u64::MAX; usize::try_from(3 * ROUND + 1).expect("small")];
    let (mut acked, mut stream) = (0, 0);
    for round in 1..=3 {
        // The kill falls somewhere into the round; then everything without a receipt is sent again.
        for kill in [true, false] {
            stream += 1;
            let mut producer = resume(&world, &topic, stream, acked, round * ROUND).await;
            let persisted = producer.opened.last_persisted_sequence;
            if kill {
                let until = acked + ROUND / 2;
                while acked < until {
                    acked += 1;
                    offsets[acked as usize] = producer.receipt().await.base_offset;
                }
                world.kill_owner(&topic).await;
            }
            while acked < round * ROUND {
                match producer.outcome().await {
                    Ok(Ok(receipt)) => {
                        acked += 1;
                        assert_eq!(receipt.hi_sequence, acked, "receipts come in order");
                        assert_eq!(receipt.duplicate, acked <= persisted, "{acked}");
                        offsets[acked as usize] = receipt.base_offset;
                    }
                    Ok(Err(refused)) => assert!(kill, "{refused:?}"),
                    Err(status) => {
                        assert!(kill, "{status:?}");
                        break;
                    }
                }
            }
        }
    }
    let client = world.client().await;
    client.subscription(&topic, "judge", settings(Default::default())).await;
    let mut consumer = client.consume(consumer::open(&topic, "judge", "judge"), 10_000).await;
    let all = consumer.take(usize::try_from(3 * ROUND).expect("small")).await;
    for (number, got) in (1..).zip(&all) {
        assert_eq!(got.text(), format!("s-{number}"), "in order, once");
        let at = offsets[number as usize];
        // A receipt for a repeat may not know the place any more.
        assert!(at == u64::MAX || at == got.offset, "{number} lies where its receipt said");
    }
    consumer.gets_nothing("there is no more").await;
}

pub(crate) async fn receipts_name_their_level(world: Arc<World>) {
    let topic = topic("levels");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    let receipt = client.publish_as("", 0, &topic, 0, &numbered(3)).await;
    assert_eq!(receipt.level(), DurabilityLevel::Quorum, "three bookies, two synced copies");
    assert_eq!((receipt.count, receipt.duplicate), (3, false));
    assert!(receipt.epoch > 0);
}
