//! CloudEvents 1.0 over HTTP: structured, batched and binary content, mapped to messages as the Kafka binding maps them:
//! attributes are headers `ce_NAME`, `partitionkey` is the key, the data is the value.

use axum::http::{
    HeaderMap,
    header::{ACCEPT, CONTENT_TYPE},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use geminga_proto::v1::Record;
use serde_json::{Map, Value, json};

use crate::{answer::Refused, messages::Outgoing};

/// One event as a JSON object.
pub(crate) const STRUCTURED: &str = "application/cloudevents+json";
/// Many as a JSON array.
pub(crate) const BATCH: &str = "application/cloudevents-batch+json";

const ATTRIBUTE: &str = "ce_";
const ON_THE_WIRE: &str = "ce-";
const CONTENT: &str = "content-type";
const REQUIRED: [&str; 4] = ["specversion", "id", "source", "type"];

/// Whether the headers hold an event's attributes.
pub(crate) fn is_binary(headers: &HeaderMap) -> bool {
    headers.contains_key("ce-specversion")
}

/// Whether events are wanted back.
pub(crate) fn wanted(headers: &HeaderMap) -> bool {
    let accept = headers.get(ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    accept.contains("application/cloudevents")
}

/// An event whose attributes are headers and whose data is the body.
pub(crate) fn binary(headers: &HeaderMap, body: Bytes) -> Result<Outgoing, Refused> {
    let mut message = Outgoing { value: body, ..Outgoing::default() };
    for (name, value) in headers {
        let Some(name) = name.as_str().strip_prefix(ON_THE_WIRE) else { continue };
        let value = value
            .to_str()
            .map_err(|_| Refused::request(format!("ce-{name} is not printable ASCII")))?;
        attribute(&mut message, name, value.to_owned())?;
    }
    if let Some(kind) = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()) {
        message.headers.insert(CONTENT.to_owned(), kind.to_owned());
    }
    complete(message)
}

/// An event as JSON.
pub(crate) fn one(body: &[u8]) -> Result<Outgoing, Refused> {
    let event: Map<String, Value> = serde_json::from_slice(body)
        .map_err(|error| Refused::request(format!("the event is no JSON object: {error}")))?;
    structured(event)
}

/// Events as a JSON array.
pub(crate) fn many(body: &[u8]) -> Result<Vec<Outgoing>, Refused> {
    let events: Vec<Map<String, Value>> = serde_json::from_slice(body)
        .map_err(|error| Refused::request(format!("the events are no JSON array: {error}")))?;
    events.into_iter().map(structured).collect()
}

fn structured(event: Map<String, Value>) -> Result<Outgoing, Refused> {
    let mut message = Outgoing::default();
    for (name, value) in event {
        match (name.as_str(), value) {
            ("data", Value::String(text)) => message.value = text.into(),
            ("data", other) => {
                message.value = other.to_string().into();
                let kind = message.headers.entry(CONTENT.to_owned());
                kind.or_insert_with(|| "application/json".to_owned());
            }
            ("data_base64", Value::String(text)) => {
                let wrong = |error| Refused::request(format!("data_base64: {error}"));
                message.value = STANDARD.decode(text).map_err(wrong)?.into();
            }
            ("datacontenttype", Value::String(kind)) => {
                message.headers.insert(CONTENT.to_owned(), kind);
            }
            (_, Value::Null) => {}
            (name, Value::String(text)) => attribute(&mut message, name, text)?,
            (name, value @ (Value::Bool(_) | Value::Number(_))) => {
                attribute(&mut message, name, value.to_string())?;
            }
            (name, _) => {
                let message = format!("the attribute {name:?} is no text, number or flag");
                return Err(Refused::request(message));
            }
        }
    }
    complete(message)
}

fn attribute(message: &mut Outgoing, name: &str, value: String) -> Result<(), Refused> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    if name.is_empty() || !name.chars().all(plain) {
        let message = format!("{name:?} is no attribute name: lower-case letters and digits only");
        return Err(Refused::request(message));
    }
    if name == "partitionkey" {
        message.key = Some(value.clone().into());
    }
    message.headers.insert(format!("{ATTRIBUTE}{name}"), value);
    Ok(())
}

