//! What is asked over answers, refusals, revocations and breaks: each is confirmed only when the server did it, and none
//! hangs.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use proptest::prelude::*;
use tokio::sync::oneshot::{self, Receiver, error::TryRecvError};

use super::*;

const ACCEPT: Ask = Ask::Accept;
const RELEASE: Ask = Ask::Release { delay_ms: None, counts: true };

fn ask(settles: &mut Settles, offset: u64, key: u64, ask: Ask) -> Receiver<Result<(), Error>> {
    let (waiter, answer) = oneshot::channel();
    let deadline = Instant::now() + Duration::from_secs(60);
    settles.request(Request { offset, key, ask, deadline, waiter });
    answer
}

fn handle(stream: u64, attempt: u64) -> Bytes {
    Bytes::from(format!("stream {stream}, attempt {attempt}"))
}

/// A message at the server.
#[derive(Clone, Debug, PartialEq, Eq)]
enum At {
    /// Waits for the delivery with this number.
    Ready(u64),
    /// With our consumer: attempt, handle.
    Held(u64, Bytes),
    Settled,
}

/// One delivery in the application's hands, and what it asked for it.
struct Held {
    offset: u64,
    key: u64,
    attempt: u64,
    asked: Option<(Ask, Receiver<Result<(), Error>>)>,
}

struct World {
    settles: Settles,
    messages: Vec<At>,
    stream: u64,
    wire: Vec<Settle>,
    held: Vec<Held>,
    /// Delivered on this stream and not handed out: (offset, key, attempt).
    unseen: Vec<(u64, u64, u64)>,
    /// (offset, attempt) of what was delivered, with how often: a denied claim comes again with its attempt unchanged.
    delivered: BTreeMap<(u64, u64), u32>,
    /// (offset, attempt) of what the server settled or took back.
    done: BTreeSet<(u64, u64)>,
    breaks: u32,
}

#[derive(Clone, Debug)]
enum Step {
    Deliver {
        pick: usize,
        count: usize,
    },
    See,
    Ask {
        pick: usize,
        release: bool,
    },
    Send,
    /// The server applies the oldest frame, and its answer arrives or is lost with the stream.
    Apply {
        answered: bool,
    },
    /// A lease runs out.
    Revoke {
        pick: usize,
    },
    Break {
        deny: u8,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (any::<usize>(), 1usize..5).prop_map(|(pick, count)| Step::Deliver { pick, count }),
        8 => Just(Step::See),
        6 => (any::<usize>(), prop::bool::weighted(0.3)).prop_map(|(pick, release)| Step::Ask { pick, release }),
        4 => Just(Step::Send),
        5 => prop::bool::weighted(0.85).prop_map(|answered| Step::Apply { answered }),
        2 => any::<usize>().prop_map(|pick| Step::Revoke { pick }),
        1 => any::<u8>().prop_map(|deny| Step::Break { deny }),
    ]
}

impl World {
    fn new() -> Self {
        let mut settles = Settles::default();
        settles.on_opened(0, &[], Instant::now()).expect("nothing is claimed");
        let messages = vec![At::Ready(1); 24];
        let (wire, held, unseen) = (Vec::new(), Vec::new(), Vec::new());
        let (delivered, done) = (BTreeMap::new(), BTreeSet::new());
        Self { settles, messages, stream: 1, wire, held, unseen, delivered, done, breaks: 0 }
    }

    fn mark_delete_next(&self) -> u64 {
        self.messages.iter().take_while(|at| **at == At::Settled).count() as u64
    }

    fn deliver(&mut self, pick: usize, count: usize) {
        let ready: Vec<u64> = (0..self.messages.len() as u64)
            .filter(|offset| matches!(self.messages[*offset as usize], At::Ready(_)))
            .collect();
        let Some(first) = (!ready.is_empty()).then(|| ready[pick % ready.len()]) else { return };
        let At::Ready(attempt) = self.messages[first as usize] else { return };
        let mut last = first;
        let handle = handle(self.stream, attempt);
        while last + 1 < self.messages.len() as u64
            && self.messages[last as usize + 1] == At::Ready(attempt)
            && last - first + 1 < count as u64
        {
            last += 1;
        }
        for offset in first..=last {
            self.messages[offset as usize] = At::Held(attempt, handle.clone());
            *self.delivered.entry((offset, attempt)).or_default() += 1;
        }
        let lease = Duration::from_secs(30);
        let key = self.settles.on_delivered(&[(first, last)], &handle, lease, Instant::now());
        self.unseen.extend((first..=last).map(|offset| (offset, key, attempt)));
    }

