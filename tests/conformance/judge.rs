//! What clients of one subscription saw, and whether it may be.

use std::collections::{BTreeMap, BTreeSet};

use crate::{client::Outgoing, consumer::Got};

/// What order a subscription promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    None,
    /// Of the messages of one key.
    Key,
    /// Of all messages of the segment.
    All,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Delivered {
        offset: u64,
        attempt: u32,
    },
    /// An accept is about to be sent.
    Asked(u64),
    /// And was answered with success.
    Accepted(u64),
    /// Or not at all: it may have counted.
    Unanswered(u64),
}

/// The history of one segment's subscription.
#[derive(Debug, Default)]
pub(crate) struct Judge {
    published: BTreeMap<u64, (Vec<u8>, Vec<u8>)>,
    steps: Vec<Step>,
}

impl Judge {
    /// Published in one batch, acknowledged with this first offset.
    pub(crate) fn published(&mut self, base: u64, messages: &[Outgoing]) {
        for (offset, message) in (base..).zip(messages) {
            let key = message.key.clone().unwrap_or_default();
            self.published.insert(offset, (key, message.value.clone()));
        }
    }

    /// A consumer works on it.
    ///
    /// # Panics
    /// If it is not what was published.
    pub(crate) fn delivered(&mut self, got: &Got) {
        let (key, value) = self.published.get(&got.offset).expect("only what was published comes");
        assert_eq!(&got.value[..], &value[..], "offset {} was changed", got.offset);
        assert_eq!(got.key.as_deref().unwrap_or_default(), &key[..], "offset {}", got.offset);
        self.steps.push(Step::Delivered { offset: got.offset, attempt: got.attempt });
    }

    pub(crate) fn asked(&mut self, offset: u64) {
        self.steps.push(Step::Asked(offset));
    }

    pub(crate) fn answered(&mut self, offset: u64, accepted: bool) {
        if accepted {
            self.steps.push(Step::Accepted(offset));
        }
    }

    /// The stream ended before an accept was answered.
    pub(crate) fn unanswered(&mut self, offset: u64) {
        self.steps.push(Step::Unanswered(offset));
    }

    /// Messages whose accept was confirmed.
    pub(crate) fn accepted(&self) -> BTreeSet<u64> {
        let accepted = self.steps.iter().filter_map(|step| match step {
            Step::Accepted(offset) => Some(*offset),
            _ => None,
        });
        accepted.collect()
    }

    /// What may not be, in words; empty if all is well.
    pub(crate) fn violations(&self, order: Order) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut last_attempt: BTreeMap<u64, u32> = BTreeMap::new();
        let mut accepted: BTreeSet<u64> = BTreeSet::new();
        // The highest offset whose accept was confirmed, by key.
        let mut highest: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
        // What was the highest when the accept of an offset was asked for.
        let mut when_asked: BTreeMap<u64, Option<u64>> = BTreeMap::new();
        for step in &self.steps {
            match *step {
                Step::Delivered { offset, attempt } => {
                    let last = last_attempt.insert(offset, attempt).unwrap_or(0);
                    if attempt < last.max(1) {
                        wrong.push(format!("{offset}: attempt {attempt} after {last}"));
                    }
                    if accepted.contains(&offset) {
                        wrong.push(format!("{offset} comes again after its accept was confirmed"));
                    }
                }
                Step::Asked(offset) => {
                    when_asked.insert(offset, highest.get(&self.group(offset, order)).copied());
                }
                Step::Unanswered(_) => {}
                Step::Accepted(offset) => {
                    accepted.insert(offset);
                    let before = when_asked.get(&offset).copied().flatten();
                    if order != Order::None
                        && let Some(before) = before
                        && before > offset
                    {
                        wrong.push(format!(
                            "{offset} was accepted after {before}, which is behind it in order"
                        ));
                    }
                    let highest = highest.entry(self.group(offset, order)).or_default();
                    *highest = (*highest).max(offset);
                }
            }
        }
        wrong
    }

    /// As [`Self::violations`], and whatever was not accepted.
    pub(crate) fn unfinished(&self, order: Order) -> Vec<String> {
        let mut wrong = self.violations(order);
        let mut settled = self.accepted();
        settled.extend(self.steps.iter().filter_map(|step| match step {
            Step::Unanswered(offset) => Some(*offset),
            _ => None,
        }));
        let lost = self.published.keys().filter(|offset| !settled.contains(offset));
        wrong.extend(lost.map(|offset| format!("{offset} was acknowledged and never accepted")));
        wrong
    }

    fn group(&self, offset: u64, order: Order) -> Vec<u8> {
        match order {
            Order::Key => self.published.get(&offset).map(|(key, _)| key.clone()),
            Order::None | Order::All => None,
        }
        .unwrap_or_default()
    }
}

mod tests {
    use super::*;

    fn judge(steps: &[Step]) -> Judge {
        let messages: Vec<Outgoing> =
            ["a", "b", "a", "b"].iter().map(|key| Outgoing::new("v").key(key)).collect();
        let mut judge = Judge { steps: steps.to_vec(), ..Judge::default() };
        judge.published(0, &messages);
        judge
    }

    fn first(offset: u64) -> Step {
        Step::Delivered { offset, attempt: 1 }
    }

    #[test]
    fn the_judge_sees_each_kind_of_wrong() {
        use Step::{Accepted, Asked};
        let done = |offset| [first(offset), Asked(offset), Accepted(offset)];
        let in_order: Vec<Step> = (0..4).flat_map(done).collect();
        assert_eq!(judge(&in_order).unfinished(Order::All), Vec::<String>::new());
        let by_key: Vec<Step> = [1, 0, 2, 3].into_iter().flat_map(done).collect();
        assert_eq!(judge(&by_key).unfinished(Order::Key), Vec::<String>::new());
        let found = |steps: &[Step], order| judge(steps).unfinished(order).join("; ");
        assert!(found(&by_key, Order::All).contains("0 was accepted after 1"));
        let late: Vec<Step> = [2, 0, 1, 3].into_iter().flat_map(done).collect();
        assert!(found(&late, Order::Key).contains("0 was accepted after 2"));
        assert!(found(&in_order[..9], Order::All).contains("3 was acknowledged and never"));
        // Asked for before the other was confirmed: nobody can tell which was first.
        let crossed = [Asked(0), Asked(2), Accepted(2), Accepted(0)];
        assert_eq!(judge(&crossed).violations(Order::Key), Vec::<String>::new());
        let again = [first(0), Asked(0), Accepted(0), first(0)];
        assert!(found(&again, Order::None).contains("comes again"));
        let falls = [Step::Delivered { offset: 0, attempt: 2 }, first(0)];
        assert!(found(&falls, Order::None).contains("attempt 1 after 2"));
    }
}
