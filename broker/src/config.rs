//! The broker's settings and limits, with their defaults. Limits are part of the contract with clients.

use std::{net::SocketAddr, time::Duration};

const MIB: u64 = 1024 * 1024;

/// Bytes that a batch's frame may have beyond its payload: open-frame fields, record index, protobuf tags. An index row
/// is 5 bytes, so the largest batch needs 320 KiB of it.
pub const FRAME_OVERHEAD_BYTES: usize = 512 * 1024;

/// Largest gRPC message that holds names and numbers only, bytes (S4).
pub const REQUEST_BYTES_MAX: usize = 64 * 1024;
/// An encoded range of offsets: two numbers of up to 10 bytes, their tags, and the range's own tag and length.
const RANGE_BYTES_MAX: usize = 24;

/// Settings of one broker.
#[derive(Clone, Debug)]
pub struct BrokerConfig {
    /// Name of this broker in the cluster, for instance `broker-0`.
    pub id: String,
    /// Where the gRPC listener binds; port 0 takes any free one.
    pub listen: SocketAddr,
    /// `host:port` that clients are told; none means the bound address.
    pub advertise: Option<String>,
    /// Length of the ownership lease (O1).
    pub lease_ttl: Duration,
    /// Time that streams have to leave a segment that is handed to another broker.
    pub move_drain: Duration,
    /// Time that a broker that stops serves on while no other one is there to take over; a third of what it has for its end at
    /// most. Zero: none will come.
    pub successor_wait: Duration,
    /// Mean time between two rounds of the janitor over cold storage (X4). An object goes a day after it was written at the
    /// earliest; each round costs a listing of everything there, shared by the brokers.
    pub sweep_interval: Duration,
    /// Fewest writable bookies that a drain may leave: the ensemble size (DC1).
    pub bookies_min: usize,
    /// Whether missing topics are created on first use at all; where they are, the namespace's policy decides.
    pub auto_create_topics: bool,
    /// The bounds below.
    pub limits: Limits,
}

/// Bounds on what clients may ask for and hold. Past each of them the answer is a typed refusal or back-pressure.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Largest single message, bytes of key, value and headers.
    pub message_bytes_max: u64,
    /// Bytes of HTTP request bodies in memory.
    pub http_bodies_bytes_max: u64,
    /// Largest payload of one batch, bytes, compressed and uncompressed alike.
    pub batch_bytes_max: u64,
    /// Most records of one batch.
    pub batch_records_max: u32,
    /// Most connections at a time; more are closed at once.
    pub connections_max: usize,
    /// Most of them from one address: half-open ones of one peer leave room for the others (S6).
    pub connections_per_address_max: usize,
    /// Most publish, consume and watch streams of all connections together.
    pub streams_max: usize,
    /// Most publish, consume and watch streams of one connection.
    pub streams_per_connection_max: usize,
    /// Bytes of batches, payload and index, that one connection may have taken but not settled.
    pub connection_bytes_max: u64,
    /// Bytes of batches that all connections together may have taken but not settled.
    pub broker_bytes_max: u64,
    /// Payload bytes read ahead for consumers and not yet taken by their connections, all streams together. A stream may
    /// always hold one batch beyond it.
    pub dispatch_bytes_max: u64,
    /// Read-ahead of one consume stream, payload bytes.
    pub read_ahead_bytes_max: u64,
    /// Payload bytes of relayed streams and calls on their way through this broker: half of it to owners, half back (O6). A
    /// stream may always hold one reply beyond it.
    pub relay_bytes_max: u64,
    /// Delivered bytes that wait for a slow connection, per stream.
    pub outbox_bytes_max: usize,
    /// Messages delivered to a subscription of one segment and not settled.
    pub unacked_messages_max: u64,
    /// Of one consumer.
    pub unacked_per_consumer_max: u64,
    /// Consumers of a subscription on one segment, where no policy says how many.
    pub consumers_max: usize,
    /// Time that a consumer whose stream broke has to come back, and that consumers have after a crash of the owner (L4).
    pub consumer_grace: Duration,
    /// Messages of a subscription on one segment that wait for a time, a key or a consumer; past it no later ones are looked
    /// at until some have left.
    pub delayed_messages_max: u64,
    /// Dead letters of a subscription on one segment whose copy is not stored yet; past it rejects are refused.
    pub dead_letters_max: usize,
    /// Claims in one open frame.
    pub claims_max: usize,
    /// Ranges in one settle frame.
    pub settle_ranges_max: usize,
    /// Settles of one stream that wait for their record to become durable.
    pub settles_in_flight_max: usize,
    /// Batches, and payload bytes, that one publish stream may have in flight: its credit.
    pub publish_window_batches: u64,
    /// See `publish_window_batches`.
    pub publish_window_bytes: u64,
    /// Segments of one topic (one transaction creates them all).
    pub segments_max: u32,
    /// Subscriptions of one topic, where no policy says how many.
    pub subscriptions_max: usize,
    /// Time that a subscription's creation or deletion may stand half done before it is driven on (C6).
    pub subscription_stall: Duration,
    /// Items on one page of a listing.
    pub page_items_max: usize,
    /// Time from a stream's start to its open frame, and from a connection's start to its first bytes.
    pub open_deadline: Duration,
    /// Time that an open or an admin call may wait for a segment to be loaded.
    pub load_deadline: Duration,
    /// Time that a unary publish may wait for its share of the bytes in flight before it is refused as BUSY, and for its topic's
    /// rate before it is refused as RATE_LIMITED.
    pub busy_after: Duration,
    /// Time that a unary publish or settle may wait for its record.
    pub unary_deadline: Duration,
    /// Time without any sign of life after which the server pings a connection.
    pub keepalive_interval: Duration,
    /// Time for the answer to such a ping; then the connection ends.
    pub keepalive_timeout: Duration,
    /// Age at which a publish, consume or watch stream is told to go, give or take a tenth (each draws its own): so clients
    /// spread over brokers that came later, and credentials are looked at again.
    pub stream_age_max: Duration,
    /// Time that a write to a connection may make no progress before the connection ends.
    pub write_stall_max: Duration,
}

