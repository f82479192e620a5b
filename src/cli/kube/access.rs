//! The way to the Kubernetes API, and what its refusals mean to the user.

use std::time::Duration;

use geminga_operator::crd::{self, GemingaCluster};
use k8s_openapi::NamespaceResourceScope;
use kube::{
    Api, Client, Config, Resource, ResourceExt,
    api::ListParams,
    config::{KubeConfigOptions, Kubeconfig},
    core::ApiResource,
};
use serde::de::DeserializeOwned;

use super::Place;
use crate::cli::exit::{Code, Failure};

/// Until a connection stands.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Silence after which a request has failed.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Objects asked for in one page of a listing.
const PAGE_ITEMS: u32 = 500;
/// Most objects of one kind that are listed.
pub(super) const OBJECTS_MAX: usize = 100_000;

/// A Kubernetes cluster and the namespace that is looked at.
#[derive(Clone)]
pub(super) struct Access {
    pub(super) client: Client,
    /// The namespace of objects that name none.
    pub(super) namespace: String,
    /// All namespaces are looked at.
    pub(super) all: bool,
}

impl Access {
    /// By the kubeconfig, else as the pod that this runs in. Nothing is connected yet.
    pub(super) async fn open(place: &Place) -> Result<Self, Failure> {
        let mut config = match &place.context {
            None => Config::infer().await.map_err(|error| {
                let words = format!("there is no way to Kubernetes: {}", causes(&error));
                Failure::new(Code::Usage, words, "export KUBECONFIG=FILE")
            })?,
            Some(context) => named(context).await?,
        };
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        config.read_timeout = Some(READ_TIMEOUT);
        let namespace = place.namespace.clone().unwrap_or(config.default_namespace.clone());
        let client = Client::try_from(config).map_err(|error| failure(&error))?;
        Ok(Self { client, namespace, all: place.all_namespaces })
    }

    /// Objects of one namespace.
    pub(super) fn within<K>(&self, namespace: &str) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// Objects of what is looked at.
    pub(super) fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        if self.all { Api::all(self.client.clone()) } else { self.within(&self.namespace) }
    }

    /// All objects of a kind of ours in what is looked at. A kind that is not known is an installation that is missing.
    pub(super) async fn list<K>(&self) -> Result<Vec<K>, Failure>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + DeserializeOwned,
    {
        all(&self.api(), "").await.map_err(|error| of_our_kinds(&error))
    }

    /// Where is looked, in words.
    pub(super) fn place(&self) -> String {
        if self.all { "any namespace".into() } else { format!("namespace {}", self.namespace) }
    }

    /// The flags that lead here again.
    pub(super) fn flags(&self) -> String {
        if self.all { " -A".into() } else { format!(" -n {}", self.namespace) }
    }

    /// The cluster of this name, among those that there are.
    pub(super) fn no_cluster(&self, name: &str, there: &[GemingaCluster]) -> Failure {
        let there: Vec<String> = there.iter().map(ResourceExt::name_any).collect();
        self.not_found("GemingaCluster", name, &there)
    }

    /// An object that is not there, and those that are.
    pub(super) fn not_found(&self, kind: &str, name: &str, there: &[String]) -> Failure {
        let place = self.place();
        let words = match there {
            [] => format!("there is no {kind} {name} in {place}, and no other either"),
            there => {
                format!("there is no {kind} {name} in {place}; there are: {}", there.join(", "))
            }
        };
        Failure::new(Code::NotFound, words, "geminga kube status -A")
    }
}

/// Everything that a label selector matches, page by page.
pub(super) async fn all<K>(api: &Api<K>, selector: &str) -> kube::Result<Vec<K>>
where
    K: Clone + std::fmt::Debug + DeserializeOwned,
{
    let mut params = ListParams::default().labels(selector).limit(PAGE_ITEMS);
    let mut found = Vec::new();
    loop {
        let page = api.list(&params).await?;
        found.extend(page.items);
        match page.metadata.continue_.filter(|next| !next.is_empty()) {
            Some(next) if found.len() < OBJECTS_MAX => params = params.continue_token(&next),
            _ => return Ok(found),
        }
    }
}

async fn named(context: &str) -> Result<Config, Failure> {
    let options = KubeConfigOptions { context: Some(context.to_owned()), ..Default::default() };
    Config::from_kubeconfig(&options).await.map_err(|error| {
        let known = Kubeconfig::read().map(|config| config.contexts).unwrap_or_default();
        let known: Vec<String> = known.into_iter().map(|context| context.name).collect();
        let words = match known.as_slice() {
            [] => format!("the context {context} cannot be used: {}", causes(&error)),
            known if known.iter().any(|name| name == context) => {
                format!("the context {context} cannot be used: {}", causes(&error))
            }
            known => format!("there is no context {context}; there are: {}", known.join(", ")),
        };
        Failure::new(Code::Usage, words, "kubectl config get-contexts")
    })
}

/// How one of our kinds is asked for, by any name that kubectl takes: topic, topics, gtopic, Topic.
pub(super) fn kind_of(word: &str) -> Option<ApiResource> {
    let word = word.to_lowercase();
    crd::definitions().into_iter().find_map(|definition| {
        let names = definition.spec.names;
        let mut known = vec![names.kind.to_lowercase(), names.plural.clone()];
        known.extend(names.singular);
        known.extend(names.short_names.into_iter().flatten());
        known.contains(&word).then(|| ApiResource {
            group: definition.spec.group.clone(),
            version: "v1alpha1".into(),
            api_version: format!("{}/v1alpha1", definition.spec.group),
            kind: names.kind,
            plural: names.plural,
        })
    })
}

/// What the refusal of a listing of one of our kinds means: a kind that is not known is an installation that is missing.
pub(super) fn of_our_kinds(error: &kube::Error) -> Failure {
    match error {
        kube::Error::Api(status) if status.code == 404 => Failure::new(
            Code::NotFound,
            "this Kubernetes does not know Geminga's kinds: the operator's chart is not installed",
            "helm install geminga-operator charts/geminga-operator --namespace geminga --create-namespace",
        ),
        _ => failure(error),
    }
}

/// What a refusal means.
pub(super) fn failure(error: &kube::Error) -> Failure {
    let (code, next) = match error {
        kube::Error::Api(status) if status.is_forbidden() => {
            (Code::Refused, "kubectl auth can-i --list")
        }
        kube::Error::Api(status) if status.code == 401 => {
            (Code::Refused, "kubectl config get-contexts")
        }
        kube::Error::Api(status) if status.is_not_found() => {
            (Code::NotFound, "geminga kube status -A")
        }
        kube::Error::Api(status) if status.code >= 500 || status.code == 429 => {
            (Code::Unavailable, "kubectl get --raw /readyz")
        }
        kube::Error::Api(_) => (Code::Refused, "kubectl explain gemingacluster.spec"),
        kube::Error::Auth(_) => (Code::Usage, "kubectl config get-contexts"),
        _ => (Code::Unavailable, "kubectl cluster-info"),
    };
    Failure::new(code, format!("Kubernetes: {}", words(error)), next)
}

/// What the API said, or why nobody did.
pub(super) fn words(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        other => causes(other),
    }
}

/// An error with its causes, each once.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let words = next.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_has_every_name_that_kubectl_takes() {
        for word in ["Topic", "topic", "topics", "gtopic"] {
            assert_eq!(kind_of(word).expect("known").plural, "topics", "{word}");
        }
        assert_eq!(kind_of("bp").expect("known").kind, "BookiePool");
        assert!(kind_of("pod").is_none());
    }
}
