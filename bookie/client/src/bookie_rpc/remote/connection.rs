//! The task that owns the connection to one bookie: connects, sends what waits, hands out answers, watches deadlines. One
//! loop. It ends when the connection does; the next request starts another.

use std::{io, pin::pin, sync::Arc, time::Duration};

use bytes::Buf;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::{Instant, sleep_until, timeout},
};

use super::{Peer, Unknown};
use crate::bookie_rpc::{
    AddAnswer, FenceAnswer, LacAnswer, ListAnswer,
    frame::{Frame, FrameError, Inbox, Kind, Outbox},
    handshake::{self, HandshakeError},
    transfer::{Moved, ping, transfer},
    wire::Reply,
};
use crate::metrics::Counted;

/// Frames are taken from the queue until so many bytes wait for the socket; what is behind can still expire or fail.
const FLUSH_BYTES: usize = 256 * 1024;

/// Owns the connection; dropped, however the task ends, it answers everything that still waits.
pub(super) struct Connection {
    peer: Arc<Peer>,
    established: bool,
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("no address is known")]
    NoAddress,
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error("the connection broke: {0}")]
    Broken(#[from] io::Error),
    #[error("the bookie closed the connection")]
    Closed,
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("the bookie is silent")]
    Silent,
    #[error("another incarnation lives at the address")]
    Moved,
    #[error("the bookie is gone, and nothing waits for it")]
    Idle,
    #[error("the process is stopping")]
    Stopped,
}

impl Connection {
    pub(super) fn new(peer: Arc<Peer>) -> Self {
        Self { peer, established: false }
    }

    pub(super) async fn run(mut self) {
        let token = self.peer.shared.tasks.token();
        let end = tokio::select! {
            biased;
            () = token.cancelled() => End::Stopped,
            end = self.live() => end,
        };
        let bookie = self.peer.incarnation.0;
        if self.established {
            tracing::info!(bookie, %end, "connection to bookie ended");
        } else {
            self.peer.shared.metrics.connects_failed.inc();
            tracing::info!(bookie, %end, "bookie cannot be reached");
        }
        // The address may be stale; looking again is bounded.
        if !matches!(end, End::Idle | End::Stopped) {
            self.peer.shared.resolver.look_again();
        }
    }

    /// Over a stream whose handshake is done.
    #[cfg(test)]
    pub(super) async fn run_over(mut self, stream: tokio::io::DuplexStream) -> String {
        self.established = true;
        let peer = Arc::clone(&self.peer);
        let (mut reader, mut writer) = tokio::io::split(stream);
        let Err(end) = converse(&peer, &mut reader, &mut writer).await;
        end.to_string()
    }

    async fn live(&mut self) -> End {
        let peer = Arc::clone(&self.peer);
        let stream = {
            let mut dial = pin!(dial(&peer));
            loop {
                let next = peer.state.lock().calls.next_deadline();
                let far = Instant::now() + peer.shared.config.connect_timeout;
                tokio::select! {
                    biased;
                    stream = &mut dial => break stream,
                    () = sleep_until(next.unwrap_or(far)) => {
                        peer.state.lock().calls.expire(Instant::now());
                    }
                    () = peer.wake.notified() => {}
                }
            }
        };
        let mut stream = match stream {
            Ok(stream) => stream,
            Err(end) => return end,
        };
        self.established = true;
        peer.state.lock().failures = 0;
        let _counted = Counted::new(&peer.shared.metrics.connections);
        let (mut reader, mut writer) = stream.split();
        let Err(end) = converse(&peer, &mut reader, &mut writer).await;
        end
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let config = &self.peer.shared.config;
        let mut state = self.peer.state.lock();
        let pause = config.retry_min * (1u32 << state.failures.min(10));
        let pause = pause.min(config.retry_max);
        let half = pause.as_micros() as u64 / 2;
        let jitter = Duration::from_micros(self.peer.shared.random.below(half + 1));
        state.failures += 1;
        state.retry_at = Some(Instant::now() + pause - jitter);
        state.connected = false;
        state.calls.fail_all(&Unknown::Disconnected);
    }
}

async fn dial(peer: &Peer) -> Result<TcpStream, End> {
    let config = &peer.shared.config;
    let address = peer.shared.resolver.address(peer.incarnation).ok_or(End::NoAddress)?;
    let late = || io::Error::from(io::ErrorKind::TimedOut);
    let connect = timeout(config.connect_timeout, TcpStream::connect(&*address));
    let mut stream = connect.await.unwrap_or_else(|_| Err(late())).map_err(End::Connect)?;
    stream.set_nodelay(true)?;
    let shake = handshake::ask(&mut stream, &config.cluster_id);
    let shaken = timeout(config.connect_timeout, shake).await;
    shaken.unwrap_or_else(|_| Err(late().into()))?;
    Ok(stream)
}

