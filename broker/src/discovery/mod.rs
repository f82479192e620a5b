//! What topics there are and where they are served: a mirror fed by watches, and the streams that follow it.

mod hub;
mod service;
mod topics;

pub(crate) use hub::{Hub, SubscriptionKey};
pub(crate) use service::DiscoveryService;