    fn server(&mut self, settle: &Settle) -> Result<(), Error> {
        let (ranges, handle, verb, counts) = match settle.verb.clone().expect("a verb") {
            Verb::Accept(accept) => (accept.ranges, accept.handle, true, true),
            Verb::Release(release) => (release.ranges, release.handle, false, release.counts),
            other => panic!("{other:?} was never asked for"),
        };
        let offsets: Vec<usize> =
            ranges.iter().flat_map(|range| range.first..=range.last).map(|o| o as usize).collect();
        let held = |at: &At| matches!(at, At::Held(_, of) if *of == handle);
        // What an accept of this kind settled before is answered as success.
        let fine = |at: &At| held(at) || (verb && *at == At::Settled);
        if !offsets.iter().all(|offset| fine(&self.messages[*offset])) {
            return Err(Error::refused(Reason::InvalidHandle, "not held"));
        }
        for offset in offsets {
            let At::Held(attempt, _) = self.messages[offset] else { continue };
            if counts {
                self.done.insert((offset as u64, attempt));
            }
            let next = attempt + u64::from(counts);
            self.messages[offset] = if verb { At::Settled } else { At::Ready(next) };
        }
        Ok(())
    }

    fn reopen(&mut self, deny: u8) {
        self.breaks += 1;
        self.wire.clear();
        let unseen: Vec<_> = self.unseen.drain(..).map(|(offset, _, _)| (offset, offset)).collect();
        self.settles.on_broken(&unseen);
        let claims = self.settles.claims(usize::MAX);
        self.stream += 1;
        let mut granted: BTreeMap<Bytes, Vec<OffsetRange>> = BTreeMap::new();
        let mut kept = BTreeSet::new();
        for claim in claims {
            for offset in claim.ranges.iter().flat_map(|range| range.first..=range.last) {
                let at = &mut self.messages[offset as usize];
                let At::Held(attempt, of) = at.clone() else { continue };
                if of != claim.handle || (offset + u64::from(deny)).is_multiple_of(7) {
                    continue;
                }
                let new = handle(self.stream, attempt);
                *at = At::Held(attempt, new.clone());
                kept.insert(offset);
                granted.entry(new).or_default().push(OffsetRange { first: offset, last: offset });
            }
        }
        for (offset, at) in (0u64..).zip(&mut self.messages) {
            if let (At::Held(attempt, _), false) = (at.clone(), kept.contains(&offset)) {
                *at = At::Ready(attempt); // unchanged (L4)
            }
        }
        let granted: Vec<Claim> =
            granted.into_iter().map(|(handle, ranges)| Claim { handle, ranges }).collect();
        let next = self.mark_delete_next();
        self.settles.on_opened(next, &granted, Instant::now()).expect("all of it was claimed");
    }

    fn apply(&mut self, step: &Step) {
        match *step {
            Step::Deliver { pick, count } => self.deliver(pick, count),
            Step::See => {
                if !self.unseen.is_empty() {
                    let (offset, key, attempt) = self.unseen.remove(0);
                    self.held.push(Held { offset, key, attempt, asked: None });
                }
            }
            Step::Ask { pick, release } => {
                let mut free = self.held.iter_mut().filter(|held| held.asked.is_none());
                let count = free.by_ref().count();
                if count == 0 {
                    return;
                }
                let mut free = self.held.iter_mut().filter(|held| held.asked.is_none());
                let held = free.nth(pick % count).expect("counted");
                let wish = if release { RELEASE } else { ACCEPT };
                let answer = ask(&mut self.settles, held.offset, held.key, wish.clone());
                held.asked = Some((wish, answer));
            }
            Step::Send => self.wire.extend(self.settles.frame()),
            Step::Apply { answered } => {
                if self.wire.is_empty() {
                    return;
                }
                let settle = self.wire.remove(0);
                let result = self.server(&settle);
                let now = Instant::now();
                match (answered, result) {
                    (true, Ok(())) => {
                        self.settles.on_settled(settle.token, self.mark_delete_next(), now);
                    }
                    (true, Err(error)) => self.settles.on_refused(settle.token, &error, now),
                    (false, _) => self.reopen(3),
                }
            }
            Step::Revoke { pick } => {
                let held: Vec<u64> = (0..self.messages.len() as u64)
                    .filter(|offset| matches!(self.messages[*offset as usize], At::Held(..)))
                    .collect();
                if held.is_empty() {
                    return;
                }
                let offset = held[pick % held.len()];
                let At::Held(attempt, handle) = self.messages[offset as usize].clone() else {
                    return;
                };
                self.messages[offset as usize] = At::Ready(attempt + 1);
                let ranges = [OffsetRange { first: offset, last: offset }];
                let (revoked, _) = self.settles.on_revoked(&ranges, &handle);
                for (first, last) in revoked {
                    self.unseen.retain(|(offset, ..)| !(first..=last).contains(offset));
                }
            }
            Step::Break { deny } => self.reopen(deny),
        }
        self.check();
    }

