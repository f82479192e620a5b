//! Which pod is replaced next: one at a time, while every copy is whole (U1). Pure.

use super::plan::{Action, PodSeen, View, Work, bookie, count, ordinal};
use crate::crd::Reason;

impl View<'_> {
    /// At most one pod is replaced at a time, and only through the gate (U1).
    pub(super) fn rolls(&self, template: &str, replicas: i32, work: &mut Work) {
        let mut pods: Vec<(i32, &PodSeen)> = self
            .observed
            .pods
            .iter()
            .filter_map(|pod| Some((ordinal(&self.set, &pod.name)?, pod)))
            .filter(|(ordinal, _)| *ordinal < replicas)
            .collect();
        pods.sort_by_key(|(ordinal, _)| *ordinal);
        let outdated = |(_, pod): &&(i32, &PodSeen)| pod.template != template;
        let left = pods.iter().filter(outdated).count();
        if left == 0 {
            return;
        }
        let so_far = format!("{left} of {} pods are to be replaced", pods.len());
        if let Some((_, pod)) = pods.iter().find(|(_, pod)| pod.terminating) {
            work.working.push((Reason::Rolling, format!("{so_far}; {} is going", pod.name)));
            return;
        }
        // What is down loses nothing by being replaced, and may be down because of its old template.
        let is_down = |pod: &PodSeen| !pod.ready && (pod.stopped || !self.serves(pod));
        let down = pods.iter().rev().filter(outdated).find(|(_, pod)| is_down(pod));
        let next = match (down, self.gate(&pods, replicas)) {
            (Some((_, pod)), _) => pod,
            (None, Some(why)) => {
                work.working.push((Reason::RollBlocked, format!("{so_far}; waiting: {why}")));
                return;
            }
            (None, None) => match pods.iter().rev().find(outdated) {
                Some((_, pod)) => pod,
                None => return,
            },
        };
        work.then.push(Action::Replace { pod: next.name.clone(), uid: next.uid.clone() });
        work.working.push((Reason::Rolling, format!("{so_far}; {} is next", next.name)));
    }

    /// Whether the bookie of a pod holds its lease. Where nobody can tell, it does.
    fn serves(&self, pod: &PodSeen) -> bool {
        self.facts.map_or(true, |facts| bookie(facts, &pod.name).is_some_and(|b| b.registered))
    }

    /// What keeps the next pod from being replaced; none: nothing does (U1).
    fn gate(&self, pods: &[(i32, &PodSeen)], replicas: i32) -> Option<String> {
        let facts = match self.same_cluster() {
            Ok(facts) => facts,
            Err((_, why)) => return Some(why),
        };
        if facts.under_replicated > 0 {
            return Some(format!("{} ledgers lack copies", facts.under_replicated));
        }
        if facts.lost > 0 {
            return Some(format!(
                "{} bookies are lost and their ledgers not yet copied",
                facts.lost
            ));
        }
        if let Some(away) = facts.bookies.iter().find(|bookie| !bookie.registered) {
            return Some(format!("bookie {} is not registered", away.id));
        }
        if let Some(limbo) = facts.bookies.iter().find(|bookie| bookie.limbo) {
            return Some(format!("bookie {} is in limbo", limbo.id));
        }
        if count(pods.len()) < replicas {
            return Some(format!("{} of {replicas} pods are there", pods.len()));
        }
        if let Some((_, pod)) = pods.iter().find(|(_, pod)| !pod.ready) {
            return Some(format!("pod {} is not ready", pod.name));
        }
        if let Some((_, pod)) = pods.iter().find(|(_, pod)| bookie(facts, &pod.name).is_none()) {
            return Some(format!("bookie {} has not joined yet", pod.name));
        }
        self.observed.others.clone()
    }
}
