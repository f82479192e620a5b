//! What to do about a bookie pool. Pure.
//!
//! Two gates guard the data:
//! - **A bookie goes only with a proof** (DC1). Fewer replicas drain the highest ordinal first, one at a time. The drain is
//!   noted in the status before the server is asked, so that a restart of the operator goes on with it, and raising the
//!   number again takes it back. Once the proof is seen there is no way back: the pod goes, then its volume, and only then may
//!   the ordinal return, with an empty volume. The proof is the server's word (`proven`), or that a bookie whose drain we
//!   asked for has no cookie any more. A server of another cluster proves nothing.
//! - **A bookie is replaced only while every copy is whole** (U1): nothing is under-replicated or lost, every bookie of the
//!   cluster is registered and none is in limbo, every pod of every pool is there and ready. A pod that is down anyway may
//!   be replaced at once: one whose process does not run, as Kubernetes says, or that is not ready and holds no lease.

use std::{collections::BTreeMap, fmt};

use serde::Deserialize;
use serde_json::Value;

use crate::{
    controllers::marks::Marks,
    crd::{
        BookiePoolSpec, BookiePoolStatus, ConditionStatus, DrainNote, GemingaClusterSpec, Reason,
        StatusReport,
    },
    manifest::Manifest,
    server::{BookieFacts, ClusterFacts},
    workloads::{Owner, bookie_service, bookie_set, pool_selector, set_name, template_hash},
};

/// What was seen. Everything is read after the pool itself.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Observed {
    /// The spec of the cluster that the pool names; none: there is none, or it is being deleted.
    pub cluster: Option<GemingaClusterSpec>,
    /// The pool's StatefulSet.
    pub set: Option<SetSeen>,
    /// The live StatefulSet and Service, by `Kind`.
    pub objects: BTreeMap<String, Value>,
    /// The pool's pods.
    pub pods: Vec<PodSeen>,
    /// The pool's volume claims.
    pub claims: Vec<ClaimSeen>,
    /// What keeps the other pools of the cluster from being whole; none: nothing does.
    pub others: Option<String>,
    /// What the server says.
    pub server: ServerSeen,
}

/// The StatefulSet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SetSeen {
    /// `spec.replicas`
    pub replicas: i32,
    /// The size in its claim template.
    pub storage: String,
}

/// A pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSeen {
    /// Its name: the bookie's id.
    pub name: String,
    /// Its uid, so that no successor is deleted in its place.
    pub uid: String,
    /// The hash of the template that it was made from.
    pub template: String,
    /// The image that it runs.
    pub image: String,
    /// Its readiness.
    pub ready: bool,
    /// It is being deleted.
    pub terminating: bool,
    /// Kubernetes says that no process of it runs.
    pub stopped: bool,
    /// `pod NAME: REASON: words`, where something keeps it from its work that may not pass by itself.
    pub trouble: Option<String>,
}

/// A volume claim.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClaimSeen {
    /// Its name.
    pub name: String,
    /// What it asks for.
    pub requested: String,
    /// What it has; empty while it is not bound.
    pub capacity: String,
    /// What Kubernetes says of its growth, if anything.
    pub growth: Option<String>,
    /// It is being deleted.
    pub terminating: bool,
}

/// What the server says.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ServerSeen {
    /// No broker answers: why.
    Silent(String),
    /// The cluster as it is.
    Answers(ClusterFacts),
}

impl Default for ServerSeen {
    fn default() -> Self {
        Self::Silent("nobody was asked".into())
    }
}

/// A step, in the order in which they are taken.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Server-side apply.
    Apply(Manifest),
    /// Writes the drains to the status, before what follows is done.
    Note(Vec<DrainNote>),
    /// Asks that a bookie's ledgers are moved away.
    Drain(String),
    /// Takes that back.
    CancelDrain(String),
    /// Deletes a pod, which the StatefulSet makes again from the present template.
    Replace {
        /// Its name.
        pod: String,
        /// Only this one.
        uid: String,
    },
    /// Deletes the StatefulSet and leaves its pods: its claim template cannot be changed otherwise.
    Orphan(String),
    /// Asks for a larger volume.
    Grow {
        /// The claim.
        claim: String,
        /// The new size.
        size: String,
    },
    /// Deletes a volume claim: it is proven that no ledger needs what is on it.
    DeleteClaim(String),
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Apply(manifest) => {
                write!(f, "apply {} {}", manifest.kind(), manifest.name())?;
                match manifest.object()["spec"]["replicas"].as_i64() {
                    Some(replicas) => write!(f, " with {replicas} replicas"),
                    None => Ok(()),
                }
            }
            Self::Note(notes) => {
                let notes = notes.iter().map(|note| {
                    format!("{}{}", note.bookie, if note.proven { " (proven)" } else { "" })
                });
                write!(f, "note drains [{}]", notes.collect::<Vec<_>>().join(", "))
            }
            Self::Drain(bookie) => write!(f, "drain bookie {bookie}"),
            Self::CancelDrain(bookie) => write!(f, "cancel the drain of bookie {bookie}"),
            Self::Replace { pod, .. } => write!(f, "replace pod {pod}"),
            Self::Orphan(set) => write!(f, "delete StatefulSet {set} and keep its pods"),
            Self::Grow { claim, size } => write!(f, "grow claim {claim} to {size}"),
            Self::DeleteClaim(claim) => write!(f, "delete claim {claim}"),
        }
    }
}

