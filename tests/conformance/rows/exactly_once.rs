//! Exactly once: what TX8 rests on, done by hand. Outputs go out under a named producer whose sequences are the inputs'.

use std::sync::Arc;

use geminga_proto::v1::OpenPublish;

use super::topic;
use crate::{
    client::{Outgoing, batch, settings},
    consumer, producer,
    world::World,
};

/// Enough for a hundred lives of the job.
const INPUTS: u64 = 1_600;

fn transform(input: &str) -> String {
    let sum = input.bytes().fold(7_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    format!("{input} -> {sum:016x}")
}

pub(crate) async fn one_output_per_input(world: Arc<World>) {
    let (input, output) = (topic("once-in"), topic("once-out"));
    let client = world.client().await;
    client.topic(&input, 1).await;
    client.topic(&output, 1).await;
    client.subscription(&input, "job", settings(Default::default())).await;
    let inputs: Vec<Outgoing> =
        (0..INPUTS).map(|number| Outgoing::new(format!("in-{number}"))).collect();
    for chunk in inputs.chunks(25) {
        client.publish(&input, 0, chunk).await;
    }
    // Each life of the job ends at another step, with only the job gone, or now and then with the owner killed.
    let mut life = 0;
    let mut done = false;
    while !done {
        life += 1;
        done = job(&world, &input, &output, life).await;
    }
    assert!(life > 100, "it was killed again and again: {life}");
    let client = world.client().await;
    client.subscription(&output, "judge", settings(Default::default())).await;
    let mut judge = client.consume(consumer::open(&output, "judge", "judge"), 10_000).await;
    let outputs = judge.take(INPUTS as usize).await;
    judge.gets_nothing("no output twice").await;
    for (number, got) in outputs.iter().enumerate() {
        assert_eq!(got.text(), transform(&format!("in-{number}")));
    }
}

/// One life of the job; whether it came to the end.
async fn job(world: &World, input: &str, output: &str, life: u64) -> bool {
    let client = world.client().await;
    let mut consumer = client.consume(consumer::open(input, "job", "job"), 40).await;
    let open = OpenPublish { stream_number: life, ..producer::open(output, "job~7~0") };
    let mut producer = client.produce(open).await;
    let persisted = producer.opened.last_persisted_sequence;
    let mut steps = 20 + life * 13 % 47;
    loop {
        if consumer.opened.mark_delete_next >= INPUTS {
            return true;
        }
        let Some(got) = consumer.next_or_end().await else { return false };
        let sequence = got.offset + 1;
        if sequence > persisted {
            // In the order of the inputs, so that sequences rise; what is already stored is skipped.
            producer
                .send_batch(batch(sequence - 1, &[Outgoing::new(transform(&got.text()))]))
                .await;
        }
        steps -= 1;
        if steps == 0 {
            if life % 16 == 3 {
                world.kill_owner(input).await; // with an output on its way
            }
            return false;
        }
        if sequence > persisted {
            match producer.outcome().await {
                Ok(Ok(receipt)) => assert_eq!(receipt.hi_sequence, sequence),
                Ok(Err(refused)) => panic!("{refused:?}"),
                Err(_) => return false,
            }
        }
        steps -= 1;
        if steps == 0 {
            return false; // the output is stored, the input not settled
        }
        consumer.accept_up_to(&got).await;
        consumer.grant(1).await;
        if sequence == INPUTS {
            return true;
        }
        steps = steps.saturating_sub(1).max(1);
    }
}
