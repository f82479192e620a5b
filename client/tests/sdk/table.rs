//! The table view, over a scripted reader.

use std::time::Duration;

use geminga_client::{Client, Error, Reason, Table, Update};
use geminga_proto::v1::{Delivery, OffsetRange, PeekResponse, Record, RecordBatch};
use prost::Message as _;

use crate::server::{Answer, Asked, ConsumeCall, Server, jump, soon};

/// A batch of (key, value) from this offset on.
fn keyed(base_offset: u64, records: &[(&str, &str)]) -> Delivery {
    let record = |(key, value): &(&str, &str)| Record {
        key: Some(key.to_string().into()),
        value: value.to_string().into(),
        ..Record::default()
    };
    let batch = RecordBatch { records: records.iter().map(record).collect() };
    let payload = batch.encode_to_vec();
    let last = base_offset + records.len() as u64 - 1;
    Delivery {
        base_offset,
        count: records.len() as u32,
        format: 1,
        uncompressed_size: payload.len() as u32,
        deliver: vec![OffsetRange { first: base_offset, last }],
        payload: payload.into(),
        ..Delivery::default()
    }
}

/// What the server does until the table knows where its topic ends.
async fn opened(server: &Server, next_offset: u64) -> ConsumeCall {
    let call = server.consume_from(0).await;
    let (Asked::Peek(asked), answer) = server.call().await else { panic!("a peek") };
    assert_eq!(asked.segment, 0);
    let _ = answer.send(Ok(Answer::Peek(PeekResponse { next_offset, ..Default::default() })));
    call
}

fn value(table: &Table, key: &str) -> Option<String> {
    table.get(key.as_bytes()).map(|stored| String::from_utf8_lossy(&stored.value).into_owned())
}

async fn building(client: &Client) -> Result<Table, Error> {
    soon(client.table("t").keys_max(3).build()).await
}

#[tokio::test]
async fn a_table_is_there_when_everything_published_before_is_in_it_and_follows_from_there() {
    let server = Server::start().await;
    let client = server.client().await;
    let script = async {
        let call = opened(&server, 4).await;
        call.deliver(keyed(0, &[("a", "1"), ("b", "1"), ("a", "2")])).await;
        call.deliver(keyed(3, &[("b", "")])).await;
        call
    };
    let (table, call) = tokio::join!(building(&client), script);
    let mut table = table.expect("everything came");
    assert_eq!((value(&table, "a"), value(&table, "b")), (Some("2".into()), None));
    assert_eq!(table.len(), 1);
    call.deliver(keyed(4, &[("c", "1"), ("b", ""), ("d", "1"), ("e", "1")])).await;
    assert!(matches!(soon(table.next_update()).await, Ok(Update::Put(put)) if put.value == "1"));
    assert!(matches!(soon(table.next_update()).await, Ok(Update::Put(_))), "b was gone already");
    let error = soon(table.next_update()).await.expect_err("a fourth key");
    assert_eq!(error.reason(), Some(Reason::InvalidRequest));
    assert_eq!(table.iter().count(), 3);
}

#[tokio::test]
async fn an_empty_topic_is_an_empty_table_and_one_that_stops_half_way_is_an_error() {
    let server = Server::start().await;
    let client = server.client().await;
    let (table, _call) = tokio::join!(building(&client), opened(&server, 0));
    assert!(table.expect("nothing to read").is_empty());
    let script = async {
        let call = opened(&server, 2).await;
        call.deliver(keyed(0, &[("a", "1")])).await;
        for _ in 0..7 {
            jump(Duration::from_secs(10)).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        call
    };
    let (table, _call) = tokio::join!(client.table("t").build(), script); // the jumps are over its limit
    assert!(matches!(table, Err(Error::Unavailable(_))));
}
