//! Bookies in other processes: one ordered stream of frames per incarnation, opened when something is to be sent.
//!
//! ```text
//! add, read, ... --push--> Calls (bounded, pure) --next--> Outbox ==socket==> serve
//!      answer <--tell--------^ expire, fail_all            Inbox <==socket==    |
//! ```
//! A lost connection answers everything that waits with `Unknown(Disconnected)` at once and writes nothing anywhere: what
//! follows from it is the writer's to decide (EC1), and it sends again.

mod calls;
mod connection;

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use futures::{FutureExt, future::ready};
use geminga_proto::ids::{EntryId, Incarnation, LedgerId};
use geminga_runtime::{random::Random, tasks::Tasks};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, oneshot},
    time::Instant,
};

use self::calls::{Calls, Pushed, Waiter};
use super::{
    AddAnswer, AddRequest, Answer, BookieRpc, Bookies, EntryRange, FenceAnswer, FenceRequest,
    LacAnswer, ListAnswer, ReadAnswer, ReadRequest, Unknown, directory::Resolve, wire::Request,
};
use crate::metrics::RpcMetrics;

/// Settings of the connections to bookies.
#[derive(Clone, Debug)]
pub struct RemoteConfig {
    /// A bookie of another cluster refuses the connection.
    pub cluster_id: String,
    /// Bytes queued for one bookie and on their way to it; beyond that a request is answered `Unknown(Busy)` at once.
    pub bytes_max: usize,
    /// How long finding the address and connecting may take, and then the handshake.
    pub connect_timeout: Duration,
    /// A peer that is silent for so long while something waits ends the connection.
    pub silence_max: Duration,
    /// An idle connection shows that it lives this often; less than the bookie's own patience.
    pub idle_ping: Duration,
    /// The pause after a failed or lost connection, doubling; requests within it are answered `Disconnected` at once.
    pub retry_min: Duration,
    pub retry_max: Duration,
}

impl RemoteConfig {
    /// The defaults, for this cluster.
    #[must_use]
    pub fn new(cluster_id: impl Into<String>) -> Self {
        Self {
            cluster_id: cluster_id.into(),
            bytes_max: 64 * 1024 * 1024,
            connect_timeout: Duration::from_secs(2),
            silence_max: Duration::from_secs(10),
            idle_ping: Duration::from_secs(30),
            retry_min: Duration::from_millis(50),
            retry_max: Duration::from_secs(2),
        }
    }
}

/// The bookies that `resolver` knows, over TCP. Clones share their connections.
#[derive(Clone, Debug)]
pub struct RemoteBookies {
    shared: Arc<Shared>,
    peers: Arc<Mutex<BTreeMap<Incarnation, Arc<Peer>>>>,
}

#[derive(Debug)]
struct Shared {
    config: RemoteConfig,
    resolver: Arc<dyn Resolve>,
    random: Random,
    tasks: Tasks,
    metrics: RpcMetrics,
}

/// One incarnation, as the requests see it.
struct Peer {
    incarnation: Incarnation,
    shared: Arc<Shared>,
    state: Mutex<State>,
    /// There is something new to send, or an earlier deadline.
    wake: Notify,
}

struct State {
    calls: Calls,
    /// A task owns the connection, or is about to make it.
    connected: bool,
    /// Not before this is a connection tried again.
    retry_at: Option<Instant>,
    failures: u32,
}

/// Peers without a connection and without a handle are forgotten when there are more than this.
const PEERS_KEPT: usize = 256;

impl RemoteBookies {
    /// No connection is made before something is to be sent. When `tasks` end, all requests are answered `Disconnected`.
    #[must_use]
    pub fn new(
        config: RemoteConfig,
        resolver: Arc<dyn Resolve>,
        random: Random,
        tasks: Tasks,
        metrics: RpcMetrics,
    ) -> Self {
        let shared = Arc::new(Shared { config, resolver, random, tasks, metrics });
        Self { shared, peers: Arc::default() }
    }
}

