//! One subscription's cursor: mark-delete, runs, properties; and the records it leaves in the cursor log (C1, C5).
//!
//! Records and snapshots use the same fields: what is applied here is what a later owner applies when it reads them.

use std::collections::BTreeMap;

use geminga_proto::{
    ids::{Offset, SubscriptionId},
    storage::v1::{Acked, CursorState},
};

use crate::{
    mark_delete::MarkDelete,
    types::{CursorView, Settlement},
};

/// A cursor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    marks: MarkDelete,
    /// Rises with each explicit reset (C2).
    reset_epoch: u64,
    properties: BTreeMap<String, String>,
}

/// Why a settlement was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CursorError {
    /// A run ends before it starts, or reaches the end of the log.
    #[error("an offset is not stored yet, or a run ends before it starts")]
    OutOfRange,
    /// More runs above mark-delete than allowed; settle the oldest messages first.
    #[error("the cursor would have more than {limit} runs")]
    TooManyRuns { limit: usize },
}

impl Cursor {
    /// A cursor that has settled everything below `next`.
    #[must_use]
    pub fn starting_at(next: Offset) -> Self {
        Self { marks: MarkDelete::new(next.0), ..Self::default() }
    }

    /// The first offset that is not settled.
    #[must_use]
    pub fn mark_delete_next(&self) -> Offset {
        Offset(self.marks.next())
    }

    /// The record of a settlement, to be applied once it is durable (C3). `end` is the first offset not confirmed.
    ///
    /// Given runs are joined first. The bound counts each as a new one, unless the settlement touches nothing above
    /// mark-delete: filling the oldest hole is always welcome.
    ///
    /// # Errors
    /// [`CursorError`].
    pub fn settle(
        &self,
        id: SubscriptionId,
        settlement: &Settlement,
        end: Offset,
        holes_max: usize,
    ) -> Result<Acked, CursorError> {
        let record =
            Acked { subscription: id.0, reset_epoch: self.reset_epoch, ..Acked::default() };
        match settlement {
            Settlement::UpTo(offset) if *offset >= end => Err(CursorError::OutOfRange),
            Settlement::UpTo(offset) => Ok(Acked { up_to: Some(offset.0), ..record }),
            Settlement::Accept(runs) => {
                if runs.iter().any(|(first, last)| first > last || *last >= end) {
                    return Err(CursorError::OutOfRange);
                }
                let mut joined = MarkDelete::new(self.marks.next());
                for (first, last) in runs {
                    joined.settle(first.0, last.0 + 1);
                }
                let beyond = joined.runs().len();
                if beyond > 0 && self.marks.runs().len() + beyond > holes_max {
                    return Err(CursorError::TooManyRuns { limit: holes_max });
                }
                let filled =
                    (joined.next() > self.marks.next()).then(|| (self.marks.next(), joined.next()));
                let ranges = filled
                    .into_iter()
                    .chain(joined.runs())
                    .flat_map(|(first, end)| [first, end - 1])
                    .collect();
                Ok(Acked { ranges, ..record })
            }
        }
    }

    /// Applies a record. One of an earlier reset epoch counts for nothing (C2); numbers that make no sense settle nothing.
    pub fn apply(&mut self, record: &Acked) {
        if record.reset_epoch != self.reset_epoch {
            return;
        }
        if let Some(up_to) = record.up_to {
            self.marks.settle_below(up_to.saturating_add(1));
        }
        for run in record.ranges.chunks_exact(2) {
            self.marks.settle(run[0], run[1].saturating_add(1));
        }
    }

    /// The one full encoding.
    #[must_use]
    pub fn encode(&self, id: SubscriptionId) -> CursorState {
        CursorState {
            subscription: id.0,
            mark_delete_next: self.marks.next(),
            acked_runs: self.marks.encode_runs(),
            reset_epoch: self.reset_epoch,
            properties: self.properties.clone().into_iter().collect(),
        }
    }

