//! The binary as its user meets it: real processes, real files, real sockets, kill -9.

mod harness;
mod misuse;
mod readme;
mod survival;