/// What to do, and what to say.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// In order; each is only taken when those before it succeeded.
    pub actions: Vec<Action>,
    /// The whole status, without conditions and plan.
    pub status: BookiePoolStatus,
    /// What the conditions are to say.
    pub report: StatusReport,
}

/// The ordinal in a pod's name, as a number: `pool-bookie-10` is behind `pool-bookie-9`.
#[must_use]
pub fn ordinal(set: &str, pod: &str) -> Option<i32> {
    let digits = pod.strip_prefix(set)?.strip_prefix('-')?;
    let plain =
        digits.chars().all(|c| c.is_ascii_digit()) && (digits == "0" || !digits.starts_with('0'));
    if plain { digits.parse().ok() } else { None }
}

/// Decides. `before` is the status that was last written.
#[must_use]
pub fn plan(
    owner: &Owner,
    spec: &BookiePoolSpec,
    marks: &Marks,
    before: &BookiePoolStatus,
    observed: &Observed,
) -> Plan {
    let set = set_name(&owner.name);
    let mut status = counted(owner, spec, before, observed);
    let only = |status, report| Plan { actions: Vec::new(), status, report };
    if marks.deleting_since_ms.is_some() {
        let report = StatusReport::working(false, Reason::Deleting, "volumes stay");
        return only(status, report);
    }
    if marks.paused {
        return only(status, StatusReport::idle(Reason::Paused, "geminga.io/paused is set"));
    }
    let Some(cluster) = &observed.cluster else {
        let why = format!("there is no GemingaCluster {}", spec.cluster);
        return only(status, StatusReport::working(false, Reason::ClusterNotFound, why));
    };
    let facts = match &observed.server {
        ServerSeen::Answers(facts) => {
            if before.cluster_id.is_none() {
                status.cluster_id = Some(facts.id.clone());
            }
            Ok(facts)
        }
        ServerSeen::Silent(why) => Err(why.as_str()),
    };
    let view = View { set, spec, before, observed, facts };
    let mut work = Work::default();
    if let Err((reason @ Reason::ClusterChanged, why)) = view.same_cluster() {
        work.stuck.push((reason, why));
    }
    let replicas = view.members(&mut work);
    let mut effective = spec.clone();
    effective.storage.size = view.volumes(&mut work);
    let manifest = bookie_set(owner, &spec.cluster, cluster, &effective, replicas);
    let template = template_hash(&manifest).to_owned();
    view.rolls(&template, replicas, &mut work);
    let live = |kind: &str| observed.objects.get(kind);
    let service = bookie_service(owner, &spec.cluster);
    if service.differs_from(live("Service")) {
        work.first.push(Action::Apply(service));
    }
    // While the claim template differs the API refuses every change: the StatefulSet goes first, and is made anew.
    if !work.orphans && manifest.differs_from(live("StatefulSet")) {
        work.first.push(Action::Apply(manifest));
    }
    let in_range = |pod: &&PodSeen| ordinal(&view.set, &pod.name).is_some_and(|o| o < replicas);
    let pods: Vec<&PodSeen> = observed.pods.iter().filter(in_range).collect();
    let updated = pods.iter().filter(|pod| pod.template == template).count();
    status.updated = count(updated);
    // One that is missing or not ready may be anything.
    let whole = count(pods.iter().filter(|pod| pod.ready && !pod.terminating).count()) == replicas;
    status.image = match pods.first() {
        Some(first) if whole && pods.iter().all(|pod| pod.image == first.image) => {
            first.image.clone()
        }
        _ => String::new(),
    };
    status.drains.clone_from(&work.notes);
    let ready = status.ready >= spec.replicas && status.replicas >= spec.replicas;
    view.troubles(replicas, &mut work);
    if observed.set.is_some() && count(pods.len()) < replicas {
        let missing = replicas - count(pods.len());
        let set = &view.set;
        work.missing = Some(format!(
            "; {missing} pods are missing: kubectl describe statefulset {set} tells why"
        ));
    }
    let report = work.report(ready, &status, spec, facts);
    let mut actions = work.noted;
    actions.extend(work.first);
    actions.extend(work.then);
    Plan { actions, status, report }
}

pub(super) fn count(n: usize) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}

fn counted(
    owner: &Owner,
    spec: &BookiePoolSpec,
    before: &BookiePoolStatus,
    observed: &Observed,
) -> BookiePoolStatus {
    BookiePoolStatus {
        observed_generation: before.observed_generation,
        replicas: observed.set.as_ref().map_or(0, |set| set.replicas),
        ready: count(observed.pods.iter().filter(|pod| pod.ready && !pod.terminating).count()),
        selector: pool_selector(&spec.cluster, &owner.name),
        conditions: Vec::new(),
        plan: Vec::new(),
        ..before.clone()
    }
}

