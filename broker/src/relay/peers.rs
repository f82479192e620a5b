//! Connections to other brokers: one per address, made when first used, a bounded number.

use std::{collections::BTreeMap, error::Error, sync::Arc, time::Duration};

use geminga_proto::{
    admin::v1::TierProgress,
    internal::v1::{SegmentReply, SegmentRequest, segments_client::SegmentsClient},
    reason::Reason,
    v1::{publisher_client::PublisherClient, subscriber_client::SubscriberClient},
};
use parking_lot::Mutex;
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint},
};

use crate::{
    config::{Limits, REQUEST_BYTES_MAX},
    errors::{Refusal, of_peer},
};

/// Channels kept for later use.
const CHANNELS_MAX: usize = 64;
/// Time for a connection to stand.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Delay told to those whose owner cannot be reached: its registration stands until its lease has run out.
const UNREACHABLE_DELAY: Duration = Duration::from_millis(500);
/// HTTP/2 flow-control windows, bytes.
const WINDOW_BYTES: u32 = 4 * 1024 * 1024;

/// Connections to other brokers. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Peers {
    channels: Arc<Mutex<BTreeMap<String, Channel>>>,
    limits: Arc<Limits>,
}

impl Peers {
    pub(crate) fn new(limits: Limits) -> Self {
        Self { channels: Arc::default(), limits: Arc::new(limits) }
    }

    /// Asks the broker at this address about a segment.
    ///
    /// # Errors
    /// What it answers; SEGMENT_LOADING when it was not reached, DEADLINE_EXCEEDED when it was and did not answer.
    pub(crate) async fn ask(
        &self,
        address: &str,
        request: SegmentRequest,
    ) -> Result<SegmentReply, Refusal> {
        let mut client = SegmentsClient::new(self.channel(address).await?)
            .max_decoding_message_size(self.limits.settle_frame_bytes_max());
        let answer = client.ask(request).await;
        answer.map(tonic::Response::into_inner).map_err(|status| self.failed(address, &status))
    }

    /// Begins a walk over a segment's objects at the broker at this address.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub(super) async fn walk(
        &self,
        address: &str,
        request: SegmentRequest,
    ) -> Result<Streaming<TierProgress>, Refusal> {
        let mut client = SegmentsClient::new(self.channel(address).await?)
            .max_decoding_message_size(REQUEST_BYTES_MAX);
        let steps = client.walk(request).await;
        steps.map(tonic::Response::into_inner).map_err(|status| self.failed(address, &status))
    }

    pub(super) async fn publisher(
        &self,
        address: &str,
    ) -> Result<PublisherClient<Channel>, Refusal> {
        let most = self.limits.frame_bytes_max();
        Ok(PublisherClient::new(self.channel(address).await?)
            .max_decoding_message_size(most)
            .max_encoding_message_size(most))
    }

    pub(super) async fn subscriber(
        &self,
        address: &str,
    ) -> Result<SubscriberClient<Channel>, Refusal> {
        let most = self.limits.frame_bytes_max().max(self.limits.settle_frame_bytes_max());
        Ok(SubscriberClient::new(self.channel(address).await?)
            .max_decoding_message_size(most)
            .max_encoding_message_size(most))
    }

    /// What a failed call means. The transport's own failures: not connected is safe to repeat, everything else is of
    /// unknown outcome.
    pub(super) fn failed(&self, address: &str, status: &Status) -> Refusal {
        if let Some(refusal) = of_peer(status) {
            return refusal;
        }
        self.channels.lock().remove(address);
        if never_connected(status) {
            return unreachable(address, status.message());
        }
        let message = format!("the owner at {address} did not answer: {}", status.message());
        Refusal::new(Reason::DeadlineExceeded, message)
    }

    async fn channel(&self, address: &str) -> Result<Channel, Refusal> {
        if let Some(channel) = self.channels.lock().get(address) {
            return Ok(channel.clone());
        }
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| Refusal::internal(format!("broker address {address:?}: {error}")))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(self.limits.keepalive_interval)
            .keep_alive_timeout(self.limits.keepalive_timeout)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES);
        let channel =
            endpoint.connect().await.map_err(|error| unreachable(address, &error.to_string()))?;
        let mut channels = self.channels.lock();
        if channels.len() >= CHANNELS_MAX {
            channels.clear(); // open streams hold theirs; the others connect again
        }
        channels.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }
}

fn unreachable(address: &str, why: &str) -> Refusal {
    let message = format!("the segment's owner at {address} cannot be reached: {why}");
    Refusal::new(Reason::SegmentLoading, message).after(UNREACHABLE_DELAY)
}

fn never_connected(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        source = error.source();
    }
    false
}
