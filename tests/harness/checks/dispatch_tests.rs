use super::*;

/// The first violation of these events, with two attempts allowed and keys in order.
fn judge(events: &[Event]) -> Option<(&'static str, String)> {
    let mut checks = DispatchChecks::default();
    let promised = Event::Promised { key_order: true, attempts_max: 2, deliver_at: true };
    let begun = load(1);
    let all = [promised, begun];
    let mut all = all.iter().chain(events);
    all.find_map(|event| checks.observe(event).err().map(|broken| (broken.invariant, broken.what)))
}

fn load(owner: u32) -> Event {
    Event::LoadBegun { segment: (1, 0), owner }
}

/// Offset, with the key 0, delivered by an owner.
fn given(owner: u32, offset: u64, attempt: u32) -> Event {
    at(owner, offset, attempt, 1_000)
}

fn at(owner: u32, offset: u64, attempt: u32, now_ms: u64) -> Event {
    Event::Dispatched { owner, consumer: 9, attempt, now_ms, messages: vec![(offset, 0, 0)] }
}

fn asked(offset: u64) -> Event {
    Event::AcceptAsked { offset, key: 0 }
}

fn accepted(owner: u32, offset: u64) -> Event {
    Event::AcceptTold { owner, offsets: vec![offset] }
}

fn failed(owner: u32, offset: u64, attempt: u32, due: u64) -> Event {
    Event::FailureTold { owner, items: vec![(offset, offset + 1, attempt, due)] }
}

fn copied(number: u64, offset: u64, attempt: u32) -> Event {
    Event::DeadCopied { owner: 1, number, offset, attempt, rejected: false }
}

#[test]
fn a_sound_history_passes() {
    let sound = [
        given(1, 0, 1),
        given(1, 1, 1),
        asked(0),
        accepted(1, 0),
        failed(1, 1, 2, 1_500),
        load(2),
        at(2, 1, 2, 1_500),
        copied(1, 1, 2),
        copied(1, 1, 2), // a new owner stores it again under the same number
        Event::AllDispatched { end: 2 },
    ];
    assert_eq!(judge(&sound), None);
    // A stale owner may deliver what others know to be settled.
    let stale = [load(2), given(2, 0, 1), asked(0), accepted(2, 0), given(1, 0, 1)];
    assert_eq!(judge(&stale), None);
}

#[test]
fn each_kind_of_wrong_is_seen() {
    let wrong: [(&str, &str, Vec<Event>); 12] = [
        (
            "I14",
            "accept was confirmed before",
            vec![given(1, 0, 1), asked(0), accepted(1, 0), given(1, 0, 1)],
        ),
        (
            "I14",
            "accept was confirmed before",
            vec![given(1, 0, 1), asked(0), accepted(1, 0), load(2), given(2, 0, 1)],
        ),
        (
            "I14",
            "was to be the next",
            vec![given(1, 0, 1), failed(1, 0, 2, 0), load(2), given(2, 0, 1)],
        ),
        ("I14", "was not due before", vec![given(1, 0, 1), failed(1, 0, 2, 2_000), given(1, 0, 2)]),
        ("I14", "never was as the one before", vec![given(1, 0, 2)]),
        ("I14", "as attempt 3 of 2", vec![given(1, 0, 1), given(1, 0, 2), given(1, 0, 3)]),
        (
            "I14",
            "is delivered 4 times",
            vec![given(1, 0, 1), given(1, 0, 1), given(1, 0, 1), given(1, 0, 1)],
        ),
        ("I14", "after attempt 1 of 2", vec![given(1, 0, 1), copied(1, 0, 1)]),
        (
            "I14",
            "and then",
            vec![
                given(1, 0, 1),
                given(1, 0, 2),
                given(1, 1, 1),
                given(1, 1, 2),
                copied(1, 0, 2),
                copied(1, 1, 2),
            ],
        ),
        (
            "I11",
            "of its key",
            vec![
                given(1, 0, 1),
                given(1, 1, 1),
                asked(1),
                accepted(1, 1),
                asked(0),
                accepted(1, 0),
            ],
        ),
        ("I12", "never delivered", vec![Event::AllDispatched { end: 1 }]),
        ("I12", "nobody accepted it", vec![given(1, 0, 1), Event::AllDispatched { end: 1 }]),
    ];
    for (invariant, what, events) in wrong {
        let found = judge(&events).unwrap_or_else(|| panic!("{what}: nothing was found"));
        assert_eq!(found.0, invariant, "{what}: {found:?}");
        assert!(found.1.contains(what), "{what}: {found:?}");
    }
    // Before its deliver-at.
    let early = Event::Dispatched {
        owner: 1,
        consumer: 9,
        attempt: 1,
        now_ms: 1_000,
        messages: vec![(0, 0, 1_001)],
    };
    assert!(judge(&[early]).is_some_and(|found| found.1.contains("not to be before")));
}
