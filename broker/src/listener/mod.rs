//! The rim: connections and their bounds, outgoing buffers, and typed answers to what the transport itself refuses.

mod connection;
mod first_frame;
mod outbox;
mod typed_errors;

pub use connection::{Connection, Incoming, ListenerParts, StreamSlot, incoming};
pub(crate) use first_frame::{first_frame, not_opened};
pub use outbox::{Outbox, OutboxStream, outbox};
pub use typed_errors::TypedErrors;
