//! Single calls beside the streams: pull once, peek, seek, explain. The server that is asked forwards them, or names the
//! owner, who is asked next; a refusal that may be repeated is, until the client's open timeout is over.

use std::{future::Future, sync::Arc, time::Duration};

use bytes::Bytes;
use geminga_proto::{
    names::{ConsumerName, SubscriptionName, TopicName},
    reason::{Reason, Retry},
    v1::{
        self, Accept, Delivery, ExplainRequest, Extend, OffsetRange, PeekRequest, PullRequest,
        Reject, Release, SeekRequest, Settle, SettleRequest, settle::Verb,
        subscriber_client::SubscriberClient,
    },
};
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Request, Response, Status, transport::Channel};

use crate::{
    backoff::Backoff,
    builder::Parts,
    consumer::{Batch, Position, ranges_of},
    error::Error,
    message::{Stored, topic_name},
};

/// Longest reason of a reject, bytes.
const REASON_BYTES_MAX: usize = 256;
/// Longest that a pull waits at the server.
const PULL_WAIT_MAX: Duration = Duration::from_secs(30);

/// Makes one call of the subscriber service until it is answered for good.
///
/// Not for calls that must not happen twice: a call of unknown outcome is made again.
async fn call<T, F>(
    parts: &Parts,
    patience: Duration,
    make: impl Fn(SubscriberClient<Channel>, Duration) -> F,
) -> Result<T, Error>
where
    F: Future<Output = Result<Response<T>, Status>>,
{
    let deadline = Instant::now() + patience;
    let mut backoff = Backoff::new(parts.random.clone());
    let mut owner: Option<String> = None;
    loop {
        let client = parts.connections.subscriber_call(owner.as_deref());
        let left = deadline.saturating_duration_since(Instant::now());
        let error = match timeout_at(deadline, make(client, left)).await {
            Ok(Ok(answer)) => return Ok(answer.into_inner()),
            Ok(Err(status)) => Error::from(status),
            Err(_) => return Err(Error::Unavailable("the server did not answer in time".into())),
        };
        owner = error.owner().map(ToOwned::to_owned);
        let pause = backoff.pause(error.retry_after());
        if error.retry() == Retry::Never || Instant::now() + pause >= deadline {
            return Err(error);
        }
        sleep(pause).await;
    }
}

fn timed<T>(message: T, limit: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(limit);
    request
}

/// Where a subscription stands on a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The segment.
    pub segment: u32,
    /// The first offset that is not settled.
    pub mark_delete_next: u64,
}

/// What a peek found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peeked {
    /// In the order of their offsets.
    pub messages: Vec<Stored>,
    /// The oldest offset kept.
    pub first_offset: u64,
    /// The offset that the next message will have.
    pub next_offset: u64,
}

pub(crate) async fn peek(
    parts: &Parts,
    topic: &str,
    segment: u32,
    from: Position,
    messages_max: u32,
) -> Result<Peeked, Error> {
    let request = PeekRequest {
        topic: topic_name(topic)?.to_string(),
        segment,
        from: Some(from.on_the_wire()),
        messages_max,
    };
    let answer = call(parts, parts.open_timeout, |mut client, limit| {
        let request = timed(request.clone(), limit);
        async move { client.peek(request).await }
    })
    .await?;
    let mut messages = Vec::new();
    for delivery in answer.deliveries {
        messages.extend(decode(delivery, segment)?);
    }
    let (first_offset, next_offset) = (answer.first_offset, answer.next_offset);
    Ok(Peeked { messages, first_offset, next_offset })
}

fn decode(delivery: Delivery, segment: u32) -> Result<Vec<Stored>, Error> {
    let ranges = ranges_of(&delivery).ok_or_else(|| {
        Error::Damaged("a delivery names offsets outside its batch, or none".into())
    })?;
    let mut batch = Batch::open(delivery, ranges)?;
    let mut messages = Vec::new();
    while let Some(stored) = batch.next(segment)? {
        messages.push(stored);
    }
    Ok(messages)
}