    fn check(&mut self) {
        let (messages, breaks) = (&self.messages, self.breaks);
        let (delivered, done) = (&self.delivered, &self.done);
        self.held.retain_mut(|held| {
            let Some((asked, answer)) = &mut held.asked else { return true };
            let at = &messages[held.offset as usize];
            match answer.try_recv() {
                Ok(Ok(())) if *asked == ACCEPT => {
                    assert_eq!(*at, At::Settled, "confirmed before it was durable (C3)");
                }
                Ok(Ok(())) => {
                    let ended = match at {
                        At::Ready(attempt) | At::Held(attempt, _) => *attempt > held.attempt,
                        At::Settled => true,
                    };
                    assert!(
                        ended,
                        "a release was confirmed that did not end attempt {}: {at:?}",
                        held.attempt
                    );
                }
                Ok(Err(Error::NotHeld(_))) => {
                    // Nothing of it happened; of two deliveries with one attempt the other one may have.
                    let of = (held.offset, held.attempt);
                    assert!(delivered[&of] > 1 || !done.contains(&of), "{of:?} was done");
                }
                Ok(Err(Error::Indeterminate(_))) => assert!(breaks > 0, "nothing was lost"),
                Ok(Err(error)) => panic!("{error}"),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Closed) => panic!("{} was forgotten", held.offset),
            }
            false
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(384))]

    #[test]
    fn every_wish_is_answered_once_it_is_done_and_both_sides_agree_on_what_is_held(
        steps in prop::collection::vec(step(), 1..200),
    ) {
        let mut world = World::new();
        for step in &steps {
            world.apply(step);
        }
        for _ in 0..200 {
            world.apply(&Step::Send);
            world.apply(&Step::Apply { answered: true });
        }
        prop_assert!(world.settles.is_empty() && world.settles.in_flight() == 0);
        prop_assert!(world.held.iter().all(|held| held.asked.is_none()), "every wish was answered");
        for (offset, at) in (0u64..).zip(&world.messages) {
            let run = world.settles.holds.get(offset).map(|run| run.handle.clone());
            let held = if let At::Held(_, handle) = at { Some(handle.clone()) } else { None };
            prop_assert_eq!(run, held, "{}", offset);
        }
    }
}

#[test]
fn neighbours_travel_as_one_range_and_a_refusal_reaches_all_of_them() {
    let (mut settles, now) = (Settles::default(), Instant::now());
    let key = settles.on_delivered(&[(0, 9)], &handle(1, 1), Duration::ZERO, now);
    let mut answers: Vec<_> =
        [4, 2, 3, 9].map(|offset| ask(&mut settles, offset, key, ACCEPT)).into();
    let frame = settles.frame().expect("something waits");
    let Some(Verb::Accept(accept)) = frame.verb else { panic!("an accept") };
    assert_eq!(
        accept.ranges,
        [OffsetRange { first: 2, last: 4 }, OffsetRange { first: 9, last: 9 }]
    );
    assert!(settles.frame().is_none(), "it is in flight");
    settles.on_refused(frame.token, &Error::refused(Reason::Busy, "not now"), now);
    let again = settles.frame().expect("tried again");
    let never = Error::refused(Reason::PermissionDenied, "never");
    settles.on_refused(again.token, &never, now);
    for answer in &mut answers {
        assert_eq!(answer.try_recv().expect("answered"), Err(never.clone()));
    }
}

