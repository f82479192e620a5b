//! Messages of the API as JSON and back, by their descriptors: field names as in the .proto files, 64-bit numbers as
//! numbers (and read from strings too), bytes as base64.

use std::sync::LazyLock;

use geminga_proto::FILE_DESCRIPTOR_SET;
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, Kind, MessageDescriptor, SerializeOptions};
use serde_json::{Map, Value};

use crate::answer::Refused;

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(FILE_DESCRIPTOR_SET).expect("the compiled descriptors are whole")
});

/// The descriptor of a message of the API.
pub(crate) fn descriptor(name: &str) -> MessageDescriptor {
    POOL.get_message_by_name(name).unwrap_or_else(|| panic!("{name} is a message of the API"))
}

/// Puts a text from a path or query into the field of this name, as the field's type wants it.
///
/// # Errors
/// INVALID_REQUEST for a name that is no field.
pub(crate) fn put(
    fields: &mut Map<String, Value>,
    of: &MessageDescriptor,
    name: &str,
    text: &str,
) -> Result<(), Refused> {
    let Some(field) = of.get_field_by_name(name) else {
        let known: Vec<_> = of.fields().map(|field| field.name().to_owned()).collect();
        let message = format!("{name:?} is no field here; known: {}", known.join(", "));
        return Err(Refused::request(message));
    };
    let value = match field.kind() {
        Kind::Bool if text == "true" || text.is_empty() => Value::Bool(true),
        Kind::Bool if text == "false" => Value::Bool(false),
        _ => Value::String(text.to_owned()),
    };
    let value = if field.is_list() { Value::Array(vec![value]) } else { value };
    fields.insert(name.to_owned(), value);
    Ok(())
}

/// A request message from its fields.
///
/// # Errors
/// INVALID_REQUEST, with the field and what is wrong with it.
pub(crate) fn read<M: Message + Default>(
    of: MessageDescriptor,
    fields: Map<String, Value>,
) -> Result<M, Refused> {
    let name = of.name().to_owned();
    let dynamic = DynamicMessage::deserialize(of, Value::Object(fields))
        .map_err(|error| Refused::request(format!("the request is no {name}: {error}")))?;
    dynamic
        .transcode_to()
        .map_err(|error| Refused::request(format!("the request is no {name}: {error}")))
}

/// An answer as JSON, fields without a value included.
pub(crate) fn write<M: Message>(of: MessageDescriptor, message: &M) -> Value {
    let options = SerializeOptions::new()
        .use_proto_field_name(true)
        .stringify_64_bit_integers(false)
        .skip_default_fields(false);
    let mut dynamic = DynamicMessage::new(of);
    dynamic.transcode_from(message).expect("the descriptor is the message's own");
    dynamic
        .serialize_with_options(serde_json::value::Serializer, &options)
        .expect("the API's messages can be written as JSON")
}

#[cfg(test)]
mod tests {
    use geminga_proto::admin::v1::{CreateTopicRequest, ListLedgersRequest};
    use serde_json::json;

    use super::*;

    fn fields(value: Value) -> Map<String, Value> {
        value.as_object().expect("an object").clone()
    }

    #[test]
    fn numbers_are_read_from_numbers_and_from_texts() {
        let of = descriptor("geminga.admin.v1.CreateTopicRequest");
        for segments in [json!(4), json!("4")] {
            let sent = fields(json!({"name": "a/b/c", "segments": segments}));
            let read: CreateTopicRequest = read(of.clone(), sent).expect("a request");
            assert_eq!((read.name.as_str(), read.segments), ("a/b/c", 4));
        }
    }

    #[test]
    fn what_is_no_field_or_no_number_is_named() {
        let of = descriptor("geminga.admin.v1.CreateTopicRequest");
        for wrong in [
            json!({"nam": "x"}),
            json!({"segments": "many"}),
            json!({"segments": -1}),
            json!({"name": 5}),
        ] {
            assert!(read::<CreateTopicRequest>(of.clone(), fields(wrong)).is_err());
        }
        assert!(put(&mut Map::new(), &of, "nothing", "x").is_err());
    }

    #[test]
    fn a_query_gives_flags_and_numbers() {
        let of = descriptor("geminga.admin.v1.ListLedgersRequest");
        let mut fields = Map::new();
        for (name, text) in [("under_replicated", "true"), ("page_size", "7"), ("topic", "true")] {
            put(&mut fields, &of, name, text).expect("a field");
        }
        let read: ListLedgersRequest = read(of, fields).expect("a request");
        assert!(read.under_replicated && read.page_size == 7 && read.topic == "true");
    }
}
