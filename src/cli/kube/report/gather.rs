//! Reads what goes into a report, one thing after the other, so that no more than one of them is in memory.

use std::{collections::BTreeSet, fs::File, future::Future, io::BufWriter, time::Duration};

use futures::{AsyncBufRead, AsyncReadExt};
use geminga_operator::{crd::definitions, workloads::CLUSTER_LABEL};
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::{Deployment, ReplicaSet, StatefulSet},
        core::v1::{Event, PersistentVolumeClaim, Pod, Service},
        policy::v1::PodDisruptionBudget,
    },
};
use kube::{
    Api, Resource, ResourceExt,
    api::{DynamicObject, GetParams, LogParams},
    core::Request,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::redact;
use crate::cli::{
    exit::Failure,
    kube::{
        access::{Access, all, kind_of, words},
        archive::{Archive, PutError},
    },
    output,
};

/// The label that tells whose an object is, and whose are ours.
const NAME_LABEL: &str = "app.kubernetes.io/name";
const OUR_NAMES: [&str; 3] = ["geminga", "geminga-operator", "geminga-cluster"];
/// One log or metrics page.
const TEXT_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// How long one request may take: nodes that are away hang.
const PATIENCE: Duration = Duration::from_secs(20);

/// A report that is being made.
pub(super) struct Gather<'a> {
    access: &'a Access,
    /// Only this cluster's workloads.
    cluster: Option<&'a str>,
    log_lines: u32,
    archive: Archive<BufWriter<File>>,
    errors: Vec<String>,
    /// Names of the workloads that were found, for events.
    names: BTreeSet<String>,
}

/// What came together.
pub(super) struct Done {
    pub(super) files: u64,
    pub(super) errors: usize,
}

impl<'a> Gather<'a> {
    pub(super) fn new(
        access: &'a Access,
        cluster: Option<&'a str>,
        log_lines: u32,
        archive: Archive<BufWriter<File>>,
    ) -> Self {
        let (errors, names) = (Vec::new(), BTreeSet::new());
        Self { access, cluster, log_lines, archive, errors, names }
    }

    pub(super) async fn everything(mut self) -> Result<Done, Failure> {
        output::note("objects");
        self.versions().await?;
        self.our_kinds().await?;
        self.objects::<Deployment>("deployments").await?;
        self.objects::<StatefulSet>("statefulsets").await?;
        self.objects::<ReplicaSet>("replicasets").await?;
        self.objects::<Service>("services").await?;
        self.objects::<PersistentVolumeClaim>("persistentvolumeclaims").await?;
        self.objects::<PodDisruptionBudget>("poddisruptionbudgets").await?;
        let mut pods = self.objects::<Pod>("pods").await?;
        let known: BTreeSet<Option<String>> = pods.iter().map(ResourceExt::uid).collect();
        pods.extend(self.operators().await?.into_iter().filter(|pod| !known.contains(&pod.uid())));
        self.events().await?;
        for (number, pod) in pods.iter().enumerate() {
            output::note(&format!("pod {} of {}: {}", number + 1, pods.len(), pod.name_any()));
            self.logs(pod).await?;
            self.metrics(pod).await?;
        }
        let errors = self.errors.len();
        let text: String = self.errors.iter().map(|line| format!("{line}\n")).collect();
        let files = self.archive.files() + 1;
        let out = self.archive.finish("errors.txt", text.as_bytes());
        let out = out.map_err(|error| Failure::failed(error.to_string()))?;
        let file = out.into_inner().map_err(|error| Failure::failed(error.to_string()))?;
        file.sync_all()?;
        Ok(Done { files, errors })
    }

    /// Adds a file; what has no room is a line in errors.txt.
    fn put(&mut self, name: &str, content: &[u8]) -> Result<(), Failure> {
        match self.archive.put(name, content) {
            Ok(()) => Ok(()),
            Err(PutError::Io(error)) => Err(error.into()),
            Err(left_out) => {
                self.errors.push(format!("{name}: {left_out}"));
                Ok(())
            }
        }
    }

    /// What a request gave in time; else a line in errors.txt.
    async fn asked<T>(
        &mut self,
        name: &str,
        request: impl Future<Output = kube::Result<T>>,
    ) -> Option<T> {
        let why = match timeout(PATIENCE, request).await {
            Ok(Ok(found)) => return Some(found),
            Ok(Err(error)) => words(&error),
            Err(_) => format!("no answer within {} s", PATIENCE.as_secs()),
        };
        self.errors.push(format!("{name}: {}", why.replace('\n', " ")));
        None
    }

    fn documents(&mut self, name: &str, found: Vec<Value>) -> Result<(), Failure> {
        let mut text = String::new();
        for mut object in found {
            redact::object(&mut object);
            let document = serde_saphyr::to_string(&object).map_err(std::io::Error::other)?;
            text += "---\n";
            text += document.trim_end();
            text.push('\n');
        }
        self.put(name, text.as_bytes())
    }

    async fn versions(&mut self) -> Result<(), Failure> {
        let client = self.access.client.clone();
        let kubernetes = self.asked("versions", client.apiserver_version()).await;
        let version =
            kubernetes.map(|info| json!({"version": info.git_version, "platform": info.platform}));
        let versions = json!({
            "geminga": env!("CARGO_PKG_VERSION"),
            "kubernetes": version,
            "namespace": self.access.namespace,
            "cluster": self.cluster,
        });
        self.documents("versions.yaml", vec![versions])
    }

