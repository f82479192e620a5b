//! A consume stream, frame by frame.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use bytes::Bytes;
use geminga_proto::{
    records::Records,
    v1::{
        Accept, AcceptUpTo, Assigned, Claim, ConsumeFrame, ConsumeOpened, ConsumeReply, Credit,
        Delivery, Extend, Leave, OffsetRange, OpenConsume, Ping, ReadFrom, Reject, Release,
        Revoked, Route, Settle, SettleRefused, consume_frame::Frame, consume_reply::Reply,
        settle::Verb,
    },
};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::client::{Client, in_time, passing, reason};

/// A message of a delivery.
#[derive(Clone, Debug)]
pub(crate) struct Got {
    pub(crate) offset: u64,
    pub(crate) attempt: u32,
    pub(crate) handle: Bytes,
    pub(crate) lease_ms: u64,
    pub(crate) key: Option<Bytes>,
    pub(crate) value: Bytes,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) event_time_ms: Option<u64>,
    pub(crate) publish_time_ms: u64,
    pub(crate) at: Instant,
}

impl Got {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.value).into_owned()
    }
}

/// The messages of a delivery, in order.
pub(crate) fn messages(delivery: &Delivery) -> Vec<Got> {
    let (size, count) = (delivery.uncompressed_size, delivery.count);
    let mut payload = Records::open(delivery.codec(), size, count, delivery.payload.clone())
        .expect("as it was published, or as a view keeps it");
    let mut records = Vec::new();
    while let Some(record) = payload.read().expect("as it was published") {
        records.push(record);
    }
    let offsets = delivery.deliver.iter().flat_map(|range| range.first..=range.last);
    let at = Instant::now();
    offsets
        .map(|offset| {
            let index = usize::try_from(offset - delivery.base_offset).expect("of the batch");
            let record = &records[index];
            Got {
                offset,
                attempt: delivery.attempt,
                handle: delivery.handle.clone(),
                lease_ms: delivery.lease_ms,
                key: record.key.clone(),
                value: record.value.clone(),
                headers: record.headers.clone().into_iter().collect(),
                event_time_ms: record.event_time_ms,
                publish_time_ms: delivery.publish_time_ms,
                at,
            }
        })
        .collect()
}

pub(crate) fn range(offset: u64) -> Vec<OffsetRange> {
    vec![OffsetRange { first: offset, last: offset }]
}

/// An open frame of a consumer of segment 0.
pub(crate) fn open(topic: &str, subscription: &str, consumer: &str) -> OpenConsume {
    OpenConsume {
        topic: topic.to_owned(),
        subscription: subscription.to_owned(),
        consumer_name: consumer.to_owned(),
        ..OpenConsume::default()
    }
}

pub(crate) struct Consumer {
    frames: Option<mpsc::Sender<ConsumeFrame>>,
    replies: Streaming<ConsumeReply>,
    pub(crate) opened: ConsumeOpened,
    pub(crate) inbox: VecDeque<Got>,
    pub(crate) revoked: Vec<Revoked>,
    pub(crate) assigned: Option<Assigned>,
    /// The server asked to leave the stream.
    pub(crate) told_to_go: bool,
    /// Frames of any kind that came over this stream.
    pub(crate) frames_heard: u64,
    /// Messages that came over this stream.
    pub(crate) received: u64,
    granted: (u64, u64),
    token: u64,
    pong: u64,
    answers: Vec<(u64, Result<u64, SettleRefused>)>,
    /// How the stream ended.
    pub(crate) ended: Option<Result<(), Status>>,
}

impl Client {
    /// Opens a stream, with credit for so many messages; tries again while the server asks for it.
    pub(crate) async fn consume(&self, open: OpenConsume, messages: u64) -> Consumer {
        in_time("a consume stream opens", async {
            loop {
                match self.try_consume(open.clone()).await {
                    Ok(mut consumer) => {
                        consumer.grant(messages).await;
                        return consumer;
                    }
                    Err(status) if passing(&status) => {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                    Err(status) => panic!("not opened: {status:?}"),
                }
            }
        })
        .await
    }

    /// Opens a stream without credit, or says why not.
    pub(crate) async fn try_consume(&self, mut open: OpenConsume) -> Result<Consumer, Status> {
        if open.route() == Route::Unspecified {
            open.route = Route::Relay.into(); // whoever owns the segment, this connection will do
        }
        let (frames, outbound) = mpsc::channel(64);
        let first = ConsumeFrame { frame: Some(Frame::Open(open)) };
        frames.send(first).await.expect("there is room");
        let outbound = ReceiverStream::new(outbound);
        let mut replies =
            in_time("headers", self.subscriber().consume(outbound)).await?.into_inner();
        let first = in_time("the open frame is answered", replies.message()).await?;
        let Some(Reply::Opened(opened)) = first.and_then(|reply| reply.reply) else {
            return Err(Status::unavailable("the stream ended before it was opened"));
        };
        Ok(Consumer {
            frames: Some(frames),
            replies,
            opened,
            inbox: VecDeque::new(),
            revoked: Vec::new(),
            assigned: None,
            told_to_go: false,
            frames_heard: 0,
            received: 0,
            granted: (0, 0),
            token: 0,
            pong: 0,
            answers: Vec::new(),
            ended: None,
        })
    }
}

impl Consumer {
    async fn send(&mut self, frame: Frame) {
        if let Some(frames) = &self.frames {
            // A stream that has ended says so where it is read.
            let _ = frames.send(ConsumeFrame { frame: Some(frame) }).await;
        }
    }

