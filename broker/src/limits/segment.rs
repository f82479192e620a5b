//! The limits of one segment.

use super::{Rate, Rates};
use crate::catalog::{Limit, SetPolicies};

/// What its topic's policies limit on a segment. The default limits nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SegmentLimits {
    pub(crate) publish: Rates,
    /// Of each subscription, and of each reader.
    pub(crate) deliver: Rates,
    pub(crate) producers_max: Option<Limit>,
    /// Of each subscription.
    pub(crate) consumers_max: Option<Limit>,
}

/// The share of one segment in what is set for its topic.
pub(crate) fn limits_of(set: &SetPolicies) -> SegmentLimits {
    let share = |per_s: Option<u64>| Some(Rate { per_s: per_s?, parts: set.segments.max(1) });
    let policies = &set.policies;
    SegmentLimits {
        publish: Rates {
            messages: share(policies.publish_messages_per_s),
            bytes: share(policies.publish_bytes_per_s),
        },
        deliver: Rates {
            messages: share(policies.deliver_messages_per_s),
            bytes: share(policies.deliver_bytes_per_s),
        },
        producers_max: set.limit("producers_max"),
        consumers_max: set.limit("consumers_max"),
    }
}

#[cfg(test)]
mod tests {
    use geminga_proto::v1::Policies;

    use super::*;

    #[test]
    fn rates_are_shared_by_the_segments_and_counts_are_not() {
        let policies = Policies {
            publish_messages_per_s: Some(100),
            deliver_bytes_per_s: Some(7),
            producers_max: Some(3),
            ..Policies::default()
        };
        let sources = vec![("producers_max", "tenant")];
        let limits = limits_of(&SetPolicies { policies, sources, segments: 4 });
        assert_eq!(limits.publish.messages, Some(Rate { per_s: 100, parts: 4 }));
        assert_eq!(limits.deliver.bytes, Some(Rate { per_s: 7, parts: 4 }));
        assert_eq!((limits.publish.bytes, limits.deliver.messages), (None, None));
        assert_eq!(limits.producers_max, Some(Limit { most: 3, level: "tenant" }));
        assert_eq!(limits_of(&SetPolicies::default()), SegmentLimits::default());
    }
}
