//! What belongs to a segment that another broker owns (O6): passed on to the owner, or done there.
//!
//! - `streams`: a publish or consume stream, forwarded both ways; `unary`: one batch, one settle.
//! - `walk`: work on a segment's objects, told step by step.
//! - `segments`: what the life cycle and the admin API ask of a segment, wherever it is.
//! - `peers`: one connection per broker.
//!
//! A relayed request says for whom ([`RELAYED_FOR`]). The owner authorises that principal; the broker that relays needs
//! [`crate::auth::Action::Serve`] to speak for others, which grants nothing else (S2). It is never relayed again: a second
//! hop is refused with the owner.

mod peers;
mod segments;
mod streams;
mod unary;
mod walk;

use geminga_runtime::budget::ByteBudget;

use crate::listener::Connection;

pub(crate) use peers::Peers;
pub(crate) use segments::{SegmentsService, ask, ask_if_claimed};
pub(crate) use streams::{consume, publish};
pub(crate) use unary::{peek, publish as publish_batch, pull, settle};
pub(crate) use walk::{Steps, in_steps, walk};

/// Metadata of a relayed request: the principal that it is made for.
pub(crate) const RELAYED_FOR: &str = "geminga-relayed-for";

/// Metadata of a relayed request that a broker makes for itself.
pub(crate) const RELAYED_INTERNAL: &str = "geminga-relayed-internal";

/// Bytes on their way through this broker. Each direction has its own half: consumers that do not read cannot stop
/// producers.
#[derive(Clone, Debug)]
pub(crate) struct RelayBytes {
    pub(crate) to_owner: ByteBudget,
    pub(crate) to_client: ByteBudget,
}

impl RelayBytes {
    pub(crate) fn new(bytes_max: u64) -> Self {
        let half = bytes_max / 2;
        Self { to_owner: ByteBudget::new(half), to_client: ByteBudget::new(half) }
    }

    pub(crate) fn in_use(&self) -> u64 {
        self.to_owner.in_use() + self.to_client.in_use()
    }
}

/// A request for this connection's principal, as it goes to the owner.
fn relayed<T>(message: T, connection: &Connection) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    let name = connection.principal().to_string().parse().expect("a principal's name is ASCII");
    request.metadata_mut().insert(RELAYED_FOR, name);
    if connection.is_internal() {
        let yes = tonic::metadata::MetadataValue::from_static("true");
        request.metadata_mut().insert(RELAYED_INTERNAL, yes);
    }
    request
}
