//! The rim: connections and their bounds, outgoing buffers, and typed answers to what the transport itself refuses.

mod connection;
mod first_frame;
mod life;
mod outbox;
mod typed_errors;

pub use connection::{Connection, Incoming, ListenerParts, StreamSlot, incoming};
pub(crate) use first_frame::{first_frame, not_opened};
pub(crate) use life::{Due, Hearing, Life, Traffic, check_heartbeat, silent};
pub use outbox::{Outbox, OutboxStream, outbox};
pub use typed_errors::TypedErrors;
