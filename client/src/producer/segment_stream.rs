//! The task that owns the publish stream of one segment: opens it, sends batches within the granted credit, settles
//! receipts, and starts again after a break with what is not stored.

use std::time::Duration;

use bytes::Bytes;
use geminga_proto::{
    names::{ProducerName, TopicName},
    reason::{Reason, Retry},
    v1::{AccessMode, BatchRefused, GoAway, OpenPublish, PublishReply, publish_reply::Reply},
};
use geminga_runtime::random::Random;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until},
};

use super::{
    batcher::{Batcher, Batching, Queued},
    chain::{Chain, Refusal},
    content::{self, Content, fail, fail_link, frame},
    line::{self, Line, OpenLine, Opened, open_stream},
};
use crate::{
    backoff::Backoff,
    codec::Compression,
    connection::{Connections, Way},
    error::{Error, because},
    heartbeat::Interval,
    layout::LayoutWatch,
};

/// Full batches that wait in the batcher; past that the queue of messages is not read.
const FULL_BATCHES_MAX: usize = 16;
/// Commands taken in one turn of the loop.
const COMMANDS_MAX: usize = 256;
/// A stream that stood for so long was a good one: the next one is opened as if nothing had failed before.
const GOOD_AFTER: Duration = Duration::from_secs(10);

/// What every segment's stream of a producer has in common.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) batching: Batching,
    pub(super) compression: Compression,
    pub(super) name: Option<ProducerName>,
    pub(super) message_timeout: Duration,
    pub(super) first_stream: u64,
    pub(super) access: AccessMode,
    pub(super) heartbeat: Interval,
}

/// What the producer's handles ask for, in order.
#[derive(Debug)]
pub(super) enum Command {
    Send(Queued),
    /// Answered when every message before it is.
    Flush(oneshot::Sender<()>),
    /// As flush; then the task ends.
    Close(oneshot::Sender<()>),
}

pub(super) struct SegmentStream {
    connections: Connections,
    topic: TopicName,
    segment: u32,
    layout: LayoutWatch,
    settings: Settings,
    inbox: mpsc::Receiver<Command>,
    batcher: Batcher,
    chain: Chain<Content>,
    line: Line,
    backoff: Backoff,
    /// Resumes the session.
    resume_token: Bytes,
    stream_number: u64,
    /// Of a named producer: what the server granted last (DD4), as long as it is sure that no later open of ours was granted.
    held_epoch: Option<u64>,
    way: Way,
    /// After a refusal that may be repeated: send nothing before.
    hold_until: Option<Instant>,
    /// The last refusal or break since the last receipt: why messages run out of time.
    trouble: Option<String>,
    /// (message number, who waits until all before it are settled)
    flushes: Vec<(u64, oneshot::Sender<()>)>,
    closing: bool,
    /// A newer producer of our name exists: nothing can be sent any more.
    fenced: Option<Error>,
}

enum Event {
    Line(line::Event),
    Commands,
    HandlesGone,
    Timer,
}

impl SegmentStream {
    pub(super) fn new(
        connections: Connections,
        random: Random,
        topic: TopicName,
        segment: u32,
        layout: LayoutWatch,
        settings: Settings,
        inbox: mpsc::Receiver<Command>,
    ) -> Self {
        Self {
            connections,
            topic,
            segment,
            layout,
            inbox,
            batcher: Batcher::new(settings.batching),
            chain: Chain::default(),
            line: Line::Idle,
            backoff: Backoff::new(random),
            resume_token: Bytes::new(),
            stream_number: settings.first_stream,
            held_epoch: None,
            way: Way::default(),
            hold_until: None,
            trouble: None,
            flushes: Vec::new(),
            closing: false,
            fenced: None,
            settings,
        }
    }

