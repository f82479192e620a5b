use proptest::prelude::*;

use super::*;
use crate::types::Access;

const MAX: usize = 10;

fn session(id: &ProducerId, stream: u64, may_create: bool) -> Open<'_> {
    let (access, held_epoch) = (Access::Shared, None);
    Open {
        id,
        session: true,
        stream,
        may_create,
        access,
        held_epoch,
        now_ms: 0,
        producers_max: MAX,
    }
}

fn opened() -> (Window, ProducerId) {
    let mut window = Window::default();
    let id = ProducerId::from_static(b"p");
    assert_eq!(window.open(&session(&id, 0, true)), Ok(Opened::At { epoch: 0, persisted: 0 }));
    (window, id)
}

fn batch(prev: u64, lo: u64, hi: u64) -> Chain {
    Chain { prev, lo, hi }
}

#[test]
fn a_repeat_of_what_is_only_pushed_is_no_duplicate() {
    // T32: it waits for the first one's outcome, and after a failure it may be sent again.
    let (mut window, id) = opened();
    assert_eq!(window.check(&id, 0, batch(0, 1, 5), 0), Verdict::Accept);
    assert_eq!(window.check(&id, 0, batch(0, 1, 5), 0), Verdict::Pending);
    window.forget_pending();
    assert_eq!(window.check(&id, 0, batch(0, 1, 5), 0), Verdict::Accept);
    window.on_stored(&id, 5, Offset(0));
    assert_eq!(window.check(&id, 0, batch(0, 1, 5), 0), Verdict::Stored(Some(Offset(0))));
}

#[test]
fn what_was_pipelined_behind_a_refusal_is_refused() {
    // T41: 1..2 was refused elsewhere (quota); 3..4 must not slip in before it.
    let (mut window, id) = opened();
    assert_eq!(window.check(&id, 0, batch(2, 3, 4), 0), Verdict::OutOfSequence { pushed: 0 });
    assert_eq!(window.check(&id, 0, batch(0, 1, 2), 0), Verdict::Accept);
    assert_eq!(window.check(&id, 0, batch(2, 3, 4), 0), Verdict::Accept);
}

#[test]
fn another_cut_of_the_same_sequences_is_a_conflict() {
    let (mut window, id) = opened();
    assert_eq!(window.check(&id, 0, batch(0, 1, 5), 0), Verdict::Accept);
    assert_eq!(window.check(&id, 0, batch(0, 1, 7), 0), Verdict::Conflict);
    window.on_stored(&id, 5, Offset(0));
    assert_eq!(window.check(&id, 0, batch(2, 3, 7), 0), Verdict::Conflict);
    for bad in [batch(5, 0, 0), batch(5, 8, 7), batch(9, 9, 9)] {
        assert_eq!(window.check(&id, 0, bad, 0), Verdict::Conflict);
    }
}

#[test]
fn an_older_stream_is_refused_and_an_unknown_resume_is_not_a_new_producer() {
    let (mut window, id) = opened();
    assert_eq!(window.open(&session(&id, 3, false)), Ok(Opened::At { epoch: 0, persisted: 0 }));
    assert_eq!(window.check(&id, 2, batch(0, 1, 1), 0), Verdict::OldStream);
    assert_eq!(window.open(&session(&id, 2, false)), Err(OpenRefused::OldStream { current: 3 }));
    let other = ProducerId::from_static(b"other");
    assert_eq!(window.open(&session(&other, 0, false)), Err(OpenRefused::Unknown));
}

#[test]
fn a_full_window_lets_the_oldest_idle_session_go_but_no_named_producer() {
    let mut window = Window::default();
    for n in 0..MAX as u64 {
        let id = ProducerId::from(format!("p{n}"));
        let open = Open { session: n != 0, now_ms: n, ..session(&id, 0, true) };
        assert!(window.open(&open).is_ok());
        if n < 3 {
            window.disconnected(&id, 0, n);
        }
    }
    let late = ProducerId::from_static(b"late");
    assert!(window.open(&Open { now_ms: 99, ..session(&late, 0, true) }).is_ok());
    assert_eq!(window.len(), MAX);
    let gone = ProducerId::from_static(b"p1");
    assert_eq!(window.open(&session(&gone, 0, false)), Err(OpenRefused::Unknown));
    let named = ProducerId::from_static(b"p0");
    assert!(window.open(&Open { session: false, ..session(&named, 0, false) }).is_ok());
    for n in 2..MAX as u64 {
        window.disconnected(&ProducerId::from(format!("p{n}")), 0, 0);
    }
    let more: Vec<_> = (0..MAX)
        .map(|n| {
            window.open(&Open {
                session: false,
                ..session(&ProducerId::from(format!("n{n}")), 0, true)
            })
        })
        .collect();
    assert_eq!(more.last(), Some(&Err(OpenRefused::Full)), "named producers stay");
}