pub(crate) async fn seek(
    parts: &Parts,
    topic: &str,
    subscription: &str,
    segment: Option<u32>,
    to: Position,
) -> Result<Vec<Place>, Error> {
    let request = SeekRequest {
        topic: topic_name(topic)?.to_string(),
        segment,
        subscription: SubscriptionName::parse(subscription)?.to_string(),
        to: Some(to.on_the_wire()),
    };
    let answer = call(parts, parts.open_timeout, |mut client, limit| {
        let request = timed(request.clone(), limit);
        async move { client.seek(request).await }
    })
    .await?;
    let place = |place: v1::seek_response::Place| Place {
        segment: place.segment,
        mark_delete_next: place.mark_delete_next,
    };
    Ok(answer.segments.into_iter().map(place).collect())
}

pub(crate) async fn explain(
    parts: &Parts,
    topic: &str,
    subscription: &str,
    segment: Option<u32>,
) -> Result<Vec<v1::SegmentExplained>, Error> {
    let request = ExplainRequest {
        topic: topic_name(topic)?.to_string(),
        subscription: SubscriptionName::parse(subscription)?.to_string(),
        segment,
    };
    let answer = call(parts, parts.open_timeout, |mut client, limit| {
        let request = timed(request.clone(), limit);
        async move { client.explain(request).await }
    })
    .await?;
    Ok(answer.segments)
}

/// A pull: some messages at once, without a stream.
#[derive(Clone, Debug)]
pub struct PullBuilder {
    parts: Parts,
    topic: String,
    subscription: String,
    name: Option<String>,
    segment: Option<u32>,
    messages_max: u32,
    bytes_max: u64,
    wait: Duration,
    lease: Duration,
}

impl PullBuilder {
    pub(crate) fn new(parts: Parts, topic: String, subscription: String) -> Self {
        Self {
            parts,
            topic,
            subscription,
            name: None,
            segment: None,
            messages_max: 0,
            bytes_max: 0,
            wait: Duration::ZERO,
            lease: Duration::ZERO,
        }
    }

    /// A name for the consumer, as `sub explain` shows it; by default a random one.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Only from this segment. Default: the server takes one that has something.
    #[must_use]
    pub fn segment(mut self, segment: u32) -> Self {
        self.segment = Some(segment);
        self
    }

    /// Most messages. Default 100.
    #[must_use]
    pub fn messages_max(mut self, messages: u32) -> Self {
        self.messages_max = messages;
        self
    }

    /// Most bytes; a single batch may exceed it. Default 1 MiB.
    #[must_use]
    pub fn bytes_max(mut self, bytes: u64) -> Self {
        self.bytes_max = bytes;
        self
    }

    /// How long to wait for the first message; at most 30 s. Default not at all.
    #[must_use]
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait.min(PULL_WAIT_MAX);
        self
    }

    /// How long the messages belong to the caller. Default: the subscription's lease.
    #[must_use]
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// Asks once. Empty: there was nothing in time.
    ///
    /// Not cancel-safe: messages of an answer that nobody reads are leased, and come again when their lease is over.
    ///
    /// # Errors
    /// A refusal, or that the server does not answer. What it had leased then comes again when the lease is over.
    pub async fn send(self) -> Result<Vec<Pulled>, Error> {
        let topic = topic_name(&self.topic)?;
        let subscription = SubscriptionName::parse(&self.subscription)?;
        let name = match &self.name {
            Some(name) => ConsumerName::parse(name)?,
            None => ConsumerName::parse(&format!("pull-{:016x}", self.parts.random.u64()))?,
        };
        let request = PullRequest {
            topic: topic.to_string(),
            segment: self.segment,
            subscription: subscription.to_string(),
            consumer_name: name.to_string(),
            messages_max: self.messages_max,
            bytes_max: self.bytes_max,
            wait_ms: self.wait.as_millis() as u64, // at most 30 s
            lease_ms: u64::try_from(self.lease.as_millis()).unwrap_or(u64::MAX),
        };
        let answer = call(&self.parts, self.parts.open_timeout + self.wait, |mut client, limit| {
            let request = timed(request.clone(), limit);
            async move { client.pull(request).await }
        })
        .await?;
        let from =
            Arc::new(Pull { parts: self.parts, topic, subscription, segment: answer.segment });
        let mut pulled = Vec::new();
        for delivery in answer.deliveries {
            let (attempt, handle) = (delivery.attempt.max(1), delivery.handle.clone());
            for message in decode(delivery, answer.segment)? {
                let (handle, from) = (handle.clone(), Arc::clone(&from));
                pulled.push(Pulled { message, attempt, handle, from });
            }
        }
        Ok(pulled)
    }
}

