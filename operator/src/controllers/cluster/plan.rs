//! What to do about a cluster: its brokers, its Services, its policies. Pure.
//!
//! An upgrade goes bottom up: as long as a bookie pool does not run the cluster's image throughout, the brokers keep theirs,
//! unless none of them can run with it.
//! Brokers need no gate of their own: their Deployment brings a new one up first, and an old one hands its topics over on
//! SIGTERM.

use std::{collections::BTreeMap, fmt};

use serde::Deserialize;
use serde_json::Value;

use crate::{
    controllers::{
        marks::Marks,
        policies::{Changes, changes},
        pool::plan::ServerSeen,
    },
    crd::{
        BrokerStatus, GemingaClusterSpec, GemingaClusterStatus, PolicyValues, Reason, StatusReport,
    },
    manifest::Manifest,
    server::ClusterFacts,
    workloads::{Owner, broker_deployment, broker_selector, broker_service, disruption_budget},
};

/// What was seen. Everything is read after the cluster's own object.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Observed {
    /// The brokers' Deployment.
    pub brokers: Option<BrokersSeen>,
    /// Live objects by `Kind/name`.
    pub objects: BTreeMap<String, Value>,
    /// The cluster's pools.
    pub pools: Vec<PoolSeen>,
    /// What the server says.
    pub server: ServerSeen,
    /// Policies that the cluster's level has set; only read where the server answers.
    pub own_policies: PolicyValues,
}

/// The Deployment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BrokersSeen {
    /// The image in its template.
    pub image: String,
    /// Pods there are.
    pub replicas: i32,
    /// Pods that serve.
    pub ready: i32,
    /// Pods of the present template.
    pub updated: i32,
    /// Its controller has seen its present spec.
    pub settled: bool,
    /// What keeps a pod from its work, or from being made, and may not pass by itself.
    pub trouble: Option<String>,
}

/// A pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PoolSeen {
    /// Its name.
    pub name: String,
    /// Bookies asked for.
    pub replicas: i32,
    /// The image that all of its pods run; empty while they differ or there are none.
    pub image: String,
}

/// A step, in the order in which they are taken.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Server-side apply.
    Apply(Manifest),
    /// Writes to the status which policies are ours, before they are set.
    Note(Vec<String>),
    /// Sets and un-sets policies of the cluster's level.
    SetPolicies {
        /// Fields to set.
        set: PolicyValues,
        /// Fields to be left to what is built in.
        unset: Vec<String>,
    },
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Apply(manifest) => {
                write!(f, "apply {} {}", manifest.kind(), manifest.name())?;
                let image = manifest.object().pointer("/spec/template/spec/containers/0/image");
                match image.and_then(Value::as_str) {
                    Some(image) => write!(f, " with image {image}"),
                    None => Ok(()),
                }
            }
            Self::Note(names) => write!(f, "note policies {}", names.join(", ")),
            Self::SetPolicies { set, unset } => {
                f.write_str("policies of the cluster:")?;
                for (name, value) in set {
                    write!(f, " {name}={value}")?;
                }
                unset.iter().try_for_each(|name| write!(f, " un-set {name}"))
            }
        }
    }
}

/// What to do, and what to say.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// In order; each is only taken when those before it succeeded.
    pub actions: Vec<Action>,
    /// The whole status, without conditions and plan.
    pub status: GemingaClusterStatus,
    /// What the conditions are to say.
    pub report: StatusReport,
}

/// Decides. `before` is the status that was last written.
#[must_use]
pub fn plan(
    owner: &Owner,
    spec: &GemingaClusterSpec,
    marks: &Marks,
    before: &GemingaClusterStatus,
    observed: &Observed,
) -> Plan {
    let facts = match &observed.server {
        ServerSeen::Answers(facts) => Ok(facts),
        ServerSeen::Silent(why) => Err(why.as_str()),
    };
    let mut status = counted(owner, before, observed, facts.ok());
    let only = |status, report| Plan { actions: Vec::new(), status, report };
    if marks.deleting_since_ms.is_some() {
        let why = "brokers go with it; bookies' volumes stay";
        return only(status, StatusReport::working(false, Reason::Deleting, why));
    }
    if marks.paused {
        return only(status, StatusReport::idle(Reason::Paused, "geminga.io/paused is set"));
    }
    let (image, waits) = image(spec, observed);
    let manifests = [
        broker_service(owner, spec),
        disruption_budget(owner, "broker"),
        disruption_budget(owner, "bookie"),
        broker_deployment(owner, spec, &image),
    ];
    let live = |manifest: &Manifest| {
        observed.objects.get(&format!("{}/{}", manifest.kind(), manifest.name()))
    };
    let mut actions: Vec<Action> = manifests
        .into_iter()
        .filter(|manifest| manifest.differs_from(live(manifest)))
        .map(Action::Apply)
        .collect();
    let applies = !actions.is_empty();
    if facts.is_ok() {
        let wanted = spec.policies.as_ref().map(|policies| policies.values()).unwrap_or_default();
        actions.extend(policies(&wanted, &before.managed_policies, &observed.own_policies));
        status.managed_policies = wanted.into_keys().collect();
    }
    let report = report(spec, observed, facts, waits, applies);
    Plan { actions, status, report }
}

