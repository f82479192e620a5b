//! The SDK against a scripted server: over real connections, and the test decides what is answered, and when.

mod chaos;
mod client;
mod consumer;
mod producer;
mod server;