    /// Runs until it is closed and everything is answered, or every handle is gone.
    pub(super) async fn run(mut self) {
        let mut commands = Vec::with_capacity(COMMANDS_MAX);
        let mut wants_room = false;
        loop {
            let timer = self.timer();
            let listens = !self.closing && self.batcher.full() < FULL_BATCHES_MAX;
            let event = tokio::select! {
                biased;
                event = self.line.next(wants_room) => Event::Line(event),
                taken = self.inbox.recv_many(&mut commands, COMMANDS_MAX), if listens => {
                    if taken == 0 { Event::HandlesGone } else { Event::Commands }
                }
                () = sleep_until(timer.unwrap_or_else(Instant::now)), if timer.is_some() => Event::Timer,
            };
            let now = Instant::now();
            self.apply(event, &mut commands, now);
            self.expire(now);
            wants_room = self.pump(now);
            self.connect();
            self.watch_silence(now);
            self.answer_flushes();
            if self.closing && self.is_settled() {
                break;
            }
        }
        drop(self.line); // ends the stream
        // What came behind the end was not taken; nobody is left without an answer.
        self.inbox.close();
        while let Some(command) = self.inbox.recv().await {
            match command {
                Command::Send(queued) => drop(queued.answer.send(Err(Error::Closed))),
                Command::Flush(done) | Command::Close(done) => drop(done.send(())),
            }
        }
    }

    fn apply(&mut self, event: Event, commands: &mut Vec<Command>, now: Instant) {
        match event {
            Event::Line(event) => self.on_line(event, now),
            Event::Commands => {
                for command in commands.drain(..) {
                    self.on_command(command, now);
                }
            }
            Event::HandlesGone => self.closing = true,
            Event::Timer => {}
        }
    }

    fn on_line(&mut self, event: line::Event, now: Instant) {
        match event {
            line::Event::Retry => self.line = Line::Idle, // connect() opens it if there is work
            line::Event::Opened(Ok(opened)) => self.on_opened(*opened, now),
            line::Event::Opened(Err(error)) => {
                // It may have been granted all the same: then our own later epoch must not count as somebody else's.
                let refused = error.reason().is_some() && error.retry() == Retry::Safe;
                self.held_epoch = self.held_epoch.filter(|_| refused);
                self.on_broken(error, now);
            }
            line::Event::Reply(Ok(Some(reply))) => self.on_reply(reply, now),
            line::Event::Reply(Ok(None)) => match &self.line {
                Line::Open(line) if line.is_to_leave() => self.move_on(now),
                _ => self.on_broken(Error::Unavailable("the server ended the stream".into()), now),
            },
            line::Event::Reply(Err(error)) => self.on_broken(error, now),
            line::Event::Room => {}
        }
    }

    fn on_command(&mut self, command: Command, now: Instant) {
        match command {
            Command::Send(queued) => match &self.fenced {
                Some(error) => drop(queued.answer.send(Err(error.clone()))),
                None => self.batcher.push(queued, now),
            },
            Command::Flush(done) => self.flushes.push((self.batcher.count(), done)),
            Command::Close(done) => {
                self.flushes.push((self.batcher.count(), done));
                self.closing = true;
            }
        }
    }

    fn on_opened(&mut self, opened: Opened, now: Instant) {
        let answer = &opened.answer;
        tracing::debug!(
            topic = %self.topic, segment = self.segment, producer = answer.producer_name,
            persisted = answer.last_persisted_sequence, "publish stream open"
        );
        for stored in self.chain.on_opened(answer.last_persisted_sequence) {
            // Stored before the break; where exactly was in the receipt that got lost.
            self.trouble = None;
            stored.content.stored(self.segment, None);
        }
        self.resume_token = answer.resume_token.clone();
        self.held_epoch = Some(answer.producer_epoch).filter(|epoch| *epoch > 0);
        self.line = Line::Open(Box::new(OpenLine::new(opened, self.settings.heartbeat, now)));
        self.hold_until = None;
    }

