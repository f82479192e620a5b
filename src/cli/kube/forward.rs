//! A way from this machine to a cluster's brokers: a local port, forwarded to a pod through the Kubernetes API.

use std::{collections::BTreeMap, net::Ipv4Addr, sync::Arc, time::Duration};

use async_trait::async_trait;
use geminga_operator::{
    controllers::pods::is_ready,
    metrics::Metrics,
    server::{Clients, Server, ServerError, Servers},
    workloads::{CLIENT_PORT, CLUSTER_LABEL, COMPONENT_LABEL},
};
use geminga_runtime::tasks::Tasks;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client, ResourceExt};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::Mutex,
};

use super::access::{all, words};

/// How long a Geminga server may take to answer.
const SERVER_TIMEOUT: Duration = Duration::from_secs(10);
/// What stands before the namespace and the name of a cluster whose brokers are reached by forwarding.
const SCHEME: &str = "forward://";

/// Reaches servers as a user does from outside: the one that was named, else a port that is forwarded to a broker.
pub(super) struct Outside {
    kubernetes: Client,
    given: Option<String>,
    clients: Clients,
    forwards: Mutex<BTreeMap<String, Result<Forward, String>>>,
}

impl Outside {
    /// `given`: where the brokers of every GemingaCluster are, if the user named a server.
    pub(super) fn new(kubernetes: Client, given: Option<&str>) -> Self {
        Self {
            kubernetes,
            given: given.map(ToOwned::to_owned),
            clients: Clients::new(SERVER_TIMEOUT, Metrics::default()),
            forwards: Mutex::default(),
        }
    }

    /// The address of a GemingaCluster, for [`Servers::connect`].
    pub(super) fn address(&self) -> impl Fn(&str, &str) -> String + Send + Sync + 'static {
        let given = self.given.clone();
        move |namespace, name| {
            given.clone().unwrap_or_else(|| format!("{SCHEME}{namespace}/{name}"))
        }
    }
}

#[async_trait]
impl Servers for Outside {
    async fn connect(&self, addresses: &str) -> Result<Arc<dyn Server>, ServerError> {
        let place = addresses.strip_prefix(SCHEME).and_then(|place| place.split_once('/'));
        let Some((namespace, cluster)) = place else {
            return self.clients.connect(addresses).await;
        };
        let mut forwards = self.forwards.lock().await;
        if !forwards.contains_key(addresses) {
            let made = Forward::to(&self.kubernetes, namespace, cluster).await;
            forwards.insert(addresses.to_owned(), made);
        }
        match forwards.get(addresses) {
            Some(Ok(forward)) => self.clients.connect(&forward.address).await,
            Some(Err(why)) => Err(ServerError::Unreachable(why.clone())),
            None => Err(ServerError::Unreachable("no way was made".into())),
        }
    }
}

/// A local port that leads to a broker; it is closed when this is dropped.
struct Forward {
    address: String,
    tasks: Tasks,
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.tasks.abort();
    }
}

impl Forward {
    /// To a ready broker of a cluster.
    async fn to(client: &Client, namespace: &str, cluster: &str) -> Result<Self, String> {
        let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
        let selector = format!("{COMPONENT_LABEL}=broker,{CLUSTER_LABEL}={cluster}");
        let found = all(&pods, &selector).await.map_err(|error| words(&error))?;
        let serves = |pod: &&Pod| is_ready(pod) && pod.metadata.deletion_timestamp.is_none();
        let pod = found.iter().find(serves).map(ResourceExt::name_any);
        let pod = pod.ok_or_else(|| format!("no broker of {cluster} is ready"))?;
        // A refusal is told now, not as a connection that breaks.
        let tried = pods.portforward(&pod, &[CLIENT_PORT]).await;
        tried
            .map_err(|error| format!("no port can be forwarded to {pod}: {}", words(&error)))?
            .abort();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await;
        let listener = listener.map_err(|error| error.to_string())?;
        let address = listener.local_addr().map_err(|error| error.to_string())?;
        let tasks = Tasks::new("forward");
        let connections = tasks.clone();
        tasks.spawn("forward", async move {
            while let Ok((local, _)) = listener.accept().await {
                connections.spawn("connection", carry(pods.clone(), pod.clone(), local));
            }
        });
        Ok(Self { address: format!("http://{address}"), tasks })
    }
}

/// One connection; an end of either side ends it, and the client's own error tells.
async fn carry(pods: Api<Pod>, pod: String, mut local: TcpStream) {
    let mut forwarder = match pods.portforward(&pod, &[CLIENT_PORT]).await {
        Ok(forwarder) => forwarder,
        Err(error) => return tracing::debug!(%error, pod, "not forwarded"),
    };
    if let Some(mut remote) = forwarder.take_stream(CLIENT_PORT) {
        let _ = copy_bidirectional(&mut local, &mut remote).await;
    }
    forwarder.abort();
}
