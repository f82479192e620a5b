//! The fields of [`Policies`] as a table: their names on the wire and on the command line, and their bounds.

use crate::v1::{BacklogAction, Policies};

/// Ten years, milliseconds: a longer time is a mistake of units.
const TIME_MAX_MS: u64 = 10 * 366 * 24 * 3_600 * 1_000;
/// 1 EiB.
const BYTES_MAX: u64 = 1 << 60;
/// Messages, or things, of any kind.
const COUNT_MAX: u64 = 1_000_000_000_000;

/// A field of [`Policies`].
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// As requests and answers name it.
    pub name: &'static str,
    /// The largest value that is accepted.
    pub value_max: u64,
    /// Its value, if it is set; of one that is no number, its number on the wire.
    pub get: fn(&Policies) -> Option<u64>,
    /// Sets it, or takes it from the level above.
    pub set: fn(&mut Policies, Option<u64>),
}

macro_rules! fields {
    ($($name:ident <= $max:expr;)*) => {
        /// Every field.
        pub const FIELDS: &[Field] = &[
            $(Field {
                name: stringify!($name),
                value_max: $max,
                get: |policies| policies.$name,
                set: |policies, value| policies.$name = value,
            },)*
            Field {
                name: "backlog_action",
                value_max: BacklogAction::EvictOldest as u64,
                get: |policies| policies.backlog_action.map(|action| u64::from(action.unsigned_abs())),
                set: |policies, value| policies.backlog_action = value.and_then(|v| i32::try_from(v).ok()),
            },
        ];
    };
}

fields! {
    offload_after_ms       <= TIME_MAX_MS;
    offload_above_bytes    <= BYTES_MAX;
    delete_lag_ms          <= TIME_MAX_MS;
    retention_ms           <= TIME_MAX_MS;
    retention_bytes        <= BYTES_MAX;
    ttl_ms                 <= TIME_MAX_MS;
    backlog_quota_bytes    <= BYTES_MAX;
    backlog_quota_ms       <= TIME_MAX_MS;
    publish_messages_per_s <= COUNT_MAX;
    publish_bytes_per_s    <= BYTES_MAX;
    deliver_messages_per_s <= COUNT_MAX;
    deliver_bytes_per_s    <= BYTES_MAX;
    producers_max          <= COUNT_MAX;
    consumers_max          <= COUNT_MAX;
    subscriptions_max      <= COUNT_MAX;
    topics_max             <= COUNT_MAX;
    compact_after_bytes    <= BYTES_MAX;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_is_read_back_as_it_was_set_and_no_two_share_a_place() {
        let mut policies = Policies::default();
        for (n, field) in (1..).zip(FIELDS) {
            (field.set)(&mut policies, Some(n));
        }
        for (n, field) in (1..).zip(FIELDS) {
            assert_eq!((field.get)(&policies), Some(n), "{}", field.name);
        }
        // One that were missing here would be set by nobody.
        let text = format!("{policies:?}");
        assert!(!text.contains("None"), "{text}");
    }
}
