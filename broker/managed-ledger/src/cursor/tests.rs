use proptest::prelude::*;

use super::*;
use crate::types::{DeadLetter, LeaseRecord, Redelivery};

const ID: SubscriptionId = SubscriptionId(9);
const END: u64 = 60;

fn bounds(holes_max: usize) -> Bounds {
    let (first, end) = (Offset(2), Offset(END));
    Bounds { first, end, holes_max, queued_runs: 0, queued_decisions: 0, reset_to: None }
}

fn restored(cursor: &Cursor) -> Cursor {
    let records = cursor.encode(ID);
    let Record::State(state) = &records[0] else { panic!("the state comes first") };
    let mut restored = Cursor::decode(state);
    records[1..].iter().for_each(|record| restored.apply(record));
    restored
}

/// A step of the dispatcher; numbers of decisions are put in when it is taken.
#[derive(Clone, Debug)]
enum Step {
    Settle(Settlement),
    Log(Vec<LeaseRecord>),
}

fn run() -> impl Strategy<Value = (Offset, Offset)> {
    (0u64..50, 0u64..8).prop_map(|(first, more)| (Offset(first), Offset(first + more)))
}

fn leases() -> impl Strategy<Value = Vec<LeaseRecord>> {
    let lease = (0u64..3, prop::collection::vec(run(), 0..3), 1u32..4, 0u64..3);
    let lease = lease.prop_map(|(consumer, ranges, attempt, left_ms)| {
        let name = format!("c{consumer}");
        LeaseRecord { consumer, name, ranges, attempt, left_ms }
    });
    prop::collection::vec(lease, 0..3)
}

fn step() -> impl Strategy<Value = Step> {
    let redelivery = (run(), 1u32..4, 0u64..3)
        .prop_map(|((first, last), attempt, due_ms)| Redelivery { first, last, attempt, due_ms });
    let dead = (0u64..50, 1u32..4).prop_map(|(offset, attempt)| DeadLetter {
        number: 0,
        offset: Offset(offset),
        attempt,
        reason: "x".repeat(300),
    });
    let key = (0u32..9, 0u32..3).prop_map(|(first, more)| KeyOwner {
        first,
        last: first + more,
        consumer: format!("c{more}"),
    });
    let settlement = prop_oneof![
        2 => (0u64..50).prop_map(|offset| Settlement::UpTo(Offset(offset))),
        4 => prop::collection::vec(run(), 0..4).prop_map(Settlement::Accept),
        4 => prop::collection::vec(redelivery, 0..4).prop_map(Settlement::Redeliver),
        2 => dead.prop_map(|dead| Settlement::DeadLetter(vec![dead])),
        1 => prop::collection::vec(key, 0..3).prop_map(Settlement::Keys),
        1 => leases().prop_map(Settlement::Leases),
        1 => (0u64..80).prop_map(|offset| Settlement::Reset(Offset(offset))),
    ];
    prop_oneof![4 => settlement.prop_map(Step::Settle), 1 => leases().prop_map(Step::Log)]
}

/// The record of a step, if it leaves one.
fn record(cursor: &Cursor, step: &Step, holes_max: usize) -> Result<Option<Record>, CursorError> {
    match step {
        Step::Log(leases) => {
            let (decided, _) = cursor.log_leases(ID, leases, &bounds(holes_max));
            Ok(decided.map(|decided| decided.record))
        }
        Step::Settle(settlement) => {
            let mut settlement = settlement.clone();
            if let Settlement::DeadLetter(dead) = &mut settlement {
                for (one, number) in dead.iter_mut().zip(cursor.redelivery().dead_letters + 1..) {
                    one.number = number;
                }
            }
            cursor.settle(ID, &settlement, &bounds(holes_max)).map(|decided| Some(decided.record))
        }
    }
}

/// Whether the offset is settled, and what is known of it.
fn settled(cursor: &Cursor, offset: u64) -> bool {
    let view = cursor.view(Offset(END));
    view.mark_delete_next.0 > offset
        || view.holes.iter().any(|(first, last)| first.0 <= offset && offset <= last.0)
}

