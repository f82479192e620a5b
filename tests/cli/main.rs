//! The binary as its user meets it: real processes, real files, real sockets, kill -9.

mod check;
mod contexts;
mod harness;
mod misuse;
mod policies;
mod processing;
mod queues;
mod readme;
mod survival;
