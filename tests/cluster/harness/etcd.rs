//! A real etcd, of one or three members.

use std::{path::Path, process::Command, time::Duration};

use serde_json::Value;

use super::{Process, eventually, ports, tool};

#[derive(Debug)]
struct Member {
    client: u16,
    peer: u16,
    /// None while it is down.
    process: Option<Process>,
}

/// The members.
#[derive(Debug)]
pub(crate) struct Etcd {
    members: Vec<Member>,
    directory: std::path::PathBuf,
}

impl Etcd {
    /// Where the etcd binary is.
    pub(crate) fn binary() -> &'static str {
        tool("etcd")
    }

    pub(crate) async fn start(directory: &Path, count: usize) -> Self {
        let members = (0..count)
            .map(|_| Member { client: ports::free(), peer: ports::free(), process: None })
            .collect();
        let mut etcd = Self { members, directory: directory.to_owned() };
        for member in 0..count {
            etcd.start_member(member);
        }
        etcd.healthy().await;
        etcd
    }

    /// URLs of all members, separated by commas.
    pub(crate) fn endpoints(&self) -> String {
        let urls: Vec<String> = self.members.iter().map(|member| url(member.client)).collect();
        urls.join(",")
    }

    /// `host:port` of one member.
    pub(crate) fn address(&self, member: usize) -> String {
        format!("127.0.0.1:{}", self.members[member].client)
    }

    pub(crate) fn start_member(&mut self, number: usize) {
        let peers: Vec<String> = self
            .members
            .iter()
            .enumerate()
            .map(|(number, member)| format!("m{number}={}", url(member.peer)))
            .collect();
        let member = &mut self.members[number];
        let mut command = Command::new(Self::binary());
        command.args([
            "--name",
            &format!("m{number}"),
            "--data-dir",
            &self.directory.join(format!("etcd-{number}")).to_string_lossy(),
            "--listen-client-urls",
            &url(member.client),
            "--advertise-client-urls",
            &url(member.client),
            "--listen-peer-urls",
            &url(member.peer),
            "--initial-advertise-peer-urls",
            &url(member.peer),
            "--initial-cluster",
            &peers.join(","),
            "--heartbeat-interval",
            "100",
            "--election-timeout",
            "1000",
            "--log-level",
            "warn",
        ]);
        member.process = Some(Process::start(&format!("etcd-{number}"), command, &self.directory));
    }

    pub(crate) fn kill_member(&mut self, number: usize) {
        if let Some(mut process) = self.members[number].process.take() {
            process.kill();
        }
    }

    pub(crate) fn stop_all(&mut self) {
        for number in 0..self.members.len() {
            self.kill_member(number);
        }
    }

    pub(crate) async fn start_all(&mut self) {
        for number in 0..self.members.len() {
            if self.members[number].process.is_none() {
                self.start_member(number);
            }
        }
        self.healthy().await;
    }

    /// Waits until every member that runs says that it is healthy.
    pub(crate) async fn healthy(&self) {
        for member in self.members.iter().filter(|member| member.process.is_some()) {
            let address = format!("127.0.0.1:{}", member.client);
            eventually("etcd is healthy", async || {
                let answer = super::cluster::http_get(&address, "/health").await?;
                answer.contains("\"true\"").then_some(())
            })
            .await;
        }
    }

    /// Keys, and bytes of keys and values, of everything.
    #[allow(dead_code, reason = "each test target uses a part of the harness")]
    pub(crate) async fn size(&self) -> (u64, u64) {
        let address = self.address(0);
        // "\0" to "\0": all keys.
        let all = r#"{"key":"AA==","range_end":"AA=="}"#;
        let answer = super::cluster::http_post(&address, "/v3/kv/range", all).await;
        let range: Value = serde_json::from_str(&answer.expect("etcd answers")).expect("JSON");
        let kvs = range["kvs"].as_array().expect("keys");
        let decoded = |text: &Value| text.as_str().map_or(0, |text| text.len() as u64 / 4 * 3);
        let bytes = kvs.iter().map(|kv| decoded(&kv["key"]) + decoded(&kv["value"])).sum();
        (kvs.len() as u64, bytes)
    }

    /// The member that leads now.
    pub(crate) async fn leader(&self) -> usize {
        eventually("etcd has a leader", async || {
            for (number, member) in self.members.iter().enumerate() {
                if member.process.is_none() {
                    continue;
                }
                let address = format!("127.0.0.1:{}", member.client);
                let answer =
                    super::cluster::http_post(&address, "/v3/maintenance/status", "{}").await;
                let Some(Ok(status)) = answer.map(|text| serde_json::from_str::<Value>(&text))
                else {
                    continue;
                };
                if status["leader"].is_string() && status["leader"] == status["header"]["member_id"]
                {
                    return Some(number);
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            None
        })
        .await
    }
}

fn url(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}
