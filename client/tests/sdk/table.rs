//! The table view, over a scripted reader.

use std::time::Duration;

use geminga_client::{Client, Error, Reason, Table, Update};
use geminga_proto::v1::{
    ConsumeOpened, Delivery, OffsetRange, PeekResponse, Ping, ReaderAt, Record, RecordBatch,
    consume_frame::Frame, consume_reply::Reply,
};
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

/// A compacted segment whose log is empty and whose view has not its last messages, as the table meets it.
async fn compacted(server: &Server, compacted_to: u64, trimmed: bool) -> ConsumeCall {
    let call = server.consume().await;
    assert!(call.open.compacted, "the shorter way");
    call.opened_as(ConsumeOpened { compacted_to, ..ConsumeOpened::default() }).await;
    let (Asked::Peek(_), answer) = server.call().await else { panic!("a peek") };
    let ends = PeekResponse {
        first_offset: if trimmed { 9 } else { 0 },
        next_offset: 9,
        ..PeekResponse::default()
    };
    let _ = answer.send(Ok(Answer::Peek(ends)));
    call
}

/// Answers the next ping.
async fn pong(call: &mut ConsumeCall, next_offset: Option<u64>) {
    while !matches!(soon(call.next()).await.expect("it goes on"), Frame::Ping(_)) {}
    if let Some(next_offset) = next_offset {
        call.reply(Reply::ReaderAt(ReaderAt { next_offset })).await;
    }
    call.reply(Reply::Pong(Ping { token: 0 })).await;
}

#[tokio::test]
async fn a_table_of_a_compacted_topic_is_there_when_the_server_has_read_to_its_end() {
    let server = Server::start().await;
    let client = server.client().await;
    let script = async {
        let mut call = compacted(&server, 9, true).await;
        let mut sparse = keyed(2, &[("a", "1"), ("", ""), ("b", "1")]);
        sparse.deliver = vec![OffsetRange { first: 2, last: 2 }, OffsetRange { first: 4, last: 4 }];
        pong(&mut call, Some(0)).await;
        call.deliver(sparse).await;
        pong(&mut call, Some(5)).await;
        pong(&mut call, Some(9)).await;
        call
    };
    let (table, call) = tokio::join!(building(&client), script);
    let mut table = table.expect("everything came, though offset 8 did not");
    assert_eq!((value(&table, "a"), value(&table, "b")), (Some("1".into()), Some("1".into())));
    assert_eq!(table.len(), 2, "what was left out is no key");
    call.deliver(keyed(9, &[("a", "")])).await;
    assert!(matches!(soon(table.next_update()).await, Ok(Update::Removed(key)) if key == "a"));
}

#[tokio::test]
async fn a_server_that_says_nothing_of_its_place_is_read_as_a_whole_where_something_is_compacted() {
    let server = Server::start().await;
    let client = server.client().await;
    let script = async {
        let mut call = compacted(&server, 9, false).await;
        call.deliver(keyed(2, &[("a", "2")])).await;
        pong(&mut call, None).await;
        let whole = opened(&server, 3).await;
        assert!(!whole.open.compacted);
        whole.deliver(keyed(0, &[("a", "1"), ("a", "2"), ("b", "")])).await;
        (call, whole)
    };
    let (table, _calls) = tokio::join!(building(&client), script);
    let table = table.expect("everything came");
    assert_eq!((value(&table, "a"), table.len()), (Some("2".into()), 1));
}

#[tokio::test]
async fn a_table_whose_log_was_trimmed_and_never_compacted_is_empty() {
    let server = Server::start().await;
    let client = server.client().await;
    let script = async {
        let mut call = compacted(&server, 0, true).await;
        pong(&mut call, None).await;
        call
    };
    let (table, _call) = tokio::join!(building(&client), script);
    assert!(table.expect("nothing is there").is_empty());
}
