//! The task that owns the consume stream of one segment: opens it, grants credit for what was handed out, passes
//! deliveries on, settles what the application asks, keeps leases, and starts again after a break.

use std::{sync::Arc, time::Duration};

use futures::future::BoxFuture;
use geminga_proto::{
    names::{ConsumerName, SubscriptionName, TopicName},
    reason::{Reason, Retry},
    v1::{
        Assigned, ConsumeFrame, ConsumeOpened, ConsumeReply, Credit, Delivery, OpenConsume, Ping,
        ReadFrom, Revoked, SubscriptionSettings, SubscriptionStart, SubscriptionType,
        consume_frame::Frame, consume_reply::Reply, read_from,
    },
};
use geminga_runtime::random::Random;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until, timeout_at},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{
    Window,
    desk::Desk,
    settles::{Settles, millis},
    source::ranges_of,
    unseen::Unseen,
};
use crate::{
    backoff::Backoff,
    connection::{Connections, Way},
    error::Error,
    layout::LayoutWatch,
};

/// Time for a stream to be opened; the server may have to load the segment first.
const OPEN_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a consumer that opens for the first time waits for another one of the subscription to go.
const EXISTING_CONSUMER_WAIT: Duration = Duration::from_secs(2);
/// How long accepts may wait for others while a settle is in flight.
const SETTLE_LINGER: Duration = Duration::from_millis(3);
/// Frames handed to the connection and not yet taken by it.
const OUTGOING_FRAMES_MAX: usize = 64;
/// After so long without a word the server is asked for one, and the credit is told again.
const PING_AFTER: Duration = Duration::from_secs(15);
/// A stream on which nothing comes for so long, though it was asked for, is given up.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Accepts that time out are looked for this often.
const SWEEP: Duration = Duration::from_secs(5);

/// Streams are numbered in so many bits; a number is only ever compared with its neighbours.
const STREAM_MASK: u64 = (1 << 24) - 1;
/// Time for the server to end a stream that was closed cleanly: it has then heard all of it.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// Ranges claimed after a break; the others are delivered again. Bounds the open frame.
const CLAIMED_RANGES_MAX: usize = 100_000;

/// What a stream reads.
#[derive(Clone, Debug)]
pub(super) enum Target {
    Subscription {
        name: SubscriptionName,
        create_at: Option<SubscriptionStart>,
        settings: Option<SubscriptionSettings>,
        /// Leases of handed out messages are extended for so long.
        processing_time_max: Duration,
    },
    /// A segment without a cursor.
    Reader(ReadFrom),
}

/// What every segment's stream of a consumer has in common.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) topic: TopicName,
    pub(super) target: Target,
    pub(super) name: ConsumerName,
    pub(super) window: Window,
    pub(super) open_by: Instant,
}

/// A delivery on its way to the application.
#[derive(Debug)]
pub(super) struct Inbound {
    pub(super) stream: u64,
    /// Of the delivery, for settles.
    pub(super) key: u64,
    pub(super) delivery: Delivery,
    /// Offsets to hand out, as inclusive ranges.
    pub(super) offsets: Vec<(u64, u64)>,
    /// Messages and bytes of credit it used.
    pub(super) messages: u64,
    pub(super) bytes: u64,
}

pub(super) struct SegmentStream {
    connections: Connections,
    segment: u32,
    layout: LayoutWatch,
    settings: Settings,
    desk: Arc<Desk>,
    /// Answered when the stream stands for the first time, or cannot.
    ready: Option<oneshot::Sender<Result<(), Error>>>,
    line: Line,
    backoff: Backoff,
    way: Way,
    stream: u64,
    settles: Settles,
    unseen: Unseen,
    /// Handed out since leases were last looked at.
    news: Vec<(u64, u64)>,
    /// When leases are looked at next; none while none is held.
    lease_at: Option<Instant>,
    /// When waiting accepts are sent at the latest.
    settle_at: Option<Instant>,
    /// After a refusal that may be repeated: no accepts are sent before.
    hold_until: Option<Instant>,
    sweep_at: Instant,
    started_at: Instant,
    closing: bool,
}