#[test]
fn one_message_that_is_not_held_does_not_fail_those_that_went_with_it() {
    let (mut settles, now) = (Settles::default(), Instant::now());
    let key = settles.on_delivered(&[(0, 99)], &handle(1, 1), Duration::ZERO, now);
    let mut answers: Vec<_> =
        (0..100).map(|offset| ask(&mut settles, offset, key, ACCEPT)).collect();
    let mut frames = 0;
    while let Some(frame) = settles.frame() {
        frames += 1;
        let Some(Verb::Accept(accept)) = &frame.verb else { panic!("an accept") };
        if accept.ranges.iter().any(|range| (range.first..=range.last).contains(&37)) {
            settles.on_refused(frame.token, &Error::refused(Reason::InvalidHandle, "37"), now);
        } else {
            settles.on_settled(frame.token, 0, now);
        }
    }
    for (offset, answer) in answers.iter_mut().enumerate() {
        let answer = answer.try_recv().expect("answered");
        assert_eq!(answer.is_ok(), offset != 37, "{offset}: {answer:?}");
    }
    assert!(frames < 20, "halves, not one by one: {frames}");
    assert!(!settles.holds_any());
}

#[test]
fn a_refusal_of_two_is_not_taken_for_one_of_the_one_that_is_left_of_them() {
    let (mut settles, now) = (Settles::default(), Instant::now());
    let key = settles.on_delivered(&[(0, 1)], &handle(1, 1), Duration::ZERO, now);
    let mut answers = [0, 1].map(|offset| ask(&mut settles, offset, key, RELEASE));
    let frame = settles.frame().expect("both");
    // The server takes 1 back before it sees the frame, and delivers it again: that is not what the other one is refused for.
    settles.on_revoked(&[OffsetRange { first: 1, last: 1 }], &handle(1, 1));
    settles.on_delivered(&[(1, 1)], &handle(1, 2), Duration::ZERO, now);
    settles.on_refused(frame.token, &Error::refused(Reason::InvalidHandle, "1"), now);
    assert!(answers[0].try_recv().is_err(), "it is held");
    let frame = settles.frame().expect("again, alone");
    settles.on_settled(frame.token, 0, now);
    assert_eq!(answers[0].try_recv(), Ok(Ok(())));
}

#[test]
fn a_wish_that_nobody_confirms_ends_by_its_deadline() {
    let (mut settles, now) = (Settles::default(), Instant::now());
    let key = settles.on_delivered(&[(1, 1)], &handle(1, 1), Duration::ZERO, now);
    let mut answer = ask(&mut settles, 1, key, ACCEPT);
    settles.expire(Instant::now());
    assert!(answer.try_recv().is_err(), "not yet");
    settles.expire(Instant::now() + Duration::from_secs(61));
    assert!(matches!(answer.try_recv(), Ok(Err(Error::Indeterminate(_)))));
}

#[test]
fn a_message_is_settled_in_one_way_and_only_for_the_delivery_that_is_meant() {
    let (mut settles, now) = (Settles::default(), Instant::now());
    let first = settles.on_delivered(&[(5, 5)], &handle(1, 1), Duration::ZERO, now);
    let mut released = ask(&mut settles, 5, first, RELEASE);
    let mut accepted = ask(&mut settles, 5, first, ACCEPT);
    assert!(matches!(accepted.try_recv(), Ok(Err(Error::NotHeld(_)))), "it is being released");
    settles.frame().expect("the release");
    let second = settles.on_delivered(&[(5, 5)], &handle(1, 2), Duration::ZERO, now);
    assert_eq!(released.try_recv().expect("it comes again: done"), Ok(()));
    let mut stale = ask(&mut settles, 5, first, ACCEPT);
    assert!(matches!(stale.try_recv(), Ok(Err(Error::NotHeld(_)))));
    let mut answer = ask(&mut settles, 5, second, ACCEPT);
    let frame = settles.frame().expect("an accept");
    let Some(Verb::Accept(accept)) = frame.verb else { panic!("an accept") };
    assert_eq!(accept.handle, handle(1, 2));
    settles.on_settled(frame.token, 0, now);
    assert_eq!(answer.try_recv().expect("answered"), Ok(()));
}

