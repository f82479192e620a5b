//! What the broker counts. Names are dotted with a unit; the exporter writes `broker.publish.bytes` as
//! `geminga_broker_publish_bytes_total`.

use std::sync::atomic::AtomicU64;

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

/// Connections open now.
pub const CONNECTIONS: &str = "broker.connections";
/// Connections closed at once because there were too many.
pub const CONNECTIONS_REFUSED: &str = "broker.connections.refused";
/// Streams open now; `kind` = publish | consume | watch | tier.
pub const STREAMS: &str = "broker.streams";
/// Refused calls, batches and settles; `reason` = one of the reasons.
pub const REFUSED: &str = "broker.refused";
/// Messages stored, duplicates not counted.
pub const PUBLISH_MESSAGES: &str = "broker.publish.messages";
/// Payload stored, as sent.
pub const PUBLISH_BYTES: &str = "broker.publish.bytes";
/// From a batch's arrival to its receipt.
pub const PUBLISH_DURATION: &str = "broker.publish.duration";
/// Batches answered as duplicate.
pub const PUBLISH_DUPLICATES: &str = "broker.publish.duplicates";
/// Time that batches waited for their topic's publish rate, all together.
pub const PUBLISH_THROTTLED: &str = "broker.publish.throttled";
/// Payload of batches that waited for it.
pub const PUBLISH_THROTTLED_BYTES: &str = "broker.publish.throttled.bytes";
/// Messages given to consumers.
pub const DISPATCH_MESSAGES: &str = "broker.dispatch.messages";
/// Payload given to consumers, whole batches.
pub const DISPATCH_BYTES: &str = "broker.dispatch.bytes";
/// Time that deliverable messages waited for their subscription's or reader's rate, all together.
pub const DISPATCH_THROTTLED: &str = "broker.dispatch.throttled";
/// Payload of deliveries that waited for it.
pub const DISPATCH_THROTTLED_BYTES: &str = "broker.dispatch.throttled.bytes";
/// From a settle's arrival to its answer.
pub const SETTLE_DURATION: &str = "broker.settle.duration";
/// Messages given to a consumer again after an attempt ended.
pub const REDELIVERIES: &str = "broker.dispatch.redeliveries";
/// Messages decided to be dead letters.
pub const DEAD_LETTERS: &str = "broker.dispatch.dead_letters";
/// Messages whose lease ran out.
pub const LEASE_EXPIRIES: &str = "broker.dispatch.lease_expiries";
/// Key ranges that got another consumer.
pub const KEY_RANGE_MOVES: &str = "broker.dispatch.key_range_moves";
/// Messages that wait for a time, as far as dispatchers know, all together.
pub const DELAYED: &str = "broker.dispatch.delayed";
/// Subscriptions of served segments with messages that nobody has, by what holds the next one up; `by` = as in `HeldBy`.
pub const BLOCKED: &str = "broker.dispatch.blocked";
/// Consumers of dispatchers, all together.
pub const CONSUMERS: &str = "broker.consumers";
/// Segments served now.
pub const SEGMENTS: &str = "broker.segments";
/// From the first request for a segment to its being served.
pub const SEGMENT_LOAD_DURATION: &str = "broker.segment.load.duration";
/// Messages not settled, of the subscriptions on served segments.
pub const BACKLOG: &str = "broker.subscription.backlog";
/// Their payload bytes, estimated.
pub const BACKLOG_BYTES: &str = "broker.subscription.backlog.bytes";
/// Age of the oldest of them, estimated.
pub const BACKLOG_AGE: &str = "broker.subscription.backlog.age";
/// Streams and calls passed on to a segment's owner.
pub const RELAYED: &str = "broker.relayed";
/// Payload passed on, both ways.
pub const RELAYED_BYTES: &str = "broker.relayed.bytes";
/// Bundles claimed now.
pub const BUNDLES: &str = "broker.bundles";
/// Bundles handed to another broker.
pub const BUNDLES_MOVED: &str = "broker.bundles.moved";
/// Bundles whose claim ran out and was made again before anybody else did.
pub const BUNDLES_RECLAIMED: &str = "broker.bundles.reclaimed";
/// 1 while the claims are unconfirmed for too long (O3).
pub const PROVISIONAL: &str = "broker.provisional";
/// Rounds over cold storage that came to their end (X4).
pub const SWEEPS: &str = "broker.tier.sweeps";
/// Topics, or whole rounds, that were not swept; the next round goes on.
pub const SWEEP_FAILURES: &str = "broker.tier.sweep.failures";

/// The label of [`STREAMS`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct StreamKind {
    pub kind: &'static str,
}

/// The label of [`REFUSED`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RefusedFor {
    pub reason: &'static str,
}

/// The label of [`BLOCKED`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct BlockedBy {
    pub by: &'static str,
}