enum Line {
    Waiting {
        until: Instant,
    },
    /// Our side is closed, and everything is answered: the server ends it.
    Closing {
        replies: Box<Streaming<ConsumeReply>>,
        until: Instant,
    },
    Opening(BoxFuture<'static, Result<Opened, Error>>),
    Open(Box<OpenLine>),
    Ended,
}

struct Opened {
    frames: mpsc::Sender<ConsumeFrame>,
    replies: Streaming<ConsumeReply>,
    answer: ConsumeOpened,
}

struct OpenLine {
    frames: mpsc::Sender<ConsumeFrame>,
    replies: Streaming<ConsumeReply>,
    granted_messages: u64,
    granted_bytes: u64,
    used_messages: u64,
    used_bytes: u64,
    leave_by: Option<Instant>,
    heard_at: Instant,
    pinged: bool,
    /// Of the last assignment.
    assigned: u64,
}

enum Event {
    Retry,
    Opened(Result<Opened, Error>),
    Reply(Result<Option<ConsumeReply>, Error>),
    Closed,
    Desk,
    Timer,
}

impl Line {
    async fn next(&mut self) -> Event {
        match self {
            Self::Ended => std::future::pending().await,
            Self::Waiting { until } => {
                sleep_until(*until).await;
                Event::Retry
            }
            Self::Closing { replies, until } => {
                while let Ok(Ok(Some(_))) = timeout_at(*until, replies.message()).await {}
                Event::Closed
            }
            Self::Opening(opening) => Event::Opened(opening.await),
            Self::Open(line) => Event::Reply(line.replies.message().await.map_err(Error::from)),
        }
    }
}

impl SegmentStream {
    pub(super) fn new(
        connections: Connections,
        random: Random,
        segment: u32,
        layout: LayoutWatch,
        settings: Settings,
        desk: Arc<Desk>,
        ready: oneshot::Sender<Result<(), Error>>,
    ) -> Self {
        let now = Instant::now();
        Self {
            connections,
            segment,
            layout,
            settings,
            desk,
            ready: Some(ready),
            line: Line::Waiting { until: now },
            backoff: Backoff::new(random),
            way: Way::default(),
            stream: 0,
            settles: Settles::default(),
            unseen: Unseen::default(),
            news: Vec::new(),
            lease_at: None,
            settle_at: None,
            hold_until: None,
            sweep_at: now + SWEEP,
            started_at: now,
            closing: false,
        }
    }

    /// Runs until it is closed and every accept is answered, or no retry helps.
    pub(super) async fn run(mut self) {
        let desk = Arc::clone(&self.desk);
        loop {
            let timer = self.timer();
            let event = tokio::select! {
                biased;
                event = self.line.next() => event,
                () = desk.changed() => Event::Desk,
                () = sleep_until(timer) => Event::Timer,
            };
            let now = Instant::now();
            match event {
                Event::Retry => self.open(now),
                Event::Opened(Ok(opened)) => self.on_opened(opened, now),
                Event::Opened(Err(error)) => self.on_broken(error, now),
                Event::Reply(Ok(Some(reply))) => self.on_reply(reply, now),
                Event::Reply(Ok(None)) => {
                    self.on_broken(Error::Unavailable("the server ended the stream".into()), now);
                }
                Event::Reply(Err(error)) => self.on_broken(error, now),
                Event::Closed => self.line = Line::Ended,
                Event::Desk => self.look(now),
                Event::Timer => self.on_timer(now),
            }
            self.keep_leases(now);
            self.send_settles(now);
            if matches!(self.line, Line::Ended) {
                break; // dropping the line ends the stream
            }
            if self.closing && self.settles.is_empty() {
                self.close(now);
            }
        }
        let late = self.desk.end();
        self.settles.fail(&Error::Closed);
        for request in late {
            let _ = request.waiter.send(Err(Error::Closed)); // nobody may wait any more
        }
    }

    /// Everything that was asked is answered: what is still held goes back uncounted, as the server hears the end.
    fn close(&mut self, now: Instant) {
        self.line = match std::mem::replace(&mut self.line, Line::Ended) {
            Line::Open(line) => {
                let OpenLine { replies, frames, .. } = *line;
                drop(frames);
                Line::Closing { replies: Box::new(replies), until: now + CLOSE_TIMEOUT }
            }
            closing @ Line::Closing { .. } => closing,
            _ => Line::Ended,
        };
    }

    /// The present stream counts for nothing from here on. What the application has not seen comes again.
    fn leave(&mut self) {
        self.stream = (self.stream + 1) & STREAM_MASK;
        let seen = self.desk.cut(self.stream);
        let last = self.unseen.on_seen(seen).last().map(|range| range.1);
        let unseen = self.unseen.end();
        let next = unseen.first().map(|range| range.0);
        if let (Target::Reader(from), Some(next)) =
            (&mut self.settings.target, next.or(last.map(|last| last.saturating_add(1))))
        {
            from.from = Some(read_from::From::Offset(next));
        }
        self.news.clear();
        self.settles.on_broken(&unseen);
    }

