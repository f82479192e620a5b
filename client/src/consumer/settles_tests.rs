//! Accepts over answers, refusals and breaks: each is confirmed only when it is durable, and none hangs.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use proptest::prelude::*;
use tokio::sync::oneshot::{Receiver, error::TryRecvError};

use super::*;

fn request(settles: &mut Settles, offset: u64, up_to: bool) -> Receiver<Result<(), Error>> {
    let (waiter, answer) = oneshot::channel();
    let deadline = Instant::now() + Duration::from_secs(60);
    settles.request(Request { offset, up_to, deadline, waiter });
    answer
}

fn handle(stream: u64) -> Bytes {
    Bytes::from(format!("stream {stream}"))
}

/// The server's cursor: what is durable, and what it delivered on the present stream.
#[derive(Default)]
struct Cursor {
    acked: BTreeSet<u64>,
    delivered: u64,
}

impl Cursor {
    fn next(&self) -> u64 {
        (0..).find(|offset| !self.acked.contains(offset)).expect("finite")
    }

    fn apply(&mut self, settle: &Settle, stream: u64) {
        match settle.verb.as_ref().expect("a verb") {
            Verb::Accept(accept) => {
                assert_eq!(accept.handle, handle(stream), "a handle of the present stream");
                for range in &accept.ranges {
                    assert!(range.last < self.delivered, "only what was delivered");
                    self.acked.extend(range.first..=range.last);
                }
            }
            Verb::AcceptUpTo(up_to) => {
                assert_eq!(up_to.handle, handle(stream));
                assert!(up_to.offset < self.delivered);
                self.acked.extend(0..=up_to.offset);
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Deliver,
    Accept {
        pick: usize,
        up_to: bool,
    },
    Send,
    /// The server applies the oldest frame, and its answer arrives or is lost with the stream.
    Apply {
        answered: bool,
    },
    Break,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Deliver),
        4 => (any::<usize>(), prop::bool::weighted(0.2)).prop_map(|(pick, up_to)| Step::Accept { pick, up_to }),
        4 => Just(Step::Send),
        4 => prop::bool::weighted(0.8).prop_map(|answered| Step::Apply { answered }),
        1 => Just(Step::Break),
    ]
}

struct World {
    settles: Settles,
    cursor: Cursor,
    wire: Vec<Settle>,
    /// Handed out, on this stream or an earlier one, and not accepted.
    held: Vec<u64>,
    accepted: BTreeSet<u64>,
    answers: BTreeMap<u64, Vec<Receiver<Result<(), Error>>>>,
}

impl World {
    fn deliver(&mut self) {
        let start = (self.cursor.delivered..)
            .find(|offset| !self.cursor.acked.contains(offset))
            .expect("finite");
        self.cursor.delivered = start + 1;
        let stream = self.settles.stream();
        self.settles.on_delivered(start, start + 1, &handle(stream));
        if self.settles.is_accepted(start) {
            return;
        }
        assert!(!self.accepted.contains(&start), "{start} was accepted and is handed out again");
        self.held.push(start);
    }

