//! What the application's side and the task of one segment share: what was delivered and not handed out, and what was
//! accepted.

use std::{
    collections::{BTreeSet, VecDeque},
    future::Future,
    pin::Pin,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    task::{Context, Poll, Waker},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, oneshot},
    time::Instant,
};

use super::{segment_stream::Inbound, settles::Request};
use crate::error::Error;

/// Time from an accept to its confirmation, after which it fails as indeterminate.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(60);

/// The shared state of one segment. The lock is held for a few instructions, never over an await, and taken per delivery,
/// not per message.
#[derive(Debug, Default)]
pub(super) struct Desk {
    state: Mutex<State>,
    /// The stream that deliveries count for, from 1; written under the lock.
    stream: AtomicU64,
    /// Whether `late` names anything; written under the lock.
    any_late: AtomicBool,
    wake: Notify,
    over: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Deliveries of the present stream, bounded by its credit.
    queue: VecDeque<Inbound>,
    /// The application waits for a delivery.
    waker: Option<Waker>,
    /// Told to the application behind the queue, once.
    failure: Option<Error>,
    taken_messages: u64,
    taken_bytes: u64,
    /// Bounded by what was handed out: the server stops at its limit of unsettled messages.
    requests: Vec<Request>,
    late: Late,
    closing: bool,
    ended: bool,
}

/// What was handed out on an earlier stream and accepted only after the present one began. The present one may have
/// delivered it again already: it is not handed out.
#[derive(Debug, Default)]
struct Late {
    singles: BTreeSet<u64>,
    /// Everything below.
    below: u64,
}

/// What the task finds when it looks.
pub(super) struct Seen {
    /// Handed out on the present stream, in total.
    pub(super) taken_messages: u64,
    pub(super) taken_bytes: u64,
    pub(super) requests: Vec<Request>,
    pub(super) closing: bool,
}

impl Desk {
    /// The task's side: something changed since the last look. Cancel-safe.
    pub(super) async fn changed(&self) {
        self.wake.notified().await;
    }

    pub(super) fn look(&self) -> Seen {
        let mut state = self.state.lock();
        Seen {
            taken_messages: state.taken_messages,
            taken_bytes: state.taken_bytes,
            requests: std::mem::take(&mut state.requests),
            closing: state.closing,
        }
    }

    /// A new stream: what was delivered before and not handed out will come again.
    pub(super) fn begin(&self, stream: u64) {
        let mut state = self.state.lock();
        state.queue.clear();
        state.late = Late::default();
        state.taken_messages = 0;
        state.taken_bytes = 0;
        self.any_late.store(false, Ordering::Release);
        self.stream.store(stream, Ordering::Release);
    }

    /// A delivery of the present stream, for the application.
    pub(super) fn deliver(&self, inbound: Inbound) {
        let mut state = self.state.lock();
        state.queue.push_back(inbound);
        wake(state.waker.take());
    }

    /// No retry helps: the application hears of it behind what was delivered.
    pub(super) fn fail(&self, error: Error) {
        self.state.lock().failure = Some(error); // the task ends, and wakes the application then
    }

    /// The task ends: later accepts fail, pending ones are returned.
    pub(super) fn end(&self) -> Vec<Request> {
        let mut state = self.state.lock();
        state.ended = true;
        self.over.notify_waiters();
        wake(state.waker.take());
        std::mem::take(&mut state.requests)
    }

    /// Resolves when the task has ended. Cancel-safe.
    pub(super) async fn ended(&self) {
        let over = self.over.notified();
        tokio::pin!(over);
        over.as_mut().enable();
        if !self.state.lock().ended {
            over.await;
        }
    }

    /// The application's side: the next delivery, or why none comes any more.
    pub(super) fn poll_delivery(
        &self,
        context: &Context<'_>,
    ) -> Poll<Option<Result<Inbound, Error>>> {
        let mut state = self.state.lock();
        if let Some(inbound) = state.queue.pop_front() {
            return Poll::Ready(Some(Ok(inbound)));
        }
        if state.ended {
            return Poll::Ready(state.failure.take().map(Err));
        }
        match &mut state.waker {
            Some(waker) => waker.clone_from(context.waker()),
            none => *none = Some(context.waker().clone()),
        }
        Poll::Pending
    }

