//! One connection, and what is asked with one call over it.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use geminga_proto::{
    admin::v1::{
        CreateSubscriptionRequest, CreateTopicRequest, DescribeSubscriptionRequest,
        DescribeTopicRequest, SegmentState, SetPoliciesRequest, Subscription, TierStatusRequest,
        admin_client::AdminClient,
    },
    key_hash::key_hash,
    reason::{DOMAIN, Reason},
    v1::{
        Batch, PayloadFormat, Policies, PublishRequest, Receipt, Record, RecordBatch, RecordIndex,
        SubscriptionSettings, SubscriptionStart, SubscriptionType,
        publisher_client::PublisherClient, subscriber_client::SubscriberClient,
    },
};
use prost::Message;
use tokio::runtime::Runtime;
use tonic::{Status, transport::Channel};
use tonic_types::StatusExt;

use crate::{
    harness::{PATIENCE, eventually},
    world::{self, World},
};

/// Largest gRPC message that a test takes or sends.
const FRAME_MAX: usize = 64 * 1024 * 1024;

#[derive(Clone)]
pub(crate) struct Client {
    channel: Channel,
}

/// A client whose connections end all at once, as with its process. (Streams that are only dropped may look as if they had
/// been closed well.)
pub(crate) struct Mortal {
    pub(crate) client: Client,
    runtime: Option<Runtime>,
}

impl Mortal {
    pub(crate) async fn start(world: &Arc<World>) -> Self {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).enable_all().build().expect("a runtime");
        let world = Arc::clone(world);
        let client = runtime.spawn(async move { world.client().await });
        Self { client: client.await.expect("it connects"), runtime: Some(runtime) }
    }
}

impl Drop for Mortal {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Client {
    pub(crate) async fn connect(address: &str) -> Option<Self> {
        Some(Self { channel: world::channel(address).await? })
    }

    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    pub(crate) fn admin(&self) -> AdminClient<Channel> {
        AdminClient::new(self.channel())
    }

    pub(crate) fn publisher(&self) -> PublisherClient<Channel> {
        PublisherClient::new(self.channel())
            .max_decoding_message_size(FRAME_MAX)
            .max_encoding_message_size(FRAME_MAX)
    }

    pub(crate) fn subscriber(&self) -> SubscriberClient<Channel> {
        SubscriberClient::new(self.channel()).max_decoding_message_size(FRAME_MAX)
    }

    /// Creates a topic.
    pub(crate) async fn topic(&self, name: &str, segments: u32) {
        retrying("create the topic", async || {
            let request = CreateTopicRequest { name: name.to_owned(), segments };
            self.admin().create_topic(request).await
        })
        .await;
    }

    /// Creates a subscription from the earliest message on.
    pub(crate) async fn subscription(
        &self,
        topic: &str,
        name: &str,
        settings: SubscriptionSettings,
    ) {
        retrying("create the subscription", async || {
            self.admin()
                .create_subscription(CreateSubscriptionRequest {
                    topic: topic.to_owned(),
                    name: name.to_owned(),
                    start: SubscriptionStart::Earliest.into(),
                    settings: Some(settings.clone()),
                })
                .await
        })
        .await;
    }

    pub(crate) async fn describe(&self, topic: &str, name: &str) -> Subscription {
        retrying("describe the subscription", async || {
            let (topic, name) = (topic.to_owned(), name.to_owned());
            self.admin().describe_subscription(DescribeSubscriptionRequest { topic, name }).await
        })
        .await
    }

    /// A segment as its owner describes it.
    pub(crate) async fn state(&self, topic: &str, segment: u32) -> SegmentState {
        let described = retrying("describe the topic", async || {
            let request = DescribeTopicRequest { name: topic.to_owned() };
            self.admin().describe_topic(request).await
        })
        .await;
        described.segments.into_iter().find(|of| of.segment == segment).expect("it has it")
    }

    /// Sets policies of a scope; those that are absent stay.
    pub(crate) async fn set_policies(&self, scope: &str, policies: Policies) {
        self.change_policies(scope, policies, &[]).await;
    }

    /// Takes policies from the level above again.
    pub(crate) async fn unset_policies(&self, scope: &str, unset: &[&str]) {
        self.change_policies(scope, Policies::default(), unset).await;
    }

    async fn change_policies(&self, scope: &str, policies: Policies, unset: &[&str]) {
        let unset = unset.iter().map(|name| (*name).to_owned()).collect();
        let request =
            SetPoliciesRequest { scope: scope.to_owned(), policies: Some(policies), unset };
        retrying("set policies", async || self.admin().set_policies(request.clone()).await).await;
    }

    /// Waits until the owners of a topic act by such policies.
    pub(crate) async fn in_force(&self, topic: &str, wanted: impl Fn(&Policies) -> bool) {
        eventually("the policy is in force", async || {
            let request = TierStatusRequest { topic: topic.to_owned() };
            let told = self.admin().tier_status(request).await.ok()?.into_inner().segments;
            let all = told.iter().all(|of| of.in_force.as_ref().is_some_and(&wanted));
            (all && !told.is_empty()).then_some(())
        })
        .await;
    }

