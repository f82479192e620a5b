//! The native payload format, read so that it cannot be made to allocate without bound (S5).

use std::{io::Read, ops::Range};

use bytes::{Buf, Bytes};
use prost::{
    Message as _,
    encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field},
};

use crate::v1::{Codec, Record};

/// Largest uncompressed batch that is decoded, bytes. A server refuses larger ones at its front door.
pub const BATCH_BYTES_MAX: usize = 6 * 1024 * 1024;

/// A record without key, value and headers, in a payload: field 1, no bytes.
const EMPTY_RECORD: [u8; 2] = [0x0a, 0];

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
        let bytes = self.read_bytes()?;
        bytes.map(Record::decode).transpose().map_err(damaged)
    }

    /// The next record as it is encoded; `None` after the last one.
    ///
    /// # Errors
    /// [`Damaged`].
    pub fn read_bytes(&mut self) -> Result<Option<Bytes>, Damaged> {
        let Some(len) = next_record(&mut self.0)? else { return Ok(None) };
        Ok(Some(self.0.split_to(len)))
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

/// The records of an uncompressed payload that lie in these runs of numbers (rising, not empty, not touching), as a payload
/// from the first of them to the last; those between the runs become empty records, so that numbers stay what they are. One
/// run costs no copy.
///
/// # Errors
/// [`Damaged`]: it holds fewer records, or is none.
pub fn cut(payload: &Bytes, runs: &[Range<u32>]) -> Result<Bytes, Damaged> {
    let (Some(first), Some(last)) = (runs.first(), runs.last()) else { return Ok(Bytes::new()) };
    let mut found = Vec::with_capacity(runs.len()); // where each run lies
    let (mut rest, mut number) = (&payload[..], 0);
    let at = |rest: &[u8]| payload.len() - rest.len();
    for run in runs {
        let mut begins = 0;
        while number < run.end {
            let before = at(rest);
            let Some(len) = next_record(&mut rest)? else {
                return Err(Damaged(format!("message {number} of a batch is not there")));
            };
            rest.advance(len);
            if number == run.start {
                begins = before;
            }
            number += 1;
        }
        found.push(begins..at(rest));
    }
    if let [only] = &found[..] {
        return Ok(payload.slice(only.clone()));
    }
    let bytes: usize = found.iter().map(Range::len).sum();
    let mut cut =
        Vec::with_capacity(bytes + EMPTY_RECORD.len() * (last.end - first.start) as usize);
    let mut next = first.start;
    for (run, bytes) in runs.iter().zip(found) {
        (next..run.start).for_each(|_| cut.extend_from_slice(&EMPTY_RECORD));
        cut.extend_from_slice(&payload[bytes]);
        next = run.end;
    }
    Ok(cut.into())
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

    proptest! {
        #[test]
        fn a_cut_batch_has_the_records_of_its_runs_under_their_numbers_and_nothing_else(
            values in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..60),
            chosen in prop::collection::vec(any::<bool>(), 60),
        ) {
            let records: Vec<Record> = values
                .iter()
                .map(|value| Record { value: value.clone().into(), ..Record::default() })
                .collect();
            let payload: Bytes = RecordBatch { records: records.clone() }.encode_to_vec().into();
            let mut runs: Vec<Range<u32>> = Vec::new();
            for number in (0..).take(records.len()).filter(|n| chosen[*n as usize]) {
                match runs.last_mut() {
                    Some(run) if run.end == number => run.end += 1,
                    _ => runs.push(number..number + 1),
                }
            }
            let cut = cut(&payload, &runs).expect("whole");
            prop_assert!(cut.len() <= payload.len());
            let first = runs.first().map_or(0, |run| run.start) as usize;
            let last = runs.last().map_or(0, |run| run.end) as usize;
            let kept = (last - first) as u32;
            let found = decode(Codec::Unspecified, cut.len() as u32, kept, cut).expect("whole");
            for (number, record) in (first..).zip(found) {
                let wanted = if chosen[number] { records[number].clone() } else { Record::default() };
                prop_assert_eq!(record, wanted);
            }
            let beyond = records.len() as u32..records.len() as u32 + 1;
            prop_assert!(super::cut(&payload, &[beyond]).is_err());
        }
    }
}
