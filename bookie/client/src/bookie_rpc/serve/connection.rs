//! One connection of the bookie's side. One loop; the answers of the bookie come in whatever order.

use std::{collections::VecDeque, convert::Infallible, io, pin::pin};

use bytes::Buf;
use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, sleep_until},
};

use super::{Held, Shared};
use crate::bookie_rpc::{
    ReadRequest,
    frame::{Frame, FrameError, Inbox, Kind, Outbox, PRELUDE_BYTES},
    transfer::{ping, transfer},
    wire::{Reply, Request},
};

/// What a request is charged besides its bytes, bytes.
const REQUEST_BYTES: usize = 512;
/// A READ is cut to this many payload bytes (and one entry more), so that its answer fits a frame, bytes.
const READ_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Reads that wait for room; beyond that nothing more is read from the connection.
const READS_WAITING_MAX: usize = 1_024;
/// What an answer with a list is charged ahead; most are far smaller, bytes.
const LIST_BYTES: usize = 64 * 1024;
/// Answers taken in one turn before the socket gets its turn.
const ANSWERS_PER_TURN: usize = 256;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error("the bookie is stopping")]
    Closing,
    #[error("the peer closed it")]
    Closed,
    #[error("it broke: {0}")]
    Broken(#[from] io::Error),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("the peer does not take its answers")]
    Stalled,
    #[error("the peer is silent")]
    Silent,
}

/// An answer, the request's id, and what the request was charged.
struct Answered {
    id: u64,
    reply: Reply,
    charge: usize,
    read: bool,
}

pub(super) struct Connection<'a> {
    shared: &'a Shared,
    answers: FuturesUnordered<BoxFuture<'static, Answered>>,
    outbox: Outbox,
    /// Requests that are not answered.
    held: Held,
    /// Reads may use half of the room; those beyond wait here, and the adds behind them do not.
    reads_waiting: VecDeque<(u64, ReadRequest)>,
    reads_held: usize,
}

impl<'a> Connection<'a> {
    pub(super) fn new(shared: &'a Shared) -> Self {
        Self {
            shared,
            answers: FuturesUnordered::new(),
            outbox: Outbox::default(),
            held: Held::new(&shared.memory),
            reads_waiting: VecDeque::new(),
            reads_held: 0,
        }
    }

    pub(super) async fn run(
        mut self,
        reader: &mut (impl AsyncRead + Unpin),
        writer: &mut (impl AsyncWrite + Unpin),
    ) -> End {
        let Err(end) = self.converse(reader, writer).await;
        end
    }

    async fn converse(
        &mut self,
        reader: &mut (impl AsyncRead + Unpin),
        writer: &mut (impl AsyncWrite + Unpin),
    ) -> Result<Infallible, End> {
        let Shared { config, metrics, closing, memory, .. } = self.shared;
        let mut inbox = Inbox::default();
        let mut heard = Instant::now();
        // Since when answers wait for the socket and it takes none.
        let mut stalled: Option<Instant> = None;
        let mut timer = pin!(sleep_until(Instant::now()));
        loop {
            let here = self.held.bytes + self.outbox.remaining() < config.connection_bytes_max
                && self.reads_waiting.len() < READS_WAITING_MAX;
            let reads = here && memory.has_room();
            let now = Instant::now();
            stalled = self.outbox.has_remaining().then(|| stalled.unwrap_or(now));
            let cut_at = stalled.map(|since| since + config.write_stall);
            if cut_at.is_some_and(|at| now >= at) {
                return Err(End::Stalled);
            }
            if !reads {
                heard = now; // not listened to: it cannot be called silent
            } else if now >= heard + config.silence_max {
                return Err(End::Silent);
            }
            let at = heard + config.silence_max;
            let at = cut_at.map_or(at, |cut| cut.min(at));
            if timer.deadline() != at {
                timer.as_mut().reset(at);
            }
            let inbox_now = reads.then_some(&mut inbox);
            let moved = tokio::select! {
                biased;
                () = closing.cancelled() => return Err(End::Closing),
                Some(answered) = self.answers.next() => {
                    self.take_answers(answered)?;
                    continue;
                }
                moved = transfer(reader, inbox_now, writer, &mut self.outbox) => moved?,
                () = memory.room(), if here && !reads => continue,
                () = &mut timer => continue,
            };
            if moved.written > 0 {
                metrics.bytes_out.inc_by(moved.written as u64);
                stalled = None;
            }
            let Some(count) = moved.read else { continue };
            if count == 0 {
                return Err(End::Closed);
            }
            metrics.bytes_in.inc_by(count as u64);
            heard = Instant::now();
            while let Some(frame) = inbox.next_frame()? {
                metrics.frames_in.inc();
                self.hear(frame, heard)?;
            }
        }
    }

