//! The rim: connections and their bounds, outgoing buffers, and typed answers to what the transport itself refuses.

mod connection;
mod outbox;
mod typed_errors;

pub use connection::{Connection, Incoming, ListenerParts, StreamSlot, incoming};
pub use outbox::{Outbox, OutboxStream, outbox};
pub use typed_errors::TypedErrors;
