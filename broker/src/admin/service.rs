//! The handlers: check, parse, ask the catalog or the life cycle, describe.

use geminga_proto::{
    admin::v1::{
        CancelDelayedRequest, CancelDelayedResponse, Cluster, CompactTopicRequest,
        CreateNamespaceRequest, CreateSubscriptionRequest, CreateTenantRequest, CreateTopicRequest,
        DeleteNamespaceRequest, DeleteNamespaceResponse, DeleteSubscriptionRequest,
        DeleteSubscriptionResponse, DeleteTenantRequest, DeleteTenantResponse, DeleteTopicRequest,
        DeleteTopicResponse, DescribeClusterRequest, DescribeLedgerRequest,
        DescribeNamespaceRequest, DescribeSubscriptionRequest, DescribeTenantRequest,
        DescribeTopicRequest, DrainBookieRequest, DrainBookieResponse, DrainBrokerRequest,
        DrainBrokerResponse, GetPoliciesRequest, Ledger, ListBookiesRequest, ListBookiesResponse,
        ListBrokersRequest, ListBrokersResponse, ListDelayedRequest, ListDelayedResponse,
        ListLedgersRequest, ListLedgersResponse, ListNamespacesRequest, ListNamespacesResponse,
        ListSubscriptionsRequest, ListSubscriptionsResponse, ListTenantsRequest,
        ListTenantsResponse, ListTopicsRequest, ListTopicsResponse, LocateTopicRequest,
        LocateTopicResponse, Namespace, OffloadTopicRequest, PoliciesResponse, SetPoliciesRequest,
        Subscription, Tenant, TierStatusRequest, TierStatusResponse, Topic,
        UpdateSubscriptionRequest, VerifyTierRequest, admin_server::Admin,
    },
    internal::v1::segment_request::{Compact, DescribeCursor, OffloadTier, Verb, VerifyTier},
    names::{NamespaceName, SubscriptionName, TenantName, TopicName},
    reason::Reason,
};
use tokio::time::timeout;
use tonic::{Request, Response, Status};

use super::{bookies, cluster, describe, ledgers, policies, tier};
use crate::{
    auth::Authorized,
    catalog::PageRequest,
    context::Shared,
    errors::Refusal,
    lifecycle,
    listener::Connection,
    relay,
    subscription::{self, start_of},
};

/// The service.
#[derive(Clone, Debug)]
pub(crate) struct AdminService(pub(crate) Shared);

impl AdminService {
    /// The one way through every handler: permission first, then the work, refusals counted.
    async fn call<R, T, F>(
        &self,
        request: Request<R>,
        work: impl FnOnce(Shared, R) -> F,
    ) -> Result<Response<T>, Status>
    where
        R: Authorized,
        F: Future<Output = Result<T, Refusal>>,
    {
        let shared = self.0.clone();
        let connection = Connection::of(&request, &shared.config.limits);
        let request = request.into_inner();
        let result = match shared.admit(&connection, &request) {
            // Every step can be repeated: what is left half done here is brought to its end by the next call (C6).
            Ok(()) => timeout(shared.config.limits.unary_deadline, work(shared.clone(), request))
                .await
                .unwrap_or_else(|_| {
                    let message = "not done in time; the call may be repeated";
                    Err(Refusal::new(Reason::DeadlineExceeded, message))
                }),
            Err(refusal) => Err(refusal),
        };
        result.map(Response::new).map_err(|refusal| shared.refused(refusal))
    }
}

