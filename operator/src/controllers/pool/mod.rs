//! Bookie pools.

mod members;
mod observe;
pub mod plan;
mod roll;
mod volumes;

use kube::ResourceExt;

use self::plan::{Action, plan};
use super::{
    context::{Context, Error, Reached},
    cycle::{Controlled, Planned},
    marks::Marks,
};
use crate::{
    crd::{BookiePool, BookiePoolStatus, ClusterKind, ClusterRef, GemingaClusterSpec},
    kubernetes::Namespace,
    server::ServerError,
    workloads::Owner,
};

impl BookiePool {
    pub(super) fn owner(&self) -> Owner {
        Owner {
            kind: "BookiePool",
            name: self.name_any(),
            namespace: self.namespace().unwrap_or_default(),
            uid: self.uid().unwrap_or_default(),
        }
    }

    fn cluster_ref(&self) -> ClusterRef {
        ClusterRef { kind: ClusterKind::GemingaCluster, name: self.spec.cluster.clone() }
    }

    /// Reads only, then decides; with the spec of `cluster` in place of the stored one.
    pub(super) async fn plan_in(
        &self,
        cluster: Option<&GemingaClusterSpec>,
        marks: &Marks,
        context: &Context,
    ) -> Result<Planned<Action, BookiePoolStatus>, Error> {
        let mut observed = observe::observe(self, marks, context).await?;
        if let Some(cluster) = cluster {
            observed.cluster = Some(cluster.clone());
        }
        let decided = plan(&self.owner(), &self.spec, marks, &self.before(), &observed);
        Ok(Planned { actions: decided.actions, status: decided.status, report: decided.report })
    }

    async fn drain(&self, bookie: &str, cancel: bool, context: &Context) -> Result<(), Error> {
        let namespace = self.namespace().unwrap_or_default();
        match context.reach(&namespace, &self.cluster_ref()).await? {
            Reached::Server(server) => Ok(server.drain_bookie(bookie, cancel).await?),
            Reached::Silent(why) => Err(ServerError::Unreachable(why).into()),
            Reached::Gone => {
                Err(ServerError::Unreachable("the cluster was removed meanwhile".into()).into())
            }
        }
    }
}

impl Controlled for BookiePool {
    type Status = BookiePoolStatus;
    type Action = Action;

    // Whether a bookie may be replaced or drained depends on the other pools: each sees what the turn before it did.
    fn alone(&self) -> Option<String> {
        Some(format!("{}/{}", self.namespace().unwrap_or_default(), self.spec.cluster))
    }

    fn before(&self) -> BookiePoolStatus {
        self.status.clone().unwrap_or_default()
    }

    async fn plan(
        &self,
        marks: &Marks,
        context: &Context,
    ) -> Result<Planned<Action, BookiePoolStatus>, Error> {
        let planned = self.plan_in(None, marks, context).await?;
        let drains = &planned.status.drains;
        let left = (!drains.is_empty()).then(|| drains.iter().map(|drain| drain.bytes_left).sum());
        let namespace = self.namespace().unwrap_or_default();
        context.metrics.on_drain(&namespace, &self.name_any(), left);
        Ok(planned)
    }

    async fn apply(
        &self,
        action: &Action,
        so_far: &mut BookiePoolStatus,
        context: &Context,
    ) -> Result<(), Error> {
        let namespace = self.namespace().unwrap_or_default();
        let kubernetes = Namespace::new(&context.client, &namespace);
        match action {
            Action::Note(drains) => {
                so_far.drains.clone_from(drains);
                kubernetes.write_status::<Self>(&self.name_any(), so_far).await?;
            }
            Action::Apply(manifest) => kubernetes.apply(manifest).await?,
            Action::Drain(bookie) => self.drain(bookie, false, context).await?,
            Action::CancelDrain(bookie) => self.drain(bookie, true, context).await?,
            Action::Replace { pod, uid } => kubernetes.delete_pod(pod, uid).await?,
            Action::Orphan(set) => kubernetes.orphan(set).await?,
            Action::Grow { claim, size } => kubernetes.grow_claim(claim, size).await?,
            Action::DeleteClaim(claim) => kubernetes.delete_claim(claim).await?,
        }
        Ok(())
    }
}
