//! The broker over real gRPC connections on this machine: the real managed ledger, on the in-memory forms of what is below.

mod admin;
mod admin_cluster;
mod bounds;
mod consume;
mod failures;
mod harness;
mod moves;
mod permissions;
mod publish;
mod reasons;
mod relay;
mod rest;
mod standing;
mod streams;
mod tier;
mod tier_janitor;
mod types;
