//! A process of the test: its output goes to a file, signals go to it by pid, and it is gone when the test is.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};

use super::eventually;

/// A running process.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it; standard output and error are appended to `<directory>/<name>.log`.
    pub(crate) fn start(name: &str, mut command: Command, directory: &Path) -> Self {
        let log = directory.join(format!("{name}.log"));
        let open = || File::options().create(true).append(true).open(&log).expect("a log file");
        let child = command
            .stdin(Stdio::null())
            .stdout(open())
            .stderr(open())
            .spawn()
            .unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        Self { name: name.to_owned(), child, log }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it lives");
    }

    /// `kill -9`, and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it can be waited for");
    }

    /// SIGTERM, and waits for its orderly end.
    ///
    /// # Panics
    /// If it does not end, or not with success.
    pub(crate) async fn terminate(&mut self) {
        self.signal(Signal::TERM);
        let code = self.ended().await;
        assert_eq!(code, Some(0), "{} ends orderly:\n{}", self.name, self.log());
    }

    /// Its exit code, once it has ended.
    pub(crate) async fn ended(&mut self) -> Option<i32> {
        let what = format!("{} ends", self.name);
        let child = &mut self.child;
        eventually(&what, async || child.try_wait().expect("it can be waited for")).await.code()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("it can be waited for").is_some()
    }

    /// All it wrote so far, earlier runs of the same name included.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until it wrote this.
    pub(crate) async fn wrote(&mut self, text: &str) {
        let what = format!("{} writes {text:?}", self.name);
        let log = self.log.clone();
        let deadline = tokio::time::Instant::now() + super::PATIENCE;
        while !fs::read_to_string(&log).unwrap_or_default().contains(text) {
            assert!(!self.has_ended(), "{what}, but it ended:\n{}", self.log());
            assert!(tokio::time::Instant::now() < deadline, "not in time: {what}\n{}", self.log());
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A stopped process takes SIGKILL all the same.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
