//! What there is of a pool. Reads only.

use std::collections::BTreeMap;

use geminga_runtime::clock::Timestamp;
use k8s_openapi::api::{
    apps::v1::StatefulSet,
    core::v1::{PersistentVolumeClaim, Pod, Service},
};
use kube::{Resource, ResourceExt};
use serde_json::Value;

use super::plan::{ClaimSeen, Observed, PodSeen, ServerSeen, SetSeen, claim_name, ordinal};
use crate::{
    controllers::{
        context::{Context, Error, Reached},
        marks::Marks,
        pods,
    },
    crd::{BookiePool, GemingaCluster},
    kubernetes::Namespace,
    manifest::TEMPLATE,
    workloads::{bookie_selector, pool_selector, set_name},
};

pub(super) async fn observe(
    pool: &BookiePool,
    marks: &Marks,
    context: &Context,
) -> Result<Observed, Error> {
    let namespace = pool.namespace().unwrap_or_default();
    let kubernetes = Namespace::new(&context.client, &namespace);
    let (cluster, name) = (&pool.spec.cluster, pool.name_any());
    let set = set_name(&name);
    let live = kubernetes.live::<StatefulSet>(&set).await?;
    let mut observed = Observed { set: live.as_ref().map(set_seen), ..Observed::default() };
    if let Some(live) = live {
        observed.objects.insert("StatefulSet".into(), live);
    }
    let pods = kubernetes.list::<Pod>(&pool_selector(cluster, &name)).await?;
    let now = context.clock.now();
    observed.pods = pods.iter().map(|pod| pod_seen(pod, now)).collect();
    if marks.paused || marks.deleting_since_ms.is_some() {
        return Ok(observed); // only counted
    }
    if let Some(live) = kubernetes.live::<Service>(&set).await? {
        observed.objects.insert("Service".into(), live);
    }
    let found = kubernetes.get::<GemingaCluster>(cluster).await?;
    let found = found.filter(|found| found.metadata.deletion_timestamp.is_none());
    observed.cluster = found.map(|found| found.spec);
    // Claims of a StatefulSet carry its selector's labels.
    let claims = kubernetes.list::<PersistentVolumeClaim>(&pool_selector(cluster, &name)).await?;
    let ours = |claim: &&PersistentVolumeClaim| {
        let pod = claim.name_any();
        let pod = pod.strip_prefix("data-").unwrap_or_default();
        ordinal(&set, pod).is_some() && claim_name(pod) == claim.name_any()
    };
    observed.claims = claims.iter().filter(ours).map(claim_seen).collect();
    observed.others = others(&kubernetes, cluster, &set, now).await?;
    observed.server = match context.reach(&namespace, &pool.cluster_ref()).await? {
        Reached::Gone => ServerSeen::Silent("there is no such cluster".into()),
        Reached::Silent(why) => ServerSeen::Silent(why),
        Reached::Server(server) => match server.cluster().await {
            Ok(facts) => ServerSeen::Answers(facts),
            Err(error) => ServerSeen::Silent(error.to_string()),
        },
    };
    Ok(observed)
}

/// What keeps other pools of the cluster from being whole: at most one bookie of a cluster is replaced at a time.
async fn others(
    kubernetes: &Namespace<'_>,
    cluster: &str,
    own: &str,
    now: Timestamp,
) -> Result<Option<String>, Error> {
    let selector = bookie_selector(cluster);
    let pods = kubernetes.list::<Pod>(&selector).await?;
    let pods: Vec<PodSeen> = pods.iter().map(|pod| pod_seen(pod, now)).collect();
    for set in kubernetes.list::<StatefulSet>(&selector).await? {
        let name = set.name_any();
        if name == own {
            continue;
        }
        let wanted = set.spec.and_then(|spec| spec.replicas).unwrap_or(1);
        let whole = pods
            .iter()
            .filter(|pod| ordinal(&name, &pod.name).is_some_and(|ordinal| ordinal < wanted))
            .filter(|pod| pod.ready && !pod.terminating)
            .count();
        if i32::try_from(whole).unwrap_or(i32::MAX) < wanted {
            return Ok(Some(format!("{whole} of {wanted} pods of {name} are ready")));
        }
    }
    Ok(None)
}

fn set_seen(set: &Value) -> SetSeen {
    let replicas = set.pointer("/spec/replicas").and_then(Value::as_i64).unwrap_or(1);
    let storage = "/spec/volumeClaimTemplates/0/spec/resources/requests/storage";
    SetSeen {
        replicas: i32::try_from(replicas).unwrap_or(i32::MAX),
        storage: set.pointer(storage).and_then(Value::as_str).unwrap_or_default().to_owned(),
    }
}

fn pod_seen(pod: &Pod, now: Timestamp) -> PodSeen {
    let image = pod.spec.as_ref().and_then(|spec| spec.containers.first()?.image.clone());
    PodSeen {
        name: pod.name_any(),
        uid: pod.uid().unwrap_or_default(),
        template: pod.annotations().get(TEMPLATE).cloned().unwrap_or_default(),
        image: image.unwrap_or_default(),
        ready: pods::is_ready(pod),
        terminating: pod.meta().deletion_timestamp.is_some(),
        stopped: pods::stopped(pod),
        trouble: pods::trouble(pod, now),
    }
}

fn claim_seen(claim: &PersistentVolumeClaim) -> ClaimSeen {
    let requests = claim.spec.as_ref().and_then(|spec| spec.resources.as_ref()?.requests.as_ref());
    let capacity = claim.status.as_ref().and_then(|status| status.capacity.as_ref());
    let storage = |sizes: Option<&BTreeMap<String, _>>| {
        sizes
            .and_then(|sizes| sizes.get("storage"))
            .map(|size: &k8s_openapi::apimachinery::pkg::api::resource::Quantity| size.0.clone())
            .unwrap_or_default()
    };
    let conditions = claim.status.as_ref().and_then(|status| status.conditions.as_deref());
    // Resizing, FileSystemResizePending, and what went wrong with them.
    let growth =
        conditions.unwrap_or_default().iter().rfind(|c| c.status == "True").map(|c| {
            match c.message.as_deref().filter(|words| !words.is_empty()) {
                Some(words) => format!("{}: {words}", c.type_),
                None => c.type_.clone(),
            }
        });
    ClaimSeen {
        name: claim.name_any(),
        requested: storage(requests),
        capacity: storage(capacity),
        growth,
        terminating: claim.meta().deletion_timestamp.is_some(),
    }
}
