//! Controllers: per kind observe (reads only), plan (pure, tested from YAML), apply, and a status from what was applied.

pub mod cluster;
mod connection;
pub mod context;
mod cycle;
pub mod marks;
pub mod pods;
mod policies;
pub mod pool;
pub mod preview;
pub mod resource;

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use geminga_runtime::tasks::Tasks;
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::{Deployment, StatefulSet},
        core::v1::{PersistentVolumeClaim, Pod, Service},
        policy::v1::PodDisruptionBudget,
    },
};
use kube::{
    Api, Resource, ResourceExt,
    runtime::{
        Config, Controller,
        controller::{Action, Error as ControllerError},
        reflector::ObjectRef,
        watcher,
    },
};

use self::{
    context::{Context, Error, RETRY},
    cycle::{Controlled, turn},
};
use crate::{
    crd::{
        BookiePool, GemingaCluster, GemingaConnection, Subscription, Tenant, Topic, TopicNamespace,
    },
    metrics::Metrics,
    workloads::{CLUSTER_LABEL, COMPONENT_LABEL, POOL_LABEL},
};

/// Objects of one kind that are worked on at a time: one server that does not answer must not keep the others waiting.
const AT_ONCE: u16 = 8;

/// Starts the controllers of every kind, in one namespace or in all. They end with `tasks`; one that ends by itself is a
/// failure of `tasks`.
pub fn start(context: Context, namespace: Option<&str>, tasks: &Tasks) {
    let context = Arc::new(context);
    let run = Runner { context, namespace, tasks };
    run.clusters();
    run.pools();
    run.resources::<GemingaConnection>("connections");
    run.resources::<Tenant>("tenants");
    run.resources::<TopicNamespace>("namespaces");
    run.resources::<Topic>("topics");
    run.resources::<Subscription>("subscriptions");
}

struct Runner<'a> {
    context: Arc<Context>,
    namespace: Option<&'a str>,
    tasks: &'a Tasks,
}

impl Runner<'_> {
    fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        let client = self.context.client.clone();
        match self.namespace {
            Some(namespace) => Api::namespaced(client, namespace),
            None => Api::all(client),
        }
    }

    fn clusters(&self) {
        let controller = Controller::new(self.api::<GemingaCluster>(), watcher::Config::default())
            .owns(self.api::<Deployment>(), ours())
            .owns(self.api::<Service>(), ours())
            .owns(self.api::<PodDisruptionBudget>(), ours())
            .watches(self.api::<BookiePool>(), watcher::Config::default(), |pool| {
                let namespace = pool.namespace().unwrap_or_default();
                Some(ObjectRef::new(&pool.spec.cluster).within(&namespace))
            });
        self.run("clusters", controller);
    }

    fn pools(&self) {
        let controller = Controller::new(self.api::<BookiePool>(), watcher::Config::default());
        let store = controller.store();
        let bookies = ours().labels(&format!("{COMPONENT_LABEL}=bookie,{CLUSTER_LABEL}"));
        let controller = controller
            .owns(self.api::<StatefulSet>(), ours())
            .owns(self.api::<Service>(), ours())
            .watches(self.api::<Pod>(), bookies.clone(), |pod| labelled(&pod))
            .watches(self.api::<PersistentVolumeClaim>(), bookies, |claim| labelled(&claim))
            .watches(self.api::<GemingaCluster>(), watcher::Config::default(), move |cluster| {
                let (name, namespace) = (cluster.name_any(), cluster.namespace());
                let of = |pool: &Arc<BookiePool>| {
                    pool.spec.cluster == name && pool.namespace() == namespace
                };
                let pools = store.state().into_iter().filter(of);
                pools.map(|pool| ObjectRef::from_obj(&*pool)).collect::<Vec<_>>()
            });
        self.run("pools", controller);
    }

    fn resources<K>(&self, name: &'static str)
    where
        K: Controlled + Send + Sync + 'static,
    {
        let controller = Controller::new(self.api::<K>(), watcher::Config::default());
        self.run(name, controller);
    }

    fn run<K>(&self, name: &'static str, controller: Controller<K>)
    where
        K: Controlled + Send + Sync + 'static,
    {
        let context = Arc::clone(&self.context);
        let token = self.tasks.token();
        let end = {
            let token = token.clone();
            async move { token.cancelled().await }
        };
        let config = Config::default().concurrency(AT_ONCE);
        self.tasks.spawn_critical(name, async move {
            let metrics = context.metrics.clone();
            let turns = controller
                .with_config(config)
                .graceful_shutdown_on(end)
                .run(turn::<K>, retry::<K>, context);
            let told = turns.for_each(|done| {
                heard(name, &metrics, done);
                std::future::ready(())
            });
            told.await;
            if token.is_cancelled() { Ok(()) } else { Err("the controller ended by itself") }
        });
    }
}

/// Objects that the operator made.
fn ours() -> watcher::Config {
    watcher::Config::default().labels("app.kubernetes.io/managed-by=geminga-operator")
}

fn labelled(object: &impl ResourceExt) -> Option<ObjectRef<BookiePool>> {
    let namespace = object.namespace()?;
    let pool = object.labels().get(POOL_LABEL)?;
    Some(ObjectRef::new(pool).within(&namespace))
}

/// Not all at once: whatever broke one turn broke others in the same moment.
fn retry<K>(_object: Arc<K>, _error: &Error, context: Arc<Context>) -> Action {
    let more_ms = u64::try_from(RETRY.as_millis()).unwrap_or_default();
    Action::requeue(RETRY + Duration::from_millis(context.random.below(more_ms)))
}

/// Watches that break are made again by the runtime, after a pause that grows; here they are only told.
fn heard<K>(
    controller: &'static str,
    metrics: &Metrics,
    done: Result<(ObjectRef<K>, Action), ControllerError<Error, watcher::Error>>,
) where
    K: Controlled,
{
    match done {
        Ok(_) | Err(ControllerError::ReconcilerFailed(..)) => {}
        Err(ControllerError::ObjectNotFound(gone)) => {
            let namespace = gone.namespace.as_deref().unwrap_or_default();
            metrics.on_state(&K::kind(&()), namespace, &gone.name, None);
            metrics.on_drain(namespace, &gone.name, None);
        }
        Err(error) => tracing::warn!(controller, %error, "watch broke"),
    }
}
