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
//! - [`Consumer`] is a stream over all segments of a topic. Each message comes at least once until it is settled. What was
//!   handed out stays this consumer's over breaks, if the server grants its claim (L4), and its lease is kept from running
//!   out for as long as the application asks; what is not ours any more is [`Error::NotHeld`].
//! - [`ProcessorBuilder`] stores each output of an input exactly once (TX8), under the conditions it names.
//! - [`Reader`], [`Client::peek`] and [`Table`] leave no trace in any subscription.
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
mod calls;
mod codec;
mod connection;
mod consumer;
mod error;
mod heartbeat;
mod layout;
mod message;
mod pattern;
mod processor;
mod producer;
pub mod routing;
mod table;

pub use admin::{Admin, TierWalk};
pub use builder::{Client, ClientBuilder};
pub use calls::{Peeked, Place, PullBuilder, Pulled};
pub use codec::Compression;
pub use consumer::{
    Consumer, ConsumerBuilder, Position, Reader, ReaderBuilder, Received, Settling, Start,
};
pub use error::{Error, Refused};
pub use geminga_proto::{
    names::{NamespaceName, SubscriptionName, TenantName, TopicName},
    reason::{Reason, Retry},
    v1::{RetryPolicy, SubscriptionSettings, SubscriptionType},
};
pub use message::{Level, Message, MessageId, Receipt, Stored, namespace_name, topic_name};
pub use pattern::{PatternBuilder, PatternConsumer};
pub use processor::{OUTPUTS_MAX, Processed, ProcessorBuilder};
pub use producer::{Access, Batching, Pending, Producer, ProducerBuilder};
pub use routing::{Custom, Routing};
pub use table::{Table, TableBuilder, Update};
