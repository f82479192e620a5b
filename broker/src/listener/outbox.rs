//! The outgoing buffer of one stream, bounded in bytes: a client that does not read stops only itself. What lies in it holds
//! its share of the broker's budget until the transport takes it.
//!
//! The stream's task puts replies in while the outbox is open; tonic takes them out as fast as the connection allows, and
//! packs those that wait together into one frame of the transport. A reply put in while it is full is still taken: the
//! task must look at [`Outbox::is_open`] before it does anything that makes more replies.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use futures::Stream;
use geminga_proto::reason::Reason;
use geminga_runtime::budget::Permit;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tonic::Status;

use super::Traffic;
use crate::errors::Refusal;

/// What a reply costs beside its payload.
const REPLY_BYTES: usize = 64;

/// The task's end.
#[derive(Debug)]
pub struct Outbox<T>(Arc<Shared<T>>);

/// The transport's end.
#[derive(Debug)]
pub struct OutboxStream<T>(Arc<Shared<T>>);

#[derive(Debug)]
struct Shared<T> {
    bytes_max: usize,
    state: Mutex<State<T>>,
    changed: Notify,
    /// The last reply was taken out, or the client left.
    drained: Notify,
}

#[derive(Debug)]
struct State<T> {
    replies: VecDeque<Waiting<T>>,
    bytes: usize,
    traffic: Traffic,
    end: Option<Result<(), Status>>,
    /// The transport has the last word.
    ended: bool,
    /// Told of the same as `changed`, beside it: a task with many outboxes waits for one thing.
    told: Option<Arc<Notify>>,
    gone: bool,
    waker: Option<Waker>,
}

#[derive(Debug)]
struct Waiting<T> {
    reply: T,
    bytes: usize,
    _held: Option<Arc<Permit>>,
}

impl<T> State<T> {
    fn tell(&self) {
        if let Some(told) = &self.told {
            told.notify_one();
        }
    }
}

/// Both ends of a buffer that is full at `bytes_max`.
#[must_use]
pub fn outbox<T>(bytes_max: usize) -> (Outbox<T>, OutboxStream<T>) {
    let state = State {
        replies: VecDeque::new(),
        bytes: 0,
        traffic: Traffic::default(),
        end: None,
        ended: false,
        told: None,
        gone: false,
        waker: None,
    };
    let state = Mutex::new(state);
    let shared =
        Arc::new(Shared { bytes_max, state, changed: Notify::new(), drained: Notify::new() });
    (Outbox(Arc::clone(&shared)), OutboxStream(shared))
}

impl<T> Outbox<T> {
    /// Puts a reply in, with the bytes of its payload.
    pub fn push(&self, reply: T, payload_bytes: usize) {
        self.push_holding(reply, payload_bytes, None);
    }

    /// As [`Self::push`]; `held` is given back once the transport has taken the reply, or the client has left.
    pub fn push_holding(&self, reply: T, payload_bytes: usize, held: Option<Arc<Permit>>) {
        let mut state = self.0.state.lock();
        if state.gone {
            return;
        }
        let bytes = payload_bytes + REPLY_BYTES;
        state.bytes += bytes;
        state.traffic.pushed += 1;
        state.replies.push_back(Waiting { reply, bytes, _held: held });
        if let Some(waker) = state.waker.take() {
            drop(state);
            waker.wake();
        }
    }

    /// Whether it takes more.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.0.state.lock().bytes < self.0.bytes_max
    }

    /// Whether the client is gone.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.0.state.lock().gone
    }

    /// Whether the client was there to the end: the transport took the last word before it left.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.0.state.lock().ended
    }

    /// Replies put in, and taken by the transport.
    pub(crate) fn traffic(&self) -> Traffic {
        self.0.state.lock().traffic
    }

    /// From now on `told` is notified as well, whenever [`Self::changed`] would resolve.
    pub fn tell(&self, told: Arc<Notify>) {
        let gone = {
            let mut state = self.0.state.lock();
            state.told = Some(Arc::clone(&told));
            state.gone
        };
        if gone {
            told.notify_one();
        }
    }

    /// Resolves when the buffer opened again or the client left since the last call; look again then. Cancel-safe.
    pub async fn changed(&self) {
        self.0.changed.notified().await;
    }

    /// Resolves when nothing is in the buffer, or the client has left. Cancel-safe.
    pub fn drained(&self) -> impl Future<Output = ()> + Send + 'static
    where
        T: Send + 'static,
    {
        let shared = Arc::clone(&self.0);
        async move {
            loop {
                let mut drained = std::pin::pin!(shared.drained.notified());
                drained.as_mut().enable();
                if shared.state.lock().replies.is_empty() {
                    return;
                }
                drained.await;
            }
        }
    }

    /// The last word: after what is in the buffer the stream ends, well or with this refusal.
    pub fn finish(self, end: Result<(), Refusal>) {
        self.set_end(end.map_err(Status::from));
    }

    /// As [`Self::finish`], well; whether the client heard it is seen by [`Self::has_ended`] or [`Self::is_gone`], of which
    /// [`Self::changed`] tells.
    pub fn close(&self) {
        self.set_end(Ok(()));
    }

    fn set_end(&self, end: Result<(), Status>) {
        let mut state = self.0.state.lock();
        state.end.get_or_insert(end);
        if let Some(waker) = state.waker.take() {
            drop(state);
            waker.wake();
        }
    }
}

