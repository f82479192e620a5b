//! What the application's side and the task of one segment share: what was delivered and not handed out, and what was
//! asked of it.

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    task::{Context, Poll, Waker},
    time::Duration,
};

use geminga_proto::v1::SubscriptionSettings;
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, oneshot},
    time::Instant,
};

use super::{
    asked::{Ask, Request},
    segment_stream::Inbound,
};
use crate::error::Error;

/// Time from a wish to its confirmation, after which it fails as indeterminate.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Bits of [`Desk::seen`] that count messages; the others are the stream's number.
const COUNT_BITS: u32 = 40;

/// The shared state of one segment. The lock is held for a few instructions, never over an await, and taken per delivery,
/// not per message.
#[derive(Debug, Default)]
pub(super) struct Desk {
    state: Mutex<State>,
    /// The stream that deliveries count for, and how many of its messages the application has seen: in one word, so that
    /// what is claimed when a stream is left is exactly what was handed out.
    seen: AtomicU64,
    /// Whether `revoked` names anything; written under the lock.
    any_revoked: AtomicBool,
    /// This consumer gets the segment's messages.
    active: AtomicBool,
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
    /// Revoked before they were handed out; bounded by the credit.
    revoked: Vec<Revoked>,
    /// Of the subscription, as the last open was answered.
    settings: SubscriptionSettings,
    /// Of a compacted reader, as the last open was answered.
    compacted_to: u64,
    /// The application wants to know how far the server has read.
    asks_reached: bool,
    told_reached: Option<Told>,
    closing: bool,
    ended: bool,
}

#[derive(Debug)]
struct Revoked {
    first: u64,
    last: u64,
    /// Deliveries with a higher key are other ones.
    key_max: u64,
    /// Of no use once the application has seen so many messages.
    until: u64,
}

/// How far the server had read when it had delivered so many messages of the present stream.
#[derive(Clone, Copy, Debug)]
struct Told {
    delivered: u64,
    next_offset: Option<u64>,
}

/// How far a reader has come: everything below was handed out, or is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reached {
    /// Not answered yet, or not everything that came before the answer is handed out.
    Unknown,
    /// The server does not say it.
    NotTold,
    /// All below this offset.
    Upto(u64),
}

