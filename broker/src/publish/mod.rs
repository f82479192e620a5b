//! From a client's batch to its receipt: check, reserve its bytes, put it in order, answer in order.

mod anonymous;
mod batch;
mod order;
mod service;
mod stream;
mod unary;

use geminga_proto::reason::Reason;

use crate::{catalog::Topic, errors::Refusal};

pub(crate) use anonymous::Anonymous;
pub(crate) use service::PublisherService;

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
