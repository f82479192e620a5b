//! What to do about a tenant, namespace, topic or subscription. Pure.
//!
//! ```text
//! being deleted ──► Retain: let go │ Delete: delete, then let go │ cluster gone, or silent for LET_GO: let go
//! otherwise     ──► finalizer as the deletion policy needs it ─► create │ update │ conflict ─► policies: note, set, un-set
//! ```

use std::{fmt, time::Duration};

use geminga_runtime::clock::Timestamp;
use serde::Deserialize;

use crate::{
    controllers::marks::Marks,
    controllers::policies::{Changes, changes},
    crd::{DeletionPolicy, PolicyValues, Reason, ResourceStatus, StatusReport},
    thing::{Compared, Found, Thing, Wish},
};

/// How long the deletion of an object waits for a server that does not answer, or that refuses, before it lets go.
pub const LET_GO: Duration = Duration::from_secs(300);

/// Whether the cluster that the object names can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Target {
    /// There is no such GemingaCluster or GemingaConnection, or it is being deleted.
    Gone,
    /// It does not answer: why.
    Silent(String),
    /// It answers.
    Answers,
}

/// What was seen on the server.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Observed {
    /// The cluster.
    pub target: Target,
    /// What has the name.
    #[serde(default)]
    pub found: Option<Found>,
    /// Policies that its level has set.
    #[serde(default)]
    pub own_policies: PolicyValues,
}

/// A step, in the order in which they are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// From now on the deletion of the object waits for us.
    AddFinalizer,
    /// The deletion of the object does not wait for us.
    RemoveFinalizer,
    /// Writes to the status which policies are ours, before they are set: a crash in between forgets none.
    Note(Vec<String>),
    /// Creates it.
    Create(Thing),
    /// Changes what can be changed.
    Update(Thing),
    /// Sets and un-sets policies of a scope.
    SetPolicies {
        /// As the contract names it.
        scope: String,
        /// Fields to set.
        set: PolicyValues,
        /// Fields to be taken from the level above again.
        unset: Vec<String>,
    },
    /// Deletes it with everything in it.
    Delete {
        /// What.
        thing: Thing,
        /// The last try: a refusal keeps nobody.
        last_try: bool,
    },
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddFinalizer => f.write_str("add finalizer"),
            Self::RemoveFinalizer => f.write_str("remove finalizer"),
            Self::Note(names) => write!(f, "note policies {}", names.join(", ")),
            Self::Create(thing) => write!(f, "create {thing}"),
            Self::Update(thing) => write!(f, "update {thing}"),
            Self::SetPolicies { scope, set, unset } => {
                write!(f, "policies of {scope}:")?;
                for (name, value) in set {
                    write!(f, " {name}={value}")?;
                }
                unset.iter().try_for_each(|name| write!(f, " un-set {name}"))
            }
            Self::Delete { thing, last_try: false } => write!(f, "delete {thing}"),
            Self::Delete { thing, last_try: true } => write!(f, "try to delete {thing}"),
        }
    }
}

/// What to do, and what to say once it is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// In order; each is only taken when those before it succeeded.
    pub actions: Vec<Action>,
    /// The status when all of them succeeded.
    pub report: StatusReport,
    /// The object's policies when all of them succeeded.
    pub managed_policies: Vec<String>,
}

/// Decides. `before` is the status that was last written.
#[must_use]
pub fn plan(
    wish: &Result<Wish, String>,
    marks: &Marks,
    before: &ResourceStatus,
    observed: &Observed,
    now: Timestamp,
) -> Plan {
    let managed = before.managed_policies.clone();
    let only = |report| Plan { actions: Vec::new(), report, managed_policies: managed.clone() };
    if let Some(since) = marks.deleting_since_ms {
        return deletion(wish.as_ref().ok(), marks, observed, now.since(Timestamp(since)), managed);
    }
    if marks.paused {
        return only(StatusReport::idle(Reason::Paused, "geminga.io/paused is set"));
    }
    let wish = match wish {
        Ok(wish) => wish,
        Err(why) => return only(StatusReport::stalled(false, Reason::InvalidSpec, why)),
    };
    match &observed.target {
        Target::Gone => {
            let why = "the cluster that spec.clusterRef names does not exist";
            return only(StatusReport::working(false, Reason::ClusterNotFound, why));
        }
        Target::Silent(why) => {
            return only(StatusReport::unknown(Reason::ServerUnreachable, why.as_str()));
        }
        Target::Answers => {}
    }
    let mut actions = finalizer(wish.deletion, marks);
    match &observed.found {
        None => actions.push(Action::Create(wish.thing.clone())),
        Some(found) => match wish.thing.compare(found) {
            Compared::Same => {}
            Compared::Changed => actions.push(Action::Update(wish.thing.clone())),
            Compared::Conflict(why) => {
                return only(StatusReport::stalled(false, Reason::Conflict, why));
            }
        },
    }
    actions.extend(policies(wish, &managed, &observed.own_policies));
    let managed_policies = wish.policies.keys().cloned().collect();
    Plan { actions, report: StatusReport::ready(), managed_policies }
}

fn finalizer(deletion: DeletionPolicy, marks: &Marks) -> Vec<Action> {
    match (deletion, marks.finalizer) {
        (DeletionPolicy::Delete, false) => vec![Action::AddFinalizer],
        (DeletionPolicy::Retain, true) => vec![Action::RemoveFinalizer],
        _ => Vec::new(),
    }
}

fn policies(wish: &Wish, managed: &[String], own: &PolicyValues) -> Vec<Action> {
    let Some(scope) = wish.thing.policy_scope() else { return Vec::new() };
    let Changes { note, set, unset } = changes(&wish.policies, managed, own);
    let mut actions: Vec<Action> = note.into_iter().map(Action::Note).collect();
    if !set.is_empty() || !unset.is_empty() {
        actions.push(Action::SetPolicies { scope, set, unset });
    }
    actions
}

/// A finalizer always lets go: at once where nothing is to be deleted or nobody is left to ask, else after [`LET_GO`].
fn deletion(
    wish: Option<&Wish>,
    marks: &Marks,
    observed: &Observed,
    waited: Duration,
    managed_policies: Vec<String>,
) -> Plan {
    let plan = |actions, message: &str| Plan {
        actions,
        report: StatusReport::working(false, Reason::Deleting, message),
        managed_policies: managed_policies.clone(),
    };
    if !marks.finalizer {
        return plan(Vec::new(), "nothing waits for the operator");
    }
    let let_go = |message| plan(vec![Action::RemoveFinalizer], message);
    let Some(wish) = wish.filter(|wish| wish.deletion == DeletionPolicy::Delete) else {
        return let_go("what is on the server stays");
    };
    if marks.paused || marks.dry_run {
        return let_go("paused or dry-run: what is on the server stays");
    }
    match (&observed.target, &observed.found) {
        (Target::Gone, _) => let_go("the cluster is gone, and what was on it"),
        (Target::Silent(_), _) if waited >= LET_GO => {
            let_go("the server does not answer: what is on it stays")
        }
        (Target::Silent(why), _) => Plan {
            actions: Vec::new(),
            report: StatusReport::working(false, Reason::ServerUnreachable, why.as_str()),
            managed_policies,
        },
        (Target::Answers, None) => let_go("it is not on the server any more"),
        (Target::Answers, Some(_)) => {
            let delete = Action::Delete { thing: wish.thing.clone(), last_try: waited >= LET_GO };
            plan(vec![delete, Action::RemoveFinalizer], "deleted on the server")
        }
    }
}