#[test]
fn a_session_leaves_only_some_time_after_its_last_stream_ended() {
    let (mut window, id) = opened();
    window.expire_sessions(1_000);
    assert_eq!(window.len(), 1, "connected, however long it is silent");
    assert!(window.open(&session(&id, 1, false)).is_ok());
    window.disconnected(&id, 0, 1_000);
    window.expire_sessions(5_000);
    assert_eq!(window.len(), 1, "an older stream's end says nothing of the newer one");
    window.disconnected(&id, 1, 6_000);
    window.expire_sessions(6_000);
    assert_eq!(window.len(), 1);
    let mut loaded = Window::restore(&window.snapshot(Offset(0)));
    loaded.begin_absences(9_000);
    loaded.expire_sessions(8_000);
    assert_eq!(loaded.len(), 1, "a load gives it time to come back");
    loaded.expire_sessions(9_001);
    assert!(loaded.is_empty());
}

#[test]
fn a_stream_opens_only_when_what_is_on_its_way_is_settled() {
    let (mut window, id) = opened();
    assert_eq!(window.check(&id, 0, batch(0, 1, 5), 0), Verdict::Accept);
    assert_eq!(window.open(&session(&id, 1, false)), Ok(Opened::Pending));
    assert_eq!(window.check(&id, 0, batch(5, 6, 6), 0), Verdict::OldStream);
    window.on_stored(&id, 5, Offset(0));
    assert_eq!(window.reopen(&id, 1), Ok(Opened::At { epoch: 0, persisted: 5 }));
    assert_eq!(window.reopen(&id, 0), Err(OpenRefused::OldStream { current: 1 }));
}

proptest! {
    /// A producer that re-sends at random, over random failures: each sequence is stored once, in order.
    #[test]
    fn every_sequence_is_stored_once_and_in_order(
        actions in prop::collection::vec((0u64..4, 1u64..4, any::<bool>()), 1..60)
    ) {
        let (mut window, id) = opened();
        let mut cut: Vec<Chain> = Vec::new();   // batches as first sent
        let mut waiting: VecDeque<Chain> = VecDeque::new();
        let mut stored: Vec<u64> = Vec::new();
        for (action, size, flag) in actions {
            match action {
                0 | 1 => {
                    let prev = cut.last().map_or(0, |chain| chain.hi);
                    cut.push(batch(prev, prev + 1, prev + size));
                }
                2 => if let Some(chain) = waiting.pop_front() {
                    stored.extend(chain.lo..=chain.hi);
                    window.on_stored(&id, chain.hi, Offset(chain.lo));
                },
                _ => if flag { waiting.clear(); window.forget_pending(); },
            }
            // Everything not yet stored is sent again, in order, as it was cut.
            for chain in &cut {
                match window.check(&id, 0, *chain, 0) {
                    Verdict::Accept => waiting.push_back(*chain),
                    Verdict::Stored(_) => prop_assert!(stored.contains(&chain.hi), "I13"),
                    Verdict::Pending => prop_assert!(waiting.contains(chain)),
                    other => prop_assert!(false, "{other:?}"),
                }
            }
        }
        prop_assert!(stored.iter().copied().eq(1..=stored.len() as u64), "{stored:?}");
        let restored = Window::restore(&window.snapshot(Offset(0)));
        prop_assert_eq!(restored.snapshot(Offset(0)), window.snapshot(Offset(0)));
    }
}

mod access {
    use geminga_proto::storage::v1::entry_header::Grant;

    use super::*;