    fn open(&mut self, now: Instant) {
        self.leave();
        let known = self.layout.get();
        let (owner, route) = self.way.next(known.owner(self.segment));
        let settings = &self.settings;
        let mut open = OpenConsume {
            topic: settings.topic.to_string(),
            segment: self.segment,
            layout_epoch: known.table.epoch,
            consumer_name: settings.name.to_string(),
            route: route.into(),
            ..Default::default()
        };
        match &settings.target {
            Target::Subscription { name, create_at, settings, .. } => {
                open.subscription = name.to_string();
                open.create_at = create_at.map(Into::into);
                open.settings = settings.clone();
                open.claims = self.settles.claims(CLAIMED_RANGES_MAX);
            }
            Target::Reader(from) => open.reader = Some(*from),
        }
        // The builder waits for the first one, and no longer than it was told.
        let limit = now + OPEN_TIMEOUT;
        let limit = if self.ready.is_some() { limit.min(self.settings.open_by) } else { limit };
        let connections = self.connections.clone();
        self.line = Line::Opening(Box::pin(async move {
            timeout_at(limit, open_stream(connections, owner, open)).await.unwrap_or_else(|_| {
                Err(Error::Unavailable("the stream was not opened in time".into()))
            })
        }));
    }

    fn on_opened(&mut self, opened: Opened, now: Instant) {
        let Opened { frames, replies, answer } = opened;
        tracing::debug!(
            topic = %self.settings.topic, segment = self.segment, next = answer.mark_delete_next,
            "consume stream open"
        );
        if let Err(words) = self.settles.on_opened(answer.mark_delete_next, &answer.granted, now) {
            return self.give_up(Error::refused(Reason::UnexpectedFrame, words));
        }
        if let Target::Reader(from) = &mut self.settings.target
            && answer.mark_delete_next > 0
            && !matches!(from.from, Some(read_from::From::Offset(_)))
        {
            // Where the server began: a break does not begin at another place.
            from.from = Some(read_from::From::Offset(answer.mark_delete_next));
        }
        let settings = answer.settings.unwrap_or_default();
        self.desk.set_active(settings.r#type() != SubscriptionType::Failover);
        self.desk.set_settings(settings);
        let mut line = OpenLine {
            frames,
            replies,
            granted_messages: 0,
            granted_bytes: 0,
            used_messages: 0,
            used_bytes: 0,
            leave_by: None,
            heard_at: now,
            pinged: false,
            assigned: 0,
        };
        line.grant(&self.settings, 0, 0);
        self.line = Line::Open(Box::new(line));
        self.hold_until = None;
        if let Some(ready) = self.ready.take() {
            let _ = ready.send(Ok(())); // the builder may have given up
        }
    }

    fn on_reply(&mut self, reply: ConsumeReply, now: Instant) {
        if let Line::Open(line) = &mut self.line {
            line.heard_at = now;
            line.pinged = false;
        }
        match reply.reply {
            Some(Reply::Delivery(delivery)) => self.on_delivery(delivery, now),
            Some(Reply::Settled(settled)) => {
                self.backoff.reset();
                self.settles.on_settled(settled.token, settled.mark_delete_next, now);
            }
            Some(Reply::SettleRefused(refused)) => {
                let error = Error::in_stream(&refused.reason, refused.message, refused.retry_safe);
                let again = error.retry() != Retry::Never;
                self.settles.on_refused(refused.token, &error, now);
                if again && self.hold_until.is_none_or(|until| until <= now) {
                    self.hold_until = Some(now + self.backoff.pause(None));
                }
            }
            Some(Reply::GoAway(go_away)) => {
                if let Line::Open(line) = &mut self.line {
                    line.leave_by =
                        Some(now + Duration::from_millis(u64::from(go_away.drain_by_ms)));
                }
                self.way.on_go_away(go_away);
            }
            Some(Reply::Assigned(assigned)) => self.on_assigned(assigned),
            Some(Reply::Revoked(revoked)) => self.on_revoked(&revoked, now),
            Some(Reply::Opened(_) | Reply::Pong(_)) | None => {}
        }
    }

    /// A failover subscription shares its segments out; an older word than the last one is ignored.
    fn on_assigned(&mut self, assigned: Assigned) {
        let Line::Open(line) = &mut self.line else { return };
        if assigned.epoch >= line.assigned {
            line.assigned = assigned.epoch;
            self.desk.set_active(assigned.active);
        }
    }

    fn on_revoked(&mut self, revoked: &Revoked, now: Instant) {
        self.look(now); // what was asked before is on its way
        let (ranges, key_max) = self.settles.on_revoked(&revoked.ranges, &revoked.handle);
        self.desk.revoke(&ranges, key_max, self.unseen.delivered());
    }

    fn on_delivery(&mut self, delivery: Delivery, now: Instant) {
        self.look(now); // what was accepted until now is not handed out again
        let Line::Open(line) = &mut self.line else { return };
        let Some(ranges) = ranges_of(&delivery) else {
            return self.give_up(Error::Damaged(
                "a delivery names offsets outside its batch, or none".into(),
            ));
        };
        let messages = ranges.iter().map(|(first, last)| last - first + 1).sum::<u64>();
        let bytes = delivery.payload.len() as u64;
        // Bytes may run over by the rest of one batch: a batch cannot be cut. So what waits is bounded.
        let spent = line.used_bytes >= line.granted_bytes;
        line.used_messages += messages;
        line.used_bytes += bytes;
        if spent || line.used_messages > line.granted_messages {
            let error = Error::refused(
                Reason::CreditExceeded,
                "the server delivered more than was granted",
            );
            return self.give_up(error);
        }
        self.backoff.reset();
        if self.closing {
            return; // given back with the end of the stream
        }
        let key = match &self.settings.target {
            Target::Reader(_) => 0,
            Target::Subscription { .. } => {
                let lease = millis(delivery.lease_ms);
                self.settles.on_delivered(&ranges, &delivery.handle, lease, now)
            }
        };
        if delivery.lease_ms > 0 && self.lease_at.is_none() {
            self.lease_at = self.settles.lease_tick().map(|tick| now + tick);
        }
        self.see();
        self.unseen.on_delivered(&ranges);
        let stream = self.stream;
        self.desk.deliver(Inbound { stream, key, delivery, offsets: ranges, messages, bytes });
    }

    /// Learns what the application has seen.
    fn see(&mut self) {
        let news = self.unseen.on_seen(self.desk.seen());
        if self.lease_at.is_some() {
            self.news.extend(news);
        }
    }

    /// Extends leases in time: of what waits for the application, and of what it has for as long as it has asked.
    fn keep_leases(&mut self, now: Instant) {
        let Target::Subscription { processing_time_max, .. } = self.settings.target else { return };
        let Line::Open(line) = &mut self.line else { return };
        if self.lease_at.is_none_or(|at| now < at) {
            return;
        }
        let news = self.unseen.on_seen(self.desk.seen());
        self.news.extend(news);
        self.settles.on_handed_out(&std::mem::take(&mut self.news), now + processing_time_max);
        let Some(tick) = self.settles.lease_tick() else {
            self.lease_at = None;
            return;
        };
        self.lease_at = Some(now + tick);
        while let Ok(room) = line.frames.try_reserve() {
            let Some(settle) = self.settles.renewal(now, tick) else { return };
            room.send(ConsumeFrame { frame: Some(Frame::Settle(settle)) });
        }
    }

    fn look(&mut self, now: Instant) {
        let seen = self.desk.look();
        if !seen.requests.is_empty() {
            self.settle_at.get_or_insert(now + SETTLE_LINGER);
        }
        for request in seen.requests {
            self.settles.request(request);
        }
        self.closing |= seen.closing;
        if let Line::Open(line) = &mut self.line {
            line.grant(&self.settings, seen.taken_messages, seen.taken_bytes);
        }
    }

    /// Sends waiting accepts: at once if no settle is in flight, else after the linger time.
    fn send_settles(&mut self, now: Instant) {
        let Line::Open(line) = &mut self.line else {
            self.settle_at = None; // the next stream's deliveries will bring them up again
            return;
        };
        if self.hold_until.is_some_and(|until| now < until) {
            return;
        }
        self.hold_until = None;
        if self.settles.in_flight() > 0 && self.settle_at.is_none_or(|at| now < at) {
            return;
        }
        self.settle_at = None;
        while let Ok(room) = line.frames.try_reserve() {
            let Some(settle) = self.settles.frame() else { return };
            room.send(ConsumeFrame { frame: Some(Frame::Settle(settle)) });
        }
        self.settle_at = Some(now + SETTLE_LINGER); // the connection takes no more now
    }

    /// When something is due without anything happening.
    fn timer(&self) -> Instant {
        let held = self.hold_until.is_some();
        let settle_at = self.settle_at.filter(|_| !held);
        let mut due =
            [settle_at, self.hold_until].into_iter().flatten().fold(self.sweep_at, Instant::min);
        if let Line::Open(line) = &self.line {
            due = due.min(line.quiet_until()).min(line.leave_by.unwrap_or(due));
            due = due.min(self.lease_at.unwrap_or(due));
        }
        due
    }

    fn on_timer(&mut self, now: Instant) {
        if now >= self.sweep_at {
            self.sweep_at = now + SWEEP;
            self.settles.expire(now);
        }
        self.look(now);
        let Line::Open(line) = &mut self.line else { return };
        if line.leave_by.is_some_and(|by| now >= by) {
            self.line = Line::Waiting { until: now + self.backoff.pause(None) };
        } else if now >= line.quiet_until() {
            if line.pinged {
                return self.on_broken(Error::Unavailable("the server is silent".into()), now);
            }
            line.ask_for_a_word();
        }
    }

    fn on_broken(&mut self, error: Error, now: Instant) {
        self.way.on_broken(&error);
        let pause = self.backoff.pause(error.retry_after());
        let opening = self.ready.is_some();
        let existing = error.reason() == Some(Reason::ConsumerExists)
            && now + pause > self.started_at + EXISTING_CONSUMER_WAIT;
        // Handles of a subscription that was deleted and made again: it goes on without them.
        let disowned = error.reason() == Some(Reason::InvalidHandle) && self.settles.holds_any();
        if disowned {
            self.settles.disown();
        }
        let hopeless = error.retry() == Retry::Never && !disowned;
        if hopeless || (opening && (existing || now + pause >= self.settings.open_by)) {
            return self.give_up(error);
        }
        tracing::debug!(topic = %self.settings.topic, segment = self.segment, %error, ?pause, "consume stream broken");
        self.line = Line::Waiting { until: now + pause };
    }

    fn give_up(&mut self, error: Error) {
        self.settles.fail(&error);
        self.line = Line::Ended;
        match self.ready.take() {
            Some(ready) => drop(ready.send(Err(error))),
            None => self.desk.fail(error),
        }
    }
}

impl OpenLine {
    /// Grants what was handed out again, once that is half the window.
    fn grant(&mut self, settings: &Settings, taken_messages: u64, taken_bytes: u64) {
        let messages = taken_messages + settings.window.messages;
        let bytes = taken_bytes + settings.window.bytes;
        let enough = messages >= self.granted_messages + settings.window.messages.div_ceil(2)
            || bytes >= self.granted_bytes + settings.window.bytes.div_ceil(2);
        if !enough || self.leave_by.is_some() {
            return;
        }
        let credit = ConsumeFrame { frame: Some(Frame::Credit(Credit { messages, bytes })) };
        if self.frames.try_send(credit).is_ok() {
            self.granted_messages = messages;
            self.granted_bytes = bytes;
        }
    }

