//! The task that owns the publish stream of one segment: opens it, sends batches within the granted credit, settles
//! receipts, and starts again after a break with what is not stored.

use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use geminga_proto::{
    names::{ProducerName, TopicName},
    reason::{Reason, Retry},
    v1::{
        self, AccessMode, BatchRefused, Codec, DurabilityLevel, OpenPublish, PayloadFormat,
        PublishFrame, PublishOpened, PublishReply, RecordIndex, publish_frame::Frame,
        publish_reply::Reply,
    },
};
use geminga_runtime::{random::Random, telemetry::TraceContext};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{
    batcher::{Asks, Batcher, Batching, Cut, Queued, Waiters},
    chain::{Chain, Link, Placed, Refusal},
};
use crate::{
    backoff::Backoff,
    codec::{Compression, compress},
    connection::{Connections, Way},
    error::{Error, because},
    layout::LayoutWatch,
    message::{Level, MessageId, Receipt},
};

/// Time for a stream to be opened; the server may have to load the segment first.
const OPEN_TIMEOUT: Duration = Duration::from_secs(20);
/// A stream that owes us answers or credit and says nothing for this long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// No producer comes here by counting messages.
const SEQUENCE_END: u64 = 1 << 62;
/// Frames handed to the connection and not yet taken by it.
const OUTGOING_FRAMES_MAX: usize = 16;
/// Full batches that wait in the batcher; past that the queue of messages is not read.
const FULL_BATCHES_MAX: usize = 16;
/// Commands taken in one turn of the loop.
const COMMANDS_MAX: usize = 256;

/// What every segment's stream of a producer has in common.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) batching: Batching,
    pub(super) compression: Compression,
    pub(super) name: Option<ProducerName>,
    pub(super) message_timeout: Duration,
    pub(super) first_stream: u64,
    pub(super) access: AccessMode,
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

/// A sealed batch.
struct Content {
    codec: Codec,
    payload: Bytes,
    uncompressed: u32,
    index: RecordIndex,
    /// The first message's place among all of this stream.
    number: u64,
    asks: Asks,
    waiters: Waiters,
    trace: Option<TraceContext>,
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

/// The state of the connection.
enum Line {
    Idle,
    Waiting { until: Instant },
    Opening(BoxFuture<'static, Result<Box<Opened>, Error>>),
    Open(Box<OpenLine>),
}

struct Opened {
    frames: mpsc::Sender<PublishFrame>,
    replies: Streaming<PublishReply>,
    answer: PublishOpened,
}

struct OpenLine {
    frames: mpsc::Sender<PublishFrame>,
    replies: Streaming<PublishReply>,
    granted_batches: u64,
    granted_bytes: u64,
    sent_batches: u64,
    sent_bytes: u64,
    /// The server asked us to leave by then.
    leave_by: Option<Instant>,
    /// Since when it owes us something and says nothing.
    silent_since: Option<Instant>,
}

enum Event {
    Retry,
    Opened(Result<Box<Opened>, Error>),
    Reply(Result<Option<PublishReply>, Error>),
    /// The connection takes frames again.
    Room,
    Commands,
    HandlesGone,
    Timer,
}

impl Line {
    /// The next thing that the connection does; never, while idle. `wants_room`: frames wait to be sent.
    async fn next(&mut self, wants_room: bool) -> Event {
        match self {
            Self::Idle => std::future::pending().await,
            Self::Waiting { until } => {
                sleep_until(*until).await;
                Event::Retry
            }
            Self::Opening(opening) => Event::Opened(opening.await),
            Self::Open(line) => tokio::select! {
                biased;
                reply = line.replies.message() => Event::Reply(reply.map_err(Error::from)),
                room = line.frames.reserve(), if wants_room => match room {
                    Ok(_) => Event::Room,
                    // The connection takes no more frames; why is what the server says last.
                    Err(_) => Event::Reply(line.replies.message().await.map_err(Error::from)),
                },
            },
        }
    }
}

impl OpenLine {
    /// Whether a batch may be sent. It may begin while some byte credit is left, whatever its size: a batch cannot be cut,
    /// and one that is larger than what is ever granted at once must not wait for ever.
    fn takes(&self) -> bool {
        self.leave_by.is_none()
            && self.sent_batches < self.granted_batches
            && self.sent_bytes < self.granted_bytes
    }
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
                event = self.line.next(wants_room) => event,
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
            Event::Retry => self.line = Line::Idle, // connect() opens it if there is work
            Event::Opened(Ok(opened)) => self.on_opened(*opened),
            Event::Opened(Err(error)) => {
                // It may have been granted all the same: then our own later epoch must not count as somebody else's.
                let refused = error.reason().is_some() && error.retry() == Retry::Safe;
                self.held_epoch = self.held_epoch.filter(|_| refused);
                self.on_broken(error, now);
            }
            Event::Reply(Ok(Some(reply))) => self.on_reply(reply, now),
            Event::Reply(Ok(None)) => {
                self.on_broken(Error::Unavailable("the server ended the stream".into()), now)
            }
            Event::Reply(Err(error)) => self.on_broken(error, now),
            Event::Commands => {
                for command in commands.drain(..) {
                    self.on_command(command, now);
                }
            }
            Event::HandlesGone => self.closing = true,
            Event::Room | Event::Timer => {}
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