fn page(shared: &Shared, size: u32, token: String) -> PageRequest {
    let most = shared.config.limits.page_items_max;
    let size = if size == 0 { most } else { most.min(size as usize) };
    PageRequest { size, token }
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn create_tenant(
        &self,
        request: Request<CreateTenantRequest>,
    ) -> Result<Response<Tenant>, Status> {
        self.call(request, |s, r| async move {
            let tenant = s.catalog.create_tenant(&TenantName::parse(&r.name)?).await?;
            let namespaces = s.catalog.namespace_count(&tenant.name).await?;
            Ok(describe::tenant(&tenant, Some(namespaces)))
        })
        .await
    }

    async fn list_tenants(
        &self,
        request: Request<ListTenantsRequest>,
    ) -> Result<Response<ListTenantsResponse>, Status> {
        self.call(request, |s, r| async move {
            let listing = s.catalog.tenants(&page(&s, r.page_size, r.page_token)).await?;
            let tenants =
                listing.items.iter().map(|tenant| describe::tenant(tenant, None)).collect();
            Ok(ListTenantsResponse { tenants, next_page_token: listing.next_page_token })
        })
        .await
    }

    async fn describe_tenant(
        &self,
        request: Request<DescribeTenantRequest>,
    ) -> Result<Response<Tenant>, Status> {
        self.call(request, |s, r| async move {
            let tenant = s.catalog.tenant(&TenantName::parse(&r.name)?).await?;
            let namespaces = s.catalog.namespace_count(&tenant.name).await?;
            Ok(describe::tenant(&tenant, Some(namespaces)))
        })
        .await
    }

    async fn delete_tenant(
        &self,
        request: Request<DeleteTenantRequest>,
    ) -> Result<Response<DeleteTenantResponse>, Status> {
        self.call(request, |s, r| async move {
            s.catalog.delete_tenant(&TenantName::parse(&r.name)?).await?;
            Ok(DeleteTenantResponse {})
        })
        .await
    }

    async fn create_namespace(
        &self,
        request: Request<CreateNamespaceRequest>,
    ) -> Result<Response<Namespace>, Status> {
        self.call(request, |s, r| async move {
            let name = NamespaceName::parse(&r.name)?;
            let namespace = s.catalog.create_namespace(&name, r.auto_create_topics).await?;
            let topics = s.catalog.topic_count(&name).await?;
            Ok(describe::namespace(&namespace, Some(topics)))
        })
        .await
    }

    async fn list_namespaces(
        &self,
        request: Request<ListNamespacesRequest>,
    ) -> Result<Response<ListNamespacesResponse>, Status> {
        self.call(request, |s, r| async move {
            let tenant = TenantName::parse(&r.tenant)?;
            let listing =
                s.catalog.namespaces(&tenant, &page(&s, r.page_size, r.page_token)).await?;
            let namespaces = listing
                .items
                .iter()
                .map(|namespace| describe::namespace(namespace, None))
                .collect();
            Ok(ListNamespacesResponse { namespaces, next_page_token: listing.next_page_token })
        })
        .await
    }

    async fn describe_namespace(
        &self,
        request: Request<DescribeNamespaceRequest>,
    ) -> Result<Response<Namespace>, Status> {
        self.call(request, |s, r| async move {
            let namespace = s.catalog.namespace(&NamespaceName::parse(&r.name)?).await?;
            let topics = s.catalog.topic_count(&namespace.name).await?;
            Ok(describe::namespace(&namespace, Some(topics)))
        })
        .await
    }

    async fn delete_namespace(
        &self,
        request: Request<DeleteNamespaceRequest>,
    ) -> Result<Response<DeleteNamespaceResponse>, Status> {
        self.call(request, |s, r| async move {
            s.catalog.delete_namespace(&NamespaceName::parse(&r.name)?).await?;
            Ok(DeleteNamespaceResponse {})
        })
        .await
    }

    async fn create_topic(
        &self,
        request: Request<CreateTopicRequest>,
    ) -> Result<Response<Topic>, Status> {
        self.call(request, |s, r| async move {
            let segments = r.segments.max(1);
            let topic = lifecycle::create_topic(&s, &TopicName::parse(&r.name)?, segments).await?;
            Ok(describe::topic(&topic))
        })
        .await
    }

    async fn list_topics(
        &self,
        request: Request<ListTopicsRequest>,
    ) -> Result<Response<ListTopicsResponse>, Status> {
        self.call(request, |s, r| async move {
            let namespace = NamespaceName::parse(&r.namespace)?;
            let listing =
                s.catalog.topics(&namespace, &page(&s, r.page_size, r.page_token)).await?;
            let topics = listing.items.iter().map(describe::topic).collect();
            Ok(ListTopicsResponse { topics, next_page_token: listing.next_page_token })
        })
        .await
    }

    async fn describe_topic(
        &self,
        request: Request<DescribeTopicRequest>,
    ) -> Result<Response<Topic>, Status> {
        self.call(request, |s, r| async move {
            let topic = s.catalog.topic(&TopicName::parse(&r.name)?).await?;
            Ok(describe::topic_with_segments(&s, &topic).await)
        })
        .await
    }

    async fn delete_topic(
        &self,
        request: Request<DeleteTopicRequest>,
    ) -> Result<Response<DeleteTopicResponse>, Status> {
        self.call(request, |s, r| async move {
            lifecycle::delete_topic(&s, &TopicName::parse(&r.name)?).await?;
            Ok(DeleteTopicResponse {})
        })
        .await
    }

    async fn create_subscription(
        &self,
        request: Request<CreateSubscriptionRequest>,
    ) -> Result<Response<Subscription>, Status> {
        self.call(request, |s, r| async move {
            let topic = s.catalog.topic(&TopicName::parse(&r.topic)?).await?;
            let (name, start) = (SubscriptionName::parse(&r.name)?, start_of(r.start)?);
            let settings = subscription::settings(&r.settings.unwrap_or_default())?;
            let start = (start, false);
            let subscription =
                lifecycle::create_subscription(&s, &topic, &name, start, Some(&settings)).await?;
            Ok(describe::subscription(&topic, &subscription))
        })
        .await
    }

    async fn list_subscriptions(
        &self,
        request: Request<ListSubscriptionsRequest>,
    ) -> Result<Response<ListSubscriptionsResponse>, Status> {
        self.call(request, |s, r| async move {
            let topic = s.catalog.topic(&TopicName::parse(&r.topic)?).await?;
            let listing =
                s.catalog.subscriptions(&topic, &page(&s, r.page_size, r.page_token)).await?;
            let subscriptions =
                listing.items.iter().map(|found| describe::subscription(&topic, found)).collect();
            Ok(ListSubscriptionsResponse {
                subscriptions,
                next_page_token: listing.next_page_token,
            })
        })
        .await
    }

    async fn describe_subscription(
        &self,
        request: Request<DescribeSubscriptionRequest>,
    ) -> Result<Response<Subscription>, Status> {
        self.call(request, |s, r| async move {
            let topic = s.catalog.topic(&TopicName::parse(&r.topic)?).await?;
            let found = s.catalog.subscription(&topic, &SubscriptionName::parse(&r.name)?).await?;
            let mut described = describe::subscription(&topic, &found);
            for id in topic.segment_ids() {
                let verb = Verb::DescribeCursor(DescribeCursor { subscription: found.id.0 });
                described.cursors.extend(relay::ask(&s, id, verb).await?.cursor);
            }
            Ok(described)
        })
        .await
    }

    async fn delete_subscription(
        &self,
        request: Request<DeleteSubscriptionRequest>,
    ) -> Result<Response<DeleteSubscriptionResponse>, Status> {
        self.call(request, |s, r| async move {
            let topic = s.catalog.topic(&TopicName::parse(&r.topic)?).await?;
            lifecycle::delete_subscription(&s, &topic, &SubscriptionName::parse(&r.name)?).await?;
            Ok(DeleteSubscriptionResponse {})
        })
        .await
    }

    async fn describe_cluster(
        &self,
        request: Request<DescribeClusterRequest>,
    ) -> Result<Response<Cluster>, Status> {
        self.call(request, |s, _r| async move { cluster::describe(&s).await }).await
    }

    async fn list_brokers(
        &self,
        request: Request<ListBrokersRequest>,
    ) -> Result<Response<ListBrokersResponse>, Status> {
        self.call(request, |s, _r| async move { cluster::list_brokers(&s).await }).await
    }

    async fn drain_broker(
        &self,
        request: Request<DrainBrokerRequest>,
    ) -> Result<Response<DrainBrokerResponse>, Status> {
        self.call(request, |s, r| async move { cluster::drain_broker(&s, &r).await }).await
    }

    async fn list_bookies(
        &self,
        request: Request<ListBookiesRequest>,
    ) -> Result<Response<ListBookiesResponse>, Status> {
        self.call(request, |s, _r| async move { bookies::list(&s).await }).await
    }

    async fn drain_bookie(
        &self,
        request: Request<DrainBookieRequest>,
    ) -> Result<Response<DrainBookieResponse>, Status> {
        self.call(request, |s, r| async move { bookies::drain(&s, &r).await }).await
    }

    async fn locate_topic(
        &self,
        request: Request<LocateTopicRequest>,
    ) -> Result<Response<LocateTopicResponse>, Status> {
        self.call(request, |s, r| async move { cluster::locate(&s, &r).await }).await
    }

    async fn list_ledgers(
        &self,
        request: Request<ListLedgersRequest>,
    ) -> Result<Response<ListLedgersResponse>, Status> {
        self.call(request, |s, r| async move { ledgers::list(&s, &r).await }).await
    }

    async fn describe_ledger(
        &self,
        request: Request<DescribeLedgerRequest>,
    ) -> Result<Response<Ledger>, Status> {
        self.call(request, |s, r| async move { ledgers::describe(&s, &r).await }).await
    }

    async fn get_policies(
        &self,
        request: Request<GetPoliciesRequest>,
    ) -> Result<Response<PoliciesResponse>, Status> {
        self.call(request, |s, r| async move { policies::get(&s, &r).await }).await
    }

    async fn set_policies(
        &self,
        request: Request<SetPoliciesRequest>,
    ) -> Result<Response<PoliciesResponse>, Status> {
        self.call(request, |s, r| async move { policies::set(&s, &r).await }).await
    }

    async fn tier_status(
        &self,
        request: Request<TierStatusRequest>,
    ) -> Result<Response<TierStatusResponse>, Status> {
        self.call(request, |s, r| async move { tier::status(&s, &r).await }).await
    }

    type OffloadTopicStream = relay::Steps;

    async fn offload_topic(
        &self,
        request: Request<OffloadTopicRequest>,
    ) -> Result<Response<Self::OffloadTopicStream>, Status> {
        let connection = Connection::of(&request, &self.0.config.limits);
        let request = request.into_inner();
        let verb = Verb::OffloadTier(OffloadTier { roll: request.roll });
        let steps = tier::walk(&self.0, &connection, &request, &request.topic, verb).await;
        steps.map(Response::new).map_err(|refusal| self.0.refused(refusal))
    }

    type VerifyTierStream = relay::Steps;

    async fn verify_tier(
        &self,
        request: Request<VerifyTierRequest>,
    ) -> Result<Response<Self::VerifyTierStream>, Status> {
        let connection = Connection::of(&request, &self.0.config.limits);
        let request = request.into_inner();
        let verb = Verb::VerifyTier(VerifyTier {});
        let steps = tier::walk(&self.0, &connection, &request, &request.topic, verb).await;
        steps.map(Response::new).map_err(|refusal| self.0.refused(refusal))
    }

    type CompactTopicStream = relay::Steps;

    async fn compact_topic(
        &self,
        request: Request<CompactTopicRequest>,
    ) -> Result<Response<Self::CompactTopicStream>, Status> {
        let connection = Connection::of(&request, &self.0.config.limits);
        let request = request.into_inner();
        let verb = Verb::Compact(Compact {});
        let steps = tier::walk(&self.0, &connection, &request, &request.topic, verb).await;
        steps.map(Response::new).map_err(|refusal| self.0.refused(refusal))
    }

    async fn update_subscription(
        &self,
        request: Request<UpdateSubscriptionRequest>,
    ) -> Result<Response<Subscription>, Status> {
        self.call(request, |s, r| async move {
            let topic = s.catalog.topic(&TopicName::parse(&r.topic)?).await?;
            let name = SubscriptionName::parse(&r.name)?;
            let settings = r.settings.ok_or_else(|| Refusal::request("settings are missing"))?;
            let updated = lifecycle::update_subscription(&s, &topic, &name, &settings).await?;
            Ok(describe::subscription(&topic, &updated))
        })
        .await
    }

    async fn list_delayed(
        &self,
        request: Request<ListDelayedRequest>,
    ) -> Result<Response<ListDelayedResponse>, Status> {
        self.call(request, |s, r| async move { subscription::list_delayed(&s, r).await }).await
    }

    async fn cancel_delayed(
        &self,
        request: Request<CancelDelayedRequest>,
    ) -> Result<Response<CancelDelayedResponse>, Status> {
        self.call(request, |s, r| async move { subscription::cancel_delayed(&s, r).await }).await
    }
}