proptest! {
    #[test]
    fn a_snapshot_and_later_records_give_the_state_back(
        steps in prop::collection::vec(step(), 0..40), snapshot_at in 0usize..40
    ) {
        let mut cursor = Cursor::starting_at(Offset(3), 0);
        let mut copy = cursor.clone();
        for (n, step) in steps.iter().enumerate() {
            if n == snapshot_at {
                copy = restored(&cursor);
            }
            let Some(record) = record(&cursor, step, 1000).expect("in range") else { continue };
            let (before, epoch) = (cursor.mark_delete_next(), cursor.reset_epoch());
            cursor.apply(&record);
            prop_assert!(
                cursor.mark_delete_next() >= before || cursor.reset_epoch() > epoch,
                "mark-delete fell (C2)"
            );
            copy.apply(&record);
            prop_assert_eq!(&copy, &cursor);
            let view = cursor.redelivery();
            let pending = view.pending.iter().map(|one| (one.first, one.last));
            let leased = view.leases.iter().flat_map(|lease| lease.ranges.clone());
            let dead = view.dead.iter().map(|one| (one.offset, one.offset));
            for (first, last) in pending.chain(leased).chain(dead) {
                prop_assert!((first.0..=last.0).all(|offset| !settled(&cursor, offset)), "settled and held");
            }
        }
        let view = cursor.view(Offset(END));
        let open = (0..END).filter(|offset| !settled(&cursor, *offset)).count() as u64;
        prop_assert_eq!(view.backlog, open);
    }

    #[test]
    fn a_lost_record_costs_redelivery_and_never_skips(
        steps in prop::collection::vec(step(), 1..30), lost in 0usize..30
    ) {
        // What the log says, with and without one entry; a reset is said twice, so that no single entry holds it alone.
        let mut cursor = Cursor::starting_at(Offset(3), 0);
        let mut damaged = cursor.clone();
        let mut entry = 0;
        let mut ever: Vec<u64> = (0..3).collect();
        for step in &steps {
            let Some(record) = record(&cursor, step, 1000).expect("in range") else { continue };
            cursor.apply(&record);
            if matches!(record, Record::Reset(_)) {
                ever.clear();
            }
            ever.extend((0..END).filter(|offset| settled(&cursor, *offset)));
            match entry == lost {
                true => damaged.skip_numbers(),
                false => damaged.apply(&record),
            }
            entry += 1;
            if matches!(record, Record::Reset(_)) {
                match entry == lost {
                    true => damaged.skip_numbers(),
                    false => damaged = restored(&cursor),
                }
                entry += 1;
            }
            for offset in (0..END).filter(|offset| settled(&damaged, *offset)) {
                prop_assert!(ever.contains(&offset) , "{offset} was never settled");
            }
            let (is, was) = (damaged.redelivery().dead_letters, cursor.redelivery().dead_letters);
            prop_assert!(is >= was, "a number may be used twice");
        }
    }

    #[test]
    fn the_number_of_runs_stays_under_its_bound(steps in prop::collection::vec(step(), 1..60)) {
        let mut cursor = Cursor::default();
        for step in steps {
            match record(&cursor, &step, 6) {
                Ok(record) => record.iter().for_each(|record| cursor.apply(record)),
                Err(error) => prop_assert_eq!(error, CursorError::TooManyRuns { limit: 6 }),
            }
            prop_assert!(cursor.runs() <= 6, "{cursor:?}");
            let oldest = cursor.mark_delete_next();
            if oldest < Offset(END) {
                let one = Settlement::Accept(vec![(oldest, oldest)]);
                prop_assert!(cursor.settle(ID, &one, &bounds(6)).is_ok(), "the oldest hole may always be filled");
            }
            for one in cursor.redelivery().pending.into_iter().filter(|one| one.first == one.last) {
                let one = Settlement::Accept(vec![(one.first, one.last)]);
                prop_assert!(cursor.settle(ID, &one, &bounds(6)).is_ok(), "a redelivered message may be accepted");
            }
        }
    }
}

