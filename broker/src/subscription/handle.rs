//! What a delivery carries and a settle presents: bound to the owner epoch, the subscription, the consumer and the attempt,
//! and signed with the segment's key (L4). A late settle settles nothing of a later delivery, and nobody makes a handle up.

use bytes::{BufMut, Bytes, BytesMut};
use geminga_proto::{
    ids::{Epoch, SubscriptionId},
    reason::Reason,
};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::{dispatcher::Presented, errors::Refusal};

/// Bytes of the fields.
const FIELDS: usize = 28;
/// Bytes of the signature: the first half of an HMAC-SHA256.
const SIGNATURE: usize = 16;

/// A delivery's handle: 44 bytes on the wire, opaque to clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handle {
    pub epoch: Epoch,
    pub subscription: SubscriptionId,
    /// The consumer instance: drawn at random for each stream.
    pub consumer: u64,
    pub attempt: u32,
}

/// Signs and checks the handles of one segment.
#[derive(Clone)]
pub struct Signer(Hmac<Sha256>);

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Signer")
    }
}

impl Signer {
    /// With the segment's key, the same for all its owners.
    #[must_use]
    pub fn new(key: &[u8; 32]) -> Self {
        Self(Hmac::new_from_slice(key).expect("a key of any length will do"))
    }

    fn signature(&self, fields: &[u8]) -> [u8; SIGNATURE] {
        let mut mac = self.0.clone();
        mac.update(fields);
        let full = mac.finalize().into_bytes();
        full[..SIGNATURE].try_into().expect("32 bytes have 16")
    }

    /// The bytes on the wire.
    #[must_use]
    pub fn encode(&self, handle: Handle) -> Bytes {
        let mut bytes = BytesMut::with_capacity(FIELDS + SIGNATURE);
        bytes.put_u64(handle.epoch.0);
        bytes.put_u64(handle.subscription.0);
        bytes.put_u64(handle.consumer);
        bytes.put_u32(handle.attempt);
        let signature = self.signature(&bytes);
        bytes.put_slice(&signature);
        bytes.freeze()
    }

    /// From the wire, if this segment gave it.
    ///
    /// # Errors
    /// INVALID_HANDLE for anything else.
    pub fn decode(&self, bytes: &[u8]) -> Result<Handle, Refusal> {
        if bytes.len() != FIELDS + SIGNATURE {
            return Err(invalid("the handle was never given"));
        }
        let (fields, signature) = bytes.split_at(FIELDS);
        // In constant time: how far a guess is right does not show.
        let differs = self.signature(fields).iter().zip(signature).fold(0, |d, (a, b)| d | (a ^ b));
        if differs != 0 {
            return Err(invalid("the handle was never given on this segment"));
        }
        let number =
            |at: usize| u64::from_be_bytes(fields[at..at + 8].try_into().expect("8 bytes"));
        Ok(Handle {
            epoch: Epoch(number(0)),
            subscription: SubscriptionId(number(8)),
            consumer: number(16),
            attempt: u32::from_be_bytes(fields[24..28].try_into().expect("4 bytes")),
        })
    }

    /// As [`Self::decode`], for this subscription under this owner epoch.
    ///
    /// # Errors
    /// INVALID_HANDLE, saying what differs.
    pub fn check(
        &self,
        bytes: &[u8],
        subscription: SubscriptionId,
        epoch: Epoch,
    ) -> Result<Presented, Refusal> {
        let handle = self.decode(bytes)?;
        if handle.subscription != subscription {
            return Err(invalid("the handle is of another subscription"));
        }
        if handle.epoch > epoch {
            return Err(invalid("the handle is of a later owner epoch of the segment"));
        }
        let earlier = handle.epoch < epoch;
        Ok(Presented { consumer: handle.consumer, attempt: handle.attempt, earlier })
    }
}

/// A handle or offset that settles nothing here.
pub(crate) fn invalid(message: &str) -> Refusal {
    Refusal::new(Reason::InvalidHandle, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HANDLE: Handle =
        Handle { epoch: Epoch(7), subscription: SubscriptionId(8), consumer: u64::MAX, attempt: 3 };

    #[test]
    fn a_handle_comes_back_as_it_was_given_and_says_whether_its_owner_was_an_earlier_one() {
        let signer = Signer::new(&[1; 32]);
        let bytes = signer.encode(HANDLE);
        assert_eq!(signer.decode(&bytes).expect("given"), HANDLE);
        let check = |epoch| signer.check(&bytes, SubscriptionId(8), Epoch(epoch));
        assert!(!check(7).expect("good").earlier);
        assert!(check(8).expect("good").earlier);
        assert_eq!(check(6).expect_err("from the future").reason, Reason::InvalidHandle);
        let other = signer.check(&bytes, SubscriptionId(9), Epoch(7)).expect_err("other");
        assert_eq!(other.reason, Reason::InvalidHandle);
    }

    #[test]
    fn nobody_makes_a_handle_up() {
        let signer = Signer::new(&[1; 32]);
        let bytes = signer.encode(HANDLE);
        for at in 0..bytes.len() {
            let mut forged = bytes.to_vec();
            forged[at] ^= 1;
            assert_eq!(signer.decode(&forged).expect_err("forged").reason, Reason::InvalidHandle);
        }
        assert!(Signer::new(&[2; 32]).decode(&bytes).is_err(), "another segment's key");
        for junk in [&b""[..], b"x", &[0; 24], &[0; 43], &[0; 44], &[0; 45]] {
            assert_eq!(signer.decode(junk).expect_err("junk").reason, Reason::InvalidHandle);
        }
    }
}
