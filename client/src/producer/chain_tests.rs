//! The chain against a model of the server's side of DD1 and DD5, in every order of refusals, breaks and answers.

use std::{
    collections::{BTreeSet, VecDeque},
    time::Duration,
};

use proptest::prelude::*;

use super::*;

/// The server's window of one producer on one segment: what it accepted, what it stored.
#[derive(Default)]
struct Server {
    pushed: u64,
    persisted: u64,
    /// Accepted batches, not stored yet.
    pending: VecDeque<(u64, u64, u32)>,
    /// What the segment holds, in order.
    log: Vec<u32>,
    /// Taken or attached on the present stream: answered there.
    asked: BTreeSet<u64>,
}

enum Answer {
    Stored(u64),
    Refused { hi: u64, pushed: u64 },
}

impl Server {
    /// DD1, DD3, DD5.
    fn take(&mut self, prev: u64, lo: u64, hi: u64, content: u32, busy: bool) -> Option<Answer> {
        if hi <= self.persisted {
            return Some(Answer::Stored(hi));
        }
        if hi <= self.pushed {
            assert!(
                self.pending.iter().any(|batch| *batch == (lo, hi, content)),
                "other bounds (DD3)"
            );
            self.asked.insert(hi);
            return None; // attached: answered when it is stored
        }
        if busy || prev != self.pushed {
            return Some(Answer::Refused { hi, pushed: self.pushed });
        }
        assert!(lo > prev, "sequences rise");
        self.pushed = hi;
        self.pending.push_back((lo, hi, content));
        self.asked.insert(hi);
        None
    }

    /// The oldest pending batch becomes durable; the answer, if its stream asked.
    fn store_one(&mut self) -> Option<Answer> {
        let (_, hi, content) = self.pending.pop_front()?;
        self.persisted = hi;
        self.log.push(content);
        self.asked.remove(&hi).then_some(Answer::Stored(hi))
    }

    /// The owner changes: what was pending is stored or gone (a prefix survives).
    fn take_over(&mut self, survive: usize) {
        for _ in 0..survive {
            self.store_one();
        }
        self.pending.clear();
        self.pushed = self.persisted;
    }
}

#[derive(Clone, Debug)]
enum Step {
    Push(u64),
    Send,
    /// The server takes the next frame; `busy` refuses it.
    Receive {
        busy: bool,
    },
    Store,
    /// The client reads the next answer.
    Answer,
    /// The stream breaks; the owner may change.
    Break {
        take_over: Option<usize>,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1u64..5).prop_map(Step::Push),
        6 => Just(Step::Send),
        6 => prop::bool::weighted(0.15).prop_map(|busy| Step::Receive { busy }),
        4 => Just(Step::Store),
        6 => Just(Step::Answer),
        1 => prop::option::of(0usize..4).prop_map(|take_over| Step::Break { take_over }),
    ]
}

struct World {
    server: Server,
    chain: Chain<u32>,
    wire: VecDeque<(u64, u64, u64, u32)>,
    answers: VecDeque<Answer>,
    pushed: u32,
    settled: Vec<u32>,
}

impl World {
    fn new() -> Self {
        let mut chain = Chain::default();
        assert!(chain.on_opened(0).is_empty());
        Self {
            server: Server::default(),
            chain,
            wire: VecDeque::new(),
            answers: VecDeque::new(),
            pushed: 0,
            settled: Vec::new(),
        }
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::Push(count) => {
                self.chain.push(count, far(), self.pushed);
                self.pushed += 1;
            }
            Step::Send => {
                if let Some((prev, link)) = self.chain.send() {
                    self.wire.push_back((prev, link.lo, link.hi, link.content));
                }
            }
            Step::Receive { busy } => {
                if let Some((prev, lo, hi, content)) = self.wire.pop_front() {
                    self.answers.extend(self.server.take(prev, lo, hi, content, busy));
                }
            }
            Step::Store => self.answers.extend(self.server.store_one()),
            Step::Answer => match self.answers.pop_front() {
                Some(Answer::Stored(hi)) => {
                    self.settled.extend(self.chain.on_stored(hi).map(|link| link.content))
                }
                Some(Answer::Refused { hi, pushed }) => {
                    assert!(self.chain.on_refused(hi, pushed, Refusal::Again).is_none());
                }
                None => {}
            },
            Step::Break { take_over } => {
                self.wire.clear();
                self.answers.clear();
                self.server.asked.clear();
                if let Some(survive) = take_over {
                    self.server.take_over(survive);
                }
                self.chain.on_broken();
                let stored = self.chain.on_opened(self.server.persisted);
                self.settled.extend(stored.into_iter().map(|link| link.content));
            }
        }
    }
}