/// What a plan is made from.
pub(super) struct View<'a> {
    pub(super) set: String,
    pub(super) spec: &'a BookiePoolSpec,
    pub(super) before: &'a BookiePoolStatus,
    pub(super) observed: &'a Observed,
    pub(super) facts: Result<&'a ClusterFacts, &'a str>,
}

/// What came together so far.
#[derive(Default)]
pub(super) struct Work {
    pub(super) noted: Vec<Action>,
    pub(super) first: Vec<Action>,
    pub(super) then: Vec<Action>,
    pub(super) orphans: bool,
    pub(super) notes: Vec<DrainNote>,
    /// Going on by itself, the weightiest first.
    pub(super) working: Vec<(Reason, String)>,
    /// Somebody has to help.
    pub(super) stuck: Vec<(Reason, String)>,
    /// The end of a sentence about pods that the StatefulSet did not make.
    missing: Option<String>,
}

impl View<'_> {
    pub(super) fn name(&self, ordinal: i32) -> String {
        format!("{}-{ordinal}", self.set)
    }

    pub(super) fn pod(&self, name: &str) -> Option<&PodSeen> {
        self.observed.pods.iter().find(|pod| pod.name == name)
    }

    pub(super) fn claim(&self, bookie: &str) -> Option<&ClaimSeen> {
        let name = claim_name(bookie);
        self.observed.claims.iter().find(|claim| claim.name == name)
    }

    /// A pod that fails is said before everything that waits for it.
    fn troubles(&self, replicas: i32, work: &mut Work) {
        let stays = |pod: &&PodSeen| {
            let drained = work.notes.iter().any(|note| note.proven && note.bookie == pod.name);
            !drained && ordinal(&self.set, &pod.name).is_some_and(|ordinal| ordinal < replicas)
        };
        let mut failing = self.observed.pods.iter().filter(stays);
        let said = failing.find_map(|pod| {
            let trouble = pod.trouble.clone()?;
            let claim = self.claim(&pod.name).filter(|claim| claim.capacity.is_empty());
            Some(match claim {
                Some(claim) => format!("{trouble}; claim {} has no volume", claim.name),
                None => trouble,
            })
        });
        if let Some(said) = said {
            let why = match work.working.first() {
                Some((_, also)) => format!("{said}; {also}"),
                None => said,
            };
            work.working.insert(0, (Reason::PodFailing, why));
        }
    }

    /// What the cluster says, if it is the one that the pool joined.
    pub(super) fn same_cluster(&self) -> Result<&ClusterFacts, (Reason, String)> {
        let facts = self.facts.map_err(|why| (Reason::ServerUnreachable, why.to_owned()))?;
        match &self.before.cluster_id {
            Some(joined) if *joined != facts.id => {
                let why = format!(
                    "the bookies joined cluster {joined}, the server is of {}: no bookie is drained or removed on its word",
                    facts.id
                );
                Err((Reason::ClusterChanged, why))
            }
            _ => Ok(facts),
        }
    }
}

pub(super) fn bookie<'a>(facts: &'a ClusterFacts, id: &str) -> Option<&'a BookieFacts> {
    facts.bookies.iter().find(|bookie| bookie.id == id)
}

/// The claim of a pod.
pub(super) fn claim_name(pod: &str) -> String {
    format!("data-{pod}")
}

impl Work {
    pub(super) fn note(
        &mut self,
        bookie: &str,
        bytes_left: u64,
        ledgers_left: u64,
        blocked: &str,
        proven: bool,
    ) {
        let note = DrainNote {
            bookie: bookie.to_owned(),
            proven,
            bytes_left: i64::try_from(bytes_left).unwrap_or(i64::MAX),
            ledgers_left: i64::try_from(ledgers_left).unwrap_or(i64::MAX),
            blocked: blocked.to_owned(),
        };
        match self.notes.iter_mut().find(|known| known.bookie == bookie) {
            Some(known) => *known = note,
            None => self.notes.push(note),
        }
    }

    fn report(
        &self,
        ready: bool,
        status: &BookiePoolStatus,
        spec: &BookiePoolSpec,
        facts: Result<&ClusterFacts, &str>,
    ) -> StatusReport {
        if let Some((reason, why)) = self.stuck.first() {
            return StatusReport::stalled(ready, *reason, why.as_str());
        }
        if let Some((reason, why)) = self.working.first() {
            return StatusReport::working(ready, *reason, why.as_str());
        }
        if !ready {
            let missing = self.missing.as_deref().unwrap_or_default();
            let why = format!("{} of {} bookies are ready{missing}", status.ready, spec.replicas);
            return StatusReport::working(false, Reason::Starting, why);
        }
        match facts {
            Err(why) => StatusReport {
                ready: ConditionStatus::Unknown,
                ..StatusReport::unknown(Reason::ServerUnreachable, why)
            },
            Ok(_) if self.first.is_empty() => StatusReport::ready(),
            Ok(_) => StatusReport::working(true, Reason::Applying, "objects are corrected"),
        }
    }
}
