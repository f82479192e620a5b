//! An entry as it travels and lies on disks: frozen at its first send, checked wherever it arrives (section 3).
//!
//! ```text
//! 0        8        16       24           32        36           40
//! | ledger | entry  | lac    | acc_length | length  | digest     | payload ...
//! | u64 le | u64 le | i64 le | u64 le     | u32 le  | u32 le     | `length` bytes
//! ```
//! `lac` is -1 for none. `digest` is CRC32C over bytes 0..36 and the payload.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use geminga_proto::ids::{EntryId, LedgerId};
use geminga_runtime::telemetry::TraceContext;

/// Bytes in front of the payload.
pub const ENTRY_HEADER_BYTES: usize = 40;
/// The largest payload of an entry, bytes: a message of 5 MiB with its headers, and well below every frame limit.
pub const ENTRY_PAYLOAD_BYTES_MAX: usize = 6 * 1024 * 1024;

/// A payload in two parts, so that a layer can put a header in front without copying what it got.
#[derive(Clone, Debug, Default)]
pub struct Payload {
    /// First part; may be empty.
    pub head: Bytes,
    /// Second part; may be empty.
    pub body: Bytes,
    /// The trace it belongs to, if somebody records it. It travels beside the entry and is no part of its bytes.
    pub trace: Option<TraceContext>,
}

impl Payload {
    /// Length of both parts, bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.head.len() + self.body.len()
    }

    /// Whether there are no bytes at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Both parts as one slice; copies only if both are non-empty.
    #[must_use]
    pub fn to_bytes(&self) -> Bytes {
        if self.head.is_empty() {
            return self.body.clone();
        }
        if self.body.is_empty() {
            return self.head.clone();
        }
        let mut joined = BytesMut::with_capacity(self.len());
        joined.put_slice(&self.head);
        joined.put_slice(&self.body);
        joined.freeze()
    }
}

impl From<Bytes> for Payload {
    fn from(body: Bytes) -> Self {
        Self { body, ..Self::default() }
    }
}

impl PartialEq for Payload {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && self.to_bytes() == other.to_bytes()
    }
}

impl Eq for Payload {}

/// One entry with its digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub ledger: LedgerId,
    pub id: EntryId,
    /// The writer's own LAC when the entry was first sent, hence acknowledged.
    pub lac: Option<EntryId>,
    /// Payload bytes of the ledger up to and including this entry.
    pub acc_length: u64,
    pub payload: Payload,
    /// CRC32C over header and payload.
    pub digest: u32,
}

/// Bytes that are not the entry they claim to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryDamage {
    /// Shorter than the header says, or longer.
    #[error("the entry has {got} bytes where {expected} were expected")]
    Length { got: usize, expected: usize },
    /// The digest does not fit the bytes.
    #[error("the entry's checksum is {got:#010x}, its bytes give {computed:#010x}")]
    Digest { got: u32, computed: u32 },
}

impl Entry {
    /// Freezes an entry: computes its digest.
    #[must_use]
    pub fn seal(
        ledger: LedgerId,
        id: EntryId,
        lac: Option<EntryId>,
        acc_length: u64,
        payload: Payload,
    ) -> Self {
        let mut entry = Self { ledger, id, lac, acc_length, payload, digest: 0 };
        entry.digest = entry.compute_digest();
        entry
    }

    /// The first [`ENTRY_HEADER_BYTES`] bytes of its encoding.
    #[must_use]
    pub fn header(&self) -> [u8; ENTRY_HEADER_BYTES] {
        let mut header = [0u8; ENTRY_HEADER_BYTES];
        let mut out = &mut header[..];
        out.put_u64_le(self.ledger.0);
        out.put_u64_le(self.id.0);
        out.put_i64_le(encode_lac(self.lac));
        out.put_u64_le(self.acc_length);
        out.put_u32_le(self.payload.len() as u32);
        out.put_u32_le(self.digest);
        header
    }

    /// Bytes of its encoding.
    #[must_use]
    pub fn encoded_len(&self) -> usize {
        ENTRY_HEADER_BYTES + self.payload.len()
    }

    /// Appends its encoding.
    pub fn encode(&self, out: &mut impl BufMut) {
        out.put_slice(&self.header());
        out.put_slice(&self.payload.head);
        out.put_slice(&self.payload.body);
    }

    /// Reads an entry and checks its digest; the payload is a slice of `bytes`.
    ///
    /// # Errors
    /// [`EntryDamage`].
    pub fn decode(bytes: Bytes) -> Result<Self, EntryDamage> {
        let entry = Self::parse(bytes)?;
        entry.verify()?;
        Ok(entry)
    }

    /// Reads an entry whose digest somebody else will check: on the way through a connection, the receiver does.
    ///
    /// # Errors
    /// [`EntryDamage::Length`].
    pub fn parse(bytes: Bytes) -> Result<Self, EntryDamage> {
        let short = EntryDamage::Length { got: bytes.len(), expected: ENTRY_HEADER_BYTES };
        if bytes.len() < ENTRY_HEADER_BYTES {
            return Err(short);
        }
        let mut header = &bytes[..ENTRY_HEADER_BYTES];
        let ledger = LedgerId(header.get_u64_le());
        let id = EntryId(header.get_u64_le());
        let lac = decode_lac(header.get_i64_le());
        let acc_length = header.get_u64_le();
        let length = header.get_u32_le() as usize;
        let digest = header.get_u32_le();
        let expected = ENTRY_HEADER_BYTES + length;
        if bytes.len() != expected {
            return Err(EntryDamage::Length { got: bytes.len(), expected });
        }
        let payload = Payload::from(bytes.slice(ENTRY_HEADER_BYTES..));
        Ok(Self { ledger, id, lac, acc_length, payload, digest })
    }

    /// Checks the digest.
    ///
    /// # Errors
    /// [`EntryDamage::Digest`].
    pub fn verify(&self) -> Result<(), EntryDamage> {
        let computed = self.compute_digest();
        if computed == self.digest {
            Ok(())
        } else {
            Err(EntryDamage::Digest { got: self.digest, computed })
        }
    }

    fn compute_digest(&self) -> u32 {
        let mut crc = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
        crc.update(&self.header()[..ENTRY_HEADER_BYTES - 4]);
        crc.update(&self.payload.head);
        crc.update(&self.payload.body);
        crc.finalize() as u32
    }
}

/// -1 for none.
#[must_use]
pub fn encode_lac(lac: Option<EntryId>) -> i64 {
    lac.map_or(-1, |id| id.0 as i64)
}

/// Negative is none.
#[must_use]
pub fn decode_lac(lac: i64) -> Option<EntryId> {
    u64::try_from(lac).ok().map(EntryId)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(head: &[u8], body: &[u8]) -> Entry {
        let payload = Payload {
            head: Bytes::copy_from_slice(head),
            body: Bytes::copy_from_slice(body),
            trace: None,
        };
        Entry::seal(LedgerId(7), EntryId(3), Some(EntryId(2)), 99, payload)
    }

    proptest! {
        #[test]
        fn decode_gives_back_what_encode_took(head: Vec<u8>, body: Vec<u8>) {
            let entry = entry(&head, &body);
            let mut bytes = BytesMut::new();
            entry.encode(&mut bytes);
            prop_assert_eq!(Entry::decode(bytes.freeze()), Ok(entry));
        }

        #[test]
        fn any_flipped_bit_is_found(body: Vec<u8>, bit in 0usize..1_000_000) {
            let mut bytes = BytesMut::new();
            entry(b"h", &body).encode(&mut bytes);
            let bit = bit % (bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Entry::decode(bytes.freeze()).is_err());
        }
    }
}
