//! What a segment's policy says about messages that wait too long or are too many. Pure: backlog, policy and time in, a
//! judgement out.

use geminga_proto::ids::Offset;

use crate::{
    backlog::Backlog,
    list::{Counts, List},
    offload::{BacklogAction, TierPolicy},
};

/// Which bound a backlog exceeds, if any.
pub(crate) fn is_over(policy: &TierPolicy, backlog: &Backlog, now_ms: u64) -> bool {
    let age_ms = backlog.oldest_publish_ms.map_or(0, |at| now_ms.saturating_sub(at));
    policy.backlog_quota_bytes.is_some_and(|most| backlog.bytes > most)
        || policy.backlog_quota_ms.is_some_and(|most| age_ms > most)
}

/// Whatever was published before this moment counts as settled: by the time to live, and where the oldest are evicted by the
/// age that a backlog may have. None: nothing does.
pub(crate) fn expires_before(policy: &TierPolicy, now_ms: u64) -> Option<u64> {
    let evicted =
        policy.backlog_quota_ms.filter(|_| policy.backlog_action == BacklogAction::EvictOldest);
    let most = [policy.ttl_ms, evicted].into_iter().flatten().min()?;
    Some(now_ms.saturating_sub(most))
}

/// Whether the message at `slowest`, or one after it, may have been published before `cutoff_ms`, as far as the list tells.
pub(crate) fn may_have_expired(
    list: &List,
    open: &Counts,
    slowest: Offset,
    cutoff_ms: u64,
) -> bool {
    list.data.iter().any(|listed| {
        let counts = if listed.is_open() { open } else { &listed.counts };
        let end = listed.base_offset.advance(counts.records);
        end > slowest && counts.records > 0 && counts.first_publish_ms < cutoff_ms
    })
}

/// Where the last `bytes_max` bytes begin: what lies before is evicted. Inside a ledger as if its messages were of equal size.
pub(crate) fn evict_below(list: &List, open: &Counts, bytes_max: u64) -> Offset {
    let mut left = bytes_max;
    let mut below = list.first_offset;
    for listed in list.data.iter().rev() {
        let counts = if listed.is_open() { open } else { &listed.counts };
        below = listed.base_offset;
        if counts.bytes > left {
            // As many messages as fit, rounded down.
            let kept = u128::from(counts.records) * u128::from(left) / u128::from(counts.bytes);
            let kept = u64::try_from(kept).unwrap_or(0);
            return listed.base_offset.advance(counts.records - kept.min(counts.records));
        }
        left -= counts.bytes;
    }
    below
}

#[cfg(test)]
mod tests {
    use geminga_proto::ids::LedgerId;
    use proptest::prelude::*;

    use super::*;
    use crate::{backlog, list::Log};

    fn list(ledgers: &[(u64, u64)], open: bool) -> (List, Counts) {
        let mut list = List::empty();
        let mut at = 1_000;
        let mut last = Counts::default();
        for (n, (records, size)) in ledgers.iter().enumerate() {
            let id = LedgerId(n as u64 + 1);
            list.open(Log::Data, id).expect("room");
            let (records, bytes) = (*records, records * size);
            let counts = Counts {
                entries: records,
                records,
                bytes,
                first_publish_ms: at,
                last_publish_ms: at + 9,
            };
            at += 10;
            if open && n + 1 == ledgers.len() {
                last = counts;
            } else {
                list.close(id, counts);
            }
        }
        (list, last)
    }

    proptest! {
        #[test]
        fn what_is_kept_fits_and_one_message_more_would_not(
            ledgers in prop::collection::vec((0u64..9, 1u64..20), 0..12),
            open: bool,
            most in 0u64..400,
        ) {
            let (list, open) = list(&ledgers, open);
            let below = evict_below(&list, &open, most);
            let kept = |from: Offset| backlog::estimate(&list, &open, from).bytes;
            prop_assert!(kept(below) <= most, "{below:?}");
            if below > list.first_offset {
                prop_assert!(kept(Offset(below.0 - 1)) > most, "{below:?} is too far");
            }
            let policy = TierPolicy { backlog_quota_bytes: Some(most), ..TierPolicy::default() };
            let over = is_over(&policy, &backlog::estimate(&list, &open, list.first_offset), 5_000);
            prop_assert_eq!(over, below > list.first_offset);
        }
    }

    #[test]
    fn age_expires_by_the_time_to_live_and_by_eviction_and_by_nothing_else() {
        let none = TierPolicy::default();
        assert_eq!(expires_before(&none, 900), None);
        let ttl = TierPolicy { ttl_ms: Some(100), ..none.clone() };
        assert_eq!(expires_before(&ttl, 900), Some(800));
        assert_eq!(expires_before(&ttl, 50), Some(0), "a clock that is new");
        let quota = |action| TierPolicy {
            backlog_quota_ms: Some(40),
            backlog_action: action,
            ..ttl.clone()
        };
        assert_eq!(expires_before(&quota(BacklogAction::EvictOldest), 900), Some(860));
        for action in [BacklogAction::Reject, BacklogAction::Hold] {
            assert_eq!(expires_before(&quota(action), 900), Some(800), "it only holds producers");
            let old = Backlog { messages: 1, bytes: 1, oldest_publish_ms: Some(859) };
            assert!(is_over(&quota(action), &old, 900));
            assert!(!is_over(
                &quota(action),
                &Backlog { oldest_publish_ms: Some(860), ..old },
                900
            ));
            assert!(!is_over(&quota(action), &Backlog::default(), 900), "nothing waits");
        }
        let (list, open) = list(&[(2, 1), (2, 1), (2, 1)], true);
        assert!(!may_have_expired(&list, &open, Offset(0), 1_000));
        assert!(may_have_expired(&list, &open, Offset(0), 1_001));
        assert!(!may_have_expired(&list, &open, Offset(2), 1_010), "settled");
        assert!(may_have_expired(&list, &open, Offset(5), 1_021), "in the open ledger");
        assert!(!may_have_expired(&list, &open, Offset(6), 9_000));
    }
}
