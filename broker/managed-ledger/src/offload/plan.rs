//! What to do next about a segment's old ledgers. Pure: list, policy and time in, steps out.

use std::collections::BTreeSet;

use geminga_proto::ids::{LedgerId, Offset};

use super::{Stage, TierPolicy};
use crate::{
    list::{List, Listed, ListedState},
    takeover::LEDGERS_PER_TXN,
};

/// What is known when steps are planned.
#[derive(Clone, Debug)]
pub(crate) struct Situation<'a> {
    pub(crate) list: &'a List,
    pub(crate) now_ms: u64,
    /// None: nothing was decided, so nothing goes.
    pub(crate) policy: Option<&'a TierPolicy>,
    /// The first offset that some subscription, or one about to open, has not settled; none without subscriptions.
    pub(crate) slowest: Option<Offset>,
    /// A load replays from here (DD2).
    pub(crate) dedup_next: Offset,
    /// A compaction reads from the horizon on.
    pub(crate) compacting: bool,
    /// In the open ledger.
    pub(crate) open_bytes: u64,
    /// Uploaded whatever the policy says.
    pub(crate) forced: &'a BTreeSet<LedgerId>,
}

/// Steps that may be taken, in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// So many ledgers from the front leave the list (M3).
    pub(crate) trim: usize,
    /// Ledgers leave bookies (X3).
    pub(crate) delete: Vec<LedgerId>,
    /// The ledger to upload next (X1).
    pub(crate) upload: Option<LedgerId>,
}

/// The next steps.
pub(crate) fn plan(situation: &Situation<'_>) -> Plan {
    let trim = trim(situation);
    let kept = &situation.list.data[trim..];
    Plan { trim, delete: delete(situation, kept), upload: upload(situation, kept) }
}

/// M3: a contiguous prefix, never the last ledger, never past a cursor or the deduplication snapshot; nor past the compaction
/// horizon, where a policy wants everything compacted first or a compaction runs.
fn trim(situation: &Situation<'_>) -> usize {
    let Situation { list, policy: Some(policy), .. } = situation else { return 0 };
    let retention = policy.retention_ms.is_some() || policy.retention_bytes.is_some();
    let settled = match situation.slowest {
        Some(slowest) => slowest.min(situation.dedup_next),
        None if retention => situation.dedup_next,
        None => return 0,
    };
    let settled = match policy.compact_after_bytes.is_some() || situation.compacting {
        true => settled.min(list.compacted_to),
        false => settled,
    };
    let all: u64 = list.data.iter().map(|listed| listed.counts.bytes).sum();
    let mut after = all + situation.open_bytes;
    let mut count = 0;
    for listed in list.data.iter().take(list.data.len().saturating_sub(1)).take(LEDGERS_PER_TXN) {
        if listed.state != ListedState::Closed || listed.end() > settled {
            break;
        }
        after -= listed.counts.bytes;
        let too_old = policy.retention_ms.is_some_and(|most| age_ms(situation, listed) >= most);
        let too_much = policy.retention_bytes.is_some_and(|most| after >= most);
        if retention && !too_old && !too_much {
            break;
        }
        count += 1;
    }
    count
}

/// X3: what was uploaded the lag ago, and only that.
fn delete(situation: &Situation<'_>, kept: &[Listed]) -> Vec<LedgerId> {
    let Some(policy) = situation.policy else { return Vec::new() };
    let lag_ms = policy.delete_lag.as_millis() as u64;
    let over = |listed: &&Listed| {
        listed.offload.as_ref().is_some_and(|offload| {
            offload.stage == Stage::Uploaded
                && situation.now_ms >= offload.at_ms.saturating_add(lag_ms)
        })
    };
    kept.iter().filter(over).map(|listed| listed.id).take(LEDGERS_PER_TXN).collect()
}

/// X1: the oldest closed ledger that should be in cold storage and is not.
fn upload(situation: &Situation<'_>, kept: &[Listed]) -> Option<LedgerId> {
    let waits = |listed: &&Listed| {
        listed.state == ListedState::Closed
            && listed.counts.entries > 0
            && listed.stage() <= Some(Stage::Uploading)
    };
    let bookies_alone: u64 = kept.iter().filter(waits).map(|listed| listed.counts.bytes).sum();
    let by_policy = |listed: &&Listed| {
        situation.policy.is_some_and(|policy| {
            let after = policy.offload_after.map(|after| after.as_millis() as u64);
            listed.stage() == Some(Stage::Uploading)
                || after.is_some_and(|after| age_ms(situation, listed) >= after)
                || policy.offload_above_bytes.is_some_and(|most| bookies_alone > most)
        })
    };
    // What somebody waits for goes first: a ledger that fails again and again must not stand before it.
    let mut waiting = kept.iter().filter(waits);
    let forced = waiting.clone().find(|listed| situation.forced.contains(&listed.id));
    forced.or_else(|| waiting.find(by_policy)).map(|listed| listed.id)
}

