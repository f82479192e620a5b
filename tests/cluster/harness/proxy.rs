//! A userspace TCP proxy: a network path that a test can cut, freeze and mend.

use std::sync::Arc;

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};

/// What the path does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Pass,
    /// Nothing goes through, nothing is refused: a partition.
    Silent,
}

/// One path to one address.
#[derive(Debug)]
pub(crate) struct Proxy {
    address: String,
    mode: Arc<watch::Sender<Mode>>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// A path to `target`, which passes everything.
    pub(crate) async fn start(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        let mode = Arc::new(watch::Sender::new(Mode::Pass));
        let modes = Arc::clone(&mode);
        let task = tokio::spawn(async move {
            while let Ok((inbound, _)) = listener.accept().await {
                tokio::spawn(forward(inbound, target.clone(), modes.subscribe()));
            }
        });
        Self { address, mode, task }
    }

    /// `host:port` of this end.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// From now on nothing goes through, in either direction, and nobody is told.
    pub(crate) fn cut(&self) {
        self.mode.send_replace(Mode::Silent);
    }

    /// Bytes pass again on new connections; those that were silent are closed.
    pub(crate) fn mend(&self) {
        self.mode.send_replace(Mode::Pass);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Passes bytes until the path is cut; then holds both ends, silent, until it is mended.
async fn forward(mut inbound: TcpStream, target: String, mut mode: watch::Receiver<Mode>) {
    if *mode.borrow_and_update() == Mode::Pass {
        let Ok(mut outbound) = TcpStream::connect(&target).await else { return };
        let _ = (inbound.set_nodelay(true), outbound.set_nodelay(true));
        tokio::select! {
            _ = copy_bidirectional(&mut inbound, &mut outbound) => return,
            _ = mode.wait_for(|mode| *mode == Mode::Silent) => {}
        }
        let _held_till_the_path_is_mended = mode.wait_for(|mode| *mode == Mode::Pass).await;
        return;
    }
    let _held_till_the_path_is_mended = mode.wait_for(|mode| *mode == Mode::Pass).await;
}
