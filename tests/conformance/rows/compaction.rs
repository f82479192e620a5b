//! Compaction: the latest message of each key, for those who read so; nothing changes for others.

use std::{collections::BTreeMap, sync::Arc};

use geminga_proto::{
    admin::v1::CompactTopicRequest,
    v1::{OpenConsume, ReadFrom, SubscriptionStart, read_from},
};

use super::{offsets, topic};
use crate::{
    client::{Client, Outgoing, passing},
    consumer::{Got, open},
    harness::eventually,
    world::World,
};

/// Says that everything before it was read.
const LAST: &str = "the last one";

/// A topic's messages as they were published, and the table that they make.
#[derive(Default)]
struct Model {
    log: Vec<Outgoing>,
    table: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Model {
    fn add(&mut self, messages: &[Outgoing]) {
        for message in messages {
            apply(&mut self.table, message.key.as_deref(), &message.value);
            self.log.push(message.clone());
        }
    }
}

fn apply(table: &mut BTreeMap<Vec<u8>, Vec<u8>>, key: Option<&[u8]>, value: &[u8]) {
    let Some(key) = key else { return };
    if value.is_empty() {
        table.remove(key);
    } else {
        table.insert(key.to_vec(), value.to_vec());
    }
}

/// Batches of seven: keys come again and again, some are removed, and some messages have none.
async fn publish(client: &Client, topic: &str, model: &mut Model, from: u64, count: u64) {
    let messages: Vec<Outgoing> = (from..from + count)
        .map(|number| match number % 11 {
            3 => Outgoing::new(format!("no key {number}")),
            5 => Outgoing::new("").key(format!("k-{}", number % 23)),
            _ => Outgoing::new(format!("v-{number}")).key(format!("k-{}", number % 23)),
        })
        .collect();
    for chunk in messages.chunks(7) {
        client.publish(topic, 0, chunk).await;
        model.add(chunk);
    }
}

/// Compacts everything that is stored now.
async fn compact(client: &Client, topic: &str) {
    eventually("the topic is compacted", async || {
        let request = CompactTopicRequest { topic: topic.to_owned() };
        let walked = async {
            let mut steps = client.admin().compact_topic(request).await?.into_inner();
            while let Some(step) = steps.message().await? {
                assert!(step.problem.is_empty(), "{step:?}");
                assert!(step.bytes_done <= step.bytes_total, "{step:?}");
            }
            Ok(())
        };
        match walked.await {
            Ok(()) => Some(()),
            Err(status) => {
                let status: tonic::Status = status;
                assert!(passing(&status), "{status:?}");
                None
            }
        }
    })
    .await;
}

/// What a reader gets from the beginning on up to the last message.
async fn read(client: &Client, topic: &str, end: usize, compacted: bool) -> (u64, Vec<Got>) {
    let from = read_from::From::At(SubscriptionStart::Earliest.into());
    let reader = OpenConsume {
        reader: Some(ReadFrom { from: Some(from) }),
        compacted,
        ..open(topic, "", "")
    };
    let mut reader = client.consume(reader, 1_000_000).await;
    let mut got = Vec::new();
    while got.last().is_none_or(|got: &Got| got.offset + 1 < end as u64) {
        got.push(reader.next().await);
    }
    (reader.opened.compacted_to, got)
}

/// The compacted reader's table is that of the log, and it reads no more than it has to.
async fn is_compacted(client: &Client, topic: &str, model: &Model, horizon: u64) {
    let (compacted_to, got) = read(client, topic, model.log.len(), true).await;
    assert!(compacted_to >= horizon, "compacted to {compacted_to}, not {horizon}");
    assert!(got.is_sorted_by(|a, b| a.offset < b.offset), "in the order of the log");
    let below: Vec<&Got> = got.iter().take_while(|got| got.offset < compacted_to).collect();
    let mut keys: Vec<_> = below.iter().map(|got| got.key.clone()).collect();
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), below.len(), "one message a key");
    assert!(below.iter().all(|got| got.key.is_some() && !got.value.is_empty()), "no tombstone");
    for got in &got {
        let stored = &model.log[usize::try_from(got.offset).expect("small")];
        assert_eq!(got.value[..], stored.value[..], "offset {} is as it was", got.offset);
    }
    let behind = got.len() - below.len();
    assert_eq!(behind as u64, model.log.len() as u64 - compacted_to, "everything behind it");
    let mut table = BTreeMap::new();
    for got in &got {
        apply(&mut table, got.key.as_deref(), &got.value);
    }
    assert_eq!(table, model.table, "the same table");
}

/// The last message, which every reader waits for.
async fn finish(client: &Client, topic: &str, model: &mut Model) {
    let last = [Outgoing::new(LAST).key("last")];
    client.publish(topic, 0, &last).await;
    model.add(&last);
}

pub(crate) async fn the_table_is_the_same(world: Arc<World>) {
    let topic = topic("compaction");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    let mut model = Model::default();
    publish(&client, &topic, &mut model, 0, 300).await;
    compact(&client, &topic).await;
    let state = client.state(&topic, 0).await;
    assert_eq!(state.compacted_to, 300, "up to its end: {state:?}");
    assert_eq!(state.compacted_messages, model.table.len() as u64, "{state:?}");
    publish(&client, &topic, &mut model, 300, 40).await;
    finish(&client, &topic, &mut model).await;
    is_compacted(&client, &topic, &model, 300).await;
    let (_, all) = read(&client, &topic, model.log.len(), false).await;
    assert_eq!(offsets(&all), (0..341).collect::<Vec<_>>(), "other readers get everything");
    // A second round goes on from the first one's view.
    compact(&client, &topic).await;
    publish(&client, &topic, &mut model, 341, 20).await;
    finish(&client, &topic, &mut model).await;
    is_compacted(&client, &topic, &model, 341).await;
}

pub(crate) async fn survives_kills(world: Arc<World>) {
    let topic = topic("compaction-kill");
    let mut client = world.client().await;
    client.topic(&topic, 1).await;
    let mut model = Model::default();
    for round in 0..3 {
        publish(&client, &topic, &mut model, round * 200, 200).await;
        // The owner dies somewhere in a compaction, which the next one does not mind.
        let request = CompactTopicRequest { topic: topic.clone() };
        let walk = client.admin().compact_topic(request).await;
        if round > 0
            && let Ok(steps) = walk
        {
            let _ = steps.into_inner().message().await;
        }
        world.kill_owner(&topic).await;
        client = world.client().await;
    }
    compact(&client, &topic).await;
    let horizon = client.state(&topic, 0).await.compacted_to;
    assert_eq!(horizon, 600);
    finish(&client, &topic, &mut model).await;
    is_compacted(&client, &topic, &model, 600).await;
    world.kill_owner(&topic).await;
    is_compacted(&world.client().await, &topic, &model, 600).await;
}
