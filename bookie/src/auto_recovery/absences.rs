//! Who is missing, and since when the auditor saw it itself (A1, T16). Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use geminga_proto::ids::Incarnation;
use tokio::time::Instant;

/// Incarnations that are known and not registered. It starts empty with every auditor: what an earlier one saw does not
/// count, so that a restart of everything is no loss of everything.
#[derive(Debug, Default)]
pub(crate) struct Absences(BTreeMap<Incarnation, Instant>);

impl Absences {
    /// Takes what is known and registered at `now`.
    pub(crate) fn look(
        &mut self,
        known: &BTreeSet<Incarnation>,
        registered: impl Fn(Incarnation) -> bool,
        now: Instant,
    ) {
        self.0.retain(|missing, _| known.contains(missing) && !registered(*missing));
        for incarnation in known.iter().filter(|known| !registered(**known)) {
            self.0.entry(*incarnation).or_insert(now);
        }
    }

    /// Those missing for at least `after`.
    pub(crate) fn ripe(&self, after: Duration, now: Instant) -> Vec<Incarnation> {
        let long = |since: &Instant| now.duration_since(*since) >= after;
        self.0.iter().filter(|(_, since)| long(since)).map(|(missing, _)| *missing).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_absence_counts_from_when_it_was_seen_and_a_return_ends_it() {
        let (one, two) = (Incarnation(1), Incarnation(2));
        let known = BTreeSet::from([one, two]);
        let after = Duration::from_secs(600);
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut absences = Absences::default();
        absences.look(&known, |_| false, at(0));
        assert_eq!(absences.ripe(after, at(599)), []);
        absences.look(&known, |i| i == one, at(599));
        assert_eq!(absences.ripe(after, at(600)), [two]);
        absences.look(&known, |_| false, at(600));
        assert_eq!(absences.ripe(after, at(1199)), [two]);
        assert_eq!(absences.ripe(after, at(1200)), [one, two]);
        absences.look(&BTreeSet::from([two]), |_| false, at(1200));
        assert_eq!(absences.ripe(after, at(1200)), [two], "nobody knows it any more");
    }
}
