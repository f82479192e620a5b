//! Messages over HTTP: publish one or many, pull, peek. JSON holds a value as text where it is text, else as base64.

use std::collections::BTreeMap;

use axum::{
    Json, Router,
    extract::Request,
    http::{HeaderMap, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures::{StreamExt, stream};
use geminga_proto::{
    admin::v1::admin_server::Admin,
    key_hash::key_hash,
    records::Records,
    v1::{
        Batch, Codec, Delivery, PayloadFormat, PeekRequest, PublishRequest, PublishResponse,
        PullRequest, Record, RecordBatch, RecordIndex, publisher_server::Publisher,
        subscriber_server::Subscriber,
    },
};
use prost::Message;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{
    Gateway,
    answer::Refused,
    events, guard, json,
    resources::{asked_fields, body_fields, query, subscription, topic},
};

/// Messages in one publish call.
const MESSAGES_MAX: usize = 1_000;
/// Batches of one call that are on their way at once.
const CONCURRENT: usize = 16;
/// Headers of a request that become headers of its message.
const HEADER_PREFIX: &str = "geminga-header-";

pub(crate) fn routes<P: Publisher, S: Subscriber, A: Admin>(gateway: &Gateway<P, S, A>) -> Router {
    let (publisher, peeker, puller) = (gateway.clone(), gateway.clone(), gateway.clone());
    let messages = post(async move |request| answer(publish(&publisher, request).await))
        .merge(get(async move |request| answer(peek(&peeker, request).await)));
    let pull = post(async move |request| answer(pull(&puller, request).await));
    Router::new()
        .route("/v1/topics/{tenant}/{namespace}/{topic}/messages", messages)
        .route("/v1/topics/{tenant}/{namespace}/{topic}/subscriptions/{subscription}/pull", pull)
}

fn answer(result: Result<Value, Refused>) -> Response {
    match result {
        Ok(value) => Json(value).into_response(),
        Err(refused) => refused.into_response(),
    }
}

/// A message as it is written in JSON.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    key: Option<String>,
    /// Text as it is; any other JSON value as its JSON text.
    value: Option<Value>,
    value_base64: Option<String>,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    event_time_ms: Option<u64>,
    deliver_at_ms: Option<u64>,
}

/// A message to be published.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Outgoing {
    pub(crate) key: Option<Bytes>,
    pub(crate) value: Bytes,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) event_time_ms: Option<u64>,
    pub(crate) deliver_at_ms: u64,
}

impl Written {
    fn parse(self) -> Result<Outgoing, Refused> {
        let value = match (self.value, self.value_base64) {
            (Some(_), Some(_)) => {
                return Err(Refused::request("a message has a value or a value_base64, not both"));
            }
            (Some(Value::String(text)), None) => text.into(),
            (Some(other), None) => other.to_string().into(),
            (None, Some(text)) => STANDARD
                .decode(text)
                .map_err(|error| Refused::request(format!("value_base64: {error}")))?
                .into(),
            (None, None) => Bytes::new(),
        };
        Ok(Outgoing {
            key: self.key.map(Bytes::from),
            value,
            headers: self.headers,
            event_time_ms: self.event_time_ms,
            deliver_at_ms: self.deliver_at_ms.unwrap_or(0),
        })
    }
}

/// What a publish call's query may say.
#[derive(Debug, Default)]
struct How {
    segment: Option<u32>,
    /// With `sequence`: the message is stored once, however often the call is repeated.
    producer_name: String,
    sequence: Option<u64>,
    key: Option<String>,
    deliver_at_ms: Option<u64>,
}