    /// When silence is to be noticed: first by asking, then by giving up.
    fn quiet_until(&self) -> Instant {
        self.heard_at + if self.pinged { SILENCE_MAX } else { PING_AFTER }
    }

    /// Tells the credit again, which leaks nothing and heals a lost frame, and asks for a sign of life.
    fn ask_for_a_word(&mut self) {
        self.pinged = true;
        let credit = Credit { messages: self.granted_messages, bytes: self.granted_bytes };
        for frame in [Frame::Credit(credit), Frame::Ping(Ping { token: 0 })] {
            let _ = self.frames.try_send(ConsumeFrame { frame: Some(frame) }); // full: the server does not read, as noticed
        }
    }
}

async fn open_stream(
    connections: Connections,
    owner: Option<String>,
    open: OpenConsume,
) -> Result<Opened, Error> {
    let (frames, outgoing) = mpsc::channel(OUTGOING_FRAMES_MAX);
    let first = ConsumeFrame { frame: Some(Frame::Open(open)) };
    frames.try_send(first).expect("a new queue has room");
    let mut client = connections.subscriber(owner.as_deref());
    let mut replies = client.consume(ReceiverStream::new(outgoing)).await?.into_inner();
    match replies.message().await?.and_then(|reply| reply.reply) {
        Some(Reply::Opened(answer)) => Ok(Opened { frames, replies, answer }),
        Some(Reply::GoAway(_) | Reply::Assigned(_) | Reply::Revoked(_)) | None => {
            Err(Error::Unavailable("the server ended the stream".into()))
        }
        Some(_) => Err(Error::refused(
            Reason::UnexpectedFrame,
            "the server answered the open with something else",
        )),
    }
}
