//! The task that owns the consume stream of one segment: opens it, grants credit for what was handed out, passes
//! deliveries on, settles what the application asks, keeps leases, and starts again after a break.

use std::{sync::Arc, time::Duration};

use geminga_proto::{
    names::{ConsumerName, SubscriptionName, TopicName},
    reason::{Reason, Retry},
    v1::{
        Assigned, ConsumeReply, Delivery, GoAway, OpenConsume, ReadFrom, Revoked,
        SubscriptionSettings, SubscriptionStart, SubscriptionType, consume_frame::Frame,
        consume_reply::Reply, read_from,
    },
};
use geminga_runtime::random::Random;
use tokio::{
    sync::oneshot,
    time::{Instant, sleep_until, timeout_at},
};

use super::{
    Window,
    desk::Desk,
    line::{self, Line, OpenLine, Opened, open_stream},
    settles::{Settles, millis},
    source::ranges_of,
    unseen::Unseen,
};
use crate::{
    backoff::Backoff,
    connection::{Connections, Way},
    error::Error,
    heartbeat::Interval,
    layout::LayoutWatch,
};

/// Time for a stream to be opened; the server may have to load the segment first.
const OPEN_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a consumer that opens for the first time waits for another one of the subscription to go.
const EXISTING_CONSUMER_WAIT: Duration = Duration::from_secs(2);
/// How long accepts may wait for others while a settle is in flight.
const SETTLE_LINGER: Duration = Duration::from_millis(3);
/// A stream that stood for so long was a good one: the next one is opened as if nothing had failed before.
const GOOD_AFTER: Duration = Duration::from_secs(10);
/// Accepts that time out are looked for this often.
const SWEEP: Duration = Duration::from_secs(5);

/// Streams are numbered in so many bits; a number is only ever compared with its neighbours.
const STREAM_MASK: u64 = (1 << 24) - 1;
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
    /// A segment without a cursor; `compacted`: below its horizon only the latest message of each key.
    Reader { from: ReadFrom, compacted: bool },
}

/// What every segment's stream of a consumer has in common.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) topic: TopicName,
    pub(super) target: Target,
    pub(super) name: ConsumerName,
    pub(super) window: Window,
    pub(super) heartbeat: Interval,
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

