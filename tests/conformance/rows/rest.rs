//! The same promises over plain HTTP, and as CloudEvents.

use std::sync::Arc;

use serde_json::{Value, json};

use super::topic;
use crate::{client::settings, consumer::open, world::World};

/// One that publishes by HTTP: the path below a topic.
fn path(topic: &str, rest: &str) -> String {
    format!("/v1/topics/{topic}{rest}")
}

pub(crate) async fn publish_pull_settle(world: Arc<World>) {
    let topic = topic("rest");
    let made = world.post("/v1/topics", "application/json", &json!({"name": topic})).await;
    assert_eq!(made.status, 200, "{}", made.body);
    let work = json!({
        "name": "work",
        "start": "SUBSCRIPTION_START_EARLIEST",
        "settings": {"type": "SUBSCRIPTION_TYPE_SHARED"},
    });
    let made = world.post(&path(&topic, "/subscriptions"), "application/json", &work).await;
    assert_eq!(made.status, 200, "{}", made.body);
    let messages = json!({"messages": [
        {"key": "k", "value": "one", "headers": {"h": "1"}},
        {"key": "k", "value": "two"},
    ]});
    let published = world.post(&path(&topic, "/messages"), "application/json", &messages).await;
    assert_eq!(published.status, 200, "{}", published.body);
    // The same call with a sequence is stored once.
    let named = path(&topic, "/messages?producer_name=p&sequence=1");
    for duplicate in [false, true] {
        let published = world.post(&named, "text/plain", &json!("three")).await;
        assert_eq!(published.status, 200, "{}", published.body);
        assert_eq!(published.body["messages"][0]["duplicate"], duplicate, "{}", published.body);
    }
    let pull = path(&topic, "/subscriptions/work/pull?wait_ms=5000&messages_max=10");
    let pulled = world.post(&pull, "application/json", &Value::Null).await;
    assert_eq!(pulled.status, 200, "{}", pulled.body);
    let got = pulled.body["messages"].as_array().expect("messages").clone();
    let values: Vec<&str> = got.iter().filter_map(|message| message["value"].as_str()).collect();
    assert_eq!(values, ["one", "two", "\"three\""], "{}", pulled.body);
    assert_eq!((got[0]["key"].as_str(), got[0]["headers"]["h"].as_str()), (Some("k"), Some("1")));
    assert_eq!(got[0]["attempt"], 1);
    let segment = pulled.body["segment"].clone();
    for message in &got {
        let range = json!({"first": message["offset"], "last": message["offset"]});
        let accept = json!({"ranges": [range], "handle": message["handle"]});
        let settle = json!({"segment": segment, "settle": {"accept": accept}});
        let at = path(&topic, "/subscriptions/work/settle");
        let settled = world.post(&at, "application/json", &settle).await;
        assert_eq!(settled.status, 200, "{}", settled.body);
    }
    let cursor = world.client().await.describe(&topic, "work").await.cursors[0].clone();
    assert_eq!((cursor.mark_delete_next, cursor.backlog_messages), (3, 0));
    let none = path(&topic, "/subscriptions/none/pull");
    let refused = world.post(&none, "application/json", &Value::Null).await;
    assert_eq!(refused.status, 404, "{}", refused.body);
    assert_eq!(refused.body["error"]["reason"], "SUBSCRIPTION_NOT_FOUND");
}

pub(crate) async fn cloud_events(world: Arc<World>) {
    let topic = topic("cloud-events");
    let client = world.client().await;
    client.topic(&topic, 1).await;
    client.subscription(&topic, "work", settings(Default::default())).await;
    let event = |id: &str| {
        json!({
            "specversion": "1.0",
            "id": id,
            "source": "/orders",
            "type": "made",
            "partitionkey": "k",
            "datacontenttype": "application/json",
            "data": {"number": id},
        })
    };
    let messages = path(&topic, "/messages");
    let one = world.post(&messages, "application/cloudevents+json", &event("1")).await;
    assert_eq!(one.status, 200, "{}", one.body);
    let two = json!([event("2"), event("3")]);
    let two = world.post(&messages, "application/cloudevents-batch+json", &two).await;
    assert_eq!(two.status, 200, "{}", two.body);
    let bad = json!({"specversion": "1.0", "id": "4"});
    let bad = world.post(&messages, "application/cloudevents+json", &bad).await;
    assert_eq!(bad.status, 400, "an event without source and type: {}", bad.body);
    // A consumer of the other kind sees attributes as headers; who asks for events gets them back.
    let mut consumer = client.consume(open(&topic, "work", "a"), 100).await;
    let got = consumer.take(3).await;
    for (got, id) in got.iter().zip(["1", "2", "3"]) {
        assert_eq!(got.key.as_deref(), Some(&b"k"[..]));
        assert_eq!(got.headers["ce_id"], id);
        assert_eq!((&*got.headers["ce_source"], &*got.headers["ce_type"]), ("/orders", "made"));
        let data: Value = serde_json::from_slice(&got.value).expect("its data");
        assert_eq!(data, json!({"number": id}));
    }
    let peek = path(&topic, "/messages?segment=0&offset=0&messages_max=10");
    let events = world.get_as(&peek, "application/cloudevents-batch+json").await;
    assert_eq!(events.status, 200, "{}", events.body);
    let events = events.body["messages"].as_array().expect("a batch of events").clone();
    let ids: Vec<&str> = events.iter().filter_map(|event| event["id"].as_str()).collect();
    assert_eq!(ids, ["1", "2", "3"]);
    assert_eq!(events[2]["data"], json!({"number": "3"}));
}
