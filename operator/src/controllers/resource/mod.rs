//! Tenants, namespaces, topics and subscriptions: one controller for the four kinds.

pub mod plan;

use kube::ResourceExt;

use self::plan::{Action, Observed, Target, plan};
use super::{
    context::{Context, Error, Reached},
    cycle::{Controlled, Planned},
    marks::Marks,
};
use crate::{
    crd::{
        ClusterRef, DeletionPolicy, ResourceStatus, Subscription, Tenant, Topic, TopicNamespace,
    },
    kubernetes::Namespace,
    server::ServerError,
    thing::{Described, Wish},
};

/// What is on the server, or why that is not known.
async fn observe(
    namespace: &str,
    cluster: &ClusterRef,
    wish: Option<&Wish>,
    managed: &[String],
    context: &Context,
) -> Result<Observed, Error> {
    let seen = |target| Observed { target, found: None, own_policies: Default::default() };
    let server = match context.reach(namespace, cluster).await? {
        Reached::Gone => return Ok(seen(Target::Gone)),
        Reached::Silent(why) => return Ok(seen(Target::Silent(why))),
        Reached::Server(server) => server,
    };
    let Some(wish) = wish else { return Ok(seen(Target::Answers)) };
    let found = match server.find(&wish.thing).await {
        Ok(found) => found,
        Err(ServerError::Unreachable(why)) => return Ok(seen(Target::Silent(why))),
        Err(refused) => return Err(refused.into()),
    };
    let mut observed = Observed { found, ..seen(Target::Answers) };
    let has_policies = !wish.policies.is_empty() || !managed.is_empty();
    if let (Some(scope), Some(_), true) = (wish.thing.policy_scope(), &observed.found, has_policies)
    {
        observed.own_policies = server.policies(&scope).await?;
    }
    Ok(observed)
}

async fn planned<K: Described>(
    object: &K,
    marks: &Marks,
    context: &Context,
) -> Result<Planned<Action, ResourceStatus>, Error> {
    let before = object.status();
    let wish = object.wish().map_err(|error| error.to_string());
    // What is left alone, and what goes without a word at the server, needs no look at it.
    let deletes = wish.as_ref().is_ok_and(|wish| wish.deletion == DeletionPolicy::Delete);
    let looks = if marks.deleting_since_ms.is_some() {
        marks.finalizer && deletes && !marks.paused && !marks.dry_run
    } else {
        !marks.paused && wish.is_ok()
    };
    let observed = if looks {
        let namespace = object.namespace().unwrap_or_default();
        let wish = wish.as_ref().ok();
        observe(&namespace, object.cluster_ref(), wish, &before.managed_policies, context).await?
    } else {
        Observed { target: Target::Answers, found: None, own_policies: Default::default() }
    };
    let decided = plan(&wish, marks, &before, &observed, context.clock.now());
    let status = ResourceStatus {
        server_name: wish.map_or_else(|_| before.server_name.clone(), |w| w.thing.full_name()),
        managed_policies: decided.managed_policies,
        ..ResourceStatus::default()
    };
    Ok(Planned { actions: decided.actions, status, report: decided.report })
}

async fn taken<K: Described>(
    object: &K,
    action: &Action,
    so_far: &mut ResourceStatus,
    context: &Context,
) -> Result<(), Error> {
    let namespace = object.namespace().unwrap_or_default();
    let kubernetes = Namespace::new(&context.client, &namespace);
    match action {
        Action::AddFinalizer => return Ok(kubernetes.set_finalizer(object, true).await?),
        Action::RemoveFinalizer => return Ok(kubernetes.set_finalizer(object, false).await?),
        Action::Note(names) => {
            so_far.managed_policies.clone_from(names);
            return Ok(kubernetes.write_status::<K>(&object.name_any(), so_far).await?);
        }
        _ => {}
    }
    let server = match context.reach(&namespace, object.cluster_ref()).await? {
        Reached::Server(server) => server,
        Reached::Gone => {
            return Err(ServerError::Unreachable("the cluster was removed meanwhile".into()).into());
        }
        Reached::Silent(why) => return Err(ServerError::Unreachable(why).into()),
    };
    match action {
        Action::Create(thing) => server.create(thing).await?,
        Action::Update(thing) => server.update(thing).await?,
        Action::SetPolicies { scope, set, unset } => server.set_policies(scope, set, unset).await?,
        Action::Delete { thing, last_try } => match server.delete(thing).await {
            Err(error) if *last_try => {
                tracing::warn!(%error, %thing, "not deleted, and let go");
            }
            done => done?,
        },
        Action::AddFinalizer | Action::RemoveFinalizer | Action::Note(_) => {}
    }
    Ok(())
}

macro_rules! controlled {
    ($($kind:ty),*) => {$(
        impl Controlled for $kind {
            type Status = ResourceStatus;
            type Action = Action;
            const WAITS: bool = true;

            fn before(&self) -> ResourceStatus {
                Described::status(self)
            }

            async fn plan(
                &self,
                marks: &Marks,
                context: &Context,
            ) -> Result<Planned<Action, ResourceStatus>, Error> {
                planned(self, marks, context).await
            }

            async fn apply(
                &self,
                action: &Action,
                so_far: &mut ResourceStatus,
                context: &Context,
            ) -> Result<(), Error> {
                taken(self, action, so_far, context).await
            }
        }
    )*};
}

controlled!(Tenant, TopicNamespace, Topic, Subscription);