#[test]
fn each_verb_and_each_delay_has_frames_of_its_own() {
    let (mut settles, now) = (Settles::default(), Instant::now());
    let key = settles.on_delivered(&[(0, 9)], &handle(1, 1), Duration::from_secs(9), now);
    let delayed = |delay_ms| Ask::Release { delay_ms: Some(delay_ms), counts: false };
    let wishes = [
        ACCEPT,
        RELEASE,
        delayed(5),
        delayed(5),
        delayed(6),
        Ask::Reject("bad".into()),
        Ask::Extend(7),
    ];
    let _answers: Vec<_> =
        (0..).zip(wishes).map(|(offset, wish)| ask(&mut settles, offset, key, wish)).collect();
    let mut verbs = Vec::new();
    while let Some(frame) = settles.frame() {
        verbs.push(match frame.verb.expect("a verb") {
            Verb::Accept(accept) => format!("accept {}", accept.ranges.len()),
            Verb::Release(it) => {
                let (first, last) = (it.ranges[0].first, it.ranges[0].last);
                format!("release {first}-{last} {:?} {}", it.delay_ms, it.counts)
            }
            Verb::Reject(it) => format!("reject {}", it.reason),
            Verb::Extend(it) => format!("extend {}", it.lease_ms),
            Verb::AcceptUpTo(_) => "up to".into(),
        });
    }
    assert_eq!(
        verbs,
        [
            "accept 1",
            "release 1-1 None true",
            "release 2-3 Some(5) false",
            "release 4-4 Some(6) false",
            "reject bad",
            "extend 7"
        ]
    );
}

#[test]
fn accept_up_to_covers_what_lies_below_and_is_presented_with_a_handle_that_is_held() {
    let (mut settles, now) = (Settles::default(), Instant::now());
    settles.on_delivered(&[(0, 9)], &handle(1, 1), Duration::ZERO, now);
    let mut answers = [3, 7, 7].map(|offset| ask(&mut settles, offset, 0, Ask::AcceptUpTo));
    let frame = settles.frame().expect("the highest");
    let Some(Verb::AcceptUpTo(up_to)) = frame.verb else { panic!("up to") };
    assert_eq!((up_to.offset, up_to.handle), (7, handle(1, 1)));
    assert!(settles.frame().is_none(), "it covers the others");
    settles.on_settled(frame.token, 8, now);
    for answer in &mut answers {
        assert_eq!(answer.try_recv().expect("answered"), Ok(()));
    }
    let mut again = ask(&mut settles, 7, 0, Ask::AcceptUpTo);
    assert_eq!(again.try_recv().expect("settled already"), Ok(()));
    settles.on_broken(&[(9, 9)]);
    assert_eq!(settles.claims(usize::MAX)[0].ranges, [OffsetRange { first: 8, last: 9 }]);
    let mut waits = ask(&mut settles, 8, 0, Ask::AcceptUpTo);
    let granted = Claim { handle: handle(2, 1), ranges: vec![OffsetRange { first: 8, last: 8 }] };
    settles.on_opened(8, &[granted], now).expect("it was claimed");
    let Some(Verb::AcceptUpTo(up_to)) = settles.frame().expect("again").verb else {
        panic!("up to")
    };
    assert_eq!((up_to.offset, up_to.handle), (8, handle(2, 1)));
    assert!(waits.try_recv().is_err());
}

#[test]
fn what_is_not_granted_after_a_break_is_not_held_any_more() {
    let (mut settles, now) = (Settles::default(), Instant::now());
    let key = settles.on_delivered(&[(0, 9)], &handle(1, 1), Duration::ZERO, now);
    let mut sent = ask(&mut settles, 1, key, ACCEPT);
    settles.frame().expect("sent");
    let mut released = ask(&mut settles, 2, key, RELEASE);
    settles.on_broken(&[(5, 9)]);
    settles.on_opened(0, &[], now).expect("nothing is granted");
    assert!(matches!(released.try_recv(), Ok(Err(Error::NotHeld(_)))), "never sent");
    let frame = settles.frame().expect("the server may have taken it before the break");
    let Some(Verb::Accept(accept)) = &frame.verb else { panic!("an accept") };
    assert_eq!(accept.handle, handle(1, 1));
    settles.on_refused(frame.token, &Error::refused(Reason::InvalidHandle, "old"), now);
    assert!(matches!(sent.try_recv(), Ok(Err(Error::Indeterminate(_)))));
    let mut late = ask(&mut settles, 3, key, ACCEPT);
    assert!(matches!(late.try_recv(), Ok(Err(Error::NotHeld(_)))));
}

