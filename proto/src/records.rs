//! The native payload format, read so that it cannot be made to allocate without bound (S5).

use std::io::Read;

use bytes::{Buf, Bytes};
use prost::{
    Message as _,
    encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field},
};

use crate::v1::{Codec, Record};

/// Largest uncompressed batch that is decoded, bytes. A server refuses larger ones at its front door.
pub const BATCH_BYTES_MAX: usize = 6 * 1024 * 1024;

/// A payload that is not what it says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Damaged(pub String);

/// The records of a delivered payload, decoded one by one as they are asked for: a batch of many small records does not
/// become as many large values at once.
#[derive(Debug)]
pub struct Records(Bytes);

impl Records {
    /// Allocates at most the declared size, which is at most [`BATCH_BYTES_MAX`], and refuses a payload that turns out
    /// longer, or does not hold `count` records.
    ///
    /// # Errors
    /// [`Damaged`], which says what is wrong with it.
    pub fn open(codec: Codec, declared: u32, count: u32, payload: Bytes) -> Result<Self, Damaged> {
        let declared = declared as usize;
        if declared > BATCH_BYTES_MAX || payload.len() > BATCH_BYTES_MAX {
            let bytes = declared.max(payload.len());
            return Err(Damaged(format!("{bytes} bytes are more than a batch may have")));
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
            return Err(Damaged(format!("a batch of {count} messages holds {found}")));
        }
        Ok(Self(plain))
    }

    /// The next record; `None` after the last one.
    ///
    /// # Errors
    /// [`Damaged`].
    pub fn read(&mut self) -> Result<Option<Record>, Damaged> {
        let Some(len) = next_record(&mut self.0)? else { return Ok(None) };
        Record::decode(self.0.split_to(len)).map(Some).map_err(damaged)
    }

    /// Passes one record by.
    ///
    /// # Errors
    /// [`Damaged`].
    pub fn skip(&mut self) -> Result<(), Damaged> {
        if let Some(len) = next_record(&mut self.0)? {
            self.0.advance(len);
        }
        Ok(())
    }
}

/// Goes to the next record; its length, which is there. `None` at the end.
fn next_record(rest: &mut impl Buf) -> Result<Option<usize>, Damaged> {
    while rest.has_remaining() {
        let (tag, wire_type) = decode_key(rest).map_err(damaged)?;
        if tag != 1 || wire_type != WireType::LengthDelimited {
            skip_field(wire_type, tag, rest, DecodeContext::default()).map_err(damaged)?;
            continue;
        }
        let len = decode_varint(rest).map_err(damaged)?;
        return match usize::try_from(len) {
            Ok(len) if len <= rest.remaining() => Ok(Some(len)),
            _ => Err(Damaged("a record is longer than its batch".into())),
        };
    }
    Ok(None)
}

fn read_all(from: impl Read, declared: usize) -> Result<Bytes, Damaged> {
    let mut plain = Vec::with_capacity(declared);
    from.take(declared as u64 + 1).read_to_end(&mut plain).map_err(damaged)?;
    if plain.len() != declared {
        return Err(undeclared(declared));
    }
    Ok(plain.into())
}

fn undeclared(declared: usize) -> Damaged {
    Damaged(format!("the batch does not have the {declared} bytes it declares"))
}

fn damaged(error: impl std::fmt::Display) -> Damaged {
    Damaged(error.to_string())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::v1::RecordBatch;

    fn decode(
        codec: Codec,
        declared: u32,
        count: u32,
        payload: Bytes,
    ) -> Result<Vec<Record>, Damaged> {
        let mut records = Records::open(codec, declared, count, payload)?;
        let mut all = Vec::new();
        while let Some(record) = records.read()? {
            all.push(record);
        }
        Ok(all)
    }

    fn batch(count: usize) -> Bytes {
        let record = Record { value: "v".into(), key: Some("k".into()), ..Record::default() };
        RecordBatch { records: vec![record; count] }.encode_to_vec().into()
    }

    fn zstd(plain: &[u8]) -> Bytes {
        zstd::bulk::compress(plain, 1).expect("memory").into()
    }

    fn lz4(plain: &[u8]) -> Bytes {
        use std::io::Write;
        let mut encoder = lz4_flex::frame::FrameEncoder::new(Vec::new());
        encoder.write_all(plain).expect("memory");
        encoder.finish().expect("memory").into()
    }

    #[test]
    fn a_batch_gives_its_records_back() {
        let plain = batch(3);
        let declared = plain.len() as u32;
        for (codec, payload) in [
            (Codec::Unspecified, plain.clone()),
            (Codec::Lz4, lz4(&plain)),
            (Codec::Zstd, zstd(&plain)),
        ] {
            assert_eq!(decode(codec, declared, 3, payload).expect("good").len(), 3);
        }
        for (declared, count) in
            [(declared, 2), (declared, 4), (declared - 1, 3), (declared + 1, 3)]
        {
            assert!(decode(Codec::Unspecified, declared, count, plain.clone()).is_err());
        }
    }

    #[test]
    fn the_records_of_a_batch_are_as_many_as_it_says() {
        // Two bytes each: a batch can hold millions.
        let plain: Bytes =
            RecordBatch { records: vec![Record::default(); 3] }.encode_to_vec().into();
        assert_eq!(plain.len(), 6);
        assert_eq!(decode(Codec::Unspecified, 6, 3, plain.clone()).expect("good").len(), 3);
        for (declared, count) in [(6, 2), (6, 4), (5, 3), (7, 3)] {
            assert!(decode(Codec::Unspecified, declared, count, plain.clone()).is_err());
        }
        assert!(decode(Codec::Unspecified, 5, 3, plain.slice(..5)).is_err());
    }

    #[test]
    fn a_bomb_is_refused_at_its_declared_size() {
        let bomb = vec![0u8; 5_000_000];
        for (codec, packed) in [(Codec::Lz4, lz4(&bomb)), (Codec::Zstd, zstd(&bomb))] {
            assert!(packed.len() < 50_000);
            assert!(decode(codec, 100, 1, packed.clone()).is_err(), "more than it declares");
            assert!(decode(codec, 6_000_000, 1, packed.clone()).is_err(), "less than it declares");
            assert!(decode(codec, u32::MAX, 1, packed).is_err(), "more than a batch may have");
        }
    }

    proptest! {
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
}
