//! How every stream begins: with one frame, in time (S6).

use std::time::Duration;

use futures::{Stream, StreamExt};
use geminga_proto::reason::Reason;
use tokio::time::timeout;
use tonic::Status;

use crate::errors::{Refusal, unreadable};

/// The first frame of a stream; none if the client left without one.
///
/// # Errors
/// UNEXPECTED_FRAME when none came within `deadline`; what could not be read.
pub(crate) async fn first_frame<F>(
    inbound: &mut (impl Stream<Item = Result<F, Status>> + Unpin),
    deadline: Duration,
) -> Result<Option<F>, Refusal> {
    match timeout(deadline, inbound.next()).await {
        Err(_) => Err(Refusal::new(Reason::UnexpectedFrame, "no open frame came in time")),
        Ok(frame) => frame.transpose().map_err(|status| unreadable(&status)),
    }
}

/// The first frame was another one.
pub(crate) fn not_opened() -> Refusal {
    Refusal::new(Reason::UnexpectedFrame, "the first frame must open the stream")
}