impl How {
    fn parse(text: &str) -> Result<Self, Refused> {
        let mut how = Self::default();
        for (name, value) in query(text) {
            let number = || {
                let wrong = |_| Refused::request(format!("{name} is not a number: {value:?}"));
                value.parse::<u64>().map_err(wrong)
            };
            match name.as_str() {
                "segment" => {
                    let wrong = |_| Refused::request("segment is out of range");
                    how.segment = Some(u32::try_from(number()?).map_err(wrong)?);
                }
                "producer_name" => how.producer_name = value,
                "sequence" => how.sequence = Some(number()?),
                "key" => how.key = Some(value),
                "deliver_at_ms" => how.deliver_at_ms = Some(number()?),
                _ => {
                    let known = "segment, producer_name, sequence, key, deliver_at_ms";
                    let message = format!("{name:?} is no parameter here; known: {known}");
                    return Err(Refused::request(message));
                }
            }
        }
        if how.producer_name.is_empty() != how.sequence.is_none() {
            let message = "producer_name and sequence go together: they make a repeated call safe";
            return Err(Refused::request(message));
        }
        Ok(how)
    }
}

async fn publish<P: Publisher, S, A>(
    gateway: &Gateway<P, S, A>,
    request: Request,
) -> Result<Value, Refused> {
    let mut taken = guard::take(request, &gateway.bodies, gateway.body_bytes_max).await?;
    let topic = topic(&mut taken.parts).await?;
    let how = How::parse(taken.parts.uri.query().unwrap_or_default())?;
    let mut messages = messages(&taken.parts.headers, taken.body.clone())?;
    for message in &mut messages {
        message.key = message.key.take().or_else(|| how.key.clone().map(Bytes::from));
        message.deliver_at_ms = how.deliver_at_ms.unwrap_or(message.deliver_at_ms);
    }
    if messages.is_empty() || messages.len() > MESSAGES_MAX {
        let message =
            format!("a call publishes 1 to {MESSAGES_MAX} messages, not {}", messages.len());
        return Err(Refused::request(message));
    }
    if how.sequence.is_some() && messages.len() != 1 {
        return Err(Refused::request("a call with a sequence publishes one message"));
    }
    let count = messages.len();
    let parts = &taken.parts;
    let sends = groups(messages).into_iter().map(|(places, batch)| {
        let request = PublishRequest {
            topic: topic.clone(),
            segment: how.segment,
            producer_name: how.producer_name.clone(),
            batch: Some(sequenced(batch, how.sequence)),
        };
        async move {
            let published = gateway.publisher.publish(guard::call(parts, request)).await;
            (places, published.map(tonic::Response::into_inner).map_err(Refused::from))
        }
    });
    let mut stored = vec![Value::Null; count];
    let mut sent = stream::iter(sends).buffered(CONCURRENT);
    let mut refused = None;
    while let Some((places, published)) = sent.next().await {
        match published {
            Ok(published) => {
                for (n, place) in places.into_iter().enumerate() {
                    stored[place] = receipt(&published, n as u64);
                }
            }
            Err(why) => refused = refused.or(Some(why)),
        }
    }
    match refused {
        // Some of it may be stored: whoever wants to know which uses one message a call, with a sequence.
        Some(refused) => Err(refused),
        None => Ok(json!({"messages": stored})),
    }
}

/// The messages of a call, by its content type.
fn messages(headers: &HeaderMap, body: Bytes) -> Result<Vec<Outgoing>, Refused> {
    let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    match kind.as_str() {
        events::STRUCTURED => Ok(vec![events::one(&body)?]),
        events::BATCH => events::many(&body),
        _ if events::is_binary(headers) => Ok(vec![events::binary(headers, body)?]),
        "application/json" => {
            let mut fields = body_fields(&body)?;
            let written = match fields.remove("messages") {
                Some(list) if fields.is_empty() => list,
                Some(_) => return Err(Refused::request("beside messages the body has nothing")),
                None => Value::Array(vec![Value::Object(fields)]),
            };
            let written: Vec<Written> = serde_json::from_value(written)
                .map_err(|error| Refused::request(format!("the messages: {error}")))?;
            written.into_iter().map(Written::parse).collect()
        }
        // Anything else is one message, as it is.
        _ => {
            let mut message = Outgoing { value: body, ..Outgoing::default() };
            for (name, value) in headers {
                if let Some(name) = name.as_str().strip_prefix(HEADER_PREFIX)
                    && let Ok(value) = value.to_str()
                {
                    message.headers.insert(name.to_owned(), value.to_owned());
                }
            }
            // What curl calls a body that nobody named says nothing.
            if !kind.is_empty() && kind != "application/x-www-form-urlencoded" {
                message.headers.insert("content-type".to_owned(), kind);
            }
            Ok(vec![message])
        }
    }
}

