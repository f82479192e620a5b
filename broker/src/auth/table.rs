//! The permission table: request type -> (action, resource). A request type without a row has no [`Authorized`] and does
//! not compile where a handler passes it to the gate.

use geminga_proto::{
    admin::v1::{
        CancelDelayedRequest, CompactTopicRequest, CreateNamespaceRequest,
        CreateSubscriptionRequest, CreateTenantRequest, CreateTopicRequest, DeleteNamespaceRequest,
        DeleteSubscriptionRequest, DeleteTenantRequest, DeleteTopicRequest, DescribeClusterRequest,
        DescribeLedgerRequest, DescribeNamespaceRequest, DescribeSubscriptionRequest,
        DescribeTenantRequest, DescribeTopicRequest, DrainBookieRequest, DrainBrokerRequest,
        GetPoliciesRequest, ListBookiesRequest, ListBrokersRequest, ListDelayedRequest,
        ListLedgersRequest, ListNamespacesRequest, ListSubscriptionsRequest, ListTenantsRequest,
        ListTopicsRequest, LocateTopicRequest, OffloadTopicRequest, SetPoliciesRequest,
        TierStatusRequest, UpdateSubscriptionRequest, VerifyTierRequest,
    },
    internal::v1::SegmentRequest,
    names::{NamespaceName, SubscriptionName, TenantName, TopicName},
    v1::{
        ExplainRequest, OpenConsume, OpenPublish, PeekRequest, PublishRequest, PullRequest,
        SeekRequest, SettleRequest, WatchRequest, WatchTopicsRequest,
    },
};

use super::{Action, Resource};
use crate::errors::Refusal;

/// What a request needs; a bulk call needs the sum of its single ones.
pub trait Authorized {
    /// Every (action, resource) pair.
    ///
    /// # Errors
    /// INVALID_NAME when a name cannot exist: there is nothing to permit.
    fn needs(&self) -> Result<Vec<(Action, Resource)>, Refusal>;
}

macro_rules! table {
    ($($request:ty => |$r:ident| $action:ident, $resource:expr;)*) => {
        $(impl Authorized for $request {
            fn needs(&self) -> Result<Vec<(Action, Resource)>, Refusal> {
                let $r = self;
                Ok(vec![(Action::$action, $resource)])
            }
        })*
    };
}

fn cluster() -> Resource {
    Resource::Cluster
}

fn tenant(name: &str) -> Result<Resource, Refusal> {
    Ok(Resource::Tenant(TenantName::parse(name)?))
}

fn namespace(name: &str) -> Result<Resource, Refusal> {
    Ok(Resource::Namespace(NamespaceName::parse(name)?))
}

fn topic(name: &str) -> Result<Resource, Refusal> {
    Ok(Resource::Topic(TopicName::parse(name)?))
}

/// Empty, tenant, tenant/namespace, or tenant/namespace/topic.
fn scope(name: &str) -> Result<Resource, Refusal> {
    match name.matches('/').count() {
        0 if name.is_empty() => Ok(cluster()),
        0 => tenant(name),
        2 => topic(name),
        _ => namespace(name),
    }
}

fn subscription(topic: &str, name: &str) -> Result<Resource, Refusal> {
    Ok(Resource::Subscription(TopicName::parse(topic)?, SubscriptionName::parse(name)?))
}

