//! One turn of a controller, the same for every kind: read the object anew, observe, plan, apply, write the status.

use std::{fmt::Display, future::Future, sync::Arc};

use kube::{
    ResourceExt,
    runtime::{controller::Action, events::EventType},
};
use serde::Serialize;
use tokio::time::Instant;

use super::{
    context::{Context, Error, SOON},
    marks::Marks,
};
use crate::{
    crd::{Condition, ConditionStatus, ConditionType, Reason, StatusReport},
    kubernetes::{Namespace, Ours},
};

/// What a kind's controller has to say of one turn.
pub(crate) struct Planned<A, S> {
    /// In order; each is only taken when those before it succeeded.
    pub(crate) actions: Vec<A>,
    /// Without conditions and plan.
    pub(crate) status: S,
    pub(crate) report: StatusReport,
}

/// A status with the parts that every kind has.
pub(crate) trait Status: Serialize + Clone + Default + PartialEq + Send + Sync {
    fn conditions(&self) -> &[Condition];
    fn finish(&mut self, generation: i64, conditions: Vec<Condition>, plan: Vec<String>);
}

/// A kind.
pub(crate) trait Controlled: Ours {
    type Status: Status;
    type Action: Display + Send + Sync;

    /// What was last written.
    fn before(&self) -> Self::Status;

    /// Reads only, then decides.
    fn plan(
        &self,
        marks: &Marks,
        context: &Context,
    ) -> impl Future<Output = Result<Planned<Self::Action, Self::Status>, Error>> + Send;

    /// Takes one step. `so_far` is the status that holds at this moment; a step may write a part of it ahead.
    fn apply(
        &self,
        action: &Self::Action,
        so_far: &mut Self::Status,
        context: &Context,
    ) -> impl Future<Output = Result<(), Error>> + Send;
}

/// One turn. An object that is gone is none.
pub(crate) async fn turn<K: Controlled + Send + Sync>(
    object: Arc<K>,
    context: Arc<Context>,
) -> Result<Action, Error> {
    let start = Instant::now();
    let kind = K::kind(&());
    let done = whole_turn(&*object, &context).await;
    let outcome = match &done {
        Ok(Some(report)) => outcome(report),
        Ok(None) => "idle",
        Err(error) => {
            tracing::warn!(%error, %kind, name = object.name_any(), "reconciliation broke off");
            "failed"
        }
    };
    context.metrics.on_reconcile(&kind, outcome, start.elapsed());
    Ok(match done? {
        // What is under way is looked at soon, everything else by the timer that finds drift.
        Some(report) if report.reconciling => Action::requeue(SOON.min(context.resync)),
        Some(_) => Action::requeue(context.resync),
        None => Action::await_change(),
    })
}

fn outcome(report: &StatusReport) -> &'static str {
    match report {
        StatusReport { stalled: true, .. } => "stalled",
        StatusReport { ready: ConditionStatus::Unknown, reconciling: true, .. } => "unknown",
        StatusReport { reconciling: true, .. } => "working",
        StatusReport { ready: ConditionStatus::True, .. } => "ready",
        _ => "idle",
    }
}

async fn whole_turn<K: Controlled + Send + Sync>(
    stored: &K,
    context: &Context,
) -> Result<Option<StatusReport>, Error> {
    let (namespace, name) = (stored.namespace().unwrap_or_default(), stored.name_any());
    let kubernetes = Namespace::new(&context.client, &namespace);
    // The controller's copy may be older than our last status, which has the notes that keep data safe.
    let Some(object) = kubernetes.get::<K>(&name).await? else { return Ok(None) };
    let marks = Marks::of(object.meta());
    let before = object.before();
    let Planned { actions, mut status, mut report } = match object.plan(&marks, context).await {
        Ok(planned) => planned,
        Err(error) => {
            Planned { actions: Vec::new(), status: before.clone(), report: error.report() }
        }
    };
    let mut shown = Vec::new();
    if marks.dry_run && marks.deleting_since_ms.is_none() {
        shown = actions.iter().map(ToString::to_string).collect();
        let would = format!("geminga.io/dry-run is set: {} steps would be taken", shown.len());
        report = StatusReport::idle(Reason::DryRun, would);
        // Nothing happens: what was noted stays noted.
        status = before.clone();
    } else {
        let mut so_far = before.clone();
        let about = object.object_ref(&());
        let kind = K::kind(&());
        for action in &actions {
            match object.apply(action, &mut so_far, context).await {
                Ok(()) => {
                    tracing::info!(%kind, namespace, name, %action, "step taken");
                    context.metrics.on_action(&kind);
                    let note = action.to_string();
                    context.tell(&about, EventType::Normal, report.reason, note).await;
                }
                Err(error) => {
                    tracing::warn!(%kind, namespace, name, %action, %error, "step failed");
                    report = error.report();
                    report.message = format!("{action}: {}", report.message);
                    status = so_far;
                    break;
                }
            }
        }
    }
    let conditions = report.conditions(before.conditions(), marks.generation, context.clock.now());
    let news = news(before.conditions(), &conditions);
    status.finish(marks.generation, conditions, shown);
    if status != before {
        match kubernetes.write_status::<K>(&name, &status).await {
            Err(kube::Error::Api(answer)) if answer.is_not_found() => return Ok(None), // let go
            done => done?,
        }
    }
    if report.stalled && news {
        let about = object.object_ref(&());
        context.tell(&about, EventType::Warning, report.reason, report.message.clone()).await;
    }
    Ok(Some(report))
}

/// Whether it is stalled for another reason than before.
fn news(before: &[Condition], now: &[Condition]) -> bool {
    let stalled = |conditions: &[Condition]| {
        let found = conditions.iter().find(|c| c.type_ == ConditionType::Stalled);
        found.map(|c| (c.status, c.reason))
    };
    stalled(before) != stalled(now)
}

macro_rules! status {
    ($($name:ty),*) => {$(
        impl Status for $name {
            fn conditions(&self) -> &[Condition] {
                &self.conditions
            }

            fn finish(&mut self, generation: i64, conditions: Vec<Condition>, plan: Vec<String>) {
                self.observed_generation = generation;
                self.conditions = conditions;
                self.plan = plan;
            }
        }
    )*};
}

status!(crate::crd::ResourceStatus, crate::crd::GemingaClusterStatus, crate::crd::BookiePoolStatus);

impl Status for crate::crd::GemingaConnectionStatus {
    fn conditions(&self) -> &[Condition] {
        &self.conditions
    }

    // Nothing is ever done to a connection, so there is never a plan.
    fn finish(&mut self, generation: i64, conditions: Vec<Condition>, _plan: Vec<String>) {
        self.observed_generation = generation;
        self.conditions = conditions;
    }
}