/// Sends and receives until something ends the connection; `Ok` never comes.
async fn converse(
    peer: &Peer,
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
) -> Result<std::convert::Infallible, End> {
    let metrics = &peer.shared.metrics;
    let (mut inbox, mut outbox) = (Inbox::default(), Outbox::default());
    let mut life = Life::new(Instant::now());
    let mut timer = pin!(sleep_until(Instant::now()));
    loop {
        let at = {
            let mut state = peer.state.lock();
            let now = Instant::now();
            state.calls.expire(now);
            let mut frames = 0;
            while outbox.remaining() < FLUSH_BYTES {
                let Some((id, request)) = state.calls.next() else { break };
                match request.encode(id, now, &mut outbox) {
                    Ok(()) => frames += 1,
                    Err(error) => state.calls.fail(id, Unknown::Refused(error.to_string())),
                }
            }
            metrics.frames_out.inc_by(frames);
            let (at, step) = life.next(state.calls.waiting_since(), peer);
            let step = step.filter(|_| at <= now);
            let deadline = state.calls.next_deadline();
            drop(state);
            match step {
                None => deadline.map_or(at, |deadline| deadline.min(at)),
                Some(Step::Ping) => {
                    life.pinged = Some(now);
                    ping(Kind::Ping, &mut outbox)?;
                    continue;
                }
                Some(Step::End(end)) => return Err(end),
            }
        };
        if timer.deadline() != at {
            timer.as_mut().reset(at);
        }
        let moved = tokio::select! {
            biased;
            moved = transfer(reader, Some(&mut inbox), writer, &mut outbox) => moved?,
            () = peer.wake.notified() => continue,
            () = &mut timer => continue,
        };
        let Moved { read, written } = moved;
        metrics.bytes_out.inc_by(written as u64);
        let Some(count) = read else { continue };
        if count == 0 {
            return Err(End::Closed);
        }
        metrics.bytes_in.inc_by(count as u64);
        life.heard(Instant::now());
        while let Some(frame) = inbox.next_frame()? {
            metrics.frames_in.inc();
            hear(peer, frame, &mut outbox)?;
        }
    }
}

fn hear(peer: &Peer, frame: Frame, outbox: &mut Outbox) -> Result<(), End> {
    match frame.kind {
        Kind::Pong => Ok(()),
        Kind::Ping => Ok(ping(Kind::Pong, outbox)?),
        _ => {
            let (id, reply) = Reply::decode(frame)?;
            let moved = is_wrong_incarnation(&reply);
            let mut state = peer.state.lock();
            let addressed_here = state.calls.is_for(id, peer.incarnation);
            if !state.calls.answer(id, reply) {
                return Err(FrameError::Malformed("an answer of another kind").into());
            }
            // Everything else on this connection would be refused as well; perhaps the address is stale.
            if moved && addressed_here { Err(End::Moved) } else { Ok(()) }
        }
    }
}

fn is_wrong_incarnation(reply: &Reply) -> bool {
    const WRONG: &Unknown = &Unknown::WrongIncarnation;
    match reply {
        Reply::Add(AddAnswer::Unknown(why))
        | Reply::Fence(FenceAnswer::Unknown(why))
        | Reply::ReadLac(LacAnswer::Unknown(why))
        | Reply::List(ListAnswer::Unknown(why)) => why == WRONG,
        Reply::Read(answer) => *answer == super::ReadAnswer::unknown(WRONG.clone()),
        _ => false,
    }
}

/// Whether the peer still lives, judged by when it was last heard.
struct Life {
    heard: Instant,
    pinged: Option<Instant>,
}

enum Step {
    Ping,
    End(End),
}

impl Life {
    fn new(now: Instant) -> Self {
        Self { heard: now, pinged: None }
    }

    fn heard(&mut self, now: Instant) {
        self.heard = now;
        self.pinged = None;
    }

    /// What to do next if nothing is heard until then, and when. While something waits, or a ping was sent: ask after half
    /// of the patience, end after all of it. Idle: show that both live, or end when the bookie is gone.
    fn next(&self, waiting_since: Option<Instant>, peer: &Peer) -> (Instant, Option<Step>) {
        let config = &peer.shared.config;
        match (waiting_since, self.pinged) {
            (Some(since), None) => {
                (self.heard.max(since) + config.silence_max / 2, Some(Step::Ping))
            }
            (Some(since), Some(pinged)) => {
                let end = (self.heard.max(since) + config.silence_max)
                    .max(pinged + config.silence_max / 2);
                (end, Some(Step::End(End::Silent)))
            }
            (None, Some(pinged)) => (pinged + config.silence_max, Some(Step::End(End::Silent))),
            (None, None) if peer.shared.resolver.is_registered(peer.incarnation) => {
                (self.heard + config.idle_ping, Some(Step::Ping))
            }
            (None, None) => (self.heard + config.idle_ping, Some(Step::End(End::Idle))),
        }
    }
}
