//! What is read for a status, typed as the operator writes it.

use std::collections::BTreeSet;

use geminga_operator::{
    controllers::pods::is_ready,
    crd::{
        BookiePool, ClusterKind, Condition, ConditionStatus, ConditionType, DrainNote,
        GemingaCluster, GemingaConnection, Reason, Subscription, Tenant, Topic, TopicNamespace,
    },
    thing::Described,
    workloads::CLUSTER_LABEL,
};
use geminga_runtime::clock::{Clock, SystemClock};
use k8s_openapi::{
    api::core::v1::{Event, Pod},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{ResourceExt, api::ListParams};
use serde::Serialize;

use super::super::access::{Access, all, words};
use crate::cli::{
    exit::{Code, Failure},
    output,
};

/// Warnings that are shown, the latest.
const WARNINGS_MAX: usize = 10;
/// Events that are looked through for them.
const EVENTS_MAX: u32 = 1_000;

/// Everything that is shown.
#[derive(Debug, Default, Serialize)]
pub(super) struct State {
    pub(super) ready: bool,
    pub(super) clusters: Vec<Cluster>,
    pub(super) connections: Vec<Thing>,
    /// How many tenants, namespaces, topics and subscriptions there are.
    pub(super) objects: usize,
    /// Those of them that are not Ready, and pools whose cluster is not there.
    pub(super) not_ready: Vec<Thing>,
    pub(super) warnings: Vec<Warning>,
}

/// What an object's conditions say.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Said {
    pub(super) ready: ConditionStatus,
    pub(super) stalled: bool,
    pub(super) reason: Option<Reason>,
    pub(super) message: String,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Thing {
    pub(super) kind: String,
    pub(super) namespace: String,
    pub(super) name: String,
    #[serde(flatten)]
    pub(super) said: Said,
}

#[derive(Debug, Serialize)]
pub(super) struct Cluster {
    pub(super) namespace: String,
    pub(super) name: String,
    #[serde(flatten)]
    pub(super) said: Said,
    pub(super) conditions: Vec<Condition>,
    /// As the spec asks.
    pub(super) image: String,
    /// What its pods run; none where they may not be read.
    pub(super) images_running: BTreeSet<String>,
    /// Pods are replaced, or wait for it.
    pub(super) rolling: bool,
    pub(super) brokers: Count,
    /// Registered, of those that the pools ask for.
    pub(super) bookies: Count,
    pub(super) under_replicated_ledgers: i64,
    pub(super) pools: Vec<Pool>,
    /// Pods that do not serve, with what keeps them.
    pub(super) pods_not_ready: Vec<PodTrouble>,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Count {
    pub(super) ready: i32,
    pub(super) wanted: i32,
}

#[derive(Debug, Serialize)]
pub(super) struct Pool {
    pub(super) name: String,
    #[serde(flatten)]
    pub(super) said: Said,
    pub(super) zone: String,
    pub(super) bookies: Count,
    pub(super) updated: i32,
    pub(super) drains: Vec<DrainNote>,
}

#[derive(Debug, Serialize)]
pub(super) struct PodTrouble {
    pub(super) pod: String,
    pub(super) why: String,
}

#[derive(Debug, Serialize)]
pub(super) struct Warning {
    /// When it was seen last.
    pub(super) at: String,
    #[serde(skip)]
    pub(super) age_s: i64,
    pub(super) about: String,
    pub(super) reason: String,
    pub(super) message: String,
    pub(super) times: i32,
}

impl Said {
    fn of(meta: &ObjectMeta, conditions: &[Condition]) -> Self {
        let find = |type_| conditions.iter().find(|condition| condition.type_ == type_);
        let stalled =
            find(ConditionType::Stalled).filter(|found| found.status == ConditionStatus::True);
        let Some(ready) = find(ConditionType::Ready) else { return Self::unseen() };
        if ready.observed_generation < meta.generation.unwrap_or_default() {
            return Self::unseen();
        }
        let weightiest = stalled.unwrap_or(ready);
        Self {
            ready: ready.status,
            stalled: stalled.is_some(),
            reason: Some(weightiest.reason),
            message: weightiest.message.clone(),
        }
    }

    fn unseen() -> Self {
        Self {
            ready: ConditionStatus::Unknown,
            stalled: false,
            reason: None,
            message: "the operator has not looked at it yet".into(),
        }
    }

    fn is_ready(&self) -> bool {
        self.ready == ConditionStatus::True && !self.stalled
    }

    /// Reason and sentence.
    pub(super) fn words(&self) -> String {
        match self.reason {
            Some(reason) => format!("{reason:?}: {}", self.message),
            None => self.message.clone(),
        }
    }
}

impl Thing {
    fn new(kind: &str, meta: &ObjectMeta, conditions: &[Condition]) -> Self {
        Self {
            kind: kind.to_owned(),
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
            said: Said::of(meta, conditions),
        }
    }
}

impl State {
    /// Reads all of it; `name`: only what belongs to this cluster.
    pub(super) async fn read(access: &Access, name: Option<&str>) -> Result<Self, Failure> {
        let clusters: Vec<GemingaCluster> = access.list().await?;
        let ours = |found: &str| name.is_none_or(|name| name == found);
        if let Some(name) = name
            && !clusters.iter().any(|cluster| cluster.name_any() == name)
        {
            return Err(access.no_cluster(name, &clusters));
        }
        let pools: Vec<BookiePool> = access.list().await?;
        let mut state = Self::default();
        if name.is_none() {
            let connections: Vec<GemingaConnection> = access.list().await?;
            let thing = |one: &GemingaConnection| {
                let conditions = one.status.as_ref().map(|status| status.conditions.as_slice());
                Thing::new("GemingaConnection", &one.metadata, conditions.unwrap_or_default())
            };
            state.connections = connections.iter().map(thing).collect();
        }
        if clusters.is_empty() && state.connections.is_empty() {
            let words = format!(
                "there is no GemingaCluster and no GemingaConnection in {}",
                access.place()
            );
            return Err(Failure::new(Code::NotFound, words, "geminga kube status -A"));
        }
        let pods = pods(access).await;
        for cluster in clusters.iter().filter(|cluster| ours(&cluster.name_any())) {
            state.clusters.push(cluster_state(cluster, &pools, &pods));
        }
        let there = |pool: &BookiePool| {
            clusters.iter().any(|cluster| {
                cluster.name_any() == pool.spec.cluster && cluster.namespace() == pool.namespace()
            })
        };
        for pool in pools.iter().filter(|pool| name.is_none() && !there(pool)) {
            state.not_ready.push(Thing::new("BookiePool", &pool.metadata, conditions(pool)));
        }
        state.things::<Tenant>(access, name).await?;
        state.things::<TopicNamespace>(access, name).await?;
        state.things::<Topic>(access, name).await?;
        state.things::<Subscription>(access, name).await?;
        state.warnings = warnings(access, &state, name).await;
        state.ready = state.first_trouble().is_none();
        Ok(state)
    }

    /// Counts the objects of a server kind, and keeps those that are not Ready.
    async fn things<K: Described>(
        &mut self,
        access: &Access,
        name: Option<&str>,
    ) -> Result<(), Failure> {
        for object in access.list::<K>().await? {
            let of = object.cluster_ref();
            let ours =
                name.is_none_or(|name| of.kind == ClusterKind::GemingaCluster && of.name == name);
            if !ours {
                continue;
            }
            self.objects += 1;
            let thing = Thing::new(&K::kind(&()), object.meta(), &object.status().conditions);
            if !thing.said.is_ready() {
                self.not_ready.push(thing);
            }
        }
        Ok(())
    }

    /// The first thing that is not Ready, in words.
    pub(super) fn first_trouble(&self) -> Option<String> {
        let of_clusters = self.clusters.iter().find_map(|cluster| {
            trouble("GemingaCluster", &cluster.name, &cluster.said).or_else(|| {
                cluster.pools.iter().find_map(|pool| trouble("BookiePool", &pool.name, &pool.said))
            })
        });
        let mut things = self.connections.iter().chain(&self.not_ready);
        of_clusters
            .or_else(|| things.find_map(|thing| trouble(&thing.kind, &thing.name, &thing.said)))
    }

    /// The command that tells more about it.
    pub(super) fn next(&self, flags: &str) -> String {
        let pods = self.clusters.iter().flat_map(|cluster| {
            cluster.pods_not_ready.iter().map(move |pod| (&cluster.namespace, &pod.pod))
        });
        match pods.into_iter().next() {
            Some((namespace, pod)) => format!("kubectl describe pod -n {namespace} {pod}"),
            None if self.clusters.is_empty() => format!("geminga kube plan{flags}"),
            None => format!("geminga kube status --wait-ready{flags}"),
        }
    }
}

fn trouble(kind: &str, name: &str, said: &Said) -> Option<String> {
    (!said.is_ready()).then(|| format!("{kind}/{name}: {}", said.words()))
}

fn conditions(pool: &BookiePool) -> &[Condition] {
    pool.status.as_ref().map_or(&[], |status| &status.conditions)
}

fn cluster_state(cluster: &GemingaCluster, pools: &[BookiePool], pods: &[Pod]) -> Cluster {
    let (name, namespace) = (cluster.name_any(), cluster.namespace().unwrap_or_default());
    let status = cluster.status.clone().unwrap_or_default();
    let ours = |pool: &&BookiePool| {
        pool.spec.cluster == name && pool.namespace().unwrap_or_default() == namespace
    };
    let pools: Vec<Pool> = pools.iter().filter(ours).map(pool_state).collect();
    let of = |pod: &&Pod| {
        pod.labels().get(CLUSTER_LABEL) == Some(&name)
            && pod.namespace().unwrap_or_default() == namespace
    };
    let said = Said::of(&cluster.metadata, &status.conditions);
    let under_way =
        [Reason::Rolling, Reason::RollBlocked, Reason::WaitingForBookies].map(Option::Some);
    let rolls = |said: &Said| under_way.contains(&said.reason);
    Cluster {
        rolling: rolls(&said) || pools.iter().any(|pool| rolls(&pool.said)),
        namespace: namespace.clone(),
        image: cluster.spec.image.clone(),
        images_running: pods.iter().filter(of).filter_map(image).collect(),
        brokers: Count { ready: status.brokers.ready, wanted: cluster.spec.brokers.replicas },
        bookies: Count {
            ready: status.bookies,
            wanted: pools.iter().map(|pool| pool.bookies.wanted).sum(),
        },
        under_replicated_ledgers: status.under_replicated_ledgers,
        pods_not_ready: pods.iter().filter(of).filter_map(pod_trouble).collect(),
        conditions: status.conditions,
        name,
        said,
        pools,
    }
}

fn pool_state(pool: &BookiePool) -> Pool {
    let status = pool.status.clone().unwrap_or_default();
    Pool {
        name: pool.name_any(),
        said: Said::of(&pool.metadata, &status.conditions),
        zone: pool.spec.zone.clone(),
        bookies: Count { ready: status.ready, wanted: pool.spec.replicas },
        updated: status.updated,
        drains: status.drains,
    }
}

/// Pods of all clusters; a user who may not see them sees the rest.
async fn pods(access: &Access) -> Vec<Pod> {
    match all(&access.api::<Pod>(), CLUSTER_LABEL).await {
        Ok(pods) => pods,
        Err(error) => {
            output::note(&format!("pods are not shown: {}", words(&error)));
            Vec::new()
        }
    }
}

fn image(pod: &Pod) -> Option<String> {
    pod.spec.as_ref()?.containers.first()?.image.clone()
}

/// Why a pod does not serve: what its containers wait for or ended of, else what its conditions say.
fn pod_trouble(pod: &Pod) -> Option<PodTrouble> {
    let status = pod.status.as_ref()?;
    if is_ready(pod) {
        return None;
    }
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let containers = status.container_statuses.iter().flatten();
    let waits = containers.clone().find_map(|one| {
        let waiting = one.state.as_ref()?.waiting.as_ref()?;
        Some((waiting.reason.clone()?, waiting.message.clone().unwrap_or_default()))
    });
    let ended = containers.clone().find_map(|one| {
        let ended = one.last_state.as_ref()?.terminated.as_ref()?;
        Some(format!("{} (exit code {})", ended.reason.clone()?, ended.exit_code))
    });
    let condition = || {
        let failing = conditions.iter().find(|condition| condition.status == "False")?;
        Some((failing.reason.clone()?, failing.message.clone().unwrap_or_default()))
    };
    let going = pod.metadata.deletion_timestamp.as_ref();
    let (reason, message) = match going {
        Some(_) => ("Terminating".to_owned(), String::new()),
        None => waits.or_else(condition).unwrap_or(("NotReady".to_owned(), String::new())),
    };
    let mut why = reason;
    if !message.is_empty() {
        why = format!("{why}: {message}");
    }
    if let Some(ended) = ended {
        why = format!("{why}; ended before: {ended}");
    }
    Some(PodTrouble { pod: pod.name_any(), why })
}

/// The latest Warnings about our kinds and what is made from them.
async fn warnings(access: &Access, state: &State, name: Option<&str>) -> Vec<Warning> {
    let params = ListParams::default().fields("type=Warning").limit(EVENTS_MAX);
    let events = match access.api::<Event>().list(&params).await {
        Ok(events) => events.items,
        Err(error) => {
            output::note(&format!("events are not shown: {}", words(&error)));
            return Vec::new();
        }
    };
    // Names begin with those of their cluster or pool: demo-broker-..., main-bookie-0, data-main-bookie-0.
    let parts: Vec<String> = state
        .clusters
        .iter()
        .flat_map(|cluster| {
            let pools = cluster.pools.iter().map(|pool| format!("{}-bookie", pool.name));
            [format!("{}-broker", cluster.name)].into_iter().chain(pools)
        })
        .collect();
    let named: Vec<&str> = state
        .clusters
        .iter()
        .flat_map(|cluster| {
            let pools = cluster.pools.iter().map(|pool| pool.name.as_str());
            [cluster.name.as_str()].into_iter().chain(pools)
        })
        .collect();
    let ours = |event: &Event| {
        let about = &event.involved_object;
        let object = about.name.as_deref().unwrap_or_default();
        let of_ours = about.api_version.as_deref().unwrap_or_default().starts_with("geminga.io/");
        let object = object.strip_prefix("data-").unwrap_or(object);
        match name {
            None if of_ours => true,
            _ => {
                (of_ours && named.contains(&object))
                    || (!of_ours && parts.iter().any(|part| object.starts_with(part.as_str())))
            }
        }
    };
    let now = i64::try_from(SystemClock.now().0 / 1_000).unwrap_or(i64::MAX);
    let mut found: Vec<Warning> =
        events.into_iter().filter(ours).map(|event| warning(event, now)).collect();
    found.sort_by_key(|warning| warning.age_s);
    found.truncate(WARNINGS_MAX);
    found
}

fn warning(event: Event, now_s: i64) -> Warning {
    let series = event.series.as_ref().and_then(|series| series.last_observed_time.clone());
    let at = series
        .map(|time| time.0)
        .or(event.last_timestamp.map(|time| time.0))
        .or(event.event_time.map(|time| time.0))
        .or(event.metadata.creation_timestamp.map(|time| time.0));
    let times = event.series.and_then(|series| series.count).or(event.count).unwrap_or(1);
    Warning {
        age_s: at.map_or(i64::MAX, |at| now_s - at.as_second()),
        at: at.map(|at| at.to_string()).unwrap_or_default(),
        about: format!(
            "{}/{}",
            event.involved_object.kind.unwrap_or_default(),
            event.involved_object.name.unwrap_or_default()
        ),
        reason: event.reason.unwrap_or_default(),
        message: event.message.unwrap_or_default(),
        times,
    }
}
