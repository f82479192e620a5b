//! Figures of the operator; their number is bounded by kinds, states, reasons and bookie pools.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use geminga_runtime::telemetry::metric_name;
use parking_lot::Mutex;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

/// Objects compared with their spec, by `kind` and `outcome`: a [`State`], or `failed`.
pub const RECONCILES: &str = "operator.reconciles";
/// Of one comparison, with what it did, s.
pub const RECONCILE_DURATION: &str = "operator.reconcile.duration";
/// Steps that were taken, by `kind` of the object that they were taken for.
pub const ACTIONS: &str = "operator.actions";
/// Objects there are, by `kind` and `state`; only where [`LEADER`] is 1.
pub const OBJECTS: &str = "operator.objects";
/// Objects that are being worked on now, by `kind`.
pub const WORKERS_BUSY: &str = "operator.workers.busy";
/// Answers of the Kubernetes API, by `code`; `none` where there was no answer.
pub const API_REQUESTS: &str = "operator.api.requests";
/// Calls to Geminga servers that failed, by `reason`; `UNREACHABLE` where nobody answered.
pub const SERVER_CALLS_FAILED: &str = "operator.server.calls.failed";
/// What is still to be moved off bookies that are drained, by `namespace` and `pool`, bytes; a pool without a drain has none.
pub const DRAIN_BYTES_LEFT: &str = "operator.drain.bytes.left";
/// 1 while this process holds the lease.
pub const LEADER: &str = "operator.leader";

/// What the conditions of an object say, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Ready, and nothing is under way.
    Ready,
    /// Under way, or waiting for something that should come by itself.
    Working,
    /// Somebody has to help.
    Stalled,
    /// Nobody can tell: its server does not answer.
    Unknown,
    /// Paused or dry-run.
    Idle,
}

impl State {
    /// The value of the label.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Working => "working",
            Self::Stalled => "stalled",
            Self::Unknown => "unknown",
            Self::Idle => "idle",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    kind: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindState {
    kind: String,
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Code {
    code: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Pool {
    namespace: String,
    pool: String,
}

/// Kind, namespace, name.
type Name = (String, String, String);

/// Handles to the figures; clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    reconciles: Family<Outcome, Counter>,
    duration: Histogram,
    actions: Family<Kind, Counter>,
    objects: Family<KindState, Gauge>,
    /// The state in which each object is counted.
    known: Arc<Mutex<BTreeMap<Name, State>>>,
    busy: Family<Kind, Gauge>,
    api_requests: Family<Code, Counter>,
    server_calls_failed: Family<Reason, Counter>,
    drain_bytes_left: Family<Pool, Gauge>,
    leader: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            reconciles: Family::default(),
            duration: Histogram::new(exponential_buckets(0.001, 2.0, 16)), // 1 ms to 33 s
            actions: Family::default(),
            objects: Family::default(),
            known: Arc::default(),
            busy: Family::default(),
            api_requests: Family::default(),
            server_calls_failed: Family::default(),
            drain_bytes_left: Family::default(),
            leader: Gauge::default(),
        }
    }
}

