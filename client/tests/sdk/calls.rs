//! Single calls: each test is one conversation.

use std::time::Duration;

use geminga_client::{Error, Position, Reason};
use geminga_proto::v1::{
    Delivery, ExplainResponse, Held, OffsetRange, PeekResponse, PullResponse, SeekResponse,
    SegmentExplained, SettleResponse, Settled, read_from, seek_response::Place, settle::Verb,
};

use crate::server::{Answer, Asked, Server, delivery, refusal, soon};

#[tokio::test]
async fn a_pull_gives_messages_that_are_settled_one_by_one() {
    let server = Server::start().await;
    let client = server.client().await;
    let pull = client.pull("t", "s").messages_max(7).wait(Duration::from_secs(90)).send();
    let script = async {
        let (Asked::Pull(asked), answer) = server.call().await else { panic!("a pull") };
        assert_eq!((asked.messages_max, asked.wait_ms), (7, 30_000), "no longer than may be");
        assert!(asked.consumer_name.starts_with("pull-") && asked.segment.is_none());
        let deliveries = vec![
            Delivery { attempt: 2, ..delivery(5, 2, "h") },
            Delivery { deliver: vec![OffsetRange { first: 9, last: 9 }], ..delivery(8, 3, "i") },
        ];
        let _ = answer.send(Ok(Answer::Pull(PullResponse { segment: 3, deliveries })));
    };
    let (pulled, ()) = tokio::join!(soon(pull), script);
    let pulled = pulled.expect("messages");
    let seen: Vec<_> = pulled.iter().map(|one| (one.message.id.to_string(), one.attempt)).collect();
    assert_eq!(seen, [("3:5".into(), 2), ("3:6".into(), 2), ("3:9".into(), 1)]);

    let settled = |token| {
        Answer::Settle(SettleResponse { settled: Some(Settled { token, ..Default::default() }) })
    };
    let script = async {
        for handle in ["h", "i"] {
            let (Asked::Settle(asked), answer) = server.call().await else { panic!("a settle") };
            assert_eq!((asked.segment, asked.subscription.as_str()), (3, "s"));
            match asked.settle.expect("a settle").verb.expect("a verb") {
                Verb::Accept(accept) => assert_eq!((&accept.handle[..], handle), (&b"h"[..], "h")),
                Verb::Release(release) => {
                    assert_eq!((&release.handle[..], handle), (&b"i"[..], "i"));
                    assert_eq!((release.delay_ms, release.counts), (Some(50), true));
                }
                other => panic!("{other:?}"),
            }
            let _ = answer.send(Ok(settled(0)));
        }
        let (Asked::Settle(_), answer) = server.call().await else { panic!("a settle") };
        let _ = answer.send(Err(refusal(Reason::InvalidHandle, None)));
    };
    let settle = async {
        pulled[0].accept().await.expect("durable");
        pulled[2].release(Some(Duration::from_millis(50))).await.expect("durable");
        let lost = pulled[1].extend(Duration::from_secs(1)).await;
        assert!(matches!(lost, Err(Error::NotHeld(_))), "{lost:?}");
        let long = pulled[1].reject(&"x".repeat(257)).await.expect_err("too long");
        assert_eq!(long.reason(), Some(Reason::InvalidRequest));
    };
    tokio::join!(soon(settle), script);
}

#[tokio::test]
async fn a_call_follows_the_owner_and_is_made_again_while_that_may_help() {
    let (server, other) = (Server::start().await, Server::start().await);
    let client = server.client().await;
    let script = async {
        for reason in [Reason::SegmentLoading, Reason::Busy] {
            let (_, answer) = server.call().await;
            let _ = answer.send(Err(refusal(reason, None)));
        }
        let (_, answer) = server.call().await;
        let _ = answer.send(Err(refusal(Reason::NotOwner, Some(&other.address))));
        let (Asked::Seek(asked), answer) = other.call().await else { panic!("a seek") };
        assert_eq!(asked.to.expect("a place").from, Some(read_from::From::TimeMs(9)));
        let segments = vec![Place { segment: 1, mark_delete_next: 40 }];
        let _ = answer.send(Ok(Answer::Seek(SeekResponse { segments })));
        let (_, answer) = server.call().await;
        let _ = answer.send(Err(refusal(Reason::SubscriptionNotFound, None)));
    };
    let calls = async {
        let places = client.seek("t", "s", Some(1), Position::TimeMs(9)).await.expect("it moved");
        assert_eq!((places[0].segment, places[0].mark_delete_next), (1, 40));
        let error = client.seek("t", "s", None, Position::Latest).await.expect_err("refused");
        assert_eq!(error.reason(), Some(Reason::SubscriptionNotFound));
    };
    tokio::join!(soon(calls), script);
}

#[tokio::test]
async fn a_peek_is_decoded_and_what_cannot_be_is_a_typed_error() {
    let server = Server::start().await;
    let client = server.client().await;
    let script = async {
        for good in [true, false] {
            let (Asked::Peek(asked), answer) = server.call().await else { panic!("a peek") };
            assert_eq!((asked.segment, asked.messages_max), (2, 5));
            let mut deliveries =
                vec![Delivery { handle: Default::default(), ..delivery(7, 2, "") }];
            if !good {
                deliveries[0].count = 9;
            }
            let peeked = PeekResponse { deliveries, first_offset: 3, next_offset: 9 };
            let _ = answer.send(Ok(Answer::Peek(peeked)));
        }
    };
    let calls = async {
        let peeked = client.peek("t", 2, Position::Offset(7), 5).await.expect("two");
        let values: Vec<_> = peeked.messages.iter().map(|one| one.value.clone()).collect();
        assert_eq!(values, ["7", "8"]);
        assert_eq!((peeked.first_offset, peeked.next_offset), (3, 9));
        let error = client.peek("t", 2, Position::Earliest, 5).await.expect_err("damaged");
        assert!(matches!(error, Error::Damaged(_)), "{error}");
    };
    tokio::join!(soon(calls), script);
}

#[tokio::test]
async fn an_explanation_is_handed_on_as_it_is() {
    let server = Server::start().await;
    let client = server.client().await;
    let explained = SegmentExplained {
        segment: 1,
        held: vec![Held { by: 3, messages: 12, ..Default::default() }],
        summary: "no credit".into(),
        ..Default::default()
    };
    let script = async {
        let (Asked::Explain(asked), answer) = server.call().await else { panic!("an explain") };
        assert_eq!(asked.topic, "public/default/t");
        let segments = vec![explained.clone()];
        let _ = answer.send(Ok(Answer::Explain(ExplainResponse { segments })));
    };
    let (found, ()) = tokio::join!(soon(client.explain("t", "s", None)), script);
    assert_eq!(found.expect("explained"), std::slice::from_ref(&explained));
    for bad in ["", "a b", ".."] {
        let error = soon(client.explain("t", bad, None)).await.expect_err("no name");
        assert_eq!(error.reason(), Some(Reason::InvalidName), "{bad:?}");
    }
}