    fn named(id: &ProducerId, stream: u64, access: Access) -> Open<'_> {
        Open { session: false, access, ..session(id, stream, true) }
    }

    fn grant(opened: Result<Opened, OpenRefused>) -> Grant {
        match opened {
            Ok(Opened::Grant(grant)) => grant,
            other => panic!("no grant: {other:?}"),
        }
    }

    fn ids() -> [ProducerId; 3] {
        [b"a", b"b", b"c"].map(|name| ProducerId::from_static(name))
    }

    #[test]
    fn each_stream_of_a_name_has_an_epoch_and_who_holds_a_lower_one_is_refused() {
        let (mut window, [a, ..]) = (Window::default(), ids());
        assert_eq!(grant(window.open(&named(&a, 5, Access::Shared))).epoch, 1);
        let same = window.open(&named(&a, 5, Access::Shared));
        assert_eq!(same, Ok(Opened::At { epoch: 1, persisted: 0 }), "the same stream");
        assert_eq!(grant(window.open(&named(&a, 6, Access::Shared))).epoch, 2);
        let comes_back = Open { held_epoch: Some(1), ..named(&a, 7, Access::Shared) };
        assert_eq!(window.open(&comes_back), Err(OpenRefused::OldEpoch { current: 2 }));
        let comes_back = Open { held_epoch: Some(2), ..comes_back };
        assert_eq!(grant(window.open(&comes_back)).epoch, 3);
    }

    #[test]
    fn one_producer_may_have_the_segment_for_itself_while_its_stream_is_open() {
        let (mut window, [a, b, _]) = (Window::default(), ids());
        grant(window.open(&named(&a, 1, Access::Shared)));
        let refused = window.open(&named(&b, 1, Access::Exclusive));
        assert_eq!(refused, Err(OpenRefused::OthersConnected));
        window.disconnected(&a, 1, 0);
        grant(window.open(&named(&b, 1, Access::Exclusive)));
        let held = Err(OpenRefused::Held { holder: b.clone() });
        assert_eq!(window.open(&named(&a, 2, Access::Shared)), held);
        assert_eq!(window.open(&named(&a, 2, Access::Exclusive)), held);
        assert_eq!(window.check(&a, 1, batch(0, 1, 1), 0), Verdict::Fenced);
        assert_eq!(window.check(&b, 1, batch(0, 1, 1), 0), Verdict::Accept);
        // A call beside its stream keeps it; a newer stream that shares gives it up, as its end does.
        assert!(window.open(&named(&b, 1, Access::Shared)).is_ok());
        window.disconnected(&b, 1, 0);
        assert_eq!(window.open(&named(&a, 2, Access::Shared)), held);
        grant(window.open(&named(&b, 2, Access::Shared)));
        grant(window.open(&named(&a, 2, Access::Shared)));
        window.disconnected(&a, 2, 0);
        grant(window.open(&named(&b, 3, Access::Exclusive)));
        window.disconnected(&b, 2, 0);
        assert_eq!(window.open(&named(&a, 3, Access::Shared)), held, "an older stream ended");
        window.disconnected(&b, 3, 0);
        grant(window.open(&named(&a, 3, Access::Shared)));
    }

    #[test]
    fn who_was_fenced_stays_out_and_may_only_begin_anew() {
        let (mut window, [a, b, _]) = (Window::default(), ids());
        let s = ProducerId::from_static(b"session:1");
        assert!(window.open(&session(&s, 0, true)).is_ok());
        let first = grant(window.open(&named(&a, 1, Access::Shared)));
        assert_eq!(window.check(&a, 1, batch(0, 1, 1), 0), Verdict::Accept);
        window.on_stored(&a, 1, Offset(0));
        let fencing = named(&b, 1, Access::ExclusiveWithFencing);
        let second = grant(window.open(&fencing));
        assert_eq!((second.epoch, second.fence), (1, 1));
        let refused = window.open(&Open { session: true, ..fencing });
        assert_eq!(refused, Err(OpenRefused::NotNamed));
        // What a later owner finds: a snapshot of any moment, and all grants again.
        let mut replayed = Window::default();
        replayed.replay(&s, true, 1, Offset(0), 0);
        replayed.replay_grant(&first, 0);
        replayed.replay(&a, false, 1, Offset(1), 0);
        replayed.replay_grant(&second, 0);
        let mut again = Window::restore(&window.snapshot(Offset(2)));
        again.replay_grant(&first, 0);
        again.replay_grant(&second, 0);
        window.disconnected(&b, 1, 0);
        for window in [&mut window, &mut replayed, &mut again] {
            assert_eq!(window.check(&a, 1, batch(1, 2, 2), 0), Verdict::Fenced);
            assert_eq!(window.check(&s, 0, batch(1, 2, 2), 0), Verdict::Fenced);
            let resumed = window.open(&session(&s, 1, false));
            assert_eq!(resumed, Err(OpenRefused::OldEpoch { current: 0 }));
            let back = Open { held_epoch: Some(1), ..named(&a, 2, Access::Shared) };
            assert_eq!(window.open(&back), Err(OpenRefused::OldEpoch { current: 1 }));
            let anew = grant(window.open(&named(&a, 2, Access::Shared)));
            assert_eq!((anew.epoch, anew.fence), (2, 1));
            assert_eq!(window.check(&a, 2, batch(1, 2, 2), 0), Verdict::Accept);
            assert_eq!(
                window.open(&named(&b, 0, Access::Shared)),
                Err(OpenRefused::OldStream { current: 1 })
            );
        }
    }

    #[test]
    fn who_fences_while_another_does_is_the_last_one() {
        let (mut window, [a, b, c]) = (Window::default(), ids());
        let grants =
            [&a, &b, &c].map(|id| grant(window.open(&named(id, 1, Access::ExclusiveWithFencing))));
        assert_eq!(grants.map(|grant| grant.fence), [1, 2, 3]);
        assert_eq!(window.reopen(&a, 1), Err(OpenRefused::OldEpoch { current: 1 }));
        assert_eq!(window.reopen(&b, 1), Err(OpenRefused::OldEpoch { current: 1 }));
        assert_eq!(window.reopen(&c, 1), Ok(Opened::At { epoch: 1, persisted: 0 }));
        assert_eq!(window.check(&b, 1, batch(0, 1, 1), 0), Verdict::Fenced);
    }
}