    /// Publishes records to a segment, with one call, and gives the offset of the first.
    pub(crate) async fn publish(&self, topic: &str, segment: u32, messages: &[Outgoing]) -> u64 {
        self.publish_as("", 0, topic, segment, messages).await.base_offset
    }

    /// As [`Self::publish`], as a named producer that sent up to `prev` before.
    pub(crate) async fn publish_as(
        &self,
        producer: &str,
        prev: u64,
        topic: &str,
        segment: u32,
        messages: &[Outgoing],
    ) -> Receipt {
        let request = PublishRequest {
            topic: topic.to_owned(),
            segment: Some(segment),
            producer_name: producer.to_owned(),
            batch: Some(batch(prev, messages)),
        };
        let response =
            retrying("publish", async || self.publisher().publish(request.clone()).await).await;
        response.receipt.expect("a receipt")
    }
}

/// A message to be published.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outgoing {
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) value: Vec<u8>,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) event_time_ms: Option<u64>,
    pub(crate) deliver_at_ms: u64,
}

impl Outgoing {
    pub(crate) fn new(value: impl AsRef<[u8]>) -> Self {
        Self { value: value.as_ref().to_vec(), ..Self::default() }
    }

    pub(crate) fn key(mut self, key: impl AsRef<[u8]>) -> Self {
        self.key = Some(key.as_ref().to_vec());
        self
    }
}

/// So many messages: `m-0`, `m-1`, ...
pub(crate) fn numbered(count: usize) -> Vec<Outgoing> {
    (0..count).map(|number| Outgoing::new(format!("m-{number}"))).collect()
}

/// A batch with the next sequences after `prev`.
pub(crate) fn batch(prev: u64, messages: &[Outgoing]) -> Batch {
    let records: Vec<Record> = messages
        .iter()
        .map(|message| Record {
            key: message.key.clone().map(Bytes::from),
            value: message.value.clone().into(),
            headers: message.headers.iter().cloned().collect(),
            event_time_ms: message.event_time_ms,
        })
        .collect();
    let delays = messages.iter().any(|message| message.deliver_at_ms > 0);
    let hash = |message: &Outgoing| key_hash(message.key.as_deref().unwrap_or_default());
    let payload = RecordBatch { records }.encode_to_vec();
    let count = u32::try_from(messages.len()).expect("few");
    Batch {
        prev_sequence: prev,
        lo_sequence: prev + 1,
        hi_sequence: prev + u64::from(count),
        format: PayloadFormat::Native.into(),
        uncompressed_size: u32::try_from(payload.len()).expect("small"),
        index: Some(RecordIndex {
            key_hash: messages.iter().map(hash).collect(),
            has_key: messages.iter().map(|message| message.key.is_some()).collect(),
            deliver_at_ms: if delays {
                messages.iter().map(|message| message.deliver_at_ms).collect()
            } else {
                Vec::new()
            },
        }),
        count,
        payload: payload.into(),
        ..Batch::default()
    }
}

pub(crate) fn settings(kind: SubscriptionType) -> SubscriptionSettings {
    SubscriptionSettings { r#type: kind.into(), ..SubscriptionSettings::default() }
}

/// The reason of a refusal.
pub(crate) fn reason(status: &Status) -> Option<Reason> {
    let info = status.get_details_error_info()?;
    assert_eq!(info.domain, DOMAIN, "{status:?}");
    Reason::parse(&info.reason)
}

/// What a call that must be refused is refused for; the name of the reason, or what came instead.
pub(crate) fn refusal<T>(result: Result<T, Status>) -> String {
    match result {
        Ok(_) => "nothing: it was taken".to_owned(),
        Err(status) => match reason(&status) {
            Some(reason) => reason.as_str().to_owned(),
            None => format!("an untyped {:?}: {}", status.code(), status.message()),
        },
    }
}

/// Whether the server asks to try again.
pub(crate) fn passing(status: &Status) -> bool {
    matches!(status.code(), tonic::Code::Unavailable | tonic::Code::DeadlineExceeded)
        || reason(status).is_some_and(|reason| reason.retry() == geminga_proto::reason::Retry::Safe)
}

/// Repeats what the server asks to repeat.
///
/// # Panics
/// With what the server says to anything else.
pub(crate) async fn retrying<T>(
    what: &str,
    mut call: impl AsyncFnMut() -> Result<tonic::Response<T>, Status>,
) -> T {
    eventually(what, async || match call().await {
        Ok(response) => Some(response.into_inner()),
        Err(status) => {
            assert!(passing(&status), "{what}: {status:?}");
            None
        }
    })
    .await
}

/// Fails loudly instead of waiting for ever.
pub(crate) async fn in_time<T>(what: &str, work: impl Future<Output = T>) -> T {
    let patience = PATIENCE.min(Duration::from_secs(30));
    match tokio::time::timeout(patience, work).await {
        Ok(done) => done,
        Err(_) => panic!("not within {patience:?}: {what}"),
    }
}