    /// Whether this stream's deliveries may still be handed out.
    pub(super) fn is_current(&self, stream: u64) -> bool {
        self.stream.load(Ordering::Acquire) == stream
    }

    /// Whether this message, about to be handed out, was accepted meanwhile.
    pub(super) fn is_late(&self, offset: u64) -> bool {
        if !self.any_late.load(Ordering::Acquire) {
            return false;
        }
        let mut state = self.state.lock();
        let late = &mut state.late;
        // Messages are handed out in order: what lies before this one is of no more use.
        late.singles = late.singles.split_off(&offset);
        let found = offset < late.below || late.singles.contains(&offset);
        self.any_late.store(late.below > offset || !late.singles.is_empty(), Ordering::Release);
        found
    }

    /// A delivery was handed out: its credit can be granted again.
    pub(super) fn taken(&self, stream: u64, messages: u64, bytes: u64) {
        let mut state = self.state.lock();
        if self.is_current(stream) {
            state.taken_messages += messages;
            state.taken_bytes += bytes;
            drop(state);
            self.wake.notify_one();
        }
    }

    /// Asks for an accept of a message that was handed out on `stream`, at once.
    pub(super) fn accept(&self, offset: u64, up_to: bool, stream: u64) -> Settling {
        let (waiter, answer) = oneshot::channel();
        let deadline = Instant::now() + ACCEPT_TIMEOUT;
        let mut state = self.state.lock();
        if state.ended {
            let _ = waiter.send(Err(Error::Closed)); // the answer is held below
            return Settling(answer);
        }
        if !self.is_current(stream) {
            if up_to {
                state.late.below = state.late.below.max(offset.saturating_add(1));
            } else {
                state.late.singles.insert(offset);
            }
            self.any_late.store(true, Ordering::Release);
        }
        state.requests.push(Request { offset, up_to, deadline, waiter });
        drop(state);
        self.wake.notify_one();
        Settling(answer)
    }

    /// No more messages are wanted; pending accepts are, and may need what is delivered behind what waits here.
    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        state.closing = true;
        for inbound in std::mem::take(&mut state.queue) {
            state.taken_messages += inbound.messages;
            state.taken_bytes += inbound.bytes;
        }
        drop(state);
        self.wake.notify_one();
    }
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// The confirmation of an accept, to come: it is durable. Dropping it abandons the answer, not the accept.
#[derive(Debug)]
#[must_use = "an accept is durable only once it is confirmed; drop it to not wait"]
pub struct Settling(oneshot::Receiver<Result<(), Error>>);

impl Settling {
    pub(super) fn failed(error: Error) -> Self {
        let (waiter, answer) = oneshot::channel();
        let _ = waiter.send(Err(error)); // the answer is held below
        Self(answer)
    }
}

impl Future for Settling {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map(|answer| {
            answer.unwrap_or_else(|_| Err(Error::Indeterminate("the consumer was dropped".into())))
        })
    }
}

#[cfg(test)]
mod tests {
    use geminga_proto::v1::Delivery;

    use super::*;

    fn inbound(stream: u64) -> Inbound {
        Inbound {
            stream,
            delivery: Delivery::default(),
            offsets: vec![(0, 0)],
            messages: 1,
            bytes: 10,
        }
    }

    #[test]
    fn what_a_stream_left_behind_holds_no_memory_when_the_next_one_begins() {
        let desk = Desk::default();
        desk.begin(1);
        desk.deliver(inbound(1));
        desk.begin(2);
        assert!(desk.poll_delivery(&Context::from_waker(Waker::noop())).is_pending());
        desk.deliver(inbound(2));
        assert!(desk.poll_delivery(&Context::from_waker(Waker::noop())).is_ready());
    }
}
