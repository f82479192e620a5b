//! A network that the test can cut in one direction or both.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use geminga_runtime::tasks::Tasks;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};

pub(crate) struct Proxy {
    pub(crate) endpoint: String,
    network: Arc<Network>,
    tasks: Tasks,
}

struct Network {
    target: String,
    requests_lost: AtomicBool,
    answers_lost: AtomicBool,
    cuts: watch::Sender<u64>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.tasks.abort();
    }
}

impl Proxy {
    /// In front of an `http://` endpoint.
    pub(crate) async fn start(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
        let network = Arc::new(Network {
            target: target.trim_start_matches("http://").to_owned(),
            requests_lost: AtomicBool::new(false),
            answers_lost: AtomicBool::new(false),
            cuts: watch::Sender::new(0),
        });
        let tasks = Tasks::new("proxy");
        let (owner, accepted) = (tasks.clone(), Arc::clone(&network));
        tasks.spawn("proxy listener", async move {
            while let Ok((client, _)) = listener.accept().await {
                owner.spawn("proxied connection", Arc::clone(&accepted).carry(client));
            }
        });
        Self { endpoint, network, tasks }
    }

    /// From now on bytes in this direction are swallowed; the connections stay.
    pub(crate) fn lose(&self, requests: bool, answers: bool) {
        self.network.requests_lost.store(requests, Ordering::SeqCst);
        self.network.answers_lost.store(answers, Ordering::SeqCst);
    }

    /// Closes all connections.
    pub(crate) fn cut(&self) {
        self.network.cuts.send_modify(|cuts| *cuts += 1);
    }
}

impl Network {
    async fn carry(self: Arc<Self>, client: TcpStream) {
        let mut cuts = self.cuts.subscribe();
        let Ok(server) = TcpStream::connect(&self.target).await else { return };
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        tokio::select! {
            _ = cuts.changed() => {}
            () = pump(from_client, to_server, &self.requests_lost) => {}
            () = pump(from_server, to_client, &self.answers_lost) => {}
        }
    }
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    lost: &AtomicBool,
) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        if !lost.load(Ordering::SeqCst) && to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
