//! The table of paths: each is one unary call, its request made from path, query and body.

use std::future::Future;

use axum::{
    Json, Router,
    extract::{FromRequestParts, RawPathParams, Request},
    http::Method,
    response::{IntoResponse, Response},
    routing::{MethodFilter, on},
};
use geminga_proto::{
    admin::v1::admin_server::Admin, v1::publisher_server::Publisher,
    v1::subscriber_server::Subscriber,
};
use prost::Message;
use prost_reflect::MessageDescriptor;
use serde_json::{Map, Value};
use tonic::Status;

use crate::{
    Gateway,
    answer::Refused,
    guard::{self, Taken},
    json,
};

/// A field of the request that the path gives, and the parts of the path that make it, joined by `/`.
type PathField = (&'static str, &'static [&'static str]);

const TENANT: PathField = ("name", &["tenant"]);
const OF_TENANT: PathField = ("tenant", &["tenant"]);
const NAMESPACE: PathField = ("name", &["tenant", "namespace"]);
const OF_NAMESPACE: PathField = ("namespace", &["tenant", "namespace"]);
const TOPIC: PathField = ("name", &["tenant", "namespace", "topic"]);
const OF_TOPIC: PathField = ("topic", &["tenant", "namespace", "topic"]);
const SUBSCRIPTION: PathField = ("name", &["subscription"]);
const OF_SUBSCRIPTION: PathField = ("subscription", &["subscription"]);
const ID: PathField = ("id", &["id"]);

macro_rules! resources {
    ($($method:ident $path:literal $service:ident . $call:ident ( $package:literal $request:ident ) -> $answer:ident [$($field:ident),*];)*) => {
        /// Every path of the table.
        pub(crate) fn routes<P: Publisher, S: Subscriber, A: Admin>(gateway: &Gateway<P, S, A>) -> Router {
            let mut router = Router::new();
            $({
                let gateway = gateway.clone();
                let handler = move |request: Request| {
                    let gateway = gateway.clone();
                    async move {
                        let row = Row {
                            request: concat!($package, ".", stringify!($request)),
                            answer: concat!($package, ".", stringify!($answer)),
                            fields: &[$($field),*],
                        };
                        let service = std::sync::Arc::clone(&gateway.$service);
                        row.serve(&gateway, request, async move |call| service.$call(call).await).await
                    }
                };
                router = router.route($path, on(MethodFilter::$method, handler));
            })*
            router
        }

        /// The table for the documentation: method, path, request and answer message.
        const TABLE: &[(Method, &str, &str, &str)] = &[
            $((Method::$method, $path, concat!($package, ".", stringify!($request)), concat!($package, ".", stringify!($answer))),)*
        ];
    };
}

resources! {
    GET "/v1/tenants" admin.list_tenants("geminga.admin.v1" ListTenantsRequest) -> ListTenantsResponse [];
    POST "/v1/tenants" admin.create_tenant("geminga.admin.v1" CreateTenantRequest) -> Tenant [];
    GET "/v1/tenants/{tenant}" admin.describe_tenant("geminga.admin.v1" DescribeTenantRequest) -> Tenant [TENANT];
    DELETE "/v1/tenants/{tenant}" admin.delete_tenant("geminga.admin.v1" DeleteTenantRequest) -> DeleteTenantResponse [TENANT];
    GET "/v1/tenants/{tenant}/namespaces" admin.list_namespaces("geminga.admin.v1" ListNamespacesRequest) -> ListNamespacesResponse [OF_TENANT];
    POST "/v1/namespaces" admin.create_namespace("geminga.admin.v1" CreateNamespaceRequest) -> Namespace [];
    GET "/v1/namespaces/{tenant}/{namespace}" admin.describe_namespace("geminga.admin.v1" DescribeNamespaceRequest) -> Namespace [NAMESPACE];
    DELETE "/v1/namespaces/{tenant}/{namespace}" admin.delete_namespace("geminga.admin.v1" DeleteNamespaceRequest) -> DeleteNamespaceResponse [NAMESPACE];
    GET "/v1/namespaces/{tenant}/{namespace}/topics" admin.list_topics("geminga.admin.v1" ListTopicsRequest) -> ListTopicsResponse [OF_NAMESPACE];
    POST "/v1/topics" admin.create_topic("geminga.admin.v1" CreateTopicRequest) -> Topic [];
    GET "/v1/topics/{tenant}/{namespace}/{topic}" admin.describe_topic("geminga.admin.v1" DescribeTopicRequest) -> Topic [TOPIC];
    DELETE "/v1/topics/{tenant}/{namespace}/{topic}" admin.delete_topic("geminga.admin.v1" DeleteTopicRequest) -> DeleteTopicResponse [TOPIC];
    GET "/v1/topics/{tenant}/{namespace}/{topic}/location" admin.locate_topic("geminga.admin.v1" LocateTopicRequest) -> LocateTopicResponse [TOPIC];
    GET "/v1/topics/{tenant}/{namespace}/{topic}/tier" admin.tier_status("geminga.admin.v1" TierStatusRequest) -> TierStatusResponse [OF_TOPIC];
    GET "/v1/topics/{tenant}/{namespace}/{topic}/subscriptions" admin.list_subscriptions("geminga.admin.v1" ListSubscriptionsRequest) -> ListSubscriptionsResponse [OF_TOPIC];
    POST "/v1/topics/{tenant}/{namespace}/{topic}/subscriptions" admin.create_subscription("geminga.admin.v1" CreateSubscriptionRequest) -> Subscription [OF_TOPIC];
    GET "/v1/topics/{tenant}/{namespace}/{topic}/subscriptions/{subscription}" admin.describe_subscription("geminga.admin.v1" DescribeSubscriptionRequest) -> Subscription [OF_TOPIC, SUBSCRIPTION];
    PATCH "/v1/topics/{tenant}/{namespace}/{topic}/subscriptions/{subscription}" admin.update_subscription("geminga.admin.v1" UpdateSubscriptionRequest) -> Subscription [OF_TOPIC, SUBSCRIPTION];
    DELETE "/v1/topics/{tenant}/{namespace}/{topic}/subscriptions/{subscription}" admin.delete_subscription("geminga.admin.v1" DeleteSubscriptionRequest) -> DeleteSubscriptionResponse [OF_TOPIC, SUBSCRIPTION];
    GET "/v1/topics/{tenant}/{namespace}/{topic}/subscriptions/{subscription}/explain" subscriber.explain("geminga.v1" ExplainRequest) -> ExplainResponse [OF_TOPIC, OF_SUBSCRIPTION];
    POST "/v1/topics/{tenant}/{namespace}/{topic}/subscriptions/{subscription}/settle" subscriber.settle("geminga.v1" SettleRequest) -> SettleResponse [OF_TOPIC, OF_SUBSCRIPTION];
    POST "/v1/topics/{tenant}/{namespace}/{topic}/subscriptions/{subscription}/seek" subscriber.seek("geminga.v1" SeekRequest) -> SeekResponse [OF_TOPIC, OF_SUBSCRIPTION];
    GET "/v1/topics/{tenant}/{namespace}/{topic}/subscriptions/{subscription}/delayed" admin.list_delayed("geminga.admin.v1" ListDelayedRequest) -> ListDelayedResponse [OF_TOPIC, OF_SUBSCRIPTION];
    POST "/v1/topics/{tenant}/{namespace}/{topic}/subscriptions/{subscription}/delayed/cancel" admin.cancel_delayed("geminga.admin.v1" CancelDelayedRequest) -> CancelDelayedResponse [OF_TOPIC, OF_SUBSCRIPTION];
    GET "/v1/policies" admin.get_policies("geminga.admin.v1" GetPoliciesRequest) -> PoliciesResponse [];
    PATCH "/v1/policies" admin.set_policies("geminga.admin.v1" SetPoliciesRequest) -> PoliciesResponse [];
    GET "/v1/cluster" admin.describe_cluster("geminga.admin.v1" DescribeClusterRequest) -> Cluster [];
    GET "/v1/brokers" admin.list_brokers("geminga.admin.v1" ListBrokersRequest) -> ListBrokersResponse [];
    POST "/v1/brokers/{id}/drain" admin.drain_broker("geminga.admin.v1" DrainBrokerRequest) -> DrainBrokerResponse [ID];
    GET "/v1/bookies" admin.list_bookies("geminga.admin.v1" ListBookiesRequest) -> ListBookiesResponse [];
    POST "/v1/bookies/{id}/drain" admin.drain_bookie("geminga.admin.v1" DrainBookieRequest) -> DrainBookieResponse [ID];
    GET "/v1/ledgers" admin.list_ledgers("geminga.admin.v1" ListLedgersRequest) -> ListLedgersResponse [];
    GET "/v1/ledgers/{id}" admin.describe_ledger("geminga.admin.v1" DescribeLedgerRequest) -> Ledger [ID];
}

/// One path, as its handler needs it.
struct Row {
    request: &'static str,
    answer: &'static str,
    fields: &'static [PathField],
}

impl Row {
    async fn serve<P, S, A, Q, R, F>(
        self,
        gateway: &Gateway<P, S, A>,
        request: Request,
        call: impl FnOnce(tonic::Request<Q>) -> F,
    ) -> Response
    where
        Q: Message + Default,
        R: Message,
        F: Future<Output = Result<tonic::Response<R>, Status>>,
    {
        let answered = async {
            let mut taken = guard::take(request, &gateway.bodies, gateway.body_bytes_max).await?;
            let of = json::descriptor(self.request);
            let mut fields = asked_fields(&taken, &of)?;
            for (field, text) in path_fields(&mut taken.parts, self.fields).await? {
                fields.insert(field.to_owned(), text.into());
            }
            let message = json::read(of, fields)?;
            let answer = call(guard::call(&taken.parts, message)).await?.into_inner();
            Ok(Json(json::write(json::descriptor(self.answer), &answer)).into_response())
        };
        answered.await.unwrap_or_else(|refused: Refused| refused.into_response())
    }
}

/// What the path says, by field.
///
/// # Errors
/// INVALID_REQUEST for a path that is no text.
pub(crate) async fn path_fields(
    parts: &mut axum::http::request::Parts,
    fields: &[PathField],
) -> Result<Vec<(&'static str, String)>, Refused> {
    let params = RawPathParams::from_request_parts(parts, &())
        .await
        .map_err(|error| Refused::request(format!("the path cannot be read: {error}")))?;
    // A part with a slash in it, percent-encoded, would change which name it belongs to (S3).
    if let Some((part, _)) = params.iter().find(|(_, value)| value.contains('/')) {
        return Err(Refused::request(format!("the {part} in the path contains a slash")));
    }
    let value = |wanted: &str| {
        params.iter().find(|(name, _)| *name == wanted).map_or("", |(_, value)| value)
    };
    Ok(fields
        .iter()
        .map(|(field, parts)| {
            let texts: Vec<&str> = parts.iter().map(|part| value(part)).collect();
            (*field, texts.join("/"))
        })
        .collect())
}

/// The topic that a path names.
pub(crate) async fn topic(parts: &mut axum::http::request::Parts) -> Result<String, Refused> {
    let mut fields = path_fields(parts, &[OF_TOPIC]).await?;
    Ok(fields.remove(0).1)
}

/// The topic and the subscription that a path names.
pub(crate) async fn subscription(
    parts: &mut axum::http::request::Parts,
) -> Result<(String, String), Refused> {
    let mut fields = path_fields(parts, &[OF_TOPIC, OF_SUBSCRIPTION]).await?;
    let subscription = fields.remove(1).1;
    Ok((fields.remove(0).1, subscription))
}

/// The body's fields; an empty body has none.
///
/// # Errors
/// INVALID_REQUEST when it is no JSON object.
pub(crate) fn body_fields(body: &[u8]) -> Result<Map<String, Value>, Refused> {
    if body.iter().all(u8::is_ascii_whitespace) {
        return Ok(Map::new());
    }
    serde_json::from_slice(body)
        .map_err(|error| Refused::request(format!("the body is no JSON object: {error}")))
}

/// What body and query say of a request.
///
/// # Errors
/// INVALID_REQUEST.
pub(crate) fn asked_fields(
    taken: &Taken,
    of: &MessageDescriptor,
) -> Result<Map<String, Value>, Refused> {
    let mut fields = body_fields(&taken.body)?;
    for (name, text) in query(taken.parts.uri.query().unwrap_or_default()) {
        json::put(&mut fields, of, &name, &text)?;
    }
    Ok(fields)
}

/// The pairs of a query, decoded.
pub(crate) fn query(text: &str) -> Vec<(String, String)> {
    let uri: axum::http::Uri = match format!("/?{text}").parse() {
        Ok(uri) => uri,
        Err(_) => return Vec::new(),
    };
    axum::extract::Query::<Vec<(String, String)>>::try_from_uri(&uri)
        .map_or_else(|_| Vec::new(), |query| query.0)
}

/// The table of paths for the documentation.
pub(crate) fn markdown() -> String {
    let mut page = String::from("| method | path | request | answer |\n|---|---|---|---|\n");
    for (method, path, request, answer) in TABLE {
        page += &format!("| {method} | `{path}` | `{request}` | `{answer}` |\n");
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_names_messages_and_fields_of_the_api() {
        for (_, path, request, answer) in TABLE {
            json::descriptor(answer);
            let of = json::descriptor(request);
            assert!(of.fields().count() > 0 || !path.contains('{'), "{path}");
        }
        for field in [OF_TOPIC.0, OF_SUBSCRIPTION.0] {
            let explain = json::descriptor("geminga.v1.ExplainRequest");
            assert!(explain.get_field_by_name(field).is_some());
        }
    }

    #[test]
    fn a_query_is_decoded() {
        let pairs = query("a=1&b=x%20y&c");
        let expected = [("a", "1"), ("b", "x y"), ("c", "")];
        let expected: Vec<_> =
            expected.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        assert_eq!(pairs, expected);
    }

    #[test]
    fn a_body_is_an_object_or_nothing() {
        assert!(body_fields(b" \n").expect("nothing").is_empty());
        assert_eq!(body_fields(b"{\"a\":1}").expect("an object").len(), 1);
        for wrong in [&b"[]"[..], b"1", b"{", b"\xff"] {
            assert!(body_fields(wrong).is_err());
        }
    }
}
