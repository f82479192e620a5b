//! REST/JSON and CloudEvents, over plain HTTP/1.1 on the port of gRPC.

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::harness::{Cluster, Settings};

const MESSAGES: &str = "/v1/topics/public/default/orders/messages";
const SUB: &str = "/v1/topics/public/default/orders/subscriptions/work";

/// One request as curl would send it: status, headers as they came, body.
async fn call(
    cluster: &Cluster,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> (u16, String, Value) {
    let address = cluster.broker().address();
    let mut request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {}\r\n",
        body.len()
    );
    for (name, value) in headers {
        request += &format!("{name}: {value}\r\n");
    }
    let mut stream = TcpStream::connect(address).await.expect("it listens");
    stream.write_all(format!("{request}\r\n").as_bytes()).await.expect("sent");
    stream.write_all(body).await.expect("sent");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("answered");
    let answer = String::from_utf8(answer).expect("text");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    (status, head.to_ascii_lowercase(), serde_json::from_str(body).unwrap_or(Value::Null))
}

async fn get(cluster: &Cluster, path: &str) -> (u16, Value) {
    let (status, _, body) = call(cluster, "GET", path, &[], b"").await;
    (status, body)
}

async fn post(cluster: &Cluster, path: &str, body: Value) -> (u16, Value) {
    let headers = [("content-type", "application/json")];
    let (status, _, body) =
        call(cluster, "POST", path, &headers, body.to_string().as_bytes()).await;
    (status, body)
}

async fn shared_subscription(cluster: &Cluster) {
    let topic = json!({"name": "public/default/orders", "segments": 2});
    assert_eq!(post(cluster, "/v1/topics", topic).await.0, 200);
    let settings = json!({"type": "SUBSCRIPTION_TYPE_SHARED"});
    let create =
        json!({"name": "work", "start": "SUBSCRIPTION_START_EARLIEST", "settings": settings});
    let path = "/v1/topics/public/default/orders/subscriptions";
    let (status, body) = post(cluster, path, create).await;
    assert_eq!(status, 200, "{body}");
}