fn complete(message: Outgoing) -> Result<Outgoing, Refused> {
    let has = |name: &&str| {
        message.headers.get(&format!("{ATTRIBUTE}{name}")).is_some_and(|value| !value.is_empty())
    };
    match REQUIRED.iter().find(|name| !has(name)) {
        Some(missing) => Err(Refused::request(format!("the event lacks the attribute {missing}"))),
        None => Ok(message),
    }
}

/// A message as a structured event; one that is none gets the attributes that say so.
pub(crate) fn show(record: Record) -> Value {
    let mut event = Map::new();
    let mut kind = None;
    let mut headers: Vec<_> = record.headers.into_iter().collect();
    headers.sort();
    for (name, value) in headers {
        if let Some(name) = name.strip_prefix(ATTRIBUTE) {
            event.insert(name.to_owned(), value.into());
        } else if name == CONTENT {
            kind = Some(value);
        }
    }
    for (name, otherwise) in REQUIRED.iter().zip(["1.0", "", "geminga", "geminga.message"]) {
        event.entry((*name).to_owned()).or_insert_with(|| otherwise.into());
    }
    let is_json = kind.as_deref().is_some_and(|kind| kind.contains("json"));
    if let Some(kind) = kind {
        event.insert("datacontenttype".to_owned(), kind.into());
    }
    match (
        is_json,
        serde_json::from_slice::<Value>(&record.value),
        std::str::from_utf8(&record.value),
    ) {
        (true, Ok(value), _) => event.insert("data".to_owned(), value),
        (_, _, Ok(text)) => event.insert("data".to_owned(), text.into()),
        (_, _, Err(_)) => {
            event.insert("data_base64".to_owned(), json!(STANDARD.encode(&record.value)))
        }
    };
    Value::Object(event)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EVENT: &str = r#"{"specversion":"1.0","id":"7","source":"/orders","type":"made","partitionkey":"k","datacontenttype":"application/json","data":{"n":1}}"#;

    fn back(message: Outgoing) -> Value {
        show(Record {
            key: message.key,
            value: message.value,
            headers: message.headers.into_iter().collect(),
            event_time_ms: None,
        })
    }

    #[test]
    fn an_event_comes_back_as_it_was_sent() {
        let message = one(EVENT.as_bytes()).expect("an event");
        assert_eq!(message.key.as_deref(), Some(&b"k"[..]));
        assert_eq!(&message.value[..], br#"{"n":1}"#);
        let sent: Value = serde_json::from_str(EVENT).expect("JSON");
        assert_eq!(back(message), sent);
    }

    #[test]
    fn binary_and_structured_content_are_the_same_message() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("ce-specversion", "1.0"),
            ("ce-id", "7"),
            ("ce-source", "/orders"),
            ("ce-type", "made"),
            ("ce-partitionkey", "k"),
            ("content-type", "application/json"),
            ("x-other", "no"),
        ] {
            headers.insert(name, value.parse().expect("a header"));
        }
        assert!(is_binary(&headers));
        let sent = binary(&headers, Bytes::from_static(br#"{"n":1}"#)).expect("an event");
        assert_eq!(sent, one(EVENT.as_bytes()).expect("an event"));
    }

    #[test]
    fn an_event_without_its_attributes_is_refused() {
        for missing in REQUIRED {
            let mut event: Map<String, Value> = serde_json::from_str(EVENT).expect("JSON");
            event.remove(missing);
            assert!(structured(event.clone()).is_err(), "{missing}");
            event.insert(missing.to_owned(), json!({"nested": 1}));
            assert!(structured(event).is_err(), "{missing}");
        }
        assert!(many(EVENT.as_bytes()).is_err(), "not an array");
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_event_or_an_error(body in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = one(&body);
            let _ = many(&body);
        }
    }
}
