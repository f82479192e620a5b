//! The few things that we ask of the Kubernetes API. Every change of ours is a server-side apply under one field manager,
//! except deletions, claims that grow, and finalizers.

use std::future::Future;

use http::Response;
use k8s_openapi::{
    NamespaceResourceScope,
    api::core::v1::{PersistentVolumeClaim, Pod},
};
use kube::{
    Api, Client, Config, Resource,
    api::{
        ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, Preconditions,
        PropagationPolicy,
    },
    client::ClientBuilder,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tower::util::MapFutureLayer;

use crate::{crd::FINALIZER, manifest::Manifest, metrics::Metrics};

/// Under which name our fields are managed.
pub const FIELD_MANAGER: &str = "geminga-operator";

/// The way to the Kubernetes API: of the pod that this runs in, else of KUBECONFIG. Nothing is connected yet.
///
/// # Errors
/// What is missing, in words.
pub async fn connect() -> Result<Client, String> {
    connect_counted(&Metrics::default()).await
}

/// As [`connect`]; every answer is counted.
///
/// # Errors
/// What is missing, in words.
pub async fn connect_counted(metrics: &Metrics) -> Result<Client, String> {
    let config = Config::infer().await.map_err(|error| error.to_string())?;
    let builder = ClientBuilder::try_from(config).map_err(|error| error.to_string())?;
    let metrics = metrics.clone();
    let counted = MapFutureLayer::new(move |answer| counted(answer, metrics.clone()));
    Ok(builder.with_layer(&counted).build())
}

async fn counted<B, E>(
    answer: impl Future<Output = Result<Response<B>, E>>,
    metrics: Metrics,
) -> Result<Response<B>, E> {
    let answer = answer.await;
    metrics.on_api_answer(answer.as_ref().ok().map(|answer| answer.status().as_u16()));
    answer
}

/// One namespace of a Kubernetes cluster.
#[derive(Clone)]
pub(crate) struct Namespace<'a> {
    client: &'a Client,
    name: &'a str,
}

/// A kind of the operator.
pub(crate) trait Ours:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + Clone
    + std::fmt::Debug
    + DeserializeOwned
{
}

impl<K> Ours for K where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned
{
}

impl<'a> Namespace<'a> {
    pub(crate) fn new(client: &'a Client, name: &'a str) -> Self {
        Self { client, name }
    }

    fn api<K: Ours>(&self) -> Api<K> {
        Api::namespaced(self.client.clone(), self.name)
    }

    pub(crate) async fn get<K: Ours>(&self, name: &str) -> kube::Result<Option<K>> {
        self.api::<K>().get_opt(name).await
    }

    pub(crate) async fn list<K: Ours>(&self, selector: &str) -> kube::Result<Vec<K>> {
        Ok(self.api::<K>().list(&ListParams::default().labels(selector)).await?.items)
    }

    /// An object as JSON; none if it is not there.
    pub(crate) async fn live<K: Ours + Serialize>(
        &self,
        name: &str,
    ) -> kube::Result<Option<Value>> {
        let found = self.get::<K>(name).await?;
        found.map(|found| serde_json::to_value(found).map_err(kube::Error::SerdeError)).transpose()
    }

    /// Server-side apply; fields of others that contradict ours are taken over.
    pub(crate) async fn apply(&self, manifest: &Manifest) -> kube::Result<()> {
        let api = self.dynamic(manifest.api_version(), manifest.kind());
        let params = PatchParams::apply(FIELD_MANAGER).force();
        api.patch(manifest.name(), &params, &Patch::Apply(manifest.object())).await.map(drop)
    }

    fn dynamic(&self, api_version: &str, kind: &str) -> Api<DynamicObject> {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        let resource = ApiResource {
            group: group.to_owned(),
            version: version.to_owned(),
            api_version: api_version.to_owned(),
            kind: kind.to_owned(),
            plural: format!("{}s", kind.to_lowercase()), // all kinds that we apply
        };
        Api::namespaced_with(self.client.clone(), self.name, &resource)
    }

    /// Replaces the whole status that is ours.
    pub(crate) async fn write_status<K: Ours>(
        &self,
        name: &str,
        status: &impl Serialize,
    ) -> kube::Result<()> {
        let object = json!({
            "apiVersion": K::api_version(&()), "kind": K::kind(&()),
            "metadata": {"name": name}, "status": status,
        });
        let params = PatchParams::apply(FIELD_MANAGER).force();
        self.api::<K>().patch_status(name, &params, &Patch::Apply(&object)).await.map(drop)
    }

    /// Adds or removes our finalizer; others stay. Refused if the object changed since it was read.
    pub(crate) async fn set_finalizer<K: Ours>(
        &self,
        object: &K,
        present: bool,
    ) -> kube::Result<()> {
        let mut finalizers = object.meta().finalizers.clone().unwrap_or_default();
        finalizers.retain(|name| name != FINALIZER);
        if present {
            finalizers.push(FINALIZER.to_owned());
        }
        let patch = json!({"metadata": {
            "finalizers": finalizers, "resourceVersion": object.meta().resource_version,
        }});
        let name = object.meta().name.clone().unwrap_or_default();
        let patch = Patch::Merge(&patch);
        self.api::<K>().patch(&name, &PatchParams::default(), &patch).await.map(drop)
    }

    /// Deletes exactly this pod; one that is gone is no error.
    pub(crate) async fn delete_pod(&self, name: &str, uid: &str) -> kube::Result<()> {
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: Some(uid.to_owned()),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        gone_is_fine(self.api::<Pod>().delete(name, &params).await.map(drop))
    }

    /// Deletes a StatefulSet and leaves its pods.
    pub(crate) async fn orphan(&self, name: &str) -> kube::Result<()> {
        let params = DeleteParams {
            propagation_policy: Some(PropagationPolicy::Orphan),
            ..DeleteParams::default()
        };
        let sets = self.api::<k8s_openapi::api::apps::v1::StatefulSet>();
        gone_is_fine(sets.delete(name, &params).await.map(drop))
    }

    pub(crate) async fn grow_claim(&self, name: &str, size: &str) -> kube::Result<()> {
        let patch = json!({"spec": {"resources": {"requests": {"storage": size}}}});
        let claims = self.api::<PersistentVolumeClaim>();
        claims.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await.map(drop)
    }

    pub(crate) async fn delete_claim(&self, name: &str) -> kube::Result<()> {
        let claims = self.api::<PersistentVolumeClaim>();
        gone_is_fine(claims.delete(name, &DeleteParams::default()).await.map(drop))
    }
}

fn gone_is_fine(result: kube::Result<()>) -> kube::Result<()> {
    match result {
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        // The uid is another one: the pod that was meant is gone.
        Err(kube::Error::Api(status)) if status.is_conflict() => Ok(()),
        result => result,
    }
}
