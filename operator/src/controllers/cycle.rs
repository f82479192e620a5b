//! One turn of a controller, the same for every kind: read the object anew, observe, plan, apply, write the status.

use std::{fmt::Display, future::Future, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures::FutureExt;
use kube::{
    ResourceExt,
    runtime::{controller::Action, events::EventType},
};
use serde::Serialize;
use tokio::time::{Instant, timeout};

use super::{
    context::{Context, Error, RETRY, SOON},
    marks::Marks,
};
use crate::{
    crd::{Condition, ConditionStatus, ConditionType, Reason, StatusReport},
    kubernetes::{Namespace, Ours},
    metrics::State,
};

/// The longest turn: a connection to Kubernetes that went silent must not keep a worker for ever. What was done stays done,
/// and the next turn goes on from it.
const TURN_MAX: Duration = Duration::from_secs(120);

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

    /// Whether what it waits for comes from outside, without any event: it is asked less and less often.
    const WAITS: bool = false;

    /// What only one object at a time may be worked at, by any controller; none: nothing.
    fn alone(&self) -> Option<String> {
        None
    }

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

/// One turn. An object that is gone is none; a turn that panics or does not end is tried again, and hurts no other object.
pub(crate) async fn turn<K: Controlled + Send + Sync>(
    object: Arc<K>,
    context: Arc<Context>,
) -> Result<Action, Error> {
    let kind = K::kind(&());
    let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
    // Not counted as busy while it waits: others of its cluster are.
    let _alone = match object.alone() {
        Some(what) => Some(context.turns.begin(&what).await),
        None => None,
    };
    let busy = context.metrics.busy(&kind);
    let start = Instant::now();
    let whole = AssertUnwindSafe(whole_turn(&*object, &context)).catch_unwind();
    let done = timeout(TURN_MAX, whole).await;
    drop(busy);
    let (outcome, next) = match done {
        Ok(Ok(Ok(Some(turned)))) => {
            let state = state(&turned.report);
            context.metrics.on_state(&kind, &namespace, &name, Some(state));
            (state.as_str(), Ok(Action::requeue(pause::<K>(&turned, &context))))
        }
        Ok(Ok(Ok(None))) => {
            context.metrics.on_state(&kind, &namespace, &name, None);
            (State::Idle.as_str(), Ok(Action::await_change()))
        }
        Ok(Ok(Err(error))) => {
            tracing::warn!(%error, %kind, namespace, name, "reconciliation broke off");
            ("failed", Err(error))
        }
        Ok(Err(_)) => {
            tracing::error!(%kind, namespace, name, "reconciliation panicked");
            ("failed", Ok(Action::requeue(RETRY)))
        }
        Err(_) => {
            tracing::error!(%kind, namespace, name, "reconciliation does not end");
            ("failed", Ok(Action::requeue(RETRY)))
        }
    };
    context.metrics.on_reconcile(&kind, outcome, start.elapsed());
    next
}

/// What a turn left behind.
struct Turned {
    report: StatusReport,
    /// How long it has been reconciling, or not.
    for_so_long: Duration,
}

/// When the object is looked at again without any event: soon while something is under way, else by the timer that finds
/// drift, up to a fifth earlier, so that many objects spread out. One that waits for others is asked as often as it waited
/// long: a thousand that wait for one server are no storm.
fn pause<K: Controlled>(turned: &Turned, context: &Context) -> Duration {
    let soon = SOON.min(context.resync);
    if turned.report.reconciling {
        let longest = if K::WAITS { context.resync } else { soon };
        return turned.for_so_long.clamp(soon, longest);
    }
    let resync_ms = u64::try_from(context.resync.as_millis()).unwrap_or(u64::MAX);
    context.resync - Duration::from_millis(context.random.below(resync_ms / 5))
}

fn state(report: &StatusReport) -> State {
    match report {
        StatusReport { stalled: true, .. } => State::Stalled,
        StatusReport { ready: ConditionStatus::Unknown, reconciling: true, .. } => State::Unknown,
        StatusReport { reconciling: true, .. } => State::Working,
        StatusReport { ready: ConditionStatus::True, .. } => State::Ready,
        _ => State::Idle,
    }
}

async fn whole_turn<K: Controlled + Send + Sync>(
    stored: &K,
    context: &Context,
) -> Result<Option<Turned>, Error> {
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
    let now = context.clock.now();
    let conditions = report.conditions(before.conditions(), marks.generation, now);
    let news = news(before.conditions(), &conditions);
    let reconciling = conditions.iter().find(|c| c.type_ == ConditionType::Reconciling);
    let for_so_long = reconciling.map(|c| c.lasted(now)).unwrap_or_default();
    status.finish(marks.generation, conditions, shown);
    if status != before {
        match kubernetes.write_status::<K>(&name, &status).await {
            Err(kube::Error::Api(answer)) if answer.is_not_found() => return Ok(None), // let go
            done => done?,
        }
    }
    if news && (report.stalled || report.reason.warns()) {
        let about = object.object_ref(&());
        context.tell(&about, EventType::Warning, report.reason, report.message.clone()).await;
    }
    Ok(Some(Turned { report, for_so_long }))
}

/// Whether it is stalled, or warned of, for another reason than before.
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
