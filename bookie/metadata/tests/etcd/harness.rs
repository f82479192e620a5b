//! Real etcd servers on loopback: one member or three, in a directory of their own, killed when the test ends.

use std::{
    fs::File,
    net::TcpListener,
    process::{Child, Command},
    time::Duration,
};

use etcd_client::Client;
use geminga_metadata::{EtcdConfig, EtcdStore};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

const START_MAX: Duration = Duration::from_secs(20);

struct Member {
    client_url: String,
    arguments: Vec<String>,
    process: Option<Child>,
}

pub(crate) struct Etcd {
    members: Vec<Member>,
    directory: TempDir,
}

impl Drop for Etcd {
    fn drop(&mut self) {
        (0..self.members.len()).for_each(|member| self.kill(member));
    }
}

impl Etcd {
    /// Starts so many members with these arguments, and returns when they answer.
    pub(crate) async fn start(count: usize, extra: &[&str]) -> Self {
        let mut etcd = Self::plan(count, extra);
        (0..count).for_each(|member| etcd.run(member));
        etcd.ready().await;
        etcd
    }

    /// Chooses ports and arguments; starts nothing.
    pub(crate) fn plan(count: usize, extra: &[&str]) -> Self {
        let directory = TempDir::new().expect("a directory is made");
        // held together, so that no port is given twice
        let held: Vec<TcpListener> = (0..2 * count)
            .map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port"))
            .collect();
        let port = |n: usize| held[n].local_addr().expect("bound").port();
        let scheme = if extra.contains(&"--client-cert-auth") { "https" } else { "http" };
        let client = |n: usize| format!("{scheme}://127.0.0.1:{}", port(2 * n));
        let peer = |n: usize| format!("http://127.0.0.1:{}", port(2 * n + 1));
        let cluster: Vec<String> = (0..count).map(|n| format!("m{n}={}", peer(n))).collect();
        let member = |n: usize| {
            let data = directory.path().join(format!("m{n}")).display().to_string();
            let arguments = [
                ("--name", format!("m{n}")),
                ("--data-dir", data),
                ("--listen-client-urls", client(n)),
                ("--advertise-client-urls", client(n)),
                ("--listen-peer-urls", peer(n)),
                ("--initial-advertise-peer-urls", peer(n)),
                ("--initial-cluster", cluster.join(",")),
                ("--heartbeat-interval", "50".to_owned()),
                ("--election-timeout", "500".to_owned()),
                ("--log-level", "warn".to_owned()),
            ];
            let pairs = arguments.into_iter().map(|(name, value)| format!("{name}={value}"));
            // a killed process loses nothing that it wrote: syncing would only cost time
            let fast = "--unsafe-no-fsync".to_owned();
            let extra = extra.iter().map(|extra| (*extra).to_owned());
            let arguments = pairs.chain([fast]).chain(extra).collect();
            Member { client_url: client(n), arguments, process: None }
        };
        Self { members: (0..count).map(member).collect(), directory }
    }

    /// Starts a member, or starts it again where it stopped.
    pub(crate) fn run(&mut self, member: usize) {
        let log = File::options().create(true).append(true).open(self.log(member)).expect("a log");
        let member = &mut self.members[member];
        let mut command = Command::new(binary());
        command.args(&member.arguments).stdout(log.try_clone().expect("cloned")).stderr(log);
        member.process = Some(command.spawn().expect("etcd starts"));
    }

    /// As `kill -9`; nothing if it does not run.
    pub(crate) fn kill(&mut self, member: usize) {
        if let Some(mut process) = self.members[member].process.take() {
            let _ended_already = process.kill();
            process.wait().expect("it ended");
        }
    }

    /// Waits until every running member without TLS answers a linearizable read.
    pub(crate) async fn ready(&self) {
        let deadline = Instant::now() + START_MAX;
        for (n, member) in self.members.iter().enumerate() {
            if member.process.is_none() || member.client_url.starts_with("https") {
                continue;
            }
            loop {
                let answer = async { self.admin(n).await.get("ready", None).await };
                let answer = tokio::time::timeout(Duration::from_secs(2), answer).await;
                if matches!(answer, Ok(Ok(_))) {
                    break;
                }
                let log = || std::fs::read_to_string(self.log(n)).unwrap_or_default();
                assert!(Instant::now() < deadline, "etcd does not answer: {answer:?}\n{}", log());
                sleep(Duration::from_millis(20)).await;
            }
        }
    }

    fn log(&self, member: usize) -> std::path::PathBuf {
        self.directory.path().join(format!("m{member}.log"))
    }

    pub(crate) fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|member| member.client_url.clone()).collect()
    }

    /// A plain client of one member, to do what operators do.
    pub(crate) async fn admin(&self, member: usize) -> Client {
        Client::connect([&self.members[member].client_url], None).await.expect("lazy")
    }

    /// Which member leads.
    pub(crate) async fn leader(&self) -> usize {
        for member in 0..self.members.len() {
            let status = self.admin(member).await.status().await.expect("answered");
            if status.0.header.expect("a header").member_id == status.0.leader {
                return member;
            }
        }
        panic!("no member leads");
    }

    pub(crate) async fn store(&self, prefix: &str) -> EtcdStore {
        let mut config = EtcdConfig::new(self.endpoints(), prefix);
        config.request_deadline = Duration::from_secs(10); // the machine may be busy
        EtcdStore::connect(config).await.expect("configured")
    }
}

/// The script builds it once; without it these tests fail, and say why.
fn binary() -> String {
    static BINARY: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    let find = || {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/etcd");
        let output = Command::new(script).output().expect("scripts/etcd runs");
        let why = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "scripts/etcd: {why}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    BINARY.get_or_init(find).clone()
}
