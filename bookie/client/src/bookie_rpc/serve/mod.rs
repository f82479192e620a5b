//! The bookie's side of the data plane: accepts connections and carries their requests out, in the order of arrival.
//!
//! ```text
//! serve --accept--> connection task (one each): handshake, then
//!     Inbox --decode--> bookie.add(..), in order --> answers, as they come --encode--> Outbox
//! ```
//! What goes wrong on one connection ends that one: bad bytes, a silent or slow peer, even a panic.

mod connection;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use geminga_runtime::tasks::Tasks;
use tokio::{
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    BookieRpc,
    handshake::{self, HandshakeError},
};
use crate::{
    memory::ClientMemory,
    metrics::{Counted, RpcMetrics},
};

/// Settings of the bookie's side.
#[derive(Clone, Debug)]
pub struct ServeConfig {
    /// Members of other clusters are refused.
    pub cluster_id: String,
    /// Connections beyond it are refused by the handshake.
    pub connections_max: usize,
    /// Bytes that one connection's requests hold until their answers are in the socket; beyond it nothing more is read from
    /// it. Exceeded by one frame at most.
    pub connection_bytes_max: usize,
    /// The same for all connections together; exceeded by one frame per connection at most.
    pub total_bytes_max: usize,
    /// How long a peer may take to say who it is.
    pub handshake_timeout: Duration,
    /// A peer that takes none of its answers for so long is cut.
    pub write_stall: Duration,
    /// A peer that says nothing for so long is gone; three times what the other side's idle pings take.
    pub silence_max: Duration,
}

impl ServeConfig {
    /// The defaults, for this cluster.
    #[must_use]
    pub fn new(cluster_id: impl Into<String>) -> Self {
        Self {
            cluster_id: cluster_id.into(),
            connections_max: 1_024,
            connection_bytes_max: 64 * 1024 * 1024,
            total_bytes_max: 512 * 1024 * 1024,
            handshake_timeout: Duration::from_secs(10),
            write_stall: Duration::from_secs(10),
            silence_max: Duration::from_secs(90),
        }
    }
}

/// What all connections share.
#[derive(Debug)]
struct Shared {
    bookie: Arc<dyn BookieRpc>,
    config: ServeConfig,
    metrics: RpcMetrics,
    /// Bytes of requests that are not answered yet, of all connections.
    memory: Arc<ClientMemory>,
    connections: Arc<AtomicUsize>,
    closing: CancellationToken,
}

/// Pause after the operating system refused to accept, as when file descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves `bookie` on `listener` until `closing` is cancelled, which ends the connections too: their peers take what was
/// not answered for unknown. Connections are tasks of `tasks`. Dropping the future stops accepting; connections go on.
pub async fn serve(
    listener: TcpListener,
    bookie: Arc<dyn BookieRpc>,
    config: ServeConfig,
    metrics: RpcMetrics,
    tasks: &Tasks,
    closing: CancellationToken,
) {
    let memory = ClientMemory::new(config.total_bytes_max, metrics.in_flight_bytes.clone());
    let (memory, connections) = (Arc::new(memory), Arc::default());
    let shared = Arc::new(Shared { bookie, config, metrics, memory, connections, closing });
    loop {
        let accepted = tokio::select! {
            biased;
            () = shared.closing.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let place = Place::take(&shared);
                tasks.spawn("bookie rpc connection", receive(Arc::clone(&shared), stream, place));
            }
            Err(error) => {
                tracing::warn!(%error, "connections cannot be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// One connection's place among those there may be; refused ones have theirs beyond the limit for as long as it takes to
/// tell them.
struct Place {
    connections: Arc<AtomicUsize>,
    number: usize,
}

impl Place {
    fn take(shared: &Shared) -> Self {
        let connections = Arc::clone(&shared.connections);
        let number = connections.fetch_add(1, Ordering::AcqRel) + 1;
        Self { connections, number }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.fetch_sub(1, Ordering::AcqRel);
    }
}

async fn receive(shared: Arc<Shared>, mut stream: TcpStream, place: Place) {
    let (config, metrics) = (&shared.config, &shared.metrics);
    if place.number > config.connections_max * 2 {
        metrics.handshakes_refused.inc();
        return; // no time to tell it why
    }
    let has_room = place.number <= config.connections_max;
    let late = || io::Error::from(io::ErrorKind::TimedOut);
    let shake = async {
        stream.set_nodelay(true)?;
        handshake::answer(&mut stream, &config.cluster_id, has_room).await
    };
    let shaken = tokio::select! {
        biased;
        () = shared.closing.cancelled() => return,
        shaken = timeout(config.handshake_timeout, shake) => shaken,
    };
    match shaken.unwrap_or_else(|_| Err(late().into())) {
        Ok(_version) => {}
        Err(HandshakeError::Io(error)) => {
            metrics.connects_failed.inc();
            tracing::debug!(%error, "connection ended before its handshake");
            return;
        }
        Err(error) => {
            metrics.handshakes_refused.inc();
            tracing::warn!(%error, "connection refused");
            return;
        }
    }
    let _counted = Counted::new(&metrics.connections);
    let (mut reader, mut writer) = stream.split();
    let end = connection::Connection::new(&shared).run(&mut reader, &mut writer).await;
    tracing::info!(%end, "bookie rpc connection ended");
}

/// Gives the gauge of bytes in flight back whatever a connection still holds.
struct Held {
    memory: Arc<ClientMemory>,
    bytes: usize,
}

impl Held {
    fn new(memory: &Arc<ClientMemory>) -> Self {
        Self { memory: Arc::clone(memory), bytes: 0 }
    }

    fn take(&mut self, bytes: usize) {
        self.bytes += bytes;
        self.memory.take(bytes);
    }

    fn give_back(&mut self, bytes: usize) {
        self.bytes -= bytes;
        self.memory.give_back(bytes);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.memory.give_back(self.bytes);
    }
}

#[cfg(test)]
mod tests;
