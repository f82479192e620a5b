//! The broker over real gRPC connections on this machine: the real managed ledger, on the in-memory forms of what is below.

mod admin;
mod admin_cluster;
mod bounds;
mod compaction;
mod consume;
mod counted;
mod failures;
mod harness;
mod limits;
mod lives;
mod many;
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
mod topics;
mod types;
