//! A client's connection: its share of the budgets, and the deadlines that end it (security S6).
//!
//! Everything a connection may hold is bounded here: streams, bytes in flight, the time to its first bytes, the time a
//! write may make no progress; and how many connections there are, of one address and of all. A killed broker cuts all connections at once, like a dead process would.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, stream};
use geminga_proto::reason::Reason;
use geminga_runtime::budget::ByteBudget;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, Sleep, sleep, sleep_until},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;

use crate::{
    auth::Principal,
    config::Limits,
    errors::Refusal,
    metrics::Metrics,
    relay::{RELAYED_FOR, RELAYED_INTERNAL},
};

/// Bytes of the HTTP/2 preface: a peer that has sent so many speaks.
const PREFACE_BYTES: usize = 24;
/// Pause after a failed accept (no file descriptors, for instance).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What the requests of one connection share. Clones are handles to the same connection.
#[derive(Clone, Debug)]
pub struct Connection {
    inner: Arc<Inner>,
    relayed: Relayed,
    internal: bool,
}

/// Whether the request was passed on by another broker, and for whom.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Relayed {
    No,
    For(Principal),
    /// It names nobody that it could be for.
    Unknown,
}

#[derive(Debug)]
struct Inner {
    peer: SocketAddr,
    principal: Principal,
    streams: AtomicUsize,
    streams_max: usize,
    bytes: ByteBudget,
}

impl Connection {
    /// A connection from this address.
    #[must_use]
    pub fn new(peer: SocketAddr, limits: &Limits) -> Self {
        Self {
            inner: Arc::new(Inner {
                peer,
                principal: Principal::Anonymous,
                streams: AtomicUsize::new(0),
                streams_max: limits.streams_per_connection_max,
                bytes: ByteBudget::new(limits.connection_bytes_max),
            }),
            relayed: Relayed::No,
            internal: false,
        }
    }

    /// A broker's own: what it publishes for itself is not limited by policies.
    #[must_use]
    pub fn internal(limits: &Limits) -> Self {
        Self { internal: true, ..Self::new(SocketAddr::from(([0, 0, 0, 0], 0)), limits) }
    }

    /// The connection a request came on.
    #[must_use]
    pub fn of<T>(request: &tonic::Request<T>, limits: &Limits) -> Self {
        let unknown = || Self::new(SocketAddr::from(([0, 0, 0, 0], 0)), limits);
        let mut connection = request.extensions().get::<Self>().cloned().unwrap_or_else(unknown);
        if let Some(name) = request.metadata().get(RELAYED_FOR) {
            connection.relayed = match name.to_str().ok().and_then(Principal::relayed_name) {
                Some(principal) => Relayed::For(principal),
                None => Relayed::Unknown,
            };
            // Whoever may relay is a broker: the gate asks before anything is done.
            connection.internal = request.metadata().contains_key(RELAYED_INTERNAL);
        }
        connection
    }

    /// Where it comes from.
    #[must_use]
    pub fn peer(&self) -> SocketAddr {
        self.inner.peer
    }

    /// For whom the request is made: whoever calls, or the one that a relay names (S2).
    #[must_use]
    pub fn principal(&self) -> &Principal {
        match &self.relayed {
            Relayed::For(principal) => principal,
            Relayed::No | Relayed::Unknown => &self.inner.principal,
        }
    }

    /// Who calls.
    #[must_use]
    pub fn caller(&self) -> &Principal {
        &self.inner.principal
    }

    /// Whether another broker passed the request on: it is not passed on again (O6).
    #[must_use]
    pub fn is_relayed(&self) -> bool {
        self.relayed != Relayed::No
    }

    /// Whether a broker publishes for itself.
    #[must_use]
    pub fn is_internal(&self) -> bool {
        self.internal
    }

    /// Whether a relayed request says for whom.
    #[must_use]
    pub fn names_its_principal(&self) -> bool {
        self.relayed != Relayed::Unknown
    }

    /// Bytes of batches it may have in flight.
    #[must_use]
    pub fn bytes(&self) -> &ByteBudget {
        &self.inner.bytes
    }

    /// Takes one of its stream slots.
    ///
    /// # Errors
    /// TOO_MANY_STREAMS.
    pub fn stream_slot(&self) -> Result<StreamSlot, Refusal> {
        let taken = self.inner.streams.fetch_add(1, Ordering::Relaxed);
        let slot = StreamSlot(self.clone()); // gives back what was just taken, whatever comes
        if taken >= self.inner.streams_max {
            let message = format!("the connection has {taken} streams, as many as it may");
            return Err(Refusal::new(Reason::TooManyStreams, message)
                .with("streams_max", self.inner.streams_max));
        }
        Ok(slot)
    }
}

/// A stream counted against its connection until dropped.
#[derive(Debug)]
pub struct StreamSlot(Connection);

