//! Whether what came back is what was sent. Pure.

use std::{collections::BTreeMap, fmt};

/// Segment and offset.
pub(super) type Place = (u32, u64);

/// Knows what was sent, and counts what comes.
#[derive(Debug, Default)]
pub(super) struct Judge {
    messages: Vec<Sent>,
    /// By segment, the offset behind the last one that must be handed out.
    ends: BTreeMap<u32, u64>,
    /// By segment, the offset behind the last one that was handed out.
    reached: BTreeMap<u32, u64>,
    changed: usize,
}

#[derive(Debug)]
struct Sent {
    /// As its receipt says.
    place: Option<Place>,
    times: u32,
    misplaced: bool,
}

/// What is wrong, in messages; all zero is the proof.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) sent: usize,
    /// Not handed out so far.
    pub(super) missing: usize,
    /// Of those, the ones behind which later messages were handed out.
    pub(super) lost: usize,
    pub(super) repeated: usize,
    /// Handed out with other bytes than were sent.
    pub(super) changed: usize,
    /// Handed out at another place than the receipt says.
    pub(super) misplaced: usize,
}

impl Judge {
    /// The next message was sent, and its receipt names this place.
    pub(super) fn sent(&mut self, place: Option<Place>) {
        self.messages.push(Sent { place, times: 0, misplaced: false });
    }

    /// The offsets behind the last ones that were stored when all receipts were there.
    pub(super) fn ends_at(&mut self, ends: impl IntoIterator<Item = Place>) {
        let ends: BTreeMap<u32, u64> = ends.into_iter().collect();
        for (segment, offset) in self.messages.iter().filter_map(|sent| sent.place) {
            let stored = ends.get(&segment).copied().unwrap_or_default();
            let end = self.ends.entry(segment).or_default();
            *end = (*end).max(stored).max(offset + 1);
        }
    }

    /// Any message of the topic was handed out.
    pub(super) fn handed_out(&mut self, (segment, offset): Place) {
        let reached = self.reached.entry(segment).or_default();
        *reached = (*reached).max(offset + 1);
    }

    /// A message of this run was handed out.
    pub(super) fn seen(&mut self, number: u32, place: Place, unchanged: bool) {
        let sent = usize::try_from(number).ok().and_then(|number| self.messages.get_mut(number));
        let Some(sent) = sent else {
            self.changed += 1; // a number that was never sent
            return;
        };
        sent.times += 1;
        sent.misplaced |= sent.place.is_some_and(|receipt| receipt != place);
        self.changed += usize::from(!unchanged);
    }

    /// Whatever was stored was handed out: what did not come by now never will.
    pub(super) fn is_complete(&self) -> bool {
        self.ends.iter().all(|(segment, end)| self.reached(*segment) >= *end)
            && self.messages.iter().all(|sent| sent.place.is_some() || sent.times > 0)
    }

    fn reached(&self, segment: u32) -> u64 {
        self.reached.get(&segment).copied().unwrap_or_default()
    }

    pub(super) fn verdict(&self) -> Verdict {
        let count =
            |holds: &dyn Fn(&Sent) -> bool| self.messages.iter().filter(|sent| holds(sent)).count();
        let passed = |sent: &Sent| {
            sent.place.is_some_and(|(segment, offset)| self.reached(segment) > offset)
        };
        Verdict {
            sent: self.messages.len(),
            missing: count(&|sent| sent.times == 0),
            lost: count(&|sent| sent.times == 0 && passed(sent)),
            repeated: count(&|sent| sent.times > 1),
            changed: self.changed,
            misplaced: count(&|sent| sent.misplaced),
        }
    }
}

impl Verdict {
    /// The data is not what it must be: no more time would help.
    pub(super) fn is_wrong(&self) -> bool {
        self.lost + self.repeated + self.changed + self.misplaced > 0
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sent, missing, lost, repeated, changed, misplaced } = self;
        if !self.is_wrong() {
            return write!(f, "{} of {sent} messages came back", sent - missing);
        }
        let counts = [
            (lost, "lost"),
            (repeated, "repeated"),
            (changed, "changed"),
            (misplaced, "at another offset than their receipt says"),
        ];
        let words = counts.iter().filter(|(count, _)| **count > 0);
        let words: Vec<String> = words.map(|(count, what)| format!("{count} {what}")).collect();
        write!(f, "of {sent} messages: {}", words.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three messages at offsets 5, 6 and 7 of segment 0; somebody else's lies at 8.
    fn sent() -> Judge {
        let mut judge = Judge::default();
        (5..8).for_each(|offset| judge.sent(Some((0, offset))));
        judge.ends_at([(0, 9), (1, 4)]);
        judge
    }

    fn comes(judge: &mut Judge, number: u32, offset: u64) {
        judge.handed_out((0, offset));
        judge.seen(number, (0, offset), true);
    }

    #[test]
    fn all_of_them_once_is_the_proof_once_everything_stored_was_handed_out() {
        let mut judge = sent();
        (0..3).for_each(|number| comes(&mut judge, number, 5 + u64::from(number)));
        assert!(!judge.is_complete(), "what lies at 8 could be a repeat");
        judge.handed_out((0, 8));
        assert!(judge.is_complete(), "segment 1 got nothing of ours");
        assert_eq!(judge.verdict(), Verdict { sent: 3, ..Verdict::default() });
    }

    #[test]
    fn a_message_that_others_overtook_is_lost_and_one_that_may_still_come_is_not() {
        let mut judge = sent();
        comes(&mut judge, 0, 5);
        let verdict = judge.verdict();
        assert_eq!((verdict.missing, verdict.lost, verdict.is_wrong()), (2, 0, false));
        assert_eq!(verdict.to_string(), "1 of 3 messages came back");
        comes(&mut judge, 2, 7);
        let verdict = judge.verdict();
        assert_eq!((verdict.missing, verdict.lost, verdict.is_wrong()), (1, 1, true));
        assert_eq!(verdict.to_string(), "of 3 messages: 1 lost");
    }

    #[test]
    fn a_repeat_other_bytes_and_another_place_are_each_told() {
        let mut judge = sent();
        (0..3).for_each(|number| comes(&mut judge, number, 5 + u64::from(number)));
        comes(&mut judge, 1, 8);
        assert_eq!(judge.verdict().repeated, 1);
        assert_eq!(judge.verdict().misplaced, 1);

        let mut judge = sent();
        judge.seen(0, (0, 5), false);
        judge.seen(9, (0, 6), true);
        assert_eq!(judge.verdict().changed, 2);
    }
}
