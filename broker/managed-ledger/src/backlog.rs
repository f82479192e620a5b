//! How much of a segment a subscription has not settled yet: messages exactly; bytes and age by the counts of ledgers. Pure.

use geminga_proto::ids::Offset;

use crate::list::{Counts, List};

/// What lies from an offset to the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    pub messages: u64,
    /// Payload bytes; inside a ledger as if its messages were of equal size.
    pub bytes: u64,
    /// When the oldest of these messages was published; inside a ledger as if they had come evenly. None without messages.
    pub oldest_publish_ms: Option<u64>,
}

/// From `from` to the end; `open` counts what is confirmed in the open ledger.
pub(crate) fn estimate(list: &List, open: &Counts, from: Offset) -> Backlog {
    let mut backlog = Backlog::default();
    for listed in &list.data {
        let counts = if listed.is_open() { open } else { &listed.counts };
        let end = listed.base_offset.advance(counts.records);
        if counts.records == 0 || end <= from {
            continue;
        }
        let left = end.0 - from.0.max(listed.base_offset.0);
        let share = |of: u64, part: u64| {
            u64::try_from(u128::from(of) * u128::from(part) / u128::from(counts.records))
                .unwrap_or(u64::MAX)
        };
        backlog.messages += left;
        backlog.bytes += share(counts.bytes, left);
        let spread = counts.last_publish_ms.saturating_sub(counts.first_publish_ms);
        let began = counts.first_publish_ms + share(spread, counts.records - left);
        backlog.oldest_publish_ms.get_or_insert(began);
    }
    backlog
}

#[cfg(test)]
mod tests {
    use geminga_proto::ids::LedgerId;

    use super::*;
    use crate::list::Log;

    fn counts(records: u64, first: u64, last: u64) -> Counts {
        Counts {
            entries: records,
            records,
            bytes: records * 100,
            first_publish_ms: first,
            last_publish_ms: last,
        }
    }

    #[test]
    fn a_backlog_is_what_lies_behind_the_offset_in_closed_and_open_ledgers() {
        let mut list = List::empty();
        for (id, counts) in [(1, counts(10, 1_000, 2_000)), (2, counts(10, 3_000, 4_000))] {
            list.open(Log::Data, LedgerId(id)).expect("room");
            list.close(LedgerId(id), counts);
        }
        list.open(Log::Data, LedgerId(3)).expect("room");
        let open = counts(4, 5_000, 6_000);
        let at = |offset| estimate(&list, &open, Offset(offset));
        let all = Backlog { messages: 24, bytes: 2_400, oldest_publish_ms: Some(1_000) };
        assert_eq!(at(0), all);
        assert_eq!(at(15), Backlog { messages: 9, bytes: 900, oldest_publish_ms: Some(3_500) });
        assert_eq!(at(22), Backlog { messages: 2, bytes: 200, oldest_publish_ms: Some(5_500) });
        assert_eq!(at(24), Backlog::default());
    }
}
