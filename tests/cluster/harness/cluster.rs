//! A cluster: etcd, bookies, brokers.

use std::{collections::BTreeMap, path::PathBuf, process::Command};

use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{Etcd, Process, Proxy, ports};

/// What a cluster is made of at first.
#[derive(Clone, Debug)]
pub(crate) struct ClusterSpec {
    pub(crate) etcd_members: usize,
    pub(crate) bookies: Vec<BookieSpec>,
    pub(crate) brokers: usize,
    /// Settings of every process, as flags without their dashes.
    pub(crate) settings: Vec<(&'static str, String)>,
    /// Further variables of every process.
    pub(crate) environment: Vec<(&'static str, String)>,
}

impl Default for ClusterSpec {
    fn default() -> Self {
        Self {
            etcd_members: 1,
            bookies: vec![BookieSpec::default(); 3],
            brokers: 2,
            settings: Vec::new(),
            environment: Vec::new(),
        }
    }
}

/// One bookie.
#[derive(Clone, Debug, Default)]
pub(crate) struct BookieSpec {
    pub(crate) zone: &'static str,
    /// Where it keeps its data; none: a directory of the test's.
    pub(crate) data: Option<PathBuf>,
    pub(crate) settings: Vec<(&'static str, String)>,
}

/// A member that may be down.
#[derive(Debug)]
struct Member {
    process: Option<Process>,
    command: Vec<String>,
    address: String,
    health: String,
    data: PathBuf,
    /// The path from everybody else, for a bookie; to etcd, for a broker.
    proxy: Proxy,
}

/// The whole of it. Everything ends with it.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) etcd: Etcd,
    members: BTreeMap<String, Member>,
    settings: Vec<(&'static str, String)>,
    environment: Vec<(&'static str, String)>,
    directory: TempDir,
}

impl Cluster {
    /// Starts all of it and waits until every process is ready.
    pub(crate) async fn start(spec: ClusterSpec) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let etcd = Etcd::start(directory.path(), spec.etcd_members).await;
        let mut cluster = Self {
            etcd,
            members: BTreeMap::new(),
            settings: spec.settings.clone(),
            environment: spec.environment.clone(),
            directory,
        };
        for (number, bookie) in spec.bookies.iter().enumerate() {
            cluster.add_bookie(&format!("bookie-{number}"), bookie).await;
        }
        for number in 0..spec.brokers {
            cluster.add_broker(&format!("broker-{number}")).await;
        }
        let ids: Vec<String> = cluster.members.keys().cloned().collect();
        for id in ids {
            cluster.ready(&id).await;
        }
        cluster
    }

    pub(crate) async fn add_bookie(&mut self, id: &str, spec: &BookieSpec) {
        let (port, health) = (ports::free(), format!("127.0.0.1:{}", ports::free()));
        let proxy = Proxy::start(format!("127.0.0.1:{port}")).await;
        let data = spec.data.clone().unwrap_or_else(|| self.directory.path().join(id));
        let mut command = vec![
            "bookie".to_owned(),
            flag("bookie-id", id),
            flag("bookie-data-dir", &data.to_string_lossy()),
            flag("bookie-listen", &format!("127.0.0.1:{port}")),
            flag("bookie-advertise", proxy.address()),
            flag("bookie-health-listen", &health),
            flag("bookie-zone", spec.zone),
            flag("metadata-endpoints", &self.etcd.endpoints()),
        ];
        command.extend(self.settings_for("broker-").chain(&spec.settings).map(|(k, v)| flag(k, v)));
        let address = proxy.address().to_owned();
        let member = Member { process: None, command, address, health, data, proxy };
        self.members.insert(id.to_owned(), member);
        self.start_member(id);
    }

    /// A broker reaches etcd through a path of its own when there is one etcd.
    pub(crate) async fn add_broker(&mut self, id: &str) {
        let address = format!("127.0.0.1:{}", ports::free());
        let health = format!("127.0.0.1:{}", ports::free());
        let proxy = Proxy::start(self.etcd.address(0)).await;
        let endpoints = if self.etcd.endpoints().contains(',') {
            self.etcd.endpoints()
        } else {
            format!("http://{}", proxy.address())
        };
        let mut command = vec![
            "broker".to_owned(),
            flag("broker-id", id),
            flag("broker-listen", &address),
            flag("broker-health-listen", &health),
            flag("metadata-endpoints", &endpoints),
        ];
        command.extend(self.settings_for("bookie-").map(|(k, v)| flag(k, v)));
        let data = self.directory.path().join(id);
        let member = Member { process: None, command, address, health, data, proxy };
        self.members.insert(id.to_owned(), member);
        self.start_member(id);
    }

    /// All settings but those of the other role.
    fn settings_for<'a>(
        &'a self,
        not: &'static str,
    ) -> impl Iterator<Item = &'a (&'static str, String)> + 'a {
        let broker_only = not == "broker-";
        self.settings.iter().filter(move |(key, _)| {
            !key.starts_with(not)
                && !(broker_only && (key.starts_with("tier-") || key.starts_with("ledger-roll")))
        })
    }

    /// Starts a member that is down, with the command it had.
    pub(crate) fn start_member(&mut self, id: &str) {
        let directory = self.directory.path().to_owned();
        let member = self.members.get_mut(id).expect("a member");
        let mut command = geminga();
        command.args(&member.command).envs(self.environment.iter().cloned());
        member.process = Some(Process::start(id, command, &directory));
    }

    /// As [`Self::start_member`], with further flags, this time only.
    pub(crate) fn start_member_with(&mut self, id: &str, flags: &[(&str, &str)]) {
        let directory = self.directory.path().to_owned();
        let member = self.members.get_mut(id).expect("a member");
        let mut command = geminga();
        command.envs(self.environment.iter().cloned());
        command.args(&member.command).args(flags.iter().map(|(key, value)| flag(key, value)));
        member.process = Some(Process::start(id, command, &directory));
    }

