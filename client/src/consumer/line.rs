//! The consume stream of one segment, from its opening to its end: frames out, replies in, credit, signs of life.

use std::time::Duration;

use futures::future::BoxFuture;
use geminga_proto::{
    reason::Reason,
    v1::{
        ConsumeFrame, ConsumeOpened, ConsumeReply, Credit, Leave, OpenConsume, Ping,
        consume_frame::Frame, consume_reply::Reply,
    },
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout_at},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::Window;
use crate::{
    connection::Connections,
    error::Error,
    heartbeat::{Due, Heartbeat, Interval},
};

/// Frames handed to the connection and not yet taken by it.
const OUTGOING_FRAMES_MAX: usize = 64;
/// Time for the server to end a stream that was closed cleanly: it has then heard all of it.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// The state of the connection.
pub(super) enum Line {
    Waiting {
        until: Instant,
    },
    /// Everything is answered, and the consumer leaves: the server ends it.
    Closing(Closing),
    Opening(BoxFuture<'static, Result<Opened, Error>>),
    Open(Box<OpenLine>),
    Ended,
}

/// What the connection does next.
pub(super) enum Event {
    Retry,
    Opened(Result<Opened, Error>),
    Reply(Result<Option<ConsumeReply>, Error>),
    Closed,
}

pub(super) struct Closing {
    /// Our side, until the last frame is handed to the connection.
    frames: Option<mpsc::Sender<ConsumeFrame>>,
    /// It has messages to give back.
    leaves: bool,
    replies: Box<Streaming<ConsumeReply>>,
    until: Instant,
}

pub(super) struct Opened {
    frames: mpsc::Sender<ConsumeFrame>,
    replies: Streaming<ConsumeReply>,
    pub(super) answer: ConsumeOpened,
}

pub(super) struct OpenLine {
    frames: mpsc::Sender<ConsumeFrame>,
    replies: Streaming<ConsumeReply>,
    window: Window,
    granted_messages: u64,
    granted_bytes: u64,
    used_messages: u64,
    used_bytes: u64,
    heartbeat: Heartbeat,
    opened_at: Instant,
    /// The server asked us to leave by then.
    pub(super) leave_by: Option<Instant>,
    /// Of the last assignment.
    pub(super) assigned: u64,
    /// How far the server has read for a reader, until its pong says since when.
    pub(super) reader_at: Option<u64>,
}

impl Line {
    /// Cancel-safe.
    pub(super) async fn next(&mut self) -> Event {
        match self {
            Self::Ended => std::future::pending().await,
            Self::Waiting { until } => {
                sleep_until(*until).await;
                Event::Retry
            }
            Self::Closing(closing) => {
                closing.end().await;
                Event::Closed
            }
            Self::Opening(opening) => Event::Opened(opening.await),
            Self::Open(line) => Event::Reply(line.replies.message().await.map_err(Error::from)),
        }
    }
}

impl Closing {
    /// Says that the consumer goes for good, if it is one, and waits for the server's end. Cancel-safe.
    async fn end(&mut self) {
        if let Some(frames) = &self.frames
            && self.leaves
        {
            let leave = ConsumeFrame { frame: Some(Frame::Leave(Leave {})) };
            let _ = timeout_at(self.until, frames.send(leave)).await; // a stream that is gone needs none
        }
        self.frames = None;
        while let Ok(Ok(Some(_))) = timeout_at(self.until, self.replies.message()).await {}
    }
}

impl OpenLine {
    /// An opened stream, with the credit of its window.
    pub(super) fn new(opened: Opened, window: Window, interval: Interval, now: Instant) -> Self {
        let Opened { frames, replies, .. } = opened;
        let mut line = Self {
            frames,
            replies,
            window,
            granted_messages: 0,
            granted_bytes: 0,
            used_messages: 0,
            used_bytes: 0,
            heartbeat: Heartbeat::new(interval, now),
            opened_at: now,
            leave_by: None,
            assigned: 0,
            reader_at: None,
        };
        line.grant(0, 0, now);
        line
    }

