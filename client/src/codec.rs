//! Records and batches as bytes: encoding, compression, and decoding that cannot be made to allocate without bound (S5).

use std::io::Read;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use geminga_proto::v1::{Codec, Record};
use prost::{
    Message as _,
    encoding::{
        DecodeContext, WireType, decode_key, decode_varint, encode_key, encode_varint,
        encoded_len_varint, skip_field,
    },
};

use crate::{error::Error, message::Message};

/// Largest uncompressed batch a consumer accepts, bytes. A server refuses larger ones at its front door.
pub(crate) const BATCH_BYTES_MAX: usize = 6 * 1024 * 1024;

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

/// The records of a delivered payload, decoded one by one as they are asked for: a batch of many small records does not
/// become as many large values at once.
#[derive(Debug)]
pub(crate) struct Records(Bytes);

impl Records {
    /// Allocates at most the declared size, which is at most [`BATCH_BYTES_MAX`], and refuses a payload that turns out
    /// longer, or does not hold `count` records.
    pub(crate) fn open(
        codec: Codec,
        declared: u32,
        count: u32,
        payload: Bytes,
    ) -> Result<Self, Error> {
        let declared = declared as usize;
        if declared > BATCH_BYTES_MAX || payload.len() > BATCH_BYTES_MAX {
            let bytes = declared.max(payload.len());
            return Err(Error::Damaged(format!("{bytes} bytes are more than a batch may have")));
        }
        let plain = match codec {
            Codec::Unspecified if payload.len() == declared => payload,
            Codec::Unspecified => return Err(undeclared(declared)),
            Codec::Lz4 => read_all(lz4_flex::frame::FrameDecoder::new(&payload[..]), declared)?,
            Codec::Zstd => {
                let mut decoder =
                    zstd::stream::read::Decoder::with_buffer(&payload[..]).map_err(damaged)?;
                // 8 MiB: no honest batch needs a larger window, and a hostile one cannot ask for more memory.
                decoder.window_log_max(23).map_err(damaged)?;
                read_all(decoder, declared)?
            }
        };
        let mut rest = &plain[..];
        let mut found = 0u32;
        while let Some(len) = next_record(&mut rest)? {
            rest.advance(len);
            found += 1; // a record has two bytes at least: no overflow
        }
        if found != count {
            return Err(Error::Damaged(format!("a batch of {count} messages holds {found}")));
        }
        Ok(Self(plain))
    }

    /// The next record; `None` after the last one.
    pub(crate) fn next(&mut self) -> Result<Option<Record>, Error> {
        let Some(len) = next_record(&mut self.0)? else { return Ok(None) };
        Record::decode(self.0.split_to(len)).map(Some).map_err(damaged)
    }

    /// Passes one record by.
    pub(crate) fn skip(&mut self) -> Result<(), Error> {
        if let Some(len) = next_record(&mut self.0)? {
            self.0.advance(len);
        }
        Ok(())
    }
}

/// Goes to the next record; its length, which is there. `None` at the end.
fn next_record(rest: &mut impl Buf) -> Result<Option<usize>, Error> {
    while rest.has_remaining() {
        let (tag, wire_type) = decode_key(rest).map_err(damaged)?;
        if tag != 1 || wire_type != WireType::LengthDelimited {
            skip_field(wire_type, tag, rest, DecodeContext::default()).map_err(damaged)?;
            continue;
        }
        let len = decode_varint(rest).map_err(damaged)?;
        return match usize::try_from(len) {
            Ok(len) if len <= rest.remaining() => Ok(Some(len)),
            _ => Err(Error::Damaged("a record is longer than its batch".into())),
        };
    }
    Ok(None)
}

fn read_all(from: impl Read, declared: usize) -> Result<Bytes, Error> {
    let mut plain = Vec::with_capacity(declared);
    from.take(declared as u64 + 1).read_to_end(&mut plain).map_err(damaged)?;
    if plain.len() != declared {
        return Err(undeclared(declared));
    }
    Ok(plain.into())
}

fn undeclared(declared: usize) -> Error {
    Error::Damaged(format!("the batch does not have the {declared} bytes it declares"))
}

fn damaged(error: impl std::fmt::Display) -> Error {
    Error::Damaged(error.to_string())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
        while let Some(record) = records.next()? {
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

        #[test]
        fn foreign_bytes_are_an_error_never_a_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            declared in 0u32..10_000,
            codec in 0i32..3,
        ) {
            let codec = Codec::try_from(codec).expect("a codec");
            for count in 0..4 {
                if let Ok(records) = decode(codec, declared, count, bytes.clone().into()) {
                    prop_assert_eq!(records.len(), count as usize);
                }
            }
        }
    }

    #[test]
    fn a_bomb_is_refused_at_its_declared_size() {
        let bomb = vec![0u8; 5_000_000];
        for compression in [Compression::Lz4, Compression::Zstd] {
            let (codec, packed) = compress(bomb.clone().into(), compression);
            assert!(packed.len() < 50_000);
            assert!(decode(codec, 100, 1, packed.clone()).is_err(), "more than it declares");
            assert!(decode(codec, 6_000_000, 1, packed.clone()).is_err(), "less than it declares");
            assert!(
                decode(codec, u32::MAX, 1, packed).is_err(),
                "declares more than a batch may have"
            );
        }
    }

    #[test]
    fn the_records_of_a_batch_are_as_many_as_it_says() {
        let mut batch = BytesMut::new();
        for _ in 0..3 {
            put_record(&mut batch, &Message::default()); // two bytes each: a batch can hold millions
        }
        let plain = batch.freeze();
        assert_eq!(plain.len(), 6);
        assert_eq!(decode(Codec::Unspecified, 6, 3, plain.clone()).expect("good").len(), 3);
        for (declared, count) in [(6, 2), (6, 4), (5, 3), (7, 3)] {
            assert!(matches!(
                decode(Codec::Unspecified, declared, count, plain.clone()),
                Err(Error::Damaged(_))
            ));
        }
        let cut = plain.slice(..5);
        assert!(matches!(decode(Codec::Unspecified, 5, 3, cut), Err(Error::Damaged(_))));
    }
}