/// Messages of one key stay together and in order: one batch each, since keys lie on different segments. Beside each batch
/// the places its messages had in the call.
fn groups(messages: Vec<Outgoing>) -> Vec<(Vec<usize>, Batch)> {
    let mut groups: Vec<(Vec<usize>, Vec<Outgoing>)> = Vec::new();
    let mut of_key: BTreeMap<Option<Bytes>, usize> = BTreeMap::new();
    for (place, message) in messages.into_iter().enumerate() {
        let group = *of_key.entry(message.key.clone()).or_insert_with(|| {
            groups.push((Vec::new(), Vec::new()));
            groups.len() - 1
        });
        groups[group].0.push(place);
        groups[group].1.push(message);
    }
    groups.into_iter().map(|(places, messages)| (places, batch(messages))).collect()
}

fn batch(messages: Vec<Outgoing>) -> Batch {
    let count = messages.len() as u32;
    let keyed = messages.iter().any(|message| message.key.is_some());
    let timed = messages.iter().any(|message| message.deliver_at_ms > 0);
    let hash = |message: &Outgoing| message.key.as_ref().map_or(0, |key| key_hash(key));
    let index = RecordIndex {
        key_hash: messages.iter().map(hash).collect(),
        has_key: if keyed { vec![true; messages.len()] } else { Vec::new() },
        deliver_at_ms: if timed {
            messages.iter().map(|message| message.deliver_at_ms).collect()
        } else {
            Vec::new()
        },
    };
    let records = messages.into_iter().map(|message| Record {
        key: message.key,
        value: message.value,
        headers: message.headers.into_iter().collect(),
        event_time_ms: message.event_time_ms,
    });
    let payload: Bytes = RecordBatch { records: records.collect() }.encode_to_vec().into();
    Batch {
        format: PayloadFormat::Native.into(),
        codec: Codec::Unspecified.into(),
        uncompressed_size: u32::try_from(payload.len()).unwrap_or(u32::MAX),
        index: Some(index),
        count,
        lo_sequence: 1,
        hi_sequence: u64::from(count),
        payload,
        ..Batch::default()
    }
}

fn sequenced(batch: Batch, sequence: Option<u64>) -> Batch {
    match sequence {
        None => batch,
        Some(n) => {
            Batch { prev_sequence: n.saturating_sub(1), lo_sequence: n, hi_sequence: n, ..batch }
        }
    }
}

/// Where the `n`th message of a batch is now.
fn receipt(published: &PublishResponse, n: u64) -> Value {
    let receipt = published.receipt.unwrap_or_default();
    let offset = (receipt.base_offset != u64::MAX).then(|| receipt.base_offset + n);
    json!({
        "segment": published.segment,
        "offset": offset,
        "duplicate": receipt.duplicate,
        "level": receipt.level().as_str_name(),
    })
}

async fn pull<P, S: Subscriber, A>(
    gateway: &Gateway<P, S, A>,
    request: Request,
) -> Result<Value, Refused> {
    let mut taken = guard::take(request, &gateway.bodies, gateway.body_bytes_max).await?;
    let (topic, subscription) = subscription(&mut taken.parts).await?;
    let of = json::descriptor("geminga.v1.PullRequest");
    let fields = asked_fields(&taken, &of)?;
    let message = PullRequest { topic, subscription, ..json::read(of, fields)? };
    let pulled = gateway.subscriber.pull(guard::call(&taken.parts, message)).await?.into_inner();
    let events = events::wanted(&taken.parts.headers);
    shown(pulled.segment, &pulled.deliveries, events)
        .map(|messages| json!({"segment": pulled.segment, "messages": messages}))
}

