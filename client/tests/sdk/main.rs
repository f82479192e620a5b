//! The SDK against a scripted server: over real connections, and the test decides what is answered, and when.

mod calls;
mod chaos;
mod client;
mod consumer;
mod life;
mod pattern;
mod processor;
mod producer;
mod server;
mod table;
