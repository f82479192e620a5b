//! Connections: gRPC channels by server address, made when first used and shared by streams: one is enough for most clients,
//! one more for each so many streams.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{Stream, StreamExt};
use geminga_proto::{
    admin::v1::admin_client::AdminClient,
    v1::{
        GoAway, Route, discovery_client::DiscoveryClient, publisher_client::PublisherClient,
        subscriber_client::SubscriberClient,
    },
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout, timeout_at},
};
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use crate::{
    backoff::Backoff,
    error::{Error, innermost},
};

/// Time for a connection to stand: a server that does not answer the dial of a redirect is reached through another one.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// A silent connection is pinged this often, and given up when a ping is not answered for as long.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Largest gRPC message in either direction, bytes.
const FRAME_BYTES_MAX: usize = 16 * 1024 * 1024;
/// HTTP/2 flow control, bytes: a batch of the largest size fits.
const STREAM_WINDOW_BYTES: u32 = 8 * 1024 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;
/// Addresses whose channels are kept for later use. Servers name addresses for as long as a client lives, so there is an end to
/// it.
const ADDRESSES_MAX: usize = 256;
/// Streams on one connection; servers allow 1,000 by default.
const STREAMS_MAX: usize = 500;

/// All channels of a client; clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Connections(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    bootstrap: Bootstrap,
    /// None: to any of the configured servers.
    channels: Mutex<BTreeMap<Option<Address>, Vec<Shared>>>,
}

/// A channel and the streams on it.
#[derive(Clone, Debug)]
struct Shared {
    channel: Channel,
    streams: Arc<AtomicUsize>,
}

impl Shared {
    fn new(channel: Channel) -> Self {
        Self { channel, streams: Arc::default() }
    }

    fn open(&self) -> usize {
        self.streams.load(Ordering::Relaxed)
    }
}

/// The place of a stream on its connection, free again when dropped.
#[derive(Debug)]
pub(crate) struct StreamPlace(Arc<AtomicUsize>);

impl StreamPlace {
    fn on(shared: &Shared) -> Self {
        shared.streams.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(&shared.streams))
    }

    /// Frames of a stream, which keep its place for as long as the call has them.
    pub(crate) fn with<T>(self, frames: impl Stream<Item = T>) -> impl Stream<Item = T> {
        frames.map(move |frame| {
            let _kept = &self;
            frame
        })
    }
}

impl Drop for StreamPlace {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The configured servers. Each new connection goes to the next one that can be dialed, so that a client leaves a server
/// that is gone, or silent, without being told where to go.
#[derive(Clone, Debug)]
struct Bootstrap {
    servers: Arc<[Address]>,
    next: Arc<AtomicUsize>,
}

impl Bootstrap {
    /// Accepts addresses separated by commas.
    fn parse(text: &str) -> Result<Self, Error> {
        let servers: Vec<Address> = text
            .split(',')
            .map(str::trim)
            .filter(|address| !address.is_empty())
            .map(Address::parse)
            .collect::<Result<_, _>>()?;
        if servers.is_empty() {
            return Err(Error::Unavailable("no server address is given".into()));
        }
        Ok(Self { servers: servers.into(), next: Arc::default() })
    }

    /// A connection to the next server, or to one after it.
    ///
    /// # Errors
    /// What the last one said.
    async fn dial(self) -> io::Result<TokioIo<TcpStream>> {
        let count = self.servers.len();
        let first = self.next.fetch_add(1, Ordering::Relaxed);
        let mut failure = io::Error::from(io::ErrorKind::NotConnected);
        for turn in 0..count {
            let server = &self.servers[first.wrapping_add(turn) % count];
            match timeout(CONNECT_TIMEOUT / count as u32, TcpStream::connect(server.authority()))
                .await
            {
                Ok(Ok(stream)) => {
                    self.next.store(first.wrapping_add(turn + 1), Ordering::Relaxed);
                    stream.set_nodelay(true)?;
                    return Ok(TokioIo::new(stream));
                }
                Ok(Err(error)) => failure = error,
                Err(_) => failure = io::ErrorKind::TimedOut.into(),
            }
        }
        Err(failure)
    }

    fn names(&self) -> String {
        let names: Vec<&str> = self.servers.iter().map(|server| server.0.as_str()).collect();
        names.join(", ")
    }
}

/// Where a server listens, as `http://host:port`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Address(String);

impl Address {
    /// Accepts `host:port` and `http://host:port`.
    pub(crate) fn parse(text: &str) -> Result<Self, Error> {
        let url = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let endpoint = Endpoint::from_shared(url.clone()).map_err(|error| {
            Error::Unavailable(format!("{text:?} is no server address: {error}"))
        })?;
        match (endpoint.uri().scheme_str(), endpoint.uri().authority()) {
            (Some("http"), Some(_)) => Ok(Self(url)),
            _ => Err(Error::Unavailable(format!(
                "{text:?} is no server address: expected http://host:port"
            ))),
        }
    }