    fn reopen(&mut self) {
        self.wire.clear(); // what was handed out stays in the application's hands
        self.cursor.delivered = self.cursor.next();
        self.settles.on_opened(self.cursor.next());
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::Deliver => self.deliver(),
            Step::Accept { pick, up_to } => {
                if self.held.is_empty() {
                    return;
                }
                let offset = self.held.remove(pick % self.held.len());
                if up_to {
                    self.held.retain(|held| *held > offset);
                }
                // With up-to everything below is accepted too.
                let covered = if up_to { 0..=offset } else { offset..=offset };
                self.accepted.extend(covered);
                let answer = request(&mut self.settles, offset, up_to);
                self.answers.entry(offset).or_default().push(answer);
            }
            Step::Send => self.wire.extend(self.settles.frame()),
            Step::Apply { answered } => {
                if self.wire.is_empty() {
                    return;
                }
                let settle = self.wire.remove(0);
                self.cursor.apply(&settle, self.settles.stream());
                if answered {
                    self.settles.on_settled(settle.token, self.cursor.next());
                } else {
                    self.reopen();
                }
            }
            Step::Break => self.reopen(),
        }
        for (offset, answers) in &mut self.answers {
            answers.retain_mut(|answer| match answer.try_recv() {
                Ok(Ok(())) => {
                    assert!(
                        self.cursor.acked.contains(offset),
                        "{offset} was confirmed before it was durable (C3)"
                    );
                    false
                }
                Ok(Err(error)) => panic!("{offset} failed: {error}"),
                Err(TryRecvError::Empty) => true,
                Err(TryRecvError::Closed) => panic!("{offset} was forgotten"),
            });
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn every_accept_is_confirmed_once_durable_and_its_message_never_handed_out_again(
        steps in prop::collection::vec(step(), 1..300),
    ) {
        let mut world = World {
            settles: Settles::default(),
            cursor: Cursor::default(),
            wire: Vec::new(),
            held: Vec::new(),
            accepted: BTreeSet::new(),
            answers: BTreeMap::new(),
        };
        world.settles.on_opened(0);
        for step in steps {
            world.apply(step);
        }
        for _ in 0..350 {
            for step in [Step::Deliver, Step::Send, Step::Apply { answered: true }] {
                world.apply(step);
            }
        }
        prop_assert!(world.settles.is_empty() && world.settles.in_flight() == 0);
        prop_assert!(world.answers.values().all(Vec::is_empty), "every accept was answered");
        prop_assert!(world.accepted.is_subset(&world.cursor.acked));
    }
}

#[test]
fn neighbours_travel_as_one_range_and_a_refusal_reaches_all_of_them() {
    let mut settles = Settles::default();
    settles.on_opened(0);
    settles.on_delivered(0, 10, &handle(1));
    let mut answers: Vec<_> =
        [4, 2, 3, 9].map(|offset| request(&mut settles, offset, false)).into();
    let frame = settles.frame().expect("something waits");
    let Some(Verb::Accept(accept)) = frame.verb else { panic!("an accept") };
    assert_eq!(
        accept.ranges,
        [OffsetRange { first: 2, last: 4 }, OffsetRange { first: 9, last: 9 }]
    );
    assert!(settles.frame().is_none(), "it is in flight");
    let error = Error::Closed;
    settles.on_refused(frame.token, &error, true);
    let again = settles.frame().expect("tried again");
    settles.on_refused(again.token, &error, false);
    for answer in &mut answers {
        assert_eq!(answer.try_recv().expect("answered"), Err(Error::Closed));
    }
}

#[test]
fn an_accept_that_nobody_confirms_ends_by_its_deadline() {
    let mut settles = Settles::default();
    settles.on_opened(0);
    let mut answer = request(&mut settles, 1, false);
    settles.expire(Instant::now());
    assert!(answer.try_recv().is_err(), "not yet");
    settles.expire(Instant::now() + Duration::from_secs(61));
    assert!(matches!(answer.try_recv(), Ok(Err(Error::Indeterminate(_)))));
}

#[test]
fn an_accept_that_comes_after_its_message_was_delivered_again_is_presented_with_the_new_handle() {
    let mut settles = Settles::default();
    settles.on_opened(0);
    settles.on_delivered(0, 10, &handle(1));
    settles.on_opened(0); // it broke, and the application was still at work on 5
    settles.on_delivered(0, 10, &handle(2));
    for up_to in [false, true] {
        let _answer = request(&mut settles, 5, up_to);
        let frame = settles.frame().expect("presented, not waited for in vain");
        let presented = match frame.verb.expect("a verb") {
            Verb::Accept(accept) => accept.handle,
            Verb::AcceptUpTo(up_to) => up_to.handle,
        };
        assert_eq!(presented, handle(2));
    }
}

#[test]
fn an_accept_of_what_the_new_stream_went_past_is_confirmed_at_once() {
    let mut settles = Settles::default();
    settles.on_opened(0);
    settles.on_delivered(0, 10, &handle(1));
    settles.on_opened(3);
    settles.on_delivered(3, 5, &handle(2));
    settles.on_delivered(7, 10, &handle(2));
    for settled in [0, 2, 5, 6] {
        assert_eq!(
            request(&mut settles, settled, false).try_recv().expect("answered"),
            Ok(()),
            "{settled}"
        );
    }
    assert_eq!(request(&mut settles, 2, true).try_recv().expect("answered"), Ok(()));
    assert!(settles.is_empty());
    let mut later = request(&mut settles, 12, false);
    assert!(
        settles.frame().is_none() && later.try_recv().is_err(),
        "not delivered on this stream yet"
    );
    settles.on_delivered(10, 13, &handle(3));
    let Some(Verb::Accept(accept)) = settles.frame().expect("revived").verb else {
        panic!("an accept")
    };
    assert_eq!((accept.ranges[0], accept.handle), (OffsetRange { first: 12, last: 12 }, handle(3)));
}