/// Where pulled messages come from, and go back to.
#[derive(Debug)]
struct Pull {
    parts: Parts,
    topic: TopicName,
    subscription: SubscriptionName,
    segment: u32,
}

/// A pulled message. It belongs to the caller until it is settled or its lease is over; nothing extends the lease by
/// itself.
#[derive(Clone, Debug)]
pub struct Pulled {
    /// The message.
    pub message: Stored,
    /// The number of this delivery, from 1.
    pub attempt: u32,
    handle: Bytes,
    from: Arc<Pull>,
}

/// # Errors
/// [`Error::NotHeld`] when the message is not the caller's any more; that the server refused, or did not answer.
impl Pulled {
    /// It is done.
    pub async fn accept(&self) -> Result<(), Error> {
        let (ranges, handle) = self.place();
        self.settle(Verb::Accept(Accept { ranges, handle })).await
    }

    /// It failed: deliver it again, after `delay` or the subscription's backoff. Counts as an attempt.
    pub async fn release(&self, delay: Option<Duration>) -> Result<(), Error> {
        let (ranges, handle) = self.place();
        let delay_ms = delay.map(|delay| u64::try_from(delay.as_millis()).unwrap_or(u64::MAX));
        self.settle(Verb::Release(Release { ranges, handle, delay_ms, counts: true })).await
    }

    /// It will never be done: to the dead-letter topic now.
    pub async fn reject(&self, reason: &str) -> Result<(), Error> {
        if reason.len() > REASON_BYTES_MAX {
            let words = format!(
                "a reason has {} bytes, at most {REASON_BYTES_MAX} are allowed",
                reason.len()
            );
            return Err(Error::refused(Reason::InvalidRequest, words));
        }
        let (ranges, handle) = self.place();
        self.settle(Verb::Reject(Reject { ranges, handle, reason: reason.to_owned() })).await
    }

    /// More time, from now on; zero: the subscription's lease.
    pub async fn extend(&self, time: Duration) -> Result<(), Error> {
        let (ranges, handle) = self.place();
        let lease_ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        self.settle(Verb::Extend(Extend { ranges, handle, lease_ms })).await
    }

    fn place(&self) -> (Vec<OffsetRange>, Bytes) {
        let offset = self.message.id.offset;
        (vec![OffsetRange { first: offset, last: offset }], self.handle.clone())
    }

    async fn settle(&self, verb: Verb) -> Result<(), Error> {
        let Pull { parts, topic, subscription, segment } = &*self.from;
        let request = SettleRequest {
            topic: topic.to_string(),
            segment: *segment,
            subscription: subscription.to_string(),
            settle: Some(Settle { token: 0, verb: Some(verb) }),
        };
        let answer = call(parts, parts.open_timeout, |mut client, limit| {
            let request = timed(request.clone(), limit);
            async move { client.settle(request).await }
        })
        .await;
        match answer {
            Ok(_) => Ok(()),
            Err(error) if error.reason() == Some(Reason::InvalidHandle) => Err(Error::not_held()),
            Err(error) => Err(error),
        }
    }
}
