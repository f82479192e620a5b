//! Administration: typed names in, plain descriptions out.

use std::time::Duration;

use geminga_proto::{
    admin::v1::{self as pb, admin_client::AdminClient},
    names::{NamespaceName, SubscriptionName, TenantName, TopicName},
    v1::{OffsetRange, SubscriptionSettings},
};
use tonic::{Request, Response, Status, transport::Channel};

use crate::{connection::Connections, consumer::Start, error::Error};

/// Administrative calls. Each create is idempotent for equal parameters. Every call ends within the client's open
/// timeout; a change whose call timed out may still happen, and may be repeated.
#[derive(Clone, Debug)]
pub struct Admin {
    connections: Connections,
    timeout: Duration,
}

/// Items asked for in one page of a listing.
const PAGE_ITEMS: u32 = 500;
/// Most pages one listing reads: a listing is bounded, whatever a server answers.
const PAGES_MAX: u32 = 2_000;

macro_rules! call {
    ($self:ident, $method:ident, $request:expr) => {{
        let mut client = $self.client();
        let request = $self.request($request);
        answer(client.$method(request).await)
    }};
}

macro_rules! listing {
    ($self:ident, $method:ident, $field:ident, $request:ident { $($name:ident: $value:expr),* }) => {{
        let mut all = Vec::new();
        let mut page_token = String::new();
        for _ in 0..PAGES_MAX {
            let request = pb::$request { page_size: PAGE_ITEMS, page_token, $($name: $value),* };
            let page = call!($self, $method, request)?;
            all.extend(page.$field);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        Ok(all)
    }};
}

mod cluster;

pub use cluster::TierWalk;

fn answer<T>(result: Result<Response<T>, Status>) -> Result<T, Error> {
    Ok(result?.into_inner())
}

/// # Errors
/// Every call gives the server's refusal, or that there is no server.
impl Admin {
    pub(crate) fn new(connections: Connections, timeout: Duration) -> Self {
        Self { connections, timeout }
    }

    fn client(&self) -> AdminClient<Channel> {
        self.connections.admin()
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.timeout);
        request
    }

    /// Creates a tenant.
    pub async fn create_tenant(&self, name: &TenantName) -> Result<pb::Tenant, Error> {
        call!(self, create_tenant, pb::CreateTenantRequest { name: name.to_string() })
    }

    /// All tenants.
    pub async fn tenants(&self) -> Result<Vec<pb::Tenant>, Error> {
        listing!(self, list_tenants, tenants, ListTenantsRequest {})
    }

    /// One tenant.
    pub async fn tenant(&self, name: &TenantName) -> Result<pb::Tenant, Error> {
        call!(self, describe_tenant, pb::DescribeTenantRequest { name: name.to_string() })
    }

    /// Deletes an empty tenant.
    pub async fn delete_tenant(&self, name: &TenantName) -> Result<(), Error> {
        call!(self, delete_tenant, pb::DeleteTenantRequest { name: name.to_string() }).map(drop)
    }

    /// Creates a namespace; `auto_create_topics`: whether a missing topic is created on first use (none: the server's
    /// policy).
    pub async fn create_namespace(
        &self,
        name: &NamespaceName,
        auto_create_topics: Option<bool>,
    ) -> Result<pb::Namespace, Error> {
        let request = pb::CreateNamespaceRequest { name: name.to_string(), auto_create_topics };
        call!(self, create_namespace, request)
    }

    /// All namespaces of a tenant.
    pub async fn namespaces(&self, tenant: &TenantName) -> Result<Vec<pb::Namespace>, Error> {
        listing!(
            self,
            list_namespaces,
            namespaces,
            ListNamespacesRequest { tenant: tenant.to_string() }
        )
    }

    /// One namespace.
    pub async fn namespace(&self, name: &NamespaceName) -> Result<pb::Namespace, Error> {
        call!(self, describe_namespace, pb::DescribeNamespaceRequest { name: name.to_string() })
    }

    /// Deletes an empty namespace.
    pub async fn delete_namespace(&self, name: &NamespaceName) -> Result<(), Error> {
        call!(self, delete_namespace, pb::DeleteNamespaceRequest { name: name.to_string() })
            .map(drop)
    }

    /// Creates a topic of `segments` equal key ranges; 0 means 1.
    pub async fn create_topic(&self, name: &TopicName, segments: u32) -> Result<pb::Topic, Error> {
        call!(self, create_topic, pb::CreateTopicRequest { name: name.to_string(), segments })
    }

    /// All topics of a namespace.
    pub async fn topics(&self, namespace: &NamespaceName) -> Result<Vec<pb::Topic>, Error> {
        listing!(self, list_topics, topics, ListTopicsRequest { namespace: namespace.to_string() })
    }

    /// One topic, with the state of its segments.
    pub async fn topic(&self, name: &TopicName) -> Result<pb::Topic, Error> {
        call!(self, describe_topic, pb::DescribeTopicRequest { name: name.to_string() })
    }

    /// Deletes a topic with everything in it.
    pub async fn delete_topic(&self, name: &TopicName) -> Result<(), Error> {
        call!(self, delete_topic, pb::DeleteTopicRequest { name: name.to_string() }).map(drop)
    }

    /// Creates an exclusive subscription without a limit of attempts.
    pub async fn create_subscription(
        &self,
        topic: &TopicName,
        name: &SubscriptionName,
        start: Start,
    ) -> Result<pb::Subscription, Error> {
        self.create_subscription_as(topic, name, start, None).await
    }

    /// Creates a subscription of this type, with this retry policy and lease.
    pub async fn create_subscription_as(
        &self,
        topic: &TopicName,
        name: &SubscriptionName,
        start: Start,
        settings: Option<SubscriptionSettings>,
    ) -> Result<pb::Subscription, Error> {
        let request = pb::CreateSubscriptionRequest {
            topic: topic.to_string(),
            name: name.to_string(),
            start: start.on_the_wire().into(),
            settings,
        };
        call!(self, create_subscription, request)
    }

    /// Replaces the retry policy and the lease of a subscription; its type stays. In force within seconds.
    pub async fn update_subscription(
        &self,
        topic: &TopicName,
        name: &SubscriptionName,
        settings: SubscriptionSettings,
    ) -> Result<pb::Subscription, Error> {
        let request = pb::UpdateSubscriptionRequest {
            topic: topic.to_string(),
            name: name.to_string(),
            settings: Some(settings),
        };
        call!(self, update_subscription, request)
    }

    /// At most `limit` messages of a segment that wait for a time, the next due first.
    pub async fn delayed(
        &self,
        topic: &TopicName,
        subscription: &SubscriptionName,
        segment: u32,
        limit: usize,
    ) -> Result<Vec<pb::DelayedMessage>, Error> {
        let mut all = Vec::new();
        let mut page_token = String::new();
        for _ in 0..PAGES_MAX {
            let request = pb::ListDelayedRequest {
                topic: topic.to_string(),
                subscription: subscription.to_string(),
                segment,
                page_size: PAGE_ITEMS.min(u32::try_from(limit - all.len()).unwrap_or(PAGE_ITEMS)),
                page_token,
            };
            let page = call!(self, list_delayed, request)?;
            all.extend(page.messages);
            all.truncate(limit);
            page_token = page.next_page_token;
            if page_token.is_empty() || all.len() == limit {
                break;
            }
        }
        Ok(all)
    }

    /// Settles messages that wait for a time, so that they are never delivered; how many there were.
    pub async fn cancel_delayed(
        &self,
        topic: &TopicName,
        subscription: &SubscriptionName,
        segment: u32,
        ranges: &[(u64, u64)],
    ) -> Result<u64, Error> {
        let ranges = ranges.iter().map(|(first, last)| OffsetRange { first: *first, last: *last });
        let request = pb::CancelDelayedRequest {
            topic: topic.to_string(),
            subscription: subscription.to_string(),
            segment,
            ranges: ranges.collect(),
        };
        Ok(call!(self, cancel_delayed, request)?.cancelled)
    }

    /// All subscriptions of a topic.
    pub async fn subscriptions(&self, topic: &TopicName) -> Result<Vec<pb::Subscription>, Error> {
        listing!(
            self,
            list_subscriptions,
            subscriptions,
            ListSubscriptionsRequest { topic: topic.to_string() }
        )
    }

    /// One subscription, with its cursors.
    pub async fn subscription(
        &self,
        topic: &TopicName,
        name: &SubscriptionName,
    ) -> Result<pb::Subscription, Error> {
        let request =
            pb::DescribeSubscriptionRequest { topic: topic.to_string(), name: name.to_string() };
        call!(self, describe_subscription, request)
    }

    /// Deletes a subscription; what it had not settled is forgotten.
    pub async fn delete_subscription(
        &self,
        topic: &TopicName,
        name: &SubscriptionName,
    ) -> Result<(), Error> {
        let request =
            pb::DeleteSubscriptionRequest { topic: topic.to_string(), name: name.to_string() };
        call!(self, delete_subscription, request).map(drop)
    }
}
