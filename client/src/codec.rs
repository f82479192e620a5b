//! Records and batches as bytes: encoding and compression. Decoding is the format's own (`geminga_proto::records`).

use bytes::{BufMut, Bytes, BytesMut};
use geminga_proto::v1::Codec;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};

use crate::message::Message;

/// How a producer compresses its batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// lz4: cheap.
    Lz4,
    /// zstd level 1: smaller, dearer.
    Zstd,
}

/// Bytes of a message as a record of a batch, with what frames it: what counts against the message limit.
pub(crate) fn record_len(message: &Message) -> usize {
    field_len(body_len(message))
}

fn body_len(message: &Message) -> usize {
    let headers: usize =
        message.headers.iter().map(|(name, value)| field_len(header_len(name, value))).sum();
    let key = message.key.as_ref().map_or(0, |key| field_len(key.len()));
    let value = if message.value.is_empty() { 0 } else { field_len(message.value.len()) };
    let time = message.event_time_ms.map_or(0, |time| 1 + encoded_len_varint(time));
    key + value + headers + time
}

/// Appends one record to an encoded `RecordBatch`. Written by hand: it saves building the generated types, and the
/// headers stay in their order, so that equal messages are equal bytes.
pub(crate) fn put_record(batch: &mut BytesMut, message: &Message) {
    let record = body_len(message);
    batch.reserve(field_len(record));
    encode_key(1, WireType::LengthDelimited, batch);
    encode_varint(record as u64, batch);
    if let Some(key) = &message.key {
        put_bytes(1, key, batch);
    }
    if !message.value.is_empty() {
        put_bytes(2, &message.value, batch);
    }
    for (name, value) in &message.headers {
        encode_key(3, WireType::LengthDelimited, batch);
        encode_varint(header_len(name, value) as u64, batch);
        put_bytes(1, name.as_bytes(), batch);
        put_bytes(2, value.as_bytes(), batch);
    }
    if let Some(time) = message.event_time_ms {
        encode_key(4, WireType::Varint, batch);
        encode_varint(time, batch);
    }
}

/// Of a length-delimited field with a one-byte tag.
fn field_len(bytes: usize) -> usize {
    1 + encoded_len_varint(bytes as u64) + bytes
}

fn header_len(name: &str, value: &str) -> usize {
    field_len(name.len()) + field_len(value.len())
}

fn put_bytes(tag: u32, bytes: &[u8], batch: &mut BytesMut) {
    encode_key(tag, WireType::LengthDelimited, batch);
    encode_varint(bytes.len() as u64, batch);
    batch.put_slice(bytes);
}

/// A compressed payload, or the plain one where compression gains nothing.
pub(crate) fn compress(plain: Bytes, compression: Compression) -> (Codec, Bytes) {
    let (codec, packed) = match compression {
        Compression::None => return (Codec::Unspecified, plain),
        Compression::Lz4 => (Codec::Lz4, lz4(&plain)),
        Compression::Zstd => (Codec::Zstd, zstd::bulk::compress(&plain, 1)),
    };
    match packed {
        Ok(packed) if packed.len() < plain.len() => (codec, packed.into()),
        _ => (Codec::Unspecified, plain),
    }
}

fn lz4(plain: &[u8]) -> std::io::Result<Vec<u8>> {
    use std::io::Write;
    let mut encoder = lz4_flex::frame::FrameEncoder::new(Vec::with_capacity(plain.len() / 2));
    encoder.write_all(plain)?;
    encoder.finish().map_err(std::io::Error::other)
}

#[cfg(test)]
mod tests {
    use geminga_proto::{records::Records, v1::Record};
    use proptest::prelude::*;

    use super::*;
    use crate::error::Error;

    fn message() -> impl Strategy<Value = Message> {
        (
            prop::option::of(prop::collection::vec(any::<u8>(), 0..20)),
            prop::collection::vec(any::<u8>(), 0..300),
            prop::collection::btree_map("[a-z]{0,8}", ".{0,12}", 0..4),
            prop::option::of(any::<u64>()),
        )
            .prop_map(|(key, value, headers, event_time_ms)| Message {
                key: key.map(Bytes::from),
                value: value.into(),
                headers,
                event_time_ms,
                deliver_at_ms: None,
            })
    }

    fn decode(
        codec: Codec,
        declared: u32,
        count: u32,
        payload: Bytes,
    ) -> Result<Vec<Record>, Error> {
        let mut records = Records::open(codec, declared, count, payload)?;
        let mut all = Vec::new();
        while let Some(record) = records.read()? {
            all.push(record);
        }
        Ok(all)
    }

    fn compressions() -> impl Strategy<Value = Compression> {
        prop::sample::select(vec![Compression::None, Compression::Lz4, Compression::Zstd])
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_with_every_codec(
            messages in prop::collection::vec(message(), 1..20),
            compression in compressions(),
        ) {
            let mut batch = BytesMut::new();
            for message in &messages {
                let before = batch.len();
                put_record(&mut batch, message);
                prop_assert_eq!(batch.len() - before, record_len(message));
            }
            let plain = batch.freeze();
            let declared = plain.len() as u32;
            let (codec, payload) = compress(plain, compression);
            prop_assert!(payload.len() <= declared as usize);
            let records = decode(codec, declared, messages.len() as u32, payload).expect("what we encoded");
            prop_assert_eq!(records.len(), messages.len());
            for (record, message) in records.into_iter().zip(messages) {
                prop_assert_eq!(record.key, message.key);
                prop_assert_eq!(record.value, message.value);
                prop_assert_eq!(record.headers.into_iter().collect::<std::collections::BTreeMap<_, _>>(), message.headers);
                prop_assert_eq!(record.event_time_ms, message.event_time_ms);
            }
        }
    }
}