#[tokio::test]
async fn a_topic_lives_by_curl_alone() {
    let cluster = Cluster::start().await;
    shared_subscription(&cluster).await;
    let (status, topic) = get(&cluster, "/v1/topics/public/default/orders").await;
    assert_eq!((status, topic["segments"].as_array().map(Vec::len)), (200, Some(2)), "{topic}");
    let two = json!({"messages": [
        {"key": "a", "value": "first", "headers": {"n": "1"}},
        {"key": "a", "value": {"n": 2}},
    ]});
    let (status, stored) = post(&cluster, MESSAGES, two).await;
    assert_eq!(status, 200, "{stored}");
    let segment = stored["messages"][0]["segment"].clone();
    assert_eq!(
        stored["messages"][1],
        json!({
            "segment": segment, "offset": 1, "duplicate": false, "level": "DURABILITY_LEVEL_QUORUM"
        })
    );
    let pull =
        json!({"consumer_name": "curl", "messages_max": 10, "wait_ms": 5_000, "segment": segment});
    let (status, pulled) = post(&cluster, &format!("{SUB}/pull"), pull).await;
    assert_eq!(status, 200, "{pulled}");
    let messages = pulled["messages"].as_array().expect("a list");
    let values: Vec<&str> = messages.iter().filter_map(|m| m["value"].as_str()).collect();
    assert_eq!(values, ["first", r#"{"n":2}"#]);
    assert_eq!((&messages[0]["headers"]["n"], &messages[0]["attempt"]), (&json!("1"), &json!(1)));
    let accept = json!({"ranges": [{"first": 0, "last": 1}], "handle": messages[0]["handle"]});
    let settle = json!({"segment": segment, "settle": {"accept": accept}});
    let (status, settled) = post(&cluster, &format!("{SUB}/settle"), settle).await;
    assert_eq!((status, &settled["settled"]["mark_delete_next"]), (200, &json!(2)), "{settled}");
    let (status, deleted, _) = call(&cluster, "DELETE", SUB, &[], b"").await;
    assert_eq!(status, 200, "{deleted}");
}

#[tokio::test]
async fn a_repeated_call_with_a_sequence_stores_once() {
    let cluster = Cluster::start().await;
    shared_subscription(&cluster).await;
    let path = format!("{MESSAGES}?producer_name=cron&sequence=1&key=k");
    for duplicate in [false, true] {
        let (status, _, stored) =
            call(&cluster, "POST", &path, &[("content-type", "text/plain")], b"once").await;
        assert_eq!(
            (status, &stored["messages"][0]["duplicate"]),
            (200, &json!(duplicate)),
            "{stored}"
        );
    }
}

#[tokio::test]
async fn cloud_events_come_back_as_they_were_sent() {
    let cluster = Cluster::start().await;
    shared_subscription(&cluster).await;
    let event = json!({
        "specversion": "1.0", "id": "7", "source": "/shop", "type": "order.made",
        "partitionkey": "k", "datacontenttype": "application/json", "data": {"n": 1},
    });
    let batch = [("content-type", "application/cloudevents-batch+json")];
    let body = json!([event]).to_string();
    let (status, _, stored) = call(&cluster, "POST", MESSAGES, &batch, body.as_bytes()).await;
    assert_eq!(status, 200, "{stored}");
    let segment = stored["messages"][0]["segment"].as_u64().expect("a number");
    let as_events = [("accept", "application/cloudevents-batch+json")];
    let peek =
        format!("{MESSAGES}?segment={segment}&at=SUBSCRIPTION_START_EARLIEST&messages_max=10");
    let (status, _, peeked) = call(&cluster, "GET", &peek, &as_events, b"").await;
    assert_eq!((status, &peeked["messages"][0]), (200, &event), "{peeked}");
}

#[tokio::test]
async fn bad_requests_say_what_to_do_next() {
    let cluster = Cluster::start_as(|settings: &mut Settings| {
        settings.broker.limits.http_bodies_bytes_max = 64 << 20;
    })
    .await;
    shared_subscription(&cluster).await;
    let error = async |method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]| {
        let (status, _, answer) = call(&cluster, method, path, headers, body).await;
        (status, answer["error"]["reason"].as_str().unwrap_or_default().to_owned())
    };
    let json_body = [("content-type", "application/json")];
    let foreign = [("origin", "https://example.org")];
    let large = vec![b'x'; 8 << 20];
    for (method, path, headers, body, status, reason) in [
        ("GET", "/v1/topics/public/default/none", &[][..], &b""[..], 404, "TOPIC_NOT_FOUND"),
        ("GET", "/v1/topics/public/default/no%20name", &[], b"", 400, "INVALID_NAME"),
        ("GET", "/v1/topics/public/default/a%2Fb", &[], b"", 400, "INVALID_REQUEST"),
        ("POST", "/v1/topics", &json_body, b"{", 400, "INVALID_REQUEST"),
        ("POST", "/v1/topics", &json_body, b"{\"nam\":1}", 400, "INVALID_REQUEST"),
        ("POST", MESSAGES, &json_body, b"{\"messages\":[]}", 400, "INVALID_REQUEST"),
        (
            "POST",
            MESSAGES,
            &[("content-type", "application/cloudevents+json")],
            b"{}",
            400,
            "INVALID_REQUEST",
        ),
        ("POST", MESSAGES, &foreign, b"x", 403, "PERMISSION_DENIED"),
        ("POST", MESSAGES, &[], &large[..(5 << 20) + 1], 400, "MESSAGE_TOO_LARGE"),
        ("GET", "/v1/nothing", &[], b"", 404, "INVALID_REQUEST"),
        ("PUT", "/v1/topics", &[], b"", 405, "INVALID_REQUEST"),
        ("GET", "/v1/ledgers?size=1", &[], b"", 400, "INVALID_REQUEST"),
    ] {
        assert_eq!(
            error(method, path, headers, body).await,
            (status, reason.to_owned()),
            "{method} {path}"
        );
    }
}

#[tokio::test]
async fn the_documentation_lists_every_path() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/rest.md");
    let page = std::fs::read_to_string(path).expect("docs/rest.md is there");
    let (begin, end) = ("<!-- paths: made from the code -->\n", "<!-- end of paths -->");
    let (head, rest) = page.split_once(begin).expect("the marked section");
    let (_, tail) = rest.split_once(end).expect("its end");
    let wanted = format!("{head}{begin}{}{end}{tail}", geminga_gateway::markdown());
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, &wanted).expect("written");
    } else {
        assert!(
            page == wanted,
            "run: UPDATE_DOCS=1 cargo test --workspace --test grpc documentation"
        );
    }
}
