//! A Kubernetes of real nodes, and the commands that a person would type.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use serde_json::Value;

use crate::harness::within;

/// How long a step may take before the test fails loudly. Two drains with proof take some four minutes.
const PATIENCE: Duration = Duration::from_secs(600);
/// Nodes there are.
pub(crate) const NODES: u32 = 3;

fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The cluster; it ends with the test.
pub(crate) struct Kubernetes {
    kubeconfig: String,
    path: String,
}

impl Kubernetes {
    /// Builds what is missing, starts it and waits until it is usable.
    pub(crate) fn up() -> Self {
        script(&["down"]); // what a test that was killed left
        script(&["up", &NODES.to_string()]);
        let shell = script(&["env"]);
        let out = run(Command::new("bash")
            .arg("-c")
            .arg(format!("{shell}\nprintf '%s\\n' \"$KUBECONFIG\" \"$PATH\"")));
        let mut lines = out.lines().map(ToOwned::to_owned);
        let (kubeconfig, path) = (lines.next().expect("a file"), lines.next().expect("a path"));
        Self { kubeconfig, path }
    }

    /// Brings an executable to every node as an image.
    pub(crate) fn load(&self, image: &str, executable: &Path) {
        let folder = tempfile::tempdir().expect("a folder");
        let archive = folder.path().join("image.tar");
        run(Command::new(project().join("scripts/image")).arg(executable).arg(image).arg(&archive));
        script(&["load", &archive.to_string_lossy()]);
    }

    /// Power loss.
    pub(crate) fn power_off(&self, node: u32) {
        script(&["kill", &node.to_string()]);
    }

    /// Brings every node back with its disks.
    pub(crate) fn power_on(&self) {
        script(&["up"]);
    }

    /// `kill -9` of a pod's geminga process, from its node: Kubernetes is not told.
    pub(crate) fn kill_process(&self, namespace: &str, pod: &str) {
        let seen = self.object(namespace, &["pod", pod]);
        let uid = seen["metadata"]["uid"].as_str().expect("a uid");
        let node = seen["spec"]["nodeName"]
            .as_str()
            .and_then(|name| name.strip_prefix("node"))
            .expect("on a node");
        let kill = format!(
            "for p in $(pgrep -x geminga); do grep -q '{uid}' /proc/$p/cgroup && kill -9 $p && echo $p; done; true"
        );
        let killed = script(&["exec", node, "bash", "-c", &kill]);
        assert!(!killed.trim().is_empty(), "{pod} has a process on node{node}");
    }

    /// A command with kubectl and helm on its PATH, in the project's folder.
    pub(crate) fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(args).current_dir(project());
        // The user's own context is not looked at.
        command
            .env("KUBECONFIG", &self.kubeconfig)
            .env("PATH", self.path())
            .env_remove("GEMINGA_SERVER");
        command
    }

    fn path(&self) -> String {
        let binary = Path::new(env!("CARGO_BIN_EXE_geminga")).parent().expect("a folder");
        format!("{}:{}", binary.display(), self.path)
    }

    /// Standard output of kubectl.
    ///
    /// # Panics
    /// If it fails.
    pub(crate) fn kubectl(&self, args: &[&str]) -> String {
        run(&mut self.command("kubectl", args))
    }

    pub(crate) fn helm(&self, args: &[&str]) -> String {
        run(&mut self.command("helm", args))
    }

    /// An object, or a list of them.
    pub(crate) fn object(&self, namespace: &str, what: &[&str]) -> Value {
        let text = self.kubectl(&[&["--namespace", namespace, "get", "-o", "json"], what].concat());
        serde_json::from_str(&text).expect("JSON")
    }

    /// Names of the pods with these labels that are not going away.
    pub(crate) fn pods(&self, namespace: &str, labels: &str) -> Vec<String> {
        let list = self.object(namespace, &["pods", "-l", labels]);
        let items = list["items"].as_array().expect("a list").iter();
        items
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null())
            .map(|pod| pod["metadata"]["name"].as_str().expect("a name").to_owned())
            .collect()
    }

    /// Puts what there is beside the test's output.
    fn explain(&self) {
        for args in [
            &["get", "nodes,pods,pvc", "-A", "-o", "wide"][..],
            &["get", "geminga", "-A", "-o", "yaml"],
            &["get", "events", "-A", "--sort-by=.lastTimestamp"],
            &[
                "logs",
                "-n",
                "messaging",
                "-l",
                "app.kubernetes.io/name=geminga-operator",
                "--tail",
                "60",
            ],
            &[
                "logs",
                "-n",
                "messaging",
                "-l",
                "app.kubernetes.io/name=geminga",
                "--tail",
                "40",
                "--prefix",
            ],
        ] {
            let output = self.command("kubectl", args).output();
            let output = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
            eprintln!("== kubectl {}\n{}", args.join(" "), output.unwrap_or_default());
        }
    }
}

impl Drop for Kubernetes {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.explain();
        }
        if std::env::var_os("NODES_KEEP").is_none() {
            let _ = cluster(&["down"]).status();
        }
    }
}

fn cluster(args: &[&str]) -> Command {
    let mut command = Command::new(project().join("scripts/kubernetes/cluster"));
    command.args(args);
    // A node is lost after 16 s instead of 50 s, and its pods leave after 10 s instead of 5 min: the test is not to wait.
    command.env("GEMINGA_NODES_GRACE", "16s").env("GEMINGA_NODES_TOLERATION_S", "10");
    command
}

fn script(args: &[&str]) -> String {
    run(&mut cluster(args))
}

/// Standard output of a command that must succeed.
pub(crate) fn run(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().expect("the command is there");
    let (out, err) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?}: {status}\n{out}\n{err}");
    out.into_owned()
}

/// The executable whose image is installed, without what only a debugger reads.
pub(crate) fn executable(folder: &Path) -> PathBuf {
    let built =
        std::env::var_os("NODES_IMAGE").unwrap_or_else(|| env!("CARGO_BIN_EXE_geminga").into());
    let stripped = folder.join("geminga");
    fs::copy(built, &stripped).expect("copied");
    run(Command::new("strip").arg(&stripped));
    stripped
}

/// Waits until `condition` gives something; until then it says what is missing. A look is a process or more: few of them.
///
/// # Panics
/// When it does not in time.
pub(crate) async fn until<T>(condition: impl AsyncFnMut() -> Result<T, String>) -> T {
    within(PATIENCE, Duration::from_millis(500), condition).await
}
