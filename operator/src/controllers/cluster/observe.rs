//! What there is of a cluster. Reads only.

use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{Pod, Service},
    policy::v1::PodDisruptionBudget,
};
use kube::ResourceExt;
use serde_json::Value;

use super::plan::{BrokersSeen, Observed, PoolSeen};
use crate::{
    controllers::{
        context::{Context, Error, Reached},
        marks::Marks,
        pods,
        pool::plan::ServerSeen,
    },
    crd::{BookiePool, GemingaCluster},
    kubernetes::Namespace,
    workloads::{broker_name, broker_selector},
};

pub(super) async fn observe(
    cluster: &GemingaCluster,
    marks: &Marks,
    context: &Context,
) -> Result<Observed, Error> {
    let namespace = cluster.namespace().unwrap_or_default();
    let kubernetes = Namespace::new(&context.client, &namespace);
    let name = cluster.name_any();
    let brokers = broker_name(&name);
    let mut observed = Observed::default();
    if let Some(live) = kubernetes.live::<Deployment>(&brokers).await? {
        observed.brokers = Some(brokers_seen(&live));
        observed.objects.insert(format!("Deployment/{brokers}"), live);
    }
    if marks.paused || marks.deleting_since_ms.is_some() {
        return Ok(observed); // only counted
    }
    if let Some(live) = kubernetes.live::<Service>(&brokers).await? {
        observed.objects.insert(format!("Service/{brokers}"), live);
    }
    if let Some(seen) = observed.brokers.as_mut().filter(|seen| seen.trouble.is_none()) {
        let wanted = cluster.spec.brokers.replicas;
        if seen.ready < wanted || seen.updated < wanted {
            let pods = kubernetes.list::<Pod>(&broker_selector(&name)).await?;
            let now = context.clock.now();
            seen.trouble = pods.iter().find_map(|pod| pods::trouble(pod, now));
        }
    }
    for component in ["broker", "bookie"] {
        let budget = format!("{name}-{component}");
        if let Some(live) = kubernetes.live::<PodDisruptionBudget>(&budget).await? {
            observed.objects.insert(format!("PodDisruptionBudget/{budget}"), live);
        }
    }
    let pools = kubernetes.list::<BookiePool>("").await?;
    let ours = pools.into_iter().filter(|pool| pool.spec.cluster == name);
    observed.pools = ours.map(pool_seen).collect();
    match context.reach(&namespace, &cluster.itself()).await? {
        Reached::Gone => {}
        Reached::Silent(why) => observed.server = ServerSeen::Silent(why),
        Reached::Server(server) => match server.cluster().await {
            Ok(facts) => {
                let managed =
                    cluster.status.as_ref().is_some_and(|s| !s.managed_policies.is_empty());
                if managed || cluster.spec.policies.is_some() {
                    observed.own_policies = server.policies("").await?;
                }
                observed.server = ServerSeen::Answers(facts);
            }
            Err(error) => observed.server = ServerSeen::Silent(error.to_string()),
        },
    }
    Ok(observed)
}

fn pool_seen(pool: BookiePool) -> PoolSeen {
    PoolSeen {
        name: pool.name_any(),
        replicas: pool.spec.replicas,
        image: pool.status.map(|status| status.image).unwrap_or_default(),
    }
}

fn brokers_seen(live: &Value) -> BrokersSeen {
    let number = |path: &str| {
        let found = live.pointer(path).and_then(Value::as_i64).unwrap_or_default();
        i32::try_from(found).unwrap_or(i32::MAX)
    };
    let image = live.pointer("/spec/template/spec/containers/0/image");
    let conditions = live.pointer("/status/conditions").and_then(Value::as_array);
    // A quota, or an admission rule, that refuses the pods themselves.
    let refused = conditions
        .into_iter()
        .flatten()
        .find(|condition| condition["type"] == "ReplicaFailure" && condition["status"] == "True");
    let trouble = refused.map(|condition| {
        let word = |key: &str| condition[key].as_str().unwrap_or_default();
        format!("no pod can be made: {}: {}", word("reason"), word("message"))
    });
    BrokersSeen {
        trouble,
        image: image.and_then(Value::as_str).unwrap_or_default().to_owned(),
        replicas: number("/status/replicas"),
        ready: number("/status/readyReplicas"),
        updated: number("/status/updatedReplicas"),
        settled: live.pointer("/status/observedGeneration") == live.pointer("/metadata/generation"),
    }
}