/// The labels of [`BACKLOG`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct BacklogOf {
    pub topic: String,
    pub segment: u32,
    pub subscription: String,
}

/// The broker's metrics. Clones count together.
#[derive(Clone, Debug)]
pub struct Metrics {
    pub connections: Gauge,
    pub connections_refused: Counter,
    pub streams: Family<StreamKind, Gauge>,
    pub refused: Family<RefusedFor, Counter>,
    pub publish_messages: Counter,
    pub publish_bytes: Counter,
    pub publish_duration: Histogram,
    pub publish_duplicates: Counter,
    pub publish_throttled: Counter<f64, AtomicU64>,
    pub publish_throttled_bytes: Counter,
    pub dispatch_throttled: Counter<f64, AtomicU64>,
    pub dispatch_throttled_bytes: Counter,
    pub dispatch_messages: Counter,
    pub dispatch_bytes: Counter,
    pub settle_duration: Histogram,
    pub redeliveries: Counter,
    pub dead_letters: Counter,
    pub lease_expiries: Counter,
    pub key_range_moves: Counter,
    pub delayed: Gauge,
    pub blocked: Family<BlockedBy, Gauge>,
    pub consumers: Gauge,
    pub segments: Gauge,
    pub segment_load_duration: Histogram,
    pub backlog: Family<BacklogOf, Gauge>,
    pub backlog_bytes: Family<BacklogOf, Gauge>,
    pub backlog_age: Family<BacklogOf, Gauge>,
    pub relayed: Counter,
    pub relayed_bytes: Counter,
    pub bundles: Gauge,
    pub bundles_moved: Counter,
    pub bundles_reclaimed: Counter,
    pub provisional: Gauge,
    pub sweeps: Counter,
    pub sweep_failures: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            connections: Gauge::default(),
            connections_refused: Counter::default(),
            streams: Family::default(),
            refused: Family::default(),
            publish_messages: Counter::default(),
            publish_bytes: Counter::default(),
            publish_duration: seconds(),
            publish_duplicates: Counter::default(),
            publish_throttled: Counter::default(),
            publish_throttled_bytes: Counter::default(),
            dispatch_throttled: Counter::default(),
            dispatch_throttled_bytes: Counter::default(),
            dispatch_messages: Counter::default(),
            dispatch_bytes: Counter::default(),
            settle_duration: seconds(),
            redeliveries: Counter::default(),
            dead_letters: Counter::default(),
            lease_expiries: Counter::default(),
            key_range_moves: Counter::default(),
            delayed: Gauge::default(),
            blocked: Family::default(),
            consumers: Gauge::default(),
            segments: Gauge::default(),
            segment_load_duration: seconds(),
            backlog: Family::default(),
            backlog_bytes: Family::default(),
            backlog_age: Family::default(),
            relayed: Counter::default(),
            relayed_bytes: Counter::default(),
            bundles: Gauge::default(),
            bundles_moved: Counter::default(),
            bundles_reclaimed: Counter::default(),
            provisional: Gauge::default(),
            sweeps: Counter::default(),
            sweep_failures: Counter::default(),
        }
    }
}

impl Metrics {
    /// Registers all of them.
    pub fn register(registry: &mut Registry) -> Self {
        let m = Self::default();
        let name = |dotted: &str| format!("geminga_{}", dotted.replace('.', "_"));
        registry.register(name(CONNECTIONS), "Connections open now", m.connections.clone());
        let refused = "Connections closed at once because there were too many";
        registry.register(name(CONNECTIONS_REFUSED), refused, m.connections_refused.clone());
        registry.register(name(STREAMS), "Streams open now", m.streams.clone());
        registry.register(name(REFUSED), "Refused calls, batches and settles", m.refused.clone());
        registry.register(name(PUBLISH_MESSAGES), "Messages stored", m.publish_messages.clone());
        registry.register(name(PUBLISH_BYTES), "Payload bytes stored", m.publish_bytes.clone());
        registry.register_with_unit(
            name(PUBLISH_DURATION),
            "From a batch's arrival to its receipt",
            Unit::Seconds,
            m.publish_duration.clone(),
        );
        registry.register(
            name(PUBLISH_DUPLICATES),
            "Batches stored before",
            m.publish_duplicates.clone(),
        );
        registry.register(
            name(DISPATCH_MESSAGES),
            "Messages given to consumers",
            m.dispatch_messages.clone(),
        );
        registry.register(
            name(DISPATCH_BYTES),
            "Payload bytes given to consumers",
            m.dispatch_bytes.clone(),
        );
        registry.register_with_unit(
            name(SETTLE_DURATION),
            "From a settle's arrival to its answer",
            Unit::Seconds,
            m.settle_duration.clone(),
        );
        registry.register(name(SEGMENTS), "Segments served now", m.segments.clone());
        registry.register_with_unit(
            name(SEGMENT_LOAD_DURATION),
            "From the first request for a segment to its being served",
            Unit::Seconds,
            m.segment_load_duration.clone(),
        );
        registry.register(name(BACKLOG), "Messages not settled", m.backlog.clone());
        let bytes = "Payload bytes of messages not settled, estimated";
        registry.register(name(BACKLOG_BYTES), bytes, m.backlog_bytes.clone());
        registry.register_with_unit(
            name(BACKLOG_AGE),
            "Age of the oldest message not settled, estimated",
            Unit::Seconds,
            m.backlog_age.clone(),
        );
        // Counters begin at 0, so that the first refusal of a kind is a rise.
        for reason in geminga_proto::reason::Reason::ALL {
            let _at_zero = m.refused.get_or_create(&RefusedFor { reason: reason.as_str() });
        }
        m.register_rates(registry, name);
        m.register_dispatch(registry, name);
        m.register_ownership(registry, name);
        m
    }