#[test]
fn an_accept_that_was_lost_in_a_break_had_no_effect_if_its_message_is_granted_or_comes_again() {
    let (mut settles, now) = (Settles::default(), Instant::now());
    let key = settles.on_delivered(&[(0, 1)], &handle(1, 1), Duration::ZERO, now);
    let mut answers = [0, 1].map(|offset| ask(&mut settles, offset, key, ACCEPT));
    settles.frame().expect("both are on their way");
    settles.on_broken(&[]);
    let granted = Claim { handle: handle(2, 1), ranges: vec![OffsetRange { first: 0, last: 0 }] };
    settles.on_opened(0, &[granted], now).expect("it was claimed");
    settles.on_delivered(&[(1, 1)], &handle(2, 2), Duration::ZERO, now);
    while let Some(frame) = settles.frame() {
        // The lease of the one ran out meanwhile, and the other one is not meant by its old handle.
        settles.on_refused(frame.token, &Error::refused(Reason::InvalidHandle, "late"), now);
    }
    for answer in &mut answers {
        assert!(matches!(answer.try_recv(), Ok(Err(Error::NotHeld(_)))), "nothing happened");
    }
}

#[test]
fn what_nobody_has_seen_is_claimed_and_given_back_uncounted() {
    let (mut settles, now) = (Settles::default(), Instant::now());
    let key = settles.on_delivered(&[(0, 9)], &handle(1, 1), Duration::ZERO, now);
    settles.on_broken(&[(3, 9)]);
    settles.on_broken(&[]); // the first attempt to open failed
    let claims = settles.claims(usize::MAX);
    assert_eq!(claims[0].ranges, [OffsetRange { first: 0, last: 9 }]);
    let granted = Claim { handle: handle(2, 1), ranges: vec![OffsetRange { first: 0, last: 7 }] };
    settles.on_opened(0, &[granted], now).expect("it was claimed");
    let frame = settles.frame().expect("something goes back");
    let Some(Verb::Release(release)) = &frame.verb else { panic!("a release") };
    assert_eq!(release.ranges, [OffsetRange { first: 3, last: 7 }], "what is granted of it");
    assert_eq!((release.handle.clone(), release.counts), (handle(2, 1), false));
    // It comes again before that is answered, and what is asked for it is its own.
    let again = settles.on_delivered(&[(3, 3)], &handle(2, 2), Duration::ZERO, now);
    let mut accept = ask(&mut settles, 3, again, ACCEPT);
    settles.on_settled(frame.token, 0, now);
    let frame = settles.frame().expect("the accept");
    settles.on_settled(frame.token, 0, now);
    assert_eq!(accept.try_recv(), Ok(Ok(())));
    assert!(settles.is_empty());
    assert_eq!(settles.claims(usize::MAX)[0].ranges, [OffsetRange { first: 0, last: 2 }]);
    assert_eq!(settles.holds.get(1).map(|run| run.key), Some(key), "what was seen is ours");
}

#[test]
fn leases_are_kept_by_frames_that_no_application_waits_for() {
    let (mut settles, now) = (Settles::default(), Instant::now());
    let key = settles.on_delivered(&[(0, 9)], &handle(1, 1), Duration::from_secs(8), now);
    assert!(settles.renewal(now, Duration::ZERO).is_none());
    let half = now + Duration::from_secs(4);
    let frame = settles.renewal(half, Duration::ZERO).expect("half of it is over");
    let Some(Verb::Extend(extend)) = &frame.verb else { panic!("an extension") };
    assert_eq!((extend.ranges[0].last, extend.lease_ms), (9, 0));
    assert_eq!(settles.in_flight(), 0, "settles do not wait for it");
    settles.on_refused(frame.token, &Error::refused(Reason::Busy, "later"), half);
    assert!(settles.renewal(half + Duration::from_secs(1), Duration::ZERO).is_some(), "again");
    let _asked = ask(&mut settles, 4, key, Ask::Extend(u64::MAX));
    let frame = settles.frame().expect("asked for");
    settles.on_settled(frame.token, 0, half); // no clock overflows
}