#[expect(clippy::large_enum_variant, reason = "one at a time, on the stack")]
enum Event {
    Line(line::Event),
    Desk,
    Timer,
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
                event = self.line.next() => Event::Line(event),
                () = desk.changed() => Event::Desk,
                () = sleep_until(timer) => Event::Timer,
            };
            let now = Instant::now();
            match event {
                Event::Line(event) => self.on_line(event, now),
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

    fn on_line(&mut self, event: line::Event, now: Instant) {
        match event {
            line::Event::Retry => self.open(now),
            line::Event::Opened(Ok(opened)) => self.on_opened(opened, now),
            line::Event::Reply(Ok(Some(reply))) => self.on_reply(reply, now),
            line::Event::Reply(Ok(None)) if self.is_to_leave() => self.move_on(now),
            line::Event::Reply(Ok(None)) => {
                self.on_broken(Error::Unavailable("the server ended the stream".into()), now);
            }
            line::Event::Opened(Err(error)) | line::Event::Reply(Err(error)) => {
                self.on_broken(error, now);
            }
            line::Event::Closed => self.line = Line::Ended,
        }
    }

    /// Everything that was asked is answered: what is still held goes back uncounted, as the server hears that we leave.
    fn close(&mut self, now: Instant) {
        let leaves = matches!(self.settings.target, Target::Subscription { .. });
        self.line = match std::mem::replace(&mut self.line, Line::Ended) {
            Line::Open(line) => Line::Closing(line.close(leaves, now)),
            closing @ Line::Closing { .. } => closing,
            _ => Line::Ended,
        };
    }

    /// Whether the server asked us to leave the present stream.
    fn is_to_leave(&self) -> bool {
        matches!(&self.line, Line::Open(line) if line.leave_by.is_some())
    }

    /// Leaves the present stream for a new one, where the server wants it: no fault of anybody.
    fn move_on(&mut self, now: Instant) {
        if let Line::Open(line) = &self.line
            && now >= line.opened_at() + GOOD_AFTER
        {
            self.backoff.reset();
        }
        self.line = Line::Waiting { until: now + self.backoff.pause(None) };
    }

    /// The present stream counts for nothing from here on. What the application has not seen comes again.
    fn leave(&mut self) {
        self.stream = (self.stream + 1) & STREAM_MASK;
        let seen = self.desk.cut(self.stream);
        let last = self.unseen.on_seen(seen).last().map(|range| range.1);
        let unseen = self.unseen.end();
        let next = unseen.first().map(|range| range.0);
        if let (Target::Reader { from, .. }, Some(next)) =
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
            heartbeat_ms: settings.heartbeat.on_the_wire(),
            ..Default::default()
        };
        match &settings.target {
            Target::Subscription { name, create_at, settings, .. } => {
                open.subscription = name.to_string();
                open.create_at = create_at.map(Into::into);
                open.settings = settings.clone();
                open.claims = self.settles.claims(CLAIMED_RANGES_MAX);
            }
            Target::Reader { from, compacted } => {
                open.reader = Some(*from);
                open.compacted = *compacted;
            }
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
        let answer = &opened.answer;
        tracing::debug!(
            topic = %self.settings.topic, segment = self.segment, next = answer.mark_delete_next,
            "consume stream open"
        );
        if let Err(words) = self.settles.on_opened(answer.mark_delete_next, &answer.granted, now) {
            return self.give_up(Error::refused(Reason::UnexpectedFrame, words));
        }
        if let Target::Reader { from, .. } = &mut self.settings.target
            && answer.mark_delete_next > 0
            && !matches!(from.from, Some(read_from::From::Offset(_)))
        {
            // Where the server began: a break does not begin at another place.
            from.from = Some(read_from::From::Offset(answer.mark_delete_next));
        }
        let settings = answer.settings.clone().unwrap_or_default();
        self.desk.set_active(settings.r#type() != SubscriptionType::Failover);
        self.desk.set_settings(settings);
        self.desk.set_compacted_to(answer.compacted_to);
        let Settings { window, heartbeat, .. } = self.settings;
        self.line = Line::Open(Box::new(OpenLine::new(opened, window, heartbeat, now)));
        self.hold_until = None;
        if let Some(ready) = self.ready.take() {
            let _ = ready.send(Ok(())); // the builder may have given up
        }
    }

    fn on_reply(&mut self, reply: ConsumeReply, now: Instant) {
        if let Line::Open(line) = &mut self.line {
            line.on_heard(now);
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
            Some(Reply::GoAway(go_away)) => self.on_go_away(go_away, now),
            Some(Reply::Assigned(assigned)) => self.on_assigned(assigned),
            Some(Reply::Revoked(revoked)) => self.on_revoked(&revoked, now),
            Some(Reply::ReaderAt(at)) => {
                if let Line::Open(line) = &mut self.line {
                    line.reader_at = Some(at.next_offset);
                }
            }
            Some(Reply::Pong(_)) => self.on_pong(),
            Some(Reply::Opened(_)) | None => {}
        }
    }

    fn on_go_away(&mut self, go_away: GoAway, now: Instant) {
        if let Line::Open(line) = &mut self.line {
            line.leave_by = Some(now + Duration::from_millis(u64::from(go_away.drain_by_ms)));
        }
        self.way.on_go_away(go_away);
    }

    /// Everything that the server sent before it is here: what a reader was told of its place is true of what it delivered.
    fn on_pong(&mut self) {
        if let (Line::Open(line), Target::Reader { .. }) = (&mut self.line, &self.settings.target) {
            self.desk.set_reached(self.unseen.delivered(), line.reader_at.take());
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
        if !line.uses(messages, bytes) {
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
            Target::Reader { .. } => 0,
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
        while line.has_room() {
            let Some(settle) = self.settles.renewal(now, tick) else { return };
            line.send(Frame::Settle(settle), now);
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
            line.grant(seen.taken_messages, seen.taken_bytes, now);
            if seen.asks_reached {
                line.ping(now);
            }
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
        while line.has_room() {
            let Some(settle) = self.settles.frame() else { return };
            line.send(Frame::Settle(settle), now);
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
            self.move_on(now);
        } else if !line.look_alive(now) {
            self.on_broken(Error::Unavailable("the server is silent".into()), now);
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