    /// Waits until a member calls itself ready.
    pub(crate) async fn ready(&mut self, id: &str) {
        let member = self.members.get_mut(id).expect("a member");
        let deadline = tokio::time::Instant::now() + super::PATIENCE;
        loop {
            if http_get(&member.health, "/readyz").await.is_some_and(|text| text == "ready\n") {
                return;
            }
            let process = member.process.as_mut().expect("it was started");
            assert!(!process.has_ended(), "{id} ended:\n{}", process.log());
            assert!(
                tokio::time::Instant::now() < deadline,
                "{id} does not get ready:\n{}",
                process.log()
            );
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }

    /// The process of a member that runs.
    pub(crate) fn process(&mut self, id: &str) -> &mut Process {
        self.members.get_mut(id).and_then(|m| m.process.as_mut()).expect("it runs")
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self, id: &str) {
        self.process(id).kill();
        self.members.get_mut(id).expect("a member").process = None;
    }

    /// SIGTERM, until it has ended well.
    pub(crate) async fn terminate(&mut self, id: &str) {
        self.process(id).terminate().await;
        self.members.get_mut(id).expect("a member").process = None;
    }

    /// The path of a member that a test can cut: from the others to a bookie, from a broker to etcd.
    pub(crate) fn path(&self, id: &str) -> &Proxy {
        &self.members[id].proxy
    }

    pub(crate) fn data(&self, id: &str) -> &std::path::Path {
        &self.members[id].data
    }

    pub(crate) fn brokers(&self) -> Vec<String> {
        self.members.keys().filter(|id| id.starts_with("broker")).cloned().collect()
    }

    pub(crate) fn bookies(&self) -> Vec<String> {
        self.members.keys().filter(|id| id.starts_with("bookie")).cloned().collect()
    }

    /// Addresses of all brokers, as clients take them.
    pub(crate) fn servers(&self) -> String {
        let of_brokers = self.members.iter().filter(|(id, _)| id.starts_with("broker"));
        let urls: Vec<String> = of_brokers.map(|(_, m)| format!("http://{}", m.address)).collect();
        urls.join(",")
    }

    /// One value of a member's `/metrics`; none if it is not there.
    pub(crate) async fn metric(&self, id: &str, name: &str) -> Option<f64> {
        let page = http_get(&self.members[id].health, "/metrics").await?;
        let lines = page.lines().filter(|line| !line.starts_with('#'));
        let values: Vec<f64> = lines
            .filter(|line| line.split([' ', '{']).next() == Some(name))
            .filter_map(|line| line.rsplit(' ').next()?.parse().ok())
            .collect();
        (!values.is_empty()).then(|| values.iter().sum())
    }

    /// A member's whole `/metrics` page.
    pub(crate) async fn metrics(&self, id: &str) -> Option<String> {
        http_get(&self.members[id].health, "/metrics").await
    }

    /// Runs a client command that must succeed; what it printed, as JSON.
    pub(crate) async fn cli(&self, args: &[&str]) -> Value {
        let output = self.cli_output(args).await;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {error}");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        serde_json::from_str(&text).unwrap_or(Value::String(text))
    }

    /// Runs a client command to its end.
    pub(crate) async fn cli_output(&self, args: &[&str]) -> std::process::Output {
        let mut command = geminga();
        command.env("GEMINGA_SERVER", self.servers()).args(["-o", "json"]).args(args);
        tokio::task::spawn_blocking(move || command.output().expect("the binary runs"))
            .await
            .expect("it does not panic")
    }

    /// The broker that serves a topic's first segment.
    pub(crate) async fn owner(&self, topic: &str) -> String {
        super::eventually("the topic has an owner", async || {
            let output = self.cli_output(&["topic", "where", topic]).await;
            let places: Value = serde_json::from_slice(&output.stdout).ok()?;
            let broker = places[0]["broker"].as_str()?.to_owned();
            (!broker.is_empty()).then_some(broker)
        })
        .await
    }
}

impl Drop for Cluster {
    /// What every process wrote is kept when the test fails.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.directory.disable_cleanup(true);
            eprintln!("the logs of this cluster are in {}", self.directory.path().display());
        }
    }
}

fn flag(key: &str, value: &str) -> String {
    format!("--{key}={value}")
}

/// The command, without inherited configuration.
pub(crate) fn geminga() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_geminga"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("GEMINGA_")) {
        command.env_remove(name);
    }
    command
}

/// The body of a plain HTTP answer; none if there is none within a second.
pub(crate) async fn http_get(address: &str, path: &str) -> Option<String> {
    http(address, &format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"))
        .await
}

pub(crate) async fn http_post(address: &str, path: &str, body: &str) -> Option<String> {
    let length = body.len();
    http(
        address,
        &format!(
            "POST {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        ),
    )
    .await
}

async fn http(address: &str, request: &str) -> Option<String> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await.ok()?;
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.ok()?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let (head, body) = answer.split_once("\r\n\r\n")?;
        Some(if head.to_lowercase().contains("transfer-encoding: chunked") {
            unchunk(body)
        } else {
            body.to_owned()
        })
    };
    tokio::time::timeout(std::time::Duration::from_secs(1), exchange).await.ok()?
}

fn unchunk(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((length, rest)) = body.split_once("\r\n") {
        let Ok(length) = usize::from_str_radix(length.trim(), 16) else { break };
        let Some(chunk) = rest.get(..length).filter(|_| length > 0) else { break };
        whole.push_str(chunk);
        body = rest[length..].trim_start_matches("\r\n");
    }
    whole
}
