//! Where a row runs: processes of one shape, and the harm that can be done to them.

use std::{path::Path, time::Duration};

use geminga_proto::admin::v1::{ListTenantsRequest, LocateTopicRequest};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    sync::{Mutex, RwLock},
    time::{Instant, sleep},
};
use tonic::transport::Channel;

use crate::{
    client::Client,
    harness::{Cluster, ClusterSpec, PATIENCE, Process, eventually, free_port, geminga},
    http::{self, Answer},
};

/// The two forms of the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// One process.
    Standalone,
    /// etcd, three bookies, two brokers.
    Cluster,
}

/// Running processes of one shape.
pub(crate) struct World {
    shape: Shape,
    standalone: Option<Mutex<Standalone>>,
    cluster: Option<RwLock<Cluster>>,
}

struct Standalone {
    process: Process,
    data: TempDir,
    port: u16,
    health: u16,
}

impl Standalone {
    fn launch(data: &Path, port: u16, health: u16) -> Process {
        let mut command = geminga();
        command
            .arg("standalone")
            .args(["--bookies", "3", "--log-format", "json"])
            .arg(format!("--listen=127.0.0.1:{port}"))
            .arg(format!("--health-listen=127.0.0.1:{health}"))
            .arg("--data-dir")
            .arg(data.join("data"));
        Process::start("standalone", command, data)
    }

    fn relaunch(&mut self) {
        self.process = Self::launch(self.data.path(), self.port, self.health);
    }
}

impl World {
    /// Starts it and waits until it answers.
    pub(crate) async fn start(shape: Shape) -> Self {
        let world = match shape {
            Shape::Standalone => {
                let data = tempfile::tempdir().expect("a temporary directory");
                let (port, health) = (free_port(), free_port());
                let process = Standalone::launch(data.path(), port, health);
                let standalone = Standalone { process, data, port, health };
                Self { shape, standalone: Some(Mutex::new(standalone)), cluster: None }
            }
            Shape::Cluster => {
                let cluster = Cluster::start(ClusterSpec::default()).await;
                Self { shape, standalone: None, cluster: Some(RwLock::new(cluster)) }
            }
        };
        world.answers().await;
        world
    }

    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    /// `host:port` of every server.
    async fn addresses(&self) -> Vec<String> {
        if let Some(standalone) = &self.standalone {
            return vec![format!("127.0.0.1:{}", standalone.lock().await.port)];
        }
        let servers = self.cluster().read().await.servers();
        servers.split(',').map(|url| url.trim_start_matches("http://").to_owned()).collect()
    }

    /// One request with a JSON body, as curl would send it, to a server.
    pub(crate) async fn post(&self, path: &str, content_type: &str, body: &Value) -> Answer {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let address = self.addresses().await.remove(0);
        http::call(&address, "POST", path, &[("Content-Type", content_type)], &body).await
    }

    /// Gets a page in this format.
    pub(crate) async fn get_as(&self, path: &str, accept: &str) -> Answer {
        let address = self.addresses().await.remove(0);
        http::call(&address, "GET", path, &[("Accept", accept)], "").await
    }

    fn cluster(&self) -> &RwLock<Cluster> {
        self.cluster.as_ref().expect("one of the two shapes")
    }

    async fn answers(&self) {
        drop(self.client().await);
    }

    /// A connection to a server that answers.
    pub(crate) async fn client(&self) -> Client {
        let deadline = Instant::now() + PATIENCE;
        loop {
            for address in self.addresses().await {
                let Some(client) = Client::connect(&address).await else { continue };
                if client.admin().list_tenants(ListTenantsRequest::default()).await.is_ok() {
                    return client;
                }
            }
            assert!(Instant::now() < deadline, "no server answers");
            sleep(PAUSE).await;
        }
    }

    /// A connection to the owner of a segment: nothing is relayed.
    pub(crate) async fn owner(&self, topic: &str, segment: u32) -> Client {
        let client = self.client().await;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let request = LocateTopicRequest { name: topic.to_owned() };
            if let Ok(located) = client.admin().locate_topic(request).await {
                let mut places = located.into_inner().segments.into_iter();
                let place = places.find(|place| place.segment == segment).expect("it exists");
                if let Some(owner) = Client::connect(&place.address).await {
                    return owner;
                }
            }
            assert!(Instant::now() < deadline, "the owner of {topic} does not answer");
            sleep(PAUSE).await;
        }
    }

    /// `kill -9` of the process that owns the topic's first segment. In the standalone it is started again; in a cluster
    /// the other broker takes over, and the killed one comes back.
    pub(crate) async fn kill_owner(&self, topic: &str) {
        if let Some(standalone) = &self.standalone {
            let mut standalone = standalone.lock().await;
            standalone.process.kill();
            standalone.relaunch();
        } else {
            let mut cluster = self.cluster().write().await;
            let owner = cluster.owner(topic).await;
            cluster.kill(&owner);
            cluster.start_member(&owner);
            cluster.ready(&owner).await;
        }
        self.answers().await;
    }

    /// A planned hand-over: the owner is drained in a cluster, and stopped in good order and started again in the
    /// standalone.
    pub(crate) async fn move_owner(&self, topic: &str) {
        if let Some(standalone) = &self.standalone {
            let mut standalone = standalone.lock().await;
            standalone.process.signal(Signal::TERM);
            standalone.process.ended().await;
            standalone.relaunch();
        } else {
            let cluster = self.cluster().read().await;
            let owner = cluster.owner(topic).await;
            cluster.cli(&["broker", "drain", &owner]).await;
            eventually("the topic has moved", async || {
                (cluster.owner(topic).await != owner).then_some(())
            })
            .await;
            cluster.cli(&["broker", "drain", &owner, "--cancel"]).await;
        }
        self.answers().await;
    }
}

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(50);
/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(5);

/// A channel to an address.
pub(crate) async fn channel(address: &str) -> Option<Channel> {
    let endpoint = Channel::from_shared(format!("http://{address}")).ok()?;
    endpoint.connect_timeout(CONNECT).connect().await.ok()
}
