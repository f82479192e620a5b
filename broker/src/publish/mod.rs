//! From a client's batch to its receipt: check, reserve its bytes, put it in order, answer in order.

mod anonymous;
mod batch;
mod order;
mod service;
mod stream;
mod unary;

use geminga_proto::{
    ids::SegmentId,
    reason::Reason,
    v1::{OwnerHint, Route},
};

use crate::{catalog::Topic, errors::Refusal, listener::Connection, ownership::not_owner};

pub(crate) use anonymous::Anonymous;
pub(crate) use service::PublisherService;
pub(crate) use unary::admitted as publish_own;

/// Whether a stream for another broker's segment is passed on: only where the client asks for it, and never twice (O6). The
/// others are sent to the owner; a client that cannot reach it comes back and asks.
pub(crate) fn relays(connection: &Connection, route: i32) -> bool {
    route == i32::from(Route::Relay) && !connection.is_relayed()
}

/// The stream is to be opened at the owner.
pub(crate) fn elsewhere(topic: &Topic, id: SegmentId, mut owner: OwnerHint) -> Refusal {
    owner.layout_epoch = topic.layout_epoch;
    not_owner(id, &owner)
}

/// Whether a request was routed by the layout that stands; 0 means that it does not say.
///
/// # Errors
/// LAYOUT_CHANGED with the epoch that stands.
pub(crate) fn check_layout(topic: &Topic, layout_epoch: u64) -> Result<(), Refusal> {
    if layout_epoch == 0 || layout_epoch == topic.layout_epoch {
        return Ok(());
    }
    let message = format!(
        "the layout of {} stands at epoch {}, not {layout_epoch}",
        topic.name, topic.layout_epoch
    );
    Err(Refusal::new(Reason::LayoutChanged, message).with("layout_epoch", topic.layout_epoch))
}
