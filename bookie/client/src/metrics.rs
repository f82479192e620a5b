//! Metrics of the ledger client.

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

/// `ledger.append.duration`, s: from append to acknowledgement.
pub const LEDGER_APPEND_DURATION: &str = "ledger.append.duration";
/// `ledger.append.bytes`: payload bytes acknowledged.
pub const LEDGER_APPEND_BYTES: &str = "ledger.append.bytes";
/// `ledger.held.bytes`: payload bytes held until every slot answered (W5).
pub const LEDGER_HELD_BYTES: &str = "ledger.held.bytes";
/// `ledger.ensemble.changes`: fragments published by writers (EC3).
pub const LEDGER_ENSEMBLE_CHANGES: &str = "ledger.ensemble.changes";
/// `ledger.slots.given.up`: slots given up for lack of a replacement (EC7).
pub const LEDGER_SLOTS_GIVEN_UP: &str = "ledger.slots.given.up";
/// `ledger.writers.poisoned`: writers that will acknowledge nothing more.
pub const LEDGER_WRITERS_POISONED: &str = "ledger.writers.poisoned";
/// `ledger.recoveries`: ledgers recovered.
pub const LEDGER_RECOVERIES: &str = "ledger.recoveries";
/// `ledger.recovery.aborts`: attempts that met neither a positive nor enough explicit noes (R3).
pub const LEDGER_RECOVERY_ABORTS: &str = "ledger.recovery.aborts";
/// `ledger.read.damage`: copies at or below the end that a bookie could not show (RD4).
pub const LEDGER_READ_DAMAGE: &str = "ledger.read.damage";

/// `bookie.rpc.<side>.connections`: open connections, past their handshake. `<side>` is `client` or `server`, here and below.
pub const BOOKIE_RPC_CONNECTIONS: &str = "connections";
/// `bookie.rpc.<side>.connects.failed`: connections that did not come about.
pub const BOOKIE_RPC_CONNECTS_FAILED: &str = "connects.failed";
/// `bookie.rpc.<side>.handshakes.refused`: peers of another cluster or version, or beyond the limit.
pub const BOOKIE_RPC_HANDSHAKES_REFUSED: &str = "handshakes.refused";
/// `bookie.rpc.<side>.busy`: requests refused at once because too many bytes waited.
pub const BOOKIE_RPC_BUSY: &str = "busy";
/// `bookie.rpc.<side>.frames.in` and `.out`.
pub const BOOKIE_RPC_FRAMES: &str = "frames";
/// `bookie.rpc.<side>.bytes.in` and `.out`: bytes on the connections.
pub const BOOKIE_RPC_BYTES: &str = "bytes";
/// `bookie.rpc.<side>.in.flight.bytes`: what requests hold that are not answered yet; on the server's side only.
pub const BOOKIE_RPC_IN_FLIGHT_BYTES: &str = "in.flight.bytes";

/// The crate's metrics; `default()` is unregistered, for tests.
#[derive(Clone, Debug)]
pub struct ClientMetrics {
    pub append_duration: Histogram,
    pub append_bytes: Counter,
    pub held_bytes: Gauge,
    pub ensemble_changes: Counter,
    pub slots_given_up: Counter,
    pub writers_poisoned: Counter,
    pub recoveries: Counter,
    pub recovery_aborts: Counter,
    pub read_damage: Counter,
}

impl Default for ClientMetrics {
    fn default() -> Self {
        let buckets = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0];
        Self {
            append_duration: Histogram::new(buckets),
            append_bytes: Counter::default(),
            held_bytes: Gauge::default(),
            ensemble_changes: Counter::default(),
            slots_given_up: Counter::default(),
            writers_poisoned: Counter::default(),
            recoveries: Counter::default(),
            recovery_aborts: Counter::default(),
            read_damage: Counter::default(),
        }
    }
}

impl ClientMetrics {
    /// Registers them as `geminga_<name>`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let name = |dotted: &str| format!("geminga_{}", dotted.replace('.', "_"));
        registry.register_with_unit(
            name(LEDGER_APPEND_DURATION),
            "From append to acknowledgement",
            Unit::Seconds,
            metrics.append_duration.clone(),
        );
        for (dotted, help, counter) in [
            (LEDGER_APPEND_BYTES, "Payload bytes acknowledged", &metrics.append_bytes),
            (LEDGER_ENSEMBLE_CHANGES, "Ensemble changes by writers", &metrics.ensemble_changes),
            (LEDGER_SLOTS_GIVEN_UP, "Slots without a replacement", &metrics.slots_given_up),
            (LEDGER_WRITERS_POISONED, "Writers that ended early", &metrics.writers_poisoned),
            (LEDGER_RECOVERIES, "Ledgers recovered", &metrics.recoveries),
            (LEDGER_RECOVERY_ABORTS, "Recovery attempts to be repeated", &metrics.recovery_aborts),
            (LEDGER_READ_DAMAGE, "Copies a bookie could not show", &metrics.read_damage),
        ] {
            registry.register(name(dotted), help, counter.clone());
        }
        registry.register(
            name(LEDGER_HELD_BYTES),
            "Payload bytes held",
            metrics.held_bytes.clone(),
        );
        metrics
    }
}

/// Metrics of one side of the bookie data plane; `default()` is unregistered, for tests.
#[derive(Clone, Debug, Default)]
pub struct RpcMetrics {
    pub connections: Gauge,
    pub connects_failed: Counter,
    pub handshakes_refused: Counter,
    pub busy: Counter,
    pub frames_in: Counter,
    pub frames_out: Counter,
    pub bytes_in: Counter,
    pub bytes_out: Counter,
    pub in_flight_bytes: Gauge,
}

impl RpcMetrics {
    /// Registers them as `geminga_bookie_rpc_<side>_<name>`.
    pub fn register(registry: &mut Registry, side: &str) -> Self {
        let metrics = Self::default();
        let name = |dotted: &str| format!("geminga_bookie_rpc_{side}_{}", dotted.replace('.', "_"));
        for (dotted, help, gauge) in [
            (BOOKIE_RPC_CONNECTIONS, "Open connections", &metrics.connections),
            (BOOKIE_RPC_IN_FLIGHT_BYTES, "Bytes not answered yet", &metrics.in_flight_bytes),
        ] {
            registry.register(name(dotted), help, gauge.clone());
        }
        let way = |what: &str, way: &str| format!("{what}.{way}");
        for (dotted, help, counter) in [
            (
                BOOKIE_RPC_CONNECTS_FAILED.to_owned(),
                "Connections that did not come about",
                &metrics.connects_failed,
            ),
            (
                BOOKIE_RPC_HANDSHAKES_REFUSED.to_owned(),
                "Peers refused by the handshake",
                &metrics.handshakes_refused,
            ),
            (BOOKIE_RPC_BUSY.to_owned(), "Requests refused for lack of room", &metrics.busy),
            (way(BOOKIE_RPC_FRAMES, "in"), "Frames received", &metrics.frames_in),
            (way(BOOKIE_RPC_FRAMES, "out"), "Frames sent", &metrics.frames_out),
            (way(BOOKIE_RPC_BYTES, "in"), "Bytes received", &metrics.bytes_in),
            (way(BOOKIE_RPC_BYTES, "out"), "Bytes sent", &metrics.bytes_out),
        ] {
            registry.register(name(&dotted), help, counter.clone());
        }
        metrics
    }
}

/// Counts one more in a gauge while it lives.
#[derive(Debug)]
pub(crate) struct Counted(Gauge);

impl Counted {
    pub(crate) fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}
