//! A stream of a client, opened once more at the segment's owner; frames go both ways, in order, within a byte budget.

use std::{
    pin::{Pin, pin},
    sync::Arc,
    task::{self, Poll},
    time::Duration,
};

use futures::{FutureExt, Stream, StreamExt, future::BoxFuture};
use geminga_proto::{
    ids::SegmentId,
    reason::Reason,
    v1::{
        ConsumeFrame, ConsumeReply, GoAway, OpenConsume, OpenPublish, OwnerHint, PublishFrame,
        PublishReply, Route, consume_frame, consume_reply, publish_frame, publish_reply,
    },
};
use geminga_runtime::budget::{ByteBudget, Permit};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};
use tonic::{Request, Status, Streaming};

use super::relayed;
use crate::{
    context::Shared,
    errors::{Refusal, unreadable},
    listener::{Connection, Outbox},
    ownership::{Found, loading},
};

/// Frames on their way to the owner, of one stream.
const FRAMES_MAX: usize = 16;
/// Pause before the owner is looked for again, after the one asked was not it.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Bytes of payload in a frame.
trait Weighed {
    fn payload_bytes(&self) -> u64;
}

impl Weighed for PublishFrame {
    fn payload_bytes(&self) -> u64 {
        match &self.frame {
            Some(publish_frame::Frame::Batch(batch)) => batch.payload.len() as u64,
            _ => 0,
        }
    }
}

impl Weighed for PublishReply {
    fn payload_bytes(&self) -> u64 {
        0
    }
}

impl Weighed for ConsumeFrame {
    fn payload_bytes(&self) -> u64 {
        0
    }
}

impl Weighed for ConsumeReply {
    fn payload_bytes(&self) -> u64 {
        match &self.reply {
            Some(consume_reply::Reply::Delivery(delivery)) => delivery.payload.len() as u64,
            _ => 0,
        }
    }
}

/// Frames to the owner; each gives its bytes back when the transport takes it.
struct ToOwner<F>(mpsc::Receiver<(F, Option<Permit>)>);

impl<F> Stream for ToOwner<F> {
    type Item = F;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut task::Context<'_>) -> Poll<Option<F>> {
        self.0.poll_recv(context).map(|next| next.map(|(frame, _taken_now)| frame))
    }
}

type Opening<R> = BoxFuture<'static, Result<Streaming<R>, Refusal>>;

/// A stream that stands at the owner.
struct Line<F, R> {
    frames: mpsc::Sender<(F, Option<Permit>)>,
    first: R,
    replies: Streaming<R>,
}

/// Relays a publish stream to the segment's owner until either side ends it.
///
/// # Errors
/// What the owner refuses; SEGMENT_LOADING when it cannot be reached; SEGMENT_FENCED when the way to it broke.
pub(crate) async fn publish<I>(
    shared: &Shared,
    connection: &Connection,
    (id, owner): (SegmentId, OwnerHint),
    open: OpenPublish,
    inbound: I,
    outbox: &Outbox<PublishReply>,
) -> Result<(), Refusal>
where
    I: Stream<Item = Result<PublishFrame, Status>> + Unpin,
{
    let open = OpenPublish { route: Route::Direct.into(), ..open };
    let first = PublishFrame { frame: Some(publish_frame::Frame::Open(open)) };
    let peers = shared.peers.clone();
    let at_owner = move |address: String, frames: Request<ToOwner<PublishFrame>>| {
        let peers = peers.clone();
        let open = async move {
            let mut client = peers.publisher(&address).await?;
            let replies = client.publish_stream(frames).await;
            replies.map(tonic::Response::into_inner).map_err(|s| peers.failed(&address, &s))
        };
        open.boxed()
    };
    let line = open_line(shared, connection, (id, owner), first, at_owner).await?;
    let go_away = |go_away| PublishReply { reply: Some(publish_reply::Reply::GoAway(go_away)) };
    pump(shared, id, line, inbound, outbox, go_away).await
}

