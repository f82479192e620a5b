//! The gRPC service `Admin`: tenants, namespaces, topics and subscriptions.

mod describe;
mod service;

pub(crate) use service::AdminService;
