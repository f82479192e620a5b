//! Which broker a bundle belongs to, and when one that nobody claims may be taken. Pure.
//!
//! Every bundle has a preferred owner: the broker with the highest score for it (rendezvous hashing). All brokers that see
//! the same members agree without talking, and a member that comes or goes moves only its own share. Two that see
//! different members may disagree for a moment: each would send the client to the other, or both would try to create the
//! claim, which one of them does (O1).

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use bytes::Bytes;
use geminga_proto::ids::Bundle;
use tokio::time::Instant;

/// O3: an expired claim is left to its last owner for so long.
pub(crate) const LEFT_TO_LAST_OWNER: Duration = Duration::from_millis(500);

/// A registered broker.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) instance: Bytes,
    /// `host:port` for clients and brokers.
    pub(crate) address: String,
    /// It says of itself that it takes no bundle and gives its own away.
    pub(crate) draining: bool,
}

/// The registered brokers, and the operator's wishes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct View {
    pub(crate) brokers: BTreeMap<String, Member>,
    /// Brokers that are to give their bundles away.
    pub(crate) wishes: BTreeSet<String>,
}

/// How a claim ended that nobody has made anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Vacated {
    /// Who held it.
    pub(crate) by: String,
    pub(crate) at: Instant,
    /// It was given away: the holder was draining, or had announced the move.
    pub(crate) given: bool,
}

/// What is to be done with a bundle that nobody claims.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Claim it.
    Take,
    /// Ask again after this long.
    Wait(Duration),
    /// It belongs to this broker.
    Elsewhere(String, Member),
}

impl View {
    /// Whether a registered broker gives its bundles away.
    pub(crate) fn drains(&self, broker: &str) -> bool {
        self.wishes.contains(broker) || self.brokers.get(broker).is_some_and(|m| m.draining)
    }

    /// The preferred owner of a bundle: by score among the registered brokers that do not drain, `without` left out.
    pub(crate) fn preferred(
        &self,
        bundle: Bundle,
        without: Option<&str>,
    ) -> Option<(&String, &Member)> {
        let takes = |id: &str| !self.drains(id) && Some(id) != without;
        let candidates = self.brokers.iter().filter(|(id, _)| takes(id));
        candidates.max_by_key(|(id, _)| (score(bundle, id), *id))
    }

    /// What `me` does with a bundle that nobody claims. Without a preferred owner (everybody drains) it is served by whoever
    /// is asked.
    pub(crate) fn unclaimed(
        &self,
        me: &str,
        bundle: Bundle,
        vacated: Option<&Vacated>,
        now: Instant,
    ) -> Verdict {
        match self.preferred(bundle, None) {
            Some((id, member)) if id != me => Verdict::Elsewhere(id.clone(), member.clone()),
            _ => may_take(me, vacated, now),
        }
    }
}

/// The one place that says when a dead owner's bundle may be taken. O3: a claim that ran out is left to its last owner for
/// 500 ms; one that was given away is not.
fn may_take(me: &str, vacated: Option<&Vacated>, now: Instant) -> Verdict {
    match vacated {
        Some(vacated) if vacated.by != me && !vacated.given => {
            let left = (vacated.at + LEFT_TO_LAST_OWNER).saturating_duration_since(now);
            if left.is_zero() { Verdict::Take } else { Verdict::Wait(left) }
        }
        _ => Verdict::Take,
    }
}

/// How much a bundle belongs to a broker. All versions must agree, so the function is spelled out: FNV-1a over the id, then
/// the finalizer of splitmix64 with the bundle mixed in.
fn score(bundle: Bundle, broker: &str) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for byte in broker.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    let mut mixed = hash ^ u64::from(bundle.0).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn view(ids: impl IntoIterator<Item = impl Into<String>>) -> View {
        let brokers = ids.into_iter().map(|id| (id.into(), Member::default())).collect();
        View { brokers, wishes: BTreeSet::new() }
    }

    fn owner(view: &View, bundle: u32) -> Option<String> {
        view.preferred(Bundle(bundle), None).map(|(id, _)| id.clone())
    }

    #[test]
    fn the_scores_are_those_of_every_version() {
        let scores = [(0, "broker-0"), (1, "broker-0"), (1_023, "broker-1"), (7, "")];
        let scores = scores.map(|(bundle, id)| score(Bundle(bundle), id));
        assert_eq!(scores, VECTORS);
    }

    const VECTORS: [u64; 4] = [
        4_917_806_466_637_866_488,
        13_030_579_217_379_762_605,
        915_032_109_514_789_367,
        5_459_338_262_970_964_051,
    ];

    #[test]
    fn each_of_three_gets_about_a_third() {
        let view = view(["broker-0", "broker-1", "broker-2"]);
        for id in view.brokers.keys() {
            let share = (0..1_024).filter(|b| owner(&view, *b).as_ref() == Some(id)).count();
            assert!((270..=410).contains(&share), "{id} has {share}");
        }
    }

    proptest! {
        #[test]
        fn a_member_that_goes_moves_its_own_share_only(ids in prop::collection::btree_set("[a-z]{1,8}", 2..8), gone in any::<prop::sample::Index>()) {
            let before = view(ids.clone());
            let gone = gone.get(&ids.iter().cloned().collect::<Vec<_>>()).clone();
            let mut after = before.clone();
            after.wishes.insert(gone.clone());
            for bundle in 0..256 {
                let (was, is) = (owner(&before, bundle), owner(&after, bundle));
                prop_assert!(is.as_ref() != Some(&gone));
                prop_assert!(was == is || was.as_ref() == Some(&gone));
                let without = before.preferred(Bundle(bundle), Some(&gone)).map(|(id, _)| id.clone());
                prop_assert_eq!(is, without);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_claim_that_ran_out_is_left_to_its_last_owner_for_a_moment() {
        let (view, now) = (view(["a"]), Instant::now());
        let vacated = |by: &str, given| Vacated { by: by.into(), at: now, given };
        let ask = |vacated: &Vacated, after: u64| {
            let now = now + Duration::from_millis(after);
            view.unclaimed("a", Bundle(1), Some(vacated), now)
        };
        assert_eq!(ask(&vacated("b", false), 100), Verdict::Wait(Duration::from_millis(400)));
        assert_eq!(ask(&vacated("b", false), 500), Verdict::Take);
        assert_eq!(ask(&vacated("b", true), 0), Verdict::Take, "it was given away");
        assert_eq!(ask(&vacated("a", false), 0), Verdict::Take, "it was ours");
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_takes_what_belongs_to_a_registered_broker_and_anybody_what_all_give_away() {
        let mut view = view(["a", "b"]);
        let now = Instant::now();
        let of_b = (0..).map(Bundle).find(|b| view.preferred(*b, None).expect("some").0 == "b");
        let of_b = of_b.expect("b has a share");
        let elsewhere = Verdict::Elsewhere("b".into(), Member::default());
        assert_eq!(view.unclaimed("a", of_b, None, now), elsewhere);
        view.wishes.insert("b".into());
        assert_eq!(view.unclaimed("a", of_b, None, now), Verdict::Take);
        assert_eq!(view.unclaimed("b", of_b, None, now), {
            Verdict::Elsewhere("a".into(), Member::default())
        });
        view.brokers.get_mut("a").expect("there").draining = true;
        assert_eq!(view.unclaimed("b", of_b, None, now), Verdict::Take);
    }
}