fn far() -> Instant {
    Instant::now() + Duration::from_secs(3_600)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn every_order_of_refusals_and_breaks_keeps_order_and_loses_nothing(
        steps in prop::collection::vec(step(), 1..400),
    ) {
        let mut world = World::new();
        for step in steps {
            world.apply(step);
        }
        // Everything heals: it must drain by itself, in a bounded number of rounds.
        for _ in 0..4 * (world.pushed as usize + 4) {
            for step in [Step::Send, Step::Receive { busy: false }, Step::Store, Step::Answer] {
                world.apply(step);
            }
        }
        let expected: Vec<u32> = (0..world.pushed).collect();
        prop_assert_eq!(&world.server.log, &expected, "stored once each, in order");
        prop_assert_eq!(&world.settled, &expected, "every message got its receipt");
        prop_assert!(world.chain.is_empty() && world.chain.nothing_in_flight());
    }

    #[test]
    fn what_is_refused_for_good_leaves_and_the_rest_is_chained_on(
        bad in prop::collection::btree_set(0u32..12, 0..6),
    ) {
        let mut world = World::new();
        for _ in 0..12 {
            world.apply(Step::Push(2));
        }
        let mut dropped = Vec::new();
        for _ in 0..200 {
            world.apply(Step::Send);
            world.apply(Step::Send);
            if let Some((prev, lo, hi, content)) = world.wire.pop_front() {
                let refuse = bad.contains(&content);
                let answer = world.server.take(prev, lo, hi, content, refuse);
                match answer {
                    Some(Answer::Refused { hi, pushed }) => {
                        // Too large is refused for good even out of sequence; the rest only for now.
                        let refusal = if refuse { Refusal::Drop } else { Refusal::Again };
                        dropped.extend(world.chain.on_refused(hi, pushed, refusal).map(|link| link.content));
                    }
                    other => world.answers.extend(other),
                }
            }
            world.apply(Step::Store);
            world.apply(Step::Answer);
        }
        let kept: Vec<u32> = (0..12).filter(|content| !bad.contains(content)).collect();
        prop_assert_eq!(&world.server.log, &kept);
        prop_assert_eq!(&world.settled, &kept);
        prop_assert_eq!(dropped, bad.into_iter().collect::<Vec<_>>());
    }

    #[test]
    fn a_batch_given_up_in_flight_never_blocks_the_ones_behind_it(
        steps in prop::collection::vec(step(), 1..200),
        give_up in 0usize..200,
    ) {
        let mut world = World::new();
        let mut given_up = Vec::new();
        for (number, step) in steps.into_iter().enumerate() {
            if number == give_up {
                let now = far() + Duration::from_secs(1);
                given_up.extend(world.chain.expire(now).into_iter().map(|link| link.content));
            }
            world.apply(step);
        }
        for _ in 0..6 * (world.pushed as usize + 4) {
            for step in [Step::Send, Step::Receive { busy: false }, Step::Store, Step::Answer] {
                world.apply(step);
            }
        }
        prop_assert!(world.server.log.windows(2).all(|pair| pair[0] < pair[1]), "in order, none twice");
        let expected: Vec<u32> = (0..world.pushed).filter(|content| !given_up.contains(content)).collect();
        prop_assert_eq!(&world.settled, &expected, "everything not given up is settled");
        prop_assert!(expected.iter().all(|content| world.server.log.contains(content)));
    }
}

#[test]
fn a_named_producer_goes_on_after_what_the_server_has() {
    let mut chain = Chain::default();
    chain.on_opened(41);
    chain.push(3, far(), ());
    let (prev, link) = chain.send().expect("one batch");
    assert_eq!((prev, link.lo, link.hi), (41, 42, 44));
}

#[test]
fn a_stranger_answer_changes_nothing() {
    let mut chain = Chain::default();
    chain.on_opened(0);
    chain.push(1, far(), ());
    chain.push(1, far(), ());
    chain.send().expect("the first");
    assert!(chain.on_stored(2).is_none(), "not in flight");
    assert_eq!(chain.unsent(), 1);
    assert!(chain.on_stored(1).is_some());
}

#[test]
fn a_sequence_that_may_be_on_its_way_is_never_used_for_another_batch() {
    // The server took 1..=2, and its answer was lost; the producer gave everything up and starts again.
    let mut chain = Chain::default();
    chain.on_opened(0);
    chain.push(2, far(), "old");
    chain.send().expect("sent");
    let given_up = chain.drain();
    assert!(given_up[0].uncertain);
    chain.on_opened(0);
    chain.push(2, far(), "new");
    let (prev, link) = chain.send().expect("sent");
    assert_eq!((prev, link.lo, link.hi), (0, 3, 4), "the receipt of 1..=2 would be a false one");
}

#[test]
fn only_what_was_in_flight_over_a_break_is_uncertain() {
    let mut chain = Chain::default();
    chain.on_opened(0);
    for content in ["refused", "in flight", "unsent"] {
        chain.push(1, far(), content);
    }
    chain.send().expect("sent");
    chain.on_refused(1, 0, Refusal::Again);
    assert_eq!(chain.unsent(), 3);
    let mut expired: Vec<_> =
        chain.expire(far() + Duration::from_secs(1)).into_iter().map(|l| l.uncertain).collect();
    assert_eq!(expired, [false; 3], "refused each time, or never sent");
    for content in ["in flight", "unsent"] {
        chain.push(1, far(), content);
    }
    chain.send().expect("sent");
    assert_eq!(chain.unsent(), 1);
    expired =
        chain.expire(far() + Duration::from_secs(1)).into_iter().map(|l| l.uncertain).collect();
    assert_eq!(expired, [true, false]);
}

#[test]
fn a_new_session_is_given_what_was_certainly_not_stored() {
    let mut chain = Chain::default();
    chain.on_opened(0);
    chain.push(1, far(), "in flight");
    chain.push(1, far(), "unsent");
    chain.send().expect("sent");
    let gone: Vec<_> = chain.restart().into_iter().map(|link| link.content).collect();
    assert_eq!(gone, ["in flight"]);
    chain.on_opened(0);
    let (prev, link) = chain.send().expect("the other");
    assert_eq!((prev, link.lo, link.content), (0, 2, "unsent"));
}