    fn on_opened(&mut self, opened: Opened) {
        let Opened { frames, replies, answer } = opened;
        tracing::debug!(
            topic = %self.topic, segment = self.segment, producer = answer.producer_name,
            persisted = answer.last_persisted_sequence, "publish stream open"
        );
        for stored in self.chain.on_opened(answer.last_persisted_sequence) {
            // Stored before the break; where exactly was in the receipt that got lost.
            self.settle(stored, None);
        }
        self.resume_token = answer.resume_token;
        self.held_epoch = Some(answer.producer_epoch).filter(|epoch| *epoch > 0);
        self.line = Line::Open(Box::new(OpenLine {
            frames,
            replies,
            granted_batches: answer.granted_batches,
            granted_bytes: answer.granted_bytes,
            sent_batches: 0,
            sent_bytes: 0,
            leave_by: None,
            silent_since: None,
        }));
        self.hold_until = None;
    }

    fn on_reply(&mut self, reply: PublishReply, now: Instant) {
        let Line::Open(line) = &mut self.line else { return };
        line.silent_since = None;
        match reply.reply {
            Some(Reply::Receipt(receipt)) => {
                self.backoff.reset();
                if let Some(link) = self.chain.on_stored(receipt.hi_sequence) {
                    self.settle(link, Some(&receipt));
                }
            }
            Some(Reply::Refused(refused)) => self.on_refused(refused, now),
            Some(Reply::Credit(credit)) => {
                // Absolute totals: a late frame takes nothing back.
                line.granted_batches = line.granted_batches.max(credit.granted_batches);
                line.granted_bytes = line.granted_bytes.max(credit.granted_bytes);
            }
            Some(Reply::GoAway(go_away)) => {
                line.leave_by = Some(now + Duration::from_millis(u64::from(go_away.drain_by_ms)));
                self.way.on_go_away(go_away);
            }
            Some(Reply::Opened(_) | Reply::Pong(_)) | None => {}
        }
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

    fn settle(&mut self, link: Link<Content>, receipt: Option<&v1::Receipt>) {
        self.trouble = None;
        let base = receipt.map(|receipt| receipt.base_offset).filter(|base| *base != u64::MAX);
        let answer = Receipt {
            segment: self.segment,
            id: None,
            level: receipt.map_or(Level::Unknown, |receipt| {
                Level::of(DurabilityLevel::try_from(receipt.level).unwrap_or_default())
            }),
            epoch: receipt.map_or(0, |receipt| receipt.epoch),
            duplicate: receipt.is_none_or(|receipt| receipt.duplicate),
        };
        link.content.waiters.answer(|place| {
            let id = base.map(|base| MessageId {
                segment: self.segment,
                offset: base.saturating_add(place),
            });
            Ok(Receipt { id, ..answer })
        });
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
            fail([link.content.waiters], &error);
        }
        let unsent = self.batcher.expire(now);
        fail(unsent, &self.not_sent());
        if let Line::Open(line) = &self.line {
            let left = line.leave_by.is_some_and(|by| now >= by || self.chain.nothing_in_flight());
            if line.silent_since.is_some_and(|since| now >= since + SILENCE_MAX) {
                self.on_broken(
                    Error::Unavailable("the server owes answers and is silent".into()),
                    now,
                );
            } else if left {
                self.chain.on_broken();
                self.line = Line::Waiting { until: now + self.backoff.pause(None) };
            }
        }
    }