    /// Every object of our kinds in the namespace.
    async fn our_kinds(&mut self) -> Result<(), Failure> {
        for definition in definitions() {
            let Some(resource) = kind_of(&definition.spec.names.kind) else { continue };
            let (client, namespace) = (self.access.client.clone(), &self.access.namespace);
            let api: Api<DynamicObject> = Api::namespaced_with(client, namespace, &resource);
            let name = format!("objects/{}.yaml", resource.plural);
            let Some(found) = self.asked(&name, all(&api, "")).await else { continue };
            self.documents(&name, found.into_iter().map(|object| json!(object)).collect())?;
        }
        Ok(())
    }

    /// Our objects of a kind in the namespace.
    async fn objects<K>(&mut self, plural: &str) -> Result<Vec<K>, Failure>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + DeserializeOwned
            + Serialize,
    {
        let name = format!("objects/{plural}.yaml");
        let api = self.access.within::<K>(&self.access.namespace);
        let Some(mut found) = self.asked(&name, all(&api, "")).await else { return Ok(Vec::new()) };
        found.retain(|object| self.is_ours(object));
        self.names.extend(found.iter().map(ResourceExt::name_any));
        self.documents(&name, found.iter().map(|object| json!(object)).collect())?;
        Ok(found)
    }

    fn is_ours(&self, object: &impl ResourceExt) -> bool {
        let labels = object.labels();
        match (labels.get(CLUSTER_LABEL), self.cluster) {
            (Some(of), Some(cluster)) => of == cluster,
            (Some(_), None) => true,
            (None, _) => {
                labels.get(NAME_LABEL).is_some_and(|name| OUR_NAMES.contains(&name.as_str()))
            }
        }
    }

    /// The operator's pods, in whichever namespace.
    async fn operators(&mut self) -> Result<Vec<Pod>, Failure> {
        let api: Api<Pod> = Api::all(self.access.client.clone());
        let selector = format!("{NAME_LABEL}=geminga-operator");
        let name = "objects/operator-pods.yaml";
        let Some(found) = self.asked(name, all(&api, &selector)).await else {
            return Ok(Vec::new());
        };
        self.documents(name, found.iter().map(|pod| json!(pod)).collect())?;
        Ok(found)
    }

    /// Events about our kinds, about the workloads that were found, and about what was made from those.
    async fn events(&mut self) -> Result<(), Failure> {
        let api = self.access.within::<Event>(&self.access.namespace);
        let Some(found) = self.asked("events.yaml", all(&api, "")).await else { return Ok(()) };
        let ours = |event: &&Event| {
            let about = &event.involved_object;
            let of_our_kinds = about
                .api_version
                .as_deref()
                .is_some_and(|version| version.starts_with("geminga.io/"));
            let name = about.name.as_deref().unwrap_or_default();
            of_our_kinds || self.names.iter().any(|known| name.starts_with(known.as_str()))
        };
        let found = found.iter().filter(ours).map(|event| json!(event)).collect();
        self.documents("events.yaml", found)
    }

    async fn logs(&mut self, pod: &Pod) -> Result<(), Failure> {
        let (name, namespace) = (pod.name_any(), pod.namespace().unwrap_or_default());
        let api = self.access.within::<Pod>(&namespace);
        let spec = pod.spec.clone().unwrap_or_default();
        let containers = spec.init_containers.into_iter().flatten().chain(spec.containers);
        let status = pod.status.clone().unwrap_or_default();
        let restarted: BTreeSet<String> = status
            .container_statuses
            .into_iter()
            .chain(status.init_container_statuses)
            .flatten()
            .filter(|container| container.restart_count > 0)
            .map(|container| container.name)
            .collect();
        for container in containers {
            let runs =
                if restarted.contains(&container.name) { &[false, true][..] } else { &[false] };
            for previous in runs {
                let which = if *previous { ".previous" } else { "" };
                let file = format!("logs/{name}/{}{which}.log", container.name);
                let params = LogParams {
                    container: Some(container.name.clone()),
                    tail_lines: Some(i64::from(self.log_lines)),
                    limit_bytes: Some(TEXT_BYTES_MAX.cast_signed()),
                    previous: *previous,
                    timestamps: true,
                    ..LogParams::default()
                };
                let read = async { text(api.log_stream(&name, &params).await?).await };
                if let Some(log) = self.asked(&file, read).await {
                    self.put(&file, redact::addresses(&log).as_bytes())?;
                }
            }
        }
        Ok(())
    }

    /// The page of a pod that has a port for health, through the API server.
    async fn metrics(&mut self, pod: &Pod) -> Result<(), Failure> {
        let ports = pod.spec.iter().flat_map(|spec| &spec.containers).flat_map(|one| &one.ports);
        let health = ports.flatten().find(|port| port.name.as_deref() == Some("health"));
        let Some(port) = health.map(|port| port.container_port) else { return Ok(()) };
        let (name, namespace) = (pod.name_any(), pod.namespace().unwrap_or_default());
        let file = format!("metrics/{name}.txt");
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}:{port}/proxy");
        let client = self.access.client.clone();
        let read = async {
            let request = Request::new(path).get("metrics", &GetParams::default());
            let request = request.map_err(kube::Error::BuildRequest)?;
            text(client.request_stream(request).await?).await
        };
        match self.asked(&file, read).await {
            Some(page) => self.put(&file, page.as_bytes()),
            None => Ok(()),
        }
    }
}

/// The beginning of an answer, as text.
async fn text(answer: impl AsyncBufRead) -> kube::Result<String> {
    let mut bytes = Vec::new();
    let mut answer = std::pin::pin!(answer.take(TEXT_BYTES_MAX));
    answer.read_to_end(&mut bytes).await.map_err(kube::Error::ReadEvents)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