async fn peek<P, S: Subscriber, A>(
    gateway: &Gateway<P, S, A>,
    request: Request,
) -> Result<Value, Refused> {
    let mut taken = guard::take(request, &gateway.bodies, gateway.body_bytes_max).await?;
    let topic = topic(&mut taken.parts).await?;
    // The nested field is written flat in a query: offset=, time_ms= or at=.
    let mut fields = Map::new();
    let of = json::descriptor("geminga.v1.PeekRequest");
    let place = json::descriptor("geminga.v1.ReadFrom");
    let mut from = Map::new();
    for (name, text) in query(taken.parts.uri.query().unwrap_or_default()) {
        if place.get_field_by_name(&name).is_some() {
            json::put(&mut from, &place, &name, &text)?;
        } else {
            json::put(&mut fields, &of, &name, &text)?;
        }
    }
    if !from.is_empty() {
        fields.insert("from".to_owned(), from.into());
    }
    let message = PeekRequest { topic, ..json::read(of, fields)? };
    let segment = message.segment;
    let peeked = gateway.subscriber.peek(guard::call(&taken.parts, message)).await?.into_inner();
    let messages = shown(segment, &peeked.deliveries, events::wanted(&taken.parts.headers))?;
    Ok(json!({
        "segment": segment,
        "first_offset": peeked.first_offset,
        "next_offset": peeked.next_offset,
        "messages": messages,
    }))
}

/// The delivered messages, one by one.
fn shown(segment: u32, deliveries: &[Delivery], as_events: bool) -> Result<Vec<Value>, Refused> {
    let mut all = Vec::new();
    for delivery in deliveries {
        let damaged = |error: &dyn std::fmt::Display| {
            let place = format!("segment {segment}, offset {}", delivery.base_offset);
            Refused::new(
                geminga_proto::reason::Reason::ReadDamaged,
                format!("{place}: the batch cannot be decoded: {error}"),
            )
        };
        let codec = Codec::try_from(delivery.codec).map_err(|error| damaged(&error))?;
        let payload = delivery.payload.clone();
        let opened = Records::open(codec, delivery.uncompressed_size, delivery.count, payload);
        let mut records = opened.map_err(|error| damaged(&error))?;
        let mut offset = delivery.base_offset;
        while let Some(record) = records.read().map_err(|error| damaged(&error))? {
            if delivery.deliver.iter().any(|range| range.first <= offset && offset <= range.last) {
                let message =
                    if as_events { events::show(record) } else { show(delivery, offset, record) };
                all.push(message);
            }
            offset += 1;
        }
    }
    Ok(all)
}

fn show(delivery: &Delivery, offset: u64, record: Record) -> Value {
    let mut message = json!({
        "offset": offset,
        "headers": record.headers,
        "event_time_ms": record.event_time_ms,
        "publish_time_ms": delivery.publish_time_ms,
        "producer_name": delivery.producer_name,
    });
    if !delivery.handle.is_empty() {
        message["attempt"] = delivery.attempt.into();
        message["handle"] = STANDARD.encode(&delivery.handle).into();
        message["lease_ms"] = delivery.lease_ms.into();
    }
    if let Some(key) = &record.key {
        put_bytes(&mut message, "key", key);
    }
    put_bytes(&mut message, "value", &record.value);
    message
}