fn counted(
    owner: &Owner,
    before: &GemingaClusterStatus,
    observed: &Observed,
    facts: Option<&ClusterFacts>,
) -> GemingaClusterStatus {
    let brokers = observed.brokers.clone().unwrap_or_default();
    let mut status = GemingaClusterStatus {
        brokers: BrokerStatus {
            replicas: brokers.replicas,
            ready: brokers.ready,
            updated: brokers.updated,
            selector: broker_selector(&owner.name),
        },
        plan: Vec::new(),
        conditions: Vec::new(),
        ..before.clone()
    };
    if let Some(facts) = facts {
        status.bookies = registered(facts);
        status.under_replicated_ledgers = i64::try_from(facts.under_replicated).unwrap_or(i64::MAX);
        status.cluster_id = Some(facts.id.clone());
    }
    status
}

/// The brokers' image now, and what they wait for if it is not the cluster's.
fn image(spec: &GemingaClusterSpec, observed: &Observed) -> (String, Option<String>) {
    let Some(brokers) = observed.brokers.as_ref().filter(|brokers| brokers.image != spec.image)
    else {
        return (spec.image.clone(), None);
    };
    // Without a broker nobody can tell whether bookies may be replaced: a broken image of brokers is mended first.
    if brokers.ready == 0 && brokers.trouble.is_some() {
        return (spec.image.clone(), None);
    }
    let behind = observed.pools.iter().find(|pool| pool.replicas > 0 && pool.image != spec.image);
    match behind {
        None => (spec.image.clone(), None),
        Some(pool) => {
            let why = format!("pool {} does not run {} throughout yet", pool.name, spec.image);
            (brokers.image.clone(), Some(why))
        }
    }
}

fn policies(wanted: &PolicyValues, managed: &[String], own: &PolicyValues) -> Vec<Action> {
    let Changes { note, set, unset } = changes(wanted, managed, own);
    let mut actions: Vec<Action> = note.into_iter().map(Action::Note).collect();
    if !set.is_empty() || !unset.is_empty() {
        actions.push(Action::SetPolicies { set, unset });
    }
    actions
}

fn report(
    spec: &GemingaClusterSpec,
    observed: &Observed,
    server: Result<&ClusterFacts, &str>,
    waits: Option<String>,
    applies: bool,
) -> StatusReport {
    let brokers = observed.brokers.clone().unwrap_or_default();
    let wanted = spec.brokers.replicas;
    let too_few = server.map_or(None, |facts| too_few(spec, facts));
    let serves = brokers.ready >= wanted && server.is_ok() && too_few.is_none();
    let whole = brokers.ready >= wanted && brokers.updated >= wanted;
    if let Some(trouble) = brokers.trouble.filter(|_| !whole) {
        return StatusReport::working(serves, Reason::PodFailing, trouble);
    }
    if let Some(why) = waits {
        return StatusReport::working(serves, Reason::WaitingForBookies, why);
    }
    if applies {
        return StatusReport::working(serves, Reason::Applying, "objects are created or corrected");
    }
    if brokers.ready < wanted {
        let why = format!("{} of {wanted} brokers are ready", brokers.ready);
        return StatusReport::working(false, Reason::Starting, why);
    }
    if !brokers.settled || brokers.updated < wanted || brokers.replicas > wanted {
        let why = format!("{} of {wanted} brokers are replaced", brokers.updated.min(wanted));
        return StatusReport::working(serves, Reason::Rolling, why);
    }
    match (server, too_few) {
        (Ok(_), Some(why)) => StatusReport::working(false, Reason::Starting, why),
        (Ok(_), None) => StatusReport::ready(),
        (Err(_), _) if wanted == 0 => StatusReport::ready(),
        (Err(why), _) => StatusReport::unknown(Reason::ServerUnreachable, why),
    }
}

/// Brokers alone store nothing: without as many bookies as a receipt needs the cluster does not serve.
fn too_few(spec: &GemingaClusterSpec, facts: &ClusterFacts) -> Option<String> {
    let (there, needed) = (registered(facts), spec.ledgers.ack_quorum);
    (there < needed).then(|| format!("{there} bookies are registered, a receipt needs {needed}"))
}

fn registered(facts: &ClusterFacts) -> i32 {
    let there = facts.bookies.iter().filter(|bookie| bookie.registered).count();
    i32::try_from(there).unwrap_or(i32::MAX)
}
