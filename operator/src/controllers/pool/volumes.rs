//! Volumes grow, never shrink. Pure.

use super::plan::{Action, ClaimSeen, View, Work, ordinal};
use crate::{crd::Reason, quantity};

impl View<'_> {
    /// Volumes grow; then the claim template follows. They never shrink. Returns the size of the claim template.
    pub(super) fn volumes(&self, work: &mut Work) -> String {
        let size = &self.spec.storage.size;
        let set = self.observed.set.as_ref();
        let Some(wanted) = quantity::bytes(size) else {
            let why = format!("spec.storage.size: {size:?} is no size");
            work.stuck.push((Reason::InvalidSpec, why));
            return set.map_or_else(|| size.clone(), |set| set.storage.clone());
        };
        let members = self.spec.replicas.max(set.map_or(0, |set| set.replicas));
        let ours = |claim: &&ClaimSeen| {
            let pod = claim.name.strip_prefix("data-");
            let ordinal = pod.and_then(|pod| ordinal(&self.set, pod));
            !claim.terminating && ordinal.is_some_and(|ordinal| ordinal < members)
        };
        for claim in self.observed.claims.iter().filter(ours) {
            self.volume(claim, wanted, work);
        }
        let Some(set) = set else { return size.clone() };
        match quantity::bytes(&set.storage) {
            Some(has) if has < wanted => {
                work.orphans = true;
                work.then.push(Action::Orphan(self.set.clone()));
                work.working.push((Reason::GrowingVolumes, "the StatefulSet is made anew".into()));
                size.clone()
            }
            // As it is written there: the same size in other words would be a change that the API refuses.
            _ => set.storage.clone(),
        }
    }

    fn volume(&self, claim: &ClaimSeen, wanted: u128, work: &mut Work) {
        let ClaimSeen { name, requested, capacity, growth, .. } = claim;
        let size = &self.spec.storage.size;
        match quantity::bytes(requested) {
            Some(requests) if requests > wanted => {
                let why = format!(
                    "claim {name} has {requested}, spec.storage.size is {size}: volumes never shrink"
                );
                work.stuck.push((Reason::VolumesNeverShrink, why));
            }
            Some(requests) if requests < wanted => {
                work.then.push(Action::Grow { claim: name.clone(), size: size.clone() });
                work.working
                    .push((Reason::GrowingVolumes, format!("claim {name} grows to {size}")));
            }
            _ if quantity::bytes(capacity).is_some_and(|has| has < wanted) => {
                let mut why = format!("claim {name} has {capacity} of {size}");
                if let Some(growth) = growth {
                    why += &format!(", {growth}");
                }
                work.working.push((Reason::GrowingVolumes, why));
            }
            _ => {}
        }
    }
}