    /// Credit for so many messages more, and all bytes they may have.
    pub(crate) async fn grant(&mut self, messages: u64) {
        self.granted = (self.granted.0 + messages, 1 << 40);
        let (messages, bytes) = self.granted;
        self.send(Frame::Credit(Credit { messages, bytes })).await;
    }

    /// Credit for so many messages beyond those that it has dealt with or lost.
    pub(crate) async fn has_credit(&mut self, messages: u64) {
        let total = self.received - self.inbox.len() as u64 + messages;
        if total > self.granted.0 {
            self.grant_totals(total, 1 << 40).await;
        }
    }

    /// Credit in messages and bytes, as totals.
    pub(crate) async fn grant_totals(&mut self, messages: u64, bytes: u64) {
        self.granted = (messages, bytes);
        self.send(Frame::Credit(Credit { messages, bytes })).await;
    }

    /// Takes one frame in.
    async fn turn(&mut self) {
        if self.ended.is_some() {
            std::future::pending().await
        }
        let next = self.replies.message().await;
        self.frames_heard += 1;
        match next {
            Ok(Some(reply)) => match reply.reply.expect("a known kind of reply") {
                Reply::Delivery(delivery) => {
                    let messages = messages(&delivery);
                    self.received += messages.len() as u64;
                    self.inbox.extend(messages);
                }
                Reply::Settled(settled) => {
                    self.answers.push((settled.token, Ok(settled.mark_delete_next)));
                }
                Reply::SettleRefused(refused) => self.answers.push((refused.token, Err(refused))),
                Reply::Assigned(assigned) => self.assigned = Some(assigned),
                Reply::Revoked(revoked) => {
                    for range in &revoked.ranges {
                        self.inbox.retain(|got| {
                            got.handle != revoked.handle
                                || got.offset < range.first
                                || got.offset > range.last
                        });
                    }
                    self.revoked.push(revoked);
                }
                Reply::Pong(pong) => self.pong = self.pong.max(pong.token),
                Reply::GoAway(_) => self.told_to_go = true,
                Reply::ReaderAt(_) => {}
                Reply::Opened(_) => panic!("opened twice"),
            },
            Ok(None) => self.ended = Some(Ok(())),
            Err(status) => self.ended = Some(Err(status)),
        }
    }

    /// Takes frames in until it holds.
    pub(crate) async fn until(&mut self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        in_time(what, async {
            while !holds(self) {
                assert!(self.ended.is_none(), "{what}, but the stream ended: {:?}", self.ended);
                self.turn().await;
            }
        })
        .await;
    }

    /// The next message; none if the stream ended, whatever for.
    pub(crate) async fn next_or_end(&mut self) -> Option<Got> {
        in_time("a message comes, or the stream ends", async {
            while self.inbox.is_empty() && self.ended.is_none() {
                self.turn().await;
            }
            self.inbox.pop_front()
        })
        .await
    }

    /// The next message.
    pub(crate) async fn next(&mut self) -> Got {
        self.until("a message comes", |consumer| !consumer.inbox.is_empty()).await;
        self.inbox.pop_front().expect("there is one")
    }

    pub(crate) async fn take(&mut self, messages: usize) -> Vec<Got> {
        let what = format!("{messages} messages come");
        self.until(&what, |consumer| consumer.inbox.len() >= messages).await;
        self.inbox.drain(..messages).collect()
    }

    /// Messages that come within a time.
    pub(crate) async fn within(&mut self, time: Duration) -> Vec<Got> {
        let _ = tokio::time::timeout(time, async {
            loop {
                self.turn().await;
            }
        })
        .await;
        self.inbox.drain(..).collect()
    }

    /// Everything that the server sent up to now has come when this returns: frames are answered in order.
    pub(crate) async fn in_step(&mut self) {
        self.token += 1;
        let token = self.token;
        self.send(Frame::Ping(Ping { token })).await;
        self.until("a ping is answered", |consumer| consumer.pong >= token).await;
    }