#[test]
fn more_redelivery_state_than_fits_one_record_goes_into_several() {
    let mut cursor = Cursor::starting_at(Offset(0), 0);
    let end = Offset(200_000);
    let bounds = Bounds { end, ..bounds(100_000) };
    let every = |n: u64, by: u64| (Offset(n * by), Offset(n * by));
    let mut take = |settlement: Settlement| {
        let decided = cursor.settle(ID, &settlement, &bounds).expect("within bounds");
        cursor.apply(&decided.record);
    };
    take(Settlement::Accept((1..9_000).map(|n| every(n, 20)).collect()));
    take(Settlement::Redeliver(
        (1..9_000)
            .map(|n| Redelivery {
                first: Offset(n * 20 + 2),
                last: Offset(n * 20 + 4),
                attempt: 2,
                due_ms: n,
            })
            .collect(),
    ));
    take(Settlement::Leases(
        (1..9_000)
            .map(|n| LeaseRecord {
                consumer: n,
                name: format!("c{n}"),
                ranges: vec![
                    (Offset(n * 20 + 3), Offset(n * 20 + 7)),
                    (Offset(n * 20 + 9), Offset(n * 20 + 9)),
                ],
                attempt: 2,
                left_ms: 7,
            })
            .collect(),
    ));
    for part in 0..3u64 {
        let dead = (part * 3_000 + 1..part * 3_000 + 3_001).map(|n| DeadLetter {
            number: n,
            offset: Offset(n * 20 + 11),
            attempt: 3,
            reason: "no".to_owned(),
        });
        take(Settlement::DeadLetter(dead.collect()));
    }
    let records = cursor.encode(ID);
    assert!(records.len() > 4, "{}", records.len());
    assert!(records.iter().all(|record| record.encoded_len() < 1 << 20));
    assert_eq!(restored(&cursor), cursor);
    assert!(cursor.redelivery().leases_exact);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let cursor = Cursor::default();
    let out = |settlement: Settlement| {
        let bounds = Bounds { end: Offset(5), ..bounds(10) };
        assert_eq!(
            cursor.settle(ID, &settlement, &bounds),
            Err(CursorError::OutOfRange),
            "{settlement:?}"
        );
    };
    let pending = |first, last, attempt| {
        Settlement::Redeliver(vec![Redelivery {
            first: Offset(first),
            last: Offset(last),
            attempt,
            due_ms: 0,
        }])
    };
    let dead = |numbers: &[u64], offset| {
        let one = |(n, number): (u64, &u64)| DeadLetter {
            number: *number,
            offset: Offset(offset + n),
            attempt: 1,
            reason: String::new(),
        };
        Settlement::DeadLetter((0..).zip(numbers).map(one).collect())
    };
    out(Settlement::UpTo(Offset(5)));
    out(Settlement::Accept(vec![(Offset(2), Offset(1))]));
    out(pending(2, 1, 1));
    out(pending(0, 5, 1));
    out(pending(0, 1, 0));
    out(dead(&[2], 0));
    out(dead(&[1, 1], 0));
    out(dead(&[1], 5));
    let twice = DeadLetter { number: 2, offset: Offset(1), attempt: 1, reason: String::new() };
    out(Settlement::DeadLetter(vec![DeadLetter { number: 1, ..twice.clone() }, twice]));
    let owner =
        |first, last, consumer: usize| KeyOwner { first, last, consumer: "c".repeat(consumer) };
    out(Settlement::Keys(vec![owner(2, 1, 1)]));
    out(Settlement::Keys(vec![owner(0, 1, 257)]));
    let lease = |last, name: usize| LeaseRecord {
        consumer: 1,
        name: "n".repeat(name),
        ranges: vec![(Offset(0), Offset(last))],
        attempt: 1,
        left_ms: 0,
    };
    out(Settlement::Leases(vec![lease(5, 1)]));
    out(Settlement::Leases(vec![lease(4, 257)]));
    let large = Settlement::Keys((0..2_000).map(|n| owner(n, n, 200)).collect());
    let refused = cursor.settle(ID, &large, &bounds(10));
    assert_eq!(refused, Err(CursorError::TooManyRuns { limit: 10 }));
}