impl BrokerConfig {
    /// The defaults, listening on a port of this machine only.
    #[must_use]
    pub fn new(id: impl Into<String>, listen: SocketAddr) -> Self {
        Self {
            id: id.into(),
            listen,
            advertise: None,
            lease_ttl: Duration::from_secs(5),
            move_drain: Duration::from_secs(2),
            successor_wait: Duration::ZERO,
            sweep_interval: Duration::from_secs(6 * 3600),
            bookies_min: 3,
            auto_create_topics: true,
            limits: Limits::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            message_bytes_max: 5 * MIB,
            http_bodies_bytes_max: 256 * MIB,
            batch_bytes_max: 6 * MIB,
            batch_records_max: 65_536,
            connections_max: 10_000,
            connections_per_address_max: 2_000,
            streams_max: 50_000,
            streams_per_connection_max: 1_000,
            connection_bytes_max: 64 * MIB,
            broker_bytes_max: 256 * MIB,
            dispatch_bytes_max: 256 * MIB,
            relay_bytes_max: 64 * MIB,
            read_ahead_bytes_max: 2 * MIB,
            outbox_bytes_max: MIB as usize,
            unacked_messages_max: 500_000,
            unacked_per_consumer_max: 500_000,
            consumers_max: 1_000,
            consumer_grace: Duration::from_secs(5),
            delayed_messages_max: 2_000_000,
            dead_letters_max: 10_000,
            claims_max: 1_000,
            settle_ranges_max: 10_000,
            settles_in_flight_max: 1_024,
            publish_window_batches: 1_024,
            publish_window_bytes: 32 * MIB,
            segments_max: 100,
            subscriptions_max: 1_000,
            subscription_stall: Duration::from_secs(60),
            page_items_max: 1_000,
            open_deadline: Duration::from_secs(10),
            load_deadline: Duration::from_secs(15),
            busy_after: Duration::from_secs(2),
            unary_deadline: Duration::from_secs(30),
            keepalive_interval: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(10),
            stream_age_max: Duration::from_secs(3_600),
            write_stall_max: Duration::from_secs(60),
        }
    }
}

impl Limits {
    /// Largest gRPC message with a batch in it.
    #[must_use]
    pub fn frame_bytes_max(&self) -> usize {
        self.batch_bytes_max as usize + FRAME_OVERHEAD_BYTES
    }

    /// Largest gRPC message that the broker decodes from a consumer: a settle with as many ranges as it may have.
    #[must_use]
    pub fn settle_frame_bytes_max(&self) -> usize {
        self.settle_ranges_max * RANGE_BYTES_MAX + REQUEST_BYTES_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_batch_with_its_index_fits_one_frame_and_the_frame_every_transport() {
        let limits = Limits::default();
        assert!(limits.batch_records_max as usize * 5 + 4_096 < FRAME_OVERHEAD_BYTES);
        assert!(limits.frame_bytes_max() < 16 * 1024 * 1024);
        assert!(limits.message_bytes_max < limits.batch_bytes_max);
        assert!(limits.publish_window_bytes >= limits.batch_bytes_max);
    }
}