    fn on_reply(&mut self, reply: PublishReply, now: Instant) {
        let Line::Open(line) = &mut self.line else { return };
        line.on_heard(!matches!(reply.reply, Some(Reply::Pong(_)) | None), now);
        match reply.reply {
            Some(Reply::Receipt(receipt)) => {
                self.backoff.reset();
                if let Some(link) = self.chain.on_stored(receipt.hi_sequence) {
                    self.trouble = None;
                    link.content.stored(self.segment, Some(&receipt));
                }
            }
            Some(Reply::Refused(refused)) => self.on_refused(refused, now),
            Some(Reply::Credit(credit)) => line.on_credit(credit),
            Some(Reply::GoAway(go_away)) => self.on_go_away(go_away, now),
            Some(Reply::Opened(_) | Reply::Pong(_)) | None => {}
        }
    }

    fn on_go_away(&mut self, go_away: GoAway, now: Instant) {
        if let Line::Open(line) = &mut self.line {
            line.on_go_away(go_away.drain_by_ms, now);
        }
        self.way.on_go_away(go_away);
    }

    fn on_refused(&mut self, refused: BatchRefused, now: Instant) {
        let BatchRefused { hi_sequence, reason, message, retry_safe, pushed_sequence } = refused;
        let error = Error::in_stream(&reason, message, retry_safe);
        match error.reason() {
            Some(Reason::ProducerFenced) => return self.give_up(&error),
            Some(Reason::ProducerExpired) => return self.on_broken(error, now),
            _ => {}
        }
        let refusal = if error.retry() == Retry::Never { Refusal::Drop } else { Refusal::Again };
        tracing::debug!(topic = %self.topic, segment = self.segment, %error, "batch refused");
        if let Some(dropped) = self.chain.on_refused(hi_sequence, pushed_sequence, refusal) {
            fail_link(dropped, &error);
        } else if refusal == Refusal::Again && self.hold_until.is_none_or(|until| until <= now) {
            // Out of sequence behind a refused batch needs no pause of its own, but one that repeats does.
            self.trouble = Some(error.to_string());
            self.hold_until = Some(now + self.backoff.pause(None));
        }
    }

    /// Leaves the present stream for a new one, where the server wants it: no fault of anybody.
    fn move_on(&mut self, now: Instant) {
        self.chain.on_broken();
        if let Line::Open(line) = &self.line
            && now >= line.opened_at() + GOOD_AFTER
        {
            self.backoff.reset();
        }
        self.line = Line::Waiting { until: now + self.backoff.pause(None) };
    }

    /// The stream broke or was not opened.
    fn on_broken(&mut self, error: Error, now: Instant) {
        self.chain.on_broken();
        self.line = Line::Idle;
        self.way.on_broken(&error);
        match (error.reason(), error.retry()) {
            (Some(Reason::ProducerExpired), _) => {
                // The server forgot our session: what was in flight is of unknown outcome, and a new one starts (DD4).
                for link in self.chain.restart() {
                    fail_link(link, &error);
                }
                self.resume_token = Bytes::new();
                self.line = Line::Waiting { until: now + self.backoff.pause(None) };
            }
            (_, Retry::Never) => self.give_up(&error),
            _ => {
                let pause = self.backoff.pause(error.retry_after());
                tracing::debug!(topic = %self.topic, segment = self.segment, %error, ?pause, "publish stream broken");
                self.trouble = Some(error.to_string());
                self.line = Line::Waiting { until: now + pause };
            }
        }
    }

    /// No retry helps: everything that waits fails. The next message tries again from the start, unless we are fenced.
    fn give_up(&mut self, error: &Error) {
        self.line = Line::Idle;
        for link in self.chain.drain() {
            fail_link(link, error);
        }
        fail(self.batcher.drain(), error);
        (self.resume_token, self.held_epoch) = (Bytes::new(), None);
        if error.reason() == Some(Reason::ProducerFenced) {
            self.fenced = Some(error.clone());
        }
    }

    fn not_sent(&self) -> Error {
        Error::NotSent { within: self.settings.message_timeout, trouble: self.trouble.clone() }
    }