fn age_ms(situation: &Situation<'_>, listed: &Listed) -> u64 {
    situation.now_ms.saturating_sub(listed.counts.last_publish_ms)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use geminga_proto::ids::EntryId;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        list::{Counts, Log},
        offload::Object,
    };

    #[derive(Clone, Debug)]
    struct Ledger {
        records: u64,
        bytes: u64,
        at_ms: u64,
        stage: u8,
        since_ms: u64,
    }

    fn ledger() -> impl Strategy<Value = Ledger> {
        (0u64..5, 1u64..100, 0u64..1_000, 0u8..4, 0u64..1_000).prop_map(
            |(records, bytes, at_ms, stage, since_ms)| {
                let bytes = if records == 0 { 0 } else { bytes };
                Ledger { records, bytes, at_ms, stage, since_ms }
            },
        )
    }

    fn list(ledgers: &[Ledger], open: bool) -> List {
        let mut list = List::empty();
        for (n, one) in ledgers.iter().enumerate() {
            let id = LedgerId(n as u64 + 1);
            list.open(Log::Data, id).expect("room");
            let counts = Counts {
                entries: one.records,
                records: one.records,
                bytes: one.bytes,
                first_publish_ms: one.at_ms,
                last_publish_ms: one.at_ms,
            };
            list.close(id, counts);
            if one.stage > 0 && one.records > 0 {
                list.begin_upload(id, [9; 16], one.since_ms, 1).expect("closed");
            }
            if one.stage > 1 && one.records > 0 {
                let entries = one.records;
                let object = Object { bytes: 1, crc32c: 1, first_entry: EntryId(0), entries };
                list.uploaded(id, [9; 16], one.since_ms, &[object]).expect("uploading");
            }
            if one.stage > 2 {
                list.ledgers_deleted(&[id], one.since_ms);
            }
        }
        if open {
            list.open(Log::Data, LedgerId(1_000)).expect("room");
        }
        list
    }

    fn policy() -> impl Strategy<Value = Option<TierPolicy>> {
        let some = (
            prop::option::of(0u64..1_000),
            prop::option::of(0u64..500),
            0u64..1_000,
            prop::option::of(0u64..1_000),
            prop::option::of(0u64..500),
            prop::option::of(0u64..500),
        );
        prop::option::of(some.prop_map(|(after, above, lag, ms, bytes, compact)| TierPolicy {
            offload_after: after.map(Duration::from_millis),
            offload_above_bytes: above,
            delete_lag: Duration::from_millis(lag),
            retention_ms: ms,
            retention_bytes: bytes,
            compact_after_bytes: compact,
            ..TierPolicy::default()
        }))
    }

    proptest! {
        #[test]
        fn nothing_needed_is_ever_planned_away(
            ledgers in prop::collection::vec(ledger(), 0..80),
            open: bool,
            policy in policy(),
            slowest in prop::option::of(0u64..150),
            dedup_next in 0u64..150,
            now_ms in 0u64..2_000,
            open_bytes in 0u64..50,
            compacting: bool,
            compacted_to in 0u64..150,
        ) {
            let mut list = list(&ledgers, open);
            list.compacted_to = Offset(compacted_to);
            let forced = BTreeSet::from([LedgerId(3)]);
            let situation = Situation {
                list: &list,
                now_ms,
                policy: policy.as_ref(),
                slowest: slowest.map(Offset),
                dedup_next: Offset(dedup_next),
                compacting,
                open_bytes,
                forced: &forced,
            };
            let plan = plan(&situation);
            prop_assert!(plan.trim <= 50 && plan.trim <= list.data.len().saturating_sub(1));
            let retention = policy.as_ref().is_some_and(|p| p.retention_ms.is_some() || p.retention_bytes.is_some());
            for (n, gone) in list.data[..plan.trim].iter().enumerate() {
                prop_assert_eq!(gone.state, ListedState::Closed);
                prop_assert!(gone.end() <= Offset(dedup_next), "past the deduplication snapshot");
                prop_assert!(slowest.is_none_or(|slowest| gone.end() <= Offset(slowest)), "past a cursor");
                prop_assert!(slowest.is_some() || retention, "nobody asked for it");
                let held = compacting || policy.as_ref().is_some_and(|p| p.compact_after_bytes.is_some());
                prop_assert!(!held || gone.end() <= Offset(compacted_to), "before it was compacted");
                let policy = policy.as_ref().expect("without a policy nothing goes");
                let bytes: u64 = list.data[n + 1..].iter().map(|l| l.counts.bytes).sum::<u64>() + open_bytes;
                let old = policy.retention_ms.is_some_and(|ms| now_ms.saturating_sub(gone.counts.last_publish_ms) >= ms);
                let much = policy.retention_bytes.is_some_and(|most| bytes >= most);
                prop_assert!(!retention || old || much, "retention keeps it");
            }
            for id in &plan.delete {
                let listed = list.data[plan.trim..].iter().find(|l| l.id == *id).expect("listed and kept");
                let offload = listed.offload.as_ref().expect("uploaded");
                prop_assert_eq!(offload.stage, Stage::Uploaded);
                let lag = policy.as_ref().expect("a policy").delete_lag.as_millis() as u64;
                prop_assert!(offload.at_ms + lag <= now_ms, "X3");
            }
            if let Some(id) = plan.upload {
                let listed = list.data[plan.trim..].iter().find(|l| l.id == id).expect("listed and kept");
                prop_assert!(listed.state == ListedState::Closed && listed.stage() <= Some(Stage::Uploading), "X1");
                prop_assert!(policy.is_some() || forced.contains(&id));
            }
            // What was forced and waits is not forgotten.
            let waits = list.data[plan.trim..].iter().any(|l| forced.contains(&l.id) && l.counts.entries > 0 && l.stage() <= Some(Stage::Uploading));
            prop_assert!(!waits || plan.upload.is_some());
        }
    }

    #[test]
    fn settled_ledgers_go_and_those_within_retention_stay() {
        let one = |at_ms| Ledger { records: 2, bytes: 10, at_ms, stage: 0, since_ms: 0 };
        let list = list(&[one(0), one(500), one(900)], true);
        let forced = BTreeSet::new();
        let trimmed = |policy: &TierPolicy, slowest: Option<u64>| {
            let situation = Situation {
                list: &list,
                now_ms: 1_000,
                policy: Some(policy),
                slowest: slowest.map(Offset),
                dedup_next: Offset(6),
                compacting: false,
                open_bytes: 0,
                forced: &forced,
            };
            plan(&situation).trim
        };
        let none = TierPolicy::default();
        assert_eq!(trimmed(&none, Some(5)), 2, "the third is not settled");
        assert_eq!(trimmed(&none, None), 0, "nobody has read it");
        let time = TierPolicy { retention_ms: Some(600), ..TierPolicy::default() };
        assert_eq!((trimmed(&time, Some(6)), trimmed(&time, None)), (1, 1));
        let size = TierPolicy { retention_bytes: Some(20), ..TierPolicy::default() };
        assert_eq!(trimmed(&size, Some(6)), 1, "20 bytes are kept");
        let zero = TierPolicy { retention_ms: Some(0), ..TierPolicy::default() };
        assert_eq!(trimmed(&zero, None), 3, "said so");
    }

    #[test]
    fn old_ledgers_go_to_cold_storage_oldest_first_and_an_upload_that_did_not_end_goes_on() {
        let one = |at_ms, stage| Ledger { records: 2, bytes: 10, at_ms, stage, since_ms: 0 };
        let list = list(&[one(0, 2), one(500, 0), one(900, 1), one(950, 0)], true);
        let forced = BTreeSet::new();
        let next = |policy: &TierPolicy| {
            let situation = Situation {
                list: &list,
                now_ms: 1_000,
                policy: Some(policy),
                slowest: None,
                dedup_next: Offset(0),
                compacting: false,
                open_bytes: 0,
                forced: &forced,
            };
            plan(&situation).upload.map(|id| id.0)
        };
        let after = |ms| TierPolicy {
            offload_after: Some(Duration::from_millis(ms)),
            ..TierPolicy::default()
        };
        assert_eq!(next(&after(400)), Some(2));
        assert_eq!(next(&after(800)), Some(3), "its upload had begun");
        let above = |most| TierPolicy { offload_above_bytes: Some(most), ..TierPolicy::default() };
        assert_eq!((next(&above(20)), next(&above(30))), (Some(2), Some(3)));
    }
}