impl Bookies for RemoteBookies {
    fn bookie(&self, incarnation: Incarnation) -> Arc<dyn BookieRpc> {
        let mut peers = self.peers.lock();
        if peers.len() > PEERS_KEPT && !peers.contains_key(&incarnation) {
            peers.retain(|_, peer| Arc::strong_count(peer) > 1);
        }
        let peer = peers
            .entry(incarnation)
            .or_insert_with(|| Arc::new(Peer::new(incarnation, Arc::clone(&self.shared))));
        Arc::new(Handle(Arc::clone(peer)))
    }
}

/// What [`RemoteBookies`] hands out.
#[derive(Debug)]
struct Handle(Arc<Peer>);

impl Peer {
    fn new(incarnation: Incarnation, shared: Arc<Shared>) -> Self {
        let calls = Calls::new(shared.config.bytes_max);
        let state = State { calls, connected: false, retry_at: None, failures: 0 };
        Self { incarnation, shared, state: Mutex::new(state), wake: Notify::new() }
    }

    /// Takes a request up, or answers at once why not.
    fn send(self: &Arc<Self>, request: Request, waiter: Waiter) -> Result<(), Unknown> {
        let now = Instant::now();
        let mut state = self.state.lock();
        if !state.connected && state.retry_at.is_some_and(|at| now < at) {
            return Err(Unknown::Disconnected);
        }
        let Pushed::Taken { wake } = state.calls.push(request, waiter, now) else {
            self.shared.metrics.busy.inc();
            return Err(Unknown::Busy);
        };
        let start = !std::mem::replace(&mut state.connected, true);
        drop(state);
        if start {
            let connection = connection::Connection::new(Arc::clone(self));
            self.shared.tasks.spawn("bookie connection", connection.run());
        } else if wake {
            self.wake.notify_one();
        }
        Ok(())
    }
}

impl Handle {
    /// The request is in its place in the queue when this returns.
    fn call<T: Send + 'static>(
        &self,
        request: Request,
        waiter: fn(oneshot::Sender<T>) -> Waiter,
        unknown: fn(Unknown) -> T,
    ) -> Answer<T> {
        let (tell, told) = oneshot::channel();
        match self.0.send(request, waiter(tell)) {
            Ok(()) => told
                .map(move |answer| answer.unwrap_or_else(|_| unknown(Unknown::Disconnected)))
                .boxed(),
            Err(why) => ready(unknown(why)).boxed(),
        }
    }
}

impl BookieRpc for Handle {
    fn add(&self, request: AddRequest) -> Answer<AddAnswer> {
        self.call(Request::Add(request), Waiter::Add, AddAnswer::Unknown)
    }

    /// Ready once it is queued: nobody learns whether it arrived.
    fn write_lac(&self, to: Incarnation, ledger: LedgerId, lac: EntryId) -> Answer<()> {
        let _ = self.0.send(Request::WriteLac { to, ledger, lac }, Waiter::Nobody);
        ready(()).boxed()
    }

    fn fence(&self, request: FenceRequest) -> Answer<FenceAnswer> {
        self.call(Request::Fence(request), Waiter::Fence, FenceAnswer::Unknown)
    }

    fn read(&self, request: ReadRequest) -> Answer<ReadAnswer> {
        self.call(Request::Read(request), Waiter::Read, ReadAnswer::unknown)
    }

    fn read_lac(&self, to: Incarnation, ledger: LedgerId, deadline: Instant) -> Answer<LacAnswer> {
        let request = Request::ReadLac { to, ledger, deadline };
        self.call(request, Waiter::ReadLac, LacAnswer::Unknown)
    }

    fn list(
        &self,
        to: Incarnation,
        ledger: LedgerId,
        range: EntryRange,
        deadline: Instant,
    ) -> Answer<ListAnswer> {
        let request = Request::List { to, ledger, range, deadline };
        self.call(request, Waiter::List, ListAnswer::Unknown)
    }
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peer").field("incarnation", &self.incarnation).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