    /// `host:port`; 80 where no port is given.
    fn authority(&self) -> String {
        let rest = self.0.split_once("://").map_or(self.0.as_str(), |(_, rest)| rest);
        let authority = rest.split('/').next().unwrap_or(rest);
        let has_port =
            authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        if has_port { authority.to_owned() } else { format!("{authority}:80") }
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint::from_shared(self.0.clone())
            .expect("the address was parsed")
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
    }
}

/// Where a segment's next stream is opened, and how: at the owner that a refusal or the layout names, else at the
/// configured server. When a named owner cannot be dialed, the configured server is asked to relay: behind a load
/// balancer the owners' own addresses need not be reachable.
#[derive(Debug, Default)]
pub(crate) struct Way {
    owner: Option<String>,
    /// The present attempt went to a named owner.
    named: bool,
    relay: bool,
}

impl Way {
    /// For the next attempt; `known` is the owner by the layout. None: the configured server.
    pub(crate) fn next(&mut self, known: Option<&str>) -> (Option<String>, Route) {
        if std::mem::take(&mut self.relay) {
            self.named = false;
            return (None, Route::Relay);
        }
        let owner = self.owner.take().or_else(|| known.map(ToOwned::to_owned));
        self.named = owner.is_some();
        (owner, Route::Auto)
    }

    /// The attempt failed, or its stream broke.
    pub(crate) fn on_broken(&mut self, error: &Error) {
        self.owner = error.owner().map(ToOwned::to_owned);
        self.relay = self.named && matches!(error, Error::Unavailable(_));
    }

    /// The server asks to go, and may say where to.
    pub(crate) fn on_go_away(&mut self, go_away: GoAway) {
        self.owner = go_away.owner.map(|owner| owner.address).filter(|address| !address.is_empty());
    }
}

impl Connections {
    pub(crate) fn new(server: &str) -> Result<Self, Error> {
        let bootstrap = Bootstrap::parse(server)?;
        Ok(Self(Arc::new(Inner { bootstrap, channels: Mutex::default() })))
    }

    /// A channel to this address, or to any of the configured servers. It connects when used and reconnects by itself.
    fn connect(&self, address: Option<&Address>) -> Channel {
        let bootstrap = self.0.bootstrap.clone();
        match address {
            Some(address) => address.endpoint().connect_lazy(),
            None => bootstrap.servers[0]
                .endpoint()
                .connect_with_connector_lazy(service_fn(move |_| bootstrap.clone().dial())),
        }
    }

    /// Looks at the channels to this address, at least one, with what makes another.
    fn shared<T>(
        &self,
        owner: Option<&str>,
        look: impl FnOnce(&mut Vec<Shared>, &dyn Fn() -> Shared) -> T,
    ) -> T {
        let address = owner.and_then(|owner| Address::parse(owner).ok());
        let mut channels = self.0.channels.lock();
        if channels.len() >= ADDRESSES_MAX && !channels.contains_key(&address) {
            // Open streams hold theirs; the others connect again. The configured servers are no part of what grows.
            channels.retain(|address, _| address.is_none());
        }
        let another = || Shared::new(self.connect(address.as_ref()));
        look(channels.entry(address.clone()).or_insert_with(|| vec![another()]), &another)
    }

    /// The channel for calls.
    fn channel(&self, owner: Option<&str>) -> Channel {
        self.shared(owner, |shared, _| shared[0].channel.clone())
    }

    /// A channel with room for a stream, and the stream's place on it.
    fn for_stream(&self, owner: Option<&str>) -> (Channel, StreamPlace) {
        self.shared(owner, |shared, another| {
            let at = shared.iter().position(|one| one.open() < STREAMS_MAX);
            let at = at.unwrap_or_else(|| {
                shared.push(another());
                shared.len() - 1
            });
            let place = (shared[at].channel.clone(), StreamPlace::on(&shared[at]));
            // The first one stays for calls.
            let mut first = true;
            shared.retain(|one| std::mem::take(&mut first) || one.open() > 0);
            place
        })
    }

    /// Connects to a configured server; when all refuse they are asked again until `deadline`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] with the addresses and what kept the last one from being reached in time.
    pub(crate) async fn reach(&self, mut backoff: Backoff, deadline: Instant) -> Result<(), Error> {
        let bootstrap = &self.0.bootstrap;
        loop {
            let dialed = bootstrap.clone();
            let endpoint = bootstrap.servers[0].endpoint();
            let connect =
                endpoint.connect_with_connector(service_fn(move |_| dialed.clone().dial()));
            let words = match timeout_at(deadline, connect).await {
                Ok(Ok(channel)) => {
                    let first = || vec![Shared::new(channel)];
                    self.0.channels.lock().entry(None).or_insert_with(first);
                    return Ok(());
                }
                Ok(Err(error)) => innermost(&error),
                Err(_) => "it does not answer".to_owned(),
            };
            let pause = backoff.pause(None);
            if Instant::now() + pause >= deadline {
                return Err(Error::Unavailable(format!("{}: {words}", bootstrap.names())));
            }
            sleep(pause).await;
        }
    }

