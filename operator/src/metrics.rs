//! Figures of the operator; their number is bounded by kinds and outcomes.

use std::time::Duration;

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

/// Objects compared with their spec, by `kind` and `outcome`: `ready`, `working`, `stalled`, `unknown`, `idle`, `failed`.
pub const RECONCILES: &str = "operator.reconciles";
/// Of one comparison, with what it did, s.
pub const RECONCILE_DURATION: &str = "operator.reconcile.duration";
/// Steps that were taken, by `kind` of the object that they were taken for.
pub const ACTIONS: &str = "operator.actions";
/// 1 while this process holds the lease.
pub const LEADER: &str = "operator.leader";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    kind: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: String,
}

/// Handles to the figures; clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    reconciles: Family<Outcome, Counter>,
    duration: Histogram,
    actions: Family<Kind, Counter>,
    leader: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            reconciles: Family::default(),
            duration: Histogram::new(exponential_buckets(0.001, 2.0, 16)), // 1 ms to 33 s
            actions: Family::default(),
            leader: Gauge::default(),
        }
    }
}

impl Metrics {
    /// Registers them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let name = |dotted: &str| format!("geminga_{}", dotted.replace('.', "_"));
        registry.register(
            name(RECONCILES),
            "Objects compared with their spec, by kind and by what their status says then",
            metrics.reconciles.clone(),
        );
        registry.register_with_unit(
            name(RECONCILE_DURATION),
            "Time of one comparison, with what it did",
            Unit::Seconds,
            metrics.duration.clone(),
        );
        registry.register(
            name(ACTIONS),
            "Steps that were taken, by kind of the object that they were taken for",
            metrics.actions.clone(),
        );
        registry.register(
            name(LEADER),
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

    pub(crate) fn set_leader(&self, leads: bool) {
        self.leader.set(i64::from(leads));
    }
}