/// As text where it is text.
fn put_bytes(message: &mut Value, name: &str, bytes: &Bytes) {
    match std::str::from_utf8(bytes) {
        Ok(text) => message[name] = text.into(),
        Err(_) => message[format!("{name}_base64")] = STANDARD.encode(bytes).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(kind: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, kind.parse().expect("a header"));
        headers
    }

    fn json_messages(body: &str) -> Result<Vec<Outgoing>, Refused> {
        messages(&headers("application/json"), body.to_owned().into())
    }

    #[test]
    fn a_json_body_is_one_message_or_many() {
        let one = json_messages(r#"{"key":"k","value":"v","headers":{"a":"b"}}"#).expect("one");
        assert_eq!(
            (one.len(), &one[0].value[..], one[0].key.as_deref()),
            (1, &b"v"[..], Some(&b"k"[..]))
        );
        let many = json_messages(
            r#"{"messages":[{"value":"a"},{"value":{"n":1}},{"value_base64":"AP8="}]}"#,
        );
        let values: Vec<Bytes> =
            many.expect("many").into_iter().map(|message| message.value).collect();
        assert_eq!(values, [&b"a"[..], br#"{"n":1}"#, b"\x00\xff"]);
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let wrong = [
            r#"{"valu":"x"}"#,
            r#"{"value":"x","value_base64":"AA=="}"#,
            r#"{"value_base64":"*"}"#,
            r#"{"messages":{}}"#,
            r#"{"messages":[1]}"#,
            r#"{"messages":[],"key":"k"}"#,
            r#"{"headers":{"a":1}}"#,
            r#"{"deliver_at_ms":-1}"#,
            "[]",
            "",
        ];
        for body in &wrong[..wrong.len() - 1] {
            assert!(json_messages(body).is_err(), "{body}");
        }
        assert_eq!(json_messages("").expect("an empty message").len(), 1);
    }

    #[test]
    fn any_other_body_is_a_message_as_it_is() {
        let mut sent = headers("image/png");
        sent.insert("geminga-header-trace", "7".parse().expect("a header"));
        sent.insert("cookie", "secret".parse().expect("a header"));
        let [message] = &messages(&sent, Bytes::from_static(b"\x89PNG")).expect("one")[..] else {
            panic!()
        };
        assert_eq!(&message.value[..], b"\x89PNG");
        let expected = [("content-type", "image/png"), ("trace", "7")];
        let got: Vec<_> = message.headers.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(got, expected);
    }

    #[test]
    fn messages_of_a_key_stay_in_order_and_together() {
        let message = |key: &'static str, value: &'static str| Outgoing {
            key: (!key.is_empty()).then(|| Bytes::from_static(key.as_bytes())),
            value: value.into(),
            ..Outgoing::default()
        };
        let sent = vec![message("a", "1"), message("b", "2"), message("a", "3"), message("", "4")];
        let groups = groups(sent);
        let places: Vec<_> = groups.iter().map(|(places, _)| places.clone()).collect();
        assert_eq!(places, [vec![0, 2], vec![1], vec![3]]);
        let (_, a) = &groups[0];
        assert_eq!((a.count, a.lo_sequence, a.hi_sequence), (2, 1, 2));
        let index = a.index.as_ref().expect("an index");
        assert_eq!(
            (&index.key_hash[..], &index.has_key[..]),
            (&[key_hash(b"a"); 2][..], &[true; 2][..])
        );
        assert!(groups[2].1.index.as_ref().expect("an index").has_key.is_empty());
    }

    #[test]
    fn a_sequence_needs_a_name_and_a_name_a_sequence() {
        assert!(How::parse("producer_name=p&sequence=4").is_ok());
        for wrong in [
            "producer_name=p",
            "sequence=4",
            "segment=-1",
            "segment=5000000000",
            "x=1",
            "sequence=a&producer_name=p",
        ] {
            assert!(How::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_pulled_shows_only_what_was_delivered() {
        let plain: Bytes = RecordBatch {
            records: ["a", "b", "c"]
                .map(|value| Record { value: value.into(), ..Record::default() })
                .into(),
        }
        .encode_to_vec()
        .into();
        let delivery = Delivery {
            base_offset: 10,
            count: 3,
            uncompressed_size: plain.len() as u32,
            payload: plain,
            deliver: vec![geminga_proto::v1::OffsetRange { first: 11, last: 12 }],
            attempt: 2,
            handle: Bytes::from_static(b"h"),
            ..Delivery::default()
        };
        let shown_now = shown(0, std::slice::from_ref(&delivery), false).expect("decoded");
        let offsets: Vec<_> =
            shown_now.iter().map(|m| (m["offset"].clone(), m["value"].clone())).collect();
        assert_eq!(offsets, [(json!(11), json!("b")), (json!(12), json!("c"))]);
        assert_eq!(shown_now[0]["attempt"], 2);
        let damaged = Delivery { count: 4, ..delivery };
        assert!(shown(0, &[damaged], false).is_err());
    }
}
