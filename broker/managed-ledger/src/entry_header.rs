//! An entry of a data ledger: version, length, header, payload. Bounds are checked before anything is allocated (S4).
//!
//! ```text
//! 0         1                    5
//! | version | header length u32le | EntryHeader ... | payload ...
//! ```

use bytes::{Buf, BufMut, Bytes, BytesMut};
use geminga_bookie_client::entry::Payload;
use geminga_proto::storage::v1::EntryHeader;
use prost::Message;

const VERSION: u8 = 1;
/// Bytes in front of the header.
pub const PREFIX_BYTES: usize = 5;
/// The largest header, bytes.
pub const HEADER_BYTES_MAX: usize = 1024 * 1024;

/// Bytes that are no entry of this format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the entry {0}")]
pub struct HeaderError(pub String);

/// The entry of a header and a payload; the payload is not copied.
#[must_use]
pub fn encode(header: &EntryHeader, payload: Bytes) -> Payload {
    let length = header.encoded_len();
    let mut head = BytesMut::with_capacity(PREFIX_BYTES + length);
    head.put_u8(VERSION);
    head.put_u32_le(length as u32);
    header.encode_raw(&mut head);
    Payload { head: head.freeze(), body: payload, trace: None }
}

/// Reads an entry: its header, and the payload as a slice of it.
///
/// # Errors
/// [`HeaderError`].
pub fn decode(payload: &Payload) -> Result<(EntryHeader, Bytes), HeaderError> {
    let bytes = payload.to_bytes();
    let fail = |why: String| HeaderError(why);
    if bytes.len() < PREFIX_BYTES {
        return Err(fail(format!("has {} bytes", bytes.len())));
    }
    let mut prefix = &bytes[..PREFIX_BYTES];
    let version = prefix.get_u8();
    if version != VERSION {
        return Err(fail(format!("has the unknown version {version}")));
    }
    let length = prefix.get_u32_le() as usize;
    if length > HEADER_BYTES_MAX || length > bytes.len() - PREFIX_BYTES {
        return Err(fail(format!("claims a header of {length} bytes in {}", bytes.len())));
    }
    let end = PREFIX_BYTES + length;
    let header = EntryHeader::decode(bytes.slice(PREFIX_BYTES..end))
        .map_err(|error| fail(format!("has an unreadable header: {error}")))?;
    if header.base_offset.checked_add(u64::from(header.count)).is_none() {
        return Err(fail("has offsets past the end of numbers".to_owned()));
    }
    Ok((header, bytes.slice(end..)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn decode_gives_back_what_encode_took(base in 0u64..1 << 60, count: u32, payload: Vec<u8>) {
            let header = EntryHeader { base_offset: base, count, ..EntryHeader::default() };
            let stored = decode(&encode(&header, Bytes::from(payload.clone())));
            prop_assert_eq!(stored, Ok((header, Bytes::from(payload))));
        }

        #[test]
        fn foreign_bytes_are_refused_or_read_never_a_panic(bytes: Vec<u8>, version in 0u8..2) {
            let mut entry = vec![version];
            entry.extend(bytes);
            drop(decode(&Payload::from(Bytes::from(entry))));
        }
    }

    #[test]
    fn a_header_length_beyond_the_bytes_is_refused() {
        let entry = [&[VERSION][..], &u32::MAX.to_le_bytes(), &[0; 10]].concat();
        assert!(decode(&Payload::from(Bytes::from(entry))).is_err());
    }
}