impl<T> Drop for Outbox<T> {
    /// A task that ended without a last word panicked, or was aborted: never a good end.
    fn drop(&mut self) {
        if self.0.state.lock().end.is_none() {
            self.set_end(Err(
                Refusal::new(Reason::Internal, "the stream's task ended early").into()
            ));
        }
    }
}

impl<T> Stream for OutboxStream<T> {
    type Item = Result<T, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut state = self.0.state.lock();
        if let Some(Waiting { reply, bytes, _held }) = state.replies.pop_front() {
            let was_full = state.bytes >= self.0.bytes_max;
            state.bytes -= bytes;
            state.traffic.taken += 1;
            if was_full && state.bytes < self.0.bytes_max {
                self.0.changed.notify_one();
                state.tell();
            }
            if state.replies.is_empty() {
                self.0.drained.notify_waiters();
            }
            return Poll::Ready(Some(Ok(reply)));
        }
        match &state.end {
            Some(Ok(())) => {
                state.ended = true;
                self.0.changed.notify_one();
                state.tell();
                Poll::Ready(None)
            }
            Some(Err(status)) => {
                let status = status.clone();
                state.end = Some(Ok(()));
                Poll::Ready(Some(Err(status)))
            }
            None => {
                state.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl<T> Drop for OutboxStream<T> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.gone = true;
        state.replies.clear();
        state.bytes = 0;
        self.0.changed.notify_one();
        state.tell();
        self.0.drained.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_closes_when_full_and_opens_when_read() {
        let (outbox, mut stream) = outbox(1_000);
        outbox.push(1, 900);
        assert!(outbox.is_open());
        outbox.push(2, 900);
        assert!(!outbox.is_open());
        assert_eq!(stream.next().await.expect("some").expect("reply"), 1);
        outbox.changed().await;
        assert!(outbox.is_open());
        outbox.finish(Ok(()));
        assert_eq!(stream.next().await.expect("some").expect("reply"), 2);
        assert!(stream.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_vanishes_ends_the_stream_with_an_error() {
        let (outbox, mut stream) = outbox::<u8>(10);
        drop(outbox);
        assert_eq!(
            stream.next().await.expect("some").expect_err("error").code(),
            tonic::Code::Internal
        );
        assert!(stream.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_in_it_holds_its_budget_and_emptiness_can_be_waited_for() {
        let budget = geminga_runtime::budget::ByteBudget::new(100);
        let (outbox, mut stream) = outbox(1_000);
        outbox.push_holding(1, 60, budget.try_acquire(60).map(Arc::new));
        outbox.push(2, 0);
        let mut drained = Box::pin(outbox.drained());
        assert!(futures::poll!(&mut drained).is_pending());
        assert_eq!(budget.in_use(), 60);
        stream.next().await.expect("some").expect("reply");
        assert_eq!(budget.in_use(), 0, "given back when the reply is taken");
        assert!(futures::poll!(&mut drained).is_pending(), "one reply is left");
        stream.next().await.expect("some").expect("reply");
        drained.await;
        outbox.push_holding(3, 60, budget.try_acquire(60).map(Arc::new));
        drop(stream);
        assert_eq!(budget.in_use(), 0, "and when the client leaves");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_hears_the_last_word_is_told_from_one_that_leaves_before() {
        for hears in [true, false] {
            let (outbox, mut stream) = outbox::<u8>(10);
            outbox.close();
            assert!(!outbox.has_ended());
            if hears {
                assert!(stream.next().await.is_none());
            }
            drop(stream);
            outbox.changed().await;
            assert!(outbox.is_gone());
            assert_eq!(outbox.has_ended(), hears);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_leaves_is_noticed_and_holds_no_memory() {
        let (outbox, stream) = outbox(10);
        outbox.push(vec![0u8; 100], 100);
        drop(stream);
        outbox.changed().await;
        assert!(outbox.is_gone() && outbox.is_open());
    }
}