table! {
    PublishRequest              => |r| Publish,  topic(&r.topic)?;
    OpenPublish                 => |r| Publish,  topic(&r.topic)?;
    SettleRequest               => |r| Consume,  subscription(&r.topic, &r.subscription)?;
    PullRequest                 => |r| Consume,  subscription(&r.topic, &r.subscription)?;
    SeekRequest                 => |r| Consume,  subscription(&r.topic, &r.subscription)?;
    PeekRequest                 => |r| Consume,  topic(&r.topic)?;
    ExplainRequest              => |r| Describe, subscription(&r.topic, &r.subscription)?;
    UpdateSubscriptionRequest   => |r| Configure, subscription(&r.topic, &r.name)?;
    ListDelayedRequest          => |r| Describe, subscription(&r.topic, &r.subscription)?;
    CancelDelayedRequest        => |r| Consume,  subscription(&r.topic, &r.subscription)?;
    CreateTenantRequest         => |_r| Create,  cluster();
    ListTenantsRequest          => |_r| List,    cluster();
    DescribeTenantRequest       => |r| Describe, tenant(&r.name)?;
    DeleteTenantRequest         => |_r| Delete,  cluster();
    CreateNamespaceRequest      => |r| Create,   Resource::Tenant(NamespaceName::parse(&r.name)?.tenant().clone());
    ListNamespacesRequest       => |r| List,     tenant(&r.tenant)?;
    DescribeNamespaceRequest    => |r| Describe, namespace(&r.name)?;
    DeleteNamespaceRequest      => |r| Delete,   Resource::Tenant(NamespaceName::parse(&r.name)?.tenant().clone());
    CreateTopicRequest          => |r| Create,   Resource::Namespace(TopicName::parse(&r.name)?.namespace().clone());
    ListTopicsRequest           => |r| List,     namespace(&r.namespace)?;
    WatchTopicsRequest          => |r| List,     namespace(&r.namespace)?;
    DescribeTopicRequest        => |r| Describe, topic(&r.name)?;
    DeleteTopicRequest          => |r| Delete,   Resource::Namespace(TopicName::parse(&r.name)?.namespace().clone());
    CreateSubscriptionRequest   => |r| Create,   topic(&r.topic)?;
    ListSubscriptionsRequest    => |r| List,     topic(&r.topic)?;
    DescribeSubscriptionRequest => |r| Describe, subscription(&r.topic, &r.name)?;
    DeleteSubscriptionRequest   => |r| Delete,   topic(&r.topic)?;
    DescribeClusterRequest      => |_r| Describe, cluster();
    ListBrokersRequest          => |_r| List,    cluster();
    DrainBrokerRequest          => |_r| Operate, cluster();
    ListBookiesRequest          => |_r| List,    cluster();
    DrainBookieRequest          => |_r| Operate, cluster();
    LocateTopicRequest          => |r| Lookup,   topic(&r.name)?;
    ListLedgersRequest          => |r| List,     if r.topic.is_empty() { cluster() } else { topic(&r.topic)? };
    DescribeLedgerRequest       => |_r| Describe, cluster();
    GetPoliciesRequest          => |r| Describe, scope(&r.scope)?;
    SetPoliciesRequest          => |r| Configure, scope(&r.scope)?;
    TierStatusRequest           => |r| Describe, topic(&r.topic)?;
    OffloadTopicRequest         => |r| Operate,  topic(&r.topic)?;
    VerifyTierRequest           => |r| Operate,  topic(&r.topic)?;
    CompactTopicRequest         => |r| Operate,  topic(&r.topic)?;
    SegmentRequest              => |_r| Serve,   cluster();
}

impl Authorized for OpenConsume {
    /// Consuming needs the subscription; creating it on the way needs what `CreateSubscription` needs.
    fn needs(&self) -> Result<Vec<(Action, Resource)>, Refusal> {
        if self.reader.is_some() {
            return Ok(vec![(Action::Consume, topic(&self.topic)?)]);
        }
        let mut needs = vec![(Action::Consume, subscription(&self.topic, &self.subscription)?)];
        if self.create_at.is_some() {
            needs.push((Action::Create, topic(&self.topic)?));
        }
        Ok(needs)
    }
}

impl Authorized for WatchRequest {
    /// Looking up needs the topic; creating it on the way needs what `CreateTopic` needs.
    fn needs(&self) -> Result<Vec<(Action, Resource)>, Refusal> {
        let mut needs = vec![(Action::Lookup, topic(&self.topic)?)];
        if self.create_if_missing {
            needs.push((
                Action::Create,
                Resource::Namespace(TopicName::parse(&self.topic)?.namespace().clone()),
            ));
        }
        Ok(needs)
    }
}