/// Relays a consume stream to the segment's owner until either side ends it.
///
/// # Errors
/// As [`publish`].
pub(crate) async fn consume<I>(
    shared: &Shared,
    connection: &Connection,
    (id, owner): (SegmentId, OwnerHint),
    open: OpenConsume,
    inbound: I,
    outbox: &Outbox<ConsumeReply>,
) -> Result<(), Refusal>
where
    I: Stream<Item = Result<ConsumeFrame, Status>> + Unpin,
{
    let open = OpenConsume { route: Route::Direct.into(), ..open };
    let first = ConsumeFrame { frame: Some(consume_frame::Frame::Open(open)) };
    let peers = shared.peers.clone();
    let at_owner = move |address: String, frames: Request<ToOwner<ConsumeFrame>>| {
        let peers = peers.clone();
        let open = async move {
            let mut client = peers.subscriber(&address).await?;
            let replies = client.consume(frames).await;
            replies.map(tonic::Response::into_inner).map_err(|s| peers.failed(&address, &s))
        };
        open.boxed()
    };
    let line = open_line(shared, connection, (id, owner), first, at_owner).await?;
    let go_away = |go_away| ConsumeReply { reply: Some(consume_reply::Reply::GoAway(go_away)) };
    pump(shared, id, line, inbound, outbox, go_away).await
}

/// Opens the stream at the owner. One that says it is not is taken at its word, and the store is asked.
async fn open_line<F, R>(
    shared: &Shared,
    connection: &Connection,
    (id, mut owner): (SegmentId, OwnerHint),
    first: F,
    at_owner: impl Fn(String, Request<ToOwner<F>>) -> Opening<R>,
) -> Result<Line<F, R>, Refusal>
where
    F: Clone + std::fmt::Debug + Send + 'static,
{
    let deadline = Instant::now() + shared.config.limits.load_deadline;
    loop {
        let address = owner.address.clone();
        let (frames, queue) = mpsc::channel::<(F, Option<Permit>)>(FRAMES_MAX);
        frames.try_send((first.clone(), None)).expect("a new queue has room");
        let opening = async {
            let request = relayed(ToOwner(queue), connection);
            let mut replies = at_owner(address.clone(), request).await?;
            match replies.message().await {
                Ok(Some(first)) => Ok((first, replies)),
                Ok(None) => Err(loading(id)),
                Err(status) => Err(shared.peers.failed(&address, &status)),
            }
        };
        let opened = tokio::time::timeout_at(deadline, opening).await;
        let refusal = match opened {
            Ok(Ok((first, replies))) => {
                shared.metrics.relayed.inc();
                return Ok(Line { frames, first, replies });
            }
            Ok(Err(refusal)) => refusal,
            Err(_) => return Err(loading(id)),
        };
        match refusal.reason {
            Reason::NotOwner => {}
            // Nothing but the open frame was sent.
            Reason::DeadlineExceeded => return Err(loading(id)),
            _ => return Err(refusal),
        }
        sleep(LOOK_AGAIN).await;
        match shared.ownership.find_again(id).await? {
            Found::Elsewhere(found) => owner = found,
            Found::Here(_) => return Err(loading(id).after(LOOK_AGAIN)), // the next open finds it here
        }
    }
}

enum Event<F, R> {
    Woken,
    GoAway,
    /// The frame that waited is on its way; false: the owner takes no more.
    Sent(bool),
    Frame(Option<Result<F, Status>>),
    Reply(Option<Result<R, Status>>),
    /// There is room for the reply that waits.
    Room(Option<Permit>),
}

type Sending = Pin<Box<dyn Future<Output = bool> + Send>>;
type Making = Pin<Box<dyn Future<Output = Option<Permit>> + Send>>;

