//! The gRPC service `Admin`: tenants, namespaces, topics and subscriptions; the cluster, policies and tiers.

mod bookies;
mod cluster;
pub(crate) mod describe;
mod ledgers;
mod policies;
mod service;
mod tier;

pub(crate) use service::AdminService;
