use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Stored {
    base: u64,
    count: u32,
    bytes: u64,
}

impl Batch for Stored {
    fn base(&self) -> u64 {
        self.base
    }
    fn count(&self) -> u32 {
        self.count
    }
    fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[derive(Clone, Debug)]
enum Event {
    Append { count: u32, bytes: u64 },
    Credit { messages: u64, bytes: u64 },
    Settle { pick: u64, len: u64 },
    SettleUpTo { pick: u64 },
    ElseSettles { pick: u64, len: u64 },
    Outbox(bool),
    ReadFails,
    Retry,
    Reconnect,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (1u32..20, 0u64..500).prop_map(|(count, bytes)| Event::Append { count, bytes }),
        4 => (0u64..40, 0u64..2_000).prop_map(|(messages, bytes)| Event::Credit { messages, bytes }),
        4 => (any::<u64>(), 1u64..12).prop_map(|(pick, len)| Event::Settle { pick, len }),
        1 => any::<u64>().prop_map(|pick| Event::SettleUpTo { pick }),
        1 => (any::<u64>(), 1u64..12).prop_map(|(pick, len)| Event::ElseSettles { pick, len }),
        1 => any::<bool>().prop_map(Event::Outbox),
        1 => Just(Event::ReadFails),
        1 => Just(Event::Retry),
        1 => Just(Event::Reconnect),
    ]
}

const LIMITS: CoreLimits = CoreLimits { unacked_messages_max: 30, read_ahead_bytes_max: 800 };

/// The log, the cursor and one consumer's view, kept the simple way.
struct Model {
    log: Vec<Stored>,
    end: u64,
    settled: BTreeSet<u64>,
    delivered: BTreeSet<u64>,
    granted: (u64, u64),
    used: (u64, u64),
    outbox: bool,
    read_fails: bool,
    core: Core<Stored>,
}

impl Model {
    fn new() -> Self {
        Self {
            log: Vec::new(),
            end: 0,
            settled: BTreeSet::new(),
            delivered: BTreeSet::new(),
            granted: (0, 0),
            used: (0, 0),
            outbox: true,
            read_fails: false,
            core: Core::new(LIMITS, 0, RangeSet::default(), 0),
        }
    }

    fn mark_delete(&self) -> u64 {
        (0..).find(|x| !self.settled.contains(x)).expect("infinite")
    }

    fn cursor(&self) -> RangeSet {
        let mut set = RangeSet::default();
        let mark = self.mark_delete();
        self.settled.iter().filter(|x| **x > mark).for_each(|x| set.insert(*x, x + 1));
        set
    }

