//! Which of our bundles should be another broker's. Pure.

use std::{collections::BTreeMap, time::Duration};

use geminga_proto::ids::Bundle;
use tokio::time::Instant;

use super::placement::{Member, View};

/// Most bundles that one round gives away for balance.
const MOVES_MAX: usize = 16;

/// What the decision is made from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Situation<'a> {
    pub(super) view: &'a View,
    pub(super) me: &'a str,
    /// This broker gives everything away.
    pub(super) drains: bool,
    /// Since when the members are the ones that they are.
    pub(super) stable_since: Instant,
    /// Bundles held, and since when.
    pub(super) held: &'a BTreeMap<Bundle, Instant>,
    pub(super) ttl: Duration,
    pub(super) now: Instant,
}

/// A bundle and the broker that it should go to.
pub(super) type Move = (Bundle, String, Member);

/// A broker that drains gives everything away at once, to whoever is there. Another one gives away what belongs to a live
/// member, once the members have been the same for 2 TTL, a few bundles at a time, and none that it has not held for 2 TTL:
/// so no bundle changes owner twice in 2 TTL (I20).
pub(super) fn plan(situation: &Situation<'_>) -> Vec<Move> {
    let Situation { view, me, drains, stable_since, held, ttl, now } = *situation;
    let settled = |since: Instant| now.saturating_duration_since(since) >= ttl * 2;
    if !drains && !settled(stable_since) {
        return Vec::new();
    }
    let moves = held.iter().filter(|(_, since)| drains || settled(**since)).filter_map(|(b, _)| {
        let (id, member) = view.preferred(*b, drains.then_some(me))?;
        (id != me).then(|| (*b, id.clone(), member.clone()))
    });
    moves.take(if drains { usize::MAX } else { MOVES_MAX }).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TTL: Duration = Duration::from_secs(5);

    fn view(ids: &[&str]) -> View {
        let brokers = ids.iter().map(|id| ((*id).to_owned(), Member::default())).collect();
        View { brokers, wishes: Default::default() }
    }

    fn moves(view: &View, drains: bool, stable: Duration, held_for: Duration) -> Vec<Move> {
        let now = Instant::now() + Duration::from_secs(100);
        let held = (0..64).map(|b| (Bundle(b), now - held_for)).collect();
        let stable_since = now - stable;
        plan(&Situation { view, me: "a", drains, stable_since, held: &held, ttl: TTL, now })
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_member_gets_its_share_a_few_at_a_time_once_all_is_quiet() {
        let view = view(&["a", "b"]);
        assert!(moves(&view, false, TTL, TTL * 9).is_empty(), "the members are new");
        assert!(moves(&view, false, TTL * 9, TTL).is_empty(), "the bundles are new");
        let moves = moves(&view, false, TTL * 2, TTL * 2);
        assert!(!moves.is_empty() && moves.len() <= MOVES_MAX);
        for (bundle, id, _) in &moves {
            assert_eq!(view.preferred(*bundle, None).expect("some").0, id);
            assert_eq!(id, "b");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_drains_gives_everything_away_at_once_and_keeps_it_when_nobody_is_there() {
        let at_once = moves(&view(&["a", "b", "c"]), true, Duration::ZERO, Duration::ZERO);
        assert_eq!(at_once.len(), 64);
        assert!(at_once.iter().all(|(_, id, _)| id != "a"));
        assert!(moves(&view(&["a"]), true, TTL * 9, TTL * 9).is_empty());
        let mut both = view(&["a", "b"]);
        both.wishes.insert("b".into());
        assert!(moves(&both, true, TTL * 9, TTL * 9).is_empty(), "b drains too");
    }

    proptest! {
        /// I20: what the receiver holds afterwards it keeps.
        #[test]
        fn nobody_gives_back_what_it_was_given(count in 2usize..6) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
            let _inside = runtime.enter();
            let ids: Vec<String> = (0..count).map(|n| format!("broker-{n}")).collect();
            let view = view(&ids.iter().map(String::as_str).collect::<Vec<_>>());
            let now = Instant::now() + Duration::from_secs(100);
            let since = now - TTL * 9;
            let held = (0..1_024).map(|b| (Bundle(b), since)).collect();
            let first = Situation {
                view: &view,
                me: "broker-0",
                drains: false,
                stable_since: since,
                held: &held,
                ttl: TTL,
                now,
            };
            for (bundle, to, _) in &plan(&first) {
                let one = BTreeMap::from([(*bundle, since)]);
                let back = plan(&Situation { view: &view, me: to, held: &one, ..first });
                prop_assert!(back.is_empty());
            }
        }
    }
}