/// What the task finds when it looks.
pub(super) struct Seen {
    /// Handed out on the present stream, in total.
    pub(super) taken_messages: u64,
    pub(super) taken_bytes: u64,
    pub(super) requests: Vec<Request>,
    pub(super) closing: bool,
    /// The server is to be asked how far it has read.
    pub(super) asks_reached: bool,
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
            asks_reached: std::mem::take(&mut state.asks_reached),
        }
    }

    /// The stream is left: what it delivered and the application has not seen is dropped, and comes again. Returns how
    /// many of its messages the application has seen.
    pub(super) fn cut(&self, next_stream: u64) -> u64 {
        let mut state = self.state.lock();
        let before = self.seen.swap(next_stream << COUNT_BITS, Ordering::AcqRel);
        state.queue.clear();
        state.revoked.clear();
        state.taken_messages = 0;
        state.taken_bytes = 0;
        state.told_reached = None;
        self.any_revoked.store(false, Ordering::Release);
        self.active.store(false, Ordering::Release);
        before & ((1 << COUNT_BITS) - 1)
    }

    /// How many messages of the present stream the application has seen.
    pub(super) fn seen(&self) -> u64 {
        self.seen.load(Ordering::Acquire) & ((1 << COUNT_BITS) - 1)
    }

    /// A delivery of the present stream, for the application.
    pub(super) fn deliver(&self, inbound: Inbound) {
        let mut state = self.state.lock();
        state.queue.push_back(inbound);
        wake(state.waker.take());
    }

    /// Of what was delivered so far, this is not to be handed out; `delivered` messages came on this stream.
    pub(super) fn revoke(&self, ranges: &[(u64, u64)], key_max: u64, delivered: u64) {
        let seen = self.seen();
        let mut state = self.state.lock();
        state.revoked.retain(|revoked| revoked.until > seen);
        if seen < delivered {
            state.revoked.extend(ranges.iter().map(|(first, last)| Revoked {
                first: *first,
                last: *last,
                key_max,
                until: delivered,
            }));
        }
        self.any_revoked.store(!state.revoked.is_empty(), Ordering::Release);
    }

    pub(super) fn set_settings(&self, settings: SubscriptionSettings) {
        self.state.lock().settings = settings;
    }

    /// Of the subscription.
    pub(super) fn settings(&self) -> SubscriptionSettings {
        self.state.lock().settings.clone()
    }

    pub(super) fn set_compacted_to(&self, offset: u64) {
        self.state.lock().compacted_to = offset;
    }

    /// Of a compacted reader: messages below it came from the compacted view.
    pub(super) fn compacted_to(&self) -> u64 {
        self.state.lock().compacted_to
    }

    /// Asks the server how far it has read; [`Self::reached`] tells once it is answered. Asked again after a break.
    pub(super) fn ask_reached(&self) {
        self.state.lock().asks_reached = true;
        self.wake.notify_one();
    }

    /// The server had read so far when it had delivered so much.
    pub(super) fn set_reached(&self, delivered: u64, next_offset: Option<u64>) {
        let mut state = self.state.lock();
        state.told_reached = Some(Told { delivered, next_offset });
        wake(state.waker.take());
    }

    /// How far the reader has come, as far as it was answered.
    pub(super) fn reached(&self) -> Reached {
        let seen = self.seen();
        match self.state.lock().told_reached {
            Some(told) if seen >= told.delivered => {
                told.next_offset.map_or(Reached::NotTold, Reached::Upto)
            }
            _ => Reached::Unknown,
        }
    }

    pub(super) fn set_active(&self, active: bool) {
        self.active.store(active, Ordering::Release);
    }

    /// Whether this consumer gets the segment's messages.
    pub(super) fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }

    /// No retry helps: the application hears of it behind what was delivered.
    pub(super) fn fail(&self, error: Error) {
        self.state.lock().failure = Some(error); // the task ends, and wakes the application then
    }

    /// The task ends: later wishes fail, pending ones are returned.
    pub(super) fn end(&self) -> Vec<Request> {
        let mut state = self.state.lock();
        state.ended = true;
        self.active.store(false, Ordering::Release);
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

    /// The application sees the next message of this stream: from here on it is claimed after a break. False if the
    /// stream was left, and the message is not ours to hand out.
    pub(super) fn see(&self, stream: u64) -> bool {
        let mut before = self.seen.load(Ordering::Acquire);
        while before >> COUNT_BITS == stream {
            let seen = self.seen.compare_exchange_weak(
                before,
                before + 1,
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            match seen {
                Ok(_) => return true,
                Err(now) => before = now,
            }
        }
        false
    }

    /// Whether this message, about to be handed out, was revoked meanwhile.
    pub(super) fn is_revoked(&self, offset: u64, key: u64) -> bool {
        if !self.any_revoked.load(Ordering::Acquire) {
            return false;
        }
        let state = self.state.lock();
        let names = |revoked: &Revoked| {
            (revoked.first..=revoked.last).contains(&offset) && key <= revoked.key_max
        };
        state.revoked.iter().any(names)
    }

    /// A delivery was handed out: its credit can be granted again.
    pub(super) fn taken(&self, stream: u64, messages: u64, bytes: u64) {
        let mut state = self.state.lock();
        if self.seen.load(Ordering::Acquire) >> COUNT_BITS == stream {
            state.taken_messages += messages;
            state.taken_bytes += bytes;
            drop(state);
            self.wake.notify_one();
        }
    }

    /// Asks something of a message that was handed out under `key`, at once.
    pub(super) fn ask(&self, offset: u64, key: u64, ask: Ask) -> Settling {
        let (waiter, answer) = oneshot::channel();
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        let mut state = self.state.lock();
        if state.ended {
            let _ = waiter.send(Err(Error::Closed)); // the answer is held below
            return Settling(answer);
        }
        state.requests.push(Request { offset, key, ask, deadline, waiter });
        drop(state);
        self.wake.notify_one();
        Settling(answer)
    }

    /// No more messages are wanted; pending settles are answered first.
    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        state.closing = true;
        state.queue.clear();
        drop(state);
        self.wake.notify_one();
    }
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// The confirmation of a settle, to come: it is durable. Dropping it abandons the answer, not the settle.
#[derive(Debug)]
#[must_use = "a settle is durable only once it is confirmed; drop it to not wait"]
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
            key: 1,
            delivery: Delivery::default(),
            offsets: vec![(0, 0)],
            messages: 1,
            bytes: 10,
        }
    }

    #[test]
    fn what_a_stream_left_behind_holds_no_memory_when_the_next_one_begins() {
        let desk = Desk::default();
        desk.cut(1);
        desk.deliver(inbound(1));
        desk.cut(2);
        assert!(desk.poll_delivery(&Context::from_waker(Waker::noop())).is_pending());
        desk.deliver(inbound(2));
        assert!(desk.poll_delivery(&Context::from_waker(Waker::noop())).is_ready());
    }

    #[test]
    fn what_was_seen_is_counted_until_the_stream_is_left_and_nothing_is_seen_behind_that() {
        let desk = Desk::default();
        desk.cut(1);
        assert!(desk.see(1) && desk.see(1));
        assert_eq!(desk.cut(2), 2);
        assert!(!desk.see(1), "it comes again");
        assert!(desk.see(2));
        assert_eq!(desk.seen(), 1);
    }

    #[test]
    fn a_revoked_message_is_passed_by_and_its_next_delivery_is_not() {
        let desk = Desk::default();
        desk.cut(1);
        desk.revoke(&[(5, 9)], 3, 10);
        assert!(desk.is_revoked(5, 3) && desk.is_revoked(9, 1));
        assert!(!desk.is_revoked(4, 3) && !desk.is_revoked(5, 4));
        for _ in 0..10 {
            desk.see(1);
        }
        desk.revoke(&[(5, 9)], 3, 10);
        assert!(!desk.is_revoked(5, 3), "everything before was seen");
    }
}