    /// Since when it is open.
    pub(super) fn opened_at(&self) -> Instant {
        self.opened_at
    }

    /// Ends our side in good order. `leaves`: the consumer says that it goes for good.
    pub(super) fn close(self, leaves: bool, now: Instant) -> Closing {
        let Self { frames, replies, .. } = self;
        let until = now + CLOSE_TIMEOUT;
        Closing { frames: Some(frames), leaves, replies: Box::new(replies), until }
    }

    /// Whether the connection takes another frame now.
    pub(super) fn has_room(&self) -> bool {
        !self.frames.is_closed() && self.frames.capacity() > 0
    }

    /// False: the connection takes no more now.
    pub(super) fn send(&mut self, frame: Frame, now: Instant) -> bool {
        let sent = self.frames.try_send(ConsumeFrame { frame: Some(frame) }).is_ok();
        if sent {
            self.heartbeat.on_said(now);
        }
        sent
    }

    pub(super) fn on_heard(&mut self, now: Instant) {
        self.heartbeat.on_heard(now);
    }

    /// A delivery used so much; false if more than was granted. Bytes may run over by the rest of one batch: a batch cannot
    /// be cut. So what waits is bounded.
    pub(super) fn uses(&mut self, messages: u64, bytes: u64) -> bool {
        let spent = self.used_bytes >= self.granted_bytes;
        self.used_messages += messages;
        self.used_bytes += bytes;
        !spent && self.used_messages <= self.granted_messages
    }

    /// Grants what was handed out again, once that is half the window.
    pub(super) fn grant(&mut self, taken_messages: u64, taken_bytes: u64, now: Instant) {
        let messages = taken_messages + self.window.messages;
        let bytes = taken_bytes + self.window.bytes;
        let enough = messages >= self.granted_messages + self.window.messages.div_ceil(2)
            || bytes >= self.granted_bytes + self.window.bytes.div_ceil(2);
        if !enough || self.leave_by.is_some() {
            return;
        }
        if self.send(Frame::Credit(Credit { messages, bytes }), now) {
            self.granted_messages = messages;
            self.granted_bytes = bytes;
        }
    }

    /// When [`Self::look_alive`] is to be asked next.
    pub(super) fn quiet_until(&self) -> Instant {
        self.heartbeat.next()
    }

    /// Gives a sign of life if one is due; false: the server gives none.
    pub(super) fn look_alive(&mut self, now: Instant) -> bool {
        match self.heartbeat.due(now) {
            Due::Nothing => {}
            Due::Ping => self.ping(now),
            Due::GiveUp => return false,
        }
        true
    }

    /// Tells the credit again, which leaks nothing and heals a lost frame, and asks for a sign of life.
    pub(super) fn ping(&mut self, now: Instant) {
        let credit = Credit { messages: self.granted_messages, bytes: self.granted_bytes };
        for frame in [Frame::Credit(credit), Frame::Ping(Ping { token: 0 })] {
            self.send(frame, now); // full: the server does not read, as the heartbeat notices
        }
        self.heartbeat.on_pinged(now);
    }
}

/// Opens a stream at the owner, or the configured server.
///
/// # Errors
/// The refusal, or what kept the stream from being opened.
pub(super) async fn open_stream(
    connections: Connections,
    owner: Option<String>,
    open: OpenConsume,
) -> Result<Opened, Error> {
    let (frames, outgoing) = mpsc::channel(OUTGOING_FRAMES_MAX);
    let first = ConsumeFrame { frame: Some(Frame::Open(open)) };
    frames.try_send(first).expect("a new queue has room");
    let (mut client, place) = connections.subscriber(owner.as_deref());
    let outgoing = place.with(ReceiverStream::new(outgoing));
    let mut replies = client.consume(outgoing).await?.into_inner();
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