#[test]
fn an_attempt_outlives_the_lease_above_it_and_stale_leases_count_for_nothing() {
    let mut cursor = Cursor::default();
    let mut take = |step: Step| {
        let record = record(&cursor, &step, 100).expect("in range").expect("a record");
        cursor.apply(&record);
        cursor.redelivery()
    };
    let lease = |attempt| LeaseRecord {
        consumer: 1,
        name: "c".to_owned(),
        ranges: vec![(Offset(0), Offset(5))],
        attempt,
        left_ms: 9,
    };
    let second = Redelivery { first: Offset(2), last: Offset(3), attempt: 2, due_ms: 0 };
    take(Step::Log(vec![lease(1)]));
    let view = take(Step::Settle(Settlement::Redeliver(vec![second])));
    assert_eq!(view.leases[0].ranges, [(Offset(0), Offset(1)), (Offset(4), Offset(5))]);
    // Logged late: the first attempt of 2 and 3 has ended.
    let view = take(Step::Log(vec![lease(1)]));
    assert_eq!(view.leases[0].ranges, [(Offset(0), Offset(1)), (Offset(4), Offset(5))]);
    let view =
        take(Step::Log(vec![LeaseRecord { ranges: vec![(Offset(2), Offset(3))], ..lease(2) }]));
    assert_eq!((view.pending.as_slice(), view.leases.len()), ([second].as_slice(), 2));
    let view = take(Step::Settle(Settlement::Accept(vec![(Offset(0), Offset(9))])));
    assert_eq!((view.pending.len(), view.leases.len()), (0, 0));
}

#[test]
fn a_record_from_before_a_reset_counts_for_nothing() {
    let cursor = Cursor { reset_epoch: 1, ..Cursor::default() };
    let steps = [
        Settlement::UpTo(Offset(9)),
        Settlement::Redeliver(vec![Redelivery {
            first: Offset(0),
            last: Offset(1),
            attempt: 2,
            due_ms: 0,
        }]),
        Settlement::DeadLetter(vec![DeadLetter {
            number: 1,
            offset: Offset(0),
            attempt: 1,
            reason: String::new(),
        }]),
        Settlement::Leases(vec![LeaseRecord {
            consumer: 1,
            name: String::new(),
            ranges: vec![(Offset(0), Offset(5))],
            attempt: 1,
            left_ms: 0,
        }]),
    ];
    for step in steps {
        let mut old = cursor.settle(ID, &step, &bounds(10)).expect("in range").record;
        stamp(&mut old, 0);
        let mut after = cursor.clone();
        after.apply(&old);
        assert_eq!(after, cursor, "{step:?}");
    }
}

#[test]
fn a_reset_keeps_who_owns_which_keys_and_how_many_decisions_there_were() {
    let mut cursor = Cursor::default();
    let keys = vec![KeyOwner { first: 0, last: 9, consumer: "c".to_owned() }];
    let dead = DeadLetter { number: 1, offset: Offset(7), attempt: 1, reason: String::new() };
    for step in [
        Settlement::Keys(keys.clone()),
        Settlement::DeadLetter(vec![dead]),
        Settlement::Accept(vec![(Offset(9), Offset(9))]),
        Settlement::Reset(Offset(1)),
    ] {
        let record = cursor.settle(ID, &step, &bounds(10)).expect("in range").record;
        cursor.apply(&record);
    }
    let expected =
        RedeliveryView { keys, dead_letters: 1, reset_epoch: 1, ..RedeliveryView::default() };
    assert_eq!(cursor.redelivery(), expected);
    assert_eq!(cursor.mark_delete_next(), Offset(2), "not below the first offset kept");
    assert_eq!(cursor.view(Offset(END)).holes, []);
}

#[test]
fn a_lost_reset_is_noticed_by_what_follows_it_and_everything_is_delivered_again() {
    let mut cursor = Cursor::starting_at(Offset(40), 0);
    let acked = Acked { ranges: vec![20, 21], reset_epoch: 1, ..Acked::default() };
    cursor.apply(&Record::Acked(acked));
    assert_eq!(cursor.mark_delete_next(), Offset(0));
    assert_eq!(cursor.view(Offset(END)).holes, [(Offset(20), Offset(21))]);
}
