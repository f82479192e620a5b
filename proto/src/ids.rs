//! Newtypes for every number that names something.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl From<$inner> for $name {
            fn from(value: $inner) -> Self {
                Self(value)
            }
        }
    };
}

id!(
    /// A replicated ledger. 8 bits of cluster generation, 56 of counter; never reused.
    LedgerId(u64)
);
id!(
    /// An entry of a ledger, dense from 0.
    EntryId(u64)
);
id!(
    /// One formatting of a bookie's disks, interned as a number at cookie creation; 0 is never used (it encodes a vacant
    /// slot). 8 bits of generation, 24 of counter. An empty bookie behind an old address is another incarnation.
    Incarnation(u32)
);
id!(
    /// A topic; never reused, not even for the same name.
    TopicId(u64)
);
id!(
    /// A subscription; never reused.
    SubscriptionId(u64)
);
id!(
    /// A position in a segment: dense, assigned at append.
    Offset(u64)
);
id!(
    /// An ownership epoch of a segment (O2); grows with every takeover.
    Epoch(u64)
);
id!(
    /// A hash range over segments, the unit of ownership claims.
    Bundle(u32)
);

/// Index of a holder in an ensemble.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub usize);

impl EntryId {
    /// The entry after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl Offset {
    /// The offset `count` further on.
    #[must_use]
    pub fn advance(self, count: u64) -> Self {
        Self(self.0 + count)
    }
}

/// A segment of a topic: a key range, one managed ledger, the unit of order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentId {
    /// The topic.
    pub topic: TopicId,
    /// Number within the topic, from 0.
    pub segment: u32,
}

impl SegmentId {
    /// The bundle that this segment falls into, of `bundles` (section 11).
    #[must_use]
    pub fn bundle(self, bundles: u32) -> Bundle {
        let mut bytes = [0u8; 12];
        bytes[..8].copy_from_slice(&self.topic.0.to_le_bytes());
        bytes[8..].copy_from_slice(&self.segment.to_le_bytes());
        Bundle(crate::key_hash::key_hash(&bytes) % bundles.max(1))
    }
}

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.topic, self.segment)
    }
}

/// The bits of an id that carry the cluster generation (section 2).
#[must_use]
pub fn generation_base_64(generation: u8) -> u64 {
    u64::from(generation) << 56
}

/// As [`generation_base_64`], for incarnation numbers.
#[must_use]
pub fn generation_base_32(generation: u8) -> u32 {
    u32::from(generation) << 24
}
