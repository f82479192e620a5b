//! Clusters.

mod observe;
pub mod plan;

use kube::ResourceExt;

use self::plan::{Action, plan};
use super::{
    context::{Context, Error, Reached},
    cycle::{Controlled, Planned},
    marks::Marks,
};
use crate::{
    crd::{ClusterKind, ClusterRef, GemingaCluster, GemingaClusterStatus},
    kubernetes::Namespace,
    server::ServerError,
    workloads::Owner,
};

impl GemingaCluster {
    pub(super) fn owner(&self) -> Owner {
        Owner {
            kind: "GemingaCluster",
            name: self.name_any(),
            namespace: self.namespace().unwrap_or_default(),
            uid: self.uid().unwrap_or_default(),
        }
    }

    fn itself(&self) -> ClusterRef {
        ClusterRef { kind: ClusterKind::GemingaCluster, name: self.name_any() }
    }
}

impl Controlled for GemingaCluster {
    type Status = GemingaClusterStatus;
    type Action = Action;

    fn before(&self) -> GemingaClusterStatus {
        self.status.clone().unwrap_or_default()
    }

    async fn plan(
        &self,
        marks: &Marks,
        context: &Context,
    ) -> Result<Planned<Action, GemingaClusterStatus>, Error> {
        let observed = observe::observe(self, marks, context).await?;
        let decided = plan(&self.owner(), &self.spec, marks, &self.before(), &observed);
        Ok(Planned { actions: decided.actions, status: decided.status, report: decided.report })
    }

    async fn apply(
        &self,
        action: &Action,
        so_far: &mut GemingaClusterStatus,
        context: &Context,
    ) -> Result<(), Error> {
        let namespace = self.namespace().unwrap_or_default();
        let kubernetes = Namespace::new(&context.client, &namespace);
        match action {
            Action::Apply(manifest) => kubernetes.apply(manifest).await?,
            Action::Note(names) => {
                so_far.managed_policies.clone_from(names);
                kubernetes.write_status::<Self>(&self.name_any(), so_far).await?;
            }
            Action::SetPolicies { set, unset } => {
                match context.reach(&namespace, &self.itself()).await? {
                    Reached::Server(server) => server.set_policies("", set, unset).await?,
                    Reached::Silent(why) => return Err(ServerError::Unreachable(why).into()),
                    Reached::Gone => {} // with its policies
                }
            }
        }
        Ok(())
    }
}
