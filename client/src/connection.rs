//! Connections: one gRPC channel per server address, made when first used, shared by all streams.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use geminga_proto::{
    admin::v1::admin_client::AdminClient,
    v1::{
        GoAway, Route, discovery_client::DiscoveryClient, publisher_client::PublisherClient,
        subscriber_client::SubscriberClient,
    },
};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::transport::{Channel, Endpoint};

use crate::{
    backoff::Backoff,
    error::{Error, innermost},
};

/// Time for a connection to stand.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A silent connection is pinged this often, and given up when a ping is not answered for as long.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Largest gRPC message in either direction, bytes.
const FRAME_BYTES_MAX: usize = 16 * 1024 * 1024;
/// HTTP/2 flow control, bytes: a batch of the largest size fits.
const STREAM_WINDOW_BYTES: u32 = 8 * 1024 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;
/// Channels kept for later use. Servers name addresses for as long as a client lives, so there is an end to it.
const CHANNELS_MAX: usize = 256;

/// All channels of a client; clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Connections(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    bootstrap: Address,
    channels: Mutex<BTreeMap<Address, Channel>>,
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
        let bootstrap = Address::parse(server)?;
        Ok(Self(Arc::new(Inner { bootstrap, channels: Mutex::default() })))
    }

    /// The channel to this address, or to the configured server. It connects when used and reconnects by itself.
    fn channel(&self, owner: Option<&str>) -> Channel {
        let address = owner.and_then(|owner| Address::parse(owner).ok());
        let address = address.as_ref().unwrap_or(&self.0.bootstrap);
        let mut channels = self.0.channels.lock();
        if let Some(channel) = channels.get(address) {
            return channel.clone();
        }
        if channels.len() >= CHANNELS_MAX {
            channels.clear(); // open streams hold theirs; the others connect again
        }
        let channel = address.endpoint().connect_lazy();
        channels.insert(address.clone(), channel.clone());
        channel
    }

    /// Connects to the configured server; one that refuses is asked again until `deadline`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] with the address and what kept it from being reached in time.
    pub(crate) async fn reach(&self, mut backoff: Backoff, deadline: Instant) -> Result<(), Error> {
        let address = &self.0.bootstrap;
        loop {
            let words = match timeout_at(deadline, address.endpoint().connect()).await {
                Ok(Ok(channel)) => {
                    self.0.channels.lock().insert(address.clone(), channel);
                    return Ok(());
                }
                Ok(Err(error)) => innermost(&error),
                Err(_) => "it does not answer".to_owned(),
            };
            let pause = backoff.pause(None);
            if Instant::now() + pause >= deadline {
                return Err(Error::Unavailable(format!("{}: {words}", address.0)));
            }
            sleep(pause).await;
        }
    }

    pub(crate) fn publisher(&self, owner: Option<&str>) -> PublisherClient<Channel> {
        PublisherClient::new(self.channel(owner))
            .max_decoding_message_size(FRAME_BYTES_MAX)
            .max_encoding_message_size(FRAME_BYTES_MAX)
    }

    pub(crate) fn subscriber(&self, owner: Option<&str>) -> SubscriberClient<Channel> {
        SubscriberClient::new(self.channel(owner))
            .max_decoding_message_size(FRAME_BYTES_MAX)
            .max_encoding_message_size(FRAME_BYTES_MAX)
    }

    pub(crate) fn discovery(&self) -> DiscoveryClient<Channel> {
        DiscoveryClient::new(self.channel(None))
    }

    pub(crate) fn admin(&self) -> AdminClient<Channel> {
        AdminClient::new(self.channel(None)).max_decoding_message_size(FRAME_BYTES_MAX)
    }
}

#[cfg(test)]
mod tests {
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
}