impl Drop for StreamSlot {
    fn drop(&mut self) {
        self.0.inner.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What the listener needs.
#[derive(Clone, Debug)]
pub struct ListenerParts {
    /// Bounds.
    pub limits: Limits,
    /// Counts connections.
    pub metrics: Metrics,
    /// No connection is accepted any more.
    pub closing: CancellationToken,
    /// Every connection is cut now.
    pub killed: CancellationToken,
}

/// Connections by the address they come from: one peer leaves room for the others (S6).
#[derive(Clone, Debug, Default)]
struct Addresses(Arc<Mutex<BTreeMap<IpAddr, usize>>>);

/// A connection counted against its address until dropped.
#[derive(Debug)]
struct AddressSlot {
    addresses: Addresses,
    of: IpAddr,
}

impl Addresses {
    fn slot(&self, of: IpAddr, most: usize) -> Option<AddressSlot> {
        let mut counts = self.0.lock();
        let count = counts.entry(of).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(AddressSlot { addresses: self.clone(), of })
    }
}

impl Drop for AddressSlot {
    fn drop(&mut self) {
        let mut counts = self.addresses.0.lock();
        match counts.get_mut(&self.of) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(counts.remove(&self.of)),
        }
    }
}

/// Accepted connections for tonic to serve; ends with `closing`. More than the most connections, of one address or of all,
/// are closed at once.
pub fn incoming(
    listener: TcpListener,
    parts: ListenerParts,
) -> impl Stream<Item = io::Result<Incoming>> + Send {
    let free = Arc::new(Semaphore::new(parts.limits.connections_max));
    let addresses = Addresses::default();
    stream::unfold((listener, parts), move |(listener, parts)| {
        let (free, addresses) = (Arc::clone(&free), addresses.clone());
        async move {
            loop {
                let accepted = tokio::select! {
                    biased;
                    () = parts.closing.cancelled() => return None,
                    accepted = listener.accept() => accepted,
                };
                let (stream, peer) = match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        tracing::warn!(%error, "connection not accepted");
                        sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                };
                let of_address =
                    addresses.slot(peer.ip(), parts.limits.connections_per_address_max);
                let of_all = Arc::clone(&free).try_acquire_owned();
                let (Some(of_address), Ok(of_all)) = (of_address, of_all) else {
                    parts.metrics.connections_refused.inc();
                    continue; // dropped: the peer sees it closed
                };
                let _ = stream.set_nodelay(true); // only slower without it
                let incoming = Incoming::new(stream, peer, &parts, (of_address, of_all));
                return Some((Ok(incoming), (listener, parts)));
            }
        }
    })
}

/// A connection's bytes, with the deadlines of S6.
pub struct Incoming {
    stream: TcpStream,
    connection: Connection,
    metrics: Metrics,
    killed: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Set until the peer has spoken.
    hello: Option<(usize, Pin<Box<Sleep>>)>,
    write_stall_max: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
    _places: Places,
}

/// A connection's place among those of its address, and among all.
type Places = (AddressSlot, OwnedSemaphorePermit);

impl Incoming {
    fn new(stream: TcpStream, peer: SocketAddr, parts: &ListenerParts, places: Places) -> Self {
        parts.metrics.connections.inc();
        Self {
            stream,
            connection: Connection::new(peer, &parts.limits),
            metrics: parts.metrics.clone(),
            killed: Box::pin(parts.killed.clone().cancelled_owned()),
            hello: Some((0, Box::pin(sleep(parts.limits.open_deadline)))),
            write_stall_max: parts.limits.write_stall_max,
            stalled: None,
            _places: places,
        }
    }

    fn check_killed(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.killed.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::ConnectionReset.into()),
            Poll::Pending => Ok(()),
        }
    }

    /// Starts or checks the stall timer of a write that could not go on.
    fn write_waits<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        let deadline = Instant::now() + self.write_stall_max;
        let timer = self.stalled.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if timer.as_mut().poll(cx).is_ready() {
            tracing::info!(peer = %self.connection.peer(), "connection that reads nothing is closed");
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Poll::Pending
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.metrics.connections.dec();
    }
}

impl Connected for Incoming {
    type ConnectInfo = Connection;

    fn connect_info(&self) -> Connection {
        self.connection.clone()
    }
}

impl AsyncRead for Incoming {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        this.check_killed(cx)?;
        let before = buf.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(cx, buf);
        if let Some((seen, deadline)) = &mut this.hello {
            *seen += buf.filled().len() - before;
            if *seen >= PREFACE_BYTES {
                this.hello = None;
            } else if deadline.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        polled
    }
}

impl AsyncWrite for Incoming {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        this.check_killed(cx)?;
        match Pin::new(&mut this.stream).poll_write(cx, buf) {
            Poll::Pending => this.write_waits(cx),
            ready => {
                this.stalled = None;
                ready
            }
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        this.check_killed(cx)?;
        match Pin::new(&mut this.stream).poll_write_vectored(cx, bufs) {
            Poll::Pending => this.write_waits(cx),
            ready => {
                this.stalled = None;
                ready
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
