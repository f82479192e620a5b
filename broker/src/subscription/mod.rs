//! Subscriptions in service: who consumes, with which handle, and the consume stream's task.

mod consumers;
mod handle;
mod service;
mod stream;

pub use consumers::{Attached, Consumers};
pub use handle::Handle;
pub(crate) use service::{SubscriberService, start_of};
