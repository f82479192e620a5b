//! Two operators: one works, the other takes over.

use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use serde_json::json;

use crate::{
    apiserver::Kubernetes,
    harness::{eventually, free_port},
};

async fn holder(leases: &Api<Lease>) -> Option<String> {
    let lease = leases.get_opt("geminga-operator").await.expect("the API server answers")?;
    lease.spec?.holder_identity.filter(|holder| !holder.is_empty())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_operator_takes_over_after_a_kill_and_at_once_after_an_orderly_end() {
    let kubernetes = Kubernetes::start().await;
    let leases: Api<Lease> = kubernetes.api();
    let mut first = kubernetes.operator("first", free_port());
    let held = eventually("the first one leads", async || holder(&leases).await).await;
    assert!(held.starts_with("first_"), "{held}");
    let mut second = kubernetes.operator("second", free_port());
    second.wrote("operator second runs").await;

    first.kill();
    eventually("the second one leads", async || {
        holder(&leases).await.filter(|holder| holder.starts_with("second_"))
    })
    .await;
    let reference = json!({"kind": "GemingaConnection", "name": "nowhere"});
    kubernetes.apply("Topic", "orders", json!({"clusterRef": reference})).await.expect("sound");
    kubernetes.settles("Topic", "orders", "False", "ClusterNotFound").await;

    let mut third = kubernetes.operator("third", free_port());
    third.wrote("operator third runs").await;
    second.terminate().await;
    eventually("the third one leads", async || {
        holder(&leases).await.filter(|holder| holder.starts_with("third_"))
    })
    .await;
    third.terminate().await;
    assert_eq!(holder(&leases).await, None, "it was given back");
}