    /// Nothing is delivered for a while, though the server had turns to do it.
    pub(crate) async fn gets_nothing(&mut self, why: &str) {
        for _ in 0..3 {
            self.in_step().await;
            let got = self.within(Duration::from_millis(60)).await;
            assert!(got.is_empty(), "{why}: got {:?}", got.first());
        }
    }

    /// How the stream ends.
    pub(crate) async fn end(&mut self) -> Result<(), Status> {
        in_time("the stream ends", async {
            while self.ended.is_none() {
                self.turn().await;
            }
        })
        .await;
        self.ended.clone().expect("it ended")
    }

    /// Says that it goes for good; the stream stays as it is.
    pub(crate) async fn say_leave(&mut self) {
        self.send(Frame::Leave(Leave {})).await;
    }

    /// Closes its side and waits for the server's: a clean end.
    pub(crate) async fn leave(mut self) {
        self.frames = None;
        let end = self.end().await;
        assert!(end.is_ok(), "a clean end: {end:?}");
    }

    /// Asks for a settle; the answer comes with [`Self::answer`].
    pub(crate) async fn ask(&mut self, verb: Verb) -> u64 {
        self.token += 1;
        let token = self.token;
        self.send(Frame::Settle(Settle { token, verb: Some(verb) })).await;
        token
    }

    /// The answer to a settle: the mark-delete position, or the reason of the refusal. `Err(None)`: the stream ended first.
    pub(crate) async fn answer(&mut self, token: u64) -> Result<u64, Option<SettleRefused>> {
        in_time("a settle is answered", async {
            loop {
                if let Some(at) = self.answers.iter().position(|(of, _)| *of == token) {
                    return self.answers.swap_remove(at).1.map_err(Some);
                }
                if self.ended.is_some() {
                    return Err(None);
                }
                self.turn().await;
            }
        })
        .await
    }

    pub(crate) async fn settle(&mut self, verb: Verb) -> Result<u64, SettleRefused> {
        let token = self.ask(verb).await;
        match self.answer(token).await {
            Ok(next) => Ok(next),
            Err(Some(refused)) => Err(refused),
            Err(None) => panic!("the stream ended before a settle was answered: {:?}", self.ended),
        }
    }

    async fn settled(&mut self, what: &str, verb: Verb) {
        if let Err(refused) = self.settle(verb).await {
            panic!("{what} is refused: {}: {}", refused.reason, refused.message);
        }
    }

    pub(crate) async fn accept(&mut self, got: &Got) {
        self.settled("accept", accept(got)).await;
    }

    pub(crate) async fn accept_up_to(&mut self, got: &Got) {
        let verb = AcceptUpTo { offset: got.offset, handle: got.handle.clone() };
        self.settled("accept up to", Verb::AcceptUpTo(verb)).await;
    }

    pub(crate) async fn release(&mut self, got: &Got, delay_ms: Option<u64>, counts: bool) {
        self.settled("release", release(got, delay_ms, counts)).await;
    }

    pub(crate) async fn reject(&mut self, got: &Got, reason: &str) {
        let (ranges, handle) = (range(got.offset), got.handle.clone());
        let verb = Reject { ranges, handle, reason: reason.to_owned() };
        self.settled("reject", Verb::Reject(verb)).await;
    }

    pub(crate) async fn extend(&mut self, got: &Got, lease_ms: u64) {
        let (ranges, handle) = (range(got.offset), got.handle.clone());
        self.settled("extend", Verb::Extend(Extend { ranges, handle, lease_ms })).await;
    }

    /// The reason that a settle is refused for.
    pub(crate) async fn refused(&mut self, verb: Verb) -> String {
        match self.settle(verb).await {
            Ok(_) => "nothing: it was taken".to_owned(),
            Err(refused) => refused.reason,
        }
    }

    /// The reason that the stream ends for.
    pub(crate) async fn ends_with(&mut self) -> String {
        match self.end().await {
            Ok(()) => "nothing: a clean end".to_owned(),
            Err(status) => reason(&status)
                .map_or_else(|| format!("{status:?}"), |reason| reason.as_str().to_owned()),
        }
    }
}

pub(crate) fn accept(got: &Got) -> Verb {
    Verb::Accept(Accept { ranges: range(got.offset), handle: got.handle.clone() })
}

pub(crate) fn release(got: &Got, delay_ms: Option<u64>, counts: bool) -> Verb {
    let (ranges, handle) = (range(got.offset), got.handle.clone());
    Verb::Release(Release { ranges, handle, delay_ms, counts })
}

/// What a consumer that comes back says it holds.
pub(crate) fn claim(got: &Got) -> Claim {
    Claim { handle: got.handle.clone(), ranges: range(got.offset) }
}

/// The place of an offset.
pub(crate) fn at_offset(offset: u64) -> ReadFrom {
    ReadFrom { from: Some(geminga_proto::v1::read_from::From::Offset(offset)) }
}
