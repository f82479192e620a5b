//! Controllers: per kind observe (reads only), plan (pure, tested from YAML), apply, and a status from what was applied.

pub mod cluster;
mod connection;
pub mod context;
mod cycle;
pub mod marks;
mod policies;
pub mod pool;
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
    context::{Context, Error},
    cycle::{Controlled, turn},
};
use crate::{
    crd::{
        BookiePool, GemingaCluster, GemingaConnection, Subscription, Tenant, Topic, TopicNamespace,
    },
    workloads::{CLUSTER_LABEL, COMPONENT_LABEL, POOL_LABEL},
};

/// Objects of one server kind that are worked on at a time.
const RESOURCES_AT_ONCE: u16 = 8;
/// Pause after a turn that broke off.
const RETRY: Duration = Duration::from_secs(5);

/// Starts the controllers of every kind, in one namespace or in all. They end with `tasks`.
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
        self.run("clusters", controller, 1);
    }

    // One turn at a time: a pool that looks whether it may replace a bookie sees what the turn before it did.
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
        self.run("pools", controller, 1);
    }

    fn resources<K>(&self, name: &'static str)
    where
        K: Controlled + Send + Sync + 'static,
    {
        let controller = Controller::new(self.api::<K>(), watcher::Config::default());
        self.run(name, controller, RESOURCES_AT_ONCE);
    }

    fn run<K>(&self, name: &'static str, controller: Controller<K>, at_once: u16)
    where
        K: Controlled + Send + Sync + 'static,
    {
        let context = Arc::clone(&self.context);
        let token = self.tasks.token();
        let end = {
            let token = token.clone();
            async move { token.cancelled().await }
        };
        let config = Config::default().concurrency(at_once);
        self.tasks.spawn(name, async move {
            let turns = controller
                .with_config(config)
                .graceful_shutdown_on(end)
                .run(turn::<K>, retry::<K>, context);
            turns.for_each(|done| async move { heard(name, done) }).await;
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

fn retry<K>(_object: Arc<K>, _error: &Error, _context: Arc<Context>) -> Action {
    Action::requeue(RETRY)
}

/// Watches that break are made again by the runtime; here they are only told.
fn heard<K: Resource>(
    controller: &'static str,
    done: Result<(ObjectRef<K>, Action), ControllerError<Error, watcher::Error>>,
) where
    K::DynamicType: std::fmt::Debug,
{
    match done {
        Ok(_) | Err(ControllerError::ObjectNotFound(_) | ControllerError::ReconcilerFailed(..)) => {
        }
        Err(error) => tracing::warn!(controller, %error, "watch broke"),
    }
}