impl Metrics {
    /// Registers them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            metric_name(RECONCILES),
            "Objects compared with their spec, by kind and by what their status says then",
            metrics.reconciles.clone(),
        );
        registry.register_with_unit(
            metric_name(RECONCILE_DURATION),
            "Time of one comparison, with what it did",
            Unit::Seconds,
            metrics.duration.clone(),
        );
        registry.register(
            metric_name(ACTIONS),
            "Steps that were taken, by kind of the object that they were taken for",
            metrics.actions.clone(),
        );
        registry.register(
            metric_name(OBJECTS),
            "Objects there are, by kind and by what their conditions say; only where the controllers run",
            metrics.objects.clone(),
        );
        registry.register(
            metric_name(WORKERS_BUSY),
            "Objects that are being worked on now, by kind",
            metrics.busy.clone(),
        );
        registry.register(
            metric_name(API_REQUESTS),
            "Answers of the Kubernetes API, by status code; none where there was no answer",
            metrics.api_requests.clone(),
        );
        registry.register(
            metric_name(SERVER_CALLS_FAILED),
            "Calls to Geminga servers that failed, by reason; UNREACHABLE where nobody answered",
            metrics.server_calls_failed.clone(),
        );
        registry.register(
            metric_name(DRAIN_BYTES_LEFT),
            "Bytes still to be moved off bookies that are drained, by pool",
            metrics.drain_bytes_left.clone(),
        );
        registry.register(
            metric_name(LEADER),
            "1 while this process holds the lease and its controllers run",
            metrics.leader.clone(),
        );
        metrics
    }

    pub(crate) fn on_reconcile(&self, kind: &str, outcome: &'static str, took: Duration) {
        self.reconciles.get_or_create(&Outcome { kind: kind.to_owned(), outcome }).inc();
        self.duration.observe(took.as_secs_f64());
    }

    pub(crate) fn on_action(&self, kind: &str) {
        self.actions.get_or_create(&Kind { kind: kind.to_owned() }).inc();
    }

    /// Counts an object in this state, and no longer in the one before; none: it is gone.
    pub(crate) fn on_state(&self, kind: &str, namespace: &str, name: &str, state: Option<State>) {
        let count = |state: State| {
            let label = KindState { kind: kind.to_owned(), state: state.as_str() };
            self.objects.get_or_create_owned(&label)
        };
        let object = (kind.to_owned(), namespace.to_owned(), name.to_owned());
        let mut known = self.known.lock();
        let before = match state {
            Some(state) => known.insert(object, state),
            None => known.remove(&object),
        };
        if before == state {
            return;
        }
        if let Some(before) = before {
            count(before).dec();
        }
        if let Some(state) = state {
            count(state).inc();
        }
    }

    /// One more object is being worked on, until the guard goes.
    pub(crate) fn busy(&self, kind: &str) -> Busy {
        let gauge = self.busy.get_or_create_owned(&Kind { kind: kind.to_owned() });
        gauge.inc();
        Busy(gauge)
    }

    /// Gives every family a value, without which it is not served: for a page of all that there are.
    pub fn fill(&self) {
        let kind = "GemingaCluster";
        self.on_reconcile(kind, State::Ready.as_str(), Duration::ZERO);
        self.on_action(kind);
        self.on_state(kind, "namespace", "name", Some(State::Ready));
        drop(self.busy(kind));
        self.on_api_answer(Some(200));
        self.on_server_call_failed("UNREACHABLE");
        self.on_drain("namespace", "pool", Some(0));
    }

    /// An answer of the Kubernetes API; none: there was none.
    pub fn on_api_answer(&self, code: Option<u16>) {
        let code = code.map_or_else(|| "none".to_owned(), |code| code.to_string());
        self.api_requests.get_or_create(&Code { code }).inc();
    }

    /// A call to a server failed.
    pub fn on_server_call_failed(&self, reason: &'static str) {
        self.server_calls_failed.get_or_create(&Reason { reason }).inc();
    }

    /// What is left of a pool's drains; none: it has none, or is gone.
    pub fn on_drain(&self, namespace: &str, pool: &str, bytes_left: Option<i64>) {
        let label = Pool { namespace: namespace.to_owned(), pool: pool.to_owned() };
        match bytes_left {
            Some(bytes) => drop(self.drain_bytes_left.get_or_create(&label).set(bytes)),
            None => drop(self.drain_bytes_left.remove(&label)),
        }
    }

    /// Whoever does not lead knows of no object.
    pub(crate) fn set_leader(&self, leads: bool) {
        self.leader.set(i64::from(leads));
        if !leads {
            self.known.lock().clear();
            self.objects.clear();
            self.drain_bytes_left.clear();
        }
    }

    #[cfg(test)]
    pub(crate) fn leads(&self) -> bool {
        self.leader.get() == 1
    }
}

/// An object that is being worked on.
pub(crate) struct Busy(Gauge);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use geminga_runtime::telemetry::MetricsRegistry;

    use super::*;

    #[test]
    fn an_object_is_counted_in_one_state_until_it_is_gone_or_somebody_else_leads() {
        let registry = MetricsRegistry::new();
        let metrics = registry.with(Metrics::register);
        let line = |state: &str, n: u32| {
            format!("geminga_operator_objects{{kind=\"Topic\",state=\"{state}\"}} {n}\n")
        };
        metrics.on_state("Topic", "a", "one", Some(State::Working));
        metrics.on_state("Topic", "b", "one", Some(State::Ready));
        metrics.on_state("Topic", "a", "one", Some(State::Ready));
        metrics.on_state("Topic", "a", "one", Some(State::Ready));
        let page = registry.encode();
        assert!(page.contains(&line("ready", 2)) && page.contains(&line("working", 0)), "{page}");
        metrics.on_state("Topic", "b", "one", None);
        metrics.on_state("Topic", "b", "one", None);
        assert!(registry.encode().contains(&line("ready", 1)));
        metrics.on_drain("a", "main", Some(5));
        assert!(registry.encode().contains("drain_bytes_left{namespace=\"a\",pool=\"main\"} 5\n"));
        metrics.set_leader(false);
        let page = registry.encode();
        assert!(!page.contains("kind=\"Topic\"") && !page.contains("pool=\"main\""), "{page}");
        metrics.on_state("Topic", "a", "one", Some(State::Stalled));
        assert!(registry.encode().contains(&line("stalled", 1)));
    }

    #[test]
    fn a_worker_is_busy_until_its_turn_ends_in_any_way() {
        let metrics = Metrics::default();
        let kind = Kind { kind: "Topic".into() };
        let busy = metrics.busy("Topic");
        assert_eq!(metrics.busy.get_or_create(&kind).get(), 1);
        drop(busy);
        assert_eq!(metrics.busy.get_or_create(&kind).get(), 0);
    }
}
