//! The publish stream of one segment, from its opening to its end: frames out, replies in, credit, signs of life.

use std::time::Duration;

use futures::future::BoxFuture;
use geminga_proto::{
    reason::Reason,
    v1::{
        OpenPublish, Ping, PublishCredit, PublishFrame, PublishOpened, PublishReply,
        publish_frame::Frame, publish_reply::Reply,
    },
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::{
    connection::Connections,
    error::Error,
    heartbeat::{Due, Heartbeat, Interval},
};

/// Time for a stream to be opened; the server may have to load the segment first.
const OPEN_TIMEOUT: Duration = Duration::from_secs(20);
/// A stream that owes us answers or credit and gives no sign of life for so long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// As long as it gives signs of life it is believed to hold them back for a reason, such as a rate limit, but not for ever.
const OWED_MAX: Duration = Duration::from_secs(120);
/// No producer comes here by counting messages.
const SEQUENCE_END: u64 = 1 << 62;
/// Frames handed to the connection and not yet taken by it.
const OUTGOING_FRAMES_MAX: usize = 16;

/// The state of the connection.
pub(super) enum Line {
    Idle,
    Waiting { until: Instant },
    Opening(BoxFuture<'static, Result<Box<Opened>, Error>>),
    Open(Box<OpenLine>),
}

/// What the connection does next.
pub(super) enum Event {
    Retry,
    Opened(Result<Box<Opened>, Error>),
    Reply(Result<Option<PublishReply>, Error>),
    /// It takes frames again.
    Room,
}

pub(super) struct Opened {
    frames: mpsc::Sender<PublishFrame>,
    replies: Streaming<PublishReply>,
    pub(super) answer: PublishOpened,
}

pub(super) struct OpenLine {
    frames: mpsc::Sender<PublishFrame>,
    replies: Streaming<PublishReply>,
    granted_batches: u64,
    granted_bytes: u64,
    sent_batches: u64,
    sent_bytes: u64,
    heartbeat: Heartbeat,
    opened_at: Instant,
    /// The server asked us to leave by then.
    leave_by: Option<Instant>,
    /// Since when it owes us something and gives none of it, and since when no sign of life either.
    owes: Option<Owes>,
}

#[derive(Clone, Copy)]
struct Owes {
    since: Instant,
    silent_since: Instant,
}

impl Owes {
    fn until(self) -> Instant {
        (self.silent_since + SILENCE_MAX).min(self.since + OWED_MAX)
    }
}

impl Line {
    /// The next thing that the connection does; never, while idle. `wants_room`: frames wait to be sent. Cancel-safe.
    pub(super) async fn next(&mut self, wants_room: bool) -> Event {
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
    pub(super) fn new(opened: Opened, interval: Interval, now: Instant) -> Self {
        let Opened { frames, replies, answer } = opened;
        Self {
            frames,
            replies,
            granted_batches: answer.granted_batches,
            granted_bytes: answer.granted_bytes,
            sent_batches: 0,
            sent_bytes: 0,
            heartbeat: Heartbeat::new(interval, now),
            opened_at: now,
            leave_by: None,
            owes: None,
        }
    }

    /// Since when it is open.
    pub(super) fn opened_at(&self) -> Instant {
        self.opened_at
    }

    /// Whether a batch may be sent. It may begin while some byte credit is left, whatever its size: a batch cannot be cut,
    /// and one that is larger than what is ever granted at once must not wait for ever.
    pub(super) fn takes(&self) -> bool {
        self.leave_by.is_none()
            && self.sent_batches < self.granted_batches
            && self.sent_bytes < self.granted_bytes
    }

    /// Whether the connection takes another frame now.
    pub(super) fn has_room(&self) -> bool {
        !self.frames.is_closed() && self.frames.capacity() > 0
    }

    /// Sends a batch, for which there is room, with so many bytes of payload.
    pub(super) fn send(&mut self, batch: PublishFrame, bytes: usize, now: Instant) {
        if self.frames.try_send(batch).is_ok() {
            self.heartbeat.on_said(now);
        }
        self.sent_batches += 1;
        self.sent_bytes += bytes as u64;
    }

    /// Any reply; `answers`: one that is more than a sign of life.
    pub(super) fn on_heard(&mut self, answers: bool, now: Instant) {
        self.heartbeat.on_heard(now);
        match &mut self.owes {
            Some(owes) if !answers => owes.silent_since = now,
            owes => *owes = None,
        }
    }

    /// Absolute totals: a late frame takes nothing back.
    pub(super) fn on_credit(&mut self, credit: PublishCredit) {
        self.granted_batches = self.granted_batches.max(credit.granted_batches);
        self.granted_bytes = self.granted_bytes.max(credit.granted_bytes);
    }

    pub(super) fn on_go_away(&mut self, drain_by_ms: u32, now: Instant) {
        self.leave_by = Some(now + Duration::from_millis(u64::from(drain_by_ms)));
    }

    /// The server asked us to leave.
    pub(super) fn is_to_leave(&self) -> bool {
        self.leave_by.is_some()
    }

    /// Time to leave, with or without the answers that are missing.
    pub(super) fn leaves(&self, nothing_in_flight: bool, now: Instant) -> bool {
        self.leave_by.is_some_and(|by| nothing_in_flight || now >= by)
    }

    /// Notes since when the server owes us something. `unanswered`: batches are in flight; `unsent`: messages wait.
    pub(super) fn watch(&mut self, unanswered: bool, unsent: bool, now: Instant) {
        let owes = unanswered || (unsent && (!self.takes() || self.frames.is_closed()));
        let since = Owes { since: now, silent_since: now };
        self.owes = owes.then(|| self.owes.unwrap_or(since));
    }

    /// Gives a sign of life if one is due.
    ///
    /// # Errors
    /// What the stream is given up for.
    pub(super) fn look_alive(&mut self, now: Instant) -> Result<(), Error> {
        if self.owes.is_some_and(|owes| now >= owes.until()) {
            return Err(Error::Unavailable("the server owes answers and is silent".into()));
        }
        match self.heartbeat.due(now) {
            Due::Nothing => {}
            Due::Ping => {
                let ping = PublishFrame { frame: Some(Frame::Ping(Ping { token: 0 })) };
                let _ = self.frames.try_send(ping); // full: the server does not read, as the heartbeat notices
                self.heartbeat.on_pinged(now);
            }
            Due::GiveUp => return Err(Error::Unavailable("the server is silent".into())),
        }
        Ok(())
    }

    /// When something is due on this stream though nothing happens.
    pub(super) fn next_due(&self) -> Instant {
        let owed = self.owes.map(Owes::until);
        [owed, self.leave_by].into_iter().flatten().fold(self.heartbeat.next(), Instant::min)
    }
}

/// Opens a stream at the owner, or the configured server.
///
/// # Errors
/// The refusal, or what kept the stream from being opened.
pub(super) async fn open_stream(
    connections: Connections,
    owner: Option<String>,
    open: OpenPublish,
) -> Result<Box<Opened>, Error> {
    let opening = async {
        let (frames, outgoing) = mpsc::channel(OUTGOING_FRAMES_MAX);
        let first = PublishFrame { frame: Some(Frame::Open(open)) };
        frames.try_send(first).expect("a new queue has room");
        let (mut client, place) = connections.publisher(owner.as_deref());
        let outgoing = place.with(ReceiverStream::new(outgoing));
        let mut replies = client.publish_stream(outgoing).await?.into_inner();
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
    };
    timeout(OPEN_TIMEOUT, opening)
        .await
        .unwrap_or_else(|_| Err(Error::Unavailable("the stream was not opened in time".into())))
}
