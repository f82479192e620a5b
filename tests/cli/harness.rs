//! Starts `geminga` processes on ports of their own and ends them with the test.

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, Command, Output, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use serde_json::Value;

/// How long a test waits for something that must happen, before it fails loudly.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The command, without inherited configuration.
pub(crate) fn geminga() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_geminga"));
    for name in [
        "GEMINGA_SERVER",
        "GEMINGA_DATA_DIR",
        "GEMINGA_BOOKIES",
        "GEMINGA_LISTEN",
        "GEMINGA_HEALTH_LISTEN",
    ] {
        command.env_remove(name);
    }
    // Whoever runs the tests may have contexts of their own.
    command.env("XDG_CONFIG_HOME", concat!(env!("CARGO_TARGET_TMPDIR"), "/no-contexts"));
    command
}

/// A running `geminga standalone`; killed when dropped.
pub(crate) struct Standalone {
    child: Child,
    log: mpsc::Receiver<String>,
    pub(crate) server: String,
    pub(crate) health: String,
}

impl Standalone {
    /// Starts one and waits until it says that it is ready.
    pub(crate) fn start(data: &Path, bookies: u32) -> Self {
        Self::try_start(data, bookies)
            .unwrap_or_else(|log| panic!("standalone did not get ready:\n{log}"))
    }

    /// Its standard error output, if it ended before it was ready.
    pub(crate) fn try_start(data: &Path, bookies: u32) -> Result<Self, String> {
        Self::try_start_at(data, bookies, "127.0.0.1:0")
    }

    /// As [`Self::start`], where clients know it: what a server does that is started again.
    pub(crate) fn start_at(data: &Path, bookies: u32, listen: &str) -> Self {
        Self::try_start_at(data, bookies, listen)
            .unwrap_or_else(|log| panic!("standalone did not get ready:\n{log}"))
    }

    fn try_start_at(data: &Path, bookies: u32, listen: &str) -> Result<Self, String> {
        let mut child = geminga()
            .args([
                "standalone",
                "-o",
                "json",
                "--listen",
                listen,
                "--health-listen",
                "127.0.0.1:0",
            ])
            .arg("--bookies")
            .arg(bookies.to_string())
            .arg("--data-dir")
            .arg(data)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let log = drain(child.stderr.take().expect("piped"));
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
        stdout.read_line(&mut line).expect("readable");
        let Ok(ready) = serde_json::from_str::<Value>(&line) else {
            child.wait().expect("it can be waited for");
            return Err(log.iter().collect::<Vec<_>>().join("\n"));
        };
        let address = |name: &str| ready[name].as_str().expect("an address").to_owned();
        Ok(Self {
            server: format!("http://{}", address("listen")),
            health: address("health"),
            log,
            child,
        })
    }

    /// Ends the process as `kill -9` does.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it can be waited for");
    }

    /// Asks it to stop, as a service manager does; its exit code.
    pub(crate) fn terminate(mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it lives");
        self.child.wait().expect("it can be waited for").code()
    }

    /// A client command against this server.
    pub(crate) fn client(&self, args: &[&str]) -> Command {
        let mut command = geminga();
        command.env("GEMINGA_SERVER", &self.server).args(args);
        command
    }

    /// Runs a client command to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.run_with(args, "")
    }

    /// As [`Self::run`], with standard input.
    pub(crate) fn run_with(&self, args: &[&str], input: &str) -> Output {
        let mut child = self
            .client(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let mut stdin = child.stdin.take().expect("piped");
        let input = input.to_owned();
        let feeder = thread::spawn(move || drop(stdin.write_all(input.as_bytes())));
        let output = child.wait_with_output().expect("it ends");
        feeder.join().expect("the feeder ends");
        output
    }

    /// Runs a client command that must succeed; its standard output.
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        self.ok_with(args, "")
    }

    /// As [`Self::ok`], with standard input.
    pub(crate) fn ok_with(&self, args: &[&str], input: &str) -> String {
        let output = self.run_with(args, input);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// What it wrote to standard error since the last call.
    pub(crate) fn log(&self) -> String {
        self.log.try_iter().collect::<Vec<_>>().join("\n")
    }

    /// The text of `/metrics`.
    pub(crate) fn metrics(&self) -> String {
        http_get(&self.health, "/metrics")
    }
}

impl Drop for Standalone {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads lines on a thread, so that the process never blocks on its output.
fn drain(from: impl std::io::Read + Send + 'static) -> mpsc::Receiver<String> {
    let (lines, received) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            if lines.send(line).is_err() {
                // Nobody wants the log any more; go on reading.
            }
        }
    });
    received
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// NDJSON, parsed.
pub(crate) fn json_lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .collect()
}

/// A plain HTTP GET; the body of the answer.
pub(crate) fn http_get(address: &str, path: &str) -> String {
    use std::io::Read;
    let mut stream = std::net::TcpStream::connect(address).expect("the health port answers");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket option");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")
        .expect("writable");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("readable");
    answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default()
}