    /// For a publish stream.
    pub(crate) fn publisher(&self, owner: Option<&str>) -> (PublisherClient<Channel>, StreamPlace) {
        let (channel, place) = self.for_stream(owner);
        let client = PublisherClient::new(channel)
            .max_decoding_message_size(FRAME_BYTES_MAX)
            .max_encoding_message_size(FRAME_BYTES_MAX);
        (client, place)
    }

    /// For a consume stream.
    pub(crate) fn subscriber(
        &self,
        owner: Option<&str>,
    ) -> (SubscriberClient<Channel>, StreamPlace) {
        let (channel, place) = self.for_stream(owner);
        (subscriber(channel), place)
    }

    /// For one call.
    pub(crate) fn subscriber_call(&self, owner: Option<&str>) -> SubscriberClient<Channel> {
        subscriber(self.channel(owner))
    }

    /// For a watch.
    pub(crate) fn discovery(&self) -> (DiscoveryClient<Channel>, StreamPlace) {
        let (channel, place) = self.for_stream(None);
        (DiscoveryClient::new(channel), place)
    }

    pub(crate) fn admin(&self) -> AdminClient<Channel> {
        AdminClient::new(self.channel(None)).max_decoding_message_size(FRAME_BYTES_MAX)
    }
}

fn subscriber(channel: Channel) -> SubscriberClient<Channel> {
    SubscriberClient::new(channel)
        .max_decoding_message_size(FRAME_BYTES_MAX)
        .max_encoding_message_size(FRAME_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn an_owner_that_cannot_be_dialed_is_reached_through_the_configured_server() {
        let mut way = Way::default();
        assert_eq!(way.next(None), (None, Route::Auto));
        way.on_broken(&Error::Unavailable("refused".into()));
        assert_eq!(
            way.next(Some("owner:1")),
            (Some("owner:1".into()), Route::Auto),
            "nobody named was dialed before"
        );
        way.on_broken(&Error::Unavailable("refused".into()));
        assert_eq!(way.next(Some("owner:1")), (None, Route::Relay));
        way.on_broken(&Error::Unavailable("refused".into()));
        assert_eq!(
            way.next(Some("owner:1")),
            (Some("owner:1".into()), Route::Auto),
            "and around again"
        );
    }

    #[test]
    fn an_address_is_host_and_port_or_http() {
        assert_eq!(
            Address::parse("h:1").expect("valid"),
            Address::parse("http://h:1").expect("valid")
        );
        for bad in ["", "https://h:1", "ftp://h", "http://", "a b"] {
            assert!(Address::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[tokio::test]
    async fn each_connection_goes_to_the_next_server_that_can_be_dialed() {
        let listen = async || TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let (gone, one, two) = (listen().await, listen().await, listen().await);
        let address = |listener: &TcpListener| listener.local_addr().expect("bound").to_string();
        let (first, second) = (address(&one), address(&two));
        let servers = format!("{}, {first},http://{second}/", address(&gone));
        drop(gone);
        let bootstrap = Bootstrap::parse(&servers).expect("three addresses");
        for expected in [&first, &second, &first] {
            let stream = bootstrap.clone().dial().await.expect("two listen").into_inner();
            assert_eq!(&stream.peer_addr().expect("connected").to_string(), expected);
        }
        drop((one, two));
        let refused = bootstrap.dial().await.expect_err("nobody listens");
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        assert!(Bootstrap::parse(" , ").is_err());
    }

    #[tokio::test]
    async fn many_addresses_of_owners_leave_the_channels_to_the_configured_servers_alone() {
        let connections = Connections::new("127.0.0.1:1").expect("an address");
        let (_, _place) = connections.for_stream(None);
        let known = || connections.0.channels.lock().len();
        for owner in 0..ADDRESSES_MAX {
            connections.channel(Some(&format!("127.0.0.1:{}", owner + 2)));
            assert!(known() <= ADDRESSES_MAX);
        }
        assert_eq!(known(), 2, "the owners known before went");
        let open = connections.shared(None, |shared, _| shared[0].open());
        assert_eq!(open, 1, "the stream is still on the channel that new calls take");
    }

    #[tokio::test]
    async fn a_connection_takes_so_many_streams_and_one_more_is_made_for_the_next() {
        let connections = Connections::new("127.0.0.1:1").expect("an address");
        let count = || connections.shared(None, |shared, _| shared.len());
        let mut places: Vec<_> =
            (0..=STREAMS_MAX).map(|_| connections.for_stream(None).1).collect();
        assert_eq!(count(), 2);
        places.drain(..STREAMS_MAX);
        places.push(connections.for_stream(None).1);
        assert_eq!(count(), 2, "one is left on the second");
        places.clear();
        drop(connections.for_stream(None));
        assert_eq!(count(), 1, "nobody needs the second any more");
        let (_, place) = connections.for_stream(None);
        let frames = place.with(futures::stream::iter([1]));
        assert_eq!(connections.shared(None, |shared, _| shared[0].open()), 1);
        drop(frames);
        assert_eq!(connections.shared(None, |shared, _| shared[0].open()), 0);
    }
}
