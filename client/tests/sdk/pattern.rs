//! Pattern subscriptions over a scripted watch of a namespace.

use std::time::Duration;

use futures::StreamExt;
use geminga_client::{Client, Error, PatternConsumer, Reason};
use geminga_proto::v1::{TopicRef, WatchTopicsReply};

use crate::server::{Server, TopicsCall, delivery, jump, refusal, soon};

fn topics(topics: &[(&str, u64)]) -> Vec<TopicRef> {
    let topic =
        |(name, id): &(&str, u64)| TopicRef { name: format!("public/default/{name}"), id: *id };
    topics.iter().map(topic).collect()
}

async fn tell(call: &TopicsCall, come: &[(&str, u64)], gone: &[(&str, u64)]) {
    let (come, gone) = (topics(come), topics(gone));
    call.reply(WatchTopicsReply { come, gone, synced: true }).await;
}

async fn building(client: &Client) -> Result<PatternConsumer, Error> {
    soon(client.pattern("default", "eu-.*", "work").build()).await
}

async fn next(consumer: &mut PatternConsumer) -> (String, u64) {
    let (topic, received) = soon(consumer.next()).await.expect("it does not end");
    (topic.topic().to_owned(), received.expect("a message").id.offset)
}

#[tokio::test]
async fn topics_are_consumed_as_they_come_and_left_as_they_go() {
    let server = Server::start().await;
    let client = server.client().await;
    let script = async {
        let watch = server.topics().await;
        assert_eq!(watch.request.namespace, "public/default");
        assert_eq!(watch.request.prefix, "eu-", "the server is asked for no more than that");
        tell(&watch, &[("eu-a", 1), ("us-a", 2)], &[]).await;
        (watch, server.consume_from(0).await)
    };
    let (consumer, (watch, a)) = tokio::join!(building(&client), script);
    let mut consumer = consumer.expect("built");
    assert_eq!(
        (a.open.topic.as_str(), a.open.subscription.as_str()),
        ("public/default/eu-a", "work")
    );
    assert_eq!(a.open.create_at, Some(1), "from its first message");
    a.deliver(delivery(0, 1, "h")).await;
    assert_eq!(next(&mut consumer).await, ("eu-a".to_owned(), 0));

    tell(&watch, &[("eu-b", 3)], &[]).await;
    let b = server.consume_from(0).await;
    b.deliver(delivery(7, 1, "h")).await;
    assert_eq!(next(&mut consumer).await, ("eu-b".to_owned(), 7));

    tell(&watch, &[], &[("eu-a", 1)]).await;
    b.deliver(delivery(8, 1, "h")).await;
    let mut seen = next(&mut consumer).await;
    while consumer.topics().count() > 1 {
        b.deliver(delivery(9, 1, "h")).await;
        seen = next(&mut consumer).await;
    }
    assert_eq!(seen.0, "eu-b");
    assert_eq!(consumer.topics().next().expect("one").topic(), "eu-b");
}

#[tokio::test]
async fn after_a_break_only_what_differs_is_opened_and_a_name_made_again_is_opened_anew() {
    let server = Server::start().await;
    let client = server.client().await;
    let script = async {
        let watch = server.topics().await;
        tell(&watch, &[("eu-a", 1), ("eu-b", 2)], &[]).await;
        (watch, [server.consume_from(0).await, server.consume_from(0).await])
    };
    let (consumer, (watch, first)) = tokio::join!(building(&client), script);
    let mut consumer = consumer.expect("built");
    drop(watch);
    let watch = server.topics().await;
    // Half of a list is no list.
    let (come, gone) = (topics(&[("eu-b", 5)]), Vec::new());
    watch.reply(WatchTopicsReply { come, gone, synced: false }).await;
    tell(&watch, &[("eu-a", 1)], &[]).await;
    let again = server.consume_from(0).await;
    assert_eq!(again.open.topic, "public/default/eu-b", "eu-a is as it was");
    assert_eq!(
        again.open.consumer_name, first[1].open.consumer_name,
        "it takes the place of the one that may hold on to the name"
    );
    again.deliver(delivery(3, 1, "h")).await;
    assert_eq!(next(&mut consumer).await, ("eu-b".to_owned(), 3));
    let a = first.iter().find(|call| call.open.topic.ends_with("eu-a")).expect("of the two");
    a.deliver(delivery(4, 1, "h")).await;
    assert_eq!(next(&mut consumer).await, ("eu-a".to_owned(), 4));
}

#[tokio::test]
async fn a_topic_that_cannot_be_opened_is_told_once_and_tried_again() {
    let server = Server::start().await;
    let client = server.client().await;
    let script = async {
        let watch = server.topics().await;
        tell(&watch, &[], &[]).await;
        watch
    };
    let (consumer, watch) = tokio::join!(building(&client), script);
    let mut consumer = consumer.expect("a namespace without topics is no error");
    tell(&watch, &[("eu-a", 1)], &[]).await;
    server.consume().await.end(refusal(Reason::PermissionDenied, None)).await;
    let (topic, refused) = soon(consumer.next()).await.expect("it does not end");
    assert_eq!(topic.topic(), "eu-a");
    assert_eq!(refused.expect_err("refused").reason(), Some(Reason::PermissionDenied));
    for _ in 0..2 {
        jump(Duration::from_secs(11)).await;
        server.consume().await.end(refusal(Reason::PermissionDenied, None)).await;
    }
    jump(Duration::from_secs(11)).await;
    let call = server.consume_from(0).await;
    call.deliver(delivery(0, 1, "h")).await;
    assert_eq!(next(&mut consumer).await, ("eu-a".to_owned(), 0), "told once");
}

#[tokio::test]
async fn a_namespace_that_is_refused_is_an_error_of_the_builder() {
    let server = Server::start().await;
    let client = server.client().await;
    let script = async {
        server.topics().await.end(refusal(Reason::SegmentLoading, None)).await;
        server.topics().await.end(refusal(Reason::NamespaceNotFound, None)).await;
    };
    let (refused, ()) = tokio::join!(building(&client), script);
    assert_eq!(refused.expect_err("refused").reason(), Some(Reason::NamespaceNotFound));
}

#[tokio::test]
async fn the_end_of_a_topic_that_was_deleted_is_no_error() {
    let server = Server::start().await;
    let client = server.client().await;
    let script = async {
        let watch = server.topics().await;
        tell(&watch, &[("eu-a", 1), ("eu-b", 2)], &[]).await;
        let (one, other) = (server.consume_from(0).await, server.consume_from(0).await);
        let (a, b) = if one.open.topic.ends_with("eu-a") { (one, other) } else { (other, one) };
        a.end(refusal(Reason::TopicNotFound, None)).await;
        b.deliver(delivery(0, 1, "h")).await;
        (watch, b)
    };
    let (consumer, (_watch, b)) = tokio::join!(building(&client), script);
    let mut consumer = consumer.expect("built");
    assert_eq!(next(&mut consumer).await, ("eu-b".to_owned(), 0));
    let mut offset = 1;
    while consumer.topics().count() > 1 {
        b.deliver(delivery(offset, 1, "h")).await;
        assert_eq!(next(&mut consumer).await, ("eu-b".to_owned(), offset));
        offset += 1;
    }
}
