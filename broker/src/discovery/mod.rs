//! Where topics are served: a mirror of topics and claims, fed by watches, and the `Watch` streams that follow it.

mod hub;
mod service;

pub(crate) use hub::Hub;
pub(crate) use service::DiscoveryService;
