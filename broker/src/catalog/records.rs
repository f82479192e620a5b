//! Values of the catalog's keys: encoded with their format number first, checked when read.

use geminga_metadata::{Key, KeyValue};
use geminga_proto::storage::v1::{
    Available, Broker, Claim, Cookie, Draining, ListValue, NamespaceValue, SubscriptionValue,
    TenantValue, TopicName, TopicValue,
};
use prost::Message;

use crate::errors::Refusal;

/// The format this version writes and reads.
pub(super) const FORMAT: u32 = 1;

/// A value with a format number.
pub trait Record: Message + Default {
    /// The format it was written in.
    fn format(&self) -> u32;

    /// Reads the value of a key.
    ///
    /// # Errors
    /// INTERNAL for bytes that no version known here writes.
    fn decode_value(found: &KeyValue) -> Result<Self, Refusal> {
        Self::decode_bytes(&found.key, &found.value)
    }

    /// As [`Self::decode_value`].
    ///
    /// # Errors
    /// The same.
    fn decode_bytes(key: &Key, value: &[u8]) -> Result<Self, Refusal> {
        match Self::decode(value) {
            Ok(record) if record.format() == FORMAT => Ok(record),
            Ok(record) => {
                Err(Refusal::internal(format!("{key} has the unknown format {}", record.format())))
            }
            Err(error) => Err(Refusal::internal(format!("{key} cannot be read: {error}"))),
        }
    }

    /// The bytes to store.
    fn encode_value(&self) -> Vec<u8> {
        self.encode_to_vec()
    }
}

macro_rules! records {
    ($($type:ty),*) => {
        $(impl Record for $type {
            fn format(&self) -> u32 {
                self.format
            }
        })*
    };
}

records!(
    TenantValue,
    NamespaceValue,
    TopicName,
    TopicValue,
    SubscriptionValue,
    Broker,
    Claim,
    Draining,
    Available,
    Cookie,
    ListValue
);
