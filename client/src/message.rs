//! What an application sends and gets back.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use geminga_proto::{
    names::{NameError, NamespaceName, TopicName},
    v1::DurabilityLevel,
};
use geminga_runtime::clock::{Clock, SystemClock};

/// A message to publish.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// Places the message: equal keys go to one segment and keep their order.
    pub key: Option<Bytes>,
    /// The payload.
    pub value: Bytes,
    /// Application headers; `traceparent` and `tracestate` carry W3C trace context.
    pub headers: BTreeMap<String, String>,
    /// Set by the application; milliseconds since the Unix epoch.
    pub event_time_ms: Option<u64>,
    /// Shared and key-shared subscriptions do not get it before this time; milliseconds since the Unix epoch. Exclusive
    /// and failover subscriptions, which promise order, get it in its turn.
    pub deliver_at_ms: Option<u64>,
}

impl Message {
    /// A message without a key.
    #[must_use]
    pub fn new(value: impl Into<Bytes>) -> Self {
        Self { value: value.into(), ..Self::default() }
    }

    /// Sets the key.
    #[must_use]
    pub fn with_key(mut self, key: impl Into<Bytes>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Adds a header, or replaces it.
    #[must_use]
    pub fn with_header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.insert(name.into(), value.into());
        self
    }

    /// Delivers it to shared and key-shared subscriptions at this time, milliseconds since the Unix epoch, and not before.
    #[must_use]
    pub fn with_deliver_at_ms(mut self, time: u64) -> Self {
        self.deliver_at_ms = Some(time);
        self
    }

    /// As [`Self::with_deliver_at_ms`], so long after now by this machine's clock.
    #[must_use]
    pub fn with_delay(self, delay: Duration) -> Self {
        let delay = u64::try_from(delay.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX);
        self.with_deliver_at_ms(SystemClock.now().0.saturating_add(delay))
    }

    /// Bytes of key, value and headers. The message limit counts a few more: what frames them.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let headers: usize =
            self.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
        self.key.as_ref().map_or(0, Bytes::len) + self.value.len() + headers
    }
}

/// A position in a topic: offsets are dense per segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageId {
    /// The segment.
    pub segment: u32,
    /// The place in the segment, from 0.
    pub offset: u64,
}

impl std::fmt::Display for MessageId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.segment, self.offset)
    }
}

/// A message as it is stored: read without a subscription.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Where it lies.
    pub id: MessageId,
    /// What placed it.
    pub key: Option<Bytes>,
    /// The payload.
    pub value: Bytes,
    /// Application headers, by name.
    pub headers: BTreeMap<String, String>,
    /// Set by the producer; milliseconds since the Unix epoch.
    pub event_time_ms: Option<u64>,
    /// When the server took it; milliseconds since the Unix epoch.
    pub publish_time_ms: u64,
    /// Who published it.
    pub producer: Arc<str>,
}

/// What a receipt promises about the stored copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// One synced copy; standalone with a single bookie only.
    OneCopy,
    /// Synced on at least the ack quorum, two or more distinct bookies.
    Quorum,
    /// Not told: the server answered on resume that the message is stored, without its level.
    Unknown,
}

impl Level {
    /// `one copy`, `quorum` or `unknown`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::OneCopy => "one copy",
            Self::Quorum => "quorum",
            Self::Unknown => "unknown",
        }
    }

    pub(crate) fn of(level: DurabilityLevel) -> Self {
        match level {
            DurabilityLevel::OneCopy => Self::OneCopy,
            DurabilityLevel::Quorum => Self::Quorum,
            DurabilityLevel::Unspecified => Self::Unknown,
        }
    }
}

/// The message is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// The segment it went to.
    pub segment: u32,
    /// Where it lies. None where the server remembers only that it is stored (after a resume, or of a duplicate).
    pub id: Option<MessageId>,
    /// How safe it is.
    pub level: Level,
    /// The ownership epoch it was written under; 0 where that is not told.
    pub epoch: u64,
    /// The server had stored it before this answer was asked for: a retry met its first attempt.
    pub duplicate: bool,
}

/// Parses `tenant/namespace/topic`, or a bare `topic` of `public/default`.
///
/// # Errors
/// [`NameError`] for anything else.
pub fn topic_name(text: &str) -> Result<TopicName, NameError> {
    if text.contains('/') {
        TopicName::parse(text)
    } else {
        TopicName::parse(&format!("public/default/{text}"))
    }
}

/// Parses `tenant/namespace`, or a bare `namespace` of `public`.
///
/// # Errors
/// [`NameError`] for anything else.
pub fn namespace_name(text: &str) -> Result<NamespaceName, NameError> {
    if text.contains('/') {
        NamespaceName::parse(text)
    } else {
        NamespaceName::parse(&format!("public/{text}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_topic_lives_in_public_default() {
        assert_eq!(topic_name("orders").expect("valid").to_string(), "public/default/orders");
        assert_eq!(topic_name("a/b/c").expect("valid").to_string(), "a/b/c");
        for bad in ["", "..", "a/b", "a/b/c/d", "a b", "/orders"] {
            assert!(topic_name(bad).is_err(), "{bad:?}");
        }
        assert_eq!(namespace_name("default").expect("valid").to_string(), "public/default");
    }

    #[test]
    fn the_size_of_a_message_is_key_value_and_headers() {
        assert_eq!(Message::new("four").with_key("ab").with_header("x", "yz").bytes(), 9);
    }
}
