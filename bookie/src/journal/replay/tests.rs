//! The verdict, on journals that a model wrote.

use proptest::prelude::*;

use super::*;

fn group(file: u64, number: u64, first_live: u64) -> Found {
    let header = GroupHeader { file, number, first_live, length: 0, count: 0 };
    Found { header, position: number * 4096, limbo: None }
}

/// A journal's life: files with their groups, as starts and rolls make them.
#[derive(Clone, Debug)]
struct Life {
    found: Vec<Found>,
    highest: u64,
}

#[derive(Clone, Debug)]
enum Event {
    Write,
    Roll,
    /// Restart; the last group may be torn.
    Restart {
        torn: bool,
        copied: usize,
    },
}

fn live(events: &[Event], mark: u64) -> Life {
    let (mut file, mut next, mut first_live) = (1, 2, 1);
    let mut found = vec![group(1, 1, 1)];
    for event in events {
        match event {
            Event::Write => {
                found.push(group(file, next, first_live));
                next += 1;
            }
            Event::Roll => {
                file += 1;
                first_live = next;
                found.push(group(file, next, first_live));
                next += 1;
            }
            Event::Restart { torn, copied } => {
                if *torn {
                    next += 1; // written by nobody's leave: unsynced, lost
                    next -= 1;
                }
                let plan = plan(mark.min(next - 1), &found, &[]);
                let tail: Vec<Found> = plan.take[plan.copy_from..].to_vec();
                file += 1;
                let complete = *copied >= tail.len();
                for copy in tail.iter().take(*copied) {
                    found.push(group(file, copy.header.number, plan.next));
                }
                if complete {
                    found.push(group(file, plan.next, plan.next));
                    next = plan.next + 1;
                    first_live = plan.next;
                } else {
                    // Crashed before the first group: the next event has to be a start as well.
                    let plan = self::plan(mark.min(next - 1), &found, &[]);
                    let tail: Vec<Found> = plan.take[plan.copy_from..].to_vec();
                    file += 1;
                    found
                        .extend(tail.iter().map(|copy| group(file, copy.header.number, plan.next)));
                    found.push(group(file, plan.next, plan.next));
                    next = plan.next + 1;
                    first_live = plan.next;
                }
            }
        }
    }
    Life { found, highest: next - 1 }
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        5 => Just(Event::Write),
        1 => Just(Event::Roll),
        2 => (any::<bool>(), 0usize..6).prop_map(|(torn, copied)| Event::Restart { torn, copied }),
    ];
    prop::collection::vec(event, 0..25)
}

proptest! {
    #[test]
    fn an_undamaged_journal_gives_every_group_after_the_mark_once(events in events(), mark in 1u64..20) {
        let life = live(&events, mark);
        let mark = mark.min(life.highest);
        let plan = plan(mark, &life.found, &[]);
        let numbers: Vec<u64> = plan.take.iter().map(|group| group.header.number).collect();
        prop_assert_eq!(numbers, (mark + 1..=life.highest).collect::<Vec<_>>());
        prop_assert!(plan.damage.is_empty());
        prop_assert_eq!(plan.next, life.highest + 1);
    }

    #[test]
    fn a_group_lost_in_every_copy_is_damage_unless_it_was_the_last(events in events(), lost in 1u64..30) {
        let mut life = live(&events, 0);
        let lost = lost % life.highest + 1;
        life.found.retain(|group| group.header.number != lost);
        let plan = plan(0, &life.found, &[]);
        if lost < life.highest && life.highest > 1 {
            prop_assert!(plan.damage.iter().any(|d| matches!(d, Damage::Missing(a, b) if *a <= lost && lost <= *b)), "{:?}", plan);
        } else {
            prop_assert!(plan.damage.is_empty());
        }
    }

    #[test]
    fn files_called_superseded_are_not_needed(events in events(), mark in 0u64..20) {
        let life = live(&events, mark);
        let whole = plan(mark, &life.found, &[]);
        let found: Vec<Found> =
            life.found.iter().filter(|group| !whole.superseded.contains(&group.header.file)).copied().collect();
        let rest = plan(mark, &found, &[]);
        let numbers = |plan: &Plan| plan.take.iter().map(|group| group.header.number).collect::<Vec<_>>();
        prop_assert_eq!(numbers(&whole), numbers(&rest));
        prop_assert_eq!(whole.damage, rest.damage);
    }
}

#[test]
fn a_newer_file_ends_the_older_ones_whatever_they_show_later() {
    // Group 5 of file 1 was torn when file 2 was started at 5; it must not come back (T46).
    let found = [group(1, 4, 1), group(1, 5, 1), group(1, 6, 1), group(2, 4, 5), group(2, 5, 5)];
    let plan = plan(3, &found, &[]);
    let files: Vec<_> =
        plan.take.iter().map(|group| (group.header.number, group.header.file)).collect();
    assert_eq!(files, [(4, 2), (5, 2)]);
    assert_eq!(plan.next, 6);
}

#[test]
fn a_journal_that_ends_below_the_mark_is_damaged() {
    let below = plan(9, &[group(1, 7, 1)], &[]);
    assert_eq!(below.damage, [Damage::BelowMark(7, 9)]);
    assert_eq!(below.next, 10, "no number is given twice");
}

#[test]
fn a_second_start_does_not_judge_the_same_damage_again() {
    let mut found = vec![group(1, 1, 1), group(1, 3, 1)];
    let first = plan(1, &found, &[]);
    assert_eq!(first.damage, [Damage::Missing(2, 2)]);
    let start = Found { limbo: Some(Bound { generation: 0, revision: 7 }), ..group(2, 4, 4) };
    found.extend([group(2, 3, 4), start]);
    assert!(plan(1, &found, &[]).damage.is_empty());
    found.push(group(2, 6, 4));
    assert_eq!(plan(1, &found, &[]).damage, [Damage::Missing(5, 5)], "new damage is");
}

#[test]
fn an_unfinished_start_is_copied_again_from_what_was_served() {
    let found = [group(1, 1, 1), group(1, 2, 1), group(2, 1, 3)];
    let plan = plan(0, &found, &[]);
    assert_eq!(plan.copy_from, 0);
    assert_eq!(plan.next, 3);
    assert!(plan.superseded.is_empty(), "file 2 was never synced");
}