    /// Carries a request out; in the order of arrival, because every call is in its place when it returns.
    fn hear(&mut self, frame: Frame, now: Instant) -> Result<(), End> {
        match frame.kind {
            Kind::Ping => return Ok(ping(Kind::Pong, &mut self.outbox)?),
            Kind::Pong => return Ok(()),
            _ => {}
        }
        let mut bytes = PRELUDE_BYTES + frame.header.len() + frame.payload.len() + REQUEST_BYTES;
        let (id, request) = Request::decode(frame, now)?;
        let bookie = &self.shared.bookie;
        let id = id.unwrap_or_default();
        let answer = match request {
            Request::WriteLac { to, ledger, lac } => {
                // Nobody is told: what matters is that it happens before what comes behind it.
                let _ = bookie.write_lac(to, ledger, lac).now_or_never();
                return Ok(());
            }
            Request::Read(read) if !read.fence && self.reads_are_many(&read) => {
                self.reads_waiting.push_back((id, read));
                return Ok(());
            }
            Request::Read(read) => return self.read(id, read),
            Request::Add(add) => bookie.add(add).map(Reply::Add).boxed(),
            Request::Fence(fence) => {
                bytes += fence.list.map_or(0, |_| LIST_BYTES);
                bookie.fence(fence).map(Reply::Fence).boxed()
            }
            Request::ReadLac { to, ledger, deadline } => {
                bookie.read_lac(to, ledger, deadline).map(Reply::ReadLac).boxed()
            }
            Request::List { to, ledger, range, deadline } => {
                bytes += LIST_BYTES;
                bookie.list(to, ledger, range, deadline).map(Reply::List).boxed()
            }
        };
        self.await_answer(id, answer, bytes, false)
    }

    fn reads_are_many(&self, next: &ReadRequest) -> bool {
        let room = self.shared.config.connection_bytes_max / 2;
        !self.reads_waiting.is_empty()
            || (self.reads_held > 0 && self.reads_held + read_charge(next) > room)
    }

    fn read(&mut self, id: u64, mut read: ReadRequest) -> Result<(), End> {
        let charge = read_charge(&read);
        read.bytes_max = read.bytes_max.min(READ_BYTES_MAX);
        self.reads_held += charge;
        let answer = self.shared.bookie.read(read).map(Reply::Read).boxed();
        self.await_answer(id, answer, charge, true)
    }

    fn await_answer(
        &mut self,
        id: u64,
        mut answer: BoxFuture<'static, Reply>,
        charge: usize,
        read: bool,
    ) -> Result<(), End> {
        self.held.take(charge);
        if let Some(reply) = (&mut answer).now_or_never() {
            return self.answer(Answered { id, reply, charge, read });
        }
        self.answers.push(answer.map(move |reply| Answered { id, reply, charge, read }).boxed());
        Ok(())
    }

    /// Takes every answer that is there, so that they leave in one flush.
    fn take_answers(&mut self, first: Answered) -> Result<(), End> {
        self.answer(first)?;
        for _ in 1..ANSWERS_PER_TURN {
            let Some(Some(answered)) = self.answers.next().now_or_never() else { break };
            self.answer(answered)?;
        }
        while let Some((_, next)) = self.reads_waiting.front() {
            let room = self.shared.config.connection_bytes_max / 2;
            if self.reads_held > 0 && self.reads_held + read_charge(next) > room {
                break;
            }
            let Some((id, read)) = self.reads_waiting.pop_front() else { break };
            self.read(id, read)?;
        }
        Ok(())
    }

    fn answer(&mut self, answered: Answered) -> Result<(), End> {
        let Answered { id, reply, charge, read } = answered;
        self.held.give_back(charge);
        if read {
            self.reads_held -= charge;
        }
        self.shared.metrics.frames_out.inc();
        Ok(reply.encode(id, &mut self.outbox)?)
    }
}

/// What its answer may hold, bytes.
fn read_charge(read: &ReadRequest) -> usize {
    read.bytes_max.min(READ_BYTES_MAX) + REQUEST_BYTES
}
