//! What a delivery carries and a settle presents: bound to the owner epoch, the subscription, and the consumer. A late
//! settle of an earlier consumer settles nothing of a later one.

use bytes::{BufMut, Bytes, BytesMut};
use geminga_proto::{
    ids::{Epoch, SubscriptionId},
    reason::Reason,
};

use crate::errors::Refusal;

/// A delivery's handle: 24 bytes on the wire, opaque to clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handle {
    pub epoch: Epoch,
    pub subscription: SubscriptionId,
    /// The consumer instance: drawn at random for each stream.
    pub consumer: u64,
}

impl Handle {
    /// The bytes on the wire.
    #[must_use]
    pub fn encode(self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(24);
        bytes.put_u64(self.epoch.0);
        bytes.put_u64(self.subscription.0);
        bytes.put_u64(self.consumer);
        bytes.freeze()
    }

    /// From the wire.
    ///
    /// # Errors
    /// INVALID_HANDLE for anything that is not 24 bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, Refusal> {
        let bytes: &[u8; 24] =
            bytes.try_into().map_err(|_| invalid("the handle was never given"))?;
        let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        Ok(Self {
            epoch: Epoch(number(0)),
            subscription: SubscriptionId(number(8)),
            consumer: number(16),
        })
    }

    /// Whether a presented handle is this one.
    ///
    /// # Errors
    /// INVALID_HANDLE, saying what differs.
    pub fn check(self, presented: &[u8]) -> Result<(), Refusal> {
        let presented = Self::decode(presented)?;
        if presented == self {
            return Ok(());
        }
        Err(invalid(if presented.subscription != self.subscription {
            "the handle is of another subscription"
        } else if presented.epoch != self.epoch {
            "the handle is of an earlier owner epoch of the segment"
        } else {
            "the handle is of another consumer"
        }))
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
        Handle { epoch: Epoch(7), subscription: SubscriptionId(8), consumer: u64::MAX };

    #[test]
    fn only_the_same_handle_passes() {
        HANDLE.check(&HANDLE.encode()).expect("the same");
        let others = [
            Handle { epoch: Epoch(6), ..HANDLE },
            Handle { subscription: SubscriptionId(9), ..HANDLE },
            Handle { consumer: 1, ..HANDLE },
        ];
        for other in others {
            assert_eq!(
                HANDLE.check(&other.encode()).expect_err("other").reason,
                Reason::InvalidHandle
            );
        }
        for junk in [&b""[..], b"x", &[0; 23], &[0; 25]] {
            assert_eq!(HANDLE.check(junk).expect_err("junk").reason, Reason::InvalidHandle);
        }
    }
}
