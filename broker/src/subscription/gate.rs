//! A consumer's frames, taken only while its gate is open: one whose answers are not read, or whose settles pile up, is not
//! listened to, and stops only itself.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use futures::{Stream, StreamExt, stream::BoxStream};
use geminga_proto::v1::ConsumeFrame;
use parking_lot::Mutex;
use tonic::Status;

/// Frames as they come from the transport.
pub(crate) type Frames = BoxStream<'static, Result<ConsumeFrame, Status>>;

/// Opens and closes.
#[derive(Clone, Debug, Default)]
pub(super) struct Gate(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    closed: bool,
    ended: bool,
    waker: Option<Waker>,
}

impl Gate {
    pub(super) fn set(&self, open: bool) {
        let mut state = self.0.lock();
        state.closed = !open;
        if open && let Some(waker) = state.waker.take() {
            drop(state);
            waker.wake();
        }
    }
}

impl Gate {
    /// Nothing more is wanted.
    pub(super) fn end(&self) {
        self.0.lock().ended = true;
        self.set(true);
    }
}

/// The frames of one consumer, each with its instance; none at the end.
pub(super) struct Gated {
    consumer: u64,
    gate: Gate,
    frames: Frames,
    ended: bool,
}

impl Gated {
    pub(super) fn new(consumer: u64, gate: Gate, frames: Frames) -> Self {
        Self { consumer, gate, frames, ended: false }
    }
}

/// One frame of one consumer, or its end.
pub(super) type Framed = (u64, Option<Result<ConsumeFrame, Status>>);

impl Stream for Gated {
    type Item = Framed;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Framed>> {
        if self.ended {
            return Poll::Ready(None);
        }
        {
            let mut state = self.gate.0.lock();
            if state.ended {
                drop(state);
                self.ended = true;
                return Poll::Ready(None);
            }
            if !state.waker.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
                state.waker = Some(context.waker().clone());
            }
            if state.closed {
                return Poll::Pending;
            }
        }
        let next = self.frames.poll_next_unpin(context);
        next.map(|frame| {
            self.ended = !matches!(frame, Some(Ok(_)));
            Some((self.consumer, frame))
        })
    }
}

#[cfg(test)]
mod tests {
    use futures::poll;

    use super::*;

    #[tokio::test]
    async fn nothing_passes_a_closed_gate_and_the_end_is_told_once() {
        let gate = Gate::default();
        let frames = futures::stream::iter([Ok(ConsumeFrame::default())]).boxed();
        let mut gated = Gated::new(7, gate.clone(), frames);
        gate.set(false);
        let mut next = Box::pin(gated.next());
        assert!(poll!(&mut next).is_pending());
        gate.set(true);
        assert!(matches!(next.await, Some((7, Some(Ok(_))))));
        assert!(matches!(gated.next().await, Some((7, None))));
        assert!(gated.next().await.is_none());
    }
}
