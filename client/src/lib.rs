//! The Rust SDK: publish to and consume from a Geminga server over gRPC.
//!
//! ```no_run
//! # async fn demo() -> Result<(), geminga_client::Error> {
//! use futures::StreamExt;
//! use geminga_client::{Client, Message, Start};
//!
//! let client = Client::builder().server("http://127.0.0.1:8650").build().await?;
//! let producer = client.producer("orders").build().await?;
//! let receipt = producer.send(Message::new("first").with_key("customer-7")).await?.await?;
//! println!("stored at {:?}", receipt.id);
//! producer.close().await?;
//!
//! let mut consumer = client.consumer("orders", "billing").start(Start::Earliest).build().await?;
//! while let Some(received) = consumer.next().await {
//!     let received = received?;
//!     received.accept().await?;
//! }
//! # Ok(()) }
//! ```
//!
//! What it promises:
//! - [`Producer::send`] waits for room and returns a future of the [`Receipt`]. A receipt means: synced, at the level it
//!   names. Messages of one key keep their order; a message is stored at most once, also over reconnects (DD1, DD5).
//! - [`Consumer`] is a stream over all segments of a topic. Each message comes at least once until it is accepted; one
//!   that was accepted is not handed out again by the same consumer.
//! - Everything is bounded: a producer by its byte budget, a consumer by its credit; every wait has a deadline.
//! - An [`Error`] says what the caller may do next ([`Error::retry`]).
//!
//! The main path: [`Producer`] routes a message by the watched layout ([`routing`]) to the one task that owns the stream
//! of its segment; the task cuts batches (`producer/batcher.rs`) and keeps the chain of sequences (`producer/chain.rs`).
//! Both are plain synchronous code. What the SDK deliberately does not know: ledgers, brokers, bookies; it sees segments
//! and offsets.

mod admin;
mod backoff;
mod builder;
mod codec;
mod connection;
mod consumer;
mod error;
mod layout;
mod message;
mod producer;
pub mod routing;

pub use admin::{Admin, TierWalk};
pub use builder::{Client, ClientBuilder};
pub use codec::Compression;
pub use consumer::{Consumer, ConsumerBuilder, Received, Settling, Start};
pub use error::{Error, Refused};
pub use geminga_proto::{
    names::{NamespaceName, SubscriptionName, TenantName, TopicName},
    reason::{Reason, Retry},
};
pub use message::{Level, Message, MessageId, Receipt, namespace_name, topic_name};
pub use producer::{Batching, Pending, Producer, ProducerBuilder};
pub use routing::Routing;
