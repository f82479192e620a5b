//! The broker over real gRPC connections on this machine: the real managed ledger, on the in-memory forms of what is below.

mod admin;
mod bounds;
mod consume;
mod failures;
mod harness;
mod permissions;
mod publish;
mod reasons;
mod streams;