    /// Notes since when the server owes us something: answers, credit, or the word that it takes no more frames.
    fn watch_silence(&mut self, now: Instant) {
        let settled = self.is_settled();
        let Line::Open(line) = &mut self.line else { return };
        let owes = !self.chain.nothing_in_flight()
            || (!settled && (!line.takes() || line.frames.is_closed()));
        line.silent_since = owes.then(|| line.silent_since.unwrap_or(now));
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
                if !line.takes() || line.frames.capacity() == 0 {
                    return line.frames.capacity() == 0 && !self.batcher.is_empty();
                }
                let idle = self.chain.nothing_in_flight();
                let Some(cut) = self.batcher.cut(now, idle, flush) else { return false };
                let (count, deadline) = (cut.waiters.len() as u64, cut.deadline);
                let sequence = cut.asks.sequence;
                let content = seal(cut, self.settings.compression);
                match sequence {
                    None => self.chain.push(count, deadline, content),
                    Some(sequence) => {
                        place(&mut self.chain, self.segment, sequence, deadline, content)
                    }
                }
                continue;
            }
            let Some(next) = self.chain.sendable() else { return false };
            let bytes = next.content.payload.len();
            if !line.takes() {
                return false;
            }
            let Ok(room) = line.frames.try_reserve() else { return true };
            let Some((prev, link)) = self.chain.send() else { return false };
            room.send(frame(prev, link));
            line.sent_batches += 1;
            line.sent_bytes += bytes as u64;
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
        };
        self.stream_number += 1;
        let connections = self.connections.clone();
        self.line = Line::Opening(Box::pin(async move {
            timeout(OPEN_TIMEOUT, open_stream(connections, owner, open)).await.unwrap_or_else(
                |_| Err(Error::Unavailable("the stream was not opened in time".into())),
            )
        }));
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
            let linger = self.batcher.due().filter(|_| can_cut && line.frames.capacity() > 0);
            let silence = line.silent_since.map(|since| since + SILENCE_MAX);
            due = [due, linger, silence, line.leave_by].into_iter().flatten().min();
        }
        due
    }
}

fn seal(cut: Cut, compression: Compression) -> Content {
    let uncompressed = cut.records.len() as u32;
    let (codec, payload) = compress(cut.records, compression);
    Content {
        codec,
        payload,
        uncompressed,
        index: RecordIndex {
            key_hash: cut.hashes,
            has_key: cut.has_key,
            deliver_at_ms: cut.deliver_at_ms,
        },
        asks: cut.asks,
        number: cut.number,
        waiters: cut.waiters,
        trace: cut.trace,
    }
}

/// A batch with a sequence of its own: it waits to be sent, or is answered at once.
fn place(
    chain: &mut Chain<Content>,
    segment: u32,
    sequence: u64,
    deadline: Instant,
    content: Content,
) {
    match chain.push_at(sequence, deadline, content) {
        Placed::Waits => {}
        Placed::Stored(content) => content.waiters.answer(|_| {
            let level = Level::Unknown;
            Ok(Receipt { segment, id: None, level, epoch: 0, duplicate: true })
        }),
        Placed::Behind(content) => {
            let words = format!("sequence {sequence} is not above those before it");
            fail([content.waiters], &Error::refused(Reason::SequenceConflict, words));
        }
    }
}

fn frame(prev: u64, link: &Link<Content>) -> PublishFrame {
    let content = &link.content;
    PublishFrame {
        frame: Some(Frame::Batch(v1::Batch {
            prev_sequence: prev,
            lo_sequence: link.lo,
            hi_sequence: link.hi,
            format: PayloadFormat::Native.into(),
            codec: content.codec.into(),
            uncompressed_size: content.uncompressed,
            index: Some(content.index.clone()),
            count: content.waiters.len() as u32,
            payload: content.payload.clone(),
            traceparent: content.trace.map(|trace| trace.to_string()).unwrap_or_default(),
            expected_offset: content.asks.expected_offset,
        })),
    }
}

fn fail(waiters: impl IntoIterator<Item = Waiters>, error: &Error) {
    for waiters in waiters {
        waiters.answer(|_| Err(error.clone()));
    }
}

/// What was in flight on a stream that is gone may have been stored; the rest was not.
fn fail_link(link: Link<Content>, error: &Error) {
    if link.uncertain {
        fail([link.content.waiters], &Error::Indeterminate(error.to_string()));
    } else {
        fail([link.content.waiters], error);
    }
}

async fn open_stream(
    connections: Connections,
    owner: Option<String>,
    open: OpenPublish,
) -> Result<Box<Opened>, Error> {
    let (frames, outgoing) = mpsc::channel(OUTGOING_FRAMES_MAX);
    let first = PublishFrame { frame: Some(Frame::Open(open)) };
    frames.try_send(first).expect("a new queue has room");
    let mut client = connections.publisher(owner.as_deref());
    let mut replies = client.publish_stream(ReceiverStream::new(outgoing)).await?.into_inner();
    match replies.message().await?.and_then(|reply| reply.reply) {
        Some(Reply::Opened(answer)) if answer.last_persisted_sequence < SEQUENCE_END => {
            Ok(Box::new(Opened { frames, replies, answer }))
        }
        Some(Reply::GoAway(_)) | None => {
            Err(Error::Unavailable("the server ended the stream".into()))
        }
        Some(_) => Err(Error::refused(
            Reason::UnexpectedFrame,
            "the server answered the open with something else",
        )),
    }
}