    fn register_dispatch(&self, registry: &mut Registry, name: impl Fn(&str) -> String) {
        let redelivered = "Messages given to a consumer again";
        registry.register(name(REDELIVERIES), redelivered, self.redeliveries.clone());
        let dead = "Messages decided to be dead letters";
        registry.register(name(DEAD_LETTERS), dead, self.dead_letters.clone());
        let expired = "Messages whose lease ran out";
        registry.register(name(LEASE_EXPIRIES), expired, self.lease_expiries.clone());
        let moved = "Key ranges that got another consumer";
        registry.register(name(KEY_RANGE_MOVES), moved, self.key_range_moves.clone());
        registry.register(name(DELAYED), "Messages that wait for a time", self.delayed.clone());
        let blocked = "Subscriptions with messages that nobody has";
        registry.register(name(BLOCKED), blocked, self.blocked.clone());
        registry.register(name(CONSUMERS), "Consumers attached", self.consumers.clone());
    }

    fn register_rates(&self, registry: &mut Registry, name: impl Fn(&str) -> String) {
        registry.register_with_unit(
            name(PUBLISH_THROTTLED),
            "Time that batches waited for their topic's publish rate",
            Unit::Seconds,
            self.publish_throttled.clone(),
        );
        let bytes = "Payload bytes of batches that waited for their topic's publish rate";
        registry.register(
            name(PUBLISH_THROTTLED_BYTES),
            bytes,
            self.publish_throttled_bytes.clone(),
        );
        registry.register_with_unit(
            name(DISPATCH_THROTTLED),
            "Time that deliverable messages waited for a delivery rate",
            Unit::Seconds,
            self.dispatch_throttled.clone(),
        );
        let bytes = "Payload bytes of deliveries that waited for a delivery rate";
        registry.register(
            name(DISPATCH_THROTTLED_BYTES),
            bytes,
            self.dispatch_throttled_bytes.clone(),
        );
    }

    fn register_ownership(&self, registry: &mut Registry, name: impl Fn(&str) -> String) {
        let relayed = "Streams and calls passed on to a segment's owner";
        registry.register(name(RELAYED), relayed, self.relayed.clone());
        let bytes = "Payload bytes passed on, both ways";
        registry.register(name(RELAYED_BYTES), bytes, self.relayed_bytes.clone());
        registry.register(name(BUNDLES), "Bundles claimed now", self.bundles.clone());
        let moved = "Bundles handed to another broker";
        registry.register(name(BUNDLES_MOVED), moved, self.bundles_moved.clone());
        let reclaimed = "Bundles whose claim ran out and was made again";
        registry.register(name(BUNDLES_RECLAIMED), reclaimed, self.bundles_reclaimed.clone());
        let provisional = "1 while the claims are unconfirmed for too long";
        registry.register(name(PROVISIONAL), provisional, self.provisional.clone());
        let sweeps = "Rounds over cold storage that came to their end";
        registry.register(name(SWEEPS), sweeps, self.sweeps.clone());
        let failures = "Topics, or whole rounds, not swept";
        registry.register(name(SWEEP_FAILURES), failures, self.sweep_failures.clone());
    }

    /// Counts a stream of this kind as open until the guard is dropped.
    #[must_use]
    pub fn stream(&self, kind: &'static str) -> OpenStream {
        let gauge = self.streams.get_or_create(&StreamKind { kind }).clone();
        gauge.inc();
        OpenStream(gauge)
    }

    /// Counts a refusal.
    pub fn refuse(&self, reason: geminga_proto::reason::Reason) {
        self.refused.get_or_create(&RefusedFor { reason: reason.as_str() }).inc();
    }
}

/// A stream that is counted as open.
#[derive(Debug)]
pub struct OpenStream(Gauge);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Buckets from 100 us to 26 s.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.000_1, 2.0, 19))
}