    /// Reads it back.
    #[must_use]
    pub fn decode(state: &CursorState) -> Self {
        Self {
            marks: MarkDelete::decode(state.mark_delete_next, &state.acked_runs),
            reset_epoch: state.reset_epoch,
            properties: state.properties.clone().into_iter().collect(),
        }
    }

    /// What callers see; `end` is the first offset not confirmed.
    #[must_use]
    pub fn view(&self, end: Offset) -> CursorView {
        let holes = self.marks.runs().map(|(first, end)| (Offset(first), Offset(end - 1)));
        CursorView {
            mark_delete_next: self.mark_delete_next(),
            holes: holes.collect(),
            backlog: end.0.saturating_sub(self.marks.next()).saturating_sub(self.marks.above()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: SubscriptionId = SubscriptionId(9);

    fn settlement() -> impl Strategy<Value = Settlement> {
        let run =
            (0u64..50, 0u64..5).prop_map(|(first, more)| (Offset(first), Offset(first + more)));
        prop_oneof![
            (0u64..50).prop_map(|offset| Settlement::UpTo(Offset(offset))),
            prop::collection::vec(run, 0..4).prop_map(Settlement::Accept),
        ]
    }

    proptest! {
        #[test]
        fn a_snapshot_and_later_records_give_the_state_back(
            steps in prop::collection::vec(settlement(), 0..40), snapshot_at in 0usize..40
        ) {
            let mut cursor = Cursor::starting_at(Offset(3));
            let mut restored = cursor.clone();
            for (n, step) in steps.iter().enumerate() {
                if n == snapshot_at {
                    restored = Cursor::decode(&cursor.encode(ID));
                }
                let record = cursor.settle(ID, step, Offset(60), 1000).expect("in range");
                let before = cursor.mark_delete_next();
                cursor.apply(&record);
                prop_assert!(cursor.mark_delete_next() >= before, "mark-delete fell (C2)");
                restored.apply(&record);
                prop_assert_eq!(&restored, &cursor);
            }
            let view = cursor.view(Offset(60));
            let held = |offset: u64| view.holes.iter().any(|(first, last)| first.0 <= offset && offset <= last.0);
            let open = (view.mark_delete_next.0..60).filter(|offset| !held(*offset)).count() as u64;
            prop_assert_eq!(view.backlog, open);
        }

        #[test]
        fn the_number_of_runs_stays_under_its_bound(offsets in prop::collection::vec(0u64..60, 1..40)) {
            let mut cursor = Cursor::default();
            for offset in offsets {
                let one = Settlement::Accept(vec![(Offset(offset), Offset(offset))]);
                let stuck = offset == cursor.mark_delete_next().0;
                match cursor.settle(ID, &one, Offset(60), 4) {
                    Ok(record) => cursor.apply(&record),
                    Err(error) => {
                        prop_assert_eq!(error, CursorError::TooManyRuns { limit: 4 });
                        prop_assert!(!stuck, "the oldest hole may always be filled");
                    }
                }
                prop_assert!(cursor.view(Offset(60)).holes.len() <= 4);
            }
        }
    }

    #[test]
    fn what_is_not_stored_cannot_be_settled() {
        let cursor = Cursor::default();
        let up_to = Settlement::UpTo(Offset(5));
        assert_eq!(cursor.settle(ID, &up_to, Offset(5), 10), Err(CursorError::OutOfRange));
        let runs = Settlement::Accept(vec![(Offset(2), Offset(1))]);
        assert_eq!(cursor.settle(ID, &runs, Offset(5), 10), Err(CursorError::OutOfRange));
    }

    #[test]
    fn a_record_from_before_a_reset_settles_nothing() {
        let mut cursor = Cursor { reset_epoch: 1, ..Cursor::default() };
        cursor.apply(&Acked { up_to: Some(9), reset_epoch: 0, ..Acked::default() });
        assert_eq!(cursor.mark_delete_next(), Offset(0));
    }
}