    /// Messages whose time is over fail; a stream that owes answers and is silent is given up.
    fn expire(&mut self, now: Instant) {
        let timeout = self.settings.message_timeout;
        for link in self.chain.expire(now) {
            let error = if link.uncertain {
                let trouble = because(self.trouble.as_deref());
                Error::Indeterminate(format!("no receipt within {timeout:?}{trouble}"))
            } else {
                self.not_sent()
            };
            link.content.fail(&error);
        }
        let unsent = self.batcher.expire(now);
        fail(unsent, &self.not_sent());
        let nothing_in_flight = self.chain.nothing_in_flight();
        let Line::Open(line) = &mut self.line else { return };
        if let Err(error) = line.look_alive(now) {
            self.on_broken(error, now);
        } else if line.leaves(nothing_in_flight, now) {
            self.move_on(now);
        }
    }

    /// Notes since when the server owes us something: answers, credit, or the word that it takes no more frames.
    fn watch_silence(&mut self, now: Instant) {
        let (unanswered, unsent) = (!self.chain.nothing_in_flight(), !self.is_settled());
        if let Line::Open(line) = &mut self.line {
            line.watch(unanswered, unsent, now);
        }
    }

    /// Sends what may be sent. True if frames wait for room in the connection.
    fn pump(&mut self, now: Instant) -> bool {
        if self.hold_until.is_some_and(|until| now < until) {
            return false;
        }
        self.hold_until = None;
        let flush = !self.flushes.is_empty();
        let Line::Open(line) = &mut self.line else { return false };
        loop {
            if self.chain.unsent() == 0 {
                // Cut only what can be sent: a longer wait makes larger batches.
                if !line.takes() || !line.has_room() {
                    return !line.has_room() && !self.batcher.is_empty();
                }
                let idle = self.chain.nothing_in_flight();
                let Some(cut) = self.batcher.cut(now, idle, flush) else { return false };
                content::push(&mut self.chain, cut, self.settings.compression, self.segment);
                continue;
            }
            let Some(next) = self.chain.sendable() else { return false };
            let bytes = next.content.bytes();
            if !line.takes() {
                return false;
            }
            if !line.has_room() {
                return true;
            }
            let Some((prev, link)) = self.chain.send() else { return false };
            line.send(frame(prev, link), bytes, now);
        }
    }

    /// Opens the stream if there is something to send.
    fn connect(&mut self) {
        if !matches!(self.line, Line::Idle) || self.is_settled() {
            return;
        }
        let known = self.layout.get();
        let (owner, route) = self.way.next(known.owner(self.segment));
        let open = OpenPublish {
            topic: self.topic.to_string(),
            segment: self.segment,
            layout_epoch: known.table.epoch,
            producer_name: self.settings.name.as_ref().map(ToString::to_string).unwrap_or_default(),
            resume_token: self.resume_token.clone(),
            stream_number: self.stream_number,
            route: route.into(),
            access: self.settings.access.into(),
            held_epoch: self.held_epoch,
            heartbeat_ms: self.settings.heartbeat.on_the_wire(),
        };
        self.stream_number += 1;
        self.line = Line::Opening(Box::pin(open_stream(self.connections.clone(), owner, open)));
    }

    fn is_settled(&self) -> bool {
        self.chain.is_empty() && self.batcher.is_empty()
    }

    fn answer_flushes(&mut self) {
        if self.flushes.is_empty() {
            return;
        }
        let oldest = self.chain.front().map(|content| content.number).or(self.batcher.oldest());
        let waiting = std::mem::take(&mut self.flushes);
        for (before, done) in waiting {
            if oldest.is_some_and(|oldest| oldest < before) {
                self.flushes.push((before, done));
            } else {
                let _ = done.send(()); // nobody may wait any more
            }
        }
    }

    /// When something is due without anything happening.
    fn timer(&self) -> Option<Instant> {
        let times = [self.chain.deadline(), self.batcher.deadline(), self.hold_until];
        let mut due = times.into_iter().flatten().min();
        if let Line::Open(line) = &self.line {
            let can_cut = self.hold_until.is_none() && self.chain.unsent() == 0 && line.takes();
            let linger = self.batcher.due().filter(|_| can_cut && line.has_room());
            due = [due, linger, Some(line.next_due())].into_iter().flatten().min();
        }
        due
    }
}