    fn outstanding(&self) -> u64 {
        self.delivered.difference(&self.settled).count() as u64
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Append { count, bytes } => {
                self.log.push(Stored { base: self.end, count, bytes });
                self.end += u64::from(count);
                self.core.on_end(self.end);
            }
            Event::Credit { messages, bytes } => {
                self.granted.0 += messages;
                self.granted.1 += bytes;
                self.core.on_credit(self.granted.0, self.granted.1);
                self.core.on_credit(self.granted.0 / 2, 0); // an old total, come late
            }
            Event::Settle { pick, len } => {
                let Some(high) = self.delivered.last().copied() else { return };
                let start = pick % (high + 1);
                let end = (start + len).min(high + 1);
                self.settled.extend(start..end);
                let mark = self.mark_delete();
                self.core.on_settled([(start, end)], mark);
            }
            Event::SettleUpTo { pick } => {
                let Some(high) = self.delivered.last().copied() else { return };
                let end = pick % (high + 1) + 1;
                self.settled.extend(0..end);
                let mark = self.mark_delete();
                self.core.on_settled([(0, end)], mark);
            }
            Event::ElseSettles { pick, len } => {
                if self.end == 0 {
                    return;
                }
                let start = pick % self.end;
                self.settled.extend(start..(start + len).min(self.end));
                self.core.on_cursor(self.mark_delete(), self.cursor());
            }
            Event::Outbox(open) => {
                self.outbox = open;
                self.core.on_outbox(open);
            }
            Event::ReadFails => self.read_fails = true,
            Event::Retry => {
                self.read_fails = false;
                self.core.on_retry();
            }
            Event::Reconnect => {
                self.delivered.clear();
                self.granted = (0, 0);
                self.used = (0, 0);
                self.outbox = true;
                self.read_fails = false;
                self.core = Core::new(LIMITS, self.mark_delete(), self.cursor(), self.end);
            }
        }
    }

    fn drain(&mut self) -> Result<(), TestCaseError> {
        let mut steps = 0;
        while let Some(action) = self.core.step() {
            steps += 1;
            prop_assert!(steps < 10_000, "it does not spin");
            match action {
                Action::Read { from, bytes_max, messages_max } => {
                    self.read(from, bytes_max, messages_max)?
                }
                Action::Deliver(delivery) => self.deliver(&delivery)?,
            }
        }
        self.check_progress()
    }

    fn read(&mut self, from: u64, bytes_max: u64, messages_max: u64) -> Result<(), TestCaseError> {
        prop_assert!(bytes_max > 0 && messages_max > 0 && from < self.end);
        prop_assert!(
            messages_max <= self.granted.0 - self.used.0,
            "read-ahead is bounded by credit"
        );
        prop_assert!(bytes_max <= LIMITS.read_ahead_bytes_max);
        if self.read_fails {
            self.core.on_read_failed();
            return Ok(());
        }
        let (mut bytes, mut batches) = (0, Vec::new());
        for batch in self.log.iter().filter(|b| b.base + u64::from(b.count) > from) {
            if !batches.is_empty() && bytes + batch.bytes > bytes_max {
                break;
            }
            bytes += batch.bytes;
            batches.push(batch.clone());
        }
        self.core.on_read(batches);
        Ok(())
    }

    fn deliver(&mut self, delivery: &Delivery<Stored>) -> Result<(), TestCaseError> {
        prop_assert!(self.outbox);
        prop_assert!(self.used.1 < self.granted.1, "some byte credit was left");
        let mut messages = 0;
        for (start, end) in &delivery.ranges {
            prop_assert!(start < end && *end <= self.end);
            for offset in *start..*end {
                prop_assert!(!self.settled.contains(&offset), "settled messages are not delivered");
                prop_assert!(self.delivered.insert(offset), "none twice without a reconnect");
                let skipped =
                    (0..offset).find(|x| !self.settled.contains(x) && !self.delivered.contains(x));
                prop_assert_eq!(skipped, None, "none is skipped, and order is kept");
                messages += 1;
            }
        }
        prop_assert!(messages > 0 && messages == delivery.messages);
        self.used.0 += messages;
        self.used.1 += delivery.batch.bytes;
        prop_assert!(self.used.0 <= self.granted.0, "never beyond the messages granted");
        prop_assert!(self.outstanding() <= LIMITS.unacked_messages_max);
        Ok(())
    }

    fn check_progress(&self) -> Result<(), TestCaseError> {
        prop_assert_eq!(self.core.outstanding(), self.outstanding());
        let next = (0..self.end).find(|x| !self.settled.contains(x) && !self.delivered.contains(x));
        let why = self.core.blocked();
        match next {
            None => prop_assert_eq!(why, Blocked::CaughtUp),
            Some(_) if self.used.0 >= self.granted.0 || self.used.1 >= self.granted.1 => {
                prop_assert_eq!(why, Blocked::NoCredit);
            }
            Some(_) if self.outstanding() >= LIMITS.unacked_messages_max => {
                prop_assert_eq!(why, Blocked::UnackedLimit);
            }
            Some(_) if !self.outbox => prop_assert_eq!(why, Blocked::SlowConnection),
            Some(_) => prop_assert_eq!(why, Blocked::ReadFailed, "stuck"),
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn deliveries_stay_within_credit_in_order_and_never_get_stuck(events in prop::collection::vec(event(), 1..80)) {
        let mut model = Model::new();
        for event in events {
            model.apply(event);
            model.drain()?;
        }
    }
}

#[test]
fn a_batch_larger_than_the_whole_byte_grant_is_delivered() {
    let mut core = Core::new(LIMITS, 0, RangeSet::default(), 5);
    core.on_credit(100, 1);
    assert!(matches!(core.step(), Some(Action::Read { from: 0, .. })));
    core.on_read(vec![Stored { base: 0, count: 5, bytes: 4_000 }]);
    let Some(Action::Deliver(delivery)) = core.step() else { panic!("stuck") };
    assert_eq!(delivery.ranges, [(0, 5)]);
    assert_eq!(core.step(), None);
}

#[test]
fn a_read_that_finds_nothing_waits_for_the_retry() {
    let mut core: Core<Stored> = Core::new(LIMITS, 0, RangeSet::default(), 5);
    core.on_credit(100, 100);
    assert!(core.step().is_some());
    core.on_read(Vec::new());
    assert_eq!((core.step(), core.blocked()), (None, Blocked::ReadFailed));
    core.on_retry();
    assert!(core.step().is_some());
}

#[test]
fn what_was_trimmed_is_passed_over() {
    let mut core: Core<Stored> = Core::new(LIMITS, 0, RangeSet::default(), 5);
    core.on_credit(100, 100);
    assert!(core.step().is_some());
    core.on_trimmed(3);
    assert!(matches!(core.step(), Some(Action::Read { from: 3, .. })));
    core.on_trimmed(5);
    assert_eq!((core.step(), core.blocked()), (None, Blocked::CaughtUp));
}

#[test]
fn a_batch_behind_a_gap_that_begins_settled_gives_no_empty_range() {
    let mut settled = RangeSet::default();
    settled.insert(10, 12);
    settled.insert(20, 30);
    let mut core = Core::new(LIMITS, 0, settled, 40);
    core.on_credit(100, 10_000);
    assert!(matches!(core.step(), Some(Action::Read { from: 0, .. })));
    // Everything below 10 was trimmed; the first batch begins, the second is, settled.
    let batch = |base| Stored { base, count: 10, bytes: 1 };
    core.on_read(vec![batch(10), batch(20), batch(30)]);
    let Some(Action::Deliver(first)) = core.step() else { panic!("10..20 is deliverable") };
    assert_eq!((first.ranges, first.messages), (vec![(12, 20)], 8));
    let Some(Action::Deliver(second)) = core.step() else { panic!("30..40 is deliverable") };
    assert_eq!((second.batch.base, second.ranges), (30, vec![(30, 40)]));
}