async fn pump<I, F, R>(
    shared: &Shared,
    id: SegmentId,
    line: Line<F, R>,
    mut inbound: I,
    outbox: &Outbox<R>,
    go_away: fn(GoAway) -> R,
) -> Result<(), Refusal>
where
    I: Stream<Item = Result<F, Status>> + Unpin,
    F: Weighed + Send + 'static,
    R: Weighed + Send + 'static,
{
    let Line { frames, first, mut replies } = line;
    let mut to_owner = Some(frames);
    let mut sending: Option<Sending> = None;
    let mut held: Option<(R, Making)> = None;
    let mut told = false;
    let mut draining = pin!(shared.draining.started());
    outbox.push(first, 0);
    loop {
        let takes_frames = sending.is_none() && to_owner.is_some();
        let event = tokio::select! {
            biased;
            () = &mut draining, if !told => Event::GoAway,
            () = outbox.changed() => Event::Woken,
            sent = waits(&mut sending) => Event::Sent(sent),
            room = room(&mut held) => Event::Room(room),
            reply = replies.next(), if held.is_none() && outbox.is_open() => Event::Reply(reply),
            frame = inbound.next(), if takes_frames => Event::Frame(frame),
        };
        match event {
            Event::Woken => {}
            Event::GoAway => {
                told = true;
                let next = shared.ownership.hint(id, 0);
                outbox.push(go_away(shared.draining.go_away(Some(next))), 0);
            }
            Event::Sent(taken) => {
                sending = None;
                if !taken {
                    to_owner = None; // its last word comes as a reply
                }
            }
            Event::Frame(None) => to_owner = None,
            Event::Frame(Some(Err(_))) if outbox.is_gone() => return Ok(()),
            Event::Frame(Some(Err(status))) => return Err(unreadable(&status)),
            Event::Frame(Some(Ok(frame))) => {
                if let Some(line) = &to_owner {
                    shared.metrics.relayed_bytes.inc_by(frame.payload_bytes());
                    sending = Some(send(line.clone(), frame, shared.relay_bytes.to_owner.clone()));
                }
            }
            Event::Reply(Some(Ok(reply))) => {
                let bytes = reply.payload_bytes();
                shared.metrics.relayed_bytes.inc_by(bytes);
                if bytes == 0 {
                    outbox.push(reply, 0);
                } else {
                    let making = make_room(outbox, shared.relay_bytes.to_client.clone(), bytes);
                    held = Some((reply, making));
                }
            }
            Event::Room(permit) => {
                let (reply, _) = held.take().expect("it was waited for");
                let bytes = reply.payload_bytes() as usize;
                outbox.push_holding(reply, bytes, permit.map(Arc::new));
            }
            Event::Reply(None) => return Ok(()),
            Event::Reply(Some(Err(status))) => return Err(broken(id, &status)),
        }
        if outbox.is_gone() {
            return Ok(());
        }
    }
}

/// The frame's bytes are taken before it is queued; what is queued gives them back when the transport takes it.
fn send<F: Weighed + Send + 'static>(
    line: mpsc::Sender<(F, Option<Permit>)>,
    frame: F,
    budget: ByteBudget,
) -> Sending {
    Box::pin(async move {
        let bytes = frame.payload_bytes();
        let permit = if bytes > 0 { Some(budget.acquire(bytes).await) } else { None };
        line.send((frame, permit)).await.is_ok()
    })
}

/// Room for a reply's payload: in the budget; or without it, once the client has taken everything before. So clients that do
/// not read cannot stop the others.
fn make_room<R: Send + 'static>(outbox: &Outbox<R>, budget: ByteBudget, bytes: u64) -> Making {
    let drained = outbox.drained();
    Box::pin(async move {
        if let Some(permit) = budget.try_acquire(bytes) {
            return Some(permit);
        }
        tokio::select! {
            biased;
            permit = budget.acquire(bytes) => Some(permit),
            () = drained => None,
        }
    })
}

/// The owner's own words, or that the way to it broke: what was in flight is of unknown outcome.
pub(super) fn broken(id: SegmentId, status: &Status) -> Refusal {
    crate::errors::of_peer(status).unwrap_or_else(|| {
        let message = format!("the way to the owner of segment {} broke", id.segment);
        Refusal::new(Reason::SegmentFenced, format!("{message}: {}", status.message()))
    })
}

async fn waits(sending: &mut Option<Sending>) -> bool {
    match sending {
        Some(sending) => sending.as_mut().await,
        None => std::future::pending().await,
    }
}

async fn room<R>(held: &mut Option<(R, Making)>) -> Option<Permit> {
    match held {
        Some((_, making)) => making.as_mut().await,
        None => std::future::pending().await,
    }
}
